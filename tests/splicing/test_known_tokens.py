"""Which token ids a splice goes by: those of the forward that runs, and of none that has ended."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from support.causal_lms import make_causal_lm
from support.saes import at, drawn_sae
from support.spliced import TOKENS, place

import saekit
from saekit.errors import ModelError
from saekit.tokens import TokenChoice

pytestmark = pytest.mark.usefixtures("one_thread")

OTHERS = TOKENS.flip(0)
WITHOUT = TokenChoice(exclude=TOKENS[0, :3].tolist())
CALLED = ("HookedTransformer", "HookedMamba", "TransformerBridge", "AutoModelForCausalLM")


@pytest.fixture(autouse=True)
def no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


def part_of(kind: str, model: Any) -> Any:
    """Called as ``part(model, tokens)``: a part of the model that holds its first block, without the whole."""
    if kind == "HookedTransformer":
        return lambda ids: model.blocks[0](model.embed(ids) + model.pos_embed(ids))
    if kind == "HookedMamba":
        return lambda ids: model.blocks[0](model.embedding(ids))
    inner = model.original_model if kind == "TransformerBridge" else model
    return lambda ids: inner.transformer(ids)


@pytest.mark.parametrize("kind", CALLED)
@pytest.mark.parametrize(
    "options", [{"tokens": WITHOUT}, {"mask": lambda tokens: tokens % 2 == 0}], ids=["tokens", "mask"]
)
def test_a_part_that_is_called_alone_never_goes_by_the_tokens_of_an_earlier_forward(kind: str, options: Any) -> None:
    there = place(kind)
    part = part_of(kind, there.model)
    with saekit.splice(there.target, at(drawn_sae(there.width), there.early), **options) as spliced:
        for forward in (lambda: there.model(TOKENS), lambda: spliced.run(TOKENS, want="loss")):
            forward()
            with pytest.raises(ModelError, match=r"are not known: give the model .* call it as a whole"):
                part(OTHERS)


@pytest.mark.parametrize("kind", CALLED)
def test_a_forward_that_raised_is_forgotten_too(kind: str) -> None:
    there = place(kind)
    with saekit.splice(there.target, at(drawn_sae(there.width), there.early), tokens=WITHOUT) as spliced:
        fails = spliced.hook(f"{there.early}.hook_sae_acts_post", lambda features: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            there.model(TOKENS)
        fails.remove()
        with pytest.raises(ModelError, match="are not known"):
            part_of(kind, there.model)(OTHERS)


@pytest.mark.parametrize("kind", CALLED)
def test_a_forward_inside_another_leaves_it_its_own_tokens(kind: str) -> None:
    there = place(kind)
    early, late = (at(drawn_sae(there.width, seed=seed), hook) for seed, hook in enumerate((there.early, there.late)))
    with saekit.splice(there.target, [early, late], tokens=WITHOUT) as spliced:
        expected = there.backend.run(TOKENS, want="logits").logits
        inside: list[bool] = []

        def looks(features: Any) -> Any:
            if not inside:
                inside.append(True)
                there.model(OTHERS[:, :4])
                spliced.run(OTHERS[:, :5], want="loss")
            return features

        spliced.hook(f"{there.early}.hook_sae_acts_post", looks)
        found = there.model(TOKENS)
    assert inside
    assert torch.equal(getattr(found, "logits", found), expected)


def test_places_are_those_of_the_forward_that_runs() -> None:
    model = make_causal_lm("gpt2")
    sae = at(drawn_sae(16), "transformer.h.0")
    named = inspect.signature(model.transformer.forward).parameters  # transformers has renamed it in 5.24
    name = "cache" if "cache" in named else "past_key_values"
    with saekit.splice(model, sae, tokens=TokenChoice(seqpos_slice=(2, None))):
        kept = model(TOKENS, use_cache=True).past_key_values
        model(TOKENS[:, :1])  # nothing came before
        with pytest.raises(ModelError, match="are not known"):
            model.transformer(TOKENS[:, :1], **{name: kept})


def test_another_model_that_shares_a_layer_is_not_taken_for_the_spliced_one() -> None:
    model, other = make_causal_lm("llama"), make_causal_lm("llama")
    other.model.layers[0] = model.model.layers[0]
    with saekit.splice(model, at(drawn_sae(16), "model.layers.0"), tokens=WITHOUT):
        model(TOKENS)
        with pytest.raises(ModelError, match="are not known"):
            other(OTHERS)
