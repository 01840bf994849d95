"""Write ``reference/configuration.generated.md`` from the configuration classes and the built-in plugins."""

from __future__ import annotations

from pathlib import Path

import attrs

from saekit.config import PretokenizeConfig, TrainConfig
from saekit.config.describe import describe_fields
from saekit.kinds import KINDS
from saekit.testing import isolated_manager

TARGET = Path(__file__).parent / "reference" / "configuration.generated.md"


def options_table(cls: type) -> list[str]:
    """The options of one class as a Markdown table."""
    if not attrs.fields(cls):
        return ["No options.", ""]
    lines = ["| option | type | default | |", "|---|---|---|---|"]
    for field in describe_fields(cls):
        default = "required" if field.default is ... else f"`{_shown(field.default)}`"
        doc = " ".join(field.doc.split()).replace("|", "\\|")
        lines.append(f"| `{field.name}` | {field.type} | {default} | {doc} |")
    return [*lines, ""]


def _shown(value: object) -> str:
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "none"}[value]
    if isinstance(value, tuple):
        return "[" + ", ".join(_shown(item) for item in value) + "]"
    if attrs.has(type(value)):
        return "see its section"
    return f'"{value}"' if isinstance(value, str) else str(value)


def sections(config: object, path: str = "") -> list[str]:
    """A section for each field of ``config``, with those inside it after it."""
    lines: list[str] = []
    for field in describe_fields(type(config)):
        value = getattr(config, field.name)
        if attrs.has(type(value)):
            lines += [f"### `{path}{field.name}`", "", field.doc, "", *options_table(type(value))]
            lines += sections(value, f"{path}{field.name}.")
        elif not path:
            lines += [f"### `{field.name}`", "", field.doc, ""]
            lines += [f"A plugin ({field.type}); by default `{_shown(value)}`. Its options are below.", ""]
    return lines


def reference() -> str:
    """The whole page."""
    lines = ["# Configuration reference", "", "## Sections of a run", "", *sections(TrainConfig())]
    lines += ["## `saekit pretokenize`", "", *options_table(PretokenizeConfig)]
    lines += ["`dataset` and `model` have the options of the sections above.", ""]
    for kind, registry in isolated_manager(builtins=True).registries.items():
        lines += [f"## Plugins: {KINDS[kind].labels}", ""]
        for item in registry.items:
            lines += [f"### `{item.key}`", "", f"{item.entry.summary[:1].upper()}{item.entry.summary[1:]}.", ""]
            if item.entry.extra:
                lines += [f"Needs `pip install '{item.distribution}[{item.entry.extra}]'`.", ""]
            lines += options_table(item.entry.config)
    return "\n".join(lines)


def write(target: Path = TARGET) -> None:
    """Write the page, if it has changed."""
    text = reference()
    target.parent.mkdir(exist_ok=True)
    if not target.is_file() or target.read_text(encoding="utf-8") != text:
        target.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    write()
