"""What each kind of plugin builds, as protocols: nothing needs to be derived from.

What a plugin may have beside stands in :mod:`saekit.abilities`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from saekit.values import Batch, Forward, Metrics, Replacement, StepInput, StepOutput, Want

if TYPE_CHECKING:
    from torch import Tensor

    from saekit.released import Release
    from saekit.saved import PretrainedSAE, SAEFiles
    from saekit.site import Site, Sites

__all__ = [
    "ActivationFunction",
    "ActivationSource",
    "Dictionary",
    "Eval",
    "LRSchedule",
    "ModelBackend",
    "Optimizer",
    "PretrainedLoader",
    "ReleaseList",
    "ServingKernel",
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
        where one of these is needed; else the forward stops after the last hook that is read.  Where nothing is read
        either, none would run: an error.

        Nothing is recorded for autograd, unless ``grad``: then loss and logits are differentiable by what was read, by
        what the functions use, and by those of the model's parameters that learn.  What comes without it are ordinary
        tensors that have no gradient.

        :class:`saekit.errors.ModelError` for a hook that the model lacks, or that does not run; for tokens that are not
        whole numbers ``[b, t]``, or longer than :attr:`n_ctx`; and for ids that are none of its :attr:`d_vocab`, unless
        they are on a GPU, which would be waited for.
        """

    def unembedding(self) -> tuple[Tensor, Tensor | None]:
        """The weights ``[d_model, d_vocab]`` that make logits of the last (normalized) residual stream, and the bias
        ``[d_vocab]`` if there is one.  :class:`saekit.errors.ModelError` where there are none.
        """

    def fingerprint(self) -> str | None:
        """A text that tells the model's weights from others of that name; None where that is not known."""


class ActivationFunction(Protocol):
    """Pre-activations to feature activations, shape kept."""

    def __call__(self, pre: Tensor) -> Tensor:
        """``[..., d_sae]`` to ``[..., d_sae]``."""


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


class Tracker(Protocol):
    """Receives metrics, in a thread of its own, so that it may take its time.

    A record is taken when the method returns.  What was not taken when a run is stopped or killed is a part of its
    checkpoint, and is handed over again when the run goes on, so that a record may come twice but is never left out.
    """

    def log(self, metrics: Metrics, step: int) -> None:
        """Numbers and histograms by name, after ``step`` optimizer steps."""

    def close(self) -> None:
        """The run has ended."""


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
        reads them; two that are equally sure are an error that names both.  From 0.5 to 0.75 is "likely, but others
        have such files": where two say that, the surer one reads, and a warning names the other.
        """

    def load(self, files: SAEFiles) -> PretrainedSAE:
        """Read them; raise :class:`saekit.errors.SAEFormatError` with what was found and what was expected."""


class ReleaseList(Protocol):
    """SAEs that somebody has published."""

    def releases(self) -> Iterable[Release]:
        """All of them.  Nothing is fetched, and nothing heavy imported."""


class ServingKernel(Protocol):
    """A faster way to make the steps of architectures that somebody else wrote; derive it from
    :class:`saekit.kernels.StepKernel`, where all that it does is described."""

    devices: Collection[str]
    """The types of device that it is for, such as ``cuda``; elsewhere it is as if it were not there."""

    def refuses(self, sae: Any, use: Any) -> str | None:
        """Why it cannot serve this SAE, in words; None: it can."""

    def step(self, sae: Any, x: Tensor, step: StepInput, workspace: Any) -> StepOutput:
        """A training step, with its gradients, without autograd."""

    def groups(self, sae: Any, rows: Tensor, workspace: Any) -> Iterator[tuple[int, Any]]:
        """The features of rows, for inference."""
