"""Adam with clipping, in as few passes as torch offers; a step that is no number changes nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from saekit.config import OptimizerConfig
from saekit.devices import KERNEL_DEVICES
from saekit.errors import StorageError
from saekit.kernels.workspace import SHARED

__all__ = ["Optimizer"]

_MOMENTS = {"step", "exp_avg", "exp_avg_sq"}  # of torch's Adam


class Optimizer:
    """Clips the gradient's total norm and takes a fused Adam step at the scheduled rate.

    Parameters without a gradient are left alone.
    """

    def __init__(
        self,
        parameters: Iterable[tuple[str, nn.Parameter]],
        config: OptimizerConfig,
        schedule: Callable[[int], float],
        lr_factors: Mapping[str, float] | None = None,
    ) -> None:
        """``lr_factors`` multiply the rate of the parameters that they name."""
        self._names, self._parameters = zip(*parameters, strict=True)
        # Torch's fused kernel copies what is not contiguous.  A matrix whose transpose is shows Adam that instead.
        self._turned = [p.dim() == 2 and p.T.is_contiguous() and not p.is_contiguous() for p in self._parameters]
        self._shown = [
            nn.Parameter(p.detach().T) if turned else p
            for p, turned in zip(self._parameters, self._turned, strict=True)
        ]
        self._clip = config.clip_grad_norm
        self._schedule = schedule
        betas = (float(config.beta1 or 0), float(config.beta2))
        device = self._parameters[0].device
        # In float64 runs are compared to the last digits, and torch's plain loop has the order of operations of others.
        self._fused = device.type in KERNEL_DEVICES and all(p.dtype != torch.float64 for p in self._parameters)
        self.looks = device.type == "cpu" or not self._fused
        """Whether every step looks if loss and gradient are numbers, because it costs nothing or must be."""
        self._failed = torch.zeros((), dtype=torch.float32, device=device)  # as Adam's kernel wants it
        self._groups = self._by_factor(lr_factors or {})
        groups = [{"params": [self._shown[index] for index in part]} for part in self._groups.values()]
        self._adam = torch.optim.Adam(groups, lr=schedule(0), betas=betas, eps=config.eps, fused=self._fused)
        if not self.looks:
            self._adam.found_inf = self._failed  # type: ignore[attr-defined]  # its kernel looks at it on the device
        self.lr = schedule(0)
        """The rate of the last step."""

    @property
    def failed(self) -> bool:
        """Whether a step was left out because its loss or gradient was not finite.  To look waits for the device."""
        return bool(self._failed)

    @torch.no_grad()
    def step(self, step: int, loss: Tensor | None = None) -> Tensor:
        """One update from the parameters' ``grad``, whose memory is given up; returns the norm before clipping.

        When the ``loss``, a scalar if it is given, or the norm is not finite, weights and moments stay as they are, in
        this step and in all that follow: see :attr:`failed`.
        """
        self.lr = self._schedule(step)
        self._show_gradients()
        gradients = [p.grad for p in self._shown if p.grad is not None]
        norm = nn.utils.get_total_norm(gradients)
        sound = norm if loss is None else loss.detach() + norm
        self._failed.logical_or_(sound - sound)  # 0, but nan where there is an infinity or a nan
        if not (self.looks and self.failed):
            self._update(norm)
        self._adam.zero_grad(set_to_none=True)
        SHARED.recycle(gradients)
        return norm

    def _update(self, norm: Tensor) -> None:
        if self._clip and self._fused:
            # Adam's own kernel divides by this as it reads, which saves a pass; the 1e-6 is torch's, in clipping.
            self._adam.grad_scale = ((norm + 1e-6) / self._clip).clamp_min(1).float()  # type: ignore[attr-defined]
        elif self._clip:
            nn.utils.clip_grads_with_norm_(self._shown, self._clip, norm)
        for factor, group in zip(self._groups, self._adam.param_groups, strict=True):
            group["lr"] = self.lr * factor
        self._adam.step()

    def _by_factor(self, factors: Mapping[str, float]) -> dict[float, list[int]]:
        """The numbers of the parameters by the factor of their rate."""
        groups: dict[float, list[int]] = {}
        for index, name in enumerate(self._names):
            groups.setdefault(factors.get(name, 1.0), []).append(index)
        return groups

    def _show_gradients(self) -> None:
        for parameter, shown, turned in zip(self._parameters, self._shown, self._turned, strict=True):
            if turned:
                if shown.data_ptr() != parameter.data_ptr():  # somebody gave the parameter other memory
                    parameter.data = parameter.data.T.contiguous().T
                    shown.data = parameter.detach().T
                shown.grad = None if parameter.grad is None else parameter.grad.T
                parameter.grad = None
            if shown.grad is not None and shown.grad.stride() != shown.stride():
                shown.grad = torch.empty_like(shown).copy_(shown.grad)  # the fused kernel goes by memory alone

    def state_dict(self) -> dict[str, Any]:
        """Adam's moments by the name of the parameter; the rate follows from the step."""
        found = {}
        for name, shown, turned in zip(self._names, self._shown, self._turned, strict=True):
            if shown in self._adam.state:
                moments = self._adam.state[shown].items()
                found[name] = {moment: value.T if turned and value.dim() == 2 else value for moment, value in moments}
        return found

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where ``state`` was taken."""
        if unknown := sorted(set(state) - set(self._names)):
            raise StorageError(f"the saved optimizer has moments of {', '.join(unknown)}, which this SAE does not have")
        for name, parameter in zip(self._names, self._parameters, strict=True):
            if name in state and state[name].keys() != _MOMENTS:
                raise StorageError(f"the saved optimizer has {', '.join(state[name]) or 'no moments'} of {name}")
            for moment, value in state.get(name, {}).items():
                if value.ndim and value.shape != parameter.shape:
                    raise StorageError(
                        f"the saved {moment} of {name} has shape {list(value.shape)}, expected {list(parameter.shape)}"
                    )
        order = [index for part in self._groups.values() for index in part]  # as Adam numbers them
        numbered = {
            order.index(index): {
                # In the order of memory of what Adam is shown, which the fused kernel walks through.
                moment: torch.empty_like(shown).copy_(value.T if turned else value) if value.dim() else value
                for moment, value in state[name].items()
            }
            for index, (name, shown, turned) in enumerate(zip(self._names, self._shown, self._turned, strict=True))
            if name in state
        }
        self._adam.load_state_dict({**self._adam.state_dict(), "state": numbered})
