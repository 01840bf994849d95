"""What travels between an eval that accumulates and the pass over contexts that it takes part in, and what it finds.

Importing this imports no torch.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs

from saekit.reasons import alike
from saekit.shapes import by_shapes
from saekit.site import Sites
from saekit.tables import facts_html, table_html
from saekit.values import Histogram

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

    from saekit.kernels.sparse import SparseFeatures

__all__ = [
    "Evaluation", "Evaluations", "Measure", "Needs", "Outcome", "Seen", "json_text", "measured_text", "plain_number",
    "plain_numbers",
]  # fmt: skip


@attrs.frozen(kw_only=True)
class Needs:
    """What an eval asks for; what no eval asks for is not computed."""

    rows: bool = False
    """What the SAE reads, what it should give, and what it gives: :attr:`Seen.inputs`, ``targets``, ``outputs``."""
    features: bool = False
    """Its feature activations, :attr:`Seen.features`."""
    clean: bool = False
    """The model's loss as it is."""
    spliced: bool = False
    """The model's loss with what the SAE gives at its targets."""
    zero: bool = False
    """Its loss with zeros there."""
    mean: int = 0
    """Its loss with the mean there, over so many contexts, which are read first; 0: none."""
    kl: bool = False
    """Of each of these forwards the Kullback-Leibler divergence from the clean one."""
    top1: bool = False
    """Of each whether its likeliest token is that of the clean one."""
    logits: bool = False
    """Of each the logits."""
    batch_size: int = 16
    """Contexts in one forward of the model, at most."""

    @property
    def model(self) -> bool:
        """Whether any loss is asked for."""
        return bool(self.clean or self.spliced or self.zero or self.mean)

    @property
    def sae(self) -> bool:
        """Whether the SAE must run."""
        return self.rows or self.features or self.spliced

    @property
    def by_logits(self) -> bool:
        """Whether logits must be made."""
        return self.model and (self.kl or self.top1 or self.logits)

    def __or__(self, other: Needs) -> Needs:
        """What either asks for; the smaller batches."""
        flags = {
            name: getattr(self, name) or getattr(other, name)
            for name in ("rows", "features", "clean", "spliced", "zero", "kl", "top1", "logits")
        }
        size = min(self.batch_size, other.batch_size)
        return Needs(mean=max(self.mean, other.mean), batch_size=size, **flags)


@attrs.frozen(eq=False, kw_only=True)
class Outcome:
    """What the model made of one batch in one forward."""

    loss: Tensor
    """``[b, t - 1]``: next-token cross-entropy in nats; the ``i``-th is that of token ``i + 1``."""
    _kl: Tensor | None = None
    _agrees: Tensor | None = None
    _logits: Tensor | None = None

    __repr__ = by_shapes

    @property
    def kl(self) -> Tensor:
        """``[b, t]``: KL(clean ‖ this) in nats at each position; of the clean forward 0."""
        return _asked_for(self._kl, "kl")  # type: ignore[no-any-return]

    @property
    def agrees(self) -> Tensor:
        """``[b, t]`` bool: whether the likeliest token is that of the clean forward."""
        return _asked_for(self._agrees, "top1")  # type: ignore[no-any-return]

    @property
    def logits(self) -> Tensor:
        """``[b, t, d_vocab]``."""
        return _asked_for(self._logits, "logits")  # type: ignore[no-any-return]


@attrs.frozen(eq=False, kw_only=True)
class Seen:
    """A batch of contexts, and what was asked for of it."""

    numbers: tuple[int, ...]
    """The number of each context among all that are measured; none is shown twice."""
    tokens: Tensor
    """``[b, t]`` ids."""
    kept: Tensor
    """``[b, t]`` bool: the positions that count."""
    sites: Sites
    _inputs: Tensor | None = None
    _targets: Tensor | None = None
    _outputs: Tensor | None = None
    _features: SparseFeatures | None = None
    _clean: Outcome | None = None
    _spliced: Outcome | None = None
    _zero: Outcome | None = None
    _mean: Outcome | None = None

    __repr__ = by_shapes

    @property
    def inputs(self) -> Tensor:
        """``[b, t, d_in]``: what the SAE reads."""
        return _asked_for(self._inputs, "rows")  # type: ignore[no-any-return]

    @property
    def targets(self) -> Tensor:
        """``[b, t, d_out]``: what it should give; of an SAE the inputs."""
        return _asked_for(self._targets, "rows")  # type: ignore[no-any-return]

    @property
    def outputs(self) -> Tensor:
        """``[b, t, d_out]``: what it gives."""
        return _asked_for(self._outputs, "rows")  # type: ignore[no-any-return]

    @property
    def features(self) -> SparseFeatures:
        """Its features by their entries; row ``i * t + j`` is position ``j`` of context ``i``, counted or not."""
        return _asked_for(self._features, "features")  # type: ignore[no-any-return]

    @property
    def clean(self) -> Outcome:
        """The model as it is."""
        return _asked_for(self._clean, "clean")  # type: ignore[no-any-return]

    @property
    def spliced(self) -> Outcome:
        """The model with what the SAE gives at its targets."""
        return _asked_for(self._spliced, "spliced")  # type: ignore[no-any-return]

    @property
    def zero(self) -> Outcome:
        """The model with zeros there."""
        return _asked_for(self._zero, "zero")  # type: ignore[no-any-return]

    @property
    def mean(self) -> Outcome:
        """The model with the mean there."""
        return _asked_for(self._mean, "mean")  # type: ignore[no-any-return]

    def summed(self, values: Tensor) -> Tensor:
        """``[b]`` in float64, on the CPU: of each context the sum of ``values`` over the positions that count.

        ``values`` are ``[b, t]``, or ``[b, t - 1]`` as losses are: a loss counts with the token it is predicted from.
        """
        import torch

        values = values.cpu().double()  # not every device has float64
        kept = self.kept.cpu()[:, : values.shape[1]]
        return torch.where(kept, values, 0.0).sum(1)


@attrs.frozen
class Measure:
    """What a number of an eval means, in words, and which of two is the better one."""

    label: str
    better: int = attrs.field(default=0, validator=attrs.validators.in_((-1, 0, 1)))
    """1: more of it is better; -1: less; 0: neither."""
    short: str = ""
    """The heading of a column; empty: the label."""
    headline: int = 0
    """Its place among the numbers that are told first, from 1 on; 0: it is not told first."""
    fidelity: bool = False
    """Whether it says how faithful the SAE is, which more features per token pay for: it is told beside L0."""
    of_site: bool = False
    """Whether it is of what a site holds, or of what its ablation costs: SAEs at other sites are not compared by it."""
    of_model: bool = False
    """Whether all SAEs at a site have it in common: no difference to speak of."""


@attrs.frozen(eq=False, kw_only=True)
class Evaluation:
    """Numbers by name with their standard errors."""

    values: Mapping[str, float]
    """The numbers."""
    errors: Mapping[str, float] = attrs.field(factory=dict)
    """The standard errors of those that have one: by bootstrap over contexts."""
    histograms: Mapping[str, Histogram] = attrs.field(factory=dict)
    features: Mapping[str, NDArray[Any]] = attrs.field(factory=dict)
    """Numbers of each feature, ``[d_sae]``."""
    remarks: tuple[str, ...] = ()
    """What looks wrong, in words."""
    about: Mapping[str, Any] = attrs.field(factory=dict)
    """What was measured, and how: plain data."""
    contexts: tuple[int, ...] = ()
    """The numbers of the contexts that have a token that counts."""
    resampled: Mapping[str, NDArray[Any]] = attrs.field(factory=dict)
    """Of each number that has an error ``[n_bootstrap]``: what it is in each resample of the contexts.  Those of SAEs
    that were measured on the same contexts are of the same resamples."""
    file: Path | None = None
    """Where the numbers were written."""
    sums: Mapping[str, Any] = attrs.field(factory=dict)
    """The :class:`saekit.evals.Sums` of each eval, by its name."""
    measures: Mapping[str, Measure] = attrs.field(factory=dict)
    """What the numbers mean, of those of which the eval says it."""

    @measures.validator
    def _check_measures(self, _: Any, value: Any) -> None:
        if not isinstance(value, Mapping) or not all(isinstance(one, Measure) for one in value.values()):
            raise TypeError(f"measures must be a mapping of names to saekit.measuring.Measure, found {value!r}")

    def __getitem__(self, name: str) -> float:
        if name not in self.values:
            hint = alike(name, self.values) or f"; there are {', '.join(self.values)}"
            raise KeyError(f"there is no number {name!r}{hint}")
        return self.values[name]

    def text_of(self, name: str) -> str:
        """A number with its standard error, for people; empty where there is none of that name."""
        return measured_text(self.values[name], self.errors.get(name)) if name in self.values else ""

    def measure(self, name: str) -> Measure:
        """What a number means; ``NAME/TARGET`` is that of ``NAME`` of one of several targets."""
        if name in self.measures:
            return self.measures[name]
        of_all, _, target = name.partition("/")
        known = self.measures.get(of_all, Measure(of_all.replace("_", " ")))
        return attrs.evolve(known, label=f"{known.label} of {target}", short="", headline=0) if target else known

    @property
    def headlines(self) -> list[str]:
        """The numbers that are told first."""
        places = {name: self.measure(name).headline for name in self.values}
        return sorted((name for name, place in places.items() if place), key=places.__getitem__)

    def to_dict(self, *, features: bool = False) -> dict[str, Any]:
        """As JSON has it, where what is no number is None; with ``features``, with the numbers of each, too."""
        told = {
            "values": plain_numbers(self.values),
            "errors": plain_numbers(self.errors),
            "histograms": {
                name: {"counts": list(one.counts), "edges": list(one.edges)} for name, one in self.histograms.items()
            },
            "remarks": list(self.remarks),
            "about": dict(self.about),
        }
        each = {name: [plain_number(value) for value in found.tolist()] for name, found in self.features.items()}
        return told | ({"features": each} if features else {})

    def __repr__(self) -> str:
        shown = (self.headlines or list(self.values))[:3]
        numbers = ", ".join(f"{name} {self.text_of(name)}" for name in shown)
        return f"Evaluation({numbers}; {len(self.values)} numbers on {len(self.contexts):,} contexts)"

    def _repr_html_(self) -> str:
        """All numbers, for notebooks."""
        title = str(self.about.get("sae", "Evaluation"))
        return facts_html(title, [(name, self.text_of(name)) for name in self.values])

    def numbers(self) -> dict[str, float]:
        """Values, and errors as ``NAME_se``."""
        return {**self.values, **{f"{name}_se": error for name, error in self.errors.items()}}

    @classmethod
    def joined(cls, parts: Iterable[Evaluation]) -> Evaluation:
        """What several evals have found of one SAE on the same contexts, as one; of a name the first counts."""
        whole = cls(values={})
        for part in parts:
            merged: dict[str, Any] = {
                name: {**getattr(whole, name), **_new(getattr(part, name), getattr(whole, name))}
                for name in ("values", "errors", "histograms", "features", "about", "resampled", "sums", "measures")
            }
            remarks = tuple(dict.fromkeys((*whole.remarks, *part.remarks)))
            first = whole if whole.contexts and (whole.resampled or not part.resampled) else part
            whole = cls(**merged, remarks=remarks, contexts=first.contexts)
        return whole


class Evaluations(dict[str, Evaluation]):
    """Those of several SAEs, by their names."""

    def to_dict(self, *, features: bool = False) -> dict[str, Any]:
        """As JSON has it: of each SAE what :meth:`Evaluation.to_dict` gives."""
        return {name: one.to_dict(features=features) for name, one in self.items()}

    @property
    def names(self) -> list[str]:
        """The numbers that any of them has."""
        return list(dict.fromkeys(name for one in self.values() for name in one.values))

    def by_text(self) -> list[Evaluations]:
        """Those that were measured on the same contexts of one model, together: the numbers of others are not alike."""
        found: dict[tuple[str, str], Evaluations] = {}
        for name, one in self.items():
            key = str(one.about.get("contexts_digest")), str(one.about.get("model"))
            found.setdefault(key, Evaluations())[name] = one
        return list(found.values())

    def rows(self) -> list[list[str]]:
        """A table for people: of each number its name, and what it is of each SAE."""
        return [[name, *(one.text_of(name) for one in self.values())] for name in self.names]

    def __repr__(self) -> str:
        return "\n".join(f"{name}: {one!r}" for name, one in self.items()) or "Evaluations({})"

    def _repr_html_(self) -> str:
        """The table, for notebooks; of SAEs on other contexts one of their own."""
        parts = self.by_text() or [self]
        titles = ["Evaluations", *["Evaluations on other contexts, or of another model"] * (len(parts) - 1)]
        return "".join(table_html(title, ["", *part], part.rows()) for title, part in zip(titles, parts, strict=True))


def json_text(told: Mapping[str, Any]) -> str:
    """``told`` as JSON for people, too: indented, and lists of numbers on one line each."""
    text = json.dumps(told, indent=2, allow_nan=False)
    return re.sub(r"\[\n[-+.\deE,\s]*\]", lambda found: f"[{' '.join(found[0][1:-1].split())}]", text)


def measured_text(value: float, error: float | None = None) -> str:
    """A number with its standard error, with as many digits as that leaves: ``0.853 ± 0.012``."""
    if not math.isfinite(value):
        return "nan" if math.isnan(value) else f"{value:g}"
    if error is None or not math.isfinite(error):
        return f"{value:,.0f}" if value == round(value) and abs(value) < 1e15 else f"{value:.4g}"
    if error == 0:
        return f"{value:.4g} ± 0"
    places = 1 - math.floor(math.log10(error))  # two digits of the error
    if not -1 <= places <= 8:
        return f"{value:.4g} ± {error:.2g}"
    places = max(places, 0)
    return f"{value:,.{places}f} ± {error:,.{places}f}"


def plain_number(value: float) -> float | None:
    """As JSON has it: None for what is no number."""
    return value if math.isfinite(value) else None


def plain_numbers(values: Mapping[str, float]) -> dict[str, float | None]:
    """The same of each, by name."""
    return {name: plain_number(value) for name, value in values.items()}


def _new(some: Mapping[str, Any], known: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in some.items() if name not in known}


def _asked_for(value: Any, what: str) -> Any:
    if value is None:
        raise ValueError(f"this was not asked for: the eval's needs must have {what}")
    return value
