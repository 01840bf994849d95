"""All benches one after another, as `make bench` runs them, and their figures as tables in the documentation.

    python tests/bench/run_all.py [--peers PYTHON] [--only step live ...] [--machine NAME] [--docs FOLDER]

``--peers`` is a Python with other libraries beside saekit.  What fails, or has nothing to be compared with, is named at
the end, the rest is measured all the same, and the exit code is 1.  Two machines that are called the same share a page.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs
from figures import FOLDER
from pages import Measured, write_pages

HERE = Path(__file__).parent
DOCS = HERE.parents[1] / "docs"
_PATIENCE = 5  # times as long as it takes on two cores with AVX2, and a quarter of an hour


@attrs.frozen
class Bench:
    """A script, the arguments of each of its runs, and about how many seconds all of them take on two cores."""

    name: str
    seconds: int
    runs: tuple[str, ...] = ("",)
    peers: bool = True
    """Whether it runs beside other libraries, where they are."""


BENCHES = (
    Bench("startup", 30, ("--runs 3",)),
    Bench("gaps", 60, ("demo training.training_tokens=300_000 training.lr_decay_steps=30",)),
    Bench("shuffle", 10),
    Bench("backends", 50, ("--contexts 128 --rounds 3",)),
    Bench("tokenizing", 40, ("--processes 1 --model 0 10 --rounds 1",)),
    Bench("live", 60, ("--rounds 4 --peer-buffer 24",)),
    Bench("cached", 60, ("--contexts 1024",)),
    Bench("memory", 60, ("--only peak evals",)),
    Bench("load", 40, ("--gigabytes 0.5 --rounds 3 --only saekit",)),
    Bench("checkpoint", 60, ("--rounds 3",)),
    Bench("step", 420, ("--size small --rounds 3", "--size large --only standard topk inference --rounds 1")),
    Bench("splice", 50, ("--rounds 2 --forwards 2",)),
    Bench("evals", 90, ("--contexts 16 --rounds 2",)),
    Bench("end_to_end", 250, ("--only runs --tokens 98304 --rounds 1", "--only parts --tokens 98304")),
    Bench("growth", 70, ("--widths 4096 16384 65536 --batches --rounds 1",)),
    Bench("dead_features", 40, ("--seeds 1 --batches 150 --only topk",)),
    Bench("toy_models", 30, ("--seeds 1",)),
    Bench("features", 30, ("--tokens 100_000",), peers=False),
    Bench("tsea", 60, ("--parts booleans ours many",), peers=False),
    Bench("dashboard_server", 60, peers=False),
    Bench("processes", 60, ("--rounds 2",), peers=False),
    Bench("plan_truth", 240, peers=False),
    Bench("jitter", 150, peers=False),
)


def run(bench: Bench, python: str, folder: Path) -> str | None:
    """Run it; what went wrong, in words, or None."""
    environment = os.environ | {FOLDER: str(folder), "PYTHONUNBUFFERED": "1"}
    for arguments in bench.runs:
        command = [python, "-W", "ignore", str(HERE / f"{bench.name}.py"), *arguments.split()]
        limit = _PATIENCE * bench.seconds + 900
        try:
            code = subprocess.run(command, env=environment, check=False, timeout=limit).returncode
        except subprocess.TimeoutExpired:
            return f"did not end in {limit} seconds"
        except OSError as error:
            return f"could not be started: {error}"
        if code:
            return f"ended with exit code {code}"
    return None


def rows_in(folder: Path, name: str) -> Iterator[dict[str, Any]]:
    """What a bench has written."""
    file = folder / f"{name}.jsonl"
    for line in file.read_text(encoding="utf-8").splitlines() if file.exists() else ():
        yield json.loads(line)


def described(name: str) -> str:
    """The first words of a script's docstring."""
    source = (HERE / f"{name}.py").read_text(encoding="utf-8")
    return " ".join(source.split('"""')[1].split("\n\n")[0].split())


def this_machine(name: str | None) -> Mapping[str, Any]:
    from saekit.runs.machine import this_machine as looked_at

    found = looked_at().to_dict()
    return {**found, "name": name or found["name"]}


def all_of(benches: Sequence[Bench], peers: str, measured: Measured) -> dict[str, str]:
    """Run them, and add what they find to ``measured``; what was wrong with which."""
    wrong: dict[str, str] = {}
    with tempfile.TemporaryDirectory(prefix="saekit-figures-") as place:
        for number, bench in enumerate(benches, 1):
            print(f"== {bench.name} ({number} of {len(benches)}, about {bench.seconds} s)", flush=True)
            began = time.perf_counter()
            problem = run(bench, peers if bench.peers else sys.executable, Path(place))
            found = [*rows_in(Path(place), bench.name)]
            lacking = list(dict.fromkeys(row["missing"] for row in found if "missing" in row))
            told = ([problem] if problem else []) + [f"not installed: {', '.join(lacking)}"] * bool(lacking)
            if told:
                wrong[bench.name] = "; ".join(told)
            measured.add(
                bench.name,
                about=described(bench.name),
                command=[f"python tests/bench/{bench.name}.py {one}".strip() for one in bench.runs],
                rows=[row for row in found if "missing" not in row],
                seconds=round(time.perf_counter() - began),
                wrong=wrong.get(bench.name),
            )
    return wrong


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [bench.name for bench in BENCHES]
    parser.add_argument("--peers", default="", help="a Python with other libraries; without it they are left out")
    parser.add_argument("--only", nargs="+", choices=names, default=names)
    parser.add_argument("--machine", help="what to call this machine; by default what it says of itself")
    parser.add_argument("--docs", type=Path, default=DOCS, help="where performance.md and figures/ are")
    asked = parser.parse_args()
    benches = [bench for bench in BENCHES if bench.name in asked.only]
    machine = this_machine(asked.machine)
    minutes = sum(bench.seconds for bench in benches) / 60
    print(f"{machine['name']}: {len(benches)} benches, about {minutes:.0f} minutes on two cores with AVX2", flush=True)
    measured, began, wrong = Measured.of(asked.docs, machine), time.perf_counter(), {}
    try:
        wrong = all_of(benches, asked.peers or sys.executable, measured)
    finally:  # what was measured until it was stopped, too
        for page in write_pages(asked.docs, measured):
            print(f"written: {page}")
    print(f"in {(time.perf_counter() - began) / 60:.1f} minutes")
    for name, problem in wrong.items():
        print(f"{name}: {problem}")
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
