"""Only what is a feature store's is ever replaced, and only by a store that is whole."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from support.failing_disk import failing_at
from support.stores import small_sae, small_store, some_contexts

import saekit
from saekit.errors import DataError, PlaceError, StorageError
from saekit.features import collect as collecting
from saekit.features import manifest
from saekit.features.collect import Pass


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_store(tmp_path_factory.mktemp("made") / "store").folder


@pytest.fixture
def whole(made: Path, tmp_path: Path) -> Path:
    """A store that a test may damage."""
    return shutil.copytree(made, tmp_path / "store")


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def put(folder: Path, **files: str) -> dict[str, bytes]:
    for name, text in files.items():
        path = folder / name.replace("__", "/").replace("_json", ".json").replace("_txt", ".txt")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return files_of(folder)


STRANGE = {
    "a folder of that name": {"collecting__stamps_txt": "x", "thesis_txt": "mine", "vocabulary_json": "mine"},
    "a progress of somebody's": {"collecting__progress_json": '{"done": 5}', "vocabulary_json": "mine"},
    "an extension": {"manifest_json": '{"name": "x", "files": {"a.txt": {}}}', "a_txt": "x", "sae-0__mine_txt": "x"},
    "a cache": {"manifest_json": '{"format": 1, "files": {"part.txt": {}}, "seal": "x"}', "part_txt": "x"},
    "lookalike names": {"vocabulary_json": "[]", "manifest_json": "no JSON"},
}


@pytest.mark.parametrize("what", STRANGE)
@pytest.mark.parametrize("overwrite", [False, True])
def test_what_is_somebody_elses_stays(what: str, overwrite: bool, tmp_path: Path) -> None:
    before = put(tmp_path / "theirs", **STRANGE[what])
    with pytest.raises((PlaceError, DataError)) as error:
        small_store(tmp_path / "theirs", overwrite=overwrite)
    assert not overwrite or "holds something else" in str(error.value)
    assert files_of(tmp_path / "theirs") == before


def test_what_lies_in_a_store_stays_when_it_is_replaced(whole: Path) -> None:
    mine = {"notes.txt", "sae-0/mine.txt", "collecting/mine/mine.txt"}
    put(whole, notes_txt="n", **{"sae-0__mine_txt": "x", "collecting__mine__mine_txt": "x"})
    store = small_store(whole, seed=3, overwrite=True)
    assert store.manifest.options["seed"] == 3
    found = files_of(whole)
    assert mine == set(found) - set(store.manifest.files) - {"manifest.json"}


def test_links_are_replaced_and_not_what_they_lead_to(whole: Path, tmp_path: Path) -> None:
    shutil.move(whole / "sae-0", tmp_path / "elsewhere")
    before = files_of(tmp_path / "elsewhere")
    (whole / "sae-0").symlink_to(tmp_path / "elsewhere")
    small_store(whole, seed=3, overwrite=True)
    assert files_of(tmp_path / "elsewhere") == before
    assert not (whole / "sae-0").is_symlink()


@pytest.mark.parametrize("text", ['{"form', "", "\x00\xff", "[]", '{"files": [1, 2]}', None])
def test_a_store_with_a_damaged_manifest_is_replaced_when_asked(whole: Path, made: Path, text: str | None) -> None:
    if text is None:
        (whole / "manifest.json").unlink()
    else:
        (whole / "manifest.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(
        DataError, match=r"Collect the features again \(overwrite=True of saekit\.collect_features, saek"
    ):
        small_store(whole)
    assert files_of(small_store(whole, overwrite=True).folder) == files_of(made)


def test_a_damaged_table_says_how_it_is_made_again(whole: Path) -> None:
    (whole / "sae-0" / "together.safetensors").unlink()
    with pytest.raises(DataError, match=r"is missing\. Collect the features again \(overwrite=True of saekit\.collect"):
        small_store(whole)
    assert small_store(whole, overwrite=True).n_contexts == 40


class _Free:
    free = 1000


def test_the_old_store_stays_until_the_new_one_is_whole(
    whole: Path, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def opened() -> dict[str, bytes]:
        assert saekit.FeatureStore.open(whole, verify=True).n_contexts == 40
        return {name: data for name, data in files_of(whole).items() if not name.startswith("collecting")}

    before = files_of(made)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda place: _Free())
        with pytest.raises(PlaceError, match=r"The store that is there stays until the new one is whole; to make room"):
            small_store(whole, seed=3, overwrite=True)
    assert files_of(whole) == before
    with pytest.raises(DataError, match="no token of the contexts counts for"):
        small_store(whole, mask=torch.zeros(40, 12, dtype=torch.bool), overwrite=True)
    assert files_of(whole) == before
    with monkeypatch.context() as patch:
        patch.setattr(Pass, "estimate", _interrupted)
        with pytest.raises(KeyboardInterrupt):
            small_store(whole, seed=3, overwrite=True)
    assert files_of(whole) == before
    with monkeypatch.context() as patch:
        patch.setattr(collecting, "merge", _interrupted)
        with pytest.raises(KeyboardInterrupt):
            small_store(whole, seed=3, overwrite=True)
    assert opened() == before
    new = small_store(whole, seed=3, overwrite=True).folder
    assert files_of(new) == files_of(small_store(tmp_path / "fresh", seed=3).folder)


def _interrupted(*_: Any, **__: Any) -> Any:
    raise KeyboardInterrupt


def test_an_impossible_pass_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no token of the contexts counts for"):
        small_store(tmp_path / "store", mask=torch.zeros(40, 12, dtype=torch.bool))
    assert not (tmp_path / "store").exists()


def test_wherever_a_replacement_ends_the_same_call_makes_the_same_store(whole: Path, tmp_path: Path) -> None:
    expected = files_of(small_store(tmp_path / "fresh", seed=3).folder)
    faults = 0
    for operation in (40, 66, 81, 94):
        place = shutil.copytree(whole, tmp_path / f"at-{operation}")
        try:
            with failing_at(operation, place):
                small_store(place, seed=3, overwrite=True)
        except StorageError:
            faults += 1
            if (place / "manifest.json").exists():
                assert saekit.FeatureStore.open(place, verify=True).manifest.options["seed"] == 0
        assert files_of(small_store(place, seed=3, overwrite=True).folder) == expected, operation
    assert faults == 4


def test_what_a_finished_pass_has_left_goes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(collecting.Parts, "remove", lambda parts: None)
    small_store(tmp_path / "store")
    monkeypatch.undo()
    assert (tmp_path / "store" / "collecting" / "progress.json").exists()
    small_store(tmp_path / "store")
    assert not (tmp_path / "store" / "collecting").exists()


@pytest.mark.parametrize("seal_again", [False, True])
def test_a_progress_that_skips_contexts_is_refused(made: Path, tmp_path: Path, seal_again: bool) -> None:
    identity = saekit.FeatureStore.open(made).manifest.identity
    table = {"format": manifest.FORMAT, "identity": identity, "parts": [], "contexts": 20, "files": {}}
    folder = tmp_path / "store" / "collecting"
    put(folder, progress_json=json.dumps(manifest.sealed(table) if seal_again else table | {"seal": "x"}))
    (folder / "part-00000").mkdir()
    message = "names parts that are not those of its contexts" if seal_again else "was changed after it was written"
    with pytest.raises(DataError, match=rf"{message}.*Begin anew with overwrite=True"):
        small_store(tmp_path / "store")
    assert files_of(small_store(tmp_path / "store", overwrite=True).folder) == files_of(made)


def test_a_reader_never_mixes_two_stores(whole: Path) -> None:
    half = saekit.FeatureStore.open(whole)
    fired = half.sae.fired.tolist()
    other = small_sae()
    with torch.no_grad():
        other.W_enc.mul_(-1)
    small_store(whole, other, overwrite=True)
    assert half.sae.fired.tolist() == fired
    for read in (lambda: half.feature(1).top(1), lambda: half.contexts, lambda: half.vocabulary):
        with pytest.raises(DataError, match="was removed or replaced since it was opened: open it again"):
            read()


def test_a_store_goes_by_the_names_that_saes_have_now(whole: Path) -> None:
    assert [*small_store(whole, {"a": small_sae(neuronpedia_id="x/1-y")}).saes] == ["a"]
    renamed = small_store(whole, {"b": small_sae(neuronpedia_id="z/1-q")})
    assert renamed.saes["b"].about.metadata["neuronpedia_id"] == "z/1-q"
    assert renamed.saes["b"].feature(1).fired >= 0
    again = saekit.FeatureStore.open(whole, verify=True)
    assert again.manifest == renamed.manifest
    assert again.n_contexts == len(some_contexts())


def test_a_pass_that_ends_at_once_is_in_nobodys_way(tmp_path: Path, made: Path) -> None:
    (tmp_path / "left" / "sae-0").mkdir(parents=True)
    assert files_of(small_store(tmp_path / "left").folder) == files_of(made)
    ended = 0
    for operation in range(2, 7):
        place = tmp_path / f"at-{operation}"
        try:
            with failing_at(operation, place):
                small_store(place)
        except (StorageError, PlaceError):
            ended += 1
        assert files_of(small_store(place).folder) == files_of(made), operation
    assert ended > 2
