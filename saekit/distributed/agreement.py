"""Work that processes do together: where one of them cannot, none goes on as if all had."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import TypeVar

from saekit.distributed.group import Group
from saekit.errors import LostProcessError, SaekitError, StorageError
from saekit.reasons import error_text

__all__ = ["OthersFailedError", "agreed", "by_first", "done_by_all", "leaving", "left_by_all"]

_T = TypeVar("_T")
_E = TypeVar("_E", bound=BaseException)

_LEFT_BY = "left_by_processes"


class OthersFailedError(StorageError):
    """This process was told to end its work, since another one failed."""


def done_by_all(
    group: Group,
    work: Callable[[], _T],
    doing: str | None = None,
    kinds: Sequence[type[SaekitError]] = (StorageError,),
) -> _T:
    """What ``work`` returns in this process; where it fails in one of ``group``, it fails in all.

    They wait for each other however long it takes.  In the others the error is of the first of ``kinds`` that it is of
    where it came, or of the last.  One of the disk is that it cannot be ``doing`` something, where that is said.
    """
    if group.size == 1:
        return work()
    found: list[_T] = []
    failure: Exception | None = None
    try:
        found.append(work())
    except LostProcessError:
        raise
    except Exception as error:
        failure = error
    if doing is not None and isinstance(failure, OSError):
        told = StorageError(f"cannot {doing}: {failure.strerror or failure}. What was there before is kept")
        told.__cause__, failure = failure, told
    words = group.words("" if failure is None else _word(failure, kinds))
    if failure is not None and (words is None or not isinstance(failure, OthersFailedError)):
        raise failure if words is None else leaving(failure, group)
    said = [(number, json.loads(word)) for number, word in enumerate(words or ()) if word]
    for number, (_, kind, text) in sorted(said, key=lambda one: one[1][0]):  # the cause, before what follows from it
        raise leaving(kinds[kind](f"of process {number}: {text}"), group)
    return found[0]


def _word(failure: Exception, kinds: Sequence[type[SaekitError]]) -> str:
    kind = next((number for number, kind in enumerate(kinds) if isinstance(failure, kind)), len(kinds) - 1)
    text = (str(failure) if isinstance(failure, SaekitError) else "") or error_text(failure)
    return json.dumps([isinstance(failure, OthersFailedError), kind, text])


def agreed(group: Group, work: Callable[[], _T], doing: str = "write a checkpoint") -> list[_T]:
    """What ``work`` returns in each process, told to all; where it fails in one, all fail: :func:`done_by_all`."""
    return group.objects(done_by_all(group, work, doing))


def by_first(group: Group, work: Callable[[], _T]) -> _T | None:
    """What ``work`` returns in the first process; None in the others, which wait for it, and fail if it does."""
    return done_by_all(group, lambda: None if group.rank else work(), kinds=(SaekitError,))


def leaving(error: _E, group: Group) -> _E:
    """``error``, by which all processes of ``group`` leave the same place of their work."""
    setattr(error, _LEFT_BY, max(group.size, getattr(error, _LEFT_BY, 1)))
    return error


def left_by_all(error: BaseException, group: Group) -> bool:
    """Whether all of ``group`` have left the same place by ``error``, so that they can still work together."""
    return group.size == 1 or getattr(error, _LEFT_BY, 1) == group.size
