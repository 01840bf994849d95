"""Models that ``torch.compile`` has compiled, which does not see hooks that are added later."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from support.causal_lms import make_causal_lm
from support.saes import at, drawn_sae
from support.spliced import TOKENS, bridge, state
from support.tiny import hooked_transformer
from torch import Tensor, nn

import saekit
from saekit.backends import ModuleBackend
from saekit.errors import ModelError

pytestmark = pytest.mark.usefixtures("one_thread")

INSIDE = r"the hook '{}' is inside {} \({}\), which torch.compile has compiled, .* Load the model anew"


class Small(nn.Module):
    """Quick to compile."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(100, 16)
        self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(16, 16), nn.Tanh()) for _ in range(2)])
        self.unembed = nn.Linear(16, 100)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for block in self.blocks:
            x = x + block(x)
        logits: Tensor = self.unembed(x)
        return logits


class SmallBackend(ModuleBackend):
    def logits(self, tokens: Tensor) -> Tensor:
        logits: Tensor = self.model(tokens)
        return logits


def small() -> SmallBackend:
    torch.manual_seed(0)
    return SmallBackend(Small(), name="small", d_vocab=100, n_ctx=None)


@pytest.fixture
def compiling() -> Iterator[None]:
    with torch.no_grad():
        yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("compiling")
def test_a_model_that_was_compiled_takes_no_saes_and_says_so() -> None:
    backend, sae = small(), at(drawn_sae(16), "blocks.0.1")
    model = backend.model
    with saekit.splice(backend, sae):  # the first time that the site is asked for
        pass
    model.compile(backend="eager")
    clean, before = model(TOKENS), state(model)
    handle = model.blocks[0][1].register_forward_hook(lambda module, args, out: out * 0)
    assert torch.equal(model(TOKENS), clean)  # torch itself does not see hooks
    handle.remove()
    expected = INSIDE.format("blocks.0.1", "the model", "Small")
    with pytest.raises(ModelError, match=expected), saekit.splice(backend, sae):
        pass
    backend.run(TOKENS, want="logits")
    with pytest.raises(ModelError, match=expected):
        backend.run(TOKENS, replace={"blocks.0.1": torch.zeros_like}, want="logits")
    assert state(model) == before
    assert torch.equal(model(TOKENS), clean)


@pytest.mark.usefixtures("compiling")
def test_blocks_that_are_compiled_one_by_one_take_saes_between_them() -> None:
    backend, plain = small(), small()
    for block in backend.model.blocks:
        block.compile(backend="eager")
    clean = backend.model(TOKENS)
    for seed in range(2):
        sae = at(drawn_sae(16, seed=seed), "blocks.1")
        with saekit.splice(plain, sae), saekit.splice(backend, sae):
            expected = plain.model(TOKENS)
            assert not torch.equal(expected, clean)
            torch.testing.assert_close(backend.model(TOKENS), expected)
        torch.testing.assert_close(backend.model(TOKENS), clean)
    refused(backend, "blocks.1.0", INSIDE.format("blocks.1.0", "blocks.1", "Sequential"))


def refused(backend: Any, hook: str, expected: str) -> None:
    with pytest.raises(ModelError, match=expected), backend.attached({hook: torch.zeros_like}):
        pass


def test_whatever_way_somebody_compiled_is_found() -> None:
    part, by_hand, wrapped = small(), small(), small()
    part.model.blocks[0].compile(backend="eager")
    by_hand.model.forward = torch.compile(by_hand.model.forward, backend="eager")
    wrapped.model.blocks[0] = torch.compile(wrapped.model.blocks[0], backend="eager")
    refused(part, "blocks.0.0.input", INSIDE.format("blocks.0.0.input", "blocks.0", "Sequential"))
    refused(by_hand, "blocks.1", INSIDE.format("blocks.1", "the model", "Small"))
    refused(wrapped, "blocks.0._orig_mod.1", INSIDE.format("blocks.0._orig_mod.1", "blocks.0", "OptimizedModule"))


@pytest.mark.parametrize("make", [hooked_transformer, bridge])
def test_so_it_is_in_models_of_transformer_lens(make: Any) -> None:
    model = make()
    backend: Any = saekit.load_model(model)
    model.blocks[0].compile(backend="eager")
    hook = "blocks.0.mlp.hook_post" if make is hooked_transformer else "blocks.0.mlp.hook_out"
    refused(backend, hook, f"the hook {hook!r} is inside .*blocks.0 ")


@pytest.mark.parametrize("options", [{}, {"backend": "AutoModelForCausalLM"}])
def test_what_torch_compile_returns_is_not_the_model(options: Any) -> None:
    wrapper: Any = torch.compile(make_causal_lm("llama"), backend="eager")
    with pytest.raises(ModelError, match="found OptimizedModule. torch.compile made it, .* give the model inside, its"):
        saekit.load_model(wrapper, **options)
    assert saekit.load_model(wrapper._orig_mod).d_vocab
