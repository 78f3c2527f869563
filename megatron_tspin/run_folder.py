"""Where everything of a run is, and the names of what stages write, wherever they are told to write it.

Every stage, the driver and the report take their paths from here.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

CONFIG = "run.yaml"
REPORT = "report.html"
TRAIN = "train"
HELD_OUT = "held_out"
SERVING = "serving"


VERIFICATION = "verification.json"
"""A conversion's card."""


@dataclass(frozen=True)
class RunFolder:
    """The folder of a run. Policy number t is the one after t self-play iterations; number 0 is the initial policy."""

    root: Path

    @property
    def config(self) -> Path:
        """The resolved config."""
        return self.root / CONFIG

    @property
    def data(self) -> Path:
        """Examples, and the documents written once."""
        return self.root / "data"

    @property
    def proto(self) -> Path:
        """Shards of the initial policy's answers (y0)."""
        return self.root / "proto"

    @property
    def export(self) -> Path:
        """The final policy as an HF checkpoint."""
        return self.root / "export" / "hf"

    @property
    def serving(self) -> Path:
        """Policies as HF checkpoints for servers that answer, while a rollout needs them."""
        return self.root / SERVING

    @property
    def report(self) -> Path:
        """The report."""
        return self.root / REPORT

    @property
    def doctor(self) -> Path:
        """Where `tspin doctor` leaves what it found, and nodes probe what they see of each other."""
        return self.root / "doctor"

    @property
    def markers(self) -> Path:
        """The markers of the stages that are done."""
        return self.root / "stages"

    def marker(self, stage: str) -> Path:
        """What a stage read and wrote, there once it is done."""
        return self.markers / f"{stage}.json"

    @property
    def logs(self) -> Path:
        """What stages and jobs said."""
        return self.root / "logs"

    def log(self, stage: str) -> Path:
        """What a stage said."""
        return self.logs / f"{stage}.log"

    def job_log(self, job: str) -> Path:
        """What a Slurm job's driver said; `job` is its number."""
        return self.logs / f"slurm-{job}.out"

    @property
    def job(self) -> Path:
        """Number of the Slurm job that was submitted last."""
        return self.root / "job.txt"

    @property
    def batch_script(self) -> Path:
        """The script of the run's Slurm jobs."""
        return self.root / "submit.sh"

    def iteration(self, iteration: int) -> Path:
        """Folder of a self-play iteration."""
        return self.root / f"iteration_{iteration:03d}"

    def iterations(self) -> list[int]:
        """The iterations that have begun, in order."""
        return [number for number, _ in _numbered(self.root, r"iteration_(\d{3,})")]

    def synthetic(self, iteration: int) -> Path:
        """Shards of the answers that an iteration trains against (y')."""
        return self.iteration(iteration) / "synthetic"

    def metrics(self, iteration: int) -> Path:
        """One JSON line an optimizer step."""
        return self.iteration(iteration) / "metrics.jsonl"

    def tensorboard(self, iteration: int) -> Path:
        """TensorBoard's events of an iteration."""
        return self.iteration(iteration) / "tensorboard"

    def reference(self, iteration: int) -> Path:
        """Reference log-probs of the methods that have a reference."""
        return self.iteration(iteration) / "reference.jsonl"

    def precision(self, iteration: int) -> Path:
        """What bf16 or FP8 does to log-probs at the start of an iteration."""
        return self.iteration(iteration) / "precision.json"

    def checkpoints(self, iteration: int) -> Path:
        """Folder of an iteration's checkpoints, `step_00000012` and so on; the last one is policy iteration + 1."""
        return self.iteration(iteration) / "checkpoint"

    @property
    def initial_checkpoint(self) -> Path:
        """The converted initial policy."""
        return self.root / "initial" / "checkpoint"

    @property
    def verification(self) -> Path:
        """How far the initial policy is from transformers' model."""
        return self.root / "initial" / VERIFICATION

    def evaluation(self, policy: int) -> Path:
        """Held-out results of a policy."""
        return self.root / "evaluation" / f"policy_{policy:03d}.json"

    def evaluations(self) -> list[tuple[int, Path]]:
        """Number of the policy and file of the held-out results that are there, in order."""
        return _numbered(self.root / "evaluation", r"policy_(\d{3,})\.json")


def beats_folder(log_file: Path) -> Path:
    """Where the ranks of the stage with this log say what they do, while it runs or if it did not end well."""
    return log_file.with_suffix(".ranks")


def engine_log(log_file: Path) -> Path:
    """What a server that answers said, beside the log of the stage that started it."""
    return log_file.with_suffix(".vllm.log")


def rank_log(folder: Path, rank: int) -> Path:
    """What a rank's libraries said on stderr, in the folder of `beats_folder`; kept if it is not empty."""
    return folder / f"rank_{rank:05d}.log"


def rank_logs(folder: Path) -> list[Path]:
    """Those of all ranks that said something, in order."""
    return [path for path in sorted(folder.glob("rank_*.log")) if path.stat().st_size]


def examples_path(data: Path, split: str) -> Path:
    """The normalised examples of a split in a run's data folder, in document order."""
    return data / f"{split}.jsonl"


def document_stem(folder: Path, split: str, key: str) -> Path:
    """Stem of an indexed data set, whose files `file_of` names.

    Args:
        folder: The run's data folder, or the folder of a self-play iteration.
        split: `train` or `held_out`.
        key: `prompt`, `annotated`, `synthetic` or `proto`.
    """
    return folder / f"{split}_{key}"


def file_of(path_stem: Path, kind: str) -> Path:
    """One of the three files of an indexed data set: `kind` is `bin`, `idx` or `json`."""
    return path_stem.with_name(f"{path_stem.name}_document.{kind}")


def shard_path(folder: Path, number: int) -> Path:
    """File of a shard of answers."""
    return folder / f"shard_{number:05d}.jsonl"


def shard_paths(folder: Path) -> list[Path]:
    """The shards that are there, in order."""
    return sorted(folder.glob("shard_*.jsonl"))


def shard_digest(shard: Path) -> Path:
    """Hex SHA-256 of a shard, there once it is whole."""
    return shard.with_suffix(".sha256")


def shard_settings(folder: Path) -> Path:
    """With which settings a folder's shards were made."""
    return folder / "settings.json"


def shard_summary(folder: Path) -> Path:
    """What the answers to all training prompts look like, there once the last shard is."""
    return folder / "summary.json"


def serving_beside(answers: Path) -> Path:
    """What servers are given of a policy whose answers a person names a folder for."""
    return answers / SERVING


def held_out_answers(evaluation: Path, decoding: str) -> Path:
    """Shards of the answers that held-out results were computed from; `decoding` is `greedy` or `sampled`."""
    return evaluation.with_suffix("") / decoding


def reference_facts(reference: Path) -> Path:
    """From what reference log-probs were computed."""
    return reference.with_suffix(".json")


def reference_parts(reference: Path) -> Path:
    """Folder of what an unfinished pass over the reference log-probs has computed."""
    return reference.with_suffix(".parts")


def step_folder(checkpoints: Path, step: int) -> Path:
    """Folder of the checkpoint after an optimizer step."""
    return checkpoints / f"step_{step:08d}"


def step_of(checkpoint: Path) -> int:
    """The optimizer step after which a checkpoint was made."""
    return int(checkpoint.name.removeprefix("step_"))


def step_folders(checkpoints: Path) -> list[Path]:
    """The checkpoints that are there, whole or not, in the order of their steps."""
    return [path for _, path in _numbered(checkpoints, r"step_(\d{8})")]


def step_leftovers(checkpoints: Path) -> list[Path]:
    """What interrupted saves left beside the checkpoints."""
    return sorted(checkpoints.glob("step_*.partial"))


def _numbered(folder: Path, pattern: str) -> list[tuple[int, Path]]:
    """Entries of a folder whose whole name matches, with their number, in order of it."""
    entries: Iterable[Path] = folder.iterdir() if folder.is_dir() else ()
    matches = ((re.fullmatch(pattern, entry.name), entry) for entry in entries)
    return sorted((int(match[1]), entry) for match, entry in matches if match)
