"""What is done around every optimizer's step; a step that is no number changes nothing."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from saekit.abilities import Elementwise, GuardedOptimizer, HasMoments
from saekit.devices import at_hand
from saekit.distributed.group import Group
from saekit.errors import ConfigError, PluginFailedError, StorageError
from saekit.kernels.workspace import SHARED
from saekit.protocols import Optimizer
from saekit.sae.parameters import ParameterTable

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
        clip: float = 1.0,
        table: ParameterTable | None = None,
        features: Group | None = None,
    ) -> None:
        """``clip`` is the largest norm, 0: none; ``table`` says of the parameters what groups are to know of them.

        ``features`` are the processes over which those are split of which the table says so; None: this one has all.
        """
        self._names, self._parameters = zip(*parameters, strict=True)
        # Fused kernels copy what is not contiguous.  A matrix whose transpose is shows the optimizer that instead.
        self._turned = [p.dim() == 2 and p.T.is_contiguous() and not p.is_contiguous() for p in self._parameters]
        self._shown = [
            nn.Parameter(p.detach().T) if turned else p
            for p, turned in zip(self._parameters, self._turned, strict=True)
        ]
        self._clip, self._features = clip, features or Group()
        split = {entry.name for entry in table or () if entry.split is not None}
        self._split = [name in split for name in self._names]
        self._schedule = schedule
        device = self._parameters[0].device
        groups = self._groups(table)
        factors = {id(shown): group["lr_factor"] for group in groups for shown in group["params"]}
        self._inner = build(groups=groups, lr=schedule(0))
        self._check(factors)
        if self._features.size > 1 and not (isinstance(self._inner, Elementwise) and self._inner.elementwise):
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
        self.lr = schedule(0)
        """The rate of the last step."""

    @property
    def failed(self) -> bool:
        """Whether a step was left out because its loss or gradient was not finite.  To look waits for the device."""
        return bool(self._failed)

    @torch.no_grad()
    def step(self, step: int, loss: Tensor | None = None, factor: float = 1.0) -> Tensor:
        """One update from the parameters' ``grad`` times ``factor``, whose memory is given up; returns the norm before
        clipping.

        When the ``loss``, a scalar if it is given, or the norm is not finite, weights and moments stay as they are, in
        this step and in all that follow: see :attr:`failed`.
        """
        self.lr = self._schedule(step)
        self._show_gradients()
        gradients = [p.grad for p in self._shown if p.grad is not None]
        norm = self._total_norm(gradients) if factor == 1 else self._total_norm(gradients) * factor
        sound = norm if loss is None else loss.detach() + norm
        self._failed.logical_or_(sound - sound)  # 0, but nan where there is an infinity or a nan
        if not (self.looks and self.failed):
            self._update(norm, factor)
        for shown in self._shown:
            shown.grad = None
        SHARED.recycle(gradients)
        return norm

    def _total_norm(self, gradients: list[Tensor]) -> Tensor:
        """Of all parameters, those of other processes included."""
        if self._features.size == 1:
            return nn.utils.get_total_norm(gradients)
        parts: list[list[Tensor]] = [[], []]
        for shown, split in zip(self._shown, self._split, strict=True):
            if shown.grad is not None:
                parts[split].append(shown.grad)
        alike, own = (nn.utils.get_total_norm(some).to(self._failed.device).square() for some in parts)
        return (alike + self._features.sum(own)).sqrt()

    def _update(self, norm: Tensor, factor: float) -> None:
        if self._guarded is not None:
            # A kernel divides by this as it reads, which saves a pass; the 1e-6 is torch's, in clipping.
            scale = ((norm + 1e-6) / self._clip).clamp_min(1).float() if self._clip else None
            if factor != 1:
                scale = (torch.ones_like(self._failed) if scale is None else scale) / factor
            self._guarded.grad_scale = scale
        else:
            for shown in self._shown if factor != 1 else ():
                if shown.grad is not None:
                    shown.grad.mul_(factor)
            if self._clip:
                nn.utils.clip_grads_with_norm_(self._shown, self._clip, norm)
        for group in self._inner.param_groups:
            group["lr"] = self.lr * group["lr_factor"]
        self._inner.step()

    # ---- groups

    def _groups(self, table: ParameterTable | None) -> list[dict[str, Any]]:
        """The parameters by the factor of their rate, as :mod:`torch.optim` takes them."""
        factors = {} if table is None else table.lr_factors()
        unit_rows = set() if table is None else {entry.name for entry in table if entry.unit_rows}
        groups: dict[float, dict[str, Any]] = {}
        for name, shown, turned in zip(self._names, self._shown, self._turned, strict=True):
            factor = factors.get(name, 1.0)
            group = groups.setdefault(factor, {"params": [], "names": [], "unit_rows": [], "transposed": []})
            group["lr_factor"] = factor
            for what, value in (("params", shown), ("names", name), ("unit_rows", name in unit_rows)):
                group[what].append(value)
            group["transposed"].append(turned)
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

    def _show_gradients(self) -> None:
        for parameter, shown, turned in zip(self._parameters, self._shown, self._turned, strict=True):
            if turned:
                if shown.data_ptr() != parameter.data_ptr():  # somebody gave the parameter other memory
                    parameter.data = parameter.data.T.contiguous().T
                    shown.data = parameter.detach().T
                shown.grad = None if parameter.grad is None else parameter.grad.T
                parameter.grad = None
            if shown.grad is not None and shown.grad.stride() != shown.stride():
                shown.grad = torch.empty_like(shown).copy_(shown.grad)  # fused kernels go by memory alone

    # ---- state

    def _numbered(self) -> Iterator[tuple[int, str, nn.Parameter, bool]]:
        """Number in the optimizer's own state, name, what is shown, and whether that is turned."""
        numbers = {id(p): n for n, p in enumerate(p for group in self._inner.param_groups for p in group["params"])}
        for name, shown, turned in zip(self._names, self._shown, self._turned, strict=True):
            yield numbers[id(shown)], name, shown, turned

    def state_dict(self) -> dict[str, Any]:
        """What the optimizer keeps, by the name of the parameter; the rate follows from the step.

        Settings of groups that it changed as it went, and whatever else is in its ``state_dict()``, are beside them.
        """
        state = self._inner.state_dict()
        found: dict[str, Any] = {}
        for number, name, shown, turned in self._numbered():
            if number in state["state"]:
                kept = state["state"][number].items()
                found[name] = {key: value.T if turned and _is_like(value, shown) else value for key, value in kept}
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

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where ``state`` was taken; :class:`StorageError` where it is not of these parameters."""
        others = dict(state.get(_REST, {}))
        self._check_saved({name: value for name, value in state.items() if name != _REST})
        numbered = {
            number: {
                # In the order of memory of what the optimizer is shown, which fused kernels walk through.
                key: torch.empty_like(shown).copy_(value.T if turned else value)
                if _is_like(value, shown.T if turned else shown) and value.dim()
                else value
                for key, value in state[name].items()
            }
            for number, name, shown, turned in self._numbered()
            if name in state
        }
        own = self._inner.state_dict()
        changed = others.pop("param_groups", {})
        groups = [{**group, **changed.get(str(number), {})} for number, group in enumerate(own["param_groups"])]
        self._inner.load_state_dict({**own, **others, "param_groups": groups, "state": numbered})

    def _check_saved(self, state: Mapping[str, Any]) -> None:
        if unknown := sorted(set(state) - set(self._names)):
            raise StorageError(f"the saved optimizer has moments of {', '.join(unknown)}, which this SAE does not have")
        if not isinstance(self._inner, HasMoments):
            return
        for name, parameter in zip(self._names, self._parameters, strict=True):
            if name in state and state[name].keys() != set(self._inner.moments):
                raise StorageError(f"the saved optimizer has {', '.join(state[name]) or 'no moments'} of {name}")
            for moment, value in state.get(name, {}).items():
                if value.ndim and value.shape != parameter.shape:
                    raise StorageError(
                        f"the saved {moment} of {name} has shape {list(value.shape)}, expected {list(parameter.shape)}"
                    )


def _is_like(value: object, parameter: Tensor) -> bool:
    return isinstance(value, Tensor) and value.shape == parameter.shape


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) or isinstance(other, Tensor):
        both = isinstance(one, Tensor) and isinstance(other, Tensor)
        return both and one.shape == other.shape and bool((one == other).all())
    return type(one) is type(other) and bool(one == other)
