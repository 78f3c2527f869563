"""What a checkpoint is, from its headers and manifests; no weight is read."""

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from megatron_tspin.checkpoint.any_folder import open_weights
from megatron_tspin.checkpoint.core_folder import CoreFolder
from megatron_tspin.checkpoint.core_names import EMBEDDING, OUTPUT_LAYER
from megatron_tspin.checkpoint.hf_folder import HFFolder
from megatron_tspin.checkpoint.tensor_check import Header
from megatron_tspin.checkpoint.weight_files import source_digest, weight_files
from megatron_tspin.models.families.registry import FAMILIES
from megatron_tspin.storage import read_json

_LAYER = re.compile(r"\blayers\.(\d+)\.")
_BUFFERS = (".inv_freq",)


@dataclass(frozen=True)
class Facts:
    """What `tspin checkpoint info` tells.

    Attributes:
        folder: The checkpoint.
        kind: `hf` or `distributed`.
        family: `model_type` of the HF config.
        parameters: In all; tied embeddings count once, rows that pad the vocabulary not at all.
        parameters_per_layer: In the order of the layers.
        dtypes: Number of tensors of each stored type.
        layout: Sizes of TP, PP, DP and CP that wrote it; None of an HF folder.
        step: Optimizer steps of the self-play iteration so far, if training wrote it.
        iteration: Self-play iteration, likewise.
        optimizer: Whether training can go on inside the iteration from it.
        source: HF folder that it was converted from, or checkpoints that it is the mean of, if it says so.
        source_digest: SHA-256 of the HF folder that it was converted from.
        digest: SHA-256: of an HF folder's config.json and weights if that was asked for, else of the manifest.
        files: Number of files with weights or of the manifest.
        bytes: Of these files.
        versions: That wrote it.
    """

    folder: str
    kind: str
    family: str
    parameters: int
    parameters_per_layer: list[int]
    dtypes: dict[str, int]
    layout: dict[str, int] | None
    step: int | None
    iteration: int | None
    optimizer: bool
    source: str | list[str] | None
    source_digest: str | None
    digest: str | None
    files: int
    bytes: int
    versions: dict[str, str]


def inspect(folder: Path, digests: bool = False) -> Facts:
    """Looks at a checkpoint of either kind.

    Args:
        folder: The checkpoint.
        digests: Read an HF folder's files for their digest; a distributed checkpoint has its in the manifest.

    Raises:
        InputError: It is no checkpoint.
        ArtifactError: It is not whole, as far as sizes tell.
    """
    found = open_weights(folder)
    return _of_core(found) if isinstance(found, CoreFolder) else _of_hf(found, digests)


def _of_core(found: CoreFolder) -> Facts:
    facts, state, files = (found.manifest[part] for part in ("facts", "state", "files"))
    vocabulary = facts["architecture"]["vocab_size"]
    counts = {
        name: prod((vocabulary, *header.shape[1:]) if name in (EMBEDDING, OUTPUT_LAYER) else header.shape)
        for name, header in found.headers.items()
    }
    return Facts(
        folder=str(found.folder),
        kind="distributed",
        family=facts["architecture"]["family"],
        **_sums(counts, found.headers),
        layout=facts["layout"],
        step=state.get("step"),
        iteration=state.get("iteration"),
        optimizer=facts["optimizer"] is not None,
        source=state.get("hf_checkpoint") or state.get("averaged"),
        source_digest=state.get("hf_digest"),
        digest=found.manifest["sha256"],
        files=len(files),
        bytes=sum(each["size"] for each in files.values()),
        versions={name: facts[name] for name in ("megatron_core", "torch")},
    )


def _of_hf(found: HFFolder, digests: bool) -> Facts:
    config = read_json(found.folder / "config.json")
    model_type = str(config.get("model_type"))
    family = FAMILIES.get(model_type)
    passed_over = (*_BUFFERS, *(family.buffers if family else ()))
    twice = family.head if family and config.get("tie_word_embeddings") else None
    headers = {
        name: header
        for name, header in found.headers.items()
        if not name.endswith(passed_over) and not (name == twice and family and family.embedding in found.names)
    }
    paths = weight_files(found.folder)
    version = config.get("transformers_version")
    return Facts(
        folder=str(found.folder),
        kind="hf",
        family=model_type,
        **_sums({name: prod(header.shape) for name, header in headers.items()}, headers),
        layout=None,
        step=None,
        iteration=None,
        optimizer=False,
        source=None,
        source_digest=None,
        digest=source_digest(found.folder) if digests else None,
        files=len(paths),
        bytes=sum(path.stat().st_size for path in paths),
        versions={"transformers": version} if version else {},
    )


def _sums(counts: Mapping[str, int], headers: Mapping[str, Header]) -> dict[str, Any]:
    layers: Counter[int] = Counter()
    for name, count in counts.items():
        numbered = _LAYER.search(name)
        if numbered:
            layers[int(numbered[1])] += count
    return {
        "parameters": sum(counts.values()),
        "parameters_per_layer": [layers[layer] for layer in range(max(layers, default=-1) + 1)],
        "dtypes": dict(Counter(header.dtype for header in headers.values())),
    }
