"""What imports what: no circle of files, and rooms that do not know what they need not know.

Every import counts, those under ``TYPE_CHECKING`` and inside functions included.  A lazy ``__init__`` imports nothing;
who imports a name from it imports the file that its ``__init__.pyi`` names.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Protocol

import pytest

import saekit
from saekit import abilities as known_abilities
from saekit.kinds import KINDS

ROOT = Path(saekit.__file__).parent.parent
LONGEST_FILE, LONGEST_FUNCTION = 400, 60


@cache
def files() -> dict[str, Path]:
    """Every module of the kernel and the built-in plugins."""
    found = {}
    for base in (ROOT / "saekit", ROOT / "plugins" / "saekit_plugins"):
        for path in base.rglob("*.py"):
            parts = path.relative_to(base.parent).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


class Code:
    """What a source says, as far as a rule asks.  Its tree, which is large, is not kept."""

    def __init__(self, text: str) -> None:
        nodes = [*ast.walk(ast.parse(text))]
        self.n_lines = len(text.splitlines())
        self.imports = [node for node in nodes if isinstance(node, (ast.Import, ast.ImportFrom))]
        self.texts = literals(nodes)
        self.called = called(nodes)
        self.asked_by_name = asked_by_name(nodes)
        self.functions = [
            (node.name, node.end_lineno - node.lineno + 1)
            for node in nodes
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and node.end_lineno is not None
        ]


@cache
def code(module: str) -> Code:
    """Read once in a process, whatever is asked."""
    return Code(files()[module].read_text())


@cache
def face(module: str) -> dict[str, str]:
    """Of a lazy ``__init__``: public name to the module that it is from."""
    stub = files()[module].with_name("__init__.pyi")
    if files()[module].name != "__init__.py" or not stub.exists():
        return {}
    imports = [node for node in ast.parse(stub.read_text()).body if isinstance(node, ast.ImportFrom)]
    return {alias.name: f"{module}.{node.module}" for node in imports if node.module for alias in node.names}


def targets(node: ast.AST) -> Iterator[str]:
    """The modules that an import statement names, as far as they are known: others by their own name."""
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom) and node.module:
        for alias in node.names:
            inner = f"{node.module}.{alias.name}"
            if inner in files():
                yield inner
            elif node.module in files():
                yield origin(node.module, alias.name)
            else:
                yield node.module


def origin(module: str, name: str) -> str:
    """The module that ``name`` is from, which is imported from ``module``."""
    while name in face(module):
        module = face(module)[name]
    return module


@cache
def graph() -> dict[str, set[str]]:
    """Module to the modules that it imports."""
    return {
        module: {target for node in code(module).imports for target in targets(node)} - {module} for module in files()
    }


def circles(edges: dict[str, set[str]]) -> list[set[str]]:
    """The sets of modules that reach one another."""
    reached = {module: reachable(module, edges) for module in edges}
    found: list[set[str]] = []
    for module, others in reached.items():
        circle = {other for other in others if module in reached.get(other, ())}
        if circle and circle not in found:
            found.append(circle)
    return found


def reachable(start: str, edges: dict[str, set[str]]) -> set[str]:
    seen: set[str] = set()
    left = [start]
    while left:
        for module in edges.get(left.pop(), ()):
            if module not in seen:
                seen.add(module)
                left.append(module)
    return seen


def test_circles_are_found() -> None:
    edges = {"a": {"b"}, "b": {"c", "d"}, "c": {"a"}, "d": set(), "e": {"a"}}
    assert circles(edges) == [{"a", "b", "c"}]


def test_every_kind_of_import_counts() -> None:
    assert "saekit.sae.module" in graph()["saekit.pretrained.load"], "under TYPE_CHECKING"
    assert "saekit.runs.run" in graph()["saekit.commands.jobs"], "inside a function"
    assert "torch" in graph()["saekit.sae.module"]
    assert origin("saekit", "train") == "saekit.commands.jobs", "through a lazy face"


def test_there_is_no_circle_of_files() -> None:
    assert circles(graph()) == []


def inside(module: str, *rooms: str) -> bool:
    return any(module == room or module.startswith(f"{room}.") for room in rooms)


NEVERS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "the kernel imports no plugin": (("saekit",), ("saekit_plugins",)),
    "stages know no config file, manager or command": (
        ("saekit.data",),
        ("saekit.config.files", "saekit.config.converter", "saekit.plugins", "saekit.commands", "saekit.runs"),
    ),
    "training draws no pictures": (("saekit.training",), ("matplotlib", "saekit.analysis", "saekit.reports")),
    "training knows no run": (("saekit.training", "saekit.kernels", "saekit.sae"), ("saekit.runs", "saekit.commands")),
    "what is below commands knows none": (
        (
            "saekit.backends",
            "saekit.splicing",
            "saekit.evals",
            "saekit.analysis",
            "saekit.exports",
            "saekit.reports",
            "saekit.pretrained",
        ),
        ("saekit.commands", "saekit.cli"),
    ),
    "runs know no plan and no command": (("saekit.runs",), ("saekit.planning", "saekit.commands", "saekit.cli")),
    "plans know no command": (("saekit.planning",), ("saekit.commands", "saekit.cli")),
    "kinds and choices know no configuration": (
        ("saekit.kinds", "saekit.plugins.registry", "saekit.plugins.building", "saekit.plugins.choice"),
        ("saekit.config",),
    ),
}
"""Rule: the rooms that it is about, and what nothing in them imports."""


@pytest.mark.parametrize("rule", NEVERS)
def test_never(rule: str) -> None:
    rooms, others = NEVERS[rule]
    found = {
        f"{module} -> {target}"
        for module, imported in graph().items()
        for target in imported
        if inside(module, *rooms) and inside(target, *others)
    }
    assert not found


def kernel() -> list[str]:
    """Its modules."""
    return sorted(module for module in files() if inside(module, "saekit"))


def own(modules: set[str]) -> set[str]:
    return {module for module in modules if inside(module, "saekit")}


def test_modules_do_not_know_their_loaders() -> None:
    found = {
        f"{module} -> {known}"
        for module in files()
        if inside(module, "saekit.sae")
        for known in reachable(module, graph())
        if inside(known, "saekit.pretrained")
    }
    assert not found


def test_protocols_import_nothing_that_they_describe() -> None:
    """They speak of what travels, and so does everything on the ground."""
    travels = {"saekit.values", "saekit.site", "saekit.saved", "saekit.released", "saekit.converted"}
    travels |= {"saekit.measuring"}
    assert own(graph()["saekit.protocols"]) <= travels
    assert own(graph()["saekit.accumulates"]) <= travels | {"saekit.protocols"}
    assert not own(graph()["saekit.source_forwards"])
    parts = {"saekit.protocols", "saekit.accumulates", "saekit.source_forwards", "saekit.loader_abilities"}
    assert own(graph()["saekit.abilities"]) <= travels | parts
    assert own(graph()["saekit.converted"]) <= {"saekit.config.formats", "saekit.config.values"}
    assert own(graph()["saekit.released"]) <= {"saekit.errors", "saekit.files.paths"}
    ground = {"saekit.errors", "saekit.site", "saekit.forwards", "saekit.shapes", "saekit.tables"}
    assert own(graph()["saekit.values"]) <= ground
    assert own(graph()["saekit.forwards"]) <= {"saekit.shapes"}
    assert own(graph()["saekit.shapes"]) <= {"saekit.plugins.text"}
    assert not own(graph()["saekit.tables"]), "the ground itself"
    assert own(graph()["saekit.measuring"]) <= {
        "saekit.kernels.sparse",
        "saekit.reasons",
        "saekit.shapes",
        "saekit.site",
        "saekit.tables",
        "saekit.values",
    }
    known = {
        "saekit.errors",
        "saekit.site",
        "saekit.values",
        "saekit.defaults",
        "saekit.hub_files",
        "saekit.reasons",
        "saekit.shapes",
        "saekit.legacy",
        "saekit.weights",
    }
    assert own(graph()["saekit.weights"]) <= {
        "saekit.errors", "saekit.reasons", "saekit.files.mapped", "saekit.files.faults",
    }  # fmt: skip
    assert {module for module in own(graph()["saekit.saved"]) if not inside(module, "saekit.files")} <= known
    assert own(graph()["saekit.kinds"]) <= {"saekit.errors", "saekit.protocols", "saekit.transforms"}
    assert own(graph()["saekit.transforms"]) == set()


def abilities() -> set[str]:
    """What a plugin's object may have beside what its kind must have."""
    every = [found for found in vars(known_abilities).values() if isinstance(found, type) and Protocol in found.__mro__]
    of_kinds = {name for kind in KINDS.values() for name in (*kind.methods, *kind.values)}
    return {name for found in every for name in (*vars(found), *found.__annotations__) if name[0] != "_"} - of_kinds


def asked_by_name(nodes: list[ast.AST]) -> list[str]:
    """The attributes that ``getattr`` and ``hasattr`` are asked for, where these stand there as texts."""
    return [
        name.value
        for node in nodes
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("getattr", "hasattr")
        for name in node.args[1:2]
        if isinstance(name, ast.Constant)
    ]


def test_abilities_are_protocols_and_not_names() -> None:
    known = abilities()
    asked = {module: known & {*code(module).asked_by_name} for module in kernel()}
    assert not {module: names for module, names in asked.items() if names}


def test_a_name_that_is_asked_for_is_found() -> None:
    assert {"pause", "memory_bytes", "rows", "widths", "log_checkpoint", "conclude", "moments"} <= abilities()
    found = Code("if hasattr(a, 'rows'): getattr(b, c)(getattr(d, 'pause', None))").asked_by_name
    assert found == ["rows", "pause"]


def test_nobody_inside_imports_saekit_itself() -> None:
    found = [module for module, imported in graph().items() if inside(module, "saekit") and "saekit" in imported]
    named = [
        module
        for module in kernel()
        for node in code(module).imports
        if isinstance(node, ast.ImportFrom) and node.module == "saekit"
    ]
    assert found + named == []


def literals(nodes: list[ast.AST]) -> list[str]:
    """The texts in code, f-strings among them, that are not documentation."""
    documentation = {node.value for node in nodes if isinstance(node, ast.Expr)}
    return [
        node.value
        for node in nodes
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and node not in documentation
    ]


def called(nodes: list[ast.AST]) -> list[object]:
    """What stands in tables as their ``name``."""
    return [
        value.value
        for node in nodes
        if isinstance(node, ast.Dict)
        for key, value in zip(node.keys, node.values, strict=True)
        if isinstance(key, ast.Constant) and key.value == "name" and isinstance(value, ast.Constant)
    ]


WORDS = {"none", "reconstruction"}
"""Names of plugins that are words of other things, too."""


def named_plugins(source: Code) -> list[str]:
    """The plugins that code names: by qualified keys, as ``{"name": "cosine"}``, or as texts of their own."""
    keys = [found for text in source.texts for found in re.findall(r"saekit_plugins|\bsaekit:(?!\s)\S*", text)]
    words = [str(name) for name in source.called if name in WORDS]  # there they can mean nothing else
    names = built_in() - WORDS
    return keys + words + [text for text in source.texts if text in names]


@cache
def built_in() -> frozenset[str]:
    """The names of the plugins that come with saekit."""
    manager = saekit.default_manager()
    return frozenset(item.entry.name for kind in KINDS for item in manager.registry(kind).items)


def test_plugins_that_code_names_are_found() -> None:
    text = '''"""Such as saekit:cosine."""
a = "saekit:cosine"
b = f"saekit:{a}"
c = "an error of saekit: none"
d = {"name": "cosine", "end": 0.1}
e = {"name": "a run", "is": "none"}
e = {"name": "reconstruction"}
f = "saekit_plugins.loaders"
_CACHED, _WANDB = "cached", "wandb"
_CALLED = {"matryoshka_batchtopk": "matryoshka"}
if name in ("gated", "standard"): ...
["gemma_2", "/embedding/", "hook_embed"]
'''
    assert sorted(named_plugins(Code(text))) == sorted(
        ["cosine", "reconstruction", "saekit:", "saekit:cosine", "saekit_plugins", "cached", "wandb", "matryoshka",
         "gated", "standard", "gemma_2"]
    )  # fmt: skip


NAMED: dict[str, set[str]] = {
    "saekit.for_sae_lens": {"HookedTransformer"},  # a word of cfg.json, which sae-lens reads
    "saekit.sae.folder": {"transcoder", "expected_average_only_in"},  # likewise
    "saekit.values": {"expected_average_only_in"},
}
"""What other files name all the same."""


def test_the_kernel_names_plugins_in_one_file_of_defaults() -> None:
    named = {module: {*found} for module in kernel() if (found := named_plugins(code(module)))}
    defaults = named.pop("saekit.defaults")
    assert named == NAMED
    known = {item.key for kind in KINDS for item in saekit.default_manager().registry(kind).items}
    assert defaults <= known


def test_the_data_of_the_kernel_name_no_plugin() -> None:
    data = [*(ROOT / "saekit").rglob("*.json"), *(ROOT / "saekit").rglob("*.toml")]
    assert not {
        path.name: found for path in data if (found := {*re.findall(r'"(\w+)"', path.read_text())} & built_in())
    }


def test_short_files_and_functions() -> None:
    long = {}
    for module in files():
        if code(module).n_lines > LONGEST_FILE:
            long[module] = code(module).n_lines
        for function, length in code(module).functions:
            if length > LONGEST_FUNCTION:
                long[f"{module}.{function}"] = length
    assert not long
