"""Whether a loaded tokenizer follows its tokenizer.json.

transformers 5 may build a tokenizer's rules anew from the `tokenizer_class` of tokenizer_config.json, and then
normalizer and pre-tokenizer of tokenizer.json count for nothing. What tokenizer_config.json adds to them (tokens, BOS
and EOS) is as it should be.
"""

from collections.abc import Iterable
from pathlib import Path

from tokenizers import Tokenizer

from megatron_tspin.errors import InputError

SAMPLE = (
    "The quick brown fox, and 3 + 4 = 7.",
    "  two  spaces,\ttabs\n\n\nand lines \r\n end ",
    "def area(width, height):\n    return {'area': width * height}  # 12.5 %",
    "Grüße aus Köln: übermäßig höflich. ÀÉÎõü ſ ﬁ ½ ² ™",
    "e\u0301 is not é; ＡＢＣ are wide; ﷺ is one character",
    "你好，世界。 こんにちは 안녕하세요 Привет שלום مرحبا नमस्ते",
    "\U0001f600 \U0001f469\u200d\U0001f680 \u00a0 \u2028 \ufeff zero\u200bwidth",
    "1234567 1,000,000 0x1F 2026-01-01 $5 a_b-c/d\\e <b>bold</b>",
)
"""Texts on which tokenizers are compared: scripts, digits, white space, ligatures, combining and wide characters."""
_SHOWN = 16


def by_rules(file: Path) -> Tokenizer:
    """The tokenizer that a tokenizer.json describes by itself, without truncation and padding."""
    tokenizer = Tokenizer.from_file(str(file))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def check_rules(file: Path, loaded: Tokenizer, kind: str, texts: Iterable[str]) -> None:
    """Demands that a loaded tokenizer gives texts the ids that its tokenizer.json gives them.

    Args:
        file: The tokenizer.json.
        loaded: What transformers made of its folder.
        kind: transformers' class of it.
        texts: What to compare on. Texts that hold a token of which tokenizer.json knows nothing are passed over.

    Raises:
        InputError: A text has other ids; shows both, and says how to choose.
    """
    rules = by_rules(file)
    known = set(rules.get_added_tokens_decoder())
    added = {token.content for key, token in loaded.get_added_tokens_decoder().items() if key not in known}
    for text in texts:
        if any(content in text for content in added):
            continue
        one, other = (each.encode(text, add_special_tokens=False) for each in (rules, loaded))
        if one.ids != other.ids:
            raise InputError(
                f"{file.parent}: {kind} of transformers reads texts in another way than tokenizer.json: of {text!r} it "
                f"makes {_shown(other.tokens)}, tokenizer.json {_shown(one.tokens)}; set model.tokenizer_rules to the "
                "one that the model was trained with, `transformers` or `tokenizer.json`"
            )


def _shown(tokens: list[str]) -> str:
    return f"{tokens[:_SHOWN]}{'...' if len(tokens) > _SHOWN else ''}"
