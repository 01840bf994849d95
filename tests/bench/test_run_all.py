"""What `make bench` does around the benches: a failing one ends nothing, and figures become tables."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

HERE = Path(__file__).parent
MARKS = "before\n\n<!-- figures: every machine, written by make bench -->\n\n<!-- end of figures -->\n\nafter\n"
SCRIPTS = {
    "good": "times = figures.spread([54.0, 52.5, 61])\n"
    'figures.row("512 → 4,096", "saekit topk", {"µs per token": times, "× mm1": 1.8})\n'
    'figures.row("512 → 4,096", "saekit topk", {"peer 6 / it": 5.25, "other / it": 2.2})\n'
    'figures.row("512 → 4,096", "peer 6", {"µs per token": [2850.0, 2850.0, 2850.0], "about": "a|b <c>"})',
    "failing": 'figures.row("half", "saekit", {"seconds": 0.25})\nraise SystemExit(3)',
    "alone": 'figures.missing("sae-lens", "sparsify")\nfigures.row("own", "saekit", {"seconds": 12345})',
}


def made_bench(run_all: ModuleType, name: str) -> Any:
    return run_all.Bench(name, (run_all.Part("", 1),))


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[ModuleType]:
    """The module, for benches of a folder of their own."""
    monkeypatch.syspath_prepend(str(HERE))
    import run_all

    scripts, docs = tmp_path / "scripts", tmp_path / "docs"
    scripts.mkdir()
    docs.mkdir()
    (docs / "performance.md").write_text(MARKS, encoding="utf-8")
    (scripts / "figures.py").write_bytes((HERE / "figures.py").read_bytes())
    for name, body in SCRIPTS.items():
        (scripts / f"{name}.py").write_text(
            f'"""What {name} is.\n\nMore."""\nimport figures\n{body}\n', encoding="utf-8"
        )
    monkeypatch.setattr(run_all, "HERE", scripts)
    monkeypatch.setattr(run_all, "BENCHES", tuple(made_bench(run_all, name) for name in SCRIPTS))
    yield run_all
    for name in ("run_all", "pages", "figures"):
        sys.modules.pop(name, None)


def ran(made: ModuleType, monkeypatch: pytest.MonkeyPatch, docs: Path, *words: str) -> int:
    monkeypatch.setattr(sys, "argv", ["run_all.py", "--docs", str(docs), *words])
    with pytest.raises(SystemExit) as ended:
        made.main()
    return int(str(ended.value.code))


def test_what_fails_is_named_at_the_end_and_the_rest_is_measured(
    made: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    docs = tmp_path / "docs"
    assert ran(made, monkeypatch, docs, "--machine", "Two cores, mine") == 1
    said = capfd.readouterr().out
    assert said.splitlines()[0] == ("Two cores, mine: 3 benches, about 0 minutes on two cores with AVX2, 25 at most")
    assert said.splitlines()[-2:] == ["failing: ended with exit code 3", "alone: not installed: sae-lens, sparsify"]
    table = json.loads((docs / "figures" / "two-cores-mine.json").read_text(encoding="utf-8"))
    assert [*table["benches"]] == ["good", "failing", "alone"]
    assert table["machine"]["cores"] >= 1
    page = (docs / "figures" / "two-cores-mine.md").read_text(encoding="utf-8")
    assert "# Two cores, mine" in page
    assert "What good is." in page
    assert "| saekit topk | 54 (52.5–61) | 1.8 | 5.25 | 2.2 |  |" in page
    assert r"| peer 6 | 2,850 |  |  |  | a\|b \<c\> |" in page
    assert "Not whole: ended with exit code 3." in page
    assert "| saekit | 0.25 |" in page  # what it found before it failed
    assert "| saekit | 12,345 |" in page
    performance = (docs / "performance.md").read_text(encoding="utf-8")
    assert "| `good`: 512 → 4,096: saekit topk | **5.25** (54 µs, 1.8 mm1, 2.2 beside other) |" in performance
    assert performance.startswith("before\n")
    assert performance.endswith("\nafter\n")


def test_each_machine_has_a_column_and_what_is_measured_again_takes_the_place_of_what_was(
    made: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    docs = tmp_path / "docs"
    assert ran(made, monkeypatch, docs, "--machine", "A", "--only", "good") == 0
    assert ran(made, monkeypatch, docs, "--machine", "B", "--only", "alone") == 1
    script = tmp_path / "scripts" / "good.py"
    script.write_text(script.read_text(encoding="utf-8").replace("5.25", "7"), encoding="utf-8")
    assert ran(made, monkeypatch, docs, "--machine", "B", "--only", "good") == 0
    performance = (docs / "performance.md").read_text(encoding="utf-8")
    assert "|  | [A](figures/a.md) | [B](figures/b.md) |" in performance
    assert "saekit topk | **5.25** (54 µs, 1.8 mm1, 2.2 beside other) | **7** (54 " in performance
    assert performance.count("<!-- figures") == performance.count("<!-- end of figures") == 1
    page = (docs / "figures" / "b.md").read_text(encoding="utf-8")
    assert "| saekit | 12,345 |" in page  # of the run before


def test_marks_that_are_lost_are_said(made: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import pages

    with pytest.raises(SystemExit, match=r"docs/performance.md has lost its marks: '<!-- figures: every machine"):
        pages.with_columns("text\n", [])
    with pytest.raises(SystemExit, match=r"has lost its marks"):
        pages.with_columns(f"text\n{pages.BEGIN}\n", [])


def test_a_python_that_is_not_there(made: ModuleType, tmp_path: Path) -> None:
    bench = made_bench(made, "good")
    found = made.run(bench, str(tmp_path / "nowhere"), tmp_path, made.Budget(9, [bench]))
    assert found.startswith("could not be started: ")


SLOW = """import subprocess, sys, time
figures.row("half", "saekit", {"seconds": 0.25})
first = figures.late()
while not figures.late():
    time.sleep(0.01)
figures.cut(f"1 of 3 rounds, {first}")
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
print(child.pid, file=open(sys.argv[1], "w"), flush=True)
time.sleep(60)"""


def test_a_bench_that_takes_too_long_is_ended_with_all_that_it_started(
    made: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    child = tmp_path / "child"
    (tmp_path / "scripts" / "slow.py").write_text(f'"""Slow.\n\nMore."""\nimport figures\n{SLOW}\n', encoding="utf-8")
    slow = made.Bench("slow", (made.Part(str(child), 1), made.Part("", 0)))
    monkeypatch.setattr(made, "BENCHES", (slow, made_bench(made, "good")))
    assert ran(made, monkeypatch, tmp_path / "docs", "--machine", "A", "--minutes", str(2 / 60)) == 1
    assert capfd.readouterr().out.splitlines()[-1].startswith(f"slow: {child} was ended after 1 s, which is its part")
    page = (tmp_path / "docs" / "figures" / "a.md").read_text(encoding="utf-8")
    assert "For want of time: 1 of 3 rounds, False." in page
    assert "| saekit | 0.25 |" in page
    assert "was ended after 1 s, which is its part of the time" in page
    assert "| saekit topk | 54 (52.5–61) | 1.8 | 5.25 |" in page  # what came after it had its time
    status = Path("/proc", child.read_text().strip(), "stat")
    assert not status.exists() or status.read_text().rpartition(")")[2].split()[0] == "Z"


def test_time_that_is_left_over_is_for_those_that_follow(made: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(made.time, "perf_counter", lambda: now)
    first, second, third = (made.Part("", seconds) for seconds in (100, 300, 200))
    benches = [made.Bench("a", (first, second)), made.Bench("b", (third,))]
    budget = made.Budget(700, benches)
    assert budget.taken_by(first) == 200
    now += 150  # of which 50 were over
    assert budget.taken_by(second) == 350
    now += 350
    assert budget.taken_by(third) == 200
    slow = made.Budget(60, benches)
    assert [slow.taken_by(part) for part in (first,)] == [10]
    now += 10
    assert slow.taken_by(second) == 30


def test_a_machine_that_is_held_to_less_is_another_one(made: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    from saekit.runs import machine

    for name in machine._LIBRARIES:
        monkeypatch.delenv(name, raising=False)
    assert made.this_machine("Two cores")["name"] == "Two cores"
    for name in ("ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "MKL_ENABLE_INSTRUCTIONS"):
        monkeypatch.setenv(name, "avx2")
    assert made.this_machine("Two cores")["name"] == "Two cores, held to AVX2"
    assert ", held to AVX2, " in made.this_machine(None)["name"]


def test_all_benches_together_take_less_than_they_may(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(HERE))
    import run_all

    assert sum(bench.seconds for bench in run_all.BENCHES) <= 0.9 * 25 * 60
    assert all((HERE / f"{bench.name}.py").exists() for bench in run_all.BENCHES)
    for name in ("run_all", "pages", "figures"):
        sys.modules.pop(name, None)


@pytest.mark.parametrize(
    ("value", "shown"),
    [(0, "0"), (1234567, "1,234,567"), (0.000012, "1.2e-05"), (12.345, "12.3"), (1234.5, "1,234"), (-0.5, "-0.5")],
)
def test_numbers_of_tables(made: ModuleType, value: Any, shown: str) -> None:
    import pages

    assert pages._number(value) == shown


def test_what_stands_beside_what(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(HERE))
    import step

    monkeypatch.setattr(step, "version", lambda name: "6.5")
    steps = [
        "sparsify 1 topk",
        "sae-lens 6.5 topk",
        "sae-lens 3.0 topk",
        "saekit topk",
        "saekit topk, kernels = reference",
    ]
    assert step.beside("saekit topk", steps) == ["sae-lens 6.5 topk", "sparsify 1 topk", "sae-lens 3.0 topk"]
    uses = ["sae-lens 6.5 standard encode, decode", "sae-lens 6.5 standard encode", "saekit standard forward"]
    assert step.beside("saekit standard encode_sparse screened", uses) == uses[1:2]
    assert step.beside("saekit standard encode, decode", uses) == uses[:1]
    assert step.beside("saekit standard forward", uses) == uses[:1]
    for name in ("step", "common", "peers", "figures"):
        sys.modules.pop(name, None)


def test_the_marks_are_in_the_docs() -> None:
    text = (HERE.parents[1] / "docs" / "performance.md").read_text(encoding="utf-8")
    assert all(text.count(mark) == 1 for mark in MARKS.split("\n\n")[1:3])
