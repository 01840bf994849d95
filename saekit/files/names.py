"""What a file or folder may be called, wherever the name comes from: a person, a configuration, a stranger's file."""

from __future__ import annotations

import os
import re

__all__ = [
    "LONGEST_NAME",
    "RUN_FILES",
    "SAE_CONFIG",
    "SAE_EVALS",
    "SAE_FILES",
    "SAE_PROBE",
    "SAE_SPARSITY",
    "SAE_WEIGHTS",
    "SWEEP_FILES",
    "fault_of_name",
    "half_written",
    "hidden_name",
    "is_free_in_run",
    "is_plain_name",
    "made_name",
]

LONGEST_NAME = 255
"""Bytes of a name in UTF-8: what the usual file systems take."""
SAE_CONFIG, SAE_WEIGHTS, SAE_SPARSITY = "cfg.json", "sae_weights.safetensors", "sparsity.safetensors"
SAE_PROBE = "probe.safetensors"
SAE_FILES = (SAE_WEIGHTS, SAE_SPARSITY, SAE_PROBE, SAE_CONFIG)
"""The files of an SAE's folder; without the last, nobody reads it."""
SAE_EVALS = "evals.json"
"""What was measured of it, beside them."""
SWEEP_FILES = frozenset({"checkpoints", "run.json", "summary.csv", "summary.png", "summary.html"})
"""What the folder of a sweep holds beside those of its SAEs."""
RUN_FILES = SWEEP_FILES | {
    "config.toml", "sae", "curves.png", "curves.html", "features.txt", "features.html", "dashboard.html",
}  # fmt: skip
"""What saekit itself writes into a run folder; nothing else in it may have such a name."""
_HALF_WRITTEN = re.compile(r"\.(.+)\.(?=[0-9]*[a-f])[0-9a-f]{8}\.(tmp|old)", re.DOTALL)  # not a date
_WINDOWS_DEVICES = {"con", "prn", "aux", "nul", *(f"{port}{n}" for port in ("com", "lpt") for n in range(1, 10))}
_NOT_ON_WINDOWS = re.compile(r'[<>:"|?*]')


def on_windows() -> bool:
    """Whether names must be such that Windows takes them."""
    return os.name == "nt"


def fault_of_name(name: object) -> str | None:
    """Why ``name`` cannot be that of one file or folder, as in "it ..."; None when it can.

    A name is one component of a path, so that nothing that is called so lies anywhere but where it is looked for.
    """
    if not isinstance(name, str) or not name.strip():
        return "is not a name"
    if name in (".", ".."):
        return "names a folder that is there already"
    if "/" in name or "\\" in name:
        return "is a path, not the name of one folder"
    if any(ord(character) < 32 or ord(character) == 127 for character in name):
        return "holds control characters"
    try:
        size = len(name.encode())
    except UnicodeEncodeError:
        return "is not valid Unicode"
    if size > LONGEST_NAME:
        return f"has {size} bytes, and a file system takes at most {LONGEST_NAME}"
    if half_written(name) is not None:
        return "is what saekit calls half-written files"
    return _fault_on_windows(name) if on_windows() else None


def half_written(name: str) -> tuple[str, str] | None:
    """Of the hidden name of something half written, the name that it was to have, and ``tmp``, or ``old`` if it had."""
    match = _HALF_WRITTEN.fullmatch(name)
    return None if match is None else (match[1], match[2])


def is_plain_name(name: object) -> bool:
    """Whether ``name`` can be that of one file or folder."""
    return fault_of_name(name) is None


def is_free_in_run(name: object) -> bool:
    """Whether something in a run folder that is not saekit's own may have this name."""
    return isinstance(name, str) and is_plain_name(name) and name[0] != "." and name.casefold() not in RUN_FILES


def made_name(text: str, room: int = 0) -> str:
    """``text`` as a name for a folder on any system, with ``room`` bytes left for an ending."""
    name = _NOT_ON_WINDOWS.sub("-", re.sub(r"[/\\\x00-\x1f\x7f\ud800-\udfff]", "-", text))
    return name.encode()[: LONGEST_NAME - room].decode(errors="ignore").rstrip(". ") or "run"


def _fault_on_windows(name: str) -> str | None:
    if wrong := _NOT_ON_WINDOWS.search(name):
        return f"holds {wrong[0]!r}, which Windows does not take"
    if name.endswith((".", " ")):
        return "ends in a dot or a space, which Windows does not take"
    if name.partition(".")[0].rstrip().lower() in _WINDOWS_DEVICES:
        return "is the name of a device of Windows"
    return None


def hidden_name(name: str, kind: str) -> str:
    """A new name by which :func:`half_written` knows what is to be called ``name``; ``kind`` is ``tmp`` or ``old``.

    Eight hexadecimal digits with a letter among them, so never a date, tell such files apart.
    """
    import secrets  # here, for most of what needs names writes nothing

    while (mark := secrets.token_hex(4)).isdecimal():
        pass
    room = LONGEST_NAME - len(f"..{mark}.{kind}")
    return f".{name.encode(errors='surrogateescape')[:room].decode(errors='ignore')}.{mark}.{kind}"
