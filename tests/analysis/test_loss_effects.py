"""What removing a feature does to the loss of the next token, against a forward with a hook for every window."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.saes import at, drawn_sae
from support.tiny import hooked_transformer
from torch import Tensor
from torch.nn.functional import cross_entropy

import saekit
from saekit.analysis import loss_effects
from saekit.analysis.loss_effects import LossEffects, WindowEffects
from saekit.errors import ConfigError, DataError, ModelError
from saekit.features import Window
from saekit.testing import FakeBackend

RESID, LAST, MLP_IN, MLP_OUT, HEADS = (
    f"blocks.{name}"
    for name in ("0.hook_resid_post", "1.hook_resid_post", "0.ln2.hook_normalized", "0.hook_mlp_out", "1.attn.hook_z")
)
CONTEXTS = torch.randint(1, 100, (5, 9), generator=torch.Generator().manual_seed(3))
CONTEXTS[:, 0] = 0


class DoubleFake(FakeBackend):
    def _embedding(self) -> Tensor:
        return super()._embedding().double() / 4


class BothWays(DoubleFake):
    """One that looks ahead: a custom model need not be causal."""

    def forward(self, tokens: Tensor, hooks: Any) -> Tensor | None:
        self.forwards.append(tuple(tokens.shape))
        residual = hooks("blocks.0.hook_resid_post", self._embedding()[tokens])
        residual = hooks(LAST, residual + residual.flip(1).cumsum(1).flip(1) / 4)
        return None if hooks.done else residual @ self._embedding().T


@pytest.fixture(scope="module")
def lens() -> Any:
    return saekit.load_model(hooked_transformer().double())


def double(d_in: int, d_out: int | None = None, **options: Any) -> Any:
    return drawn_sae(d_in, d_out, d_sae=8, dtype="float64", **options)


def two_targets() -> Any:
    ports = saekit.Ports({"in": 8}, {"early": 8, "late": 8})
    sae = saekit.SAE.from_dict({"name": "transcoder", "d_sae": 8, "dtype": "float64"}, ports=ports)
    with torch.no_grad():
        sae.b_enc.normal_(generator=torch.Generator().manual_seed(0))
    return at(sae, "hook_embed", targets=("blocks.0.hook_resid_post", LAST))


def with_factors() -> Any:
    sae = at(double(8), RESID)
    sae.add_scaling_factor()
    with torch.no_grad():
        sae.scaling_factor.copy_(torch.linspace(0.5, 2, 8))
    return sae


def temporal() -> Any:
    options = {"d_sae": 8, "d_in": 8, "dtype": "float64", "bottleneck_factor": 2, "n_heads": 2, "input_scale": 4.0}
    sae = saekit.SAE.from_dict({"name": "temporal", "sae_diff_type": "relu", **options})
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for value in sae.parameters():
            value.normal_(generator=generator)
    return at(sae, RESID)


IN_LENS: dict[str, Callable[[], Any]] = {
    "the residual stream": lambda: at(double(16), RESID, model_name="tiny"),
    "a transcoder": lambda: at(double(16, 16), MLP_IN, targets=(MLP_OUT,), model_name="tiny"),
    "one head": lambda: at(double(8), saekit.Site(hook_name=HEADS, hook_head_index=1), model_name="tiny"),
}
IN_FAKE: dict[str, Callable[[], Any]] = {
    "all heads": lambda: at(double(8), "blocks.0.attn.hook_z"),
    "normalized inputs": lambda: at(double(8, input_transform="layer_norm"), RESID),
    "factors of fine-tuning": with_factors,
    "no special tokens": lambda: at(double(8), RESID, exclude_special_tokens=[0]),
    "several targets": two_targets,
    "features of sequences": temporal,
    "a target before the input": lambda: at(double(8, 8), LAST, targets=(RESID,)),
}


def collected(sae: Any, model: Any, folder: Path) -> saekit.FeatureStore:
    sae.info.metadata.setdefault("model_name", "fake")
    return saekit.collect_features(
        sae, model=model, contexts=CONTEXTS, folder=folder, verbose=False, device="cpu", partners=0, logits=0
    )


def some_windows(store: saekit.FeatureStore) -> list[tuple[int, Window]]:
    """Of features that fire, windows of several sizes, some of one context."""
    busy = [int(index) for index in store.sae.indices[store.sae.fired > 0]][:2]
    found = []
    for index in busy:
        feature = store.feature(index)
        found += [(index, one) for one in (*feature.top(2, window=(2, 2)), *feature.top(1, window=None))]
    assert len(found) == 6
    return found


def changes(sae: Any, x: Tensor, feature: int, tokens: Tensor) -> Tensor:
    """``[b, t, d_out]``: what outputs lose, by the features' own rows where rows have no units of their own."""
    with torch.no_grad():
        features = sae.encode(x)
        if sae.input_transform is None:
            scale = getattr(sae.config, "input_scale", 1.0)
            change = -features[..., feature, None] * sae.scaled_decoder()[feature] / scale
        else:
            less = features.clone()
            less[..., feature] = 0
            change = sae.decode(less, like=x) - sae.decode(features, like=x)
    if sae.info.metadata.get("exclude_special_tokens"):
        change[tokens == 0] = 0
    return change


def slowly(sae: Any, model: Any, feature: int, context: int) -> list[float | None]:
    """The model's own hooks, which subtract what the feature decodes to; one forward for one context."""
    (read,), targets = sae.info.sites.inputs, sae.info.sites.targets
    tokens = CONTEXTS[context : context + 1]

    def loss(replace: dict[str, Callable[[Tensor], Tensor]]) -> Tensor:
        logits = model.run(tokens, replace=replace, want="logits").logits
        return cross_entropy(logits[0, :-1], tokens[0, 1:], reduction="none")

    x = read.extract(model.run(tokens, read=[read.hook_name]).held[read.hook_name])
    parts = sae.ports.split_target(changes(sae, x, feature, tokens)).values()

    def without(site: saekit.Site, change: Tensor) -> Callable[[Tensor], Tensor]:
        def replaced(there: Tensor) -> Tensor:
            there = there.clone()
            if site.hook_head_index is not None:
                there[:, :, site.hook_head_index] += change
                return there
            return there + change.reshape(there.shape)

        return replaced

    replace = {site.hook_name: without(site, change) for site, change in zip(targets, parts, strict=True)}
    return [*(loss(replace) - loss({})).tolist(), None]


def shown(values: list[float | None], window: Window) -> list[float | None]:
    return values[window.start : window.start + len(window.ids)]


def assert_like(found: WindowEffects, wanted: list[float | None]) -> float:
    """They are; the largest of them."""
    assert [one is None for one in found] == [one is None for one in wanted]
    numbers = [one for one in found if one is not None]
    assert numbers == pytest.approx([one for one in wanted if one is not None], abs=1e-6)
    return max(map(abs, numbers))


@pytest.mark.parametrize("which", [*IN_LENS, *IN_FAKE])
def test_exact_effects_are_those_of_a_forward_without_the_feature(which: str, lens: Any, tmp_path: Path) -> None:
    sae = (IN_LENS | IN_FAKE)[which]()
    model = lens if which in IN_LENS else DoubleFake()
    store = collected(sae, model, tmp_path / "store")
    windows = some_windows(store)
    found = LossEffects.of(store.sae, sae, model).of_windows(windows)
    wanted = [shown(slowly(sae, model, feature, window.context), window) for feature, window in windows]
    assert max(map(assert_like, found, wanted)) > 1e-3


def test_a_model_that_looks_ahead_is_given_whole_contexts(tmp_path: Path) -> None:
    sae, model = at(double(8), RESID), BothWays()
    store = collected(sae, model, tmp_path / "store")
    windows = [(feature, one) for feature, one in some_windows(store) if len(one.ids) < 9]
    found = [LossEffects.of(store.sae, sae, model).of_windows([one])[0] for one in windows]
    wanted = [shown(slowly(sae, model, feature, window.context), window) for feature, window in windows]
    assert max(map(assert_like, found, wanted)) > 1e-3
    assert (1, 9) in model.forwards[-2:]


def test_effects_do_not_depend_on_what_else_is_asked(
    lens: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sae = IN_LENS["the residual stream"]()
    store = collected(sae, lens, tmp_path / "store")
    windows, effects = some_windows(store), LossEffects.of(store.sae, sae, lens)
    together = effects.of_windows(windows)
    monkeypatch.setattr(loss_effects, "_MOST_CONTEXTS", 1)
    with torch.inference_mode():
        alone = effects.of_windows(windows[::-1])[::-1]
    assert [assert_like(one, list(other)) for one, other in zip(alone, together, strict=True)]
    assert effects.of_windows([]) == []


@pytest.mark.parametrize("which", ["the last residual stream", "one head"])
def test_direct_effects_are_those_of_the_last_residual_stream_alone(which: str, lens: Any, tmp_path: Path) -> None:
    sae = IN_LENS[which]() if which in IN_LENS else at(double(16), LAST, model_name="tiny")
    store = collected(sae, lens, tmp_path / "store")
    windows = some_windows(store)
    found = LossEffects.of(store.sae, sae, lens, "direct").of_windows(windows)
    (site,) = sae.info.sites.inputs
    held = lens.run(CONTEXTS, read=[LAST, site.hook_name]).held
    unembedding = lens.model.W_U.detach()
    largest = 0.0
    for (feature, window), effects in zip(windows, found, strict=True):
        context = slice(window.context, window.context + 1)
        change = changes(sae, site.extract(held[site.hook_name][context]), feature, CONTEXTS[context])[0]
        if which == "one head":
            change = change @ lens.model.blocks[1].attn.W_O[1].detach()
        stream = held[LAST][window.context]
        losses = []
        for one in (stream + change, stream):
            logits = (one / one.var(-1, correction=0, keepdim=True).sqrt()) @ unembedding
            losses.append(cross_entropy(logits[:-1], CONTEXTS[window.context, 1:], reduction="none"))
        largest = max(largest, assert_like(effects, shown([*(losses[0] - losses[1]).tolist(), None], window)))
        still = [place for place, value in enumerate(window.values[: len(effects) - 1]) if value == 0]
        assert all(effects[place] == 0 for place in still)
    assert largest > 1e-3


@pytest.mark.parametrize("kind", ["exact", "direct"])
def test_a_feature_is_removed_where_the_mask_lets_tokens_count_alone(kind: Any, lens: Any, tmp_path: Path) -> None:
    sae, mask = IN_LENS["the residual stream"](), torch.rand(5, 9, generator=torch.Generator().manual_seed(1)) > 0.4
    store = saekit.collect_features(
        sae, model=lens, contexts=CONTEXTS, mask=mask, folder=tmp_path / "store", verbose=False, device="cpu"
    )
    feature = store.feature(int(store.sae.fired.argmax()))
    windows = [(feature.index, one) for one in feature.top(3, window=None)]
    held = lens.run(CONTEXTS, read=[LAST, RESID]).held
    change = changes(sae, held[RESID], feature.index, CONTEXTS) * mask[..., None]

    def losses(logits: Tensor) -> Tensor:
        return cross_entropy(logits[:, :-1].flatten(0, 1), CONTEXTS[:, 1:].flatten(), reduction="none").view(5, 8)

    def likely(stream: Tensor) -> Tensor:
        scaled = stream / stream.var(-1, correction=0, keepdim=True).sqrt()
        return scaled @ lens.model.W_U.detach()

    with torch.no_grad():
        without = lens.run(CONTEXTS, replace={RESID: lambda x: x + change}, want="logits").logits
        logits = lens.run(CONTEXTS, want="logits").logits
    before, after = (logits, without) if kind == "exact" else (likely(held[LAST]), likely(held[LAST] + change))
    wanted = losses(after) - losses(before)
    found = LossEffects.of(store.sae, sae, lens, kind).of_windows(windows)
    for (_, window), effects in zip(windows, found, strict=True):
        assert assert_like(effects, [*wanted[window.context].tolist(), None]) > 1e-3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_logits_of_a_narrow_model_are_multiplied_in_float32(dtype: torch.dtype, tmp_path: Path) -> None:
    model = hooked_transformer().to(dtype)
    with torch.no_grad():
        model.unembed.W_U.mul_(20)
    lens, sae = saekit.load_model(model), at(drawn_sae(16, d_sae=24), RESID, model_name="tiny")
    store = saekit.collect_features(
        sae, model=lens, contexts=CONTEXTS, folder=tmp_path / "store", verbose=False, device="cpu"
    )
    unembedding = model.unembed.W_U.detach()
    ranked = (sae.W_dec.detach() @ unembedding.float()).topk(10)
    for feature in store.sae:
        assert feature.logits is not None
        told = feature.logits.top[:10]
        assert [token for token, _, _ in told] == ranked.indices[feature.index].tolist()
        assert [value for _, _, value in told] == pytest.approx(ranked.values[feature.index].tolist(), rel=1e-5)
    feature = store.feature(int(store.sae.fired.argmax()))
    windows = [(feature.index, one) for one in feature.top(3, window=None)]
    held = {name: x.double() for name, x in lens.run(CONTEXTS, read=[LAST, RESID]).held.items()}
    change = changes(sae, held[RESID].float(), feature.index, CONTEXTS).double()
    before, after = (
        ((x / x.std(-1, correction=0, keepdim=True)) @ unembedding.double()).log_softmax(-1)
        for x in (held[LAST], held[LAST] + change)
    )
    wanted = (before - after)[:, :-1].gather(-1, CONTEXTS[:, 1:, None])[..., 0]
    found = LossEffects.of(store.sae, sae, lens, "direct").of_windows(windows)
    for (_, window), effects in zip(windows, found, strict=True):
        assert effects[:-1] == pytest.approx(wanted[window.context].tolist(), abs=1e-4)


def test_another_model_and_another_sae_are_refused(tmp_path: Path) -> None:
    sae, model = IN_FAKE["all heads"](), DoubleFake()
    store = collected(sae, model, tmp_path / "store")

    class Other(DoubleFake):
        def fingerprint(self) -> str:
            return "other"

    class Renamed(DoubleFake):
        name = "renamed"

    store.manifest.model["fingerprint"] = "that"  # type: ignore[index]
    with pytest.raises(DataError, match=r"collected with 'fake', and its weights differ\. Give that model"):
        LossEffects.of(store.sae, sae, Other())
    store.manifest.model["fingerprint"] = None  # type: ignore[index]
    with pytest.raises(DataError, match=r"collected with 'fake', and it is called 'renamed'"):
        LossEffects.of(store.sae, sae, Renamed())
    with torch.no_grad():
        sae.b_enc += 1
    with pytest.raises(DataError, match=r"the SAE is not the one whose features were collected as .*: its weights"):
        LossEffects.of(store.sae, sae, model)


def test_no_direct_path_is_claimed_where_none_is_known(tmp_path: Path) -> None:
    model = DoubleFake()
    for number, (which, why) in enumerate({
        "several targets": "what is written are several sites",
        "all heads": "is not in the residual stream",
        "no special tokens": "the backend of 'fake' does not say which hook holds the last residual stream",
    }.items()):  # fmt: skip
        sae = IN_FAKE[which]()
        store = collected(sae, model, tmp_path / str(number))
        with pytest.raises(ModelError, match=rf"there is no direct path to the loss: .*{why}.*loss_effects='exact'"):
            LossEffects.of(store.sae, sae, model, "direct")


@pytest.mark.parametrize("kind", ["exact", "direct"])
def test_where_the_feature_is_nowhere_nothing_changes(kind: Any, lens: Any, tmp_path: Path) -> None:
    sae = IN_LENS["the residual stream"]()
    with torch.no_grad():
        sae.b_enc[3] = -1e4
    store = collected(sae, lens, tmp_path / "store")
    assert store.feature(3).dead
    (found,) = LossEffects.of(store.sae, sae, lens, kind).of_windows([(3, store.feature(3).window(2, 4, None))])
    assert found == (*[0.0] * 8, None)


def test_an_unknown_way_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"loss_effects: must be 'exact', 'direct' or None, found 'quick'"):
        loss_effects.check_kind("quick")
