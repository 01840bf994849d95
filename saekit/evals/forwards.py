"""The forwards of one batch of contexts: the clean one, and those with something in the place of targets."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any, Self, TypeAlias

import attrs
import torch
from torch import Tensor

from saekit.abilities import StartsInside
from saekit.devices import widest
from saekit.measuring import Needs, Outcome
from saekit.protocols import ModelBackend
from saekit.site import Site, Sites
from saekit.values import Forward, Replacement, Want

__all__ = ["Forwards", "Put", "logit_contexts"]

_BATCH_BYTES = 1 << 29  # of the logits of a batch, on a device that has many rows to do at once
_BATCH_BYTES_ON_CPU = 1 << 27
_PIECE_BYTES = 1 << 26  # of those that are compared at once

Put: TypeAlias = Callable[[Site, Tensor], Tensor]
"""What is put at a site in the place of its vectors, ``[b, t, width]`` both."""


def logit_contexts(backend: ModelBackend, context_size: int, device: str | None = None) -> int:
    """How many contexts a batch of evals has at most, so that its logits fit in a fixed number of bytes; at least one.

    ``device``: where the model runs; needed for a model that is only outlined, which is on no device.
    """
    most = _BATCH_BYTES_ON_CPU if torch.device(device or backend.device).type == "cpu" else _BATCH_BYTES
    return max(most // (4 * backend.d_vocab * context_size), 1)


@attrs.frozen(eq=False)
class Forwards:
    """What the model made of a batch, and what else it can be asked of it."""

    backend: ModelBackend
    tokens: Tensor
    needs: Needs
    held: Mapping[str, Tensor]
    """What hooks hold in the clean forward."""
    clean: Outcome | None
    """None, where nobody asks for a loss."""
    _entries: Mapping[Sites, str | None]
    _clean_logs: Tensor | None = None
    """``[b * t, d_vocab]``: the logarithms of its probabilities, for divergences from them."""
    _clean_likeliest: Tensor | None = None
    """``[b * t]``."""

    @classmethod
    def of(
        cls, backend: ModelBackend, tokens: Tensor, needs: Needs, *, read: Collection[str], entries: Mapping[Sites, Any]
    ) -> Self:
        """Run the model as it is, and read the hooks of ``read``, and the ``entries`` that other forwards begin at."""
        hooks = {*read, *(entry for entry in entries.values() if entry is not None)}
        # Of an eval that reads neither the model nor an SAE, nothing runs.
        run = backend.run(tokens, read=hooks, want=_want(needs)) if hooks or needs.model else Forward({})
        if not needs.model:
            return cls(backend, tokens, needs, run.held, None, entries)
        if not needs.by_logits:
            return cls(backend, tokens, needs, run.held, Outcome(loss=run.loss), entries)
        logs, likeliest = _clean_of(run.logits, needs)
        zero = run.logits.new_zeros(tokens.shape, dtype=torch.float32)
        outcome = Outcome(
            loss=_losses(run.logits, tokens),
            kl=zero if needs.kl else None,
            agrees=zero == 0 if needs.top1 else None,
            logits=run.logits if needs.logits else None,
        )
        return cls(backend, tokens, needs, run.held, outcome, entries, logs, likeliest)

    def with_put(self, sites: Sites, put: Put, kept: Tensor | None) -> Outcome:
        """Run the model with what ``put`` gives at the targets of ``sites``, where ``kept [b, t]``, or everywhere."""
        hooks = dict.fromkeys(site.hook_name for site in sites.targets)
        replace = {hook: _replacement(sites, hook, put, kept) for hook in hooks}
        run, want, entry = self.backend, _want(self.needs), self._entries.get(sites)
        if entry is not None and isinstance(run, StartsInside):
            return self._outcome(run.run_from(self.tokens, entry, self.held[entry], replace=replace, want=want))
        return self._outcome(run.run(self.tokens, replace=replace, want=want))

    def _outcome(self, run: Forward) -> Outcome:
        if not self.needs.by_logits:
            return Outcome(loss=run.loss)
        kl, agrees = self._compared(run.logits)
        return Outcome(
            loss=_losses(run.logits, self.tokens),
            kl=kl,
            agrees=agrees,
            logits=run.logits if self.needs.logits else None,
        )

    def _compared(self, logits: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """``[b, t]`` both: the divergence from the clean forward, and whether the likeliest token is the same."""
        divergences, likeliest = [], []
        for rows, piece in _pieces(logits):
            likeliest += [piece.argmax(-1)] if self.needs.top1 else []
            if self._clean_logs is not None:
                divergences.append(_divergence(self._clean_logs[rows], piece.log_softmax(-1)))
        shape = logits.shape[:2]
        agrees = None
        if likeliest and self._clean_likeliest is not None:
            agrees = torch.cat(likeliest).eq(self._clean_likeliest).reshape(shape)
        return torch.cat(divergences).reshape(shape) if divergences else None, agrees


def _want(needs: Needs) -> Want:
    if needs.by_logits:
        return "logits"
    return "loss" if needs.model else "held"


def _replacement(sites: Sites, hook: str, put: Put, kept: Tensor | None) -> Replacement:
    def replaced(activations: Tensor) -> Tensor:
        values = {site.name: put(site, site.extract(activations)) for site in sites.targets if site.hook_name == hook}
        return sites.replaced(hook, activations, values, None if kept is None else kept.to(activations.device))

    return replaced


def _pieces(logits: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Rows of ``logits [b, t, d_vocab]``, so many as are few, in float32 at least, and which they are."""
    flat = logits.flatten(0, 1)
    dtype = torch.promote_types(logits.dtype, torch.float32)
    size = max(_PIECE_BYTES // (dtype.itemsize * logits.shape[-1]), 1)
    for start in range(0, len(flat), size):
        rows = slice(start, start + size)
        yield rows, flat[rows].to(dtype)


def _losses(logits: Tensor, tokens: Tensor) -> Tensor:
    """``[b, t - 1]``: next-token cross-entropy in nats."""
    following = tokens.to(logits.device).roll(-1, 1).flatten().long()  # the last of each is cut off
    losses = [
        torch.nn.functional.cross_entropy(piece, following[rows], reduction="none") for rows, piece in _pieces(logits)
    ]
    return torch.cat(losses).reshape(tokens.shape)[:, :-1]


def _clean_of(logits: Tensor, needs: Needs) -> tuple[Tensor | None, Tensor | None]:
    """The logarithms of probabilities and the likeliest tokens, as far as they are needed."""
    logs, likeliest = None, []
    if needs.kl:
        logs = logits.new_empty(logits.flatten(0, 1).shape, dtype=torch.promote_types(logits.dtype, torch.float32))
    for rows, piece in _pieces(logits):
        likeliest += [piece.argmax(-1)] if needs.top1 else []
        if logs is not None:
            logs[rows] = piece.log_softmax(-1)
    return logs, torch.cat(likeliest) if likeliest else None


def _divergence(clean: Tensor, other: Tensor) -> Tensor:
    """``[n]``: ``Σ p (log p − log q)`` of logarithms ``[n, d_vocab]``; what has no probability adds nothing."""
    terms = clean.exp().mul_(clean - other)
    total = terms.sum(-1, dtype=widest(terms.device))
    if bool(total.isnan().any()):
        total = terms.masked_fill_(clean == -torch.inf, 0).sum(-1, dtype=widest(terms.device))
    return total
