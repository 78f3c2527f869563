"""A real vLLM, on the CPU, answers a self-play run. `make test-vllm` sets it up."""

import json
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from megatron_tspin.generation.backends.vllm_process import Serving, VllmProcess, free_port
from megatron_tspin.records import Evaluation, PrecisionNoise
from megatron_tspin.run_folder import RunFolder, shard_settings
from tests.end_to_end.small_run import (
    EXAMPLE,
    REPOSITORY,
    command,
    environment,
    succeed,
    tree_of,
    write_config,
    write_data,
)  # fmt: skip

PYTHON = REPOSITORY / ".venv-vllm" / "bin" / "python"
EAGER = ["--enforce-eager"]  # the compiler of vLLM's CPU backend costs a minute a server

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.processes,
    pytest.mark.skipif(not PYTHON.exists(), reason="`make test-vllm` installs vLLM"),
]


def drifts(folder: RunFolder) -> list[float]:
    """Nats a token between what vLLM said and what training computes, by iteration."""
    found = []
    for iteration in folder.iterations():
        noise = PrecisionNoise.model_validate_json(folder.precision(iteration).read_text())
        assert noise.engine_drift is not None
        found.append(noise.engine_drift.per_token_rms)
    return found


def test_a_run_of_the_quickstarts_size_learns(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    done = subprocess.run(
        command(
            "run", "--config", EXAMPLE / "run.yaml", "--run-dir", folder.root, "--tspin-iterations", "2",
            "--tspin-lr-by-iteration", "1e-4", "5e-5", "--tspin-alpha", "0.3", "--tspin-generation-engine", "vllm",
            "--tspin-vllm-python", PYTHON, "--set", "generation.vllm_arguments=[--enforce-eager]",
            "--tspin-generation-cache-gib", "0.25",
        ),
        cwd=REPOSITORY, env=environment(), capture_output=True, text=True, timeout=1500,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert max(drifts(folder)) < 1e-4, "fp32 on both sides"
    before, after = (Evaluation.model_validate_json(folder.evaluation(policy).read_text()).sampled for policy in (0, 2))
    assert before is not None and after is not None and before.accuracy is not None and after.accuracy is not None
    assert after.accuracy > before.accuracy + 0.2
    settings = [json.loads(shard_settings(folder.synthetic(iteration)).read_text()) for iteration in (0, 1)]
    assert [each["engine"] for each in settings] == ["vllm"] * 2 and settings[0]["engine_version"] == "0.32.0"
    assert settings[0]["checkpoint_sha256"] != settings[1]["checkpoint_sha256"]
    assert answers_of(folder.proto) != answers_of(folder.synthetic(0)), "y0 and y' are drawn independently"
    assert not folder.serving.exists()
    assert "vLLM" in done.stderr and folder.report.is_file()


def answers_of(shards: Path) -> list[Any]:
    lines = [line for path in sorted(shards.glob("shard_*.jsonl")) for line in path.read_text().splitlines()]
    return [json.loads(line)["response_ids"] for line in lines]


def test_log_probs_are_the_policys_whatever_the_decoding(tmp_path: Path) -> None:
    """And answers end at the run's stops, texts among them."""
    write_data(tmp_path)
    tree = tree_of(
        tmp_path, tmp_path / "run", generation__engine="vllm", generation__vllm_python=str(PYTHON),
        generation__vllm_arguments=EAGER, generation__cache_gib=0.25, generation__temperature=0.6,
        generation__top_p=0.9, generation__top_k=20, precision__bf16=True, evaluation__greedy=False,
    )  # fmt: skip
    succeed("run", "--config", write_config(tmp_path / "run.yaml", tree))
    assert max(drifts(RunFolder(tmp_path / "run"))) < 0.05, "bf16 on vLLM's side, fp32 on the other"


def test_servers_that_are_named(tmp_path: Path) -> None:
    """Someone serves what the log says, where the run says it."""
    write_data(tmp_path)
    run = RunFolder(tmp_path / "run")
    config = write_config(tmp_path / "run.yaml", tree_of(tmp_path, run.root))
    for stage in ("tokenize", "convert"):
        succeed(stage, "--config", config)
    prompts = tmp_path / "held_out.jsonl"
    output = tmp_path / "answers"
    exported = output / "serving"
    process: VllmProcess | None = None
    port = free_port()
    client = subprocess.Popen(
        command(
            "generate", "--config", config, "--load", run.initial_checkpoint, "--prompts", prompts, "--output", output,
            "--tspin-generation-engine", "vllm", "--tspin-server-url", f"http://127.0.0.1:{port}",
            "--set", "generation.request_seeds=true",
        ),
        env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        deadline = time.monotonic() + 120
        while not (found := list(exported.glob("policy-????????????"))):
            assert time.monotonic() < deadline and client.poll() is None
            time.sleep(0.2)
        serving = Serving(found[0], found[0].name, "float32", 48)
        more = [*EAGER, "--kv-cache-memory-bytes", str(2**28)]
        process = VllmProcess(str(PYTHON), serving, 3, 8, more, tmp_path / "vllm.log", port=port)
        _, said = client.communicate(timeout=300)
        assert client.returncode == 0, said
    finally:
        client.kill()
        if process is not None:
            process.close()
    assert len(answers_of(output)) == 16
    assert f"vllm serve {found[0]} --served-model-name {found[0].name}" in said
