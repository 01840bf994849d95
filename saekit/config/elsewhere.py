"""What to say of an option that is not there: where it is, what it is called here, what is like it."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import Any

import attrs

from saekit.config.annotations import inner_class
from saekit.config.fields import PLUGIN_KIND
from saekit.config.sae_lens_names import SAE_LENS
from saekit.config.structuring import UnknownOption
from saekit.plugins.manager import PluginManager

__all__ = ["option_paths", "told"]

_AT_MOST = 4
RENAMED = {"optimiser": "optimizer"}
"""Options of earlier versions, by what they are called now."""


def told(option: UnknownOption, path: str, root: type, plugins: PluginManager) -> str:
    """The message about an ``option`` at ``path`` of a ``root``, when the whole tree is looked through."""
    tree = option_paths(root, plugins)
    if option.key in RENAMED:
        return f"is called {RENAMED[option.key]} since saekit 0.3"
    if same := tree.get(option.key):
        return _elsewhere(path, same, option.chosen, plugins)
    if option.key in SAE_LENS and "training_tokens" in tree:  # not below a plugin's options that are read alone
        return f"is a name of sae-lens; here it is {SAE_LENS[option.key]}"
    if option.close:
        return str(option)
    close = difflib.get_close_matches(option.key, tree, n=1, cutoff=0.8)
    return f"is not an option. Did you mean {' or '.join(list(tree[close[0]])[:_AT_MOST])}?" if close else str(option)


def _elsewhere(path: str, places: Mapping[str, tuple[str, ...]], chosen: str, plugins: PluginManager) -> str:
    """``places`` are the paths of options of that name, with the plugins that have it, if not all of a kind do."""
    if owners := places.get(path):
        section = path.rpartition(".")[0]
        other = _shortest(min(owners, key=len), plugins)
        return (
            f"is not an option of {chosen or 'the plugin that is chosen'} ({section}.name), but of {_listed(owners)}. "
            f"Choose one of these ({section}.name={other}), or delete it"
        )
    told = [place + (f" (of {_listed(owners)})" if owners else "") for place, owners in places.items()]
    return f"is not an option here; it is {' or '.join(told[:_AT_MOST])}"


def _shortest(key: str, plugins: PluginManager) -> str:
    """``key`` without its distribution, where no other plugin of a kind that has it is called so."""
    name = key.partition(":")[2]
    keys = [[item.key for item in registry.items] for registry in plugins.registries.values()]
    alike = [one for of_kind in keys if key in of_kind for one in of_kind if one.partition(":")[2] == name]
    return name if alike == [key] else key


def _listed(names: Iterable[str]) -> str:
    names = list(names)
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def option_paths(root: type, plugins: PluginManager) -> dict[str, dict[str, tuple[str, ...]]]:
    """For the name of every option below ``root``: its dotted paths, each with the plugins that have it.

    A path that is there whatever plugin is chosen has none.
    """
    found: dict[str, dict[str, tuple[str, ...]]] = {}
    _collect(root, "", (), plugins, found, 0)
    return found


def _collect(
    cls: type,
    prefix: str,
    owners: tuple[str, ...],
    plugins: PluginManager,
    found: dict[str, dict[str, tuple[str, ...]]],
    depth: int,
) -> None:
    try:
        attrs.resolve_types(cls)
    except Exception:  # a plugin's annotations; it says so when it is used
        return
    for field in attrs.fields(cls):
        path = prefix + field.name
        found.setdefault(field.name, {}).setdefault(path, owners)
        if depth > 4:
            continue
        if kind := field.metadata.get(PLUGIN_KIND):
            several = "[]" if isinstance(field.default, tuple) else ""
            _collect_plugins(kind, path + several, plugins, found, depth)
        elif (inner := inner_class(field.type)) is not None:
            _collect(inner, f"{path}.", owners, plugins, found, depth + 1)


def _collect_plugins(
    kind: str, path: str, plugins: PluginManager, found: dict[str, dict[str, tuple[str, ...]]], depth: int
) -> None:
    registry = plugins.registries.get(kind)
    keys: dict[type, list[str]] = {}
    for item in registry.items if registry is not None else ():
        keys.setdefault(item.entry.config, []).append(item.key)
    fields: dict[str, list[type]] = {}
    for config in keys:
        for field in attrs.fields(config):
            fields.setdefault(field.name, []).append(config)
    for name, configs in fields.items():
        shortest = tuple(min(keys[config], key=len) for config in configs)
        owners = () if len(configs) == len(keys) else shortest
        found.setdefault(name, {}).setdefault(f"{path}.{name}", owners)
        nested: Any = {field.name: field for config in configs for field in attrs.fields(config)}[name]
        if (inner_kind := nested.metadata.get(PLUGIN_KIND)) and depth < 4:
            _collect_plugins(inner_kind, f"{path}.{name}", plugins, found, depth + 1)
