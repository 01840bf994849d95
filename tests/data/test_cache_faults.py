"""Writing that is killed, interrupted or out of space: nothing finished is lost, and nothing torn is read."""

from __future__ import annotations

import errno
import fcntl
import itertools
import os
import random
import resource
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from support import warm
from support.caches import (
    cache,
    config,
    hashes,
    leftovers,
    marks,
    numbered,
    plan,
    source,
    threads,
    write,
)
from support.tiny import run_config
from torch import Tensor

import saekit
from saekit import Forward
from saekit.data.cache import CacheWriter, verify_cache
from saekit.data.cache import write as writing
from saekit.errors import DataError, StorageError
from saekit.files import storage
from saekit.testing import FakeBackend


def reference(folder: Path, contexts: int = 13, **options: Any) -> dict[str, str]:
    """What is on disk when nothing happens: thirteen contexts in shards of four."""
    write(folder, contexts, at_once=2, **options)
    return hashes(folder)


def go_on(folder: Path, wanted: dict[str, str], contexts: int = 13) -> None:
    """The same command again: finished shards are left alone, and the end is as if nothing had happened."""
    before = marks(folder, verify_cache(folder)) if (folder / "manifest.json").exists() else {}
    write(folder, contexts, at_once=2)
    assert before.items() <= marks(folder, verify_cache(folder)).items()
    assert hashes(folder) == wanted
    assert not leftovers(folder)


@pytest.mark.parametrize(
    "left",
    [
        [".shard-00000.4e5f6071.tmp", ".shard-00002.0a1b2c3d.tmp"],
        ["shard-00002"],
        [".shard-00002.0a1b2c3d.old"],
        [".manifest.json.0a1b2c3d.tmp"],
        [".shard-00002.0a1b2c3d.tmp", ".shard-00002.0a1b2c3d.old", "shard-00002", ".manifest.json.0a1b2c3d.tmp"],
    ],
    ids="+".join,
)
@pytest.mark.parametrize("finished", [0, 2])
def test_what_a_kill_leaves_is_removed(tmp_path: Path, finished: int, left: list[str]) -> None:
    wanted, folder = reference(tmp_path / "whole"), tmp_path / "killed"
    folder.mkdir()
    if finished:
        write(folder, 8, at_once=2)
    else:
        plan().save(folder)  # which comes before anything else
    for name in left:
        path = folder / name.replace("shard-00002", f"shard-{finished:05d}")
        if "shard" in name:
            path.mkdir()
            (path / "tokens.safetensors").write_text("torn")
        else:
            path.write_text('{"format": 1, "ident')
    go_on(folder, wanted)


def test_a_folder_like_a_shard_is_not_ours_without_a_manifest(tmp_path: Path) -> None:
    for name in ("shard-00000", ".shard-00000.0a1b2c3d.tmp"):
        mine = tmp_path / name / name / "precious.parquet"
        mine.parent.mkdir(parents=True)
        mine.write_text("years of work")
        with pytest.raises(DataError, match="is no activation cache and holds"):
            CacheWriter(tmp_path / name, plan())
        assert mine.read_text() == "years of work"


KILLED_AT_EVERY_STEP = """
import os, signal, sys
from pathlib import Path
import torch
from support.caches import write
torch.set_num_threads(1)
left, watched = 0, ""
def watch(event, arguments):
    global left
    if left and event in ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir") and watched in str(arguments[0]):
        left -= 1
        if not left:
            os.kill(os.getpid(), signal.SIGKILL)
sys.addaudithook(watch)
for number in range(1, 10**6):
    child = os.fork()
    if not child:
        left, watched = number, os.path.join(sys.argv[1], str(number))
        write(Path(watched), 9, at_once=2)
        os._exit(0)
    if os.WIFEXITED(os.waitpid(child, 0)[1]):
        break
"""


@pytest.mark.slow
def test_a_kill_between_any_two_steps_loses_no_finished_shard(tmp_path: Path) -> None:
    """SIGKILL before the first operation on the folder, before the second one, and so on to the last.

    There is a first shard, one like it, and a last one that is not full.
    """
    wanted = reference(tmp_path / "whole", 9)
    places = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    done = warm.python("-W", "error", "-c", KILLED_AT_EVERY_STEP, tmp_path / "killed", env=places)
    assert done.returncode == 0, done.stderr
    folders = sorted((tmp_path / "killed").iterdir(), key=lambda path: int(path.name))
    assert len(folders) > 60
    assert hashes(folders[-1]) == wanted, "the last one was not killed"
    seen = set()
    for folder in folders:
        if (folder / "manifest.json").exists():
            seen.add(verify_cache(folder).contexts)
        go_on(folder, wanted, 9)
    assert seen == {0, 4, 8, 9}


@pytest.mark.slow
def test_the_command_goes_on_after_kill_9(tmp_path: Path) -> None:
    options = {"tokens": 20_000, "shard_megabytes": 1, "batch_size_prompts": 5}
    run = run_config(Path("runs"), activations={"cache": options}, dataset={"context_size": 128})
    (tmp_path / "run.toml").write_text(saekit.dump_config(saekit.load_config(run)))

    def start(folder: str) -> warm.Popen:
        command = ["-m", "saekit.cli", "cache", "run.toml", f"activations.cache.folder={folder}"]
        return warm.Popen(*command, cwd=tmp_path)

    whole = start("whole")
    told = whole.communicate(timeout=300)
    assert whole.returncode == 0, told
    chance, killed, kept = random.Random(5), tmp_path / "killed", dict[str, tuple[int, int]]()
    for _ in range(2):
        process, wanted = start("killed"), len(list(killed.glob("shard-*"))) + chance.randint(1, 3)
        deadline = time.monotonic() + 120
        while len(list(killed.glob("shard-*"))) < wanted and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.002)
        time.sleep(chance.random() * 0.05)
        process.kill()
        process.communicate()
        assert process.returncode == -signal.SIGKILL
        found = marks(killed, verify_cache(killed))
        assert kept.items() <= found.items()
        kept = found
    last = start("killed")
    out, err = last.communicate(timeout=300)
    assert last.returncode == 0, err
    assert "20,096 activations of blocks.1.hook_resid_post in killed" in out
    assert kept.items() <= marks(killed, verify_cache(killed)).items()
    assert len(kept) < len(marks(killed, verify_cache(killed)))
    assert hashes(killed) == hashes(tmp_path / "whole")
    assert not leftovers(killed)


def failing_at_every(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, error: OSError, before: Any = None
) -> list[int]:
    """Let the first call of ``owner.name`` fail, the second one and so on, once each; the numbers of shards then.

    What is said is tested, and that the same command goes on.
    """
    wanted, work, shards, running = reference(tmp_path / "whole"), getattr(owner, name), [], threads()
    for number in itertools.count():
        calls = itertools.count()

        def fail(*arguments: Any, number: int = number, calls: Any = calls) -> Any:
            if next(calls) == number:
                if before is not None:
                    before(*arguments)
                raise error
            return work(*arguments)

        folder = tmp_path / str(number)
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, fail)
            failure = failed(folder)
        if failure is None:
            return shards
        assert str(failure) == (
            f"cannot write the activation cache {str(folder)!r}: {error.strerror}. Finished shards are kept, and "
            "`saekit cache` goes on after them"
        )
        assert failure.exit_code == 1
        assert not leftovers(folder)
        assert threads() == running
        shards.append(len(list(folder.glob("shard-*"))))
        go_on(folder, wanted)
    raise AssertionError("unreachable")


def failed(folder: Path) -> StorageError | None:
    try:
        write(folder, 13, at_once=2)
    except StorageError as error:
        return error
    return None


def test_a_full_disk_at_every_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What follows a write that failed is not written either, even if there is room for it again."""

    def half(file: Any, data: bytes | memoryview) -> None:
        file._file.write(memoryview(data)[: len(data) // 2])
        time.sleep(0.005)  # the rest of the shard is waiting by now

    error = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    shards = failing_at_every(tmp_path, monkeypatch, writing.SummedFile, "put", error, half)
    assert len(shards) == 4 * 4 + 7 * 4, "headers and batches"
    assert shards == [0] * 12 + [1] * 12 + [2] * 12 + [3] * 8


def test_a_disk_that_fails_late(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where files and the manifest are synced, as network file systems do."""
    error = OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))
    shards = failing_at_every(tmp_path, monkeypatch, storage, "_sync", error)
    manifests = 2 * (1 + 4 + 1)
    assert len(shards) == 4 * (4 + 2) + manifests, "files and folders of four shards; the manifest and its folder"


def test_a_file_that_may_not_grow(tmp_path: Path) -> None:
    """A real refusal of the system, met in the writer's thread and told where the next batch is added."""
    wanted = reference(tmp_path / "whole")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with CacheWriter(tmp_path / "c", plan()) as writer:
        try:
            with pytest.raises(StorageError, match="File too large. Finished shards are kept, and `saekit cache` goes"):
                for done in range(0, 12, 2):
                    if done == 8:
                        writer._worker.submit(lambda: None).result()  # two shards are there
                        resource.setrlimit(resource.RLIMIT_FSIZE, (4100, hard))
                    writer.add(numbered(done, 2), {"next": done + 2})
                writer.finish(ended=False)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert verify_cache(tmp_path / "c").contexts == 8
    assert not leftovers(tmp_path / "c")
    go_on(tmp_path / "c", wanted)


def test_an_error_is_not_forgotten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who goes on all the same cannot make a cache with a gap."""

    def fail(*arguments: Any) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with CacheWriter(tmp_path / "c", plan()) as writer:
        writer.add(numbered(0, 4), {"next": 4})
        writer._worker.submit(lambda: None).result()  # it is written
        with monkeypatch.context() as patch:
            patch.setattr(writing.SummedFile, "put", fail)
            writer.add(numbered(4, 2), {"next": 6})
            writer._worker.submit(lambda: None).result()  # it has failed
        for attempt in (
            lambda: writer.add(numbered(6, 2), {"next": 8}),
            lambda: writer.finish(ended=False),
            lambda: writer.finish(ended=True),
        ):
            with pytest.raises(StorageError, match="Input/output error. Finished"):
                attempt()
    assert not verify_cache(tmp_path / "c").ended
    assert verify_cache(tmp_path / "c").contexts == 4
    write(tmp_path / "c", 13)


def test_an_interrupt_keeps_what_is_finished(tmp_path: Path) -> None:
    class Impatient(FakeBackend):
        def run(self, tokens: Tensor, **options: Any) -> Forward:
            if len(self.forwards) == 9:
                raise KeyboardInterrupt
            return super().run(tokens, **options)

    running = threads()
    with pytest.raises(KeyboardInterrupt):
        cache(config(tmp_path), Impatient())
    assert threads() == running
    assert not leftovers(tmp_path / "cache")
    assert verify_cache(tmp_path / "cache").contexts == 20, "eight forwards of four contexts, ten of them to a shard"
    cache(config(tmp_path))
    cache(config(tmp_path / "whole"))
    assert hashes(tmp_path / "cache") == hashes(tmp_path / "whole/cache")


# ---- two at once


def test_one_writer_at_a_time(tmp_path: Path) -> None:
    write(tmp_path / "c", 6)
    with CacheWriter(tmp_path / "c", plan()) as writer:
        writer.add(numbered(6, 3), {"next": 9})
        with pytest.raises(DataError, match="another process is writing the activation cache '.*c'"):
            write(tmp_path / "c", 13)
        rows = source(tmp_path / "c", batch=1000)
        assert len(next(rows)) == 48, "what is finished can be read meanwhile"
        rows.close()
        writer.finish(ended=False)
    assert write(tmp_path / "c", 13).contexts == 13
    with pytest.raises(DataError, match="holds another activation cache"):
        write(tmp_path / "c", 13, dtype="float16")
    write(tmp_path / "c", 14)  # the one that was refused holds no lock


def test_file_systems_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(number: int) -> Any:
        def flock(*arguments: Any) -> None:
            raise OSError(number, os.strerror(number))

        return flock

    monkeypatch.setattr(fcntl, "flock", refuse(errno.ENOLCK))
    with pytest.warns(RuntimeWarning, match="c' has no locks: see to it that nothing else writes there"):
        assert write(tmp_path / "c", 6).contexts == 6
    monkeypatch.setattr(fcntl, "flock", refuse(errno.EIO))
    with pytest.raises(StorageError, match="cannot write the activation cache .* Input/output error. Finished shards"):
        write(tmp_path / "c", 6)
