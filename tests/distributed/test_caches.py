"""Caches that several processes write: the very same files, also after one of them was killed."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
from support import spread_caches
from support.caches import hashes, leftovers
from support.processes import ended, launch
from support.spread_caches import CACHES, write, write_all

from saekit.data.cache import verify_cache


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("alone")
    write_all(folder)
    return folder


@pytest.mark.parametrize("size", [2, pytest.param(3, marks=pytest.mark.processes)])
def test_the_files_are_those_of_one_process(alone: Path, tmp_path: Path, size: int) -> None:
    launch(size, [spread_caches.__file__, str(tmp_path), "whole", ""])
    for name in (*CACHES, "more"):
        assert hashes(tmp_path / name) == hashes(alone / name), name
        assert not leftovers(tmp_path / name)
    shards = {name: len(verify_cache(alone / name / "cache").shards) for name in (*CACHES, "more")}
    assert (shards["all"], shards["one shard"]) == (7, 1)
    assert shards["more"] == 7, "a short one within"
    assert min(shards["chosen"], shards["by mask"], shards["ends"]) > 2


@pytest.mark.parametrize(
    ("how", "rank"),
    [
        ("killed", 1),
        pytest.param("killed", 0, marks=pytest.mark.processes),
        pytest.param("fails", 1, marks=pytest.mark.processes),
    ],
)
def test_one_that_ends_leaves_a_cache_to_go_on_with(alone: Path, tmp_path: Path, how: str, rank: int) -> None:
    found = ended(2, [spread_caches.__file__, str(tmp_path), how, str(rank)], timeout=90)
    assert found[rank][0] == (-signal.SIGKILL if how == "killed" else 1)
    code, told = found[1 - rank]
    assert code == 1
    assert "process" in told
    assert ("a fault of a model" if how == "fails" else "it was killed") in told
    there = verify_cache(tmp_path / "cache")
    assert [shard.contexts for shard in there.shards] == [3] * 4, "two rounds of two shards"
    write(tmp_path, CACHES["all"])
    assert hashes(tmp_path) == hashes(alone / "all")
    assert not leftovers(tmp_path)
