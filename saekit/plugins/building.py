"""Building what an entry offers: whatever goes wrong, or comes back wrong, names the plugin that it is from."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from saekit.errors import PluginFailedError, SaekitError
from saekit.plugins.registry import KINDS, Registered
from saekit.plugins.text import error_text, short

__all__ = ["METHODS", "VALUES", "blamed", "built", "returned"]

METHODS = {
    "model_backends": ("hook_names", "tokenize", "token_texts", "run", "unembedding", "fingerprint"),
    "activation_functions": ("__call__",),
    "pretrained_loaders": ("detects", "load"),
    "lr_schedules": ("__call__",),
    "sae_architectures": ("encode", "decode", "losses", "training_step", "public_tensors", "load_public_tensors", "to"),
    "activation_sources": ("__iter__", "__next__", "peek", "state_dict", "load_state_dict", "close"),
    "trackers": ("log", "close"),
    "evals": ("__call__",),
}
"""What can be called on what each kind builds (see :mod:`saekit.protocols`)."""
VALUES = {
    "model_backends": ("name", "device", "n_ctx", "d_vocab", "special_tokens"),
    "lr_schedules": ("end",),
}
"""What else it must have."""


def built(item: Registered, options: Any, **services: Any) -> Any:
    """What ``item`` builds from ``options`` (None: its defaults), checked against what its kind promises.

    Raises :class:`saekit.errors.MissingPackageError` for a package that the entry requires, the plugin's own
    :class:`saekit.errors.SaekitError` or ImportError with a note that names it, and otherwise
    :class:`saekit.errors.PluginFailedError`.
    """
    item.check_requirements()
    with blamed(item, "build"):
        made = item.entry.build(item.entry.config() if options is None else options, **services)
        fault = _fault(item.kind, made)
    if fault:
        raise returned(item, "build", made, fault)
    return made


def returned(item: Registered, what: str, value: Any, fault: str) -> PluginFailedError:
    """The error to raise where a plugin's method ``what`` returned ``value``, which is not as it should be."""
    return PluginFailedError(f"{_who(item)}: {what} returned {short(value)}, {fault}")


@contextmanager
def blamed(item: Registered, doing: str) -> Iterator[None]:
    """What strangers' code raises inside says which plugin it is of, and that it was ``doing``."""
    try:
        yield
    except KeyboardInterrupt:
        raise
    except (SaekitError, ImportError) as error:
        note = f"In {doing} of the {_who(item)}."
        if note not in getattr(error, "__notes__", ()):
            error.add_note(note)
        raise
    except BaseException as error:  # also SystemExit, and what test libraries raise to skip
        raise PluginFailedError(f"{_who(item)} failed in {doing}: {error_text(error)}") from error


def _who(item: Registered) -> str:
    return f"{KINDS[item.kind]} '{item.key}' ({item.distribution} {item.version}".rstrip() + ")"


def _fault(kind: str, made: Any) -> str | None:
    """What is missing in ``made``, in words, or None."""
    label = _with_article(KINDS[kind])
    if made is None:
        return f"expected {label}"
    if isinstance(made, type):
        return f"a class, expected {label}: an instance of it"
    if inspect.iscoroutine(made):
        made.close()
        return f"a coroutine, expected {label}: build must not be async"
    missing = [f"{name}()" for name in METHODS[kind] if not callable(getattr(made, name, None))]
    missing += [name for name in VALUES.get(kind, ()) if not _has(made, name)]
    if missing:
        return f"which lacks {', '.join(missing)}; expected {label}, as saekit.protocols describes it"
    if kind == "lr_schedules" and not _is_number(made.end):
        return f"whose end is {short(made.end)}, expected a finite number"
    return None


def _with_article(label: str) -> str:
    return f"an {label}" if label.startswith(("LR", "SAE", "a", "e")) else f"a {label}"


def _has(made: Any, name: str) -> bool:
    """Whether there is such an attribute; a property is not asked, which may take long."""
    try:
        inspect.getattr_static(made, name)
    except AttributeError:
        return hasattr(made, name)
    return True


def _is_number(value: Any) -> bool:
    try:
        return not isinstance(value, (str, bytes)) and math.isfinite(float(value))
    except (TypeError, ValueError, OverflowError):
        return False
