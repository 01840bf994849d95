"""The base class of model backends."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import TYPE_CHECKING

from saekit.abilities import OnTokens, TranslatesHooks
from saekit.backends.asked import check_asked, checked_tokens
from saekit.backends.forward import Hooks, next_token_loss
from saekit.backends.loading import attached_to
from saekit.backends.texts import to_tokens
from saekit.devices import sent
from saekit.errors import ModelError
from saekit.reasons import alike
from saekit.values import Forward, Replacement, Want

if TYPE_CHECKING:
    from torch import Tensor

    from saekit.protocols import ModelBackend

__all__ = ["Backend", "no_hook"]


def no_hook(backend: ModelBackend, name: str, *, option: str = "") -> ModelError:
    """The error for a hook ``name`` that the model of ``backend`` does not have, with the one of that place, where
    another library's name for it is known (:class:`saekit.abilities.TranslatesHooks`), or those that are spelled alike.

    ``option`` is where the name is from, if a configuration says it.
    """
    names = backend.hook_names()
    where = f" ({option})" if option else ""
    like = backend.hook_like(name) if isinstance(backend, TranslatesHooks) else None
    if like is not None:
        hint = f". Did you mean {like!r}? It is what this model calls that place"
    else:
        hint = alike(name, names) or _some(names)
    return ModelError(f"the model {backend.name!r} has no hook {name!r}{where}{hint}")


def _some(names: Sequence[str]) -> str:
    if not names:
        return ""
    return f". It has {len(names)} hooks, such as {names[0]!r}; saekit.load_model(...).hook_names() lists them"


class Backend(ABC):
    """A :class:`saekit.protocols.ModelBackend` of which only the model is missing.

    What a subclass must have: the values below, :meth:`hook_names`, :meth:`tokenize`, :meth:`token_texts` and
    :meth:`forward`.  Of models that are modules of torch, :class:`saekit.backends.ModuleBackend` has most of it.
    """

    name: str
    device: str
    n_ctx: int | None
    d_vocab: int
    special_tokens: Mapping[str, int | None]
    runs_beyond_n_ctx: bool = False
    """Whether the model computes positions, as with rotary embeddings, and so takes longer contexts, too."""
    autocast: bool = False
    """Whether the model's products are made in bfloat16 (``model.autocast``)."""
    why_silent: str = ""
    """Why a hook that is there may not run, and what to do, for the message to say; begins with a space."""
    _attached: tuple[tuple[Mapping[str, Replacement], OnTokens | None], ...] = ()

    def __repr__(self) -> str:
        contexts = "" if self.n_ctx is None else f"contexts of up to {self.n_ctx:,} tokens, "
        return f"{type(self).__name__}({self.name!r} on {self.device}: {contexts}vocabulary of {self.d_vocab:,})"

    @abstractmethod
    def hook_names(self) -> Sequence[str]:
        """Every hook point."""

    def no_hook(self, name: str) -> ModelError:
        """The error for a hook that the model does not have, with those that are spelled alike."""
        return no_hook(self, name)

    def check_runs(self, name: str) -> None:  # noqa: B027 - most need not say anything
        """Raise :class:`saekit.errors.ModelError` if it is known why nothing that is put at the hook ``name`` runs."""

    @abstractmethod
    def tokenize(self, text: str) -> list[int]:
        """Token ids of ``text``, without special tokens."""

    def to_tokens(self, text: str | Sequence[str], *, prepend_bos: bool = True) -> Tensor:
        """``text`` as :meth:`run` takes it, ``[1, t]`` on the CPU, after the BOS token, as in training by default.

        Several texts must come to equally many tokens, ``[n, t]``: nothing is padded.  :class:`ModelError` where they
        do not, for nothing at all, and where the tokenizer has no BOS token.
        """
        return to_tokens(self, [text] if isinstance(text, str) else list(text), prepend_bos)

    @abstractmethod
    def token_texts(self, tokens: Sequence[int]) -> list[str]:
        """Each token as the text that it stands for."""

    @abstractmethod
    def forward(self, tokens: Tensor, hooks: Hooks) -> Tensor | None:
        """Run the model on ``tokens [b, t]``, which are where it is, calling ``hooks(name, activation)`` on the way.

        Returns logits ``[b, t, d_vocab]``, or the loss ``[b, t - 1]`` if that is wanted (``hooks.want``); from logits
        the base class makes it.  A forward that may stop early (``hooks.done``) may return None.
        """

    def run(
        self,
        tokens: Tensor,
        *,
        read: Collection[str] = (),
        replace: Mapping[str, Replacement] | None = None,
        want: Want = "held",
        grad: bool = False,
    ) -> Forward:
        """See :meth:`saekit.protocols.ModelBackend.run`."""
        read = [read] if isinstance(read, str) else read
        check_asked(read, replace, want, names="model.hook_names()")
        return self._run(checked_tokens(tokens, self), read, replace, want, grad)

    def _run(
        self,
        tokens: Tensor,
        read: Collection[str],
        replace: Mapping[str, Replacement] | None,
        want: Want,
        grad: bool,
        start: tuple[str, Tensor] | None = None,
    ) -> Forward:
        """A forward from the tokens, or from the hook ``start`` and what it holds."""
        import torch

        with torch.inference_mode(False):
            tokens = sent(self.device, tokens).contiguous()  # models take views of them
            tokens = tokens.clone() if tokens.is_inference() else tokens  # gradients of embeddings keep them
        attached = [one for one, _ in self._attached]
        hooks = Hooks(read, replace or {}, tokens=tokens, want=want, grad=grad, attached=attached, start=start)
        with self.running(tokens, grad=grad), ExitStack() as ends:
            for _, on_tokens in self._attached:
                if on_tokens is not None and (ended := on_tokens(tokens, 0)) is not None:
                    ends.callback(ended)
            out = self.forward(tokens, hooks)
            if want == "loss" and out is not None and out.ndim == 3:
                out = next_token_loss(out, tokens)
        if silent := sorted(hooks.silent & hooks.read if want == "held" else hooks.silent):
            if silent[0] not in self.hook_names():
                raise self.no_hook(silent[0])
            self.check_runs(silent[0])
            how = "as the model is configured" if start is None else f"in a forward that begins at {start[0]!r}"
            raise ModelError(f"the hook {silent[0]!r} of {self.name!r} does not run {how}{self.why_silent}")
        return Forward(hooks.held, loss=out if want == "loss" else None, logits=out if want == "logits" else None)

    @contextmanager
    def running(self, tokens: Tensor, *, grad: bool) -> Iterator[None]:
        """What torch is told for one forward: whether gradients are kept, and what the products are made in."""
        import torch

        kind = tokens.device.type
        rounded: AbstractContextManager[object] = nullcontext()
        if torch.amp.is_autocast_available(kind):  # not on the meta device, where models are outlined
            # A copy of the weights that autocast kept beyond this forward could not be trained on.
            rounded = torch.autocast(kind, dtype=torch.bfloat16, enabled=self.autocast, cache_enabled=False)
        # Not inference mode, which is hardly faster: of what is made there nobody may learn, nor write to it.  What is
        # made here is ordinary where the caller is in it, too.
        with torch.inference_mode(False), torch.set_grad_enabled(grad), rounded:
            yield

    @contextmanager
    def attached(self, replace: Mapping[str, Replacement], *, on_tokens: OnTokens | None = None) -> Iterator[None]:
        """See :class:`saekit.abilities.AttachesHooks`: here every :meth:`run` meets them."""
        known = self.hook_names()
        if unknown := [name for name in replace if name not in known]:
            raise self.no_hook(unknown[0])
        own = (dict(replace), on_tokens)
        self._attached = (*self._attached, own)
        try:
            with attached_to(self):
                yield
        finally:
            self._attached = tuple(one for one in self._attached if one is not own)

    @contextmanager
    def undisturbed(self) -> Iterator[None]:
        """While the context is open, :meth:`run` meets nothing that was attached: for a look at the model itself."""
        kept, self._attached = self._attached, ()
        try:
            yield
        finally:
            self._attached = kept

    def unembedding(self) -> tuple[Tensor, Tensor | None]:
        """The weights ``[d_model, d_vocab]`` that make logits, and the bias ``[d_vocab]`` if there is one."""
        raise ModelError(f"the model {self.name!r} has no unembedding that its backend knows")

    def fingerprint(self) -> str | None:
        """A text that tells the model's weights from others; None where that is not known."""
        return None
