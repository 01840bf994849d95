"""Saved SAEs of which each process had a part: the files are those that one process writes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file
from support.parted import ways_to_save
from support.processes import Call, together

import saekit
from saekit.sae.folder import CONFIG, PROBE, SPARSITY, WEIGHTS

MOST = {"start": 0.6, "save": 0.2, "load": 0.4, "resume": 0.6}
"""Of the whole that a process has beside what it had: of four parts one is 0.25, of two, as in ``resume``, 0.5."""


@pytest.fixture(scope="module", params=[2, 4], ids="{} parts".format)
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("parted")
    calls = {"saved": Call("support.parted:saved", 1, request.param, (str(folder), request.param == 2))}
    if request.param == 4:
        calls["peaks"] = Call("support.parted:peaks", 1, 4, (str(folder),))
    found = together(calls, request.param, folder / "calls")
    (folder / "peaks.json").write_text(json.dumps(found.get("peaks")))
    return folder


@pytest.mark.parametrize("name", [name for name, _, _ in ways_to_save()])
def test_the_files_are_those_of_one_process(name: str, saved: Path) -> None:
    if not (saved / f"{name}-one").exists():
        pytest.skip("two parts save some of what four do")
    parts, one = saved / f"{name}-parts", saved / f"{name}-one"
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


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the system does not tell the peak of memory")
def test_no_process_has_the_whole_in_memory(saved: Path) -> None:
    """Of 256 MB in four parts."""
    peaks = json.loads((saved / "peaks.json").read_text())
    for number, found in enumerate(peaks or []):
        for what, most in MOST.items():
            allowed = most + 0.3 * (what == "save" and number == 0)  # pieces of the others, as they come
            assert found[what] < allowed, (number, found)
