"""Distributed checkpoints: every layout loads what every other one saved, and nothing broken is loaded."""

import hashlib
import json
import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
from rank_pool import in_layout

from megatron_tspin.checkpoint.manifest import describe_files, latest_checkpoint, verify_checkpoint, write_manifest
from megatron_tspin.config import OptimizerSection, ParallelSection, TrainingSection
from megatron_tspin.config_precision import PrecisionSection
from megatron_tspin.errors import ArtifactError, InputError, StageError


def layout(tp: int = 1, pp: int = 1, dp: int = 1, distributed_optimizer: bool = False) -> ParallelSection:
    return ParallelSection(
        tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=pp,
        data_parallel_size=dp,
        use_distributed_optimizer=distributed_optimizer,
    )


def build(hf: Path, parallel: ParallelSection, topology: Any, bf16: bool = False) -> Any:
    from megatron_tspin.checkpoint.store import build_policy
    from megatron_tspin.models.hf_config import read_architecture

    return build_policy(read_architecture(hf), parallel, TrainingSection(), PrecisionSection(bf16=bf16), topology)


def wrap(model: Any, parallel: ParallelSection, bf16: bool) -> tuple[Any, Any]:
    """DDP and optimizer, as training builds them."""
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig

    from megatron_tspin.training.optimizer import build_optimizer

    config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        use_distributed_optimizer=parallel.use_distributed_optimizer,
        overlap_grad_reduce=False,
    )
    wrapped = DistributedDataParallel(config=model.config, ddp_config=config, module=model)
    kind = "rmsprop" if model.architecture.tied_embeddings else "adam"  # Adam needs the step: bias correction
    settings = OptimizerSection(optimizer=kind, lr=1e-2)
    return wrapped, build_optimizer([wrapped], settings, parallel, PrecisionSection(bf16=bf16))


def step(wrapped: Any, optimizer: Any, number: int) -> None:
    """An update whose gradient is a function of name, position and step, so the same under every layout."""
    import torch

    from megatron_tspin.training.optimizer import gradient_norm, update

    wrapped.zero_grad_buffer()
    optimizer.zero_grad()
    for parameter in wrapped.parameters():
        parameter.main_grad.copy_(torch.cos(parameter.detach().float() * 37.0 + number))
    gradient_norm(optimizer)
    update(optimizer, norm=0.0, lr=1e-2, clip_grad=0.0)


def whole_parameters(model: Any, topology: Any, hf: Path, target: Path) -> dict[str, Any]:
    """All weights, by way of the export."""
    import torch
    from safetensors.torch import load_file

    from megatron_tspin.checkpoint.convert import export_hf

    export_hf(model, topology, hf, target, dtype=torch.float32)
    return {name: tensor.numpy() for name, tensor in load_file(target / "model.safetensors").items()}


def train_and_save(hf: Path, folder: Path, parallel: ParallelSection, bf16: bool, scratch: Path) -> dict[str, Any]:
    """Two steps, a checkpoint, a third step: its weights are the answer."""
    from megatron_tspin.checkpoint.convert import load_hf
    from megatron_tspin.checkpoint.store import save_checkpoint

    with in_layout(parallel) as topology:
        model = build(hf, parallel, topology, bf16)
        load_hf(model, topology)
        wrapped, optimizer = wrap(model, parallel, bf16)
        for number in (1, 2):
            step(wrapped, optimizer, number)
        save_checkpoint(folder, wrapped, topology, optimizer, {"step": 2, "note": "é"})
        step(wrapped, optimizer, 3)
        return whole_parameters(model, topology, hf, scratch)


def load_and_train(hf: Path, folder: Path, parallel: ParallelSection, bf16: bool, scratch: Path) -> tuple[Any, Any]:
    from megatron_tspin.checkpoint.store import load_checkpoint

    with in_layout(parallel) as topology:
        model = build(hf, parallel, topology, bf16)
        for parameter in model.parameters():
            parameter.data.fill_(float("nan"))
        wrapped, optimizer = wrap(model, parallel, bf16)
        state = load_checkpoint(folder, wrapped, topology, optimizer)
        step(wrapped, optimizer, 3)
        return state, whole_parameters(model, topology, hf, scratch)


def finish_iteration(hf: Path, folder: Path, parallel: ParallelSection) -> Any:
    """Two steps in bf16, then what an iteration ends with; this rank's masters by parameter."""
    from megatron_tspin.checkpoint.convert import load_hf
    from megatron_tspin.checkpoint.store import save_checkpoint

    with in_layout(parallel) as topology:
        model = build(hf, parallel, topology, bf16=True)
        load_hf(model, topology)
        wrapped, optimizer = wrap(model, parallel, bf16=True)
        for number in (1, 2):
            step(wrapped, optimizer, number)
        save_checkpoint(folder, wrapped, topology, masters=optimizer)


def start_iteration(hf: Path, folder: Path, parallel: ParallelSection) -> Any:
    """Whether parameters and masters of a new optimizer are those of the checkpoint, and its largest moment."""
    import torch

    from megatron_tspin.checkpoint.store import load_checkpoint, load_masters

    with in_layout(parallel) as topology:
        exact = build(hf, parallel, topology)
        load_checkpoint(folder, exact, topology)
        model = build(hf, parallel, topology, bf16=True)
        load_checkpoint(folder, model, topology)
        wrapped, optimizer = wrap(model, parallel, bf16=True)
        load_masters(folder, wrapped, optimizer)
        rounded = [
            torch.equal(ours, wanted.bfloat16())
            for ours, wanted in zip(model.parameters(), exact.parameters(), strict=True)
        ]
        finer = any(not torch.equal(p, p.bfloat16().float()) for p in exact.parameters())
        (part,) = optimizer.chained_optimizers
        moments = [s["exp_avg_sq"].abs().max().item() for s in part.optimizer.state.values() if s["exp_avg_sq"].numel()]
        masters = {
            name: (ours.main_param, wanted.detach().flatten())
            for (name, ours), wanted in zip(model.named_parameters(), exact.parameters(), strict=True)
            if getattr(ours, "main_param", None) is not None
        }
        same = {
            name: torch.isin(master.flatten(), wanted).all().item() if parallel.use_distributed_optimizer
            else torch.equal(master.flatten(), wanted)
            for name, (master, wanted) in masters.items()
        }  # fmt: skip
        step(wrapped, optimizer, 3)
        return all(rounded), finer, max(moments), same


ITERATIONS = [
    (layout(), layout(tp=2)),
    (layout(tp=2), layout()),
    (layout(dp=2, distributed_optimizer=True), layout(pp=2)),
    (layout(pp=2), layout(dp=2, distributed_optimizer=True)),
]


@pytest.mark.parametrize("kind", ["tied", "untied"])
@pytest.mark.parametrize(("saving", "loading"), ITERATIONS, ids=range(len(ITERATIONS)))
def test_master_weights_pass_from_iteration_to_iteration(ranks, tiny_checkpoint, tmp_path, saving, loading, kind):
    hf, folder = tiny_checkpoint(kind), tmp_path / "step_00000002"
    ranks(saving.world_size).run(finish_iteration, hf, folder, saving)
    assert json.loads((folder / "manifest.json").read_text())["facts"]["dtype"] == "float32"
    for rounded, finer, moments, same in ranks(loading.world_size).run(start_iteration, hf, folder, loading):
        assert rounded, "parameters are the masters rounded to bf16"
        assert finer, "otherwise nothing is tested"
        assert same and all(same.values()), same
        assert moments == 0.0


def start_with_fused_optimizer(hf: Path, folder: Path) -> Any:
    """As an iteration starts where megatron-core took a fused optimizer, which counts steps in its groups alone."""
    import torch

    from megatron_tspin.checkpoint.store import load_checkpoint, load_masters

    class Fused(torch.optim.Optimizer):
        """Refuses, as Transformer Engine's FusedAdam does, a state that it does not know."""

        def load_state_dict(self, state_dict: Any) -> None:
            unknown = {name for state in state_dict["state"].values() for name in state} - {"exp_avg", "exp_avg_sq"}
            if unknown:
                raise KeyError(unknown)
            super().load_state_dict(state_dict)

    with in_layout(layout()) as topology:
        model = build(hf, layout(), topology, bf16=True)
        load_checkpoint(folder, model, topology)
        wrapped, optimizer = wrap(model, layout(), bf16=True)
        (part,) = optimizer.chained_optimizers
        part.optimizer.__class__ = Fused
        load_masters(folder, wrapped, optimizer)
        finer = any(not torch.equal(p.main_param, p.main_param.bfloat16().float()) for p in model.parameters())
        return finer, [group["step"] for group in part.optimizer.param_groups]


def test_masters_load_into_fused_optimizers(ranks: Any, tiny_checkpoint: Any, tmp_path: Path) -> None:
    hf, folder = tiny_checkpoint("untied"), tmp_path / "step_00000002"
    ranks(1).run(finish_iteration, hf, folder, layout())
    finer, steps = ranks(1).run(start_with_fused_optimizer, hf, folder)[0]
    assert finer and set(steps) == {0}


LAYOUTS = [
    (layout(), layout(tp=2), False),
    (layout(tp=2), layout(pp=2), False),
    (layout(pp=2), layout(dp=2, distributed_optimizer=True), False),
    (layout(dp=2, distributed_optimizer=True), layout(tp=2), False),
    (layout(dp=2, distributed_optimizer=True), layout(dp=2), True),
    (layout(tp=2), layout(dp=2, distributed_optimizer=True), True),
]


@pytest.mark.parametrize("kind", ["tied", "untied"])
@pytest.mark.parametrize(("saving", "loading", "bf16"), LAYOUTS, ids=range(len(LAYOUTS)))
def test_training_continues_under_another_layout(ranks, tiny_checkpoint, tmp_path, saving, loading, bf16, kind):
    hf, folder = tiny_checkpoint(kind), tmp_path / "step_00000002"
    straight = ranks(saving.world_size).run(train_and_save, hf, folder, saving, bf16, tmp_path / "a")[0]
    results = ranks(loading.world_size).run(load_and_train, hf, folder, loading, bf16, tmp_path / "b")
    state, continued = results[0]
    assert all(result[0] == {"step": 2, "note": "é"} for result in results)
    assert straight.keys() == continued.keys()
    for name in straight:
        assert (straight[name] == continued[name]).all(), name


def save_plain(hf: Path, folder: Path, parallel: ParallelSection, state: dict[str, Any]) -> None:
    """A checkpoint without optimizer."""
    from megatron_tspin.checkpoint.convert import load_hf
    from megatron_tspin.checkpoint.store import save_checkpoint

    with in_layout(parallel) as topology:
        model = build(hf, parallel, topology)
        load_hf(model, topology)
        save_checkpoint(folder, model, topology, state=state)


def load_plain(hf: Path, folder: Path, parallel: ParallelSection, with_optimizer: bool = False) -> dict[str, Any]:
    from megatron_tspin.checkpoint.store import load_checkpoint

    with in_layout(parallel) as topology:
        model = build(hf, parallel, topology)
        optimizer = wrap(model, parallel, bf16=False)[1] if with_optimizer else None
        return load_checkpoint(folder, model, topology, optimizer)


@pytest.fixture(scope="module")
def saved(ranks, tiny_checkpoint, tmp_path_factory) -> Path:
    """Three checkpoints of two ranks; do not write into it."""
    folder = tmp_path_factory.mktemp("checkpoints")
    for number in (1, 2, 10):
        ranks(2).run(save_plain, tiny_checkpoint("tied"), folder / f"step_{number:08d}", layout(pp=2), {"step": number})
    return folder


@pytest.fixture
def checkpoints(saved, tmp_path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "checkpoints"))


def shard(folder: Path) -> Path:
    return max(folder.glob("*.distcp"), key=lambda path: path.stat().st_size)


def test_a_whole_checkpoint_says_what_it_is(saved):
    manifest = verify_checkpoint(saved / "step_00000010")
    assert manifest["state"] == {"step": 10}
    assert manifest["facts"]["layout"] == {"tp": 1, "pp": 2, "dp": 1, "cp": 1}
    assert manifest["facts"]["optimizer"] is None and manifest["facts"]["architecture"]["num_layers"] == 4
    assert set(manifest["files"]) == {path.name for path in (saved / "step_00000010").iterdir()} - {"manifest.json"}
    assert latest_checkpoint(saved) == saved / "step_00000010"
    assert not list(saved.glob("*.partial"))


def remove(path: Path) -> str:
    path.unlink()
    return rf"{path}: missing; manifest.json names it with \d+ bytes"


def truncate(path: Path) -> str:
    size = path.stat().st_size
    path.write_bytes(path.read_bytes()[:-1])
    return f"{path}: {size - 1} bytes, manifest.json says {size}"


def flip_a_bit(path: Path) -> str:
    content = bytearray(path.read_bytes())
    before = hashlib.sha256(content).hexdigest()
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    return f"{path}: SHA-256 {hashlib.sha256(content).hexdigest()}, manifest.json says {before}"


@pytest.mark.parametrize("damage", [remove, truncate, flip_a_bit])
@pytest.mark.parametrize("name", ["shard", ".metadata", "metadata.json"])
def test_a_broken_checkpoint_is_refused_and_passed_over(ranks, tiny_checkpoint, checkpoints, caplog, damage, name):
    broken = checkpoints / "step_00000010"
    message = damage(shard(broken) if name == "shard" else broken / name)
    with pytest.raises(ArtifactError, match=message):
        verify_checkpoint(broken)
    with pytest.raises(ArtifactError, match=message):
        ranks(2).run(load_plain, tiny_checkpoint("tied"), broken, layout(tp=2))
    assert latest_checkpoint(checkpoints) == checkpoints / "step_00000002"
    assert "step_00000010 is not whole and is passed over" in caplog.text


def test_a_manifest_that_is_missing_torn_or_altered(checkpoints):
    missing, torn, altered = (checkpoints / f"step_{number:08d}" / "manifest.json" for number in (1, 2, 10))
    missing.unlink()
    torn.write_text(torn.read_text()[:-40])
    altered.write_text(altered.read_text().replace('"step": 10', '"step": 11'))
    for path, message in ((missing, "no such file"), (torn, "not valid JSON"), (altered, "it was altered")):
        with pytest.raises(ArtifactError, match=message):
            verify_checkpoint(path.parent)
    assert latest_checkpoint(checkpoints) is None
    assert latest_checkpoint(checkpoints / "nowhere") is None


def sign_again(folder: Path, files: dict[str, Any] | None = None) -> None:
    """What an attacker would do: a manifest that fits."""
    manifest = verify_or_read(folder)
    names = [path.name for path in folder.iterdir() if path.name != "manifest.json"]
    write_manifest(folder, files or describe_files(folder, names), manifest["facts"], manifest["state"])


def verify_or_read(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "manifest.json").read_text()))


class Touch:
    """A pickle that creates a file when it is opened."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("name", [".metadata", "common.pt"])
def test_a_pickle_with_a_fitting_manifest_runs_nothing(ranks, tiny_checkpoint, checkpoints, tmp_path, name):
    folder = checkpoints / "step_00000010"
    (folder / name).write_bytes(pickle.dumps(Touch(tmp_path / "was_run"), protocol=2))
    sign_again(folder)
    with pytest.raises(ArtifactError, match=r"(names posix.mkdir, which does not belong|Weights only load failed)"):
        ranks(1).run(load_plain, tiny_checkpoint("tied"), folder, layout())
    assert not (tmp_path / "was_run").exists()


def open_as_object(content: bytes) -> str:
    """What torch's planner does with a tensor that the metadata declares to be an object."""
    import io

    import torch

    from megatron_tspin.checkpoint.safe_pickle import restricted_metadata

    before = dict(os.environ)
    with restricted_metadata(), pytest.raises(pickle.UnpicklingError) as caught:
        torch.load(io.BytesIO(content), weights_only=False)
    assert dict(os.environ) == before
    return str(caught.value)


def test_an_object_among_the_tensors_runs_nothing(ranks, tmp_path):
    content = pickle.dumps(Touch(tmp_path / "was_run"), protocol=2)
    (message,) = ranks(1).run(open_as_object, content)
    assert "posix.mkdir" in message and not (tmp_path / "was_run").exists()


def test_a_checkpoint_of_a_newer_megatron_core_is_refused(ranks, tiny_checkpoint, checkpoints):
    folder = checkpoints / "step_00000010"
    if not (folder / "common.pt").exists():
        pytest.skip("this megatron-core reads checkpoints without common.pt")
    (folder / "common.pt").unlink()
    sign_again(folder)
    with pytest.raises(InputError, match=r"step_00000010: saved by megatron-core [\d.]+, which [\d.]+ cannot read; "):
        ranks(1).run(load_plain, tiny_checkpoint("tied"), folder, layout())


def test_a_manifest_names_only_files_beside_it(checkpoints, tmp_path):
    folder = checkpoints / "step_00000010"
    (tmp_path / "outside").write_text("x")
    files = verify_or_read(folder)["files"] | {"../../outside": {"size": 1, "sha256": "0"}}
    sign_again(folder, files)
    with pytest.raises(ArtifactError, match=r"names '../../outside', which is not a file beside it"):
        verify_checkpoint(folder)


def test_another_architecture_and_a_missing_optimizer_are_refused(ranks, tiny_checkpoint, saved):
    folder = saved / "step_00000001"
    with pytest.raises(InputError, match="tied_embeddings is True there and False in the model"):
        ranks(2).run(load_plain, tiny_checkpoint("untied"), folder, layout(tp=2))
    with pytest.raises(InputError, match="step_00000001: holds no optimizer state; continue from one saved inside"):
        ranks(1).run(load_plain, tiny_checkpoint("tied"), folder, layout(), True)


def test_saving_replaces_and_leaves_no_rests(ranks, tiny_checkpoint, checkpoints):
    folder = checkpoints / "step_00000010"
    partial = checkpoints / "step_00000010.partial"
    partial.mkdir()
    (partial / "rest").write_text("of a killed writer")
    ranks(2).run(save_plain, tiny_checkpoint("tied"), folder, layout(tp=2), {"step": 10, "again": True})
    assert verify_checkpoint(folder)["state"]["again"] and not partial.exists() and not (folder / "rest").exists()


def fail_to_write(hf: Path, folder: Path, parallel: ParallelSection) -> None:
    """A disk that is full for rank 1."""
    import errno

    from torch.distributed.checkpoint.filesystem import FileSystemWriter

    from megatron_tspin.checkpoint import in_process_save

    class FullDisk(FileSystemWriter):
        def write_data(self, *args: Any) -> Any:
            if os.environ["RANK"] == "1":
                raise OSError(errno.ENOSPC, "No space left on device", str(folder))
            return super().write_data(*args)

    original = in_process_save.FileSystemWriter
    in_process_save.FileSystemWriter = FullDisk
    try:
        save_plain(hf, folder, parallel, {})
    finally:
        in_process_save.FileSystemWriter = original


def test_a_full_disk_leaves_the_earlier_checkpoint(ranks, tiny_checkpoint, checkpoints):
    with pytest.raises(
        StageError, match=r"step_00000010.partial: cannot be written: rank 1: .*No space left on device"
    ):
        ranks(2).run(fail_to_write, tiny_checkpoint("tied"), checkpoints / "step_00000010", layout(tp=2))
    assert verify_checkpoint(checkpoints / "step_00000010")["state"] == {"step": 10}
