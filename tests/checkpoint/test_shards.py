"""Each rank saves what it holds: ranges of parameters as rectangles, once each, and nothing that no step needs."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_tspin.checkpoint.rectangles import rectangles
from megatron_tspin.config import ParallelSection
from tests.checkpoint.store_runs import build, layout, step, wrap
from tests.rank_pool import in_layout

SHAPES = st.lists(st.integers(1, 5), min_size=1, max_size=3)


@given(shape=SHAPES, data=st.data())
def test_rectangles_are_the_range(shape: list[int], data: st.DataObject) -> None:
    numel = math.prod(shape)
    start = data.draw(st.integers(0, numel))
    stop = data.draw(st.integers(start, numel))
    places = np.arange(numel).reshape(shape)
    found = list(rectangles(shape, start, stop))
    covered = [
        place
        for offset, size in found
        for place in places[tuple(slice(o, o + s) for o, s in zip(offset, size, strict=True))].flatten().tolist()
    ]
    assert covered == list(range(start, stop))
    assert len(found) <= 2 * len(shape) - 1


def save_after_a_step(hf: Path, folder: Path, parallel: ParallelSection, bf16: bool) -> int:
    """Returns the bytes of this rank's optimizer: masters and moments."""
    from megatron_tspin.checkpoint.hf_weights import load_hf
    from megatron_tspin.checkpoint.optimizer_state import has_masters, held
    from megatron_tspin.checkpoint.store import save_checkpoint

    with in_layout(parallel) as topology:
        model = build(hf, parallel, topology, bf16)
        load_hf(model, topology)
        wrapped, optimizer = wrap(model, parallel, bf16)
        step(wrapped, optimizer, 1)
        save_checkpoint(folder, wrapped, topology, optimizer)
        return sum(
            tensor.nbytes
            for part in held(optimizer)
            for tensor in [*part.moments.values(), *([part.updated] if has_masters(optimizer) else [])]
        )


def stored(folder: Path) -> dict[str, dict[str, int]]:
    """Bytes of tensors in each file, by what they are."""
    from torch.distributed.checkpoint import FileSystemReader
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    metadata = FileSystemReader(folder).read_metadata()
    found: dict[str, dict[str, int]] = {}
    assert metadata.storage_data is not None
    for index, info in metadata.storage_data.items():
        described: Any = metadata.state_dict_metadata[index.fqn]
        if not isinstance(described, TensorStorageMetadata):
            continue  # a newer megatron-core keeps the checkpoint's facts among its tensors
        chunk = next(chunk for chunk in described.chunks if chunk.offsets == index.offset)
        size = math.prod(chunk.sizes) * described.properties.dtype.itemsize
        what = index.fqn.split(".")[2] if index.fqn.startswith("optimizer.state.") else "weights"
        file = found.setdefault(info.relative_path, {})
        file[what] = file.get(what, 0) + size
    return found


@pytest.mark.parametrize("kind", ["tied", "untied"])
def test_each_rank_saves_its_own_shards(kind: str, ranks: Any, tiny_checkpoint: Any, tmp_path: Path) -> None:
    parallel = layout(dp=2, distributed_optimizer=True)
    held = ranks(2).run(save_after_a_step, tiny_checkpoint(kind), tmp_path / "saved", parallel, True)
    files = stored(tmp_path / "saved")
    for rank, size in enumerate(held):
        state = {what: stored for what, stored in files[f"__{rank}_0.distcp"].items() if what != "weights"}
        assert sum(state.values()) == size > 0
        assert set(state) == {"fp32_param", "exp_avg_sq"} | ({"exp_avg"} if kind == "untied" else set())  # Adam
    assert held[0] / held[1] == pytest.approx(1, rel=0.1)


@pytest.mark.parametrize("parallel", [layout(), layout(dp=2, distributed_optimizer=True)], ids=["whole", "sharded"])
def test_rmsprop_stores_no_first_moment(
    parallel: ParallelSection, ranks: Any, tiny_checkpoint: Any, tmp_path: Path
) -> None:
    ranks(parallel.world_size).run(save_after_a_step, tiny_checkpoint("tied"), tmp_path / "saved", parallel, False)
    assert {what for file in stored(tmp_path / "saved").values() for what in file} == {"weights", "exp_avg_sq"}
