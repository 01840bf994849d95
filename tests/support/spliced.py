"""Models of every backend with a place in each, and all that hooks leave in a model."""

from __future__ import annotations

import copy
from functools import cache
from typing import Any

import attrs
import torch
from support.causal_lms import make_causal_lm
from support.tiny import hooked_mamba, hooked_transformer, tokenizer
from torch import nn

import saekit
from saekit.protocols import ModelBackend
from saekit.testing import FakeBackend

TOKENS = torch.randint(1, 100, (2, 7), generator=torch.Generator().manual_seed(0))


@attrs.frozen
class Place:
    """A backend, and hooks of it: two in the residual stream, one after the other, and one that comes later."""

    model: Any
    """What a library calls its model; None: there is none."""
    backend: ModelBackend
    early: str
    late: str
    width: int

    @property
    def target(self) -> Any:
        """What a user would splice into."""
        return self.backend if self.model is None else self.model


class Bare:
    """A backend that has what its kind must have, and nothing else."""

    def __init__(self, inner: ModelBackend) -> None:
        for name in ("name", "device", "n_ctx", "d_vocab", "special_tokens", "hook_names", "tokenize", "token_texts",
                     "run", "unembedding", "fingerprint"):  # fmt: skip
            setattr(self, name, getattr(inner, name))


KINDS = ("HookedTransformer", "HookedMamba", "TransformerBridge", "AutoModelForCausalLM", "fake", "bare")


@cache
def place(kind: str) -> Place:
    """The one of that kind: tests leave it as it was."""
    if kind in ("fake", "bare"):
        backend: Any = FakeBackend()
        backend = Bare(backend) if kind == "bare" else backend
        return Place(None, backend, "blocks.0.hook_resid_post", "blocks.1.hook_resid_post", 8)
    if kind == "AutoModelForCausalLM":
        model = make_causal_lm("gpt2")
        model.tokenizer = tokenizer()
        found = Place(model, saekit.load_model(model), "transformer.h.0", "transformer.h.1", 16)
    elif kind == "TransformerBridge":
        model = bridge()
        found = Place(model, saekit.load_model(model), "blocks.0.hook_resid_post", "blocks.1.hook_resid_post", 16)
    else:
        model = hooked_transformer(n_layers=3) if kind == "HookedTransformer" else hooked_mamba()
        names = ("blocks.0.hook_resid_post", "blocks.1.hook_resid_post")
        found = Place(model, saekit.load_model(model), *names, 16 if kind == "HookedTransformer" else 32)
    model.requires_grad_(False)
    return found


def bridge() -> Any:
    """A tiny GPT-2 of transformers as transformer_lens wraps it."""
    from transformer_lens.model_bridge import TransformerBridge

    boot: Any = TransformerBridge.boot_transformers
    return boot("tiny-gpt2", hf_model=make_causal_lm("gpt2"), tokenizer=tokenizer(), device="cpu")


_HOOKS = (
    "_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks", "_state_dict_hooks",
    "_forward_hooks_with_kwargs", "_forward_pre_hooks_with_kwargs", "_forward_hooks_always_called",
)  # fmt: skip


def state(model: Any) -> Any:
    """All that a splice could leave behind, in its order."""
    if not isinstance(model, nn.Module):
        return copy.copy(vars(model))
    hooks = {
        name: [[*vars(module)[kind].items()] for kind in _HOOKS if kind in vars(module)]
        for name, module in model.named_modules()
    }
    lens = {
        name: ([*point.fwd_hooks], [*point.bwd_hooks], dict(point.ctx))
        for name, point in getattr(model, "hook_dict", {}).items()
    }
    own = {name: value for name, value in vars(model).items() if not isinstance(value, (dict, nn.Module))}
    dicts = [[*getattr(model, name, {}).items()] for name in ("hook_dict", "mod_dict")]
    flags = {name: (module.training, "forward" in vars(module)) for name, module in model.named_modules()}
    learning = [value.requires_grad for value in model.parameters()]
    return hooks, lens, own, dicts, flags, learning


def sae_state(sae: Any) -> Any:
    """Likewise of an SAE."""
    grads = [None if value.grad is None else value.grad.clone() for value in sae.parameters()]
    return state(sae), sae.use_error_term, grads, [value.requires_grad for value in sae.parameters()], sae.info
