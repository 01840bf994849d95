"""Steps and streams of two commits, side by side: is the newer one slower?

    python tests/bench/commits.py OLD [NEW] [--rounds 40]

Each commit is installed in a folder of its own and its own benches are run by a process that waits between two calls;
a third process is of OLD again.  A round calls each of the three once, in an order that turns, so that what else the
machine does meets all of them.  Per case it prints the median of NEW / OLD with its 95 % interval (bootstrap), and
beside it the same of OLD / OLD, which is what two runs of one commit differ by.  Prints figures; it judges nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

CASES = (
    "step standard", "step topk", "step batchtopk", "inference standard", "stream live", "stream cached",
)  # fmt: skip


def cases_of(name: str, folder: Path) -> Iterator[tuple[str, Callable[[], object]]]:
    """What the benches of the commit that is installed offer for a case."""
    import cached
    import live
    import step
    import torch

    what, kind = name.split()
    if what == "stream" and kind == "live":
        yield name, live.live_case(live.language_model(), live.random_contexts(2048), live.HOOK, 4).run
    elif what == "stream":
        bench = cached.Bench(256, folder)
        bench.ours()
        yield name, lambda: bench.read_ours(prefetch=False)
    else:
        d_in, d_sae = step.SIZES["small"]
        x = torch.randn(step.BATCH, d_in, generator=torch.Generator().manual_seed(0))
        weights = step.shared_weights(d_in, d_sae, x, step.L0 if kind == "standard" else None)
        works = step.own_steps(kind, weights, x, False) if what == "step" else step.own_inference(kind, weights, x)
        yield from works.items()


def work(names: list[str], folder: Path) -> None:
    """Answers each line, the number of a case, with the seconds that it took."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what libraries print
    cases = [case for name in names for case in cases_of(name, folder)]
    for _, run in cases:
        run()
    answers.write("\t".join(name for name, _ in cases) + "\n")
    for line in sys.stdin:
        start = time.perf_counter()
        cases[int(line)][1]()
        answers.write(f"{time.perf_counter() - start}\n")


class Worker:
    """A process with one commit's benches."""

    def __init__(self, installed: Path, benches: Path, case: str, folder: Path) -> None:
        folder.mkdir()
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-W", "ignore", __file__, "--work", case, "--folder", str(folder)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1,
            env=os.environ | {"PYTHONPATH": f"{installed}{os.pathsep}{benches}"},
        )  # fmt: skip
        self.names = self._line().split("\t")

    def _line(self) -> str:
        assert self.process.stdout
        if not (line := self.process.stdout.readline()):
            raise SystemExit(f"the process of {self.process.args} ended")
        return line.rstrip("\n")

    def seconds(self, number: int) -> float:
        assert self.process.stdin
        self.process.stdin.write(f"{number}\n")
        return float(self._line())

    def close(self) -> None:
        assert self.process.stdin
        self.process.stdin.close()
        self.process.wait()


def install(commit: str, folder: Path) -> tuple[Path, Path]:
    """The folder that the commit is installed in, and that of its benches."""
    source, installed = folder / "source", folder / "installed"
    source.mkdir(parents=True)
    archive = subprocess.run(["git", "archive", commit], check=True, capture_output=True).stdout
    subprocess.run(["tar", "-x", "-C", source], input=archive, check=True)
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"]
    subprocess.run([*pip, "--target", installed, source], check=True)
    return installed, source / "tests/bench"


def shown(ratios: list[float]) -> str:
    """The median, and 95 % of the medians of samples that are drawn from ``ratios``."""
    draw = random.Random(0)
    medians = sorted(statistics.median(draw.choices(ratios, k=len(ratios))) for _ in range(2000))
    return f"{statistics.median(ratios):.3f} ({medians[49]:.3f}-{medians[-50]:.3f})"


def compare(case: str, commits: Mapping[str, tuple[Path, Path]], rounds: int, folder: Path) -> None:
    """Print a case's figures."""
    with contextlib.ExitStack() as stack:
        workers = {}
        for name in ("old", "new", "again"):
            worker = Worker(*commits["old" if name == "again" else name], case, folder / f"{case}-{name}")
            stack.callback(worker.close)
            workers[name] = worker
        for title in workers["old"].names:
            if title not in workers["new"].names:
                continue
            times: dict[str, list[float]] = {name: [] for name in workers}
            for turn in range(rounds + 2):
                order = list(workers)[turn % 3 :] + list(workers)[: turn % 3]
                for name in order:
                    place = workers[name].names.index(title)
                    times[name].append(workers[name].seconds(place))
            new, again = ([a / b for a, b in zip(times[k], times["old"], strict=True)][2:] for k in ("new", "again"))
            median = statistics.median(times["old"])
            print(f"  {title:45} {median * 1e3:7.1f} ms  {shown(new)}  {shown(again)}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old", nargs="?")
    parser.add_argument("new", nargs="?", default="HEAD")
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--only", nargs="+", choices=CASES, default=CASES)
    parser.add_argument("--work", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    asked: Any = parser.parse_args()
    if asked.work:
        work([asked.work], asked.folder)
        return
    if not asked.old:
        parser.error("OLD is missing: a commit")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        commits = {name: install(commit, folder / name) for name, commit in (("old", asked.old), ("new", asked.new))}
        print(f"old {asked.old}, new {asked.new}: a call of old, new / old, old / old; {asked.rounds} rounds")
        for case in asked.only:
            compare(case, commits, asked.rounds, folder)


if __name__ == "__main__":
    main()
