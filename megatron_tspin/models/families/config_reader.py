"""Hands out the values of a config.json, notes which keys were asked for, and collects what is wrong with them.

So that nothing is passed over: a key that no family asked for and that is not neutral is refused by name.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

_NEUTRAL = {
    "architectures", "transformers_version", "torch_dtype", "dtype", "bos_token_id", "eos_token_id", "pad_token_id",
    "use_cache", "initializer_range", "_name_or_path", "name_or_path", "pretraining_tp", "is_llama_config",
    "transformers.js_config", "unk_token_id", "max_length", "id2label", "label2id", "problem_type", "return_dict",
    "chunk_size_feed_forward", "output_attentions", "output_hidden_states", "keys_to_ignore_at_inference",
    "_attn_implementation", "tokenizer_class", "is_encoder_decoder", "is_decoder",
}  # fmt: skip
"""Keys that do not change what a network computes, in any family."""
DROPOUTS = ("attention_dropout", "hidden_dropout", "resid_pdrop", "embd_pdrop", "classifier_dropout")
"""Nothing is ever dropped here: log-probs of one sequence have to be one number."""
_NOT_UNDERSTOOD = "is not understood, so the computation might differ; remove the key if it is unused"
_ADVICE = {
    "auto_map": "names code of the checkpoint's own, which is never run here; remove the key if the model computes "
    "what its model_type says, as transformers' own class does",
    "quantization_config": "says that the weights are quantised; take the unquantised checkpoint, or dequantise it "
    "with transformers (`model.dequantize()`) and save it again",
}
_REQUIRED = object()
_ACTIVATIONS = {
    "silu": "silu", "swish": "silu", "gelu": "gelu", "gelu_python": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh", "gelu_new": "gelu_tanh", "gelu_fast": "gelu_tanh",
}  # fmt: skip
_JSON_NAMES = {list: "a list", dict: "an object", bool: "true or false"}


class ConfigReader:
    """One reading of a config.

    Args:
        values: What the file says.
    """

    def __init__(self, values: Mapping[str, Any]) -> None:
        self._values = values
        self._asked: set[str] = set()
        self.problems: list[str] = []

    def refuse(self, problem: str) -> None:
        """Adds a problem."""
        self.problems.append(problem)

    def inconsistent(self, problem: str) -> None:
        """Adds a problem of values that do not fit together, if so far each value by itself was right."""
        if not self.problems:
            self.problems.append(problem)

    def raw(self, key: str, default: Any = None) -> Any:
        """The value as it is, or the default where the file has none."""
        self._asked.add(key)
        return self._values.get(key, default)

    def whole(self, key: str, default: Any = _REQUIRED) -> Any:
        """A whole number above 0; None where the file says null and there is a default. Returns 1 for what is wrong."""
        return self._positive(key, default, whole=True)

    def number(self, key: str, default: Any = _REQUIRED) -> Any:
        """A number above 0, likewise."""
        return self._positive(key, default, whole=False)

    def count(self, key: str, default: int) -> int:
        """A whole number, 0 or more; null is the default."""
        found = self.raw(key)
        if found is None:
            return default
        if type(found) is not int or found < 0:
            self.refuse(f"`{key}` = {found!r} must be a whole number, 0 or more")
            return default
        return found

    def flag(self, key: str, default: bool = False) -> bool:
        """True or false; null is the default."""
        return bool(self._typed(key, bool, default))

    def listing(self, key: str) -> list[Any] | None:
        """A list, or None where the file has none."""
        found: list[Any] | None = self._typed(key, list, None)
        return found

    def table(self, key: str) -> dict[str, Any] | None:
        """An object, or None where the file has none."""
        found: dict[str, Any] | None = self._typed(key, dict, None)
        return found

    def activation(self, key: str, default: str) -> Any:
        """What `Architecture.activation` calls it."""
        name = self.raw(key) or default
        if name not in _ACTIVATIONS:
            self.refuse(f"{key} = {name!r} is not implemented; implemented are {', '.join(_ACTIVATIONS)}")
        return _ACTIVATIONS.get(name, "silu")

    def only(self, key: str, value: Any) -> None:
        """Refuses another value than this one, which is also what silence means."""
        found = self.raw(key)
        if found is not None and found != value:
            self.refuse(f"{key} = {found!r} is not implemented")

    def per_layer(self, key: str, count: int, allowed: Sequence[str], default: Sequence[str]) -> list[str]:
        """A word a layer."""
        found = self.listing(key)
        if found is None:
            return list(default)
        if others := sorted({str(word) for word in found} - set(allowed)):
            self.refuse(f"{key} has {', '.join(others)}; implemented are {', '.join(allowed)}")
        if len(found) != count:
            self.inconsistent(f"{key} has {len(found)} entries for {count} layers (num_hidden_layers)")
        return list(default) if self.problems else found

    def left_over(self, neutral: Sequence[str] = ()) -> list[str]:
        """A problem for every key that says something, was not asked for, and is not neutral."""
        known = self._asked | _NEUTRAL | set(DROPOUTS) | set(neutral)
        return [
            f"`{key}` = {value!r} {_ADVICE.get(key, _NOT_UNDERSTOOD)}"
            for key, value in self._values.items()
            if key not in known and value not in (None, False, [], {})
        ]

    def _typed(self, key: str, kind: type, default: Any) -> Any:
        found = self.raw(key)
        if found is None:
            return default
        if not isinstance(found, kind):
            self.refuse(f"`{key}` = {found!r} must be {_JSON_NAMES[kind]}")
            return default
        return found

    def _positive(self, key: str, default: Any, whole: bool) -> Any:
        self._asked.add(key)
        if key not in self._values:
            if default is _REQUIRED:
                self.refuse(f"`{key}` is missing")
                return 1
            return default
        found = self._values[key]
        if found is None and default is not _REQUIRED:
            return None
        if not is_positive(found, whole):
            self.refuse(f"`{key}` = {found!r} must be a {'whole number' if whole else 'number'} above 0")
            return 1
        return found


def is_positive(value: Any, whole: bool) -> bool:
    """Whether it is a finite number above 0, not a bool or a word that looks like one."""
    return (type(value) is int or (type(value) is float and not whole)) and 0 < value < math.inf
