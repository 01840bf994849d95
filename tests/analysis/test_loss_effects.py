"""What removing a feature does to the loss of the next token, against a forward with a hook for every window."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.causal_lms import make_causal_lm
from support.saes import at, drawn_sae
from support.tiny import hooked_transformer
from torch import Tensor
from torch.nn.functional import cross_entropy

import saekit
from saekit.analysis.loss_effects import LossEffects
from saekit.errors import ConfigError, DataError, ModelError
from saekit.testing import FakeBackend

RESID, LAST, MLP_IN, MLP_OUT, HEADS = (
    f"blocks.{name}"
    for name in ("0.hook_resid_post", "1.hook_resid_post", "0.ln2.hook_normalized", "0.hook_mlp_out", "1.attn.hook_z")
)
CONTEXTS = torch.randint(1, 2000, (6, 9), generator=torch.Generator().manual_seed(3))
CONTEXTS[:, 0] = 0
Window = saekit.features.Window


@pytest.fixture(scope="module")
def model() -> Any:
    return saekit.load_model(hooked_transformer().double())


def sae_at(which: str) -> Any:
    double = {"dtype": "float64"}
    if which == "transcoder":
        return at(drawn_sae(16, 16, **double), MLP_IN, targets=(MLP_OUT,), model_name="tiny")
    if which == "head":
        return at(drawn_sae(8, **double), saekit.Site(hook_name=HEADS, hook_head_index=1), model_name="tiny")
    if which == "heads":
        return at(drawn_sae(16, **double), HEADS, model_name="tiny")
    options = {"input_transform": "layer_norm"} if which == "normalized" else {}
    sae = drawn_sae(16, **double, **options)
    if which == "factors":
        sae.add_scaling_factor()
        with torch.no_grad():
            sae.scaling_factor.copy_(torch.linspace(0.5, 2, 24))
    left_out = {"exclude_special_tokens": [0]} if which == "without BOS" else {}
    return at(sae, LAST if which == "last" else RESID, model_name="tiny", **left_out)


def collected(sae: Any, model: Any, folder: Path) -> saekit.FeatureStore:
    return saekit.collect_features(
        sae, model=model, contexts=CONTEXTS, folder=folder, verbose=False, device="cpu", partners=1, logits=1
    )


def some_windows(store: saekit.FeatureStore) -> list[tuple[int, Window]]:
    """Of three features that fire, windows of several sizes, some of one context."""
    busy = [int(index) for index in store.sae.indices[store.sae.fired > 0]][:3]
    found = []
    for index in busy:
        feature = store.feature(index)
        found += [(index, one) for width in ((2, 2), None) for one in feature.top(3, window=width)]
    assert len(found) == 18
    return found


def slowly(sae: Any, model: Any, feature: int, context: int) -> list[float]:
    """The model's own hook, which subtracts what the feature decodes to."""
    (read,), (written,) = sae.info.sites.inputs, sae.info.sites.targets
    tokens = CONTEXTS[context : context + 1]

    def loss(replace: dict[str, Callable[[Tensor], Tensor]]) -> Tensor:
        logits = model.run(tokens, replace=replace, want="logits").logits
        return cross_entropy(logits[0, :-1], tokens[0, 1:], reduction="none")

    x = read.extract(model.run(tokens, read=[read.hook_name]).held[read.hook_name])
    with torch.no_grad():
        features = sae.encode(x)
        less = features.clone()
        less[..., feature] = 0
        change = sae.decode(less, like=x) - sae.decode(features, like=x)
    if sae.info.metadata.get("exclude_special_tokens"):
        change[tokens == 0] = 0

    def without(there: Tensor) -> Tensor:
        there = there.clone()
        if written.hook_head_index is not None:
            there[:, :, written.hook_head_index] += change
            return there
        return there + change.reshape(there.shape)

    return (loss({written.hook_name: without}) - loss({})).tolist()


@pytest.mark.parametrize(
    "which", ["residual", "last", "transcoder", "head", "heads", "normalized", "factors", "without BOS"]
)
def test_exact_effects_are_those_of_a_forward_without_the_feature(which: str, model: Any, tmp_path: Path) -> None:
    sae = sae_at(which)
    store = collected(sae, model, tmp_path / "store")
    windows = some_windows(store)
    found = LossEffects.of(store.sae, sae, model).of_windows(windows)
    largest = 0.0
    for (feature, window), effects in zip(windows, found, strict=True):
        wanted = [*slowly(sae, model, feature, window.context), None][window.start :][: len(window.ids)]
        assert len(effects) == len(window.ids)
        assert [x is None for x in effects] == [x is None for x in wanted]
        assert [x for x in effects if x is not None] == pytest.approx([x for x in wanted if x is not None], abs=1e-6)
        largest = max(largest, *(abs(x) for x in effects if x is not None))
    assert largest > 1e-3
