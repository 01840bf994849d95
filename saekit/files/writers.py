"""One writer at a time in a folder, and what is said when the disk refuses."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from saekit.errors import DataError, PlaceError, StorageError
from saekit.files.storage import locked

__all__ = ["one_writer"]

_NO_RIGHT = (errno.EACCES, errno.EPERM, errno.EROFS)


@contextmanager
def one_writer(place: Path, what: str, doing: str, then: str) -> Iterator[None]:
    """For a writer of ``what`` into the folder ``place``, which is made, and goes again where nothing was written.

    :class:`PlaceError` where none can be made, or nothing written; :class:`DataError` while another process is
    ``doing`` the same there; what else the disk refuses is a :class:`StorageError` that says what there is to do
    ``then``.
    """
    made = [one for one in (place, *place.parents) if not one.exists()]
    try:
        place.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise PlaceError(
            f"no {what} can be made in {str(place)!r}: {error.strerror or error}. Name another folder"
        ) from error
    try:
        with locked(place):
            yield
    except BlockingIOError as error:
        raise DataError(f"another process is {doing} {str(place)!r}") from error
    except PlaceError:
        raise
    except (OSError, StorageError) as error:
        cause = error if isinstance(error, OSError) else error.__cause__
        reason = getattr(cause, "strerror", None) or error
        if getattr(cause, "errno", None) in _NO_RIGHT:
            raise PlaceError(
                f"nothing can be written into {str(place)!r}: {reason}. Name another folder, or ask for the right to "
                "write there"
            ) from error
        raise StorageError(f"cannot write the {what} {str(place)!r}: {reason}. {then}") from error
    finally:
        with suppress(OSError):
            for one in made:
                one.rmdir()  # as far as there is nothing in it
