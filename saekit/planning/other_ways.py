"""How fast the run's own backend forwards compiled, or other numbers of contexts at once, for `saekit plan --measure`.

Nothing is switched by it: each of them may round otherwise, and a run does what its configuration says.
"""

from __future__ import annotations

import math
import statistics
import time
import warnings
from collections.abc import Callable, Mapping
from typing import TypeVar

import attrs
import torch
from torch import Tensor

from saekit.abilities import HasMemory, SourceForwards
from saekit.config import TrainConfig
from saekit.devices import synchronize
from saekit.hub import cached_alone
from saekit.plugins.manager import PluginManager
from saekit.protocols import ModelBackend
from saekit.reasons import reason
from saekit.runs.opening import build_backend
from saekit.runs.randomness import seeded
from saekit.runs.timing import duration_text
from saekit.runs.working_memory import free_memory

__all__ = ["SIZES_FACT", "Compared", "compared", "told_of_ways"]

SIZES_FACT = "contexts in a forward"

_Name = TypeVar("_Name")
_SECONDS = 30.0  # for the sizes of a forward, beside the first of each
_ROUNDS = 7
_ALIKE = 1.05  # a gain for which nobody should change a run
_SPREAD = 1.5  # between the rounds of what is not faster, beyond which it may be another time
_UNCLEAR = "the rounds differ by more than the two do, as where other programs are at work; try again when it is quiet"
_ROOM = 2  # as much memory must be free as a larger forward takes


@attrs.frozen
class Compared:
    """How many times as fast as a base, in rounds that took turns with it."""

    ratio: float
    least: float
    most: float
    rounds: int

    @classmethod
    def of(cls, base: list[float], other: list[float]) -> Compared:
        """From seconds of the same work, round by round."""
        ratios = [one / two for one, two in zip(base, other, strict=True)]
        return cls(statistics.median(ratios), min(ratios), max(ratios), len(ratios))

    @property
    def pays(self) -> bool:
        """Whether it is faster, by more than the noise of the rounds."""
        return self.ratio >= _ALIKE and self.least > 1

    @property
    def clear(self) -> bool:
        """Whether the rounds agree on what it is: faster, or not."""
        return self.pays or self.most < _ALIKE or (self.ratio < _ALIKE and self.most < _SPREAD * self.least)

    def __str__(self) -> str:
        noise, rounds = f"{_times(self.least)} to {_times(self.most)} ×", f"in {self.rounds} rounds"
        if not self.clear:
            return f"not clear on this machine: {noise} as fast {rounds}"
        if 1 / _ALIKE < self.ratio < _ALIKE:
            return f"about as fast here ({noise} {rounds})"
        if self.ratio < 1:
            return f"{1 / self.ratio:.2f} × slower here ({noise} as fast {rounds})"
        return f"{self.ratio:.2f} × faster here ({noise} {rounds})"


def _times(factor: float) -> str:
    return f"{factor:.2f}" if factor < 10 else f"{factor:.0f}"


def compared(
    base: _Name, works: Mapping[_Name, Callable[[], float]], seconds: float = _SECONDS
) -> dict[_Name, Compared]:
    """Each of ``works``, which say how much they did, beside the one named ``base``, in turns.

    The first round does not count; after so many ``seconds`` no further round is begun, but for two that count.
    """
    times: dict[_Name, list[float]] = {name: [] for name in works}
    begun = time.perf_counter()
    for number in range(_ROUNDS + 1):
        for name, work in works.items():
            start = time.perf_counter()
            done = work()
            times[name].append((time.perf_counter() - start) / done)
        if number >= 2 and time.perf_counter() - begun > seconds:
            break
    return {name: Compared.of(times[base][1:], found[1:]) for name, found in times.items() if name != base}


def told_of_ways(
    config: TrainConfig,
    plugins: PluginManager,
    backend: ModelBackend,
    tokens: Tensor,
    forward_bytes: float,
    source: SourceForwards,
    *,
    rows: int,
    alone: bool,
) -> dict[str, str]:
    """Facts of forwards of ``tokens [b, t]`` by other ways; a forward of as many contexts as the run's takes so many
    bytes while it lasts.

    ``tokens`` are as many as four of the run's forwards take, or fewer if there are no more; of a context, ``rows``
    are trained on.  Only where the model was loaded ``alone``, by its name, it can be loaded again, to be compiled.
    """
    found = {}
    with warnings.catch_warnings(), cached_alone(), seeded(config.training.seed):
        warnings.simplefilter("ignore")  # of what nobody has chosen
        if source.contexts_option:
            found[SIZES_FACT] = _of_sizes(config, backend, tokens, source, forward_bytes, rows)
        else:
            found[SIZES_FACT] = "not compared: the source does not let them be chosen"
        if not alone:
            found["model.compile"] = "not compared: the model was passed, and a second copy cannot be loaded"
        elif not config.model.compile:
            found["model.compile"] = _of_compiling(config, plugins, backend, tokens[: source.contexts])
    return found


def _forward(config: TrainConfig, backend: ModelBackend, tokens: Tensor) -> Callable[[], float]:
    read = {site.hook_name for site in config.sites.all}

    def forward() -> float:
        held = backend.run(tokens, read=read).held
        synchronize(next(iter(held.values())).device)
        return float(tokens.numel())

    return forward


def _of_sizes(
    config: TrainConfig,
    backend: ModelBackend,
    tokens: Tensor,
    source: SourceForwards,
    forward_bytes: float,
    rows: int,
) -> str:
    """Half as many contexts, twice, and four times as many, where a buffer of the same size takes them."""
    prompts, room = source.contexts, min(free_memory([str(torch.device(backend.device))]).values(), default=math.inf)
    sizes = [size for size in (prompts // 2, prompts, 2 * prompts, 4 * prompts) if 1 <= size <= len(tokens)]
    sizes = [size for size in sizes if size <= prompts or _ROOM * forward_bytes * size / prompts < room]
    held = source.buffered * prompts if source.buffered_option else 0  # contexts in the buffer, where that is chosen
    batch = config.training.train_batch_size_tokens
    sizes = [size for size in sizes if size == prompts or not held or _fits_buffer(held, size, rows, batch)]
    if prompts not in sizes or len(sizes) < 2:
        return f"{prompts} (not compared: the text is too short, or memory or the buffer too small for others)"
    found = compared(prompts, {size: _forward(config, backend, tokens[:size]) for size in sizes})
    texts = [f"{size} {'would be' if one.clear else 'is'} {one}" for size, one in found.items()]
    paying = {size: one for size, one in found.items() if one.pays}
    advice = (
        "the run's is as good as any" if all(one.clear for one in found.values()) else f"keep the run's; {_UNCLEAR}"
    )
    if paying:
        best = max(paying, key=lambda size: paying[size].ratio)
        same = f" and {source.buffered_option}={held // best}, for a buffer of the same size" * bool(held)
        advice = f"write {source.contexts_option}={best}{same}; batches are others then"
    return f"{prompts}; {', '.join(texts)}: {advice}"


def _fits_buffer(held: int, size: int, rows: int, batch: int) -> bool:
    """Whether forwards of ``size`` contexts fill a buffer of ``held``, and a batch is there before the last comes."""
    return held % size == 0 and held // size >= 2 and (held - size) * rows >= batch


def _of_compiling(config: TrainConfig, plugins: PluginManager, backend: ModelBackend, tokens: Tensor) -> str:
    """A second copy of the model, compiled."""
    size = backend.memory_bytes() if isinstance(backend, HasMemory) else 0
    room = min(free_memory([str(torch.device(backend.device))]).values(), default=float("inf"))
    if 3 * size > room:
        return "not tried: there is no memory for a second copy of the model"
    try:
        chosen = attrs.evolve(config, model=attrs.evolve(config.model, compile=True))
        other = build_backend(chosen, plugins, None)
        own, compiled = _forward(config, backend, tokens), _forward(config, other, tokens)
        start = time.perf_counter()
        compiled()
        took = time.perf_counter() - start
        found = compared("own", {"own": own, "compiled": compiled})["compiled"]
        start = time.perf_counter()
        own()
        per_token = (time.perf_counter() - start) / tokens.numel()
    except Exception as error:  # compilers and what they call raise what they like
        return f"cannot be tried here: {reason(error)}"
    if not found.clear:
        return f"{found}, after {duration_text(took)} of compiling: {_UNCLEAR}"
    if not found.pays:
        return f"would be {found}, after {duration_text(took)} of compiling: leave it off"
    saved = per_token * (1 - 1 / found.ratio)
    from_tokens = took / saved
    line = "write model.compile=true" if config.training.total_tokens > from_tokens else "not for this run"
    return (
        f"would be {found}, after {duration_text(took)} of compiling, which pays from {from_tokens:,.0f} tokens on: "
        f"{line}; it rounds otherwise"
    )
