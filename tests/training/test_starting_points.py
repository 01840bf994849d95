"""Training may start from a saved SAE."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from saekit_plugins.architectures.standard import StandardConfig
from saekit_plugins.architectures.topk import TopKConfig
from support.foreign import OLD, write
from support.training import DOCUMENTS, FACTOR, TUNING, Step, fake_run, fakes, train
from torch import Tensor

import saekit
from saekit import SAE
from saekit.errors import ConfigError, SAEFormatError
from saekit.sae.build import build_module, initialize

both_ways = pytest.mark.usefixtures("way")  # the others take no step, or are not about it
THEIRS = OLD | {"d_in": 8, "hook_point": "blocks.0.hook_resid_post"}
"""Another library's SAE for the site of :func:`fake_run`."""


def saved_sae(
    folder: Path, seed: int = 1, d_sae: int = 40, d_in: int = 8, kind: Any = StandardConfig, **options: Any
) -> SAE:
    """An SAE with rows of norm 1 (unless ``options`` say otherwise), written to ``folder``."""
    plugins = saekit.default_manager()
    config = kind(**{"d_sae": d_sae, **options})
    sae = build_module(plugins.find("sae_architectures", config), config, d_in, plugins)
    generator = torch.Generator().manual_seed(seed)
    initialize(sae, generator, torch.randn(50, d_in, generator=torch.Generator().manual_seed(seed)))
    sae.b_enc.data = torch.randn(d_sae, generator=generator).to(sae.b_enc) * 0.1
    sae.b_dec.data = torch.randn(d_in, generator=generator).to(sae.b_dec)
    sae.save(folder)
    return sae


def start_run(tmp_path: Path, start: Path, **sections: dict[str, Any]) -> dict[str, Any]:
    """A run of the options that the file does not decide."""
    config = fake_run(tmp_path / "runs", training={"from_pretrained_path": str(start)})
    config["sae"] = {"name": "standard", "l1_coefficient": 1.0}
    for name, section in sections.items():
        config[name] = config.get(name, {}) | section
    return config


def first_step_is(step: Step, start: SAE, scale: float) -> None:
    """Before it, the SAE in training does on scaled activations what the saved one does on raw ones."""
    raw = step.x.double() / scale
    own = type(step.sae).forward(_with(step.sae, step.before), step.x)
    expected = start(raw.float())
    assert torch.allclose(own / scale, expected, rtol=1e-4, atol=1e-5)
    mse = (raw - start(raw.float()).double()).pow(2).sum(1).mean().item() * scale**2
    assert step.metrics["losses/mse_loss"] == pytest.approx(mse, rel=1e-4)


def _with(sae: SAE, values: dict[str, Tensor]) -> SAE:
    other = copy.deepcopy(sae)
    with torch.no_grad():
        for name, parameter in other.named_parameters():
            parameter.copy_(values[name])
    return other


@pytest.mark.parametrize("normalize", [True, False])
@both_ways
def test_training_goes_on_from_a_saved_sae(tmp_path: Path, steps: list[Step], normalize: bool) -> None:
    start = saved_sae(tmp_path / "start", normalize_sae_decoder=normalize)
    result = train(
        start_run(tmp_path, tmp_path / "start", sae={"normalize_sae_decoder": normalize}, training={"lr": 0.01})
    )
    assert result.sae.d_sae == 40, "as in the file"
    first_step_is(steps[0], start, 1.0)
    for name, value in start.named_parameters():
        assert torch.allclose(steps[0].before[name], value, atol=1e-6), name
    losses = [step.metrics["losses/overall_loss"] for step in steps]
    assert losses[-1] < 0.9 * losses[0]
    with torch.no_grad():
        l1 = start.encode(steps[0].x).sum(1).mean().item()
    assert losses[0] == pytest.approx(steps[0].metrics["losses/mse_loss"] + l1, rel=1e-5)
    fresh = train(fake_run(tmp_path / "runs", sae={"d_sae": 40}))
    assert steps[-8].metrics["losses/overall_loss"] != pytest.approx(losses[0], rel=1e-3)
    assert fresh.sae.d_sae == 40


@both_ways
def test_from_a_run_a_checkpoint_and_another_librarys_folder(tmp_path: Path, steps: list[Step]) -> None:
    first = train(fake_run(tmp_path / "runs", training={"training_tokens": 600}, checkpoints={"n_checkpoints": 1}))
    (checkpoint, *_) = sorted(first.folder.glob("checkpoints/*"))
    parts = {
        name: value.detach().contiguous() for name, value in saved_sae(tmp_path / "x", d_sae=64).named_parameters()
    }
    theirs = write(tmp_path / "theirs", THEIRS | {"d_sae": 64}, parts)
    for place in (first.folder, first.folder / "sae", checkpoint, theirs):
        steps.clear()
        train(start_run(tmp_path, place))
        first_step_is(steps[0], SAE.load(place), 1.0)


@pytest.mark.parametrize("normalize", [True, False])
@both_ways
def test_from_an_sae_of_scaled_activations(tmp_path: Path, steps: list[Step], normalize: bool) -> None:
    """The factor that was folded into it is taken out again, whatever this run's own data would say."""
    sections: dict[str, Any] = {
        "activations": {"normalize_activations": "expected_average_only_in"},
        "sae": {"normalize_sae_decoder": normalize},
    }
    first = train(fake_run(tmp_path / "runs", **sections))
    last, folder = steps[-1].after, first.folder / "sae"
    scale = first.sae.info.metadata["activation_scale"]
    assert scale != pytest.approx(1, rel=0.01)
    others = [{"tokens": [token % 9 + 1 for token in document["tokens"]]} for document in DOCUMENTS]
    for documents in (DOCUMENTS, others):
        steps.clear()
        second = saekit.train(start_run(tmp_path, folder, **sections), plugins=fakes(), dataset=documents)
        assert second.sae.info.metadata["activation_scale"] == scale
        for name, value in last.items():
            assert torch.allclose(steps[0].before[name], value, rtol=1e-5, atol=1e-6), name
        first_step_is(steps[0], SAE.load(folder), scale)
    steps.clear()
    if normalize:  # rows of norm 1 / scale cannot be kept at 1 on raw activations
        with pytest.raises(ConfigError, match=rf"sae.normalize_sae_decoder: .*norms from {1 / scale:.3g}"):
            train(start_run(tmp_path, folder))
        train(start_run(tmp_path, folder, sae={"normalize_sae_decoder": False}))
    else:
        train(start_run(tmp_path, folder, sae={"normalize_sae_decoder": False}))
    first_step_is(steps[0], SAE.load(folder), 1.0)


@both_ways
def test_an_sae_of_raw_activations_on_scaled_ones(tmp_path: Path, steps: list[Step]) -> None:
    start = saved_sae(tmp_path / "start")
    sections: dict[str, Any] = {"activations": {"normalize_activations": "expected_average_only_in"}}
    with pytest.raises(ConfigError, match="sae.normalize_sae_decoder: .* for activations scaled by .*set it to false"):
        train(start_run(tmp_path, tmp_path / "start", **sections))
    assert not (tmp_path / "runs").exists()
    result = train(start_run(tmp_path, tmp_path / "start", sae={"normalize_sae_decoder": False}, **sections))
    scale = result.sae.info.metadata["activation_scale"]
    assert scale != pytest.approx(1, rel=0.01)
    first_step_is(steps[0], start, scale)


@pytest.mark.parametrize("method", [None, "scale"])
@both_ways
def test_a_factor_in_the_start(tmp_path: Path, steps: list[Step], method: str | None) -> None:
    """Without fine-tuning it becomes a part of the decoder; with it, it waits and learns on."""
    parts = {
        name: value.detach().contiguous() for name, value in saved_sae(tmp_path / "x", d_sae=10).named_parameters()
    }
    folder = write(tmp_path / "start", THEIRS, parts | {"scaling_factor": FACTOR})
    start = SAE.load(folder)
    tuning = {} if method is None else {**TUNING, "finetuning_method": method}
    config = start_run(tmp_path, folder, training=tuning)
    if method is None:
        with pytest.raises(
            ConfigError, match=r"sae.normalize_sae_decoder: .*have norms from 0.5 to 2; set it to false"
        ):
            train(config)
        config["sae"]["normalize_sae_decoder"] = False
    result = train(config)
    first_step_is(steps[0], start, 1.0)
    if method is None:
        assert "scaling_factor" not in steps[0].before
        assert torch.allclose(steps[0].before["W_dec"], parts["W_dec"] * FACTOR[:, None])
        assert result.sae.scaling_factor is None
        return
    for step in steps[:4]:
        assert torch.equal(step.after["scaling_factor"], FACTOR)
    assert torch.allclose(steps[0].before["W_dec"], parts["W_dec"], atol=1e-6)
    assert not torch.equal(steps[4].after["scaling_factor"], FACTOR)
    assert torch.allclose(SAE.load(result.folder)(steps[0].x), result.sae(steps[0].x), rtol=1e-5, atol=1e-5)


@both_ways
def test_a_start_without_a_factor_is_fine_tuned_from_one(tmp_path: Path, steps: list[Step]) -> None:
    start = saved_sae(tmp_path / "start")
    train(start_run(tmp_path, tmp_path / "start", training={**TUNING, "finetuning_method": "scale"}))
    first_step_is(steps[0], start, 1.0)
    assert torch.equal(steps[3].after["scaling_factor"], torch.ones(40))
    assert not torch.equal(steps[4].after["scaling_factor"], torch.ones(40))


def test_every_contradiction_is_named(tmp_path: Path) -> None:
    saved_sae(tmp_path / "start", normalize_sae_decoder=False)
    config = start_run(
        tmp_path, tmp_path / "start",
        sae={
            "activation": "tanh-relu", "apply_b_dec_to_input": False, "d_sae": 41, "d_in": 9,
            "decoder_orthogonal_init": True, "init_encoder_as_decoder_transpose": False, "b_dec_init_method": "mean",
        },
    )  # fmt: skip
    with pytest.raises(ConfigError) as caught:
        train(config)
    message = str(caught.value)
    where = f"the SAE in {tmp_path / 'start'} (training.from_pretrained_path)"
    for words in (
        "sae.decoder_orthogonal_init: chooses a start, but training starts from",
        "sae.init_encoder_as_decoder_transpose: chooses a start",
        "sae.b_dec_init_method: chooses a start",
        f"sae.activation: is 'saekit:tanh-relu', but {where} has 'saekit:relu'",
        f"sae.apply_b_dec_to_input: is False, but {where} has True",
        "sae.d_sae: is 41, but",
        "sae.d_in: is 9, but",
        "sae.normalize_sae_decoder: keeps decoder rows at norm 1, and those of",
    ):
        assert words in message
    assert len(message.strip().splitlines()) == 9, "and nothing else is"
    assert any("sae.d_sae: is 41" in problem for problem in problems_of(config))
    heuristic = start_run(
        tmp_path, tmp_path / "start", sae={"decoder_heuristic_init": True, "normalize_sae_decoder": False}
    )
    with pytest.raises(ConfigError, match="sae.decoder_heuristic_init: chooses a start"):
        train(heuristic)
    assert not (tmp_path / "runs").exists()


def test_what_other_options_ask_for_is_no_choice_of_a_start(tmp_path: Path) -> None:
    """Rows of norm 1 cannot start from norms of 0.1, as they would by the default of topk."""
    saved_sae(tmp_path / "start", kind=TopKConfig, k=4, normalize_sae_decoder=True, decoder_heuristic_init=False)
    config = start_run(tmp_path, tmp_path / "start")
    config["sae"] = {"name": "topk", "k": 4, "normalize_sae_decoder": True, "decoder_heuristic_init": False}
    assert train(config).sae.d_sae == 40
    config["sae"] |= {"normalize_sae_decoder": False, "b_dec_init_method": "zeros"}
    with pytest.raises(ConfigError) as caught:
        train(config)
    assert [path for path, _ in caught.value.problems] == ["sae.decoder_heuristic_init", "sae.b_dec_init_method"]


def problems_of(config: dict[str, Any]) -> list[str]:
    return saekit.plan(config, plugins=fakes(), dataset=DOCUMENTS).problems


def test_starts_that_are_not_there_or_do_not_fit(tmp_path: Path) -> None:
    missing = start_run(tmp_path, tmp_path / "nowhere")
    saved_sae(tmp_path / "wide", d_in=9)
    wide = start_run(tmp_path, tmp_path / "wide")
    (tmp_path / "empty").mkdir()
    empty = start_run(tmp_path, tmp_path / "empty")
    for config, error, words in (
        (missing, SAEFormatError, r"the SAE folder .*nowhere is not there"),
        (empty, SAEFormatError, "no loader recognizes .*empty, which has no files"),
        (
            wide, ConfigError,
            "training.from_pretrained_path: holds an SAE for vectors of 9, but blocks.0.hook_resid_post of 'fake' has "
            "width 8",
        ),
    ):  # fmt: skip
        with pytest.raises(error, match=words):
            train(config)
        assert not (tmp_path / "runs").exists()
        assert problems_of(config)


def test_d_sae_may_be_said_again(tmp_path: Path) -> None:
    saved_sae(tmp_path / "start", d_sae=40)
    for sae in ({"d_sae": 40}, {"expansion_factor": 5}, {"d_in": 8}):
        assert train(start_run(tmp_path, tmp_path / "start", sae=sae)).sae.d_sae == 40
    with pytest.raises(ConfigError, match="sae.d_sae: is 48, but .* has 40"):
        train(start_run(tmp_path, tmp_path / "start", sae={"expansion_factor": 6}))
    key = start_run(tmp_path, tmp_path / "start") | {"sae": "standard"}
    assert train(key).sae.d_sae == 40
    options = json.loads((train(key).folder / "sae/cfg.json").read_text())["saekit"]["options"]
    assert options["d_sae"] == 40


@both_ways
def test_many_starts_in_one_sweep(tmp_path: Path, steps: list[Step]) -> None:
    """Each SAE of a sweep has its own start."""
    starts = [saved_sae(tmp_path / str(seed), seed) for seed in (1, 2)]
    found = saekit.train(
        [start_run(tmp_path, tmp_path / str(seed)) for seed in (1, 2)], plugins=fakes(), dataset=DOCUMENTS
    )
    assert len(found.results) == 2
    for step, start in zip(steps[:2], starts, strict=True):
        first_step_is(step, start, 1.0)
