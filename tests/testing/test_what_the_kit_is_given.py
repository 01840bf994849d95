"""Where plugins are from, and what they are tried with: what is not said is found out, slips of the pen are told."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import attrs
import pytest
from saekit_plugins.architectures.topk import TopKConfig
from saekit_plugins.architectures.topk.module import TopKSAE
from support.faulty.step_kernels import Doubled

import saekit
from saekit.config import PluginChoice, plugin_field
from saekit.kinds import LR_SCHEDULES
from saekit.testing import fake_plugin, isolated_manager, plugin_of, plugin_report

SCHEDULE = """
import attrs
import saekit

@attrs.frozen(kw_only=True)
class Options:
    pass

@saekit.hookimpl
def saekit_register_lr_schedules():
    yield saekit.Entry("mine", Options, lambda config, *, lr, steps: None)
"""


def test_a_module_is_of_the_distribution_that_has_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    about = tmp_path / "Own_Dist-1.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: Own_Dist\nVersion: 1\n")
    (about / "entry_points.txt").write_text("[saekit]\nmine = own_schedule_module\n")
    for name in ("own_schedule_module", "other_schedule_module"):
        (tmp_path / f"{name}.py").write_text(SCHEDULE)
    monkeypatch.syspath_prepend(tmp_path)
    own, other = (importlib.import_module(f"{name}_schedule_module") for name in ("own", "other"))
    keys = [item.key for item in isolated_manager(own, other).registry(LR_SCHEDULES).items]
    assert keys == ["own-dist:mine", "test:mine"]
    given = isolated_manager(own, other, distribution="given").registry(LR_SCHEDULES).items
    assert [item.key for item in given] == ["given:mine"] * 2


@pytest.mark.usefixtures("one_thread")
def test_kernels_for_an_architecture_of_ones_own_are_tried() -> None:
    @attrs.frozen(kw_only=True)
    class OwnConfig(TopKConfig):
        """That of topk."""

    def build(config: Any, **services: Any) -> TopKSAE:
        return TopKSAE(config, **services)

    architecture = plugin_of("sae_architectures", saekit.Entry("own", OwnConfig, build))
    kernel = fake_plugin("step_kernels", build=Doubled, serves=("own-dist:own",))
    alone = plugin_report(kernel, only=["steps"])
    assert "give its module, too, check_plugin(kernel, architecture), and distribution='own-dist'" in str(alone)
    report = plugin_report(kernel, architecture, only=["steps"], distribution="own-dist")
    assert "the gradient of W_dec (own-dist:own)" in str(report)


@attrs.frozen(kw_only=True)
class HalfConfig:
    """Options that choose another plugin."""

    of: PluginChoice = plugin_field("lr_schedules", "cosine")
    """The schedule that is halved."""


class Half:
    def __init__(self, config: HalfConfig, *, lr: float, steps: int) -> None:
        self.inner = config.of.build(lr=lr, steps=steps)
        self.end = self.inner.end / 2

    def __call__(self, step: int) -> float:
        return float(self.inner(step) / 2)


def test_a_plugin_that_chooses_another() -> None:
    """Its choice is bound where a key, or options that were made in code, choose it, as in a configuration."""
    half = plugin_of("lr_schedules", saekit.Entry("half", HalfConfig, Half))
    report = plugin_report(half, configs={"half": [HalfConfig(), HalfConfig(of=HalfConfig(of="constant"))]})
    assert not report.faults, report
    plugins = isolated_manager(half, builtins=True)
    for choice in ("half", HalfConfig(), HalfConfig(of=HalfConfig()), plugins.bound("lr_schedules", HalfConfig())):
        assert plugins.build("lr_schedules", choice, lr=1.0, steps=100)(0) in (0.5, 0.25)
