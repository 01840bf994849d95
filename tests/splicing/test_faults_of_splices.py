"""Known faults of sae-lens 3.0.0 with SAEs inside models, by their numbers in the list of them, and what saekit does.

``tests/golden_splicing/make_faults.py`` has recorded what each of them gives, on the same model with the same weights.
What is right is made here by TransformerLens' own hooks.
"""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

import attrs
import pytest
import torch
from golden_splicing import calls
from saekit_plugins.architectures.standard import StandardConfig
from saekit_plugins.backends.hooked_sae_transformer import HookedSAETransformer
from saekit_plugins.evals.downstream import DownstreamConfig
from saekit_plugins.evals.downstream.module import DownstreamEval
from torch import Tensor
from transformer_lens import HookedTransformer

import saekit
from saekit import Site, Sites
from saekit.sae.build import build_module

pytestmark = pytest.mark.usefixtures("one_thread")

RECORDED: dict[str, Any] = json.loads(
    (Path(__file__).parents[1] / "golden_splicing" / "sae_lens_3_faults.json").read_text()
)


def sae_at(hook: str, name: str, d_in: int, head: int | None = None, d_sae: int = calls.D_SAE_OF_HEAD) -> Any:
    config, plugins = StandardConfig(d_sae=d_sae), saekit.default_manager()
    sae: Any = build_module(plugins.find("sae_architectures", config), config, d_in, plugins)
    sae.info = attrs.evolve(sae.info, sites=Sites.one(Site(hook_name=hook, hook_head_index=head)))
    return calls.filled(sae, name)


def lens() -> Any:
    return calls.model_of(HookedTransformer)


def measured(sae: Any, model: Any, **how: Any) -> dict[str, float]:
    backend = saekit.load_model(model, **how)
    measure = DownstreamEval(DownstreamConfig(n_bootstrap=0))
    return dict(measure(sae, backend=backend, sites=sae.info.sites, contexts=calls.TOKENS))


@torch.no_grad()
def loss(model: Any, hook: str, put: Any) -> float:
    """Of the model with ``put(x)`` in the place of what the hook holds."""

    def at(x: Tensor, hook: Any) -> Tensor:
        return put(x)

    return float(model.run_with_hooks(calls.TOKENS, return_type="loss", fwd_hooks=[(hook, at)]))


def with_head(x: Tensor, head: int, values: Tensor) -> Tensor:
    x = x.clone()
    x[:, :, head] = values
    return x


def close(number: float) -> Any:
    return pytest.approx(number, abs=1e-5)


def test_fault_5_one_head_is_measured() -> None:
    """The reference calls a method that does not exist."""
    assert "no attribute 'decoder'" in RECORDED["5"]["error"]
    sae, model = sae_at(calls.Q, "head", 4, head=1), lens()
    right = loss(model, calls.Q, lambda x: with_head(x, 1, sae(x[:, :, 1])))
    assert measured(sae, model)["ce_loss_with_sae"] == close(right)


def test_fault_6_zero_ablation_is_of_that_head_alone() -> None:
    """The reference's zeroes every head."""
    sae, model = sae_at(calls.Q, "head", 4, head=1), lens()
    right = loss(model, calls.Q, lambda x: with_head(x, 1, torch.zeros(4)))
    assert loss(model, calls.Q, torch.zeros_like) == close(RECORDED["6"]["ce_loss_with_ablation"])
    assert right != close(RECORDED["6"]["ce_loss_with_ablation"])
    assert measured(sae, model)["ce_loss_with_ablation"] == close(right)


def test_fault_7_hook_z_is_measured_whole_and_by_head() -> None:
    """In the reference the evals of a run fail there, and with a head index replace all heads."""
    assert "must match the size" in RECORDED["7"]["error"]
    model, whole, head = lens(), sae_at(calls.Z, "heads", 8), sae_at(calls.Z, "head", 4, head=1)
    right = loss(model, calls.Z, lambda x: whole(x.flatten(-2)).reshape(x.shape))
    assert measured(whole, model)["ce_loss_with_sae"] == close(right)
    right = loss(model, calls.Z, lambda x: with_head(x, 1, head(x[:, :, 1])))
    theirs = RECORDED["7"]["ce_loss_with_sae"]
    assert loss(model, calls.Z, lambda x: torch.stack([head(x[:, :, 0]), head(x[:, :, 1])], 2)) == close(theirs)
    assert right != close(theirs)
    assert measured(head, model)["ce_loss_with_sae"] == close(right)


@torch.no_grad()
def test_fault_8_an_attached_sae_of_one_head_replaces_that_head() -> None:
    """The reference ignores the head index."""
    sae, model = sae_at(calls.Q, "head", 4, head=1), calls.model_of(HookedSAETransformer)
    hooks = [(calls.Q, lambda x, hook: with_head(x, 1, sae(x[:, :, 1])))]
    right = model.run_with_hooks(calls.TOKENS, fwd_hooks=hooks)
    found = model.run_with_saes(calls.TOKENS, saes=[sae])
    torch.testing.assert_close(found, right)
    assert (found - torch.tensor(RECORDED["8"]["logits"])).abs().max() > 1e-3


def test_fault_9_forwards_of_evals_have_the_models_options_and_take_no_text_of_training(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Most of the reference's have none, and it takes its contexts from the stream that is trained on.

    saekit's evals are given held-out contexts, and no stream.
    """
    assert RECORDED["9"]["forwards_without_kwargs"] == RECORDED["9"]["forwards"] - 1
    assert RECORDED["9"]["batches_of_training_taken"] > 0
    model, given = lens(), []
    forward = model.forward

    def watched(*args: Any, **kwargs: Any) -> Any:
        given.append(kwargs.get("padding_side"))
        return forward(*args, **kwargs)

    watched.__signature__ = inspect.signature(forward)  # type: ignore[attr-defined]
    monkeypatch.setattr(model, "forward", watched)
    options = {"name": "HookedTransformer", "forward_kwargs": {"padding_side": "right"}}
    measured(sae_at(calls.RESID, "x", 8), model, backend=options)
    assert len(given) >= 2, "from the site on they may begin inside"
    assert set(given) == {"right"}


@torch.no_grad()
def test_fault_26_two_saes_on_one_hook_and_a_permanent_hook() -> None:
    """In the reference the wrong one is restored, and the permanent hook is lost."""
    model, seen = calls.model_of(HookedSAETransformer), []
    kept, first, second = (
        sae_at(calls.RESID, name, 8, d_sae=calls.SAES[name][1]) for name in ("m", "a", "other_a")
    )  # fmt: skip
    model.add_hook(calls.RESID, lambda x, hook: seen.append(hook.name), is_permanent=True)
    model.add_sae(kept)
    right = model(calls.TOKENS)
    with model.saes(saes=[first, second]):
        pass
    found = model(calls.TOKENS)
    assert torch.equal(found, right)
    assert (found - torch.tensor(RECORDED["26"]["logits_afterwards"])).abs().max() > 1e-3
    model.reset_saes()
    before = len(seen)
    model(calls.TOKENS)
    assert len(seen) == before + 1
    assert RECORDED["26"]["permanent_hook_ran"] == 0
