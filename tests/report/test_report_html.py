"""The HTML file: self-contained, escaped, whole at every stage of a run."""

import json
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from megatron_tspin.report.html import render, setting_lines, versions, write_report
from megatron_tspin.report.iteration_figures import misaligned_iterations
from megatron_tspin.report.run_data import load_run

BuildRun = Callable[..., Path]
HOSTILE = (
    '</script><script>alert("x")</script><img src=x onerror=alert(1)> {{ 7 * 7 }} {% raw %} & \u202e\x07\x00 \ud800'
)


class Outline(HTMLParser):
    """Sections, tags with their attributes, and texts of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def ids(self, tag: str) -> list[str | None]:
        return [attributes.get("id") for name, attributes in self.tags if name == tag]


def without_plotly(text: str) -> str:
    """The page without the library, in which every string of the world occurs."""
    start = text.index("<script>/**")
    return text[:start] + text[text.index("</script>", start) :]


def figures(text: str) -> dict[str, Any]:
    found = re.findall(r'class="figure" data-plot="plot-([\w-]+)">(.*?)</script>', text, re.S)
    return {key: json.loads(value) for key, value in found}


def test_all_sections_are_there_in_order(build_run: BuildRun) -> None:
    folder = build_run(active=0.1)
    path = write_report(folder, [build_run("spin", method="spin")])
    assert path == folder / "report.html"
    assert not list(folder.glob("*.partial"))
    text = path.read_text(encoding="utf-8")
    assert Outline(text).ids("section") == [
        "headline", "warnings", "comparison", "figures", "iterations", "samples", "time", "config", "notes",
    ]  # fmt: skip
    assert list(figures(text)) == ["accuracy", "log-probs", "alignment", "margins", "lengths", "time"]
    assert 'data-kind="saturation"' in text and "The run is finished." in text


def test_it_can_be_written_elsewhere(build_run: BuildRun, tmp_path: Path) -> None:
    folder = build_run()
    assert write_report(folder, output=tmp_path / "new" / "page.html").is_file()
    assert not (folder / "report.html").exists()


def test_it_needs_no_network_and_has_plotly_once(build_run: BuildRun) -> None:
    text = render(load_run(build_run()))
    assert text.count("plotly.js v") >= 1 and text.count("<script>/**") == 1
    for tag, attributes in Outline(without_plotly(text)).tags:
        assert not {"src", "href", "action"} & set(attributes), tag
    assert "default-src 'none'" in text
    assert "http" not in re.sub(r"http-equiv", "", without_plotly(text))


@pytest.mark.parametrize("done", [0.2, 1, 1.5, 2])
@pytest.mark.parametrize("method", ["tspin", "spin", "tspin_ref", "sft"])
def test_a_report_can_be_made_at_any_time(build_run: BuildRun, method: str, done: float) -> None:
    text = render(load_run(build_run(method=method, done=done, iterations=2, steps=4)))
    assert ("The run is finished." in text) == (done == 2)
    assert "None</" not in text and ">nan" not in text


def test_a_run_with_nothing_but_its_config(build_run: BuildRun) -> None:
    folder = build_run(done=0)
    (folder / "data" / "held_out.jsonl").unlink()
    for marker in (folder / "stages").iterdir():
        marker.unlink()
    text = render(load_run(folder))
    assert "Nothing is measured yet" in text and "tokenize is next" in text and figures(text) == {}


def test_hostile_texts_stay_texts(build_run: BuildRun) -> None:
    folder = build_run(
        "<b onclick=x>&run", prompt=HOSTILE, response=HOSTILE, config={"data.template": "<i>{prompt}</i>"}
    )
    text = without_plotly(write_report(folder).read_text(encoding="utf-8"))
    assert "<img" not in text and "alert(1)&gt;" in text
    assert "{{ 7 * 7 }}" in text and "49" not in re.findall(r"onerror.*", text)[0]
    assert "\x00" not in text and "\x07" not in text and "\u2400" in text
    assert "&lt;i&gt;{prompt}" in text and "<b onclick" not in text
    scripts = [attributes for tag, attributes in Outline(text).tags if tag == "script"]
    assert len([item for item in scripts if item.get("type") != "application/json"]) == 2  # and plotly, left out here


def test_hostile_run_names_are_no_markup_in_figures(build_run: BuildRun) -> None:
    run, other = load_run(build_run("<b>one")), load_run(build_run("<a href='x'>two", method="spin"))
    text = render(run, [other])
    names = {trace.get("name") for trace in figures(text)["accuracy"]["data"]}
    assert names == {"&lt;b&gt;one", "&lt;a href='x'&gt;two"}


def test_misaligned_iterations_are_named_and_shaded(build_run: BuildRun, spin_recipe: Any) -> None:
    run = load_run(build_run())
    spin = load_run(build_run("spin", spin_recipe))
    assert misaligned_iterations(run) == [] and misaligned_iterations(spin) == [1, 2, 3]
    text = render(run, [spin])
    assert "tspin-run: none; spin: 1, 2, 3" in text
    alignment = figures(text)["alignment"]
    assert len(alignment["layout"]["shapes"]) == 6
    rewards = [trace["y"] for trace in alignment["data"] if trace.get("xaxis") == "x4"]
    assert all(annotated > synthetic for annotated, synthetic in zip(*rewards, strict=True))
    likelihoods = [trace["y"] for trace in alignment["data"] if trace.get("xaxis") == "x5"]
    assert [annotated > synthetic for annotated, synthetic in zip(*likelihoods, strict=True)] == [True] + 3 * [False]


def test_curves_are_interrupted_between_iterations(build_run: BuildRun) -> None:
    plot = figures(render(load_run(build_run(iterations=2, steps=3))))["log-probs"]
    annotated = plot["data"][0]
    assert annotated["x"] == [1, 2, 3, None, 4, 5, 6, None]
    assert [note["text"] for note in plot["layout"]["annotations"]] == ["iteration 0", "iteration 1"]


def test_samples_show_the_answers_before_and_after(build_run: BuildRun) -> None:
    text = render(load_run(build_run(iterations=2)))
    assert text.count('<article class="sample">') == 3
    assert "elppa (0)" in text and "elppa (2)" in text and "elppa (1)" not in text
    assert "3 tokens, cut off, no EOS, log-prob −1.7" in text and "after 2 iterations (greedy)" in text


def test_broken_files_are_shown_as_warnings(build_run: BuildRun) -> None:
    folder = build_run()
    (folder / "evaluation" / "policy_000" / "greedy" / "shard_00000.jsonl").write_text("{")
    (folder / "proto" / "summary.json").write_text("[")
    text = render(load_run(folder))
    assert text.count("A file cannot be read") == 2 and "shard_00000.jsonl:1:" in text


def test_settings_that_differ_from_their_defaults_are_told_apart(build_run: BuildRun) -> None:
    lines = {line.name: line for line in setting_lines(load_run(build_run()))}
    assert lines["objective.alpha"].is_changed and (
        lines["objective.alpha"].value,
        lines["objective.alpha"].default,
    ) == (
        "0.1",
        "1.0",
    )
    assert lines["model.hf_checkpoint"].is_changed and lines["model.hf_checkpoint"].default == "required"
    assert not lines["objective.beta"].is_changed


def test_versions_that_differ_between_stages_are_told_apart(build_run: BuildRun) -> None:
    folder = build_run(iterations=1)
    marker = folder / "stages" / "export.json"
    content = json.loads(marker.read_text())
    content["versions"]["torch"] = "9.9"
    marker.write_text(json.dumps(content))
    found = dict(versions(load_run(folder)))
    assert found["megatron-core"] == "0.16.1"
    assert found["torch"].startswith("2.13.0 in tokenize, ") and found["torch"].endswith("; 9.9 in export")
