"""What forwards give without ``grad`` are ordinary tensors, which may be learned from and written to."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
from support.saes import at, drawn_sae
from support.spliced import KINDS, TOKENS, place
from support.tiny import hooked_transformer
from torch import Tensor

import saekit
from saekit.abilities import StartsInside

pytestmark = pytest.mark.usefixtures("one_thread")

AROUND: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "gradients": torch.enable_grad, "no_grad": torch.no_grad, "inference mode": torch.inference_mode,
}  # fmt: skip


@pytest.fixture(params=AROUND)
def around(request: pytest.FixtureRequest) -> Callable[[], AbstractContextManager[Any]]:
    return AROUND[request.param]


@pytest.fixture(params=KINDS)
def there(request: pytest.FixtureRequest) -> Any:
    return place(request.param)


def check_ordinary(*values: Tensor) -> None:
    for value in values:
        assert not value.requires_grad
        assert not value.is_inference()
        weight = torch.ones(value.shape[-1], requires_grad=True)
        (value * weight).sum().backward()  # a probe keeps what it reads
        assert torch.equal(weight.grad, value.flatten(0, -2).sum(0))
        value.add_(1)


def test_of_a_forward(there: Any, around: Any) -> None:
    with around():
        tokens = TOKENS.clone()  # the caller's own
        forward = there.backend.run(tokens, read=[there.early, there.late], want="logits")
        loss = there.backend.run(tokens, want="loss").loss
    check_ordinary(*forward.held.values(), forward.logits, loss)


def test_saes_of_every_way_take_what_is_held(there: Any) -> None:
    held = there.backend.run(TOKENS, read=[there.early]).held[there.early]
    for applied in (False, True):
        sae = drawn_sae(there.width, apply_b_dec_to_input=applied)
        sae.encode(held).sum().backward()
        assert sae.W_enc.grad is not None


def test_of_a_splice(there: Any, around: Any) -> None:
    acts, error = (f"{there.early}.hook_sae_{point}" for point in ("acts_post", "error"))
    parameter = torch.nn.Parameter(torch.ones(there.width))
    with saekit.splice(there.target, at(drawn_sae(there.width), there.early), use_error_term=True, read=[error]) as one:
        one.hook(error, lambda value: parameter.expand_as(value))
        with around():
            forward = one.run(TOKENS.clone(), read=[acts, there.early, there.late], want="logits")
    check_ordinary(*forward.held.values(), forward.logits)
    assert not one.held[error].requires_grad
    assert not one.held[error].is_inference()


def test_gradients_where_the_caller_is_in_inference_mode(there: Any) -> None:
    expected = there.backend.run(TOKENS, read=[there.early], want="loss", grad=True)
    (slope,) = torch.autograd.grad(expected.loss.sum(), expected.held[there.early])
    with torch.inference_mode():
        found = there.backend.run(TOKENS.clone(), read=[there.early], want="loss", grad=True)
    assert torch.equal(torch.autograd.grad(found.loss.sum(), found.held[there.early])[0], slope)


@pytest.mark.parametrize("kind", ["HookedTransformer", "AutoModelForCausalLM"])
def test_of_a_forward_that_begins_inside(kind: str, around: Any) -> None:
    there = place(kind)
    assert isinstance(there.backend, StartsInside)
    entry = there.backend.entry_of([there.late])
    assert entry is not None
    plain = there.backend.run(TOKENS, read=[entry], want="logits")
    with around():
        value = plain.held[entry].clone()  # made where the caller is
        begun = there.backend.run_from(TOKENS, entry, value, read=[entry], want="logits")
        learned = there.backend.run_from(TOKENS, entry, value, read=[entry], want="logits", grad=True)
    (slope,) = torch.autograd.grad(learned.logits.sum(), learned.held[entry])
    assert slope.shape == value.shape
    torch.testing.assert_close(begun.logits, plain.logits)
    check_ordinary(begun.held[entry], begun.logits)
    assert not value.requires_grad


def test_of_a_model_that_was_made_in_inference_mode(around: Any) -> None:
    """What some hooks hold there is a view of its weights."""
    with torch.inference_mode():
        model = hooked_transformer()
    names = ["hook_embed", "hook_pos_embed", "blocks.1.hook_resid_post"]
    with around():
        held = saekit.load_model(model).run(TOKENS, read=names).held
    for value in held.values():
        assert not value.is_inference()
        assert not value.requires_grad
    assert torch.equal(held["hook_pos_embed"][0], model.W_pos[: TOKENS.shape[1]])
