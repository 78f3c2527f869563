"""What `benchmarks/convert.py` tells its ranks to do, on a tiny checkpoint; its figures mean nothing here."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

from megatron_tspin.benchmark.load_speed import drop_cache, fill_cache, read_plainly, room_for, weights_of
from megatron_tspin.config import ParallelSection
from tests.rank_pool import in_layout


def all_actions(folder: Path, target: Path) -> dict[str, dict[str, Any]]:
    from megatron_tspin.benchmark.load_speed import perform

    held: dict[str, Any] = {}
    actions = ("read", "load", "read_again", "load_again", "read_nowhere", "load_fp32", "write", "export")
    with in_layout(ParallelSection(tensor_model_parallel_size=2)) as topology:
        files = {"export": target, "write": target.with_name(f"plain{topology.rank}")}
        found = {name: asdict(perform(name, folder, topology, held, files.get(name))) for name in actions}
    assert not held
    return found


def test_every_side_of_a_rank(ranks: Any, tiny_checkpoint: Any, tmp_path: Path) -> None:
    source = tiny_checkpoint("untied")
    size = sum(path.stat().st_size for path in weights_of(source))
    for found in ranks(2).run(all_actions, source, tmp_path / "export"):
        assert all(each["seconds"] > 0 for each in found.values())
        assert {each["read"] for name, each in found.items() if name not in ("write", "export")} == {size // 2}
        assert found["write"]["read"] == size and found["export"]["read"] in (size, size - size % 2)
        assert found["load_fp32"]["kept"] == 2 * found["load"]["kept"] and found["load_again"]["kept"] == 0
    assert sum(path.stat().st_size for path in weights_of(tmp_path / "export")) == size


def test_plain_reads_are_of_all_bytes_once(tiny_checkpoint: Any) -> None:
    source = tiny_checkpoint("tied")
    drop_cache(source)
    fill_cache(source)
    (path,) = weights_of(source)
    rooms = [room_for(source, 2) for _ in range(2)]
    counts = [read_plainly(source, rank, 2, room).read for rank, room in enumerate(rooms)]
    together = b"".join(room[:count].numpy().tobytes() for room, count in zip(rooms, counts, strict=True))
    assert together == path.read_bytes()
    assert read_plainly(source, 0, 1, None).kept == 0
