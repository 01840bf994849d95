"""Eval ``reconstruction``: explained variance, sparsity, and the model's loss with the SAE spliced in."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

import attrs

from saekit import Entry, Sites, hookimpl
from saekit.config import check

if TYPE_CHECKING:
    from torch import Tensor

    from saekit import SAE
    from saekit.protocols import ModelBackend
    from saekit.values import EvalRun


@attrs.frozen(kw_only=True)
class ReconstructionConfig:
    """Reconstruction, sparsity and downstream loss on held-out text."""

    batch_size_prompts: int = attrs.field(default=16, validator=check(lambda value: value >= 1, "1 or more"))
    """Contexts in one forward of the model."""


@attrs.frozen
class ReconstructionEval:
    """See the module."""

    config: ReconstructionConfig

    def __call__(self, sae: SAE, *, backend: ModelBackend, sites: Sites, contexts: Tensor) -> dict[str, float]:
        from saekit.evals import spliced_losses, variance_metrics

        size = self.config.batch_size_prompts

        def rows() -> Iterator[Tensor | tuple[Tensor, Tensor]]:
            for tokens in contexts.split(size):
                held = backend.run(tokens, read={site.hook_name for site in sites.all}).held
                x = sites.input_of(held)
                x = x if sae.reads_sequences else x.flatten(0, 1)
                yield x if sites.same else (x, sites.target_of(held).flatten(0, 1))

        losses = spliced_losses(sae, backend=backend, sites=sites, contexts=contexts, batch_size=size)
        return variance_metrics(sae, rows()) | losses


@hookimpl
def saekit_register_evals() -> Iterable[Entry]:
    yield Entry("reconstruction", ReconstructionConfig, _build, summary="explained variance, L0, CE recovered")


def _build(config: ReconstructionConfig, *, run: EvalRun) -> ReconstructionEval:
    return ReconstructionEval(config)
