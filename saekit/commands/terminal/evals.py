"""``saekit eval``."""

from __future__ import annotations

import os
from typing import Annotated

import typer

from saekit.commands.terminal.measuring import (
    Backend,
    Contexts,
    ContextSize,
    Dataset,
    Device,
    Evals,
    Excluded,
    Model,
    Places,
    Seed,
    Where,
    evals_of,
    places_of,
)

__all__ = ["EXAMPLES", "evaluate"]

EXAMPLES = """
    saekit eval runs/RUN
    saekit eval runs/A runs/B --n-contexts 256 --kl --top1
    saekit eval runs/RUN --model FOLDER --seqpos-slice 1:
    saekit eval gpt2-small-res-jb:blocks.8.hook_resid_pre --dataset OWNER/NAME
"""


def evaluate(
    saes: Annotated[
        list[str],
        typer.Argument(
            help="Run folders, sweeps', those of SAEs of any format, or RELEASE:ID.", metavar="SAE_OR_RUN..."
        ),
    ],
    model: Model = None,
    backend: Backend = None,
    dataset: Dataset = None,
    n_contexts: Contexts = 64,
    context_size: ContextSize = None,
    evals: Evals = None,
    site: Where = None,
    mean_ablation: Annotated[
        int | None,
        typer.Option(
            "--mean-ablation", metavar="N", help="Put the mean over the first N contexts in the SAE's place, too."
        ),
    ] = None,
    kl: Annotated[bool, typer.Option("--kl", help="Tell the KL divergence from the model as it is, too.")] = False,
    top1: Annotated[
        bool, typer.Option("--top1", help="Tell how often the likeliest token stays the same, too.")
    ] = False,
    exclude_special_tokens: Excluded = None,
    seqpos_slice: Places = None,
    seed: Seed = 0,
    device: Device = "auto",
    save: Annotated[bool, typer.Option("--save/--no-save", help="Write evals.json beside each SAE.")] = True,
    as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
) -> None:
    """Measure SAEs in their models, on text that they were not trained on."""
    from saekit.commands.evaluating import evaluate as evaluated
    from saekit.commands.measured import show_evaluations
    from saekit.distributed.launched import Launched

    found = evaluated(
        saes, model=model, backend=backend, site=site, seqpos_slice=places_of(seqpos_slice),
        dataset=None if dataset is None else {"path": dataset}, n_contexts=n_contexts,
        context_size=context_size, evals=evals_of(evals), mean_ablation_contexts=mean_ablation,
        kl=kl or None, top1=top1 or None, exclude_special_tokens=exclude_special_tokens, seed=seed, device=device,
        save=save,
    )  # fmt: skip
    if Launched.here(os.environ).rank == 0:  # all have found the same
        show_evaluations(found, as_json=as_json)
