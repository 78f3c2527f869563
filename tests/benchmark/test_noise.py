"""The comparison of number formats on a checkpoint's own answers."""

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_tspin.benchmark.noise import NOISE_FORMATS, measure_formats, report_formats
from megatron_tspin.config_precision import PrecisionSection
from megatron_tspin.conversion.parity import Sentence

SENTENCES = [
    Sentence(f"sentence {number}", [number + 3, 7, 9], [(5 * number + i) % 90 + 3 for i in range(20)])
    for number in range(4)
]
FORMATS = {
    "bf16": NOISE_FORMATS["bf16"],
    "bf16 TE": NOISE_FORMATS["bf16 TE"],
    "FP8": NOISE_FORMATS["FP8 torch rowwise hybrid"],
    "fp32 again": PrecisionSection(),
}


def measure(hf: Path, folder: Path) -> Any:
    results = measure_formats(hf, SENTENCES, 1, FORMATS)
    report_formats(hf, SENTENCES, 1, results, folder)
    return results


@pytest.mark.processes
def test_formats_side_by_side(tiny_checkpoint: Any, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    from multiprocessing import get_context

    hf = tiny_checkpoint("untied")
    with get_context("spawn").Pool(1) as pool:  # it joins process groups of its own
        found = {each.name: each for each in pool.apply(measure, (hf, tmp_path))}
    assert list(found) == ["fp32", *FORMATS]
    assert found["fp32 again"].noise.largest_absolute == 0.0
    assert 0 < found["bf16"].noise.mean_absolute < found["FP8"].noise.mean_absolute / 2
    assert found["bf16"].noise.count == 4 and found["bf16"].seconds > 0
    assert found["bf16 TE"].noise is None and "needs a CUDA device" in found["bf16 TE"].absent
    written = json.loads((tmp_path / f"noise_{hf.name}.json").read_text())
    assert written["response_tokens"] == 80 and written["model"] == hf.name
    by_name = {each["name"]: each for each in written["formats"]}
    assert by_name["FP8"]["noise"]["mean_absolute"] == found["FP8"].noise.mean_absolute
    shown = capfd.readouterr().out
    assert "not measured: precision.transformer_impl" in shown
