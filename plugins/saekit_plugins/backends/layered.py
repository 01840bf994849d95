"""What models of transformers share, alone or in a bridge.  A helper of the backends' plugins, not a plugin."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Collection, Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Any

from saekit import ModelError
from saekit.backends import InsideBackend, ModuleBackend

if TYPE_CHECKING:
    from torch import Tensor

    from saekit_plugins.backends.layer_order import LayerOrder

__all__ = ["LayeredBackend", "causal_mask", "checked_kwargs", "output_weights"]


class LayeredBackend(ModuleBackend, InsideBackend):
    """A model of transformers whose layers may run one after the other.

    A short forward shows in which order its hooks are met, and another one, for each entry, that one which begins there
    gives the same logits: some models hand more from layer to layer than hidden states.
    """

    def entry_of(self, hooks: Collection[str]) -> str | None:
        """The input of a layer or what it returns, of models whose layers run one after the other."""
        entry = None if self._order is None else self._last_before(hooks)
        if entry is not None and entry not in self._same:
            whole = self._run(self._few(), [entry], None, "logits", False)
            self._run(self._few(8), (), None, "logits", False)  # what a layer keeps of a forward is of this one now
            begun = self._run(self._few(), (), None, "logits", False, (entry, whole.held[entry]))
            difference = (begun.logits.double() - whole.logits.double()).abs().max()
            self._same[entry] = bool(difference <= 1e-6 * whole.logits.double().abs().max())
        return entry if entry is not None and self._same[entry] else None

    @abstractmethod
    def _last_before(self, hooks: Collection[str]) -> str | None:
        """The last input or output of a layer that is not met after any of ``hooks``."""

    @cached_property
    def _same(self) -> dict[str, bool]:
        """By the hook where a forward begins: whether it gives what a whole one does."""
        return {}

    @cached_property
    def _order(self) -> LayerOrder | None:
        return self._observed(self.model, getattr(self.model.config.get_text_config(), "num_hidden_layers", 0))

    def _observed(self, model: Any, layers: int) -> LayerOrder | None:
        """The order in ``model``, of ``layers`` layers; None where it cannot be known."""
        from saekit_plugins.backends.layer_order import observed

        if self.device == "meta" or not layers:  # without numbers, nothing shows
            return None
        tokens = self._few()
        with self.running(tokens, grad=False):
            return observed(model, layers, lambda: self.logits(tokens))

    def _few(self, first: int = 0) -> Tensor:
        import torch

        length = min(8, self.n_ctx or 8)
        return torch.arange(first, first + length, device=self.device)[None] % self.d_vocab


def causal_mask(tokens: Tensor) -> Tensor:
    """``[b, 1, t, t]``: which tokens each token sees."""
    import torch

    batch, length = tokens.shape
    return torch.ones(batch, 1, length, length, dtype=torch.bool, device=tokens.device).tril()


def checked_kwargs(backend: ModuleBackend, given: Mapping[str, Any], accepted: Collection[str]) -> Mapping[str, Any]:
    """``given`` options of every forward, all of which must be ``accepted``."""
    if unknown := sorted(set(given) - set(accepted)):
        raise ModelError(
            f"the forward of {backend.name!r} does not take {unknown} (model.backend.forward_kwargs); it takes "
            f"{sorted(accepted)}"
        )
    return given


def output_weights(module: Any) -> Tensor | None:
    """``[d, d_out]``, by which a module of transformers multiplies; None for one that does something else."""
    from torch import nn

    if not isinstance(module, nn.Linear) and type(module).__name__ != "Conv1D":  # others may be quantized, or add to it
        return None
    weights: Tensor = module.weight
    if weights.ndim != 2 or not weights.is_floating_point():
        return None
    return weights.T if isinstance(module, nn.Linear) else weights  # transformers' Conv1D lies the other way
