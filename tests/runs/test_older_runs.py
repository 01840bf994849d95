"""Runs that an earlier saekit began go on, whatever is refused at the begin of one today."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import saekit
from saekit.commands import preflight
from saekit.config import TrainConfig
from saekit.config.converter import ConfigConverter
from saekit.config.files import plain_config
from saekit.runs.record import RunRecord, as_of_today
from saekit.runs.resuming import _of_checkpoint

SITES = {"inputs": [{"hook_name": "a"}], "targets": [{"hook_name": "b"}]}


def test_a_site_that_was_written_beside_inputs_is_passed_over() -> None:
    old = {"site": {"hook_name": "x"}, **SITES, "sae": {"name": "transcoder"}}
    assert as_of_today(old) == {**SITES, "sae": {"name": "transcoder"}}
    assert as_of_today({"site": {"hook_name": "x"}, "inputs": []})["site"] == {"hook_name": "x"}
    assert old["site"] == {"hook_name": "x"}, "is not changed in its place"


def test_the_record_and_the_checkpoint_of_such_a_run_are_read(tmp_path: Path) -> None:
    plugins = saekit.default_manager()
    config = ConfigConverter(plugins).structure({**SITES, "sae": {"name": "transcoder"}}, TrainConfig, "a test")
    table: dict[str, Any] = {**plain_config(config, plugins), "site": {"hook_name": "blocks.0.hook_resid_pre"}}
    checkpoint: Any = SimpleNamespace(folder=tmp_path, facts={"saes": {"": {"config": table}}})
    assert _of_checkpoint(checkpoint, {"": config}, plugins)[""].sites == config.sites
    (tmp_path / "config.toml").write_text(
        '[site]\nhook_name = "blocks.0.hook_resid_pre"\n[[inputs]]\nhook_name = "a"\n[[targets]]\nhook_name = "b"\n'
        '[sae]\nname = "transcoder"\n'
    )
    assert RunRecord(tmp_path, {"": "."}).configs(plugins)[""].sites == config.sites


def test_options_that_only_a_new_run_may_not_have_do_not_end_one(tmp_path: Path) -> None:
    run = {"sae": {"name": "standard", "l1_warm_up_steps": 10**6}, "dataset": {"path": "saekit/python-stdlib"}}
    plugins = saekit.default_manager()
    config = ConfigConverter(plugins).structure(run, TrainConfig, "a test")
    assert preflight.of_resume([config], plugins, begun=True).texts == []
    (text,) = preflight.of_resume([config], plugins, begun=False).texts
    assert "l1_warm_up_steps: is 1,000,000, and training has" in text
