"""Eval ``downstream``: what becomes of the model's predictions when an SAE takes the place of what it reconstructs."""

from __future__ import annotations

from collections.abc import Iterable

import attrs

from saekit import Entry, hookimpl
from saekit.config import check

_at_least_0 = check(lambda value: value >= 0, "0 or more")


@attrs.frozen(kw_only=True)
class DownstreamConfig:
    """The model's loss with the SAE spliced in, and how much of it is recovered, on held-out text."""

    mean_ablation_contexts: int = attrs.field(default=0, validator=_at_least_0)
    """Put the mean over so many of the contexts, which are read first, in the place of the targets, too; 0: do not."""
    kl: bool = False
    """Tell the Kullback-Leibler divergence from the model as it is, too.  Takes the logits of every forward."""
    top1: bool = False
    """Tell how often the likeliest token stays the same, too.  Takes the logits of every forward."""
    batch_size_prompts: int = attrs.field(default=16, validator=check(lambda value: value >= 1, "1 or more"))
    """Contexts in one forward of the model, at most: fewer where logits are large."""
    n_bootstrap: int = attrs.field(default=1000, validator=_at_least_0)
    """Resamples of the contexts for standard errors; 0: none."""


@hookimpl
def saekit_register_evals() -> Iterable[Entry]:
    build = f"{__name__}.module:DownstreamEval"
    yield Entry("downstream", DownstreamConfig, build, summary="the model's loss with the SAE, CE recovered, KL")
