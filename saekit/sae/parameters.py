"""An architecture's parameters, stated once, in a table; whatever is done with parameters follows from it.

Memory and its layout, starting values, the activation scale, saving and loading with checks of shapes, which of them
fine-tuning trains, rows of norm 1, learning-rate factors, histograms, and how large an SAE is: nobody else knows a
parameter's name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TypeAlias

import attrs
import torch
from torch import Tensor, nn

from saekit.config import SAEConfig
from saekit.errors import ConfigError, SAEFormatError
from saekit.kernels.workspace import zeros
from saekit.plugins.text import short
from saekit.values import Ports, Scale

__all__ = [
    "Factor", "Parameter", "ParameterTable", "Start", "factors_of", "one_factor", "scale_of", "tensors_of", "to_hold",
    "to_take",
]  # fmt: skip

Factor: TypeAlias = float | Tensor
"""One number for all, or a vector of one for each column."""

_BLOCK = 1024  # rows that are worked on together, in the cache
_CPU = torch.device("cpu")
_to_hold: ContextVar[Mapping[str, Tensor] | None] = ContextVar("_to_hold", default=None)
_to_take: ContextVar[Mapping[str, Tensor] | None] = ContextVar("_to_take", default=None)


@contextmanager
def to_hold(tensors: Mapping[str, Tensor]) -> Iterator[None]:
    """Modules that are made here shall hold ``tensors``: they are compared with the table before anything is allocated.

    :class:`SAEFormatError` names those of other shapes.
    """
    token = _to_hold.set(tensors)
    try:
        yield
    finally:
        _to_hold.reset(token)


@contextmanager
def to_take(parameters: Mapping[str, Tensor]) -> Iterator[None]:
    """Modules that are loaded here take over those of ``parameters`` that :meth:`ParameterTable.load` is given.

    Others are copied.
    """
    token = _to_take.set(parameters)
    try:
        yield
    finally:
        _to_take.reset(token)


@attrs.frozen
class Parameter:
    """One parameter of an architecture."""

    name: str
    dims: tuple[str | int, ...]
    """Its shape: of ``"d_in"`` and ``"d_out"`` (all inputs, and all targets, side by side), ``"d_sae"``, ``"inputs"``
    and ``"targets"`` (how many there are), and plain numbers."""
    init: Callable[[Start, tuple[int, ...]], Tensor] = attrs.field(kw_only=True)
    """Its starting value, of the shape that is given, on the CPU: see :mod:`saekit.sae.init`."""
    turn: int = attrs.field(default=1, kw_only=True)
    """Starting values are made in this order, those of one turn as they stand in the table: what draws random numbers
    changes those of all that come after it."""
    scale: Mapping[str, int] = attrs.field(factory=dict, kw_only=True)
    """Which power of the activation scale goes into it: ``{"d_in": 1}`` for a matrix that meets inputs, ``{"d_out":
    -1}`` for what makes outputs."""
    grows: int | None = attrs.field(default=None, kw_only=True)
    """Which power of a feature's size goes into it, along ``d_sae``: 1 for what makes the feature, -1 for what is made
    of it, 0 for what stays as it is when features are measured otherwise.  None: nobody says, and so they are not."""
    unit_rows: bool = attrs.field(default=False, kw_only=True)
    """Keep every row, along the last dimension, at norm 1: project the gradient before each update, rescale after."""
    groups: tuple[str, ...] = attrs.field(default=(), kw_only=True)
    """The fine-tuning methods (``training.finetuning_method``) that train it."""
    lr_factor: float = attrs.field(default=1.0, kw_only=True)
    """What the learning rate is multiplied by."""
    columns_contiguous: bool = attrs.field(default=False, kw_only=True)
    """Of a matrix: keep the numbers of a column together in memory, as kernels read those of active features."""
    keeps_digits: bool = attrs.field(default=False, kw_only=True)
    """Never in less than float32, whatever the SAE is in: small updates of it would be lost."""
    histogram: str | None = attrs.field(default=None, kw_only=True)
    """The name, below ``weights/``, of its logged histogram: of a vector's numbers, of the norms of a matrix's rows."""
    folds_into: str | None = attrs.field(default=None, kw_only=True)
    """The matrix whose rows it multiplies, one factor each, and of which it is a part when the SAE is saved.  Such a
    parameter is there only where fine-tuning, or a file that is loaded, adds it; before, it does not learn."""
    split: str | None = attrs.field(kw_only=True)
    """The dimension along which it is split when features are split over processes; None: each has all of it."""

    @split.default
    def _by_feature(self) -> str | None:
        return "d_sae" if "d_sae" in self.dims else None

    @split.validator
    def _is_a_dimension(self, _: object, split: str | None) -> None:
        if split is not None and split not in self.dims:
            raise ValueError(f"{self.name} is to be split along {split}, and its dimensions are {self.dims}")

    @property
    def optional(self) -> bool:
        """Whether an SAE may be without it."""
        return self.folds_into is not None

    def shape(self, sizes: Mapping[str, int]) -> tuple[int, ...]:
        """For sizes of the named dimensions."""
        return tuple(dim if isinstance(dim, int) else sizes[dim] for dim in self.dims)

    def memory(self, shape: tuple[int, ...], dtype: torch.dtype) -> nn.Parameter:
        """Zeros, laid out as the table says.  Where nobody writes to them they take no memory."""
        turned = self._turned(shape, dtype)
        memory = zeros(shape[::-1] if turned else shape, self.dtype(dtype), _CPU)
        return nn.Parameter(memory.T if turned else memory)

    def unwritten(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> nn.Parameter:
        """Anything, laid out likewise, that somebody writes over.

        Not in large pages: to get those for the first time takes longer than to read a file.
        """
        turned = self._turned(shape, dtype)
        memory = torch.empty(shape[::-1] if turned else shape, dtype=self.dtype(dtype), device=device)
        return nn.Parameter(memory.T if turned else memory)

    def _turned(self, shape: tuple[int, ...], dtype: torch.dtype) -> bool:
        # In float64, results are compared with those of others to the last digits, which depend on the order in memory.
        return self.columns_contiguous and len(shape) == 2 and dtype != torch.float64

    def dtype(self, wanted: torch.dtype) -> torch.dtype:
        """The type that it has in an SAE of the type ``wanted``."""
        return torch.promote_types(wanted, torch.float32) if self.keeps_digits else wanted

    def fold(self, value: Tensor, factors: Mapping[str, Factor]) -> None:
        """Multiply ``value`` in place by its powers of ``factors``, which are along the dimensions of these names."""
        for dim, power in self.scale.items():
            factor = factors[dim]
            if isinstance(factor, Tensor):
                factor = self._along(dim, factor.to(value))
            for _ in range(abs(power)):
                value.mul_(factor) if power > 0 else value.div_(factor)

    def _along(self, dim: str, factor: Tensor) -> Factor:
        if dim in self.dims:
            return factor.reshape(-1, *[1] * (len(self.dims) - 1 - self.dims.index(dim)))
        return one_factor(factor, f"{self.name} has no dimension {dim}")


@attrs.frozen
class ParameterTable:
    """Those of one SAE.  What its class adds outside the table is saved and trained, never initialized or scaled."""

    entries: tuple[Parameter, ...]
    """In the order in which they are registered, on which sums over all of them depend in their last digits."""
    sizes: Mapping[str, int]
    """Of the named dimensions."""

    def check(self) -> None:
        names, sizes = [getattr(entry, "name", None) for entry in self.entries], ", ".join(self.sizes)
        for entry in self.entries or (None,):
            named = {dim for dim in getattr(entry, "dims", ()) if isinstance(dim, str)}
            if not isinstance(entry, Parameter) or names.count(entry.name) > 1 or named - {*self.sizes}:
                what = f"expected Parameters of dimensions {sizes} or numbers, each name once"
                raise ValueError(f"parameters_of returned {short(entry, 100)}; {what}")

    def __iter__(self) -> Iterator[Parameter]:
        return iter(self.entries)

    def __getitem__(self, name: str) -> Parameter:
        return next(entry for entry in self.entries if entry.name == name)

    def of_dims(self, *dims: str) -> str | None:
        """The name of the one parameter of these dimensions; None where there is none, or several."""
        found = [entry.name for entry in self.entries if entry.dims == dims]
        return found[0] if len(found) == 1 else None

    def shape(self, name: str) -> tuple[int, ...]:
        """Of a parameter."""
        return self[name].shape(self.sizes)

    # ---- memory

    def allocate(self, module: nn.Module, dtype: torch.dtype) -> None:
        """Register all parameters: zeros, but for those that may be missing, which are."""
        self._check(_to_hold.get())
        for entry in self.entries:
            parameter = None if entry.optional else entry.memory(entry.shape(self.sizes), dtype)
            module.register_parameter(entry.name, parameter)

    def _check(self, tensors: Mapping[str, Tensor] | None) -> None:
        """:class:`SAEFormatError` unless ``tensors`` may be those of this table."""
        if tensors is None:
            return
        shapes = {entry.name: list(entry.shape(self.sizes)) for entry in self.entries}
        problems = [
            f"{name} has shape {list(value.shape)}, expected {shapes[name]}"
            for name, value in tensors.items()
            if name in shapes and list(value.shape) != shapes[name]
        ]
        held, wanted = sum(value.numel() for value in tensors.values()), self.sizes["d_in"] * self.sizes["d_sae"]
        if wanted > 1000 * held:
            problems += [f"d_in × d_sae is {wanted:.3g}, and there are {held:,} numbers"]
        if problems:
            raise SAEFormatError(f"the weights do not fit the options: {'; '.join(problems)}")

    def add_optional(self, module: nn.Module, name: str) -> None:
        """Factors of 1, unless they are there, on the device and in the type of what they multiply."""
        if getattr(module, name) is None:
            whole: Tensor = getattr(module, str(self[name].folds_into))
            setattr(module, name, nn.Parameter(whole.new_ones(self.shape(name))))

    def count(self, itemsize: Callable[[Parameter], int] = lambda entry: 1) -> int:
        """How many numbers all parameters have; with ``itemsize``, how many bytes."""
        kept = [entry for entry in self.entries if not entry.optional]
        return sum(torch.Size(entry.shape(self.sizes)).numel() * itemsize(entry) for entry in kept)

    # ---- training

    def trained_by(self, method: str) -> frozenset[str]:
        """The names of those that a fine-tuning method trains."""
        return frozenset(entry.name for entry in self.entries if method in entry.groups)

    def lr_factors(self) -> dict[str, float]:
        """By name, where they are not 1."""
        return {entry.name: entry.lr_factor for entry in self.entries if entry.lr_factor != 1}

    def project(self, module: nn.Module) -> None:
        """Remove from the gradients what rows of norm 1 cannot follow."""
        for parameter in self._unit(module):
            if parameter.grad is None:
                continue
            for gradient, row in zip(parameter.grad.split(_BLOCK), parameter.split(_BLOCK), strict=True):
                along = (gradient * row).sum(-1, keepdim=True) / row.pow(2).sum(-1, keepdim=True)
                gradient.addcmul_(along, row, value=-1)

    def renormalize(self, module: nn.Module) -> None:
        """Rows back to norm 1."""
        for parameter in self._unit(module):
            parameter.div_(parameter.norm(dim=-1, keepdim=True))

    def _unit(self, module: nn.Module) -> Iterator[nn.Parameter]:
        found = ((entry, getattr(module, entry.name)) for entry in self.entries if entry.unit_rows)
        return (parameter for _, parameter in found if parameter is not None and parameter.requires_grad)

    # ---- saving and loading

    def fold_scale(self, module: nn.Module, scale: Factor, target_scale: Factor) -> None:
        """See :meth:`saekit.sae.SAEModule.fold_activation_scale`."""
        for entry in self.entries:
            if (value := getattr(module, entry.name)) is not None:
                entry.fold(value, {"d_in": scale, "d_out": target_scale})

    def grow_features(self, module: nn.Module, factor: Tensor) -> None:
        """From now on every feature is ``factor [d_sae]`` times as large, and what is decoded of it is the same.

        :class:`ConfigError` where a parameter does not say what that is for it.
        """
        if unsaid := [entry.name for entry in self.entries if entry.grows is None and "d_sae" in entry.dims]:
            raise ConfigError(
                f"features cannot be measured otherwise here: what that does to {', '.join(unsaid)} is not stated. "
                "Say it in parameters_of: Parameter(..., grows=1) for what makes a feature as large as it is, -1 for "
                "what is made of it, 0 for what stays"
            )
        for entry in self.entries:
            value = getattr(module, entry.name)
            if value is not None and entry.grows:
                along = entry._along("d_sae", factor.to(value))
                value.mul_(along) if entry.grows > 0 else value.div_(along)

    def folded(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """``tensors`` with the factors of rows among them in what they multiply."""
        found = dict(tensors)
        for entry in self.entries:
            if entry.folds_into is not None and (factor := found.pop(entry.name, None)) is not None:
                whole = found[entry.folds_into]
                found[entry.folds_into] = whole * factor.reshape(-1, *[1] * (whole.ndim - 1))
        return found

    def load(self, module: nn.Module, tensors: Mapping[str, Tensor], architecture: str) -> None:
        """Copy ``tensors`` in; :class:`SAEFormatError` names what is missing, unknown or of another shape."""
        tensors = dict(tensors)
        for entry in self.entries:
            if entry.optional and entry.name in tensors:
                self.add_optional(module, entry.name)
            elif entry.optional and (factor := getattr(module, entry.name)) is not None:
                tensors[entry.name] = torch.ones_like(factor)
        own = tensors_of(module)
        problems = [f"{name} is missing" for name in own if name not in tensors]
        problems += [f"{name} is not a tensor of this architecture" for name in tensors if name not in own]
        problems += [
            f"{name} has shape {list(tensors[name].shape)}, expected {list(own[name].shape)}"
            for name in own
            if name in tensors and tensors[name].shape != own[name].shape
        ]
        if problems:
            raise SAEFormatError(f"the weights do not fit {architecture}: {'; '.join(problems)}")
        taken = _to_take.get() or {}
        for name, value in own.items():
            given = tensors[name]
            if isinstance(given, nn.Parameter) and given is taken.get(name):
                setattr(module, name, given.requires_grad_(value.requires_grad))
            else:
                value.copy_(given.to(value.dtype))  # here, for another device may not have the other dtype


@attrs.define
class Start:
    """What starting values are made of; ``start["W_dec"]`` is that of another parameter."""

    config: SAEConfig
    """The architecture's options."""
    generator: torch.Generator
    """For what is drawn."""
    dtype: torch.dtype
    """That of the parameters, float32 at least."""
    table: ParameterTable
    sample: Tensor | None = None
    """``[n, d_in]``: raw inputs to come; None where ``b_dec_init_method`` is ``zeros`` and nobody asked."""
    target: Tensor | None = None
    """``[n, d_out]``: raw targets of the same rows."""
    scale: Factor = 1.0
    """What inputs will be multiplied by."""
    target_scale: Factor = 1.0
    """What targets will be multiplied by."""
    parts: int = 1
    """How many processes have parts of the features; then ``table`` is that of one part."""
    part: int = 0
    """The number of that part."""
    _made: dict[str, Tensor] = attrs.field(factory=dict, init=False)

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._made:
            self._made[name] = self.table[name].init(self, self.table.shape(name))
        return self._made[name]

    def give(self, module: nn.Module) -> None:
        """Copy those of all parameters that every SAE of the architecture has into ``module``."""
        there = [entry for entry in self.table if not entry.optional]
        for entry in sorted(there, key=lambda entry: entry.turn):
            own: Tensor = getattr(module, entry.name)
            own.copy_(self[entry.name])
            if self.parts > 1 and own.dtype == self[entry.name].dtype and own.device == _CPU:
                self._made[entry.name] = own.detach()  # so that it is in memory once


def factors_of(
    scale: Scale, ports: Ports, dtype: torch.dtype = torch.float64, device: torch.device | str = _CPU
) -> tuple[Factor, Factor]:
    """What inputs and targets are multiplied by: a number, or of numbers by site vectors ``[d_in]`` and ``[d_out]``."""
    if not isinstance(scale, Mapping):
        return scale, scale
    read, written = (
        torch.cat([torch.full((width,), scale[name], dtype=torch.float64, device=_CPU) for name, width in some.items()])
        for some in (ports.inputs, ports.targets)
    )
    return read.to(dtype).to(device), written.to(dtype).to(device)


def scale_of(read: Factor, written: Factor, ports: Ports) -> Scale | None:
    """The scale whose :func:`factors_of` are ``read`` and ``written``; None, where a site has no one number."""
    found: dict[str, float] = {}
    for factor, widths in ((read, ports.inputs), (written, ports.targets)):
        columns = torch.as_tensor(factor, dtype=torch.float64, device=_CPU).expand(sum(widths.values()))
        for name, column in zip(widths, columns.split([*widths.values()]), strict=True):
            one = column[0].item()
            if found.setdefault(name, one) != one or bool((column != one).any()):
                return None
    return found if len({*found.values()}) > 1 else one


def one_factor(factor: Factor, why: str = "features have no ports") -> Factor:
    """The one number that ``factor`` has everywhere; :class:`ValueError` says ``why`` it may have no other."""
    if not isinstance(factor, Tensor) or not factor.ndim:
        return factor
    if bool((factor == factor[0]).all()):
        return factor[0]
    raise ValueError(f"{why}, so there can be one activation scale only, the same for all ports")


def tensors_of(module: nn.Module) -> dict[str, Tensor]:
    """All that an SAE is: its parameters, and the buffers that torch calls persistent.

    :class:`SAEFormatError` for state of another kind, which no folder could hold.
    """
    state = module.state_dict(keep_vars=True)
    if odd := [name for name, value in state.items() if not isinstance(value, Tensor)]:
        raise SAEFormatError(
            f"{type(module).__name__} has state that is no tensor ({', '.join(odd)}) and cannot be saved: register it "
            "as a buffer of floating-point numbers"
        )
    return state
