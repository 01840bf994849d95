"""SAEs, runs and feature stores as users give them: in memory or by their paths, to every public function alike."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from support.stores import LastKnown, small_sae, small_store, some_contexts

import saekit
from saekit.commands.subjects import subjects_of
from saekit.errors import ConfigError, PlaceError

QUIET: dict[str, Any] = {"verbose": False}
TEXTS = ["def f(x):\n    return x\n" * 20] * 40
NO_SAE = [3, None, object()]
WANTED = "must be an SAE, the result of saekit.train, a folder, or RELEASE:ID"


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An SAE's folder with a feature store in it."""
    folder = small_sae(context_size=16).save(tmp_path_factory.mktemp("given") / "bt")
    small_store(folder / "features", saekit.SAE.load(folder))
    return folder


def given(saved: Path) -> dict[str, Any]:
    return {"path": saved, "text": str(saved), "SAE": saekit.SAE.load(saved)}


def test_top_texts_takes_what_the_others_take(saved: Path) -> None:
    how: dict[str, Any] = {"model": LastKnown(), "dataset": TEXTS, "tokens": 200, **QUIET}
    found = {name: saekit.top_texts(one, features=[1], **how) for name, one in given(saved).items()}
    assert len({repr(one) for one in found.values()}) == 1
    with pytest.raises(ConfigError, match="features: are 0 to 23 of this SAE, found 24"):
        saekit.top_texts(saved, features=[24], **how)
    with pytest.raises(saekit.SaekitError, match="there is no file or folder nowhere"):
        saekit.top_texts("nowhere", **how)
    for one in NO_SAE:
        with pytest.raises(ConfigError, match=f"saes: {WANTED}, found"):
            saekit.top_texts(one, **how)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="sae: must be one SAE, found 2"):
        saekit.top_texts([saved, saved], **how)  # type: ignore[arg-type]


CALLS: dict[str, Callable[[Any], Any]] = {
    "evaluate": lambda one: saekit.evaluate(one, model=LastKnown(), contexts=some_contexts(4), save=False, **QUIET),
    "collect_features": lambda one: saekit.collect_features(one, model=LastKnown(), **QUIET),
    "top_texts": lambda one: saekit.top_texts(one, model=LastKnown(), dataset=TEXTS, **QUIET),
    "token_set_enrichment": lambda one: saekit.token_set_enrichment(one, model=LastKnown(), **QUIET),
    "splice": lambda one: saekit.splice(LastKnown(), one).__enter__(),
}


@pytest.mark.parametrize("name", CALLS)
def test_what_needs_an_sae_says_so_of_a_feature_store(name: str, saved: Path) -> None:
    store = saekit.FeatureStore.open(saved / "features")
    for one in (saved / "features", store, *([] if name == "splice" else [store.sae])):
        with pytest.raises(ConfigError, match="is a feature store, and here the SAE is needed, whose weights are not"):
            CALLS[name](one)


def test_one_sae_of_a_store_stands_for_itself(tmp_path: Path) -> None:
    one, other = small_sae(), small_sae()
    other.info = saekit.SAEInfo(sites=other.info.sites, metadata={"model_name": "fake", "context_size": 12})
    store = small_store(tmp_path / "store", {"a": one, "b": other})
    table = saekit.feature_statistics(store.saes["b"], **QUIET)
    assert set(table["sae"]) == {"b"}
    page = saekit.dashboard(store.saes["b"], features=[1], out=tmp_path / "b.html", **QUIET).read_text()
    both = saekit.dashboard(store, features=[1], out=tmp_path / "both.html", **QUIET).read_text()
    assert len(page) < len(both)
    folder = saekit.export_neuronpedia(store.saes["b"], neuronpedia_id="tiny/3-res-x", folder=tmp_path / "np", **QUIET)
    assert (folder / "batch-0.json").is_file()
    calls: list[Callable[..., Any]] = [
        saekit.dashboard, partial(saekit.serve_dashboard, port=0),
        lambda one, **how: saekit.show_feature(one, 1, **how),
        saekit.export_neuronpedia, saekit.export_delphi,
    ]  # fmt: skip
    for call in calls:
        with pytest.raises(ConfigError, match="sae: is 'b', and what is given is 'a' alone: leave sae out"):
            call(store.saes["a"], sae="b", **QUIET)
    saekit.dashboard(store.saes["a"], sae="a", features=[1], out=tmp_path / "a.html", **QUIET)


def test_an_export_takes_the_sae_beside_which_the_store_lies(saved: Path, tmp_path: Path) -> None:
    sae = saekit.SAE.load(saved)
    folder = saekit.export_neuronpedia(sae, neuronpedia_id="tiny/3-res-x", folder=tmp_path / "np", **QUIET)
    assert (folder / "batch-0.json").is_file()
    with pytest.raises(ConfigError, match="features: must be a feature store, .* an SAE that was read from a folder"):
        saekit.export_neuronpedia(small_sae(), **QUIET)


def test_a_sweep_that_was_trained_is_all_of_its_saes(tmp_path: Path) -> None:
    results = {
        name: SimpleNamespace(
            sae=small_sae(), folder=tmp_path / name, backend=LastKnown(), corpus=SimpleNamespace(dataset=TEXTS)
        )
        for name in ("low", "high")
    }
    sweep = SimpleNamespace(results=results, diverged={}, folder=tmp_path)
    assert list(subjects_of(sweep, saekit.default_manager(), device="cpu")) == ["low", "high"]


def test_what_is_no_path_is_said(saved: Path) -> None:
    sae = saekit.SAE.load(saved)
    for call in (saekit.SAE.load, saekit.FeatureStore.open, saekit.pretrained.verify, saekit.reports.read_run,
                 saekit.resume, lambda one: saekit.push_to_hub(one, "owner/name"), sae.save):  # fmt: skip
        with pytest.raises(PlaceError, match=f"a path is needed here, .* found a {type(sae).__name__}"):
            call(sae)  # type: ignore[operator]
        with pytest.raises(PlaceError, match="a path is needed here, .* found 3"):
            call(3)  # type: ignore[operator]


def test_what_was_trained_stands_for_its_folder(tmp_path: Path) -> None:
    result: Any = SimpleNamespace(folder=tmp_path / "gone")
    for call in (saekit.resume, saekit.reports.read_run, saekit.reports.draw_pictures, saekit.reports.run_table):
        with pytest.raises(PlaceError, match=f"there is no folder {tmp_path / 'gone'}"):
            call(result)
