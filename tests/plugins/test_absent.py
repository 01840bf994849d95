"""A plugin that is asked for and not there: why, and what to do, said once.  Nothing here imports torch."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest

import saekit
from saekit.errors import ConfigError, PluginFailedError, UnknownKeyError
from saekit.plugins import listing
from saekit.plugins.building import built
from saekit.plugins.manager import Failure, PluginManager
from saekit.testing import fake_plugin, isolated_manager
from saekit.training.schedule import SupervisedSchedule

KIND = "lr_schedules"
LISTS = "`saekit plugins lr_schedules` lists the LR schedules that there are."


def with_evals(manager: PluginManager) -> None:
    manager.register(fake_plugin("evals"), name="evals", distribution="saex", version="0.1")


def disabled(manager: PluginManager) -> None:
    manager.blocked += [f"saex:{name}" for name in ("act", "arch", "evals", "sched")]


def failed(manager: PluginManager) -> None:
    manager.failures += [Failure("saex:sched", "0.1", "ImportError: no"), Failure("other:x", "1", "ValueError")]


@pytest.mark.parametrize(
    ("key", "done", "said"),
    [
        ("saex:constant", None, "No installed plugin comes from 'saex': try pip install saex"),
        ("saex:constant", with_evals, "saex 0.1 is here, and has no such LR schedule: another version of it may"),
        ("Saex:constant", disabled, "4 plugins of saex are disabled by SAEKIT_DISABLE_PLUGINS."),
        ("saex:constant", failed, "Plugin saex:sched failed to load: ImportError: no"),
        ("test:constant", None, "'test' stands for plugins that a program has registered itself"),
        ("attrs:constant", None, " is installed, and has no plugins of saekit"),
    ],
)
def test_what_is_said_of_a_distribution(key: str, done: Callable[[PluginManager], None] | None, said: str) -> None:
    manager = isolated_manager(builtins=True)
    if done is not None:
        done(manager)
    with pytest.raises(UnknownKeyError) as caught:
        manager.get(KIND, key)
    first, why, last = str(caught.value).splitlines()
    assert (first, last) == (f"Unknown LR schedule '{key}'.", LISTS)
    assert said in why


def test_a_distribution_that_is_misspelt() -> None:
    with pytest.raises(UnknownKeyError) as caught:
        isolated_manager(builtins=True).get(KIND, "saekitt:constnat")
    first, last = str(caught.value).splitlines()
    assert first.startswith("Unknown LR schedule 'saekitt:constnat'. Did you mean 'saekit:constant'")
    assert last == LISTS


def test_problems_of_a_configuration_say_once_what_there_is() -> None:
    manager = isolated_manager(builtins=True)
    failed(manager)
    with pytest.raises(ConfigError) as caught:
        saekit.load_config({"lr_schedule": "x", "evals": {"run": ["x", "y"]}}, plugins=manager)
    lines = str(caught.value).splitlines()
    assert lines.count("Registered evals:") == lines.count("Plugin other:x failed to load: ValueError") == 1
    assert len(caught.value.problems) == 3
    assert all("Plugin other:x failed" in text for _, text in caught.value.problems)


def test_why_a_plugin_that_is_looked_for_was_left_out() -> None:
    manager = isolated_manager(builtins=True)
    failed(manager)
    for name, said in (("saex:zz", ["saex:sched"]), ("zz", ["saex:sched", "other:x"])):
        with pytest.raises(UnknownKeyError, match=f"^there is no plugin '{name}'") as caught:
            listing.found(manager, name)
        assert [line.split()[1] for line in str(caught.value).splitlines()[1:]] == said


def test_a_name_that_disables_nothing_is_told_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    with warnings.catch_warnings(record=True, action="always") as told:
        PluginManager(disabled=["nosuch"])  # no variable names it
        assert told == []
        monkeypatch.setenv("SAEKIT_DISABLE_PLUGINS", "nosuch,SAEKIT:topk,relu")
        PluginManager()
        monkeypatch.setenv("RANK", "1")
        PluginManager()
    said = "SAEKIT_DISABLE_PLUGINS names nosuch, which is no plugin that is installed"
    assert [str(one.message) for one in told] == [said]


def test_properties_of_what_a_plugin_is_given_may_fail() -> None:
    class Run:
        @property
        def backend(self) -> None:
            raise RuntimeError("not yet")

    made = lambda: {}  # noqa: E731
    item = isolated_manager(fake_plugin("evals", "mine", lambda config, run: made)).get("evals", "mine")
    assert built(item, None, run=Run()) is made


def test_of_several_problems_what_is_the_same_is_said_once() -> None:
    lists = ["None.\nRegistered x:\n  a\n  b\nFailed: f"] * 2 + ["None.\nRegistered y:\n  b\n  c\nFailed: f"]
    assert str(ConfigError([(str(number), text) for number, text in enumerate(lists)])).splitlines()[1:] == [
        "  - 0: None.", "Registered x:", "  a", "  b", "Failed: f", "  - 1: None.", "  - 2: None.", "Registered y:",
        "  b", "  c",
    ]  # fmt: skip


def test_a_remark_that_is_no_text() -> None:
    schedule = type("Remarking", (), {"end": 0.0, "__call__": lambda *_: 0.0, "remark": lambda _: 5})()
    item = isolated_manager(fake_plugin(KIND)).get(KIND, "fake")
    with pytest.raises(PluginFailedError, match=r"'test:fake' .*: remark returned 5, expected a text or None"):
        SupervisedSchedule(schedule, item).remark()
