"""Tokenizers without the space that they put in front of a text, for texts that continue another one.

Llama 2, Mistral 7B, T5 and their kin write a space before whatever they encode, so that a first word looks like any
other. Before a response, which is no beginning, that space would be a token that nobody wrote.
"""

import json
from typing import Any

from tokenizers import Tokenizer

# Field 3 of the model (`normalizer_spec`) with its field 3 (`add_dummy_prefix`) false. Protobuf merges a message that
# comes twice, and the last value wins, so appending this is all it takes (sentencepiece_model.proto).
_NO_DUMMY_PREFIX = b"\x1a\x02\x18\x00"

# By transformers 5 for SentencePiece models: Metaspace puts no space in front of one, so one is doubled first.
_DOUBLING = {"type": "Replace", "pattern": {"Regex": r"\A▁"}, "content": "▁▁"}


def without_dummy_prefix(model: bytes) -> bytes:
    """A serialized SentencePiece model that puts nothing in front of a text."""
    return model + _NO_DUMMY_PREFIX


def without_prefix(tokenizer: Tokenizer) -> Tokenizer:
    """The tokenizer without the space that it puts in front of a text; itself if it puts none there.

    A pre-tokenizer that comes after another one is left as it is: it marks each word that the first one cut out
    (T5's, after `WhitespaceSplit`), and without the marks no space would be left.
    """
    rules: dict[str, Any] = json.loads(tokenizer.to_str())
    changed = {
        **rules,
        "normalizer": _without_prepend(rules.get("normalizer")),
        "pre_tokenizer": _without_space(rules.get("pre_tokenizer")),
    }
    return tokenizer if changed == rules else Tokenizer.from_str(json.dumps(changed))


def _without_prepend(normalizer: dict[str, Any] | None) -> dict[str, Any] | None:
    if normalizer is None or normalizer["type"] == "Prepend" or normalizer == _DOUBLING:
        return None
    if normalizer["type"] != "Sequence":
        return normalizer
    kept = [inner for inner in map(_without_prepend, normalizer["normalizers"]) if inner is not None]
    return {**normalizer, "normalizers": kept}


def _without_space(pre_tokenizer: dict[str, Any] | None) -> dict[str, Any] | None:
    if pre_tokenizer is None:
        return None
    kind = pre_tokenizer["type"]
    if kind == "Metaspace":
        return {**pre_tokenizer, "prepend_scheme": "never"}
    if kind == "ByteLevel":
        return {**pre_tokenizer, "add_prefix_space": False}
    if kind == "Sequence" and pre_tokenizer["pretokenizers"]:
        first, *others = pre_tokenizer["pretokenizers"]
        return {**pre_tokenizer, "pretokenizers": [_without_space(first), *others]}
    return pre_tokenizer
