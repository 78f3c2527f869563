"""Every family computes what it computes in transformers, in every layout, and comes back bit for bit."""

from pathlib import Path
from typing import Any

import pytest

from megatron_tspin.config import Config, ParallelSection
from tests.generation.answers import answer, greedy_by_transformers
from tests.models.test_against_transformers import judge, pairs_of
from tests.rank_pool import in_layout
from tests.rounding import all_within, same_gradients, within
from tests.tiny_checkpoint import DENSE, MIXTURES
from tests.training.test_trajectory import assert_same
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

KINDS = (*DENSE[DENSE.index("llama_biases") :], *MIXTURES)
"""Those that only this file tries; the others are tried all over the tests."""
MAIN = (
    "llama_biases", "smollm3_window", "qwen2_window", "qwen3_window", "phi4", "granite", "gemma2", "gemma3", "olmo2",
    "gpt_neox", "mixtral", "qwen3_moe",
)  # fmt: skip
EACH_FAMILY = [pytest.param(kind, marks=() if kind in MAIN else pytest.mark.slow) for kind in KINDS]
"""`make test-slow` tries the others as well."""
TRAINED = ("granite", "gemma2", "olmo2", "gpt_neox", "qwen3_moe")
"""Every module of its own that a family brings is in one of these; their gradients are compared for all families."""
LAYOUTS: dict[str, dict[str, Any]] = {
    "tp1": {},
    "padded_recompute": {"training.layout": "padded", "training.recompute_granularity": "full"},
    "tp2_sp": {"parallel.tensor_model_parallel_size": 2, "parallel.sequence_parallel": True},
    "pp2": {"parallel.pipeline_model_parallel_size": 2},
    "cp2": {"parallel.context_parallel_size": 2},
}
MOST_PER_TOKEN = 5e-6
"""Absolute difference of a log-prob, over the response's tokens."""


@pytest.fixture(scope="module")
def judged(tiny_checkpoint: Any) -> Any:
    """The judge's log-probs and gradients for a kind of checkpoint, computed once."""
    known: dict[str, Any] = {}

    def get(kind: str) -> Any:
        if kind not in known:
            known[kind] = plain_gradients(make_config(tiny_checkpoint(kind)))
        return known[kind]

    return get


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", EACH_FAMILY)
def test_log_probs_and_gradients(
    kind: str, layout: str, ranks: Any, tiny_checkpoint: Any, judged: Any, tmp_path: Path
) -> None:
    config = make_config(tiny_checkpoint(kind), **LAYOUTS[layout])
    log_probs = ranks(config.parallel.world_size).run(gradients, config, tmp_path / "out")
    expected, expected_gradients = judged(kind)
    for each in log_probs:
        all_within("log-prob", each, expected)
    same_gradients(weights(tmp_path / "out"), expected_gradients)


def loaded_and_exported(config: Config, export: Path, pairs: Any) -> list[float]:
    """On ranks: weights in and out again, and log-probs."""
    from megatron_tspin.checkpoint.hf_weights import export_hf
    from megatron_tspin.objective.scoring import score_pairs
    from tests.generation.answers import load

    folder = Path(config.model.hf_checkpoint)
    with in_layout(config.parallel) as topology:
        model = load(folder, config.parallel, topology)
        export_hf(model, topology, folder, export)
        return score_pairs(model, topology, pairs, 100)


@pytest.mark.parametrize("kind", ["qwen2", "qwen3", "mixtral"])
def test_more_ranks_than_key_value_heads(
    kind: str, ranks: Any, tiny_checkpoint: Any, judged: Any, tmp_path: Path
) -> None:
    """TP 4 over 2 key-value heads: a rank's rows of queries, keys and values begin and end inside a group."""
    config = make_config(
        tiny_checkpoint(kind), **{"parallel.tensor_model_parallel_size": 4, "parallel.sequence_parallel": True}
    )
    log_probs = ranks(4).run(gradients, config, tmp_path / "out")
    expected, expected_gradients = judged(kind)
    for each in log_probs:
        all_within("log-prob", each, expected)
    same_gradients(weights(tmp_path / "out"), expected_gradients)


@pytest.mark.parametrize("kind", KINDS)
def test_long_sequences_and_export(kind: str, ranks: Any, tiny_checkpoint: Any, tmp_path: Path) -> None:
    """At TP 2 x PP 2, on sequences longer than windows and original positions."""
    from megatron_tspin.conversion.loading import check_loads

    config = make_config(
        tiny_checkpoint(kind),
        **{"parallel.tensor_model_parallel_size": 2, "parallel.pipeline_model_parallel_size": 2},
    )
    pairs = pairs_of(5)
    found = ranks(4).run(loaded_and_exported, config, tmp_path / "out", pairs)[0]
    for ours, theirs, (_, response) in zip(found, judge(tiny_checkpoint(kind), pairs), pairs, strict=True):
        within("log-prob", abs(ours - theirs) / len(response), bound=MOST_PER_TOKEN)
    source, back = weights(tiny_checkpoint(kind)), weights(tmp_path / "out")
    assert set(back) == set(source)
    assert all(back[name].equal(value) for name, value in source.items())
    check_loads(tmp_path / "out")


@pytest.mark.parametrize("kind", EACH_FAMILY)
def test_greedy_answers(kind: str, ranks: Any, tiny_checkpoint: Any) -> None:
    """With the key-value cache, at TP 2, token for token."""
    parallel = ParallelSection(tensor_model_parallel_size=2)
    found = ranks(2).run(answer, tiny_checkpoint(kind), parallel, 5, {"temperature": 0.0})
    expected = greedy_by_transformers(tiny_checkpoint(kind))
    for rank in found:
        assert [ids for ids, *_ in rank] == expected


@pytest.mark.trajectory
@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=() if kind in TRAINED else pytest.mark.slow) for kind in KINDS]
)
def test_trajectory(kind: str, ranks: Any, tiny_checkpoint: Any, tmp_path: Path) -> None:
    """Five steps at TP 2 with a sharded sequence, against plain transformers and torch's RMSprop."""
    config = make_config(tiny_checkpoint(kind), **LAYOUTS["tp2_sp"])
    found = ranks(2).run(train, config, tmp_path / "out")[0]
    assert_same(config, (found, tmp_path / "out"), train_plainly(config))


EXPERTS: dict[str, dict[str, Any]] = {
    "dp2_ep2": {"parallel.data_parallel_size": 2, "parallel.use_distributed_optimizer": True},
    "dp2_ep2_padded": {"parallel.data_parallel_size": 2, "training.layout": "padded"},
    "cp2_ep2": {"parallel.context_parallel_size": 2},
    "tp2_dp2_ep2": {
        "parallel.tensor_model_parallel_size": 2,
        "parallel.sequence_parallel": True,
        "parallel.data_parallel_size": 2,
    },
}


@pytest.mark.trajectory
@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow if "tp2" in n else ()) for n in EXPERTS])
def test_shared_out_experts(name: str, ranks: Any, tiny_checkpoint: Any, tmp_path: Path) -> None:
    """Expert parallelism changes nothing, and training goes on from its checkpoints to the bit."""
    config = make_config(tiny_checkpoint("qwen3_moe"), **EXPERTS[name], **{"parallel.expert_model_parallel_size": 2})
    pool = ranks(config.parallel.world_size)
    if name == "dp2_ep2":
        assert_resumes_to_the_bit(pool, config, tmp_path)
    found = pool.run(train, config, tmp_path / "out")[0]
    assert_same(config, (found, tmp_path / "out"), train_plainly(config))


def saved(folder: Path, layout: ParallelSection, target: Path) -> None:
    from megatron_tspin.checkpoint.store import save_checkpoint
    from tests.generation.answers import load

    with in_layout(layout) as topology:
        save_checkpoint(target, load(folder, layout, topology), topology)


def loaded(folder: Path, layout: ParallelSection, checkpoint: Path, target: Path) -> None:
    from megatron_tspin.checkpoint.hf_weights import export_hf
    from megatron_tspin.checkpoint.policies import load_policy
    from megatron_tspin.config import TrainingSection
    from megatron_tspin.config_precision import PrecisionSection
    from megatron_tspin.models.hf_config import read_architecture

    with in_layout(layout) as topology:
        architecture = read_architecture(folder)
        model = load_policy(architecture, layout, TrainingSection(), PrecisionSection(), topology, checkpoint)
        export_hf(model, topology, folder, target)


@pytest.mark.parametrize("kind", ["qwen3_moe_normalised", "olmo2", "gpt_neox"])
def test_checkpoints_load_in_other_layouts(kind: str, ranks: Any, tiny_checkpoint: Any, tmp_path: Path) -> None:
    folder = tiny_checkpoint(kind)
    expert = {"expert_model_parallel_size": 2} if kind in MIXTURES else {}
    shared, whole = ParallelSection(data_parallel_size=2, **expert), ParallelSection(tensor_model_parallel_size=2)
    for number, (first, second) in enumerate([(shared, whole), (whole, shared)]):
        ranks(2).run(saved, folder, first, tmp_path / f"core{number}")
        ranks(2).run(loaded, folder, second, tmp_path / f"core{number}", tmp_path / f"out{number}")
        source, back = weights(folder), weights(tmp_path / f"out{number}")
        assert set(back) == set(source)
        assert all(back[name].equal(value) for name, value in source.items())


def test_layouts_of_experts_that_do_not_fit(tiny_checkpoint: Any) -> None:
    from megatron_tspin.errors import InputError
    from megatron_tspin.models.hf_config import read_architecture

    with pytest.raises(ValueError, match="2 does not divide context_parallel_size x data_parallel_size = 3"):
        ParallelSection(data_parallel_size=3, expert_model_parallel_size=2)
    three = ParallelSection(data_parallel_size=3, expert_model_parallel_size=3)
    with pytest.raises(InputError, match="expert_model_parallel_size = 3 does not divide the 4 experts"):
        read_architecture(tiny_checkpoint("qwen3_moe")).check_layout(three)
    tensor = ParallelSection(tensor_model_parallel_size=2)
    read_architecture(tiny_checkpoint("qwen3_moe")).check_layout(tensor)
    with pytest.raises(InputError, match="experts, which train at .* = 2 only with their tokens split; add --seq"):
        read_architecture(tiny_checkpoint("qwen3_moe")).check_layout(tensor, training=True)
    with pytest.raises(InputError, match="expert_model_parallel_size = 3: .* has no experts; leave"):
        read_architecture(tiny_checkpoint("qwen3")).check_layout(three)
