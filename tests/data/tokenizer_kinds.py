"""Tokenizers of every kind that matters to where a text begins: as different as published ones are."""

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

CORPUS = [
    "### Instruction: What is the capital of France?\n\n### Response: Paris is the capital of France.",
    "def area(width, height):\n    return {'area': width * height}\n\tpass",
    "Grüße aus Köln. 你好，世界。 Responses are long; a response is short. e\u0301",
]
SPECIAL = ["<unk>", "<s>", "</s>", "<|assistant|>"]
BYTES = [f"<0x{value:02X}>" for value in range(256)]
METASPACE = decoders.Sequence(
    [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
)


def _trained_bpe(pieces: list[str], special: list[str], **options: Any) -> dict[str, Any]:
    """Vocabulary and merges of a BPE trained on texts that are cut as they will be."""
    trainer = trainers.BpeTrainer(vocab_size=700, special_tokens=special, show_progress=False, **options)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.train_from_iterator(pieces, trainer)
    rules: dict[str, Any] = json.loads(tokenizer.to_str())["model"]
    return {"vocab": rules["vocab"], "merges": [tuple(merge) for merge in rules["merges"]]}


def _metaspace_bpe() -> Tokenizer:
    pieces = [f"▁{word}" for text in CORPUS for word in text.split(" ")]
    return Tokenizer(
        models.BPE(**_trained_bpe(pieces, [*SPECIAL, *BYTES]), unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )


def llama2() -> Tokenizer:
    """The normalizer writes the space."""
    tokenizer = _metaspace_bpe()
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = METASPACE
    return tokenizer


def metaspace(scheme: str) -> Tokenizer:
    """The pre-tokenizer writes the space."""
    tokenizer = _metaspace_bpe()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    tokenizer.decoder = METASPACE
    return tokenizer


def converted() -> Tokenizer:
    """As transformers 5 converts a SentencePiece model: a space at the beginning is doubled for Metaspace's sake."""
    tokenizer = _metaspace_bpe()
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Replace(" ", "▁"), normalizers.Replace(Regex(r"\A▁"), "▁▁")]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Metaspace(prepend_scheme="always", split=False)])
    tokenizer.decoder = METASPACE
    return tokenizer


def _unigram_model() -> models.Unigram:
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=150, special_tokens=SPECIAL, unk_token="<unk>", show_progress=False, shrinking_factor=0.6
    )
    tokenizer.train_from_iterator(CORPUS * 8, trainer)
    vocabulary = json.loads(tokenizer.to_str())["model"]["vocab"]
    known = {piece for piece, _ in vocabulary}
    more = [(piece, -20.0) for piece in ["▁", *BYTES] if piece not in known]
    return models.Unigram([*map(tuple, vocabulary), *more], unk_id=0, byte_fallback=True)


def unigram() -> Tokenizer:
    """As ALBERT's descendants: Unigram after Metaspace, which splits at each space."""
    tokenizer = Tokenizer(_unigram_model())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = METASPACE
    return tokenizer


def t5() -> Tokenizer:
    """Marks words, so that white space is lost but for where it was."""
    tokenizer = Tokenizer(_unigram_model())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()])
    tokenizer.decoder = METASPACE
    return tokenizer


def byte_level(prefix: bool) -> Tokenizer:
    """GPT-2's, with or without a space in front."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def llama3() -> Tokenizer:
    """Digits in threes, words by a pattern, then bytes."""
    tokenizer = byte_level(prefix=False)
    pattern = Regex(r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(pattern, "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    return tokenizer


def bert() -> Tokenizer:
    """WordPiece: lower case, and no white space at all."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.train_from_iterator(
        CORPUS, trainers.WordPieceTrainer(vocab_size=200, special_tokens=SPECIAL, show_progress=False)
    )
    return tokenizer


def sentencepiece_model(kind: str, **options: Any) -> bytes:
    """A serialized SentencePiece model."""
    import sentencepiece

    model = io.BytesIO()
    settings = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False, "vocab_size": 420, **options}
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([line for text in CORPUS for line in text.split("\n")] * 8), model_writer=model,
        byte_fallback=True, model_type=kind, hard_vocab_limit=False, minloglevel=2, **settings,
    )  # fmt: skip
    return model.getvalue()


LOSSLESS: dict[str, Callable[[], Tokenizer | bytes]] = {
    "llama2": llama2,
    "metaspace always": lambda: metaspace("always"),
    "metaspace first": lambda: metaspace("first"),
    "metaspace never": lambda: metaspace("never"),
    "converted": converted,
    "unigram": unigram,
    "byte level": lambda: byte_level(prefix=False),
    "byte level, prefix": lambda: byte_level(prefix=True),
    "llama3": llama3,
    "sentencepiece bpe": lambda: sentencepiece_model("bpe"),
    "sentencepiece unigram": lambda: sentencepiece_model("unigram"),
    "sentencepiece without prefix": lambda: sentencepiece_model("bpe", add_dummy_prefix=False),
}
LOSSY: dict[str, Callable[[], Tokenizer | bytes]] = {
    "t5": t5,
    "bert": bert,
    "sentencepiece squeezed": lambda: sentencepiece_model("bpe", remove_extra_whitespaces=True),
    "sentencepiece nfkc": lambda: sentencepiece_model(
        "unigram", normalization_rule_name="nmt_nfkc", remove_extra_whitespaces=True
    ),
}


def write_tokenizer(folder: Path, kind: str) -> Path:
    """Writes a checkpoint's tokenizer and config.json into a new folder."""
    made = {**LOSSLESS, **LOSSY}[kind]()
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "vocab_size": 1024}))
    if isinstance(made, bytes):
        (folder / "tokenizer.model").write_bytes(made)
        return folder
    bos = ("<s>", made.token_to_id("<s>"))
    made.post_processor = processors.Sequence([processors.TemplateProcessing(single="<s> $A", special_tokens=[bos])])
    made.add_special_tokens([token for token in SPECIAL if made.token_to_id(token) is not None])
    made.save(str(folder / "tokenizer.json"))
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", **names}))
    return folder
