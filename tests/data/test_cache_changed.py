"""Cache files that shrink, go or change under a run: an error that names the file, after a checkpoint; never SIGBUS."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from support import warm
from support.caches import SITE, hashes, rows_of, source, write

from saekit.errors import DataError

FILES = [f"{SITE.name}.safetensors", "tokens.safetensors", "documents.safetensors"]


def shrink(path: Path) -> None:
    os.truncate(path, 4096)


def remove(path: Path) -> None:
    path.unlink()


def replace(path: Path) -> None:
    other = path.with_name("other")
    other.write_bytes(path.read_bytes()[:-8] + b"\1" * 8)
    other.replace(path)


def overwrite(path: Path) -> None:
    data = path.read_bytes()
    with path.open("r+b") as file:
        file.write(data[:-8] + b"\1" * 8)
    os.utime(path, ns=(1, 1))  # a clock may be too coarse to tell two writes apart


def move_all(path: Path) -> None:
    path.parent.parent.rename(path.parent.parent.with_name("moved"))


CHANGES: dict[Callable[[Path], None], str] = {
    shrink: r"has 4,096 bytes, and had [45],\d\d\d when it was opened",
    remove: "was removed",
    replace: "was replaced or written to, and has other contents than were opened",
    overwrite: "was replaced or written to, and has other contents than were opened",
    move_all: "was removed",
}
HOW = "of the activation cache {}: a cache must not change while it is read. Restore the file"


@pytest.mark.parametrize("prefetch", [False, True], ids=["plain", "prefetched"])
@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("change", [one for one in CHANGES if one is not shrink], ids=lambda change: change.__name__)
def test_a_file_that_is_not_as_it_was(
    tmp_path: Path, change: Callable[[Path], None], name: str, prefetch: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "c", 13)
    read = source(Path("c"), batch=52, repeat=True, prefetch=prefetch)
    first = next(read)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")  # the run's own business
    change(tmp_path / "c/shard-00001" / name)
    with pytest.raises(DataError, match=HOW.format(CHANGES[change])) as caught:
        for _ in range(5):  # some are made ahead
            next(read)
    if change is not move_all:
        assert str(Path("c/shard-00001") / name) in str(caught.value)
    with pytest.raises(DataError, match=HOW.format(CHANGES[change])):
        read.peek()
    read.close()
    assert first.activations[SITE].shape == (52, 8)


@pytest.mark.parametrize("prefetch", [False, True], ids=["plain", "prefetched"])
def test_a_batch_that_could_not_be_read_comes_again(tmp_path: Path, prefetch: bool) -> None:
    write(tmp_path / "c", 13)
    one, two = (source(tmp_path / "c", batch=52, repeat=True, prefetch=prefetch) for _ in range(2))
    wanted = rows_of([next(two) for _ in range(6)])
    path = tmp_path / "c/shard-00001" / FILES[0]
    good, found = path.read_bytes(), [next(one)]
    path.unlink()
    with pytest.raises(DataError, match="was removed"):
        while True:
            found.append(next(one))
    state = one.state_dict()
    path.write_bytes(good)
    one.load_state_dict(state)
    assert rows_of(found + [next(one) for _ in range(6 - len(found))]).equal(wanted)
    one.close()
    two.close()


def test_the_same_again_is_no_change(tmp_path: Path) -> None:
    """Touched, or copied anew: what was verified is still what is read."""
    write(tmp_path / "c", 13)
    one, two = (source(tmp_path / "c", batch=52, repeat=True, prefetch=False) for _ in range(2))
    wanted = rows_of([next(two) for _ in range(4)])
    found = [next(one)]
    os.utime(tmp_path / "c/shard-00001" / FILES[0], ns=(1, 1))
    found.append(next(one))
    shutil.copytree(tmp_path / "c", tmp_path / "copy")
    for path in sorted((tmp_path / "copy").rglob("*.safetensors")):
        path.replace(tmp_path / "c" / path.relative_to(tmp_path / "copy"))
    found += [next(one), next(one)]
    assert rows_of(found).equal(wanted)
    one.close()
    two.close()


def test_only_files_that_a_batch_needs_are_looked_at(tmp_path: Path) -> None:
    write(tmp_path / "c", 400, per_shard=4, at_once=4)
    read = source(tmp_path / "c", sites=(SITE,), batch=2, prefetch=False)
    state = read.state_dict()
    needed = {int(row) // 32 for row in next(read).activations[SITE][:, 0]}
    read.load_state_dict(state)
    for number in set(range(100)) - needed:
        shutil.rmtree(tmp_path / f"c/shard-{number:05d}")
    assert len(next(read)) == 2
    read.close()


def test_a_saved_reading_that_is_damaged(tmp_path: Path) -> None:
    write(tmp_path / "c", 4)
    read = source(tmp_path / "c", prefetch=False)
    good = read.state_dict()
    for changes in (
        {"epoch": -1},
        {"epoch": 2**70},
        {"position": "3"},
        {"position": 33},
        {"rows": None},
        {"rows": 3.0},
    ):
        with pytest.raises(DataError, match="the saved reading is damaged: its epoch, position and rows are"):
            read.load_state_dict(good | changes)
    assert len(next(read)) == 24
    read.close()


RUN = """
import os, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
import saekit
from support.caches import DOCUMENTS, cache, config, hashes, manager, train, with_options
from saekit.data.cache import CachedBatches
from saekit.testing import FakeBackend
import test_cache_changed as changes

folder, prefetch = Path(sys.argv[1]), sys.argv[2] == "prefetched"
cache(config(folder))
victim = folder / "cache/shard-00003" / changes.FILES[0]
good = victim.read_bytes()

def run(name):
    wanted = config(folder, checkpoints={"name": name}, training={"training_tokens": 4000})
    return with_options(wanted, "activations.source", prefetch=prefetch)

whole = hashes(train(run("whole")).folder / "sae")
made, take = 0, CachedBatches.__next__
for change in (changes.shrink, changes.remove, changes.replace):
    name = change.__name__
    made = 0
    def watched(self):
        global made
        made += 1
        if made == 8:
            change(victim)
        return take(self)
    CachedBatches.__next__ = watched
    try:
        train(run(name))
        raise SystemExit("nothing was said")
    except saekit.errors.DataError as error:
        said = str(error) + str(error.__notes__)
    CachedBatches.__next__ = take
    assert "shard-00003/" + changes.FILES[0] in said, said
    assert "the run as it was before is in" in said and "saekit train --resume" in said, said
    (checkpoint,) = (folder / "runs" / name / "checkpoints").iterdir()
    assert (checkpoint / "checkpoint.json").is_file() and checkpoint.name == "step-7", checkpoint
    try:
        saekit.resume(folder / "runs" / name, plugins=manager(FakeBackend()), dataset=DOCUMENTS)
        raise SystemExit("a damaged cache was read")
    except saekit.errors.DataError as error:
        assert changes.FILES[0] in str(error)
    victim.write_bytes(good)
    result = saekit.resume(folder / "runs" / name, plugins=manager(FakeBackend()), dataset=DOCUMENTS)
    found = hashes(result.folder / "sae")
    weights = "sae_weights.safetensors"
    assert found[weights] == whole[weights] and found.keys() == whole.keys()
print("well")
"""


@pytest.mark.slow
@pytest.mark.parametrize("prefetch", ["plain", "prefetched"])
def test_a_run_whose_cache_shrinks_ends_with_a_checkpoint_and_goes_on_to_the_same_bytes(
    tmp_path: Path, prefetch: str
) -> None:
    """In a process of its own, which SIGBUS would end."""
    places = os.pathsep.join([*map(str, Path(__file__).parents[:2]), os.environ.get("PYTHONPATH", "")])
    found = warm.python("-c", RUN, tmp_path, prefetch, env=os.environ | {"PYTHONPATH": places})
    assert found.returncode == 0, found.stderr
    assert found.stdout.endswith("well\n")
    assert hashes(tmp_path / "cache")
