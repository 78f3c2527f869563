"""Each thing that may be wrong with a node is one line: node, what, remedy."""

import socket
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_tspin.config import Config
from megatron_tspin.doctor.findings import Facts, Gpu, code_digest, differences, gpu_findings, own_facts
from megatron_tspin.doctor.ranks import least_bytes_of_a_rank, slow_nodes
from megatron_tspin.doctor.shared_folder import (
    held_lock,
    lock_findings,
    missing_probes,
    probe_of,
    remove_probes,
    write_probe,
)
from tests.end_to_end.small_run import tree_of, write_data

GIB = 2**30
FACTS = Facts(0, "n1", {"torch": "2.13.0", "numpy": "2.4"}, "code", "config", 1000.0, {"NCCL_ALGO": "Ring"})


def lines(*others: Facts) -> list[str]:
    return [finding.line() for finding in differences([FACTS, *others])]


def test_equal_nodes_are_well() -> None:
    assert lines(replace(FACTS, rank=1), replace(FACTS, rank=2, host="n2", clock=1004.0)) == []


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"versions": {"torch": "2.12.0", "numpy": "2.4"}}, "FAIL  n2: torch 2.12.0, on n1 2.13.0; install the same"),
        ({"versions": {"torch": "2.13.0"}}, "FAIL  n2: numpy absent, on n1 2.4; install the same"),
        ({"code": "other"}, "FAIL  n2: other code of this project than n1; install the same"),
        ({"config": "other"}, "FAIL  n2: another run.yaml than n1; wait until the file system shows it"),
        ({"clock": 970.0}, "warn  n2: its clock is -30 s from n1's; start its time service"),
        ({"settings": {"NCCL_ALGO": "Tree"}}, "FAIL  n2: NCCL_ALGO = Tree, on n1 Ring; set the same"),
        ({"settings": {}}, "FAIL  n2: NCCL_ALGO = absent, on n1 Ring; set the same"),
    ],
)
def test_a_node_that_differs(changes: dict[str, Any], line: str) -> None:
    other = replace(FACTS, host="n2", **changes)
    found = lines(replace(FACTS, rank=1), replace(other, rank=2), replace(other, rank=3))
    assert len(found) == 1 and found[0].startswith(line)


def test_devices_may_have_other_names_on_another_node() -> None:
    assert lines(replace(FACTS, host="n2", settings={**FACTS.settings, "NCCL_SOCKET_IFNAME": "ib1"})) == []


def test_settings_that_do_harm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NCCL_ASYNC_ERROR_HANDLING", "0")
    assert lines() == ["warn  n1: NCCL_ASYNC_ERROR_HANDLING = 0: a rank that fails leaves the others waiting; unset it"]


@pytest.mark.parametrize(
    ("gpu", "line"),
    [
        (Gpu("H100", 80 * GIB, 79 * GIB), None),
        (Gpu("H100", 80 * GIB, 40 * GIB), "FAIL  n2: rank 1, H100: 40.0 GiB are in use by another process; end it"),
        (Gpu("A100", 80 * GIB, 79 * GIB), "warn  n2: rank 1, A100: on n1 H100; ask for nodes of one kind"),
        (
            Gpu("H100", 10 * GIB, 10 * GIB),
            "FAIL  n2: rank 1, H100: weights, gradients and optimizer need 20.0 GiB of 10.0",
        ),
        (None, "FAIL  n2: rank 1: only n1 has a GPU; ask for nodes of one kind"),
    ],
)
def test_gpus(gpu: Gpu | None, line: str | None) -> None:
    ranks = [replace(FACTS, gpu=Gpu("H100", 80 * GIB, 80 * GIB)), replace(FACTS, rank=1, host="n2", gpu=gpu)]
    found = [finding.line() for finding in gpu_findings(ranks, 20 * GIB)]
    assert len(found) == (line is not None) and (line is None or found[0].startswith(line))


def test_memory_of_a_rank(tmp_path: Path) -> None:
    write_data(tmp_path)

    def needed(**changes: Any) -> float:
        return least_bytes_of_a_rank(Config.model_validate(tree_of(tmp_path, tmp_path / "run", **changes)))

    whole = needed()
    parameters = whole / 12  # fp32 weights, gradients and RMSProp's mean square
    assert needed(parallel__tensor_model_parallel_size=2) == pytest.approx(whole / 2, abs=1)
    assert needed(optimizer__optimizer="adam") == pytest.approx(16 * parameters)
    assert needed(precision__bf16=True) == pytest.approx(14 * parameters)
    assert needed(parallel__data_parallel_size=4, parallel__use_distributed_optimizer=True) == pytest.approx(
        9 * parameters
    )


def test_slow_links() -> None:
    rates = [
        (f"n{rank // 2 + 1}", {"all-reduce over TP (2 ranks)": 400.0 if rank // 2 != 2 else 20.0}) for rank in range(8)
    ]
    (found,) = slow_nodes(rates)
    assert found.line().startswith(
        "warn  n3: all-reduce over TP (2 ranks) is slower than half of the median 400.00 GB/s"
    )


def test_a_folder_that_not_all_nodes_see(tmp_path: Path) -> None:
    folder, here = tmp_path / "doctor", socket.gethostname()
    assert write_probe(folder) == []
    assert missing_probes(folder, [here], 0.0) == []
    (found,) = missing_probes(folder, [here, "n2"], 0.3)
    assert found.line().startswith(f"FAIL  {here}: does not see what n2 has written to {folder}; put --run-dir on")
    probe_of(folder, "n2").write_text("n2")
    assert missing_probes(folder, [here, "n2"], 0.0) == []
    remove_probes(folder)
    assert not folder.exists()
    (tmp_path / "file").write_text("")
    (found,) = write_probe(tmp_path / "file" / "doctor")
    assert "cannot write to" in found.line() and "Not a directory" in found.line()


def test_locks_that_a_node_does_not_see(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "probe.lock"
    with held_lock(path) as held:
        assert held and lock_findings(path, "n1") == []
    (found,) = lock_findings(path, "n1")  # as where locks are of one node alone
    assert "does not see a lock that n1 holds" in found.line() and not found.fatal


def test_code_is_compared_by_content() -> None:
    assert code_digest() == code_digest() and len(code_digest()) == 64


def test_facts_of_this_node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "run.yaml").write_text("x")
    monkeypatch.setenv("NCCL_ALGO", "Ring")
    facts = own_facts(3, tmp_path / "run.yaml", 1.0, None)
    assert (facts.rank, facts.host, facts.settings["NCCL_ALGO"]) == (3, socket.gethostname(), "Ring")
