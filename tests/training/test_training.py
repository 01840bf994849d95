"""Whole runs, on real models and real text, small."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

import datasets
import pytest
import torch
from support.tiny import hooked_transformer, run_config
from support.training import hashes, lines

import saekit
from saekit.errors import (
    ConfigError,
    DataError,
    DivergedError,
    PluginFailedError,
    SAEFormatError,
    TrainingInterrupted,
)
from saekit.runs.trackers import Trackers
from saekit.testing import FakeBackend, fake_plugin, isolated_manager
from saekit.training.firing import FiringStatistics

both_ways = pytest.mark.usefixtures("way")  # the others are not about steps


@both_ways
def test_a_run_leaves_everything_behind(tmp_path: Path) -> None:
    result = saekit.train(run_config(tmp_path, checkpoints={"name": "first"}))
    assert result.folder == tmp_path / "first"
    files = {"config.toml", "metrics.jsonl", "run.json", "sae", "checkpoints"}
    assert {p.name for p in result.folder.iterdir()} == files
    assert {p.name for p in (result.folder / "sae").iterdir()} == {
        "cfg.json", "sae_weights.safetensors", "sparsity.safetensors", "probe.safetensors"
    }  # fmt: skip
    steps = [line for line in lines(result.folder) if "losses/mse_loss" in line]
    assert [line["step"] for line in steps] == list(range(1, 9))
    # 2000 tokens in batches of 256: the last batch is what is left over.
    assert steps[-1]["details/n_training_tokens"] == 2000
    assert steps[-1]["losses/mse_loss"] < steps[0]["losses/mse_loss"]
    names = {
        "losses/mse_loss", "losses/l1_loss", "losses/overall_loss", "metrics/explained_variance",
        "metrics/explained_variance_std", "metrics/l0", "sparsity/mean_passes_since_fired", "sparsity/dead_features",
        "details/current_learning_rate", "details/current_l1_coefficient", "details/n_training_tokens",
    }  # fmt: skip
    assert names <= set(steps[0])
    evals = {"evals/ce_recovered", "evals/explained_variance", "evals/l0", "evals/ce_loss_without_sae"}
    evals |= {"evals/never_fired"}
    assert {name for name in result.metrics if "dead" in name} == {"sparsity/dead_features"}, "one number is called so"
    assert evals <= set(lines(result.folder)[-1])
    assert evals <= set(result.metrics)
    assert 0 < result.metrics["evals/ce_loss_without_sae"] < result.metrics["evals/ce_loss_with_ablation"]
    assert saekit.load_config(result.folder / "config.toml") == saekit.load_config(
        run_config(tmp_path, checkpoints={"name": "first"})
    )
    with pytest.raises(ConfigError, match="first exists already"):
        saekit.train(run_config(tmp_path, checkpoints={"name": "first"}))


@both_ways
def test_one_seed_one_result(tmp_path: Path) -> None:
    def run(seed: int, **sae: object) -> dict[str, str]:
        torch.manual_seed(int(time.time()))  # what others draw must not matter
        options = {"noise_scale": 0.1, "b_dec_init_method": "geometric_median"}
        return hashes(saekit.train(run_config(tmp_path, training={"seed": seed}, sae=options)).folder)

    one, again, other = run(1), run(1), run(2)
    assert one == again
    assert one["sae_weights.safetensors"] != other["sae_weights.safetensors"]


@both_ways
def test_evals_during_training_change_nothing(tmp_path: Path) -> None:
    plain = saekit.train(run_config(tmp_path))
    watched = saekit.train(run_config(tmp_path, evals={"every_n_steps": 2}))
    assert hashes(plain.folder) == hashes(watched.folder)
    assert [line["step"] for line in lines(watched.folder) if "evals/l0" in line] == [2, 4, 6, 8]


@both_ways
def test_models_and_datasets_in_memory(tmp_path: Path) -> None:
    documents = [{"text": f"def f{n}(x):\n    return x + {n}\n" * 20} for n in range(40)]
    config = run_config(tmp_path, site={"hook_name": "blocks.0.attn.hook_z"}, evals={"split": None})
    for dataset in (documents, datasets.Dataset.from_list(documents)):
        result = saekit.train(config, model=hooked_transformer(), dataset=dataset)
        assert result.sae.d_in == 16, "two heads of eight, flattened"
        assert result.sae.info.site == saekit.Site(hook_name="blocks.0.attn.hook_z")
        assert result.sae.info.metadata["dataset_path"] is None
        assert result.sae.info.metadata["model_class_name"] == "HookedTransformer"
        assert result.sae.info.metadata["model_fingerprint"] == result.backend.fingerprint()
    config["site"]["hook_head_index"] = 1
    assert saekit.train(config, model=hooked_transformer(), dataset=documents).sae.d_in == 8
    tokenized = [{"tokens": list(range(1, 200))} for _ in range(40)]
    assert saekit.train(config, model=hooked_transformer(), dataset=tokenized).sae.d_in == 8


def test_data_that_ends(tmp_path: Path) -> None:
    few = [{"text": "abc " * 100} for _ in range(5)]
    config = run_config(tmp_path, evals={"run": []}, dataset={"on_exhausted": "stop"})
    with pytest.raises(DataError, match="evals.split is 'heldout', but the dataset passed in memory has no splits"):
        saekit.train(run_config(tmp_path), dataset=few)
    result = saekit.train(config, dataset=few)
    assert 0 < result.metrics["details/n_training_tokens"] < 2000
    config["dataset"]["on_exhausted"] = "error"
    enough = config | {"training": config["training"] | {"training_tokens": 512}}
    assert saekit.train(enough, dataset=few).metrics["details/n_training_tokens"] == 512
    with pytest.raises(DataError, match=r"the data ended after [\d,]+ activations, and 2,000 were asked for"):
        saekit.train(config, dataset=few)
    with pytest.raises(DataError, match="held-out text does not fill one context"):
        saekit.train(run_config(tmp_path, evals={"split": None}), dataset=few)


def test_held_out_documents_are_not_trained_on(tmp_path: Path) -> None:
    model = hooked_transformer()
    seen: list[torch.Tensor] = []
    model.hook_embed.add_hook(lambda tensor, hook: None)
    original = model.run_with_hooks
    model.run_with_hooks = lambda first, **options: seen.append(first) or original(first, **options)
    # Documents of one token each: 999 in every twentieth document, 5 elsewhere.
    documents = [{"tokens": [999 if n % 20 == 19 else 5] * 40} for n in range(400)]
    config = run_config(tmp_path, evals={"split": None}, dataset={"on_exhausted": "repeat"})
    result = saekit.train(config, model=model, dataset=documents)
    assert set(result.held_out.unique().tolist()) == {0, 999}
    training = [tokens for tokens in seen if tokens.shape == (8, 32)]
    assert training
    assert all(set(tokens.unique().tolist()) == {0, 5} for tokens in training)


@both_ways
def test_normalized_training_does_not_see_the_size_of_activations(tmp_path: Path) -> None:
    """The same model with activations 50 times as large: the same features, and raw activations to use them on."""

    def run(size: float) -> saekit.TrainResult:
        backend = FakeBackend()
        backend._weights = backend._embedding() * size
        plugins = isolated_manager(
            fake_plugin("model_backends", build=lambda config, **services: backend), builtins=True
        )
        config = run_config(
            tmp_path, model={"backend": "test:fake"}, site={"hook_name": "blocks.0.hook_resid_post"},
            activations={"normalize_activations": "expected_average_only_in"},
            sae={"b_dec_init_method": "mean"}, training={"training_tokens": 8000, "lr": 0.01},
        )  # fmt: skip
        return saekit.train(config, plugins=plugins)

    one, fifty = run(1.0), run(50.0)
    ratio = one.sae.info.metadata["activation_scale"] / fifty.sae.info.metadata["activation_scale"]
    assert ratio == pytest.approx(50, rel=1e-5)
    for key in ("evals/explained_variance", "evals/l0", "losses/mse_loss"):
        assert fifty.metrics[key] == pytest.approx(one.metrics[key], rel=1e-3)
    assert one.metrics["evals/explained_variance"] > 0.5
    loaded = saekit.SAE.load(fifty.folder / "sae")
    assert fifty.metrics["evals/l2_ratio"] == pytest.approx(one.metrics["evals/l2_ratio"], rel=1e-3)
    assert torch.equal(loaded.W_dec, fifty.sae.W_dec)


@both_ways
def test_a_strangers_backend_trains_an_sae(tmp_path: Path) -> None:
    backend = FakeBackend()
    plugins = isolated_manager(fake_plugin("model_backends", build=lambda config, **services: backend), builtins=True)
    config = run_config(tmp_path, model={"backend": "test:fake"}, site={"hook_name": "blocks.0.hook_resid_post"})
    result = saekit.train(config, plugins=plugins)
    assert result.sae.d_in == 8
    assert result.sae.info.metadata["model_name"] == "fake"
    assert (result.folder / "config.toml").read_text().count("test:fake") == 1
    assert (8, 32) in backend.forwards


def test_plugins_of_one_manager_are_enough_to_train_save_and_load(tmp_path: Path) -> None:
    """Nothing on the way falls back on the installed plugins."""
    plugins = isolated_manager(
        fake_plugin("activation_functions", "shrink", build=lambda config: torch.nn.functional.softshrink),
        builtins=True,
    )
    result = saekit.train(run_config(tmp_path, sae={"activation": "shrink"}), plugins=plugins)
    assert json.loads((result.folder / "sae/cfg.json").read_text())["saekit"]["options"]["activation"] == "test:shrink"
    loaded = saekit.SAE.load(result.folder / "sae", plugins=plugins)
    assert torch.equal(loaded(torch.ones(2, 128)), result.sae(torch.ones(2, 128)))
    assert loaded.info.metadata["training_tokens"] == 2000
    with pytest.raises(SAEFormatError, match="options do not fit.*Unknown activation function 'test:shrink'"):
        saekit.SAE.load(result.folder / "sae")


def test_a_failing_last_eval_loses_nothing(tmp_path: Path) -> None:
    def build(config: object, *, run: object) -> object:
        return lambda sae, **services: exec("raise RuntimeError('an eval broke')")

    plugins = isolated_manager(fake_plugin("evals", "bad", build=build), builtins=True)
    with pytest.raises(PluginFailedError, match="an eval broke"):
        saekit.train(run_config(tmp_path, evals={"run": ["bad"]}), plugins=plugins)
    (folder,) = tmp_path.glob("*/sae")
    assert saekit.SAE.load(folder).d_sae == 64


def test_evals_do_not_choose_what_is_trained_on(tmp_path: Path) -> None:
    documents = [{"text": f"value_{n} = {n}\n" * 60} for n in range(60)]
    runs = [
        saekit.train(run_config(tmp_path, evals={"split": None, "run": run}), dataset=documents)
        for run in ([], ["reconstruction"])
    ]
    assert hashes(runs[0].folder) == hashes(runs[1].folder)


def test_documents_without_text_are_passed_over(tmp_path: Path) -> None:
    documents = [{"text": f"value_{n} = {n}\n" * 60 if n != 5 else None} for n in range(60)]
    config = run_config(tmp_path, evals={"run": []}, dataset={"on_exhausted": "error"})
    config["evals"]["split"] = None
    assert saekit.train(config, dataset=documents).metrics["details/n_training_tokens"] == 2000
    with pytest.raises(DataError, match="document 3 has int 7 in column 'text'"):
        saekit.train(config, dataset=[{"text": "abc " * 50}] * 3 + [{"text": 7}])
    with pytest.raises(DataError, match="does not fill one context of 32 tokens"):
        saekit.train(config, dataset=[{"text": "abc"}] * 3)


def test_a_plain_text_file_with_the_defaults(tmp_path: Path) -> None:
    (tmp_path / "book.txt").write_text("It was the best of times, it was the worst of times.\n" * 1500)
    config = run_config(tmp_path, dataset={"path": str(tmp_path / "book.txt")})
    config["evals"].pop("split")
    assert saekit.train(config).metrics["evals/l0"] > 0


@both_ways
def test_a_loss_that_explodes(tmp_path: Path) -> None:
    config = run_config(tmp_path, training={"lr": 1e30}, sae={"normalize_sae_decoder": False})
    message = r"is (nan|inf) at step \d+ \(learning rate 1e\+30, 256 activations of mean norm .*Lower training.lr"
    with pytest.raises(DivergedError, match=message + ".*There was no checkpoint before"):
        saekit.train(config)


def test_metrics_are_always_written_and_always_json(tmp_path: Path) -> None:
    run = saekit.RunInfo("x", tmp_path, {})
    tracker = saekit.default_manager().build("trackers", "jsonl", run=run)
    tracker.log({"a": float("nan"), "b": 1.0}, 3)
    tracker.close()
    assert lines(tmp_path)[0].items() >= {"step": 3, "a": None, "b": 1.0}.items()
    plugins = saekit.PluginManager()
    plugins.register(fake_plugin("trackers", build=lambda config, run: exec("raise OSError('no login')")), name="p")
    with pytest.raises(ConfigError, match="trackers: names a plugin twice"):
        saekit.train(run_config(tmp_path) | {"trackers": ["jsonl", {"name": "jsonl", "file": "b.jsonl"}]})
    with pytest.raises(ConfigError, match="the name of a file without folders"):
        saekit.load_config({"trackers": [{"name": "jsonl", "file": "a/b"}]})
    with pytest.warns(RuntimeWarning, match="the tracker local:fake cannot start and is off: OSError: no login"):
        result = saekit.train(run_config(tmp_path) | {"trackers": ["fake"]}, plugins=plugins)
    assert len(lines(result.folder)) == 9, "training goes on, and is recorded"


@both_ways
def test_an_interrupt_in_code_saves_a_checkpoint(tmp_path: Path) -> None:
    """Ctrl-C in the middle of an eval waits for the step's end."""

    def build(config: object, *, run: object) -> object:
        return lambda sae, **services: os.kill(os.getpid(), signal.SIGINT) or {"pressed": 1.0}

    plugins = isolated_manager(fake_plugin("evals", "impatient", build=build), builtins=True)
    config = run_config(tmp_path, evals={"run": ["impatient"], "every_n_steps": 4})
    with pytest.raises(TrainingInterrupted, match=r"interrupted after 4 steps \(1,024 tokens\); saved in") as caught:
        saekit.train(config, plugins=plugins)
    assert caught.value.checkpoint == caught.value.run / "checkpoints/step-4"
    assert lines(caught.value.run)[-1]["evals/pressed"] == 1
    sae = saekit.SAE.load(caught.value.checkpoint)
    assert sae.d_sae == 64
    assert sae.log_sparsity is not None


def test_a_failing_tracker_is_reported_once_and_left_alone() -> None:
    class Broken:
        calls = 0

        def log(self, metrics: dict, step: int) -> None:
            self.calls += 1
            raise OSError("no network")

        def close(self) -> None: ...

    broken = Broken()
    trackers = Trackers({"x:broken": broken})
    trackers.log({}, 1)
    with pytest.warns(RuntimeWarning, match="tracker x:broken failed at step 1 and is off now: OSError: no network"):
        trackers.flush(10)
    trackers.log({}, 2)
    trackers.close()
    assert broken.calls == 1


def test_firing_statistics() -> None:
    firing = FiringStatistics(3, dead_after=2, window=2, device="cpu")
    assert not firing.update(torch.tensor([4, 0, 1]), rows=4)
    assert firing.update(torch.tensor([1, 0, 0]), rows=1), "a window of two steps"
    assert firing.last_fractions.tolist() == pytest.approx([1.0, 0.0, 0.2]), "of the real number of rows"
    assert firing.since_fired.tolist() == [0, 2, 1]
    assert firing.dead().tolist() == [False, False, False], "dead is more than the window"
    firing.update(torch.tensor([0, 0, 2]), rows=4)
    assert firing.dead().tolist() == [False, True, False]
    assert firing.fractions().tolist() == [0.0, 0.0, 0.5]
    assert firing.log_sparsity()[1].item() == pytest.approx(-10)


@both_ways
def test_without_lambda_and_without_a_terminal(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    result = saekit.train(run_config(tmp_path, sae={"l1_coefficient": 0}, training={"verbose": True}))
    assert result.metrics["details/current_l1_coefficient"] == 0
    err = capfd.readouterr().err
    assert "2,000/2,000 tokens" in err
    assert "L0" in err
    saekit.train(run_config(tmp_path))
    assert capfd.readouterr() == ("", ""), "verbose off is silent"
