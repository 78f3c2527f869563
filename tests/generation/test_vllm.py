"""The vLLM backend: what it exports, whom it asks, what it keeps of the answers, and a server of its own."""

import json
import os
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_tspin.config import Config, ParallelSection
from megatron_tspin.data.stops import Stops
from megatron_tspin.errors import InputError, StageError
from megatron_tspin.generation.backends.vllm_process import Serving, VllmProcess, environment, version_of
from megatron_tspin.generation.shards import Prompt, Request, read_shards
from megatron_tspin.run_folder import shard_path
from tests.generation.answers import prompts_of
from tests.generation.fake_vllm import STOP, VERSION, VOCABULARY, FakeVllm, answer_to, fake_vllm
from tests.generation.fake_vllm_python import write_python
from tests.generation.test_shards import Letters
from tests.rank_pool import in_layout
from tests.training.trajectory import make_config

SHA = "0123456789abcdef"
ONE = ParallelSection()
LAYOUTS = [ONE, ParallelSection(tensor_model_parallel_size=2), ParallelSection(pipeline_model_parallel_size=2)]
MOST = 6


@pytest.fixture
def fake() -> Iterator[FakeVllm]:
    with fake_vllm() as server:
        yield server


def config_of(folder: Path, *servers: FakeVllm, **settings: Any) -> Config:
    quick = {"generation.server_wait_seconds": 0.3, "generation.server_retries": 2, "generation.batch_size": 5}
    urls = {"generation.server_urls": [server.url for server in servers]}
    return make_config(folder, **{"generation.engine": "vllm", **quick, **urls, **settings})


def on_ranks(config: Config, layout: ParallelSection, folder: Path, texts: tuple[str, ...] = ()) -> Any:
    """The answers to `prompts_of(13)` in the order in which they came, and the facts."""
    from megatron_tspin.generation.backends.backend import PromptRequest
    from megatron_tspin.generation.sampling import Decoding

    decoding = Decoding(temperature=1.0, top_p=1.0, top_k=0, max_new_tokens=MOST)
    requests = [PromptRequest(7 * i, ids, 11 + i) for i, ids in enumerate(prompts_of(13))]
    with in_layout(layout) as topology:
        backend = backend_of(config, layout, topology, folder, texts)
        found = [
            (index, answer.ids, answer.log_probs, answer.ended) for index, answer in backend.answers(requests, decoding)
        ]
        backend.close()
        return found, backend.facts


def backend_of(
    config: Config, layout: ParallelSection, topology: Any, folder: Path, texts: tuple[str, ...] = ()
) -> Any:
    from megatron_tspin.generation.backends.vllm import VllmBackend, serve_policy
    from tests.generation.answers import load

    model = load(Path(config.model.hf_checkpoint), layout, topology)
    serving = serve_policy(config, model, topology, SHA, folder)
    letters: Any = Letters()
    return VllmBackend(config.generation, serving, topology, Stops(frozenset([STOP]), texts, letters), VOCABULARY)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_every_rank_of_a_replica_sees_the_same_answers(
    layout: ParallelSection, fake: FakeVllm, ranks: Any, tiny_checkpoint: Any, tmp_path: Path
) -> None:
    config = config_of(tiny_checkpoint("tied"), fake)
    found = ranks(layout.world_size).run(on_ranks, config, layout, tmp_path)
    assert all(each == found[0] for each in found)
    answers, facts = found[0]
    expected = {7 * i: answer_to(ids, MOST) for i, ids in enumerate(prompts_of(13))}
    assert {index: (ids, log_probs) for index, ids, log_probs, _ in answers} == expected and len(answers) == 13
    assert all(ended == (ids[-1] == STOP) for _, ids, _, ended in answers)
    assert facts == {
        "engine": "vllm",
        "engine_version": VERSION,
        "engine_settings": {"dtype": "float32", "log_probs": "raw", "seeds": "answer", "arguments": []},
    }
    seeds = {tuple(each["prompt"]): each["seed"] for each in fake.asked if "seed" in each}
    assert seeds == {tuple(ids): 11 + i for i, ids in enumerate(prompts_of(13))}
    assert {each["model"] for each in fake.asked} == {"policy-0123456789ab"}


def test_answers_end_at_texts_too(fake: FakeVllm, ranks: Any, tiny_checkpoint: Any, tmp_path: Path) -> None:
    """Of which the server is not told: the answer is cut, and what is left of it was sampled as it should be."""
    config = config_of(tiny_checkpoint("tied"), fake)
    ((answers, _),) = ranks(1).run(on_ranks, config, ONE, tmp_path, ("9",))
    prompts = {7 * i: ids for i, ids in enumerate(prompts_of(13))}
    cut = 0
    for index, ids, log_probs, ended in answers:
        whole, all_log_probs = answer_to(prompts[index], MOST)
        assert ids == whole[: len(ids)] and log_probs == all_log_probs[: len(ids)]
        stops = [place for place, token in enumerate(whole) if token == STOP or "9" in str(token)]
        assert ended == bool(stops) and len(ids) == (stops[0] + 1 if stops else len(whole))
        cut += len(ids) < len(whole)
    assert cut


def test_exports_hold_the_policy_and_link_what_is_unchanged(
    fake: FakeVllm, ranks: Any, tiny_checkpoint: Any, tmp_path: Path
) -> None:
    source: Path = tiny_checkpoint("tied")
    before = {path.name: path.read_bytes() for path in source.iterdir()}
    ranks(1).run(on_ranks, config_of(source, fake), ONE, tmp_path)
    export = tmp_path / "policy-0123456789ab"
    times = {path.name: path.stat().st_mtime_ns for path in export.iterdir()}
    assert json.loads((export / "config.json").read_text())["dtype"] == "float32"
    linked = {path.name for path in export.iterdir() if path.is_symlink()}
    assert linked == {name for name in before if name.endswith(".json") and name != "config.json"}
    from tests.checkpoint.test_hf_weights import tensors

    exported, original = tensors(export), tensors(source)
    assert exported.keys() == original.keys()
    assert all((exported[name] == original[name].float()).all() for name in original)
    ranks(1).run(on_ranks, config_of(source, fake), ONE, tmp_path)
    assert {path.name: path.stat().st_mtime_ns for path in export.iterdir()} == times, "exported once"
    assert {path.name: path.read_bytes() for path in source.iterdir()} == before


def test_servers_of_another_policy_are_told_what_to_serve(
    fake: FakeVllm, ranks: Any, tiny_checkpoint: Any, tmp_path: Path
) -> None:
    """As those still are that answered in the iteration before."""
    fake.model = "policy-ffffffffffff"
    with pytest.raises(InputError) as caught:
        ranks(1).run(on_ranks, config_of(tiny_checkpoint("tied"), fake), ONE, tmp_path)
    assert f"{fake.url}: serves policy-ffffffffffff instead of policy-0123456789ab" in str(caught.value)
    served = f"vllm serve {tmp_path}/policy-0123456789ab --served-model-name policy-0123456789ab --dtype float32"
    assert served in str(caught.value) and "--logprobs-mode raw_logprobs" in str(caught.value)
    assert not fake.asked


def test_servers_of_different_versions_are_refused(
    fake: FakeVllm, ranks: Any, tiny_checkpoint: Any, tmp_path: Path
) -> None:
    with fake_vllm() as other:
        other.version = "0.33.0"
        with pytest.raises(InputError, match="different versions of vLLM"):
            ranks(1).run(on_ranks, config_of(tiny_checkpoint("tied"), fake, other), ONE, tmp_path)


def test_a_server_of_processed_log_probs_is_refused(ranks: Any, tiny_checkpoint: Any, tmp_path: Path) -> None:
    with fake_vllm(processed=True) as fake, pytest.raises(InputError, match="depend on temperature"):
        ranks(1).run(on_ranks, config_of(tiny_checkpoint("tied"), fake), ONE, tmp_path)


@pytest.mark.parametrize("layout", LAYOUTS[:2], ids=str)
def test_an_error_ends_all_ranks(
    layout: ParallelSection, fake: FakeVllm, ranks: Any, tiny_checkpoint: Any, tmp_path: Path
) -> None:
    fake.change = lambda choice, request: choice.update(token_ids=None)
    with pytest.raises(InputError, match="an answer has no token ids"):
        ranks(layout.world_size).run(on_ranks, config_of(tiny_checkpoint("tied"), fake), layout, tmp_path)


def write_shards_on_ranks(config: Config, layout: ParallelSection, request: Request, folder: Path) -> Any:
    from megatron_tspin.generation.shards import generate_shards

    with in_layout(layout) as topology:
        backend = backend_of(config, layout, topology, folder / "serving")
        letters: Any = Letters()
        made = generate_shards(replace(request, facts=backend.facts), backend, topology, letters, folder)
        backend.close()
        return [response.model_dump() for response in read_shards(made, folder)]


def test_shards_over_two_replicas_while_a_server_fails(
    fake: FakeVllm, ranks: Any, tiny_checkpoint: Any, tmp_path: Path
) -> None:
    from megatron_tspin.errors import ArtifactError
    from megatron_tspin.generation.sampling import Decoding

    decoding = Decoding(temperature=1.0, top_p=1.0, top_k=0, max_new_tokens=MOST)
    prompts = [Prompt(f"p{i}", ids) for i, ids in enumerate(prompts_of(13))]
    request = Request(prompts, decoding, 1, "synthetic/0", 3, {})
    two = ParallelSection(data_parallel_size=2)
    with fake_vllm() as dying:
        dying.seconds = 0.05
        timer = threading.Timer(1.0, dying.die)
        timer.start()
        config = config_of(tiny_checkpoint("tied"), fake, dying)
        found = ranks(2).run(write_shards_on_ranks, config, two, request, tmp_path)
        timer.join()
    assert found[0] == found[1]
    expected = [answer_to(list(prompt.ids), MOST) for prompt in prompts]
    assert [(each["response_ids"], each["token_log_probs"]) for each in found[0]] == expected
    settings = json.loads((tmp_path / "settings.json").read_text())
    assert (settings["engine"], settings["engine_version"]) == ("vllm", VERSION)
    shard_path(tmp_path, 1).unlink()
    fake.asked.clear()
    config = config_of(tiny_checkpoint("tied"), fake)
    assert ranks(2).run(write_shards_on_ranks, config, two, request, tmp_path) == found
    asked = {tuple(each["prompt"]) for each in fake.asked if "seed" in each}
    assert asked == {tuple(prompt.ids) for prompt in prompts[3:6]}
    fake.version = "0.33.0"
    with pytest.raises(ArtifactError, match="engine_version was '0.32.0', now '0.33.0'"):
        ranks(2).run(write_shards_on_ranks, config, two, request, tmp_path)


@pytest.mark.processes
def test_a_server_of_its_own(ranks: Any, tiny_checkpoint: Any, tmp_path: Path) -> None:
    python = write_python(tmp_path)
    more = {"generation.vllm_arguments": ["--enforce-eager"], "generation.server_wait_seconds": 60.0}
    config = config_of(tiny_checkpoint("tied"), **{"generation.vllm_python": str(python), **more})
    ((answers, facts),) = ranks(1).run(on_ranks, config, ONE, tmp_path)
    assert {index: (ids, log_probs) for index, ids, log_probs, _ in answers} == {
        7 * i: answer_to(ids, MOST) for i, ids in enumerate(prompts_of(13))
    }
    assert facts["engine_version"] == VERSION
    assert facts["engine_settings"]["seeds"] == "engine", "on a CPU vLLM gets no seed with an answer"
    said = json.loads((tmp_path / "policy-0123456789ab.vllm.log").read_text().splitlines()[0])
    arguments = said["arguments"]
    assert arguments[arguments.index("--seed") + 1] == "11" and arguments[-1] == "--enforce-eager"
    assert arguments[arguments.index("--max-model-len") + 1] == "64"
    assert not {"TORCHDYNAMO_DISABLE", "OMP_NUM_THREADS", "RANK", "PYTHONPATH"} & said["environment"].keys()


def serving(folder: Path) -> Serving:
    return Serving(folder / "export", "policy-0123456789ab", "float32", 64)


@pytest.mark.processes
def test_a_server_that_ends_says_why_and_one_that_runs_is_ended(tmp_path: Path) -> None:
    python, log = str(write_python(tmp_path)), tmp_path / "vllm.log"
    failing = VllmProcess(python, serving(tmp_path), 1, 2, ["--fail", "now"], log)
    deadline = time.monotonic() + 60
    with pytest.raises(StageError, match=r"ended with code 1(.|\n)*no kernel for this machine(.|\n)*vllm.log"):
        while time.monotonic() < deadline:
            failing.check()
            time.sleep(0.05)
    failing.close()
    running = VllmProcess(python, serving(tmp_path), 1, 2, [], log)
    pid = running._child.pid
    running.check()
    running.close()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


@pytest.mark.processes
@pytest.mark.parametrize(
    ("version", "message"),
    [
        ("echo there is no vllm in it >&2; false", "no vLLM to be found: there is no vllm in it"),
        ("true", "no vLLM to be found: no answer"),
    ],
)
def test_a_python_without_vllm_is_refused(version: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=f"{message}; set generation.vllm_python"):
        version_of(str(write_python(tmp_path, version)))
    with pytest.raises(InputError, match="cannot be asked for its vLLM"):
        version_of(str(tmp_path / "absent"))


def test_servers_get_nothing_that_is_meant_for_ranks() -> None:
    ours = {"RANK": "0", "TORCHDYNAMO_DISABLE": "1", "OMP_NUM_THREADS": "1", "TSPIN_LOG_FILE": "x", "PET_X": "1"}
    assert environment({**ours, "HOME": "/root", "CUDA_VISIBLE_DEVICES": "1"}) == {
        "HOME": "/root",
        "CUDA_VISIBLE_DEVICES": "1",
    }
