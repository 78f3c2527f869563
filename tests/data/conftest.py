import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from megatron_tspin.config import Config

os.environ.setdefault("HF_HUB_OFFLINE", "1")

CORPUS = [
    "### Instruction: What is 3 + 4?\n\n### Response: 7",
    "def area(width, height):\n    return {'area': width * height}",
    "Grüße aus Köln, übermäßig höflich. 你好。",
]
CHAT = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def build_hf_folder(
    folder: Path,
    *,
    eos: str | None = "</s>",
    chat: str | None = CHAT,
    post: str | None = "<s> $A",
    checkpoint: dict[str, Any] | None = None,
) -> Path:
    """A byte-level BPE tokenizer, with truncation and padding left on as some published files have it."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<s>", "</s>", "<pad>", "<|user|>", "<|assistant|>", "<|system|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    if post is not None:
        ids = [(token, tokenizer.token_to_id(token)) for token in ("<s>", "</s>")]
        tokenizer.post_processor = processors.TemplateProcessing(single=post, special_tokens=ids)
    tokenizer.enable_truncation(8)
    tokenizer.enable_padding(length=16, pad_id=2, pad_token="<pad>")
    tokenizer.save(str(folder / "tokenizer.json"))
    settings: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>"}
    if eos is not None:
        settings["eos_token"] = eos
    if chat is not None:
        settings["chat_template"] = chat
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    config = {"model_type": "llama", "vocab_size": 512} | (checkpoint or {})
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="session")
def hf_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_hf_folder(tmp_path_factory.mktemp("hf"))


@pytest.fixture(scope="session")
def hf_folder_factory() -> Callable[..., Path]:
    return build_hf_folder


@pytest.fixture(scope="session")
def sentencepiece_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import sentencepiece

    folder = tmp_path_factory.mktemp("sp")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS * 4),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=330,
        byte_fallback=True,
        model_type="bpe",
        hard_vocab_limit=False,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    return folder / "tokenizer.model"


def write_lines(path: Path, lines: list[Any]) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def jsonl() -> Callable[[Path, list[Any]], Path]:
    return write_lines


@pytest.fixture
def config_of(tmp_path: Path, hf_folder: Path) -> Callable[..., Config]:
    """Builds the config of a run over lines of examples; keyword arguments are settings of `data`."""

    def build(train: list[Any], held_out: list[Any] | None = None, max_new_tokens: int = 4, **data: Any) -> Config:
        data["annotated"] = str(write_lines(tmp_path / "train.jsonl", train))
        if held_out is not None:
            data["held_out"] = str(write_lines(tmp_path / "held_out.jsonl", held_out))
        return Config.model_validate(
            {
                "run_dir": str(tmp_path / "run"),
                "model": {"hf_checkpoint": str(hf_folder)},
                "data": data,
                "generation": {"max_new_tokens": max_new_tokens},
            }
        )

    return build
