"""Options that the commands share which measure SAEs in their models."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from saekit.commands.terminal.arguments import completed
from saekit.errors import ConfigError

if TYPE_CHECKING:
    from saekit.config import PluginChoice

__all__ = [
    "Backend", "ContextSize", "Contexts", "Dataset", "Device", "Evals", "Excluded", "Model", "Places", "Seed", "Where",
    "evals_of", "places_of",
]  # fmt: skip

Model = Annotated[
    str | None,
    typer.Option(
        "--model",
        help="Another model than the SAE's own: a name or a folder, loaded as the SAE's was.",
    ),
]
Backend = Annotated[
    str | None,
    typer.Option(
        "--backend",
        metavar="KEY",
        help="What runs the model, by its key; default: what the SAE was trained with.",
        autocompletion=lambda ctx, incomplete: completed("complete_backend", ctx, incomplete),
    ),
]
Dataset = Annotated[
    str | None,
    typer.Option("--dataset", help="Another text than what was held out from training: a path or OWNER/NAME."),
]
Contexts = Annotated[int, typer.Option("--n-contexts", help="Contexts to measure on.")]
ContextSize = Annotated[
    int | None, typer.Option("--context-size", help="Tokens in each; default: as the SAE was trained.")
]
Evals = Annotated[
    list[str] | None,
    typer.Option(
        "--evals",
        metavar="EVAL",
        help="An eval, by its key, or with options as '{name=\"KEY\",option=value}'; several times for several.",
        autocompletion=lambda ctx, incomplete: completed("complete_eval", ctx, incomplete),
    ),
]
Where = Annotated[
    str | None, typer.Option("--site", metavar="HOOK", help="The hook, for SAEs that do not name it, or another one.")
]
Excluded = Annotated[
    bool | None,
    typer.Option(
        "--exclude-special-tokens/--include-special-tokens",
        help="Whether special tokens count; default: as in training.",
        show_default=False,
    ),
]
Places = Annotated[
    str | None,
    typer.Option(
        "--seqpos-slice",
        metavar="START:STOP",
        help="The positions that count, as of a Python slice (1: is all but the first); default: as in training.",
    ),
]
Seed = Annotated[int, typer.Option("--seed", help="For the choice of contexts.")]
Device = Annotated[str, typer.Option("--device", help="Where the model and the SAEs run.")]


def evals_of(given: list[str] | None) -> Sequence[PluginChoice]:
    """Those that are asked for, or the default ones; :class:`ConfigError` for a table that is none."""
    from saekit.config.files import parsed_choice
    from saekit.defaults import DEFAULT_EVALS

    return [parsed_choice(one, "--evals") for one in given] if given else DEFAULT_EVALS


def places_of(text: str | None) -> tuple[int | None, ...] | None:
    """``START:STOP``, ``START:STOP:STEP`` or ``STOP`` as numbers; :class:`ConfigError` for anything else."""
    if text is None:
        return None
    parts = [part.strip() for part in text.split(":")]
    try:
        found = tuple(int(part) if part else None for part in parts)
    except ValueError:
        found = ()
    if not 1 <= len(found) <= 3 or not text.strip():
        raise ConfigError(
            [
                (
                    "--seqpos-slice",
                    f"is {text!r}, expected START:STOP, such as 1: or 0:64, START:STOP:STEP, or STOP alone",
                )
            ]
        )
    return found
