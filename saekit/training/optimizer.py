"""What is done around every optimizer's step; a step that is no number changes nothing."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from saekit.abilities import Elementwise, GuardedOptimizer, HasMoments
from saekit.devices import at_hand
from saekit.distributed.group import Group
from saekit.errors import ConfigError, PluginFailedError, StorageError
from saekit.kernels.workspace import LARGE, SHARED
from saekit.plugins.building import blamed, origin_of
from saekit.protocols import Optimizer
from saekit.sae.parameters import ParameterTable
from saekit.training.shown import Shown

__all__ = ["BuildOptimizer", "ScheduledOptimizer"]

BuildOptimizer: TypeAlias = Callable[..., Optimizer]
"""``build(groups=..., lr=...)``: see the hook ``saekit_register_optimizers``."""

_REST = "(others)"
"""Beside the names of parameters in a saved state: what else an optimizer keeps.  No parameter can be called so."""
_OURS = ("params", "lr")  # of a group's settings; they are those of the run that goes on


class ScheduledOptimizer:
    """Clips the gradient's total norm and lets an optimizer take a step at the scheduled rate.

    Parameters without a gradient are left alone.
    """

    def __init__(
        self,
        parameters: Iterable[tuple[str, nn.Parameter]],
        build: BuildOptimizer,
        schedule: Callable[[int], float],
        *,
        lr: float | None = None,
        clip: float = 1.0,
        table: ParameterTable | None = None,
        features: Group | None = None,
        rows: Group | None = None,
        large: int | None = None,
    ) -> None:
        """``lr`` is the rate of step 0; None: the schedule is asked.  ``clip`` is the largest norm, 0: none; ``table``
        says of the parameters what groups are to know of them.

        ``features`` are the processes over which those are split of which the table says so, and ``rows`` those that
        have the same: of an optimizer that updates each number by itself, each updates a part of what is ``large``:
        see :class:`Shown`.  None: this one has all, and updates all.
        """
        self._clip, self._features, self._rows = clip, features or Group(), rows or Group()
        self._schedule, self._large, given = schedule, large, [*parameters]
        device = given[0][1].device
        self.lr = schedule(0) if lr is None else lr
        """The rate of the last step."""
        self._build(given, build, table, self._rows)
        if not self.elementwise and any(shown.parted for shown in self._shown):
            self._build(given, build, table, Group())
        self._divides_seen = self._features.size == 1 and not self.parted
        if self._features.size > 1 and not self.elementwise:
            raise ConfigError(
                [("optimizer", f"is {type(self._inner).__name__}, which does not say that it updates each number by "
                  "itself (elementwise), so the parameters cannot be split over processes; set distributed.features "
                  "to 1")]
            )  # fmt: skip
        self._first = [self._settings(group) for group in self._inner.param_groups]
        self._guarded = self._inner if isinstance(self._inner, GuardedOptimizer) else None
        self.looks = at_hand(device) or self._guarded is None
        """Whether every step looks if loss and gradient are numbers, because it costs nothing or must be."""
        self._failed = torch.zeros((), dtype=torch.float32, device=device)  # as fused kernels want it
        if self._guarded is not None and not self.looks:
            self._guarded.found_inf = self._failed

    def _build(
        self,
        parameters: Sequence[tuple[str, nn.Parameter]],
        build: BuildOptimizer,
        table: ParameterTable | None,
        rows: Group,
    ) -> None:
        entries = {entry.name: entry for entry in table or ()}
        self._shown = [Shown(name, parameter, entries.get(name), rows, self._large) for name, parameter in parameters]
        groups = self._groups(table)
        factors = {id(own): group["lr_factor"] for group in groups for own in group["params"]}
        self._inner = build(groups=groups, lr=self.lr)
        self._check(factors)

    @property
    def elementwise(self) -> bool:
        """Whether it says that it updates each number by itself."""
        return isinstance(self._inner, Elementwise) and self._inner.elementwise

    @property
    def parted(self) -> Mapping[nn.Parameter, Shown]:
        """The parameters of which other processes update other parts."""
        return {shown.parameter: shown for shown in self._shown if shown.parted}

    @property
    def failed(self) -> bool:
        """Whether a step was left out because its loss or gradient was not finite.  To look waits for the device."""
        return bool(self._failed)

    @torch.no_grad()
    def step(self, step: int, loss: Tensor | None = None, factor: float = 1.0) -> Tensor:
        """One update from the parameters' ``grad`` times ``factor``, whose memory is given up; returns the norm before
        clipping.  Of :attr:`parted` ones, own parts of gradients are those of all processes, and all have the whole
        afterwards.

        When the ``loss``, a scalar if it is given, or the norm is not finite, weights and moments stay as they are, in
        this step and in all that follow: see :attr:`failed`.
        """
        self.lr = self._schedule(step)
        memory = [shown.show_gradient() for shown in self._shown]
        norm = self._total_norm() if factor == 1 else self._total_norm() * factor
        sound = norm if loss is None else loss.detach() + norm
        self._failed.logical_or_(sound - sound)  # 0, but nan where there is an infinity or a nan
        if not (self.looks and self.failed):
            self._update(norm, factor)
            if not self._divides_seen:  # rather than with the first checkpoint
                self._divides_seen = True
                self._check_divides()
            for shown in self._shown:
                shown.spread()
        for shown in self._shown:
            shown.own.grad = None
        if large := [gradient for gradient in memory if gradient is not None and gradient.numel() >= LARGE]:
            kept = {tensor.untyped_storage().data_ptr() for tensor in _tensors(getattr(self._inner, "__dict__", {}))}
            SHARED.recycle(gradient for gradient in large if gradient.untyped_storage().data_ptr() not in kept)
        return norm

    def _total_norm(self) -> Tensor:
        """Of all parameters, those of other processes included."""
        found = [(shown.split + shown.parted, shown.own.grad) for shown in self._shown if shown.own.grad is not None]
        parted = any(shown.parted for shown in self._shown)
        if self._features.size == 1 and not parted:
            return nn.utils.get_total_norm([gradient for _, gradient in found])
        kinds = ([gradient for kind, gradient in found if kind == parts] for parts in range(3))
        # Of none, torch makes a zero on the CPU, for whose copy one would wait.
        alike, split, own = (
            nn.utils.get_total_norm(some).square() if some else torch.zeros_like(self._failed) for some in kinds
        )
        if parted:
            split = split + self._rows.sum(own)  # what is in parts is split
        return (alike + self._features.sum(split)).sqrt()

    def _update(self, norm: Tensor, factor: float) -> None:
        if self._guarded is not None:
            # A kernel divides by this as it reads, which saves a pass; the 1e-6 is torch's, in clipping.
            scale = ((norm + 1e-6) / self._clip).clamp_min(1).float() if self._clip else None
            if factor != 1:
                scale = (torch.ones_like(self._failed) if scale is None else scale) / factor
            self._guarded.grad_scale = scale
        else:
            for own in (one.own for one in self._shown if factor != 1):
                if own.grad is not None:
                    own.grad.mul_(factor)
            if self._clip:
                nn.utils.clip_grads_with_norm_([shown.own for shown in self._shown], self._clip, norm)
        for group in self._inner.param_groups:
            group["lr"] = self.lr * group["lr_factor"]
        with self._blamed("step"):
            self._inner.step()

    def _blamed(self, doing: str) -> AbstractContextManager[None]:
        """Says whose it is what fails in the optimizer, where that is a plugin's."""
        item = origin_of(self._inner)
        return nullcontext() if item is None else blamed(item, doing, at_work=True)

    # ---- groups

    def _groups(self, table: ParameterTable | None) -> list[dict[str, Any]]:
        """The parameters by the factor of their rate, as :mod:`torch.optim` takes them."""
        factors = {} if table is None else table.lr_factors()
        unit_rows = set() if table is None else {entry.name for entry in table if entry.unit_rows}
        groups: dict[float, dict[str, Any]] = {}
        for shown in self._shown:
            name, factor = shown.name, factors.get(shown.name, 1.0)
            group = groups.setdefault(factor, {"params": [], "names": [], "unit_rows": [], "transposed": []})
            group["lr_factor"] = factor
            for what, value in (("params", shown.own), ("names", name), ("unit_rows", name in unit_rows)):
                group[what].append(value)
            group["transposed"].append(shown.turned)
        return list(groups.values())

    def _check(self, factors: Mapping[int, float]) -> None:
        """:class:`PluginFailedError` unless the optimizer has every parameter once, with the factor of its rate."""
        found = [(id(p), group.get("lr_factor")) for group in self._inner.param_groups for p in group["params"]]
        if len(found) != len(factors) or dict(found) != factors:
            raise PluginFailedError(
                f"{type(self._inner).__name__} has not the parameters that it was given in its param_groups, each once "
                "and with the lr_factor of its group; where it makes groups of its own, it must copy that"
            )

    @staticmethod
    def _settings(group: Mapping[str, Any]) -> dict[str, Any]:
        return {name: copy.deepcopy(value) for name, value in group.items() if name not in _OURS}

    # ---- state

    def _numbered(self) -> Iterator[tuple[int, Shown]]:
        """Each with its number in the optimizer's own state."""
        numbers = {id(p): n for n, p in enumerate(p for group in self._inner.param_groups for p in group["params"])}
        return ((numbers[id(shown.own)], shown) for shown in self._shown)

    def state_dict(self) -> dict[str, Any]:
        """What the optimizer keeps, by the name of the parameter, of :attr:`parted` ones of the own part; the rate
        follows from the step.

        Settings of groups that it changed as it went, and whatever else is in its ``state_dict()``, are beside them.
        """
        state = self._check_divides()
        found: dict[str, Any] = {}
        for number, shown in self._numbered():
            if number in state["state"]:
                found[shown.name] = {key: shown.kept(value) for key, value in state["state"][number].items()}
        others = {key: value for key, value in state.items() if key not in ("state", "param_groups")}
        changed = {
            str(number): {key: value for key, value in settings.items() if not _same(value, first.get(key))}
            for number, (settings, first) in enumerate(
                zip(map(self._settings, self._inner.param_groups), self._first, strict=True)
            )
        }
        if changed := {number: settings for number, settings in changed.items() if settings}:
            others["param_groups"] = changed
        return {**found, _REST: others} if others else found

    def _check_divides(self) -> dict[str, Any]:
        """The optimizer's own state; :class:`PluginFailedError` where it keeps of parts what makes no whole."""
        with self._blamed("state_dict"):
            state = self._inner.state_dict()
        for number, shown in self._numbered():
            if not (shown.parted or (shown.split and self._features.size > 1)):
                continue
            for key, value in state["state"].get(number, {}).items():
                if not shown.divides(value):
                    found = f"shape {list(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
                    raise PluginFailedError(
                        f"{type(self._inner).__name__} says that it updates each number by itself (elementwise), and "
                        f"keeps {key} of {shown.name} as {found}, which cannot be divided over processes: expected "
                        f"shape {list(shown.own.shape)}, or one number. Keep it so, or do not say elementwise"
                    )
        return state

    def parted_state(self) -> dict[str, Any]:
        """Of :meth:`state_dict`, what other processes do not have."""
        parted, state = {shown.name for shown in self._shown if shown.parted}, self.state_dict()
        return {name: kept for name, kept in state.items() if name in parted}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where ``state`` was taken, which has all of each parameter; :class:`StorageError` where it is of
        others."""
        others = dict(state.get(_REST, {}))
        self._check_saved({name: value for name, value in state.items() if name != _REST})
        numbered = {
            number: {
                # In the order of memory of what the optimizer is shown, which fused kernels walk through.
                key: torch.empty_like(shown.own).copy_(shown.of(value))
                if _is_like(value, shown.parameter) and value.dim()
                else value
                for key, value in state[shown.name].items()
            }
            for number, shown in self._numbered()
            if shown.name in state
        }
        with self._blamed("state_dict"):
            own = self._inner.state_dict()
        changed = others.pop("param_groups", {})
        groups = [{**group, **changed.get(str(number), {})} for number, group in enumerate(own["param_groups"])]
        with self._blamed("load_state_dict"):
            self._inner.load_state_dict({**own, **others, "param_groups": groups, "state": numbered})

    def _check_saved(self, state: Mapping[str, Any]) -> None:
        if unknown := sorted(set(state) - {shown.name for shown in self._shown}):
            raise StorageError(f"the saved optimizer has moments of {', '.join(unknown)}, which this SAE does not have")
        if not isinstance(self._inner, HasMoments):
            return
        for name, parameter in ((shown.name, shown.parameter) for shown in self._shown):
            if name in state and state[name].keys() != set(self._inner.moments):
                raise StorageError(f"the saved optimizer has {', '.join(state[name]) or 'no moments'} of {name}")
            for moment, value in state.get(name, {}).items():
                if value.ndim and value.shape != parameter.shape:
                    raise StorageError(
                        f"the saved {moment} of {name} has shape {list(value.shape)}, expected {list(parameter.shape)}"
                    )


def _tensors(value: object, seen: set[int] | None = None) -> Iterator[Tensor]:
    """Those in ``value``, in whatever optimizers, dictionaries, lists and tuples."""
    seen = set() if seen is None else seen
    if isinstance(value, Tensor):
        yield value
    elif id(value) not in seen:
        seen.add(id(value))
        if isinstance(value, torch.optim.Optimizer):
            value = vars(value)
        if isinstance(value, (Mapping, list, tuple)):
            for each in value.values() if isinstance(value, Mapping) else value:
                yield from _tensors(each, seen)


def _is_like(value: object, parameter: Tensor) -> bool:
    return isinstance(value, Tensor) and value.shape == parameter.shape


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) or isinstance(other, Tensor):
        both = isinstance(one, Tensor) and isinstance(other, Tensor)
        return both and one.shape == other.shape and bool((one == other).all())
    return type(one) is type(other) and bool(one == other)
