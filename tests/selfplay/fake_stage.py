"""A stage without a model: writes the outputs it is told to, or misbehaves as a file beside the run says."""

import json
import os
import sys
import time
from pathlib import Path


def main() -> int:
    name, behaviour_file, *outputs = sys.argv[1:]
    behaviour = json.loads(Path(behaviour_file).read_text()).get(name, "")
    with open(Path(behaviour_file).with_name("started.txt"), "a") as stream:
        stream.write(f"{name} {os.getpid()}\n")
    if behaviour == "hang":
        time.sleep(600)
    if behaviour.startswith("kill"):
        os.kill(os.getpid(), int(behaviour.removeprefix("kill")))
    if behaviour == "crash":
        return crash(Path(os.environ["TSPIN_LOG_FILE"]).with_suffix(".ranks"))
    if behaviour.startswith("fail"):
        return int(behaviour.removeprefix("fail"))
    if behaviour.startswith("refuse"):
        log_file = Path(os.environ["TSPIN_LOG_FILE"])
        failure = {"rank": 0, "exit_code": int(behaviour.removeprefix("refuse")), "message": "line 3 is wrong"}
        log_file.with_suffix(".failure.json").write_text(json.dumps(failure))
        return 1  # as torchrun does, whatever its ranks did
    if behaviour != "forget":
        for output in map(Path, outputs):
            write(output, name)
    return 0


def crash(ranks: Path) -> int:
    """What a rank leaves that ended in a library of its own."""
    ranks.mkdir()
    beat = {"rank": 0, "pid": 1, "host": "n1", "count": 9, "doing": "train iteration 0, step 3 of 8", "kind": "step"}
    (ranks / "rank_00000.json").write_text(json.dumps(beat))
    said = 'a warning\nFatal Python error: Segmentation fault\n\nFile "x.py", line 3 in step\n'
    (ranks / "rank_00000.log").write_text(said)
    return 1


def write(output: Path, name: str) -> None:
    """Writes what stands for the output: a file, a checkpoint with its manifest, or shards with their summary."""
    inner = {"checkpoint": "step_00000004/manifest.json", "synthetic": "summary.json", "proto": "summary.json",
             "hf": "config.json"}.get(output.name)  # fmt: skip
    if output.name == "checkpoint" and output.parent.name == "initial":
        inner = "manifest.json"
    path = output / inner if inner else output
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(evaluation(path.stem) if output.stem.startswith("policy_") else {"stage": name}))


def evaluation(policy: str) -> dict[str, object]:
    """What a test wants to have been measured, or as little as a run without decodings measures."""
    least = {"iteration": int(policy[-3:]), "greedy": None, "sampled": None, "log_prob_annotated": -1.0,
             "log_prob_sampled": None, "nll_per_token": 1.0}  # fmt: skip
    wanted: dict[str, dict[str, object]] = json.loads(os.environ.get("TSPIN_TEST_EVALUATIONS", "{}"))
    return wanted.get(policy, least)


if __name__ == "__main__":
    sys.exit(main())
