"""A bridge holds what a HookedTransformer of transformer_lens 3 does, and an SAE is worth the same in every backend."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from saekit_plugins.backends.bridges import BridgeBackend
from saekit_plugins.backends.hooked_transformer import HookedTransformerOptions
from saekit_plugins.backends.huggingface import HuggingFaceOptions
from saekit_plugins.backends.transformer_bridge import TransformerBridgeOptions
from support.causal_lms import KINDS, causal_lm_folder
from support.lens_golden import CASES, TOKENS, UNPROCESSED, held, recorded
from support.saes import at, drawn_sae

import saekit

pytestmark = pytest.mark.usefixtures("one_thread")

WITHOUT = {"neox": ("attn.hook_rot_q", "attn.hook_rot_k")}
"""Hooks that a bridge has no place for."""


@pytest.fixture(params=["as it is", "in transformer_lens 4"])
def lens(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Which way the backend HookedTransformer takes; the second is that of the version 4 in every version."""
    if request.param == "in transformer_lens 4":
        monkeypatch.setattr("saekit_plugins.backends.hooked_transformer.has_hooked_transformer", lambda: False)
    return str(request.param)


@pytest.mark.parametrize("case", CASES)
def test_hooks_hold_what_a_hooked_transformer_holds(case: str, lens: str) -> None:
    """To 1e-5, all of them, whatever was done to the weights."""
    name, options = CASES[case]
    backend: Any = saekit.load_model(name(), backend=options, device="cpu")
    if lens != "as it is":
        assert isinstance(backend, BridgeBackend)
    expected = recorded()[case]
    values = ("logits", "loss", "unembedding")
    lacking = WITHOUT.get(case.split()[0], ()) if isinstance(backend, BridgeBackend) else ()
    wanted = [hook for hook in expected if hook not in values and not hook.endswith(lacking or ("no such end",))]
    found = held(backend, wanted)
    assert set(found) == {*wanted, *values}
    for hook, value in found.items():
        assert torch.allclose(value, expected[hook], atol=1e-5, rtol=1e-5), hook
    assert len(wanted) > 50


@pytest.mark.parametrize("kind", KINDS)
def test_without_compatibility_mode_hooks_hold_what_the_model_computes(kind: str) -> None:
    """So they do in a HookedTransformer of which nothing is processed, but for scores of what cannot be seen."""
    bridge = saekit.load_model(causal_lm_folder(kind), backend=TransformerBridgeOptions(), device="cpu")
    expected = recorded()[f"{kind} plain"]
    wanted = [hook for hook in ("hook_embed", "ln_final.hook_normalized") if hook in expected]
    wanted += [hook for hook in expected if hook.startswith("blocks.1.") and "scores" not in hook]
    wanted = [hook for hook in wanted if not hook.endswith(WITHOUT.get(kind, ("no such end",)))]
    for hook, value in held(bridge, wanted).items():
        assert torch.allclose(value, expected[hook], atol=1e-5, rtol=1e-5), hook


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("place", ["blocks.1.hook_resid_post", "blocks.2.hook_mlp_out"])
def test_an_sae_costs_the_same_in_every_backend(kind: str, place: str) -> None:
    folder = causal_lm_folder(kind)
    sae = drawn_sae(16)
    losses = {}
    for options in (
        HookedTransformerOptions(from_pretrained_kwargs=UNPROCESSED),
        TransformerBridgeOptions(),
        HuggingFaceOptions(),
    ):
        backend: Any = saekit.load_model(folder, backend=options, device="cpu")
        hook = backend.hook_like(place)
        assert hook is not None
        clean = backend.run(TOKENS, want="loss").loss.mean()
        spliced = backend.run(TOKENS, replace={hook: lambda held: sae(held).detach()}, want="loss").loss.mean()
        assert abs(spliced - clean) > 1e-3, "the SAE must matter"
        losses[type(options).__name__] = torch.stack([clean, spliced])
    first = next(iter(losses.values()))
    for name, found in losses.items():
        assert torch.allclose(found, first, atol=1e-5), name


def test_evals_find_the_same_in_every_backend() -> None:
    """Of one SAE, on the same contexts, by its name of the place."""
    sae = at(drawn_sae(16), "blocks.1.hook_resid_post")
    found = []
    for options in (
        HookedTransformerOptions(from_pretrained_kwargs=UNPROCESSED),
        TransformerBridgeOptions(),
        HuggingFaceOptions(),
    ):
        backend: Any = saekit.load_model(causal_lm_folder("neox"), backend=options, device="cpu")
        how: dict[str, Any] = {"contexts": TOKENS, "kl": True, "top1": True, "n_bootstrap": 20}
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*wrong site, scale or model")  # its weights are drawn
            found.append(saekit.evaluate(sae, model=backend, save=False, verbose=False, **how))
    first = found[0]
    assert {"ce_recovered", "kl_div_with_sae", "explained_variance", "top1_agreement"} <= set(first.values)
    for other in found[1:]:
        assert dict(other.values) == pytest.approx(dict(first.values), rel=1e-4, abs=1e-5)
        assert dict(other.errors) == pytest.approx(dict(first.errors), rel=1e-3, abs=1e-5)


def test_the_records_are_of_every_case() -> None:
    assert set(recorded()) == set(CASES)
