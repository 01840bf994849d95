"""Whether what a checkpoint says of itself is such as saekit writes: names, types and sizes that others rely on."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import PurePosixPath
from typing import Any

from saekit.files.names import is_plain_name
from saekit.values import is_scale

__all__ = ["check_alike", "check_facts", "check_stream", "check_training"]

_LARGEST = 2**63 - 1


def check_facts(facts: Mapping[str, Any]) -> None:
    """:class:`ValueError` for a manifest that saekit has not written."""
    _check(facts, "batches", _is_count)
    _check(facts, "finished", _is_bool)
    _check(facts, "spaced", _is_bool)
    for key in ("identity", "versions", "files", "saes"):
        _check(facts, key, _is_table)
    mesh = facts.get("mesh", [1, 1])  # of one process, it is not said
    _require(isinstance(mesh, list) and len(mesh) == 2 and all(_is_count(n) and n > 0 for n in mesh), "mesh")
    for name, about in facts["saes"].items():
        _require(is_plain_name(name), f"the name {name!r} of an SAE")
        _require(_is_table(about), f"saes.{name}")
        _check(about, "step", _is_count, name)
        _check(about, "tokens", _is_count, name)
        _check(about, "d_sae", lambda value: _is_count(value) and value > 0, name)
        _check(about, "diverged", lambda value: value is None or isinstance(value, str), name)
        _check(about, "config", _is_table, name)
        _check(about["config"], "checkpoints", _is_table, f"{name}.config")
    for name, summed in facts["files"].items():
        *folders, _ = PurePosixPath(name).parts or ("",)
        plain = all(map(is_plain_name, name.split("/")))
        _require(plain and set(folders) <= set(facts["saes"]) and len(folders) < 2, f"the file {name!r}")
        _require(isinstance(summed, str), f"the checksum of {name}")


def check_stream(stream: Mapping[str, Any], facts: Mapping[str, Any]) -> None:
    """:class:`ValueError` for a state of the batches that is not that of the checkpoint with these ``facts``."""
    _check(stream, "told", _is_count)
    _check(stream, "random", _is_table)
    _check(stream, "lanes", lambda value: isinstance(value, list))
    for lane in stream["lanes"]:
        _require(_is_table(lane), "a lane")
        _check(lane, "tokens", _is_count)
        _check(lane, "batches", _is_count)
        _check(lane, "ended", _is_bool)
        _check(lane, "source", _is_table)
        _check(lane, "untold", lambda value: _is_table(value) and value.keys() <= facts["saes"].keys())
    waiting = stream.get("trackers", {})  # a checkpoint of an older saekit has none
    _require(_is_table(waiting) and waiting.keys() <= facts["saes"].keys(), "trackers")
    _require(all(map(_is_table, waiting.values())), "trackers")
    remarks = stream.get("remarks", {})  # likewise
    _require(_is_table(remarks) and remarks.keys() <= facts["saes"].keys(), "remarks")
    for texts in remarks.values():
        _require(isinstance(texts, list) and all(isinstance(text, str) for text in texts), "remarks")
    _require(sum(lane["batches"] for lane in stream["lanes"]) == facts["batches"], "the number of batches")
    _check(stream, "latest", lambda value: _is_table(value) and value.keys() == facts["saes"].keys())
    for name, latest in stream["latest"].items():
        _require(_is_table(latest) and all(isinstance(x, (int, float)) for x in latest.values()), f"latest.{name}")


def check_training(state: Mapping[str, Any], about: Mapping[str, Any], name: str) -> None:
    """:class:`ValueError` for a training state that is not that of the SAE that the manifest speaks ``about``."""
    for key in ("step", "tokens", "diverged"):
        _require(key in state and state[key] == about[key], f"{key} of {name}")
    _require(is_scale(state.get("scale")), f"scale of {name}")


def check_alike(saved: Any, own: Any, where: str) -> None:
    """:class:`ValueError` when ``saved`` has other keys, types or shapes than ``own``; None may stand for anything."""
    if saved is None or own is None:
        return
    if _is_table(own):
        _require(_is_table(saved) and saved.keys() == own.keys(), where)
        for key, value in own.items():
            check_alike(saved[key], value, f"{where}.{key}")
    elif hasattr(own, "shape"):
        _require(hasattr(saved, "shape") and (saved.shape, saved.dtype) == (own.shape, own.dtype), where)
    else:
        _require(type(saved) is type(own), where)


def _check(table: Mapping[str, Any], key: str, test: Callable[[Any], bool], where: str = "") -> None:
    shown = f"{where}.{key}" if where else key
    _require(key in table, shown, "is missing")
    _require(test(table[key]), shown)


def _require(fine: bool, what: str, fault: str = "is not as saekit writes it") -> None:
    if not fine:
        raise ValueError(f"{what} {fault}")


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= _LARGEST


def _is_bool(value: object) -> bool:
    return isinstance(value, bool)


def _is_table(value: object) -> bool:
    return isinstance(value, Mapping)
