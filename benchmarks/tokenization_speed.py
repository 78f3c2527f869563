"""How fast `tspin tokenize` is beside a loop over documents and beside Megatron-style pools of processes.

    python benchmarks/tokenize.py [--quick] [--tokenizer HF_FOLDER]

Every side reads the same JSON Lines, encodes prompt and response of each, and writes the same indexed files; the tokens
are compared before anything is said. The sides are processes of their own, timed from the loaded libraries to the
finished files, loading the tokenizer included, in turns, so that a busy machine slows them alike.

* loop: one document after the other through transformers' tokenizer, written by megatron-core's builder.
* pool: as Megatron-LM's `preprocess_data.py` does it: the same in `Pool.imap` over lines, 32 a task, the builder in the
  parent.
* pool, bare: that, without transformers around the tokenizers library.
* pool, batches: that, with one `encode_batch_fast` a task, one thread each.
* tspin: `tokenize_run`, whole: checks, normalised examples, digests and sidecars too.

The text is that of Python's own library and of torch, cut into examples. Without --tokenizer a byte-level BPE is
trained on it. The last line is the median over the rounds of the pool's seconds by ours; seconds of processors stand
beside them, which a busy machine changes less. Before it stand time and memory of `tokenize` and of the checks before a
run for 10,000 and 100,000 examples.
"""

import argparse
import hashlib
import json
import os
import resource
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from importlib import import_module
from itertools import islice
from multiprocessing import Pool
from pathlib import Path
from typing import Any

import numpy as np
import torch
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from megatron_tspin.config import Config
from megatron_tspin.data.splits import splits_of
from megatron_tspin.data.tokenization import tokenize_run
from megatron_tspin.run_folder import TRAIN, RunFolder, document_stem, file_of

PROCESSES = 2
_CHUNK = 32  # lines of a task, Megatron-LM's
_EOS = "<|endoftext|>"
_PROMPT, _RESPONSE = 400, 1200  # characters
_SHORT = 8  # by which examples are shorter where their number counts
_MEGABYTE = 1e6
_worker: dict[str, Any] = {}

Encoded = tuple[list[int], list[int]]


def source_text() -> Iterator[str]:
    """Python's own library and torch's sources, file by file."""
    for folder in (Path(sysconfig.get_paths()["stdlib"]), Path(torch.__file__).parent):
        for path in sorted(folder.rglob("*.py")):
            if not {"site-packages", "test"}.intersection(path.relative_to(folder).parts):
                yield path.read_text(encoding="utf-8", errors="ignore")


def write_examples(path: Path, most: int, length: int) -> int:
    """Writes up to `most` examples of `length` characters each; returns their bytes of text."""
    size = 0
    with path.open("w", encoding="utf-8") as stream:
        for prompt, response in islice(_pairs(length), most):
            size += len(prompt.encode()) + len(response.encode())
            stream.write(json.dumps({"prompt": prompt, "response": response}) + "\n")
    return size


def _pairs(length: int) -> Iterator[tuple[str, str]]:
    cut = length * _PROMPT // (_PROMPT + _RESPONSE)
    for text in source_text():
        for start in range(0, len(text) - length, length):
            prompt, response = text[start : start + cut], text[start + cut : start + length]
            if prompt.strip() and response.strip():
                yield prompt, response


def train_tokenizer(folder: Path) -> None:
    """A byte-level BPE of 16384 tokens, as an HF folder."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=16384,
        special_tokens=[_EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(islice(source_text(), 150), trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": _EOS}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def run_config(folder: Path, tokenizer: Path, data: Path) -> Config:
    """A run that tokenizes the examples as they are."""
    return Config.model_validate(
        {
            "run_dir": str(folder / "run"),
            "model": {"hf_checkpoint": str(tokenizer), "tokenizer_rules": "tokenizer.json"},
            "data": {
                "annotated": str(data), "template": "{prompt}", "seq_length": 4096, "tokenizer_threads": PROCESSES,
            },
            "generation": {"max_new_tokens": 8},
        }
    )  # fmt: skip


def load_whole(folder: str) -> None:
    """Loads transformers' tokenizer of a process that encodes."""
    from transformers import AutoTokenizer

    _worker["whole"] = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    _worker["eos"] = _worker["whole"].eos_token_id


def load(folder: str) -> None:
    """Loads the tokenizer of a process that encodes."""
    _worker["tokenizer"] = Tokenizer.from_file(f"{folder}/tokenizer.json")
    settings = json.loads((Path(folder) / "tokenizer_config.json").read_text())
    _worker["eos"] = _worker["tokenizer"].token_to_id(settings["eos_token"])


def encode_as_megatron(line: str) -> Encoded:
    """Ids of one line, by two calls of transformers' tokenizer, as Megatron-LM calls it."""
    record, tokenizer = json.loads(line), _worker["whole"]
    prompt = tokenizer(record["prompt"]).input_ids
    return prompt, [*tokenizer(record["response"], add_special_tokens=False).input_ids, _worker["eos"]]


def encode_line(line: str) -> Encoded:
    """Ids of one line, by two calls of the tokenizer."""
    record, tokenizer = json.loads(line), _worker["tokenizer"]
    prompt = tokenizer.encode(record["prompt"]).ids
    return prompt, [*tokenizer.encode(record["response"], add_special_tokens=False).ids, _worker["eos"]]


def encode_lines(lines: list[str]) -> list[Encoded]:
    """Ids of a task's lines, by two calls for all of them."""
    records, tokenizer = [json.loads(line) for line in lines], _worker["tokenizer"]
    prompts = tokenizer.encode_batch_fast([record["prompt"] for record in records])
    responses = tokenizer.encode_batch_fast([record["response"] for record in records], add_special_tokens=False)
    return [(a.ids, [*b.ids, _worker["eos"]]) for a, b in zip(prompts, responses, strict=True)]


def build(encoded: Iterable[Encoded], folder: Path) -> None:
    """Writes the ids with megatron-core's builder."""
    builders = [IndexedDatasetBuilder(str(folder / f"{key}.bin"), dtype=np.uint16) for key in ("prompt", "annotated")]
    for pair in encoded:
        for builder, ids in zip(builders, pair, strict=True):
            builder.add_document(torch.tensor(ids, dtype=torch.int64), [len(ids)])
    for builder, key in zip(builders, ("prompt", "annotated"), strict=True):
        builder.finalize(str(folder / f"{key}.idx"))


def run_loop(folder: Path, tokenizer: Path, data: Path) -> None:
    """One document after the other."""
    load_whole(str(tokenizer))
    with data.open(encoding="utf-8") as stream:
        build(map(encode_as_megatron, stream), folder)


def run_pool(folder: Path, tokenizer: Path, data: Path) -> None:
    """Documents over processes."""
    with Pool(PROCESSES, load_whole, (str(tokenizer),)) as pool, data.open(encoding="utf-8") as stream:
        build(pool.imap(encode_as_megatron, stream, _CHUNK), folder)


def run_bare_pool(folder: Path, tokenizer: Path, data: Path) -> None:
    """Documents over processes, by the tokenizers library."""
    with Pool(PROCESSES, load, (str(tokenizer),)) as pool, data.open(encoding="utf-8") as stream:
        build(pool.imap(encode_line, stream, _CHUNK), folder)


def run_pool_of_batches(folder: Path, tokenizer: Path, data: Path) -> None:
    """Batches over processes."""
    with Pool(PROCESSES, load, (str(tokenizer),)) as pool, data.open(encoding="utf-8") as stream:
        tasks = iter(lambda: list(islice(stream, _CHUNK)), [])
        build((pair for pairs in pool.imap(encode_lines, tasks) for pair in pairs), folder)


def run_ours(folder: Path, tokenizer: Path, data: Path) -> None:
    """`tspin tokenize`."""
    config = run_config(folder, tokenizer, data)
    tokenize_run(config)
    for key in ("prompt", "annotated"):
        stem = document_stem(RunFolder(Path(config.run_dir)).data, TRAIN, key)
        for kind in ("bin", "idx"):
            os.link(file_of(stem, kind), folder / f"{key}.{kind}")


def run_check(folder: Path, tokenizer: Path, data: Path) -> None:
    """The checks before a run, as far as they read examples."""
    deque(splits_of(run_config(folder, tokenizer, data).data)[TRAIN](), maxlen=0)


SIDES: dict[str, Callable[[Path, Path, Path], None]] = {
    "loop": run_loop,
    "pool": run_pool,
    "pool, bare": run_bare_pool,
    "pool, batches": run_pool_of_batches,
    "tspin": run_ours,
    "check": run_check,
}


def measure(side: str, tokenizer: Path, data: Path) -> dict[str, Any]:
    """Seconds, peak memory of the process [MB] and a digest of the files of one side, in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, str(Path(__file__).with_name("tokenize.py")), "--side", side, "--folder", folder]
        command += ["--tokenizer", str(tokenizer), "--data", str(data)]
        threads = str(PROCESSES) if side == "tspin" else "1"
        environment = {**os.environ, "RAYON_NUM_THREADS": threads, "TOKENIZERS_PARALLELISM": "true"}
        done = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True)
        found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        return found


def run_side(side: str, folder: Path, tokenizer: Path, data: Path) -> None:
    """What the process of a side does."""
    # Only ours needs it, and a user loads it once: here it is no side's time.
    import_module("transformers.models.auto.tokenization_auto")
    torch.set_num_threads(1)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    processor = time.process_time()
    start = time.perf_counter()
    SIDES[side](folder, tokenizer, data)
    seconds = time.perf_counter() - start
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    processor = sum(usage.ru_utime + usage.ru_stime for usage in used) - processor
    digest = hashlib.sha256()
    for path in sorted([*folder.glob("*.bin"), *folder.glob("*.idx")]):
        digest.update(path.name.encode() + path.read_bytes())
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    memory = {"peak": peak / 1e3, "more": (peak - before) / 1e3}
    say(json.dumps({"seconds": seconds, "processor": processor, **memory, "sha": digest.hexdigest()}))


def say(line: str) -> None:
    """Prints a line at once."""
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def compare(tokenizer: Path, data: Path, size: int, rounds: int) -> float:
    """Prints the speed of every side; returns how many times the pool's speed ours has, the median of the rounds."""
    names = ["loop", "pool", "pool, bare", "pool, batches", "tspin"]
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    for number in range(rounds):
        for name in names[number % len(names) :] + names[: number % len(names)]:
            found[name].append(measure(name, tokenizer, data))
    if len({item["sha"] for items in found.values() for item in items}) > 1:
        raise SystemExit("the sides wrote different files; nothing is compared")
    say(f"{size / _MEGABYTE:.1f} MB of text, {rounds} rounds, {PROCESSES} processes or threads; all files are the same")
    for name, items in found.items():
        seconds = sorted(item["seconds"] for item in items)
        middle = statistics.median(seconds)
        processor = statistics.median(item["processor"] for item in items)
        say(
            f"{name:14} {size / _MEGABYTE / middle:6.2f} MB/s   {middle:6.2f} s ({seconds[0]:.2f} to "
            f"{seconds[-1]:.2f}), {processor:.2f} s of processors"
        )
    pairs = zip(found["pool"], found["tspin"], strict=True)
    return float(statistics.median(pool["seconds"] / ours["seconds"] for pool, ours in pairs))


def scale(tokenizer: Path, folder: Path) -> None:
    """Prints time and memory for ten times the examples."""
    for count in (10_000, 100_000):
        data = folder / f"{count}.jsonl"
        size = write_examples(data, count, (_PROMPT + _RESPONSE) // _SHORT)
        lines = sum(1 for _ in data.open("rb"))
        for name, side in (("tokenize", "tspin"), ("check", "check")):
            item = measure(side, tokenizer, data)
            say(
                f"{name:10} {lines:7} examples, {size / _MEGABYTE:5.1f} MB: {item['seconds']:6.2f} s, peak memory "
                f"{item['peak']:.0f} MB, {item['more']:.0f} MB of them since the start"
            )


def main() -> None:
    """Runs the benchmark, or one side of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="less text and fewer rounds, some three minutes")
    parser.add_argument("--tokenizer", type=Path, help="HF folder with tokenizer.json and config.json")
    for name in ("--side", "--folder", "--data"):
        parser.add_argument(name, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        run_side(args.side, Path(args.folder), args.tokenizer, Path(args.data))
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        tokenizer = args.tokenizer or folder
        if args.tokenizer is None:
            train_tokenizer(folder)
            (folder / "config.json").write_text(json.dumps({"model_type": "llama", "vocab_size": 65536}))
        data = folder / "examples.jsonl"
        size = write_examples(data, 8000 if args.quick else 16000, _PROMPT + _RESPONSE)
        speedup = compare(tokenizer, data, size, 3 if args.quick else 5)
        scale(tokenizer, folder)
    say(f"speedup over the pool: {speedup:.2f}")


if __name__ == "__main__":
    main()
