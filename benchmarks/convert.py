"""How fast HF weights are loaded and exported, beside plain reads of the same bytes and plain transformers.

    python benchmarks/convert.py --quick

Writes a random Llama of 1.24 B parameters in bf16 (the shape of Llama-3.2-1B; with --quick half its layers, 0.75 B),
and loads it into two ranks at TP 2.

What makes it fair: all sides read the same files from the page cache, which is filled before each measurement. Plain
reading is that of two processes at once, each of half the bytes, front to back. Memory that is fresh from the system
costs far more than reading does, so each rate is taken twice: into fresh memory, as parameters are when a policy was
just built, and once more into the same memory. The rate into one small buffer, where nothing is kept, stands beside it.
Rates are those of the best round. Ranks have one thread each; transformers loads the whole model in one process with
two, and is timed twice: it maps the files and returns before it has read them, so for the second line every page of its
parameters is read once. With `--cold` the files are dropped from the page cache instead, before each measurement.

The last line printed is `extra MiB per rank: N, fraction of read rate: N.NN`: the peak of a rank's resident set above
its shard, and the rate of loading over that of plain reading, both into fresh memory, of the rank that does worse.
In the table GB, GB/s and extra MiB are those of one process; an export is counted whole on each of the ranks.
"""

import argparse
import json
import socket
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from megatron_tspin.benchmark.child import Child, threads_environment
from megatron_tspin.benchmark.load_speed import drop_cache, fill_cache, serve_rank, serve_transformers
from megatron_tspin.benchmark.machine import describe_machine
from megatron_tspin.benchmark.tables import ABSENT, make_table, show
from megatron_tspin.storage import sha256_file, write_json

_RANKS = 2
_LAYERS, _QUICK_LAYERS = 16, 8
_ROUNDS, _QUICK_SECONDS = 5, 120.0
_GB = 1e9
_CONFIG = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "dtype": "bfloat16",
    "hidden_act": "silu",
    "vocab_size": 128256,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "tie_word_embeddings": True,
}
_RANDOM_VALUES = 2**24
_SIDES = {
    "read": "plain reads into fresh memory",
    "load": "ours into fresh parameters",
    "read_again": "plain reads into the same memory",
    "load_again": "ours into the same parameters",
    "read_nowhere": "plain reads into one buffer",
    "load_fp32": "ours into fresh parameters, fp32",
    "transformers": "transformers until it returns",
    "transformers_all": "transformers until all is read",
    "write": "plain write of all, to the disk",
    "export": "ours, export of all, to the disk",
}
"""What is measured, in the order in which a round does it."""
_COLUMNS = ("side", "processes", "seconds", "CPU s", "GB", "GB/s", "of plain reads", "extra MiB")
Measurements = dict[str, list[list[dict[str, Any]]]]
"""Of each side, of each round, of each of its processes."""


def main() -> None:
    """Measures, prints, and writes the JSON file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--quick", action="store_true", help=f"{_QUICK_LAYERS} layers (0.75 B parameters), no round after two minutes"
    )
    parser.add_argument("--cold", action="store_true", help="read from the disk")
    parser.add_argument("--layers", type=int, help=f"of the model [{_LAYERS}; --quick: {_QUICK_LAYERS}]")
    parser.add_argument("--folder", type=Path, help="where 8 GB can be written [a temporary folder]")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results"), help="folder of the JSON file")
    args = parser.parse_args()
    layers = args.layers or (_QUICK_LAYERS if args.quick else _LAYERS)
    deadline = time.monotonic() + (_QUICK_SECONDS if args.quick else float("inf"))
    with tempfile.TemporaryDirectory(dir=args.folder) as temporary:
        hf = Path(temporary) / "hf"
        size = write_random_checkpoint(hf, layers)
        result = {
            "machine": describe_machine(),
            "bytes": size,
            "layers": layers,
            "cold": args.cold,
            **measure(hf, Path(temporary) / "export", args.cold, deadline),
        }
    name = f"convert_{layers}_layers{'_cold' * args.cold}.json"
    write_json(args.output / name, result)
    report(result)


def write_random_checkpoint(folder: Path, layers: int) -> int:
    """Writes a Llama in bf16 with one file of weights; the bytes of that.

    A block of normal numbers is repeated: drawing all of them would take longer than everything that is measured.
    """
    import torch

    from megatron_tspin.checkpoint.hf_writer import SHARD_BYTES, HFWriter
    from megatron_tspin.models.families.registry import tensors
    from megatron_tspin.models.hf_config import read_config

    config = {**_CONFIG, "num_hidden_layers": layers}
    source = folder.with_name("config")
    source.mkdir(parents=True)
    (source / "config.json").write_text(json.dumps(config))
    values = (0.02 * torch.randn(_RANDOM_VALUES, generator=torch.Generator().manual_seed(0))).bfloat16()
    table = tensors(read_config(config, source / "config.json"))
    shapes = {name: shape for entry in table for name, shape in zip(entry.hf, entry.layout.shapes, strict=True)}
    sizes = {name: (shape, torch.bfloat16) for name, shape in shapes.items()}
    writer = HFWriter(folder, sizes, SHARD_BYTES)
    for name, (shape, _) in sizes.items():
        count = torch.Size(shape).numel()
        writer.add(name, values.repeat(count // len(values) + 1)[:count].view(shape))
    writer.finish(source, None)
    return (folder / "model.safetensors").stat().st_size


def measure(hf: Path, target: Path, cold: bool, deadline: float) -> dict[str, Any]:
    """All sides, taking turns, in at most five rounds of which none begins after the deadline; the export once."""
    found: Measurements = {name: [] for name in _SIDES}
    prepare = drop_cache if cold else fill_cache
    with ExitStack() as stack:
        ranks = [stack.enter_context(Child(serve_rank, hf, rank, _RANKS, environment=env)) for rank, env in _ranks()]
        for rank in ranks:
            rank.receive()
        theirs = stack.enter_context(Child(serve_transformers, hf, environment=threads_environment(_RANKS)))
        theirs.receive()
        pool = stack.enter_context(ThreadPoolExecutor(_RANKS))
        while len(found["read"]) < _ROUNDS and (not found["read"] or time.monotonic() < deadline):
            for name in [side for side in _SIDES if side not in ("write", "export")]:
                prepare(hf)
                sides = [theirs] if name.startswith("transformers") else ranks
                found[name].append(list(pool.map(lambda side, what=name: side.ask(what), sides)))
        found["write"].append([ranks[0].ask("write", target.with_name("plain"))])
        found["export"].append(list(pool.map(lambda side: side.ask("export", target), ranks)))
    same = sha256_file(hf / "model.safetensors") == sha256_file(target / "model.safetensors")
    return {"rounds": len(found["read"]), "sides": found, "export_has_the_same_bytes": same}


def _ranks() -> Iterator[tuple[int, dict[str, str]]]:
    """Each rank, and the variables that torchrun would set."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    for rank in range(_RANKS):
        yield (
            rank,
            {
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(_RANKS),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
                **threads_environment(1),
            },
        )


def report(result: dict[str, Any]) -> None:
    """Prints the table and the last line."""
    sides: Measurements = result["sides"]
    plain, same = _rates(sides["read"]), _rates(sides["read_again"])
    rows = []
    for name, title in _SIDES.items():
        rates, extra = _rates(sides[name]), _extra(sides[name])
        slowest = [max(turn, key=lambda each: each["seconds"]) for turn in sides[name]]
        best = min(slowest, key=lambda each: each["seconds"])
        base = same if name == "load_again" else plain
        compared = name.startswith(("load", "transformers"))
        rows.append(
            [
                title,
                str(len(sides[name][0])),
                f"{best['seconds']:.2f}",
                f"{best['cpu_seconds']:.2f}",
                f"{sides[name][0][0]['read'] / _GB:.2f}",
                f"{min(rates):.2f}",
                f"{min(rates) / min(base):.2f}" if compared else ABSENT,
                ABSENT if name.startswith(("read", "write")) else f"{extra:.0f}",
            ]
        )
    machine = result["machine"]
    show(
        f"HF weights of {result['bytes'] / _GB:.2f} GB in bf16, {'from the disk' if result['cold'] else 'cached'}; "
        f"the best of {result['rounds']} rounds; {machine['cpu']}, {machine['cores']} cores, "
        f"load {machine['load_average_before']:.1f}",
        f"the exported file has the source's bytes: {'yes' if result['export_has_the_same_bytes'] else 'NO'}",
        make_table(("side", "processes", "seconds", "CPU s", "GB", "GB/s", "of plain reads", "extra MiB"), rows),
    )
    share = min(ours / reads for ours, reads in zip(_rates(sides["load"]), plain, strict=True))
    sys.stdout.write(f"extra MiB per rank: {_extra(sides['load']):.0f}, fraction of read rate: {share:.2f}\n")


def _rates(turns: list[list[dict[str, Any]]]) -> list[float]:
    """GB/s of each process in its best round: whatever else runs here can only slow it down."""
    return [max(turn[each]["read"] / turn[each]["seconds"] / _GB for turn in turns) for each in range(len(turns[0]))]


def _extra(turns: list[list[dict[str, Any]]]) -> float:
    """The most that any process took in any round."""
    return max(float(each["extra_mib"]) for turn in turns for each in turn)


if __name__ == "__main__":  # every side is a process that imports this file again
    main()
