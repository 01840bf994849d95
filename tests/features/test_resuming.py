"""A pass that ends before its end goes on, and what is not what it should be is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from support.failing_disk import failing_at
from support.saes import at, drawn_sae

import saekit
from saekit.backends import Hooks
from saekit.errors import DataError, PlaceError, StorageError
from saekit.features import collect as collecting
from saekit.features import manifest
from saekit.testing import FakeBackend

HOOK = "blocks.1.hook_resid_post"


def _in_small_parts(patch: pytest.MonkeyPatch) -> None:
    """Of 10 contexts each; and estimates of one context."""
    patch.setattr(collecting, "_PROBED", 1)
    patch.setattr(collecting, "UNIT_TOKENS", 60)
    patch.setattr(collecting, "PART_TOKENS", 120)


@pytest.fixture(autouse=True)
def _small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    _in_small_parts(monkeypatch)


class Dying(FakeBackend):
    """One that is stopped at some forward of five contexts, of which a pass has twelve."""

    def __init__(self, left: int) -> None:
        super().__init__()
        self.left = left

    def forward(self, tokens: torch.Tensor, hooks: Hooks) -> torch.Tensor | None:
        self.left -= len(tokens) == 5
        if not self.left:
            raise KeyboardInterrupt
        return super().forward(tokens, hooks)


def bytes_of(store: saekit.FeatureStore) -> dict[str, bytes]:
    files = {path for path in store.folder.rglob("*") if path.is_file()}
    return {str(path.relative_to(store.folder)): path.read_bytes() for path in files}


@pytest.fixture(scope="module")
def sae() -> Any:
    return at(drawn_sae(8, d_sae=12), HOOK, model_name="fake")


@pytest.fixture(scope="module")
def made(sae: Any, collect: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        _in_small_parts(patch)
        store: saekit.FeatureStore = collect(sae, tmp_path_factory.mktemp("made") / "whole")
    return store.folder


@pytest.fixture
def whole(made: Path, tmp_path: Path) -> saekit.FeatureStore:
    """A store that a test may damage."""
    return saekit.FeatureStore.open(shutil.copytree(made, tmp_path / "whole"))


def test_parts_change_nothing_but_the_last_digits_of_sums(
    sae: Any, collect: Any, whole: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(collecting, "PART_TOKENS", 1 << 30)
    other = collect(sae, tmp_path / "other")
    same = [name for name in bytes_of(whole) if "together" not in name and name != "manifest.json"]
    assert all(bytes_of(whole)[name] == bytes_of(other)[name] for name in same)


@pytest.mark.parametrize("forward", [1, 3, 10])
def test_a_pass_that_was_killed_goes_on(
    sae: Any, collect: Any, whole: Any, tmp_path: Path, forward: int, capsys: Any
) -> None:
    with pytest.raises(KeyboardInterrupt):
        collect(sae, tmp_path / "store", model=Dying(forward), batch_size=5)
    assert not (tmp_path / "store" / "manifest.json").exists()
    backend = FakeBackend()
    store = collect(sae, tmp_path / "store", model=backend, batch_size=5, verbose=True)
    assert bytes_of(store) == bytes_of(whole)
    assert ("contexts that are there" in capsys.readouterr().err) == (forward > 2)
    assert sorted(path.name for path in store.folder.iterdir()) == sorted(p.name for p in whole.folder.iterdir())


def test_whichever_file_operation_fails_the_next_call_makes_the_same_store(
    sae: Any, collect: Any, whole: Any, tmp_path: Path
) -> None:
    faults = []
    for operation in range(2, 80, 13):
        place = tmp_path / f"at-{operation}"
        try:
            with failing_at(operation, place):
                collect(sae, place)
        except StorageError as error:
            faults.append(str(error))
        assert not (place / "manifest.json").exists() or bytes_of(saekit.FeatureStore.open(place)) == bytes_of(whole)
        assert bytes_of(collect(sae, place)) == bytes_of(whole), operation
    assert len(faults) > 3
    assert all("No space left on device" in fault for fault in faults)


def test_a_full_disk_says_how_to_go_on(sae: Any, collect: Any, tmp_path: Path) -> None:
    with failing_at(30, tmp_path), pytest.raises(StorageError) as error:
        collect(sae, tmp_path / "store")
    assert str(error.value) == (
        f"cannot write the feature store {str(tmp_path / 'store')!r}: No space left on device. What was collected so "
        "far is kept; when there is room, the same call goes on after it"
    )


def test_a_disk_without_room_is_seen_before_it_begins(
    sae: Any, collect: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda place: _Free())
    with pytest.raises(PlaceError, match=r"needs about .* while it is made, and the disk has 0\.0 MB free\. Ask for"):
        collect(sae, tmp_path / "store")
    assert not (tmp_path / "store").exists()


class _Free:
    free = 1000


def test_a_store_that_is_there_is_opened(sae: Any, collect: Any, whole: Any) -> None:
    backend = FakeBackend()
    again = collect(sae, whole.folder, model=backend)
    assert again.manifest == whole.manifest
    assert (5, 12) not in backend.forwards, "no pass"


def test_a_store_of_something_else_is_refused_by_name(
    sae: Any, collect: Any, whole: Any, contexts: torch.Tensor, tmp_path: Path
) -> None:
    other = at(drawn_sae(8, d_sae=12, seed=7), HOOK, model_name="fake")
    before = bytes_of(whole)
    with pytest.raises(DataError, match=r"by itself:\n(.*\n)*  - the weights \(a checksum\) of SAE 1: .*\nTo"):
        collect(other, whole.folder)
    with pytest.raises(DataError, match=r"  - n_contexts: there 60, wanted 30\nTo look at it, name that"):
        collect(sae, whole.folder, contexts=contexts[:30])
    with pytest.raises(DataError, match=r"  - features of SAE 1: there none, wanted \[1, 2\]\nTo look at"):
        collect(sae, whole.folder, features=[1, 2])
    with pytest.raises(DataError, match=r"  - partners: there 20, wanted 3"):
        collect(sae, whole.folder, partners=3)
    assert bytes_of(whole) == before
    replaced = collect(other, whole.folder, overwrite=True)
    assert bytes_of(replaced) == bytes_of(collect(other, tmp_path / "fresh"))
    with pytest.raises(KeyboardInterrupt):
        collect(sae, tmp_path / "begun", model=Dying(7), batch_size=5)
    with pytest.raises(DataError, match=r"holds the beginning of another feature store, (.*\n)*To keep it, collect"):
        collect(other, tmp_path / "begun")


def test_parts_that_are_damaged_are_refused(sae: Any, collect: Any, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        collect(sae, tmp_path / "store", model=Dying(7), batch_size=5)
    part = tmp_path / "store" / "collecting" / "part-00000" / "0.safetensors"
    data = bytearray(part.read_bytes())
    data[-1] ^= 1
    part.write_bytes(data)
    with pytest.raises(
        DataError, match=r"part-00000/0\.safetensors is not what was written\. Begin anew with overwrite"
    ):
        collect(sae, tmp_path / "store")
    assert collect(sae, tmp_path / "store", overwrite=True).n_contexts == 60


def test_a_damaged_store_is_not_read(whole: Any) -> None:
    index = whole.folder / "sae-0" / "index.safetensors"
    data = index.read_bytes()
    index.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(DataError, match=r"damaged: sae-0/index\.safetensors is not what was written"):
        saekit.FeatureStore.open(whole.folder)
    assert saekit.FeatureStore.open(whole.folder, verify=False).n_contexts == 60
    index.write_bytes(data[:-1])
    with pytest.raises(DataError, match=r"index\.safetensors has .* bytes instead of"):
        saekit.FeatureStore.open(whole.folder, verify=False)
    index.unlink()
    with pytest.raises(DataError, match=r"index\.safetensors is missing"):
        saekit.FeatureStore.open(whole.folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 1}, r"is of format 1, and this version of saekit reads 2: collect the features again \(overwrite"),
        ({"contexts": 3}, "was changed after it was written"),
        (None, "cannot be read: Expecting value"),
    ],
)
def test_a_manifest_that_is_none_is_refused(whole: Any, change: Any, message: str) -> None:
    file = whole.folder / "manifest.json"
    table = json.loads(file.read_text())
    file.write_text(json.dumps(table | change) if change else "no JSON")
    with pytest.raises(DataError, match=message):
        saekit.FeatureStore.open(whole.folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda table: table["saes"][0].pop("hook"), r"saes\[0\]\.hook: is required"),
        (lambda table: table["saes"][0].update(d_sae="many"), r"saes\[0\]\.d_sae: expected .*'many'"),
        (lambda table: table.update(files=3), "files: expected a table, found 3"),
        (lambda table: table.update(more=1), "more: is not an option"),
        (lambda table: table.pop("context_size"), "context_size: is required"),
    ],
)
def test_a_sealed_manifest_of_other_fields_says_which(whole: Any, change: Any, message: str) -> None:
    file = whole.folder / "manifest.json"
    table = json.loads(file.read_text())
    del table["seal"]
    change(table)
    file.write_text(json.dumps(table | {"seal": manifest._seal(table)}))
    with pytest.raises(DataError, match=rf"does not say what a store's says: {message}.*Collect the features again"):
        saekit.FeatureStore.open(whole.folder)


def test_a_store_of_an_older_format_is_replaced_when_asked(sae: Any, collect: Any, whole: Any) -> None:
    file = whole.folder / "manifest.json"
    table = json.loads(file.read_text())
    del table["saes"][0]["left_out"], table["seal"]
    table["format"] = 1
    file.write_text(json.dumps(table | {"seal": manifest._seal(table)}))
    with pytest.raises(DataError, match="is of format 1"):
        collect(sae, whole.folder)
    assert collect(sae, whole.folder, overwrite=True).n_contexts == 60


def test_folders_that_are_no_stores_are_refused(sae: Any, collect: Any, tmp_path: Path) -> None:
    with pytest.raises(PlaceError, match="there is no feature store"):
        saekit.FeatureStore.open(tmp_path / "none")
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(PlaceError, match=r"is not a feature store, or one that was not finished"):
        saekit.FeatureStore.open(tmp_path)
    with pytest.raises(PlaceError, match=r"holds something else \(notes\.txt\): a feature store needs a folder of its"):
        collect(sae, tmp_path)
    with pytest.raises(PlaceError, match="is a file: a feature store is a folder"):
        collect(sae, tmp_path / "notes.txt")
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
    with pytest.raises(PlaceError, match=r"no feature store can be made in .*: Not a directory\. Name another folder"):
        collect(sae, tmp_path / "notes.txt" / "store")
