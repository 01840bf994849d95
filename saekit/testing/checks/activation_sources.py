"""What an activation source promises."""

from __future__ import annotations

import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from saekit.abilities import HasMemory, KeepsRecipe, Pauses, StatesForwards, StatesRows, StatesWidths
from saekit.errors import SaekitError
from saekit.reasons import error_text
from saekit.runs.state_files import read_state, write_state
from saekit.site import Site
from saekit.source_forwards import fault_of_forwards
from saekit.testing.backend import FakeBackend
from saekit.testing.checks.check import Checks, Fault, NotTried, Subject, must
from saekit.testing.checks.numbers import must_be_equal
from saekit.testing.checks.spread_sources import must_share
from saekit.values import Batch

if TYPE_CHECKING:
    from saekit.data import ContextStream, StreamContext

CHECKS = Checks()
_SITE = Site(hook_name="blocks.0.hook_resid_post")
_HEAD = Site(hook_name="blocks.0.attn.hook_z", hook_head_index=1)
_DOCUMENTS = [[(7 * n + t) % 120 + 1 for t in range(10 + n % 13)] for n in range(60)]
_BATCH, _MOST, _PATIENCE = 24, 300, 2.0


def _no_text(text: str) -> list[int]:
    raise NotImplementedError("documents are token ids here")


def _contexts(part: tuple[int, int] = (0, 1), *, repeat: bool = False) -> ContextStream:
    """A part of the text."""
    from saekit.data import ContextStream, Documents, TokenPolicy

    documents = Documents(_DOCUMENTS).part(*part)
    return ContextStream(documents, _no_text, TokenPolicy(context_size=8), d_vocab=128, repeat=repeat)


def _stream(
    subject: Subject, *, repeat: bool = True, sites: tuple[Site, ...] | None = None, seed: int = 3, **options: Any
) -> StreamContext:
    from saekit.data import StreamContext

    sites = sites or (_first(subject),)
    given: dict[str, Any] = {"backend": FakeBackend(), "open_contexts": lambda: _contexts(repeat=repeat)} | options
    return StreamContext(sites=sites, batch_size=_BATCH, seed=seed, repeat=repeat, **given)


def _first(subject: Subject) -> Site:
    return subject.sites[0] if subject.sites else _SITE


def _width(source: Any, stream: StreamContext, site: Site) -> int | None:
    """What the source states, of data of its own, or else the model's."""
    return source.widths.get(site) if isinstance(source, StatesWidths) else stream.widths[site]


@contextmanager
def _opened(subject: Subject, stream: StreamContext | None = None, **options: Any) -> Iterator[Any]:
    source = subject.build(stream=stream or _stream(subject, **options))
    try:
        yield source
    finally:
        source.close()


def _plain(batch: Batch) -> dict[str, Any]:
    """A batch, to compare."""
    origins = {name: getattr(batch, name) for name in ("tokens", "documents", "positions")}
    return {site.name: rows for site, rows in batch.activations.items()} | origins


def _batches(source: Any, n: int) -> list[dict[str, Any]]:
    return [_plain(batch) for batch in islice(source, n)]


@CHECKS.add
def build(subject: Subject) -> None:
    """It is built from its options and a stream, and keeps to its protocol."""
    try:
        with _opened(subject):
            pass
    except SaekitError as error:
        if subject.sites:
            raise
        raise Fault(
            f"asked for {_SITE.name} it raised {error_text(error)}; of a source with data of its own say of which site "
            f"it has them: sites={{{subject.item.entry.name!r}: ...}}"
        ) from error


@CHECKS.add
def batches(subject: Subject) -> None:
    """It gives :class:`saekit.Batch` es of full size with finite rows of every site, and where they are from."""
    import torch

    several = subject.sites or (_SITE, _HEAD)
    sites = several if _has_sites(subject, several) else several[:1]
    with _opened(subject, stream := _stream(subject, sites=sites)) as source:
        must(iter(source) is source, "iter(source) is another object than the source")
        for number, batch in enumerate(islice(source, 12)):
            must(isinstance(batch, Batch), f"batch {number} is a {type(batch).__name__}, expected a saekit.Batch")
            must(set(batch.activations) == set(sites), f"batch {number} has the sites {[*batch.activations]}")
            for site, rows in batch.activations.items():
                expected = [_BATCH, _width(source, stream, site)]
                must(
                    list(rows.shape) == expected,
                    f"batch {number} has rows of shape {list(rows.shape)} at {site.name}, expected {expected}",
                )
                must(rows.isfinite().all(), f"batch {number} has rows that are no finite numbers at {site.name}")
                must(not rows.requires_grad, f"batch {number} has rows that want a gradient")
            for name in ("tokens", "documents", "positions"):
                origin = getattr(batch, name)
                fine = origin is None or (
                    isinstance(origin, torch.Tensor)
                    and list(origin.shape) == [_BATCH]
                    and not origin.is_floating_point()
                )
                must(fine, f"{name} of batch {number} are not {_BATCH} whole numbers, nor None")


def _has_sites(subject: Subject, sites: tuple[Site, ...]) -> bool:
    """Whether it can give the rows of several sites; of a cache, both may not be there."""
    if subject.sites:  # which it has, as its author says
        return True
    try:
        with _opened(subject, sites=sites):
            return True
    except Exception:
        return False


@CHECKS.add
def seeds(subject: Subject) -> None:
    """The same seed gives the same batches, to the last bit."""
    with _opened(subject) as one, _opened(subject) as other:
        must_be_equal("batches of the same seed", _batches(other, 6), _batches(one, 6))


@CHECKS.add
def peek(subject: Subject) -> None:
    """``peek`` shows rows of every site and uses none of them up: the batches are the same with and without it."""
    with _opened(subject) as plain, _opened(subject, stream := _stream(subject)) as peeked:
        site, expected, found = _first(subject), _batches(plain, 6), []
        width = _width(peeked, stream, site)
        for _ in range(3):
            shown = peeked.peek()
            must(isinstance(shown, Mapping) and set(shown) == {site}, f"peek() has the sites {[*shown]}")
            rows = shown[site]
            must(
                rows.ndim == 2 and len(rows) and rows.shape[1] == width,
                f"peek() has rows of shape {list(rows.shape)}, expected [n, {width}]",
            )
            found += _batches(peeked, 2)
        must_be_equal("batches after peek()", found, expected)


@CHECKS.add
def state(subject: Subject) -> None:
    """A state is plain values and tensors; where it was taken, a fresh source goes on with the very next batch."""
    _goes_on(subject, "a state")


@CHECKS.add
def recipe(subject: Subject) -> None:
    """One that says so (``KeepsRecipe``) goes on from a recipe with the very next batch."""
    with _opened(subject) as source:
        if not isinstance(source, KeepsRecipe):
            raise NotTried("it does not say that its states may hold recipes")
        size = source.recipe_size()
    must(
        isinstance(size, tuple) and len(size) == 2 and all(type(n) is int and n >= 0 for n in size),
        f"recipe_size() is {size!r}, expected bytes and forwards",
    )
    _goes_on(subject, "a state with a recipe", keeps_recipe=True)


def _goes_on(subject: Subject, what: str, **options: Any) -> None:
    for taken_after in (0, 1, 7):
        with _opened(subject, **options) as source:
            _batches(source, taken_after)
            saved = _through_files(source.state_dict(), subject.place)
            expected = _batches(source, 6)
        with _opened(subject, **options) as fresh:
            fresh.load_state_dict(saved)
            must_be_equal(f"batches from {what} after {taken_after}", _batches(fresh, 6), expected)
            again = _through_files(fresh.state_dict(), subject.place)
        with _opened(subject, **options) as third:
            third.load_state_dict(again)
            _batches(third, 1)


def _through_files(saved: Mapping[str, Any], place: Path) -> dict[str, Any]:
    folder = Path(tempfile.mkdtemp(dir=place))
    write_state(folder, "state", saved)
    return read_state(folder, "state")


@CHECKS.add
def state_stays(subject: Subject) -> None:
    """A state does not change when the source goes on; one that is loaded into the same source leads back."""
    import copy

    with _opened(subject) as source:
        _batches(source, 2)
        saved = source.state_dict()
        before = copy.deepcopy(saved)
        expected = _batches(source, 4)
        must_be_equal("a state, after the source went on,", saved, before)
        source.load_state_dict(before)
        must_be_equal("batches after the state was loaded again", _batches(source, 4), expected)


@CHECKS.add
def exhaustion(subject: Subject) -> None:
    """Where text is read once, batches end with it, and stay at an end; where it is repeated, they do not."""
    with _opened(subject, stream := _stream(subject, repeat=False)) as source:
        sizes = [len(batch) for batch in islice(source, _MOST)]
        ended = len(sizes) < _MOST
        if ended:
            must(next(source, None) is None, "after its end it gives a batch again")
            short = [size for size in sizes[:-1] if size != _BATCH]
            must(not short, f"before its end it gives batches of {short} rows, expected {_BATCH}")
            must(0 < sizes[-1] <= _BATCH, f"its last batch has {sizes[-1]} rows")
        must(
            ended or stream.position is None,
            f"it reads the text, which is read once, and has given {_MOST} batches of {_BATCH} and no end",
        )
    if not ended:
        raise NotTried("it has no end, and reads no text")
    with _opened(subject, repeat=True) as source:
        more = sum(1 for _ in islice(source, 2 * len(sizes)))
    must(more == 2 * len(sizes), f"where the text is repeated, it ends after {more} batches")


@CHECKS.add
def two_processes(subject: Subject) -> None:
    """Two processes read what one reads: where it says ``shares_rows``, each a part, and no row is lost or read twice;
    else all rows alike, of which each gets a part.  It goes on from its state there, too."""
    must_share(partial(_opened, subject), partial(_stream, subject), _contexts, _plain, subject.place)


@CHECKS.add
def text_is_needed(subject: Subject) -> None:
    """One whose entry says ``needs_text=False`` opens no text."""
    if subject.item.entry.needs_text:
        raise NotTried("its entry says that it needs text")
    opened: list[str] = []

    def no_text() -> Any:
        opened.append("text")
        raise RuntimeError("there is no text")

    try:
        with _opened(subject, _stream(subject, open_contexts=no_text)) as source:
            _batches(source, 3)
            source.peek()
    finally:
        must(not opened, "it opens the text, and its entry says needs_text=False")


class _Lock:
    """Tells whose turn it is."""

    def __init__(self) -> None:
        self._lock, self.owner, self._depth = threading.RLock(), 0, 0

    def acquire(self, *args: Any, **kwargs: Any) -> bool:
        taken = self._lock.acquire(*args, **kwargs)
        if taken:
            self.owner, self._depth = threading.get_ident(), self._depth + 1
        return taken

    def release(self) -> None:
        self._depth -= 1
        self.owner = self.owner if self._depth else 0
        self._lock.release()

    __enter__ = acquire

    def __exit__(self, *_: object) -> None:
        self.release()


@CHECKS.add
def model_lock(subject: Subject) -> None:
    """A thread of its own holds ``stream.model_lock`` for each forward, since evals use the same model."""
    lock, mine, without = _Lock(), threading.get_ident(), []

    class Watched(FakeBackend):
        def run(self, *args: Any, **kwargs: Any) -> Any:
            if threading.get_ident() not in (mine, lock.owner):
                without.append(threading.current_thread().name)
            return super().run(*args, **kwargs)

    with _opened(subject, _stream(subject, backend=Watched(), model_lock=lock)) as source:
        _batches(source, 8)
    must(not without, f"its thread {without[:1]} runs the model without stream.model_lock")


@CHECKS.add
def close(subject: Subject) -> None:
    """``close``, and ``pause`` where there is one, end its threads, once or twice; a pause changes no batch."""
    before = {*threading.enumerate()}
    with _opened(subject) as plain, _opened(subject) as source:
        expected, found = _batches(plain, 6), _batches(source, 3)
        if isinstance(source, Pauses):
            source.pause()
            source.pause()
        must_be_equal("batches after pause()", found + _batches(source, 3), expected)
        source.close()
    _must_end(before)


def _must_end(before: set[threading.Thread]) -> None:
    deadline = time.monotonic() + _PATIENCE
    while (left := {*threading.enumerate()} - before) and time.monotonic() < deadline:
        time.sleep(0.01)
    must(not left, f"after close() there is still the thread {next(iter(left)).name if left else ''}")


@CHECKS.add
def widths(subject: Subject) -> None:
    """Where it states ``widths``, they are those of its batches."""
    with _opened(subject) as source:
        batch: Batch = next(source)
        if not isinstance(source, StatesWidths):
            raise NotTried("it states none")
        stated = dict(source.widths)
        for site, rows in batch.activations.items():
            must(
                stated.get(site) == rows.shape[1],
                f"it states the width {stated.get(site)} of {site.name}, and gives rows of {rows.shape[1]}",
            )


@CHECKS.add
def memory(subject: Subject) -> None:
    """``memory_bytes()`` and ``rows``, where it has them, are whole numbers."""
    with _opened(subject) as source:
        told: dict[str, object] = {"memory_bytes": source.memory_bytes()} if isinstance(source, HasMemory) else {}
        told |= {"rows": source.rows} if isinstance(source, StatesRows) else {}
        for name, value in told.items():
            must(isinstance(value, int) and value >= 0, f"{name} is {value!r}, expected a whole number")


@CHECKS.add
def forwards(subject: Subject) -> None:
    """``source_forwards``, where it has it, is :class:`saekit.abilities.SourceForwards` of one context or more."""
    with _opened(subject) as source:
        if not isinstance(source, StatesForwards):
            raise NotTried("it states none")
        stated = source.source_forwards
        must(not (fault := fault_of_forwards(stated)), f"source_forwards is {stated!r}, {fault}")
