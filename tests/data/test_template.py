from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_tspin.config import PAPER_TEMPLATE
from megatron_tspin.data.annotated import Example
from megatron_tspin.data.template import PromptTemplate
from megatron_tspin.data.tokenizer import Tokenizer
from megatron_tspin.data.tokenizer_loading import load_tokenizer

PROMPT = "Say {prompt} and {0} and {x!r} and %s"


def example(prompt: str, messages: list[dict[str, str]] | None = None) -> Example:
    return Example(id="1", prompt=prompt, response="r", messages=messages, record={})


@pytest.fixture(scope="module")
def tokenizer(hf_folder: Path) -> Tokenizer:
    return load_tokenizer(str(hf_folder))


def test_a_plain_template_replaces_the_placeholder_once_and_literally(tokenizer: Tokenizer) -> None:
    template = PromptTemplate("{a} {prompt} {b}", tokenizer)
    assert template.text(example(PROMPT)) == "{a} " + PROMPT + " {b}"
    (ids,) = template.prompt_ids([example(PROMPT)])
    assert ids[0] == 0 and tokenizer.decode(ids) == "{a} " + PROMPT + " {b}"


@settings(deadline=None)  # the machines of CI are shared
@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_the_papers_template_is_verbatim(tokenizer: Tokenizer, prompt: str) -> None:
    text = PromptTemplate(PAPER_TEMPLATE, tokenizer).text(example(prompt))
    assert text == "### Instruction: " + prompt + "\n\n### Response: "


def test_a_batch_gives_the_ids_of_each_prompt_alone(tokenizer: Tokenizer) -> None:
    template = PromptTemplate(PAPER_TEMPLATE, tokenizer)
    examples = [example("x" * n) for n in range(5)]
    assert template.prompt_ids(examples) == [template.prompt_ids([item])[0] for item in examples]


@pytest.mark.parametrize("post", ["<s> $A </s>", "$A </s>", "</s> $A", "<s> $A", None])
def test_only_an_eos_that_the_tokenizer_adds_is_taken_off(
    hf_folder_factory: Callable[..., Path], tmp_path: Path, post: str | None
) -> None:
    tokenizer = load_tokenizer(str(hf_folder_factory(tmp_path / "hf", post=post)))
    start = {"<": [0], "$": [], None: []}[post[0] if post else None]
    start = [1] if post == "</s> $A" else start
    (bare,) = tokenizer.encode_batch(["p"], add_special_tokens=False)
    assert PromptTemplate("{prompt}", tokenizer).prompt_ids([example("p")]) == [start + bare]
    # A closing EOS that is text of the template stays.
    assert PromptTemplate("{prompt}</s>", tokenizer).prompt_ids([example("p")]) == [start + bare + [1]]


def test_chat_uses_the_tokenizers_template_without_more_special_tokens(tokenizer: Tokenizer) -> None:
    template = PromptTemplate("chat", tokenizer)
    messages = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]
    with_messages, with_prompt = template.prompt_ids([example("s\n\nu", messages), example("u")])
    (expected,) = tokenizer.encode_batch(["<|system|>s</s><|user|>u</s><|assistant|>"], add_special_tokens=False)
    assert with_messages == expected and 0 not in expected
    assert with_prompt == tokenizer.encode_batch(["<|user|>u</s><|assistant|>"], add_special_tokens=False)[0]


def test_a_plain_template_over_a_sentencepiece_model(sentencepiece_model: Path) -> None:
    tokenizer = load_tokenizer(str(sentencepiece_model))
    (ids,) = PromptTemplate(PAPER_TEMPLATE, tokenizer).prompt_ids([example(PROMPT)])
    assert ids[0] == 1 and ids[-1] != tokenizer.endings.closing
    assert tokenizer.decode(ids) == f"### Instruction: {PROMPT}\n\n### Response: "


def test_the_fingerprint_tells_templates_apart(
    tokenizer: Tokenizer, hf_folder_factory: Callable[..., Path], tmp_path: Path
) -> None:
    other = load_tokenizer(str(hf_folder_factory(tmp_path / "hf", chat="{{ messages }}")))

    def fingerprint(template: str, owner: Tokenizer) -> str:
        return PromptTemplate(template, owner).fingerprint

    assert fingerprint("chat", tokenizer) == fingerprint("chat", tokenizer)
    assert fingerprint("chat", tokenizer) != fingerprint("chat", other)
    assert fingerprint("a{prompt}", tokenizer) == fingerprint("a{prompt}", other)
    assert fingerprint("a{prompt}", tokenizer) != fingerprint("b{prompt}", tokenizer)


@pytest.mark.parametrize("post", ["<s> $A", "<s> $A </s>"])
@pytest.mark.parametrize(("template", "prompt"), [("<s>{prompt}", "p"), ("{prompt}", "<s>p"), ("{prompt}", "p")])
def test_bos_comes_once(
    hf_folder_factory: Callable[..., Path], tmp_path: Path, post: str, template: str, prompt: str
) -> None:
    tokenizer = load_tokenizer(str(hf_folder_factory(tmp_path / "hf", post=post)))
    (bare,) = tokenizer.encode_batch(["p"], add_special_tokens=False)
    assert PromptTemplate(template, tokenizer).prompt_ids([example(prompt)]) == [[0, *bare]]


def test_two_of_bos_in_a_text_are_two(tokenizer: Tokenizer) -> None:
    (bare,) = tokenizer.encode_batch(["p"], add_special_tokens=False)
    assert PromptTemplate("{prompt}", tokenizer).prompt_ids([example("<s><s>p")]) == [[0, 0, *bare]]
