"""Lookup, provenance and everything that can be wrong with a plugin.  Nothing here imports torch."""

from __future__ import annotations

import importlib.metadata
from types import SimpleNamespace

import attrs
import pytest

import saekit
from saekit.errors import AmbiguousKeyError, MissingPackageError, PluginError, PluginWarning, UnknownKeyError
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


def test_unknown_keys_say_what_there_is() -> None:
    manager = isolated_manager(
        fake_plugin(KIND, "constant"),
        fake_plugin(KIND, "needy", requires=("no_such_package",), extra="needs", config=OtherConfig),
    )
    with pytest.raises(UnknownKeyError) as caught:
        manager.get(KIND, "Constnt")
    text = str(caught.value)
    assert text.splitlines()[0] == "Unknown LR schedule 'Constnt'. Did you mean 'constant'?"
    assert "  test:constant (test 0)" in text
    assert "  test:needy (test 0), needs: pip install 'test[needs]'" in text
    with pytest.raises(UnknownKeyError, match="No installed plugin comes from 'stranger': try pip install stranger"):
        manager.get(KIND, "stranger:thing")
    with pytest.raises(UnknownKeyError, match="Registered evals:\n  none"):
        manager.get("evals", "x")


def test_two_distributions_with_one_key() -> None:
    manager = isolated_manager(fake_plugin(KIND, "mine"), distribution="one")
    manager.register(fake_plugin(KIND, "mine", config=OtherConfig), name="p", distribution="two", version="2.1")
    with pytest.raises(AmbiguousKeyError) as caught:
        manager.get(KIND, "mine")
    assert str(caught.value) == (
        "LR schedule 'mine' is supplied by several distributions (one 0 and two 2.1). Write one of 'one:mine' and "
        "'two:mine'."
    )
    assert manager.get(KIND, "two:mine").version == "2.1"


def test_one_distribution_with_one_key_twice() -> None:
    manager = isolated_manager(fake_plugin(KIND, "mine"), fake_plugin(KIND, "mine", config=OtherConfig))
    for key in ("mine", "test:mine"):
        with pytest.raises(
            AmbiguousKeyError, match=r"registered 2 times by one distribution, from test:fake_lr_schedules"
        ):
            manager.get(KIND, key)


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        (None, "returned None, expected an iterable of saekit.Entry"),
        ("text", "returned 'text', expected an iterable"),
        (["text"], "returned 'text' among its entries, expected a saekit.Entry"),
        ([Entry("x", FakeConfig, print), Entry("x", OtherConfig, print)], "there are several entries 'x'; give each a"),
        ([Entry("x", dict, print)], "config is <class 'dict'>, expected a frozen attrs class"),
        ([Entry("x", FakeConfig(), print)], "config is FakeConfig.*, expected a frozen attrs class"),
        ([Entry("x", attrs.make_class("Loose", []), print)], "Loose is not frozen; use @attrs.frozen"),
        ([Entry("a b", FakeConfig, print)], "entry 'a b': the name must be made of letters"),
        ([Entry("x", FakeConfig, print, requires="numpy")], "requires is 'numpy', expected a list of package names"),
        ([Entry("x", FakeConfig, print, requires=None)], "requires is None, expected a list of package names"),
        ([Entry("x", FakeConfig, print, requires=[3])], "requires is .3., expected a list of package names"),
        ([Entry("x", FakeConfig, 3)], "build is 3, expected a callable"),
        (
            [Entry("x", FakeConfig, print), Entry("y", FakeConfig, repr)],
            "'x' and 'y' share the options class FakeConfig",
        ),
    ],
)
def test_rubbish_is_refused_whole(entries: object, message: str) -> None:
    manager = isolated_manager(fake_plugin(KIND, "good"))

    def hook() -> object:
        return entries

    hook.__name__ = f"saekit_register_{KIND}"
    plugin = SimpleNamespace(**{hook.__name__: saekit.hookimpl(hook)})
    with pytest.raises(PluginError, match=message):
        manager.register(plugin, name="bad")
    assert [item.key for item in manager.registries[KIND].items] == ["test:good"]


@attrs.frozen(kw_only=True)
class NamedConfig:
    name: str = "x"
    """Clashes with the key in a file."""


def test_an_options_class_has_one_owner_whatever_the_order() -> None:
    """`build` of the owner is defined beside the class; the other plugin is refused."""

    def own(config: object) -> Rate:
        return Rate("own")

    own.__module__ = FakeConfig.__module__
    owner = plugin_of(KIND, Entry("owner", FakeConfig, own))
    thief = plugin_of(KIND, Entry("thief", FakeConfig, lambda config: Rate("stolen")))
    first = isolated_manager(owner)
    with pytest.raises(PluginError, match="FakeConfig is the options class of another plugin, test:owner; define your"):
        first.register(thief, name="thief", distribution="thief")
    second = isolated_manager(thief)
    with pytest.warns(PluginWarning, match="FakeConfig is the options class of another plugin, local:owner"):
        second.register(owner, name="owner")
    for manager in (first, second):
        assert manager.build(KIND, FakeConfig()) == Rate("own")
    with pytest.raises(PluginError, match="an option cannot be called 'name'"):
        first.register(plugin_of(KIND, Entry("x", NamedConfig, print)), name="named")


def test_aliases_may_share_an_options_class() -> None:
    def build(config: object) -> Rate:
        return Rate("built")

    manager = isolated_manager(plugin_of(KIND, Entry("long", FakeConfig, build), Entry("short", FakeConfig, build)))
    assert manager.find(KIND, FakeConfig()).entry.name == "long"
    assert manager.build(KIND, "short") == Rate("built")


def test_hooks_that_are_none() -> None:
    manager = isolated_manager()
    unknown = SimpleNamespace(saekit_register_lr_scheduls=saekit.hookimpl(lambda: []))
    with pytest.raises(PluginError, match=r"lr_scheduls\. Did you mean saekit_register_lr_schedules\?$"):
        manager.register(unknown, name="misspelt")
    with pytest.raises(PluginError, match="no hook saekit_x; the hooks are saekit_register_..., of .*step_kernels$"):
        manager.register(SimpleNamespace(saekit_x=saekit.hookimpl(lambda: [])), name="unknown")
    with pytest.raises(PluginError, match="saekit_register_lr_schedules lacks the @saekit.hookimpl mark"):
        manager.register(SimpleNamespace(saekit_register_lr_schedules=list), name="unmarked")
    with pytest.raises(PluginError, match="saekit_register_evals"):
        manager.register(SimpleNamespace(saekit_register_evals=saekit.hookimpl(lambda config: [])), name="arguments")
    wrapper = saekit.hookimpl(lambda: (yield), wrapper=True)
    with pytest.raises(PluginError, match="is a hook wrapper, which saekit does not call"):
        manager.register(SimpleNamespace(saekit_register_evals=wrapper), name="wrapper")
    with pytest.raises(PluginError, match="already registered"):
        twice = fake_plugin(KIND)
        manager.register(twice, name="twice")
        manager.register(twice, name="twice")
    assert manager.get(KIND, "fake").plugin == "local:twice"


def test_a_missing_package_names_the_command() -> None:
    manager = isolated_manager(
        fake_plugin(KIND, "a", requires=("no_such_a", "no_such_b"), extra="x"),
        fake_plugin(KIND, "b", requires=("no_such_c", "attrs"), config=OtherConfig),
    )
    with pytest.raises(MissingPackageError) as caught:
        manager.build(KIND, "a")
    assert str(caught.value) == (
        "LR schedule 'test:a' needs no_such_a and no_such_b, not installed here. Install it with: pip install 'test[x]'"
    )
    with pytest.raises(MissingPackageError, match="pip install no_such_c$"):
        manager.build(KIND, "b")


def test_another_import_error_is_shown_as_it_is() -> None:
    def build(config: object) -> object:
        import no_such_module

        return no_such_module

    with pytest.raises(ModuleNotFoundError, match="No module named 'no_such_module'"):
        isolated_manager(fake_plugin(KIND, build=build)).build(KIND, "fake")


def points(monkeypatch: pytest.MonkeyPatch, *values: tuple[str, str]) -> None:
    """Pretend that these (distribution, entry point) pairs are installed; each loads a fake plugin of its own name."""

    class Point:
        value = "x"

        def __init__(self, distribution: str, name: str) -> None:
            self.name = name
            self.dist = SimpleNamespace(metadata={"Name": distribution, "Version": "1"})

        def load(self) -> object:
            config = attrs.make_class("C", [], frozen=True)
            return fake_plugin(KIND, f"{self.dist.metadata['Name']}-{self.name}", config=config)

    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: [Point(*value) for value in values])


def test_the_order_of_installation_decides_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    pairs = [("b", "one"), ("a", "two"), ("a", "one")]
    for order in (pairs, pairs[::-1]):
        points(monkeypatch, *order)
        manager = PluginManager()
        assert [item.plugin for item in manager.registries[KIND].items] == ["a:one", "a:two", "b:one"]


@pytest.mark.parametrize(
    ("value", "left"),
    [
        ("a", ["b:one"]),
        ("one", ["a:two"]),
        ("a:one, b", ["a:two"]),
        ("B", ["a:one", "a:two"]),
        ("", ["a:one", "a:two", "b:one"]),
    ],
)
def test_blocking(monkeypatch: pytest.MonkeyPatch, value: str, left: list[str]) -> None:
    points(monkeypatch, ("a", "one"), ("a", "two"), ("b", "one"))
    monkeypatch.setenv("SAEKIT_DISABLE_PLUGINS", value)
    manager = PluginManager()
    assert [item.plugin for item in manager.registries[KIND].items] == left
    assert len(manager.blocked) == 3 - len(left)
    if manager.blocked:
        with pytest.raises(UnknownKeyError, match=f"Plugin {manager.blocked[0]} is disabled by SAEKIT_DISABLE_PLUGINS"):
            manager.get(KIND, "nothing")
    assert len(PluginManager(disabled=[]).registries[KIND].items) == 3


def test_a_plugin_that_fails_is_left_out_with_one_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    points(monkeypatch, ("a", "one"), ("b", "one"))
    good = importlib.metadata.entry_points(group="saekit")
    good[0].load = lambda: exec("raise ImportError('no such symbol')")
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: good)
    with pytest.warns(PluginWarning, match="plugin a:one 1 was left out: ImportError: no such symbol") as warned:
        manager = PluginManager()
    assert len(warned) == 1
    assert [item.plugin for item in manager.registries[KIND].items] == ["b:one"]
    with pytest.raises(UnknownKeyError, match="Plugin a:one failed to load: ImportError: no such symbol"):
        manager.get(KIND, "nothing")


class Silent(Exception):  # noqa: N818
    def __str__(self) -> str:
        raise RuntimeError


@pytest.mark.parametrize(
    ("error", "reason"), [(PluginError(), "PluginError"), (Silent(), "Silent"), (SystemExit(), "S")]
)
def test_whatever_a_plugin_raises_the_others_are_loaded(
    monkeypatch: pytest.MonkeyPatch, error: BaseException, reason: str
) -> None:
    points(monkeypatch, ("a", "one"), ("b", "one"))
    found = importlib.metadata.entry_points(group="saekit")

    def load() -> object:
        raise error

    found[0].load = load
    found[0].dist.metadata = None
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: found)
    with pytest.warns(PluginWarning, match=f"plugin unknown:one .*was left out: {reason}"):
        manager = PluginManager()
    assert [item.plugin for item in manager.registries[KIND].items] == ["b:one"]


def test_a_kind_that_is_none() -> None:
    with pytest.raises(UnknownKeyError, match="there is no kind of plugin 'lr_schedule'; the kinds are model_backends"):
        isolated_manager().get("lr_schedule", "x")


def test_builtins_alone() -> None:
    manager = isolated_manager(fake_plugin(KIND), builtins=True)
    assert manager.get(KIND, "cosine").key == "saekit:cosine"
    assert manager.get(KIND, "fake").key == "test:fake"


def test_what_is_added_to_a_copy_is_not_in_the_other() -> None:
    first = isolated_manager(fake_plugin(KIND, "shared"))
    other = first.copy()
    other.register(fake_plugin(KIND, "added"), name="added", distribution="more")
    assert [[item.key for item in one.registry(KIND).items] for one in (first, other)] == [
        ["test:shared"],
        ["test:shared", "more:added"],
    ]
    with pytest.raises(PluginError, match="already registered"):
        other.register(fake_plugin(KIND, "again"), name=first.registry(KIND).items[0].plugin[5:], distribution="test")
