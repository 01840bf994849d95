"""The training step's options: where random numbers come from, and that each option reaches the run."""

from __future__ import annotations

import itertools
import json
import random
from pathlib import Path
from typing import Any

import attrs
import numpy as np
import pytest
import rich.console  # noqa: F401 - which draws numbers when it is imported, as the first run of a process does
import torch
from saekit_plugins.architectures.standard import StandardConfig
from saekit_plugins.architectures.standard.module import StandardSAE
from support.training import DOCUMENTS, fake_run, fakes, hashes, train
from torch import Tensor, nn

import saekit
from saekit import SAE
from saekit.errors import PluginFailedError
from saekit.testing import FakeBackend, fake_plugin, isolated_manager

pytestmark = pytest.mark.usefixtures("way")


def drawing(kind: str, name: str, drawn: list[tuple[float, float, float]], **entry: Any) -> object:
    """A plugin that draws from the process's generators: when it is built, and whenever it is used."""

    def draw() -> None:
        drawn.append((random.random(), float(np.random.rand()), torch.rand(()).item()))

    def build(config: object, **services: Any) -> Any:
        draw()
        if kind == "activation_functions":
            return lambda pre: (draw(), pre.relu())[1]
        if kind == "evals":
            return lambda sae, **services: (draw(), {"drawn": drawn[-1][0]})[1]
        return lambda step: (draw(), 1e-3)[1]

    return fake_plugin(kind, name, build=build, **entry)


def states() -> tuple[Any, Any, Any]:
    return random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()


def test_plugins_that_draw_from_the_processs_generators(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of Python's, NumPy's and torch's is seeded, for as long as a run lasts."""
    monkeypatch.setattr("saekit.sae.folder.probe_of", lambda *_: None)  # after which the same is drawn once more

    def run(seed: int) -> tuple[list[tuple[float, float, float]], dict[str, str]]:
        drawn: list[tuple[float, float, float]] = []
        config = fake_run(
            tmp_path,
            sae={"activation": "drawing"},
            evals={"run": ["drawing-eval"], "every_n_steps": 3},
            training={"seed": seed},
        )
        random.seed(len(drawn_before)), np.random.seed(len(drawn_before)), torch.manual_seed(len(drawn_before))
        before = states()
        result = train(
            config,
            drawing("activation_functions", "drawing", drawn),
            drawing("evals", "drawing-eval", drawn),
        )
        assert states() == before, "the caller's are given back"
        drawn_before.append(seed)
        return drawn, hashes(result.folder)

    drawn_before: list[int] = []
    one, again, other = run(1), run(1), run(2)
    assert len(one[0]) > 12
    assert one == again
    for generator in range(3):
        draws = [[found[generator] for found in drawn] for drawn, _ in (one, other)]
        assert not set(draws[0]) & set(draws[1])
        assert len(set(draws[0])) == len(draws[0])


def test_the_callers_generators_come_back_after_an_error(tmp_path: Path) -> None:
    def build(config: object, *, run: object) -> Any:
        return lambda sae, **services: exec("import random; random.random(); raise RuntimeError('an eval broke')")

    before = states()
    with pytest.raises(PluginFailedError, match="an eval broke"):
        train(fake_run(tmp_path, evals={"run": ["bad"]}), fake_plugin("evals", "bad", build=build))
    assert states() == before


def test_an_architecture_that_draws_its_own_tensors(tmp_path: Path) -> None:
    """When it is built, as torch's layers do: the same from one seed, alone or beside another."""

    @attrs.frozen(kw_only=True)
    class MixedConfig(StandardConfig):
        pass

    def build(config: Any, *, ports: Any, activation: Any) -> SAE:
        plain = StandardSAE(config, ports=ports, activation=activation)
        plain.mixing = nn.Parameter(nn.Linear(ports.d_in, ports.d_in).weight.detach())
        return plain

    mixed = fake_plugin("sae_architectures", "mixed", build=build, config=MixedConfig)

    def config(seed: int, l1: float) -> dict[str, Any]:
        return fake_run(tmp_path, training={"seed": seed}) | {
            "sae": {"name": "mixed", "d_sae": 64, "l1_coefficient": l1}
        }

    found = []
    for caller, seed in enumerate((1, 1, 2)):
        torch.manual_seed(caller)
        found.append(train(config(seed, 1.0), mixed).sae)
    assert torch.equal(found[0].mixing, found[1].mixing)
    assert not torch.equal(found[0].mixing, found[2].mixing)
    together = saekit.train([config(1, 3.0), config(1, 1.0)], plugins=fakes(mixed), dataset=DOCUMENTS)
    _, second = together.results.values()
    assert torch.equal(second.sae.mixing, found[0].mixing)
    assert torch.equal(second.sae.W_enc, found[0].W_enc)


def test_a_backend_that_draws_its_weights(tmp_path: Path) -> None:
    def build(config: object, **services: Any) -> FakeBackend:
        backend = FakeBackend()
        backend._weights = torch.randn(backend.d_vocab, backend.d_model)
        return backend

    def run(seed: int) -> Tensor:
        torch.manual_seed(random.randrange(10**6))
        plugins = isolated_manager(fake_plugin("model_backends", build=build), builtins=True)
        config = fake_run(tmp_path, training={"seed": seed})
        return saekit.train(config, plugins=plugins, dataset=DOCUMENTS).sae.W_enc

    one, again, other = run(1), run(1), run(2)
    assert torch.equal(one, again)
    assert not torch.equal(one, other)


def test_options_reach_the_run(tmp_path: Path) -> None:
    """Every option of the standard SAE's loss changes what is learned, so none is lost on the way."""
    plain = {"normalize_sae_decoder": False}
    changes: dict[str, dict[str, Any]] = {
        "plain": {},
        "noise": {"noise_scale": 0.5},
        "norm": {"lp_norm": 0.5},
        "dense_batch": {"mse_loss_normalization": "dense_batch"},
        "weighted": {"scale_sparsity_penalty_by_decoder_norm": True},
        "ghosts": {"use_ghost_grads": True},
        "warm-up": {"l1_warm_up_steps": 5},
        "input": {"apply_b_dec_to_input": False},
        "tanh": {"activation": "tanh-relu"},
        "unit": {"normalize_sae_decoder": True},
        "orthogonal": {"decoder_orthogonal_init": True},
        "heuristic": {"decoder_heuristic_init": True},
        "untied start": {"init_encoder_as_decoder_transpose": False},
        "mean": {"b_dec_init_method": "mean"},
        "median": {"b_dec_init_method": "geometric_median"},
        "float64": {"dtype": "float64"},
    }
    # On batches so small that many a feature does not fire.
    training = {"training_tokens": 60, "train_batch_size_tokens": 3, "dead_feature_window": 1}
    found = {}
    for name, change in changes.items():
        result = train(fake_run(tmp_path, sae=plain | change, training=training))
        found[name] = hashes(result.folder)["sae_weights.safetensors"]
        options = json.loads((result.folder / "sae/cfg.json").read_text())["saekit"]["options"]
        for option, value in change.items():
            assert options[option] == (f"saekit:{value}" if option == "activation" else value)
    assert not [(a, b) for a, b in itertools.combinations(found, 2) if found[a] == found[b]]
