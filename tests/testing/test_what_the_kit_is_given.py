"""Where plugins are from, and what they are tried with: what is not said is found out, slips of the pen are told."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import attrs
import pytest
import torch
from saekit_plugins.architectures.topk import TopKConfig
from saekit_plugins.architectures.topk.module import TopKSAE
from support.faulty.step_kernels import Doubled

import saekit
from saekit.config import PluginChoice, plugin_field
from saekit.data import StreamContext
from saekit.kinds import LR_SCHEDULES
from saekit.testing import fake_plugin, isolated_manager, plugin_of, plugin_report
from saekit.testing.checks import activation_sources

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


def test_checks_that_are_not_there_are_told() -> None:
    half = plugin_of("lr_schedules", saekit.Entry("half", HalfConfig, Half))
    with pytest.raises(ValueError, match=r"only names the check 'finit', which there is not; did you mean finite\?"):
        plugin_report(half, only=["end", "finit"])
    with pytest.raises(ValueError, match="only names the check 'nosuch', which there is not; the checks are any_order"):
        plugin_report(half, only=["nosuch"])
    with pytest.raises(ValueError, match=r"skip names the check 'finit', which there is not; did you mean finite\?"):
        plugin_report(half, skip={"half: finit": "why"})


def test_options_may_be_tables_and_are_those_of_the_entry() -> None:
    half = plugin_of("lr_schedules", saekit.Entry("half", HalfConfig, Half))
    report = plugin_report(half, configs={"half": {"of": {"name": "cosine", "end": 0.1}}}, only=["end"])
    assert "HalfConfig(of=Choice('saekit:cosine', CosineConfig(end=0.1)))" in report.outcomes[-1].entry
    with pytest.raises(ValueError, match="configs has 3 for 'half', expected a HalfConfig, or a table"):
        plugin_report(half, configs={"half": 3})


def test_options_classes_that_are_made_anew() -> None:
    def saekit_register_lr_schedules() -> Any:
        yield saekit.Entry("anew", attrs.make_class("Anew", {}, frozen=True), Half)

    plugin = SimpleNamespace(saekit_register_lr_schedules=saekit.hookimpl(saekit_register_lr_schedules))
    assert "saekit_register_lr_schedules makes the options class Anew anew" in str(plugin_report(plugin))


class Own:
    """A source with data of its own, at one site; its width is no model's."""

    def __init__(self, config: Any, *, stream: StreamContext) -> None:
        (self.site,) = stream.sites
        if self.site.hook_name != "mine":
            raise saekit.ConfigError([("site", "there is only mine")])
        self.stream, self.n = stream, 0
        self.widths = {self.site: 3}

    def __iter__(self) -> Own:
        return self

    def __next__(self) -> saekit.Batch:
        self.n += 1
        rows = torch.arange(self.stream.batch_size * 3.0).reshape(-1, 3) * self.n
        return saekit.Batch({self.site: rows})

    def peek(self) -> dict[saekit.Site, torch.Tensor]:
        self.n -= 1
        return dict(next(self).activations)

    def state_dict(self) -> dict[str, Any]:
        return {"n": self.n}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.n = state["n"]

    def close(self) -> None:
        """Nothing is open."""


@pytest.mark.usefixtures("one_thread")
def test_sources_with_data_of_their_own() -> None:
    plugin = fake_plugin("activation_sources", build=Own, needs_text=False)
    said = str(plugin_report(plugin, only=["build"]))
    assert "there is only mine; of a source with data of its own say of which site it has them: sites={'fake'" in said
    checks = [check.name for check in activation_sources.CHECKS if check.name != "two_processes"]
    assert not plugin_report(plugin, sites={"fake": "mine"}, only=checks).faults
    report = plugin_report(fake_plugin("activation_sources", build=Wider), sites={"fake": "mine"}, only=["batches"])
    assert "rows of shape [24, 3] at mine, expected [24, 5]" in str(report)


class Wider(Own):
    def __init__(self, config: Any, *, stream: StreamContext) -> None:
        super().__init__(config, stream=stream)
        self.widths = {self.site: 5}
