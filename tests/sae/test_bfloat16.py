"""SAEs in bfloat16 learn as those in float32 do, go on exactly, and are saved as they were measured."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.runs import pressing
from torch import Tensor

import saekit
from saekit import SAE, Forward
from saekit.errors import TrainingInterrupted
from saekit.pretrained import verify
from saekit.sae.build import build_module
from saekit.testing import FakeBackend, fake_plugin, isolated_manager
from saekit.values import Batch

WIDTH, FEATURES, ROWS = 24, 48, 256
DOCUMENTS = [{"text": "abc def " * 50}]


@cache
def directions() -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.nn.functional.normalize(torch.randn(FEATURES, WIDTH, generator=generator), dim=1)


def mixtures(n: int, seed: int) -> Tensor:
    """Rows of about three features each, off the origin."""
    generator = torch.Generator().manual_seed(seed)
    on = torch.rand(n, FEATURES, generator=generator) < 3 / FEATURES
    return (on * (1 + torch.rand(n, FEATURES, generator=generator))) @ directions() * 2 + 0.5


class Mixtures:
    """An activation source."""

    def __init__(self, config: Any, stream: Any) -> None:
        self._stream, self._next = stream, 1

    def __iter__(self) -> Mixtures:
        return self

    def __next__(self) -> Batch:
        self._next += 1
        return Batch(dict.fromkeys(self._stream.sites, mixtures(self._stream.batch_size, self._next)))

    def peek(self) -> Mapping[Any, Tensor]:
        return dict.fromkeys(self._stream.sites, mixtures(2048, 0))

    def state_dict(self) -> dict[str, Any]:
        return {"next": self._next}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._next = state["next"]

    def close(self) -> None:
        pass


class Wide(FakeBackend):
    def run(self, tokens: Tensor, **options: Any) -> Forward:
        return Forward({name: torch.zeros(*tokens.shape, WIDTH) for name in options["read"]})


def manager() -> Any:
    return isolated_manager(
        fake_plugin("activation_sources", "mixtures", Mixtures),
        fake_plugin("model_backends", "wide", lambda config, **services: Wide()),
        builtins=True,
    )


def run(folder: Path, kind: str, dtype: str, steps: int = 60, name: str | None = None) -> dict[str, Any]:
    config: dict[str, Any] = {
        "model": {"backend": "test:wide"}, "site": {"hook_name": "hook_embed"}, "dataset": {"context_size": 16},
        "activations": {"source": "test:mixtures"}, "evals": {"run": [], "split": None, "held_out_every": 0},
        "checkpoints": {"folder": str(folder), "name": name or f"{kind}-{dtype}".replace(" ", "-")},
        "training": {
            "training_tokens": steps * ROWS, "train_batch_size_tokens": ROWS, "verbose": False, "lr": 5e-3,
            "device": "cpu", "dead_feature_window": 30,
        },
    }  # fmt: skip
    for section, options in KINDS[kind].items():
        config[section] = config.get(section, {}) | options
    config["sae"] |= {"d_sae": 64, "dtype": dtype}
    return config


STANDARD = {"name": "standard", "l1_coefficient": 0.2}
SCALED = {"normalize_activations": "expected_average_only_in"}
KINDS: dict[str, dict[str, dict[str, Any]]] = {
    "standard": {"sae": STANDARD},
    "standard by norms": {
        "sae": STANDARD | {"normalize_sae_decoder": False, "scale_sparsity_penalty_by_decoder_norm": True}
    },
    "standard scaled": {"sae": STANDARD, "activations": SCALED},
    "standard tuned": {
        "sae": STANDARD, "training": {"finetuning_tokens": 30 * ROWS, "finetuning_method": "scale"}
    },
    "topk": {"sae": {"name": "topk", "k": 3}},
    "topk normalized": {
        "sae": {"name": "topk", "k": 3, "normalize_sae_decoder": True, "decoder_heuristic_init": False}
    },
    "topk scaled and tuned": {
        "sae": {"name": "topk", "k": 3}, "activations": SCALED,
        "training": {"finetuning_tokens": 30 * ROWS, "finetuning_method": "unrotated_decoder"},
    },
    "batchtopk": {"sae": {"name": "batchtopk", "k": 3}},
    "batchtopk scaled": {"sae": {"name": "batchtopk", "k": 3}, "activations": SCALED},
}  # fmt: skip


@torch.no_grad()
def explained(sae: SAE) -> float:
    x = mixtures(2048, 10**6)
    return (1 - (x - sae(x)).pow(2).sum() / (x - x.mean(0)).pow(2).sum()).item()


@pytest.mark.parametrize("kind", KINDS)
def test_it_learns_and_is_loaded_as_it_was_measured(kind: str, tmp_path: Path) -> None:
    wide, own = (
        saekit.train(run(tmp_path, kind, dtype), plugins=manager(), dataset=DOCUMENTS)
        for dtype in ("float32", "bfloat16")
    )
    assert explained(wide.sae) > 0.5
    assert abs(explained(own.sae) - explained(wide.sae)) < 0.02
    loaded = saekit.SAE.load(own.folder / "sae")
    assert {value.dtype for value in load_file(own.folder / "sae" / "sae_weights.safetensors").values()} == {
        torch.bfloat16
    }
    assert json.loads((own.folder / "sae" / "cfg.json").read_text())["dtype"] == "bfloat16"
    x = mixtures(2048, 10**6)
    with torch.no_grad():
        assert torch.equal(own.sae.encode(x), loaded.encode(x))
        assert loaded.W_enc.dtype == torch.bfloat16
        if "tuned" not in kind:  # there, the factor is rounded once more with W_dec
            assert torch.equal(own.sae(x), loaded(x))


def test_products_are_in_bfloat16_and_weights_in_float32(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: set[tuple[torch.dtype, torch.dtype]] = set()
    original = SAE.pre_activations

    def watched(self: SAE, x: Tensor) -> Tensor:
        product = x @ self.W_enc
        if torch.is_grad_enabled():
            seen.add((self.W_enc.dtype, product.dtype))
        return original(self, x)

    monkeypatch.setattr(SAE, "pre_activations", watched)
    config = run(tmp_path, "standard", "bfloat16", steps=3)
    assert saekit.plan(config, plugins=manager(), dataset=DOCUMENTS).facts["SAE step"].startswith("plain torch")
    saekit.train(config, plugins=manager(), dataset=DOCUMENTS)
    assert seen == {(torch.float32, torch.bfloat16)}


@pytest.mark.parametrize("kind", ["standard", "topk", "batchtopk scaled", "standard tuned"])
def test_a_run_goes_on_exactly(kind: str, tmp_path: Path) -> None:
    """Its state has the weights with all their digits."""
    results = []
    for name in ("whole", "part"):
        config = run(tmp_path, kind, "bfloat16", steps=9, name=name)
        config["training"] |= {"finetuning_tokens": 4 * ROWS} if "tuned" in kind else {}
        if name == "part":
            with pressing(6), pytest.raises(TrainingInterrupted):
                saekit.train(config, plugins=manager(), dataset=DOCUMENTS)
            results.append(saekit.resume(tmp_path / name, plugins=manager(), dataset=DOCUMENTS))
        else:
            results.append(saekit.train(config, plugins=manager(), dataset=DOCUMENTS))
    whole, part = results
    for name in ("sae_weights.safetensors", "sparsity.safetensors", "probe.safetensors", "cfg.json"):
        assert (part.folder / "sae" / name).read_bytes() == (whole.folder / "sae" / name).read_bytes()
    assert part.metrics == whole.metrics
    states = [load_file(next(r.folder.rglob("checkpoints/*/sae/training.safetensors"))) for r in results]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())
    assert states[0]["training/weights/W_enc"].dtype == torch.float32


def test_a_sweep_is_each_alone_and_a_start_is_the_saved_one(tmp_path: Path) -> None:
    configs = [run(tmp_path, "topk", dtype, steps=5, name="both") for dtype in ("float32", "bfloat16")]
    both = saekit.train(configs, plugins=manager(), dataset=DOCUMENTS)
    for config, found in zip(configs, both.results.values(), strict=True):
        config["checkpoints"]["name"] = f"alone-{config['sae']['dtype']}"
        alone = saekit.train(config, plugins=manager(), dataset=DOCUMENTS)
        weights = [r.folder / "sae" / "sae_weights.safetensors" for r in (alone, found)]
        assert weights[0].read_bytes() == weights[1].read_bytes()
    start = tmp_path / "alone-bfloat16" / "sae"
    config = run(tmp_path, "topk", "bfloat16", steps=1, name="next")
    config["training"] |= {"from_pretrained_path": str(start), "lr": 1e-9}
    found = saekit.train(config, plugins=manager(), dataset=DOCUMENTS).sae
    assert torch.equal(found.W_dec, saekit.SAE.load(start).W_dec)


# ---- SAEs that were made or cast by hand: norms are not folded into numbers of eight bits


def by_hand(kind: str, factor: bool = False, **options: Any) -> SAE:
    plugins = saekit.default_manager()
    table = {"name": kind, "k": 4, "d_sae": 64} | options
    choice = saekit.load_config({"sae": table}).sae.options
    sae = build_module(plugins.find("sae_architectures", choice), choice, WIDTH, plugins)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for value in sae.parameters():
            value.copy_(torch.randn(value.shape, generator=generator))
        sae.W_dec *= (0.1 + torch.rand(64, 1, generator=generator) * 3).to(sae.W_dec.dtype)
        if factor:
            sae.add_scaling_factor()
            sae.scaling_factor.copy_(0.5 + torch.rand(64, generator=generator))  # type: ignore[union-attr]
    if kind == "batchtopk":
        sae.threshold_average.fill_(4.1234567)
        sae.threshold_updates.fill_(torch.inf)
    return sae


@pytest.mark.parametrize("kind", ["topk", "batchtopk"])
@pytest.mark.parametrize("how", ["made", "cast"])
def test_no_row_loses_a_feature_when_it_is_saved(kind: str, how: str, tmp_path: Path) -> None:
    sae = by_hand(kind, dtype="bfloat16") if how == "made" else by_hand(kind).to(torch.bfloat16)
    loaded = saekit.SAE.load(sae.save(tmp_path / "sae")).to(torch.bfloat16)
    x = torch.randn(4096, WIDTH, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert (sae.encode(x) > 0).any(1).float().mean() > 0.9
        assert torch.equal(sae.encode(x), loaded.encode(x))
        assert torch.equal(sae(x), loaded(x))


def test_the_threshold_that_others_read_is_for_features_without_their_norms(tmp_path: Path) -> None:
    """As sae-lens computes it: ``f = pre`` where that exceeds the feature's threshold, and ``x̂ = f W_dec + b_dec``."""
    sae = by_hand("batchtopk", dtype="bfloat16")
    tensors = {name: value.double() for name, value in sae.public_tensors().items()}
    x = torch.randn(512, WIDTH, generator=torch.Generator().manual_seed(1)).double()
    pre = (x - tensors["b_dec"]) @ tensors["W_enc"] + tensors["b_enc"]
    features = pre * (pre > tensors["threshold"])
    norms = tensors["W_dec"].norm(dim=1)
    own = pre * norms * (pre * norms > float(sae.threshold))
    assert ((features > 0) != (own > 0)).float().mean() < 1e-3
    assert float(((features @ tensors["W_dec"]) - (own / norms) @ tensors["W_dec"]).norm()) < 0.05 * float(pre.norm())


def test_with_a_factor_norms_must_be_folded_and_are_rounded_once_more() -> None:
    """With the factor in W_dec, its rows have other norms than those that features are compared by."""
    sae = by_hand("topk", factor=True, dtype="bfloat16")
    tensors, norms = sae.public_tensors(), sae.W_dec.norm(dim=1)
    assert tensors["W_enc"].dtype == tensors["W_dec"].dtype == torch.bfloat16
    assert torch.equal(tensors["W_enc"], (sae.W_enc.float() * norms.float()).bfloat16())
    assert sae.saved_options()["rescale_acts_by_decoder_norm"] is False


def test_running_sums_keep_their_digits_through_casts() -> None:
    sae = by_hand("batchtopk")
    with torch.no_grad():
        sae.threshold_average.fill_(1 / 3)
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        sae.to(dtype)
        assert sae.W_enc.dtype == dtype
        assert sae.threshold_average.dtype == torch.float64
        assert sae.threshold_average.item() == 1 / 3


@pytest.mark.parametrize("name", ["topk", "abstopk", "batchtopk", "matryoshka"])
def test_a_scaling_factor_is_saved_in_bfloat16(name: str, tmp_path: Path) -> None:
    options = {"name": name, "d_in": WIDTH, "d_sae": FEATURES, "k": 4, "dtype": "bfloat16"}
    sae = SAE.from_dict(options, seed=0)
    sae.add_scaling_factor()
    with torch.no_grad():
        sae.scaling_factor.copy_(torch.linspace(0.5, 2, FEATURES))
        if hasattr(sae, "threshold_average"):
            sae.threshold_average.fill_(0.3001)
    folder = sae.save(tmp_path / "sae")
    again = SAE.load(folder)
    assert again.dtype == torch.bfloat16
    assert load_file(folder / "sae_weights.safetensors")["W_enc"].dtype == torch.bfloat16
    assert verify(folder) == []
    x = mixtures(64, 1).bfloat16()
    with torch.no_grad():
        before, after = sae(x).float(), again(x).float()
    off = (before - after).norm(dim=1) / before.norm(dim=1)
    assert off.median() < 0.01, "where no two features are nearly of one size, all are the same"
