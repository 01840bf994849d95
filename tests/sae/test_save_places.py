"""Where an SAE is saved: nothing that is not an SAE's goes, whatever stands there, and nothing half saved loads."""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path

import pytest
import torch
from support import warm
from support.saved import FOREIGN, OWN, make, names, other, thesis

import saekit
from saekit import SAE
from saekit.errors import SAEFormatError, StorageError
from saekit.sae.folder import CONFIG, PROBE, WEIGHTS


def test_files_of_others_stay(tmp_path: Path) -> None:
    folder = thesis(tmp_path / "work")
    before = folder.stat().st_ino
    for sae in (make(), other(), make()):
        assert sae.save(folder) == folder
        assert torch.equal(SAE.load(folder).W_enc, sae.W_enc)
        assert names(folder) == FOREIGN | OWN
    assert folder.stat().st_ino == before, "the folder is the same one"
    assert (folder / "chapters" / "one.tex").read_text() == "more of it"
    sae = make()
    sae.log_sparsity = None
    sae.save(folder)
    assert names(folder) == FOREIGN | {CONFIG, PROBE, WEIGHTS}, (
        "sparsity of the SAE before does not pass for that of this"
    )
    assert SAE.load(folder).log_sparsity is None
    assert [path.name for path in tmp_path.iterdir()] == ["work"]


def test_the_current_folder(tmp_path: Path) -> None:
    """With files of others, with an SAE alone, and empty; it stays the folder that the process is in."""
    for number, foreign in enumerate((True, False)):
        folder = tmp_path / str(number)
        folder.mkdir()
        if foreign:
            thesis(folder)
        with contextlib.chdir(folder):
            for path in (".", Path(), folder, "../" + folder.name):
                make().save(path)
                assert Path().samefile(folder)
                assert SAE.load(".").d_sae == 30
            (folder / "deeper").mkdir()
            os.chdir("deeper")
            other().save("..")
            assert SAE.load("..").d_in == 7
        assert names(folder) - {"deeper"} == OWN | (FOREIGN if foreign else set())


def test_a_folder_of_an_sae_alone_is_swapped_whole(tmp_path: Path) -> None:
    folder = make().save(tmp_path / "new" / "and deep" / "sae")
    before = folder.stat().st_ino
    other().save(folder)
    assert folder.stat().st_ino != before
    assert SAE.load(folder).d_in == 7
    assert names(tmp_path) == {"new", "new/and deep", "new/and deep/sae", *(f"new/and deep/sae/{n}" for n in OWN)}


@pytest.mark.parametrize("alone", [True, False])
def test_a_link_to_a_folder_stays_one(tmp_path: Path, alone: bool) -> None:
    real = tmp_path / "disk" / "sae"
    if alone:
        make().save(real)
    else:
        thesis(real)
    (tmp_path / "link").symlink_to(real)
    other().save(tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert SAE.load(real).d_in == 7
    assert names(real) == OWN | (set() if alone else FOREIGN)


def run_of(tmp_path: Path) -> Path:
    run = tmp_path / "run"
    (run / "sae").mkdir(parents=True)
    (run / "a").mkdir()
    (run / "run.json").write_text(json.dumps({"format": 1, "saes": {"sae": ".", "a": "a"}, "in_memory": []}))
    (run / "checkpoints/step-3/sae").mkdir(parents=True)
    (run / "checkpoints/step-3/checkpoint.json").write_text(json.dumps({"format": 1, "saes": {"sae": {}}}))
    return run


@pytest.mark.parametrize(
    ("path", "told"),
    [
        ("file", "there is a file of that name; give a folder"),
        ("dangling", "it is a symbolic link to .*nowhere, which is not there"),
        ("to file", "there is a file of that name"),
        ("run", "it is a run folder; choose another folder, or a new one in it"),
        ("run/a", "it is a run folder"),
        ("run/checkpoints/step-3", "it is a checkpoint"),
        ("run/checkpoints/step-3/sae", "it is part of a checkpoint"),
        ("foreign", "the cfg.json in it is not an SAE's"),
        ("odd", "sae_weights.safetensors in it is not a file"),
        ("file/sae", "(Not a directory|File exists)"),
        ("x" * 300, "File name too long|has 300 bytes"),
        ("a\nb", "the name holds control characters"),
        ("null\0", "a path cannot hold a null character"),
    ],
)
def test_what_is_no_place_for_an_sae(tmp_path: Path, path: str, told: str) -> None:
    run_of(tmp_path)
    (tmp_path / "file").write_text("precious")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    (tmp_path / "to file").symlink_to(tmp_path / "file")
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign/cfg.json").write_text('{"theme": "dark"}')
    (tmp_path / "odd/sae_weights.safetensors").mkdir(parents=True)
    before = {name: (tmp_path / name).is_file() and (tmp_path / name).read_bytes() for name in names(tmp_path)}
    with pytest.raises(StorageError, match=told):
        make().save(tmp_path / path)
    assert before == {name: (tmp_path / name).is_file() and (tmp_path / name).read_bytes() for name in names(tmp_path)}


@pytest.mark.parametrize("alone", [True, False])
def test_what_was_measured_of_an_sae_goes_with_it(tmp_path: Path, alone: bool) -> None:
    folder = tmp_path / "work" if alone else thesis(tmp_path / "work")
    measured = json.dumps({"values": {}, "errors": {}, "about": {}})
    make().save(folder)
    (folder / "evals.json").write_text(measured)
    other().save(folder)
    assert names(folder) == OWN | (set() if alone else FOREIGN)
    (folder / "evals.json").write_text('{"somebody": "else"}')
    make().save(folder)
    assert (folder / "evals.json").read_text() == '{"somebody": "else"}'
    (folder / "evals.json").write_text(measured)
    (folder / CONFIG).unlink()
    make().save(folder)
    assert (folder / "evals.json").read_text() == measured, "there was no SAE that it could be of"


def test_the_sae_of_a_run_may_be_saved_again(tmp_path: Path) -> None:
    run = run_of(tmp_path)
    make().save(run / "sae")
    other().save(run / "sae")
    assert SAE.load(run / "sae").d_in == 7
    make().save(run / "another")


def test_a_full_disk_leaves_the_sae_that_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make().save(thesis(tmp_path / "work"))

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("saekit.sae.folder.save_tensors", full)
    with pytest.raises(StorageError, match="cannot save the SAE in .*work.*: .*No space left on device"):
        other().save(folder)
    assert SAE.load(folder).d_in == 12
    assert names(folder) == FOREIGN | OWN


KILLED = """
import json, os, shutil, signal, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from support.saved import make, other, thesis, names, FOREIGN
from saekit.errors import SAEFormatError
from saekit import SAE
home, alone = Path(sys.argv[2]), sys.argv[3] == "alone"
EVENTS = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.link")
seen = []
for number in range(1, 200):
    folder = home / str(number) / "work"
    folder.parent.mkdir()
    if not alone:
        thesis(folder)
    make().save(folder)
    child = os.fork()
    if not child:
        left = number
        def count(event, arguments):
            global left
            if event in EVENTS and str(folder.parent) in str(arguments[0]):
                left -= 1
                if not left:
                    os.kill(os.getpid(), signal.SIGKILL)
        sys.addaudithook(count)
        other().save(folder)
        os._exit(0)
    killed = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) != 0
    try:
        found = {12: "old", 7: "new"}[SAE.load(folder).d_in]
    except SAEFormatError as error:
        found = "refused"
    assert alone or FOREIGN <= names(folder)
    config = folder / "cfg.json"
    if config.exists():  # whoever reads it without checksums, as sae-lens does, must not be given a mixture either
        d_in = json.loads(config.read_text())["d_in"]
        from safetensors.torch import load_file
        assert load_file(folder / "sae_weights.safetensors")["W_enc"].shape[0] == d_in
    seen.append(found)
    make().save(folder)  # and nothing is in the way of the next
    assert SAE.load(folder).d_in == 12
    if not alone:
        assert not [name for name in names(folder) if name.endswith(".tmp")]
    if not killed:
        break
print(json.dumps(seen))
"""


@pytest.mark.parametrize("kind", ["alone", "among others"])
def test_a_kill_at_any_moment_leaves_no_mixture(tmp_path: Path, kind: str) -> None:
    done = warm.python("-c", KILLED, Path(__file__).parents[1], tmp_path, kind)
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout)
    assert len(seen) > 6
    assert (seen[0], seen[-1]) == ("old", "new")
    order = [state for number, state in enumerate(seen) if state != (seen[number - 1] if number else None)]
    assert order in (["old", "refused", "new"], ["old", "new"])


def test_an_sae_that_is_half_replaced_does_not_load(tmp_path: Path) -> None:
    """Weights of the one and the configuration of the other, whoever mixed them."""
    folder = make().save(tmp_path / "one")
    with torch.no_grad():
        changed = make()
        changed.W_dec.add_(1)
    changed.save(tmp_path / "two")
    (folder / WEIGHTS).write_bytes((tmp_path / "two" / WEIGHTS).read_bytes())
    with pytest.raises(SAEFormatError, match="is damaged or was changed"):
        saekit.SAE.load(folder)
