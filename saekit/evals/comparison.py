"""What came of comparing SAEs: their numbers, their differences, and what these say in words."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs
import numpy as np

from saekit.evals.comparing import LEVEL, Compared, differences, widening
from saekit.measuring import Evaluation, Measure, plain_numbers
from saekit.reasons import alike
from saekit.tables import facts_html, table_html

__all__ = ["Comparison"]


_MOST_LINES = 60
_MOST_BEATEN = 4
_SAME = " are the same: so are all their numbers"
_FEW = 10
"""Contexts, below which intervals are not to be relied on."""


def _number(value: float, like: float) -> str:
    """With as many places as ``like``, a difference or how wide an interval is, says something."""
    if not math.isfinite(value):
        return "nan"
    places = 3 if not like else min(max(1 - math.floor(math.log10(abs(like))), 0), 12)
    return f"{value:,.{places}f}"


@attrs.frozen(eq=False, kw_only=True)
class Comparison:
    """SAEs that were measured on the same contexts."""

    evaluations: Mapping[str, Evaluation]
    """Of each SAE, by its name."""
    about: Mapping[str, Any] = attrs.field(factory=dict)
    """What they were measured on: plain data."""
    sites: Mapping[str, str] = attrs.field(factory=dict)
    """Where each SAE reads and writes, by its name."""
    files: tuple[Path, ...] = ()
    """What was written."""
    pairs: tuple[Compared, ...] = attrs.field(init=False)
    """Every two of them in every metric that has an error in both."""

    @pairs.default
    def _compared(self) -> tuple[Compared, ...]:
        return tuple(pair for pair in differences(self.evaluations) if not self.measure(pair.metric).of_model)

    def measure(self, metric: str) -> Measure:
        """What a metric means: as the first eval that has it says."""
        return next(one for one in self.evaluations.values() if metric in one.values).measure(metric)

    def pair(self, metric: str, one: str, other: str) -> Compared:
        """The difference of two by their names; :class:`KeyError` where there is none."""
        for pair in self.pairs:
            if pair.metric == metric and {pair.one, pair.other} == {one, other}:
                return pair if pair.one == one else _turned(pair)
        metrics = [*dict.fromkeys(pair.metric for pair in self.pairs)]
        hint = "".join(alike(name, self.evaluations) for name in (one, other) if name not in self.evaluations)
        hint = alike(metric, metrics) if metric not in metrics else hint
        raise KeyError(f"{one!r} and {other!r} were not compared in {metric!r}{hint}")

    @property
    def headlines(self) -> list[Compared]:
        """The pairs in the metrics that are told first."""
        compared = list(dict.fromkeys(pair.metric for pair in self.pairs))
        shown = self._first(compared) or compared
        return [pair for metric in shown for pair in self.pairs if pair.metric == metric]

    def verdicts(self) -> list[str]:
        """What the headlines say, a sentence each; and then which of two pay for fidelity with more features."""
        same = {names for pair in self.pairs if self._same(*(names := (pair.one, pair.other)))}
        told = [f"{one} and {other}{_SAME}" for one, other in sorted(same)]
        shown = [pair for pair in self.headlines if (pair.one, pair.other) not in same and not self._of_other(pair)]
        told += [self.verdict(pair) for pair in shown]
        return [*told, *self._trades(), *self._of_sites()]

    def summary(self) -> list[str]:
        """What the verdicts come to, in a few sentences; of two SAEs, the verdicts themselves.

        Of more, first those at each site that no other beats at as few features per token, and then which beats others.
        """
        metrics = {pair.metric for pair in self.pairs}
        fidelity = next(iter(self._faithful(metrics)), None)
        if len(self.evaluations) < 3 or fidelity is None or "l0" not in metrics:
            return self.verdicts()
        same = [one for one in self.verdicts() if one.endswith(_SAME)]
        sites = dict.fromkeys(self.sites.get(name, "") for name in self.evaluations)
        groups = {site: [one for one in self.evaluations if self.sites.get(one, "") == site] for site in sites}
        told = [line for site, names in groups.items() for line in self._frontier(names, fidelity, site)]
        for metric in ("l0", fidelity):
            pairs = [pair for pair in self.pairs if pair.metric == metric and not self._of_other(pair)]
            apart = sum(pair.distinguishable for pair in pairs)
            if pairs:
                told.append(f"told apart in {self.measure(metric).label}: {apart} of {len(pairs)} pairs")
        return [*same, *told, *self._of_sites()]

    def _frontier(self, names: Sequence[str], fidelity: str, site: str) -> Iterator[str]:
        """Which of ``names``, all at one ``site``, have none beside them that is better at no more features."""
        found = {name: self.evaluations[name].values for name in names}
        places = {name: (one.get("l0", math.nan), one.get(fidelity, math.nan)) for name, one in found.items()}
        order = sorted((name for name in names if np.isfinite(places[name]).all()), key=places.__getitem__)
        if len(order) < 2:
            return
        wins, beaten = self._wins(fidelity), dict[str, list[str]]()
        for name in order:
            if by := [other for other in order if (other, name) in wins]:
                beaten[name] = by
        label, at = self.measure(fidelity).label, f" at {site}" if len({*self.sites.values()}) > 1 else ""
        best = [f"{name} ({places[name][1]:.3f} at {places[name][0]:.4g})" for name in order if name not in beaten]
        yield f"frontier of L0 and {label}{at}, from sparse to dense: {', '.join(best)}"
        for name in [*beaten][:_MOST_BEATEN]:
            by = beaten[name]
            more = f" and {len(by) - 1} more" if len(by) > 1 else ""
            yield f"{name} is beaten in {label}, with no more features per token, by {by[0]}{more}"
        if (left := len(beaten) - _MOST_BEATEN) > 0:
            yield f"and {left} more are beaten so"

    def _wins(self, fidelity: str) -> set[tuple[str, str]]:
        """The pairs of which the first is told to be better, and not to have more features per token."""
        denser = {(one.one, one.other): one for one in self.pairs if one.metric == "l0"}
        won = set()
        for pair in self.pairs:
            l0 = denser.get((pair.one, pair.other))
            if pair.metric != fidelity or not pair.distinguishable or l0 is None:
                continue
            first = pair.difference * (self.measure(fidelity).better or 1) > 0
            if not (l0.distinguishable and (l0.difference > 0) == first):
                won.add((pair.one, pair.other) if first else (pair.other, pair.one))
        return won

    def _of_other(self, pair: Compared) -> bool:
        """Whether it is a difference of what is measured of other vectors, or against other ablations."""
        return self.measure(pair.metric).of_site and self._apart(pair.one, pair.other)

    def _of_sites(self) -> Iterator[str]:
        """What cannot be said of SAEs at other sites."""
        labels = dict.fromkeys(self.measure(pair.metric).label for pair in self.pairs if self._of_other(pair))
        if labels:
            yield (
                f"SAEs at other sites are not compared in {', '.join(labels)}: these are of other vectors, or against "
                "other ablations. What becomes of the model's predictions is the same question at every site: the CE "
                "with the SAE, the KL divergence and the top-1 agreement"
            )

    def _same(self, one: str, other: str) -> bool:
        """Whether no number, in no resample, tells one from the other."""
        first, second = self.evaluations[one], self.evaluations[other]
        if self._apart(one, other) or first.values.keys() != second.values.keys():
            return False
        pairs: list[tuple[Any, Any]] = [(value, second.values[name]) for name, value in first.values.items()]
        pairs += [(drawn, second.resampled.get(name, ())) for name, drawn in first.resampled.items()]
        return all(np.array_equal(a, b, equal_nan=True) for a, b in pairs)

    def _apart(self, one: str, other: str) -> bool:
        """Whether they are at other sites."""
        return self.sites.get(one) != self.sites.get(other)

    def verdict(self, pair: Compared) -> str:
        """What one difference says."""
        measure = self.measure(pair.metric)
        if not math.isfinite(pair.joint_low):
            return f"{pair.one} and {pair.other} cannot be compared in {measure.label}: {self._why(pair)}"
        if not pair.distinguishable:
            shown = self._interval(pair.difference, pair.joint_low, pair.joint_high)
            return f"{pair.one} and {pair.other} are not distinguishable in {measure.label}: {shown}"
        if self._of_other(pair):
            shown = self._interval(pair.difference, pair.joint_low, pair.joint_high)
            return (
                f"{pair.one} and {pair.other} are at other sites, of which {measure.label} does not say which is "
                f"better: {shown}"
            )
        winner = pair if pair.difference * (measure.better or 1) > 0 else _turned(pair)
        low, high = sorted((abs(winner.joint_low), abs(winner.joint_high)))
        shown = self._interval(abs(winner.difference), low, high)
        if measure.better:
            return f"{winner.one} is better than {winner.other} in {measure.label} by {shown}"
        return f"{winner.one} has more {measure.label} than {winner.other} by {shown}"

    def _why(self, pair: Compared) -> str:
        n = len(self.evaluations[pair.one].contexts)
        return "one context has no error" if n < 2 else "it is no number in some resamples"

    @staticmethod
    def _interval(value: float, low: float, high: float) -> str:
        like = max(high - low, 0.0) or value
        return f"{_number(value, like)} ({_number(low, like)} to {_number(high, like)})"

    def _trades(self) -> Iterator[str]:
        for one, other in dict.fromkeys((pair.one, pair.other) for pair in self.pairs):
            found = {pair.metric: pair for pair in self.pairs if (pair.one, pair.other) == (one, other)}
            if self._apart(one, other):
                continue  # what is faithful is measured of other activations
            fidelity = [found[name] for name in self._faithful(found) if found[name].distinguishable]
            l0 = found.get("l0")
            if not fidelity or l0 is None:
                continue
            signs = {pair.difference * (self.measure(pair.metric).better or 1) > 0 for pair in fidelity}
            if len(signs) > 1:
                yield f"{one} and {other} are each better in one of {' and '.join(self._labels(fidelity))}"
                continue
            better, worse, more = (one, other, l0.joint_low > 0) if signs == {True} else (other, one, l0.joint_high < 0)
            what = " and ".join(self._labels(fidelity))
            if more:
                yield (
                    f"{better} is better in {what} and has more features per token than {worse}: compare SAEs of one "
                    "L0 to tell which is the better method"
                )
            else:
                yield f"{better} is better in {what} than {worse}, with no more features per token"

    def rules(self) -> list[str]:
        """How intervals and verdicts are made, in words."""
        n = len(next(iter(self.evaluations.values())).contexts)
        several = len(self.evaluations) > 2
        pairs = len(self.evaluations) * (len(self.evaluations) - 1) // 2
        if n < 2:
            return ["Only one context has tokens that count: there are no intervals, and nothing can be told apart."]
        lines = [f"Differences are paired by {n:,} contexts; intervals in brackets are 95 %, by bootstrap over them."]
        if several:
            lines.append(
                f"The intervals of all {pairs} pairs hold at once for each metric (the largest deviation of all pairs, "
                "Romano and Wolf 2005); metrics are not corrected for one another."
            )
        if n < _FEW:
            lines.append(f"{n} contexts are few: intervals of fewer than {_FEW} are not to be relied on.")
        return lines

    def interval(self, name: str, metric: str) -> tuple[float, float] | None:
        """The 95 % interval of a number of one SAE, by bootstrap over contexts; None where it has none."""
        evaluation = self.evaluations[name]
        if metric not in evaluation.resampled:
            return None
        value, drawn = evaluation.values[metric], evaluation.resampled[metric]
        if not np.isfinite(drawn).all() or not math.isfinite(value):
            return None
        reach = widening(len(evaluation.contexts)) * float(np.quantile(np.abs(drawn - value), LEVEL))
        return (value - reach, value + reach) if math.isfinite(reach) else None

    @property
    def title(self) -> str:
        """A line for pictures."""
        return f"{len(self.evaluations)} SAEs compared"

    @property
    def where(self) -> list[str]:
        """The model and the sites, and what text it was: a line each."""
        sites = dict.fromkeys(self.sites.values())
        places = next(iter(sites), "") if len(sites) < 2 else f"{len(sites)} sites"
        known = self.about.get("model"), places
        lines = [" at ".join(str(one) for one in known if one)]
        n, size, data = (self.about.get(name) for name in ("n_contexts", "context_size", "dataset"))
        if n and size:
            held_out = ", held out from training" if self.about.get("held_out") else ""
            lines.append(f"{n:,} contexts of {size:,} tokens" + (f" of {data}" if data else "") + held_out)
        return [line for line in lines if line]

    def tables(self) -> Iterator[dict[str, Any]]:
        """All numbers and all differences as texts, for pages: the title, the heads of columns, and the rows."""
        heads = ["SAE", *self._places, *(self.measure(name).label for name in self.shown)]
        yield {"title": "Numbers, ± standard error", "head": heads, "rows": self._rows(self.shown)}
        first = dict.fromkeys(pair.metric for pair in self.headlines)  # in the order of the verdicts
        places = {metric: place for place, metric in enumerate(first)}
        pairs = sorted(self.pairs, key=lambda pair: places.get(pair.metric, len(places)))
        told = [[self.measure(pair.metric).label, pair.one, pair.other, *self._cells(pair)] for pair in pairs]
        heads = ["metric", "one", "other", "one − other", "95 %, this pair alone", "95 %, all pairs", "told apart"]
        yield {"title": "Differences", "head": heads, "rows": told}

    @property
    def shown(self) -> list[str]:
        """The numbers that have errors, and those that are counted, the first ones first."""
        known = list(dict.fromkeys(name for one in self.evaluations.values() for name in one.values))
        first = self._first(known)
        return first + [name for name in known if name not in first]

    def _first(self, metrics: Iterable[str]) -> list[str]:
        """Those that are told first, in their order."""
        places = {name: self.measure(name).headline for name in metrics}
        return sorted((name for name, place in places.items() if place), key=places.__getitem__)

    def _faithful(self, metrics: Iterable[str]) -> list[str]:
        """Those that say how faithful an SAE is."""
        return [name for name in self._first(metrics) if self.measure(name).fidelity]

    def _labels(self, pairs: Iterable[Compared]) -> list[str]:
        return [self.measure(pair.metric).label for pair in pairs]

    @property
    def _places(self) -> list[str]:
        """The head of the column that names the sites, where there are several."""
        return ["site"] if len({*self.sites.values()}) > 1 else []

    def _rows(self, names: Sequence[str]) -> list[list[str]]:
        """Of each SAE its name, its site where there are several, and these numbers."""
        return [
            [sae, *(self.sites.get(sae, "") for _ in self._places), *(one.text_of(name) or "-" for name in names)]
            for sae, one in self.evaluations.items()
        ]

    def _table(self) -> tuple[list[str], list[list[str]]]:
        """What is told first: the names of the numbers, and a row for each SAE."""
        names = self._first(self.shown) or self.shown[:6]
        return names, self._rows(names)

    def _cells(self, pair: Compared) -> list[str]:
        if not math.isfinite(pair.joint_low):
            return ["-", "-", "-", "-"]
        like = max(pair.joint_high - pair.joint_low, 0.0) or pair.difference
        value, *ends = (
            _number(one, like) for one in (pair.difference, pair.low, pair.high, pair.joint_low, pair.joint_high)
        )
        alone, together = (f"{low} to {high}" for low, high in (ends[:2], ends[2:]))
        return [value, alone, together, "yes" if pair.distinguishable else "no"]

    def text(self, *, pairs: bool = False) -> str:
        """The numbers, what they come to (of more than two SAEs, with ``pairs``, the verdict on each two) and what that
        rests on, for people."""
        names, rows = self._table()
        heads = ["", *self._places, *(self.measure(name).short or self.measure(name).label for name in names)]
        widths = [max(len(row[place]) for row in (heads, *rows)) for place in range(len(heads))]

        def line(cells: Sequence[str]) -> str:
            first, *others = (cell.rjust(width) for cell, width in zip(cells, widths, strict=True))
            return "  ".join([cells[0].ljust(len(first)), *others]).rstrip()

        table = [line(heads), *map(line, rows)]
        files = [f"Written: {', '.join(map(str, self.files))}"] if self.files else []
        told = [f"- {verdict}" for verdict in (self.verdicts() if pairs else self.summary())]
        if len(told) > _MOST_LINES:
            left = len(told) - _MOST_LINES
            told = [*told[:_MOST_LINES], f"- and {left:,} more, in compare.json (--out) and in .verdicts()"]
        elif not pairs and len(self.evaluations) > 2:
            told.append("- what is said of each two: --pairs, or .verdicts()")
        parts = [table, told, [*self.where, *self.rules(), *files]]
        return "\n\n".join("\n".join(part) for part in parts)

    def __str__(self) -> str:
        return self.text()

    def __repr__(self) -> str:
        return f"Comparison({', '.join(self.evaluations)}; {', '.join(self.where)})"

    def _repr_html_(self) -> str:
        names, rows = self._table()
        heads = ["SAE", *self._places, *(self.measure(name).label for name in names)]
        told = facts_html("Verdicts", [(str(place + 1), verdict) for place, verdict in enumerate(self.summary())])
        return table_html(self.title, heads, rows) + told

    def rows(self) -> list[dict[str, Any]]:
        """Of each SAE what its point shows: L0 and how faithful it is, and where the intervals of these end."""
        found, metrics = [], ("l0", *self._faithful(self.shown))
        for name, evaluation in self.evaluations.items():
            row: dict[str, Any] = {"name": name}
            for metric in metrics:
                low, high = self.interval(name, metric) or (None, None)
                row |= {metric: evaluation.values.get(metric), f"{metric}_low": low, f"{metric}_high": high}
            found.append(row)
        return found

    def to_dict(self) -> dict[str, Any]:
        """All of it as plain data, as ``compare.json`` has it; numbers that are none are None."""
        saes = {
            name: {"site": self.sites.get(name), "values": plain_numbers(one.values),
                   "errors": plain_numbers(one.errors),
                   "remarks": list(one.remarks), "about": dict(one.about)}
            for name, one in self.evaluations.items()
        }  # fmt: skip
        pairs = [pair.to_dict() | {"verdict": self.verdict(pair)} for pair in self.pairs]
        return {
            "about": dict(self.about), "level": LEVEL, "rules": self.rules(), "saes": saes, "pairs": pairs,
            "verdicts": self.verdicts(),
        }  # fmt: skip


def _turned(pair: Compared) -> Compared:
    """The same, as ``other − one``."""
    return attrs.evolve(
        pair,
        one=pair.other,
        other=pair.one,
        difference=-pair.difference + 0.0,
        low=-pair.high + 0.0,
        high=-pair.low + 0.0,
        joint_low=-pair.joint_high + 0.0,
        joint_high=-pair.joint_low + 0.0,
    )
