"""Work that processes do together: where one of them cannot, none goes on as if all had."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from saekit.distributed.group import Group
from saekit.errors import StorageError

__all__ = ["agreed", "done_by_all"]

_T = TypeVar("_T")


def done_by_all(group: Group, work: Callable[[], _T]) -> _T:
    """What ``work`` returns in this process; where it fails in one of ``group``, :class:`StorageError` in all others.

    Else they would wait for its part of what comes next, and be handed its part of what comes after that.
    """
    if group.size == 1:
        return work()
    found: list[_T] = []
    agreed(group, lambda: found.append(work()))
    return found[0]


def agreed(group: Group, work: Callable[[], _T], doing: str = "write a checkpoint") -> list[_T]:
    """What ``work``, which is ``doing`` something, returns in each process, told to all.

    Where it fails in one, :class:`StorageError` in all others.
    """
    found: _T | None = None
    failure: BaseException | None = None
    try:
        found = work()
    except Exception as error:
        failure = error
    if isinstance(failure, OSError):
        failure = StorageError(f"cannot {doing}: {failure.strerror}. What was there before is kept")
    problem = None if failure is None else str(failure) or type(failure).__name__
    told = group.objects((found, problem, isinstance(failure, OthersFailedError)))
    if failure is not None and not isinstance(failure, OthersFailedError):
        raise failure
    failed = [(number, text, followed) for number, (_, text, followed) in enumerate(told) if text is not None]
    for number, text, _ in sorted(failed, key=lambda one: one[2]):  # the cause, before what follows from it
        raise StorageError(f"of process {number}: {text}")
    return [one for one, _, _ in told]  # type: ignore[misc]


class OthersFailedError(StorageError):
    """This process was told to end its work, since another one failed."""
