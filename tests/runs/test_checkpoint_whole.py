"""A checkpoint is whole or not there at all, whatever fails while it is written, and on full disks."""

from __future__ import annotations

import contextlib
import itertools
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support import warm
from support.failing_disk import _watch, failing_at, full_disk
from support.runs import contents, fake_config, pressing, resume, stopped, train
from torch import Tensor

from saekit.errors import StorageError, TrainingInterrupted
from saekit.files import storage
from saekit.runs import checkpoints as on_disk
from saekit.runs import saving
from saekit.runs.checkpoints import newest_checkpoint, write_checkpoint
from saekit.training.trainer import SAETrainer

pytestmark = pytest.mark.usefixtures("one_thread")


# ---- whole or not at all


@pytest.fixture(scope="module")
def session_files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What a checkpoint is written of, and another one that is there already."""
    folder = tmp_path_factory.mktemp("made")
    made: dict[str, Any] = {}
    write = write_checkpoint

    def keep(path: Path, saes: Any, states: Any, stream: Any, facts: Any, go_on: Any) -> None:
        made.update(saes=saes, states=states, stream=stream, facts=facts)
        write(path, saes, states, stream, facts, go_on)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(saving, "write_checkpoint", keep)
        stopped(fake_config(folder), 4)
    return made


@pytest.mark.parametrize("replaces", [False, True], ids=["new", "there already"])
@pytest.mark.parametrize("error", [full_disk, KeyboardInterrupt], ids=["disk full", "interrupted"])
def test_a_checkpoint_that_fails_at_any_operation(
    tmp_path: Path, session_files: dict[str, Any], replaces: bool, error: Callable[[], BaseException]
) -> None:
    """The one before it is still there, found and whole; or, after the last rename, the new one is."""
    facts = session_files["facts"]
    after: list[int] = []
    told: set[str] = set()
    untrue = 0
    for operation in itertools.count(1):
        run = tmp_path / str(operation)
        write_checkpoint(run / "checkpoints/step-3", **session_files | {"facts": facts | {"batches": 3}})
        if replaces:
            write_checkpoint(run / "checkpoints/step-4", **session_files | {"facts": facts | {"batches": 4}})
        failure: BaseException | None = None
        try:
            with failing_at(operation, run, error):
                write_checkpoint(run / "checkpoints/step-4", **session_files | {"facts": facts | {"batches": 44}})
                reached = not _watch["left"]
        except (StorageError, KeyboardInterrupt) as caught:
            failure, reached = caught, True
        if isinstance(failure, StorageError):
            told.add(re.sub(r"/.*/", "", str(failure)))
        found = newest_checkpoint(run)
        storage.tidy(run / "checkpoints", on_disk.is_checkpoint_name)
        assert newest_checkpoint(run).facts == found.facts
        after.append(found.facts["batches"])
        untrue += failure is not None and after[-1] == 44
        names = sorted(path.name for path in (run / "checkpoints").iterdir())
        assert names == (["step-3", "step-4"] if found.facts["batches"] != 3 else ["step-3"])
        assert set(found.training("sae")) >= {"optimizer", "weights"}
        shutil.rmtree(run)
        if not reached:
            break
    before = 4 if replaces else 3
    if error is full_disk:
        assert after[0] == 44, "it cannot make the folder of all checkpoints, which is there already"
    assert after[1:] == sorted(after[1:])
    assert set(after) == {before, 44}
    assert after.count(before) > 15, "operations before the last rename"
    wanted = "cannot write step-4: No space left on device. What was there before is kept"
    assert told == ({wanted} if error is full_disk else set())
    if error is full_disk:
        assert untrue <= 1, "when it is there, but the system will not say that it is safe"


@pytest.mark.parametrize("names", [[], ["sae"]], ids=["removed", "kept to look at"])
def test_an_old_checkpoint_that_goes(tmp_path: Path, session_files: dict[str, Any], names: list[str]) -> None:
    """Whatever fails while it is removed, it is never half there: whole, or to look at, or gone."""
    facts = session_files["facts"]
    seen = set()
    for operation in range(1, 60):
        run = tmp_path / str(operation)
        old = run / "checkpoints/step-3"
        write_checkpoint(old, **session_files | {"facts": facts | {"batches": 3}})
        kept = contents(old)
        with failing_at(operation, run), contextlib.suppress(StorageError):
            on_disk.keep_saes(old, names)
        storage.tidy(run / "checkpoints", on_disk.is_checkpoint_name)
        found = contents(old) if old.exists() else {}
        if found == kept:
            seen.add("whole")
        else:
            assert found == {
                path: checksum for path, checksum in kept.items() if names and "sae/" in path and "training" not in path
            }
            seen.add("done")
        assert [path.name for path in (run / "checkpoints").iterdir()] in ([], ["step-3"])
        shutil.rmtree(run)
    assert seen == {"whole", "done"}


def test_what_a_kill_leaves_is_tidied_up(tmp_path: Path) -> None:
    stopped(fake_config(tmp_path), 3)
    run = tmp_path / "run"
    (run / "checkpoints/.step-2.0a1b2c3d.tmp/sae").mkdir(parents=True)
    shutil.copytree(run / "checkpoints/step-3", run / "checkpoints/.step-1.0a1b2c3d.old")
    shutil.move(run / "checkpoints/step-3", run / "checkpoints/.step-3.0a1b2c3d.old")
    (run / ".run.json.0a1b2c3d.tmp").write_text("{")
    (run / ".metrics.jsonl.0a1b2c3d.tmp").write_text("{")
    (run / ".sae.0a1b2c3d.tmp").mkdir()
    (run / ".mine").write_text("not of saekit")
    with pressing(1), pytest.raises(TrainingInterrupted, match="after 4 steps"):
        resume(run)
    assert [path.name for path in run.rglob(".*")] == [".mine"]
    assert {path.name for path in (run / "checkpoints").iterdir()} == {"step-3", "step-4"}


# ---- a disk that is full


def test_a_full_disk_keeps_the_checkpoint_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Training goes on and says so; with room again, checkpoints do too; and the SAE is what it would have been."""
    whole = train(fake_config(tmp_path, checkpoints={"name": "whole", "n_checkpoints": 4}))
    write, full = saving.write_checkpoint, [False, True, True, False, True]

    def no_space(*arguments: Any) -> None:
        if full.pop(0):
            with failing_at(7, tmp_path):
                write(*arguments)
        write(*arguments)

    monkeypatch.setattr(saving, "write_checkpoint", no_space)
    with pytest.warns(RuntimeWarning) as caught:
        result = train(fake_config(tmp_path, checkpoints={"name": "run", "n_checkpoints": 4}))
    told = [str(w.message) for w in caught if "worse than the mean" not in str(w.message)]
    folder = tmp_path / "run/checkpoints"
    assert [re.sub(r"cannot write .*: No", "cannot write X: No", text) for text in told] == [
        f"there is no checkpoint after {step} steps: cannot write X: No space left on device. What was there before is "
        f"kept. {'The SAEs are saved all the same' if step == 11 else 'Training goes on'}; the last checkpoint is "
        f"{folder / kept}"
        for step, kept in ((5, "step-3"), (7, "step-3"), (11, "step-9"))
    ]
    assert {path.name for path in folder.iterdir()} == {"step-3", "step-9"}
    assert not list((tmp_path / "run").rglob(".*"))
    ours, theirs = contents(result.folder), contents(whole.folder)
    for path in ("metrics.jsonl", "sae/sae_weights.safetensors", "sae/sparsity.safetensors"):
        assert ours[path] == theirs[path]
    assert newest_checkpoint(tmp_path / "run").facts["batches"] == 9


def test_a_full_disk_before_the_first_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(saving, "write_checkpoint", lambda *_: exec("raise StorageError('full')", globals()))
    with pytest.warns(RuntimeWarning, match="(goes on|all the same); the last checkpoint is still to come"):
        train(fake_config(tmp_path, checkpoints={"name": "run", "n_checkpoints": 1}))


def test_a_full_disk_when_training_is_interrupted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It still ends as an interruption, and says what could not be done and what there is."""
    config = fake_config(tmp_path, checkpoints={"name": "run", "n_checkpoints": 4})
    write, calls = saving.write_checkpoint, [0]

    def no_space(*arguments: Any) -> None:
        calls[0] += 1
        if calls[0] > 1:
            raise StorageError("cannot write it: No space left on device. What was there before is kept")
        write(*arguments)

    monkeypatch.setattr(saving, "write_checkpoint", no_space)
    error = stopped(config, 4)
    assert error.checkpoint is None
    assert str(error) == (
        "interrupted after 4 steps (1,024 tokens); and a checkpoint could not be saved: cannot write it: No space left "
        f"on device. What was there before is kept; go on from {tmp_path}/run/checkpoints/step-3 with: saekit train "
        f"--resume {tmp_path}/run"
    )
    config["checkpoints"]["name"], calls[0] = "other", 0

    def broken(trainer: SAETrainer, rows: Tensor, *rest: Any) -> None:
        if trainer.step == 4:
            raise ValueError("a fault")
        return work(trainer, rows, *rest)

    work = SAETrainer.train_on
    monkeypatch.setattr(SAETrainer, "train_on", broken)
    monkeypatch.setattr(saving, "write_saes", lambda *_: exec("raise RuntimeError('CUDA error')"))
    with pytest.raises(ValueError, match="a fault") as caught:
        train(config)
    assert caught.value.__notes__ == [
        "and the run as it was before could not be saved: RuntimeError: CUDA error; saekit train --resume "
        f"{tmp_path}/other goes on from {tmp_path}/other/checkpoints/step-3"
    ]


SMALL_DISK = """
import ctypes, os, sys, warnings
from pathlib import Path
# A disk of its own, which nobody else sees: as root of a user namespace, in a namespace of mounts.
libc, users, place = ctypes.CDLL(None), [os.getuid(), os.getgid()], os.fsencode(sys.argv[2])
refused = libc.unshare(0x10000000 | 0x20000)
try:
    for file, text in zip(("setgroups", "uid_map", "gid_map"), ("deny", *(f"0 {user} 1" for user in users))):
        Path("/proc/self", file).write_text(text)
except OSError:
    refused = True
refused = refused or libc.mount(None, b"/", None, 0x44000, None)  # nothing that is mounted here is seen elsewhere
if refused or libc.mount(b"none", place, b"tmpfs", 0, b"size=1500k"):
    sys.exit(77)
sys.path.insert(0, sys.argv[1])
from support.runs import fake_config, train, resume
from saekit.runs.checkpoints import newest_checkpoint
home = Path(sys.argv[2])
filler = home / "filler"
config = fake_config(home, checkpoints={"name": "run", "n_checkpoints": 4, "keep_last": 2}, evals={"run": []})
import saekit.runs.saving as saving
write, kept = saving.write_checkpoint, []
def watched(path, *rest):
    if path.name == "step-5":  # nearly all of the room goes
        with filler.open("wb", buffering=0) as file:
            try:
                while True:
                    file.write(bytes(4096))
            except OSError:
                pass
        size = filler.stat().st_size
        with filler.open("r+b") as file:
            file.truncate(size - 20_000)
    if path.name == "step-9":
        filler.unlink()
    write(path, *rest)
saving.write_checkpoint = watched
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    result = train(config)
print(*[w.message for w in caught if issubclass(w.category, RuntimeWarning)], sep="\\n")
print(sorted(path.name for path in (home / "run").rglob("*") if path.name.startswith((".", "step-"))))
newest_checkpoint(home / "run").training("sae")
"""


def test_a_disk_that_is_really_full(tmp_path: Path) -> None:
    mount = tmp_path / "disk"
    mount.mkdir()
    done = warm.python("-c", SMALL_DISK, Path(__file__).parents[1], mount)
    if done.returncode == 77:
        pytest.skip("no file system can be mounted here")
    assert done.returncode == 0, done.stderr
    *told, left = done.stdout.splitlines()
    assert len(told) == 2, done.stdout
    for text, step in zip(told, (5, 7), strict=True):
        assert text.startswith(f"there is no checkpoint after {step} steps: cannot write ")
        assert "o space left on device" in text
        assert text.endswith(f"Training goes on; the last checkpoint is {mount}/run/checkpoints/step-3")
    assert left == "['step-11', 'step-3', 'step-9']"
