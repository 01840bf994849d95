"""Models and SAEs after splices: every hook in its order, permanent ones too, and outputs bit for bit."""

from __future__ import annotations

import contextlib
import threading
from typing import Any

import pytest
import torch
from hypothesis import given as drawn
from hypothesis import settings
from hypothesis import strategies as st
from support.causal_lms import make_causal_lm
from support.saes import at, drawn_sae
from support.spliced import TOKENS, place, sae_state, state
from support.tiny import hooked_transformer
from torch import Tensor

import saekit

pytestmark = pytest.mark.usefixtures("one_thread")

HOOK = "blocks.1.hook_resid_post"


def scaled(by: float) -> Any:
    return lambda value, hook: value * by


def shifted(by: float) -> Any:
    return lambda value, hook: value + by


def test_hooks_that_were_there_run_before_and_stay_in_their_order() -> None:
    model = hooked_transformer()
    point = model.hook_dict[HOOK]
    model.add_perma_hook(HOOK, scaled(2))
    model.add_hook(HOOK, shifted(1))
    point.register_forward_hook(lambda module, args, out: out * 3)
    model.add_hook("blocks.0.hook_resid_post", scaled(0.5), is_permanent=True)
    sae = at(drawn_sae(16), HOOK)
    raw = model.run_with_cache(TOKENS)[1]["blocks.1.hook_resid_mid"]
    raw = raw + model.run_with_cache(TOKENS)[1]["blocks.1.hook_mlp_out"]
    before = state(model)
    with saekit.splice(model, sae) as spliced:
        found = spliced.run(TOKENS, read=[f"{HOOK}.hook_sae_input", HOOK]).held
        torch.testing.assert_close(found[f"{HOOK}.hook_sae_input"], (raw * 2 + 1) * 3)
        model.add_hook(HOOK, scaled(0))  # a user's, while it lasts: after the SAE
        assert model.run_with_cache(TOKENS)[1]["ln_final.hook_normalized"].abs().max() == 0
        point.remove_hooks("fwd")  # which takes the one that is not permanent, too
        model.add_hook(HOOK, shifted(1))
    after = state(model)
    assert [name for name, hooks in before[0].items() if [*map(len, hooks)] != [*map(len, after[0][name])]] == []
    assert before[3] == after[3]


def test_nothing_is_left_of_nested_repeated_and_raising_uses() -> None:
    model = hooked_transformer().eval()
    model.add_perma_hook(HOOK, scaled(2))
    model.add_hook(HOOK, shifted(1))
    saes = [at(drawn_sae(16, seed=seed), HOOK) for seed in range(3)]
    saes[0].hook_sae_acts_post.add_hook(lambda features, point: features * 2)
    before, clean, of_saes = state(model), model(TOKENS), [sae_state(sae) for sae in saes]
    for _ in range(2):
        with pytest.raises(RuntimeError, match="mine"), saekit.splice(model, saes[0], use_error_term=True) as outer:
            outer.hook(f"{HOOK}.hook_sae_acts_post", torch.zeros_like)
            with saekit.splice(model, saes[1:], sites="blocks.0.attn.hook_z"):
                model.run_with_cache(TOKENS)
                raise RuntimeError("mine")
        assert state(model) == before
        assert torch.equal(model(TOKENS), clean)
        assert [sae_state(sae) for sae in saes] == of_saes


def test_splices_that_overlap_leave_nothing_in_any_order() -> None:
    model = hooked_transformer().eval()
    before, clean = state(model), model(TOKENS)
    first, second = (saekit.splice(model, at(drawn_sae(16, seed=seed), HOOK)) for seed in (1, 2))
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    alone = model(TOKENS)
    assert "forward" in vars(model)
    second.__exit__(None, None, None)
    assert state(model) == before
    assert torch.equal(model(TOKENS), clean)
    with saekit.splice(model, at(drawn_sae(16, seed=2), HOOK)):
        assert torch.equal(model(TOKENS), alone)


def test_a_function_that_somebody_puts_into_the_model_meanwhile_stays() -> None:
    model = hooked_transformer().eval()
    with saekit.splice(model, at(drawn_sae(16), HOOK)):
        around = model.forward
        model.forward = lambda *args, **options: around(*args, **options) * 0
    assert model(TOKENS).abs().max() == 0
    del model.forward
    assert model(TOKENS).abs().max() > 0


def test_training_mode_and_what_learns_stay() -> None:
    model = make_causal_lm("gpt2").train()
    model.lm_head.requires_grad_(False)
    sae = at(drawn_sae(16), "transformer.h.1").train()
    sae.b_enc.requires_grad_(False)
    before, of_sae = state(model), sae_state(sae)
    with saekit.splice(model, sae, use_error_term=True) as spliced:
        spliced.run(TOKENS, want="loss")
        model(TOKENS)
        assert state(model)[4:] == before[4:]
    assert state(model) == before
    assert sae_state(sae) == of_sae


class _StopError(Exception):
    pass


ACTIONS = st.recursive(
    st.sampled_from(["run", "raise", "call", "hook"]),
    lambda inner: st.tuples(st.integers(0, 2), st.booleans(), st.lists(inner, max_size=3)),
    max_leaves=6,
)


@drawn(st.lists(ACTIONS, min_size=1, max_size=3))
@settings(max_examples=25)
def test_whatever_is_nested_in_whatever_leaves_nothing(actions: list[Any]) -> None:
    there = place("AutoModelForCausalLM")
    before, clean = state(there.model), there.model(TOKENS).logits
    saes = [at(drawn_sae(16, seed=seed), hook) for seed, hook in enumerate((there.early, there.late, there.early))]
    of_saes = [sae_state(sae) for sae in saes]
    with contextlib.suppress(_StopError):
        do(actions, there, saes, None)
    assert state(there.model) == before
    assert torch.equal(there.model(TOKENS).logits, clean)
    assert [sae_state(sae) for sae in saes] == of_saes


def do(actions: list[Any], there: Any, saes: list[Any], inside: Any) -> None:
    for action in actions:
        if isinstance(action, tuple):
            number, error_term, inner = action
            with saekit.splice(there.model, saes[number], use_error_term=error_term) as spliced:
                do(inner, there, saes, spliced)
        elif action == "raise":
            raise _StopError
        elif inside is None or action == "call":
            there.model(TOKENS)
        elif action == "run":
            inside.run(TOKENS, read=inside.names, want="loss")
        else:
            inside.hook(inside.names[0], torch.zeros_like)


def test_two_threads_do_not_see_each_other_s_points() -> None:
    there = place("fake")
    sae = at(drawn_sae(8), there.early)
    name = f"{there.early}.hook_sae_acts_post"
    expected: dict[int, Tensor] = {}
    found: dict[int, Tensor] = {}
    with saekit.splice(there.backend, sae, use_error_term=True) as spliced:

        def ask(number: int, into: dict[int, Tensor]) -> None:
            tokens = TOKENS[:, : number + 1]
            for _ in range(20):
                held = spliced.run(tokens, read=[name], replace={name: lambda x: x * number}, want="loss")
                into[number] = held.loss

        for number in range(4):
            ask(number, expected)
        threads = [threading.Thread(target=ask, args=(number, found)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert all(torch.equal(found[number], expected[number]) for number in range(4))
