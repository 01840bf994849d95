"""Whether a model knows anything of the text that it reads."""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from saekit.evals.forwards import logit_contexts
from saekit.protocols import ModelBackend
from saekit.runs.randomness import seeded

__all__ = ["first_loss", "first_loss_text"]

_TOKENS = 1024


def first_loss(
    backend: ModelBackend, contexts: Tensor, lock: AbstractContextManager[object] | None = None
) -> float | None:
    """The model's mean loss in nats on the first of ``contexts [n, t]``, about a thousand tokens of them.

    None where it cannot be had.  Nothing else changes: what a model draws from the process's generators is given back.
    """
    few = min(_TOKENS // contexts.shape[1], logit_contexts(backend, contexts.shape[1]))
    first = contexts[: max(few, 1), :_TOKENS]
    if not first.numel():
        return None
    try:
        with lock or nullcontext(), seeded(0), torch.no_grad():
            return float(backend.run(first, want="loss").loss.double().mean())
    except Exception:  # it is only a line to be shown; whatever is wrong here, the run itself will say
        return None


def first_loss_text(backend: ModelBackend, loss: float | None) -> str | None:
    """A line for people, if the model does no better than guessing."""
    guessing = math.log(backend.d_vocab)
    if loss is None or loss < guessing:
        return None
    return (
        f"{loss:.2f} nats a token on the first contexts, no better than guessing among {backend.d_vocab:,} tokens "
        f"({guessing:.2f}): it is untrained, or the text is not of its tokenizer"
    )
