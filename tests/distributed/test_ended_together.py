"""What comes to one of two processes beside its steps ends both at one place, or neither: writing, signals, metrics."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.spread_faults import ends

from saekit.files.names import hidden_name
from saekit.runs.checkpoints import newest_checkpoint

DATA, FEATURES = "distributed.features=1", "distributed.features=2"


@pytest.mark.processes
@pytest.mark.parametrize(("rank", "words"), [(0, DATA), (1, DATA), (0, FEATURES), (1, FEATURES)])
def test_a_slow_disk_ends_nothing(tmp_path: Path, rank: int, words: str) -> None:
    """One process takes longer to write than the others wait for it in a step."""
    found = ends(tmp_path, "slow", rank, words, "distributed.timeout_s=3", "checkpoints.n_checkpoints=1", step=5)
    assert found == [(0, found[0][1]), (0, "")]
    assert "error" not in found[0][1]
    assert newest_checkpoint(tmp_path / "run").facts["finished"]
    assert (tmp_path / "run/sae/cfg.json").exists()


@pytest.mark.processes
@pytest.mark.parametrize("rank", [0, 1])
def test_a_signal_saves_all_however_slow_one_is(tmp_path: Path, rank: int) -> None:
    """Its work has ended by then, and the others wait for what it writes."""
    first, second = ends(tmp_path, "slow and terminated", rank)
    assert (first[0], second) == (143, (143, "")), first[1]
    kept = newest_checkpoint(tmp_path / "run")
    assert kept.folder.name == f"step-{kept.facts['batches']}"
    assert first[1].startswith(f"interrupted after {kept.facts['batches']} steps")
    assert kept.facts["batches"] in (6, 7)


@pytest.mark.processes
@pytest.mark.parametrize("rank", [0, 1])
def test_a_checkpoint_is_written_although_one_fails_meanwhile(tmp_path: Path, rank: int) -> None:
    """Its own part, while the others wait for it in a step."""
    found = ends(tmp_path, "raises while writing", rank)
    assert [code for code, _ in found] == [1, 1]
    said = "".join(text for _, text in found)
    assert "a fault of an architecture" in said
    kept = newest_checkpoint(tmp_path / "run")
    assert kept.facts["batches"] >= 6
    kept.verify()


@pytest.mark.processes
@pytest.mark.parametrize("words", [DATA, FEATURES])
def test_a_want_of_memory_is_told_by_the_process_that_had_it(tmp_path: Path, words: str) -> None:
    """Also where the others wait for its part elsewhere, where they would for longer than this test lasts."""
    found = ends(tmp_path, "no memory", 1, words)
    assert [code for code, _ in found] == [1, 1]
    said = [text for _, text in found if text]
    assert len(said) == 1
    assert "no room for the whole" in said[0]
    assert "goes on from" in said[0]


@pytest.mark.processes
def test_a_source_that_fails_at_the_start_is_told_once(tmp_path: Path) -> None:
    found = ends(tmp_path, "no peek", 1, "sae.b_dec_init_method=mean")
    said = [text for _, text in found if text]
    assert len(said) == 1
    assert "a fault of a source" in said[0]
    assert not (tmp_path / "run").exists()


@pytest.mark.processes
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("place", ["saving", "evals"])
def test_a_signal_at_the_end_is_not_forgotten(tmp_path: Path, place: str, rank: int) -> None:
    first, second = ends(tmp_path, f"terminated in {place}", rank)
    assert (first[0], second[0]) == (143, 143)
    assert first[1].startswith("interrupted after 10 steps (640 tokens); saved in ")
    assert second[1] == ""
    assert (tmp_path / "run/sae/cfg.json").exists()
    assert newest_checkpoint(tmp_path / "run").folder.name == "step-10"


@pytest.mark.parametrize("words", [DATA, pytest.param(FEATURES, marks=pytest.mark.processes)])
def test_a_run_whose_folder_is_lost_is_saved_beside(tmp_path: Path, words: str) -> None:
    """All of it, by all processes, as one process saves it."""
    first, second = ends(tmp_path, "no folder", 0, words, RUN=str(tmp_path / "run"))
    assert (first[0], second) == (1, (1, ""))
    assert f"the folder {tmp_path}/run was removed, renamed or replaced" in first[1]
    kept = newest_checkpoint(tmp_path / "run-rescued-1")
    assert kept.facts["batches"] >= 6
    assert f"the run as it was before is in {kept.folder}" in first[1]
    assert f"saekit train --resume {tmp_path}/run-rescued-1 goes on from it" in first[1]


@pytest.mark.processes
def test_metrics_of_one_alone_are_refused(tmp_path: Path) -> None:
    first, second = ends(tmp_path, "odd metrics", step=1)
    assert (first[0], second) == (1, (1, ""))
    assert "process 1 of them gives others than the first: 'metrics/mine', which not the first has" in first[1]


@pytest.mark.processes
def test_nobody_looks_for_a_checkpoint_before_the_folder_is_tidy(tmp_path: Path) -> None:
    """A process that was killed had half replaced the newest, which comes back; else they would find two."""
    ends(tmp_path, "terminated")
    newest = newest_checkpoint(tmp_path / "run").folder
    newest.rename(newest.with_name(hidden_name(newest.name, "old")))
    first, second = ends(tmp_path, "slow to tidy", 0, "--resume", str(tmp_path / "run"))
    assert (first[0], second) == (0, (0, "")), first[1]
    assert newest_checkpoint(tmp_path / "run").facts["batches"] == 10
