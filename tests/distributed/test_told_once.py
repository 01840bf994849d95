"""What goes wrong in one of two processes is said once, by the command line, and ends both; none is left behind."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
from support.spread_faults import ends

from saekit.runs.checkpoints import newest_checkpoint


@pytest.mark.parametrize("rank", [pytest.param(0, marks=pytest.mark.processes), 1])
def test_an_exception_is_told_by_the_process_that_had_it(tmp_path: Path, rank: int) -> None:
    found = ends(tmp_path, "raises", rank)
    assert [code for code, _ in found] == [1, 1]
    said = found[rank][1]
    assert said.startswith("process 1: error: " if rank else "error: ")
    assert "a fault of an architecture" in said
    assert f"torchrun --nproc-per-node 2 --no-python saekit train --resume {tmp_path}/run goes on from" in said
    assert "Traceback" not in said
    assert found[1 - rank][1] == ""


def test_what_is_no_number_in_one_is_told_by_the_first_of_all(tmp_path: Path) -> None:
    first, second = ends(tmp_path, "nan")
    assert (first[0], second[0]) == (1, 1)
    assert first[1].startswith("error: the loss of site_0 is nan at step 6 (learning rate ")
    assert ", 64 activations of mean norm " in first[1], "those of the whole batch"
    assert f"The last good checkpoint is {tmp_path}/run/checkpoints/step-" in first[1]
    assert second[1] == ""


@pytest.mark.processes
@pytest.mark.parametrize(
    ("rank", "words"),
    [(1, "distributed.features=1"), (0, "distributed.features=2"), (0, "checkpoints.n_checkpoints=0")],
)
def test_a_full_disk_of_one_ends_all(tmp_path: Path, rank: int, words: str) -> None:
    """Where a checkpoint is written, or without them the SAE at the end, which the first process alone writes."""
    (first, said), second = ends(tmp_path, "full", rank, words)
    assert (first, second) == (1, (1, ""))
    if "n_checkpoints" in words:
        assert f"error: cannot write {tmp_path}/run/sae: No space left on device. What was there before" in said
        return
    whose = "of process 1: " if rank else ""
    assert said.startswith(f"error: {whose}cannot write a checkpoint: No space left on device. What was there before")
    assert said.count("No space left") == 1
    last = newest_checkpoint(tmp_path / "run")
    assert last.facts["batches"] < 6
    command = f"torchrun --nproc-per-node 2 --no-python saekit train --resume {tmp_path}/run"
    assert f"{command} goes on from {last.folder}" in said


@pytest.mark.processes
def test_signals_that_come_again_change_nothing(tmp_path: Path) -> None:
    """Of the cluster to each process, and of torchrun, which passes on what it gets."""
    first, second = ends(tmp_path, "terminated often")
    assert (first[0], second[0]) == (143, 143)
    assert first[1].startswith("interrupted after 6 steps (384 tokens); saved in ")
    assert second[1] == ""
    assert newest_checkpoint(tmp_path / "run").folder.name == "step-6"


@pytest.mark.parametrize("rank", [0, pytest.param(1, marks=pytest.mark.processes)])
def test_one_that_hangs_ends_the_other(tmp_path: Path, rank: int) -> None:
    """Also where it is the one that has what they tell each other by."""
    found = ends(tmp_path, "stopped", rank, "distributed.timeout_s=3", TORCHRUN="1")  # nobody but it is there by then
    assert [found[rank][0], found[1 - rank][0]] == [-signal.SIGKILL, 1]
    assert f"process {rank} has gone or hangs: it was killed or stopped, or its machine" in found[1 - rank][1]
    assert "goes on from" in found[1 - rank][1]


# ---- processes that are not alike


def plugin(folder: Path, version: str) -> str:
    """A folder of packages with a plugin that nobody chooses."""
    about = folder / f"odd-{version}.dist-info"
    about.mkdir(parents=True)
    (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: odd\nVersion: {version}\n")
    (about / "entry_points.txt").write_text("[saekit]\nodd = odd_plugin\n")
    (folder / "odd_plugin.py").write_text(
        "import attrs\nfrom saekit import Entry, hookimpl\n\n@attrs.frozen(kw_only=True)\nclass Odd:\n"
        '    """Odd."""\n\n@hookimpl\ndef saekit_register_lr_schedules():\n'
        "    return [Entry('odd', Odd, lambda config, **given: None)]\n"
    )
    return str(folder)


@pytest.mark.parametrize(
    ("theirs", "told"),
    [
        ("2.0", "lr_schedules odd:odd is '2.0', not '1.0'"),
        pytest.param("", "it has no lr_schedules odd:odd", marks=pytest.mark.processes),
    ],
)
def test_other_plugins_are_found_at_the_start(tmp_path: Path, theirs: str, told: str) -> None:
    """Another version, and none at all."""
    own, other = plugin(tmp_path / "old", "1.0"), plugin(tmp_path / "new", theirs) if theirs else ""
    first, second = ends(tmp_path, "none", PATH_0=own, PATH_1=other)
    assert (first[0], second[0]) == (2, 2), first[1] + second[1]
    assert "process 1 has another plugin than process 0: " in first[1]
    assert told in first[1]
    assert second[1] == ""
    assert not (tmp_path / "run").exists()


@pytest.mark.processes
@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("training.lr=0.5", "process 1 has another option than process 0: training.lr is 0.5, not 0.0004"),
        ("distributed.timeout_s=50", "distributed.timeout_s is 50"),
    ],
)
def test_other_options_are_found_at_the_start(tmp_path: Path, words: str, told: str) -> None:
    first, second = ends(tmp_path, "none", WORDS_1=words)
    assert (first[0], second[0]) == (2, 2)
    assert told in first[1]
    assert second[1] == ""
    assert not (tmp_path / "run").exists()
