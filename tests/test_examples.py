"""The examples for clusters would be submitted as they are: with their models' shapes, in sparse files of no bytes."""

import json
import shutil
import struct
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models

from megatron_tspin.config import Config
from megatron_tspin.config_source import load_config
from megatron_tspin.doctor.ranks import least_bytes_of_a_rank
from megatron_tspin.selfplay.submission import submit
from tests.selfplay.fake_world import shapes_of

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
SMALL: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False, "eos_token_id": 1, "hidden_size": 1024, "intermediate_size": 4096,
    "num_hidden_layers": 8, "num_attention_heads": 16, "num_key_value_heads": 8, "vocab_size": 32000,
    "max_position_embeddings": 8192, "rope_theta": 10000.0,
}  # fmt: skip
MISTRAL = {
    **SMALL, "architectures": ["MistralForCausalLM"], "model_type": "mistral", "hidden_size": 4096,
    "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32, "max_position_embeddings": 32768,
    "sliding_window": 4096,
}  # fmt: skip
LLAMA3 = {
    **SMALL, "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64,
    "vocab_size": 128256, "rope_theta": 500000.0,
}  # fmt: skip
# Example: the model's config.json, nodes of the job, most GiB of weights, gradients and optimizer on a rank.
CASES = {
    "slurm": (SMALL, 2, 0.3),
    "zephyr_7b": (MISTRAL, 1, 30.0),
    "mistral_7b": (MISTRAL, 1, 30.0),
    "llama3_70b": (LLAMA3, 8, 22.0),
}
Usage = namedtuple("Usage", "total used free")


def write_model(folder: Path, config: dict[str, Any]) -> None:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    tokenizer = Tokenizer(models.WordLevel({"<pad>": 0, "<eos>": 1, "a": 2}, unk_token="<pad>"))
    tokenizer.save(str(folder / "tokenizer.json"))
    template = "{% for message in messages %}{{ message['content'] }}<eos>{% endfor %}"
    facts = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<eos>", "chat_template": template}
    (folder / "tokenizer_config.json").write_text(json.dumps(facts))
    header: dict[str, Any] = {}
    end = 0
    for name, shape in shapes_of(folder).items():
        size = 2
        for length in shape:
            size *= length
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [end, end + size]}
        end += size
    raw = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as stream:
        stream.write(struct.pack("<Q", len(raw)) + raw)
        stream.truncate(8 + len(raw) + end)


@pytest.mark.parametrize("name", CASES)
def test_an_example_is_ready_to_submit(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    architecture, nodes, most = CASES[name]
    example = load_config(EXAMPLES / name / "run.yaml", {})
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(2**50, 0, 2**50))
    write_model(Path(example.model.hf_checkpoint), architecture)
    line = json.dumps({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "a a"}]})
    for path in filter(None, (example.data.annotated, example.data.held_out)):
        Path(path).parent.mkdir(exist_ok=True)
        Path(path).write_text(f"{line}\n" * 64)
    assert submit(example, dry_run=True) is None
    script = (tmp_path / example.run_dir / "submit.sh").read_text()
    assert f"#SBATCH --nodes={nodes}\n" in script and "#SBATCH --gpus-per-node=8\n" in script
    needed = least_bytes_of_a_rank(absolute(example, tmp_path)) / 2**30
    assert 0.5 * most < needed < most


def absolute(example: Config, folder: Path) -> Config:
    model = example.model.model_copy(update={"hf_checkpoint": str(folder / example.model.hf_checkpoint)})
    return example.model_copy(update={"model": model})
