"""Saved SAEs of which each process had a part: the files are those that one process writes."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from safetensors.torch import load_file
from support.parted import ways_to_save
from support.processes import Call, Results

import saekit
from saekit.sae.folder import CONFIG, PROBE, SPARSITY, WEIGHTS

MOST = {"start": 0.6, "save": 0.2, "load": 0.4, "resume": 0.6}
"""Of the whole that a process has beside what it had: of four parts one is 0.25, of two, as in ``resume``, 0.5."""
PEAKS = Path("/proc/self/clear_refs")
SIZE, FEW = 4, "float32, scaled"
EVERY = "SAEKIT_PROCESSES" in os.environ
WAYS = [
    (parts, name)
    for parts in ((4, 2) if EVERY else (2,))
    for name, _, way in ways_to_save()
    if parts == 4 or way == FEW
]


def calls(folder: Path) -> dict[str, Call]:
    """In one way two parts, each in two processes; and for `make test-processes` four parts, in every way."""
    made = {"2 parts": Call("support.parted:saved", 2, 2, (str(folder / "2"), FEW))}
    if EVERY:
        made["4 parts"] = Call("support.parted:saved", 1, 4, (str(folder / "4"), ""))
    if PEAKS.exists():
        made["peaks"] = Call("support.parted:peaks", 1, 4, (str(folder),))
    return made


@pytest.mark.parametrize(("n", "name"), WAYS)
def test_the_files_are_those_of_one_process(n: int, name: str, found: Results, folder: Path) -> None:
    parts, one = folder / f"{n}/{name}-parts", folder / f"{n}/{name}-one"
    assert {path.name for path in parts.iterdir()} == {CONFIG, WEIGHTS, SPARSITY, PROBE}
    for file in (WEIGHTS, SPARSITY):
        assert (parts / file).read_bytes() == (one / file).read_bytes(), file
    configs = [json.loads((folder / CONFIG).read_text()) for folder in (parts, one)]
    for config in configs:  # outputs of the probe are sums over parts
        assert config["saekit"]["sha256"].pop(PROBE)
    assert configs[0] == configs[1]
    mine, whole = load_file(parts / PROBE), load_file(one / PROBE)
    assert (mine["x"] == whole["x"]).all()
    if "bfloat16" not in name:  # in which another feature may be the largest
        assert (mine["l0"] == whole["l0"]).all()
        assert mine["output"].allclose(whole["output"], rtol=1e-3, atol=1e-3)
    sae = saekit.SAE.load(parts)
    assert sae.d_sae == 32


@pytest.mark.skipif(not PEAKS.exists(), reason="the system does not tell the peak of memory")
def test_no_process_has_the_whole_in_memory(found: Results) -> None:
    """Of 256 MB in four parts."""
    for number, peaks in enumerate(found["peaks"]):
        for what, most in MOST.items():
            allowed = most + 0.3 * (what == "save" and number == 0)  # pieces of the others, as they come
            assert peaks[what] < allowed, (number, peaks)
