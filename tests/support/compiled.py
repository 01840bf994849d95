"""Models whose compiled code is counted."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
from saekit_plugins.backends.hooked_transformer import TransformerLensBackend
from torch import Tensor

import saekit
from saekit.config import ModelConfig

TOKENS = torch.randint(1, 2000, (3, 20), generator=torch.Generator().manual_seed(0))
HOOKS = [
    "blocks.0.hook_resid_post",
    "blocks.1.hook_resid_pre",
    "blocks.1.hook_resid_mid",
    "blocks.1.hook_resid_post",
    "blocks.0.attn.hook_z",
    "blocks.1.attn.hook_pattern",
    "blocks.0.mlp.hook_post",
    "blocks.1.hook_mlp_out",
    "blocks.1.ln1.hook_normalized",
    "ln_final.hook_normalized",
]


class Counted:
    """In place of inductor: runs the graphs that torch traces, and counts them."""

    def __init__(self) -> None:
        self.graphs = self.runs = 0
        self.modes: list[str | None] = []

    def __call__(self, graph: Any, inputs: Any) -> Callable[..., Any]:
        self.graphs += 1

        def run(*args: Any) -> Any:
            self.runs += 1
            return self.outputs(graph(*args))

        return run

    def outputs(self, outputs: Any) -> Any:
        return outputs


def use(compiler: Counted, monkeypatch: pytest.MonkeyPatch) -> None:
    real = torch.compile
    _take_einops_as_they_are(monkeypatch)

    def compiling(function: Any, *, mode: str | None = None) -> Any:
        compiler.modes.append(mode)
        return real(function, backend=compiler)

    monkeypatch.setattr(torch, "compile", compiling)


def _take_einops_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """Trace calls of einops as single operations: reading their patterns is four fifths of the time that tracing takes.

    So did einops itself before torch 2.8; with the real compiler, they are traced as they are for everyone.
    """
    import einops
    from torch._dynamo import trace_rules

    allowed: Any = trace_rules._allowed_callable_ids
    operations = (einops.einsum, einops.rearrange, einops.reduce, einops.repeat)
    monkeypatch.setattr(allowed, "function_ids", allowed() | {id(operation) for operation in operations})


def real_compiler() -> AbstractContextManager[None]:
    """Inductor as it is, but that it makes code for any processor, and in this process.

    Trying which instructions the compiler for C++ knows takes it ten seconds, and starting other processes takes two.
    """
    import torch._inductor.config

    return torch._inductor.config.patch({"cpp.vec_isa_ok": False, "compile_threads": 1})  # type: ignore[no-any-return]


def backend(model: Any = None, *, mamba: bool = False, **config: Any) -> TransformerLensBackend:
    made: TransformerLensBackend = saekit.default_manager().build(
        "model_backends",
        "HookedMamba" if mamba else "HookedTransformer",
        model=ModelConfig(**{"compile": True} | config),
        loaded=model,
    )
    return made


def halved(activation: Tensor) -> Tensor:
    return activation * 0.5


def close(found: Tensor, expected: Tensor) -> bool:
    return torch.allclose(found, expected, atol=1e-5, equal_nan=True)


def state(model: Any) -> list[Any]:
    """What is attached to the modules of ``model``, beside the lists of hooks that run_with_hooks makes anew."""
    return [
        (name, module.__class__, sorted(vars(module)), vars(module).get("attn_scale").__class__)
        for name, module in model.named_modules()
    ] + [(name, id(hook), len(hook._forward_hooks), len(hook.fwd_hooks)) for name, hook in model.hook_dict.items()]
