"""How fast a run's model forwards in other ways of its backend, and through other backends, for `saekit plan`."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from saekit.abilities import ForwardsOtherwise, HasMemory, TranslatesHooks
from saekit.config import TrainConfig
from saekit.devices import synchronize
from saekit.errors import SaekitError
from saekit.hub import cached_alone
from saekit.kinds import MODEL_BACKENDS
from saekit.planning.other_ways import Compared
from saekit.plugins.building import blamed, built, outlined
from saekit.plugins.manager import PluginManager
from saekit.plugins.registry import Registered
from saekit.protocols import ModelBackend
from saekit.runs.randomness import seeded
from saekit.runs.timing import bytes_text
from saekit.runs.working_memory import free_memory
from saekit.site import Site

__all__ = ["told_of_other_forwards", "told_of_others"]

_MOST = 4e9
"""Bytes of weights: of more, no second copy is loaded."""
_ROOM = 3
"""As many times its weights must be free for it."""
_ROUNDS = 4  # the first does not count
_SAME = 1e-3
_SHORT, _LONG = 0.1, 3.0  # seconds of a round at least; and of two, after which one has counted


def told_of_other_forwards(config: TrainConfig, backend: ModelBackend, tokens: Tensor) -> list[str]:
    """For each faster way of the run's own backend to the same numbers: how fast ``tokens [b, t]``, of one of the run's
    forwards, are forwarded so, in turns.  Nothing is told of what fails."""
    if not isinstance(backend, ForwardsOtherwise):
        return []
    texts = []
    for line, way in backend.other_forwards().items():
        try:
            gain = _gain(backend, way, {site: site.hook_name for site in config.sites.all}, tokens)
        except Exception:  # of a library, or too little memory
            continue
        if gain is not None and gain.pays:
            texts.append(f"{gain.ratio:.2f} × faster here, the same but for rounding: write {line}")
    return texts


def _gain(
    backend: ModelBackend, way: Callable[[], AbstractContextManager[None]], hooks: Mapping[Site, str], tokens: Tensor
) -> Compared | None:
    """How many times as fast it is; None where it comes to something else."""
    times: tuple[list[float], list[float]] = ([], [])
    forwards, held = 1, list[dict[Site, Tensor]]()
    for number in range(_ROUNDS):
        for seconds, entered in zip(times, (nullcontext, way), strict=True):
            with entered():
                start = time.perf_counter()
                for _ in range(forwards):
                    found = backend.run(tokens, read={*hooks.values()}).held
                    synchronize(next(iter(found.values())).device)
                seconds.append((time.perf_counter() - start) / forwards)
            if number == 0:
                held.append({site: found[hook] for site, hook in hooks.items()})
        if number == 0 and not _same(*held):
            return None
        forwards = max(int(_SHORT / times[0][0]), 1)  # of small models several, so that noise is less of a round
        if number and sum(times[0][:2]) > _LONG:
            break
    return Compared.of(*(seconds[1:] for seconds in times))


def told_of_others(config: TrainConfig, plugins: PluginManager, backend: ModelBackend, tokens: Tensor) -> list[str]:
    """For each other backend that loads the model and has its sites: how fast ``tokens [b, t]`` are forwarded there.

    It is built with its default options of what is on this machine, a folder or the Hub's cache, while the run's own
    stays, for a few forwards of both in turns.
    """
    if config.model.compile:
        return []
    texts = []
    # Libraries draw weights before they read them, and a plan leaves random numbers as they were.
    with warnings.catch_warnings(), cached_alone(), seeded(config.training.seed):
        warnings.simplefilter("ignore")  # of a backend that nobody has chosen
        for item, hooks, size in _others(config, plugins, backend):
            try:
                other = built(item, None, model=config.model, loaded=None)
                with blamed(item, "a forward"):
                    texts.append(_compared(item.entry.name, backend, other, config.sites.all, hooks, tokens, size))
            except (SaekitError, ImportError):
                continue
            finally:
                other = None
    return texts


def _others(
    config: TrainConfig, plugins: PluginManager, backend: ModelBackend
) -> Iterator[tuple[Registered, Mapping[Site, str], float]]:
    """The backends that can load the model, with their hooks for the sites and the bytes of its weights.

    What they cannot do, they say without the weights.
    """
    chosen = plugins.find(MODEL_BACKENDS, config.model.backend)
    room = min(free_memory([backend.device]).values(), default=0.0)
    for item in plugins.registry(MODEL_BACKENDS).items:
        entry = item.entry
        if entry.build == chosen.entry.build or entry.no_model or not entry.timed or item.missing():
            continue
        try:
            options = entry.config()
            if entry.precheck is not None:
                with blamed(item, "precheck"):
                    entry.precheck(options, config)
            outline = outlined(item, options, model=config.model)
            if not isinstance(outline, TranslatesHooks) or not isinstance(outline, HasMemory):
                continue
            with blamed(item, "hook_like"):
                hooks = {site: outline.hook_like(site.hook_name) for site in config.sites.all}
                size = outline.memory_bytes()
        except (SaekitError, ImportError, TypeError):  # options without defaults are a TypeError
            continue
        known = {site: hook for site, hook in hooks.items() if hook is not None}
        if len(known) == len(hooks) and size <= _MOST and _ROOM * size <= room:
            yield item, known, size


def _compared(
    name: str,
    backend: ModelBackend,
    other: ModelBackend,
    sites: Sequence[Site],
    hooks: Mapping[Site, str],
    tokens: Tensor,
    size: float,
) -> str:
    """One line of the other one."""
    own = {site: site.hook_name for site in sites}
    times: tuple[list[float], list[float]] = ([], [])
    held: list[dict[Site, Tensor]] = [{}, {}]
    for _ in range(_ROUNDS):
        for index, (one, names) in enumerate(((backend, own), (other, hooks))):
            start = time.perf_counter()
            found = one.run(tokens, read={*names.values()}).held
            synchronize(next(iter(found.values())).device)
            times[index].append(time.perf_counter() - start)
            held[index] = {site: found[hook] for site, hook in names.items()}
    here, there = (seconds[1:] for seconds in times)
    faster, slower = Compared.of(here, there), Compared.of(there, here)
    speed = "would forward as fast here"
    for gain, word in ((faster, "faster"), (slower, "slower")):
        if gain.pays:  # beyond the noise
            speed = f"would forward {gain.ratio:.2f} × {word} here"
    alike = _same(held[0], held[1])
    differ = "" if alike else "; what they hold there is not the same"
    return (
        f"{name} {speed} (hooks {', '.join(dict.fromkeys(hooks.values()))}{differ}; a second copy of the model, "
        f"{bytes_text(size)}, was loaded to see)" + (_lines(name, hooks, alike) if faster.pays else "")
    )


def _lines(name: str, hooks: Mapping[Site, str], alike: bool) -> str:
    """What to write for it, where that is short."""
    write = ": write" if alike else ": for SAEs of those write"
    if len(hooks) > 1:
        return f"{write} model.backend={name}, and its hooks"
    return f"{write} model.backend={name} and site.hook_name={next(iter(hooks.values()))}"


def _same(own: Mapping[Site, Tensor], others: Mapping[Site, Tensor]) -> bool:
    """Whether both hold the same numbers but for rounding; heads may be flattened."""
    pairs: list[tuple[Any, Any]] = [(own[site].flatten(2).float(), others[site].flatten(2).float()) for site in own]
    return all(
        one.shape == two.shape and bool((one - two).abs().max() <= _SAME * torch.max(one.abs().max(), two.abs().max()))
        for one, two in pairs
    )
