"""Batches are there whole or not at all, and an export goes on where it stopped, if it is the same."""

from __future__ import annotations

import errno
import json
import os
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.failing_disk import failing_at
from support.neuronpedia import batches, strict
from support.stores import small_sae, small_store

import saekit
from saekit.errors import ConfigError, DataError, PlaceError, SaekitError, StorageError
from saekit.exports import neuronpedia
from saekit.exports.folder import ExportFolder
from saekit.files.storage import locked


def contents(home: Path) -> dict[str, bytes]:
    return {str(path.relative_to(home)): path.read_bytes() for path in home.rglob("*") if path.is_file()}


def test_only_what_is_missing_or_damaged_is_written_again(export: Any) -> None:
    home = export(batch_size=6)
    whole = contents(home)
    written = {name: (home / name).stat().st_mtime_ns for name in whole}
    (home / "batch-1.json").unlink()
    (home / "batch-2.json").write_bytes(whole["batch-2.json"][:-10])  # cut by whoever wrote it
    (home / "batch-3.json").write_bytes(whole["batch-3.json"].replace(b"0.1", b"0.2", 1))
    assert export(batch_size=6) == home
    assert contents(home) == whole
    for name in ("batch-0.json", "skipped_indexes.json", "tokens_40.pt"):
        assert (home / name).stat().st_mtime_ns == written[name], "it was there"


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"batch_size": 7}, "batch_size: there 6, wanted 7"),
        ({"neuronpedia_id": "tiny/3-res-y"}, 'neuronpedia_id: there "tiny/3-res-x", wanted "tiny/3-res-y"'),
        ({"schema": "sae_lens_3"}, 'schema: there "saedashboard", wanted "sae_lens_3"'),
        ({"top": 3}, "top of options choice: there 20, wanted 3"),
        ({"numbers": [1, 2]}, r"features: there none, wanted [1, 2]"),
    ],
)
def test_a_batch_of_another_export_is_not_taken_for_this_one(export: Any, change: Any, line: str) -> None:
    home = export(batch_size=6)
    before = contents(home)
    with pytest.raises(DataError, match=r"holds another export:") as caught:
        export(**({"batch_size": 6} | change))
    assert line in str(caught.value)
    assert "--overwrite" in str(caught.value)
    assert contents(home) == before


def test_the_features_of_another_sae_are_another_export(export: Any, tmp_path: Path) -> None:
    home = export()
    other = small_store(tmp_path / "other", small_sae(neuronpedia_id="tiny/3-res-x").to(dtype=_double()))
    with pytest.raises(DataError, match=r"the weights \(a checksum\) of SAE: there .*, wanted"):
        export(other)
    export(other, overwrite=True)
    assert len(batches(home)) == 1


def _double() -> Any:
    import torch

    return torch.float64


def test_overwriting_leaves_what_is_not_of_the_export(export: Any) -> None:
    home = export(batch_size=6)
    (home / "notes.txt").write_text("mine")
    (home / "batch-9.json").write_text("of a process that was killed")
    export(batch_size=12, overwrite=True)
    assert sorted(path.name for path in home.glob("batch-*")) == ["batch-0.json", "batch-1.json"], "no other is read"
    assert (home / "notes.txt").read_text() == "mine"


def test_a_folder_with_batches_of_another_program_is_left_alone(export: Any, tmp_path: Path) -> None:
    home = tmp_path / "out"
    home.mkdir()
    (home / "batch-0.json").write_text("{}")
    for options in ({}, {"overwrite": True}):
        with pytest.raises(PlaceError, match=r"holds something else \(batch-0.json\): an export needs a folder"):
            export(**options)
    assert contents(home) == {"batch-0.json": b"{}"}


def test_a_record_that_leads_elsewhere_removes_nothing_there(export: Any, tmp_path: Path) -> None:
    home = export()
    victim = tmp_path / "victim.txt"
    victim.write_text("mine")
    table = json.loads((home / "export.json").read_text())
    table["files"]["../victim.txt"] = {"bytes": 4, "sha256": ""}
    (home / "export.json").write_text(json.dumps(table))
    export(batch_size=3, overwrite=True)
    assert victim.exists()


FOREIGN = ('{"files": {"batch-1.json": {}, "thesis.txt": {}}}', "[1]", '{"format": 1}', "mine")


@pytest.mark.parametrize("text", FOREIGN)
def test_a_record_of_something_else_is_left_alone(text: str, export: Any, tmp_path: Path) -> None:
    home = tmp_path / "out"
    (home / "sub").mkdir(parents=True)
    for name in ("thesis.txt", "batch-1.json", "sub/batch-2.json"):
        (home / name).write_text("mine")
    (home / "export.json").write_text(text)
    before = contents(home)
    for options in ({}, {"overwrite": True}):
        with pytest.raises(
            PlaceError, match=r"holds something else \(export.json\): an export needs a folder of its own"
        ):
            export(**options)
    assert contents(home) == before


def test_overwriting_removes_what_an_export_writes_alone(export: Any, tmp_path: Path) -> None:
    home = export(batch_size=6)
    (home / "features").mkdir()
    for name in ("thesis.txt", "features/batch-7.json", ".notes.json.0a1b2c3d.tmp"):
        (home / name).write_text("mine")
    table = json.loads((home / "export.json").read_text())
    table["files"]["thesis.txt"] = {"bytes": 4, "sha256": ""}
    (home / "export.json").write_text(json.dumps(table))
    export(batch_size=6)
    export(batch_size=12, overwrite=True)
    for name in ("thesis.txt", "features/batch-7.json", ".notes.json.0a1b2c3d.tmp"):
        assert (home / name).read_text() == "mine"
    bulk = export(schema="bulk", batch_size=6, folder=tmp_path / "bulk")
    (bulk / "batch-7.json").write_text("mine")
    export(schema="bulk", batch_size=12, folder=tmp_path / "bulk", overwrite=True)
    assert (bulk / "batch-7.json").read_text() == "mine"
    assert sorted(path.name for path in (bulk / "features").iterdir()) == ["batch-0.jsonl.gz", "batch-1.jsonl.gz"]


def test_an_export_that_was_begun_in_another_layout_is_not_gone_on_with(
    export: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    export()
    monkeypatch.setattr(neuronpedia, "_LAYOUT", neuronpedia._LAYOUT + 1)
    with pytest.raises(DataError, match=r"layout: there 1, wanted 2"):
        export()
    export(overwrite=True)


def test_after_a_full_disk_the_same_call_ends_as_it_would_have(export: Any, tmp_path: Path) -> None:
    whole = contents(export(batch_size=8, top=3, folder=tmp_path / "whole"))
    home, failed = tmp_path / "out", []
    for operation in range(1, 40, 4):
        shutil.rmtree(home, ignore_errors=True)
        try:
            with failing_at(operation, home):
                export(batch_size=8, top=3)
        except (StorageError, PlaceError) as error:
            failed.append(str(error))
        for path in home.glob("batch-*.json") if home.exists() else ():
            assert path.read_bytes() == whole[path.name], "whole or not there"
        export(batch_size=8, top=3)
        found = contents(home)
        assert {**found, "export.json": b""} == {**whole, "export.json": b""}, "and nothing half-written is left"
    assert len(failed) > 6
    assert all("No space left on device" in message for message in failed)


def test_a_killed_process_leaves_nothing_half_written(export: Any) -> None:
    home = export(batch_size=8, top=3)
    whole = contents(home)
    half = home / ".batch-1.json.0a1b2c3d.tmp"
    half.write_text("half")
    (home / "batch-1.json").unlink()
    export(batch_size=8, top=3)
    assert contents(home) == whole


def test_a_killed_process_leaves_nothing_in_the_folders_of_the_bulk_import(export: Any) -> None:
    home = export(schema="bulk", batch_size=8)
    whole = contents(home)
    for name in ("activations/.batch-1.jsonl.gz.0a1b2c3d.tmp", "features/.batch-1.jsonl.gz.0a1b2c3d.tmp"):
        (home / name).write_text("half")
    (home / "activations/batch-1.jsonl.gz").unlink()
    export(schema="bulk", batch_size=8)
    assert contents(home) == whole


def test_bulk_rows_are_the_same_after_going_on(export: Any) -> None:
    home = export(schema="bulk", batch_size=8)
    whole = contents(home)
    (home / "activations" / "batch-1.jsonl.gz").unlink()
    export(schema="bulk", batch_size=8)
    assert contents(home) == whole, "createdAt is that of the beginning"


@pytest.mark.parametrize("code", [errno.EACCES, errno.EROFS])
def test_a_folder_where_nobody_may_write(code: int, export: Any, tmp_path: Path) -> None:
    """Whatever is refused first: no room would help."""
    home, refused = tmp_path / "closed" / "out", []
    for there in (False, True):
        if there:
            home.mkdir(parents=True)
        for operation in range(1, 5):
            with failing_at(operation, home.parent, lambda: OSError(code, os.strerror(code))), suppress(SaekitError):
                try:
                    export(folder=home)
                except SaekitError as error:
                    refused.append(error)
                    raise
            shutil.rmtree(home.parent if not there else home, ignore_errors=True)
            home.mkdir(parents=True) if there else None
    assert len(refused) > 4
    for error in refused:
        assert isinstance(error, PlaceError), error
        assert f"{os.strerror(code)}. Name another folder" in str(error)


def test_a_place_that_cannot_be_one(export: Any, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(PlaceError, match=r"no export can be made in '.*file/out': Not a directory. Name another"):
        export(folder=tmp_path / "file" / "out")
    with pytest.raises(PlaceError, match=r"no export can be made in '.*file': File exists. Name another folder"):
        export(folder=tmp_path / "file")
    (tmp_path / "out").mkdir()
    with locked(tmp_path / "out"), pytest.raises(DataError, match=r"another process is exporting into"):
        export()


def test_a_damaged_record_is_named(export: Any) -> None:
    home = export()
    (home / "export.json").write_text("{")
    with pytest.raises(DataError, match=r"export.json cannot be read .*: begin anew with overwrite=True"):
        export()
    ExportFolder.remove(home)
    assert not (home / "export.json").exists()
    shutil.rmtree(home)
    export()
    table = json.loads((home / "export.json").read_text())
    table["files"]["batch-0.json"] = 3
    (home / "export.json").write_text(json.dumps(table))
    with pytest.raises(DataError, match=r"of 'batch-0.json' it does not say bytes and sha256\): begin anew"):
        export()
    export(overwrite=True)


def test_mistakes_are_told_together_and_before_anything_is_written(export: Any, store: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        export(schema="html", batch_size=0, top=-1, min_log_fraction=0.5)
    for line in (
        "schema: must be one of saedashboard, sae_lens_3, bulk, found 'html'",
        "batch_size: must be a whole number of 1 or more, found 0",
        "top: must be a whole number of 0 or more, found -1",
        "min_log_fraction: must be the logarithm of a fraction, so 0 or less, such as -6; found 0.5",
    ):
        assert line in str(caught.value)
    for options, message in (
        ({"neuronpedia_id": "res-jb"}, r"neuronpedia_id: must be MODEL/LAYER-SET, such as gpt2-small/8-res-jb, found"),
        ({"neuronpedia_id": "a/e-att-sm"}, r"names the layer 'e' in 'a/e-att-sm', and the batches of SAEDashboard"),
        ({"numbers": [1, 24]}, r"numbers: must be 0 to 23 for .*, found 24"),
        ({"numbers": "some"}, r'numbers: must be numbers of features or "all", found \'some\''),
        ({"numbers": []}, r"numbers: names none"),
        ({"numbers": [1.5]}, r"numbers: must be whole numbers, found 1.5"),
        ({"numbers": np.array([[1, 2]])}, r"numbers: must be whole numbers, found array\(\[1, 2\]\)"),
        ({"min_log_fraction": -np.inf}, r"min_log_fraction: must be the logarithm of a fraction, .*; found -inf"),
        ({"seed": -1}, r"seed: must be a whole number of 0 or more, found -1"),
        ({"seed": "x"}, r"seed: must be a whole number of 0 or more, found 'x'"),
        ({"window": -5}, r"window: must be two whole numbers of 0 or more"),
        ({"about": {"owner": "me"}}, r"about: may have creator_id, creator_name, .*; found 'owner': 'me'"),
        ({"sae": "other"}, r"sae: 'other' is not in the store, which has"),
    ):
        with pytest.raises(ConfigError, match=message):
            export(**options)
    assert not (tmp_path / "out").exists()


def test_where_features_are(export: Any, store: Any, tmp_path: Path) -> None:
    with pytest.raises(PlaceError, match=r"there is no folder 'nowhere'. Name a feature store, or a run"):
        export("nowhere")
    with pytest.raises(PlaceError, match=r"there is no folder 'gpt2:x'. Collect the features into a folder"):
        export("gpt2:x")
    with pytest.raises(PlaceError, match=r"there are no features of .* yet: collect them first \(saekit features"):
        export(tmp_path)
    with pytest.raises(ConfigError, match="features: must be a feature store, .* an SAE that was read .*, found 3"):
        export(3)
    run, sae = tmp_path / "run", small_sae(neuronpedia_id="tiny/3-res-x")
    shutil.copytree(store.folder, run / "features")
    sae.save(run / "sae")
    for place in (run, run / "sae"):
        assert export(place, folder=None) == run / "features-neuronpedia"
    with torch.no_grad():
        sae.b_enc.add_(1)  # as after more training
    sae.save(run / "sae")
    for options in ({"folder": None}, {"folder": tmp_path / "other"}):
        with pytest.raises(
            DataError, match=r"is of .*, and not of .* as it is now \(the checksums of the weights differ"
        ):
            export(run, **options)
    with pytest.raises(DataError, match=r"the checksums of the weights differ"):
        saekit.export_delphi(run, module_path="layers.1", folder=tmp_path / "delphi", verbose=False)
    assert export(run / "features", folder=tmp_path / "stored").exists(), "what is stored can still be asked for"


def test_features_that_are_not_in_the_store_are_said_to_be(tmp_path: Path, export: Any) -> None:
    some = small_store(tmp_path / "some", features=[1, 2, 4])
    with pytest.warns(UserWarning, match=r"21 of its 24 features are not in the store, so they are in no batch"):
        home = export(some)
    assert [one["feature_index"] for one in batches(home)[0]["features"]] == [1, 2]
    assert strict((home / "skipped_indexes.json").read_bytes())["skipped_indexes"] == [4]
    with pytest.raises(ConfigError, match=r"numbers: 5 of .* is not in the store"):
        export(some, numbers=[1, 5], folder=tmp_path / "more")


def test_an_sae_without_an_id_is_given_one(tmp_path: Path, export: Any) -> None:
    """Fault 28: the reference's runner asked the SAE for what it does not have.  Nothing but the store is asked."""
    plain = small_store(tmp_path / "plain", small_sae(), features=[1, 2])
    with pytest.raises(ConfigError, match=r"does not say what Neuronpedia calls it; give it, such as neuronpedia_id="):
        export(plain)
    for which in ("saedashboard", "sae_lens_3", "bulk"):
        home = export(plain, numbers=[1], neuronpedia_id="m/3-s", schema=which, folder=tmp_path / which)
        assert saekit.FeatureStore.open(plain.folder).sae.about.metadata == {"model_name": "fake"}
        assert [*home.iterdir()]
