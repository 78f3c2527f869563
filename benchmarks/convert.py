"""How fast HF weights are loaded and exported, beside plain reads of the same bytes and plain transformers.

    python benchmarks/convert.py --quick

Writes a random Llama of 1.24 B parameters in bf16 (the shape of Llama-3.2-1B), and loads it into two ranks at TP 2.

What makes it fair: all sides read the same files from the page cache, which is filled before each measurement. Plain
reading is that of two processes at once, each of half the bytes, front to back, into memory of its own that is as fresh
from the system as a rank's parameters are; the rate into one small buffer, where nothing is kept, stands beside it.
Ranks have one thread each; transformers loads the whole model in one process with two, and is timed twice: it maps the
files and returns before it has read them, so for the second line every page of its parameters is read once. With
`--cold` the files are dropped from the page cache instead, before each measurement of every side.

The last line printed is `extra MiB per rank: N, fraction of read rate: N.NN`: the peak of a rank's resident set above
its shard, and the rate of loading over that of plain reading, both of the rank that does worse.
"""

import argparse
import json
import socket
import statistics
import sys
import tempfile
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
_GB = 1e9
_CONFIG = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "dtype": "bfloat16",
    "hidden_act": "silu",
    "vocab_size": 128256,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
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
    "read": "plain reads, kept",
    "read_again": "plain reads into a buffer",
    "load": "ours, bf16",
    "load_fp32": "ours, cast to fp32",
    "transformers": "transformers, until it returns",
    "transformers_all": "transformers, all of it read",
    "export": "ours, export to HF",
}
Measurements = dict[str, list[list[dict[str, Any]]]]
"""Of each side, of each round, of each of its processes."""


def main() -> None:
    """Measures, prints, and writes the JSON file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two rounds instead of five")
    parser.add_argument("--cold", action="store_true", help="read from the disk")
    parser.add_argument("--layers", type=int, default=_CONFIG["num_hidden_layers"], help="of the model [16]")
    parser.add_argument("--folder", type=Path, help="where 5 GB can be written [a temporary folder]")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results"), help="folder of the JSON file")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as temporary:
        hf = Path(temporary) / "hf"
        size = write_random_checkpoint(hf, args.layers)
        result = {
            "machine": describe_machine(),
            "bytes": size,
            "layers": args.layers,
            "cold": args.cold,
            **measure(hf, Path(temporary) / "export", 2 if args.quick else 5, args.cold),
        }
    name = f"convert_{args.layers}_layers{'_cold' * args.cold}.json"
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


def measure(hf: Path, target: Path, rounds: int, cold: bool) -> dict[str, Any]:
    """All sides, taking turns; the export once."""
    found: Measurements = {name: [] for name in _SIDES}
    prepare = drop_cache if cold else fill_cache
    with ExitStack() as stack:
        ranks = [stack.enter_context(Child(serve_rank, hf, rank, _RANKS, environment=env)) for rank, env in _ranks()]
        for rank in ranks:
            rank.receive()
        theirs = stack.enter_context(Child(serve_transformers, hf, environment=threads_environment(_RANKS)))
        theirs.receive()
        pool = stack.enter_context(ThreadPoolExecutor(_RANKS))
        for _ in range(rounds):
            for name in ("read", "load", "read_again", "load_fp32", "transformers", "transformers_all"):
                prepare(hf)
                sides = [theirs] if name.startswith("transformers") else ranks
                found[name].append(list(pool.map(lambda side, what=name: side.ask(what), sides)))
        found["export"].append(list(pool.map(lambda side: side.ask("export", target), ranks)))
    same = sha256_file(hf / "model.safetensors") == sha256_file(target / "model.safetensors")
    return {"rounds": rounds, "sides": found, "export_has_the_same_bytes": same}


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
    plain = _rates(sides["read"])
    rows = []
    for name, title in _SIDES.items():
        rates, extra = _rates(sides[name]), _extra(sides[name])
        seconds = statistics.median(max(each["seconds"] for each in turn) for turn in sides[name])
        compared = name not in ("read", "export")
        rows.append(
            [
                title,
                str(len(sides[name][0])),
                f"{seconds:.2f}",
                f"{sides[name][0][0]['read'] / _GB:.2f}",
                f"{min(rates):.2f}",
                f"{min(rates) / min(plain):.2f}" if compared else ABSENT,
                ABSENT if name.startswith("read") else f"{extra:.0f}",
            ]
        )
    machine = result["machine"]
    show(
        f"HF weights of {result['bytes'] / _GB:.2f} GB in bf16, {'from the disk' if result['cold'] else 'cached'}; "
        f"medians of {result['rounds']} rounds; {machine['cpu']}, {machine['cores']} cores, "
        f"load {machine['load_average_before']:.1f}",
        f"the exported file has the source's bytes: {'yes' if result['export_has_the_same_bytes'] else 'NO'}",
        make_table(("side", "processes", "seconds", "GB each", "GB/s each", "of plain reads", "extra MiB each"), rows),
    )
    share = min(ours / reads for ours, reads in zip(_rates(sides["load"]), plain, strict=True))
    sys.stdout.write(f"extra MiB per rank: {_extra(sides['load']):.0f}, fraction of read rate: {share:.2f}\n")


def _rates(turns: list[list[dict[str, Any]]]) -> list[float]:
    """GB/s of each process, the median over the rounds."""
    processes = range(len(turns[0]))
    return [statistics.median(turn[each]["read"] / turn[each]["seconds"] / _GB for turn in turns) for each in processes]


def _extra(turns: list[list[dict[str, Any]]]) -> float:
    """The most that any process took in any round."""
    return max(float(each["extra_mib"]) for turn in turns for each in turn)


if __name__ == "__main__":  # every side is a process that imports this file again
    main()
