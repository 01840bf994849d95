"""Choices that are bound once, and what they build, by a function or by an import path.  Nothing here imports torch."""

from __future__ import annotations

import copy
import pickle
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import attrs
import pytest

from saekit.config import TrainConfig
from saekit.config.files import dump_config, load_config
from saekit.errors import PluginError, PluginFailedError
from saekit.kinds import LR_SCHEDULES
from saekit.plugins.choice import Choice
from saekit.plugins.manager import PluginManager
from saekit.plugins.registry import Entry, Registry
from saekit.testing import FakeConfig, fake_plugin, isolated_manager, plugin_of


@pytest.fixture
def manager() -> PluginManager:
    return isolated_manager(
        fake_plugin(LR_SCHEDULES, build=lambda config, **services: Rate(config.value)), builtins=True
    )


@attrs.frozen
class Rate:
    end: float

    def __call__(self, step: int) -> float:
        return self.end


@pytest.mark.parametrize("given", ["fake", "test:fake", {"name": "fake", "value": 3}, FakeConfig(value=3)])
def test_what_a_configuration_chooses_is_bound(manager: PluginManager, given: Any) -> None:
    choice: Choice[Any] = load_config({"lr_schedule": given}, plugins=manager).lr_schedule
    value = 0 if isinstance(given, str) else 3
    assert (choice.kind, choice.key, choice.options) == (LR_SCHEDULES, "test:fake", FakeConfig(value=value))
    assert choice.build() == manager.build(LR_SCHEDULES, choice) == Rate(value)
    assert choice == ("test:fake" if isinstance(given, str) else FakeConfig(value=3)), "what plain code would have"
    assert manager.bound(LR_SCHEDULES, choice) is choice
    assert manager.options(LR_SCHEDULES, choice) is choice.options


def test_options_that_are_none_have_defaults_of_others() -> None:
    @attrs.frozen(kw_only=True)
    class Rated:
        rate: float | None = None
        decay: float | None = None

    plugins = isolated_manager(fake_plugin(LR_SCHEDULES, build=lambda config: config, config=Rated), builtins=True)
    choice = load_config({"lr_schedule": {"name": "fake", "rate": 2.0}}, plugins=plugins).lr_schedule
    filled = choice.with_defaults({"rate": 1.0, "decay": 0.5})
    assert filled.options == Rated(rate=2.0, decay=0.5)
    assert (filled.key, choice.options) == (choice.key, Rated(rate=2.0))


def test_a_bound_choice_is_looked_up_no_more(manager: PluginManager, monkeypatch: pytest.MonkeyPatch) -> None:
    choice = load_config({"lr_schedule": "fake"}, plugins=manager).lr_schedule
    monkeypatch.setattr(Registry, "get", None)
    monkeypatch.setattr(Registry, "of_config", None)
    assert manager.build(LR_SCHEDULES, choice) == Rate(0)
    assert manager.find(LR_SCHEDULES, choice).key == "test:fake"


def test_one_configuration_in_code_and_from_its_file(manager: PluginManager) -> None:
    """A loaded configuration is equal to the one that was written, and to that of another manager."""
    for made in (TrainConfig(lr_schedule=FakeConfig(value=3)), TrainConfig(lr_schedule="test:fake")):
        (config,) = {made, load_config(made, plugins=manager)}
        loaded = load_config(manager_file(config, manager), plugins=manager)
        assert loaded == made
        assert hash(loaded) == hash(made)
    other = isolated_manager(fake_plugin(LR_SCHEDULES, build=lambda config: Rate(7)), builtins=True)
    again = load_config(loaded, plugins=other)
    assert again == loaded
    assert (loaded.lr_schedule.build(), again.lr_schedule.build()) == (Rate(0), Rate(7)), "bound anew"


def manager_file(config: TrainConfig, manager: PluginManager) -> dict[str, Any]:
    import json

    table: dict[str, Any] = json.loads(dump_config(config, "json", plugins=manager))
    return table


def test_a_choice_is_copied_as_itself_and_pickled_as_it_was_given(manager: PluginManager) -> None:
    for given, plain in (("fake", "test:fake"), (FakeConfig(value=3), FakeConfig(value=3))):
        choice = manager.bound(LR_SCHEDULES, given)
        assert copy.deepcopy(choice) is copy.copy(choice) is choice
        assert pickle.loads(pickle.dumps(choice)) == plain, "its build is a lambda"
    assert repr(manager.bound(LR_SCHEDULES, "fake")) == "Choice('test:fake', FakeConfig(value=0))"


# ---- import paths

PLUGIN = """
import attrs, saekit

@attrs.frozen(kw_only=True)
class Config:
    end: float = 0.5

@saekit.hookimpl
def saekit_register_lr_schedules():
    yield saekit.Entry("mine", Config, {build!r})
"""
MODULE = """
class Halving:
    class Inner:
        pass

    def __init__(self, config, *, lr, steps):
        self.end = config.end * lr

    def __call__(self, step):
        return self.end

number = 3
"""


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], PluginManager]]:
    """A package ``stranger`` whose plugin has an import path as ``build``."""
    home = tmp_path / "stranger"
    home.mkdir()
    (home / "module.py").write_text(MODULE)
    (home / "broken.py").write_text("import no_such_package")
    monkeypatch.syspath_prepend(tmp_path)

    def registered(build: str) -> PluginManager:
        (home / "__init__.py").write_text(PLUGIN.format(build=build))
        import stranger  # type: ignore[import-not-found]

        return isolated_manager(stranger)

    yield registered
    for name in [name for name in sys.modules if name.split(".")[0] == "stranger"]:
        del sys.modules[name]


def test_an_import_path_is_imported_on_use(package: Callable[[str], PluginManager]) -> None:
    manager = package("stranger.module:Halving")
    assert "stranger.module" not in sys.modules
    built = manager.build(LR_SCHEDULES, "mine", lr=0.2, steps=9)
    assert built(0) == built.end == 0.1
    assert type(built) is sys.modules["stranger.module"].Halving, "a plain class, which others can import"


@pytest.mark.parametrize(
    ("path", "told"),
    [
        ("stranger.nowhere:Halving", "there is no module stranger.nowhere, of its build, 'stranger.nowhere:Halving'"),
        ("no_such.module:Halving", "there is no module no_such, of its build, 'no_such.module:Halving'"),
        ("stranger.module:Halved", "there is no Halved in stranger.module, of its build, 'stranger.module:Halved'"),
        ("stranger.module:number", "its build, 'stranger.module:number' is 3, expected a class or a function"),
    ],
)
def test_a_path_that_leads_nowhere(package: Callable[[str], PluginManager], path: str, told: str) -> None:
    manager = package(path)
    with pytest.raises(PluginFailedError) as caught:
        manager.build(LR_SCHEDULES, "mine", lr=1.0, steps=1)
    assert str(caught.value) == f"LR schedule 'test:mine' (test 0): {told}"


def test_what_the_module_of_a_path_lacks_is_shown_as_it_is(package: Callable[[str], PluginManager]) -> None:
    manager = package("stranger.broken:Halving")
    with pytest.raises(ModuleNotFoundError, match="No module named 'no_such_package'") as caught:
        manager.build(LR_SCHEDULES, "mine", lr=1.0, steps=1)
    assert caught.value.__notes__ == [
        "In importing its build, 'stranger.broken:Halving' of the LR schedule 'test:mine' (test 0)."
    ]


@pytest.mark.parametrize("path", ["module", "module:", ":Class", "a b:Class", "a..b:Class", "a:b c", "3a:b"])
def test_what_is_no_path_is_refused_at_once(path: str) -> None:
    told = f"build is {path!r}, expected a callable, or an import path, such as package.module:Class"
    with pytest.raises(PluginError) as caught:
        isolated_manager(plugin_of(LR_SCHEDULES, Entry("x", FakeConfig, path)))
    assert told in str(caught.value)


def test_the_package_of_an_options_class_owns_it(package: Callable[[str], PluginManager]) -> None:
    """A thief that came first gives way to the plugin whose class it is, though the class it builds stands deeper."""
    manager = package("stranger.module:Halving")
    stranger = sys.modules["stranger"]
    thief = fake_plugin(LR_SCHEDULES, "thief", build=lambda config, **_: Rate(9), config=stranger.Config)
    second = PluginManager(discover=False)
    second.register(thief, name="thief")
    with pytest.warns(
        saekit_warning(), match="plugin local:thief was left out: Config is the options class of another"
    ):
        second.register(SimpleNamespace(**hooks_of(stranger)), name="owner")
    assert second.build(LR_SCHEDULES, stranger.Config(), lr=1.0, steps=1).end == 0.5
    assert manager.get(LR_SCHEDULES, "mine").entry.build == "stranger.module:Halving"


def saekit_warning() -> type[Warning]:
    from saekit.errors import PluginWarning

    return PluginWarning


def hooks_of(module: Any) -> dict[str, Any]:
    return {name: value for name, value in vars(module).items() if name.startswith("saekit_register_")}
