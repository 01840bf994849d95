"""Where the processor's time of one `saekit train` goes, from the start of the process to its end (Linux, on the CPU).

    python tests/bench/end_to_end.py --only parts [--tokens 131072]

A TopK SAE 512 -> 4096 on block 2 of an untrained model of 4 layers and width 512, read from a folder, with evals and
pictures.  A thread looks every 5 ms at what each thread has used of the processor since, and charges it to what that
thread is at; its own time is left out.  The clock plays no part, so other work on the machine changes little.  Prints
figures; it judges nothing.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

from figures import row

PARTS = {
    "imports": ("importlib._bootstrap",),
    "pictures": ("reports/pictures.py",),
    "evals": ("evals/engine.py", "runs/measuring.py"),
    "the model's first loss": ("runs/first_loss.py",),
    "metrics of steps": ("training/metrics.py",),
    "steps": ("training/trainer.py:train_on",),
    "opening the model": ("runs/opening.py:open_backend",),
    "forwards": ("data/activations.py:_forward",),
    "text and tokenizing": ("data/activations.py:_next", "runs/session.py:held_out", "data/corpus.py"),
    "the buffer": ("data/buffer.py",),
    "first weights": ("runs/setup.py:give_weights",),
    "saving": ("runs/saving.py", "runs/checkpoints.py", "runs/writing.py", "files/checksums.py", "runs/trained.py"),
    "trackers and progress": ("runs/trackers.py", "saekit/progress.py", "saekit/status.py"),
}
"""The first whose words are in a frame of a stack has its time."""
REST = "the rest"
BATCH, PROMPTS, CONTEXT, BUFFER = 4096, 16, 128, 32
_EVERY = 0.005


class Looking:
    """Charges what the threads of this process use of the processor to :data:`PARTS`."""

    def __init__(self) -> None:
        self.seconds: Counter[str] = Counter()
        self.own = 0.0
        self._used: dict[int, float] = {}
        self._parts: dict[tuple[str, str], str | None] = {}
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._work, daemon=True)

    def __enter__(self) -> Looking:
        self._thread.start()
        return self

    def __exit__(self, *raised: object) -> None:
        self._ended.set()
        self._thread.join()

    def _work(self) -> None:
        me = threading.get_ident()
        while not self._ended.wait(_EVERY):
            frames = sys._current_frames()
            for ident, frame in frames.items():
                if ident == me:
                    continue
                try:
                    used = time.clock_gettime(time.pthread_getcpuclockid(ident))
                except OSError:  # it has ended
                    continue
                if (since := used - self._used.get(ident, 0.0)) > 0:
                    self.seconds[self.part_of(frame)] += since
                self._used[ident] = used
            del frames
            self.own = time.thread_time()

    def part_of(self, frame: FrameType | None) -> str:
        """Which of :data:`PARTS` is at work there: the first of them that any of its callers belongs to."""
        found = {self._part(one) for one in _callers(frame)}
        return next((name for name in PARTS if name in found), REST)

    def _part(self, frame: FrameType) -> str | None:
        key = frame.f_code.co_filename, frame.f_code.co_name
        if key not in self._parts:
            name = ":".join(key)
            self._parts[key] = next((part for part, words in PARTS.items() if any(one in name for one in words)), None)
        return self._parts[key]


def _callers(frame: FrameType | None) -> Iterator[FrameType]:
    while frame is not None:
        yield frame
        frame = frame.f_back


def look(found: str, arguments: list[str]) -> None:
    """In a process of its own: run ``saekit`` with ``arguments``, and write what was seen of it to a file."""
    sys.argv = ["saekit", *arguments]
    looking = Looking()
    try:
        with looking:
            from saekit.cli import main

            main()
    finally:
        whole = sum(os.times()[:2]) - looking.own
        Path(found).write_text(json.dumps({"whole": whole, "parts": looking.seconds}))


def table(seconds: dict[str, float], whole: float, tokens: int, made: int, needed: int, title: str) -> None:
    """Print the µs per token of each part; of the forwards, those that training takes are apart from the others."""
    parts = dict(seconds)
    forwards = parts.pop("forwards", 0.0)
    parts |= {f"{needed} forwards that training takes": forwards * needed / made}
    parts |= {f"{made - needed} other forwards": forwards * (1 - needed / made)}
    parts[REST] = whole - sum(parts.values()) + parts.get(REST, 0.0)
    alone = forwards * needed / made + parts.get("steps", 0.0)
    print(f"{title}: {whole:.1f} s of the processor, {whole / alone:.2f} x those forwards and the steps")
    for name, value in sorted(parts.items(), key=lambda item: -item[1]):
        print(f"  {value / tokens * 1e6:8.1f} µs/token  {value / whole:6.1%}  {name}", flush=True)
        row("Where a whole run's processor time goes", f"{title}, {name}", {"µs per token": value / tokens * 1e6})
    row("Where a whole run's processor time goes", title, {"whole / (model + steps)": whole / alone})


def measure(tokens: int) -> None:
    """Train on so many ``tokens`` with each way to refill the buffer, and print where the time went."""
    import plan_truth

    from saekit.planning.times import Served

    shape, overrides = plan_truth.SHAPES["512"]
    forward, steps = PROMPTS * CONTEXT, -(-tokens // BATCH)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        plan_truth.command([plan_truth.__file__, "--make", str(folder / "model"), json.dumps(shape)])
        given = [*plan_truth.COMMON, *overrides, f"training.training_tokens={tokens}",
                 f"model.name={folder / 'model'}", f"checkpoints.folder={folder / 'runs'}"]  # fmt: skip
        config = folder / "run.toml"
        config.write_text(plan_truth.command(["-m", "saekit.cli", "config", "--recipe", "laptop", *given])[0])
        for refill in ("full", "needed"):
            found = folder / f"{refill}.json"
            line = [__file__, str(found), "train", str(config), f"activations.source.refill={refill}"]
            subprocess.run([sys.executable, "-W", "ignore", *line], check=True, stdout=subprocess.DEVNULL)
            seen = json.loads(found.read_text())
            served = Served(
                capacity=BUFFER * forward, forward=forward, ahead=False, beside=False, needed=refill == "needed"
            )
            made, needed = served.forwards(BATCH, steps), -(-tokens // forward)
            table(seen["parts"], seen["whole"], tokens, made, needed, f"refill = {refill}")


if __name__ == "__main__":
    look(sys.argv[1], sys.argv[2:])
