"""Fine-tuning learns exactly what it should and nothing else."""

from __future__ import annotations

import copy
import itertools
import math
import subprocess
from pathlib import Path
from typing import Any

import attrs
import pytest
import torch
from saekit_plugins.architectures.standard import StandardConfig
from safetensors.torch import load_file, save_file
from support.foreign import OLD, reconstruct, tensors, write
from support.saved import READER, sae_lens_python
from support.training import DOCUMENTS, FACTOR, TUNING, Step, fake_run, fakes, fit, make_trainer, rows, train, weights
from torch import Tensor

import saekit
from saekit import SAE
from saekit.errors import ConfigError, SAEFormatError

both_ways = pytest.mark.usefixtures("way")  # the others take no step, or are not about it


LEARNS = {
    "scale": {"scaling_factor"},
    "decoder": {"scaling_factor", "W_dec", "b_dec"},
    "unrotated_decoder": {"scaling_factor", "b_dec"},
}

# ---- what learns


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("beta1", [0.0, 0.9])
@pytest.mark.parametrize("method", list(LEARNS))
@both_ways
def test_each_method_moves_its_parameters_and_no_other(
    tmp_path: Path, steps: list[Step], method: str, beta1: float, normalize: bool
) -> None:
    config = fake_run(
        tmp_path,
        sae={
            "apply_b_dec_to_input": False, "normalize_sae_decoder": normalize, "noise_scale": 0.1,
        },
        training={**TUNING, "finetuning_method": method, "lr_warm_up_steps": 2, "lr_decay_steps": 3},
        lr_schedule={"name": "cosine", "end": 0.004},
        optimizer={"beta1": beta1},
    )  # fmt: skip
    train(config)
    assert [len(step.x) for step in steps] == [256] * 6 + [164]
    ones = torch.ones(64)
    for number, step in enumerate(steps):
        moved = {name for name, value in step.before.items() if not torch.equal(value, step.after[name])}
        if number < 4:
            assert torch.equal(step.after["scaling_factor"], ones)
            assert moved == {"W_enc", "b_enc", "W_dec", "b_dec"}, number
        else:
            assert moved == LEARNS[method], number
    main = [0.004 + 0.003 * (1 + math.cos(math.pi * t / 2)) for t in range(2)]
    rates = [0.005, 0.01, *main, 0.004, 0.004 * 2 / 3, 0.004 / 3]
    assert [step.metrics["details/current_learning_rate"] for step in steps] == pytest.approx(rates), "one schedule"
    trained = steps[-1].after
    norms = trained["W_dec"].norm(dim=1)
    assert bool(((norms - 1).abs() < 1e-5).all()) == normalize
    assert not (trained["scaling_factor"] == 1).all()


@pytest.mark.parametrize("boundary", [256, 255, 257, 1])
@both_ways
def test_the_boundary(tmp_path: Path, steps: list[Step], boundary: int) -> None:
    """Fine-tuning begins with the first batch that has no row of training."""
    training = {**TUNING, "training_tokens": boundary, "finetuning_tokens": 900 - boundary}
    train(fake_run(tmp_path, training={**training, "finetuning_method": "scale"}))
    learned = [not torch.equal(step.before["W_enc"], step.after["W_enc"]) for step in steps]
    assert learned == [256 * number < boundary for number in range(4)]


@both_ways
def test_the_factor_is_told_where_to_go(tmp_path: Path, steps: list[Step]) -> None:
    """Its first step is Adam's first, against the gradient of the reconstruction's error."""
    train(fake_run(tmp_path, sae={"l1_coefficient": 2.0}, training={**TUNING, "finetuning_method": "scale"}))
    step = steps[4]
    p, x = {name: value.double() for name, value in step.before.items()}, step.x.double()
    f = ((x - p["b_dec"]) @ p["W_enc"] + p["b_enc"]).relu()
    residual = f @ p["W_dec"] + p["b_dec"] - x
    gradient = 2 * (f * (residual @ p["W_dec"].T)).mean(0)
    clear = gradient.abs() > 1e-3 * gradient.abs().max()
    assert clear.sum() > 32
    expected = 1 - 0.01 * gradient.sign()
    assert torch.allclose(step.after["scaling_factor"].double()[clear], expected[clear], atol=1e-4)
    mse = [
        ((f * factor) @ p["W_dec"] + p["b_dec"] - x).pow(2).sum(1).mean().item()
        for factor in (step.before["scaling_factor"].double(), step.after["scaling_factor"].double())
    ]
    assert mse[1] < mse[0]
    assert step.metrics["losses/mse_loss"] == pytest.approx(mse[0], rel=1e-5)


def sparse_rows(n: int, seed: int) -> Tensor:
    """Sums of a few of 24 directions in 12 dimensions."""
    directions = torch.randn(24, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    active = torch.rand(n, 24, generator=generator) < 0.08
    sizes = 1 + torch.rand(n, 24, generator=generator, dtype=torch.float64)
    return (active * sizes) @ (directions / directions.norm(dim=1, keepdim=True))


def explained(sae: SAE, x: Tensor) -> tuple[float, float, float]:
    """Explained variance, the ratio of the norms, and L0."""
    with torch.no_grad():
        out = sae(x)
        variance = (x - x.mean(0)).pow(2).sum()
        ratio = out.norm(dim=1).mean() / x.norm(dim=1).mean()
        return (
            (1 - (x - out).pow(2).sum() / variance).item(),
            ratio.item(),
            (sae.encode(x) > 0).sum(1).float().mean().item(),
        )


@both_ways
def test_each_method_mends_what_the_penalty_shrank() -> None:
    """Feature suppression: with a large λ, reconstructions are too small; fine-tuning has no such pull."""
    batches, held_out = sparse_rows(50_000, 1).split(200), sparse_rows(4000, 2)
    state: dict[str, Any] = {}
    for method in LEARNS:
        tuning = {"finetuning_tokens": 20_000, "finetuning_method": method, "log_frequency": 1000, "lr": 0.02}
        trainer = make_trainer(30_000, 200, l1_coefficient=0.6, apply_b_dec_to_input=False, training=tuning)
        if not state:  # they have it in common
            for batch in batches[:150]:
                trainer.train_on(batch)
            state = copy.deepcopy(trainer.state_dict())
            shrunk = explained(trainer.sae, held_out)
            assert shrunk[1] < 0.8
        else:
            trainer.load_state_dict(state)
        for batch in batches[150:]:
            trainer.train_on(batch)
        assert trainer.finished
        mended = explained(trainer.sae, held_out)
        assert mended[0] > shrunk[0] + 0.03
        assert abs(1 - mended[1]) < abs(1 - shrunk[1]) / 2
        assert mended[2] == shrunk[2], "the features are the same"
        assert trainer.sae.scaling_factor.mean() > 1.1


# ---- the saved SAE


@pytest.mark.parametrize("method", list(LEARNS))
@both_ways
def test_the_factor_is_saved_in_the_decoder(tmp_path: Path, method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("saekit.runs.trained.sae_of", lambda trainer, *_: trainer.raw_sae())  # as it is trained
    sae = {"apply_b_dec_to_input": False}
    result = train(
        fake_run(
            tmp_path, sae=sae, training={**TUNING, "finetuning_method": method},
            activations={"normalize_activations": "expected_average_only_in"}, evals={"run": ["reconstruction"]},
        )
    )  # fmt: skip
    folder = result.folder / "sae"
    saved = load_file(folder / "sae_weights.safetensors")
    assert set(saved) == {"W_enc", "b_enc", "W_dec", "b_dec"}
    assert torch.equal(saved["W_dec"], result.sae.W_dec * result.sae.scaling_factor[:, None])
    loaded = SAE.load(folder)
    assert loaded.scaling_factor is None
    x = torch.randn(9, 8, generator=torch.Generator().manual_seed(0)) * 3
    assert torch.allclose(loaded(x), result.sae(x), rtol=1e-5, atol=1e-6)
    assert not torch.allclose(loaded(x), (result.sae.encode(x) @ result.sae.W_dec + result.sae.b_dec), rtol=1e-3)
    again = SAE.load(loaded.save(tmp_path / "again"))
    assert torch.equal(again(x), loaded(x))


@pytest.mark.slow
def test_sae_lens_6_reads_a_fine_tuned_sae(tmp_path: Path) -> None:
    python = sae_lens_python()
    if python is None:
        pytest.skip("sae-lens 6 is not installed; name a Python that has it in SAEKIT_SAE_LENS_PYTHON")
    result = train(fake_run(tmp_path, training={**TUNING, "finetuning_method": "scale"}))
    x = torch.randn(7, 8) * 3
    save_file({"x": x}, tmp_path / "x.safetensors")
    command = [python, "-c", READER, result.folder / "sae", tmp_path / "x.safetensors", tmp_path / "out.safetensors"]
    found = subprocess.run(command, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    theirs, own = load_file(tmp_path / "out.safetensors")["out"], result.sae(x)
    assert (theirs - own).abs().max() < 1e-5 * own.abs().max()


AGES = {  # the config's and the tensor's own names for the factor, of sae-lens 2, and of 3 and 4
    "2": (OLD | {"use_ghost_grads": False}, "scaling_factor"),
    "3": (
        {"hook_name": "blocks.2.hook_resid_pre", "hook_layer": 2, "hook_head_index": None, "d_in": 6, "d_sae": 10,
         "activation_fn_str": "relu", "finetuning_scaling_factor": True, "sae_lens_training_version": "3.0.0"},
        "finetuning_scaling_factor",
    ),
    "4": (
        {"architecture": "standard", "hook_name": "blocks.2.hook_resid_pre", "hook_layer": 2, "d_in": 6, "d_sae": 10,
         "activation_fn_str": "relu", "finetuning_scaling_factor": True, "normalize_activations": "none"},
        "finetuning_scaling_factor",
    ),
}  # fmt: skip


@pytest.mark.parametrize("age", list(AGES))
def test_a_loaded_factor(tmp_path: Path, age: str) -> None:
    config, name = AGES[age]
    parts, x = tensors(), torch.randn(4, 6)
    without = SAE.load(write(tmp_path / "ones", config, parts | {name: torch.ones(10)}))
    assert without.scaling_factor is None
    assert torch.allclose(without(x), reconstruct(parts, x), atol=1e-6)
    sae = SAE.load(write(tmp_path / "real", config, parts | {name: FACTOR}))
    assert torch.equal(sae.scaling_factor.detach(), FACTOR)
    expected = reconstruct(parts | {"W_dec": parts["W_dec"] * FACTOR[:, None]}, x)
    assert torch.allclose(sae(x), expected, atol=1e-5)
    assert torch.allclose(sae.decode(sae.encode(x)), expected, atol=1e-5)
    assert torch.allclose(SAE.load(sae.save(tmp_path / "saved"))(x), expected, atol=1e-5)
    with pytest.raises(SAEFormatError, match=r"scaling_factor has shape \[9\], expected \[10\]"):
        SAE.load(write(tmp_path / "short", config, parts | {name: FACTOR[:9]}))


# ---- mistakes


@pytest.mark.parametrize(
    "sae",
    [None, "standard", "saekit:standard", {"name": "standard", "d_sae": 64}, StandardConfig(d_sae=64)],
    ids=["the default", "a bare key", "a qualified key", "a table", "an object"],
)
def test_the_decoder_cannot_move_where_the_encoder_would(tmp_path: Path, sae: Any) -> None:
    config = fake_run(tmp_path, training={**TUNING, "finetuning_method": "decoder"})
    config.pop("sae")
    config |= {} if sae is None else {"sae": sae}
    words = r"training.finetuning_method: is 'decoder'.*set sae.apply_b_dec_to_input=false, or choose another"
    with pytest.raises(ConfigError, match=words):
        train(config)
    assert not list(tmp_path.iterdir())
    problems = saekit.plan(config, plugins=fakes(), dataset=DOCUMENTS).problems
    assert len(problems) == 1
    assert "training.finetuning_method: is 'decoder'" in problems[0]
    for method in ("scale", "unrotated_decoder"):
        config["training"]["finetuning_method"] = method
        assert not saekit.plan(config, plugins=fakes(), dataset=DOCUMENTS).problems


@pytest.mark.parametrize(
    ("training", "words"),
    [
        ({"finetuning_tokens": 5}, "training.finetuning_method: is missing: it says what learns in the 5 fine"),
        ({"finetuning_method": "scale"}, "training.finetuning_tokens: is 0, so finetuning_method = 'scale' would"),
        ({"finetuning_method": "rotated", "finetuning_tokens": 5}, "training.finetuning_method: .*'rotated'"),
        ({"finetuning_method": "scale", "finetuning_tokens": -5}, "training.finetuning_tokens: must be 0 or more"),
    ],
    ids=str,
)
def test_options_of_fine_tuning(training: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        saekit.load_config({"training": training})


def test_a_method_that_trains_nothing_is_told_before_the_main_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = SAE.parameters_of

    def without_scale(cls: Any, config: Any) -> Any:
        others = [{*entry.groups} - {"scale"} for entry in known(config)]
        return tuple(attrs.evolve(e, groups=tuple(kept)) for e, kept in zip(known(config), others, strict=True))

    monkeypatch.setattr(SAE, "parameters_of", classmethod(without_scale), raising=False)
    config = fake_run(tmp_path, training={**TUNING, "finetuning_method": "scale"})
    words = (
        "finetuning_method: is 'scale', which trains no parameter of a StandardSAE; choose 'decoder' or 'unrotated_dec"
    )
    with pytest.raises(ConfigError, match=words):
        train(config)
    assert not list(tmp_path.rglob("metrics.jsonl"))


def test_warm_up_and_decay_may_take_all_of_both_phases() -> None:
    training = {"training_tokens": 10, "finetuning_tokens": 5, "finetuning_method": "scale", "lr_decay_steps": 2}
    training |= {"train_batch_size_tokens": 2, "lr_warm_up_steps": 6}
    assert saekit.load_config({"training": training}).training.steps == 8
    with pytest.raises(ConfigError, match=r"warm-up \(7\) and decay \(2\) take more than the 8 steps"):
        saekit.load_config({"training": training | {"lr_warm_up_steps": 7}})


def test_the_plan_tells_of_fine_tuning(tmp_path: Path) -> None:
    config = fake_run(tmp_path, training={**TUNING, "finetuning_method": "scale"})
    found = saekit.plan(config, plugins=fakes(), dataset=DOCUMENTS)
    assert found.facts["training"] == "7 steps of 256 tokens, 1,700 in all, the last 700 for fine-tuning"
    assert (found.numbers["steps"], found.numbers["training_tokens"]) == (7, 1700)
    assert found.problems == []
    del config["training"]["finetuning_method"], config["training"]["finetuning_tokens"]
    assert "fine-tuning" not in saekit.plan(config, plugins=fakes(), dataset=DOCUMENTS).facts["training"]


# ---- in float64, to the last bit


@both_ways
def test_the_trainers_parts_alone() -> None:
    """In float64, to the last bit: what is frozen has the bits that training left, with momentum and ghosts."""
    for method, normalize in itertools.product(LEARNS, (True, False)):
        tuning = {"finetuning_tokens": 430, "finetuning_method": method}
        options = {
            "asleep": 5, "use_ghost_grads": True, "normalize_sae_decoder": normalize, "apply_b_dec_to_input": False,
            "optimizer": {"beta1": 0.9},
        }  # fmt: skip
        tuned = make_trainer(570, training=tuning, **options)
        plain = make_trainer(600, **options)
        x = rows(1000)
        fit(plain, x[:600])
        metrics = fit(tuned, x)
        assert metrics[-1]["losses/ghost_grad_loss"] > 0
        for name, value in weights(plain).items():
            assert torch.equal(weights(tuned)[name], value) == (name not in LEARNS[method]), (method, name)
