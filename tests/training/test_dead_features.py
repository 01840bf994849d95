"""Features that would stay dead: AuxK as in the paper, and defaults that start alive."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from saekit_plugins.architectures.batchtopk import BatchTopKConfig
from saekit_plugins.architectures.standard import StandardConfig
from saekit_plugins.architectures.topk import TopKConfig
from support.tiny import run_config

import saekit
from saekit import SAE
from saekit.config import SAEConfig, TrainingConfig
from saekit.errors import ConfigError
from saekit.sae.build import build_module, initialize
from saekit.sae.losses import variance_ratio
from saekit.testing import FakeBackend, fake_plugin, isolated_manager
from saekit.values import StepInput

D_IN, D_SAE, ROWS = 10, 48, 70


def built(config: SAEConfig, d_in: int = D_IN) -> SAE:
    plugins = saekit.default_manager()
    return build_module(plugins.find("sae_architectures", config), config, d_in, plugins)


def random_sae(**options: Any) -> SAE:
    sae = built(TopKConfig(d_sae=D_SAE, dtype="float64", k=4, **options))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) / 2)
    return sae


X = torch.randn(ROWS, D_IN, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) + 3
DEAD = torch.arange(D_SAE) % 3 == 0


def defined(sae: SAE, x: np.ndarray, coefficient: float, fixed: tuple[np.ndarray, float] | None = None) -> Any:
    """The loss of the paper in units of the variance of ``x``, times that variance; and what has no gradient in it."""
    W_enc, b_enc, W_dec, b_dec = (getattr(sae, name).detach().numpy() for name in ("W_enc", "b_enc", "W_dec", "b_dec"))
    pre = (x - b_dec) @ W_enc + b_enc
    order = np.sort(pre, axis=1)[:, -4][:, None]
    output = np.where(pre >= order, np.maximum(pre, 0), 0) @ W_dec + b_dec
    whole = ((x - x.mean(0)) ** 2).sum()
    residual = x - output if fixed is None else fixed[0]
    left = ((residual - residual.mean(0)) ** 2).sum() if fixed is None else fixed[1]
    dead = np.flatnonzero(DEAD.numpy())
    hidden = pre[:, dead]
    k = sae.k_aux  # type: ignore[operator]
    chosen = np.where(hidden >= np.sort(hidden, axis=1)[:, -k][:, None], hidden, 0)
    normalized = ((chosen @ W_dec[dead] - residual) ** 2).sum() / left
    mse = ((output - x) ** 2).sum() / whole
    return (mse + coefficient * normalized) * whole / len(x), (residual, left)


@pytest.mark.parametrize("kernels", ["fast", "reference"])
def test_auxk_is_that_of_the_paper(kernels: Any) -> None:
    """Both terms in units of the variance of what they are to explain; gradients by central differences."""
    sae = random_sae(rescale_acts_by_decoder_norm=False, aux_loss_coefficient=1 / 32)
    sae.kernels = kernels
    step = sae.training_step(X, StepInput(step=0, generator=torch.Generator(), dead=DEAD))
    expected, fixed = defined(sae, X.numpy(), 1 / 32)
    assert step.loss.item() == pytest.approx(expected, rel=1e-12)
    for name, place in (("W_enc", (2, 3)), ("W_enc", (4, 8)), ("W_dec", (6, 1)), ("W_dec", (5, 1)), ("b_enc", (9,))):
        parameter = getattr(sae, name)
        found, values = parameter.grad[place].item(), []
        for sign in (1, -1):
            with torch.no_grad():
                parameter[place] += sign * 1e-6
                values.append(defined(sae, X.numpy(), 1 / 32, fixed)[0])
                parameter[place] -= sign * 1e-6
        assert found == pytest.approx((values[0] - values[1]) / 2e-6, rel=1e-5, abs=1e-7), name


@pytest.mark.parametrize("normalization", ["residual_variance", "none"])
@pytest.mark.parametrize("rescale", [True, False])
def test_both_ways_agree(normalization: Any, rescale: bool) -> None:
    found = {}
    for kernels in ("fast", "reference"):
        sae = random_sae(aux_loss_normalization=normalization, rescale_acts_by_decoder_norm=rescale)
        sae.kernels = kernels  # type: ignore[assignment]
        result = sae.training_step(X, StepInput(step=0, generator=torch.Generator(), dead=DEAD))
        found[kernels] = [result.loss, *(parameter.grad for parameter in sae.parameters())]
    for one, other in zip(found["fast"], found["reference"], strict=True):
        assert one is not None
        assert torch.allclose(one, other, rtol=1e-10, atol=1e-12)  # type: ignore[arg-type]


def test_the_weight_does_not_depend_on_the_size_of_activations() -> None:
    """Raw sums of squares would: AuxK would count for less the better the reconstruction is."""
    output = X + torch.randn(X.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2)) / 10
    assert variance_ratio(7 * X, 7 * output).item() == pytest.approx(variance_ratio(X, output).item())
    assert variance_ratio(X, output).item() == pytest.approx(
        (X.var(0).sum() / (X - output).var(0).sum()).item(), rel=1e-12
    )
    assert variance_ratio(X, X) == 0, "nothing is left to explain"


@pytest.mark.parametrize("config", [TopKConfig, BatchTopKConfig])
def test_features_start_alive_with_outlier_dimensions(config: Any) -> None:
    """As in residual streams: two dimensions with large means.  From ``b_dec`` at zero, few features ever fire."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2000, 64, generator=generator)
    x[:, :2] += torch.tensor([60.0, -40.0])
    alive = {}
    for method in (None, "zeros"):
        options = config(d_sae=512, k=16, **({} if method is None else {"b_dec_init_method": method}))
        sae = built(options, 64)
        initialize(sae, torch.Generator().manual_seed(0), x)
        pre = sae.pre_activations(x) * sae.decoder_norms()
        alive[method] = len(pre.topk(16, dim=1).indices.unique())
    assert alive[None] > 500
    assert alive["zeros"] < 200


def test_the_window_of_short_runs() -> None:
    assert TrainingConfig(training_tokens=4096 * 586).dead_after == 58
    assert TrainingConfig(training_tokens=4096 * 20_000).dead_after == 1000
    assert TrainingConfig(training_tokens=1).dead_after == 1
    assert TrainingConfig(training_tokens=4096 * 586, dead_feature_window=1000).dead_after == 1000


def trained(folder: Path, sae: dict[str, Any], **sections: Any) -> Any:
    backend = fake_plugin("model_backends", "fake", lambda config, **services: FakeBackend())
    plugins = isolated_manager(backend, builtins=True)
    texts = [{"text": f"value_{n} = {n * n}\n" * 30} for n in range(60)]
    base = run_config(folder, evals={"run": []}, **sections)
    base |= {"sae": {"d_sae": 32, **sae}, "site": {"hook_name": "hook_embed"}, "model": {"backend": "test:fake"}}
    return saekit.train(base, plugins=plugins, dataset=texts)


@pytest.mark.parametrize(("kind", "own"), [("standard", 0.0), ("topk", 0.9), ("batchtopk", 0.9)])
@pytest.mark.parametrize("stated", [None, 0.0, 0.5])
def test_adams_beta1_is_the_architectures_unless_it_is_set(
    tmp_path: Path, kind: str, own: float, stated: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    betas = []
    adam = torch.optim.Adam

    def seen(*arguments: Any, **options: Any) -> Any:
        betas.append(options["betas"])
        return adam(*arguments, **options)

    monkeypatch.setattr(torch.optim, "Adam", seen)
    sae = {"name": kind} if kind == "standard" else {"name": kind, "k": 4}
    trained(tmp_path, sae, optimizer={"beta1": stated})
    assert betas == [(own if stated is None else stated, 0.999)]


@pytest.mark.parametrize("kind", ["topk", "batchtopk"])
def test_going_on_from_a_saved_sae_with_the_defaults(tmp_path: Path, kind: str) -> None:
    """The defaults choose a start, which must not stand in the way of another one; a chosen one does."""
    first = trained(tmp_path / "one", {"name": kind, "k": 4})
    follow = {"from_pretrained_path": str(first.folder / "sae"), "lr": 1e-12, "training_tokens": 256}
    second = trained(tmp_path / "two", {"name": kind, "k": 4}, training=follow)
    assert torch.allclose(second.sae.W_dec, first.sae.W_dec / first.sae.W_dec.norm(dim=1, keepdim=True), atol=1e-5)
    with pytest.raises(ConfigError, match=r"sae.b_dec_init_method: chooses a start, but training starts from"):
        trained(tmp_path / "three", {"name": kind, "k": 4, "b_dec_init_method": "geometric_median"}, training=follow)


def test_what_the_reference_does_can_be_asked_for() -> None:
    """The goldens of sae-lens are trained with these (``test_topk.py``)."""
    config = TopKConfig(aux_loss_coefficient=1.0, aux_loss_normalization="none", b_dec_init_method="zeros")
    assert built(config).aux_weight(X, X / 2) == 1.0  # type: ignore[operator]
    assert StandardConfig().b_dec_init_method == "zeros"
