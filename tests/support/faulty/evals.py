"""Evals that break a promise each."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable
from typing import Any

import torch
from support.faulty.case import cases

from saekit.evals import AccumulatingEval, Sums, Totals
from saekit.measuring import Needs, Seen

Measure = Callable[..., Any]


def tensor(sae: Any, **given: Any) -> Any:
    return {"norm": sae.decoder_norms().sum()}


def counting() -> Measure:
    count = itertools.count()
    return lambda sae, **given: {"number": float(next(count))}


def hooking(sae: Any, **given: Any) -> Any:
    sae.hook_sae_output.add_hook(lambda x, hook: None)
    return {}


def clearing(sae: Any, *, contexts: Any, **given: Any) -> Any:
    contexts.zero_()
    return {}


def keeping() -> Measure:
    """What it measured first counts for all."""
    kept: list[float] = []

    def measure(sae: Any, **given: Any) -> Any:
        kept.append(float(sae.d_sae))
        return {"features": kept[0]}

    return measure


@torch.no_grad()
def one_site(sae: Any, *, backend: Any, sites: Any, contexts: Any) -> Any:
    """Takes what is read for what is written, as in an SAE."""
    x = sites.input_of(backend.run(contexts, read={site.hook_name for site in sites.inputs}).held)
    return {"error": float((sae(x) - x).square().mean())}


@torch.no_grad()
def first_sites(sae: Any, *, backend: Any, sites: Any, contexts: Any) -> Any:
    """Takes one site that is read and one that is written for all that there are."""
    read, written = sites.inputs[0], sites.targets[0]
    held = backend.run(contexts, read={read.hook_name, written.hook_name}).held
    x, target = read.extract(held[read.hook_name]), written.extract(held[written.hook_name])
    return {"error": float((sae(x) - target).square().mean())}


class Norms(AccumulatingEval):
    """One that keeps its promises, but for what a case changes."""

    n_bootstrap = 0

    @property
    def needs(self) -> Needs:
        return Needs(rows=True)

    def update(self, sums: Sums, seen: Seen) -> None:
        sums.add(seen.numbers, {"norm": seen.summed(seen.outputs.norm(dim=-1)), "n": seen.kept.sum(1)})

    def metrics(self, totals: Totals) -> dict[str, Any]:
        return {"norm": totals["norm"] / totals["n"]}


class FirstCounts(Norms):
    """The part that it was merged into counts for more."""

    def merge(self, one: Sums, other: Sums) -> Sums:
        return one.merged(other) if one.numbers[0] == 0 else other


class Forgets(Norms):
    """What was merged last is all."""

    def merge(self, one: Sums, other: Sums) -> Sums:
        return max(one, other, key=len)


class SharesSums(Norms):
    """All SAEs have one table."""

    seen: list[float]

    def start(self, sae: Any, sites: Any) -> Sums:
        self.seen = []
        return super().start(sae, sites)

    def update(self, sums: Sums, seen: Seen) -> None:
        self.seen.append(float(seen.outputs.norm()))
        sums.add(seen.numbers, {"norm": torch.full((len(seen.numbers),), sum(self.seen)), "n": seen.kept.sum(1)})


class OtherNumbers(Norms):
    """Called by itself, it says something else."""

    def __call__(self, sae: Any, **given: Any) -> Any:
        return {"norm": -1.0}


class Unshared(Norms):
    """Its sums stay in the process that made them."""

    def start(self, sae: Any, sites: Any) -> Sums:
        sums = super().start(sae, sites)
        sums.made_here = threading.Lock()  # type: ignore[attr-defined]
        return sums


class LooksAtWeights(Norms):
    """It says that it begins without the weights, and does not."""

    shares_contexts = True

    def start(self, sae: Any, sites: Any) -> Sums:
        assert float(sae.decoder_norms().sum()) > 0
        return super().start(sae, sites)


CASES = cases(
    "evals",
    {
        "build": ("expected an eval", lambda config, run: None),
        "numbers": (r"norm is tensor\(.*\), expected a plain number", lambda config, run: tensor),
        "repeatable": ("the numbers of a second time, number: found 1.0, expected 0.0", lambda config, run: counting()),
        "leaves_the_sae": ("of the SAE, afterwards, hooks: found 1, expected 0", lambda config, run: hooking),
        "leaves_the_model": ("the contexts, afterwards,: other numbers", lambda config, run: clearing),
        "transcoder": (
            r"RuntimeError: The size of tensor a \(8\) must match the size of tensor b \(4\)",
            lambda config, run: one_site,
        ),
        "several_sites": (
            r"d_in is 12: .* side by side, as sae.ports.join_input.*; found \[6, 16, 8\]",
            lambda config, run: first_sites,
        ),
        "merge_in_any_order": ("parts in another order, norm: found", lambda config, run: FirstCounts()),
        "parts_are_the_whole": ("the numbers of parts, norm: found", lambda config, run: Forgets()),
        "two_processes": ("cannot pickle '_thread.lock' object", lambda config, run: Unshared()),
        "dealt_out": ("cannot be called on meta tensors", lambda config, run: LooksAtWeights()),
        "several_in_one_pass": ("an SAE beside another, norm: found", lambda config, run: SharesSums()),
        "called_alone": ("the numbers of a call, norm: found -1, expected", lambda config, run: OtherNumbers()),
        "several": ("the numbers of an SAE after another's, features: found 40.0", lambda config, run: keeping()),
    },
)
