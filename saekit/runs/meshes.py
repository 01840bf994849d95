"""Going on with more processes than before, or fewer: whether the user has said so, and whether the run can."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from saekit.config import DistributedConfig
from saekit.distributed.launched import Launched, check_mesh
from saekit.errors import ConfigError

if TYPE_CHECKING:
    from saekit.training.loop import Lane

__all__ = ["changed_mesh", "check_takes_over"]


def changed_mesh(
    mesh: tuple[int, int], config: DistributedConfig, launched: Launched, why: dict[str, str]
) -> dict[str, tuple[Any, Any]]:
    """``distributed.data`` as it was and is, where the number of processes and of their data groups is another.

    ``mesh`` is that of the checkpoint, of those that train the same SAEs where SAEs are laid out; how many split
    features is an option, which differs where it is another.  ``why`` is told what the change means.
    :class:`ConfigError` where ``config`` does not fit the processes that were ``launched``.
    """
    before = mesh[0] * mesh[1] * config.saes
    try:
        data, _ = check_mesh(config, launched)
    except ConfigError as error:
        known = f"the checkpoint is of {_processes(before)}, {mesh[0]} × {mesh[1]} (data × features)"
        hint = f"{known}; to go on with {launched.size}: distributed.features=1 --allow distributed"
        raise ConfigError([(path, f"{text}; {hint}") for path, text in error.problems]) from error
    if before == launched.size or mesh[0] == data:
        return {}
    why["distributed.data"] = (
        f"{_processes(before)} wrote the checkpoint, and {_processes(launched.size)} would go on from it, so what is "
        f"left of the text is dealt out anew, and rows may come in another order. To go on as it was, start as many "
        f"({_start(before)})"
    )
    return {"distributed.data": (mesh[0], data)}


def check_takes_over(lanes: Sequence[Lane], mesh: tuple[int, int], processes: int) -> bool:
    """Whether ``processes`` are more than those of ``mesh``, or fewer.

    :class:`ConfigError` where they are, for a source that cannot go on so.
    """
    from saekit.distributed.batches import takes_over

    before = mesh[0] * mesh[1]
    if before == processes:
        return False
    if not all(takes_over(lane.source) for lane in lanes):
        raise ConfigError(
            [("activations.source", f"gives each process rows of its own, and does not say how {_processes(processes)} "
              f"go on where {_processes(before)} were (load_states; see saekit.abilities.TakesStates). Start as many "
              f"as before ({_start(before)})")]
        )  # fmt: skip
    return True


def _processes(number: int) -> str:
    return "one process" if number == 1 else f"{number} processes"


def _start(number: int) -> str:
    return "without torchrun" if number == 1 else f"torchrun --nproc-per-node {number}"
