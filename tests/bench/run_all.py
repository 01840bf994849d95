"""All benches one after another, as `make bench` runs them, and their figures as tables in the documentation.

    python tests/bench/run_all.py [--peers PYTHON] [--only step live ...] [--machine NAME] [--minutes 25] [--docs ...]

``--peers`` is a Python with other libraries beside saekit.  Where there is too little time, benches make fewer rounds
than they should, and at last are ended; the page says so.  What fails, or has nothing to be compared with, is named at
the end, the rest is measured all the same, and the exit code is 1.  Two machines that are called the same share a page.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs
from figures import DISK, ENDS, FOLDER
from pages import Measured, write_pages

HERE = Path(__file__).parent
DOCS = HERE.parents[1] / "docs"
_SOFT = 0.8  # of its time, after which a bench begins no further rounds


@attrs.frozen
class Part:
    """A run of a script with these arguments, and about how many seconds it takes on two cores with AVX2."""

    arguments: str
    seconds: int


@attrs.frozen
class Bench:
    """A script and its runs."""

    name: str
    parts: tuple[Part, ...]
    peers: bool = True
    """Whether it runs beside other libraries, where they are."""

    @property
    def seconds(self) -> int:
        return sum(part.seconds for part in self.parts)


_LARGE = '--size large --leave-out reference int8 "sae-lens 3.0.0" dictionary_learning'
BENCHES = (
    Bench(
        "step",
        (
            Part("--size small --only standard topk inference --rounds 4", 90),
            Part('--size small --only dense gated matryoshka --rounds 2 --leave-out "sae-lens 3.0.0"', 45),
            Part(f"{_LARGE} --only standard topk --rounds 2", 105),
            Part(f"{_LARGE} --only inference --rounds 3", 45),
        ),
    ),
    Bench(
        "end_to_end",
        (
            Part("--only runs --shape topk-512 --tokens 73728 --rounds 1", 125),
            Part("--only runs --shape standard-128 --tokens 131072 --rounds 2", 40),
        ),
    ),
    Bench("checkpoint", (Part("--rounds 3", 30),)),
    Bench("plan_truth", (Part("--quick", 330),), peers=False),
    Bench("jitter", (Part("--only cached", 125), Part("--only live --steps 200", 30)), peers=False),
    Bench("processes", (Part("--rounds 2 --only topk", 70),), peers=False),
    Bench("startup", (Part("--runs 4 --few", 25),)),
    Bench(
        "gaps", (Part("demo training.training_tokens=100_000 training.lr_decay_steps=9 sae.l1_warm_up_steps=9", 40),)
    ),
    Bench("evals", (Part("--contexts 16 --rounds 1", 85),)),
    Bench("live", (Part("--only forward peer --rounds 1 --peer-buffer 8", 35),)),
    Bench("cached", (Part("--looking", 30),)),
    Bench("load", (Part("--gigabytes 0.25 --rounds 2 --only saekit", 25),)),
    Bench("backends", (Part("--contexts 128 --widths 512 --rounds 1", 28),)),
    Bench("splice", (Part("--only HookedTransformer --rounds 1 --forwards 2", 20),)),
    Bench("growth", (Part("--widths 4096 --batches --rounds 1", 15),)),
    Bench("tokenizing", (Part("--processes 1 --model 0 --contexts 1024 --rounds 1", 10),)),
)
"""What says how well features are found, and not how fast, is not among them, nor what needs a browser; nor, for want
of time, a cache beside that of another library, peaks of memory, shuffling and collecting features."""


class Budget:
    """All the time there is: each part has what it takes on two cores, and whatever those before it have left over.

    Where even that is not there, each has its share of what is.
    """

    def __init__(self, seconds: float, benches: Sequence[Bench]) -> None:
        self._ends, self._foreseen = time.perf_counter() + seconds, sum(bench.seconds for bench in benches)

    def taken_by(self, part: Part) -> float:
        """Seconds after which ``part``, which begins now, is ended."""
        left = max(self._ends - time.perf_counter(), 0.0)
        over = left - self._foreseen
        limit = part.seconds + over if over > 0 else part.seconds * left / self._foreseen
        self._foreseen -= part.seconds
        return limit


def run(bench: Bench, python: str, folder: Path, budget: Budget) -> str | None:
    """Run it; what went wrong, in words, or None."""
    told = []
    for part in bench.parts:
        limit = budget.taken_by(part)
        if problem := _run(bench.name, part, python, folder, limit):
            told.append(f"{part.arguments} {problem}".strip() if len(bench.parts) > 1 else problem)
    return "; ".join(told) or None


def _run(name: str, part: Part, python: str, folder: Path, limit: float) -> str | None:
    scratch = folder / "scratch"  # where one that is ended may leave something
    scratch.mkdir(exist_ok=True)
    disk = Path(tempfile.mkdtemp(prefix=".saekit-bench-", dir=Path.cwd()))  # one in memory is no disk
    environment = os.environ | {
        DISK: str(disk), FOLDER: str(folder), ENDS: str(time.time() + _SOFT * limit), "TMPDIR": str(scratch),
        "PYTHONUNBUFFERED": "1",
    }  # fmt: skip
    command = [python, "-W", "ignore", str(HERE / f"{name}.py"), *shlex.split(part.arguments)]
    try:
        process = subprocess.Popen(command, env=environment, start_new_session=True)
    except OSError as error:
        disk.rmdir()
        return f"could not be started: {error}"
    try:
        code = process.wait(timeout=limit)
    except subprocess.TimeoutExpired:
        return f"was ended after {limit:.0f} s, which is its part of the time"
    finally:  # with all that it has started
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        shutil.rmtree(scratch, ignore_errors=True)
        shutil.rmtree(disk, ignore_errors=True)
    return f"ended with exit code {code}" if code else None


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

    machine = looked_at()
    held = "" if machine.held_to is None else f", held to {machine.held_to}"
    return {**machine.to_dict(), "name": f"{name}{held}" if name else machine.name}


def all_of(benches: Sequence[Bench], peers: str, measured: Measured, seconds: float) -> dict[str, str]:
    """Run them in ``seconds``, and add what they find to ``measured``; what was wrong with which."""
    budget = Budget(seconds, benches)
    wrong: dict[str, str] = {}
    with tempfile.TemporaryDirectory(prefix="saekit-figures-") as place:
        for number, bench in enumerate(benches, 1):
            print(f"== {bench.name} ({number} of {len(benches)}, about {bench.seconds} s)", flush=True)
            began = time.perf_counter()
            problem = run(bench, peers if bench.peers else sys.executable, Path(place), budget)
            found = [*rows_in(Path(place), bench.name)]
            lacking = list(dict.fromkeys(row["missing"] for row in found if "missing" in row))
            told = ([problem] if problem else []) + [f"not installed: {', '.join(lacking)}"] * bool(lacking)
            if told:
                wrong[bench.name] = "; ".join(told)
            measured.add(
                bench.name,
                about=described(bench.name),
                command=[f"python tests/bench/{bench.name}.py {part.arguments}".strip() for part in bench.parts],
                rows=[row for row in found if "table" in row],
                cut=[row["cut"] for row in found if "cut" in row],
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
    parser.add_argument("--minutes", type=float, default=25.0, help="that all of it may take at most")
    parser.add_argument("--docs", type=Path, default=DOCS, help="where performance.md and figures/ are")
    asked = parser.parse_args()
    benches = [bench for bench in BENCHES if bench.name in asked.only]
    machine = this_machine(asked.machine)
    minutes = sum(bench.seconds for bench in benches) / 60
    print(
        f"{machine['name']}: {len(benches)} benches, about {minutes:.0f} minutes on two cores with AVX2, "
        f"{asked.minutes:g} at most",
        flush=True,
    )
    for ended in (signal.SIGTERM, signal.SIGHUP):  # as by who runs it, or with its terminal: no bench outlives it
        signal.signal(ended, lambda number, _: sys.exit(128 + number))
    measured, began, wrong = Measured.of(asked.docs, machine), time.perf_counter(), {}
    try:
        wrong = all_of(benches, asked.peers or sys.executable, measured, 60 * asked.minutes)
    finally:  # what was measured until it was stopped, too
        for page in write_pages(asked.docs, measured):
            print(f"written: {page}")
    print(f"in {(time.perf_counter() - began) / 60:.1f} minutes")
    for name, problem in wrong.items():
        print(f"{name}: {problem}")
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
