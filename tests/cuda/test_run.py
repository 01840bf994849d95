"""The script for a GPU works, as far as a CPU can show."""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import saekit
from saekit.kinds import SAE_ARCHITECTURES

HERE = Path(__file__).parent
MODULES = [path.stem for path in HERE.glob("*.py") if not path.stem.startswith("test_")]
SOME = ("topk", "abstopk", "crosscoder")


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """``run``, as the script itself has its modules: beside it."""
    monkeypatch.syspath_prepend(str(HERE))
    held = {name: sys.modules.pop(name) for name in MODULES if name in sys.modules}
    yield importlib.import_module("run")
    for name in MODULES:
        sys.modules.pop(name, None)
    sys.modules.update(held)


def test_every_part_runs_and_the_report_is_written(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cases = importlib.import_module("cases")
    monkeypatch.setattr(cases, "CASES", {name: cases.CASES[name] for name in SOME} | {
        name: cases.CASES[name] for name in ("standard", "batchtopk", "jumprelu")
    })  # fmt: skip
    parts = [name for name in script.PARTS if name != "tests"]  # which starts pytest
    arguments = ["--device", "cpu", "--quick", "--here", "--out", str(tmp_path), "--only", *parts]
    report = script.main(arguments)
    assert {name: found["ok"] for name, found in report["parts"].items()} == dict.fromkeys(parts, True), report
    assert json.loads((tmp_path / "cuda.json").read_text())["parts"].keys() == set(parts)
    text = (tmp_path / "cuda.md").read_text()
    assert "| steps | well |" in text
    assert "| case | well | worst | off by | way |" in text
    assert "| 16 -> 1024 | topk | fast kernels | bfloat16 |" in text
    assert report["machine"]["saekit"] == saekit.__version__


def test_a_step_that_is_another_is_seen(script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    right = importlib.import_module("right")
    made, rates = right.trainer_of, iter([1e-3, 1.0000001e-3])
    monkeypatch.setattr(right, "CASES", {"topk": right.CASES["topk"]})
    monkeypatch.setattr(right, "trainer_of", lambda *args, **more: made(*args, **more, lr=next(rates)))
    found = script.part("steps", "cpu", quick=True)
    assert not found["ok"]
    assert 1e-9 < found["rows"][0]["off by"] < 1e-6


def test_what_is_no_number_is_seen(script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wherever it is among the parameters."""
    right = importlib.import_module("right")
    made = right._trained

    def trained(options: Any, device: str, *sizes: int) -> Any:
        trainer = made(options, "cpu", *sizes)
        if device != "cpu":
            with torch.no_grad():
                trainer.sae.W_dec[3, 2] = torch.nan
        return trainer

    monkeypatch.setattr(right, "CASES", {"topk": right.CASES["topk"]})
    monkeypatch.setattr(right, "_trained", trained)
    found = script.part("steps", "another", quick=True)
    assert not found["ok"]
    row = found["rows"][0]
    assert (row["worst"], row["off by"]) == ("W_dec", float("inf"))


def test_what_waits_in_the_loop_or_the_buffer_is_seen(script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """As torch's watch says it, from the fifth batch on."""
    right, modes, fails = importlib.import_module("right"), ["default"], [""]

    def waiting(where: str, done: Any) -> Any:
        def call(*args: Any, **more: Any) -> Any:
            if where == fails[0] and modes[-1] == "error":
                raise RuntimeError(f"called a synchronizing CUDA operation in {where}")
            return done(*args, **more)

        return call

    monkeypatch.setattr(right, "CASES", {"topk": right.CASES["topk"], "transcoder": right.CASES["transcoder"]})
    monkeypatch.setattr(right.Batches, "watch", lambda self, mode: modes.append(mode))
    for where in ("add", "take"):
        monkeypatch.setattr(right.ShuffleBuffer, where, waiting(where, getattr(right.ShuffleBuffer, where)))
    monkeypatch.setattr(right.SAETrainer, "train_on", waiting("a step", right.SAETrainer.train_on))
    for where in ("", "add", "take", "a step"):
        fails[0] = where
        found = script.part("waits", "cpu", quick=True)
        assert [row["well"] for row in found["rows"]] == [not where] * 3
        assert all(where in row.get("error", "") for row in found["rows"])
    assert [(row["case"], row["precision"]) for row in found["rows"]] == [
        ("topk", ""), ("transcoder", ""), ("topk", "medium")
    ]  # fmt: skip
    assert modes == ["default", *["error", "default"] * 12]


@pytest.mark.parametrize(
    ("name", "teraflops"),
    [
        ("NVIDIA H100 80GB HBM3", 989), ("NVIDIA H100 PCIe", 756), ("NVIDIA H100 NVL", 835), ("NVIDIA H200", 989),
        ("NVIDIA GH200 480GB", 989), ("NVIDIA A100-SXM4-80GB", 312), ("NVIDIA L4", 121), ("NVIDIA L40S", 362),
        ("NVIDIA A10", 125), ("NVIDIA GeForce RTX 4090", 165), ("NVIDIA L40", None), ("NVIDIA A10G", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None), ("NVIDIA GeForce RTX 4090 D", None), ("NVIDIA H20", None),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", None), ("NVIDIA H200 NVL", 835),
    ],
)  # fmt: skip
def test_the_peak_is_that_of_the_gpu_or_none(
    name: str, teraflops: float | None, script: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    found = importlib.import_module("fast").peak("cuda")
    assert found == (None if teraflops is None else 1e12 * teraflops)


def test_every_architecture_that_trains_is_a_case(script: ModuleType) -> None:
    cases = importlib.import_module("cases")
    there = {item.entry.name for item in saekit.default_manager().registry(SAE_ARCHITECTURES).items}
    assert {options["name"] for options in cases.CASES.values()} == there - {"matching_pursuit", "temporal"}


PARTS = """
import os, subprocess, time
def steps(device, *, quick): raise ValueError(f"on {device}, quick: {quick}")
def waits(device, *, quick):
    subprocess.Popen(["sleep", "90"])  # whoever reads its output waits for it, unless it is ended, too
    yield {"d": 4.5}
    with open("started.new", "w") as file: file.write(str(os.getpid()))
    os.rename("started.new", "started")
    time.sleep(60)
def determinism(device, *, quick): os._exit(7)
def memory(device, *, quick): return {"ok": True, "rows": [{"a": 1.23456, "b": "x|y"}, {"c": 2}]}
"""


def test_a_part_that_fails_or_takes_too_long_ends_no_other(tmp_path: Path) -> None:
    shutil.copy(HERE / "run.py", tmp_path / "run.py")
    (tmp_path / "right.py").write_text(PARTS)
    (tmp_path / "torch.py").write_text("__version__ = 'none'")  # nothing here needs it
    only = ["--only", "steps", "waits", "determinism", "memory"]
    code = f"import run; run.PARTS['waits'] = 'right', 3.0; run.main(['--device', 'cpu', '--out', 'out', *{only}])"
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True, capture_output=True, timeout=60)
    parts: dict[str, Any] = json.loads((tmp_path / "out" / "cuda.json").read_text())["parts"]
    assert parts["steps"]["error"] == "ValueError: on cpu, quick: False"
    assert parts["waits"]["error"] == "took more than 3 seconds"
    assert parts["waits"]["rows"] == [{"d": 4.5}]
    assert parts["determinism"]["error"] == "its process ended with 7"
    assert parts["memory"]["ok"]
    text = (tmp_path / "out" / "cuda.md").read_text()
    assert "| a | b | c |\n| --- | --- | --- |\n| 1.23 | x\\|y |  |\n|  |  | 2 |" in text


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_no_part_outlives_the_script(sent: signal.Signals, tmp_path: Path) -> None:
    """Nor what a part has started."""
    shutil.copy(HERE / "run.py", tmp_path / "run.py")
    (tmp_path / "right.py").write_text(PARTS)
    (tmp_path / "torch.py").write_text("__version__ = 'none'")
    command = [sys.executable, "run.py", "--device", "cpu", "--only", "waits"]
    with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
        try:
            end = time.monotonic() + 30
            while not (tmp_path / "started").exists() and time.monotonic() < end:
                time.sleep(0.01)
            part = int((tmp_path / "started").read_text())
            process.send_signal(sent)
            process.communicate(timeout=30)  # until nobody holds its output any more
        finally:
            process.kill()
    assert process.returncode in (-sent, 128 + sent)
    with pytest.raises(ProcessLookupError):
        os.kill(part, 0)


def test_the_script_fails_where_a_part_does(tmp_path: Path) -> None:
    shutil.copy(HERE / "run.py", tmp_path / "run.py")
    (tmp_path / "right.py").write_text(PARTS)
    (tmp_path / "torch.py").write_text("__version__ = 'none'")
    command = [sys.executable, "run.py", "--device", "cpu", "--here", "--only"]
    codes = [subprocess.run([*command, name], cwd=tmp_path, check=False).returncode for name in ("steps", "memory")]
    assert codes == [1, 0]


def test_what_is_missing_is_unpacked_and_torch_never(script: ModuleType, tmp_path: Path) -> None:
    version = f"{sys.version_info.major}{sys.version_info.minor}"
    own = f"cp{version}"
    machine = f"manylinux2014_{platform.machine()}"
    for name in ("torch-2.13.0", "triton-3.9.0", "nvidia_cublas-1.0", "numpy-1.0", "broken_one-1.0"):
        (tmp_path / f"{name}-py3-none-any.whl").touch()
    tags = {
        "no_such": f"py{version}-none-any",
        "nor_this": f"{own}-{own}-{machine}",
        "old_one": "cp30-cp30-any",
    }
    for name, tag in tags.items():
        with zipfile.ZipFile(tmp_path / f"{name}-1.0-{tag}.whl", "w") as packed:
            packed.writestr(f"{name}/__init__.py", "x = 3")
            packed.writestr(f"{name}-1.0.dist-info/METADATA", f"Name: {name}\nVersion: 1.0\n")
            packed.writestr(f"{name}-1.0.data/purelib/{name}_too.py", "")
            packed.writestr(f"{name}-1.0.data/scripts/{name}", "")
    expected = ["broken_one-1.0-py3-none-any.whl: ", "old_one-1.0-cp30-cp30-any.whl is for another Python"]
    found = script.install(tmp_path, tmp_path / "target")
    assert [text.startswith(start) for text, start in zip(found, expected, strict=True)] == [True, True], found
    assert sorted(str(path.relative_to(tmp_path / "target")) for path in (tmp_path / "target").rglob("*.py")) == [
        "no_such/__init__.py", "no_such_too.py", "nor_this/__init__.py", "nor_this_too.py"
    ]  # fmt: skip


def test_saekit_of_the_bundle_takes_the_place_of_one_that_is_installed(script: ModuleType, tmp_path: Path) -> None:
    """And of what an earlier call has unpacked."""
    assert importlib.metadata.version("saekit")
    (tmp_path / "target" / "saekit-0.0.0.dist-info").mkdir(parents=True)
    with zipfile.ZipFile(tmp_path / "saekit-0.0.1-py3-none-any.whl", "w") as packed:
        packed.writestr("saekit-0.0.1.dist-info/METADATA", "Name: saekit\nVersion: 0.0.1\n")
    assert script.install(tmp_path, tmp_path / "target") == []
    assert [path.name for path in (tmp_path / "target").iterdir()] == ["saekit-0.0.1.dist-info"]
