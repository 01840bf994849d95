"""Building what an entry offers: whatever goes wrong, or comes back wrong, names the plugin that it is from."""

from __future__ import annotations

import contextlib
import functools
import importlib
import inspect
import math
import re
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, TypeAlias
from weakref import WeakKeyDictionary

import attrs

from saekit.errors import ConfigError, LostProcessError, PluginFailedError, SaekitError
from saekit.kinds import Kind
from saekit.plugins.registry import Registered
from saekit.plugins.text import short
from saekit.reasons import error_text

__all__ = ["Part", "blamed", "built", "origin_of", "outlined", "placed", "returned", "unless_ours", "wrong"]

Part: TypeAlias = tuple[Registered, object]
"""A plugin, and what it has built."""


_origins: WeakKeyDictionary[Any, Registered] = WeakKeyDictionary()


def origin_of(made: object) -> Registered | None:
    """The plugin that has built an object; None where that is not known."""
    with contextlib.suppress(Exception):  # of what cannot be a key, and of strangers' objects
        return _origins.get(made)
    return None


def built(item: Registered, options: Any, **services: Any) -> Any:
    """What ``item`` builds from ``options`` (None: its defaults), checked against what its kind promises.

    Raises :class:`saekit.errors.MissingPackageError` for a package that the entry requires, the plugin's own
    :class:`saekit.errors.SaekitError` or ImportError with a note that names it, and otherwise
    :class:`saekit.errors.PluginFailedError`.
    """
    made = _made(item, "build", item.entry.build, options, services)
    with contextlib.suppress(Exception):
        _origins[made] = item
    return made


def outlined(item: Registered, options: Any, **services: Any) -> Any:
    """The outline of what ``item`` would build, checked in the same way; None where it has none to give.

    Raises what :func:`built` does.
    """
    outline = getattr(item.entry, "outline", None)
    return None if outline is None else _made(item, "outline", outline, options, services)


def _made(item: Registered, what: str, by: Callable[..., Any] | str, options: Any, services: Mapping[str, Any]) -> Any:
    item.check_requirements()
    make = _imported(item, what, by) if isinstance(by, str) else by
    with blamed(item, what, parts=_parts(services)):
        made = make(item.entry.config() if options is None else options, **services)
        fault = _fault(item.kind, made)
    if fault:
        raise returned(item, what, made, fault)
    return made


def _parts(services: Mapping[str, Any]) -> list[Part]:
    """What other plugins have built among ``services``, such as the model of an activation source's stream."""
    objects = [one for value in services.values() for one in (value, _asked(value, "backend"))]
    objects += [_asked(one, "_backend") for one in objects]
    return [(item, one) for one in objects if (item := origin_of(one)) is not None]


def _asked(value: Any, name: str) -> Any:
    """An attribute of a stranger's object, which may be a property that fails; None where there is none."""
    with contextlib.suppress(Exception):
        return getattr(value, name, None)
    return None


def _imported(item: Registered, what: str, path: str) -> Callable[..., Any]:
    """What stands at an import path, ``package.module:name``."""
    module_name, _, name = path.partition(":")
    where = f"its {what}, '{path}'"
    with blamed(item, f"importing {where}"):
        try:
            module = importlib.import_module(module_name)
        except ModuleNotFoundError as error:
            if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
                raise  # another module, which it imports
            raise PluginFailedError(f"{_who(item)}: there is no module {error.name}, of {where}") from error
        try:
            found: Any = functools.reduce(getattr, name.split("."), module)
        except AttributeError as error:
            raise PluginFailedError(f"{_who(item)}: there is no {name} in {module_name}, of {where}") from error
        if not callable(found):
            raise PluginFailedError(f"{_who(item)}: {where} is {short(found)}, expected a class or a function")
    result: Callable[..., Any] = found
    return result


def returned(item: Registered, what: str, value: Any, fault: str) -> PluginFailedError:
    """The error to raise where a plugin's method ``what`` returned ``value``, which is not as it should be."""
    return PluginFailedError(f"{_who(item)}: {what} returned {short(value)}, {fault}")


def wrong(made: object, text: str, item: Registered | None = None) -> PluginFailedError:
    """The error to raise where what a plugin has ``made`` does something wrong, which ``text`` says.

    ``item`` is the plugin, where that is known.
    """
    item = item or origin_of(made)
    return PluginFailedError(f"{_who(item) if item is not None else type(made).__name__}: {text}")


@contextmanager
def blamed(item: Registered, doing: str, *, at_work: bool = False, parts: Sequence[Part] = ()) -> Iterator[None]:
    """What strangers' code raises inside says which plugin it is of, and that it was ``doing``.

    ``at_work`` leaves a want of memory what it is: that is nobody's fault.  ``parts`` are objects of other plugins that
    the code uses; what one of them raises is said of its plugin.
    """
    try:
        yield
    except (KeyboardInterrupt, LostProcessError):
        raise
    except (SaekitError, ImportError) as error:
        note = f"In {doing} of the {_who(item)}."
        if note not in getattr(error, "__notes__", ()):
            error.add_note(note)
        raise
    except BaseException as error:  # also SystemExit, and what test libraries raise to skip
        if at_work and (isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"):  # torch's
            raise
        item, doing = _culprit(error, parts) or (item, doing)
        raise PluginFailedError(f"{_who(item)} failed in {doing}: {error_text(error)}") from error


@contextmanager
def placed(item: Registered, place: str) -> Iterator[None]:
    """A :class:`ConfigError` about an option of a plugin's names the option by its ``place``, where that is known.

    A plugin knows its options by their own names, and not where it is chosen: ``k`` is ``sae.k``.
    """
    try:
        yield
    except ConfigError as error:
        own = {field.name for field in attrs.fields(item.entry.config)}
        found = [
            (f"{place}.{path}" if re.split(r"[.\[]", path)[0] in own else path, text) for path, text in error.problems
        ]
        if found == error.problems or type(error) is not ConfigError:
            raise
        named = ConfigError(found, error.source)
        for note in getattr(error, "__notes__", ()):
            named.add_note(note)
        raise named from error


@contextmanager
def unless_ours(guard: AbstractContextManager[None]) -> Iterator[None]:
    """``guard``, for what is no error of saekit's: such a one has been said whose it is."""
    try:
        yield
    except SaekitError:
        raise
    except BaseException:
        with guard:
            raise


def _culprit(error: BaseException, parts: Sequence[Part]) -> tuple[Registered, str] | None:
    """The plugin whose object was at work when ``error`` was raised, the innermost, and what it was doing."""
    known = [(item, part) for item, part in parts if part is not None]
    for frame, _ in reversed(list(traceback.walk_tb(error.__traceback__))):
        code = frame.f_code
        own = frame.f_locals.get(code.co_varnames[0]) if code.co_argcount else None  # self, whatever it is called
        for item, part in known:
            if own is part or code is getattr(part, "__code__", None):
                return item, frame.f_code.co_name
    return None


def _who(item: Registered) -> str:
    return f"{item.kind.label} '{item.key}' ({item.distribution} {item.version}".rstrip() + ")"


def _fault(kind: Kind[Any], made: Any) -> str | None:
    """What is missing in ``made``, in words, or None."""
    label = kind.one
    if made is None:
        return f"expected {label}"
    if isinstance(made, type):
        return f"a class, expected {label}: an instance of it"
    if inspect.iscoroutine(made):
        made.close()
        return f"a coroutine, expected {label}: build must not be async"
    missing = [f"{name}()" for name in kind.methods if not callable(getattr(made, name, None))]
    missing += [name for name in kind.values if not _has(made, name)]
    if missing:
        return f"which lacks {', '.join(missing)}; expected {label}, as {kind.protocol.__module__} describes it"
    wrong = [name for name in kind.numbers if not _is_number(getattr(made, name))]
    return f"whose {wrong[0]} is {short(getattr(made, wrong[0]))}, expected a finite number" if wrong else None


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
