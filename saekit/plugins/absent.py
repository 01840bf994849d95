"""Why a plugin that is asked for is not there, and what to do."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterable

__all__ = ["disabled", "not_there"]

_BY_HAND = ("test", "local")
"""What those are called that :func:`saekit.testing.isolated_manager` and ``PluginManager.register`` are given."""
_MOST = 3


def disabled(plugins: Iterable[str], variable: str) -> list[str]:
    """Lines about ``plugins`` (``distribution:entry point``) that the environment ``variable`` leaves out."""
    of: dict[str, list[str]] = {}
    for plugin in plugins:
        of.setdefault(plugin.partition(":")[0], []).append(plugin)
    lines = []
    for distribution, own in of.items():
        if len(own) > _MOST:
            lines.append(f"{len(own)} plugins of {distribution} are disabled by {variable}.")
        else:
            lines += [f"Plugin {plugin} is disabled by {variable}." for plugin in own]
    return lines


def not_there(distribution: str, version: str | None, label: str) -> str:
    """Of a ``distribution`` (as it is normalized) none of whose plugins was left out.

    ``version`` is that of its plugins that are here, of which none is the ``label`` that is asked for; None: it has
    none here.
    """
    if version is not None:
        where = f"{distribution} {version}".rstrip()
        return f"{where} is here, and has no such {label}: another version of it may have one."
    if distribution in _BY_HAND:
        return (
            f"'{distribution}' stands for plugins that a program has registered itself (isolated_manager, "
            "saekit.default_manager().register): register it here, too, or pass plugins=."
        )
    try:
        installed = importlib.metadata.version(distribution)
    except Exception:  # it is not there, or its files cannot be read
        return f"No installed plugin comes from '{distribution}': try pip install {distribution}"
    return (
        f"{distribution} {installed} is installed, and has no plugins of saekit: another version of it may have some."
    )
