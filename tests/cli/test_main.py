import argparse
import json
import os
import subprocess
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from megatron_tspin.cli import main as main_module
from megatron_tspin.cli.main import build_parser, main
from megatron_tspin.config import Config, ParallelSection
from megatron_tspin.config_source import dump_config, settings
from megatron_tspin.errors import DivergenceError, InputError, ParityError, StageError
from tests.selfplay.fake_world import tree_of

REPOSITORY = Path(__file__).resolve().parents[2]
COMMANDS = (
    "run", "quickstart", "tokenize", "convert", "rollout", "train", "generate", "evaluate", "score", "export", "report",
    "checkpoint", "bench",
)  # fmt: skip
RANK_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "TSPIN_LOG_FILE")


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No rank, no driver; what a command puts into the environment goes away again."""
    for name in RANK_VARIABLES:
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    yield


@pytest.fixture
def run_yaml(world: Path) -> str:
    path = world / "run.yaml"
    path.write_text(dump_config(Config.model_validate(tree_of(world))))
    return str(path)


class Calls:
    """Stands in for the modules that need torch, and remembers what was asked of them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.last: tuple[str, tuple[Any, ...]] | None = None
        self.error: BaseException | None = None
        self._monkeypatch = monkeypatch

    def module(self, name: str, *functions: str) -> None:
        fake = types.ModuleType(name)
        for function in functions:
            setattr(fake, function, self._recorder(function))
        self._monkeypatch.setitem(sys.modules, name, fake)

    def _recorder(self, name: str) -> Any:
        def record(*args: Any) -> None:
            self.last = (name, args)
            if self.error is not None:
                raise self.error

        return record


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    found = Calls(monkeypatch)
    conversion = ("convert_run", "convert_checkpoint", "export_run", "export_checkpoint")
    found.module("megatron_tspin.data.tokenization", "tokenize_run")
    found.module("megatron_tspin.conversion.stages", *conversion)
    found.module("megatron_tspin.training.stages", "train_run", "score_file")
    found.module("megatron_tspin.generation.stages", "rollout_run", "generate_file", "evaluate_file")
    found.module("megatron_tspin.report.html", "write_report")
    return found


@pytest.mark.parametrize("command", COMMANDS)
def test_help_teaches(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main([command, "--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    for words in ("\nreads ", "\nwrites ", "\nexample", "Exit codes: 0 done;", f"tspin {command}"):
        assert words in text
    assert max(map(len, text.splitlines())) <= 120


def test_every_command_is_listed(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    text = capsys.readouterr().out
    assert all(f"\n    {command}" in text for command in COMMANDS)


@pytest.mark.parametrize("argv", [[], ["nonsense"], ["run", "--no-such-flag"], ["train", "--config", "x"]])
def test_bad_command_lines_exit_2(argv: list[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(argv)
    assert caught.value.code == 2


def test_flags_are_not_abbreviated() -> None:
    with pytest.raises(SystemExit):
        main(["run", "--dry"])


@pytest.mark.parametrize("command", COMMANDS)
def test_examples_in_the_help_are_valid_command_lines(command: str) -> None:
    parser = build_parser()
    subparsers = parser._subparsers
    assert subparsers is not None
    actions: Any = subparsers._group_actions[0]
    text = actions.choices[command].description.replace("\\\n", " ")
    examples = [line.split(f" {command} ")[1] for line in text.splitlines() if f" {command} -" in line or
                line.startswith(f"  tspin {command} ")]  # fmt: skip
    assert examples
    for example in examples:
        parser.parse_args([command, *example.split()])


def test_stage_commands_call_their_functions(calls: Calls, world: Path, run_yaml: str) -> None:
    config = Config.model_validate(tree_of(world))
    unread = {"run_dir": "", "data__annotated": ""}
    answered = tree_of(world, **unread, data__held_out=None, evaluation={})
    scored = tree_of(world, **unread, data__held_out=None, evaluation={}, generation={})
    evaluated = tree_of(world, **unread)
    for tree in (scored, answered, evaluated):
        del tree["self_play"]
    config_flag = ["--config", run_yaml]
    here = Path
    for argv, expected in [
        (["tokenize", *config_flag], ("tokenize_run", (config,))),
        (["convert", *config_flag], ("convert_run", (config,))),
        (["export", *config_flag], ("export_run", (config,))),
        (["rollout", *config_flag, "--iteration", "2"], ("rollout_run", (config, 2))),
        (["train", *config_flag, "--iteration", "1"], ("train_run", (config, 1, None, None))),
        (
            ["train", *config_flag, "--iteration", "1", "--load", "a", "--save", "b"],
            ("train_run", (config, 1, here("a"), here("b"))),
        ),
        (
            ["score", *config_flag, "--load", "a", "--data", "b", "--output", "c"],
            ("score_file", (Config.model_validate(scored), here("a"), here("b"), here("c"), False)),
        ),
        (
            ["generate", *config_flag, "--load", "a", "--prompts", "b", "--output", "c"],
            ("generate_file", (Config.model_validate(answered), here("a"), here("b"), here("c"), 0, 1, False)),
        ),
        (
            ["evaluate", *config_flag, "--load", "a", "--iteration", "3", "--output", "c"],
            ("evaluate_file", (Config.model_validate(evaluated), here("a"), 3, here("c"), False)),
        ),
        (
            ["report", "a", "--compare", "b", "c"],
            ("write_report", (here("a"), [here("b"), here("c")], here("a/report.html"))),
        ),
    ]:
        assert main(argv) == 0, argv
        assert calls.last == expected


def test_conversion_without_a_run(calls: Calls, monkeypatch: pytest.MonkeyPatch) -> None:
    layout = ParallelSection(tensor_model_parallel_size=2)
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    flags = ["--hf-checkpoint", "hf", "--save", "out", "--tensor-model-parallel-size", "2"]
    assert main(["convert", *flags]) == 0
    assert calls.last == ("convert_checkpoint", (Path("hf"), Path("out"), layout, True, None, 5e-6))
    assert main(["convert", *flags, "--no-verify"]) == 0
    assert calls.last == ("convert_checkpoint", (Path("hf"), Path("out"), layout, False, None, 5e-6))
    assert main(["convert", *flags, "--verify", "--verify-data", "d", "--bound", "1e-3"]) == 0
    assert calls.last == ("convert_checkpoint", (Path("hf"), Path("out"), layout, True, Path("d"), 1e-3))
    assert main(["export", "--load", "core", *flags]) == 0
    assert calls.last == ("export_checkpoint", (Path("core"), Path("hf"), Path("out"), layout, None, None))


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["convert"], "--hf-checkpoint and --save"),
        (["export", "--save", "x"], "--load and --hf-checkpoint"),
        (["convert", "--hf-checkpoint", "a", "--save", "b", "--no-verify", "--verify-data", "c"], "of no use with"),
        (["convert", "--hf-checkpoint", "a", "--save", "b", "--no-verify", "--bound", "1"], "of no use with"),
        (["convert", "--hf-checkpoint", "a", "--save", "b", "--seed", "1"], "--seed: only used together with --config"),
        (["convert", "--hf-checkpoint", "a", "--save", "b", "--set", "seed=1"], "--seed: only used together with"),
        (
            ["convert", "--hf-checkpoint", "a", "--save", "b", "--set", "generation.shard_size=1"],
            "--set generation.shard_size: only used together with --config",
        ),
        (["convert", "--set", "model.hf_checkpoint=/absent"], "this command needs --save"),
        (["convert", "--hf-checkpoint", "a", "--save", "b", "--sequence-parallel"], "sequence_parallel needs"),
        (["convert", "--hf-checkpoint", "a", "--save", "b", "--tspin-cpu-threads", "0"], "--tspin-cpu-threads"),
        (["run", "--run-dir", "x"], "`model` is missing"),
        (["report", "/absent"], "/absent"),
    ],
)
def test_bad_input_is_one_line_and_exit_2(argv: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(argv) == 2
    errors = capsys.readouterr().err
    assert words in errors and "Traceback" not in errors
    assert all(line.startswith("tspin: error: ") for line in errors.splitlines())


def test_score_asks_only_for_what_it_reads(calls: Calls, world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = world / "score.yaml"
    path.write_text(
        "model: {hf_checkpoint: hf}\ndata: {seq_length: 32}\ngeneration: {temperature: -1}\nevaluation: 3\n"
        "training: {layout: padded, global_batch_size: 10}\n"
    )
    files = ["--config", str(path), "--load", "a"]
    assert main(["score", *files, "--data", "b", "--output", "c"]) == 0
    name, (config, *_) = calls.last or ("", (None,))
    assert name == "score_file" and (config.model.hf_checkpoint, config.data.seq_length) == ("hf", 32)
    path.write_text("data: {template: chat}\n")
    assert main(["score", *files, "--data", "b", "--output", "c"]) == 2
    assert "`model` is missing" in capsys.readouterr().err


def test_generate_asks_only_for_what_it_reads(calls: Calls, world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = world / "generate.yaml"
    path.write_text("model: {hf_checkpoint: hf}\noptimizer: {lr: fast}\n")
    argv = ["generate", "--config", str(path), "--load", "a", "--prompts", "b", "--output", "c"]
    assert main(argv) == 0
    assert main([*argv, "--tspin-max-new-tokens", "2048"]) == 2
    assert f"{path}: generation.max_new_tokens (2048) must be smaller" in capsys.readouterr().err


class ReadArguments(argparse.Namespace):
    """Remembers which options were looked at."""

    def __init__(self) -> None:
        super().__init__()
        self.looked_at: set[str] = set()

    def __getattribute__(self, name: str) -> Any:
        if not name.startswith("_") and name != "looked_at":
            self.looked_at.add(name)
        return super().__getattribute__(name)


def options_of(command: str) -> list[argparse.Action]:
    subparsers: Any = build_parser()._subparsers
    actions = subparsers._group_actions[0].choices[command]._actions
    return [action for action in actions if not isinstance(action, argparse._HelpAction)]


def given(action: argparse.Action, world: Path) -> list[str]:
    """An option with some value that is not its default."""
    if action.nargs == 0:
        return [action.option_strings[-1]]
    if action.choices is not None:
        return [action.option_strings[0], list(action.choices)[-1]]
    number = action.metavar in ("N", "X", "SIZE")
    return [action.option_strings[0], "2" if number else str(world / "named")]


FILE_COMMANDS = {
    "generate": ["--load", "a", "--prompts", "b", "--output", "c"],
    "score": ["--load", "a", "--data", "b", "--output", "c"],
    "evaluate": ["--load", "a", "--iteration", "3", "--output", "c"],
    "convert": ["--hf-checkpoint", "a", "--save", "b"],
    "export": ["--load", "a", "--hf-checkpoint", "b", "--save", "c"],
}


@pytest.mark.parametrize("command", [*FILE_COMMANDS, "convert --config", "export --config"])
def test_an_option_is_read_or_refused(
    command: str, calls: Calls, world: Path, run_yaml: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """No option that a person gives is passed over in silence; settings have a test of their own below."""
    name, _, with_config = command.partition(" ")
    needed = ["--config", run_yaml] if with_config else FILE_COMMANDS[name]
    if name in ("generate", "score", "evaluate"):
        needed = ["--config", run_yaml, *needed]
    names = {item.name for item in settings()}
    passed_over = []
    for action in options_of(name):
        if action.dest in names or action.dest in ("assignments", "config") or action.option_strings[0] in needed:
            continue
        parsed = build_parser().parse_args([name, *needed, *given(action, world)], ReadArguments())
        parsed.looked_at.clear()
        try:
            parsed.run(parsed)
        except InputError as error:
            assert action.option_strings[0] in str(error) or action.dest in str(error), (action.dest, str(error))
            continue
        if action.dest not in parsed.looked_at:
            passed_over.append(action.dest)
    assert passed_over == []


@pytest.mark.parametrize(
    ("command", "setting"),
    [
        ("generate", ("--held-out", "x")),
        ("generate", ("--set", "evaluation.greedy=false")),
        ("score", ("--over-long", "drop")),
        ("score", ("--set", "generation.temperature=0")),
        ("evaluate", ("--annotated", "x")),
        ("evaluate", ("--set", "self_play.iterations=3")),
    ],
)
def test_a_setting_that_a_command_does_not_read_is_refused(
    command: str, setting: tuple[str, ...], calls: Calls, run_yaml: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([command, "--config", run_yaml, *FILE_COMMANDS[command], *setting]) == 2
    assert "this command does not read that" in capsys.readouterr().err and calls.last is None


def test_flags_of_a_run_and_of_a_checkpoint_do_not_mix(calls: Calls, run_yaml: str) -> None:
    assert main(["convert", "--config", run_yaml, "--save", "x"]) == 2
    assert main(["export", "--config", run_yaml, "--load", "x"]) == 2
    assert calls.last is None


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (InputError("a\nb"), 2),
        (StageError("a"), 3),
        (ParityError("a"), 4),
        (DivergenceError("a"), 5),
        (KeyboardInterrupt(), 130),
        (RuntimeError("boom"), 1),
    ],
)
def test_exit_codes(
    calls: Calls, run_yaml: str, capsys: pytest.CaptureFixture[str], error: BaseException, code: int
) -> None:
    calls.error = error
    assert main(["tokenize", "--config", run_yaml]) == code
    errors = capsys.readouterr().err
    assert ("Traceback" in errors) == (code == 1)
    if code == 2:
        assert errors == "tspin: error: a\ntspin: error: b\n"
    if code == 1:
        assert "RuntimeError: boom" in errors


def test_a_stage_of_a_run_keeps_log_traceback_and_failure(
    calls: Calls, run_yaml: str, world: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    log_file = world / "tokenize.log"
    monkeypatch.setenv("TSPIN_LOG_FILE", str(log_file))
    calls.error = RuntimeError("boom")
    assert main(["tokenize", "--config", run_yaml]) == 1
    assert "Traceback" in log_file.read_text() and "boom" in log_file.read_text()
    failure = json.loads((world / "tokenize.failure.json").read_text())
    assert failure == {"rank": 0, "exit_code": 1, "message": "RuntimeError: boom", "consequence": False}
    (world / "tokenize.failure.json").unlink()
    calls.error = InputError("line 3")
    capsys.readouterr()
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        assert main(["tokenize", "--config", run_yaml]) == 2
    assert capsys.readouterr().err == "tspin: error: line 3\n"  # said once, not once a rank
    assert "tspin: error: line 3" in log_file.read_text()


def test_only_rank_0_speaks(calls: Calls, run_yaml: str, monkeypatch: pytest.MonkeyPatch) -> None:
    spoke: list[bool] = []
    monkeypatch.setattr(main_module, "set_up_logging", lambda speak: spoke.append(speak))
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        main(["tokenize", "--config", run_yaml])
    assert spoke == [True, False]


def test_one_process_is_a_world_of_one(calls: Calls, run_yaml: str) -> None:
    assert main(["convert", "--config", run_yaml]) == 0
    assert {name: os.environ[name] for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")} == {
        "RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0",
    }  # fmt: skip
    assert os.environ["MASTER_ADDR"] == "127.0.0.1" and os.environ["MASTER_PORT"] == "0"


def test_more_ranks_need_torchrun(
    calls: Calls, run_yaml: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["convert", "--config", run_yaml, "--tspin-data-parallel-size", "2"]
    monkeypatch.setattr(sys, "argv", ["tspin", *argv])
    assert main(argv) == 2
    assert f"torchrun --nproc-per-node 2 -m megatron_tspin convert --config {run_yaml}" in capsys.readouterr().err
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert main(argv) == 2
    assert "3 processes were started" in capsys.readouterr().err
    assert calls.last is None


def test_generation_uses_its_own_layout(calls: Calls, run_yaml: str, monkeypatch: pytest.MonkeyPatch) -> None:
    argv = ["rollout", "--config", run_yaml, "--iteration", "0", "--tspin-data-parallel-size", "2"]
    assert main([*argv, "--tspin-generation-data-parallel-size", "1"]) == 0


def test_a_stage_by_hand_respects_the_lock(
    calls: Calls, run_yaml: str, world: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from megatron_tspin.selfplay.lock import run_lock

    with run_lock(world / "run"):
        assert main(["tokenize", "--config", run_yaml]) == 2
        assert "in use by process" in capsys.readouterr().err
        monkeypatch.setenv("TSPIN_LOG_FILE", str(world / "x.log"))  # as the driver starts it
        assert main(["tokenize", "--config", run_yaml]) == 0


def test_negative_iterations_are_refused(run_yaml: str) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["train", "--config", run_yaml, "--iteration", "-1"])
    assert caught.value.code == 2


CHECK_IMPORTS = """
import sys
from megatron_tspin.cli.main import main
try:
    code = main(sys.argv[1:])
except SystemExit as error:
    code = error.code
heavy = {"torch", "transformers", "megatron", "plotly"} & set(sys.modules)
sys.exit(f"imported {heavy}" if heavy else code)
"""


@pytest.mark.processes
@pytest.mark.parametrize("arguments", [["--help"], ["train", "--help"], ["run", "--dry-run"]])
def test_start_up_imports_no_torch(arguments: list[str], run_yaml: str, world: Path) -> None:
    more = ["--config", run_yaml] if arguments[0] == "run" else []
    done = subprocess.run(
        [sys.executable, "-c", CHECK_IMPORTS, *arguments, *more], capture_output=True, text=True, cwd=REPOSITORY
    )
    assert done.returncode == 0, done.stderr
    if more:
        assert "train_001" in done.stdout
    assert not (world / "run").exists()


@pytest.mark.processes
@pytest.mark.parametrize(
    ("script", "command"),
    [
        ("convert", "convert"),
        ("tokenize_data", "tokenize"),
        ("generate", "generate"),
        ("score", "score"),
        ("train", "train"),
        ("export", "export"),
    ],
)
def test_tools_are_their_commands(script: str, command: str) -> None:
    done = subprocess.run(
        [sys.executable, str(REPOSITORY / "tools" / f"{script}.py"), "--help"],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
    )
    assert done.returncode == 0, done.stderr
    assert f"usage: tspin {command} " in done.stdout


def test_a_driver_forgets_the_launcher_around_it(
    world: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    log_file = world / "x.log"
    for rank, said in (("1", "started this command as its process 1; start it once"), ("0", "`model` is missing")):
        for name, value in {"RANK": rank, "WORLD_SIZE": "2", "TSPIN_LOG_FILE": str(log_file)}.items():
            monkeypatch.setenv(name, value)
        assert main(["run", "--run-dir", str(world / "run")]) == 2
        assert said in capsys.readouterr().err
        assert not {"RANK", "WORLD_SIZE", "TSPIN_LOG_FILE"} & set(os.environ) and not log_file.exists()
