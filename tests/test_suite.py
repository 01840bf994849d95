"""The tests themselves: files of a readable length, none of which needs another."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

TESTS = Path(__file__).parent
FILES = [path for path in sorted(TESTS.rglob("*.py")) if "bench" not in path.relative_to(TESTS).parts]
LONGEST = 500


def imported(source: str) -> Iterator[str]:
    """The modules that a program names in its imports, wherever in it they stand."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module


def is_no_helper(module: str) -> bool:
    last = module.rpartition(".")[2]
    return last.startswith("test_") or last == "conftest"


def test_imports_are_found_wherever_they_stand() -> None:
    source = "import test_a\nif True:\n    from runs.test_b import x\ndef f():\n    import conftest, support.tiny"
    assert [module for module in imported(source) if is_no_helper(module)] == ["test_a", "runs.test_b", "conftest"]


def test_each_file_is_short_and_imports_no_other_test() -> None:
    found = {}
    for path in FILES:
        source = path.read_text(encoding="utf-8")
        if (length := len(source.splitlines())) > LONGEST:
            found[path.name] = f"has {length} lines"
        if others := [module for module in imported(source) if is_no_helper(module)]:
            found[path.name] = f"imports {others}: what several test files use belongs in tests/support"
    assert not found


def test_no_two_test_files_have_one_name() -> None:
    """They are modules of one process, known by their names alone."""
    names = [path.name for path in FILES if path.name.startswith("test_")]
    assert len(names) == len(set(names))
