"""Every field of every family's config class is read, refused, or really does not matter to the network.

The judge is transformers: a field that we neither refuse nor read must leave its logits alone.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from megatron_tspin.errors import InputError
from megatron_tspin.models.families.registry import FAMILIES
from megatron_tspin.models.hf_config import read_architecture
from megatron_tspin.models.hf_reading import check_reading
from tests.tiny_checkpoint import KINDS, config_of

ONE_OF_A_FAMILY = {config_of(kind).model_type: kind for kind in reversed(KINDS)}


def test_every_family_is_tried() -> None:
    assert set(ONE_OF_A_FAMILY) == set(FAMILIES)


def mutations(value: Any) -> list[Any]:
    """Other values of the same type, one of them far away."""
    if isinstance(value, bool):
        return [not value]
    if isinstance(value, int):
        return [value + 1, value * 2]
    if isinstance(value, float):
        return [value * 1.5 + 0.1]
    if isinstance(value, str):
        return ["gelu", "relu"]
    if isinstance(value, list) and value:
        return [value[::-1], value[1:] + value[:1]]
    if value is None:
        return [True, 2, 0.5, "gelu"]
    return []


def logits_of(config: Any, state: dict[str, Any]) -> torch.Tensor | None:
    """Transformers' logits with given weights; None where it takes neither the config nor the weights."""
    try:
        model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
        model.load_state_dict(state)
        with torch.no_grad():
            out = model(torch.arange(3, 43)[None])
            found: torch.Tensor = out[0] if isinstance(out, tuple) else out.logits  # `return_dict` decides
    except Exception:
        return None
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_no_field_is_passed_over(family: str, tmp_path: Path) -> None:
    config = config_of(ONE_OF_A_FAMILY[family])
    config.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    original, written = read_architecture(tmp_path), json.loads(path.read_text())
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    state = model.state_dict()
    expected = logits_of(config, state)
    fields = {**config.to_dict(), **written}
    for name in ("model_type", "dtype", "return_dict"):  # nonsense there breaks transformers and changes nothing here
        fields.pop(name, None)
    passed_over, untouched = [], set()
    for name, value in fields.items():
        for other in mutations(value):
            path.write_text(json.dumps({**written, name: other}))
            try:
                found = read_architecture(tmp_path)
                check_reading(found)
            except InputError:
                continue
            if found.differences(original):
                continue
            logits = logits_of(transformers.AutoConfig.from_pretrained(tmp_path), state)
            untouched.add(name)
            if logits is None or expected is None or not logits.equal(expected):
                passed_over.append(f"{name} = {other!r}")
    assert {"use_cache", "initializer_range"} <= untouched, "the judge has judged nothing"
    assert not passed_over, "neither read nor refused, and they change the logits"
