"""Write ``reference/api*.generated.md`` from the public names of ``__init__.pyi`` files and of the built-in plugins."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable
from pathlib import Path

import attrs

import saekit
import saekit.config
from saekit.kinds import KINDS
from saekit.testing import isolated_manager

FOLDER = Path(__file__).parent / "reference"
SECTIONS = {
    "What saekit does": ("commands", "runs.sweep", "splicing", "backends", "analysis"),
    "What runs leave behind": ("runs", "evals", "reports"),
    "SAEs": ("sae", "pretrained", "site"),
    "Configuration": ("config",),
    "Plugins": ("plugins",),
    "What travels": ("values",),
    "Errors": ("errors",),
}
"""Heading: the modules whose public names stand below it."""
SILENT = ("__init__", "__hash__", "__eq__", "__repr__")
OTHER = "More"


def public_names(package: str) -> dict[str, str]:
    """Public name of ``package`` to the module that it is from, as its ``__init__.pyi`` says."""
    stub = Path(saekit.__file__).parents[1].joinpath(*package.split("."), "__init__.pyi")
    imports = [node for node in ast.parse(stub.read_text(encoding="utf-8")).body if isinstance(node, ast.ImportFrom)]
    named = [node for node in imports if node.module]
    return {alias.name: node.module or "" for node in named for alias in node.names if alias.name[0] != "_"}


def public_modules(package: str) -> dict[str, str]:
    """Name of each module that is an attribute of ``package`` to the first paragraph of what it says of itself."""
    home = Path(saekit.__file__).parents[1].joinpath(*package.split("."))
    tree = ast.parse((home / "__init__.pyi").read_text(encoding="utf-8"))
    found = [node for node in tree.body if isinstance(node, ast.ImportFrom) and not node.module]
    about = dict[str, str]()
    for name in sorted(alias.name for node in found for alias in node.names):
        file = home / f"{name}.py" if (home / f"{name}.py").is_file() else home / name / "__init__.py"
        text = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or ""
        about[name] = re.sub(r":\w+:(?=`)", "", " ".join(text.partition("\n\n")[0].split()))
    return about


def heading(module: str) -> str:
    """The section of a module: that of its longest prefix."""
    found = {
        prefix: title
        for title, prefixes in SECTIONS.items()
        for prefix in prefixes
        if module == prefix or module.startswith(f"{prefix}.")
    }
    return found[max(found, key=len)] if found else OTHER


def documented(names: Iterable[str], module: str = "saekit") -> list[str]:
    """Each of ``names`` with its signature and docstring."""
    lines = []
    for name in names:
        thing = getattr(__import__(module, fromlist=[name]), name)
        kind = "class" if isinstance(thing, type) else "function" if callable(thing) else "data"
        lines += ["```{eval-rst}", f".. auto{kind}:: {module}.{name}"]
        if kind == "class":
            lines += ["   :members:"]
            if name == "SAE":
                lines += ["   :inherited-members: Module"]
            if issubclass(thing, Exception):
                lines += ["   :show-inheritance:"]
        lines += ["```", ""]
    return lines


def api() -> str:
    """Everything that can be imported from ``saekit``."""
    lines = ["# `saekit`", "", "Everything that `import saekit` gives. Nothing is imported before it is used.", ""]
    sections: dict[str, list[str]] = {title: [] for title in (*SECTIONS, OTHER)}
    for name, module in public_names("saekit").items():
        sections[heading(module)].append(name)
    for title, names in sections.items():
        if names:
            lines += [f"## {title}", "", *documented(names)]
    lines += ["## Packages", "", "Attributes of `saekit`, too, with names of their own:", ""]
    lines += [f"- `saekit.{name}`: {about}" for name, about in public_modules("saekit").items()]
    return "\n".join([*lines, ""])


def options() -> str:
    """The classes of options, for configurations in code."""
    lines = ["# Options in code", ""]
    lines += [
        "The classes of the sections of a run and of the built-in plugins, for configurations that editors complete.",
        "",
    ]
    lines += ["## Sections", "", *documented(sorted(sections_of_a_run()), "saekit.config")]
    for kind, registry in isolated_manager(builtins=True).registries.items():
        lines += [f"## {KINDS[kind].labels[:1].upper()}{KINDS[kind].labels[1:]}", ""]
        classes = {item.entry.config: item.key for item in registry.items}
        for cls in classes:
            lines += documented([cls.__name__], cls.__module__)
    return "\n".join(lines)


def sections_of_a_run() -> set[str]:
    """The names of the options classes in ``saekit.config``."""
    found = {name for name in saekit.config.__all__ if attrs.has(getattr(saekit.config, name, None) or int)}
    return found - set(public_names("saekit"))


def authors(package: str, about: str) -> str:
    """A page for plugin authors."""
    return "\n".join([f"# `{package}`", "", about, "", *documented(sorted(public_names(package)), package)])


def pages() -> dict[str, str]:
    """File name to contents."""
    return {
        "api.generated.md": api(),
        "api-options.generated.md": options(),
        "api-reports.generated.md": authors(
            "saekit.reports", "Run folders as tables and pictures ([what they show](../training.md#pictures))."
        ),
        "api-exports.generated.md": authors(
            "saekit.exports", "Names, addresses and lists at Neuronpedia ([how](../exporting.md))."
        ),
        "api-toy.generated.md": authors("saekit.toy", "Features that are known ([how](../toy-models.md))."),
        "api-testing.generated.md": authors("saekit.testing", "What plugins are tested with."),
        "api-kernels.generated.md": authors(
            "saekit.kernels",
            "What fast steps and fast inference of an architecture are made of ([how](../performance.md)).",
        ),
    }


def write() -> None:
    """Write the pages that have changed."""
    FOLDER.mkdir(exist_ok=True)
    for name, text in pages().items():
        target = FOLDER / name
        if not target.is_file() or target.read_text(encoding="utf-8") != text:
            target.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    write()
