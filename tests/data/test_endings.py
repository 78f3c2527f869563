"""Which token closes an annotated response, and at which a sampled one stops, as published checkpoints say it."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_tspin.config import Config
from megatron_tspin.data.annotated import Example
from megatron_tspin.data.endings import Endings
from megatron_tspin.data.template import PromptTemplate
from megatron_tspin.data.tokenization import load_run_tokenizer
from megatron_tspin.data.tokenizer_loading import load_tokenizer
from megatron_tspin.errors import InputError

# The fixture's special tokens, in the order of their ids.
BOS, EOS, PAD, USER, ASSISTANT = range(5)
TURNS = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% if m.role == 'assistant' %}%END%{% endif %}{% endfor %}"
)


def run_config(folder: Path, **data: Any) -> Config:
    settings = {"annotated": "a.jsonl", "seq_length": 64, "template": "Q {prompt} A ", **data}
    tree = {"run_dir": "run", "model": {"hf_checkpoint": str(folder)}, "data": settings}
    return Config.model_validate({**tree, "generation": {"max_new_tokens": 8}})


def write_generation_config(folder: Path, **settings: Any) -> None:
    (folder / "generation_config.json").write_text(json.dumps(settings))


@pytest.mark.parametrize(
    ("own", "config", "generation", "expected"),
    [
        ("</s>", {"eos_token_id": 4}, None, Endings(EOS, frozenset([EOS, 4]))),
        ("</s>", {"eos_token_id": 4}, [5, 1], Endings(EOS, frozenset([EOS, 5]))),
        ("<pad>", {"eos_token_id": 1}, [2, 1], Endings(EOS, frozenset([EOS, PAD]))),
        ("<pad>", {}, None, Endings(PAD, frozenset([PAD]))),
        (None, {"eos_token_id": [3, 4]}, None, Endings(3, frozenset([3, 4]))),
        (None, {"eos_token_id": [3, 4]}, 4, Endings(4, frozenset([4]))),
        (None, {"eos_token_id": [3, 4]}, [], Endings(3, frozenset([3, 4]))),
    ],
)
def test_what_the_files_say(
    hf_folder_factory: Callable[..., Path],
    tmp_path: Path,
    own: str | None,
    config: dict[str, Any],
    generation: Any,
    expected: Endings,
) -> None:
    folder = hf_folder_factory(tmp_path / "hf", eos=own, checkpoint=config)
    if generation is not None:
        write_generation_config(folder, eos_token_id=generation)
    assert load_tokenizer(str(folder)).endings == expected
    assert load_run_tokenizer(run_config(folder)).endings == expected


def test_the_checkpoint_says_it_for_a_tokenizer_of_its_own(
    hf_folder_factory: Callable[..., Path], tmp_path: Path
) -> None:
    checkpoint = hf_folder_factory(tmp_path / "hf", checkpoint={"eos_token_id": [1, 4]})
    other = hf_folder_factory(tmp_path / "other", checkpoint={"eos_token_id": 5})
    config = run_config(checkpoint)
    config = config.model_copy(update={"model": config.model.model_copy(update={"tokenizer": str(other)})})
    assert load_run_tokenizer(config).endings.stops == {1, 4}


@pytest.mark.parametrize(
    ("end", "closing"),
    [("<|user|>", USER), (" <|user|>\n", USER), ("</s>\n", EOS), ("\n", EOS), ("", EOS), ("\n<pad></s>", PAD)],
)
def test_a_chat_closes_as_its_template_does(
    hf_folder_factory: Callable[..., Path], tmp_path: Path, end: str, closing: int
) -> None:
    folder = hf_folder_factory(tmp_path / "hf", chat=TURNS.replace("%END%", end))
    tokenizer = load_run_tokenizer(run_config(folder, template="chat"))
    assert tokenizer.endings == Endings(closing, frozenset([EOS, closing]))
    example = Example(id="a", prompt="x", response="y", record={})
    _, (ids,) = PromptTemplate("chat", tokenizer).encode([example])
    assert ids[-1] == closing and tokenizer.decode(ids) == "y"
    # Around a plain text there are no turns.
    assert load_run_tokenizer(run_config(folder)).endings == Endings(EOS, frozenset([EOS]))


def test_a_template_that_refuses_answers_leaves_it_to_the_files(
    hf_folder_factory: Callable[..., Path], tmp_path: Path
) -> None:
    chat = "{% for m in messages %}{% if m.role != 'user' %}{{ raise_exception('no') }}{% endif %}{% endfor %}"
    folder = hf_folder_factory(tmp_path / "hf", chat=chat)
    assert load_run_tokenizer(run_config(folder, template="chat")).endings.closing == EOS


def test_a_setting_goes_before_all(hf_folder_factory: Callable[..., Path], tmp_path: Path) -> None:
    folder = hf_folder_factory(tmp_path / "hf")
    for template in ("chat", "{prompt}"):
        found = load_run_tokenizer(run_config(folder, template=template, closing_token="<|user|>"))
        assert found.endings == Endings(USER, frozenset([EOS, USER]))
    with pytest.raises(InputError, match=r"data.closing_token = '<end>': the tokenizer has no single token"):
        load_run_tokenizer(run_config(folder, closing_token="<end>"))


def test_endings_are_part_of_the_fingerprint(hf_folder_factory: Callable[..., Path], tmp_path: Path) -> None:
    folder = hf_folder_factory(tmp_path / "hf")
    before = load_run_tokenizer(run_config(folder)).fingerprint
    assert load_run_tokenizer(run_config(folder, closing_token="<pad>")).fingerprint != before
    write_generation_config(folder, eos_token_id=[1, 4])
    assert load_run_tokenizer(run_config(folder)).fingerprint != before


def test_sentencepiece_models_have_several_too(sentencepiece_model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "hf"
    folder.mkdir()
    (folder / "tokenizer.model").write_bytes(sentencepiece_model.read_bytes())
    (folder / "config.json").write_text(json.dumps({"vocab_size": 10_000}))
    own = load_tokenizer(str(folder)).endings.closing
    write_generation_config(folder, eos_token_id=[own, 7])
    tokenizer = load_run_tokenizer(run_config(folder))
    assert tokenizer.endings == Endings(own, frozenset([own, 7]))
    named = load_run_tokenizer(run_config(folder, closing_token=tokenizer.token_text(5)))
    assert named.endings == Endings(5, frozenset([own, 7, 5]))
