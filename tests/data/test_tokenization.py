import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_tspin.config import Config
from megatron_tspin.data.annotated import read_examples
from megatron_tspin.data.indexed import Documents, open_documents
from megatron_tspin.data.preview import preview
from megatron_tspin.data.template import PromptTemplate
from megatron_tspin.data.tokenization import load_run_tokenizer, tokenize_run
from megatron_tspin.data.user_examples import read_annotated
from megatron_tspin.errors import InputError
from megatron_tspin.run_folder import RunFolder, document_stem, examples_path, file_of

ConfigOf = Callable[..., Config]
TEMPLATE = "Q {prompt} A "


def line(prompt: str, response: str = "yes", **more: Any) -> dict[str, Any]:
    return {"prompt": prompt, "response": response, **more}


TRAIN = [line("one {x}", gold=1), line("two", "2" * 9, id="b"), line("three")]
HELD_OUT = [line("four"), line("five")]


def documents(config: Config, split: str, key: str) -> Documents:
    return open_documents(document_stem(RunFolder(Path(config.run_dir)).data, split, key))


def ids_of_examples(config: Config, split: str) -> list[str]:
    return [example.id for example in read_examples(examples_path(RunFolder(Path(config.run_dir)).data, split))]


def outputs(config: Config) -> dict[str, tuple[int, bytes]]:
    folder = RunFolder(Path(config.run_dir)).data
    return {path.name: (path.stat().st_ino, path.read_bytes()) for path in sorted(folder.iterdir())}


def test_examples_and_documents_are_in_the_same_order(config_of: ConfigOf) -> None:
    config = config_of(TRAIN, HELD_OUT, template=TEMPLATE)
    tokenize_run(config)
    tokenizer = load_run_tokenizer(config)
    for split, lines in (("train", TRAIN), ("held_out", HELD_OUT)):
        prompts, responses = documents(config, split, "prompt"), documents(config, split, "annotated")
        examples = read_examples(examples_path(RunFolder(Path(config.run_dir)).data, split))
        assert [example.record for example in examples] == lines
        assert [tokenizer.decode(ids) for ids in prompts] == [f"Q {item['prompt']} A " for item in lines]
        assert [tokenizer.decode(ids) for ids in responses] == [item["response"] for item in lines]
        assert all(
            ids[-1] == tokenizer.endings.closing and tokenizer.endings.closing not in ids[:-1] for ids in responses
        )
    assert ids_of_examples(config, "train") == ["1", "b", "3"]


def test_stored_prompt_ids_are_what_generation_would_make(config_of: ConfigOf) -> None:
    for template in (TEMPLATE, "chat"):
        config = config_of(TRAIN, template=template)
        tokenize_run(config)
        examples = read_examples(examples_path(RunFolder(Path(config.run_dir)).data, "train"))
        again = PromptTemplate(template, load_run_tokenizer(config)).prompt_ids(examples)
        assert list(documents(config, "train", "prompt")) == again


def test_a_second_run_rewrites_nothing(config_of: ConfigOf) -> None:
    config = config_of(TRAIN, HELD_OUT)
    tokenize_run(config)
    before = outputs(config)
    assert len(before) == 2 * (1 + 2 * 3)
    tokenize_run(config)
    assert outputs(config) == before


@pytest.mark.parametrize("change", [{"seq_length": 100}, {"template": "chat"}, {"over_long": "drop"}])
def test_a_changed_setting_tokenizes_again(config_of: ConfigOf, change: dict[str, Any]) -> None:
    tokenize_run(config_of(TRAIN))
    config = config_of(TRAIN, **change)
    before = outputs(config)
    tokenize_run(config)
    assert outputs(config)["train_prompt_document.json"] != before["train_prompt_document.json"]


def test_documents_of_another_rule_for_responses_are_made_again(
    config_of: ConfigOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_of(TRAIN)
    monkeypatch.setattr("megatron_tspin.data.tokenization.RESPONSE_RULE", 1)
    tokenize_run(config)
    before = outputs(config)
    monkeypatch.undo()
    tokenize_run(config)
    assert outputs(config)["train_annotated_document.json"] != before["train_annotated_document.json"]


def test_changed_examples_tokenize_only_their_split_again(config_of: ConfigOf) -> None:
    tokenize_run(config_of(TRAIN, HELD_OUT))
    config = config_of(TRAIN, [line("six")])
    before = outputs(config)
    tokenize_run(config)
    after = outputs(config)
    assert ids_of_examples(config, "held_out") == ["1"]
    assert {name for name in after if after[name] != before[name]} == {n for n in after if n.startswith("held_out")}


@pytest.mark.parametrize(
    "name", ["train.jsonl", "train_prompt_document.bin", "train_annotated_document.idx", "train_prompt_document.json"]
)
@pytest.mark.parametrize("damage", ["delete", "change"])
def test_damaged_outputs_are_written_again_to_the_same_bytes(config_of: ConfigOf, name: str, damage: str) -> None:
    config = config_of(TRAIN)
    tokenize_run(config)
    before = {key: content for key, (_, content) in outputs(config).items()}
    path = RunFolder(Path(config.run_dir)).data / name
    if damage == "delete":
        path.unlink()
    else:
        content = path.read_bytes()
        path.write_bytes(content[:-3] + b"\x00\x00\x00")
    tokenize_run(config)
    assert {key: content for key, (_, content) in outputs(config).items()} == before


def test_prompts_without_room_are_refused_in_one_report(config_of: ConfigOf) -> None:
    config = config_of([line("x" * 40), line("ok"), line("y" * 50, id="long")], seq_length=32, template="{prompt}")
    (short, long) = PromptTemplate("{prompt}", load_run_tokenizer(config)).prompt_ids(
        [example for example in read_annotated(Path(config.data.annotated)) if example.id != "2"]
    )
    with pytest.raises(InputError) as caught:
        tokenize_run(config)
    first, second, remedy = str(caught.value).splitlines()
    source = config.data.annotated
    assert first.startswith(f"{source}:1: id '1': the prompt has {len(short)} tokens, with --tspin-max-new-tokens 4")
    assert second.startswith(f"{source}:3: id 'long': the prompt has {len(long)} tokens")
    assert f"raise --seq-length to {len(long) + 4} " in remedy
    assert not list(RunFolder(Path(config.run_dir)).data.iterdir())
    tokenize_run(config_of([line("x" * 40), line("y" * 50)], seq_length=len(long) + 4, template="{prompt}"))


def test_an_error_in_the_held_out_file_leaves_nothing_behind(config_of: ConfigOf) -> None:
    config = config_of(TRAIN, [line("x" * 400)], seq_length=32, template="{prompt}")
    with pytest.raises(InputError, match=r"held_out\.jsonl:1: "):
        tokenize_run(config)
    assert not list(RunFolder(Path(config.run_dir)).data.iterdir())


def test_a_prompt_without_tokens_is_refused(
    config_of: ConfigOf, hf_folder_factory: Callable[..., Path], tmp_path: Path
) -> None:
    folder = hf_folder_factory(tmp_path / "silent", chat="{{ '' }}")
    config = config_of(TRAIN, template="chat").model_dump()
    config["model"]["hf_checkpoint"] = str(folder)
    with pytest.raises(InputError, match=r"train\.jsonl:2: id 'b': the prompt has no tokens"):
        tokenize_run(Config.model_validate(config))


OVER_LONG = [line("a"), line("b", "z" * 60, id="long"), line("c")]


def test_an_annotated_response_that_does_not_fit_is_refused_by_default(config_of: ConfigOf) -> None:
    config = config_of(OVER_LONG, seq_length=32, template="{prompt}")
    with pytest.raises(InputError, match=r"train\.jsonl:2: id 'long': prompt and annotated response have \d+ \+ \d+"):
        tokenize_run(config)


def test_drop_leaves_the_example_out_everywhere(config_of: ConfigOf, caplog: pytest.LogCaptureFixture) -> None:
    config = config_of(OVER_LONG, seq_length=32, template="{prompt}", over_long="drop")
    with caplog.at_level(logging.WARNING):
        tokenize_run(config)
    assert ids_of_examples(config, "train") == ["1", "3"]
    assert len(documents(config, "train", "prompt")) == len(documents(config, "train", "annotated")) == 2
    assert "train: dropped 1 of 3 examples over 32 tokens: long" in caplog.text
    everything = config_of([OVER_LONG[1]], seq_length=32, template="{prompt}", over_long="drop")
    with pytest.raises(InputError, match="no example fits"):
        tokenize_run(everything)


def test_truncate_fills_the_sequence_and_leaves_eos_out(config_of: ConfigOf, caplog: pytest.LogCaptureFixture) -> None:
    config = config_of(OVER_LONG, seq_length=32, template="{prompt}", over_long="truncate")
    with caplog.at_level(logging.WARNING):
        tokenize_run(config)
    prompt, response = documents(config, "train", "prompt")[1], documents(config, "train", "annotated")[1]
    assert len(prompt) + len(response) == 32
    assert load_run_tokenizer(config).endings.closing not in response
    assert "train: truncated the responses of 1 of 3 examples over 32 tokens: long" in caplog.text


def test_a_response_that_exactly_fits_is_kept_whole(config_of: ConfigOf) -> None:
    tokenizer = load_run_tokenizer(config_of(OVER_LONG))
    (ids,) = tokenizer.encode_batch(["z" * 60], add_special_tokens=False)
    (prompt,) = tokenizer.encode_batch(["b"], add_special_tokens=True)
    fitting = len(prompt) + len(ids) + 1
    config = config_of(OVER_LONG, seq_length=fitting, template="{prompt}")
    tokenize_run(config)
    assert documents(config, "train", "annotated")[1] == [*ids, tokenizer.endings.closing]
    with pytest.raises(InputError, match=f"raise --seq-length to {fitting} "):
        tokenize_run(config_of(OVER_LONG, seq_length=fitting - 1, template="{prompt}"))


def test_eos_is_not_doubled_and_an_early_one_is_reported(config_of: ConfigOf, caplog: pytest.LogCaptureFixture) -> None:
    config = config_of([line("a", "yes</s>"), line("b", "ye</s>s")])
    with caplog.at_level(logging.WARNING):
        tokenize_run(config)
    eos = load_run_tokenizer(config).endings.closing
    assert [ids.count(eos) for ids in documents(config, "train", "annotated")] == [1, 2]
    assert "1 of 2 annotated responses hold a token that ends responses before their end: 2" in caplog.text


def test_prompts_in_both_splits_are_counted(config_of: ConfigOf, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        tokenize_run(config_of(TRAIN, [line("two"), line("nine"), line("three")]))
    assert "2 held-out prompts are also training prompts" in caplog.text


def test_a_tokenizer_that_is_too_large_is_refused_first(
    config_of: ConfigOf, hf_folder_factory: Callable[..., Path], tmp_path: Path
) -> None:
    folder = hf_folder_factory(tmp_path / "small", checkpoint={"vocab_size": 100})
    config = config_of(TRAIN).model_dump()
    config["model"]["hf_checkpoint"] = str(folder)
    with pytest.raises(InputError, match="vocab_size is 100"):
        tokenize_run(Config.model_validate(config))


def test_a_sentencepiece_tokenizer_of_its_own(config_of: ConfigOf, sentencepiece_model: Path) -> None:
    config = config_of(TRAIN).model_dump()
    config["model"]["tokenizer"] = str(sentencepiece_model)
    loaded = Config.model_validate(config)
    tokenize_run(loaded)
    tokenizer = load_run_tokenizer(loaded)
    assert [tokenizer.decode(ids) for ids in documents(loaded, "train", "annotated")] == ["yes", "2" * 9, "yes"]


def test_more_examples_than_a_batch(config_of: ConfigOf, monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_of([line(f"number {n}", "x" * (1 + n % 3)) for n in range(10)])
    monkeypatch.setattr("megatron_tspin.data.encoding._BATCH", 3)
    tokenize_run(config)
    small = outputs(config)
    monkeypatch.undo()
    file_of(document_stem(RunFolder(Path(config.run_dir)).data, "train", "prompt"), "json").unlink()
    tokenize_run(config)
    assert {k: v[1] for k, v in outputs(config).items()} == {k: v[1] for k, v in small.items()}
    assert ids_of_examples(config, "train") == [str(n) for n in range(1, 11)]


def test_special_tokens_in_the_data_are_counted(config_of: ConfigOf, caplog: pytest.LogCaptureFixture) -> None:
    texts = [("a<|user|>b", "c"), ("a", "b"), ("q", "x <s>")]
    lines = [line(prompt, response) for prompt, response in texts]
    tokenize_run(config_of(lines))
    assert "1 of 3 examples hold the text of the special token '<|user|>', which becomes that token: 1" in caplog.text
    assert "1 of 3 examples hold the text of the special token '<s>', which becomes that token: 3" in caplog.text
    assert "'</s>'" not in caplog.text.replace("close with '</s>'", "")


def test_a_preview_shows_tokens_and_writes_nothing(config_of: ConfigOf) -> None:
    config = config_of([{"prompt": "a", "response": "b"}, {"prompt": "c", "response": "d"}])
    ((identifier, tokens),) = preview(config, 1)
    (prompt,), (response,) = ([[token.id for token in tokens if token.part == part]] for part in ("prompt", "response"))
    template = PromptTemplate(config.data.template, load_run_tokenizer(config))
    assert template.encode(read_annotated(Path(config.data.annotated))[:1]) == ([prompt], [response])
    assert identifier == "1" and tokens[-1].special and tokens[-1].text == "</s>"
    assert [token.special for token in tokens if token.text.startswith("<")] == [True] * 2
    assert not Path(config.run_dir).exists()
