"""The architectures ``topk`` and ``batchtopk``, beside sae-lens 6.54.12: ``make_golden_topk.py`` made the files."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import attrs
import numpy as np
import pytest
import torch
from saekit_plugins.activations.tanh_relu import TanhReluConfig
from saekit_plugins.architectures.batchtopk import BatchTopKConfig
from saekit_plugins.architectures.topk import TopKConfig
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from support.optimizers import adam_for
from support.saved import READER, sae_lens_python
from support.tiny import run_config
from torch import Tensor

import saekit
from saekit import SAE
from saekit.config import SAEConfig, TrainingConfig
from saekit.errors import ConfigError, SAEFormatError
from saekit.sae.build import build_module
from saekit.site import Site
from saekit.testing import FakeBackend, fake_plugin, isolated_manager
from saekit.training.firing import FiringStatistics
from saekit.training.trainer import SAETrainer
from saekit.values import StepInput

pytestmark = pytest.mark.usefixtures("way")

FOLDER = Path(__file__).parents[1] / "golden_topk"
CASES = sorted(path.stem for path in FOLDER.glob("*topk_*.safetensors"))


def built(config: SAEConfig, d_in: int) -> SAE:
    plugins = saekit.default_manager()
    return build_module(plugins.find("sae_architectures", config), config, d_in, plugins)


def random_sae(kind: str, d_in: int = 12, d_sae: int = 40, seed: int = 0, **options: Any) -> SAE:
    """With decoder rows of many norms."""
    config = (TopKConfig if kind == "topk" else BatchTopKConfig)(**{"d_sae": d_sae, "dtype": "float64", **options})
    sae = built(config, d_in)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / 2)
        sae.W_dec *= 0.1 + torch.rand(d_sae, 1, generator=generator) * 3
    return sae


def rows(n: int, d_in: int = 12, seed: int = 5) -> Tensor:
    return torch.randn(n, d_in, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def step_input(dead: Tensor | None = None) -> StepInput:
    return StepInput(step=0, generator=torch.Generator(), dead=dead)


class Golden:
    def __init__(self, name: str) -> None:
        self.tensors = load_file(FOLDER / f"{name}.safetensors")
        with safe_open(FOLDER / f"{name}.safetensors", "pt") as file:
            self.config: dict[str, Any] = json.loads(file.metadata()["config"])
        self.batches = load_file(FOLDER / "batches.safetensors")["batches"].double()
        self.kind = name.split("_")[0]

    def part(self, prefix: str) -> dict[str, Tensor]:
        return {name.removeprefix(prefix): value for name, value in self.tensors.items() if name.startswith(prefix)}

    def trainer(self) -> SAETrainer:
        config = dict(self.config)
        lr, beta1, window = config.pop("lr"), config.pop("adam_beta1"), config.pop("dead_feature_window")
        scale = 1.7 if config.pop("normalize_activations", None) else 1.0
        options = {"aux_loss_coefficient": 1.0, "aux_loss_normalization": "none"} | {
            key.removeprefix("topk_"): value for key, value in config.items()
        }
        kind = TopKConfig if self.kind == "topk" else BatchTopKConfig
        sae = built(kind(d_sae=128, dtype="float64", **options), 32)
        with torch.no_grad():
            for name, parameter in sae.named_parameters():
                parameter.copy_(self.part("init.")[name])
        training = TrainingConfig(
            training_tokens=self.batches.shape[0] * self.batches.shape[1], train_batch_size_tokens=64, lr=lr,
            dead_feature_window=window, log_frequency=1,
        )  # fmt: skip
        return SAETrainer(
            name="golden", sae=sae, sites=saekit.Sites.one(Site()),
            training=training, generator=torch.Generator(), device="cpu",
            optimizer=adam_for(sae.named_parameters(), lambda step: lr, beta1=beta1),
            firing=FiringStatistics(128, dead_after=window, window=1000, device="cpu"), scale=scale,
        )  # fmt: skip


def close(found: float | Tensor, expected: float | Tensor, what: str = "") -> None:
    found, expected = (torch.as_tensor(value, dtype=torch.float64) for value in (found, expected))
    assert found.shape == expected.shape, what
    deviation = ((found - expected).abs() / expected.abs().clamp_min(1)).max().item()
    assert deviation <= 1e-9, f"{what} deviates by {deviation:.1e}"


@pytest.mark.parametrize("name", CASES)
def test_steps_equal_those_of_sae_lens(name: str) -> None:
    golden = Golden(name)
    trainer = golden.trainer()
    trace = golden.part("trace.")
    for step, batch in enumerate(golden.batches):
        dead = float(trainer.firing.dead().sum())
        metrics = trainer.train_on(batch)
        found = {
            "loss": metrics["losses/overall_loss"],
            "mse_loss": metrics["losses/mse_loss"],
            "auxiliary_reconstruction_loss": metrics["losses/auxiliary_reconstruction_loss"],
            "l0": metrics["metrics/l0"],
            "dead_features": dead,
        }
        if golden.kind == "batchtopk":
            found["topk_threshold"] = trainer.sae.threshold_average.item()
            assert metrics["details/current_topk_threshold"] == pytest.approx(trainer.sae.threshold.item())
        assert found.keys() == trace.keys()
        for key, value in found.items():
            close(value, trace[key][step], f"{key} at step {step}")
    for key, value in trainer.sae.named_parameters():
        close(value.detach(), golden.part("final.")[key], key)
    check_saved(trainer, golden)


def check_saved(trainer: SAETrainer, golden: Golden) -> None:
    """What is saved is what the peer saves, but that the running average has lost its start at zero."""
    sae = trainer.raw_sae()
    saved, expected = sae.public_tensors(), golden.part("saved.")
    x = golden.batches[0]
    if golden.kind == "batchtopk":
        lr = golden.config.get("topk_threshold_lr", 0.01)
        expected["threshold"] = expected["threshold"] / (1 - (1 - lr) ** len(golden.batches))
    else:
        with torch.no_grad():
            close(sae(x), golden.tensors["output"], "output")
            norms = sae.feature_norms()
            assert norms is None or (norms != 1).any()
            close(sae.encode(x), golden.tensors["features"], "features")
    assert saved.keys() == expected.keys()
    for key, value in expected.items():
        close(saved[key], value, f"saved {key}")


def test_cases_have_dead_features_fewer_and_more_than_auxk_trains() -> None:
    most = {name: Golden(name).part("trace.")["dead_features"].max().item() for name in CASES}
    assert sum(dead > 0 for dead in most.values()) >= 4
    assert max(most.values()) > 2 * 16, "k_aux"
    for name, dead in most.items():
        aux = Golden(name).part("trace.")["auxiliary_reconstruction_loss"]
        assert bool((aux > 0).any()) == (dead > 0)


# ---- the folder


def trained(kind: str, **options: Any) -> SAE:
    """Two steps of training, so that there is a threshold."""
    sae = random_sae(kind, **options)
    for seed in (1, 2):
        sae.training_step(rows(200, seed=seed).to(sae.W_enc.dtype), step_input())
        for parameter in sae.parameters():
            parameter.grad = None
    sae.info = attrs.evolve(
        sae.info,
        sites=saekit.Sites.one(Site(hook_name="blocks.0.hook_resid_post")),
        metadata={"model_name": "gpt2-small"},
    )
    return sae


def computed_from(folder: Path, x: np.ndarray, k: int | None) -> tuple[np.ndarray, np.ndarray]:
    """What the format means, in NumPy."""
    t = {name: value.double().numpy() for name, value in load_file(folder / "sae_weights.safetensors").items()}
    pre = (x - t["b_dec"]) @ t["W_enc"] + t["b_enc"]
    if k is None:
        features = np.where(pre > t["threshold"], pre, 0)
    else:
        features = np.maximum(np.where(pre >= np.sort(pre, axis=1)[:, -k, None], pre, 0), 0)
    return features, features @ t["W_dec"] + t["b_dec"]


@pytest.mark.parametrize("factor", [False, True])
@pytest.mark.parametrize("rescale", [True, False])
@pytest.mark.parametrize("kind", ["topk", "batchtopk"])
def test_what_is_saved_means_the_same_everywhere(tmp_path: Path, kind: str, rescale: bool, factor: bool) -> None:
    sae, x = trained(kind, k=6, rescale_acts_by_decoder_norm=rescale), rows(50)
    if factor:
        sae.add_scaling_factor()
        sae.scaling_factor.data.copy_(torch.rand(40, generator=torch.Generator().manual_seed(0)) + 0.5)
    folder = sae.save(tmp_path / "sae")
    table = json.loads((folder / "cfg.json").read_text())
    assert table["architecture"] == ("topk" if kind == "topk" else "jumprelu")
    assert table.get("k") == (6 if kind == "topk" else None)
    expected = (sae.encode(x).detach(), sae(x).detach())
    for found, wanted in zip(computed_from(folder, x.numpy(), 6 if kind == "topk" else None), expected, strict=True):
        assert np.allclose(found, wanted.numpy())
    loaded = SAE.load(folder)
    assert torch.allclose(loaded.encode(x), expected[0])
    assert torch.allclose(loaded(x), expected[1])
    again = SAE.load(loaded.save(tmp_path / "again"))
    assert torch.allclose(again(x), expected[1])
    if kind == "batchtopk":
        assert again.threshold == pytest.approx(sae.threshold.item())
        assert sae.threshold > 0


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["topk", "batchtopk"])
def test_sae_lens_6_reads_the_folder(tmp_path: Path, kind: str) -> None:
    python = sae_lens_python()
    if python is None:
        pytest.skip("sae-lens 6 is not installed; name a Python that has it in SAEKIT_SAE_LENS_PYTHON")
    sae, x = trained(kind, k=6, dtype="float32"), rows(50).float()
    sae.save(tmp_path / "sae")
    save_file({"x": x}, tmp_path / "x.safetensors")
    command = [python, "-c", READER, tmp_path / "sae", tmp_path / "x.safetensors", tmp_path / "out.safetensors"]
    found = subprocess.run(command, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    theirs = load_file(tmp_path / "out.safetensors")
    assert torch.allclose(theirs["out"], sae(x), atol=1e-4)
    assert torch.allclose(theirs["features"], sae.encode(x), atol=1e-4)


def test_thresholds_that_do_not_fit(tmp_path: Path) -> None:
    folder = trained("batchtopk", k=6).save(tmp_path / "sae")
    tensors = load_file(folder / "sae_weights.safetensors")
    table = json.loads((folder / "cfg.json").read_text())
    table["saekit"].pop("sha256")
    (folder / "cfg.json").write_text(json.dumps(table))
    tensors["threshold"].fill_(-0.5)
    save_file(tensors, folder / "sae_weights.safetensors")
    with pytest.warns(
        UserWarning, match=r"^40 of 40 thresholds in the file are below 0, the least -0\.5\. They are read as"
    ):
        assert SAE.load(folder).threshold == 0
    tensors["threshold"].fill_(0.5)[3] += 1
    save_file(tensors, folder / "sae_weights.safetensors")
    with pytest.raises(SAEFormatError, match=r"has one threshold, as a tensor \[40\] of equal numbers; found \[40\]"):
        SAE.load(folder)
    del tensors["threshold"]
    save_file(tensors, folder / "sae_weights.safetensors")
    with pytest.raises(SAEFormatError, match="threshold is missing"):
        SAE.load(folder)


@pytest.mark.parametrize("rescale", [True, False])
@pytest.mark.parametrize("kind", ["topk", "batchtopk"])
def test_folding_an_activation_scale(kind: str, rescale: bool) -> None:
    sae, x = trained(kind, k=6, rescale_acts_by_decoder_norm=rescale), rows(50)
    expected = sae(3 * x).detach() / 3
    sae.fold_activation_scale(3.0)
    assert torch.allclose(sae(x), expected)


# ---- runs


def run(folder: Path, **sections: Any) -> Any:
    base = run_config(
        folder,
        training={"training_tokens": 1024, "dead_feature_window": 2, **sections.pop("training", {})},
        evals={"run": []},
    )
    backend = fake_plugin("model_backends", "fake", lambda config, **services: FakeBackend())
    plugins = isolated_manager(backend, builtins=True)
    base |= {"site": {"hook_name": "hook_embed"}, "model": {"backend": "test:fake"}}
    return saekit.train({**base, **sections}, plugins=plugins, dataset=TEXTS)


TEXTS = [{"text": f"value_{n} = {n * n}\n" * 30} for n in range(60)]


@pytest.mark.parametrize("kind", ["topk", "batchtopk"])
@pytest.mark.parametrize("scaled", ["none", "expected_average_only_in"])
def test_a_run_and_one_that_goes_on_from_it(tmp_path: Path, kind: str, scaled: str) -> None:
    sae = {"name": kind, "d_sae": 32, "k": 4, "aux_loss_coefficient": 1.0}
    activations = {"source": {"name": "live", "n_batches_in_buffer": 4}, "normalize_activations": scaled}
    first = run(tmp_path / "one", sae=sae, activations=activations)
    assert first.metrics["metrics/l0"] <= 4
    x = torch.randn(20, 8, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(SAE.load(first.folder / "sae")(x), first.sae(x), atol=1e-4)
    follow = {"from_pretrained_path": str(first.folder / "sae"), "lr": 1e-12, "training_tokens": 256}
    second = run(tmp_path / "two", sae=sae, activations=activations, training=follow)
    if kind == "topk":
        assert torch.allclose(second.sae(x), first.sae(x), atol=1e-4), "nothing is learned at this rate"
    else:
        assert second.sae.threshold.item() == pytest.approx(first.sae.threshold.item(), rel=0.05)


@pytest.mark.parametrize("kind", ["topk", "batchtopk"])
def test_fine_tuning(tmp_path: Path, kind: str) -> None:
    training = {"finetuning_tokens": 512, "finetuning_method": "scale"}
    result = run(tmp_path, sae={"name": kind, "d_sae": 32, "k": 4}, training=training)
    assert (result.sae.W_dec.norm(dim=1) - 1).abs().max() > 1e-4, "factors are in the rows that are saved"
    x = torch.randn(20, 8, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(SAE.load(result.folder / "sae")(x), result.sae(x), atol=1e-4)


@pytest.mark.parametrize("finetuning", [{}, {"finetuning_tokens": 512, "finetuning_method": "scale"}])
@pytest.mark.parametrize("kind", ["topk", "batchtopk", "standard"])
def test_a_result_has_the_weights_that_were_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, finetuning: dict[str, Any]
) -> None:
    monkeypatch.chdir(tmp_path)
    sae = {"name": kind, "d_sae": 32} | ({} if kind == "standard" else {"k": 4})
    result = run(Path("runs"), sae=sae, training=finetuning)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    saved = SAE.load(tmp_path / result.folder / "sae")
    assert {name: value.tolist() for name, value in result.sae.state_dict().items()} == {
        name: value.tolist() for name, value in saved.state_dict().items()
    }
    assert result.sae.to_dict() == saved.to_dict()
    again = run(Path("runs"), sae=sae, training=finetuning)
    shutil.rmtree(again.folder)
    assert again.sae.d_sae == 32, "without its folder"


def test_the_threshold_of_a_short_run_is_not_near_its_start_at_zero() -> None:
    sae = random_sae("batchtopk", k=5)
    least = []
    for seed in range(3):
        x = rows(400, seed=seed)
        hidden = ((x - sae.b_dec) @ sae.W_enc + sae.b_enc) * sae.W_dec.norm(dim=1)
        least.append(hidden.relu().flatten().topk(2000).values[-1].item())
        sae.training_step(x, step_input())
    assert sae.threshold.item() == pytest.approx(np.average(least, weights=[0.99**2, 0.99, 1]), rel=1e-9)
    assert (sae.encode(rows(400)) > 0).sum() == pytest.approx(2000, rel=0.1)


def test_before_any_training_every_feature_above_zero_is_active() -> None:
    sae = random_sae("batchtopk", k=5)
    assert torch.equal(sae.encode(rows(9)) > 0, sae.pre_activations(rows(9)) > 0)


def test_training_after_inference_mode(tmp_path: Path) -> None:
    """Memory that is used again must not belong to inference mode."""
    sae = random_sae("topk", d_in=64, d_sae=3000, dtype="float32")
    x = torch.randn(1024, 64)
    with torch.inference_mode():
        sae(x)
    sae.training_step(x, step_input())
    assert sae.W_enc.grad is not None


# ---- what is wrong


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (TopKConfig(k=50, d_sae=40), "sae.k: is 50, but there are only 40 features"),
        (BatchTopKConfig(k=40.5, d_sae=40), "sae.k: is 40.5, but there are only 40 features"),
        (TopKConfig(activation=TanhReluConfig()), "sae.activation: is not ReLU, and topk is defined by the largest"),
        (
            BatchTopKConfig(activation="tanh-relu"),
            "sae.activation: is not ReLU, and batchtopk is defined by the largest",
        ),
    ],
)
def test_contradictions_are_errors(config: SAEConfig, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        built(config, 12)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TopKConfig(k=0), "k: must be 1 or more, found 0"),
        (lambda: BatchTopKConfig(k=0.0), "k: must be above 0, found 0.0"),
        (lambda: BatchTopKConfig(threshold_lr=0.0), "threshold_lr: must be above 0, at most 1, found 0.0"),
        (lambda: TopKConfig(aux_loss_coefficient=-1.0), "aux_loss_coefficient: must be 0 or more, found -1.0"),
        (lambda: TopKConfig(k_aux=0), "k_aux: must be 1 or more, found 0"),
    ],
)
def test_options_out_of_range(make: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make()


@pytest.mark.parametrize(
    "config", [TopKConfig(d_sae=20, k=3), BatchTopKConfig(d_sae=20, k=3)], ids=["topk", "batchtopk"]
)
def test_a_scale_for_each_port_is_folded_in(config: TopKConfig) -> None:
    """Decoder norms, by which features are compared, change by a factor of their own for each feature."""
    plugins = saekit.default_manager()
    ports = saekit.Ports({"a": 4, "b": 3})
    sae = build_module(plugins.find("sae_architectures", config), attrs.evolve(config, dtype="float64"), ports, plugins)
    generator = torch.Generator().manual_seed(0)
    for parameter in sae.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    x = torch.randn(9, 7, generator=generator, dtype=torch.float64)
    sae.training_step(x, StepInput(step=0, generator=generator))  # which finds a threshold
    scale = torch.tensor([0.5] * 4 + [3.0] * 3, dtype=torch.float64)
    expected = sae(x * scale) / scale
    sae.fold_activation_scale(scale, scale)
    assert torch.allclose(sae(x), expected, rtol=1e-12)
    assert sae.saved_options()["rescale_acts_by_decoder_norm"] is False


@pytest.mark.parametrize("kind", ["topk", "batchtopk"])
@pytest.mark.parametrize("factor", [False, True])
def test_rescaling_can_be_stated_otherwise_where_rows_are_of_one_norm(kind: str, factor: bool) -> None:
    sae, x = random_sae(kind, k=5, rescale_acts_by_decoder_norm=False), rows(30)
    option, name = "rescale_acts_by_decoder_norm", f"saekit:{kind}"
    sae.info = attrs.evolve(sae.info, architecture=name, options={**sae.info.options, option: False})
    assert not sae.restate(option, True, within=1e-12), "rows have many norms"
    assert not sae.restate("k", 3, within=1), "of another option nothing is known"
    if isinstance(sae.config, BatchTopKConfig):
        sae.threshold_average.fill_(0.8)
        sae.threshold_updates.fill_(10**6)
    if factor:
        sae.add_scaling_factor()
    with torch.no_grad():
        sae.W_dec *= 3 / sae.decoder_norms()[:, None]
        if sae.scaling_factor is not None:
            sae.scaling_factor.uniform_(0.5, 2, generator=torch.Generator().manual_seed(1))
        expected, features = sae(x), sae.encode(x)
        assert features.any()
        assert sae.restate(option, True, within=1e-12)
        assert sae.config.rescale_acts_by_decoder_norm
        assert sae.info.options[option] is True
        torch.testing.assert_close(sae(x), expected)
        torch.testing.assert_close(sae.encode(x), 3 * features)
        assert sae.restate(option, False, within=1e-12)
        torch.testing.assert_close(sae(x), expected)
        torch.testing.assert_close(sae.encode(x), 3 * features)
