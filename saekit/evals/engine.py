"""The one pass over contexts in which every eval that accumulates sees what it asks for, of all SAEs."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import attrs
import torch
from torch import Tensor

from saekit.abilities import StartsInside
from saekit.ambient import ambient
from saekit.distributed.group import ONE, Group
from saekit.evals.forwards import Forwards, logit_contexts
from saekit.evals.means import Means, mean_of, read_means
from saekit.evals.measured import Measured, allowed_in, checked_mask
from saekit.evals.pieces import at_once
from saekit.evals.sums import Sums
from saekit.kernels.sparse import SparseFeatures
from saekit.measuring import Needs, Outcome, Seen
from saekit.protocols import ModelBackend
from saekit.sae.once import features_and_outputs
from saekit.tokens import Mask

__all__ = ["batch_size_of", "measure", "together"]


def measure(
    subjects: Sequence[Measured],
    *,
    backend: ModelBackend,
    contexts: Tensor,
    mask: Mask | None = None,
    first: int = 0,
    means: Means | None = None,
    report: Callable[[int], Any] | None = None,
    among: Group = ONE,
) -> list[dict[str, Any]]:
    """What each eval of each of ``subjects`` has summed up of ``contexts [n, t]``: of each its sums by name.

    A batch of contexts is forwarded once as it is, once with zeros and, if asked, once with the mean at each distinct
    set of targets, and once with what each SAE gives.  What an SAE gives is made of its inputs in the clean forward.
    Positions that do not count keep their activations, and are left out of every sum.

    ``first`` is the number of the first context, for parts of a whole; ``means`` are what :func:`read_means` gives, by
    default of the first of ``contexts``; ``report`` is told of every batch how many tokens it had.

    The batches, which are the same, are dealt out ``among`` several processes, all of which must call: what comes back
    is of this one's alone, and :func:`together` puts the sums together.
    """
    mask = checked_mask(mask, contexts)
    with ambient(), torch.no_grad():
        if means is None:
            means = read_means(subjects, backend=backend, contexts=contexts, mask=mask, among=among)
        engine = _Engine(subjects, backend, means)
        size = batch_size_of(subjects, backend, contexts.shape[1])
        for number, start in enumerate(range(0, len(contexts), size)):
            tokens = contexts[start : start + size]
            if number % among.size == among.rank:
                allowed = allowed_in(mask, tokens, slice(start, start + size))
                engine.take(tokens, allowed, first + start)
            if report is not None:
                report(tokens.numel())
        return engine.sums


def together(subjects: Sequence[Measured], sums: list[dict[str, Any]], among: Group) -> list[dict[str, Any]] | None:
    """The ``sums`` of all processes ``among`` which contexts were dealt out, in the first one; None in the others."""
    if among.size == 1:
        return sums
    parts = among.at_first(sums)
    if parts is None:
        return None
    found = []
    for number, subject in enumerate(subjects):
        merged = {}
        for name, part in subject.evals.items():
            with subject.guard(name):
                merged[name] = functools.reduce(part.merge, (one[number][name] for one in parts))
        found.append(merged)
    return found


def batch_size_of(subjects: Sequence[Measured], backend: ModelBackend, context_size: int) -> int:
    """Contexts in one forward: as many as all evals take, and as fit into little memory."""
    needs = _needs_of(subjects)
    size = needs.batch_size
    if needs.model:
        size = min(size, logit_contexts(backend, context_size))
    for subject in subjects:
        if any(_waits(part.needs) for part in subject.evals.values()):
            size = min(size, at_once(subject.sae, context_size))
    return max(size, 1)


def _needs_of(subjects: Sequence[Measured]) -> Needs:
    return functools.reduce(Needs.__or__, (one.needs for one in subjects), Needs(batch_size=1 << 30))


class _Engine:
    """What all batches have in common, and the sums so far."""

    def __init__(self, subjects: Sequence[Measured], backend: ModelBackend, means: Means) -> None:
        self.subjects, self.backend, self.means = subjects, backend, means
        self.needs = _needs_of(subjects)
        self.sums: list[dict[str, Any]] = []
        for subject in subjects:
            started = {}
            for name, part in subject.evals.items():
                with subject.guard(name):
                    started[name] = part.start(subject.outline or subject.sae, subject.sites)
            self.sums.append(started)
        self.read = {site.hook_name for subject in subjects if subject.needs.sae for site in subject.sites.all}
        self.entries = {subject.targets: self._entry(subject) for subject in subjects if _puts(subject.needs)}

    def _entry(self, subject: Measured) -> str | None:
        if not isinstance(self.backend, StartsInside):
            return None
        return self.backend.entry_of({site.hook_name for site in subject.sites.targets})

    def take(self, tokens: Tensor, allowed: Tensor | None, first: int) -> None:
        """Show every eval the contexts ``tokens``, the first of which has the number ``first``."""
        forwards = Forwards.of(self.backend, tokens, self.needs, read=self.read, entries=self.entries)
        ablated: dict[Any, Outcome] = {}
        for subject, sums in zip(self.subjects, self.sums, strict=True):
            kept = subject.tokens.kept(tokens)
            kept = kept if allowed is None else kept & allowed
            batch = _Batch(subject, sums, forwards, kept, allowed is None and subject.tokens.takes_all, first)
            batch.run_sae()
            if subject.needs.spliced:
                batch.splice()
            for what, put in self._ablations(subject):
                key = (what, subject.targets, subject.tokens, subject.needs.mean if what == "mean" else 0)
                if key not in ablated:
                    ablated[key] = forwards.with_put(subject.targets, put, batch.where)
                batch.outcomes[what] = ablated[key]
            batch.show_model()

    def _ablations(self, subject: Measured) -> Iterator[tuple[str, Any]]:
        if subject.needs.zero:
            yield "zero", lambda site, vectors: torch.zeros_like(vectors)
        if subject.needs.mean:
            yield "mean", lambda site, vectors: mean_of(self.means, site, subject, vectors)


def _puts(needs: Needs) -> bool:
    return bool(needs.spliced or needs.zero or needs.mean)


def _waits(needs: Needs) -> bool:
    """Whether rows or features must be kept until the model's losses are there."""
    return needs.model and (needs.rows or needs.features)


@attrs.define(eq=False)
class _Batch:
    """One SAE and one batch."""

    subject: Measured
    sums: Mapping[str, Any]
    forwards: Forwards
    kept: Tensor
    whole: bool
    """Whether every position counts."""
    first: int
    outcomes: dict[str, Outcome] = attrs.field(factory=dict)
    outputs: list[Tensor] = attrs.field(factory=list)
    features: list[SparseFeatures] = attrs.field(factory=list)

    @property
    def where(self) -> Tensor | None:
        """Where something is put; None: everywhere."""
        return None if self.whole else self.kept

    def run_sae(self) -> None:
        """By pieces of whole contexts, which evals that need no more are shown at once."""
        needs = self.subject.needs
        if not needs.sae:
            return
        sae, sites, held = self.subject.sae, self.subject.sites, self.forwards.held
        inputs = sites.input_of(held)
        targets = inputs if sites.same else sites.target_of(held)
        size = at_once(sae, inputs.shape[1])
        waits = any(_waits(part.needs) for part in self.subject.evals.values())
        for start in range(0, len(inputs), size):
            rows = slice(start, start + size)
            x = inputs[rows].to(sae.device)
            features, outputs = features_and_outputs(sae, x)
            y = x if sites.same else targets[rows].to(sae.device)
            shown = {"inputs": x, "targets": y, "outputs": outputs, "features": features}
            self._show(lambda needs: needs.sae and not needs.model, rows, **shown)
            if needs.spliced or waits:
                self.outputs.append(outputs.to(inputs.device))
            if waits:
                self.features.append(features)

    def splice(self) -> None:
        """Run the model with what the SAE gave."""
        outputs = torch.cat(self.outputs)
        put = dict(zip(self._target_names(), self.subject.sae.ports.split_target(outputs).values(), strict=True))
        self.outcomes["spliced"] = self.forwards.with_put(
            self.subject.targets, lambda site, vectors: put[site.name].to(vectors.device), self.where
        )

    def _target_names(self) -> list[str]:
        return [site.name for site in self.subject.sites.targets]

    def show_model(self) -> None:
        """To the evals that ask for what the model made."""
        shown: dict[str, Any] = {"clean": self.forwards.clean, **self.outcomes}
        if self.features:
            sites, held, device = self.subject.sites, self.forwards.held, self.subject.sae.device
            shown["inputs"] = inputs = sites.input_of(held).to(device)
            shown["targets"] = inputs if sites.same else sites.target_of(held).to(device)
            shown |= {"outputs": torch.cat(self.outputs).to(device), "features": SparseFeatures.joined(self.features)}
        self._show(lambda needs: needs.model or not needs.sae, slice(0, len(self.kept)), **shown)

    def _show(self, which: Callable[[Needs], bool], rows: slice, **shown: Any) -> None:
        tokens = self.forwards.tokens[rows]
        numbers = tuple(range(self.first + rows.start, self.first + rows.start + len(tokens)))
        kept = self.kept[rows]
        counts = kept.any(1).tolist()
        for name, part in self.subject.evals.items():
            if not which(part.needs):
                continue
            seen = Seen(
                numbers=numbers, tokens=tokens, kept=kept, sites=self.subject.sites, **_asked(part.needs, shown)
            )
            with self.subject.guard(name), ambient(), torch.no_grad():
                part.update(self.sums[name], seen)
                if isinstance(sums := self.sums[name], Sums):
                    sums.leave_out(number for number, some in zip(numbers, counts, strict=True) if not some)


def _asked(needs: Needs, shown: Mapping[str, Any]) -> dict[str, Any]:
    """What of ``shown`` the eval asks for: nothing else, so that what it lacks is found out whatever others ask for."""
    asked = dict.fromkeys(("inputs", "targets", "outputs"), needs.rows)
    asked |= {name: bool(getattr(needs, name)) for name in ("features", "clean", "spliced", "zero", "mean")}
    return {name: value for name, value in shown.items() if asked[name]}
