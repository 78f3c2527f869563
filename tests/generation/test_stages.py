"""The rollout stage on ranks of which one sees an old state of the disk, and the scorer that only one of them calls."""

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest

from megatron_tspin.config import Config, ParallelSection
from megatron_tspin.data.annotated import Example, write_examples
from megatron_tspin.data.endings import Endings
from megatron_tspin.data.indexed import write_documents
from megatron_tspin.generation.sampling import Decoding
from megatron_tspin.generation.shards import Request
from megatron_tspin.records import Evaluation, Response
from megatron_tspin.run_folder import HELD_OUT, RunFolder, document_stem, examples_path, shard_digest, shard_path
from megatron_tspin.storage import sha256_text
from tests.rank_pool import in_layout
from tests.stale_disk import stale_on_rank_1
from tests.training.rescored import save_policy
from tests.training.trajectory import make_config
from tests.training.triplet_files import FACTS

TWO = ParallelSection(tensor_model_parallel_size=2)
COUNT = 3
SCORER = """
import os

def note(what):
    with open({log!r}, "a") as stream:
        stream.write(what + os.environ["RANK"] + "\\n")

note("loaded on ")

def judge(record, text):
    note("called on ")
    return {result}
"""


@pytest.fixture
def config(tmp_path: Path, tiny_checkpoint: Any) -> Config:
    """A run with held-out examples, in the layout TWO."""
    data = RunFolder(tmp_path / "run").data
    data.mkdir(parents=True)
    write_examples(
        examples_path(data, HELD_OUT),
        [Example(id=f"q{i}", prompt="p", response="r", record={"wanted": str(i)}) for i in range(COUNT)],
    )
    for role in ("prompt", "annotated"):
        write_documents(document_stem(data, HELD_OUT, role), [[5, 6, 7]] * COUNT, 101, FACTS)
    settings = {"parallel.tensor_model_parallel_size": 2, "data.held_out": "unused"}
    return make_config(tiny_checkpoint("tied"), run_dir=str(tmp_path / "run"), **settings)


def scored_by(config: Config, folder: Path, result: str) -> Config:
    """The config with a scorer that notes in a file where it is loaded and called."""
    (folder / "mine.py").write_text(SCORER.format(log=str(folder / "calls.txt"), result=result))
    scorer = config.evaluation.model_copy(update={"scorer": f"{folder}/mine.py:judge"})
    return config.model_copy(update={"evaluation": scorer})


def answered(topology: Any) -> Any:
    """A player whose answers are the numbers of the examples."""
    decoding = Decoding(temperature=1.0, top_p=1.0, top_k=0, max_new_tokens=4)

    def answer(prompts: Any, purpose: str, folder: Path, greedy: bool = False) -> Request:
        request = Request(prompts, decoding, 1, purpose, shard_size=COUNT, facts={})
        if topology.speaks:
            answers = [
                Response(id=prompt.id, response_ids=[5, 1], token_log_probs=[-1.0] * 2, ended=True, text=prompt.id[1:])
                for prompt in prompts
            ]
            folder.mkdir(parents=True)
            text = "".join(response.line() for response in answers)
            shard_path(folder, 0).write_text(text)
            shard_digest(shard_path(folder, 0)).write_text(sha256_text(text))
        return request

    facts = {"checkpoint_sha256": "of the policy"}
    return SimpleNamespace(
        topology=topology,
        model=None,
        backend=closing_nothing(),
        answer=answer,
        decoding=lambda greedy=False: decoding,
        facts=facts,
        tokenizer=SimpleNamespace(endings=Endings(1, frozenset([1]))),
    )


def closing_nothing() -> Any:
    return SimpleNamespace(close=lambda: None)


def evaluate(config: Config, answers: Path) -> Evaluation | str:
    """On ranks: the evaluation, or the error."""
    from megatron_tspin.errors import InputError
    from megatron_tspin.generation import evaluation

    with in_layout(TWO) as topology, patch.object(evaluation, "score_pairs", lambda *_, **__: [-1.0] * COUNT):
        data = RunFolder(Path(config.run_dir)).data
        try:
            return evaluation.evaluate_policy(config, answered(topology), 0, evaluation.of_run(data), answers)
        except InputError as error:
            return str(error)


def test_the_scorer_is_loaded_and_called_on_one_rank(config: Config, ranks: Any, tmp_path: Path) -> None:
    first, second = ranks(2).run(evaluate, scored_by(config, tmp_path, "float(text == '1')"), tmp_path / "answers")
    assert first == second and first.greedy.accuracy == first.sampled.accuracy == pytest.approx(1 / COUNT)
    calls = (tmp_path / "calls.txt").read_text().splitlines()
    assert calls == ["loaded on 0", *["called on 0"] * (2 * COUNT)]


@pytest.mark.parametrize(
    ("result", "message"),
    [
        ("record['absent']", "mine.py:12: the scorer `judge` failed for example q0: KeyError: 'absent'"),
        ("2", "the scorer `judge` returned 2 for example q0"),
    ],
)
def test_a_scorer_that_fails_ends_all_ranks(
    result: str, message: str, config: Config, ranks: Any, tmp_path: Path
) -> None:
    first, second = ranks(2).run(evaluate, scored_by(config, tmp_path, result), tmp_path / "answers")
    assert message in first and second == first


def test_a_scorer_that_is_not_there_ends_all_ranks_before_any_answer(
    config: Config, ranks: Any, tmp_path: Path
) -> None:
    scored = scored_by(config, tmp_path, "1.0")
    (tmp_path / "mine.py").unlink()
    first, second = ranks(2).run(evaluate, scored, tmp_path / "answers")
    assert "mine.py is not a file" in first and second == first
    assert not (tmp_path / "answers").exists()


def rollout(config: Config, policy: int, stale: list[Path]) -> tuple[list[Path], int]:
    """On ranks: checkpoints that were loaded, and the number of evaluations that were begun."""
    from megatron_tspin.generation import stages

    loaded: list[Path] = []
    begun: list[int] = []

    def load(config: Config, layout: Any, topology: Any, checkpoint: Path, serving: Path) -> Any:
        loaded.append(checkpoint)
        return answered(topology)

    def evaluated(*arguments: Any) -> Evaluation:
        begun.append(int(os.environ["RANK"]))
        log_probs = {"log_prob_annotated": -1.0, "log_prob_sampled": None, "nll_per_token": 1.0}
        return Evaluation(iteration=policy, greedy=None, sampled=None, **log_probs)

    with (
        patch.object(stages, "distributed", lambda layout, seed: in_layout(layout)),
        patch.object(stages, "load_player", load),
        patch.object(stages, "evaluate_policy", evaluated),
        stale_on_rank_1(*stale),
    ):
        stages.rollout_run(config, policy)
        stages.rollout_run(config, policy)
    return loaded, len(begun)


def test_all_ranks_take_the_checkpoint_and_the_results_that_rank_0_sees(
    config: Config, ranks: Any, tmp_path: Path
) -> None:
    folder = RunFolder(Path(config.run_dir))
    done = config.self_play.iterations
    checkpoint = folder.checkpoints(done - 1) / "step_00000003"
    ranks(1).run(save_policy, Path(config.model.hf_checkpoint), checkpoint)
    stale = [folder.checkpoints(done - 1), folder.evaluation(done)]
    found = ranks(2).run(rollout, config, done, stale)
    assert found == [([checkpoint] * 2, 1)] * 2  # the results are there the second time
    assert ranks(2).run(rollout, config, done, stale) == [([checkpoint] * 2, 0)] * 2
