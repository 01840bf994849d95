"""What a plugin's object may have beside what its kind promises: abilities, looked for with ``isinstance``.

What stands for a plugin's object has an ability as an attribute of its own, and only where the object has it: since
Python 3.12, what ``__getattr__`` would find does not count.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias, runtime_checkable

from saekit.accumulates import Accumulates, SharesContexts
from saekit.loader_abilities import ConvertsConfigs, KnowsParts, LocatesFiles, WritesSAEs
from saekit.protocols import ActivationFunction, Optimizer, Tracker
from saekit.source_forwards import SourceForwards, StatesForwards
from saekit.values import Forward, Replacement, RunEnd, Want

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

    from saekit.site import Site

__all__ = [
    "Accumulates", "AttachesHooks", "Concludes", "ConvertsConfigs", "CopiesState", "Elementwise",
    "EndsWithTraining", "ExposedPoint", "ExposesHooks", "ForwardsOtherwise", "GuardedOptimizer",
    "HasMemory", "HasModel", "HasMoments", "HasOtherNames", "HasTokenizer", "KeepsRecipe",
    "KnowsParts", "KnowsResidualStream", "LeadsToResidualStream", "LocatesFiles",
    "OnTokens", "Pauses", "Remarks", "RunsUndisturbed", "SharesContexts", "SharesRows", "SourceForwards",
    "SparseActivation", "StartsInside", "StatesForwards", "StatesProcessing", "StatesRows", "StatesWidths",
    "TakesCheckpoints", "TakesStates",
    "TokenizesElsewhere", "TranslatesHooks", "WritesSAEs",
]  # fmt: skip


OnTokens: TypeAlias = "Callable[[Tensor | None, int], Callable[[], None] | None]"
"""Told of a forward before it begins, and gives what is called when it has ended: see
:meth:`AttachesHooks.attached`."""


@runtime_checkable
class HasTokenizer(Protocol):
    """A model backend with a Hugging Face tokenizer: `saekit pretokenize` uses it, and vocabularies are told apart."""

    tokenizer: Any
    """None for a model without."""


@runtime_checkable
class TokenizesElsewhere(Protocol):
    """A model backend whose texts other processes can tokenize (``activations.source.tokenize_processes``)."""

    def tokenizing(self) -> Callable[[str], Sequence[int]] | None:
        """What gives the same ids as ``tokenize``, and can be pickled without the model.  None: this one has none."""


@runtime_checkable
class HasOtherNames(Protocol):
    """A model backend that knows what else its model is called, so that an SAE of that name is taken for its own."""

    def other_names(self) -> Collection[str]:
        """Such as ``gpt2-small`` for ``gpt2``."""


@runtime_checkable
class HasModel(Protocol):
    """A model backend that hands out the model that it runs, as its library has it."""

    model: Any


@runtime_checkable
class RunsUndisturbed(Protocol):
    """A model backend that can leave out what others have hooked into its model, for a look at the model itself."""

    def undisturbed(self) -> AbstractContextManager[None]:
        """While the context is open, its forwards meet no hook of others; afterwards all are as they were."""


@runtime_checkable
class KnowsResidualStream(Protocol):
    """A model backend that knows which hooks are in the residual stream: what a feature promotes can then be told."""

    def in_residual_stream(self, hook_name: str) -> bool:
        """Whether what the hook holds, ``[b, t, d_model]``, is the residual stream or is added to it as it is."""


@runtime_checkable
class LeadsToResidualStream(Protocol):
    """A model backend that knows by which weights what is inside a block reaches the residual stream."""

    def to_residual_stream(self, hook_name: str) -> Tensor | None:
        """``[d, d_model]``: what the model multiplies what the hook holds by before it is added to the residual stream.

        ``W_O`` of what heads make before it is projected, ``[heads · d_head, d_model]``, and ``W_out`` inside an MLP
        (before its activation function, too, of which it is then the slope that is left out).  None where there is no
        such product, such as where a norm lies between.
        """


@runtime_checkable
class AttachesHooks(Protocol):
    """A model backend that can leave replacements in its model for a while, so that every forward meets them.

    Those that the model's own library makes do, too, such as the forwards of `generate`.
    """

    def attached(
        self, replace: Mapping[str, Replacement], *, on_tokens: OnTokens | None = None
    ) -> AbstractContextManager[None]:
        """While the context is open, the model goes on with what the functions return at the hooks of these names.

        A hook that is read then holds what was put there.  ``on_tokens`` is told of every forward before it begins: the
        token ids ``[b, t]``, or None where the forward is given something else, and how many positions came before
        them, which a cache of keys and values stands for.  What it returns, unless that is None, is called when that
        forward has ended, also by an exception: what is then called of the model belongs to no forward that is known.
        Afterwards the model is as it was: every hook, their order, and those that are permanent.
        """


class ExposedPoint(Protocol):
    """A hook point that a library was told of."""

    @property
    def is_hooked(self) -> bool:
        """Whether anything is hooked to it now; else nothing need pass."""

    def __call__(self, value: Tensor, /) -> Tensor:
        """What the library's hooks make of ``value``."""


@runtime_checkable
class ExposesHooks(Protocol):
    """A model backend whose library can be told of further hook points, so that its own functions see them."""

    def exposed(self, names: Collection[str]) -> AbstractContextManager[Mapping[str, ExposedPoint]]:
        """While the context is open, the model has hook points of these names."""


@runtime_checkable
class StartsInside(Protocol):
    """A model backend that can begin a forward where a block begins, with what an earlier forward held there."""

    def entry_of(self, hooks: Collection[str]) -> str | None:
        """The hook that holds all that the model's output and these ``hooks`` depend on; None: none is known.

        Of several the last one, so that as little as possible is computed again.
        """

    def run_from(
        self,
        tokens: Tensor,
        entry: str,
        value: Tensor,
        *,
        read: Collection[str] = (),
        replace: Mapping[str, Replacement] | None = None,
        want: Want = "held",
        grad: bool = False,
    ) -> Forward:
        """As :meth:`saekit.protocols.ModelBackend.run` on the same ``tokens``, from the hook ``entry`` on, where the
        model holds ``value``.  Hooks before it do not run."""


@runtime_checkable
class TranslatesHooks(Protocol):
    """A model backend that knows transformer_lens' names of places in a model, so that SAEs of others fit it."""

    def hook_like(self, name: str) -> str | None:
        """The hook that holds what ``name`` means there, such as ``blocks.3.hook_resid_post``; None: there is none.

        A name of its own is itself.
        """


@runtime_checkable
class StatesProcessing(Protocol):
    """A model backend that knows what was done to its model's weights as they were loaded: it decides what hooks hold.

    transformer_lens folds and centers weights so that a model computes the same, and other activations on the way.
    """

    def processing(self, hook_name: str | None = None, about: Mapping[str, Any] | None = None) -> Mapping[str, bool]:
        """By transformer_lens' names, such as ``fold_ln``, whether that was done; what is not known is not there.

        ``hook_name``: of what makes a difference for what this hook holds, no more.  ``about``, the metadata of an SAE:
        of the model that it was trained on, in the place of this one.
        """


@runtime_checkable
class ForwardsOtherwise(Protocol):
    """A model backend with other ways to the same numbers, which round otherwise; `saekit plan` times them."""

    def other_forwards(self) -> Mapping[str, Callable[[], AbstractContextManager[None]]]:
        """By the line to write, such as ``model.backend.fused=true``, a context in which forwards go that way."""


@runtime_checkable
class HasMemory(Protocol):
    """A model backend or an activation source that can tell how much memory it needs; `saekit plan` asks."""

    def memory_bytes(self) -> int:
        """What it holds while nothing runs, such as a model's weights, or a buffer when it is full."""


@runtime_checkable
class SparseActivation(ActivationFunction, Protocol):
    """An activation function with sparse support, which the fast kernels can use.

    It works on every number by itself, is nowhere negative, and is zero with its derivative wherever ``pre <= 0``.
    :func:`saekit.testing.check_sparse_activation` verifies what an activation declares by having these methods.
    """

    def in_place(self, pre: Tensor) -> Tensor:
        """What calling it returns, written over ``pre``."""

    def pre_gradient(self, gradient: Tensor, features: Tensor) -> Tensor:
        """The gradient to pre-activations from that to ``features``, which are what it returned; of their shape.

        ``gradient`` may be overwritten.
        """


@runtime_checkable
class Remarks(Protocol):
    """What has something to say before a run begins.  Optional; of schedules, `saekit plan` asks."""

    def remark(self) -> str | None:
        """What a user may not expect of it, as it was set up; None: nothing."""


@runtime_checkable
class GuardedOptimizer(Optimizer, Protocol):
    """One that clips and looks for itself, as torch's fused ones do: the GPU need not be waited for at every step."""

    grad_scale: Tensor | None
    """Gradients are divided by this scalar as they are read; None: by nothing."""
    found_inf: Tensor | None
    """Where this scalar is not 0, a step changes nothing; None: it is not looked at."""


@runtime_checkable
class Elementwise(Protocol):
    """An optimizer that updates each number by its own past alone, so that parameters may be split over processes."""

    elementwise: bool
    """True."""


@runtime_checkable
class HasMoments(Protocol):
    """An optimizer that says what it keeps of every parameter, so that what was saved can be checked."""

    moments: Collection[str]
    """The names: tensors of the parameter's shape, or scalars."""


@runtime_checkable
class StatesWidths(Protocol):
    """An activation source that knows how wide its activations are, so that the model need not be asked.

    A run without a language model needs such a one.
    """

    @property
    def widths(self) -> Mapping[Site, int]:
        """``d`` at each site that it has; those of the stream must be among them."""


@runtime_checkable
class StatesRows(Protocol):
    """An activation source that knows how many rows it reads before it begins anew, as one that does not read text may.

    A run that would read them very often says so.
    """

    @property
    def rows(self) -> int:
        """Those of one reading."""


@runtime_checkable
class EndsWithTraining(Protocol):
    """Options of a source whose batches depend on how many rows training takes
    (:attr:`saekit.data.StreamContext.left`), where this is true: SAEs of another length do not share them."""

    @property
    def ends_with_training(self) -> bool: ...


@runtime_checkable
class SharesRows(Protocol):
    """An activation source that gives each of several processes other rows, so that together they see all of them.

    It works with :attr:`saekit.data.StreamContext.own`, whose batches and contexts are this process's part; a part of
    a batch may have fewer rows where the data ends.  What it shows before training (``peek``) are rows of its own, of
    which those of all processes are put together: so many that all are about as many as one process would show.

    One without this ability is opened alike by all, for whole batches, of which each takes its part: that is right
    where rows depend on the seed alone, and each does all the work.
    """

    shares_rows: bool
    """True."""


@runtime_checkable
class TakesStates(Protocol):
    """An activation source that shares rows, and can go on where other processes were: more of them, or fewer."""

    def load_states(self, states: Sequence[Mapping[str, Any]]) -> None:
        """Go on from the ``states`` that the sources of all processes had, in the order of their numbers.

        They are the same in every process of now.  What those before had still to hand out, these hand out together,
        each row once, in any order.  Tensors of ``states`` show files: what is kept of them is copied.
        """


@runtime_checkable
class Pauses(Protocol):
    """An activation source that works ahead of the batches that it is asked for, and can be told not to."""

    def pause(self) -> None:
        """No batch is needed for now: nothing of it runs from here on, and its state stays the same.

        A next batch may be asked for all the same, and is the one that it would have been.
        """


@runtime_checkable
class CopiesState(Protocol):
    """An activation source whose states need no copy, although they are written while it works on.

    Of any other, a checkpoint copies the tensors first: those may be what the source works with.
    """

    copies_state: bool
    """Whether the tensors of each ``state_dict()`` are written to by nobody from then on."""


@runtime_checkable
class KeepsRecipe(Protocol):
    """An activation source whose states need hold no rows.

    Where ``stream.keeps_recipe`` asks for that, they hold how the rows that wait can be computed again, to the last
    bit; one whose states hold no rows anyway has nothing to change.
    """

    def recipe_size(self) -> tuple[int, int]:
        """About how many bytes that takes, and how many forwards of the model it is to go on from it."""


@runtime_checkable
class TakesCheckpoints(Tracker, Protocol):
    """A tracker that is told of the SAE folders that are saved."""

    def log_checkpoint(self, folder: Path, step: int) -> None:
        """The SAE after ``step`` optimizer steps is in ``folder``, which stays until this returns."""


@runtime_checkable
class Concludes(Tracker, Protocol):
    """A tracker that is told how its run ended."""

    def conclude(self, end: RunEnd) -> None:
        """Called once, after the last record and before :meth:`close`."""
