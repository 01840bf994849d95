"""Write ``reference/cli.generated.md`` from the commands themselves."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer

from saekit.cli import app

INTRODUCTION = """
`section.option=value` changes options, on top of a file or without one ([configuration](../configuration.md)). Exit
codes are 0; 2 for a mistake in arguments, configurations or files; 1 where a run diverges, the disk fails, or saekit or
a plugin does; 130 after Ctrl-C and 143 after SIGTERM.
"""
TARGET = Path(__file__).parent / "reference" / "cli.generated.md"


def commands(command: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Every command with its words after ``saekit``, groups before what is in them."""
    if not command.hidden:
        yield path, command
        for name, inner in getattr(command, "commands", {}).items():
            yield from commands(inner, (*path, name))


def cli_page() -> str:
    """The whole page."""
    lines = ["# Command line", ""]
    for path, command in commands(typer.main.get_command(app)):
        if path:
            lines += [f"## `{' '.join(['saekit', *path])}`", ""]
        lines += section(path, command)
        if not path:
            lines += [INTRODUCTION]
    return "\n".join(lines).replace("\n\n\n", "\n\n")


def section(path: tuple[str, ...], command: Any) -> list[str]:
    """What ``--help`` says of one command."""
    context = typer.Context(command, info_name=" ".join(["saekit", *path]))
    lines = [*paragraphs(command.help), ""]
    lines += ["```text", command.get_usage(context).removeprefix("Usage: "), "```", ""]
    lines += table("argument", [parameter for parameter in command.params if parameter.param_type_name == "argument"])
    lines += table("option", [parameter for parameter in command.params if parameter.param_type_name == "option"])
    if inner := [name for name, below in getattr(command, "commands", {}).items() if not below.hidden]:
        lines += ["Commands: " + ", ".join(f"`{name}`" for name in inner) + ".", ""]
    return [*lines, *paragraphs(command.epilog), ""]


def table(what: str, parameters: list[Any]) -> list[str]:
    """Arguments or options with what they are for."""
    rows = [f"| {shown(one)} | {one.help.replace('|', chr(92) + '|')}{default(one)} |" for one in parameters
            if not getattr(one, "hidden", False)]  # fmt: skip
    return [f"| {what} | |", "|---|---|", *rows, ""] if rows else []


def shown(parameter: Any) -> str:
    """``--grid``, ``-h, --help``, ``CONFIG``."""
    return ", ".join(f"`{name}`" for name in (*parameter.opts, *parameter.secondary_opts))


def default(parameter: Any) -> str:
    """By default it is what is said here, where that says something."""
    value = parameter.default
    return f" Default: `{value}`." if isinstance(value, str | int | float) and value not in ("", False, True) else ""


def paragraphs(text: str | None) -> list[str]:
    """Help as Markdown: lines that are commands, or indented, as they are, in blocks; everything else as text."""
    lines: list[str] = []
    inside = False
    for line in (text or "").replace("\b", "").splitlines():
        command = line.startswith(" ") or line.strip().startswith("saekit ")
        if command != inside and (command or line.strip()):
            lines += ["", "```sh"] if command else ["```", ""]
            inside = command
        lines.append(line.strip() if command else line)
    return [*lines, "```"] if inside else lines


def write(target: Path = TARGET) -> None:
    """Write the page, if it has changed."""
    text = cli_page()
    target.parent.mkdir(exist_ok=True)
    if not target.is_file() or target.read_text(encoding="utf-8") != text:
        target.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    write()
