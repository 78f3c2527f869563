"""A chat template that asks for the date gets the run's, on whichever day the run goes on."""

import datetime
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from megatron_tspin.config import Config
from megatron_tspin.config_source import dump_config
from megatron_tspin.data.annotated import Example
from megatron_tspin.data.encoding import EncodedExamples
from megatron_tspin.data.template import PromptTemplate
from megatron_tspin.data.tokenization import load_run_tokenizer
from megatron_tspin.data.tokenizer_export import check_exportable
from megatron_tspin.data.tokenizer_loading import asks_for_the_date
from megatron_tspin.run_folder import RunFolder
from megatron_tspin.selfplay.run_config import check_same_config, with_template_date

DATED = "Today is {{ strftime_now('%d %b %Y') }}. {% for m in messages %}{{ m.content }}{% endfor %}"
EXAMPLE = Example(id="a", prompt="x", response="y", record={})


def run_config(folder: Path, **data: Any) -> Config:
    settings = {"annotated": "a.jsonl", "template": "chat", **data}
    run = {"run_dir": str(folder.parent / "run"), "model": {"hf_checkpoint": str(folder)}}
    return Config.model_validate({**run, "data": settings})


@pytest.fixture
def dated(hf_folder_factory: Callable[..., Path], tmp_path: Path) -> Path:
    return hf_folder_factory(tmp_path / "hf", chat=DATED)


def test_the_date_is_a_setting(dated: Path) -> None:
    config = run_config(dated, template_date="2024-02-29")
    tokenizer = load_run_tokenizer(config)
    template = PromptTemplate("chat", tokenizer)
    assert template.text(EXAMPLE) == "Today is 29 Feb 2024. x"
    other = PromptTemplate("chat", load_run_tokenizer(run_config(dated, template_date="2024-03-01")))
    assert other.fingerprint != template.fingerprint
    check_exportable(config, EncodedExamples([EXAMPLE], *template.encode([EXAMPLE])))
    today = PromptTemplate("chat", load_run_tokenizer(run_config(dated))).text(EXAMPLE)
    assert today == f"Today is {datetime.date.today():%d %b %Y}. x"
    with pytest.raises(ValidationError, match="template_date = '29 Feb' is no date; write it as 2026-01-31"):
        run_config(dated, template_date="29 Feb")


def test_a_run_keeps_the_date_of_its_beginning(dated: Path) -> None:
    config = run_config(dated)
    began = with_template_date(config, "2026-01-31")
    assert began.data.template_date == "2026-01-31"
    folder = RunFolder(Path(config.run_dir))
    folder.markers.mkdir(parents=True)
    folder.config.write_text(dump_config(began.model_copy(update={"run_dir": "."})))
    (folder.markers / "tokenize.json").write_text("{}")
    later = with_template_date(config, "2026-02-01")
    assert later.data.template_date == "2026-01-31"
    check_same_config(later)


def test_only_templates_that_ask_get_one(hf_folder_factory: Callable[..., Path], dated: Path, tmp_path: Path) -> None:
    plain = hf_folder_factory(tmp_path / "plain")
    assert (asks_for_the_date(dated), asks_for_the_date(plain)) == (True, False)
    for config in (run_config(plain), run_config(dated, template="{prompt}")):
        assert with_template_date(config, "2026-01-31") == config
    fingerprints = {
        load_run_tokenizer(run_config(plain, template_date=date)).fingerprint for date in (None, "2020-01-01")
    }
    assert len(fingerprints) == 1
    settings = json.loads((plain / "tokenizer_config.json").read_text())
    del settings["chat_template"]
    (plain / "tokenizer_config.json").write_text(json.dumps(settings))
    (plain / "chat_template.jinja").write_text(DATED)
    assert asks_for_the_date(plain)
