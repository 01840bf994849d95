"""What a shell completes arguments with: options by their paths, the values of those that have few, and plugins.

A shell asks by starting saekit, so nothing here imports anything heavy, and nothing may fail.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from saekit.plugins.manager import PluginManager
    from saekit.released import Release

__all__ = [
    "complete_architecture", "complete_backend", "complete_config", "complete_eval", "complete_plugin",
    "complete_recipe", "complete_release", "complete_released_loader", "complete_released_model",
    "complete_released_sae",
]  # fmt: skip

_FILES = (".toml", ".yaml", ".yml", ".json")
_PLAIN = re.compile(r"[\w./+-]+")  # what no shell takes for anything else


def complete_config(ctx: typer.Context, incomplete: str) -> list[str]:
    """Configuration files, and options as ``section.option=``; behind that, the values that there are.

    Sections first, while several fit.  Of the only option that fits, its default is a second choice, so that no shell
    ends the word behind the ``=``.
    """
    given = [word for word in (ctx.params.get("config"), *(ctx.params.get("overrides") or ())) if word]
    words = _joined(given)
    options = _Options.of(ctx, [word for word in words if "=" in word and not word.endswith("=")])
    begun = words[-1] if words and (words[-1].endswith("=") or words[-1] in options.defaults) else ""
    if begun and "=" not in incomplete:  # bash takes the sign for a word of its own
        return options.values(begun.removesuffix("="))
    path, equals, _ = incomplete.partition("=")
    if equals:
        return [f"{path}={value}" for value in options.values(path)]
    return [*(() if given else _files(incomplete)), *options.starting(incomplete)]


def complete_plugin(ctx: typer.Context, incomplete: str) -> list[str]:
    """The keys of plugins, or those of a kind that is named: ``lr_schedules:cosine``."""
    from saekit.plugins.manager import default_manager

    kind, colon, _ = incomplete.partition(":")
    items = [item for registry in default_manager().registries.values() for item in registry.items]
    return [f"{kind}:{item.entry.name}" if colon else item.entry.name for item in items
            if not colon or item.kind.name == kind]  # fmt: skip


def complete_architecture(ctx: typer.Context, incomplete: str) -> list[str]:
    """The names of SAE architectures."""
    return _of_kind("sae_architectures")


def complete_backend(ctx: typer.Context, incomplete: str) -> list[str]:
    """The names of model backends that have a model."""
    return _of_kind("model_backends")


def complete_eval(ctx: typer.Context, incomplete: str) -> list[str]:
    """The names of evals."""
    return _of_kind("evals")


def _of_kind(name: str) -> list[str]:
    from saekit.plugins.manager import default_manager

    items = default_manager().registries[name].items
    return [item.entry.name for item in items if not getattr(item.entry, "no_model", False)]


def complete_recipe(ctx: typer.Context, incomplete: str) -> list[str]:
    """The names of recipes."""
    from saekit.config.recipes import recipes

    return [found.name for found in recipes()]


def complete_release(ctx: typer.Context, incomplete: str) -> list[str]:
    """The names of releases."""
    return [one.name for one in _releases(ctx)]


def complete_released_sae(ctx: typer.Context, incomplete: str) -> list[str]:
    """The ids of the release that was typed before."""
    return [sae_id for one in _releases(ctx) if one.name == ctx.params.get("release") for sae_id in one.ids]


def complete_released_model(ctx: typer.Context, incomplete: str) -> list[str]:
    """The language models of releases."""
    return sorted({one.model for one in _releases(ctx) if one.model is not None})


def complete_released_loader(ctx: typer.Context, incomplete: str) -> list[str]:
    """The loaders of releases."""
    return sorted({one.loader for one in _releases(ctx) if one.loader is not None})


def _releases(ctx: typer.Context) -> Sequence[Release]:
    from saekit.errors import SaekitError
    from saekit.pretrained.catalog import Catalog

    for files in (ctx.params.get("releases") or (), ()):  # nothing may fail: without a file that cannot be read
        try:
            return Catalog(files).releases
        except SaekitError:
            continue
    return ()


def _joined(words: Sequence[str]) -> list[str]:
    """``a``, ``=``, ``b`` as the ``a=b`` that was typed."""
    joined: list[str] = []
    for word in words:
        if joined and (word == "=" or joined[-1].endswith("=")):
            joined[-1] += word
        else:
            joined.append(word)
    return joined


def _files(begun: str) -> Iterator[str]:
    folder, name = os.path.split(begun)
    try:
        found = sorted(os.scandir(folder or "."), key=lambda entry: entry.name)
    except OSError:
        return
    for entry in found:
        if entry.name.startswith(name) and entry.name.endswith(_FILES):
            yield os.path.join(folder, entry.name)  # noqa: PTH118 - what was typed stays as it is


class _Options:
    """Every option of a configuration by its path: its default and its values, as far as these can be listed."""

    def __init__(self, config: object, plugins: PluginManager) -> None:
        self._plugins = plugins
        self.defaults: dict[str, Any] = {}
        self._values: dict[str, list[str]] = {}
        self._add(config, "")

    @classmethod
    def of(cls, ctx: typer.Context, overrides: Sequence[str]) -> _Options:
        """Those of the configuration of a command, with what was given of it so far."""
        from saekit.config import PretokenizeConfig, TrainConfig
        from saekit.config.files import load_config
        from saekit.errors import SaekitError
        from saekit.plugins.manager import default_manager

        kind: Any = PretokenizeConfig if "pretokenize" in (ctx.info_name, ctx.params.get("of")) else TrainConfig
        default: Any = {"folder": "contexts"} if kind is PretokenizeConfig else {}
        named = ctx.params.get("config")
        for source in (named, default):
            if source is not None and (source is default or str(source).endswith(_FILES)):
                try:
                    return cls(load_config(source, overrides, kind=kind), default_manager())
                except SaekitError:
                    continue
        return cls(load_config(default, kind=kind), default_manager())

    def _add(self, config: Any, prefix: str) -> None:
        import attrs

        from saekit.config.annotations import few_values
        from saekit.config.fields import PLUGIN_KIND
        from saekit.plugins.choice import Choice

        for field in attrs.fields(attrs.resolve_types(type(config))):
            path, value = f"{prefix}{field.name}", getattr(config, field.name)
            kind = field.metadata.get(PLUGIN_KIND)
            if isinstance(value, Choice):
                self.defaults |= {path: value.key, f"{path}.name": value.key}
                self._add(value.options, f"{path}.")
            elif attrs.has(type(value)):
                self._add(value, f"{path}.")
            elif field.init:
                self.defaults[path] = value
            if kind is not None and not isinstance(value, tuple):
                keys = [item.entry.name for item in self._plugins.registry(kind).items]
                keys += ["none"] if field.default is None else []
                self._values |= {path: keys, f"{path}.name": keys}
            else:
                self._values[path] = few_values(field.type)

    def values(self, path: str) -> list[str]:
        """What may stand behind ``path=``: all that there is, or else the default."""
        return self._values.get(path) or self._default(path)

    def starting(self, begun: str) -> list[str]:
        """The options, or the sections, whose paths begin so."""
        paths = [path for path in self.defaults if path.startswith(begun)]
        sections = list(dict.fromkeys(path.partition(".")[0] for path in paths))
        if len(sections) > 1:
            return [f"{section}=" if section in paths else f"{section}." for section in sections]
        if len(paths) == 1:
            return [f"{paths[0]}=", *(f"{paths[0]}={value}" for value in self._default(paths[0]))]
        return [f"{path}=" for path in paths]

    def _default(self, path: str) -> list[str]:
        """The default as it is typed, unless a shell would take it for something else."""
        if path not in self.defaults:
            return []
        value = self.defaults[path]
        text = "none" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
        return [text] if _PLAIN.fullmatch(text) else []
