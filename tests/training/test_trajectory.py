"""One trajectory: every layout gives the losses and weights of plain transformers with the paper's formulas."""

from pathlib import Path
from typing import Any

import pytest

from tests.rounding import all_within, same_gradients, same_updates
from tests.training.trajectory import (
    assert_resumes_to_the_bit,
    gradients,
    make_config,
    plain_gradients,
    train,
    train_plainly,
    weights,
)

pytestmark = pytest.mark.exact

LAYOUTS: dict[str, dict[str, Any]] = {
    "tp1": {},
    "recompute_full": {"training.recompute_granularity": "full"},
    "recompute_selective": {"training.recompute_granularity": "selective"},
    "one_row": {"training.row_capacity": 512},
    "unshared": {"training.share_prompts": False, "training.row_capacity": 80},
    "dense": {"training.packed_attention": "dense"},
    "padded": {"training.layout": "padded"},
    "padded_micro_batch_8": {"training.layout": "padded", "training.micro_batch_size": 8},
    "tp2": {"parallel.tensor_model_parallel_size": 2},
    "tp2_sp": {"parallel.tensor_model_parallel_size": 2, "parallel.sequence_parallel": True},
    "tp2_sp_recompute": {
        "parallel.tensor_model_parallel_size": 2,
        "parallel.sequence_parallel": True,
        "training.recompute_granularity": "full",
    },
    "pp2": {"parallel.pipeline_model_parallel_size": 2},
    "pp2_padded": {"parallel.pipeline_model_parallel_size": 2, "training.layout": "padded"},
    "cp2": {"parallel.context_parallel_size": 2},
    "cp2_recompute": {"parallel.context_parallel_size": 2, "training.recompute_granularity": "full"},
    "cp2_distributed_optimizer": {"parallel.context_parallel_size": 2, "parallel.use_distributed_optimizer": True},
    "cp2_tp2_sp": {
        "parallel.context_parallel_size": 2,
        "parallel.tensor_model_parallel_size": 2,
        "parallel.sequence_parallel": True,
    },
    "dp2": {"parallel.data_parallel_size": 2},
    "dp2_distributed_optimizer": {"parallel.data_parallel_size": 2, "parallel.use_distributed_optimizer": True},
    "dp2_overlap_grad_reduce": {"parallel.data_parallel_size": 2, "parallel.overlap_grad_reduce": True},
    "dp2_overlap_param_gather": {
        "parallel.data_parallel_size": 2,
        "parallel.overlap_grad_reduce": True,
        "parallel.overlap_param_gather": True,
        "parallel.use_distributed_optimizer": True,
    },
    "tp2_pp2": {"parallel.tensor_model_parallel_size": 2, "parallel.pipeline_model_parallel_size": 2},
}
OBJECTIVES: dict[str, dict[str, Any]] = {
    "tspin_exponential": {"objective.link": "exponential"},
    "tspin_beta_0": {"objective.beta": 0.0},
    "spin": {"objective.method": "spin"},
    "tspin_ref": {"objective.method": "tspin_ref"},
    "sft": {"objective.method": "sft"},
}


def assert_same(config: Any, found: tuple[list[float], Path], expected: tuple[list[float], dict[str, Any]]) -> None:
    """Losses, gradient norms and exported weights are the judge's."""
    all_within("loss", found[0][::2], expected[0][::2])
    all_within("norm", found[0][1::2], expected[0][1::2])
    same_updates(weights(found[1]), expected[1], weights(Path(config.model.hf_checkpoint)))


@pytest.mark.parametrize("layout", ["tp1", "padded", "tp2", "tp2_sp", "pp2", "cp2", "tp2_pp2", "dp2"])
@pytest.mark.parametrize("kind", ["tied", "untied", "llama3_rope", "mistral_window"])
def test_log_probs_and_gradients(layout: str, kind: str, ranks: Any, tiny_checkpoint: Any, tmp_path: Path) -> None:
    config = make_config(tiny_checkpoint(kind), **LAYOUTS[layout])
    log_probs = ranks(config.parallel.world_size).run(gradients, config, tmp_path / "out")
    expected, expected_gradients = plain_gradients(config)
    for each in log_probs:
        all_within("log-prob", each, expected)
    same_gradients(weights(tmp_path / "out"), expected_gradients)


@pytest.fixture(scope="module")
def judged(tiny_checkpoint: Any) -> Any:
    """The judge's trajectory for a kind of checkpoint and settings, computed once."""
    known: dict[str, Any] = {}

    def get(kind: str, settings: dict[str, Any]) -> Any:
        key = f"{kind} {settings}"
        if key not in known:
            known[key] = train_plainly(make_config(tiny_checkpoint(kind), **settings))
        return known[key]

    return get


@pytest.mark.trajectory
@pytest.mark.parametrize("kind", ["tied", "untied"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout: str, kind: str, ranks: Any, tiny_checkpoint: Any, judged: Any, tmp_path: Path) -> None:
    config = make_config(tiny_checkpoint(kind), **LAYOUTS[layout])
    losses = ranks(config.parallel.world_size).run(train, config, tmp_path / "out")
    assert all(each == losses[0] for each in losses)
    assert_same(config, (losses[0], tmp_path / "out"), judged(kind, {}))


@pytest.mark.trajectory
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_objectives(objective: str, ranks: Any, tiny_checkpoint: Any, judged: Any, tmp_path: Path) -> None:
    config = make_config(tiny_checkpoint("untied"), **OBJECTIVES[objective])
    losses = ranks(1).run(train, config, tmp_path / "out")[0]
    assert_same(config, (losses, tmp_path / "out"), judged("untied", OBJECTIVES[objective]))


@pytest.mark.trajectory
@pytest.mark.parametrize("kind", ["llama3_rope", "mistral_window"])
def test_families(kind: str, ranks: Any, tiny_checkpoint: Any, judged: Any, tmp_path: Path) -> None:
    config = make_config(tiny_checkpoint(kind), **LAYOUTS["tp2"])
    losses = ranks(2).run(train, config, tmp_path / "out")[0]
    assert_same(config, (losses, tmp_path / "out"), judged(kind, {}))


@pytest.mark.trajectory
@pytest.mark.parametrize("layout", ["tp1", "pp2", "tp2_sp", "cp2", "dp2_overlap_param_gather"])
@pytest.mark.parametrize("optimizer", ["rmsprop", "adam"])
def test_resuming_changes_no_bit(layout: str, optimizer: str, ranks: Any, tiny_checkpoint: Any, tmp_path: Path) -> None:
    config = make_config(tiny_checkpoint("tied"), **LAYOUTS[layout], **{"optimizer.optimizer": optimizer})
    assert_resumes_to_the_bit(ranks(config.parallel.world_size), config, tmp_path)
