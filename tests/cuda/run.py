"""Everything that needs a GPU, in one go of less than eight minutes: what is right, and how fast it is.

    python run.py [--device cuda] [--out results] [--wheels wheels] [--only steps waits ...] [--minutes 8] [--quick]

On a bare machine with torch and Triton, `make cuda-bundle` has made the folder to start it in: what is missing is
installed from its wheels, into a folder of its own.  Each part runs in a process of its own with a time limit, and one
that fails or takes too long ends no other, and loses no row that it has found.  Writes `cuda.json` and
`cuda.md`, and ends with 1 if a part was not well.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import importlib.metadata
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import zipfile
from collections.abc import Callable, Generator, Iterable, Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
PARTS = {
    # the module, and seconds that it may take
    "steps": ("right", 90),
    "waits": ("right", 60),
    "determinism": ("right", 60),
    "memory": ("right", 45),
    "products": ("fast", 60),
    "speed": ("fast", 110),
    "peers": ("fast", 90),
    "tests": ("suite", 90),
}
"""The most important first: what does not fit into the time is left out, and said to be."""
REFUSED = re.compile(r"^(torch|triton|nvidia[_.-].*|pip|setuptools|wheel)$", re.IGNORECASE)


def missing(wheels: Path) -> list[Path]:
    """Those of ``wheels`` whose distribution is not installed, and that of saekit, which is what is tried; never torch
    itself."""
    found = []
    for wheel in sorted(wheels.glob("*.whl")):
        name = wheel.name.split("-")[0]
        if name == "saekit":
            found.append(wheel)
        elif not REFUSED.match(name):
            try:
                importlib.metadata.version(name.replace("_", "-"))
            except importlib.metadata.PackageNotFoundError:
                found.append(wheel)
    return found


def install(wheels: Path, target: Path) -> list[str]:
    """Unpack what is missing into ``target``, in seconds; what does not fit this machine is said.

    What an earlier call has left there goes.
    """
    troubles = []
    shutil.rmtree(target, ignore_errors=True)
    for wheel in missing(wheels):
        if not fits(wheel.stem):
            troubles.append(f"{wheel.name} is for another Python, or another kind of machine")
            continue
        try:
            unpack(wheel, target)
        except (OSError, zipfile.BadZipFile) as error:
            troubles.append(f"{wheel.name}: {error}")
    return troubles


def fits(name: str) -> bool:
    """Whether a wheel's tags, which end its name, are those of this Python and machine."""
    python, abi, system = name.split("-")[-3:]
    own = "".join(map(str, sys.version_info[:2]))
    by_python = bool({"py3", f"py{own}", f"cp{own}"} & {*python.split(".")}) or "abi3" in abi.split(".")
    return by_python and ("any" in system.split(".") or ("linux" in system and platform.machine() in system))


def unpack(wheel: Path, target: Path) -> None:
    """All that would be imported, and what says of it what it is."""
    with zipfile.ZipFile(wheel) as packed:
        for one in packed.infolist():
            place = re.sub(r"^[^/]+\.data/(purelib|platlib)/", "", one.filename)
            if ".data/" not in place and not one.is_dir():
                (target / place).parent.mkdir(parents=True, exist_ok=True)
                (target / place).write_bytes(packed.read(one))


class Stopped(SystemExit):
    """The script is to end."""


def stop(number: int, frame: object) -> None:
    """End because of a signal, and with it the part that runs."""
    raise Stopped(128 + number)


def part(
    name: str, device: str, *, quick: bool, tell: Callable[[dict[str, Any]], object] = lambda row: None
) -> dict[str, Any]:
    """What the part finds: ``ok``, ``rows`` for the table, and how long it took.  Each row is told when it is there."""
    started = time.monotonic()
    rows: list[dict[str, Any]] = []
    try:
        module = importlib.import_module(PARTS[name][0])
        found = getattr(module, name)(device, quick=quick)
        if isinstance(found, Generator):
            found = yield_from(found, rows, tell)
    except BaseException as error:
        if isinstance(error, (KeyboardInterrupt, Stopped)):
            raise
        found = {"ok": False, "error": f"{type(error).__name__}: {error}", "traceback": traceback.format_exc()}
    return {"rows": rows, **found, "seconds": round(time.monotonic() - started, 1)}


def yield_from(
    making: Generator[dict[str, Any], None, dict[str, Any]],
    rows: list[dict[str, Any]],
    tell: Callable[[dict[str, Any]], object],
) -> dict[str, Any]:
    """What ``making`` returns; what it yields is told, and goes to ``rows``."""
    while True:
        try:
            row = next(making)
        except StopIteration as end:
            return dict(end.value)
        rows.append(row)
        tell(row)


def alone(name: str, device: str, *, quick: bool, seconds: float, paths: Sequence[str]) -> dict[str, Any]:
    """The same in a process of its own, which may take so many ``seconds``."""
    with tempfile.TemporaryDirectory() as folder:
        told = Path(folder) / "found.jsonl"
        command = [sys.executable, str(HERE / "run.py"), "--part", name, "--device", device, "--told", str(told)]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([*paths, os.environ.get("PYTHONPATH", "")])}
        process = subprocess.Popen([*command, *["--quick"] * quick], env=environment, start_new_session=True)
        late = False
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            late = True
        finally:  # with all that it has started, also where this script is stopped: a GPU would stay in use
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        rows, found = told_in(told)
        if late:
            error = f"took more than {seconds:.0f} seconds"
            return {"ok": False, "error": error, "seconds": round(seconds, 1), "rows": rows}
        if found is None:
            return {"ok": False, "error": f"its process ended with {process.returncode}", "seconds": 0.0, "rows": rows}
        return {"rows": rows, **found}


def told_in(file: Path) -> tuple[list[dict[str, Any]], dict[str, Any] | None]:
    """The rows that a part has told, one a line, and what it has found in the end, if it came to that."""
    lines: list[dict[str, Any]] = []
    for line in file.read_text().splitlines() if file.exists() else []:
        with contextlib.suppress(json.JSONDecodeError):  # the last one, if it was ended in it
            lines.append(json.loads(line))
    return [line["row"] for line in lines if "row" in line], next(
        (line["found"] for line in lines if "found" in line), None
    )


def machine(device: str) -> dict[str, Any]:
    """What the figures are of."""
    import torch

    found: dict[str, Any] = {"python": platform.python_version(), "torch": torch.__version__, "device": device}
    for name in ("saekit", "triton", "sae-lens", "eai-sparsify"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    if device.startswith("cuda"):
        facts = torch.cuda.get_device_properties(device)
        found |= {"name": facts.name, "memory_gb": round(facts.total_memory / 1e9, 1), "cuda": torch.version.cuda}
    else:
        found["name"] = platform.processor() or platform.machine()
    return found


def markdown(report: dict[str, Any]) -> str:
    """The report as one table after another."""
    of = report["machine"]
    lines = [f"# saekit on {of['name']}", "", ", ".join(f"{key} {value}" for key, value in of.items()), ""]
    lines += ["| part | | seconds | |", "|---|---|---|---|"]
    for name, found in report["parts"].items():
        well = "well" if found["ok"] else "**not well**"
        lines.append(f"| {name} | {well} | {found['seconds']} | {found.get('error') or found.get('text', '')} |")
    for name, found in report["parts"].items():
        lines += ["", f"## {name}", "", *table(found["rows"])] if found.get("rows") else []
    return "\n".join(lines) + "\n"


def table(rows: Iterable[dict[str, Any]]) -> list[str]:
    """Rows with the same keys, or some of them."""
    rows = list(rows)
    keys = list(dict.fromkeys(key for row in rows for key in row))
    cells = [[_cell(row.get(key, "")) for key in keys] for row in rows]
    return [f"| {' | '.join(line)} |" for line in (keys, ["---"] * len(keys), *cells)]


def _cell(value: Any) -> str:
    text = f"{value:.3g}" if isinstance(value, float) else str(value)
    return text.replace("|", "\\|").replace("\n", " ")


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--out", type=Path, default=Path("cuda-results"))
    parser.add_argument("--wheels", type=Path, default=HERE / "wheels")
    parser.add_argument("--only", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--minutes", type=float, default=8.0)
    parser.add_argument("--quick", action="store_true", help="tiny, to see that all of it works")
    parser.add_argument("--here", action="store_true", help="all parts in this process, without time limits")
    parser.add_argument("--part", choices=list(PARTS), help=argparse.SUPPRESS)
    parser.add_argument("--told", type=Path, help=argparse.SUPPRESS)
    asked = parser.parse_args(arguments)
    if asked.part is not None:
        with asked.told.open("w") as file:

            def tell(**line: Any) -> None:
                print(json.dumps(line, default=str), file=file, flush=True)

            found = part(asked.part, asked.device, quick=asked.quick, tell=lambda row: tell(row=row))
            tell(found=found)
        return found
    started, end = time.monotonic(), time.monotonic() + 60 * asked.minutes
    target = asked.out / "installed"
    asked.out.mkdir(parents=True, exist_ok=True)
    troubles = install(asked.wheels, target) if asked.wheels.is_dir() else []
    paths = [str(target)] if target.is_dir() else []
    sys.path[:0] = [path for path in [*paths, str(HERE)] if path not in sys.path]
    importlib.invalidate_caches()
    report: dict[str, Any] = {"machine": machine(asked.device), "troubles": troubles, "parts": {}}
    for name in asked.only:
        left = end - time.monotonic() - 5
        if asked.here:
            found = part(name, asked.device, quick=asked.quick)
        elif left < 10:
            found = {"ok": False, "error": "no time was left", "seconds": 0.0}
        else:
            limit = min(PARTS[name][1], left)
            found = alone(name, asked.device, quick=asked.quick, seconds=limit, paths=[*paths, str(HERE)])
        report["parts"][name] = found
        report["seconds"] = round(time.monotonic() - started, 1)
        (asked.out / "cuda.json").write_text(json.dumps(report, indent=1, default=str))
        (asked.out / "cuda.md").write_text(markdown(report))
        print(f"{name}: {'well' if found['ok'] else found.get('error')} ({found['seconds']} s)", flush=True)
    return report


if __name__ == "__main__":
    for ended in (signal.SIGTERM, signal.SIGHUP):  # as by who runs it, or with its terminal: no part outlives it
        signal.signal(ended, stop)
    sys.exit(not all(found["ok"] for found in main().get("parts", {}).values()))
