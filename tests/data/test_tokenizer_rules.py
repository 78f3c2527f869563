"""A tokenizer.json means what it says, also where transformers would read it in another way."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from megatron_tspin.config import Config
from megatron_tspin.data.annotated import Example
from megatron_tspin.data.encoding import EncodedExamples
from megatron_tspin.data.template import PromptTemplate
from megatron_tspin.data.tokenization import load_run_tokenizer, tokenize_run
from megatron_tspin.data.tokenizer_export import check_exportable
from megatron_tspin.data.tokenizer_loading import load_tokenizer
from megatron_tspin.data.user_examples import read_annotated, read_prompts
from megatron_tspin.errors import InputError
from tests.data.tokenizer_kinds import LOSSLESS, LOSSY, sentencepiece_model, write_tokenizer

WIDE = "the mat ＡＢＣ"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A Unigram tokenizer that transformers' LlamaTokenizerFast builds anew as one without its NFKC."""
    found = tmp_path / "hf"
    found.mkdir()
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=40, special_tokens=["<unk>", "<s>", "</s>"], unk_token="<unk>", show_progress=False
    )
    tokenizer.train_from_iterator(["the cat sat on the mat ABC"] * 50, trainer)
    tokenizer.save(str(found / "tokenizer.json"))
    named = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "tokenizer_class": "LlamaTokenizerFast"}
    (found / "tokenizer_config.json").write_text(json.dumps(named))
    (found / "config.json").write_text(json.dumps({"model_type": "llama", "vocab_size": 64}))
    return found


def run_config(folder: Path, **model: Any) -> Config:
    tree: dict[str, Any] = {"run_dir": str(folder.parent / "run"), "model": {"hf_checkpoint": str(folder), **model}}
    data = {"annotated": str(folder.parent / "a.jsonl"), "template": "{prompt}", "seq_length": 64}
    return Config.model_validate({**tree, "data": data, "generation": {"max_new_tokens": 8}})


def test_a_class_that_builds_other_rules_is_refused_with_both(folder: Path) -> None:
    with pytest.raises(InputError) as caught:
        load_tokenizer(str(folder))
    assert str(caught.value).startswith(f"{folder}: ") and "in another way than tokenizer.json: of " in str(
        caught.value
    )
    assert "set model.tokenizer_rules" in str(caught.value)


def test_who_is_believed(folder: Path) -> None:
    rules = Tokenizer.from_file(str(folder / "tokenizer.json"))
    expected = rules.encode(WIDE, add_special_tokens=False).ids
    item = Example(id="a", prompt=WIDE, response="the", record={})
    for believed, same in (("tokenizer.json", True), ("transformers", False)):
        config = run_config(folder, tokenizer_rules=believed)
        tokenizer = load_run_tokenizer(config)
        assert (tokenizer.encode_batch([WIDE], add_special_tokens=False) == [expected]) is same
        check_exportable(config, EncodedExamples([item], *PromptTemplate("{prompt}", tokenizer).encode([item])))


def test_the_runs_own_texts_are_compared_too(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megatron_tspin.data.hf_tokenizer.SAMPLE", ())
    config = run_config(folder)
    Path(config.data.annotated).write_text(json.dumps({"prompt": "the", "response": WIDE}))
    with pytest.raises(InputError, match=f"of '{WIDE}' it makes"):
        tokenize_run(config)
    assert not Path(config.run_dir).exists()


@pytest.mark.parametrize("place", ["added_tokens.json", "tokenizer_config.json"])
def test_tokens_beside_a_sentencepiece_model_are_refused(place: str, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(sentencepiece_model("bpe"))
    size = load_tokenizer(str(tmp_path)).vocab_size
    inside, beside = {"</s>": 2}, {"</s>": 2, "<|im_end|>": size}
    for added in (inside, beside):
        decoder = {number: {"content": text} for text, number in added.items()}
        content = added if place == "added_tokens.json" else {"added_tokens_decoder": decoder}
        (tmp_path / place).write_text(json.dumps(content))
        if added is inside:
            load_tokenizer(str(tmp_path))
            continue
        with pytest.raises(InputError, match=r"cannot hold: <\|im_end\|>; make a tokenizer.json"):
            load_tokenizer(str(tmp_path))


texts = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=30).filter(str.strip)
marked = st.one_of(
    texts, st.lists(st.sampled_from(["</s>", " ", "<s>", "a", "é", "\n", "Paris"]), min_size=1).map("".join)
)


@pytest.fixture(scope="module")
def kinds(tmp_path_factory: pytest.TempPathFactory) -> Any:
    base = tmp_path_factory.mktemp("kinds")
    return {kind: write_tokenizer(base / kind.replace(" ", "_"), kind) for kind in (*LOSSLESS, *LOSSY)}


@pytest.mark.parametrize("kind", [*LOSSLESS, *LOSSY])
@settings(max_examples=8, derandomize=True, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(prompt=marked.filter(str.strip), response=marked.filter(str.strip))
def test_every_command_makes_the_same_ids(kind: str, kinds: Any, tmp_path: Path, prompt: str, response: str) -> None:
    """`run` and `tokenize`, `score`, `generate` and the parity gate, and tokenizer.json itself."""
    from megatron_tspin.conversion.parity import read_sentences
    from megatron_tspin.training.scoring_input import read_scoring_input

    folder, data = kinds[kind], tmp_path / "data.jsonl"
    data.write_text(json.dumps({"prompt": prompt, "response": response}) + "\n")
    config = run_config(folder)
    tokenizer = load_tokenizer(str(folder))
    template = PromptTemplate("{prompt}", tokenizer)
    (run_prompt,), (run_response,) = template.encode(read_annotated(data))
    assert read_scoring_input(config, data, 1024)[1] == [(run_prompt, run_response)]
    assert template.prompt_ids(read_prompts(data)) == [run_prompt]
    (sentence,) = read_sentences(folder, data)
    assert sentence.prompt_ids == run_prompt
    assert run_response in (sentence.response_ids, [*sentence.response_ids, tokenizer.endings.closing])
    if (folder / "tokenizer.json").is_file():
        rules = Tokenizer.from_file(str(folder / "tokenizer.json"))
        bos, ids = rules.token_to_id("<s>"), rules.encode(prompt).ids
        assert run_prompt == (ids[1:] if ids[:2] == [bos, bos] else ids)  # the text's own, or the tokenizer's: once
