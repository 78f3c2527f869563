"""`tspin convert` and `tspin export`, started as people start them."""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from megatron_tspin.config import Config, DataSection, ModelSection, ParallelSection, SelfPlaySection
from megatron_tspin.errors import ArtifactError, InputError
from megatron_tspin.records import Verification
from megatron_tspin.run_folder import RunFolder

pytestmark = pytest.mark.processes

ROOT = Path(__file__).parents[2]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


def command(*arguments: object, ranks: int = 1) -> subprocess.CompletedProcess[str]:
    launcher = [sys.executable] if ranks == 1 else TORCHRUN
    return subprocess.run(
        [*launcher, "-m", "megatron_tspin", *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_there_and_back_with_two_ranks(tiny_checkpoint, tmp_path):
    source = tiny_checkpoint("tied")
    layout = ("--pipeline-model-parallel-size", 2)
    core, back = tmp_path / "core", tmp_path / "back"
    done = command("convert", "--hf-checkpoint", source, "--save", core, *layout, ranks=2)
    assert done.returncode == 0, done.stderr
    assert "layers' states are off by at most" in done.stderr
    from megatron_tspin.conversion.stages import source_digest

    card = Verification.model_validate_json((core / "verification.json").read_text())
    assert card.holds and len(card.sentences) == 7 and len(card.layers) == 4
    assert card.layout == "TP 1, CP 1, PP 2, DP 1"
    assert (card.family, card.source, card.source_digest) == ("llama", str(source), source_digest(source))
    done = command("export", "--load", core, "--hf-checkpoint", source, "--save", back)
    assert done.returncode == 0, done.stderr
    for path in source.iterdir():
        assert (back / path.name).read_bytes() == path.read_bytes(), path.name


def test_verify_refuses_beyond_the_bound_and_writes_nothing(tiny_checkpoint, tmp_path):
    data, target = tmp_path / "data.jsonl", tmp_path / "core"
    data.write_text('{"prompt": "one two", "response": "three four five"}\n')
    arguments = ("--hf-checkpoint", tiny_checkpoint("tied"), "--save", target, "--bound", -1)
    done = command("convert", *arguments, "--verify-data", data)
    assert done.returncode == 4 and not target.exists()
    assert "(bound -1e+00)" in done.stderr and "of 2 sequence log-probs" in done.stderr
    assert "nothing was written" in done.stderr


def in_pool(name: str, *args: Any) -> None:
    """Runs a function of `conversion.stages`, whose group of ranks is the pool's."""
    from megatron_tspin.conversion import stages
    from tests.rank_pool import in_layout

    stages.distributed = lambda layout, seed=0: in_layout(layout)
    getattr(stages, name)(*args)


def config_of(source: Path, run: Path) -> Config:
    return Config(
        run_dir=str(run),
        model=ModelSection(hf_checkpoint=str(source)),
        data=DataSection(annotated="unused"),
        parallel=ParallelSection(tensor_model_parallel_size=2),
        self_play=SelfPlaySection(iterations=2),
    )


def test_a_run_converts_once_per_source_and_again_if_the_result_broke(ranks, tiny_checkpoint, tmp_path):
    source = Path(shutil.copytree(tiny_checkpoint("tied"), tmp_path / "hf"))
    config = config_of(source, tmp_path / "run")
    manifest = tmp_path / "run" / "initial" / "checkpoint" / "manifest.json"
    written = []

    def convert() -> int:
        ranks(2).run(in_pool, "convert_run", config)
        written.append(manifest.stat().st_mtime_ns)
        return len(set(written))

    assert convert() == 1 and convert() == 1
    shutil.copy(tiny_checkpoint("tied") / "tokenizer.json", source)  # no part of the weights
    assert convert() == 1
    (manifest.parent / ".metadata").write_bytes(b"broken")
    assert convert() == 2
    text = (source / "config.json").read_text()
    (source / "config.json").write_text(text.replace('"rms_norm_eps": 1e-06', '"rms_norm_eps": 1e-05'))
    assert text != (source / "config.json").read_text() and convert() == 3


def test_a_run_exports_the_last_iteration(ranks, tiny_checkpoint, tmp_path):
    config, run = config_of(tiny_checkpoint("tied"), tmp_path / "run"), RunFolder(tmp_path / "run")
    with pytest.raises(
        ArtifactError,
        match="iteration_001/checkpoint: no whole checkpoint; unless the run released it",
    ):
        ranks(2).run(in_pool, "export_run", config)
    ranks(2).run(in_pool, "convert_run", config)
    shutil.copytree(run.initial_checkpoint, run.checkpoints(1) / "step_00000003")
    for _ in range(2):  # it may be repeated
        ranks(2).run(in_pool, "export_run", config)
    exported = (run.export / "model.safetensors").read_bytes()
    assert exported == (tiny_checkpoint("tied") / "model.safetensors").read_bytes()


def test_what_a_person_names_is_not_overwritten(ranks, tiny_checkpoint, tmp_path):
    (tmp_path / "precious").write_text("text")
    source, layout = tiny_checkpoint("tied"), ParallelSection()
    for target in (tmp_path, tmp_path / "precious"):
        message = f"{target}: exists already; give --save the name of a new folder"
        with pytest.raises(InputError, match=message):
            ranks(1).run(in_pool, "export_checkpoint", tmp_path / "none", source, target, layout)
        with pytest.raises(InputError, match=message):
            ranks(1).run(in_pool, "convert_checkpoint", source, target, layout, False, None, 0.0)
