"""``saekit pretokenize``."""

from __future__ import annotations

import shlex

import typer

from saekit.commands.terminal.arguments import ConfigFile, Overrides, source_of
from saekit.commands.terminal.ending import interruptible

__all__ = ["EXAMPLES", "pretokenize"]

EXAMPLES = """
    saekit pretokenize dataset.path=book.txt tokenizer=gpt2 folder=contexts
    saekit pretokenize dataset.path=owner/texts tokenizer=gpt2 folder=contexts num_proc=8
    saekit train dataset.path=contexts model.name=gpt2
"""


def pretokenize(
    config: ConfigFile,
    overrides: Overrides = None,
) -> None:
    """Pack text into shuffled contexts, on disk or on the Hub, that `train` reads with dataset.path alone.

    `saekit config --of pretokenize` prints every option. A file is not needed.
    """
    from saekit.commands import jobs
    from saekit.config import PretokenizeConfig
    from saekit.config.files import load_config

    checked = load_config(*source_of(config, overrides), kind=PretokenizeConfig)

    with interruptible("interrupted; nothing was written"):
        made = jobs.pretokenize(checked)
    where = " and ".join(place for place in (made.folder, made.hub_repo_id) if place)
    typer.echo(f"{made.contexts:,} contexts of {made.context_size} tokens in {where}")
    typer.echo(f"train on them with: {shlex.quote(f'dataset.path={made.folder or made.hub_repo_id}')}")
