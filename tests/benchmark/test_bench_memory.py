from pathlib import Path

import pytest

from megatron_tspin.benchmark.head_memory import FULL, OURS, HeadSettings, report_heads, run_head_benchmark
from megatron_tspin.benchmark.memory import PeakMemory

pytestmark = pytest.mark.skipif(
    not Path("/proc/self/status").is_file(), reason="peak memory is read from Linux's /proc"
)


def test_peak_memory_sees_what_came_and_went() -> None:
    memory = PeakMemory()
    if "could not be reset" in memory.method:
        pytest.skip("the kernel does not let this process reset its peak")
    block = bytearray(b"x") * (128 * 2**20)
    del block
    assert 120 < memory.peak_mib() < 200
    memory.reset()
    assert memory.peak_mib() < 60


@pytest.mark.processes
def test_our_head_needs_a_fraction_of_full_logits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = HeadSettings(tokens=2048, hidden_size=16, vocabularies=(16384,))
    full, ours = run_head_benchmark(settings)
    assert (full.variant, ours.variant) == (FULL, OURS)
    logits_mib = 2048 * 16384 * 4 / 2**20
    assert full.peak_mib > 1.9 * logits_mib
    assert ours.peak_mib < 0.5 * logits_mib
    assert ours.log_prob == pytest.approx(full.log_prob, rel=1e-5)
    report_heads(settings, [full, ours], tmp_path)
    assert "16384" in capsys.readouterr().out and (tmp_path / "head_memory.json").is_file()
