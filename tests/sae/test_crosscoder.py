"""Crosscoders against their mathematics written head by head, finite differences, scales for each site, folders."""

from __future__ import annotations

import json
from fractions import Fraction
from pathlib import Path
from typing import Any

import attrs
import pytest
import torch
from saekit_plugins.architectures.crosscoder import BatchTopKCrosscoderConfig, CrosscoderConfig
from saekit_plugins.loaders.sae_lens import SaeLensConfig
from support.kernels import seeded
from torch import Tensor

import saekit
from saekit import SAE
from saekit.config import SAEConfig
from saekit.errors import ConfigError, SAEFormatError
from saekit.sae.build import build_module, initialize
from saekit.values import Ports, StepInput

pytestmark = pytest.mark.usefixtures("one_thread")

PORTS = Ports({"early": 5, "late": 7})
ACROSS = Ports({"early": 5, "late": 7}, {"later": 4, "last": 6, "other": 3})
WIDTHS, D_SAE, ROWS, STEPS = (5, 7), 30, 40, 22


def built(config: SAEConfig, ports: Ports = PORTS) -> Any:
    plugins = saekit.default_manager()
    sae = build_module(plugins.find("sae_architectures", config), config, ports, plugins)
    with torch.no_grad():
        for value in sae.parameters():
            value.copy_(torch.randn(value.shape, generator=seeded(1)) / 2)
    return sae


def crosscoder(**options: Any) -> Any:
    return built(CrosscoderConfig(**{"d_sae": D_SAE, "dtype": "float64", "l1_coefficient": 0.3, **options}))


def batchtopk(**options: Any) -> Any:
    given = {"d_sae": D_SAE, "dtype": "float64", "k": 3.3, "aux_loss_coefficient": 0, **options}
    return built(BatchTopKCrosscoderConfig(**given))


def close(found: Tensor, expected: Tensor, what: str, within: float = 1e-9) -> None:
    deviation = ((found - expected).abs() / expected.abs().clamp_min(1)).max().item()
    assert deviation <= within, f"{what} deviates by {deviation:.1e}"


# ---- ARCHITECTURES.md §8, written plainly: heads apart, autograd


class Plain:
    """The heads' own matrices, as a crosscoder begins with them."""

    def __init__(self, sae: SAE) -> None:
        self.W_enc, self.W_dec, self.b_dec = (
            [part.detach().clone().requires_grad_() for part in value.split(WIDTHS, dim)]
            for value, dim in ((sae.W_enc, 0), (sae.W_dec, 1), (sae.b_dec, 0))
        )
        self.b_enc = sae.b_enc.detach().clone().requires_grad_()
        self.threshold, self.updates = 0.0, 0

    @property
    def parameters(self) -> list[Tensor]:
        return [*self.W_enc, *self.W_dec, *self.b_dec, self.b_enc]

    def whole(self) -> dict[str, Tensor]:
        parts = {"W_enc": (self.W_enc, 0), "W_dec": (self.W_dec, 1), "b_dec": (self.b_dec, 0)}
        return {name: torch.cat(list(some), dim) for name, (some, dim) in parts.items()} | {"b_enc": self.b_enc}

    def pre(self, x: Tensor) -> Tensor:
        return sum(head @ W for head, W in zip(x.split(WIDTHS, 1), self.W_enc, strict=True)) + self.b_enc

    def error(self, f: Tensor, x: Tensor) -> Tensor:
        heads = zip(x.split(WIDTHS, 1), self.W_dec, self.b_dec, strict=True)
        return sum((head - (f @ W + b)).pow(2).sum(1).mean() for head, W, b in heads)  # type: ignore[return-value]

    def norms(self, kind: str = "l1") -> Tensor:
        squares = [W.pow(2).sum(1) for W in self.W_dec]
        return sum(one.sqrt() for one in squares) if kind == "l1" else sum(squares).sqrt()  # type: ignore

    def l1(self, x: Tensor, coefficient: float, kind: str) -> Tensor:
        f = self.pre(x).relu()
        return self.error(f, x) + coefficient * (f * self.norms(kind)).sum(1).mean()

    def batchtopk(self, x: Tensor, k: Fraction) -> Tensor:
        f = self.pre(x).relu()
        ranked = (f * self.norms()).detach()
        least = ranked.flatten().sort(descending=True).values[int(k * len(x)) - 1]
        self.updates += 1
        self.threshold += (least.item() - self.threshold) * 0.01
        return self.error(f * (ranked >= least), x)


def rows(step: int) -> Tensor:
    return torch.randn(ROWS, sum(WIDTHS), dtype=torch.float64, generator=seeded(100 + step))


@pytest.mark.parametrize("kind", ["l1", "l2", "batchtopk"])
def test_steps_equal_the_mathematics_head_by_head(way: str, kind: str) -> None:
    """With λ that warms up and decays, or k that does."""
    if kind == "batchtopk":
        sae = batchtopk(k_start=8.05, k_warm_up_steps=10)
    else:
        sae = crosscoder(decoder_norm=kind, l1_warm_up_steps=6, l1_decay_steps=8, l1_end=0.1)
    sae.kernels = way
    plain = Plain(sae)
    own, other = (torch.optim.Adam(values, lr=3e-3) for values in (list(sae.parameters()), plain.parameters))
    for step in range(STEPS):
        x = rows(step)
        into = max(0, step - (STEPS - 8))
        coefficient = 0.3 * min(1, step / 6) + (0.1 - 0.3) * into / 8
        k = Fraction("8.05") + (Fraction("3.3") - Fraction("8.05")) * min(Fraction(1), Fraction(step, 10))
        own.zero_grad()
        other.zero_grad()
        result = sae.training_step(x, StepInput(step=step, steps=STEPS, generator=seeded()))
        loss = plain.batchtopk(x, k) if kind == "batchtopk" else plain.l1(x, coefficient, kind)
        loss.backward()
        close(result.loss, loss, f"the loss of step {step}")
        if kind == "batchtopk":
            logged = {"k": float(k), "topk_threshold": sae.threshold.item()}
        else:
            logged = {"l1_coefficient": coefficient}
        found = {name: float(value) for name, value in result.coefficients.items()}
        assert found == pytest.approx(logged)
        own.step()
        other.step()
    for name, value in plain.whole().items():
        close(getattr(sae, name), value, name)
    if kind == "batchtopk":
        threshold = plain.threshold / (1 - 0.99**STEPS)
        assert sae.threshold.item() == pytest.approx(threshold)
        f, x = plain.pre(rows(0)).relu(), rows(0)
        close(sae.encode(x), f * plain.norms() * (f * plain.norms() > threshold), "features")
        close(sae(x), (f * (f * plain.norms() > threshold)) @ torch.cat(plain.W_dec, 1) + sae.b_dec, "outputs")


@pytest.mark.parametrize("ports", [PORTS, ACROSS], ids=["same", "across"])
@pytest.mark.parametrize("options", [{}, {"decoder_norm": "l2", "activation": "saekit:tanh-relu"}], ids=str)
def test_finite_differences(way: str, ports: Ports, options: dict[str, Any]) -> None:
    config = CrosscoderConfig(d_sae=D_SAE, dtype="float64", l1_coefficient=0.3, **options)
    sae, x = built(config, ports), rows(0)
    y = None if ports.same else torch.randn(ROWS, ports.d_out, dtype=torch.float64, generator=seeded(3))
    step, draws = StepInput(step=4, generator=seeded(), target=y), seeded(8)
    sae.kernels = way
    sae.training_step(x, step)
    for name, value in sae.named_parameters():
        direction = torch.randn(value.shape, dtype=torch.float64, generator=draws)
        values = []
        for sign in (1, -1):
            with torch.no_grad():
                value += sign * 1e-7 * direction
                values.append(sae.losses(x, step).loss.item())
                value -= sign * 1e-7 * direction
        slope = (values[0] - values[1]) / 2e-7
        assert (value.grad * direction).sum().item() == pytest.approx(slope, rel=2e-5, abs=2e-6), name


def test_the_fast_step_trains_factors_of_features_as_autograd_does() -> None:
    """Those that fine-tuning adds: the norms of the penalty are without them."""
    found = []
    for way in ("fast", "reference"):
        sae = crosscoder()
        sae.add_scaling_factor()
        with torch.no_grad():
            sae.scaling_factor.copy_(torch.rand(D_SAE, generator=seeded(4)) + 0.5)
        sae.kernels = way
        assert (sae.why_reference() is None) == (way == "fast")
        sae.training_step(rows(0), StepInput(step=4, generator=seeded()))
        found.append({name: value.grad for name, value in sae.named_parameters()})
    for name, value in found[1].items():
        close(found[0][name], value, name)


def test_rows_of_norm_0_have_no_gradient_of_their_norm() -> None:
    """A feature that one of the sites has not, at all."""
    for way in ("fast", "reference"):
        sae = crosscoder()
        sae.kernels = way
        with torch.no_grad():
            sae.W_dec[3, :5] = 0
        sae.training_step(rows(0), StepInput(step=4, generator=seeded()))
        assert sae.W_dec.grad.isfinite().all()


# ---- what people ask of it


def test_norms_and_shares_of_each_site() -> None:
    sae = crosscoder()
    norms = sae.decoder_norms_by_site()
    assert list(norms) == ["early", "late"]
    close(norms["early"], sae.W_dec[:, :5].norm(dim=1), "norms of early")
    scaled = sae.decoder_norms_by_site({"early": 2.0, "late": 3.0})
    close(scaled["late"], 3 * sae.W_dec[:, 5:].norm(dim=1), "norms of late")
    close(sae.decoder_norms_by_site(2.0)["late"], 2 * norms["late"], "norms of late")
    with torch.no_grad():
        sae.W_dec[:4] = 0  # of which there is nothing to say
        shares = sae.shares()
    early = (norms["early"] / (norms["early"] + norms["late"]))[4:].mean()
    assert shares["crosscoder/share_of_early"].item() == pytest.approx(early.item())
    assert sum(shares.values()).item() == pytest.approx(1)
    for one in (sae, batchtopk()):
        result = one.training_step(rows(0), StepInput(step=0, generator=seeded()))
        assert result.metrics.keys() == shares.keys()
    assert list(built(CrosscoderConfig(d_sae=9), ACROSS).decoder_norms_by_site()) == ["later", "last", "other"]


@pytest.mark.parametrize("make", [crosscoder, batchtopk])
@pytest.mark.parametrize("targets", [False, True])
def test_a_scale_for_each_site_folds(tmp_path: Path, way: str, make: Any, targets: bool) -> None:
    """Features of the BatchTopK kind are chosen as before: by the norms that they had."""
    read = torch.tensor([2.0] * 5 + [0.25] * 7, dtype=torch.float64)
    sae = make()
    sae.kernels = way
    sae.training_step(rows(0), StepInput(step=0, generator=seeded()))
    with torch.no_grad():
        expected, features = sae(rows(1) * read) / read, sae.encode(rows(1) * read)
        norms = sae.decoder_norms_by_site()
        sae.fold_activation_scale(read, read if targets else None)
        close(sae(rows(1)), expected, "outputs")
        close(sae.encode(rows(1)), features, "features")
        if make is crosscoder:
            again = sae.decoder_norms_by_site({"early": 2.0, "late": 0.25})
            close(again["early"], norms["early"], "norms of early")
            close(again["late"], norms["late"], "norms of late")
        loaded = SAE.load(sae.save(tmp_path / "sae"))
        close(loaded(rows(1)), expected, "loaded outputs")
        close(loaded.encode(rows(1)), features, "loaded features")


def test_one_scale_folds_and_norms_are_folded_into_what_is_saved(tmp_path: Path) -> None:
    sae = batchtopk()
    sae.training_step(rows(0), StepInput(step=0, generator=seeded()))
    with torch.no_grad():
        expected = sae(3 * rows(1)) / 3
        sae.fold_activation_scale(3.0)
        close(sae(rows(1)), expected, "outputs")
        assert sae.config.rescale_acts_by_decoder_norm
        loaded = SAE.load(sae.save(tmp_path / "sae"))
        close(loaded(rows(1)), expected, "loaded outputs")
        close(sum(loaded.decoder_norms_by_site().values()), torch.ones(D_SAE).double(), "sums of norms")  # type: ignore
        close(loaded.encode(rows(1)), sae.encode(rows(1)), "features")


def test_bfloat16_is_saved_and_chooses_the_same_features(tmp_path: Path) -> None:
    sae = batchtopk(dtype="bfloat16")
    sae.training_step(rows(0).bfloat16(), StepInput(step=0, generator=seeded()))
    loaded = SAE.load(sae.save(tmp_path / "sae"))
    with torch.no_grad():
        assert torch.equal(loaded.encode(rows(1)) > 0, sae.encode(rows(1)) > 0)
    assert loaded.threshold == sae.threshold


@pytest.mark.parametrize("make", [crosscoder, batchtopk])
def test_no_other_library_takes_it_for_something_else(tmp_path: Path, make: Any) -> None:
    sae = make()
    sites = saekit.Sites(tuple(saekit.Site(hook_name=name) for name in PORTS.inputs))
    sae.info = attrs.evolve(sae.info, sites=sites)
    sae.save(tmp_path / "sae")
    table = json.loads((tmp_path / "sae/cfg.json").read_text())
    assert (
        table["architecture"] == sae.info.architecture == f"saekit:{sae._name if make is batchtopk else 'crosscoder'}"
    )
    with pytest.raises(SAEFormatError):
        SAE.load(tmp_path / "sae", loader=SaeLensConfig())
    loaded = SAE.load(tmp_path / "sae")
    assert (loaded.ports, loaded.info.sites) == (PORTS, sites)
    assert type(loaded) is type(sae)


def test_the_start_ties_each_site_and_takes_the_means() -> None:
    for config in (CrosscoderConfig(d_sae=D_SAE), BatchTopKCrosscoderConfig(d_sae=D_SAE, k=3)):
        sae = built(config)
        initialize(sae, seeded(), rows(0).float() + 9)
        assert torch.equal(sae.W_enc, sae.W_dec.T)
        assert torch.allclose(sae.decoder_norms(), torch.full((D_SAE,), 0.1))
        assert torch.allclose(sae.b_dec, rows(0).float().mean(0) + 9)


def test_one_site_is_no_crosscoder(tmp_path: Path) -> None:
    for name, instead in (("crosscoder", "standard"), ("batchtopk_crosscoder", "batchtopk")):
        config = {"sae": {"name": name, "d_sae": 64}, "checkpoints": {"folder": str(tmp_path)}}
        message = (
            rf"inputs: there is one site alone \(.*\), and a crosscoder is for several: .* sae.name is '{instead}'\n"
        )
        with pytest.raises(ConfigError, match=message):
            saekit.train(config)
    assert not list(tmp_path.iterdir())
