"""SAEs on hidden activations of toy models, by the ordinary trainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from saekit_plugins.sources.toy import ToySourceConfig
from support.runs import stopped

import saekit
from saekit import ConfigError
from saekit.toy import ToyConfig, ToyModel, measure_recovery, train_toy_model

PLAIN = {"plugins": None, "dataset": None}


def run_of(
    folder: Path, source: dict[str, Any], sae: dict[str, Any], steps: int = 12, **training: Any
) -> dict[str, Any]:
    return {
        "model": {"backend": "none"},
        "activations": {"source": {"name": "toy", **source}},
        "site": {"hook_name": "hidden"},
        "sae": sae,
        "evals": {"run": [], "held_out_every": 0},
        "training": {
            "training_tokens": steps * 512, "train_batch_size_tokens": 512, "lr": 1e-2, "device": "cpu",
            "verbose": False, **training,
        },
        "checkpoints": {"folder": str(folder), "name": "run"},
        "reports": {"pictures": False},
    }  # fmt: skip


def test_an_sae_finds_five_features_in_two_dimensions(tmp_path: Path) -> None:
    toy = train_toy_model(ToyConfig(feature_probability=0.02, steps=500, batch_size=512, lr=0.03, lr_decay_steps=250))
    path = toy.model.save(tmp_path / "toy.safetensors")
    sae = {"name": "standard", "d_sae": 5, "l1_coefficient": 10.0}
    config = run_of(tmp_path, {"path": str(path)}, sae)
    config["training"] |= {
        "training_tokens": 400 * 1024,
        "train_batch_size_tokens": 1024,
        "lr_decay_steps": 200,
        "seed": 0,
    }
    config["activations"]["normalize_activations"] = "expected_average_only_in"
    trained = measure_recovery(saekit.train(config).sae, toy.model)
    assert trained.mmcs >= 0.95
    assert trained.mmcs_of_found >= 0.95
    config["training"] |= {"training_tokens": 1024, "lr_decay_steps": 0}
    config["checkpoints"]["name"] = "new"
    assert measure_recovery(saekit.train(config).sae, toy.model).mmcs < 0.92, "not by chance"


LEARNED = {"n_features": 6, "n_hidden": 3, "steps": 5, "batch_size": 32, "n_correlated_pairs": 1}


@pytest.mark.parametrize("source", [LEARNED, LEARNED | {"dtype": "float64"}], ids=["float32", "float64"])
def test_a_run_that_was_stopped_goes_on_bit_for_bit(tmp_path: Path, source: dict[str, Any]) -> None:
    sae = {"name": "topk", "d_sae": 8, "k": 2, "dtype": source.get("dtype", "float32")}
    whole = saekit.train(run_of(tmp_path / "whole", source, sae))
    stopped(run_of(tmp_path / "stopped", source, sae), 5, **PLAIN)
    gone_on = saekit.resume(tmp_path / "stopped" / "run")
    assert all(torch.equal(value, gone_on.sae.state_dict()[name]) for name, value in whole.sae.state_dict().items())


def test_a_run_goes_on_with_the_weights_that_it_began_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where training the toy model anew gives other digits, as on another machine."""
    sae = {"name": "topk", "d_sae": 8, "k": 2}
    whole = saekit.train(run_of(tmp_path / "whole", LEARNED, sae))
    stopped(run_of(tmp_path / "stopped", LEARNED, sae), 5, **PLAIN)
    start = ToyModel.__init__

    def elsewhere(model: ToyModel, *args: Any) -> None:
        start(model, *args)
        model.W.data *= 1.001

    monkeypatch.setattr(ToyModel, "__init__", elsewhere)
    gone_on = saekit.resume(tmp_path / "stopped" / "run")
    assert torch.equal(whole.sae.W_dec, gone_on.sae.W_dec)


def test_batches_are_hidden_activations_of_the_saved_model(tmp_path: Path) -> None:
    """All rows lie in the cone of two directions, at angles that only these have."""
    model = ToyModel.random(ToyConfig(n_features=2, feature_probability=0.5))
    assert model.directions.norm(dim=1).tolist() == pytest.approx([1, 1])
    path = model.save(tmp_path / "toy.safetensors")
    seen = {}

    class Stream:
        sites, batch_size, seed, process, processes = (saekit.Site(hook_name="hidden"),), 100, 5, 0, 1

    source = saekit.default_manager().build("activation_sources", ToySourceConfig(path=str(path)), stream=Stream())
    seen = next(source).activations[Stream.sites[0]]
    features = torch.linalg.solve(model.directions.T, seen.T).T
    assert features.min() > -1e-5
    assert features.max() < 1 + 1e-5
    drawn = model.draw(100, torch.Generator().manual_seed(5))
    assert torch.allclose(features, drawn, atol=1e-4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"path": "toy.safetensors", "n_features": 7}, "n_features: is an option of a toy model that is made here, and "
         "activations.source.path names one, toy.safetensors; leave one of the two out"),
        ({"directions": "random", "steps": 5}, "steps: is about training, and directions = 'random' trains none"),
    ],
)  # fmt: skip
def test_options_that_would_do_nothing_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ToySourceConfig(**options)


def test_runs_that_cannot_be_are_refused(tmp_path: Path) -> None:
    sae = {"name": "topk", "d_sae": 8, "k": 2}
    config = run_of(tmp_path, LEARNED, sae)
    with pytest.raises(ConfigError, match="model.backend: is 'saekit:HookedTransformer', and activations.source is"):
        saekit.train({**config, "model": {}})
    two = {name: section for name, section in config.items() if name != "site"}
    two |= {"sae": {"name": "crosscoder", "d_sae": 8}, "inputs": [{"hook_name": "hidden"}, {"hook_name": "other"}]}
    with pytest.raises(ConfigError, match="has one hidden layer and no heads.*hidden, other are wanted"):
        saekit.train(two)
    with pytest.raises(saekit.SaekitError, match="there is no toy model"):
        saekit.train(run_of(tmp_path, {"path": "nowhere.safetensors"}, sae))
    with pytest.raises(ConfigError, match="activations.source.n_correlated_pairs: .*are 8 features, and there are 6"):
        saekit.train(run_of(tmp_path, LEARNED | {"n_correlated_pairs": 4}, sae))
    assert not [*tmp_path.iterdir()], "nothing was left behind"
