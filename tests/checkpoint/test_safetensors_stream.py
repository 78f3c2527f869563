"""Files written tensor by tensor are those of safetensors, and are read back by position."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from megatron_tspin.checkpoint.safetensors_file import BUFFER_BYTES, SafetensorsFile
from megatron_tspin.checkpoint.safetensors_stream import SafetensorsStream
from megatron_tspin.errors import ArtifactError, InputError


def some_tensors() -> dict[str, torch.Tensor]:
    """All types, odd counts, a scalar, nothing, and more than is read at once."""
    torch.manual_seed(0)
    return {
        "z.half": torch.randn(3, 5).half(),
        "brain": torch.randn(7).bfloat16(),
        "b.double": torch.randn(2, 3, dtype=torch.float64),
        "scalar": torch.tensor(2.5),
        "empty": torch.empty(0, 4),
        "ünïcode": torch.randn(BUFFER_BYTES // 4 + 1, 2).bfloat16(),
    }


def test_the_bytes_are_those_of_safetensors(tmp_path: Path) -> None:
    tensors = some_tensors()
    save_file(tensors, tmp_path / "theirs", metadata={"format": "pt"})
    stream = SafetensorsStream(tmp_path / "ours", {name: (tuple(t.shape), t.dtype) for name, t in tensors.items()})
    assert [stream.add(name, tensor) for name, tensor in tensors.items()] == [False] * 5 + [True]
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()


def test_rows_in_any_order(tmp_path: Path) -> None:
    values = torch.randn(10, 3)
    stream = SafetensorsStream(tmp_path / "f", {"a": ((10, 3), torch.float32), "v": ((10,), torch.bfloat16)})
    steps = [("a", values, 7, 10), ("v", values[:, 0], 0, 4), ("a", values, 0, 7), ("v", values[:, 0], 4, 10)]
    assert [stream.add(name, of[low:high], low) for name, of, low, high in steps] == [False] * 3 + [True]
    save_file({"a": values, "v": values[:, 0].bfloat16()}, tmp_path / "theirs", metadata={"format": "pt"})
    assert (tmp_path / "f").read_bytes() == (tmp_path / "theirs").read_bytes()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
def test_any_part_reaches_any_target(tmp_path: Path, stored: Any, dtype: Any) -> None:
    whole = torch.randn(300, 2201).to(stored)
    save_file({"a": whole, "v": whole[0].clone()}, tmp_path / "f")
    file = SafetensorsFile(tmp_path / "f")
    rows: list[tuple[slice | None, int]] = [(None, 0), (slice(7, 299), 0), (slice(5, 5), 0)]
    columns = [(slice(3, 2200), 1), (slice(100, 108), 1), (slice(0, 2201), 1)]  # read row by row, or with whole rows
    parts = [*rows, *columns]
    for part, dim in parts:
        expected = whole.to(dtype) if part is None else whole.to(dtype)[(slice(None),) * dim + (part,)]
        for target in (torch.zeros(expected.shape, dtype=dtype), torch.zeros(expected.T.shape, dtype=dtype).T):
            told: list[int] = []
            file.read_into(target, "a", part, dim, told.append)
            assert torch.equal(target, expected) and sum(told) == expected.numel() * stored.itemsize
    vector = torch.zeros(20, dtype=dtype)
    file.read_into(vector, "v", slice(4, 24))
    assert torch.equal(vector, whole[0, 4:24].to(dtype))


def test_only_what_is_read_has_to_be_finite(tmp_path: Path) -> None:
    values = torch.full((64, 8), 65000.0, dtype=torch.float16)  # their sum is no number of fp16
    values[3, 5] = float("nan")
    save_file({"a": values}, tmp_path / "f")
    file = SafetensorsFile(tmp_path / "f")
    file.read_into(torch.empty(60, 8), "a", slice(4, 64))
    file.read_into(torch.empty(64, 4), "a", slice(0, 4), 1)
    for part, dim, shape in ((slice(0, 4), 0, (4, 8)), (slice(4, 6), 1, (64, 2))):
        with pytest.raises(InputError, match="tensor a holds 1 values that are NaN or infinite"):
            file.read_into(torch.empty(shape), "a", part, dim)


def test_a_value_that_the_dtype_cannot_hold_is_named(tmp_path: Path) -> None:
    stream = SafetensorsStream(tmp_path / "f", {"a": ((2,), torch.float16)})
    with pytest.raises(InputError, match="tensor a holds 1e\\+06, which F16 cannot; choose another dtype"):
        stream.add("a", torch.tensor([1.0, 1e6]))


def test_a_file_that_shrinks_while_it_is_read(tmp_path: Path) -> None:
    save_file({"a": torch.ones(100)}, tmp_path / "f")
    file = SafetensorsFile(tmp_path / "f")
    with (tmp_path / "f").open("r+b") as stream:
        stream.truncate(200)
    with pytest.raises(ArtifactError, match="ends at byte 200; it became shorter while it was read"):
        file.read_into(torch.empty(100), "a")


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory is read from /proc")
@pytest.mark.parametrize("dim", [0, 1])
def test_reading_takes_no_memory_but_the_target_and_a_buffer(tmp_path: Path, dim: int) -> None:
    from megatron_tspin.benchmark.memory import PeakMemory

    rows, columns = 2048, 6144  # 24 MiB
    save_file({"a": torch.ones(rows, columns, dtype=torch.bfloat16)}, tmp_path / "f")
    file = SafetensorsFile(tmp_path / "f")
    target = torch.zeros((rows // 2, columns) if dim == 0 else (rows, columns // 2))
    file.read_into(target, "a", slice(0, target.shape[dim]), dim)
    memory = PeakMemory()
    file.read_into(target, "a", slice(0, target.shape[dim]), dim)
    assert memory.peak_mib() < 8 and float(target.mean()) == 1
