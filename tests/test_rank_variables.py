"""Ranks that srun or mpirun started find their place."""

import pytest

from megatron_tspin.rank_variables import adopt_launcher, first_host, tasks_on

STEP = {  # as Slurm 22.05 set them for the fourth of four tasks on two nodes
    "SLURM_JOB_ID": "2", "SLURM_STEP_ID": "0", "SLURM_PROCID": "3", "SLURM_LOCALID": "1", "SLURM_NODEID": "1",
    "SLURM_STEP_NUM_TASKS": "4", "SLURM_STEP_TASKS_PER_NODE": "2(x2)", "SLURM_STEP_NODELIST": "n[1-2]",
}  # fmt: skip
OPEN_MPI = {
    "OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
}  # fmt: skip
HYDRA = {"PMI_RANK": "1", "PMI_SIZE": "2", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2"}


def adopted(environment: dict[str, str]) -> dict[str, str]:
    found = dict(environment)
    adopt_launcher(found)
    return {name: value for name, value in found.items() if environment.get(name) != value}


def test_a_task_of_srun() -> None:
    found = adopted(STEP)
    port = int(found.pop("MASTER_PORT"))
    assert found == {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "n1"}
    assert 20000 <= port < 30000
    first = {**STEP, "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0"}
    assert adopted(first)["MASTER_PORT"] == str(port)
    assert adopted({**STEP, "SLURM_STEP_ID": "1"})["MASTER_PORT"] != str(port)


def test_what_is_set_stays() -> None:
    found = adopted({**STEP, "MASTER_ADDR": "mine", "MASTER_PORT": "29500"})
    assert "MASTER_ADDR" not in found and "MASTER_PORT" not in found
    assert adopted({**STEP, "RANK": "0"}) == {}


def test_a_batch_script_and_a_step_of_one_task_are_no_ranks() -> None:
    assert adopted({"SLURM_JOB_ID": "2", "SLURM_PROCID": "0", "SLURM_NTASKS": "4", "SLURM_NODELIST": "n[1-2]"}) == {}
    assert adopted({**STEP, "SLURM_STEP_NUM_TASKS": "1", "SLURM_STEP_TASKS_PER_NODE": "1", "SLURM_NODEID": "0"}) == {}


@pytest.mark.parametrize("launcher", [OPEN_MPI, HYDRA], ids=["Open MPI", "Hydra"])
def test_a_process_of_mpirun(launcher: dict[str, str]) -> None:
    found = adopted(launcher)
    port = found.pop("MASTER_PORT")
    assert port == adopted(launcher)["MASTER_PORT"]  # all on a host have the same parent
    expected = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    assert found == expected
    several = {
        name: "4" if name.endswith("WORLD_SIZE") or name == "PMI_SIZE" else value for name, value in launcher.items()
    }
    assert not {"MASTER_ADDR", "MASTER_PORT"} & adopted(several).keys()  # which only the user knows


@pytest.mark.parametrize(
    ("nodes", "first"),
    [("n1", "n1"), ("n[1-2]", "n1"), ("n[03-05,9],m1", "n03"), ("gpu-a[7,9]-ib", "gpu-a7-ib"), ("a,b[1-2]", "a")],
)
def test_the_first_host(nodes: str, first: str) -> None:
    assert first_host(nodes) == first


def test_tasks_of_a_node() -> None:
    assert [tasks_on(node, "2(x3),1") for node in range(4)] == [2, 2, 2, 1]
    with pytest.raises(ValueError, match="names no node"):
        tasks_on(4, "2(x3),1")
