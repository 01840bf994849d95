"""Each check finds the fault that it is for, and says what was found; a plugin without faults passes."""

from __future__ import annotations

import importlib
import re
import sys
from pathlib import Path

import attrs
import pytest
import saekit_plugins.schedules.cosine
from support.faulty import CASES, EVERY_KIND, backends
from support.faulty.activations import summed
from support.faulty.backends import Norming, Pointing, of
from support.faulty.schedules import Falling, Lost

import saekit
from saekit.kinds import KINDS
from saekit.testing import ConformanceError, check_plugin, fake_plugin, plugin_of, plugin_report
from saekit.testing.checks import activation_sources, trackers
from saekit.testing.checks.every_kind import OF_EVERY_KIND


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize(("kind", "check"), CASES)
def test_each_check_finds_its_fault(kind: str, check: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(activation_sources, "_PATIENCE", 0.05)
    monkeypatch.setattr(trackers, "_GRACE", 0.05)
    case = CASES[kind, check]
    report = plugin_report(case.plugin, only=[check], **case.given(tmp_path))
    assert [outcome.check for outcome in report.faults] == [check]
    assert re.search(case.says, str(report.faults[0].fault)), report


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize(
    ("backend", "check", "says"),
    [
        (backends.Exposing, "exposes_hooks", None),
        (backends.Processed, "states_processing", None),
        (backends.Sidling, "other_forwards", None),
        (backends.Unwritten, "other_forwards", "'model.backend.aside=true', expected model.backend.value="),
        (backends.Sticking, "other_forwards", "the loss after model.backend.value=1: other numbers"),
        (backends.Inferring, "grad", "without grad, a forward gives inference tensors, which nothing that learns"),
        (backends.Lenient, "refusals", "tokens without a batch is taken, expected a ModelError"),
        (backends.Wrapping, "refusals", "a token below 0 is taken, expected a ModelError"),
        (backends.Idle, "refusals", "a forward of which nothing is wanted is taken, expected a ModelError"),
        (backends.Unheard, "exposes_hooks", "what the model's add_hook put at '.*' is not at the point there"),
        (backends.Contrary, "states_processing", r"processing\('hook_embed'\) says \['fold_ln'\] otherwise than"),
        (backends.Blind, "states_processing", r"of an SAE of this very model, processing\(\) lacks \['center_wr"),
    ],
)
def test_abilities_that_are_kept_pass_and_others_do_not(backend: type, check: str, says: str | None) -> None:
    report = plugin_report(fake_plugin("model_backends", build=backends.of(backend)), only=[check])
    assert not report.not_tried, report
    assert [outcome.check for outcome in report.outcomes] == [check]
    assert len(report.faults) == bool(says), report
    assert all(re.search(str(says), str(fault.fault)) for fault in report.faults), report


def test_every_check_has_a_fault_that_it_finds() -> None:
    checks = {(EVERY_KIND, check.name) for check in OF_EVERY_KIND}
    for kind in KINDS:
        own = importlib.import_module(f"saekit.testing.checks.{kind}").CHECKS
        checks |= {(kind, check.name) for check in own}
    assert set(CASES) == checks


def test_weights_that_lead_to_the_residual_stream_are_those_that_the_model_multiplies_by() -> None:
    check = "leads_to_residual_stream"
    says = {"gives, and not by a multiple of it": Norming, None: Pointing}
    for expected, made in says.items():
        report = plugin_report(fake_plugin("model_backends", build=of(made)), only=[check])
        if expected is None:
            (outcome,) = report.outcomes
            assert outcome.fault is outcome.not_tried is None
        else:
            assert expected in str(report.faults[0].fault)


# ---- importing


MODULE = """
import attrs
import saekit
{}

@attrs.frozen(kw_only=True)
class Options:
    pass

@saekit.hookimpl
def saekit_register_lr_schedules():
    return [saekit.Entry("mine", Options, lambda config, *, lr, steps: None)]
"""


@pytest.mark.parametrize(
    ("does", "says"),
    [
        ("print('hello')", "prints 'hello'"),
        ("import sys; print('oh', file=sys.stderr)", "prints 'oh'"),
        ("import torch", "imports torch, which slows every command: import it inside build"),
        ("import os; os.environ['MINE'] = '1'", "changes the environment"),
        ("import random; random.seed(0)", "changes Python's random numbers"),
        ("import sys; sys.path.insert(0, '/mine')", "changes sys.path"),
        ("import logging; logging.basicConfig()", "changes logging"),
        (
            "import time; start = time.process_time()\nwhile time.process_time() < start + 0.6: pass",
            "s, in every command, expected 0.5 s at most",
        ),
        ("import os\nif os.environ.get('PYTEST_VERSION') is None: raise ValueError('nowhere')", ""),
    ],
    ids=["prints", "complains", "torch", "environment", "random", "path", "logging", "slow", "clean"],
)
def test_what_importing_does(does: str, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = "a_module_that_is_imported"
    (tmp_path / f"{name}.py").write_text(MODULE.format(does))
    monkeypatch.syspath_prepend(tmp_path)
    module = type(sys)(name)  # it is not imported in this process
    found = [outcome.fault for outcome in plugin_report(module, only=["import"]).faults if outcome.check == "import"]
    assert [re.search(says, str(fault)) is not None for fault in found] == [True] * bool(says)


# ---- the report


def test_a_plugin_without_faults_passes() -> None:
    report = check_plugin(fake_plugin("lr_schedules", build=Falling))
    assert not report.faults
    assert [outcome.check for outcome in report.not_tried] == ["import", "remark"]


def test_all_faults_are_told_at_once() -> None:
    one, other = fake_plugin("lr_schedules", build=Lost), fake_plugin("activation_functions", build=lambda c: summed)
    with pytest.raises(ConformanceError) as caught:
        check_plugin(one, other)
    text = str(caught.value)
    assert "LR schedule 'fake' (FakeConfig())\n    finite: at step 50 of 103 is nan" in text
    assert "activation function 'fake' (FakeConfig())\n    shape: it turns" in text
    assert "promised: At each of its steps, from 0, the rate is a finite number, 0 or more." in text
    assert isinstance(caught.value, AssertionError)


def test_what_is_left_out_says_why() -> None:
    plugin = fake_plugin("lr_schedules", build=Lost)
    report = plugin_report(plugin, skip={"fake: finite": "a rate of nan is wanted", "fake: any_order": "likewise"})
    assert not report.faults
    assert "finite: a rate of nan is wanted" in str(report)
    assert "all: nobody uses it" in str(plugin_report(plugin, skip={"fake": "nobody uses it"}))


@pytest.mark.parametrize("what", ["configs", "models", "folders", "skip"])
def test_a_slip_of_the_pen_leaves_nothing_unchecked(what: str) -> None:
    with pytest.raises(ValueError, match=f"{what} names fale; the entries are fake"):
        plugin_report(fake_plugin("lr_schedules", build=Falling), **{what: {"fale": "x"}})  # type: ignore[arg-type]


@attrs.frozen(kw_only=True)
class Required:
    """No default."""

    value: int
    """Any number."""


def test_required_options_are_given() -> None:
    plugin = fake_plugin("lr_schedules", build=Falling, config=Required)
    (fault,) = plugin_report(plugin).faults
    assert "its options have no defaults; give configs={'fake': ...}" in str(fault)
    check_plugin(plugin, configs={"fake": [Required(value=1), Required(value=2)]})


def test_what_needs_a_package_that_is_not_there() -> None:
    report = plugin_report(fake_plugin("lr_schedules", build=Falling, requires=["no_such_package"]))
    assert not report.faults
    assert "finite: needs no_such_package, not installed here" in str(report)


def test_a_plugin_that_cannot_be_registered() -> None:
    def misspelt() -> None:
        pass

    misspelt.saekit_impl = {}  # type: ignore[attr-defined]
    plugin = type("Plugin", (), {"saekit_register_scheduls": staticmethod(misspelt)})()
    assert "there is no hook saekit_register_scheduls" in str(plugin_report(plugin))


def test_an_entry_that_changes_the_process() -> None:
    def build(config: object, *, lr: float, steps: int) -> object:
        import random

        random.random()
        return Falling(config, lr=lr, steps=steps)

    report = plugin_report(fake_plugin("lr_schedules", build=build), only=["finite"])
    assert "it changed Python's random numbers, which belong to the whole process" in str(report)


def test_a_built_in_is_found_as_it_is_installed() -> None:
    report = check_plugin(saekit_plugins.schedules.cosine, only=["build"])
    assert [outcome.entry.split(" (")[0] for outcome in report.outcomes] == [
        "LR schedule 'cosineannealing'", "LR schedule 'cosine'",
    ]  # fmt: skip


def test_nothing_is_no_plugin() -> None:
    with pytest.raises(ConformanceError, match="offers nothing"):
        check_plugin(plugin_of("lr_schedules"))
    assert saekit.testing.check_plugin is check_plugin
