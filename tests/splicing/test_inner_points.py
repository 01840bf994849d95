"""The six points inside of every spliced SAE, read and replaced on every backend."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from support.saes import at, drawn_sae
from support.spliced import KINDS, TOKENS, place, state
from torch import Tensor

import saekit
from saekit.errors import ConfigError, ModelError
from saekit.sae.hooks import Watch

pytestmark = pytest.mark.usefixtures("one_thread")

POINTS = ("input", "acts_pre", "acts_post", "recons", "error", "output")


def parts(sae: Any, x: Tensor) -> dict[str, Tensor]:
    """What each point holds, by the definition."""
    pre = (x - sae.b_dec) @ sae.W_enc + sae.b_enc
    recons = pre.relu() @ sae.W_dec + sae.b_dec
    return {"input": x, "acts_pre": pre, "acts_post": pre.relu(), "recons": recons, "error": x - recons, "output": x}


@pytest.mark.parametrize("kind", KINDS)
def test_every_point_is_read_and_replaced(kind: str) -> None:
    there = place(kind)
    sae = at(drawn_sae(there.width, apply_b_dec_to_input=True), there.early)
    x = there.backend.run(TOKENS, read=[there.early]).held[there.early]
    names = [f"{there.early}.hook_sae_{point}" for point in POINTS]
    with torch.no_grad():
        expected = parts(sae, x)
    with saekit.splice(there.target, sae, use_error_term=True) as spliced:
        assert spliced.names == names
        held = spliced.run(TOKENS, read=names).held
        assert [*held] == names
        for name, point in zip(names, POINTS, strict=True):
            torch.testing.assert_close(held[name], expected[point], rtol=1e-4, atol=1e-4)
            seen: list[Tensor] = []

            def replaced(value: Tensor, seen: list[Tensor] = seen) -> Tensor:
                seen.append(value)
                return torch.full_like(value, 0.5)

            forward = spliced.run(TOKENS, read=[name, there.early], replace={name: replaced})
            torch.testing.assert_close(seen[0], held[name])
            torch.testing.assert_close(forward.held[name], held[name], msg="read before it is replaced")
            with torch.no_grad():
                new = changed(sae, x, expected, point)
            torch.testing.assert_close(forward.held[there.early], new, rtol=1e-4, atol=1e-4)


def changed(sae: Any, x: Tensor, clean: dict[str, Tensor], point: str) -> Tensor:
    """The output where ``point`` holds halves; the error is that of the SAE as it is."""
    half = {name: torch.full_like(value, 0.5) for name, value in clean.items()}
    if point == "output":
        return half["output"]
    if point == "error":
        return clean["recons"] + half["error"]
    recons = {
        "input": lambda: parts(sae, half["input"])["recons"],
        "acts_pre": lambda: half["acts_pre"].relu() @ sae.W_dec + sae.b_dec,
        "acts_post": lambda: half["acts_post"] @ sae.W_dec + sae.b_dec,
        "recons": lambda: half["recons"],
    }[point]()
    return recons + clean["error"]


def test_a_point_that_does_not_run_says_why() -> None:
    there = place("fake")
    with saekit.splice(there.target, at(drawn_sae(8), there.early), use_error_term=False) as spliced:
        assert f"{there.early}.hook_sae_error" not in spliced.names
        with pytest.raises(ModelError, match="is there without its error term: splice with use_error_term=True"):
            spliced.run(TOKENS, read=[f"{there.early}.hook_sae_error"])
        with pytest.raises(ModelError, match=r"no SAE of this splice has .*Did you mean .*acts_post"):
            spliced.run(TOKENS, replace={f"{there.early}.hook_sae_act_post": torch.zeros_like})
        with pytest.raises(ModelError, match="no SAE of this splice has the point 'hook_embed'"):
            spliced.hook("hook_embed", torch.zeros_like)
        with pytest.raises(ModelError, match=r"what replaces .*acts_post' must be a tensor of shape \[2, 7, 24\]"):
            spliced.run(TOKENS, replace={f"{there.early}.hook_sae_acts_post": lambda x: x[0]}, want="loss")


def test_other_names_are_the_model_s() -> None:
    there = place("HookedTransformer")
    error = pytest.raises(ModelError, match="has no hook 'hook_embod'. Did you mean 'hook_embed'")
    with saekit.splice(there.target, at(drawn_sae(16), there.early)) as spliced, error:
        spliced.run(TOKENS, read=["hook_embod"])


def test_an_architecture_without_pre_activations_has_no_such_point() -> None:
    sae = saekit.SAE.from_dict({"name": "matching_pursuit", "d_in": 16, "d_sae": 24})
    model = place("HookedTransformer").model
    with saekit.splice(model, sae, sites="blocks.0.hook_resid_post") as spliced:
        assert not [name for name in spliced.names if "acts_pre" in name]
        _, cache = model.run_with_cache(TOKENS)
        assert cache["blocks.0.hook_resid_post.hook_sae_acts_post"].shape == (2, 7, 24)


def test_names_are_short_where_they_are_unique() -> None:
    there, z = place("fake"), "blocks.0.attn.hook_z"
    heads = [saekit.Site(hook_name=z, hook_head_index=head) for head in (0, 1)]
    saes = [at(drawn_sae(4), heads[0]), at(drawn_sae(4), heads[1]), at(drawn_sae(8), there.late), at(drawn_sae(8), z)]
    with saekit.splice(there.target, saes) as spliced:
        names = [one.name for one in spliced.attachments]
        assert names == [f"{z}.head0", f"{z}.head1", there.late, z]
    with saekit.splice(there.target, {"mine": saes[2], "yours": saes[2]}) as spliced:
        assert [one.name for one in spliced.attachments] == ["mine", "yours"]
        assert spliced.run(TOKENS, read="yours.hook_sae_acts_post").held["yours.hook_sae_acts_post"].shape == (2, 7, 24)


@pytest.mark.parametrize("kind", ["HookedTransformer", "HookedMamba", "TransformerBridge"])
def test_points_are_in_the_library_s_own_cache_and_can_be_hooked_there(kind: str) -> None:
    there = place(kind)
    there.model.run_with_cache(TOKENS)  # of a bridge, transformers adds hooks of its own the first time
    model, before = there.model, state(there.model)
    name = f"{there.early}.hook_sae_acts_post"
    with saekit.splice(model, at(drawn_sae(there.width), there.early), use_error_term=True) as spliced:
        expected = spliced.run(TOKENS, read=spliced.names).held
        logits, cache = model.run_with_cache(TOKENS)
        assert {key for key in cache if "hook_sae" in key} == {*spliced.names}
        for key, value in expected.items():
            torch.testing.assert_close(cache[key], value)
        zeroed = spliced.run(TOKENS, replace={name: torch.zeros_like}, want="logits").logits
        hooks = [(name, lambda features, hook: torch.zeros_like(features))]
        torch.testing.assert_close(model.run_with_hooks(TOKENS, fwd_hooks=hooks), zeroed)
        model.add_hook(name, hooks[0][1])
        torch.testing.assert_close(model(TOKENS), zeroed)
        model.reset_hooks()
        torch.testing.assert_close(model(TOKENS), logits, msg="SAEs stay where hooks are reset")
        with saekit.splice(model, at(drawn_sae(there.width, seed=3, d_sae=9), there.early)):
            assert model.run_with_cache(TOKENS)[1][name].shape[-1] == 9, "the inner splice's own"
        assert model.run_with_cache(TOKENS)[1][name].shape[-1] == 24
    assert state(model) == before


@pytest.mark.parametrize("kind", ["HookedTransformer", "HookedMamba", "TransformerBridge"])
def test_saes_stay_where_a_library_resets_its_hooks(kind: str) -> None:
    there = place(kind)
    clean, before = there.model(TOKENS), state(there.model)
    with saekit.splice(there.target, at(drawn_sae(there.width), there.early)) as spliced:
        expected = there.model(TOKENS)
        assert not torch.equal(expected, clean)
        there.model.reset_hooks()
        assert torch.equal(there.model(TOKENS), expected)
        torch.testing.assert_close(spliced.run(TOKENS, want="logits").logits, expected)
    assert state(there.model) == before
    assert torch.equal(there.model(TOKENS), clean)


def test_every_forward_is_held_that_the_splice_was_told_to_read() -> None:
    there = place("AutoModelForCausalLM")
    name = f"{there.early}.hook_sae_acts_post"
    with saekit.splice(there.model, at(drawn_sae(16), there.early), read=[name]) as spliced:
        assert not spliced.held
        there.model(TOKENS)
        assert spliced.held[name].shape == (2, 7, 24)
        there.model(TOKENS[:1, :3])
        assert spliced.held[name].shape == (1, 3, 24)


def test_fast_ways_are_left_alone_where_nobody_looks_at_features(monkeypatch: pytest.MonkeyPatch) -> None:
    there = place("fake")
    sae = at(drawn_sae(8), there.early)
    dense: list[str] = []

    def decode(self: Any, *args: Any, **options: Any) -> Any:
        dense.append("decode")
        return plain(self, *args, **options)

    plain = type(sae).decode
    monkeypatch.setattr(type(sae), "decode", decode)
    with saekit.splice(there.target, sae, use_error_term=True) as spliced:
        spliced.run(TOKENS, want="logits")
        assert not dense
        spliced.run(TOKENS, read=[f"{there.early}.hook_sae_acts_post"])
        assert dense


def test_who_watches_is_alone_with_its_sae_and_its_thread() -> None:
    sae, seen = drawn_sae(8), []
    x = torch.ones(1, 8)
    clean = sae(x)

    def look(point: str, value: Tensor) -> Tensor:
        seen.append(point)
        return value + sae.encode(x).sum()  # a call of its own, which nobody watches

    with sae.watched(Watch(frozenset({"acts_post"}), look)):
        assert not torch.equal(sae(x), clean)
        thread = threading.Thread(target=lambda: seen.append(bool(torch.equal(sae(x), clean))))
        thread.start()
        thread.join()
    assert seen == ["acts_post", True]
    assert torch.equal(sae(x), clean)


def test_where_the_sae_has_no_pre_activations_a_watch_is_refused_as_a_hook_is() -> None:
    sae = saekit.SAE.from_dict({"name": "matching_pursuit", "d_in": 8, "d_sae": 24})
    with sae.watched(Watch(frozenset({"acts_pre"}), lambda name, x: x)), pytest.raises(ConfigError, match="acts_pre"):
        sae(torch.ones(1, 8))


def test_one_call_may_choose_its_error_term() -> None:
    sae, x = drawn_sae(8), torch.randn(3, 8, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(sae(x, use_error_term=True), x, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(sae(x), x, atol=1e-2)
    sae.use_error_term = True
    assert not torch.allclose(sae(x, use_error_term=False), x, atol=1e-2)
    transcoder, y = drawn_sae(8, 5), torch.randn(3, 5, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(transcoder(x, use_error_term=True, of=y), y, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="reads and writes the same sites, unless its targets are given"):
        transcoder(x, use_error_term=True)
