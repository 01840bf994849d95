"""What each kind of plugin builds, as protocols: nothing needs to be derived from.

What a plugin may have beside is a protocol of its own, which is looked for with ``isinstance``.  What stands for a
plugin's object has an ability as an attribute of its own, and only where the object has it: since Python 3.12, what
``__getattr__`` would find does not count.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from saekit.values import Batch, Forward, Metrics, Replacement, RunEnd, StepInput, StepOutput, Want

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

    from saekit.converted import ConvertedConfig
    from saekit.released import Release
    from saekit.saved import PretrainedSAE, SAEFiles
    from saekit.site import Site, Sites

__all__ = [
    "ActivationFunction",
    "ActivationSource",
    "Concludes",
    "ConvertsConfigs",
    "Dictionary",
    "Eval",
    "GuardedOptimizer",
    "HasMemory",
    "HasMoments",
    "HasTokenizer",
    "KnowsResidualStream",
    "LRSchedule",
    "LocatesFiles",
    "ModelBackend",
    "Optimizer",
    "Pauses",
    "PretrainedLoader",
    "ReleaseList",
    "Remarks",
    "SparseActivation",
    "StatesRows",
    "StatesWidths",
    "TakesCheckpoints",
    "Tracker",
]


class ModelBackend(Protocol):
    """A language model with named places whose activations can be read and replaced."""

    name: str
    """The model's name, as it is saved with an SAE."""
    device: str
    """Where it runs, as torch spells it."""
    n_ctx: int | None
    """The longest context, or None when there is no limit."""
    d_vocab: int
    """The number of token ids that it accepts."""
    special_tokens: Mapping[str, int | None]
    """The ids of ``bos``, ``eos`` and ``sep``, None for those that its tokenizer lacks."""

    def hook_names(self) -> Sequence[str]:
        """Every hook point."""

    def tokenize(self, text: str) -> list[int]:
        """Token ids of ``text``, without special tokens."""

    def token_texts(self, tokens: Sequence[int]) -> list[str]:
        """Each token as the text that it stands for."""

    def run(
        self,
        tokens: Tensor,
        *,
        read: Collection[str] = (),
        replace: Mapping[str, Replacement] | None = None,
        want: Want = "held",
        grad: bool = False,
    ) -> Forward:
        """The one forward, on ``tokens [b, t]``, which may be on any device.

        It holds what the hooks of ``read`` hold, before anything is put in its place; at those of ``replace`` the model
        goes on with what the function returns, which is of the same shape.  ``want`` is ``"loss"`` or ``"logits"``
        where one of these is needed; else the forward stops after the last hook that is read.

        Nothing is recorded for autograd, unless ``grad``: then loss and logits are differentiable by what was read, by
        what the functions use, and by those of the model's parameters that learn.  :class:`saekit.errors.ModelError`
        for a hook that the model lacks, or that does not run.
        """

    def unembedding(self) -> tuple[Tensor, Tensor | None]:
        """The weights ``[d_model, d_vocab]`` that make logits of the last (normalized) residual stream, and the bias
        ``[d_vocab]`` if there is one.  :class:`saekit.errors.ModelError` where there are none.
        """

    def fingerprint(self) -> str | None:
        """A text that tells the model's weights from others of that name; None where that is not known."""


@runtime_checkable
class HasTokenizer(Protocol):
    """A model backend with a Hugging Face tokenizer: `saekit pretokenize` uses it, and vocabularies are told apart."""

    tokenizer: Any
    """None for a model without."""


@runtime_checkable
class KnowsResidualStream(Protocol):
    """A model backend that knows which hooks are in the residual stream: what a feature promotes can then be told."""

    def in_residual_stream(self, hook_name: str) -> bool:
        """Whether what the hook holds, ``[b, t, d_model]``, is the residual stream or is added to it as it is."""


@runtime_checkable
class HasMemory(Protocol):
    """A model backend or an activation source that can tell how much memory it needs; `saekit plan` asks."""

    def memory_bytes(self) -> int:
        """What it holds while nothing runs, such as a model's weights, or a buffer when it is full."""


class ActivationFunction(Protocol):
    """Pre-activations to feature activations, shape kept."""

    def __call__(self, pre: Tensor) -> Tensor:
        """``[..., d_sae]`` to ``[..., d_sae]``."""


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


class LRSchedule(Protocol):
    """The main part of a learning-rate schedule, between warm-up and decay."""

    @property
    def end(self) -> float:
        """The rate from which the linear decay to zero starts."""

    def __call__(self, step: int) -> float:
        """The learning rate at the main part's own ``step``, from 0.

        It is never asked for a step beyond the ``steps`` that it was built for: a run that takes more keeps the rate of
        its last one.
        """


@runtime_checkable
class Remarks(Protocol):
    """What has something to say before a run begins.  Optional; of schedules, `saekit plan` asks."""

    def remark(self) -> str | None:
        """What a user may not expect of it, as it was set up; None: nothing."""


class Dictionary(Protocol):
    """What an architecture builds, as far as the kernel must find it; derive it from :class:`saekit.SAE`."""

    def encode(self, x: Tensor) -> Tensor:
        """Feature activations ``[..., d_sae]`` of ``x [..., d_in]``."""

    def decode(self, features: Tensor) -> Tensor:
        """The reconstruction of feature activations ``[..., d_sae]``."""

    def losses(self, x: Tensor, step: StepInput) -> StepOutput:
        """The loss and its terms for ``x [n, d_in]``, by autograd."""

    def training_step(self, x: Tensor, step: StepInput) -> StepOutput:
        """The same, with every parameter's gradient filled in."""

    def public_tensors(self) -> Mapping[str, Tensor]:
        """What is saved, by name."""

    def load_public_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over what was saved."""

    def to(self, device: Any) -> Any:
        """Move there."""


class Optimizer(Protocol):
    """Updates parameters from their gradients, as those of :mod:`torch.optim` do; derive it from one of them.

    The kernel does the rest: it clips, follows the schedule, leaves out steps whose loss or gradient is no number, and
    saves the state by the names of parameters.
    """

    param_groups: list[dict[str, Any]]
    """Parameters (``params``) with their settings; ``lr`` is set before every step, to the scheduled rate times
    ``lr_factor``."""

    def step(self) -> Any:
        """One update from the parameters' ``grad``."""

    def state_dict(self) -> dict[str, Any]:
        """Everything that :meth:`load_state_dict` needs to go on exactly."""

    def load_state_dict(self, state: dict[str, Any]) -> Any:
        """Go on where ``state`` was taken."""


@runtime_checkable
class GuardedOptimizer(Optimizer, Protocol):
    """One that clips and looks for itself, as torch's fused ones do: the GPU need not be waited for at every step."""

    grad_scale: Tensor | None
    """Gradients are divided by this scalar as they are read; None: by nothing."""
    found_inf: Tensor | None
    """Where this scalar is not 0, a step changes nothing; None: it is not looked at."""


@runtime_checkable
class HasMoments(Protocol):
    """An optimizer that says what it keeps of every parameter, so that what was saved can be checked."""

    moments: Collection[str]
    """The names: tensors of the parameter's shape, or scalars."""


@runtime_checkable
class ActivationSource(Protocol):
    """An iterator of shuffled batches of ``batch_size`` rows; the last one before the data ends may be smaller."""

    def __iter__(self) -> Iterator[Batch]: ...

    def __next__(self) -> Batch: ...

    def peek(self) -> Mapping[Site, Tensor]:
        """A look at the activations to come, ``[n, d_in]`` per site, without using any of them up."""

    def state_dict(self) -> dict[str, Any]:
        """Everything that :meth:`load_state_dict` needs to go on with the very next batch."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where ``state`` was taken."""

    def close(self) -> None:
        """Release threads, files and memory."""


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
class Pauses(Protocol):
    """An activation source that works ahead of the batches that it is asked for, and can be told not to."""

    def pause(self) -> None:
        """No batch is needed for now: nothing of it runs from here on, and its state stays the same.

        A next batch may be asked for all the same, and is the one that it would have been.
        """


class Tracker(Protocol):
    """Receives metrics, in a thread of its own, so that it may take its time.

    A record is taken when the method returns.  What was not taken when a run is stopped or killed is a part of its
    checkpoint, and is handed over again when the run goes on, so that a record may come twice but is never left out.
    """

    def log(self, metrics: Metrics, step: int) -> None:
        """Numbers and histograms by name, after ``step`` optimizer steps."""

    def close(self) -> None:
        """The run has ended."""


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


class Eval(Protocol):
    """A measurement on held-out contexts."""

    def __call__(self, sae: Any, *, backend: ModelBackend, sites: Sites, contexts: Any) -> dict[str, float]:
        """Numbers by name.  ``sae`` is a :class:`saekit.SAE`, which reads and writes ``sites``; ``contexts [n,
        context_size]`` are token ids, or None where no eval of the run needs text.
        """


class PretrainedLoader(Protocol):
    """Reads SAEs of one format."""

    def detects(self, files: SAEFiles) -> bool | float:
        """How surely ``files`` are of this format: from 0, or false, for "not at all" to 1, or true, for "sure".

        Judged by their names, and by small files of JSON where names are not enough.  Of several loaders the surest
        reads them; two that are equally sure are an error that names both.
        """

    def load(self, files: SAEFiles) -> PretrainedSAE:
        """Read them; raise :class:`saekit.errors.SAEFormatError` with what was found and what was expected."""


@runtime_checkable
class LocatesFiles(PretrainedLoader, Protocol):
    """A loader that knows which file a release means by a path that is neither a file nor a folder."""

    def locate(self, path: str, names: Collection[str]) -> str | None:
        """The path of a file or folder among ``names``, all files of the repository; None: there is none."""


@runtime_checkable
class ConvertsConfigs(Protocol):
    """A pretrained loader that knows the configurations of its library's runs, too, for `saekit convert-config`."""

    def convert_config(self, table: Mapping[str, Any]) -> ConvertedConfig | None:
        """What ``table``, as the library saved it, is here; None: it is no configuration of that library.

        Raise :class:`saekit.errors.ConfigError` for one that is, and that cannot be converted.
        """


class ReleaseList(Protocol):
    """SAEs that somebody has published."""

    def releases(self) -> Iterable[Release]:
        """All of them.  Nothing is fetched, and nothing heavy imported."""


@runtime_checkable
class WritesSAEs(Protocol):
    """A pretrained loader that writes its format, too, for `SAE.export`; what it reads of that is the same SAE."""

    def write_sae(self, sae: Any, folder: Path) -> None:
        """Write ``sae``, a :class:`saekit.SAE`, into ``folder``, which is new and empty.

        Its ``public_tensors()`` are what is to be written.  Raise :class:`saekit.errors.SAEFormatError` with what the
        format has no place for.
        """
