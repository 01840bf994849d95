"""What ``saekit plugins`` shows, as data and as text."""

from __future__ import annotations

import difflib
import textwrap
from collections.abc import Iterator
from typing import Any

import attrs

from saekit.config.describe import describe_fields
from saekit.errors import AmbiguousKeyError, UnknownKeyError
from saekit.kinds import KINDS, SAE_ARCHITECTURES, STEP_KERNELS, Kind
from saekit.plugins.manager import Note, PluginManager
from saekit.plugins.registry import Registered
from saekit.plugins.text import printable
from saekit.reasons import last_line

__all__ = ["detail", "detail_text", "found", "is_kind", "kind_named", "overview", "table"]


def found(manager: PluginManager, name: str) -> Registered:
    """The plugin that ``name`` is the key of, ``KIND:KEY`` where several kinds have it.

    A key may be qualified (``saekit:topk``), too.
    """
    kind, colon, key = name.partition(":")
    items = [item for registry in manager.registries.values() for item in registry.items]
    left_out = [*(failure.plugin for failure in manager.failures), *manager.blocked]
    known = {item.distribution for item in items} | {plugin.partition(":")[0] for plugin in left_out}
    if colon and (is_kind(kind) or kind not in known):
        return manager.get(kind_named(kind), key)
    fits = [item for item in items if name in (item.entry.name, item.key)]
    if len(fits) == 1:
        return fits[0]
    if fits:
        named = [f"{item.kind.name}:{item.entry.name if _alone(item, fits) else item.key}" for item in fits]
        raise AmbiguousKeyError(f"several plugins have the key {name!r}; name one: {', '.join(named)}")
    keys = {item.key if colon else item.entry.name for item in items}
    close = difflib.get_close_matches(name, keys, n=3)
    hint = f" Did you mean {' or '.join(map(repr, close))}?" if close else ""
    lines = [f"there is no plugin {name!r}.{hint} `saekit plugins` lists all there are"]
    raise UnknownKeyError("\n".join(lines + manager.troubles(name, guessed=bool(close))))


def _alone(item: Registered, others: list[Registered]) -> bool:
    return all(other is item or other.kind.name != item.kind.name for other in others)


def is_kind(name: str) -> bool:
    """Whether ``name`` is a kind's, as :func:`kind_named` understands it."""
    return _folded(name) in {form for kind in KINDS for form in (kind, kind.removesuffix("s"))}


def _folded(name: str) -> str:
    return name.replace("-", "_").replace(" ", "_").lower()


def kind_named(name: str) -> Kind[Any]:
    """The kind of that name; ``lr_schedule`` and ``LR-schedules`` are understood too."""
    folded = _folded(name)
    for known, kind in KINDS.items():
        if folded in (known, known.removesuffix("s")):
            return kind
    close = difflib.get_close_matches(folded, KINDS, n=1)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    raise UnknownKeyError(f"there is no kind of plugin {name!r}.{hint} The kinds are {', '.join(KINDS)}")


def overview(manager: PluginManager, kind: str | None = None) -> dict[str, Any]:
    """Every plugin, the ones left out included; or those of one ``kind``."""
    registries = manager.registries.values() if kind is None else [manager.registry(kind_named(kind))]
    return {
        "plugins": [detail(item) for registry in registries for item in registry.items],
        "failed": [attrs.asdict(failure) for failure in manager.failures],
        "notes": [attrs.asdict(note) for note in (*manager.notes, *_notes_of_kernels(manager))],
        "disabled": list(manager.blocked),
    }


def _notes_of_kernels(manager: PluginManager) -> Iterator[Note]:
    """Of step kernels that serve nothing, or what is not there though its distribution is: they are never used."""
    known = {item.key: item.entry.name for item in manager.registry(SAE_ARCHITECTURES).items}
    here = {key.partition(":")[0] for key in known}
    for item in manager.registry(STEP_KERNELS).items:
        keys, texts = _served(item), []
        if not keys:
            texts.append("no SAE architecture: name them in its entry, such as serves=('distribution:architecture',)")
        for key in (key for key in keys if key not in known and (":" not in key or key.partition(":")[0] in here)):
            meant = [one for one, name in known.items() if name == key] or difflib.get_close_matches(key, known, n=1)
            texts.append(f"{key!r}, which is no SAE architecture here" + (f": write {meant[0]!r}" if meant else ""))
        yield from (Note(item.plugin, item.version, f"the step kernel {item.key} serves {text}") for text in texts)


def _served(item: Registered) -> list[str]:
    keys = item.entry.serves
    return [keys] if isinstance(keys, str) else [str(key) for key in keys]


def detail(item: Registered) -> dict[str, Any]:
    """One plugin with its options."""
    config = item.entry.config
    try:
        options, problem = _options(config), None
    except Exception as error:  # a default that cannot be made, say: it must not hide the others
        options, problem = [], last_line(error)
    return {
        "kind": item.kind.name,
        "key": item.key,
        "distribution": item.distribution,
        "version": item.version,
        "plugin": item.plugin,
        "summary": " ".join(item.entry.summary.split()),
        "missing": item.missing(),
        "install": item.install_hint() if item.missing() else None,
        "serves": _served(item),
        "config": f"{config.__module__}.{config.__qualname__}",
        "options": options,
        "problem": problem,
    }


def _options(config: type) -> list[dict[str, Any]]:
    return [
        {
            "name": field.name,
            "type": field.type,
            "required": field.default is ...,
            "default": _plain(field.default),
            "doc": field.doc,
        }
        for field in describe_fields(config)
    ]


def _plain(value: object) -> Any:
    if value is ...:
        return None
    if isinstance(value, (tuple, list)):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    return value if type(value) in (str, int, float, bool, type(None)) else repr(value)


def table(data: dict[str, Any], kind: str | None = None) -> str:
    """The overview, of all or of one ``kind``, as text, a line per plugin."""
    lines = []
    width = max((len(item["key"]) for item in data["plugins"]), default=0)
    for name in KINDS if kind is None else [kind_named(kind).name]:
        lines.append(name)
        items = [item for item in data["plugins"] if item["kind"] == name]
        for item in items:
            owner = f"{item['distribution']} {item['version']}".strip()
            needs = f"  [needs: {item['install']}]" if item["missing"] else ""
            lines.append(f"  {item['key']:{width}}  {owner:16}  {item['summary']}{needs}")
            if item.get("serves"):
                lines.append(f"      serves {', '.join(item['serves'])}")
            options = ", ".join(f"{o['name']}: {o['type']}{_default(o)}" for o in item["options"])
            if options:
                indent = " " * 6
                lines += textwrap.wrap(options, 110, initial_indent=indent, subsequent_indent=indent)
            if item["problem"]:
                lines.append(f"      its options cannot be listed: {item['problem']}")
        lines += [] if items else ["  none"]
    for failure in data["failed"]:
        lines.append(f"failed: {failure['plugin']} {failure['version']}: {failure['reason']}")
    lines += [f"note: {note['plugin']} {note['version']}: {note['text']}" for note in data["notes"]]
    lines += [f"disabled: {plugin}" for plugin in data["disabled"]]
    return "\n".join(printable(line) for line in lines)


def detail_text(data: dict[str, Any]) -> str:
    """One plugin's options as text."""
    lines = [
        f"{data['key']}: {data['summary']}" if data["summary"] else data["key"],
        f"{KINDS[data['kind']].label}, from {data['distribution']} {data['version']} ({data['plugin']})",
        f"options class: {data['config']}",
    ]
    if data.get("serves"):
        lines.append(f"serves: {', '.join(data['serves'])}")
    if data["missing"]:
        lines.append(f"needs: {data['install']}")
    if data["problem"]:
        lines.append(f"its options cannot be listed: {data['problem']}")
    lines += ["", "options:" if data["options"] else "no options"]
    for option in data["options"]:
        default = "required" if option["required"] else f"default {_shown(option['default'])}"
        lines += [
            f"  {option['name']}: {option['type']} ({default})",
            *(f"      {line}" for line in option["doc"].splitlines()),
        ]
    return "\n".join(printable(line) for line in lines)


def _default(option: dict[str, Any]) -> str:
    return "" if option["required"] else f" = {_shown(option['default'])}"


def _shown(value: object) -> str:
    return (
        {True: "true", False: "false"}[value] if isinstance(value, bool) else "none" if value is None else repr(value)
    )
