"""What backends say of a model that they cannot take."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from saekit.abilities import HasModel
from saekit.errors import ModelError

if TYPE_CHECKING:
    from torch.nn import Module

__all__ = ["attached_to", "check_not_compiled", "check_nothing_attached", "is_wrapper_of_compile", "wrong_model"]

_WRAPPED = "_orig_mod"
_attached: Counter[int] = Counter()
"""How much is attached now, by the identities of models, which live as long as something is."""


@contextmanager
def attached_to(model: object) -> Iterator[None]:
    """While the context is open, something is attached to ``model``, by whichever of its backends."""
    _attached[id(model)] += 1
    try:
        yield
    finally:
        _attached[id(model)] -= 1
        if not _attached[id(model)]:
            del _attached[id(model)]


@runtime_checkable
class _HoldsSAEs(Protocol):
    """A model that SAEs are added to and taken from by methods, as the HookedSAETransformer of sae-lens is."""

    acts_to_saes: Mapping[str, object]

    def reset_saes(self) -> None:
        """Take them away."""


def check_nothing_attached(model: object, what: str) -> None:
    """Raise :class:`saekit.errors.ModelError` where a splice of ``model``, which may be a backend, is open.

    ``what`` would be found out in it.
    """
    inner = model.model if isinstance(model, HasModel) else model
    if id(model) not in _attached and id(inner) not in _attached:
        return
    if isinstance(inner, _HoldsSAEs) and inner.acts_to_saes:
        end = "it has SAEs. Call its reset_saes() first"
    else:
        end = "a splice is open. End its with block first"
    raise ModelError(
        f"{what} is of the model itself, and something is attached to this one: {end}, or give another copy of the "
        "model"
    )


def is_wrapper_of_compile(model: object) -> bool:
    """Whether ``torch.compile(module)`` returned it."""
    return _WRAPPED in getattr(model, "_modules", ())


def check_not_compiled(model: Module, hook: str, module: Module | None) -> None:
    """Raise :class:`saekit.errors.ModelError` where ``hook``, which is at ``module`` of ``model``, is in compiled code.

    torch does not look again at the hooks of what is inside, once it has compiled it (torch's own option
    ``skip_nnmodule_hook_guards``): what is attached there would do nothing.  At what was compiled itself, it does.
    """
    for path, whole in model.named_modules():
        if _is_compiled(whole) and any(one is module for one in whole.modules() if one is not whole):
            raise ModelError(
                f"the hook {hook!r} is inside {path or 'the model'} ({type(whole).__name__}), which torch.compile has "
                "compiled, and compiled code does not see what is put there later. Load the model anew and leave it as "
                "it is, or compile its blocks one by one and take hooks that are a block's input or output"
            )


def _is_compiled(module: Module) -> bool:
    by_hand = hasattr(vars(module).get("forward"), "_torchdynamo_orig_callable")  # module.forward = torch.compile(...)
    return module._compiled_call_impl is not None or by_hand or is_wrapper_of_compile(module)


def wrong_model(loaded: object, expected: str, backend: str | None = None) -> ModelError:
    """The error for an object that was passed as the model where ``expected`` was.

    ``backend`` is the key of the one that takes such objects, if it is known.
    """
    if isinstance(loaded, str):
        hint = f"A model is chosen by its name with model.name = {loaded!r}"
    elif is_wrapper_of_compile(loaded):
        hint = f"torch.compile made it, and compiled code does not see hooks: give the model inside, its .{_WRAPPED}"
    elif backend is not None:
        hint = f"It is {_article(backend)} {backend}, and its backend must be named: model.backend={backend}"
    else:
        hint = "Of models of other kinds, saekit needs a backend (model.backend)"
    return ModelError(f"model must be {_article(expected)} {expected}, found {type(loaded).__name__}. {hint}")


def _article(word: str) -> str:
    return "an" if word[:1] in "AEIOaeio" else "a"
