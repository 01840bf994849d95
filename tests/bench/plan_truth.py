"""What `saekit plan` says that a run takes, in seconds and in memory, beside what the run takes (Linux, on the CPU).

    python tests/bench/plan_truth.py [--only NAME ...] [--quick] [--trace]

Of three shapes: that of GPT-2 small with TopK 768 -> 24576 (untrained), four layers of 512 with TopK 4096 (untrained),
and the embedded model with a standard SAE of 1024 features; and four such SAEs in one sweep.  Plan and run are
commands, each in its own process: times are from the start of the process on, and peaks are of all its memory, Python
and libraries included.  ``--trace`` shows the run's memory over time.  Prints figures; it judges nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from figures import cut, late, row

SHAPES: dict[str, tuple[dict[str, int] | None, list[str]]] = {
    "gpt2": (
        {"n_layer": 12, "n_embd": 768, "n_head": 12, "vocab_size": 50257},
        ["site.hook_name=blocks.8.hook_resid_pre", "sae.d_sae=24576", "training.training_tokens=40_960"],
    ),
    "512": (
        {"n_layer": 4, "n_embd": 512, "n_head": 8, "vocab_size": 2048},
        ["site.hook_name=blocks.2.hook_resid_post", "sae.d_sae=4096", "training.training_tokens=131_072"],
    ),
    "embedded": (None, ['sae={name="standard", d_sae=1024, l1_coefficient=1.0}', "training.training_tokens=200_000"]),
    "sweep": (None, ['sae={name="standard", d_sae=1024, l1_coefficient=1.0}', "training.training_tokens=131_072"]),
}  # fmt: skip
QUICK = {"gpt2": 24_576, "512": 65_536, "embedded": 120_000, "sweep": 65_536}  # tokens
GRIDS = {"sweep": (4, ["--grid", "sae.l1_coefficient=0.5,1.5,3,5"])}
"""Of shapes that are sweeps: how many SAEs, and which."""
COMMON = ["training.train_batch_size_tokens=4096", "training.lr_warm_up_steps=0", "training.lr_decay_steps=0"]
_CLOCK = """
import importlib.abc, importlib.util, sys, time
from pathlib import Path
class Clock(importlib.abc.MetaPathFinder):  # notes when steps end, and changes nothing of what is imported when
    def find_spec(self, name, path, target=None):
        if name != "saekit.training.trainer":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        load = spec.loader.exec_module
        def timed(module):
            load(module)
            step = module.SAETrainer.train_on
            def train_on(*given, **named):
                found = step(*given, **named)
                ends.append(time.time())
                return found
            module.SAETrainer.train_on = train_on
        spec.loader.exec_module = timed
        return spec
ends, clock, saes = [], sys.argv.pop(1), int(sys.argv.pop(1))
sys.meta_path.insert(0, Clock())
from saekit.cli import main
try:
    main()
finally:
    Path(clock).write_text(" ".join(map(str, (ends[saes - 1], ends[-1]))))
"""


def make_model(folder: str, shape: dict[str, int]) -> None:
    """An untrained model of the Hub's kind with the embedded model's tokenizer, in a folder."""
    import transformers
    from saekit_plugins.backends.hooked_transformer import EMBEDDED

    transformers.set_seed(0)
    config = transformers.GPT2Config(**shape, n_positions=128, bos_token_id=0, eos_token_id=0)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(EMBEDDED["saekit/tiny-python"]).save_pretrained(folder)


def command(arguments: list[str], *, trace: bool = False) -> tuple[str, float, float, float]:
    """What it prints, when it began, its seconds, and the most memory it had in MB."""
    begun = time.time()
    process = subprocess.Popen([sys.executable, "-W", "ignore", *arguments], stdout=subprocess.PIPE, text=True)
    if trace:
        threading.Thread(target=follow, args=(process.pid, begun), daemon=True).start()
    assert process.stdout is not None
    printed = process.stdout.read()
    _, status, used = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{arguments[:4]} ended with {status}: {printed}")
    return printed, begun, time.time() - begun, used.ru_maxrss * 1024 / 1e6


def follow(process: int, begun: float) -> None:
    """Print the memory of a process while it lasts, where it changes much."""
    last = 0.0
    while True:
        try:
            pages = int(Path(f"/proc/{process}/statm").read_text().split()[1])
        except (OSError, IndexError):
            return
        size = pages * os.sysconf("SC_PAGE_SIZE") / 1e6
        if abs(size - last) > 50:
            print(f"    {time.time() - begun:6.1f} s {size:7.0f} MB", flush=True)
            last = size
        time.sleep(0.05)


def measure(name: str, folder: Path, options: argparse.Namespace) -> None:
    shape, overrides = SHAPES[name]
    overrides = [*COMMON, *overrides, f"checkpoints.folder={folder / 'runs'}"]
    overrides += [f"training.training_tokens={QUICK[name]}"] * options.quick
    if shape is not None:
        if not (folder / name).exists():
            command([__file__, "--make", str(folder / name), json.dumps(shape)])
        overrides.append(f"model.name={folder / name}")
    config = folder / f"{name}.toml"
    config.write_text(command(["-m", "saekit.cli", "config", "--recipe", "laptop", *overrides])[0])
    saes, grid = GRIDS.get(name, (1, []))
    printed, _, plan_seconds, _ = command(["-m", "saekit.cli", "plan", str(config), *grid, "--json"])
    planned: dict[str, Any] = json.loads(printed)
    clock = folder / "clock"
    _, begun, seconds, peak = command(
        ["-c", _CLOCK, str(clock), str(saes), "train", str(config), *grid], trace=options.trace
    )
    first, last = (float(end) - begun for end in clock.read_text().split())
    numbers = planned["numbers"]
    print(f"{name}: planned in {plan_seconds:.1f} s")
    rows = {
        "first step": (numbers.get("first_step_seconds"), first, "s"),
        "last step": (numbers.get("last_step_seconds"), last, "s"),
        "end": (numbers.get("seconds"), seconds, "s"),
        "peak": (None if "peak_bytes" not in numbers else numbers["peak_bytes"] / 1e6, peak, "MB"),
    }
    for what, (said, found, unit) in rows.items():
        if said is None:
            print(f"  {what:10} planned: not told  measured {found:8.1f} {unit:2}")
        else:
            print(f"  {what:10} planned {said:8.1f} {unit:2}  measured {found:8.1f} {unit:2}  {said / found - 1:+6.1%}")
            figures = {f"planned, {unit}": said, f"measured, {unit}": found, "planned / measured": said / found}
            row("What a plan says", f"{name}, {what}", figures)
    for fact, text in planned["facts"].items():
        if fact.startswith(("memory on", "duration")):
            print(f"  {text}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--quick", action="store_true", help="of about half as many tokens")
    parser.add_argument("--trace", action="store_true")
    parser.add_argument("--folder", type=Path, help="where models and runs are kept; a temporary one by default")
    parser.add_argument("--make", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.make:
        make_model(options.make[0], json.loads(options.make[1]))
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = (options.folder or Path(temporary)).absolute()
        folder.mkdir(parents=True, exist_ok=True)
        for name in reversed(options.only):  # the smallest first
            if late():
                cut(f"the shape {name}")
            else:
                measure(name, folder, options)


if __name__ == "__main__":
    main()
