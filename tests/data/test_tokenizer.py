import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from megatron_tspin.data.tokenizer import Tokenizer
from megatron_tspin.data.tokenizer_loading import load_tokenizer
from megatron_tspin.data.vocabulary import check_vocabulary, model_vocab_size
from megatron_tspin.errors import InputError

TEXTS = ["What is 3 + 4?", "", "{'a': width}", "Grüße 你好 \U0001f600 " * 9]
any_text = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)


@pytest.fixture(scope="module")
def hf(hf_folder: Path) -> Tokenizer:
    return load_tokenizer(str(hf_folder))


@pytest.fixture(scope="module")
def sp(sentencepiece_model: Path) -> Tokenizer:
    return load_tokenizer(str(sentencepiece_model))


def edit_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize("special", [True, False])
def test_hf_ids_are_those_of_transformers_without_truncation_or_padding(
    hf: Tokenizer, hf_folder: Path, special: bool
) -> None:
    oracle = AutoTokenizer.from_pretrained(str(hf_folder))
    expected = oracle(TEXTS, add_special_tokens=special, truncation=False, padding=False)["input_ids"]
    assert hf.encode_batch(TEXTS, add_special_tokens=special) == expected
    assert len(expected[3]) > 16


def test_hf_threads_change_nothing(hf: Tokenizer, hf_folder: Path) -> None:
    threaded = load_tokenizer(str(hf_folder), threads=2)
    assert threaded.encode_batch(TEXTS * 50, True) == hf.encode_batch(TEXTS * 50, True)


@settings(deadline=None)  # the machines of CI are shared
@given(any_text)
def test_hf_text_survives_the_round_trip(hf: Tokenizer, text: str) -> None:
    (ids,) = hf.encode_batch([text], add_special_tokens=False)
    assert hf.decode(ids) == hf.decode([0, *ids, hf.endings.closing, 2, 500])
    if not any(token < 6 for token in ids):
        assert hf.decode(ids) == text


def test_hf_special_ids_and_size(hf: Tokenizer, hf_folder: Path) -> None:
    vocabulary = json.loads((hf_folder / "tokenizer.json").read_text())["model"]["vocab"]
    assert hf.endings.closing == vocabulary["</s>"]
    assert hf.vocab_size == max(vocabulary.values()) + 1


def test_added_tokens_count_into_the_vocabulary(hf_folder_factory: Callable[..., Path], tmp_path: Path) -> None:
    folder = hf_folder_factory(tmp_path / "hf")
    before = load_tokenizer(str(folder))
    added = {"content": "<extra>", "lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    tokens = json.loads((folder / "tokenizer.json").read_text())["added_tokens"]
    tokens.append(added | {"id": before.vocab_size, "special": True})
    edit_json(folder / "tokenizer.json", added_tokens=tokens)
    after = load_tokenizer(str(folder))
    assert after.vocab_size == before.vocab_size + 1
    assert after.fingerprint != before.fingerprint


def test_the_fingerprint_depends_on_content_alone(
    hf: Tokenizer, hf_folder_factory: Callable[..., Path], tmp_path: Path
) -> None:
    assert load_tokenizer(str(hf_folder_factory(tmp_path / "same"))).fingerprint == hf.fingerprint
    for name, change in {"eos": {"eos": "<|user|>"}, "chat": {"chat": None}, "post": {"post": None}}.items():
        other = load_tokenizer(str(hf_folder_factory(tmp_path / name, **change)))
        assert other.fingerprint != hf.fingerprint, name


def test_a_tokenizer_without_eos_is_refused(hf_folder_factory: Callable[..., Path], tmp_path: Path) -> None:
    folder = hf_folder_factory(tmp_path / "hf", eos=None, checkpoint={"eos_token_id": None})
    with pytest.raises(InputError, match=f"{folder}: .*no EOS token.*set `eos_token`"):
        load_tokenizer(str(folder))


def test_what_is_no_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no tokenizer found"):
        load_tokenizer(str(tmp_path))
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(InputError, match=f"{tmp_path}: the tokenizer cannot be loaded"):
        load_tokenizer(str(tmp_path))
    (tmp_path / "x.model").write_bytes(b"garbage")
    with pytest.raises(InputError, match="x.model: not a SentencePiece model"):
        load_tokenizer(str(tmp_path / "x.model"))


def test_code_of_the_folder_is_not_run(hf_folder_factory: Callable[..., Path], tmp_path: Path) -> None:
    folder = hf_folder_factory(tmp_path / "hf")
    trap = tmp_path / "executed"
    (folder / "evil.py").write_text(f"open({str(trap)!r}, 'w')\nclass Evil: pass\n")
    edit_json(
        folder / "tokenizer_config.json", tokenizer_class="Evil", auto_map={"AutoTokenizer": ["evil.Evil", "evil.Evil"]}
    )
    try:
        load_tokenizer(str(folder))
    except InputError as error:
        assert str(folder) in str(error)
    assert not trap.exists()


def test_chat_rendering(hf: Tokenizer, hf_folder_factory: Callable[..., Path], tmp_path: Path) -> None:
    assert hf.render_chat([{"role": "user", "content": "{x}"}]) == "<|user|>{x}</s><|assistant|>"
    bare = load_tokenizer(str(hf_folder_factory(tmp_path / "bare", chat=None)))
    with pytest.raises(InputError, match="no chat template; give --template"):
        bare.render_chat([{"role": "user", "content": "x"}])
    strict = "{{ raise_exception('no system role') }}"
    refusing = load_tokenizer(str(hf_folder_factory(tmp_path / "strict", chat=strict)))
    with pytest.raises(InputError, match=r"refuses messages of \['system'\]: no system role"):
        refusing.render_chat([{"role": "system", "content": "x"}])


@pytest.mark.parametrize(
    "chat",
    ["{{ messages[0].content + 1 }}", "{% if %}", [{"name": "rag", "template": "x"}]],
    ids=["type", "syntax", "named"],
)
def test_a_chat_template_that_fails_is_named(hf_folder_factory: Callable[..., Path], tmp_path: Path, chat: Any) -> None:
    folder = hf_folder_factory(tmp_path / "hf", chat=chat)
    with pytest.raises(InputError, match=f"{folder}: the chat template refuses"):
        load_tokenizer(str(folder)).render_chat([{"role": "user", "content": "x"}])


@pytest.mark.parametrize("special", [True, False])
def test_sentencepiece_ids_are_the_librarys(sp: Tokenizer, sentencepiece_model: Path, special: bool) -> None:
    oracle = sentencepiece.SentencePieceProcessor(model_file=str(sentencepiece_model))
    assert sp.encode_batch(TEXTS, special) == [oracle.encode(text, add_bos=special) for text in TEXTS]
    assert (sp.endings.closing, sp.vocab_size) == (oracle.eos_id(), len(oracle))


def test_sentencepiece_decodes_and_ignores_special_and_unknown_ids(sp: Tokenizer) -> None:
    (ids,) = sp.encode_batch(["What is 3 + 4? 你"], add_special_tokens=False)
    assert sp.decode(ids) == "What is 3 + 4? 你"
    assert sp.decode([1, *ids, sp.endings.closing, sp.vocab_size + 3]) == "What is 3 + 4? 你"
    with pytest.raises(InputError, match="no chat template"):
        sp.render_chat([{"role": "user", "content": "x"}])


def test_a_folder_with_only_tokenizer_model_is_sentencepiece(sp: Tokenizer, sentencepiece_model: Path) -> None:
    assert load_tokenizer(str(sentencepiece_model.parent)).fingerprint == sp.fingerprint


def test_a_tokenizer_must_fit_the_model(hf: Tokenizer, hf_folder: Path) -> None:
    assert model_vocab_size(hf_folder) == 512
    check_vocabulary(hf, hf.vocab_size)
    with pytest.raises(InputError, match=f"largest id is {hf.vocab_size - 1}.*vocab_size is {hf.vocab_size - 1}"):
        check_vocabulary(hf, hf.vocab_size - 1)


@pytest.mark.parametrize("value", [None, "512", True, 0])
def test_a_checkpoint_without_vocab_size_is_refused(tmp_path: Path, value: Any) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"vocab_size": value}))
    with pytest.raises(InputError, match="`vocab_size` is"):
        model_vocab_size(tmp_path)
