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
    'figures.row("512 → 4,096", "saekit topk", {"peer 6 / it": 5.25})\n'
    'figures.row("512 → 4,096", "peer 6", {"µs per token": [2850.0, 2850.0, 2850.0], "about": "a|b <c>"})',
    "failing": 'figures.row("half", "saekit", {"seconds": 0.25})\nraise SystemExit(3)',
    "alone": 'figures.missing("sae-lens", "sparsify")\nfigures.row("own", "saekit", {"seconds": 12345})',
}


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
    monkeypatch.setattr(run_all, "BENCHES", tuple(run_all.Bench(name, 1) for name in SCRIPTS))
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
    assert said.splitlines()[0].startswith("Two cores, mine: 3 benches, about 0 minutes on two cores")
    assert said.splitlines()[-2:] == ["failing: ended with exit code 3", "alone: not installed: sae-lens, sparsify"]
    table = json.loads((docs / "figures" / "two-cores-mine.json").read_text(encoding="utf-8"))
    assert [*table["benches"]] == ["good", "failing", "alone"]
    assert table["machine"]["cores"] >= 1
    page = (docs / "figures" / "two-cores-mine.md").read_text(encoding="utf-8")
    assert "# Two cores, mine" in page
    assert "What good is." in page
    assert "| saekit topk | 54 (52.5–61) | 1.8 | 5.25 |  |" in page
    assert r"| peer 6 | 2,850 |  |  | a\|b \<c\> |" in page
    assert "Not whole: ended with exit code 3." in page
    assert "| saekit | 0.25 |" in page  # what it found before it failed
    assert "| saekit | 12,345 |" in page
    performance = (docs / "performance.md").read_text(encoding="utf-8")
    assert "| `good`: 512 → 4,096: saekit topk | **5.25** (54 µs, 1.8 mm1) |" in performance
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
    assert "saekit topk | **5.25** (54 µs, 1.8 mm1) | **7** (54 µs, 1.8 mm1) |" in performance
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
    found = made.run(made.Bench("good", 1), str(tmp_path / "nowhere"), tmp_path)
    assert found.startswith("could not be started: ")


@pytest.mark.parametrize(
    ("value", "shown"),
    [(0, "0"), (1234567, "1,234,567"), (0.000012, "1.2e-05"), (12.345, "12.3"), (1234.5, "1,234"), (-0.5, "-0.5")],
)
def test_numbers_of_tables(made: ModuleType, value: Any, shown: str) -> None:
    import pages

    assert pages._number(value) == shown


def test_every_bench_that_is_run_has_its_script_and_the_marks_are_in_the_docs() -> None:
    source = (HERE / "run_all.py").read_text(encoding="utf-8")
    names = [line.split('"')[1] for line in source.splitlines() if line.startswith("    Bench(")]
    assert len(names) > 15
    assert all((HERE / f"{name}.py").exists() for name in names)
    text = (HERE.parents[1] / "docs" / "performance.md").read_text(encoding="utf-8")
    assert all(text.count(mark) == 1 for mark in MARKS.split("\n\n")[1:3])
