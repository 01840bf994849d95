"""What plugins hand over, and how it is found again by key."""

from __future__ import annotations

import difflib
import importlib.util
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs

from saekit.errors import AmbiguousKeyError, MissingPackageError, UnknownKeyError
from saekit.kinds import Kind
from saekit.plugins.text import normalized, printable

__all__ = ["Entry", "Registered", "Registry"]


@attrs.frozen
class Entry:
    """One thing that a plugin offers."""

    name: str
    """The bare key.  Users select it by this, or by ``distribution:name``."""
    config: type
    """A frozen attrs class with the options.  It is this entry's alone (aliases with the same build may share)."""
    build: Callable[..., Any] | str
    """``build(config, **services)``: see the hook.  A function, with heavy imports inside, or the import path of a
    class or function, ``"my_package.my_module:MyClass"``, which is imported on use."""
    requires: Sequence[str] = ()
    """Importable names of optional packages that ``build`` needs."""
    extra: str | None = None
    """The name of the extra of the plugin's distribution that installs ``requires``."""
    summary: str = ""
    """One line for ``saekit plugins``."""
    precheck: Callable[[Any, Any], object] | None = None
    """``precheck(config, whole)``: raises what can be seen to be wrong without heavy imports, such as a folder that is
    not there, before anything heavy is imported; see :mod:`saekit.commands.preflight`.  ``whole`` is the configuration
    that ``config`` is part of."""
    needs_text: bool = True
    """Of an activation source or an eval: whether it opens the text, which must then be there, with a model to read
    it."""
    outline: Callable[..., Any] | str | None = None
    """Of a model backend: ``outline(config, *, model)`` gives one around a model without its weights, on torch's meta
    device; or an import path, like ``build``.  It has the name, the hooks and the sizes of what ``build`` gives, and
    forwards that make shapes, and nothing large is downloaded or allocated for it: `saekit plan` counts with it."""
    no_model: bool = False
    """Of a model backend: it stands for having none, so that hooks and contexts are not checked, and nothing that needs
    a model or a text can be chosen beside it."""
    timed: bool = True
    """Of a model backend: whether `saekit plan` loads a second copy of a model to time it beside the backend that was
    chosen.  False of one that is never the quickest."""
    ships: Mapping[str, Path] = attrs.field(factory=dict, hash=False)
    """Of a model backend: the models that come with its plugin, by name, each with its folder, which has a Hugging Face
    tokenizer: by such a name `saekit pretokenize` finds that, without the model."""
    serves: Sequence[str] = ()
    """Of a step kernel: the qualified keys of the architectures that it is for, such as ``saekit:topk``."""


@attrs.frozen
class Registered:
    """An entry with its provenance."""

    entry: Entry
    kind: Kind[Any]
    distribution: str
    version: str
    plugin: str
    """``distribution:entry point``."""

    @property
    def key(self) -> str:
        """The qualified key, ``distribution:name``."""
        return f"{self.distribution}:{self.entry.name}"

    def missing(self) -> list[str]:
        """The packages in ``requires`` that are not installed."""
        return [name for name in self.entry.requires if not _importable(name)]

    def install_hint(self) -> str:
        """The command that installs what is missing."""
        if self.entry.extra:
            return f"pip install '{self.distribution}[{self.entry.extra}]'"
        return f"pip install {' '.join(self.missing())}"

    def check_requirements(self) -> None:
        """Raise :class:`MissingPackageError`, naming the command to run, when a required package is absent."""
        if missing := self.missing():
            raise MissingPackageError(
                f"{self.kind.label} '{self.key}' needs {_listed(missing)}, not installed here. "
                f"Install it with: {self.install_hint()}"
            )


class Registry:
    """All entries of one kind.  Order of registration decides nothing but the order of listing."""

    def __init__(self, kind: Kind[Any]) -> None:
        self.kind = kind
        self.items: list[Registered] = []

    def get(self, key: str, troubles: Callable[[str, Kind[Any], bool], Iterable[str]] | None = None) -> Registered:
        """The entry of a bare or qualified ``key``.

        ``troubles(key, kind, guessed)`` gives lines about plugins that were left out, or are not installed, for the
        "unknown" message; ``guessed`` says whether a key like it was found.
        """
        found = [item for item in self.items if key in (item.entry.name, item.key)]
        if len(found) == 1:
            return found[0]
        if found:
            raise AmbiguousKeyError(self._ambiguous(key, found))
        raise UnknownKeyError(self._unknown(key, troubles or (lambda *_: ())))

    def of_config(self, config: object) -> Registered:
        """The entry whose options ``config`` is an instance of."""
        found = [item for item in self.items if item.entry.config is type(config)]
        if not found:
            name = type(config).__qualname__
            raise UnknownKeyError(
                f"{name} is not the options class of any {self.kind.label}. Registered: {self._options_classes()}."
            )
        if any(item.entry.build != found[0].entry.build for item in found):
            raise AmbiguousKeyError(
                f"{type(config).__qualname__} is the options class of several {self.kind.labels}, "
                f"{_listed(item.key for item in found)}: name the one you mean by its key."
            )
        return found[0]

    def _options_classes(self) -> str:
        return _listed(f"{item.entry.config.__qualname__} ({item.key})" for item in self.items) or "none"

    def _ambiguous(self, key: str, found: list[Registered]) -> str:
        if len({item.key for item in found}) == 1:
            plugins = _listed(item.plugin for item in found)
            return (
                f"{self.kind.label} '{found[0].key}' is registered {len(found)} times by one distribution, from "
                f"{plugins}. Its author must rename one; until then, SAEKIT_DISABLE_PLUGINS={found[-1].plugin} leaves "
                "one out."
            )
        owners = _listed(f"{item.distribution} {item.version}".strip() for item in found)
        keys = _listed(f"'{item.key}'" for item in found)
        return f"{self.kind.label} '{key}' is supplied by several distributions ({owners}). Write one of {keys}."

    def _unknown(self, key: str, troubles: Callable[[str, Kind[Any], bool], Iterable[str]]) -> str:
        lines = [f"Unknown {self.kind.label} '{key}'."]
        near = self._near(key)
        if near:
            lines[0] += f" Did you mean {_listed(map(repr, near), last='or')}?"
        distribution = normalized(key.partition(":")[0]) if ":" in key else ""
        listed = [f"Registered {self.kind.labels}:", *(f"  {self._described(item)}" for item in self.items)]
        if not distribution or distribution in {item.distribution for item in self.items}:
            lines += listed if self.items else [*listed, "  none"]
            lines += troubles(key, self.kind, bool(near))
        else:  # what others have of the kind is no answer
            lines += troubles(key, self.kind, bool(near))
            lines.append(f"`saekit plugins {self.kind}` lists the {self.kind.labels} that there are.")
        return printable("\n".join(lines), keep="\n")  # the key, too, may come from a stranger's file

    def _near(self, key: str) -> list[str]:
        """Keys like ``key``; of a qualified one, those of the distribution that it names, or of one spelled alike."""
        items = self.items
        if ":" in key:
            distribution, known = normalized(key.partition(":")[0]), {item.distribution for item in items}
            if distribution not in known:
                alike = difflib.get_close_matches(distribution, known, n=1, cutoff=0.8)
                items = [item for item in items if item.distribution in alike]
            else:
                items = [item for item in items if item.distribution == distribution]
        folded = {item.entry.name.casefold(): item.key if ":" in key else item.entry.name for item in items}
        name = key.partition(":")[2] if ":" in key else key
        return [folded[one] for one in difflib.get_close_matches(name.casefold(), folded, n=3, cutoff=0.6)]

    @staticmethod
    def _described(item: Registered) -> str:
        text = f"{item.key} ({item.distribution} {item.version}".rstrip() + ")"
        return f"{text}, needs: {item.install_hint()}" if item.missing() else text


def _importable(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except (Exception, SystemExit):  # a parent package is missing, or fails when it is imported
        return False


def _listed(words: Iterable[str], last: str = "and") -> str:
    """``a``, ``a and b``, ``a, b and c``."""
    words = list(words)
    return f" {last} ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)
