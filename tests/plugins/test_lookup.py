"""Keys, options classes and managers: what is found, and what is said when it is not.  Nothing here imports torch."""

from __future__ import annotations

import importlib.metadata
from types import SimpleNamespace

import attrs
import pytest

import saekit
from saekit.errors import ConfigError, PluginError, UnknownKeyError
from saekit.kinds import KINDS
from saekit.plugins.manager import PluginManager
from saekit.plugins.registry import Entry
from saekit.testing import FakeConfig, fake_plugin, isolated_manager, plugin_of

KIND = "lr_schedules"


@attrs.frozen(kw_only=True)
class OtherConfig:
    """Options."""


@attrs.frozen
class Rate:
    """A schedule, of whom it is."""

    by: str
    end = 0.0

    def __call__(self, step: int) -> float:
        return self.end


def test_one_plugin_may_offer_every_kind() -> None:
    hooks = {}
    for kind in KINDS:
        hooks.update({name: hook for name, hook in vars(fake_plugin(kind)).items() if name != "__name__"})
    manager = isolated_manager(SimpleNamespace(__name__="everything", **hooks))
    options = {kind: manager.get(kind, "fake").entry.config() for kind in KINDS}
    assert {kind: manager.find(kind, options[kind]).kind for kind in KINDS} == KINDS
    assert {manager.get(kind, "fake").plugin for kind in KINDS} == {"test:everything"}


def test_plugins_may_be_objects_with_methods_and_hooks_may_be_generators() -> None:
    class Plugin:
        @saekit.hookimpl
        def saekit_register_lr_schedules(self) -> object:
            yield Entry("x", OtherConfig, lambda config: Rate("built"))

    assert isolated_manager(Plugin()).build(KIND, "test:x") == Rate("built")
    manager = isolated_manager()
    manager.register(Plugin())  # as in a notebook
    assert manager.get(KIND, "local:x").plugin == "local:Plugin"


def test_unknown_keys_list_every_supplier() -> None:
    manager = isolated_manager(fake_plugin(KIND, "mine"), distribution="one")
    manager.register(fake_plugin(KIND, "yours", config=OtherConfig), name="p", distribution="two", version="2.1")
    with pytest.raises(UnknownKeyError) as caught:
        manager.get(KIND, "qqqq")
    assert str(caught.value).splitlines() == [
        "Unknown LR schedule 'qqqq'.", "Registered LR schedules:", "  one:mine (one 0)", "  two:yours (two 2.1)",
    ]  # fmt: skip


@pytest.mark.parametrize(("key", "meant"), [("test:mien", "test:mine"), ("Test:Mine", "test:mine"), ("MINE", "mine")])
def test_did_you_mean_keeps_to_the_kind_of_key(key: str, meant: str) -> None:
    with pytest.raises(UnknownKeyError, match=rf"^Unknown LR schedule '{key}'\. Did you mean '{meant}'\?\n"):
        isolated_manager(fake_plugin(KIND, "mine")).get(KIND, key)


def test_options_of_nobody() -> None:
    with pytest.raises(UnknownKeyError) as caught:
        isolated_manager(fake_plugin(KIND)).find(KIND, OtherConfig())
    text = "OtherConfig is not the options class of any LR schedule. Registered: FakeConfig (test:fake)."
    assert str(caught.value) == text
    with pytest.raises(UnknownKeyError, match="Registered: none"):
        isolated_manager().find(KIND, OtherConfig())


def test_a_subclass_of_options_is_not_the_options() -> None:
    @attrs.frozen(kw_only=True)
    class Mine(FakeConfig):
        """More options."""

    manager = isolated_manager(fake_plugin(KIND), fake_plugin(KIND, "mine", config=Mine))
    assert manager.find(KIND, Mine()).entry.name == "mine"
    assert manager.find(KIND, FakeConfig()).entry.name == "fake"


def test_a_plugin_comes_whole_or_not_at_all() -> None:
    """A fault in one hook takes back what the other hooks returned, also when it is raised half-way."""

    def fails() -> object:
        yield Entry("late", OtherConfig, print)
        raise RuntimeError("half-way")

    fails.__name__ = "saekit_register_evals"
    plugin = fake_plugin(KIND)
    plugin.saekit_register_evals = saekit.hookimpl(fails)  # type: ignore[attr-defined]
    manager = isolated_manager()
    with pytest.raises(PluginError, match="plugin local:p: saekit_register_evals raised RuntimeError: half-way"):
        manager.register(plugin, name="p")
    assert not any(registry.items for registry in manager.registries.values())
    manager.register(fake_plugin(KIND), name="p")
    assert manager.get(KIND, "fake").plugin == "local:p"


def test_keys_have_one_spelling_of_the_distribution(monkeypatch: pytest.MonkeyPatch) -> None:
    owner = SimpleNamespace(metadata={"Name": "My_Own.Plugin", "Version": "1"})
    point = SimpleNamespace(
        name="p", value="x", dist=owner, load=lambda: plugin_of(KIND, Entry("x", FakeConfig, print))
    )
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: [point])
    assert PluginManager().get(KIND, "x").key == "my-own-plugin:x"


def test_an_injected_manager_decides_what_a_configuration_may_name() -> None:
    manager = isolated_manager(fake_plugin(KIND, "halving"), builtins=True)
    config = saekit.load_config({"lr_schedule": {"name": "halving", "value": 3}}, plugins=manager)
    assert config.lr_schedule == FakeConfig(value=3)
    assert saekit.dump_config(config, plugins=manager).count("test:halving") == 1
    assert saekit.load_config({"lr_schedule": "halving"}, plugins=manager).lr_schedule == "test:halving"
    with pytest.raises(ConfigError, match="lr_schedule: Unknown LR schedule 'halving'"):
        saekit.load_config({"lr_schedule": "halving"}, plugins=isolated_manager(builtins=True))


def test_isolated_managers_share_nothing() -> None:
    plugin = fake_plugin(KIND)
    first, second = isolated_manager(plugin), isolated_manager(plugin, distribution="other")
    assert (first.get(KIND, "fake").key, second.get(KIND, "fake").key) == ("test:fake", "other:fake")
    assert not isolated_manager().registries[KIND].items
    with pytest.raises(ValueError, match="there is no kind 'lr_schedule'; the kinds are model_backends, "):
        fake_plugin("lr_schedule")
    with pytest.raises(PluginError, match="already registered"):
        isolated_manager(plugin, plugin)
