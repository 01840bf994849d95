"""A run folder of a stranger: nothing that is read from it leads out of it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from support.runs import fake_config, manager, resume, stopped

import saekit
from saekit.errors import ConfigError, StorageError
from saekit.runs.checkpoints import Checkpoint, _seal, newest_checkpoint
from saekit.runs.folder import run_folder
from saekit.runs.tracker_files import TrackerFiles

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was stopped."""
    folder = tmp_path_factory.mktemp("made")
    stopped(fake_config(folder), 3)
    return folder / "run"


@pytest.fixture
def place(tmp_path: Path, made: Path) -> Path:
    """A stranger's run, and beside it somebody's own run and files."""
    shutil.copytree(made, tmp_path / "own/run")
    (tmp_path / "own/run/sae").mkdir()
    (tmp_path / "own/run/sae/thesis.tex").write_text("years of work")
    (tmp_path / "own/run/.config.toml.0a1b2c3d.tmp").write_text("half written")
    (tmp_path / "own/run/metrics.jsonl").write_text("".join(f'{{"step": {n}}}\n' for n in range(9)))
    shutil.copytree(made, tmp_path / "theirs/run")
    return tmp_path


def everything(folder: Path) -> dict[str, bytes | str]:
    found: dict[str, bytes | str] = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        found[name] = str(path.readlink()) if path.is_symlink() else path.read_bytes() if path.is_file() else "folder"
    return found


def refused(place: Path, told: str) -> None:
    before = everything(place)
    with pytest.raises(StorageError, match=told):
        resume(place / "theirs/run")
    assert everything(place) == before, "not a byte is written"


@pytest.mark.parametrize(
    ("saes", "told"),
    [
        ({"sae": "../../own/run"}, "the folder '../../own/run' of the SAE sae is a path, not the name of one folder"),
        ({"sae": ".."}, "the folder '..' of the SAE sae names a folder that is there already"),
        ({"sae": "{own}"}, "of the SAE sae is a path"),
        ({"sae": "a/../../../own/run"}, "is a path"),
        ({"sae": "..\\..\\own"}, "is a path"),
        ({"sae": "checkpoints/step-3"}, "is a path"),
        ({"sae": ""}, "is not a name"),
        ({"sae": 3}, "is not a name"),
        ({"sae": None}, "is not a name"),
        ({"sae": ["."]}, "is not a name|cannot be read: TypeError"),
        ({"sae": "\ud800"}, "is not valid Unicode"),
        ({"sae": "x" * 256}, "has 256 bytes, and a file system takes at most 255"),
        ({"sae": "a\0b"}, "holds control characters"),
        ({"../../own/run": "."}, "the name of the SAE '../../own/run' is a path"),
        ({"sae": ".", "b": "b"}, "the folder '.' cannot be that of one SAE among several"),
        ({"a": "a", "b": "checkpoints"}, "the folder 'checkpoints' cannot be that of one SAE among several"),
        ({"a": "a", "b": "a"}, "several SAEs have one folder"),
        ({}, "it names no SAE"),
    ],
)
def test_only_folders_in_it_are_taken_from_a_record(place: Path, saes: dict[str, Any], told: str) -> None:
    own = str(place / "own/run")
    saes = {name: home.format(own=own) if isinstance(home, str) else home for name, home in saes.items()}
    record = place / "theirs/run/run.json"
    record.write_text(json.dumps({"format": 1, "saes": saes, "in_memory": []}))
    refused(place, told)


@pytest.mark.parametrize("in_memory", [["model", "../x"], [3], ["weights"]])
def test_what_else_is_in_a_record(place: Path, in_memory: list[Any]) -> None:
    record = place / "theirs/run/run.json"
    record.write_text(json.dumps({"format": 1, "saes": {"sae": "."}, "in_memory": in_memory}))
    refused(place, "in_memory holds")


def test_a_record_that_is_nested_too_deep(place: Path) -> None:
    (place / "theirs/run/run.json").write_text("[" * 100_000)
    refused(place, "run.json cannot be read: ValueError it is nested too deep")


@pytest.mark.parametrize("name", ["checkpoints", "config.toml", "sae", "checkpoints/step-3", "checkpoints/step-3/sae",
                                  "checkpoints/step-3/stream.json"])  # fmt: skip
def test_links_that_lead_out_are_not_followed(place: Path, name: str) -> None:
    link, own = place / "theirs/run" / name, place / "own/run" / name
    if link.is_dir():
        shutil.rmtree(link)
    else:
        link.unlink(missing_ok=True)
    link.symlink_to(own)
    refused(place, "is a symbolic link that leads out of it")


def test_a_home_that_is_a_link_out(place: Path) -> None:
    run = place / "theirs/run"
    (run / "run.json").write_text(json.dumps({"format": 1, "saes": {"sae": "elsewhere"}, "in_memory": []}))
    (run / "elsewhere").symlink_to(place / "own/run")
    refused(place, "is a symbolic link that leads out of it")


def test_a_run_may_be_reached_by_a_link_itself(place: Path) -> None:
    (place / "link").symlink_to(place / "theirs/run")
    assert resume(place / "link").metrics["details/n_training_tokens"] == 2700


@pytest.mark.parametrize("file", ["metrics.jsonl", "wandb-run-id.txt"])
def test_the_files_of_trackers_are_no_links(tmp_path: Path, file: str) -> None:
    (tmp_path / "precious").write_text('{"step": 9}\n')
    (tmp_path / file).symlink_to(tmp_path / "precious")
    info = saekit.RunInfo("run", tmp_path, {}, 3, TrackerFiles(tmp_path).path)
    with pytest.raises(ConfigError, match=f"the file '{file}' in the run folder is a symbolic link"):
        info.file(file)
    if file == "metrics.jsonl":
        with pytest.raises(ConfigError, match="is a symbolic link"):
            saekit.default_manager().build("trackers", "jsonl", run=info)
    assert (tmp_path / "precious").read_text() == '{"step": 9}\n'


def test_a_run_folder_that_cannot_be(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="the run folder .* cannot be read: .*File name too long"):
        resume(tmp_path / ("x" * 300))
    with pytest.raises(StorageError, match="there is no folder"):
        resume(tmp_path / "a\0b")


# ---- names in the manifest of a checkpoint


def resealed(checkpoint: Path, change: Any) -> None:
    table = json.loads((checkpoint / "checkpoint.json").read_text())
    change(table)
    table["sha256"] = _seal(table)
    (checkpoint / "checkpoint.json").write_text(json.dumps(table))


@pytest.mark.parametrize("name", ["../../own/run", "..", "/etc", "a/b", "", "x\n", "\ud800", "x" * 300])
def test_names_in_a_manifest(place: Path, name: str) -> None:
    run = place / "theirs/run"

    def rename(table: dict[str, Any]) -> None:
        table["saes"][name] = table["saes"].pop("sae")

    resealed(run / "checkpoints/step-3", rename)
    with pytest.raises(StorageError, match="the name .* of an SAE is not as saekit writes it"):
        Checkpoint.open(run / "checkpoints/step-3")
    with pytest.raises(StorageError, match="every checkpoint in .* is damaged"):
        newest_checkpoint(run)


@pytest.mark.parametrize("name", ["../../own/run/run.json", "/dev/zero", "sae/../../x", "a/b/c", "..", "other/x.json"])
def test_files_in_a_manifest(place: Path, name: str) -> None:
    run = place / "theirs/run"
    resealed(run / "checkpoints/step-3", lambda table: table["files"].update({name: "0" * 64}))
    with pytest.raises(StorageError, match="the file .* is not as saekit writes it"):
        Checkpoint.open(run / "checkpoints/step-3")


def test_a_link_in_a_checkpoint_is_not_read(place: Path) -> None:
    run = place / "theirs/run"
    (run / "checkpoints/step-3/stream.json").unlink()
    (run / "checkpoints/step-3/stream.json").symlink_to("/dev/zero")
    with pytest.raises(StorageError, match="stream.json is damaged"):
        Checkpoint.open(run / "checkpoints/step-3").verify()


# ---- names of new runs


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("a/b", "'a/b' is a path, not the name of one folder"),
        ("..", "'..' names a folder that is there already"),
        (".", "names a folder that is there already"),
        ("/tmp/run", "is a path, not the name of one folder"),
        ("a\\b", "is a path"),
        (" ", "' ' is not a name"),
        ("x" * 256, "has 256 bytes, and a file system takes at most 255"),
        ("ä" * 128, "has 256 bytes"),
        ("a\tb", "holds control characters"),
        (".run.0a1b2c3d.tmp", "is what saekit calls half-written files"),
    ],
)
def test_the_name_of_a_single_run(tmp_path: Path, name: str, told: str) -> None:
    config = fake_config(tmp_path / "runs", checkpoints={"name": name})
    with pytest.raises(ConfigError) as caught:
        saekit.train(config, plugins=manager())
    assert caught.value.problems[0][0] == "checkpoints.name"
    assert told in str(caught.value)
    assert str(caught.value).endswith("To keep runs elsewhere, set checkpoints.folder")
    assert not (tmp_path / "runs").exists()
    planned = saekit.plan(config, plugins=manager(), dataset=[{"text": "def f(): return 1\n" * 200}] * 50)
    assert any(told in problem for problem in planned.problems)


@pytest.mark.parametrize(
    ("option", "value", "told"),
    [
        ("folder", "runs\udce9", "expected a text, found half of a surrogate pair"),
        ("folder", "a\0b", "must be a path, which holds no null characters"),
        ("name", "run\udce9", "expected a text, found half of a surrogate pair"),
    ],
)
def test_where_runs_are_is_text(option: str, value: str, told: str) -> None:
    with pytest.raises(ConfigError, match=f"checkpoints.{option}: {told}"):
        saekit.load_config({"checkpoints": {option: value}}, plugins=manager())


def test_a_folder_of_runs_that_cannot_be(tmp_path: Path) -> None:
    config = saekit.load_config({"checkpoints": {"folder": str(tmp_path / ("x" * 300))}}, plugins=manager())
    for name in ("run", None):
        with pytest.raises(ConfigError, match="checkpoints.folder: .* cannot be used: File name too long"):
            run_folder(config, name)
    (tmp_path / "file").write_text("")
    config = saekit.load_config({"checkpoints": {"folder": str(tmp_path / "file")}}, plugins=manager())
    with pytest.raises(StorageError, match="cannot make a run folder in .*file: "):
        run_folder(config, None)


@pytest.mark.parametrize("hook", ["h" * 400, "ä" * 300, "model/layers/3", "a:b<c>|d?*", "a\\b\0c\nd"])
def test_names_made_of_sites_fit(tmp_path: Path, hook: str) -> None:
    config = saekit.load_config(
        {"checkpoints": {"folder": str(tmp_path)}, "site": {"hook_name": hook}}, plugins=manager()
    )
    folders = [run_folder(config, None) for _ in range(12)]
    assert len(set(folders)) == 12
    assert {folder.parent for folder in folders} == {tmp_path}
    for folder in folders:
        assert len(folder.name.encode()) <= 255
        assert not set('/\\:<>|?*"\0\n') & set(folder.name)


def test_the_longest_name_works(tmp_path: Path) -> None:
    config = fake_config(tmp_path, checkpoints={"name": "x" * 255, "n_checkpoints": 1})
    stopped(config, 3)
    assert resume(tmp_path / ("x" * 255)).metrics["details/n_training_tokens"] == 2700
