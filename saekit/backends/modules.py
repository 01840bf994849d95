"""Backends of models that are modules of torch."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

from saekit.abilities import OnTokens
from saekit.backends.base import Backend
from saekit.backends.begun import Begun, Running
from saekit.backends.forward import Hooks, by_position, put
from saekit.backends.loading import attached_to, check_not_compiled
from saekit.backends.special import special_tokens
from saekit.backends.texts import text_ids, texts_of
from saekit.errors import ModelError
from saekit.tokens import ids_of
from saekit.values import Replacement

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["ModuleBackend"]

_INPUT = ".input"
_HOOKS = ("_forward_hooks", "_forward_pre_hooks")


class ModuleBackend(Backend):
    """A ``torch.nn.Module``, whose hooks are the paths of its modules.

    ``model.layers.3`` holds what that module returns (of several things the first tensor), ``model.layers.3.input`` the
    first tensor that it is called with.  A subclass says how the model makes :meth:`logits`.

    The model stays as it was: whether its parameters learn, which of its modules are in training mode, and what is
    hooked to them.
    """

    def __init__(
        self,
        model: Any,
        *,
        name: str,
        d_vocab: int,
        n_ctx: int | None,
        tokenizer: Any = None,
        autocast: bool = False,
    ) -> None:
        self.model, self._evaluating, self._running = model, _Evaluating(model), Running()
        self.name, self.d_vocab, self.n_ctx = name, d_vocab, n_ctx
        self.device = str(next(model.parameters()).device)
        self.autocast = autocast
        self.tokenizer = tokenizer
        if getattr(tokenizer, "vocab_size", 0) > d_vocab:  # tokens added later do not count
            raise ModelError(
                f"the tokenizer of {name!r} has {tokenizer.vocab_size} tokens, but the model knows {d_vocab}: they do "
                "not belong together"
            )
        self.special_tokens = special_tokens(tokenizer)

    def __deepcopy__(self, memo: object) -> ModuleBackend:
        raise ModelError("a backend cannot be copied: copy its .model, and give the copy to saekit.load_model")

    def logits(self, tokens: Tensor) -> Tensor:
        """``[b, t, d_vocab]`` for ``tokens [b, t]``."""
        raise NotImplementedError(f"{type(self).__name__} must have logits(tokens), or a forward of its own")

    def hook_names(self) -> Sequence[str]:
        return [name for path, _ in self.model.named_modules() if path for name in (path, path + _INPUT)]

    def forward(self, tokens: Tensor, hooks: Hooks) -> Tensor | None:
        with ExitStack() as attached:
            for name in hooks.names:
                attached.callback(self._attach(name, self._until_done(name, hooks)).remove)
            try:
                return self.logits(tokens)
            except _Done:
                return None

    @contextmanager
    def running(self, tokens: Tensor, *, grad: bool) -> Iterator[None]:
        with self._evaluating(), self._running(tokens), super().running(tokens, grad=grad):
            yield

    @contextmanager
    def attached(self, replace: Mapping[str, Replacement], *, on_tokens: OnTokens | None = None) -> Iterator[None]:
        """See :class:`saekit.abilities.AttachesHooks`: hooks of torch's, which whoever calls the model meets."""
        known = {*self.hook_names()}
        if unknown := [name for name in replace if name not in known]:
            raise self.no_hook(unknown[0])
        begun = Begun(on_tokens)
        with ExitStack() as attached:
            attached.enter_context(attached_to(self.model))
            attached.enter_context(self._running.told(begun))
            attached.enter_context(self.begins(self._running.unless_it_knows(begun)))
            for name, replacement in replace.items():
                self.check_runs(name)
                attached.callback(self._attach(name, _standing(name, replacement, begun)).remove)
            yield

    @contextmanager
    def undisturbed(self) -> Iterator[None]:
        """As that of the base class; hooks of torch's, whoever added them, are not there for that long."""
        aside = [(module, {name: vars(module)[name] for name in _HOOKS}) for module in self.model.modules()]
        for module, _ in aside:
            vars(module).update({name: OrderedDict() for name in _HOOKS})
        try:
            with super().undisturbed():
                yield
        finally:
            for module, hooks in aside:
                vars(module).update(hooks)

    def begins(self, tell: OnTokens) -> AbstractContextManager[None]:
        """While the context is open, ``tell(tokens, before)`` is called when somebody calls the model, and what it
        returns when that has ended.

        It is for models that take token ids as ``input_ids`` or first, and keys and values as ``cache`` or
        ``past_key_values``.
        """

        return self._begins(tell)

    @contextmanager
    def _begins(self, tell: OnTokens, module: Any = None) -> Iterator[None]:
        now = threading.local()  # the ends of forwards, one in the other

        def called(module: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
            given = kwargs.get("input_ids", args[0] if args else None)
            kept = kwargs.get("cache", kwargs.get("past_key_values"))  # transformers has renamed it in 5.24
            before = getattr(kept, "get_seq_length", int)()
            vars(now).setdefault("ends", []).append(tell(ids_of(given), before))

        def ended(*_: Any) -> None:
            ends = vars(now).get("ends")
            if ends and (end := ends.pop()) is not None:
                end()

        whole = module or self.model
        with ExitStack() as attached:
            attached.callback(whole.register_forward_pre_hook(called, with_kwargs=True).remove)
            attached.callback(whole.register_forward_hook(ended, always_call=True).remove)
            yield

    @staticmethod
    def _until_done(name: str, hooks: Hooks) -> Callable[[Tensor], Tensor]:
        def hooked(activation: Tensor) -> Tensor:
            value = hooks(name, activation)
            if hooks.done:
                raise _Done
            return value

        return hooked

    def _attach(self, name: str, hooked: Callable[[Tensor], Tensor]) -> Any:
        """Have torch call ``hooked`` at ``name``; what is returned can be removed."""
        if (module := self._module(name)) is not None:
            return module.register_forward_hook(lambda module, args, out: _at_first(out, hooked))
        if (module := self._module(name.removesuffix(_INPUT))) is not None:
            return module.register_forward_pre_hook(
                lambda module, args, kwargs: _at_first((args, kwargs), hooked), with_kwargs=True
            )
        raise self.no_hook(name)

    def check_runs(self, name: str) -> None:
        check_not_compiled(self.model, name, self._hooked_module(name))

    def _hooked_module(self, name: str) -> Any:
        """What torch's hooks for the hook ``name`` are added to."""
        return self._module(name) or self._module(name.removesuffix(_INPUT))

    def _module(self, path: str) -> Any:
        try:
            return self.model.get_submodule(path) if path else None
        except AttributeError:
            return None

    def tokenize(self, text: str) -> list[int]:
        return text_ids(self._read_by(), text)

    def tokenizing(self) -> Callable[[str], Sequence[int]] | None:
        """See :class:`saekit.abilities.TokenizesElsewhere`; of a subclass that tokenizes in a way of its own, None."""
        own = type(self).tokenize is ModuleBackend.tokenize and self.tokenizer is not None
        return partial(text_ids, self.tokenizer) if own else None

    def token_texts(self, tokens: Sequence[int]) -> list[str]:
        return texts_of(self._read_by(), tokens)

    def _read_by(self) -> Any:
        if self.tokenizer is None:
            raise ModelError(
                f"the model {self.name!r} has no tokenizer, so it cannot read text. Give the model one, or use a "
                "dataset of token ids"
            )
        return self.tokenizer

    def memory_bytes(self) -> int:
        """The weights'."""
        return sum(parameter.nbytes for parameter in self.model.parameters())

    def fingerprint(self) -> str | None:
        return None if self.device == "meta" else self._fingerprint  # where there are no weights

    @cached_property
    def _fingerprint(self) -> str:
        """Three random projections of a sample of the weights, rounded: other weights give others."""
        import torch

        samples = []
        for values in self.model.parameters():
            flat = values.detach().flatten()
            samples.append(flat[:: max(len(flat) // 64, 1)][:64].cpu().double())
        weights = torch.cat(samples)
        directions = torch.randn(3, len(weights), dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        norm = weights.norm()
        return " ".join(f"{value:.3f}" for value in [*(directions @ weights / norm).tolist(), norm.log().item()])


def _standing(name: str, replacement: Replacement, begun: Begun) -> Callable[[Tensor], Tensor]:
    """``replacement`` at the hook ``name``, as torch calls it."""

    def hooked(activation: Tensor) -> Tensor:
        value = put(name, by_position(activation, begun.shape or activation.shape[:2]), replacement)
        return value if value.shape == activation.shape else value.reshape(activation.shape)

    return hooked


class _Evaluating:
    """Calling it gives a context in which the modules of ``model`` are in evaluation mode; then each is as it was.

    Forwards may be nested, or run in several threads: the modules go back when the last one has ended.
    """

    def __init__(self, model: Any) -> None:
        self._model = model
        self._lock = threading.Lock()
        self._forwards = 0
        self._training: list[Any] = []

    @contextmanager
    def __call__(self) -> Iterator[None]:
        with self._lock:
            self._forwards += 1
            if self._forwards == 1:
                self._training = [module for module in self._model.modules() if module.training]
                self._set(False)
        try:
            yield
        finally:
            with self._lock:
                self._forwards -= 1
                if not self._forwards:
                    self._set(True)
                    self._training = []

    def _set(self, training: bool) -> None:
        for module in self._training:
            module.training = training  # this module alone, not what is in it


class _Done(Exception):  # noqa: N818 - not an error
    """Everything that was asked for is there."""


def _at_first(out: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """``out`` with the first tensor in it changed; it may be a tensor, or tuples, lists and dictionaries of others.

    What holds the tensor is made anew only if another takes its place.
    """
    path = _path_to_tensor(out)
    return out if path is None else _changed(out, path, change)


def _path_to_tensor(out: Any) -> tuple[Any, ...] | None:
    import torch

    if isinstance(out, torch.Tensor):
        return ()
    places: Any = out.items() if isinstance(out, dict) else enumerate(out) if isinstance(out, (tuple, list)) else ()
    for place, value in places:
        if (path := _path_to_tensor(value)) is not None:
            return place, *path
    return None


def _changed(out: Any, path: tuple[Any, ...], change: Callable[[Tensor], Tensor]) -> Any:
    if not path:
        return change(out)
    place, *rest = path
    new = _changed(out[place], tuple(rest), change)
    if new is out[place]:
        return out
    if isinstance(out, dict):
        copy = out.copy()
        copy[place] = new
        return copy
    items = [*out[:place], new, *out[place + 1 :]]
    return type(out)(*items) if hasattr(out, "_fields") else type(out)(items)
