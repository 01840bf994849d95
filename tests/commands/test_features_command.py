"""``saekit features``."""

from __future__ import annotations

from pathlib import Path

import attrs
import pytest
import torch
from typer.testing import CliRunner

import saekit
from saekit.cli import app
from saekit.commands.asked import feature_numbers
from saekit.errors import ConfigError, DataError, PlaceError

SITE = "blocks.0.hook_resid_post"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A TopK SAE of the embedded model, in a folder of its own."""
    return saved(tmp_path_factory.mktemp("saes") / "one")


def saved(place: Path, context_size: int = 32) -> Path:
    sae = saekit.SAE.from_dict({"name": "topk", "d_in": 128, "d_sae": 64, "k": 4})
    known = {"model_name": "saekit/tiny-python", "dataset_path": "saekit/python-stdlib", "context_size": context_size}
    sae.info = attrs.evolve(sae.info, sites=saekit.Sites.one(saekit.Site(hook_name=SITE)), metadata=known)
    return sae.save(place)


def test_the_command_keeps_the_features_beside_the_sae(folder: Path) -> None:
    arguments = ["features", str(folder), "--features", "1,2,5-20", "--n-contexts", "6", "--device", "cpu"]
    done = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    assert f"{folder}: 18 features on 192 tokens, " in done.stdout
    store = folder / "features"
    assert done.stdout.splitlines()[-2:] == [f"kept in {store}", f"next: saekit dashboard {store}"]
    store = saekit.FeatureStore.open(folder / "features")
    assert store.sae.indices.tolist() == [1, 2, *range(5, 21)]
    assert store.model_name == "saekit/tiny-python"
    assert store.manifest.dataset["dataset"] == "saekit/python-stdlib"

    model = saekit.load_model(device="cpu")
    tokens = torch.from_numpy(store.contexts.copy()).long()
    with torch.no_grad():
        full = saekit.SAE.load(folder).encode(model.run(tokens, read=[SITE]).held[SITE])
    for feature in store.sae:  # of all 64 features the 4 largest, whichever are asked for
        expected = full[..., feature.index]
        found = torch.zeros_like(expected)
        found[feature.contexts, feature.positions] = torch.from_numpy(feature.values)
        assert torch.allclose(found, expected, atol=1e-5)
    with pytest.raises(DataError, match=r"holds another feature store"):
        CliRunner().invoke(app, [*arguments[:3], "1", *arguments[4:]], catch_exceptions=False)


def test_saes_of_different_texts_are_no_one_pass(folder: Path, tmp_path: Path) -> None:
    other = saved(tmp_path / "other", context_size=24)
    with pytest.raises(ConfigError, match=r"do not share a model and a text, so no one pass has them all"):
        saekit.collect_features([folder, other], folder=tmp_path / "store", device="cpu", verbose=False)
    with pytest.raises(ConfigError, match="folder: is missing: several SAEs have no folder in common"):
        saekit.collect_features([folder, other], device="cpu", verbose=False)


def test_a_text_that_is_short_is_told(folder: Path, tmp_path: Path) -> None:
    how = {"dataset": ["import os\n" * 40], "n_contexts": 50, "verbose": False, "device": "cpu"}
    with pytest.warns(RuntimeWarning, match=r"contexts of 32 tokens, and 50 were asked for \(n_contexts\)"):
        store = saekit.collect_features(folder, folder=tmp_path / "store", **how)
    assert 0 < store.n_contexts < 50
    with pytest.raises(DataError, match="does not fill one context of 32 tokens"):
        saekit.collect_features(folder, folder=tmp_path / "other", **how | {"dataset": ["import os"]})
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize(
    ("text", "numbers"), [("all", "all"), ("3", [3]), ("1,2,5-7", [1, 2, 5, 6, 7]), (" 1 , 4 - 5", [1, 4, 5])]
)
def test_numbers_are_listed_or_ranges(text: str, numbers: object) -> None:
    assert feature_numbers(text) == numbers


@pytest.mark.parametrize("text", ["", "1,,2", "a", "5-", "7-5", "-3", "1.5"])
def test_what_is_no_list_of_numbers_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="features: must be numbers such as 1,2,5-20, or all, found"):
        feature_numbers(text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("0-999999999", "'0-999999999' are more than 16,777,216 numbers; did you mean all"),
        ("0-9999999,0-9999999", "more than 16,777,216 numbers"),
        ("9" * 5000, "has a number that is larger than any SAE: '99999"),
    ],
)
def test_numbers_that_no_sae_has_are_not_listed(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as error:
        feature_numbers(text)
    assert len(str(error.value)) < 200


def test_an_sae_that_was_read_knows_where_its_features_go(tmp_path: Path) -> None:
    sae = saekit.SAE.load(saved(tmp_path / "one"))
    how = {"n_contexts": 3, "features": [1, 2], "device": "cpu", "verbose": False}
    store = saekit.collect_features(sae, **how)
    assert store.folder == tmp_path / "one" / "features"
    assert [*store.saes] == [SITE], "it is called by its place in the model"
    assert saekit.show_feature(sae, 2, verbose=False).data["index"] == 2
    with torch.no_grad():
        sae.W_dec.mul_(2)
    with pytest.raises(DataError, match="as it is now"):
        saekit.show_feature(sae, 2, verbose=False)
    sae.read_from = None
    with pytest.raises(ConfigError, match=r"in no folder of its own; pass the path of its run, such as 'runs/first'"):
        saekit.collect_features(sae, **how)


def test_a_sweep_has_one_store_and_a_checkpoint_none(tmp_path: Path) -> None:
    for name in ("a", "b"):
        saved(tmp_path / "sweep" / name / "sae")
    saved(tmp_path / "sweep" / "checkpoints" / "step-8" / "a")
    (tmp_path / "sweep" / "run.json").write_text("{}")
    how = {"n_contexts": 2, "features": [1], "device": "cpu", "verbose": False}
    store = saekit.collect_features(tmp_path / "sweep", **how)
    assert store.folder == tmp_path / "sweep" / "features"
    assert [Path(name).name for name in store.saes] == ["a", "b"]
    with pytest.raises(ConfigError, match=r"is in a checkpoint, .* such as --folder sweep-step-8-a"):
        saekit.collect_features(tmp_path / "sweep" / "checkpoints" / "step-8" / "a", **how)
    for wrong, told in (
        (store.folder, "is a feature store, and here the SAE is needed, whose weights are not in it"),
        (store.folder / "sae-0", "is a part of the feature store "),
        (tmp_path / "sweep" / "checkpoints", "is no SAE but a part of the run "),
    ):
        with pytest.raises(ConfigError, match=told):
            saekit.collect_features(wrong, **how)
    with pytest.raises(PlaceError, match="but there is one in it: name "):
        saekit.FeatureStore.open(tmp_path / "sweep")
    with pytest.raises(PlaceError, match="is a part of the feature store "):
        saekit.FeatureStore.open(store.folder / "sae-1")


def test_an_sae_without_a_language_model_has_no_features_on_text(tmp_path: Path) -> None:
    place = tmp_path / "toy"
    saved(place / "sae")
    source = {"name": "toy", "n_features": 5, "n_hidden": 2, "directions": "random"}
    config = saekit.load_config({
        "model": {"backend": "none"}, "site": {"hook_name": "hidden"}, "activations": {"source": source},
        "sae": {"name": "topk", "d_sae": 8, "k": 1}, "training": {"training_tokens": 2048},
        "evals": {"run": [], "held_out_every": 0},
    })  # fmt: skip
    (place / "config.toml").write_text(saekit.dump_config(config))
    with pytest.raises(ConfigError, match="is of a run that has no language model, so there is no text"):
        saekit.collect_features(place, device="cpu", verbose=False)
