"""What a run directory holds so far, read without torch; whatever is absent yet is simply absent."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from megatron_tspin.config import Config
from megatron_tspin.config_source import load_config
from megatron_tspin.errors import ArtifactError, InputError
from megatron_tspin.records import Evaluation, PrecisionNoise, RolloutSummary, Verification, read_records
from megatron_tspin.run_folder import RunFolder, shard_summary
from megatron_tspin.step_metrics import StepMetrics
from megatron_tspin.storage import read_json

ModelType = TypeVar("ModelType", bound=BaseModel)


class Stage(BaseModel):
    """A stage marker: written when a stage is done."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    stage: str
    command: list[str] | str = ""
    started: str = ""
    """ISO time."""
    seconds: float
    versions: dict[str, Any] = {}


@dataclass(frozen=True)
class Iteration:
    """One self-play iteration of training, finished or not."""

    index: int
    steps: list[StepMetrics]
    """In the order of the steps; a step that was done again after a resume counts once."""
    synthetic: RolloutSummary | None
    """The answers y' it trains on."""
    precision: PrecisionNoise | None
    """What bf16 or FP8 did to log-probs before its first step; None in fp32."""

    @property
    def early(self) -> list[StepMetrics]:
        """The first half of the steps; empty if there is only one."""
        return self.steps[: len(self.steps) // 2]

    @property
    def late(self) -> list[StepMetrics]:
        """The second half of the steps: what the iteration arrived at, over enough triplets to mean something."""
        return self.steps[len(self.steps) // 2 :]


@dataclass(frozen=True)
class RunData:
    """A run as far as it went."""

    path: Path
    config: Config
    iterations: list[Iteration]
    """By index; those that have begun."""
    evaluations: dict[int, Evaluation]
    """By the number of iterations that the evaluated policy has behind it; 0 is the initial policy."""
    proto: RolloutSummary | None
    """The answers y0 of the initial policy."""
    verification: Verification | None
    """Of the conversion of the initial policy."""
    stages: list[Stage]
    """The stages that are done, in the order in which they started."""
    problems: list[str]
    """Files that are there and cannot be read, one sentence each."""

    @property
    def name(self) -> str:
        """The folder's name."""
        return self.path.resolve().name

    @property
    def last_evaluation(self) -> Evaluation | None:
        """The evaluation of the latest policy after the initial one."""
        later = [number for number in self.evaluations if number > 0]
        return self.evaluations[max(later)] if later else None

    def missing_stages(self) -> list[str]:
        """Stages still to come, the report itself left out."""
        done = {stage.stage for stage in self.stages}
        return [name for name in expected_stages(self.config) if name not in done]


def expected_stages(config: Config) -> list[str]:
    """Names of the stages of a whole run before its report, in order."""
    total = config.self_play.iterations
    turns = [f"{kind}_{number:03d}" for number in range(total) for kind in ("rollout", "train")]
    return ["tokenize", "convert", *turns, f"rollout_{total:03d}", "export"]


def load_run(run_dir: Path) -> RunData:
    """Reads a run directory.

    Args:
        run_dir: A folder with a run.yaml; everything else may be missing or half written.

    Raises:
        InputError: There is no run.yaml, or it is refused.
    """
    folder = RunFolder(run_dir)
    if not folder.config.is_file():
        raise InputError(f"{run_dir}: not a run directory, it has no run.yaml; name the --run-dir of a `tspin run`")
    config = load_config(folder.config, {"run_dir": str(run_dir)})
    problems: list[str] = []
    iterations = [
        Iteration(
            index,
            _steps(folder.metrics(index), problems),
            _record(shard_summary(folder.synthetic(index)), RolloutSummary, problems),
            _record(folder.precision(index), PrecisionNoise, problems),
        )
        for index in folder.iterations()
    ]
    evaluations = {
        number: evaluation
        for number, path in folder.evaluations()
        if (evaluation := _record(path, Evaluation, problems)) is not None
    }
    proto = _record(shard_summary(folder.proto), RolloutSummary, problems)
    stages = _stages(folder.markers, problems)
    verification = _record(folder.verification, Verification, problems)
    return RunData(run_dir, config, iterations, evaluations, proto, verification, stages, problems)


def weighted_mean(steps: Sequence[StepMetrics], field: str) -> float | None:
    """Mean of a metric over the triplets of some steps; None if no step has it."""
    pairs = [(getattr(step, field), step.num_triplets) for step in steps]
    known = [(value, weight) for value, weight in pairs if value is not None]
    total = sum(weight for _, weight in known)
    return sum(value * weight for value, weight in known) / total if total else None


def _steps(path: Path, problems: list[str]) -> list[StepMetrics]:
    """The readable lines up to the first broken one. Of a step done twice the later line counts."""
    by_step: dict[int, StepMetrics] = {}
    if path.is_file():
        try:
            for record in read_records(path, StepMetrics):
                by_step[record.step] = record
        except InputError as error:
            problems.append(f"{error}. The report uses the {len(by_step)} steps before it.")
    return [by_step[step] for step in sorted(by_step)]


def _record(path: Path, kind: type[ModelType], problems: list[str]) -> ModelType | None:
    """A JSON file that is one record; None if it is absent or broken."""
    return _validated(path, kind, problems) if path.is_file() else None


def _stages(folder: Path, problems: list[str]) -> list[Stage]:
    markers = sorted(folder.glob("*.json")) if folder.is_dir() else []
    stages = [stage for path in markers if (stage := _validated(path, Stage, problems)) is not None]
    return sorted(stages, key=lambda stage: stage.started)


def _validated(path: Path, kind: type[ModelType], problems: list[str]) -> ModelType | None:
    try:
        return kind.model_validate(read_json(path))
    except ArtifactError as error:
        problems.append(f"{error}. It is left out of the report.")
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"])
        problems.append(f"{path}: field `{field}`: {first['msg']}. It is left out of the report.")
    return None
