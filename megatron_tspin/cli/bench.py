"""`tspin bench`: speed of training steps and answers beside other tools, noise of number formats, checks of a GPU."""

import argparse
import dataclasses
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_tspin.benchmark.machine import cores
from megatron_tspin.cli.arguments import command_parser, positive_number
from megatron_tspin.errors import EXIT_OK, StageError

if TYPE_CHECKING:
    from megatron_tspin.benchmark.settings import StepSettings
    from megatron_tspin.benchmark.side import SideMaker
    from megatron_tspin.cli.arguments import Subparsers

_GPU_MINUTES = 7.8

_DESCRIPTION = """Measure how fast steps and answers are, beside plain transformers, in one run on this machine.

reads   an HF checkpoint; the triplets are random tokens
writes  JSON and a plot in benchmarks/results, or --output

examples
  tspin bench step --quick --model CHECKPOINT
  tspin bench generate --quick --model CHECKPOINT
  tspin bench noise --model CHECKPOINT --data answers.jsonl
  tspin bench gpu --out report"""

_NOISE_DESCRIPTION = """Measure what each number format does to the log-probs of whole responses, beside fp32.

All formats score the same responses with the same weights in one process, one after another. A format that this
machine cannot compute is listed with the reason.

reads   the HF checkpoint --model; --data, JSON lines with `prompt` and `response`
writes  noise_<model>.json in --output

example
  tspin bench noise --model CHECKPOINT --data answers.jsonl --limit 64"""

_STEP_DESCRIPTION = """Measure one training step, forward and backward over a global batch of triplets, side by side.

All sides run in one go, on the same weights, token ids and threads, and take turns. The optimizer is left out
everywhere, and the sides have to agree on loss and log-probs before anything is timed. The last line printed is the
speedup over transformers.

reads   the HF checkpoint --model; the triplets are random tokens with the lengths that --lengths describes
writes  step_<model>_<lengths>_<max length>_mb<micro-batch>.json (every repetition) and .html (plot) in --output

examples
  tspin bench step --quick --model smollm2
  tspin bench step --model smollm2 --sides transformers transformers_mb1 packed
  tspin bench step --head-memory"""

_GENERATE_DESCRIPTION = """Measure how fast prompts are answered, side by side, in one run on this machine.

All engines answer the same prompts with the same weights and threads, sampled at temperature 1, each in a process of
its own, and take turns. The last line printed is the speedup over transformers at a batch of 64.

reads   the HF checkpoint --model; --prompts, JSON lines with `prompt`, asked through the checkpoint's chat template
writes  generate_<model>.json (every measurement) and .html (plot) in --output

engines
{engines}

examples
  tspin bench generate --quick --model smollm2 --prompts questions.jsonl
  tspin bench generate --model smollm2 --prompts questions.jsonl --engines ours transformers"""

_ITERATION_DESCRIPTION = """Measure a self-play iteration, rollout of y' and training, beside one in plain transformers.

Both sides answer the same prompts with the same weights and threads, and train on the same triplets: transformers by
`generate` and by one padded batch of all responses, with torch's RMSProp. Each stage is a process of its own, and the
sides take turns. The last line printed is the speedup of both stages together.

reads   the HF checkpoint --model; --data, JSON lines with `prompt` and `response`
writes  iteration_<model>.json (every measurement) in --output

example
  tspin bench iteration --quick --model smollm2 --data annotated.jsonl"""

_GPU_DESCRIPTION = """Run every check and benchmark of a GPU, in less than eight minutes on one H100 or H200.

Each check runs in a process of its own with a time limit, so that none that fails or hangs stops the others. Models
have known shapes and random weights: no checkpoint is read. Without a GPU a reduced form runs, which keeps the code
alive and whose figures mean nothing. The last thing printed is the table.

writes  gpu_report.json (every figure, with its unit and meaning; up to date after every check), gpu_report.txt (the
        table), and logs/ in --out

checks
{checks}

examples
  tspin bench gpu --out report
  tspin bench gpu --out report --only step parity --minutes 4"""


def add_parser(subparsers: "Subparsers") -> None:
    """Adds the command."""
    parser = command_parser(subparsers, "bench", "speed of a training step, beside other tools", _DESCRIPTION)
    benches = parser.add_subparsers(title="benchmarks", metavar="BENCHMARK", required=True)
    step = command_parser(benches, "step", "one step, forward and backward", _STEP_DESCRIPTION)
    add_step_arguments(step)
    step.add_argument(
        "--head-memory", action="store_true", help="measure the peak memory of the head alone instead of a step"
    )
    step.set_defaults(run=run)
    _add_noise(benches)
    _add_generate(benches)
    _add_iteration(benches)
    _add_gpu(benches)


def _add_noise(benches: "Subparsers") -> None:
    noise = command_parser(benches, "noise", "log-probs in each number format", _NOISE_DESCRIPTION)
    noise.add_argument("--model", type=Path, metavar="HF_DIR", help="checkpoint [the quickstart's tiny one]")
    noise.add_argument("--data", type=Path, metavar="JSONL", help="prompts and responses [built-in sentences]")
    noise.add_argument("--limit", type=positive_number, metavar="N", help="take the first N of them [all]")
    _add_threads(noise)
    _add_output(noise)
    noise.set_defaults(run=run_noise)


def _add_generate(benches: "Subparsers") -> None:
    from megatron_tspin.benchmark.answers.settings import ENGINES

    engines = "\n".join(f"  {name:<24}{what}" for name, what in ENGINES.items())
    description = _GENERATE_DESCRIPTION.format(engines=engines)
    generate = command_parser(benches, "generate", "tokens a second of answers", description)
    generate.add_argument(
        "--model", type=Path, metavar="HF_DIR", help="checkpoint of the policy [the quickstart's tiny one]"
    )
    generate.add_argument("--prompts", type=Path, metavar="FILE", help="questions to answer [64 of random tokens]")
    generate.add_argument("--engines", nargs="+", choices=list(ENGINES), help="what to measure [all; --quick: two]")
    generate.add_argument(
        "--new-tokens", type=positive_number, default=128, metavar="N", help="most tokens of an answer [128]"
    )
    generate.add_argument("--quick", action="store_true", help="a batch of 64 alone, within six minutes on two cores")
    generate.add_argument(
        "--rounds", type=positive_number, metavar="N", help="measurements of each engine [3; --quick: 2]"
    )
    generate.add_argument(
        "--minutes",
        type=float,
        metavar="M",
        help="start no further round of an engine that would end later [no limit; --quick: 5.5]",
    )
    _add_threads(generate)
    _add_output(generate)
    generate.set_defaults(run=run_generate)


def _add_iteration(benches: "Subparsers") -> None:
    iteration = command_parser(benches, "iteration", "rollout and training of an iteration", _ITERATION_DESCRIPTION)
    iteration.add_argument("--model", type=Path, required=True, metavar="HF_DIR", help="checkpoint of the policy")
    iteration.add_argument("--data", type=Path, required=True, metavar="JSONL", help="prompts and annotated responses")
    iteration.add_argument("--prompts", type=positive_number, metavar="N", help="how many of them [64; --quick: 24]")
    iteration.add_argument(
        "--new-tokens", type=positive_number, default=128, metavar="N", help="most tokens of an answer [128]"
    )
    iteration.add_argument(
        "--rounds", type=positive_number, metavar="N", help="measurements of each side [3; --quick: 1]"
    )
    iteration.add_argument("--quick", action="store_true", help="small enough for ten minutes on two cores")
    _add_threads(iteration)
    _add_output(iteration)
    iteration.set_defaults(run=run_iteration)


def _add_gpu(benches: "Subparsers") -> None:
    from megatron_tspin.benchmark.gpu_report.catalogue import CHECKS

    width = max(len(check.name) for check in CHECKS)
    checks = "\n".join(f"  {check.name:{width}}  {check.title}" for check in CHECKS)
    gpu = command_parser(benches, "gpu", "every check of a GPU", _GPU_DESCRIPTION.format(checks=checks))
    gpu.add_argument("--out", type=Path, required=True, metavar="DIR", help="where the results go")
    gpu.add_argument("--only", nargs="+", default=[], metavar="CHECK", help="run these checks [all]")
    gpu.add_argument(
        "--reduced", action="store_true", help="the small form [without a CUDA device; with one, the full form]"
    )
    gpu.add_argument(
        "--minutes",
        type=float,
        default=_GPU_MINUTES,
        metavar="M",
        help=f"no check runs on after these [{_GPU_MINUTES}]",
    )
    gpu.set_defaults(run=run_gpu)


def add_step_arguments(parser: argparse.ArgumentParser, sides: Iterable[str] | None = None) -> None:
    """Adds what says how a step is run; `step_settings` reads it.

    Args:
        parser: Gets the options.
        sides: Those to choose from; None for all of this package.
    """
    from megatron_tspin.benchmark.lengths import DISTRIBUTIONS
    from megatron_tspin.benchmark.settings import SIDES

    def count(flag: str, what: str) -> None:
        parser.add_argument(flag, type=positive_number, metavar="N", help=what)

    parser.add_argument(
        "--model", type=Path, metavar="HF_DIR", help="checkpoint of the policy [the quickstart's tiny one]"
    )
    parser.add_argument(
        "--sides",
        nargs="+",
        choices=list(sides or SIDES),
        help="what to measure [all; --quick: our own and `transformers`]",
    )
    parser.add_argument("--lengths", choices=DISTRIBUTIONS, default="ultrachat", help="length distribution [ultrachat]")
    count("--max-length", "most tokens of prompt and response [2048; --quick: 384]")
    count("--triplets", "triplets of the global batch [16; --quick: 4]")
    count("--micro-batch-size", "padded triplets in one pass [4; --quick: 2]")
    count(
        "--recipe-micro-batch-size",
        "the same of the side `recipe`, which checkpoints gradients [8, as the public recipes]",
    )
    count("--row-capacity", "tokens of a packed row [as --tspin-row-capacity has it]")
    parser.add_argument("--bf16", action="store_true", help="compute in bfloat16 instead of fp32")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of lengths and token ids [0]")
    parser.add_argument("--quick", action="store_true", help="small enough for ten minutes on two cores")
    count("--rounds", "timed repetitions of each side [5; --quick: 3]")
    parser.add_argument(
        "--minutes", type=float, metavar="M", help="start no round that would end later [no limit; --quick: 9]"
    )
    _add_threads(parser)
    _add_output(parser)


def _add_threads(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--threads", type=positive_number, default=cores(), metavar="N", help="threads of torch [all cores]"
    )


def _add_output(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("benchmarks/results"),
        metavar="DIR",
        help="where the results go [benchmarks/results]",
    )


def run(args: argparse.Namespace) -> int:
    """Runs `tspin bench step`; see `run_step` for what is raised."""
    if not args.head_memory:
        return run_step(args)
    from megatron_tspin.benchmark.head_memory import HeadSettings, report_heads, run_head_benchmark

    settings = HeadSettings(threads=args.threads, bf16=args.bf16)
    report_heads(settings, run_head_benchmark(settings), args.output)
    return EXIT_OK


def run_step(args: argparse.Namespace, makers: "Mapping[str, SideMaker] | None" = None) -> int:
    """Compares the sides.

    Args:
        args: See `add_step_arguments`.
        makers: Of sides that the package does not know, by name. Those may fail.

    Raises:
        StageError: One of our own sides or plain transformers could not be measured.
    """
    from megatron_tspin.benchmark.output import print_result, write_result
    from megatron_tspin.benchmark.settings import SIDES
    from megatron_tspin.benchmark.step import run_step_benchmark

    result = run_step_benchmark(step_settings(args), makers)
    write_result(result, args.output)
    print_result(result)
    failed = [f"{side.name}: {side.absent}" for side in result.sides if side.absent is not None and side.name in SIDES]
    if failed:
        raise StageError("these sides could not be measured\n" + "\n".join(failed))
    return EXIT_OK


def step_settings(args: argparse.Namespace) -> "StepSettings":
    """What the options of `add_step_arguments` ask for.

    Raises:
        InputError: The policy cannot do it.
    """
    from megatron_tspin.benchmark.settings import StepSettings, settle
    from megatron_tspin.cli.quickstart import example_folder
    from megatron_tspin.models.hf_config import read_architecture

    fields = {field.name for field in dataclasses.fields(StepSettings)} - {"model"}
    given: dict[str, Any] = {name: value for name, value in vars(args).items() if name in fields}
    return settle(given, args.quick, read_architecture(args.model or example_folder() / "checkpoint"))


def run_generate(args: argparse.Namespace) -> int:
    """Runs the comparison of engines.

    Raises:
        InputError: Model or prompts cannot be read.
        StageError: Our engine or transformers' could not be measured.
    """
    from megatron_tspin.benchmark.answers.measure import run_answer_benchmark
    from megatron_tspin.benchmark.answers.output import print_result, write_result
    from megatron_tspin.benchmark.answers.prompts import read_questions
    from megatron_tspin.benchmark.answers.settings import (
        ENGINES,
        OURS,
        TRANSFORMERS,
        AnswerSettings,
        random_prompts,
        workloads,
    )
    from megatron_tspin.cli.quickstart import example_folder
    from megatron_tspin.models.hf_config import read_architecture

    architecture = read_architecture(args.model or example_folder() / "checkpoint")
    prompts = random_prompts(architecture, 0) if args.prompts is None else read_questions(architecture, args.prompts)
    wanted = args.engines or ((OURS, TRANSFORMERS) if args.quick else tuple(ENGINES))
    settings = AnswerSettings(
        model=str(architecture.folder),
        prompts=prompts,
        workloads=workloads(args.quick),
        engines=tuple(name for name in ENGINES if name in wanted),
        new_tokens=args.new_tokens,
        rounds=args.rounds or (2 if args.quick else 3),
        threads=args.threads,
        minutes=args.minutes or (5.5 if args.quick else None),
    )
    result = run_answer_benchmark(settings)
    write_result(result, args.output)
    print_result(result)
    failed = result.failures((OURS, TRANSFORMERS))
    if failed:
        raise StageError("these engines could not be measured\n" + "\n".join(failed))
    return EXIT_OK


def run_iteration(args: argparse.Namespace) -> int:
    """Runs the comparison of iterations.

    Raises:
        InputError: Model or data cannot be read.
        ChildError: A side could not be measured.
    """
    from megatron_tspin.benchmark.answers.prompts import read_examples
    from megatron_tspin.benchmark.iteration.measure import run_iteration_benchmark
    from megatron_tspin.benchmark.iteration.settings import IterationSettings
    from megatron_tspin.models.hf_config import read_architecture

    architecture = read_architecture(args.model)
    count = args.prompts or (24 if args.quick else 64)
    prompts, responses = zip(*read_examples(architecture, args.data, count), strict=True)
    settings = IterationSettings(
        model=str(architecture.folder),
        prompts=prompts,
        responses=responses,
        new_tokens=args.new_tokens,
        global_batch_size=8 if args.quick else 16,
        rounds=args.rounds or (1 if args.quick else 3),
        threads=args.threads,
    )
    result = run_iteration_benchmark(settings)
    result.write(args.output)
    result.show()
    return EXIT_OK


def run_noise(args: argparse.Namespace) -> int:
    """Runs the comparison of number formats."""
    from megatron_tspin.benchmark.noise import measure_formats, report_formats
    from megatron_tspin.cli.quickstart import example_folder
    from megatron_tspin.conversion.parity import read_sentences

    model = args.model or example_folder() / "checkpoint"
    sentences = read_sentences(model, args.data)[: args.limit]
    report_formats(model, sentences, args.threads, measure_formats(model, sentences, args.threads), args.output)
    return EXIT_OK


def run_gpu(args: argparse.Namespace) -> int:
    """Runs the report of a GPU.

    Raises:
        InputError: No such check.
        StageError: A check failed; the others ran.
    """
    from megatron_tspin.benchmark.gpu_report.report import TABLE_NAME, ReportSettings, failures, run_report
    from megatron_tspin.platform import has_cuda

    reduced = args.reduced or not has_cuda()
    settings = ReportSettings(args.out, reduced, tuple(args.only), args.minutes)
    failed = failures(run_report(settings))
    sys.stdout.write((args.out / TABLE_NAME).read_text(encoding="utf-8"))
    if failed:
        raise StageError("these checks failed\n" + "\n".join(failed))
    return EXIT_OK
