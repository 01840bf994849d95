"""How a module does what it does: by one of its kernels, by a compiled loss, or by plain torch."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from saekit.compiling import leave_out, not_compiled
from saekit.distributed.group import JoinedGroup
from saekit.distributed.share import WHOLE, Share
from saekit.kernels.kernel import Served, StepKernel, Use, choose, kernels_of
from saekit.kernels.private_torch import is_followed
from saekit.kernels.workspace import SHARED, Workspace, Workspaces
from saekit.plugins.building import blamed, origin_of
from saekit.sae.casting import Castable
from saekit.values import StepInput

__all__ = ["INFERENCE", "Ways", "not_compiled", "overridden"]

_MATHEMATICS = (
    "bypass", "centered", "decode", "decoder_norms", "decoder_scale", "encode", "features_and_bypass",
    "features_from", "features_of", "losses", "pre_activations", "reconstruction", "training_features",
)  # fmt: skip
INFERENCE = {*_MATHEMATICS, "forward"} - {"losses", "training_features"}
"""What decides the outputs of an SAE that has been trained."""


class Ways(Castable):
    """What :class:`saekit.sae.SAEModule` has of it."""

    kernels: Literal["auto", "fast", "int8", "reference"] = "auto"
    """``auto``: the fast kernels where there are any, but for training in float64; ``fast``: there, too; ``int8``: as
    ``auto``, with a first look in 8-bit integers; ``reference``: plain torch."""
    step_kernels: ClassVar[Sequence[StepKernel[Any]]] = ()
    """The fast ways of this very class, the best first.  One that changes the mathematics inherits none."""
    served_by: Served = Served()
    """Those of plugins that say that they serve this architecture; they are asked first."""
    beside_mathematics: ClassVar[frozenset[str]] = frozenset()
    """Functions that a class adds and that change nothing of it, such as those of files: whoever overrides one of them
    keeps the kernels."""
    memory: Workspaces = SHARED
    """Where kernels work."""
    share: Share = WHOLE
    """What this process has of a training step, of the rows and of the features: all of both, unless there are several
    processes.  See :class:`saekit.distributed.Share`."""
    spreads_over: ClassVar[frozenset[str]] = frozenset()
    """What may be split over processes in training, and the steps are still those of one process: ``data`` (what a step
    asks of the whole batch it asks :attr:`share`), ``features`` (and what it asks of all features, too).  A class that
    changes the mathematics says so anew.  ``inference``: of one whose features are split, features and outputs are
    those of the whole, too, of :meth:`~saekit.SAE.features_and_bypass` and :meth:`~saekit.SAE.decode`; without it, the
    SAE is put together in each process to be measured."""
    competes_over: ClassVar[str | None] = None
    """Where entries of a step compete with those of other processes, which tell each other their largest: ``features``
    (``k`` of each row), ``all`` (those of the whole batch); None: nowhere.  For `saekit plan`."""
    saved_by_parts: ClassVar[Mapping[str, int]] = {}
    """Where features are split, an SAE is loaded and saved by parts: what ``public_tensors`` makes of a part is that
    part of what it makes of the whole, and so with all that changes weights (``load_public_tensors``, ``cast_weights``,
    ``fold_activation_scale``, ``fold_affine``, ``shift_pre_activations``, ``restate``).  A class that overrides one of
    these says so anew, or its SAEs are put together to be saved.  Of tensors that are saved and not in the table, by
    their names, the dimension of features; of those that are not named, all processes have the same."""
    spread: frozenset[str] = frozenset()
    """What is split over processes in training: ``data``, ``features``."""

    losses: Any
    _compile_mode: str | None = None

    @property
    def _leading(self) -> Tensor:
        """The parameter whose device and type are the module's."""
        return next(self.parameters())

    @property
    def device(self) -> torch.device:
        """Where it is."""
        return self._leading.device

    @property
    def dtype(self) -> torch.dtype:
        """What it computes in: the type of its parameters, but for those that keep more digits."""
        return self._leading.dtype

    def step_path(self) -> str:
        """The way of a training step now, in words."""
        kernel, reasons = self._training_kernel()
        if kernel is None:
            return f"plain torch: {reasons}"
        with self._guarded(kernel, "remark"):
            remark = kernel.remark(self)
        return kernel.name + (f", {remark}" if remark else "") + (f" (not {reasons})" if reasons else "")

    def why_reference(self) -> str | None:
        """Why a training step now takes the way of autograd; None: it takes a fast one."""
        kernel, reasons = self._training_kernel()
        return None if kernel is not None else reasons

    def _training_kernel(self) -> tuple[StepKernel[Any] | None, str]:
        learning = frozenset(name for name, value in self.named_parameters() if value.requires_grad)
        return self._chosen(training=True, compiled="losses" in vars(self), learning=learning)

    def _kernel_for(self, x: Tensor) -> StepKernel[Any] | None:
        """That of inference on ``x``; None where somebody wants its gradient, or all refuse."""
        if torch.is_grad_enabled() and (x.requires_grad or any(p.requires_grad for p in self.parameters())):
            return None
        if self.share.parts > 1:  # kernels of inference know of no other process
            return None
        return self._chosen(training=False, compiled=is_followed(x), learning=frozenset())[0]

    def _chosen(
        self, *, training: bool, compiled: bool, learning: frozenset[str]
    ) -> tuple[StepKernel[Any] | None, str]:
        device = self.device
        use = Use(
            training=training,
            device=device,
            dtype=self.dtype,
            asked=self.kernels,
            autocast=torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type),
            compiled=compiled,
            learning=learning,
            spread=self.spread if training else frozenset(),
        )
        kernel, reasons = choose(kernels_of(self, device), self, use, self._guarded)
        own = kernel is not None and kernel not in self.served_by
        if own and (changed := overridden(type(self), "step_kernels")) is not None:
            return None, changed
        return kernel, reasons

    def _guarded(self, kernel: StepKernel[Any], doing: str) -> AbstractContextManager[None]:
        """Says whose it is what fails in ``kernel``, where that is a plugin's."""
        if kernel not in self.served_by or (item := origin_of(kernel)) is None:
            return nullcontext()
        activation = getattr(self, "activation", None)
        known = origin_of(activation)
        return blamed(item, doing, at_work=True, parts=[] if known is None else [(known, activation)])

    def _leaves(self, kernel: StepKernel[Any], x: Tensor, step: StepInput) -> bool:
        with self._guarded(kernel, "leaves"):
            return kernel.leaves(self, x, step)

    @contextmanager
    def _lent(self, kernel: StepKernel[Any], doing: str = "groups") -> Iterator[Workspace]:
        """Memory for ``kernel``, which says whose it is what fails there."""
        with self._guarded(kernel, doing), self.memory.lent() as workspace:
            yield workspace

    def why_not_split(self, parts: int) -> str | None:
        """Why its features cannot be split in so many ``parts`` of one size, in words; None: they can."""
        return None

    def compile_losses(self, mode: str = "default") -> None:
        """From now on train with :meth:`losses` compiled by ``torch.compile``."""
        self._compile_mode = mode
        leave_out(type(self))
        leave_out(JoinedGroup)  # what processes tell each other is between what is compiled
        self.losses = torch.compile(self.losses, mode=mode)

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickles.  A compiled :meth:`losses` works on this SAE's own weights: a copy gets its own."""
        state: dict[str, Any] = super().__getstate__()  # type: ignore[no-untyped-call]
        for name in ("losses", "table", "share", "spread"):  # made again; or of the processes that train it
            state.pop(name, None)
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        if self._compile_mode is not None:
            self.compile_losses(self._compile_mode)


def overridden(kind: type, stated: str, mathematics: Collection[str] = _MATHEMATICS) -> str | None:
    """Why what ``kind`` inherits as ``stated``, such as ``step_kernels``, is not its own: it changes some of the
    ``mathematics``, or of those that an architecture added.  None: it does not.

    The class that states it answers for the mathematics that it has and inherits.
    """
    owner = next(one for one in kind.__mro__ if stated in vars(one))
    if owner is kind:
        return None
    mathematics = {*mathematics, *_helpers(owner)}
    for changing in kind.__mro__[: kind.__mro__.index(owner)]:
        if found := [name for name in vars(changing) if name in mathematics]:
            return f"{changing.__name__} overrides {found[0]}, and not {stated}"
    return None


def _helpers(owner: type) -> Iterator[str]:
    """The functions and properties that an architecture adds, any of which may be part of its mathematics.

    Others that every module has, such as ``after_update`` and what is there to save, are at work around the kernels.
    """
    lineage = owner.__mro__
    every_module = next((base for base in lineage if Ways in base.__bases__), None)
    if every_module is None:  # of a class beside them, which an architecture derives from, too
        return
    beside = {name for base in lineage for name in vars(base).get("beside_mathematics", ())}
    for base in lineage[: lineage.index(every_module)]:
        for name, value in vars(base).items():
            if hasattr(value, "__get__") and not hasattr(every_module, name) and name not in beside:
                yield name
