"""What can be wrong with a file of JSON or YAML beside weights: faults by name, each with what is said of it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from support.bad_forms import Form
from support.bad_weights import Fault, in_bytes, marker

# ---- configurations


def _json(change: Callable[[dict[str, Any]], object]) -> Fault:
    def fault(path: Path, form: Form) -> None:
        table = json.loads(path.read_text())
        change(table)
        path.write_text(json.dumps(table))

    return fault


def _emptied(path: Path, form: Form) -> None:
    """Every field is there, and is a list of lists."""
    table = json.loads(path.read_text())
    path.write_text(json.dumps({name: [[name]] for name in table}))


_NO_JSON = "is not valid JSON"
JSON = {
    "no JSON": (in_bytes(b"{not json"), _NO_JSON),
    "empty": (in_bytes(b""), _NO_JSON),
    "no text": (in_bytes(b'{"a": "\xff\xfe"}'), _NO_JSON),
    "a list": (in_bytes(b"[1, 2]"), "holds list, expected an object"),
    "nested deep": (in_bytes(b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"), "is nested too deeply"),
    "a field twice": (in_bytes(b'{"d_in": 3, "d_in": 4}'), "gives 'd_in' twice"),
    "half a character": (in_bytes(b'{"hook_name": "\\ud800"}'), "not a text in Unicode"),
    "17 MB": (in_bytes(b'{"a": "' + b" " * (17 << 20) + b'"}'), "bytes, expected at most"),
    "digits without end": (in_bytes(b'{"d_in": ' + b"9" * 5000 + b"}"), _NO_JSON),
    "nothing in it": (in_bytes(b"{}"), "."),
    "lists for every field": (_emptied, "."),
}
_NO_YAML = "is not valid YAML"
YAML = {
    "no YAML": (in_bytes(b"a: [1, 2"), _NO_YAML),
    "no text": (in_bytes(b"a: \xff\xfe"), _NO_YAML),
    "a list": (in_bytes(b"- 1\n- 2\n"), "holds list, expected a table"),
    "nested deep": (in_bytes(b"[" * 20_000 + b"]" * 20_000), "is nested too deeply"),
    "code": (lambda path, form: path.write_text(f"a: !!python/object/apply:os.mkdir ['{marker(path)}']"), _NO_YAML),
    "names of names of names": (
        in_bytes(
            (
                "a0: &a0 [x]\n" + "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]\n" for n in range(1, 12))
            ).encode()
        ),
        "repetitions counted",
    ),
    "2 MB": (in_bytes(b"a: " + b"x" * (2 << 20)), "bytes, expected at most"),
    "lists for texts": (
        in_bytes(b"model_name: [1]\nfeature_input_hook: [2]\nfeature_output_hook: {}\n"),
        "expected a (text|table)",
    ),
}


def field(*path: str) -> Fault:
    """Another text in a field."""

    def change(table: dict[str, Any]) -> None:
        for name in path[:-1]:
            table = table[name]
        table[path[-1]] = "made-up-of-nothing"

    return _json(change)
