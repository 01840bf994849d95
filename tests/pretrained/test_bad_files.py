"""Files that are no SAE, of every format: each is refused by its name, nothing of it runs, and memory stays bounded."""

from __future__ import annotations

import re
import warnings
from pathlib import Path

import pytest
from support.bad_files import CORPUS, FORMS, good, make

from saekit import SAE
from saekit.errors import SAEFormatError, UnknownKeyError

MOST = 150 << 20
"""Bytes that may be needed to refuse a file of a few kilobytes."""


def peak(reset: bool = False) -> int:
    """The most memory that the process has had since ``reset``; 0 where the system does not tell."""
    try:
        if reset:
            Path("/proc/self/clear_refs").write_text("5")
        status = Path("/proc/self/status").read_text()
    except OSError:
        return 0
    return int(re.findall(r"VmHWM:\s+(\d+) kB", status)[0]) << 10


@pytest.mark.parametrize("name", FORMS)
def test_what_the_bad_ones_are_made_of_is_good(tmp_path: Path, name: str) -> None:
    assert SAE.load(good(FORMS[name], tmp_path / "sae"), loader=FORMS[name].loader).d_sae


def test_there_are_many() -> None:
    assert len(CORPUS) >= 150


@pytest.mark.parametrize("name", CORPUS)
def test_each_is_refused(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "sae"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch, about kinds of tensors that are made here
        bad = make(name, folder)
    before = peak(reset=True)
    with pytest.raises((SAEFormatError, UnknownKeyError)) as error:
        SAE.load(folder, loader=bad.form.loader)
    assert peak() - before < MOST
    told = str(error.value)
    assert str(folder) in told
    names = [Path(file).name for file in (bad.form.weights, bad.form.config) if file]
    others = (f"the architecture of the SAE in {folder}", f"{folder}, which has no files")
    assert any(text in told for text in (*names, *others)), told
    assert re.search(bad.told, told, re.DOTALL), told
    assert not list(tmp_path.rglob("executed"))
    assert not (tmp_path.parent / "evil").exists()


@pytest.mark.parametrize("form", ["dictionary_learning", "sparsify", "connor_rob_hook_z", "mwhanna"])
def test_an_option_leads_nowhere_else(tmp_path: Path, form: str) -> None:
    """A name out of the folder is none of its files, whatever is there."""
    folder = good(FORMS[form], tmp_path / "sae")
    good(FORMS[form], tmp_path / "other")
    other = Path("../other") / FORMS[form].weights
    for name in (other.as_posix(), other.with_suffix("").as_posix(), str(tmp_path / "other" / FORMS[form].weights)):
        with pytest.raises(SAEFormatError, match="has no (SAE|file) "):
            SAE.load(folder, loader={"name": form, "sae": name})
