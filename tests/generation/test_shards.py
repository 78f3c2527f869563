"""Shards: only what is missing is generated, and only what belongs together is read."""

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_tspin.config import ParallelSection
from megatron_tspin.errors import ArtifactError, InputError
from megatron_tspin.generation.sampling import Decoding, answer_seed, uniforms
from megatron_tspin.generation.shards import Prompt, Request, read_shards
from megatron_tspin.run_folder import shard_digest, shard_path
from tests.rank_pool import in_layout
from tests.stale_disk import stale_on_rank_1

COUNT = 7


def request(**changes: Any) -> Request:
    decoding = Decoding(temperature=1.0, top_p=1.0, top_k=0, max_new_tokens=4)
    prompts = [Prompt(f"p{i}", [3 + i] * (1 + (5 * i) % 7)) for i in range(COUNT)]
    first = Request(prompts, decoding, 1, "synthetic/0", shard_size=3, facts={"checkpoint_sha256": "c1"})
    return replace(first, **changes)


class Echo:
    """A backend whose answer is the prompt and the first random number; it counts its prompts, the last comes first."""

    facts: dict[str, Any] = {}

    def __init__(self) -> None:
        self.asked: list[list[int]] = []

    def answers(self, requests: Any, _: Decoding) -> Any:
        from megatron_tspin.generation.backends.backend import Answer

        for request in reversed(requests):
            self.asked.append(list(request.ids))
            number = -float(uniforms(request.seed, 1)[0])
            yield request.index, Answer([*request.ids, 1], [number] * (len(request.ids) + 1), True)

    def close(self) -> None:
        """Holds nothing."""


class Letters:
    """A tokenizer that can only decode."""

    def decode(self, ids: Any) -> str:
        return " ".join(map(str, ids))


def generate(what: Request, folder: Path, layout: ParallelSection, stale: bool = False) -> Any:
    """On ranks: what is then read from the folder, and the prompts that this rank's engine was asked for."""
    from megatron_tspin.generation.shards import generate_shards

    with in_layout(layout) as topology:
        engine: Any = Echo()
        tokenizer: Any = Letters()
        with stale_on_rank_1(*[folder] * stale):
            made = generate_shards(what, engine, topology, tokenizer, folder)
        return [response.model_dump() for response in read_shards(made, folder)], engine.asked


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


LAYOUTS = [{}, {"data_parallel_size": 2}, {"tensor_model_parallel_size": 2}, {"pipeline_model_parallel_size": 2}]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_answers_come_in_document_order_on_every_rank(layout: dict[str, int], ranks: Any, tmp_path: Path) -> None:
    parallel = ParallelSection(**layout)
    found = ranks(parallel.world_size).run(generate, request(), tmp_path / "s", parallel)
    expected = [
        {
            "id": prompt.id,
            "response_ids": [*prompt.ids, 1],
            "token_log_probs": [-float(uniforms(answer_seed(1, "synthetic/0", prompt.id), 1)[0])]
            * (len(prompt.ids) + 1),
            "ended": True,
            "ended_by": 1,
            "text": " ".join(map(str, [*prompt.ids, 1])),
            "sample": 0,
        }
        for prompt in request().prompts
    ]
    assert all(answers == expected for answers, _ in found)
    shards = [f"shard_0000{number}" for number in range(3)]
    assert sorted(contents(tmp_path / "s")) == sorted(
        ["settings.json", *(f"{shard}.{kind}" for shard in shards for kind in ("jsonl", "sha256"))]
    )


def test_only_the_missing_shard_is_made_again_to_the_same_bytes(ranks: Any, tmp_path: Path) -> None:
    ranks(1).run(generate, request(), tmp_path, ParallelSection())
    before = contents(tmp_path)
    shard_path(tmp_path, 1).unlink()
    found = ranks(2).run(generate, request(), tmp_path, ParallelSection(data_parallel_size=2))
    assert contents(tmp_path) == before
    asked = [prompt for _, prompts in found for prompt in prompts]
    assert sorted(asked) == sorted(list(prompt.ids) for prompt in request().prompts[3:6])
    assert ranks(1).run(generate, request(), tmp_path, ParallelSection())[0][1] == []


@pytest.mark.parametrize("damage", ["one id", "torn", "without digest"])
def test_a_shard_that_was_changed_is_made_again(damage: str, ranks: Any, tmp_path: Path) -> None:
    ranks(1).run(generate, request(), tmp_path, ParallelSection())
    before, shard = contents(tmp_path), shard_path(tmp_path, 1)
    text = shard.read_text()
    if damage == "without digest":
        shard_digest(shard).unlink()
    else:
        shard.write_text(text.replace("[6,", "[7,", 1) if damage == "one id" else text[:-20])
        assert shard.read_text() != text
        with pytest.raises((ArtifactError, InputError), match="shard_00001.jsonl"):
            read_shards(request(), tmp_path)
    ((_, asked),) = ranks(1).run(generate, request(), tmp_path, ParallelSection())
    assert contents(tmp_path) == before and len(asked) == 3


@pytest.mark.parametrize("change", [{"shard_size": 2}, {"shard_size": 5}], ids=str)
def test_a_folder_is_finished_with_the_shards_it_was_begun_with(
    change: dict[str, Any], ranks: Any, tmp_path: Path
) -> None:
    ranks(1).run(generate, request(), tmp_path, ParallelSection())
    before = contents(tmp_path)
    shard_path(tmp_path, 1).unlink()
    found = ranks(2).run(generate, request(**change), tmp_path, ParallelSection(data_parallel_size=2))
    assert contents(tmp_path) == before  # of this engine, whose log-probs do not depend on batches
    assert all([answer["id"] for answer in answers] == [p.id for p in request().prompts] for answers, _ in found)
    asked = [prompt for _, prompts in found for prompt in prompts]
    assert sorted(asked) == sorted(list(prompt.ids) for prompt in request().prompts[3:6])


@pytest.mark.parametrize("text", ["[]", "{}", '{"shard_size": 0}', '{"shard_size": "3"}'])
def test_broken_settings_of_shards_are_refused(text: str, ranks: Any, tmp_path: Path) -> None:
    (tmp_path / "settings.json").write_text(text)
    with pytest.raises(ArtifactError, match=r"settings.json: not the settings of generated shards"):
        ranks(1).run(generate, request(), tmp_path, ParallelSection())


@pytest.mark.parametrize("layout", LAYOUTS[1:], ids=str)
def test_a_rank_that_sees_no_shards_makes_none_again(layout: dict[str, int], ranks: Any, tmp_path: Path) -> None:
    parallel = ParallelSection(**layout)
    ranks(1).run(generate, request(), tmp_path, ParallelSection())
    before = contents(tmp_path)
    shard_path(tmp_path, 1).unlink()
    found = ranks(2).run(generate, request(), tmp_path, parallel, True)
    asked = [[sorted(prompt) for prompt in prompts] for _, prompts in found]
    missing = [list(prompt.ids) for prompt in request().prompts[3:6]]
    assert sorted(asked[0]) == sorted(missing)
    assert sorted(asked[1]) == ([] if parallel.data_parallel_size == 2 else sorted(missing))
    assert contents(tmp_path) == before


def test_ranks_that_read_other_prompts_do_not_begin(ranks: Any, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="rank 1 reads another state of the disk: prompts_sha256 is"):
        ranks(2).run(generate_others_on_rank_1, tmp_path / "s")
    assert not (tmp_path / "s").exists()


def generate_others_on_rank_1(folder: Path) -> Any:
    prompts = [Prompt(f"p{i}", [4 + int(os.environ["RANK"])]) for i in range(COUNT)]
    return generate(request(prompts=prompts), folder, ParallelSection(tensor_model_parallel_size=2))


def test_several_answers_to_a_prompt(ranks: Any, tmp_path: Path) -> None:
    prompts = [replace(prompt, sample=number) for prompt in request().prompts for number in range(2)]
    ((answers, _),) = ranks(1).run(generate, request(prompts=prompts), tmp_path / "two", ParallelSection())
    assert [(answer["id"], answer["sample"]) for answer in answers] == [(each.id, each.sample) for each in prompts]
    first, second = answers[::2], answers[1::2]
    assert all(one["token_log_probs"] != two["token_log_probs"] for one, two in zip(first, second, strict=True))
    ((alone, _),) = ranks(1).run(generate, request(), tmp_path / "one", ParallelSection())
    assert alone == first, "how many are wanted changes none of them"
    assert "sample" not in shard_path(tmp_path / "one", 0).read_text()


CHANGES: list[tuple[dict[str, Any], str]] = [
    ({"seed": 2}, "seed was 1, now 2"),
    ({"purpose": "proto"}, "purpose was 'synthetic/0', now 'proto'"),
    ({"facts": {"checkpoint_sha256": "c2"}}, "checkpoint_sha256 was 'c1', now 'c2'"),
    ({"decoding": Decoding(0.5, 1.0, 0, 4)}, "temperature was 1.0, now 0.5"),
    ({"prompts": [Prompt(f"p{i}", [4]) for i in range(COUNT)]}, "prompts_sha256 was"),
    ({"prompts": [Prompt("p0", [4])]}, "prompts was 7, now 1"),
]


@pytest.mark.parametrize(("change", "message"), CHANGES, ids=[next(iter(change)) for change, _ in CHANGES])
def test_answers_made_otherwise_are_refused(change: dict[str, Any], message: str, ranks: Any, tmp_path: Path) -> None:
    ranks(1).run(generate, request(), tmp_path, ParallelSection())
    before = contents(tmp_path)
    with pytest.raises(ArtifactError) as caught:
        ranks(1).run(generate, request(**change), tmp_path, ParallelSection())
    assert message in str(caught.value) and f"{tmp_path}: holds answers made with other settings" in str(caught.value)
    assert contents(tmp_path) == before


def test_a_torn_shard_is_refused_by_name(ranks: Any, tmp_path: Path) -> None:
    ranks(1).run(generate, request(), tmp_path, ParallelSection())
    path = shard_path(tmp_path, 1)
    whole = path.read_text()
    path.write_text(whole[:-20])
    with pytest.raises(InputError, match=r"shard_00001.jsonl:3: not valid JSON"):
        read_shards(request(), tmp_path)
    path.write_text("".join(whole.splitlines(keepends=True)[:2]))
    with pytest.raises(ArtifactError, match=r"shard_00001.jsonl: its answers are not those to this run's prompts"):
        read_shards(request(), tmp_path)
    path.write_text(json.dumps({**json.loads(whole.splitlines()[0]), "ended": "perhaps"}) + "\n")
    with pytest.raises(ArtifactError, match=r"shard_00001.jsonl:1: field `ended`"):
        read_shards(request(), tmp_path)
    path.unlink()
    with pytest.raises(InputError, match=r"shard_00001.jsonl: no such file"):
        read_shards(request(), tmp_path)


def test_prompts_are_bound_by_id_and_tokens() -> None:
    prompts = request().prompts
    renamed = [Prompt("other", prompts[0].ids), *prompts[1:]]
    moved = [prompts[1], prompts[0], *prompts[2:]]
    fingerprints = {request(prompts=each).settings()["prompts_sha256"] for each in (prompts, renamed, moved)}
    assert len(fingerprints) == 3
