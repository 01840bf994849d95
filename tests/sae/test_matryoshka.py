"""The architecture ``matryoshka``: beside its peers, one step beside the other, finite differences, files and runs."""

from __future__ import annotations

import copy
import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import attrs
import pytest
import torch
from saekit_plugins.architectures.batchtopk import BatchTopKConfig
from saekit_plugins.architectures.matryoshka import MatryoshkaConfig
from safetensors.torch import load_file, save_file
from support import levels
from support.kernels import seeded
from support.levels import Golden, check_loss, close, must_agree, must_be_slopes, stepped
from support.saved import READER, sae_lens_python
from support.training import fakes, run_config
from torch import Tensor

import saekit
from saekit import SAE
from saekit.config import TrainingConfig
from saekit.errors import ConfigError, SAEFormatError
from saekit.kernels import NestedStep, Workspace
from saekit.planning.step_costs import step_bytes

D_IN, D_SAE = 12, 40
WHOLE: dict[str, Any] = {"aux_loss_levels": "whole"}
SUM: dict[str, Any] = {"aux_loss_coefficient": 1.0, "aux_loss_normalization": "none"}
MEAN: dict[str, Any] = {
    "level_loss": "mean", "aux_loss_normalization": "share", "aux_loss_coefficient": 1 / 32,
    "rescale_acts_by_decoder_norm": False, **WHOLE,
}  # fmt: skip


def built(seed: int = 0, ports: Any = D_IN, **options: Any) -> SAE:
    """Random weights, decoder rows of many norms."""
    given = {"d_sae": D_SAE, "dtype": "float64", "k": 5, "widths": (4, 0.4), **options}
    sae = levels.built(MatryoshkaConfig(**given), ports)
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=seeded(seed)) / 2)
        sae.W_dec *= 0.1 + torch.rand(sae.d_sae, 1, generator=seeded(1), dtype=torch.float64)
    return sae


def rows(n: int, d_in: int = D_IN, seed: int = 5) -> Tensor:
    return torch.randn(n, d_in, dtype=torch.float64, generator=seeded(seed))


DEAD = torch.rand(D_SAE, generator=seeded(4)) < 0.3

# ---- beside the peers

SAE_LENS = ["plain", "norms_not_counted", "dead", "dead_by_level", "activations_scaled"]


@pytest.mark.parametrize("name", SAE_LENS)
def test_steps_equal_those_of_sae_lens(way: str, name: str) -> None:
    golden = Golden(f"matryoshka_{name}")
    options = dict(golden.options)
    each: Any = "each" if options.pop("use_matryoshka_aux_loss", False) else "whole"
    config = MatryoshkaConfig(
        d_sae=48,
        dtype="float64",
        widths=tuple(options.pop("matryoshka_widths")),
        aux_loss_levels=each,
        **SUM,
        **options,
    )
    trainer = golden.trainer(config, beta1=0.9)
    names = {"losses/overall_loss": "loss", "details/mse_of_first_6": "inner_mse_loss_6"}
    names |= {f"losses/{loss}": loss for loss in ("mse_loss", "auxiliary_reconstruction_loss")}
    traces = golden.check(trainer, names)
    assert bool(traces["dead_features"].any()) == (name in SAE_LENS[2:]), "k_aux is 8, of more and of fewer dead"
    close(trainer.sae.threshold_average, traces["topk_threshold"][-1], "the threshold with its start at zero")
    saved, expected = trainer.raw_sae().public_tensors(), golden.part("saved.")
    expected["threshold"] = expected["threshold"] / (1 - 0.99 ** len(golden.batches))
    assert saved.keys() == expected.keys()
    for key, value in expected.items():
        close(saved[key], value, f"saved {key}")


@pytest.mark.parametrize("name", ["", "_weights"])
def test_steps_equal_those_of_dictionary_learning(way: str, name: str) -> None:
    golden = Golden(f"matryoshka_dictionary_learning{name}")
    options, fractions = golden.options, golden.options["group_fractions"]
    widths = tuple(sum(fractions[: level + 1]) for level in range(2))
    weights = tuple(options.get("group_weights", [1 / 3] * 3))
    config = MatryoshkaConfig(
        d_sae=48, dtype="float64", k=options["k"], widths=widths, level_weights=weights, normalize_sae_decoder=True,
        decoder_heuristic_init=False, **MEAN,
    )  # fmt: skip
    traces = golden.check(golden.trainer(config, beta1=0.9), {"losses/overall_loss": "loss"})
    assert (traces["dead_features"] > 0).sum() > 5


def test_loss_and_gradients_are_those_of_sae_lens(way: str) -> None:
    config = MatryoshkaConfig(d_sae=64, dtype="float64", k=6, widths=(16, 32, 64), **SUM, **WHOLE)
    result, theirs, _ = check_loss(config, "sae_lens_4_matryoshka_batchtopk", {}, way)
    close(result.output, theirs["recons"])
    inner = theirs["loss.inner_mse_loss_16"] + theirs["loss.inner_mse_loss_32"]
    close(result.losses["inner_mse_loss"], inner.squeeze())
    close(result.losses["auxiliary_reconstruction_loss"], theirs["loss.auxiliary_reconstruction_loss"].squeeze())


def test_loss_and_gradients_are_those_of_dictionary_learning(way: str) -> None:
    """Of whose dead features each fires in the batch, so that none is left."""
    weights = (1 / 3, 1 / 3, 1 / 3)
    config = MatryoshkaConfig(d_sae=64, dtype="float64", k=6, widths=(0.25, 0.5), level_weights=weights, **MEAN)
    check_loss(config, "dictionary_learning_matryoshka", {}, way, reset=True)


# ---- one step beside the other

OPTIONS: list[dict[str, Any]] = [
    {},
    {**SUM, **WHOLE},
    {**MEAN, "k_aux": 3, "apply_b_dec_to_input": False},
    {"level_weights": (0.5, 0.0, 3.0), "widths": (1, 0.5, 40)},
    {**SUM, "k_aux": 2, "level_loss": "mean"},
    {"widths": (), "aux_loss_coefficient": 0.0},
    {"mse_loss_normalization": "variance", "aux_loss_trains_encoder": False, "k_start": 2.5, "k_warm_up_steps": 4},
]


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("encoder", "groups", "gradients", "auxk"):
        monkeypatch.setattr(f"saekit.kernels.{module}.CHUNK", 16)


@pytest.mark.parametrize("factor", [False, True])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.usefixtures("small_chunks")
def test_the_fast_step_is_that_of_autograd(options: dict[str, Any], factor: bool) -> None:
    x = rows(90)
    for dead in (None, DEAD, torch.zeros_like(DEAD)):
        found = []
        for way in ("fast", "reference"):
            sae = built(**options)
            if factor:
                sae.add_scaling_factor()
                sae.scaling_factor.data.copy_(torch.rand(D_SAE, generator=seeded(3)) + 0.5)
            found.append(stepped(sae, x, dead, way, step=2))
            assert sae.threshold > 0
        must_agree(*found)
        result = found[0][0]
        if not options.get("widths", True):
            assert result.losses["inner_mse_loss"] == 0
            assert not result.metrics
    sae.learn_only(["W_dec"])
    must_agree(*(stepped(copy.deepcopy(sae), x, DEAD, way) for way in ("fast", "reference")))


def test_levels_add_up_to_what_they_are(device: str) -> None:
    """Each by a product of its own, whatever order entries are in."""
    sae, x = built(widths=(1, 2, 30)).to(device), rows(50).to(device)
    kernel, workspace = sae.step_kernels[0], Workspace()
    with torch.no_grad():
        fast = NestedStep(sae, x, workspace, ends=sae.ends, weights=sae.factors, keep=True)
        norms, wanted = sae.feature_norms(), sae.wanted(len(x))
        ((_, features),) = kernel.chosen(sae, kernel.encoder(sae, workspace), fast.centered, norms, wanted)
        dense = features.dense()
        fast.add(0, features, lambda gradient, *_: gradient)
        for end, output, error in zip((1, 2, 30, 40), fast.outputs, fast.level_errors, strict=True):
            expected = dense[:, :end] @ sae.W_dec[:end] + sae.b_dec
            assert torch.allclose(output, expected)
            assert error.item() == pytest.approx((expected - x).pow(2).sum(1).mean().item())
        with pytest.raises(ValueError, match="levels are made of one sparse group, which has all rows"):
            fast.add(0, dense, lambda gradient, *_: gradient)


@pytest.mark.parametrize("options", [{"level_weights": (2.0, 0.5, 1.0)}, {"level_loss": "mean"}], ids=str)
def test_gradients_are_the_slopes_of_the_loss(way: str, options: dict[str, Any]) -> None:
    must_be_slopes(built(aux_loss_coefficient=0.0, **options), rows(20), None, way)


def test_one_level_is_a_batchtopk() -> None:
    sae, x = built(widths=()), rows(60)
    plain = levels.built(BatchTopKConfig(d_sae=D_SAE, dtype="float64", k=5), D_IN)
    plain.load_state_dict(sae.state_dict())
    (found, one), (expected, other) = (stepped(model, x, DEAD, "fast") for model in (sae, plain))
    assert torch.allclose(found.loss, expected.loss)
    for name, value in other.items():
        assert torch.allclose(one[name], value)


# ---- options


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: MatryoshkaConfig(widths=(0,)), r"widths: must be numbers of features .* found 0$"),
        (lambda: MatryoshkaConfig(widths=(0.5, 1.5)), r"widths: must be .* at most 1.0\), found 1.5$"),
        (
            lambda: MatryoshkaConfig(level_weights=(1.0, -1.0)),
            r"level_weights: must be finite numbers of 0 or more, fou",
        ),
        (lambda: MatryoshkaConfig(level_weights=(0.0, 0.0)), r"level_weights: must not all be 0, found \[0.0, 0.0\]"),
        (
            lambda: MatryoshkaConfig(aux_loss_coefficient=0.0, **WHOLE),
            "aux_loss_levels: is of AuxK, and",
        ),
        (
            lambda: built(widths=(8, 4)),
            r"sae.widths: are \[8, 4\], so that levels end at \[8, 4, 40\]; each must be larger than the one before",
        ),
        (
            lambda: built(widths=(0.001,)),
            r"sae.widths: are \[0.001\], so that levels end at \[0, 40\]; each must be larger",
        ),
        (
            lambda: built(widths=(41,)),
            r"sae.widths: are \[41\], so that levels end at \[41, 40\]; each must be .* to all 40 features",
        ),
        (
            lambda: built(level_weights=(1.0, 2.0)),
            "sae.level_weights: are 2, and there are 3 levels: those that end at",
        ),
        (
            lambda: built(activation="tanh-relu"),
            "sae.activation: is not ReLU, and matryoshka is defined by the largest",
        ),
        (lambda: built(k=41), "sae.k: is 41, but there are only 40 features"),
    ],
)
def test_what_does_not_fit_is_told(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make()


@pytest.mark.parametrize(
    ("widths", "ends"),
    [((4, 0.4), (4, 16, 40)), ((4, 40), (4, 40)), ((0.5, 1.0), (20, 40)), ((0.29,), (12, 40)), ((1,), (1, 40))],
)
def test_where_levels_end(widths: Any, ends: tuple[int, ...]) -> None:
    assert built(widths=widths).ends == ends
    assert MatryoshkaConfig().level_ends(64) == (2, 6, 14, 30, 64)


def test_options_are_whole_numbers_or_parts_also_in_a_file(tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text(
        '[sae]\nname = "matryoshka"\nwidths = [512, 0.5, 1.0]\nlevel_weights = [1, 2, 3]\n'
    )
    sae = saekit.load_config(tmp_path / "run.toml").sae
    assert sae.options.widths == (512, 0.5, 1.0)
    assert type(sae.options.widths[0]) is int
    assert saekit.load_config(tmp_path / "run.toml", ["sae.widths=[3]"]).sae.options.widths == (3,)


def test_what_a_step_takes_counts_its_levels() -> None:
    training = TrainingConfig(training_tokens=10_000, train_batch_size_tokens=500)
    few, more, both = (
        step_bytes(built(d_sae=400, dtype="float32", **options), training, "cpu")
        for options in ({"widths": (), **WHOLE}, {"widths": (4, 8), **WHOLE}, {"widths": (4, 8)})
    )
    assert (more - few, both - more) == (2 * 500 * D_IN * 4, 3 * 500 * D_IN * 4)


# ---- scales and files


def trained(**options: Any) -> SAE:
    sae = built(**options)
    for seed in (1, 2):
        stepped(sae, rows(200, seed=seed).to(sae.W_enc.dtype), None, "reference")
    sites = saekit.Sites.one(saekit.Site(hook_name="blocks.0.hook_resid_post"))
    sae.info = attrs.evolve(sae.info, sites=sites, metadata={"model_name": "gpt2-small"})
    return sae


@pytest.mark.parametrize("rescale", [True, False])
def test_folding_an_activation_scale(rescale: bool) -> None:
    sae, x = trained(rescale_acts_by_decoder_norm=rescale), rows(50)
    expected = sae(3 * x).detach() / 3
    assert 0 < (sae.encode(3 * x) > 0).float().mean() < 0.5
    sae.fold_activation_scale(3.0)
    assert torch.allclose(sae(x), expected)


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
def test_what_is_saved_comes_back_with_its_levels(tmp_path: Path, dtype: str) -> None:
    options = {"level_loss": "mean", "level_weights": (1.0, 2.0, 0.5), **WHOLE}
    sae, x = trained(dtype=dtype, **options), rows(50)
    folder = sae.save(tmp_path / "sae")
    table = json.loads((folder / "cfg.json").read_text())
    assert table["architecture"] == "jumprelu"
    assert table["metadata"]["training_architecture"] == "matryoshka_batchtopk"
    loaded, of_sae_lens = SAE.load(folder), SAE.load(folder, loader="sae_lens")
    assert type(loaded) is type(sae)
    assert loaded.ends == (4, 16, 40)
    if dtype != "bfloat16":  # where each feature has the threshold that its norm makes of the one
        assert type(of_sae_lens) is type(sae)
        assert of_sae_lens.ends == (4, 16, 40)
    assert (loaded.config.widths, loaded.factors) == ((4, 0.4), sae.factors)
    assert loaded.info.options == {**sae.saved_options(), "dtype": loaded.config.dtype}
    again = SAE.load(loaded.save(tmp_path / "again"))
    for one in (loaded, again, *([] if dtype == "bfloat16" else [of_sae_lens])):
        assert torch.allclose(one(x), sae(x), atol=1e-5 if dtype != "bfloat16" else 0.2)
    table["saekit"].pop("seal")
    table["saekit"]["options"].pop("widths")
    (folder / "cfg.json").write_text(json.dumps(table))
    with pytest.raises(SAEFormatError, match="saekit.options in cfg.json of .* lacks widths, without which the"):
        SAE.load(folder)


def test_a_batchtopk_says_how_it_was_trained(tmp_path: Path) -> None:
    sae = levels.built(BatchTopKConfig(d_sae=D_SAE, k=3), D_IN)
    sae.info = attrs.evolve(sae.info, sites=saekit.Sites.one(saekit.Site(hook_name="blocks.0.hook_resid_post")))
    folder = sae.save(tmp_path)
    assert json.loads((folder / "cfg.json").read_text())["metadata"]["training_architecture"] == "batchtopk"
    read = SAE.load(folder, loader="sae_lens")
    assert (read.info.architecture, read.config.k) == ("saekit:batchtopk", 3)


@pytest.mark.slow
def test_sae_lens_6_reads_the_folder(tmp_path: Path) -> None:
    python = sae_lens_python()
    if python is None:
        pytest.skip("sae-lens 6 is not installed; name a Python that has it in SAEKIT_SAE_LENS_PYTHON")
    sae, x = trained(dtype="float32"), rows(50).float()
    sae.save(tmp_path / "sae")
    save_file({"x": x}, tmp_path / "x.safetensors")
    command = [python, "-c", READER, tmp_path / "sae", tmp_path / "x.safetensors", tmp_path / "out.safetensors"]
    found = subprocess.run(command, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    theirs = load_file(tmp_path / "out.safetensors")
    assert torch.allclose(theirs["out"], sae(x), atol=1e-4)
    assert torch.allclose(theirs["features"], sae.encode(x), atol=1e-4)


# ---- runs

TEXTS = [{"text": f"value_{n} = {n * n}\n" * 30} for n in range(60)]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_run_and_one_that_goes_on_from_it(tmp_path: Path, dtype: str) -> None:
    def run(name: str, **training: Any) -> Any:
        base = run_config(
            tmp_path / name, training={"training_tokens": 1024, "dead_feature_window": 2, **training},
            evals={"run": []}, site={"hook_name": "hook_embed"}, model={"backend": "test:fake"},
            activations={"source": {"name": "live", "n_batches_in_buffer": 4},
                         "normalize_activations": "expected_average_only_in"},
        )  # fmt: skip
        base["sae"] = {"name": "matryoshka", "d_sae": 32, "k": 4, "widths": [4, 0.5], "dtype": dtype}
        return saekit.train(base, plugins=fakes(), dataset=TEXTS)

    first = run("one")
    assert first.metrics["metrics/l0"] <= 4
    assert first.metrics["details/mse_of_first_4"] >= first.metrics["losses/mse_loss"]
    x = torch.randn(20, 8, generator=seeded())
    atol = 1e-4 if dtype == "float32" else 0.1
    assert torch.allclose(SAE.load(first.folder / "sae")(x), first.sae(x), atol=atol)
    second = run("two", from_pretrained_path=str(first.folder / "sae"), lr=1e-12, training_tokens=256)
    assert second.sae.ends == (4, 16, 32)
    assert second.sae.threshold.item() == pytest.approx(first.sae.threshold.item(), rel=0.05)
