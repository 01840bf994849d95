"""A fast way to train and to use an architecture, as an object: it says what it refuses, and does the rest.

An architecture lists those that it may use (:attr:`saekit.SAE.step_kernels`); the first that does not refuse is taken,
and where all do, autograd is.
"""

from __future__ import annotations

import contextlib
import pickle
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar, Generic, Literal, TypeVar

import attrs
import torch
from torch import Tensor

from saekit.devices import KERNEL_DEVICES
from saekit.kernels.encoder import Encoder
from saekit.kernels.features import Features
from saekit.kernels.inference import Decoder
from saekit.kernels.int8 import MOST_INPUTS
from saekit.kernels.screen import why_no_screen
from saekit.kernels.workspace import Workspace
from saekit.values import StepInput, StepOutput

__all__ = ["Served", "SparseKernel", "StepKernel", "Use", "choose", "kernels_of"]

S = TypeVar("S")


@attrs.frozen(kw_only=True)
class Use:
    """What a kernel is asked to serve."""

    training: bool
    """A training step; else inference, for which nobody wants a gradient."""
    device: torch.device
    dtype: torch.dtype
    """That of the weights."""
    asked: Literal["auto", "fast", "int8", "reference"] = "auto"
    """``training.kernels``."""
    autocast: bool = False
    """The caller wants products rounded by torch's autocast."""
    compiled: bool = False
    """The loss is compiled, or what is done is traced."""
    learning: frozenset[str] = frozenset()
    """The parameters that want a gradient."""
    spread: frozenset[str] = frozenset()
    """What is split over processes: ``data``, ``features``."""


class StepKernel(Generic[S]):
    """For dictionaries of the class ``S``.  It has no state: one object serves all."""

    name: ClassVar[str] = "fast kernels"
    devices: frozenset[str] = frozenset(KERNEL_DEVICES)
    """The types of device that it is for; elsewhere one from a plugin is as if it were not there."""
    spreads_over: ClassVar[frozenset[str]] = frozenset()
    """What may be split over processes, and its steps are still those of one process: ``data``, ``features``.  Each
    class says so for itself."""

    leaves_weights: ClassVar[bool] = False
    """Whether its steps end with :meth:`FastStep.finish`, and neither read nor change the gradients of ``W_enc`` and
    ``W_dec`` that it writes, so that processes which share a batch may make them afterwards, each of its part of the
    features.  Each class says so for itself."""

    def refuses(self, sae: S, use: Use) -> str | None:
        """Why it cannot serve this architecture with its options, this device, type and so on; None: it can."""
        raise NotImplementedError

    def leaves(self, sae: S, x: Tensor, step: StepInput) -> bool:
        """Whether it leaves this one step, among those that it does not refuse, to autograd."""
        return False

    def step(self, sae: S, x: Tensor, step: StepInput, workspace: Workspace) -> StepOutput:
        """A training step on ``x [n, d_in]``: what :meth:`saekit.SAE.losses` reports, with its gradients in the
        parameters' ``grad``, which are None before.  Without autograd."""
        raise NotImplementedError

    def groups(self, sae: S, rows: Tensor, workspace: Workspace) -> Iterator[tuple[int, Features]]:
        """The features of ``rows [n, d_in]`` for inference, group by group with its first row; each is used up before
        the next is asked for."""
        raise NotImplementedError

    def decoder(self, sae: S) -> Decoder:
        """What makes outputs of features."""
        raise NotImplementedError

    def remark(self, sae: S) -> str:
        """How it works here, in words; shown beside its name."""
        return ""

    def beside(self, sae: S, rows: int) -> int:
        """Numbers that a step on so many rows holds beside what every fast step does: for what a run would need."""
        return 0


class SparseKernel(StepKernel[S]):
    """For one hidden layer whose features are mostly zero: ``W_enc``, ``b_enc``, ``W_dec``, ``b_dec`` and, where
    fine-tuning added it, ``scaling_factor``.  Architectures override :meth:`refuses_options`, :meth:`step`,
    :meth:`groups`."""

    gradients: ClassVar[tuple[str, ...]] = ("W_enc", "b_enc", "W_dec", "b_dec", "scaling_factor")
    """The parameters whose gradients :meth:`step` makes."""

    def refuses(self, sae: S, use: Use) -> str | None:
        if use.asked == "reference":
            return 'kernels is "reference"'
        if use.compiled:
            return "it is compiled"
        if use.device.type not in self.devices:
            return f"the kernels are for {' and '.join(sorted(self.devices))}, not for {use.device.type}"
        if use.autocast:
            return "autocast rounds its products"
        wide = use.dtype == torch.float64 and (use.asked == "fast" or not use.training)
        if use.dtype != torch.float32 and not wide:
            return f"the weights are {str(use.dtype).removeprefix('torch.')}"
        if more := sorted(use.learning - set(self.gradients)):
            return f"the kernels have no gradient for {', '.join(more)}"
        reason = self._why_no_first_look(sae) if use.training else None
        return reason or self.refuses_options(sae, training=use.training)

    def _why_no_first_look(self, sae: Any) -> str | None:
        """In int8, where that is asked for."""
        reason = self.why_no_screen(sae) if sae.kernels == "int8" else None
        return None if reason is None else f"no first look in int8: {reason}"

    def refuses_options(self, sae: S, *, training: bool) -> str | None:
        """Why not with the options of ``sae``, for ``training`` or else for inference; None: with these, too."""
        return None

    def encoder(self, sae: Any, workspace: Workspace) -> Encoder:
        """``x̄ W_enc + b_enc`` by chunks, in the memory of ``workspace``."""
        return Encoder(
            sae.W_enc.detach(), sae.b_enc.detach(), workspace, by_chunk=sae.share.parts > 1, int8=sae.kernels == "int8"
        )

    def decoder(self, sae: Any) -> Decoder:
        return Decoder(sae.W_dec, sae.b_dec, sae.decoder_scale())

    def remark(self, sae: Any) -> str:
        kind, reason = "int8" if sae.kernels == "int8" else "bfloat16", self.why_no_screen(sae)
        return f"a first look in {kind}" if reason is None else f"no first look in {kind}: {reason}"

    def why_no_screen(self, sae: Any) -> str | None:
        """Why the encoder's products are not screened, in int8 if that is asked for and else in bfloat16; None: they
        are where that pays."""
        int8, weights = sae.kernels == "int8", sae.W_enc
        reason = why_no_screen(weights.device, weights.dtype, weights.shape[1], int8)
        if reason is None and not weights.T.is_contiguous():
            return "the numbers of a column of W_enc do not lie together"
        if reason is None and int8 and len(weights) > MOST_INPUTS:
            return f"not for more than {MOST_INPUTS} inputs"
        return reason


class Served(tuple[StepKernel[Any], ...]):
    """Kernels of plugins.  Where a pickle is read, it has those whose plugins are there."""

    def __deepcopy__(self, memo: object) -> Served:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return _found, tuple(map(pickle.dumps, self))


def _found(*pickled: bytes) -> Served:
    found = []
    for each in pickled:
        with contextlib.suppress(ImportError, AttributeError):
            found.append(pickle.loads(each))  # of a pickle that is being read
    return Served(found)


def kernels_of(sae: Any, device: torch.device) -> list[StepKernel[Any]]:
    """Those of plugins that are for ``device``, and then those that the architecture of ``sae`` lists."""
    return [*(kernel for kernel in sae.served_by if device.type in kernel.devices), *sae.step_kernels]


def choose(
    kernels: Sequence[StepKernel[S]],
    sae: S,
    use: Use,
    guarded: Callable[[StepKernel[Any], str], contextlib.AbstractContextManager[None]],
) -> tuple[StepKernel[S] | None, str]:
    """The first of ``kernels`` that does not refuse, and in words why none of those before it, or none at all, is.

    ``guarded`` is around what one is asked, with its name: it says whose it is what fails.
    """
    reasons: list[str] = []
    for kernel in kernels:
        with guarded(kernel, "refuses"):
            reason = kernel.refuses(sae, use)
        if reason is None and use.asked == "int8" and use.training and not isinstance(kernel, SparseKernel):
            reason = "it has no first look in int8"
        if reason is None and (over := use.spread - vars(type(kernel)).get("spreads_over", frozenset())):
            reason = f"the kernels do not work where {' and '.join(sorted(over))} are split over processes"
        if reason is None:
            return kernel, "; ".join(reasons)
        reasons.append(reason if len(kernels) == 1 else f"{kernel.name}: {reason}")
    return None, "; ".join(reasons) or "the architecture has no fast path"
