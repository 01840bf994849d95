"""``saekit push``."""

from __future__ import annotations

from typing import Annotated

import typer

__all__ = ["EXAMPLES", "push"]

EXAMPLES = """
    saekit push runs/RUN OWNER/REPOSITORY
    saekit push runs/RUN OWNER/REPOSITORY --private --revision draft
    saekit push runs/RUN OWNER/REPOSITORY --preview FOLDER
"""


def push(
    path: Annotated[str, typer.Argument(help="A run folder, a sweep's, or that of a saved SAE.")],
    repo_id: Annotated[str, typer.Argument(metavar="OWNER/REPOSITORY", help="It is made if it is not there.")],
    folder: Annotated[str, typer.Option("--folder", metavar="FOLDER", help="One in the repository.")] = "",
    private: Annotated[
        bool | None, typer.Option("--private/--public", help="Who may see a new one.", show_default=False)
    ] = None,
    revision: Annotated[str | None, typer.Option("--revision", metavar="BRANCH", help="Another branch.")] = None,
    message: Annotated[str | None, typer.Option("--message", "-m", metavar="TEXT", help="Of the commit.")] = None,
    probe: Annotated[
        bool,
        typer.Option(
            "--probe/--no-probe",
            help="The probe, by which the SAE can be verified: it holds 16 rows of the run's activations.",
        ),
    ] = True,
    preview: Annotated[
        str | None,
        typer.Option(
            "--preview",
            metavar="FOLDER",
            help="Send nothing: write what would be in a new repository to a new folder.",
        ),
    ] = None,
) -> None:
    """Put what a run has trained on the Hugging Face Hub, with a model card, in one commit."""
    from saekit.commands.pushing import push_to_hub

    address = push_to_hub(
        path, repo_id, folder=folder, private=private, revision=revision, commit_message=message, probe=probe,
        preview=preview,
    )  # fmt: skip
    typer.echo(address)
