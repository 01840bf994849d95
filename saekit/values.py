"""What travels through a run: batches, what a step is given and reports, what is logged, what an SAE knows of itself.

Importing this imports no torch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Self, TypeAlias

import attrs

from saekit.errors import ConfigError
from saekit.forwards import Forward, Replacement, Want
from saekit.shapes import by_shapes
from saekit.site import Site, Sites
from saekit.tables import ShownByLines

if TYPE_CHECKING:
    import torch
    from torch import Tensor

__all__ = [
    "Batch", "EvalRun", "Forward", "Histogram", "Metrics", "Ports", "Replacement", "RunEnd", "RunInfo",
    "SAEInfo", "Scale", "StepInput", "StepOutput", "Want", "is_scale",
]  # fmt: skip

_SCALED = "expected_average_only_in"


@attrs.frozen(eq=False)
class Batch:
    """Rows of activations: for each site, ``[n, d_in]`` for the same ``n`` tokens, and where the tokens are from."""

    activations: Mapping[Site, Tensor]
    tokens: Tensor | None = None
    """``[n]`` token ids, where the source knows them."""
    documents: Tensor | None = None
    """``[n]`` positions of the tokens' documents in the dataset."""
    positions: Tensor | None = None
    """``[n]`` positions in the context."""
    counts: tuple[int, ...] = attrs.field(default=(), kw_only=True)
    """Of processes that split a batch, whose part this is: the rows of each.  Empty: this is the whole batch."""

    __repr__ = by_shapes

    def __len__(self) -> int:
        return len(next(iter(self.activations.values())))

    def __getitem__(self, site: Site | str) -> Tensor:
        """The rows ``[n, d]`` at a site, or at the site of this name; :class:`KeyError` tells which there are."""
        for own, rows in self.activations.items():
            if site in (own, own.name):
                return rows
        raise KeyError(f"{site!r}: this batch has {', '.join(own.name for own in self.activations)}")

    @property
    def whole(self) -> int:
        """Rows of the whole batch."""
        return sum(self.counts) if self.counts else len(self)

    def rows_at(self, sites: Sequence[Site]) -> Tensor:
        """The rows ``[n, d]`` at ``sites``, side by side; of one site the very tensor that is there."""
        if len(sites) == 1:
            return self.activations[sites[0]]
        import torch

        return torch.cat([self.activations[site] for site in sites], dim=-1)

    def thinned(self, n: int) -> Batch:
        """``n`` rows spread evenly over the batch, or all: rows may be in an order, so the first would not be fair."""
        if n >= len(self):
            return self
        return self.at([row * len(self) // n for row in range(n)])

    def at(self, kept: list[int] | Tensor | slice) -> Batch:
        """The rows of these numbers."""
        origins = [None if origin is None else origin[kept] for origin in (self.tokens, self.documents, self.positions)]
        return Batch({site: rows[kept] for site, rows in self.activations.items()}, *origins)


@attrs.frozen(eq=False)
class Ports:
    """The sites that a dictionary reads, and those that it writes, with their widths.

    Inside a dictionary the inputs lie side by side in one matrix ``x [n, d_in]``, and the targets in another,
    ``[n, d_out]``, in the order of the names here.  An SAE has one site, which is both.
    """

    inputs: Mapping[str, int]
    """The width of each input by the name of its site (:attr:`saekit.Site.name`)."""
    targets: Mapping[str, int] = attrs.field()
    """Likewise of each target.  Left out: the inputs."""

    @targets.default
    def _inputs(self) -> Mapping[str, int]:
        return self.inputs

    @classmethod
    def one(cls, d_in: int, name: str = "x") -> Ports:
        """Those of an SAE of the width ``d_in``."""
        return cls({name: d_in})

    @classmethod
    def of(cls, sites: Sites, widths: Mapping[Site, int]) -> Ports:
        """Those at ``sites``."""
        inputs, targets = ({site.name: widths[site] for site in some} for some in (sites.inputs, sites.targets))
        return cls(inputs, targets)

    def __attrs_post_init__(self) -> None:
        for what, widths in (("inputs", self.inputs), ("targets", self.targets)):
            if not widths or any(isinstance(width, bool) or width < 1 for width in widths.values()):
                raise ValueError(f"{what} must be widths of 1 or more by the names of sites, found {dict(widths)}")

    def __eq__(self, other: object) -> bool:
        """In the same order, too: columns depend on it."""
        if not isinstance(other, Ports):
            return NotImplemented
        return [*self.inputs.items()] == [*other.inputs.items()] and [*self.targets.items()] == [*other.targets.items()]

    def __hash__(self) -> int:
        return hash((tuple(self.inputs.items()), tuple(self.targets.items())))

    @property
    def d_in(self) -> int:
        """The width of all inputs side by side."""
        return sum(self.inputs.values())

    @property
    def d_out(self) -> int:
        """The width of all targets side by side."""
        return sum(self.targets.values())

    @property
    def same(self) -> bool:
        """Whether the targets are the inputs."""
        return [*self.inputs.items()] == [*self.targets.items()]

    def join_input(self, values: Mapping[str, Tensor]) -> Tensor:
        """``x [..., d_in]``: the inputs side by side, from ``values [..., width]`` by their names.

        Others among ``values`` do no harm.  :class:`saekit.errors.ConfigError` for one that is missing, or of another
        size than the others have or its width says.
        """
        import torch

        if missing := [name for name in self.inputs if name not in values]:
            raise ConfigError(f"the input {missing[0]} is missing; there are {', '.join(values) or 'none'}")
        for name, width in self.inputs.items():
            shape = list(values[name].shape)
            if shape[-1:] != [width]:
                raise ConfigError(f"the input {name} must be [..., {width}], found {shape}")
            first, *_ = self.inputs
            if shape[:-1] != list(values[first].shape[:-1]):
                raise ConfigError(
                    f"the inputs are of different tokens: {first} is {list(values[first].shape)}, {name} {shape}"
                )
        return torch.cat([values[name] for name in self.inputs], dim=-1)

    def split_input(self, x: Tensor) -> dict[str, Tensor]:
        """Views ``[..., width]`` of ``x [..., d_in]``, by the names of the inputs."""
        return _split(x, self.inputs, "d_in")

    def split_target(self, y: Tensor) -> dict[str, Tensor]:
        """Views ``[..., width]`` of ``y [..., d_out]``, by the names of the targets."""
        return _split(y, self.targets, "d_out")

    def one_target(self, y: Tensor, name: str) -> Tensor:
        """The view of the target ``name``; :class:`saekit.errors.ConfigError` where there is none of that name."""
        if name not in self.targets:
            raise ConfigError(f"there is no target {name!r}; there are {', '.join(self.targets)}")
        return self.split_target(y)[name]

    def sum_of_targets(self, y: Tensor) -> Tensor:
        """``[..., width]``: all targets of ``y [..., d_out]`` added up, which must be of one width.

        So some readers of cross-layer transcoders have it, though what is written to different layers is never added.
        """
        if len({*self.targets.values()}) > 1:
            raise ConfigError(f"targets of different widths cannot be added up: {dict(self.targets)}")
        return sum(self.split_target(y).values())  # type: ignore[return-value]


def _split(values: Tensor, widths: Mapping[str, int], name: str) -> dict[str, Tensor]:
    whole = sum(widths.values())
    if list(values.shape[-1:]) != [whole]:
        raise ConfigError(
            f"what is split must be [..., {name}], and {name} is {whole}: {', '.join(widths)} side by side; found "
            f"{list(values.shape)}"
        )
    return dict(zip(widths, values.split([*widths.values()], dim=-1), strict=True))


@attrs.frozen
class StepInput:
    """What a training step may depend on beside its ``x [n, d_in]``."""

    step: int
    """From 0."""
    generator: torch.Generator
    """For whatever the step draws."""
    dead: Tensor | None = None
    """``[d_sae]`` bool: the features that have not fired for the dead-feature window."""
    steps: int | None = None
    """How many there are to be in all, as far as that is known: a schedule of the architecture's own ends there."""
    target: Tensor | None = None
    """``[n, d_out]``: what is to be reconstructed.  None: ``x`` itself."""
    batch: Batch | None = None
    """Where the rows come from: tokens, documents and positions, where the source knows them."""
    backend: Any = None
    """The :class:`saekit.protocols.ModelBackend` of the run, where there is one: for losses of the model's outputs."""

    __repr__ = by_shapes

    def target_for(self, x: Tensor) -> Tensor:
        """:attr:`target`, or ``x``."""
        return x if self.target is None else self.target


class StepOutput(NamedTuple):
    """What a training step reports.  Tensors stay on the device; nothing waits for them."""

    loss: Tensor
    losses: Mapping[str, Tensor]
    """The terms by their logged name, such as ``mse_loss``."""
    output: Tensor
    """``[n, d_out]``, detached."""
    fired: Tensor
    """``[d_sae]``: rows on which each feature was active: above zero or, where features may be below it, not zero."""
    coefficients: Mapping[str, float | Tensor] = {}
    """Coefficients at this step, such as ``l1_coefficient``; tensors are scalars."""
    metrics: Mapping[str, float | Tensor] = {}
    """The architecture's own metrics, logged under these names; tensors are scalars."""

    def __repr__(self) -> str:
        return by_shapes(self)


Scale: TypeAlias = float | Mapping[str, float]
"""What activations are multiplied by: a number, or one for each site by its name."""


def is_scale(value: object) -> bool:
    """Whether activations can be multiplied by ``value``: a finite number above 0, or such numbers by name."""
    if isinstance(value, Mapping):
        return bool(value) and all(isinstance(name, str) and _is_factor(one) for name, one in value.items())
    return _is_factor(value)


def _is_factor(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < math.inf


@attrs.frozen(kw_only=True, repr=False)
class SAEInfo(ShownByLines):
    """Where an SAE comes from and where it belongs."""

    architecture: str = ""
    """The qualified key of the plugin that made it."""
    options: Mapping[str, Any] = attrs.field(factory=dict)
    """The architecture's options as plain data, every plugin by its qualified key."""
    input_transform: str | Mapping[str, Any] | None = None
    """What it does to each row before the encoder: the qualified key of the plugin, or with its options a table."""
    sites: Sites | None = None
    """The sites of the model that it reads and writes."""
    metadata: Mapping[str, Any] = attrs.field(factory=dict)
    """Model name, dataset, context size, token policies and the like: what decides what the SAE is fed."""
    provenance: Mapping[str, Any] = attrs.field(factory=dict, eq=False)
    """What it was read from, of an SAE that was loaded: the ``loader``; the ``repo`` of the Hub, its ``revision`` and
    the ``folder``; the ``release`` and ``sae_id`` that were asked for; the sha256 of the ``files`` by name; what these
    did not state (``defaulted``), also of ``options`` of training, or what means nothing here, which then are saekit's
    defaults and say nothing of how it was trained (``not_stated``); their names for what saekit calls otherwise
    (``renamed``): what of it applies."""

    @property
    def scale_is_unknown(self) -> bool:
        """Whether the SAE was trained on scaled activations, and nobody knows by which factor."""
        return self.metadata.get("normalize_activations") in (True, _SCALED)

    @property
    def site(self) -> Site | None:
        """The site of an SAE; of what has several, the first that is read."""
        return None if self.sites is None else self.sites.inputs[0]

    def with_scale(self, scale: Scale | None) -> Self:
        """For weights that a factor was folded into, where it was unknown until now or nothing was said; None: unknown.

        A factor of 1 says nothing.
        """
        if scale is None:
            return attrs.evolve(self, metadata={**self.metadata, "normalize_activations": _SCALED})
        if scale == 1:
            return self
        return self.with_known_scale(scale)

    def with_known_scale(self, scale: Scale | None) -> Self:
        """For weights that a factor was folded into, where it was unknown until now; None: no number for each site."""
        left = {name: value for name, value in self.metadata.items() if name != "normalize_activations"}
        return attrs.evolve(self, metadata=left if scale is None else {**left, "activation_scale": scale})

    def lines(self) -> list[str]:
        """What is known, a line each, for people."""
        known = [("architecture", self.architecture), ("input_transform", self.input_transform), *self._places()]
        return [f"{name}={value!r}" for name, value in [*known, *self.metadata.items()] if value not in ("", None)]

    def _places(self) -> list[tuple[str, Any]]:
        if self.sites is None or self.sites == Sites.one(self.sites.inputs[0]):
            return [("site", self.site)]
        targets = [] if self.sites.same else [("targets", self.sites.targets)]
        return [("inputs", self.sites.inputs), *targets]


@attrs.frozen
class Histogram:
    """How many values lie between neighboring edges: ``counts[i]`` of them in ``edges[i]`` to ``edges[i + 1]``."""

    counts: tuple[int, ...]
    edges: tuple[float, ...]
    """One more than there are counts."""


Metrics: TypeAlias = Mapping[str, float | Histogram]
"""What is logged, by name."""


@attrs.frozen(eq=False, kw_only=True)
class EvalRun:
    """What an eval may know of the run whose SAE it measures."""

    name: str
    """The SAE's, among those that are trained together."""
    backend: Any
    """The :class:`saekit.protocols.ModelBackend` of the run."""
    sites: Sites
    """What the SAE reads and writes."""
    device: str
    """Where the SAE is."""
    steps: int
    """How many are trained."""
    seed: int
    """For what the eval draws: the same in every run of these options."""
    open_contexts: Callable[[], Tensor | None]
    """See :attr:`contexts`."""

    @property
    def contexts(self) -> Tensor | None:
        """``[n, context_size]`` token ids that training never sees, as every measurement is given.

        None for an eval whose entry says ``needs_text=False``, where no other eval of the run reads text: it is opened
        for none but those that do.
        """
        return self.open_contexts()


@attrs.frozen
class RunEnd:
    """How a run ended, or one SAE of several: what a tracker may be told before it is closed."""

    status: Literal["finished", "interrupted", "diverged", "failed"]
    """`finished`: trained and saved; `interrupted`: stopped from outside, to go on; `diverged`: its loss is no number
    any more; `failed`: by an error.  A process that is killed tells nothing; one that goes on with its run does."""
    reason: str = ""
    """In words, where it is not `finished`."""


@attrs.frozen
class RunInfo:
    """What a tracker may know of the run it follows."""

    name: str
    folder: Path
    config: Mapping[str, Any]
    """The whole configuration as plain data."""
    resumed_at: int | None = None
    """The step after which a run that was stopped goes on, or None: what was logged for later steps comes again."""
    file: Callable[[str], Path] = attrs.field(repr=False, eq=False)
    """The path in the run folder of a file or folder of the tracker's own, half-written ones of which are removed.

    In a run, :class:`saekit.errors.ConfigError` when it is the run's own or another tracker's, or ``name`` is not the
    name of one file.
    """

    @file.default
    def _beside(self) -> Callable[[str], Path]:
        return self.folder.joinpath
