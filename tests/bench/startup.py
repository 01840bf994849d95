"""How long commands, imports and mistakes take from the start of the process: interleaved, medians of ``--runs``.

    python tests/bench/startup.py

Prints figures; it judges nothing.  The processor's time (user and system) is beside that of the clock, since a machine
that does other things has a slow clock.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from figures import cut, late, row, spread

IMPORTS = {
    "python -c pass": ["-c", "pass"],
    "import saekit": ["-c", "import saekit"],
    "import torch": ["-c", "import torch"],
}
FEW = [["--help"], ["train", "bad.toml"], ["train", "model.name=./nowhere"], ["plan", "dataset.path=./nowhere"]]
COMMANDS = [
    ["--help"],
    ["plugins"],
    ["train", "nowhere.toml"],
    ["train", "bad.toml"],
    ["train", "--resume", "nowhere"],
    ["train", "run.toml", "--allow", "training.lr"],
    ["train", "dataset.path=./nowhere"],
    ["train", "model.name=./nowhere"],
    ["train", "checkpoints.name=taken"],
    ["train", "checkpoints.folder=bad.toml"],
    ["train", 'activations.source={name="cached", folder="nowhere"}'],
    ["train", "training.from_pretrained_path=nowhere"],
    ["train", "dataset.path=./nowhere", "--grid", "training.lr=1,2,3,4"],
    ["plan", "dataset.path=./nowhere"],
    ["cache", "dataset.path=./nowhere"],
    ["cache", "activations.cache.folder=runs"],
    ["cache", "verify", "nowhere"],
    ["pretokenize", "folder=runs"],
    ["pretokenize", "folder=new", "tokenizer=./nowhere"],
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=11)
    parser.add_argument("--few", action="store_true", help="a command of each kind")
    asked = parser.parse_args()
    runs = asked.runs
    script = Path(sys.executable).with_name("saekit")
    console = [str(script)] if script.exists() else [sys.executable, "-m", "saekit.cli"]
    commands = {name: [sys.executable, *arguments] for name, arguments in IMPORTS.items()}
    commands |= {
        f"saekit {' '.join(arguments)}": [*console, *arguments] for arguments in (FEW if asked.few else COMMANDS)
    }
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in commands}
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "bad.toml").write_text('[training]\nlr = "fast"\n')
        Path(folder, "run.toml").write_text("")
        Path(folder, "runs/taken").mkdir(parents=True)
        for number in range(runs + 1):  # the first round fills the caches and is not counted
            if number > 1 and late():
                cut(f"{number - 1} of {runs} rounds")
                break
            for name, command in commands.items():
                times[name].append(_timed(command, folder))
    width = max(map(len, times))
    print(f"{'':{width}}  median    spread          processor")
    for name, values in times.items():
        clock, processor = (sorted(column) for column in zip(*values[1:], strict=True))
        print(f"{name:{width}}  {statistics.median(clock):.3f} s   {clock[0]:.3f}-{clock[-1]:.3f} s   "
              f"{statistics.median(processor):.3f} s")  # fmt: skip
        seconds = {"seconds": spread(clock), "of the processor": statistics.median(processor)}
        row("from the start of the process to its end", name, seconds)


def _timed(command: list[str], folder: str) -> tuple[float, float]:
    """Seconds by the clock and of the processor."""
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run(command, cwd=folder, capture_output=True, check=False)
    seconds, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    return seconds, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


if __name__ == "__main__":
    main()
