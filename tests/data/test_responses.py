"""A response becomes the ids of a text that goes on from its prompt, in every command and under every tokenizer."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from megatron_tspin.config import PAPER_TEMPLATE, Config
from megatron_tspin.data.annotated import Example
from megatron_tspin.data.template import PromptTemplate
from megatron_tspin.data.tokenizer import Tokenizer
from megatron_tspin.data.tokenizer_loading import load_tokenizer
from tests.data.tokenizer_kinds import LOSSLESS, LOSSY, write_tokenizer

Folders = Callable[[str], Path]
TEMPLATES = (PAPER_TEMPLATE, "Q:{prompt}", "Q{prompt}\n", "Q {prompt} Respon")
texts = st.text(st.sampled_from("Paris ito.'12\n\t\u00a0é\u0301\u0308你好，世\U0001f600\u200d\U0001f44d"), min_size=1)


@pytest.fixture(scope="session")
def folder_of(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    """The folder of a tokenizer, by kind."""
    root = tmp_path_factory.mktemp("kinds")

    def get(kind: str) -> Path:
        folder = root / kind.replace(" ", "_")
        return folder if folder.is_dir() else write_tokenizer(folder, kind)

    return get


@pytest.fixture(scope="session")
def tokenizer_of(folder_of: Folders) -> Callable[[str], Tokenizer]:
    loaded: dict[str, Tokenizer] = {}

    def get(kind: str) -> Tokenizer:
        if kind not in loaded:
            loaded[kind] = load_tokenizer(str(folder_of(kind)))
        return loaded[kind]

    return get


def pair(prompt: str, response: str) -> Example:
    return Example(id="1", prompt=prompt, response=response, record={})


@pytest.mark.parametrize("kind", LOSSLESS)
@settings(deadline=None, max_examples=60)  # the machines of CI are shared
@given(prompt=texts, response=texts, template=st.sampled_from(TEMPLATES))
@example(prompt="capital", response="Paris", template=PAPER_TEMPLATE)
@example(prompt="capital", response=" Paris", template=PAPER_TEMPLATE)
@example(prompt="capital", response=" Paris", template="Q:{prompt}")
@example(prompt="a", response="se", template="Q {prompt} Respon")
@example(prompt="e", response="\u0301", template="Q:{prompt}")
def test_prompt_and_response_decode_to_their_joined_text(
    tokenizer_of: Callable[[str], Tokenizer], kind: str, prompt: str, response: str, template: str
) -> None:
    tokenizer = tokenizer_of(kind)
    wrapped, item = PromptTemplate(template, tokenizer), pair(prompt, response)
    (prompt_ids,), (response_ids,) = wrapped.encode([item])
    assert [prompt_ids] == wrapped.prompt_ids([item])
    assert response_ids[-1] == tokenizer.endings.closing and tokenizer.endings.closing not in response_ids[:-1]
    before = " " if kind == "byte level, prefix" else ""  # whose decoder leaves the space at the start
    assert tokenizer.decode(prompt_ids + response_ids) == before + wrapped.text(item) + response


@pytest.mark.parametrize("kind", LOSSLESS)
def test_no_space_comes_before_an_answer(tokenizer_of: Callable[[str], Tokenizer], kind: str) -> None:
    """What was sampled after `Response: ` need not begin with a space, so what is annotated must not either."""
    tokenizer = tokenizer_of(kind)
    (prompt,), (response,) = PromptTemplate(PAPER_TEMPLATE, tokenizer).encode([pair("capital", "Paris is")])
    texts_so_far = [tokenizer.decode([*prompt, *response[:count]]) for count in (0, 1)]
    assert texts_so_far[0].endswith("Response: ") and texts_so_far[1][len(texts_so_far[0])] == "P"


@pytest.mark.parametrize(
    ("kind", "template", "response", "expected"),
    [
        ("t5", PAPER_TEMPLATE, "Paris is", "### Instruction: is ### Response: Paris is"),
        ("t5", "{prompt} <|assistant|>", " Paris\nis", "is Paris is"),
        ("sentencepiece nfkc", PAPER_TEMPLATE, "Paris is", "### Instruction: is ### Response: Paris is"),
        ("sentencepiece nfkc", "{prompt}:", " Paris", "is: Paris"),
        ("sentencepiece nfkc", "{prompt} Respon", "se", "is Response"),
        ("sentencepiece squeezed", PAPER_TEMPLATE, "Paris is", "### Instruction: is\n\n### Response: Paris is"),
        ("sentencepiece squeezed", "{prompt}:\n", "Paris", "is:\nParis"),
        ("sentencepiece squeezed", "{prompt}:\n", " Paris", "is:\n Paris"),
        ("bert", PAPER_TEMPLATE, "Paris is", "# # # instruction : is # # # response : paris is"),
    ],
)
def test_a_tokenizer_that_drops_spaces_keeps_words_apart(
    tokenizer_of: Callable[[str], Tokenizer], kind: str, template: str, response: str, expected: str
) -> None:
    tokenizer = tokenizer_of(kind)
    (prompt_ids,), (response_ids,) = PromptTemplate(template, tokenizer).encode([pair("is", response)])
    assert tokenizer.decode(prompt_ids + response_ids) == expected


@pytest.mark.parametrize("kind", [*LOSSLESS, *LOSSY])
def test_a_batch_gives_the_ids_of_each_pair_alone(tokenizer_of: Callable[[str], Tokenizer], kind: str) -> None:
    template = PromptTemplate("Q{prompt}", tokenizer_of(kind))
    items = [pair(prompt, response) for prompt in ("a", "b ", "c\n") for response in ("Paris", " Paris", "\tis")]
    prompts, responses = template.encode(items)
    assert [([p], [r]) for p, r in zip(prompts, responses, strict=True)] == [template.encode([item]) for item in items]


@pytest.mark.parametrize("kind", ["llama2", "unigram", "t5", "byte level, prefix", "sentencepiece bpe"])
def test_tokenize_score_and_parity_agree(folder_of: Folders, tmp_path: Path, kind: str) -> None:
    from megatron_tspin.conversion.parity import read_sentences
    from megatron_tspin.data.indexed import open_documents
    from megatron_tspin.data.tokenization import tokenize_run
    from megatron_tspin.training.scoring_input import read_scoring_input

    lines: list[dict[str, Any]] = [
        {"prompt": "capital: ", "response": "Paris is"},
        {"prompt": "the", "response": " response"},
        {"messages": [{"role": "user", "content": "two"}, {"role": "assistant", "content": "\n你好"}]},
    ]
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(line) + "\n" for line in lines))
    config = Config.model_validate(
        {
            "run_dir": str(tmp_path / "run"),
            "model": {"hf_checkpoint": str(folder_of(kind))},
            "data": {"annotated": str(data), "template": "{prompt}"},
        }
    )
    tokenize_run(config)
    prompts, responses = (open_documents(tmp_path / "run/data" / f"train_{key}") for key in ("prompt", "annotated"))
    trained = list(zip(prompts, responses, strict=True))
    assert read_scoring_input(config, data, 1024)[1] == trained
    eos = load_tokenizer(str(folder_of(kind))).endings.closing
    compared = [(each.prompt_ids, [*each.response_ids, eos]) for each in read_sentences(folder_of(kind), data)]
    assert compared == trained
