"""Which positions are replaced, and which part of what a hook holds."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.saes import at, drawn_sae, given
from support.spliced import KINDS, TOKENS, place
from torch import Tensor

import saekit
from saekit.errors import ModelError
from saekit.tokens import TokenChoice

pytestmark = pytest.mark.usefixtures("one_thread")

FIRST = TokenChoice(seqpos_slice=(1, None))


@pytest.mark.parametrize("kind", KINDS)
def test_positions_that_are_left_out_stay_bit_for_bit(kind: str) -> None:
    there = place(kind)
    sae = at(drawn_sae(there.width), there.early)
    clean = there.backend.run(TOKENS, read=[there.early]).held[there.early]
    mask = torch.rand(TOKENS.shape, generator=torch.Generator().manual_seed(0)) < 0.5
    excluded = TokenChoice(exclude=TOKENS[0, :3].tolist())
    cases: list[tuple[dict[str, Any], Tensor]] = [
        ({"mask": mask}, mask),
        ({"mask": lambda tokens: tokens % 2 == 0}, TOKENS % 2 == 0),
        ({"tokens": FIRST}, FIRST.kept(TOKENS)),
        ({"tokens": excluded}, excluded.kept(TOKENS)),
        ({"tokens": FIRST, "mask": mask}, FIRST.kept(TOKENS) & mask),
        ({}, torch.ones_like(mask)),
    ]
    for options, kept in cases:
        with saekit.splice(there.target, sae, **options) as spliced:
            held = spliced.run(TOKENS, read=[there.early]).held[there.early]
        assert torch.equal(held[~kept], clean[~kept])
        torch.testing.assert_close(held[kept], given(sae, clean)[kept])
        if there.model is not None:
            with saekit.splice(there.target, sae, **options):
                assert torch.equal(there.backend.run(TOKENS, read=[there.early]).held[there.early], held)


def test_an_sae_s_metadata_says_which_tokens_it_was_trained_on() -> None:
    there = place("fake")
    tokens = torch.cat([torch.zeros(2, 1, dtype=torch.long), TOKENS], dim=1)
    clean = there.backend.run(tokens, read=[there.early]).held[there.early]
    for metadata, out in (
        ({"exclude_special_tokens": True}, [0]),
        ({"seqpos_slice": [2, None]}, [0, 1]),
        ({}, []),
    ):
        with saekit.splice(there.target, at(drawn_sae(8), there.early, **metadata)) as spliced:
            held = spliced.run(tokens, read=[there.early]).held[there.early]
            assert [at for at in range(8) if torch.equal(held[:, at], clean[:, at])] == out
        with saekit.splice(there.target, at(drawn_sae(8), there.early, **metadata), tokens=TokenChoice()) as spliced:
            held = spliced.run(tokens, read=[there.early]).held[there.early]
            assert not (held == clean).all(-1).any()


def test_a_mask_that_does_not_fit_says_so() -> None:
    there = place("AutoModelForCausalLM")
    sae = at(drawn_sae(16), there.early)
    masks: list[tuple[Any, str]] = [
        (torch.ones(2, 5, dtype=torch.bool), r"torch.bool \[2, 5\]; a function"),
        (lambda tokens: tokens, r"torch.int64 \[2, 7\]"),
        (lambda tokens: True, "bool"),
    ]
    for mask, found in masks:
        error = pytest.raises(ModelError, match=rf"the mask must be torch.bool \[2, 7\], .* found {found}")
        with saekit.splice(there.model, sae, mask=mask), error:
            there.model(TOKENS)
    with saekit.splice(there.model, sae, tokens=FIRST):
        there.model(TOKENS)
        with pytest.raises(ModelError, match=r"whose activations are \[2, 7, '...'\], are not known: give the model"):
            there.model(inputs_embeds=torch.zeros(2, 7, 16))


def test_without_a_choice_token_ids_are_not_asked_for() -> None:
    there = place("AutoModelForCausalLM")
    x = torch.randn(2, 7, 16, generator=torch.Generator().manual_seed(0))
    sae = at(drawn_sae(16), there.early)
    with torch.no_grad():
        clean = there.model(inputs_embeds=x).logits
        with saekit.splice(there.model, sae):
            assert not torch.allclose(there.model(inputs_embeds=x).logits, clean, atol=1e-2)
        with saekit.splice(there.model, sae, use_error_term=True):
            torch.testing.assert_close(there.model(inputs_embeds=x).logits, clean, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["hook_q", "hook_k", "hook_v", "hook_z"])
def test_one_head_stays_one_head_and_all_heads_are_flattened(name: str) -> None:
    there, hook = place("HookedTransformer"), f"blocks.1.attn.{name}"
    clean = there.backend.run(TOKENS, read=[hook]).held[hook]
    sae = drawn_sae(8)
    with saekit.splice(there.model, sae, sites=saekit.Site(hook_name=hook, hook_head_index=1)) as spliced:
        held = spliced.run(TOKENS, read=[hook]).held[hook]
    assert torch.equal(held[:, :, 0], clean[:, :, 0])
    torch.testing.assert_close(held[:, :, 1], given(sae, clean[:, :, 1]))
    whole = drawn_sae(16)
    with saekit.splice(there.model, whole, sites=hook) as spliced:
        found = spliced.run(TOKENS, read=[hook, f"{hook}.hook_sae_acts_post"]).held
    torch.testing.assert_close(found[hook], given(whole, clean.flatten(-2)).unflatten(-1, (2, 8)))
    assert found[f"{hook}.hook_sae_acts_post"].shape == (2, 7, 24)


def test_text_and_one_sequence_are_token_ids_too() -> None:
    there = place("HookedTransformer")
    sae = at(drawn_sae(16), there.early)
    tokens = there.model.to_tokens("import os", prepend_bos=True)
    with saekit.splice(there.model, sae, tokens=FIRST):
        expected = there.model(tokens)
        assert torch.equal(there.model("import os", prepend_bos=True), expected)
        assert torch.equal(there.model(tokens[0]), expected)
        assert torch.equal(there.model.run_with_hooks(tokens), expected)


def test_an_sae_works_in_its_own_type() -> None:
    there = place("HookedTransformer")
    sae = at(drawn_sae(16), there.early)
    clean = there.backend.run(TOKENS, want="logits").logits
    for dtype in (torch.float64, torch.bfloat16):
        with saekit.splice(there.model, sae.to(dtype), use_error_term=True) as spliced:
            forward = spliced.run(TOKENS, read=[f"{there.early}.hook_sae_acts_post"], want="logits")
        assert forward.held[f"{there.early}.hook_sae_acts_post"].dtype == dtype
        assert forward.logits.dtype == torch.float32
        torch.testing.assert_close(forward.logits, clean, rtol=1e-4, atol=1e-4, msg=str(dtype))
