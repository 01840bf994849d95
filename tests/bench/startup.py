"""How long commands and imports take to start, beside ``python -c pass``: interleaved, medians of ``--runs``.

    python tests/bench/startup.py

Prints figures; it judges nothing.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time

COMMANDS = {
    "python -c pass": ["-c", "pass"],
    "import saekit": ["-c", "import saekit"],
    "saekit --help": ["-m", "saekit.cli", "--help"],
    "saekit train nowhere.toml": ["-m", "saekit.cli", "train", "nowhere.toml"],
    "saekit train bad.toml": ["-m", "saekit.cli", "train", "bad.toml"],
    "saekit plugins": ["-m", "saekit.cli", "plugins"],
    "import torch": ["-c", "import torch"],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=11)
    runs = parser.parse_args().runs
    times: dict[str, list[float]] = {name: [] for name in COMMANDS}
    with tempfile.TemporaryDirectory() as folder:
        with open(f"{folder}/bad.toml", "w") as file:  # noqa: PTH123
            file.write('[training]\nlr = "fast"\n')
        for _ in range(runs + 1):  # the first round fills the caches and is not counted
            for name, command in COMMANDS.items():
                start = time.perf_counter()
                subprocess.run([sys.executable, *command], cwd=folder, capture_output=True, check=False)
                times[name].append(time.perf_counter() - start)
    print(f"{'':28} median   spread          beside python -c pass")
    base = statistics.median(times["python -c pass"][1:])
    for name, values in times.items():
        counted = sorted(values[1:])
        median = statistics.median(counted)
        print(f"{name:28} {median:.3f} s  {counted[0]:.3f}-{counted[-1]:.3f} s   +{median - base:.3f} s")


if __name__ == "__main__":
    main()
