"""Where the examples and the token files of a run are."""

from pathlib import Path

TRAIN = "train"
HELD_OUT = "held_out"


def document_stem(folder: Path, split: str, key: str) -> Path:
    """Stem of an indexed data set: its files are `<stem>_document.bin`, `.idx` and `.json`.

    Args:
        folder: The run's data folder, or the folder of a self-play iteration.
        split: `train` or `held_out`.
        key: `prompt`, `annotated`, `synthetic` or `proto`.
    """
    return folder / f"{split}_{key}"


def examples_path(folder: Path, split: str) -> Path:
    """The normalised examples of a split, in document order."""
    return folder / f"{split}.jsonl"
