"""Damage is found before a row is used, and by `saekit cache verify`."""

from __future__ import annotations

import os
import shlex
import shutil
from pathlib import Path

import pytest
from support.caches import (
    HEAD,
    SITE,
    cache,
    config,
    flip,
    source,
    train,
    write,
)
from support.command import cli
from support.tiny import run_config

import saekit
from saekit.data.cache import verify_cache
from saekit.errors import DataError
from saekit.runs.timing import bytes_text
from saekit.testing import FakeBackend


@pytest.mark.parametrize("name", [f"{HEAD.name}.safetensors", "tokens.safetensors", "documents.safetensors"])
@pytest.mark.parametrize("offset", [0, 20, 4096, 4096 + 77, -1])
def test_damage_is_found_before_a_row_is_used(tmp_path: Path, name: str, offset: int) -> None:
    """The files of this test are so small that the sample is all of them."""
    run, folder = config(tmp_path), tmp_path / "cache"
    cache(run)
    flip(folder / "shard-00001" / name, offset)
    expected = rf"cache' is damaged:\n  - shard-00001/{name} has other contents than were written \(%s [0-9a-f]{{12}}, "
    with pytest.raises(DataError, match=expected % "sha256" + r"expected [0-9a-f]{12}\)\nRemove it and run `saekit"):
        verify_cache(folder)
    backend = FakeBackend()
    with pytest.raises(DataError, match=expected % "sample"):
        train(run, backend)
    assert not backend.forwards
    assert not (tmp_path / "runs").exists()
    flip(folder / "shard-00001" / name, offset)
    verify_cache(folder)


def test_every_damaged_file_is_named(tmp_path: Path) -> None:
    manifest = write(tmp_path / "c", 12, dtype="float64")
    (tmp_path / f"c/shard-00000/{SITE.name}.safetensors").unlink()
    with (tmp_path / "c/shard-00001/tokens.safetensors").open("ab") as file:
        file.write(b"x")
    cut = tmp_path / f"c/shard-00002/{HEAD.name}.safetensors"
    os.truncate(cut, 5000)
    told: list[int] = []
    for full in (False, True):
        with pytest.raises(DataError, match="is damaged") as caught:
            verify_cache(tmp_path / "c", full=full, report=told.append)
        assert [line for line in str(caught.value).splitlines() if line.startswith("  - ")] == [
            f"  - shard-00000/{SITE.name}.safetensors is missing",
            "  - shard-00001/tokens.safetensors has 4,225 bytes, expected 4,224",
            f"  - shard-00002/{HEAD.name}.safetensors has 5,000 bytes, expected 5,120",
        ]
    assert told[-1] == manifest.bytes_for(12) == manifest.nbytes
    assert len(told) == 24
    shutil.rmtree(tmp_path / "c/shard-00002")
    with pytest.raises(DataError, match="shard-00002/tokens.safetensors is missing"):
        verify_cache(tmp_path / "c")


def test_the_quick_check_is_a_sample_and_the_full_one_is_not(tmp_path: Path) -> None:
    write(tmp_path / "c", 2000, per_shard=2000, size=16, at_once=500)
    path = tmp_path / f"c/shard-00000/{SITE.name}.safetensors"
    assert path.stat().st_size > 1_000_000
    flip(path, 4096 * 3)
    verify_cache(tmp_path / "c", full=False)
    source(tmp_path / "c").close()
    with pytest.raises(DataError, match=f"{SITE.name}.safetensors has other contents"):
        verify_cache(tmp_path / "c")
    with pytest.raises(DataError, match=f"{SITE.name}.safetensors has other contents"):
        source(tmp_path / "c", verify="full")
    # Whole stretches that are gone, as a crash of the machine leaves them, do not escape the sample.
    data = path.read_bytes()
    path.write_bytes(data[:500_000] + bytes(100_000) + data[600_000:])
    with pytest.raises(DataError, match=r"has other contents than were written \(sample"):
        source(tmp_path / "c")


@pytest.mark.slow
def test_the_commands(tmp_path: Path) -> None:
    run = run_config(Path("runs"), activations={"cache": {"tokens": 4000, "sites": [{"hook_name": "hook_embed"}]}})
    (tmp_path / "run.toml").write_text(saekit.dump_config(saekit.load_config(run)))
    found = cli("cache", "run.toml", "activations.cache.folder=acts", "training.verbose=true", cwd=tmp_path)
    assert found.stdout.splitlines() == [
        "4,000 activations of blocks.1.hook_resid_post, hook_embed in acts",
        """train on them with: 'activations.source={name="cached", folder="acts"}'""",
    ]
    size = 4000 * (128 * 4 * 2 + 4 + 8) + 4 * 4096
    assert f"4,000 activations of 2 sites: {bytes_text(size)} on disk" in found.stderr
    assert "4,000/4,000 tokens" in found.stderr
    (option,) = shlex.split(found.stdout.splitlines()[1].removeprefix("train on them with: "))
    assert "run folder: runs/x" in cli("train", "run.toml", option, "checkpoints.name=x", cwd=tmp_path).stdout
    assert cli("cache", "verify", "acts", cwd=tmp_path, watch=True).stdout == (
        "acts: 1 shard, 4,000 activations per site, all as written\n"
    )
    flip(tmp_path / "acts/shard-00000/hook_embed.safetensors", 4096 * 3)
    assert cli("cache", "verify", "--quick", "acts", cwd=tmp_path, watch=True).stdout.startswith("acts: 1 shard")
    refused = cli("cache", "verify", "acts", cwd=tmp_path, watch=True, check=2)
    assert "\nerror: the activation cache 'acts' is damaged:\n  - shard-00000/hook_embed.saf" in refused.stderr
    assert "is not there" in cli("cache", "verify", "nowhere", cwd=tmp_path, watch=True, check=2).stderr
    other = cli("cache", "run.toml", "activations.cache.folder=acts", "dataset.context_size=64", cwd=tmp_path, check=2)
    assert "dataset.context_size: there 32, wanted 64" in other.stderr
    other = cli("train", "run.toml", option, "dataset.context_size=64", cwd=tmp_path, check=2)
    assert "dataset.context_size: the cache has 32, the run 64" in other.stderr
