"""Checkpoints on disk: whole or not at all, nothing in them that runs, and the right ones kept."""

from __future__ import annotations

import contextlib
import errno
import itertools
import json
import math
import os
import pickletools
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import attrs
import pytest
import test_resume
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from support import caches
from test_resume import HOOKS, LIVE, contents, fake_config, manager, pressing, resume, stopped, train
from torch import Tensor

import saekit
from saekit.errors import DivergedError, StorageError, TrainingInterrupted
from saekit.files import storage
from saekit.runs import checkpoints as on_disk
from saekit.runs import saving
from saekit.runs.checkpoints import Checkpoint, all_checkpoints, newest_checkpoint, write_checkpoint
from saekit.runs.state_files import read_state, write_state
from saekit.testing import fake_plugin
from saekit.training.trainer import SAETrainer

one_thread = test_resume.one_thread

# ---- states as files

TYPES = [
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2, torch.int64,
    torch.int32, torch.int16, torch.int8, torch.uint8, torch.uint16, torch.uint32, torch.uint64, torch.bool,
    torch.complex64,
]  # fmt: skip


@st.composite
def tensors(draw: Any) -> Tensor:
    """Of every type, of no, one or many elements, whole or a view of another, with any bits in them."""
    dtype = draw(st.sampled_from(TYPES))
    shape = draw(st.lists(st.integers(0, 4), max_size=3))
    size = math.prod(shape) * 2 + 3
    raw = draw(st.binary(min_size=size * dtype.itemsize, max_size=size * dtype.itemsize))
    if dtype == torch.bool:
        raw = bytes(byte & 1 for byte in raw)
    flat = torch.frombuffer(bytearray(raw), dtype=dtype)
    kind = draw(st.sampled_from(["whole", "slice", "steps", "transposed", "expanded", "parameter", "conjugate"]))
    whole = flat[: math.prod(shape)].clone().reshape(shape)
    if kind == "slice":
        return flat[2 : 2 + math.prod(shape)].reshape(shape)
    if kind == "steps":
        return flat[: 2 * math.prod(shape) : 2].reshape(shape)
    if kind == "transposed":
        return whole.T if whole.ndim == 2 else whole
    if kind == "expanded":
        return whole[..., None].expand(*shape, 3)
    if kind == "parameter" and dtype == torch.float32:
        return torch.nn.Parameter(whole)
    if kind == "conjugate" and dtype == torch.complex64:
        return whole.conj()
    return whole


SHARED = torch.arange(12.0)
KEYS = st.text(max_size=5) | st.sampled_from(["a", "b", "a/b", "/", "", "0", "a'", "\ud800", "\udfff"])
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.integers(-(2**200), 2**200) | st.floats() | st.text(max_size=9)
    | tensors() | st.sampled_from([SHARED, SHARED[2:5], SHARED.view(3, 4).T, SHARED[:0]]),
    lambda inner: st.dictionaries(KEYS, inner, max_size=4) | st.lists(inner, max_size=4)
    | st.lists(inner, max_size=3).map(tuple),
    max_leaves=12,
)  # fmt: skip


def same(one: Any, other: Any) -> bool:
    """Of one kind, with the same bits."""
    if isinstance(one, Tensor):
        return (
            isinstance(other, Tensor)
            and (one.dtype, one.shape) == (other.dtype, other.shape)
            and bits(one.detach()) == bits(other)
        )
    if isinstance(one, dict):
        return isinstance(other, dict) and [*one] == [*other] and all(same(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return isinstance(other, list) and len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, float):
        return isinstance(other, float) and ((math.isnan(one) and math.isnan(other)) or one.hex() == other.hex())
    return type(one) is type(other) and one == other


def bits(value: Tensor) -> bytes:
    whole = value.resolve_conj().clone(memory_format=torch.contiguous_format).flatten()
    return whole.view(torch.uint8).numpy().tobytes() if value.numel() else b""


@given(state=st.dictionaries(KEYS, VALUES, max_size=5))
@example(state={"a/b": torch.ones(1), "a": {"b": torch.zeros(1), "b'": torch.zeros(2)}, "a/b'": torch.ones(3)})
@example(state={"\ud800": torch.ones(1), "?": torch.zeros(1)})
@example(state={"nan": math.nan, "inf": [math.inf, -math.inf], "zero": -0.0, "big": 2**199, "empty": {}, "none": []})
@example(state={"x": torch.tensor([1 + 2j]).conj(), "y": torch.tensor(1.0), "z": [SHARED, SHARED, SHARED[1:3]]})
@example(state={"one": torch.ones(2, dtype=torch.float64)[::2], "none": torch.ones(0, 3).T})
@settings(max_examples=150, deadline=None)
def test_a_state_comes_back_as_it_was(state: dict[str, Any]) -> None:
    with tempfile.TemporaryDirectory() as name:
        write_state(Path(name), "it", state)
        assert {path.name for path in Path(name).iterdir()} == {"it.json", "it.safetensors"}
        found = read_state(Path(name), "it")
        assert not any(name in line for line in Path("/proc/self/maps").read_text().splitlines()), (
            "no file is held open"
        )
    assert same(state, found)


def test_numbers_of_numpy_are_numbers(tmp_path: Path) -> None:
    import numpy as np

    state = {"a": np.float64(0.1), "b": np.int32(3), "c": np.bool_(True), "d": np.float32(0.5), "e": np.array(4)}
    write_state(tmp_path, "it", state)
    found = read_state(tmp_path, "it")
    assert found == {"a": 0.1, "b": 3, "c": True, "d": 0.5, "e": 4}
    assert [type(value) for value in found.values()] == [float, int, bool, float, int]


class Anything:
    pass


@pytest.mark.parametrize(
    ("state", "told"),
    [
        ({"a": {"b": [1, {2, 3}]}}, "the state at it/a/b/1 holds a set, which cannot be saved. A state_dict may hold"),
        ({"a": (None, Anything())}, "the state at it/a/1 holds a Anything, which cannot be saved"),
        ({"a": b"bytes"}, "the state at it/a holds a bytes"),
        ({"a": {"b": {3: 4}}}, "the state at it/a/b has the key 3, which cannot be saved; use texts"),
        ({"a": {"$tensor": 1}}, r"the state at it/a has the key '\$tensor', which"),
        ({"a": 1j}, "the state at it/a holds a complex"),
        ({"a": torch.zeros(2).numpy()}, "the state at it/a holds a ndarray"),
        ({"a": {"b": torch.zeros(2, device="meta")}}, "at it/a/b holds a tensor of torch.float32, torch.strided, on m"),
        ({"a": {"b": torch.zeros(2, dtype=torch.complex128)}}, "at it/a/b holds a tensor of torch.complex128"),
        ({"a": torch.eye(2).to_sparse()}, "at it/a holds a tensor of torch.float32, torch.sparse_coo, on cpu"),
    ],
)  # fmt: skip
def test_what_is_no_state_is_named(tmp_path: Path, state: dict[str, Any], told: str) -> None:
    with pytest.raises(StorageError, match=told):
        write_state(tmp_path, "it", state)


def test_a_state_that_cannot_be_read(tmp_path: Path) -> None:
    write_state(tmp_path, "it", {"a": torch.ones(3)})
    for name, data in (
        ("it.json", b"{"), ("it.json", b"\xff"), ("it.safetensors", b""), ("it.safetensors", b"\x80\x04."),
        ("it.json", b'{"a": {"$tensor": "other"}}'), ("it.json", None), ("it.safetensors", None),
    ):  # fmt: skip
        path, before = tmp_path / name, (tmp_path / name).read_bytes()
        path.unlink()
        if data is not None:
            path.write_bytes(data)
        with pytest.raises(StorageError, match="it in .* cannot be read"):
            read_state(tmp_path, "it")
        path.write_bytes(before)
    assert read_state(tmp_path, "it")["a"].tolist() == [1, 1, 1]


# ---- what is in a checkpoint


def test_what_a_checkpoint_holds(tmp_path: Path) -> None:
    """Everything that the training needs, in JSON and safetensors alone, and an SAE that loads."""
    error = stopped(fake_config(tmp_path), 9)
    folder = tmp_path / "run/checkpoints/step-9"
    assert error.checkpoint == folder
    files = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert files == {
        "checkpoint.json", "stream.json", "stream.safetensors", "sae/training.json", "sae/training.safetensors",
        "sae/cfg.json", "sae/sae_weights.safetensors", "sae/sparsity.safetensors",
    }  # fmt: skip
    for name in files:
        data = (folder / name).read_bytes()
        if name.endswith(".json"):
            json.loads(data)
        else:
            with safe_open(folder / name, "pt") as opened:
                assert opened.keys()
        assert b"torch" not in data[:2] and data[:2] != b"PK" and data[:1] != b"\x80"  # noqa: PT018 - zip, pickle
        with pytest.raises((ValueError, IndexError)):
            list(pickletools.genops(data))
    checkpoint = Checkpoint.open(folder)
    checkpoint.verify()
    assert set(checkpoint.facts["files"]) == files - {"checkpoint.json"}
    training, stream = checkpoint.training("sae"), checkpoint.stream()
    assert set(training) == {
        "step", "tokens", "scale", "diverged", "weights", "optimizer", "firing", "generator"
    }  # fmt: skip
    assert set(training["weights"]) == {"W_enc", "W_dec", "b_enc", "b_dec", "scaling_factor"}
    assert set(training["optimizer"]["scaling_factor"]) == {"step", "exp_avg", "exp_avg_sq"}
    assert training["scale"] != 1
    assert set(stream["random"]) == {"python", "numpy", "torch", "cuda"}
    (lane,) = stream["lanes"]
    assert set(lane["source"]) == {"buffer", "contexts", "ended"}
    for path in (folder, folder / "sae"):
        sae = saekit.SAE.load(path, plugins=manager())
        assert (sae.d_in, sae.d_sae) == (8, 64)
        assert sae.info.metadata["training_tokens"] == 9 * 256


def test_a_resumed_run_holds_no_file_of_a_checkpoint(tmp_path: Path) -> None:
    """It may be removed, and its room is free then."""
    stopped(fake_config(tmp_path), 4)
    held: list[str] = []

    def build(config: object) -> object:
        def look(sae: object, **services: object) -> dict[str, float]:
            mapped = Path("/proc/self/maps").read_text().splitlines()
            held.extend(line for line in mapped if str(tmp_path / "run/checkpoints") in line)
            return {}

        return look

    plugins = manager(None, fake_plugin("evals", "look", build=build))
    resume(tmp_path / "run", plugins=plugins, overrides=['evals.run=["look"]'], allow=["evals.run"])
    assert not held


# ---- whole or not at all


@pytest.fixture(scope="module")
def session_files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What a checkpoint is written of, and another one that is there already."""
    folder = tmp_path_factory.mktemp("made")
    made: dict[str, Any] = {}
    write = write_checkpoint

    def keep(path: Path, saes: Any, states: Any, stream: Any, facts: Any) -> None:
        made.update(saes=saes, states=states, stream=stream, facts=facts)
        write(path, saes, states, stream, facts)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(saving, "write_checkpoint", keep)
        stopped(fake_config(folder), 4)
    return made


OPERATIONS = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.link")
_watch: dict[str, Any] = {"left": 0, "folder": ""}


def _fail_in_time(event: str, arguments: tuple[Any, ...]) -> None:
    if _watch["left"] and event in OPERATIONS and _watch["folder"] in str(arguments[0]):
        _watch["left"] -= 1
        if not _watch["left"]:
            raise _watch["error"]()


sys.addaudithook(_fail_in_time)  # for as long as the process lives; it does nothing but here


def full_disk() -> OSError:
    return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@contextlib.contextmanager
def failing_at(operation: int, folder: Path, error: Callable[[], BaseException] = full_disk) -> Iterator[None]:
    """The file operation of this number in ``folder`` fails."""
    _watch.update(left=operation, folder=str(folder), error=error)
    try:
        yield
    finally:
        _watch["left"] = 0


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
    told = [str(w.message) for w in caught]
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

    def broken(trainer: SAETrainer, rows: Tensor) -> None:
        if trainer.step == 4:
            raise ValueError("a fault")
        return work(trainer, rows)

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
import sys, warnings
from pathlib import Path
sys.path[:0] = [sys.argv[1], sys.argv[1] + "/runs"]
from test_resume import fake_config, train, resume
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
    (tmp_path / "program.py").write_text(SMALL_DISK)
    enter = ["unshare", "-Urm", "sh", "-c", 'mount -t tmpfs -o size=1500k none "$1" && shift && exec "$@"', "sh"]
    if subprocess.run([*enter, mount, "true"], capture_output=True, check=False).returncode:
        pytest.skip("no file system can be mounted here")
    program = [sys.executable, tmp_path / "program.py", Path(__file__).parents[1], mount]
    done = subprocess.run([*enter, mount, *program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    *told, left = done.stdout.splitlines()
    assert len(told) == 2, done.stdout
    for text, step in zip(told, (5, 7), strict=True):
        assert text.startswith(f"there is no checkpoint after {step} steps: cannot write ")
        assert "o space left on device" in text
        assert text.endswith(f"Training goes on; the last checkpoint is {mount}/run/checkpoints/step-3")
    assert left == "['step-11', 'step-3', 'step-9']"


# ---- damage


def damage(path: Path, kind: str) -> None:
    data = path.read_bytes()
    if kind == "removed":
        path.unlink()
    elif kind == "truncated":
        path.write_bytes(data[: len(data) // 2])
    elif kind == "empty":
        path.write_bytes(b"")
    else:
        caches.flip(path, {"flipped": len(data) // 2, "flipped at the end": -2}[kind])


FILES = ["checkpoint.json", "stream.json", "stream.safetensors", "sae/training.json", "sae/training.safetensors",
         "sae/cfg.json", "sae/sae_weights.safetensors", "sae/sparsity.safetensors"]  # fmt: skip


@pytest.fixture(scope="module")
def two_checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("two")
    with contextlib.chdir(folder):
        train(fake_config(Path("whole")))
        stopped(fake_config(Path("runs")), 3)
        with pressing(2), pytest.raises(TrainingInterrupted):
            resume(Path("runs/run"))
    return folder


@pytest.mark.parametrize("kind", ["flipped", "flipped at the end", "truncated", "empty", "removed"])
@pytest.mark.parametrize("name", FILES)
def test_a_damaged_checkpoint_is_noticed(tmp_path: Path, two_checkpoints: Path, name: str, kind: str) -> None:
    shutil.copytree(two_checkpoints / "runs/run", tmp_path / "run")
    newest = tmp_path / "run/checkpoints/step-5"
    assert newest_checkpoint(tmp_path / "run").folder == newest
    damage(newest / name, kind)
    with pytest.warns(RuntimeWarning) as caught:
        assert newest_checkpoint(tmp_path / "run").folder.name == "step-3"
    (told,) = (str(w.message) for w in caught)
    assert told.startswith(f"a newer checkpoint is not used: {newest / name} ")
    assert told.endswith(". Going on from step-3 instead")
    damage(tmp_path / "run/checkpoints/step-3" / name, kind)
    with pytest.raises(StorageError, match=r"every checkpoint in .* is damaged: .*step-5.*; .*step-3"):
        newest_checkpoint(tmp_path / "run")


def test_every_byte_of_a_manifest_counts(tmp_path: Path, two_checkpoints: Path) -> None:
    """It decides what is trusted, so it has a checksum of its own: only white space may change."""
    shutil.copytree(two_checkpoints / "runs/run", tmp_path / "run")
    path = tmp_path / "run/checkpoints/step-5/checkpoint.json"
    data = path.read_bytes()
    whole = json.loads(data)
    for offset in range(0, len(data), 7):
        caches.flip(path, offset)
        try:
            read = json.loads(path.read_bytes())
        except ValueError:
            read = None
        if read == whole:
            Checkpoint.open(path.parent)
        else:
            with pytest.raises(StorageError, match="checkpoint.json"):
                Checkpoint.open(path.parent)
        path.write_bytes(data)
    path.write_text(json.dumps(whole | {"format": 2}))
    with pytest.raises(StorageError, match="step-5 has format 2, and this saekit reads 1: update saekit to go on"):
        Checkpoint.open(path.parent)
    with pytest.raises(StorageError, match="step-5 has format 2"):  # going on from step-3 would lose what is there
        newest_checkpoint(path.parents[2])
    assert path.is_file()


def test_a_disk_that_cannot_read(tmp_path: Path, two_checkpoints: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(two_checkpoints / "runs/run", tmp_path / "run")

    def unreadable(path: Path) -> str:
        if "step-5" in str(path):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return storage.sha256(path)

    monkeypatch.setattr(on_disk, "sha256", unreadable)
    with pytest.warns(RuntimeWarning, match=r"step-5/\S+ cannot be read: Input/output error. Going on from step-3"):
        newest_checkpoint(tmp_path / "run")


@pytest.mark.parametrize("name", ["checkpoint.json", "sae/training.safetensors"])
def test_a_run_goes_on_before_a_damaged_checkpoint(tmp_path: Path, two_checkpoints: Path, name: str) -> None:
    """Loudly, to the same end; and the damaged one is never in the way of a good one."""
    shutil.copytree(two_checkpoints / "runs", tmp_path / "runs")
    checkpoints = tmp_path / "runs/run/checkpoints"
    damage(checkpoints / "step-5" / name, "flipped")
    with contextlib.chdir(tmp_path):
        with (
            pytest.warns(RuntimeWarning, match="a newer checkpoint is not used: .* Going on from step-3 instead"),
            pressing(1), pytest.raises(TrainingInterrupted, match="after 4 steps"),
        ):  # fmt: skip
            resume(Path("runs/run"), overrides=["checkpoints.keep_last=1"], allow=["checkpoints.keep_last"])
        assert {path.name for path in checkpoints.iterdir()} == {"step-4", "step-5.damaged"}
        resume(Path("runs/run"))  # a warning would be an error
    ours, theirs = contents(tmp_path / "runs/run"), contents(two_checkpoints / "whole/run")
    for path in theirs:
        assert ours[path] == theirs[path] or path in ("config.toml", "checkpoints/step-11/checkpoint.json")


def test_a_checkpoint_of_another_run(tmp_path: Path, two_checkpoints: Path) -> None:
    shutil.copytree(two_checkpoints / "runs", tmp_path / "runs")
    run = tmp_path / "runs/run"
    with pytest.raises(StorageError, match=r"checkpoint of sae holds weights .*, but this run's SAE has"):
        resume(run, overrides=["sae.d_sae=32"], allow=["sae.d_sae"])
    with pytest.raises(StorageError, match="does not fit the run as it is now: DataError: the saved buffer has"):
        resume(
            run,
            overrides=["activations.source.n_batches_in_buffer=9"],
            allow=["activations.source.n_batches_in_buffer"],
        )
    assert {path.name for path in (run / "checkpoints").iterdir()} == {"step-3", "step-5"}
    record = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps(record | {"saes": {"other": "."}}))
    with pytest.raises(StorageError, match="step-5 holds sae, but the run has other"):
        resume(run)


def test_another_version_is_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(torch, "__version__", "2.0.0")
        stopped(fake_config(tmp_path), 3)
    with pytest.warns(
        RuntimeWarning, match=f"written with torch 2.0.0, and this is {re.escape(torch.__version__)}: the"
    ):
        resume(tmp_path / "run")


def test_metrics_are_written_before_the_checkpoint_that_counts_on_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a run that is killed right after it would go on without the lines before it."""
    from saekit_plugins.trackers.jsonl import JsonlTracker

    log, write, lines = JsonlTracker.log, saving.write_checkpoint, []

    def slow(tracker: JsonlTracker, metrics: Any, step: int) -> None:
        time.sleep(0.05)
        log(tracker, metrics, step)

    def counted(path: Path, *rest: Any) -> None:
        lines.append((path.name, len((tmp_path / "run/metrics.jsonl").read_text().splitlines())))
        write(path, *rest)

    monkeypatch.setattr(JsonlTracker, "log", slow)
    monkeypatch.setattr(saving, "write_checkpoint", counted)
    train(fake_config(tmp_path, checkpoints={"name": "run", "n_checkpoints": 3}))
    assert lines == [("step-3", 3), ("step-6", 6), ("step-8", 8), ("step-11", 12)]


# ---- which are written, and which stay


@pytest.mark.parametrize(
    ("number", "keep_last", "steps", "resumable"),
    [
        (0, 2, [11], [11]),
        (1, 2, [6, 11], [6, 11]),  # of 2,700 tokens, those at or after every 1,350, and the end
        (3, 2, [3, 6, 8, 11], [8, 11]),
        (3, 1, [3, 6, 8, 11], [11]),
        (3, 0, [3, 6, 8], []),
        (3, 9, [3, 6, 8, 11], [3, 6, 8, 11]),
        (50, 2, list(range(1, 12)), [10, 11]),
    ],
)
def test_checkpoints_at_even_distances(
    tmp_path: Path, number: int, keep_last: int, steps: list[int], resumable: list[int]
) -> None:
    """Their SAEs stay, whatever is kept to go on from."""
    whole = train(fake_config(tmp_path, checkpoints={"name": "run", "n_checkpoints": number, "keep_last": keep_last}))
    found = sorted((tmp_path / "run/checkpoints").glob("*"), key=lambda path: int(path.name[5:]))
    assert [path.name for path in found] == [f"step-{step}" for step in steps]
    assert sorted(int(path.name[5:]) for path in all_checkpoints(tmp_path / "run")) == resumable
    for path, step in zip(found, steps, strict=True):
        if step not in resumable:
            names = {"cfg.json", "sae_weights.safetensors", "sparsity.safetensors"}
            assert {str(file.relative_to(path)) for file in path.rglob("*")} == {"sae"} | {f"sae/{n}" for n in names}
        for folder in (path, path / "sae"):
            sae = saekit.SAE.load(folder, plugins=manager())
            assert sae.info.metadata["training_tokens"] == min(step * 256, 2700)
    if steps[-1] == 11:
        assert torch.equal(sae.W_enc, whole.sae.W_enc)


def test_an_evenly_spaced_one_is_not_lost_when_another_is_of_the_same_step(tmp_path: Path) -> None:
    """Text that ends may end right there."""
    checkpoints = {"name": "run", "n_checkpoints": 50, "keep_last": 1}
    sections = {"dataset": {"on_exhausted": "stop"}, "training": {"training_tokens": 9000, "finetuning_tokens": 0,
                "finetuning_method": None}}  # fmt: skip
    train(fake_config(tmp_path, checkpoints=checkpoints, **sections), dataset=caches.DOCUMENTS[:25])
    (newest,) = all_checkpoints(tmp_path / "run")
    assert (Checkpoint.open(newest).facts["spaced"], Checkpoint.open(newest).facts["finished"]) == (True, True)


def test_checkpoints_by_the_clock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock, written = [0.0], []
    write = saving.write_checkpoint

    def note(path: Path, *rest: Any) -> None:
        written.append((path.name, round(clock[0] / 60)))
        clock[0] += 10 * 60  # it takes its time, which does not count
        write(path, *rest)

    work = SAETrainer.train_on

    def slow(trainer: SAETrainer, rows: Tensor) -> Any:
        clock[0] += 25 * 60
        return work(trainer, rows)

    monkeypatch.setattr(saving.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(saving, "write_checkpoint", note)
    monkeypatch.setattr(SAETrainer, "train_on", slow)
    train(fake_config(tmp_path, LIVE | {"prefetch": False}, checkpoints={"name": "run", "every_minutes": 60}))
    assert written == [("step-3", 75), ("step-6", 160), ("step-9", 245), ("step-11", 305)]
    assert {path.name for path in (tmp_path / "run/checkpoints").iterdir()} == {"step-9", "step-11"}
    for number, options in enumerate(({"every_minutes": 0}, {"every_minutes": 60, "keep_last": 0})):
        written.clear()
        name = f"other {number}"
        train(fake_config(tmp_path, LIVE | {"prefetch": False}, checkpoints={"name": name, **options}))
        assert [step for step, _ in written] == [["step-11"], []][number]


def test_an_old_checkpoint_that_cannot_be_removed_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a network file system where somebody reads it; training goes on."""
    monkeypatch.setattr(
        on_disk, "remove_folder", lambda path: exec("raise StorageError('cannot remove it: busy')", globals())
    )
    config = fake_config(tmp_path, checkpoints={"name": "run", "every_minutes": 1e-9})
    with pytest.warns(RuntimeWarning, match="an old checkpoint stays: cannot remove it: busy"):
        train(config)
    assert len(list(all_checkpoints(tmp_path / "run"))) == 11


# ---- what is not worth saving


def poison(monkeypatch: pytest.MonkeyPatch, name: str, step: int, what: str = "rows") -> None:
    """From this step on, the SAE of this name gets rows that are not numbers, or has weights that are not."""
    work = SAETrainer.train_on

    def train_on(trainer: SAETrainer, rows: Tensor) -> Any:
        if trainer.step + 1 >= step and name in trainer.name:
            if what == "rows":
                rows = rows.clone()
                rows[0, 0] = math.inf
            else:
                found = work(trainer, rows)
                with torch.no_grad():
                    trainer.sae.b_enc[0] = math.nan
                return found
        return work(trainer, rows)

    monkeypatch.setattr(SAETrainer, "train_on", train_on)


def test_a_loss_that_is_no_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The message has what one looks for, and the last good checkpoint stays, and can be gone on from."""
    config = fake_config(tmp_path, checkpoints={"name": "run", "every_minutes": 1e-9})
    with monkeypatch.context() as patch, pytest.raises(DivergedError) as caught:
        poison(patch, "", 6)
        train(config)
    last = tmp_path / "run/checkpoints/step-5/sae"
    assert re.fullmatch(
        r"the loss of blocks.0.hook_resid_post is nan at step 6 \(learning rate 0.000\d+, 256 activations of mean norm "
        r"inf and largest value inf, gradient norm nan\)\. Lower training.lr, or add training.lr_warm_up_steps\. The "
        rf"last good checkpoint is {last}", str(caught.value)
    )  # fmt: skip
    assert {path.name for path in (tmp_path / "run/checkpoints").iterdir()} == {"step-4", "step-5"}
    assert not (tmp_path / "run/sae").exists()
    assert saekit.SAE.load(last, plugins=manager()).W_dec.isfinite().all()
    for path in (tmp_path / "run").rglob("sae_weights.safetensors"):
        with safe_open(path, "pt") as file:
            assert all(file.get_tensor(name).isfinite().all() for name in file.keys())  # noqa: SIM118 - no mapping
    assert resume(tmp_path / "run").metrics["details/n_training_tokens"] == 2700


def test_a_resumed_run_that_diverges_names_the_checkpoint_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stopped(fake_config(tmp_path), 4)
    poison(monkeypatch, "", 6)
    with pytest.raises(
        DivergedError, match=f"at step 6 .* The last good checkpoint is {tmp_path}/run/checkpoints/step-4/sae"
    ):
        resume(tmp_path / "run")


def test_weights_that_are_no_numbers_are_never_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whenever it is noticed: at a checkpoint, when it is interrupted, at the end."""
    config = fake_config(tmp_path, checkpoints={"name": "run", "n_checkpoints": 4})
    for name, at, step in (("spaced", 4, 5), ("interrupted", 4, None), ("end", 11, 11)):
        config["checkpoints"]["name"] = name
        with monkeypatch.context() as patch:
            poison(patch, "", at, "weights")
            # On a GPU the loss is only looked at when it is logged.
            patch.setattr(SAETrainer, "_check_finite", lambda *arguments: None)
            if name == "interrupted":
                with pressing(4), pytest.raises(TrainingInterrupted) as stop:
                    train(config)
                assert stop.value.checkpoint is None
            else:
                with pytest.raises(DivergedError) as caught:
                    train(config)
                assert f"b_enc of the SAE at {HOOKS[0]} holds numbers that are not finite after step {step}" in str(
                    caught.value
                )
                assert f"The last good checkpoint is {tmp_path / name}/checkpoints/step-" in str(caught.value)
        saved = {int(path.name[5:]) for path in all_checkpoints(tmp_path / name)}
        assert max(saved) < at
        for path in (tmp_path / name).rglob("sae_weights.safetensors"):
            with safe_open(path, "pt") as file:
                assert file.get_tensor("b_enc").isfinite().all()
        assert resume(tmp_path / name).metrics["evals/l0"] > 0, "from what was good"


def test_one_of_a_sweep_diverges(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is stopped alone, its last good SAE stays when older checkpoints go, and the others end as if alone."""
    checkpoints = {"name": "run", "every_minutes": 1e-9}
    axes = {"training.seed": [1, 2], "sae.l1_coefficient": [1.0, 2.0]}
    configs = saekit.grid(fake_config(tmp_path, checkpoints=checkpoints), axes, plugins=manager())
    name = "1_l1_coefficient=2_seed=1"
    poison(monkeypatch, name, 5)
    with pytest.warns(RuntimeWarning, match=rf"^{name} is stopped: .* at step 5 \(learning rate"):
        result = train(configs)
    assert set(result.diverged) == {name}
    found = {path.name: path for path in (tmp_path / "run/checkpoints").iterdir()}
    resumable = [path.name for path in all_checkpoints(tmp_path / "run")]
    assert resumable == ["step-22", "step-21"]
    (kept,) = set(found) - set(resumable)
    assert kept == "step-8", "its fourth step, and the last before its fifth"
    assert {path.name for path in found[kept].iterdir()} == {name}
    assert saekit.SAE.load(found[kept] / name, plugins=manager()).info.metadata["training_tokens"] == 4 * 256
    assert not (tmp_path / "run" / name / "sae").exists()
    assert {path.name for path in found["step-22"].iterdir() if path.is_dir()} == {path.name for path in
           found["step-21"].iterdir() if path.is_dir()}  # fmt: skip
    assert not (found["step-22"] / name / "cfg.json").exists()
    alone = train(attrs.evolve(configs[0], checkpoints=attrs.evolve(configs[0].checkpoints, name="alone")))
    weights = "sae/sae_weights.safetensors"
    ours = result.results["0_l1_coefficient=1_seed=1"].folder
    assert (ours / weights).read_bytes() == (alone.folder / weights).read_bytes()


def test_a_sweep_of_which_one_diverged_is_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other goes on, the one stays where it was."""
    poison(monkeypatch, "l1_coefficient=2", 3)
    axes = {"sae.l1_coefficient": [1.0, 2.0]}
    results = []
    for name in ("whole", "part"):
        (tmp_path / name).mkdir()
        with contextlib.chdir(tmp_path / name):
            configs = saekit.grid(fake_config(Path("runs")), axes, plugins=manager())
            with pytest.warns(RuntimeWarning, match="is stopped") as caught:
                results.append(train(configs) if name == "whole" else stopped(configs, 12))
            assert len(caught) == 1
    with contextlib.chdir(tmp_path / "part"):
        whole, part = results[0], resume(Path("runs/run"))
    assert part.diverged == whole.diverged
    assert part.summary == whole.summary
    ours, theirs = (contents(tmp_path / name / "runs/run") for name in ("part", "whole"))
    assert {path for path in ours if not path.startswith("checkpoints/")} == {
        path for path in theirs if not path.startswith("checkpoints/")
    }
    assert all(ours[path] == theirs[path] for path in theirs if not path.startswith("checkpoints/"))


# ---- a step that is cut short


def test_a_second_ctrl_c_acts_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the middle of a step, which hangs; the SAEs are saved to look at, and nothing is claimed of going on."""
    config = fake_config(tmp_path, checkpoints={"name": "run", "n_checkpoints": 5})
    work, began = SAETrainer.train_on, []

    def hangs(trainer: SAETrainer, rows: Tensor) -> Any:
        found = work(trainer, rows)
        if trainer.step == 4:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.01)  # the first one is only noted
            began.append(time.monotonic())
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(20)
        return found

    with monkeypatch.context() as patch, pytest.raises(TrainingInterrupted) as caught:
        patch.setattr(SAETrainer, "train_on", hangs)
        train(config)
    assert time.monotonic() - began[0] < 10
    run = tmp_path / "run"
    assert caught.value.checkpoint == run / "checkpoints/step-3"
    assert str(caught.value) == (
        f"interrupted after 3 steps (1,024 tokens); the SAEs are saved in {run}/checkpoints/step-3, without what "
        f"training needs; go on from {run}/checkpoints/step-2 with: saekit train --resume {run}"
    )
    assert saekit.SAE.load(caught.value.checkpoint, plugins=manager()).d_sae == 64
    (tmp_path / "other").mkdir()
    resume(run)
    whole = train(config | {"checkpoints": {"folder": str(tmp_path / "other"), "name": "run", "n_checkpoints": 5}})
    ours, theirs = contents(run), contents(whole.folder)
    for path in ("metrics.jsonl", "sae/sae_weights.safetensors"):
        assert ours[path] == theirs[path]


def test_an_interrupt_while_the_source_works_is_nothing_to_go_on_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A second Ctrl-C may take a batch from the source that nobody trained on."""
    from saekit.data import ShuffleBuffer

    take = ShuffleBuffer.take
    taken = [0]

    def interrupted(buffer: ShuffleBuffer, n: int) -> Any:
        batch = take(buffer, n)
        taken[0] += 1
        if taken[0] == 6:
            raise KeyboardInterrupt
        return batch

    config = fake_config(tmp_path, checkpoints={"name": "run", "n_checkpoints": 5})
    with monkeypatch.context() as patch, pytest.raises(TrainingInterrupted) as caught:
        patch.setattr(ShuffleBuffer, "take", interrupted)
        train(config)
    assert caught.value.step == 5
    run = tmp_path / "run"
    assert caught.value.checkpoint in (None, run / "checkpoints/step-5")
    resume(run)
    whole = train(config | {"checkpoints": {"folder": str(tmp_path / "other"), "name": "run", "n_checkpoints": 5}})
    for path in ("metrics.jsonl", "sae/sae_weights.safetensors"):
        assert contents(run)[path] == contents(whole.folder)[path]


@pytest.mark.parametrize("sweep", [False, True])
def test_an_error_in_the_middle_of_a_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sweep: bool) -> None:
    """Some SAEs of a sweep have made it, others not: their SAEs are saved, and the run goes on from before."""
    config: Any = fake_config(tmp_path, checkpoints={"name": "run", "n_checkpoints": 5})
    if sweep:
        config = saekit.grid(config, {"sae.l1_coefficient": [1.0, 2.0]}, plugins=manager())
    work = SAETrainer.train_on

    def fails(trainer: SAETrainer, rows: Tensor) -> Any:
        if trainer.step == 3 and (not sweep or "=2" in trainer.name):
            raise RuntimeError("an architecture's fault")
        return work(trainer, rows)

    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="an architecture's fault") as caught:
        patch.setattr(SAETrainer, "train_on", fails)
        train(config)
    run = tmp_path / "run"
    assert caught.value.__notes__ == [
        f"the SAEs are saved in {run}/checkpoints/step-3, without what training needs; saekit train --resume {run} "
        f"goes on from {run}/checkpoints/step-2"
    ]
    for path in (run / "checkpoints/step-3").iterdir():
        assert saekit.SAE.load(path, plugins=manager()).d_sae == 64
    assert [path.name for path in all_checkpoints(run)] == ["step-2"]
    resume(run)
    assert newest_checkpoint(run).facts["finished"]


def test_an_error_right_after_a_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """That one is the run as it was before, and stays as it is."""
    config = fake_config(tmp_path, checkpoints={"name": "run", "every_minutes": 1e-9})
    work = SAETrainer.train_on

    def fails(trainer: SAETrainer, rows: Tensor) -> Any:
        if trainer.step == 3:
            raise RuntimeError("a fault")
        return work(trainer, rows)

    monkeypatch.setattr(SAETrainer, "train_on", fails)
    with pytest.raises(RuntimeError, match="a fault") as caught:
        train(config)
    run = tmp_path / "run"
    assert caught.value.__notes__ == [
        f"the run as it was before is in {run}/checkpoints/step-3; saekit train --resume {run} goes on from it"
    ]
    newest_checkpoint(run).verify()


def test_trackers_that_still_need_a_checkpoint(tmp_path: Path) -> None:
    """What one uploads is not removed under its hands."""
    seen: dict[str, bool] = {}

    class Slow:
        def __init__(self, config: object, run: saekit.RunInfo) -> None: ...

        def log(self, metrics: object, step: int) -> None: ...

        def log_checkpoint(self, folder: Path, step: int) -> None:
            time.sleep(0.05)
            seen[str(folder.relative_to(tmp_path / "run/checkpoints"))] = (folder / "cfg.json").is_file()

        def close(self) -> None: ...

    plugins = manager(None, fake_plugin("trackers", "slow", build=Slow))
    config = fake_config(tmp_path, checkpoints={"name": "run", "every_minutes": 1e-9}) | {"trackers": ["slow"]}
    train(config, plugins=plugins)
    assert seen == {f"step-{step}/sae": True for step in range(1, 12)}


def test_signals_outside_the_main_thread_are_left_alone(tmp_path: Path) -> None:
    import threading

    results: list[Any] = []
    before = signal.getsignal(signal.SIGTERM)
    thread = threading.Thread(target=lambda: results.append(train(fake_config(tmp_path))))
    thread.start()
    thread.join()
    assert results[0].metrics["evals/l0"] > 0
    assert signal.getsignal(signal.SIGTERM) == before
    train(fake_config(tmp_path, checkpoints={"name": "other"}))
    assert signal.getsignal(signal.SIGTERM) == before, "and in it, they are given back"
