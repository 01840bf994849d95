"""``saekit.dashboard``: which features a page has, where it goes, and what is refused."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.failing_disk import failing_at
from support.odd_tokens import ODD, OddBackend, several_saes

import saekit
from saekit.commands import dashboards, serving
from saekit.commands.material import Material
from saekit.dashboards.place import is_dashboard
from saekit.errors import ConfigError, DataError, PlaceError, SaekitError, StorageError

OTHER = "<!doctype html><p>Not a dashboard.</p>"


def data_of(page: Path) -> dict[str, Any]:
    """What a page holds."""
    text = page.read_text(encoding="utf-8")
    start = text.index('<script type="application/json" id="data">') + len('<script type="application/json" id="data">')
    found: dict[str, Any] = json.loads(text[start : text.index("</script>", start)])
    return found


def shown(store: saekit.FeatureStore, out: Path, **options: Any) -> list[int]:
    """The features of ``topk`` on a page."""
    page = saekit.dashboard(store, out=out / "page.html", sae="topk", **options)
    (sae,) = data_of(page)["saes"]
    found = [entry["index"] for entry in sae["index"]]
    assert [*sae["features"]] == [str(index) for index in found]
    return found


def test_features_are_chosen_by_number_at_random_or_by_what_they_do(store: saekit.FeatureStore, tmp_path: Path) -> None:
    sae = store.saes["topk"]
    assert shown(store, tmp_path, features=[5, 3, 5, 7]) == [5, 3, 7], "in the order given, those that never fire, too"
    assert shown(store, tmp_path, features="all") == [*range(16)]
    assert shown(store, tmp_path, features={"topk": [2]}) == [2]
    assert shown(store, tmp_path, features={"topk": iter([2])}) == shown(store, tmp_path, features=iter([2])) == [2]
    assert shown(store, tmp_path, features=torch.tensor([7, 2])) == [7, 2]
    some = shown(store, tmp_path, random=4)
    assert len(set(some)) == 4
    assert some == sorted(some) == shown(store, tmp_path, random=4) != shown(store, tmp_path, random=4, seed=1)
    alive = [index for index in range(16) if index != 3]
    assert shown(store, tmp_path) == alive, "50 of those that fire, of which there are 15"
    highest = sae.table("logits", "top")[:, 0]
    for by, values in (("firing", sae.fired), ("activation", sae.maximum), ("logit", highest)):
        expected = [int(index) for index in np.argsort(-values, kind="stable") if index != 3]
        assert shown(store, tmp_path, top_by=by, count=4) == expected[:4]


def test_a_page_needs_nothing_but_itself(store: saekit.FeatureStore, tmp_path: Path) -> None:
    page = saekit.dashboard(store, out=tmp_path, features=[1], labels={"topk": {1: "<b>mine</b>"}}, title="<i>")
    assert page == tmp_path / "dashboard.html"
    text = page.read_text(encoding="utf-8")
    frame, scripts = re.subn(r"<script[^>]*>.*?</script>", "<script>", text, flags=re.DOTALL)
    assert scripts == 3
    assert re.findall(r"(?:src|href)=\S+", frame) == ['href="data:,">', 'href="#feature">To']
    assert "url(" not in frame
    assert "default-src 'none'; connect-src 'self'" in frame
    for odd in (ODD[1], f'{ODD[2]}"', "<b>mine", "<i>"):
        assert odd not in text, "no token and no name is markup"
    data = data_of(page)
    assert data["title"] == "<i>"
    assert data["saes"][0]["index"][0]["label"] == "<b>mine</b>"
    assert [one["about"]["name"] for one in data["saes"]] == [*several_saes()]


MISTAKES: list[tuple[dict[str, Any], type[SaekitError], str]] = [
    ({"features": [1], "random": 3}, ConfigError, "features and random each say which features are shown"),
    ({"random": 3, "top_by": "logit"}, ConfigError, "random and top_by each say which"),
    ({"features": []}, ConfigError, "features: names none: there would be nothing to show"),
    ({"features": [16]}, ConfigError, "features: must be 0 to 15 for topk, found 16"),
    ({"features": "some"}, ConfigError, 'features: must be numbers of features or "all", found \'some\''),
    ({"features": [True]}, ConfigError, "features: must be numbers of features"),
    ({"features": {"nobody": [1]}}, ConfigError, "features: names 'nobody', and the SAEs are topk"),
    ({"random": 0}, ConfigError, "random: must be a whole number of 1 or more, found 0"),
    ({"top_by": "size"}, ConfigError, "top_by: must be firing, activation or logit, found 'size'"),
    ({"count": 3}, ConfigError, "count: says how many features top_by takes, and that is not given"),
    ({"sae": "heads", "top_by": "logit"}, ConfigError, "top_by: cannot be 'logit' for heads: .* no weights"),
    ({"sae": "none"}, ConfigError, "sae: must be one of the store's, topk, .*; found 'none'"),
    ({"labels": {"x": "y"}}, ConfigError, r"labels: must be texts by the numbers of features, found \{'x': 'y'\}"),
    ({"labels": {1: "\ud800"}}, ConfigError, r"labels: must be texts by the numbers of features, found \{1: "),
    ({"labels": {True: "y"}}, ConfigError, r"labels: must be texts by the numbers of features, found \{True: "),
    ({"labels": {"16": "y"}}, ConfigError, "labels: are of features 0 to 15 of topk, found '16'"),
    ({"labels": {"9" * 5000: "y"}}, ConfigError, "labels: are of features 0 to 15 of topk, found '9999"),
    ({"labels": {"topk": {1: "y"}, "heads": "y"}}, ConfigError, "labels: names 'heads'|labels: must be a mapping of"),
    ({"title": "\ud800"}, ConfigError, "title: must be a text that is valid Unicode"),
    ({"title": 3}, ConfigError, "title: must be a text that is valid Unicode, found 3"),
    ({"labels": [1]}, ConfigError, "labels: must be a mapping of numbers to texts, found list"),
    ({"n_contexts": 3}, ConfigError, "n_contexts: nothing is collected, as .* is a feature store already"),
    ({"out": "page.txt"}, PlaceError, "a dashboard is one file NAME.html"),
    ({"out": "file/page.html"}, PlaceError, "cannot write a dashboard into .*file'"),
]  # fmt: skip


@pytest.mark.parametrize(("options", "error", "told"), MISTAKES, ids=lambda one: str(one)[:40])
def test_a_mistake_is_told_and_nothing_is_written(
    options: dict[str, Any], error: type[SaekitError], told: str, store: saekit.FeatureStore, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    out = tmp_path / options.get("out", "page.html")
    with pytest.raises(error, match=told):
        saekit.dashboard(store, **{"sae": "topk", **options, "out": out})
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_only_a_dashboard_is_replaced_without_a_word(store: saekit.FeatureStore, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    page.write_text(OTHER)
    with pytest.raises(PlaceError, match=r"is there and is no dashboard, so it is left alone.*--overwrite"):
        saekit.dashboard(store, out=page, features=[1])
    assert page.read_text() == OTHER
    saekit.dashboard(store, out=page, features=[1], overwrite=True)
    assert is_dashboard(page)
    saekit.dashboard(store, out=page, features=[2])
    assert [*data_of(page)["saes"][0]["features"]] == ["2"]


def test_a_full_disk_leaves_what_was_there(store: saekit.FeatureStore, tmp_path: Path) -> None:
    page = saekit.dashboard(store, out=tmp_path / "page.html", features=[1])
    before, told = page.read_bytes(), list[str]()
    for operation in range(1, 20):
        with failing_at(operation, tmp_path):
            try:
                saekit.dashboard(store, out=page, features=[2], overwrite=True)
            except StorageError as error:
                told.append(str(error))
            else:
                break
        assert page.read_bytes() == before
        left = [path for path in tmp_path.iterdir() if not path.name.startswith(".trial.")]  # rmdir needs no room
        assert left == [page]
    assert told
    assert all("cannot write" in one and "No space left on device" in one for one in told)


def test_a_folder_where_nobody_may_write(store: saekit.FeatureStore, tmp_path: Path) -> None:
    denied = PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    with (
        failing_at(1, tmp_path, lambda: denied),
        pytest.raises(PlaceError, match=r"cannot write .*: Permission denied"),
    ):
        saekit.dashboard(store, out=tmp_path / "page.html")


def test_a_store_is_collected_once_and_then_opened(contexts: torch.Tensor, tmp_path: Path) -> None:
    sae = several_saes()["topk"]
    asked = {"model": OddBackend(), "contexts": contexts, "device": "cpu"}
    place = {"folder": tmp_path / "store", "verbose": False, "features": [1], "loss_effects": None}
    page = saekit.dashboard(sae, **asked, **place)
    assert page == tmp_path / "dashboard.html"
    first = page.read_bytes()
    assert len(data_of(page)["saes"][0]["index"]) == 1
    assert len(saekit.FeatureStore.open(tmp_path / "store").sae) == 16, "for the next page all are there"
    page.unlink()
    assert saekit.dashboard(sae, device="cpu", **place).read_bytes() == first, "without a model"
    assert saekit.dashboard(tmp_path / "store", features=[1]).read_bytes() == first

    with pytest.raises(DataError, match=r"n_contexts: (.*\n)*.*saekit features --overwrite"):
        saekit.dashboard(sae, overwrite=True, **asked | {"contexts": contexts[:1]}, **place)
    with pytest.raises(ConfigError, match="overwrite: replaces no feature store here"):
        saekit.show_feature(sae, 1, overwrite=True, folder=tmp_path / "store", verbose=False)
    with torch.no_grad():
        sae.b_enc[5] += 1
    with pytest.raises(
        DataError, match=r"is of .*, and not of .* as it is now \(the checksums of the weights differ\)"
    ):
        saekit.dashboard(sae, **place)
    saekit.collect_features(sae, overwrite=True, folder=tmp_path / "store", verbose=False, **asked)
    assert saekit.dashboard(sae, **place).read_bytes() != first


def test_there_is_nothing_to_choose_among_features_that_never_fire(contexts: torch.Tensor, tmp_path: Path) -> None:
    sae = several_saes()["topk"]
    asked = {"model": OddBackend(), "contexts": contexts, "device": "cpu", "verbose": False}
    store = saekit.collect_features(sae, features=[3], folder=tmp_path / "store", **asked)
    with pytest.raises(ConfigError, match=r"none of the 1 features of .* in the store fires on a token of the text"):
        saekit.dashboard(store, random=3)
    with pytest.raises(ConfigError, match=r"features: 4 of .* is not in the store, which has 1 of its 16"):
        saekit.dashboard(store, features=[4])
    assert saekit.dashboard(store, features=[3]).is_file()


def test_an_option_that_is_none_is_told_with_its_like(store: saekit.FeatureStore) -> None:
    with pytest.raises(ConfigError, match="n_context: is not an option of this; did you mean n_contexts"):
        saekit.dashboard(store, n_context=4)
    with pytest.raises(ConfigError, match=r"index: must be the number of one feature, found \[3, 4\]"):
        saekit.show_feature(store, [3, 4])  # type: ignore[arg-type]


@pytest.mark.parametrize("page", [saekit.dashboard, saekit.serve_dashboard])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"labels": [1]}, "labels: must be a mapping of numbers to texts, found list"),
        ({"labels": {"topk": {1: "a"}, 2: "b"}}, "labels: must be a mapping of numbers to texts for 2, as for others"),
        ({"labels": {"topk": {1: 2}}}, r"labels: must be texts by the numbers of features, found \{1: 2\}"),
        ({"labels": {1: "half \ud800"}}, "labels: must be texts by the numbers of features"),
        ({"sae": 3}, "sae: must be the name of an SAE, found 3"),
        ({"title": "half \ud800"}, "title: must be a text that is valid Unicode"),
    ],
)
def test_what_is_said_is_looked_at_before_anything_long(
    page: Any, options: Any, message: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def long(*_: Any, **__: Any) -> Any:
        raise AssertionError("features are collected")

    for module in (dashboards, serving):
        monkeypatch.setattr(module, "store_of", long)
    with pytest.raises(ConfigError, match=message):
        page("runs/x", **options)


def test_a_damaged_store_is_told_as_one(store: saekit.FeatureStore, tmp_path: Path) -> None:
    """And not as an SAE that nobody can read."""
    home = Path(shutil.copytree(store.folder, tmp_path / "store"))

    def lose_the_manifest(path: Path) -> None:
        shutil.copy(store.folder / "vocabulary.json", home)
        path.unlink()

    for name, damage, told in (
        ("vocabulary.json", lambda path: path.write_text("["), r"is damaged: vocabulary\.json has 1 bytes instead of"),
        ("vocabulary.json", Path.unlink, r"is damaged: vocabulary\.json is missing"),
        ("manifest.json", lambda path: path.write_text(""), r"manifest\.json cannot be read"),
        (
            "manifest.json",
            lose_the_manifest,
            r"is not a feature store, or one that was not finished: it has no manifest",
        ),
    ):
        damage(home / name)
        with pytest.raises((DataError, PlaceError), match=told):
            saekit.dashboard(home, out=tmp_path / "page.html")
        with pytest.raises((DataError, PlaceError), match=told):
            saekit.export_neuronpedia(home, neuronpedia_id="a/1-b", folder=tmp_path / "out")


@pytest.mark.parametrize(
    ("page", "options", "message"),
    [
        (saekit.dashboard, {"features": [3, 16]}, "features: must be numbers from 0 to 15 for .*topk, found 16"),
        (saekit.dashboard, {"features": {"nobody": [1]}}, "features: names 'nobody', and the SAEs are .*topk"),
        (saekit.dashboard, {"sae": "nobody"}, "sae: must be one of the store's, .*topk; found 'nobody'"),
        (saekit.dashboard, {"labels": {16: "x"}}, "labels: are of features 0 to 15 of .*topk, found 16"),
        (saekit.serve_dashboard, {"labels": {16: "x"}, "port": 0}, "labels: are of features 0 to 15 of .*, found 16"),
        (saekit.serve_dashboard, {"sae": "nobody", "port": 0}, "sae: must be one of the store's, .*; found 'nobody'"),
        (partial(saekit.show_feature, index=16), {}, "index: must be numbers from 0 to 15 for .*topk, found 16"),
        (
            partial(saekit.collect_features, features=[16]),
            {},
            "features: must be numbers from 0 to 15 for .*, found 16",
        ),
        (partial(saekit.collect_features, features={"a": [1]}), {}, "features: names 'a', and the SAEs are .*topk"),
    ],
)
def test_what_an_sae_has_not_is_told_before_a_model_is_loaded(
    page: Any, options: Any, message: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def long(*_: Any, **__: Any) -> Any:
        raise AssertionError("a model is loaded")

    several_saes()["topk"].save(tmp_path / "topk")
    monkeypatch.setattr(Material, "groups", long)
    with pytest.raises(ConfigError, match=message):
        page(str(tmp_path / "topk"), verbose=False, **options)
    assert not (tmp_path / "topk" / "features").exists()
