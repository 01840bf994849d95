"""Plugins and managers that a test makes."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterable, Mapping
from types import ModuleType, SimpleNamespace
from typing import Any

import attrs

from saekit.config import OptimizerConfig, SAEConfig
from saekit.kinds import KINDS, Kind, kind_of
from saekit.plugins.hookspecs import hookimpl
from saekit.plugins.loading import installed_points
from saekit.plugins.manager import PluginManager
from saekit.plugins.registry import Entry

__all__ = ["FakeConfig", "fake_plugin", "isolated_manager", "plugin_of"]

_NOBODY = "test"


def isolated_manager(*plugins: object, distribution: str | None = None, builtins: bool = False) -> PluginManager:
    """A manager with these plugins (modules, or objects with hook methods) and no installed ones.

    The plugins appear as coming from ``distribution``; None: a module from the distribution whose entry point it is,
    and all else from ``test``.  With ``builtins``, saekit's own plugins are there too, and nobody else's.
    """
    manager = _builtins().copy() if builtins else PluginManager(discover=False)
    for number, plugin in enumerate(plugins):
        name = getattr(plugin, "__name__", type(plugin).__name__)
        owner = distribution or _distribution_of(plugin)
        manager.register(plugin, name=name if number == 0 else f"{name}.{number}", distribution=owner, version="0")
    return manager


def _distribution_of(plugin: object) -> str:
    """The one that has ``plugin``, a module, as an entry point."""
    if isinstance(plugin, ModuleType):
        return _owners(tuple(sys.path)).get(plugin.__name__, _NOBODY)
    return _NOBODY


@functools.lru_cache(maxsize=4)
def _owners(path: tuple[str, ...]) -> dict[str, str]:
    """The distributions by the modules of their entry points, as what is on ``path`` says."""
    return {point.value.partition(":")[0].strip(): point.distribution for point in reversed(installed_points())}


@functools.cache
def _builtins() -> PluginManager:
    """Looked at once in a process: suites ask for them hundreds of times."""
    from importlib.metadata import distribution

    manager = PluginManager(discover=False)
    own = distribution("saekit")
    version = own.version  # each time it is asked for, it is read from a file
    for point in sorted(own.entry_points.select(group="saekit"), key=lambda point: point.name):
        manager.register(point.load(), name=point.name, distribution="saekit", version=version)
    return manager


def plugin_of(kind: Kind[Any] | str, *entries: Entry) -> object:
    """A plugin that returns ``entries`` from the hook of ``kind``, such as ``lr_schedules``."""

    def hook() -> Iterable[Entry]:
        return entries

    hook.__name__ = kind_of(kind).hook
    return SimpleNamespace(__name__=f"fake_{kind}", **{hook.__name__: hookimpl(hook)})


@attrs.frozen(kw_only=True)
class FakeConfig:
    """Options of a fake plugin."""

    value: int = 0
    """Any number."""


@attrs.frozen(kw_only=True)
class _FakeSAE(SAEConfig):
    """Options of a fake architecture."""

    value: int = 0
    """Any number."""


@attrs.frozen(kw_only=True)
class _FakeOptimizer(OptimizerConfig):
    """Options of a fake optimizer."""

    value: int = 0
    """Any number."""


def fake_plugin(
    kind: Kind[Any] | str,
    name: str = "fake",
    build: Callable[..., Any] | None = None,
    config: type | None = None,
    **entry: Any,
) -> object:
    """A plugin with one entry of ``kind``; without ``build``, it builds ``(kind, config, services)``.

    Without ``config`` its options are those of :class:`FakeConfig`, with those that all of its kind have.

    That tuple passes for what the kind promises, and does nothing.
    """
    kind = str(kind)
    if kind not in KINDS:
        raise ValueError(f"there is no kind {kind!r}; the kinds are {', '.join(KINDS)}")

    config = config or {"sae_architectures": _FakeSAE, "optimizers": _FakeOptimizer}.get(kind, FakeConfig)
    return plugin_of(kind, Entry(name, config, build or _echo(kind), **entry))


@functools.cache
def _echo(kind: str) -> Callable[..., Any]:
    """One ``build`` per kind, so that fakes may share an options class as aliases do."""

    def build(config: Any, **services: Any) -> Any:
        return _Echo((kind, config, services))

    return build


class _Echo(tuple[str, Any, Mapping[str, Any]]):
    """What was asked for, with every method and value that its kind must have."""

    end = 0.0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self

    def __getattr__(self, name: str) -> Any:
        if name in (*KINDS[self[0]].methods, *KINDS[self[0]].values):
            return self
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
