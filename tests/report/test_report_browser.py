"""The report in a real browser: every figure is drawn and no script fails."""

import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_tspin.report.html import write_report

pytestmark = pytest.mark.processes

BuildRun = Callable[..., Path]
NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
    "--virtual-time-budget=8000",
    "--window-size=1300,5000",
)


@pytest.fixture(scope="module")
def browser() -> str:
    found = next((path for name in NAMES if (path := shutil.which(name))), None)
    if found is None:
        pytest.skip("no Chromium on this machine (apt-get install chromium): the figures were not drawn")
    return found


def loaded(browser: str, page: Path, profile: Path) -> str:
    """The page's DOM after its scripts have run."""
    command = [browser, *FLAGS, f"--user-data-dir={profile}", "--dump-dom", page.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    return done.stdout


def plots(dom: str) -> list[str]:
    """What each figure's element holds: all of it up to the figure's data."""
    return re.findall(r'<div class="plot[^>]*>(.*?)<script type="application/json"', dom, re.S)


def test_every_figure_is_drawn(browser: str, build_run: BuildRun, tmp_path: Path) -> None:
    others = [build_run("spin", method="spin"), build_run("sft", method="sft")]
    dom = loaded(browser, write_report(build_run(), others), tmp_path / "profile")
    assert re.search(r'id="script-errors" hidden', dom), re.findall(r'id="script-errors".*?</div>', dom, re.S)
    drawn = plots(dom)
    assert len(drawn) == dom.count('class="plot js-plotly-plot"') == 6
    for content in drawn:
        assert content.count("<svg") >= 2
        assert 'class="trace' in content or 'class="point' in content


def test_a_half_finished_run_with_hostile_texts_is_drawn(browser: str, build_run: BuildRun, tmp_path: Path) -> None:
    text = "</script><script>document.title = 'owned'</script><img src=x onerror=\"document.title='owned'\">"
    folder = build_run("<img src=x onerror=alert(1)>", prompt=text, response=text, done=1.5, steps=70)
    dom = loaded(browser, write_report(folder), tmp_path / "profile")
    assert re.search(r'id="script-errors" hidden', dom)
    assert all("<svg" in content for content in plots(dom)) and len(plots(dom)) == 6
    assert "<title>owned" not in dom


def test_a_script_error_becomes_visible(browser: str, build_run: BuildRun, tmp_path: Path) -> None:
    page = write_report(build_run(iterations=1, steps=2))
    text = page.read_text(encoding="utf-8")
    page.write_text(text.replace('data-plot="plot-time"', 'data-plot="plot-nowhere"'), encoding="utf-8")
    dom = loaded(browser, page, tmp_path / "profile")
    assert not re.search(r'id="script-errors" hidden', dom)
    assert re.search(r'id="script-errors">.*plot-nowhere', dom, re.S)
