"""The writer removes what a killed writer left, told by name and contents, and nothing else, ever."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.caches import hashes, numbered, plan, write

from saekit.data.cache import CacheWriter, verify_cache
from saekit.errors import DataError, StorageError

MINE = "years of work"


@pytest.mark.parametrize(
    "name",
    [
        ".manifest.json.swp", ".manifest.json.bak", ".manifest.json.0a1b2c3d.tmp", ".manifest.json.d/x",
        ".shard-00001.0a1b2c3d.tmp", ".shard-00001.0a1b2c3d.tmp/thesis.tex", ".shard-00002.0a1b2c3d.old/d/x",
        ".shard-00001.0a1b2c3d.old/tokens.safetensors/x", "notes.txt", ".lock",
    ],
)  # fmt: skip
def test_what_is_not_the_caches_stays(tmp_path: Path, name: str) -> None:
    """With names by accident like the writer's own, beside shards and without a manifest."""
    (tmp_path / "new" / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / "new" / name).write_text(MINE)
    with pytest.raises(DataError, match="is no activation cache and holds"):
        write(tmp_path / "new", 4)
    assert (tmp_path / "new" / name).read_text() == MINE
    write(tmp_path / "c", 4)
    (tmp_path / "c" / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / "c" / name).write_text(MINE)
    write(tmp_path / "c", 9)
    assert (tmp_path / "c" / name).read_text() == MINE
    assert verify_cache(tmp_path / "c").contexts == 9


@pytest.mark.parametrize("name", ["shard-00001/thesis.tex", "shard-00001/tokens.safetensors/x", "shard-00002/x"])
def test_what_stands_where_a_shard_belongs_stays(tmp_path: Path, name: str) -> None:
    write(tmp_path / "c", 4)
    (tmp_path / "c" / name).parent.mkdir(parents=True)
    (tmp_path / "c" / name).write_text(MINE)
    before = hashes(tmp_path / "c")
    with pytest.raises(DataError, match=r"shard-0000\d is in the way: manifest.json names 1 shards, and writing has"):
        write(tmp_path / "c", 9)
    assert hashes(tmp_path / "c") == before


def test_shards_that_an_older_manifest_does_not_name_stay(tmp_path: Path) -> None:
    write(tmp_path / "c", 4)
    older = (tmp_path / "c/manifest.json").read_text()
    write(tmp_path / "c", 12)
    (tmp_path / "c/manifest.json").write_text(older)
    before = hashes(tmp_path / "c")
    with pytest.raises(DataError, match="shard-00002 is in the way.*Restore the manifest.json that names it"):
        write(tmp_path / "c", 12)
    assert hashes(tmp_path / "c") == before


def test_a_link_is_not_followed(tmp_path: Path) -> None:
    write(tmp_path / "c", 4)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/tokens.safetensors").write_text(MINE)
    (tmp_path / "c/.shard-00001.0a1b2c3d.tmp").symlink_to(tmp_path / "mine")
    write(tmp_path / "c", 8)
    assert (tmp_path / "mine/tokens.safetensors").read_text() == MINE


def test_what_comes_to_be_there_meanwhile_stays(tmp_path: Path) -> None:
    with CacheWriter(tmp_path / "c", plan()) as writer:
        (tmp_path / "c/shard-00000").mkdir()
        (tmp_path / "c/shard-00000/thesis.tex").write_text(MINE)
        with pytest.raises(StorageError, match="cannot write the activation cache"):
            writer.add(numbered(0, 4), {"next": 4})
            writer.finish(ended=False)
    assert (tmp_path / "c/shard-00000/thesis.tex").read_text() == MINE


@pytest.mark.parametrize("how", ["removed", "moved", "replaced"])
def test_a_folder_that_goes_away_under_the_writer(tmp_path: Path, how: str) -> None:
    """Else a new one comes to be, with the half of a cache and a manifest that names shards that are not there."""
    folder = tmp_path / "c"
    with CacheWriter(folder, plan()) as writer:
        writer.add(numbered(0, 4), {"next": 4})
        writer._worker.submit(lambda: None).result()
        folder.rename(tmp_path / "elsewhere")
        if how == "replaced":
            write(folder, 4)
        there = hashes(folder)
        with pytest.raises(StorageError, match="it was moved, removed or replaced while it was written"):
            writer.add(numbered(4, 4), {"next": 8})
            writer.finish(ended=False)
    assert hashes(folder) == there
    assert verify_cache(tmp_path / "elsewhere").contexts == 4
