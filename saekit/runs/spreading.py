"""What of a run is spread over processes, and what does not work so: it is said before anything runs."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from saekit.abilities import SharesContexts
from saekit.config import TrainConfig
from saekit.config.files import plain_config
from saekit.distributed.launched import check_layout
from saekit.distributed.world import World
from saekit.errors import ConfigError
from saekit.plugins.manager import PluginManager
from saekit.protocols import Eval
from saekit.runs.checkpoints import versions
from saekit.runs.record import flat
from saekit.sae.module import SAEModule
from saekit.sae.splitting import check_spread, infers_by_parts, keep_part, spread_of

__all__ = ["check_alike", "check_same_rows", "check_spreads", "doubts_of_measuring", "sharing", "spread"]

_Eval = TypeVar("_Eval", bound=Eval)


def check_spreads(configs: Sequence[TrainConfig], world: World) -> None:
    """:class:`ConfigError` for what a run of several processes cannot do."""
    if world.saes.size > 1:
        check_layout(configs[0].distributed, len(configs))
    size = world.column.size
    for config in configs:
        if (rows := config.training.train_batch_size_tokens) % size:
            raise ConfigError(
                [("training.train_batch_size_tokens", f"is {rows:,}, which {size} processes cannot share "
                  "evenly; choose a multiple of their number")]
            )  # fmt: skip
        for option, device in (("training.device", config.training.device), ("model.device", config.model.device)):
            if world.size > 1 and device.startswith("cuda:"):
                raise ConfigError(
                    [(option, f"is {device!r}, one GPU for all processes of a machine; set it to 'cuda', and each "
                      "takes its own")]
                )  # fmt: skip


def check_alike(world: World, configs: Sequence[TrainConfig], plugins: PluginManager, place: str = "") -> None:
    """:class:`ConfigError` in every process of a run, where one has another configuration, version or plugin.

    ``place`` is the checkpoint that it goes on from.
    """
    if world.size == 1:
        return
    options = [flat(plain_config(config, plugins)) for config in configs]
    known = (item for registry in plugins.registries.values() for item in registry.items)
    told: dict[str, dict[Any, Any]] = {
        "option": options[0] if len(options) == 1 else dict(enumerate(options)),
        "version": versions(),
        "code": {"saekit": _code()},
        "plugin": {f"{item.kind.name} {item.key}": item.version for item in known},
        "checkpoint": {"to go on from": place},
    }
    _check_told(world, told, "Start all by the same command, in the same environment")


def check_same_rows(world: World, identity: Mapping[str, Any]) -> None:
    """:class:`ConfigError` in every process of a run, where one has another model or text under the same name.

    ``identity`` is that of the session of this process.
    """
    _check_told(world, {"model or text": identity}, "Give all the same files")


def _check_told(world: World, told: Mapping[str, Mapping[Any, Any]], todo: str) -> None:
    every = world.all.objects(told)
    for what, number in ((what, number) for what in told for number in range(world.size)):
        first, other = every[0][what], every[number][what]
        odd = [name for name in {**first, **other} if first.get(name) != other.get(name)]
        if odd:
            values = ", ".join(_differing(name, other, first) for name in odd[:3])
            raise ConfigError(
                f"the processes of a run must be alike, and process {number} has another {what} than process 0: "
                f"{values}. {todo}"
            )


def _differing(name: str, other: Mapping[Any, Any], first: Mapping[Any, Any]) -> str:
    for which, one, more in (("it", first, other), ("process 0", other, first)):
        if name in one and name not in more:
            return f"{which} has no {name}, which is {one[name]!r} in the other"
    return f"{name} is {other[name]!r}, not {first[name]!r}"


@functools.cache  # it is what this process has imported, whatever becomes of the files
def _code() -> str:
    """A checksum of saekit's own code, which may have been changed without another version."""
    package, summed = Path(__file__).parents[1], hashlib.blake2b(digest_size=6)
    for path in sorted(package.rglob("*.py")):
        summed.update(path.relative_to(package).as_posix().encode() + path.read_bytes())
    return summed.hexdigest()


def spread(sae: SAEModule, world: World) -> None:
    """Have ``sae`` train on the processes of ``world``, with this one's part of its features.

    :class:`ConfigError` for an architecture that does not work so.
    """
    if world.size == 1:
        return
    check_spread(sae, world.data.size, world.features.size)
    sae.spread = spread_of(world.data.size, world.features.size)
    if world.features.size > 1:
        keep_part(sae, world.features)


def sharing(evals: Mapping[str, _Eval]) -> dict[str, _Eval]:
    """Those of ``evals`` whose contexts are dealt out over processes."""
    return {name: made for name, made in evals.items() if isinstance(made, SharesContexts) and made.shares_contexts}


def doubts_of_measuring(sae: SAEModule, evals: Mapping[str, Eval]) -> Iterator[str]:
    """Why evals need all features of ``sae`` in one process, where they are split over several; in words."""
    if sae.share.parts == 1 or not evals:
        return
    if not infers_by_parts(sae):
        yield (
            f"the SAE is put together in the memory of each process whenever it is measured: {type(sae).__name__} does "
            "not say that its parts can be (\"inference\" in spreads_over, see 'Writing plugins')"
        )
    elif apart := [name for name in evals if name not in sharing(evals)]:
        yield (
            f"the SAE is put together in the memory of each process whenever {' and '.join(apart)} measures it, which "
            "the first process does alone: it does not say that its contexts can be dealt out (shares_contexts, see "
            "'Writing plugins')"
        )
