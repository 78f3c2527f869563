"""Damage to a finished run, in every kind of file, and what `--repair` makes of it."""

import shutil
from pathlib import Path

import pytest

from tests.end_to_end.small_run import content_sha256, sampled_log_probs, succeed, tspin

pytestmark = pytest.mark.processes

KEPT = {
    "data/train_prompt_document.bin": "tokenize",
    "initial/checkpoint/__0_0.distcp": "convert",
    "proto/shard_00000.jsonl": "rollout_000",
    "evaluation/policy_000.json": "rollout_000",
    "iteration_000/checkpoint/step_*/__0_0.distcp": "train_000",
    "export/hf/model.safetensors": "export",
}
"""A file of each kind, and the stage that wrote it."""


def digests(run: Path) -> dict[str, str]:
    """Of everything but what tells of times; of shards, of their answers."""
    told = ("logs", "stages", "tensorboard", ".lock", "report.html", "metrics.jsonl", "run.yaml")
    return {
        str(path.relative_to(run)): content_sha256(path)
        for path in sorted(run.rglob("*"))
        if path.is_file()
        and not any(part in told for part in path.relative_to(run).parts)
        and not (path.name.startswith("shard_") and path.suffix == ".sha256")
    }


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_what_is_damaged_is_named_and_made_again_to_the_same_bytes(base_run: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(base_run, tmp_path / "run"))
    before = digests(run)
    command = ("run", "--config", run / "run.yaml")
    for pattern in KEPT:
        (path,) = run.glob(pattern)
        flip(path)
    refused = tspin(*command)
    assert refused.returncode == 2 and "let `tspin run --repair` make a damaged file" in refused.stderr
    said = succeed(*command, "--repair", "--dry-run").stdout
    for pattern, stage in KEPT.items():
        (path,) = run.glob(pattern)
        damaged = path.parent if path.suffix == ".distcp" else path
        assert any(line.startswith(f"{stage} ") and str(damaged) in line for line in said.splitlines())
    assert digests(run) != before
    done = succeed(*command, "--repair").stderr
    assert digests(run) == before
    assert sampled_log_probs(run) == pytest.approx(sampled_log_probs(base_run), abs=1e-4)
    again = [line.split()[3].rstrip(":") for line in done.splitlines() if ": done in " in line]
    assert again == ["tokenize", "convert", "rollout_000", "train_000", "export", "report"]
    assert succeed(*command).stderr.count("done before") == 7


def test_a_changed_input_is_never_repaired(base_run: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(base_run, tmp_path / "run"))
    marker = run / "stages" / "tokenize.json"
    text = marker.read_text()
    (line,) = [line for line in text.splitlines() if "annotated.jsonl" in line]
    marker.write_text(text.replace(line, line.replace(line.split('"')[3], "0" * 64)))  # another file was read then
    refused = tspin("run", "--config", run / "run.yaml", "--repair")
    assert refused.returncode == 2 and "annotated.jsonl: SHA-256 was 0000" in refused.stderr
