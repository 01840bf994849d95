"""Recipes: whole configurations of what people train, as commented TOML files that are found by name.

A recipe is a file ``recipes/NAME.toml`` in the package of an installed plugin.  It begins with comments: what it
trains, the sizes that `saekit plan` counts, and what to change first.
"""

from __future__ import annotations

import difflib
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import attrs

from saekit.config import TrainConfig
from saekit.config.files import apply_overrides, load_config
from saekit.config.formats import read_toml, write
from saekit.errors import AmbiguousKeyError, ConfigError, UnknownKeyError
from saekit.plugins.manager import PluginManager, default_manager
from saekit.plugins.text import printable

__all__ = ["Recipe", "find_recipe", "printed", "recipe", "recipe_text", "recipes"]

_FOLDER = "recipes"
_CHANGED = "# Changed:  "


@attrs.frozen
class Recipe:
    """A configuration file that is installed with a plugin."""

    name: str
    distribution: str
    """The distribution of the plugin."""
    path: Path

    @property
    def key(self) -> str:
        """The qualified name, ``distribution:name``."""
        return f"{self.distribution}:{self.name}"

    @property
    def text(self) -> str:
        """The file."""
        try:
            return self.path.read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise ConfigError(f"the recipe {self.key} cannot be read: {error}") from error

    @property
    def comment(self) -> list[str]:
        """The comment at its top, line by line."""
        lines = self.text.splitlines()
        return lines[: next((n for n, line in enumerate(lines) if not line.startswith("#")), len(lines))]

    @property
    def summary(self) -> str:
        """What it trains, in one line: the first of the comment."""
        return (self.comment or [""])[0].lstrip("# ")

    def table(self) -> dict[str, Any]:
        """What the file says."""
        try:
            table: dict[str, Any] = read_toml(self.text)
        except ValueError as error:
            raise ConfigError(f"the recipe {self.key} ({self.path}) is not valid TOML: {error}") from error
        return table


def recipes(plugins: PluginManager | None = None) -> list[Recipe]:
    """Those of all installed plugins, by name."""
    plugins = plugins or default_manager()
    owners: dict[str, Counter[str]] = {}
    for registry in plugins.registries.values():
        for item in registry.items:
            package = item.entry.config.__module__.partition(".")[0]
            owners.setdefault(package, Counter())[item.distribution] += 1
    found = [
        Recipe(path.stem, min(counts, key=lambda name: (-counts[name], name)), path)
        for package, counts in owners.items()
        for place in getattr(sys.modules.get(package), "__path__", ())
        for path in Path(place, _FOLDER).glob("*.toml")
    ]
    return sorted(found, key=lambda found: (found.name, found.distribution))


def find_recipe(name: str, plugins: PluginManager | None = None) -> Recipe:
    """The one called ``name``, or ``distribution:name``; :class:`UnknownKeyError` lists those that there are."""
    known = recipes(plugins)
    found = [one for one in known if name in (one.name, one.key)]
    if len(found) == 1:
        return found[0]
    if found:
        raise AmbiguousKeyError(
            f"the recipe {name!r} is there more than once; write one of {', '.join(one.key for one in found)}"
        )
    close = difflib.get_close_matches(name, [one.name for one in known], n=1)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    raise UnknownKeyError("\n".join([f"there is no recipe {name!r}.{hint} The recipes are:", *listed(known)]))


def listed(known: Sequence[Recipe]) -> list[str]:
    """A line for each: its name, which is the qualified one where several have it, and what it trains."""
    having = Counter(one.name for one in known)
    names = [one.name if having[one.name] == 1 else one.key for one in known]
    width = max(map(len, names), default=0)
    return [f"  {name:{width}}  {one.summary}" for name, one in zip(names, known, strict=True)]


def recipe(name: str, overrides: Iterable[str] = (), *, plugins: PluginManager | None = None) -> TrainConfig:
    """The configuration of the recipe ``name``, with ``section.option=value`` on top, for :func:`saekit.train`.

    :class:`saekit.errors.UnknownKeyError` for a name that is none lists those that there are (also
    `saekit config --recipes`).
    """
    plugins = plugins or default_manager()
    return _loaded(find_recipe(name, plugins), list(overrides), plugins)


def _loaded(found: Recipe, overrides: list[str], plugins: PluginManager) -> TrainConfig:
    try:
        return load_config(found.table(), overrides, plugins=plugins)
    except ConfigError as error:
        error.add_note(f"In the recipe {found.key}" + (", with the changes that were given." if overrides else "."))
        raise


def recipe_text(
    name: str, overrides: Iterable[str] = (), form: str = "toml", *, plugins: PluginManager | None = None
) -> str:
    """The recipe ``name`` as a file in ``form``, with ``overrides`` on top: its comment, then the options it sets.

    Without any, as TOML, it is the recipe's own file.  JSON has no comments.
    """
    plugins, overrides = plugins or default_manager(), list(overrides)
    found = find_recipe(name, plugins)
    _loaded(found, overrides, plugins)  # what is printed can be read
    if form == "toml" and not overrides:
        return found.text
    table = apply_overrides(found.table(), overrides, kind=TrainConfig, plugins=plugins)
    if form == "json":
        return write(table, form)
    changed = [f"{_CHANGED}{printable(override)}" for override in overrides]
    if changed:
        changed += ["#           Sizes above are those of the recipe without this; `saekit plan` counts anew.", "#"]
    return "\n".join([*found.comment, *changed, "", write(table, form)])


def printed(name: str | None, given: Sequence[str] = (), form: str = "toml") -> str:
    """What `saekit config --recipe` prints: the recipe ``name`` with changes, or the list of recipes."""
    if name is None:
        if given:
            raise ConfigError(f"--recipes lists the recipes; {given[0]!r} goes with --recipe NAME")
        return "\n".join([*listed(recipes()), "", "saekit config --recipe NAME > run.toml", ""])
    for text in given:
        if "=" not in text:
            raise ConfigError(
                f"--recipe {name} is a whole configuration, and {text!r} would be another; give changes to it as "
                "section.option=value"
            )
    return recipe_text(name, given, form)
