"""How sae-lens loads and runs the model: what has a place here, by the backend."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from saekit.config import shown
from saekit.for_sae_lens import dtype_in
from saekit_plugins.loaders.sae_lens.run_work import Work

__all__ = ["forwards", "loading"]

_KWARGS = "model_from_pretrained_kwargs"
_OWN: Mapping[str, Mapping[str, str]] = {
    "HookedTransformer": {"dtype": "model.dtype", "torch_dtype": "model.dtype"},
    "AutoModelForCausalLM": {
        "dtype": "model.dtype", "torch_dtype": "model.dtype", "revision": "model.backend.revision",
        "attn_implementation": "model.backend.attn_implementation",
    },
}  # fmt: skip
"""What is an option of its own here."""
_MAMBA_FORWARD = ("fast_conv", "fast_ssm", "warn_disabled_hooks")


def loading(work: Work, backend: str, options: Mapping[str, Any]) -> None:
    """What is passed to ``from_pretrained``."""
    own, moved, lost, rest = _OWN.get(backend, {}), {}, [], {}
    for name, value in options.items():
        if name in own and (taken := _value(own[name], value)) is not None:
            moved[name] = own[name]
            work.set(own[name], taken)
        elif name in own or name in _NOT_HERE or backend == "HookedMamba":
            lost += _why(name, value)
        else:
            rest[name] = value
    if rest:
        work.set("model.backend.from_pretrained_kwargs", rest, _KWARGS)
        given = {name: value for name, value in (work.given.get(_KWARGS) or {}).items() if name in rest}
        if given == rest:  # what has a place elsewhere, or none, is told below
            work.changed.pop(_KWARGS, None)
        elif work.given.get(_KWARGS) is not None:
            work.changed[_KWARGS] = f"{shown(given)} is model.backend.from_pretrained_kwargs = {shown(rest)}"
    elif not moved:
        work.dropped.setdefault(_KWARGS, "says nothing here")
    if moved:
        places = [f"{name} is {path}" for name, path in moved.items()]
        whole = work.changed.get(_KWARGS)
        work.changed[_KWARGS] = ", ".join([*places, *([whole] if whole else [])])
    if lost:
        work.lost[_KWARGS] = "; ".join(lost)


def _value(path: str, value: Any) -> Any:
    """The same here; None: there is no such value."""
    if path != "model.dtype":
        return value
    return dtype_in({"dtype": value})


def _devices(value: Any) -> str | None:
    one = value is None or value == 1
    return None if one else f"n_devices is {shown(value)}, and the model is on one here (model.device)"


def _device_map(value: Any) -> str | None:
    return None if value is None else f"device_map is {shown(value)}, and the model is on one here (model.device)"


def _code(value: Any) -> str | None:
    return "trust_remote_code is refused: no code that comes with a model is run" if value else None


_NOT_HERE: Mapping[str, Callable[[Any], str | None]] = {
    "n_devices": _devices, "device_map": _device_map, "trust_remote_code": _code,
}  # fmt: skip


def _why(name: str, value: Any) -> list[str]:
    if name in _NOT_HERE:
        why = _NOT_HERE[name](value)
        return [] if why is None else [why]
    return [f"{name} is {shown(value)}, which has no place here"]


def forwards(work: Work, backend: str) -> None:
    """What is passed to every forward."""
    given = dict(work.take("model_kwargs") or {})
    if not given:
        work.dropped["model_kwargs"] = "says nothing"
        return
    if backend == "AutoModelForCausalLM":
        work.dropped["model_kwargs"] = "reaches no model of transformers there"
        return
    kept = {name: value for name, value in given.items() if backend != "HookedMamba" or name in _MAMBA_FORWARD}
    if kept:
        work.set("model.backend.forward_kwargs", kept, "model_kwargs")
    if other := [name for name in given if name not in kept]:
        work.lost["model_kwargs"] = f"has {', '.join(other)}, which HookedMamba's forward does not take"
