"""How far a run is, read from its folder by anybody, on any host that sees it."""

import datetime
import shutil
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from megatron_tspin.config import Config
from megatron_tspin.config_source import load_config
from megatron_tspin.errors import InputError
from megatron_tspin.heartbeat import read_beats
from megatron_tspin.run_folder import RunFolder, beats_folder
from megatron_tspin.selfplay import markers
from megatron_tspin.selfplay.failure import read_failure
from megatron_tspin.selfplay.lock import holder
from megatron_tspin.selfplay.plan import Stage, plan

_SHOWN_RANKS = 16


@dataclass(frozen=True)
class Progress:
    """A stage of a run."""

    stage: Stage
    seconds: float | None
    """How long it took; None while it is not done."""


def run_config(run_dir: Path) -> Config:
    """The config of a run that was begun.

    Raises:
        InputError: There is none.
    """
    path = RunFolder(run_dir).config
    if not path.is_file():
        raise InputError(f"{run_dir}: no run.yaml, so no run was begun there")
    return load_config(path, {"run_dir": str(run_dir.absolute())})


def progress(config: Config) -> list[Progress]:
    """All stages in order."""
    run_dir = Path(config.run_dir)
    found = []
    for stage in plan(config):
        done = markers.is_done(stage, run_dir)
        seconds = float(markers.read_marker(markers.marker_file(run_dir, stage))["seconds"]) if done else None
        found.append(Progress(stage, seconds))
    return found


def describe_run(config: Config) -> Iterator[str]:
    """Lines for people."""
    run_dir = Path(config.run_dir)
    stages = progress(config)
    current = next((each.stage for each in stages if each.seconds is None), None)
    yield f"run     {run_dir} ({config.objective.method}, self-play iterations: {config.self_play.iterations})"
    yield f"state   {_state(config, current)}"
    yield from _job(RunFolder(run_dir).job)
    width = max(len(each.stage.name) for each in stages)
    for each in stages:
        how = "to do" if each.seconds is None else f"done in {_span(each.seconds)}"
        if each.stage == current:
            how = "next" if holder(run_dir) is None else "now"
        yield f"  {each.stage.name:<{width}}  {how}"
    if current is not None:
        yield f"left    {_time_left(stages, current)}"
        yield from _ranks(run_dir, current)
        yield from _failure(run_dir, current)


def current_stage(config: Config) -> str:
    """The stage that runs, or is to run next; the last one of a run that is done."""
    stages = progress(config)
    return next((each.stage.name for each in stages if each.seconds is None), stages[-1].stage.name)


def _state(config: Config, current: Stage | None) -> str:
    owner = holder(Path(config.run_dir))
    if owner is not None:
        job = f", Slurm job {owner['job']}" if owner.get("job") else ""
        return f"running: process {owner.get('pid')} on host {owner.get('host')}{job}, since {owner.get('since')}"
    return "done" if current is None else "not running; the command that began it continues it"


def _job(path: Path) -> Iterator[str]:
    """What Slurm says of the job that was submitted last, where it can be asked."""
    if not path.is_file() or shutil.which("squeue") is None:
        return
    job = path.read_text(encoding="utf-8").strip()
    command = ["squeue", "--noheader", f"--jobs={job}", "--format=%T, %L left of its time limit, nodes %N"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    yield f"job     {job}: {done.stdout.strip() or 'no longer in the queue'}"


def _time_left(stages: list[Progress], current: Stage) -> str:
    """By how long the last stage of each kind took, so unknown before a kind has been done once."""
    took = {_kind(each.stage): each.seconds for each in stages if each.seconds is not None}
    left = [_kind(each.stage) for each in stages if each.seconds is None]
    unknown = sorted({kind for kind in left if kind not in took} - {"export", "report"})
    if unknown:
        return f"not known before the first {' and '.join(unknown)} is done"
    return f"about {_span(sum(took.get(kind) or 0.0 for kind in left))}, if stages take as long as those before"


def _kind(stage: Stage) -> str:
    return stage.name.partition("_")[0]


def _ranks(run_dir: Path, current: Stage) -> Iterator[str]:
    """What the ranks do, or did when they ended."""
    folder = beats_folder(RunFolder(run_dir).log(current.name))
    for beat in read_beats(folder)[:_SHOWN_RANKS]:
        age = time.time() - folder.joinpath(f"rank_{beat.rank:05d}.json").stat().st_mtime
        yield f"  rank {beat.rank} on {beat.host}: {beat.doing} ({_span(age)} ago)"


def _failure(run_dir: Path, current: Stage) -> Iterator[str]:
    log_file = RunFolder(run_dir).log(current.name)
    failure = read_failure(log_file)
    if failure is not None and holder(run_dir) is None:
        yield f"why     rank {failure.rank}, exit code {failure.exit_code}:"
        yield from (f"  {line}" for line in failure.message.splitlines())
    if log_file.is_file():
        yield f"log     {log_file}"


def _span(seconds: float) -> str:
    whole = datetime.timedelta(seconds=round(max(0.0, seconds)))
    return f"{whole.seconds} s" if whole < datetime.timedelta(minutes=2) else str(whole)
