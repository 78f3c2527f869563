"""`tspin run`: brings a run directory from wherever it stands to its report, one stage after the other."""

import datetime
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

from megatron_tspin.config import Config
from megatron_tspin.errors import (
    EXIT_INPUT,
    EXIT_OK,
    EXIT_STAGE,
    EXIT_STOPPED,
    HangError,
    StageError,
    StoppedError,
    TspinError,
)
from megatron_tspin.heartbeat import read_beats
from megatron_tspin.log import get_logger
from megatron_tspin.run_folder import RunFolder, beats_folder, rank_logs
from megatron_tspin.selfplay import launch, markers
from megatron_tspin.selfplay.failure import Failure, clear_failure, handed_on, read_failure
from megatron_tspin.selfplay.launchers import Launcher, launcher_of
from megatron_tspin.selfplay.lock import RunLock, run_lock
from megatron_tspin.selfplay.plan import Stage, plan
from megatron_tspin.selfplay.preflight import preflight
from megatron_tspin.selfplay.repair import damaged_stages, is_of_the_run, remove, remove_damage
from megatron_tspin.selfplay.retention import release_policies
from megatron_tspin.selfplay.run_config import (
    added_iterations,
    check_same_config,
    with_absolute_paths,
    with_template_date,
    write_config,
)
from megatron_tspin.selfplay.scorer_trial import try_scorer
from megatron_tspin.stop_request import STOP_SIGNALS, heeded, stop_requested

_SHOWN_RANKS, _SHOWN_LINES = 4, 6
_CRASH = "Fatal Python error"  # with which faulthandler begins

logger = get_logger(__name__)


def check_before(config: Config) -> None:
    """Refuses what cannot work before anything starts."""
    preflight(config)
    try_scorer(config)


def run(
    config: Config,
    dry_run: bool = False,
    on_iteration: Callable[[Path], None] = lambda run_dir: None,
    launcher: Launcher | None = None,
    check: Callable[[Config], None] = check_before,
    repair: bool = False,
) -> int:
    """Runs every stage that is not done yet.

    Args:
        config: The run.
        dry_run: Only print the commands and what is done, write nothing.
        on_iteration: Called with the run directory after each rollout stage.
        launcher: Starts the ranks of stages. Default: the configured one.
        check: Refuses what cannot work before anything starts.
        repair: Make again what of finished stages is damaged, instead of refusing to go on; what is whole is kept.

    Returns:
        The exit code 0.

    Raises:
        InputError: The input, the config or a file of the run cannot be used, or another driver has the run.
        StageError: A stage failed.
    """
    config = with_absolute_paths(config, Path.cwd())
    config = with_template_date(config, datetime.date.today().isoformat())
    run_dir = Path(config.run_dir)
    launcher = launcher or launcher_of(config)
    check_same_config(config)
    check(config)
    if dry_run:
        for name, paths in (damaged_stages(config) if repair else {}).items():
            sys.stdout.write(f"{name:<12} damaged  {', '.join(map(str, paths))}\n")
        _show(config, launcher)
        return EXIT_OK
    with heeded(_stop_signals(), _on_request), run_lock(run_dir) as lock:
        for stage in _reopened(config):
            markers.marker_file(run_dir, stage).unlink(missing_ok=True)
        if repair:
            remove_damage(config)
        write_config(config)
        if config.launch.launcher != "local":
            _run(_doctor(config), config, launcher, lock)
        for stage in plan(config):
            _bring_about(stage, config, launcher, lock, repair)
            if stage.name.startswith("rollout"):
                release_policies(config, latest=int(stage.name.removeprefix("rollout_")))
                on_iteration(run_dir)
    logger.info("report: %s", RunFolder(run_dir).report)
    logger.info("exported checkpoint: %s", RunFolder(run_dir).export)
    return EXIT_OK


def examine_nodes(config: Config) -> int:
    """`tspin doctor`: what a job does before its first stage, in a folder of its own, so that it disturbs no job.

    Args:
        config: The run, which need not have begun.

    Returns:
        The exit code 0.

    Raises:
        InputError: The config cannot be used, or the nodes are examined already.
        StageError: Something stands in the way; says what, on which node, and what to do.
    """
    config = with_absolute_paths(config, Path.cwd())
    folder = RunFolder(Path(config.run_dir)).doctor
    config = config.model_copy(update={"run_dir": str(folder)})
    launcher = launcher_of(config)
    with heeded(_stop_signals(), _on_request), run_lock(folder) as lock:
        write_config(config)
        _run(_doctor(config), config, launcher, lock)
    return EXIT_OK


def _doctor(config: Config) -> Stage:
    """It is none of the plan: it leaves nothing, and is never done."""
    arguments = ("doctor", "--config", str(RunFolder(Path(config.run_dir)).config), "--as-rank")
    return Stage("doctor", arguments, config.largest_layout().world_size, (), ())


def _reopened(config: Config) -> list[Stage]:
    """Done stages that go on when a run is given more iterations: what used to be its last rollout, and the export."""
    added = added_iterations(config)
    names = {f"rollout_{added.start:03d}", "export"} if added else set()
    return [stage for stage in plan(config) if stage.name in names]


def _show(config: Config, launcher: Launcher) -> None:
    """The plan for people, on stdout."""
    reopened = _reopened(config)
    for stage in plan(config):
        state = "to do"
        if markers.is_done(stage, Path(config.run_dir)) and stage not in reopened:
            state = "changed" if markers.differences(stage, config) else "done"
        sys.stdout.write(f"{stage.name:<12} {state:<8} {launch.shown(launcher.command(stage))}\n")


def _bring_about(stage: Stage, config: Config, launcher: Launcher, lock: RunLock, repair: bool) -> None:
    """Runs a stage unless it is done."""
    run_dir = Path(config.run_dir)
    if markers.is_done(stage, run_dir):
        changed = markers.differences(stage, config)
        if not changed:
            logger.info("stage %s: done before", stage.name)
            return
        if not stage.disposable:
            if not (repair and is_of_the_run(changed)):
                raise markers.refusal(stage, run_dir, changed)
            for path in stage.outputs:  # made from what is another file now
                remove(path)
        logger.info("stage %s: again, because %s", stage.name, "; ".join(changed))
    _stop_if_requested(f"stage {stage.name}")
    _execute(stage, config, launcher, lock)


def _execute(stage: Stage, config: Config, launcher: Launcher, lock: RunLock) -> None:
    run_dir = Path(config.run_dir)
    inputs = markers.digests(stage.inputs, run_dir)
    started = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    seconds = _run(stage, config, launcher, lock)
    if missing := markers.missing_outputs(stage, run_dir):
        log_file = RunFolder(run_dir).log(stage.name)
        raise StageError(f"stage {stage.name} ended well, but did not write {', '.join(missing)}; see {log_file}")
    if markers.digests(stage.inputs, run_dir) != inputs:
        raise StageError(f"stage {stage.name}: a file it reads was changed while it ran; run the same command again")
    lock.check()
    markers.write_marker(stage, config, launcher.command(stage), inputs, started, seconds)
    logger.info("stage %s: done in %.0f s", stage.name, seconds)


def _run(stage: Stage, config: Config, launcher: Launcher, lock: RunLock) -> float:
    """Runs a stage's processes to their good end; returns how many seconds they took."""
    log_file = RunFolder(Path(config.run_dir)).log(stage.name)
    log_file.parent.mkdir(exist_ok=True)
    clear_failure(log_file)
    start = time.monotonic()
    logger.info("stage %s: %s", stage.name, launch.shown(launcher.command(stage)))
    try:
        code = launch.run_process(stage, launcher, launch.environment(config, log_file), lock, config.launch)
    except HangError as error:
        hung = _failed(stage, f"was ended after {time.monotonic() - start:.0f} s", str(error), log_file)
        _write_outcome(log_file, str(hung))
        raise HangError(str(hung)) from error
    except BaseException as error:
        _write_outcome(log_file, f"ended by the driver ({type(error).__name__})")
        raise
    seconds = time.monotonic() - start
    if code != EXIT_OK:
        failed = _stage_error(stage, code, seconds, log_file)
        _write_outcome(log_file, str(failed))
        raise failed
    _write_outcome(log_file, f"stage {stage.name}: done in {seconds:.0f} s")
    return seconds


def _stage_error(stage: Stage, code: int, seconds: float, log_file: Path) -> TspinError:
    """What a person needs to know: which stage, why, where to look, and that nothing is lost."""
    failure = read_failure(log_file)
    code = failure.exit_code if failure else code
    asked = stop_requested()
    if failure is not None and code == EXIT_STOPPED:
        return StoppedError(f"stage {stage.name}: {failure.message}; the same command continues")
    if asked is not None and (failure is None or failure.consequence):  # bad input stays that, whoever asks for what
        return StoppedError(
            f"stage {stage.name}: ended as {asked} asked; what it had finished is kept; the same command continues"
        )
    said = "\n".join([*([failure.message] if failure else []), *_traces(log_file, failure)])
    message = _failed(stage, f"failed after {seconds:.0f} s with {_reason(code)}", said, log_file, code == EXIT_INPUT)
    error = StageError(message)
    error.exit_code = code if handed_on(code) else EXIT_STAGE
    return error


def _failed(stage: Stage, how: str, why: str, log_file: Path, mendable: bool = False) -> str:
    """A stage's failure for people; `mendable` if something has to be mended by hand first."""
    ending = "the same command continues the run from here"
    if mendable:
        ending = f"once this is mended, {ending}; --repair makes damaged files of the run again"
    lines = [f"stage {stage.name} {how}", *(f"  {line}" for line in why.splitlines())]
    return "\n".join([*lines, f"  its log: {log_file}; what was done is kept, {ending}"])


def _traces(log_file: Path, failure: Failure | None) -> list[str]:
    """Where the ranks were, and what their libraries said, unless one of them gave a reason of its own."""
    if failure is not None and not failure.consequence:
        return []
    folder = beats_folder(log_file)
    lines = [f"rank {beat.rank} was in `{beat.doing}`" for beat in read_beats(folder)[:_SHOWN_RANKS]]
    for path in rank_logs(folder)[:_SHOWN_RANKS]:
        text = path.read_text(encoding="utf-8", errors="replace")
        crash = text.rfind(_CRASH)
        shown = text[crash:].splitlines()[:_SHOWN_LINES] if crash >= 0 else text.splitlines()[-_SHOWN_LINES:]
        lines += [f"{path.name}:", *(f"  {line}" for line in shown if line)]
    return lines


def _write_outcome(log_file: Path, outcome: str) -> None:
    """The stage's log ends with how it ended, also where its ranks could not say so any more."""
    now = datetime.datetime.now().strftime("%Y-%m-%d %H:%M:%S")
    try:
        with log_file.open("a", encoding="utf-8") as stream:
            stream.writelines(f"{now} driver: {line.strip()}\n" for line in outcome.splitlines())
    except OSError as error:
        logger.warning("%s: %s; its last line would be: %s", log_file, error.strerror, outcome)


_CAUSES = {
    "SIGKILL": " (out of memory?)",
    "SIGBUS": " (was a mapped file cut short, or is /dev/shm or the disk full?)",
}


def _reason(code: int) -> str:
    if code <= 128 or code - 128 not in signal.valid_signals():
        return f"exit code {code}"
    name = signal.Signals(code - 128).name
    return f"signal {name}{_CAUSES.get(name, '')}"


def _stop_if_requested(before: str) -> None:
    """Between stages there is nothing to finish."""
    asked = stop_requested()
    if asked is not None:
        raise StoppedError(f"stopped before {before} as {asked} asked; the same command continues")


def _stop_signals() -> tuple[signal.Signals, ...]:
    """SIGHUP too, unless the run was started by nohup."""
    return STOP_SIGNALS if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN else (*STOP_SIGNALS, signal.SIGHUP)


def _on_request(name: str, again: bool) -> None:
    """The first request lets the running stage finish its step or shard; the next one does not wait for that."""
    if again:
        logger.warning("%s again: ending the running stage now", name)
        raise SystemExit(EXIT_STOPPED)
    logger.warning(
        "%s: the running stage finishes its step or shard and saves; send it again in a while to end it now", name
    )
