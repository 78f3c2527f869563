"""The tokenizer that an export gets is the run's: its files, its ids in transformers' hands, its ends of answers."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from megatron_tspin.config import Config
from megatron_tspin.data.annotated import Example
from megatron_tspin.data.encoding import EncodedExamples
from megatron_tspin.data.endings import Endings
from megatron_tspin.data.template import PromptTemplate
from megatron_tspin.data.tokenization import load_run_tokenizer
from megatron_tspin.data.tokenizer_export import check_exportable, check_tokenizer, write_endings, write_tokenizer
from megatron_tspin.errors import InputError
from tests.data.tokenizer_kinds import LOSSLESS, sentencepiece_model
from tests.data.tokenizer_kinds import write_tokenizer as write_kind

EXAMPLES = [
    Example(id=str(number), prompt=prompt, response=response, record={})
    for number, (prompt, response) in enumerate([("capital", " Paris is"), (" the\n", "def area"), ("Köln 你", "\tx")])
]


def run_config(checkpoint: Path, tokenizer: Path | None, template: str = "Q {prompt} A ") -> Config:
    tree: dict[str, Any] = {"run_dir": "run", "model": {"hf_checkpoint": str(checkpoint)}}
    tree["model"]["tokenizer"] = None if tokenizer is None else str(tokenizer)
    return Config.model_validate({**tree, "data": {"annotated": "a.jsonl", "template": template}})


def encoded(config: Config) -> EncodedExamples:
    template = PromptTemplate(config.data.template, load_run_tokenizer(config))
    return EncodedExamples(EXAMPLES, *template.encode(EXAMPLES))


@pytest.fixture
def other(hf_folder_factory: Callable[..., Path], tmp_path: Path) -> Path:
    """A checkpoint with a tokenizer that no run here uses."""
    folder = hf_folder_factory(tmp_path / "other", checkpoint={"vocab_size": 1024})
    (folder / "added_tokens.json").write_text(json.dumps({"<never>": 1000}))
    return folder


@pytest.mark.parametrize("kind", LOSSLESS)
def test_transformers_reads_it_as_the_run_did(kind: str, other: Path, tmp_path: Path) -> None:
    config = run_config(other, write_kind(tmp_path / "kind", kind))
    found = encoded(config)
    write_tokenizer(config, other)
    check_tokenizer(config, other, found)
    oracle = AutoTokenizer.from_pretrained(str(other))
    assert [oracle(f"Q {item.prompt} A ")["input_ids"] for item in EXAMPLES] == found.prompts
    assert not (other / "added_tokens.json").exists()


def test_a_bare_sentencepiece_model(other: Path, tmp_path: Path) -> None:
    model = tmp_path / "mine.model"
    model.write_bytes(sentencepiece_model("unigram"))
    config = run_config(other, model)
    prompts = encoded(config).prompts
    write_tokenizer(config, other)
    assert (other / "tokenizer.model").read_bytes() == model.read_bytes()
    oracle = AutoTokenizer.from_pretrained(str(other))
    assert [oracle(f"Q {item.prompt} A ")["input_ids"] for item in EXAMPLES] == prompts


def test_a_chat_template_comes_along(hf_folder_factory: Callable[..., Path], other: Path, tmp_path: Path) -> None:
    chat = "{% for m in messages %}[{{ m.content }}]{% endfor %}"
    mine = hf_folder_factory(tmp_path / "mine", chat=None, checkpoint={"vocab_size": 1024})
    (mine / "chat_template.jinja").write_text(chat)
    config = run_config(other, mine, "chat")
    check_exportable(config, encoded(config))
    write_tokenizer(config, other)
    assert AutoTokenizer.from_pretrained(str(other)).chat_template == chat


def test_other_ids_are_refused_with_both(other: Path, tmp_path: Path) -> None:
    mine = write_kind(tmp_path / "kind", "byte level")
    config = run_config(other, mine)
    prompts, responses = encoded(config).prompts, encoded(config).responses
    for changed, what in (
        ((prompts, [responses[0], [7, *responses[1]], responses[2]]), "the response of example '1' has ids [7, "),
        (([[9, *prompts[0]], *prompts[1:]], responses), "the prompt of example '0' has ids [9, "),
    ):
        with pytest.raises(InputError) as caught:
            check_exportable(config, EncodedExamples(EXAMPLES, *changed))
        assert str(caught.value).startswith(f"{mine}: ") and what in str(caught.value)


@pytest.mark.parametrize(
    ("before", "endings", "after"),
    [
        (None, Endings(1, frozenset([1, 4])), [1, 4]),
        ([4, 1], Endings(1, frozenset([1, 4])), None),
        ([4], Endings(1, frozenset([1])), 1),
        (1, Endings(4, frozenset([1, 4])), [4, 1]),
    ],
)
def test_configs_name_the_ends(before: Any, endings: Endings, after: Any, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"vocab_size": 8}')
    path = tmp_path / "generation_config.json"
    if before is not None:
        path.write_text(json.dumps({"temperature": 0.6, "eos_token_id": before}))
    text = path.read_bytes() if before is not None else b""
    write_endings(endings, tmp_path)
    if after is None:
        assert path.read_bytes() == text
        return
    found = json.loads(path.read_text())
    assert found["eos_token_id"] == json.loads((tmp_path / "config.json").read_text())["eos_token_id"] == after
    assert found.get("temperature") == (0.6 if before is not None else None)
