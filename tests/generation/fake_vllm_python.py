"""Stands for the Python of an environment with vLLM: a script that starts `fake_vllm`, or fails as vLLM may."""

import json
import os
import sys
from pathlib import Path

SCRIPT = """#!/bin/sh
if [ "$1" = "-c" ]; then {version}; exit; fi
exec {python} {module} "$@"
"""


def write_python(folder: Path, version: str = "printf 0.32.0") -> Path:
    """The script; `version` is the shell's answer to whoever asks for the version."""
    path = folder / "python"
    path.write_text(SCRIPT.format(version=version, python=sys.executable, module=Path(__file__).resolve()))
    path.chmod(0o755)
    return path


def main(arguments: list[str]) -> None:
    """Serves until it is ended; leaves its command line and environment beside the log."""
    from tests.generation.fake_vllm import FakeVllm

    options = dict(zip(arguments[2:], arguments[3:], strict=False))
    sys.stdout.write(json.dumps({"arguments": arguments, "environment": dict(os.environ)}) + "\n")
    sys.stdout.flush()
    if "--fail" in arguments:
        sys.exit("RuntimeError: no kernel for this machine")
    with FakeVllm(options["--served-model-name"], port=int(options["--port"])) as server:
        server.serve_forever(0.02)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
    main(sys.argv[1:])
