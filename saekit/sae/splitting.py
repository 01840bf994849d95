"""Features split over processes: each has its part of every parameter that has an axis of features."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from saekit.distributed.group import Group
from saekit.distributed.launched import check_features
from saekit.distributed.share import WHOLE, Share
from saekit.errors import ConfigError
from saekit.files.mapped import is_mapped
from saekit.sae.parameters import Parameter
from saekit.sae.ways import Ways, overridden

if TYPE_CHECKING:
    from saekit.sae.module import SAEModule

__all__ = [
    "check_spread", "gathered", "give_part", "infers_by_parts", "is_saved_by_parts", "keep_part",
    "outline_of", "parts_of", "saved_along", "spread_of", "whole_like",
]  # fmt: skip


def spread_of(data: int, features: int) -> frozenset[str]:
    """What is split over processes: ``data``, ``features``."""
    return frozenset(name for name, parts in (("data", data), ("features", features)) if parts > 1)


def check_spread(sae: SAEModule, data: int, features: int) -> None:
    """:class:`ConfigError` where ``sae`` cannot train on so many groups of processes, each with so many parts."""
    kind = type(sae)
    for name in sorted(spread_of(data, features)):
        doing = "split its features over" if name == "features" else "split batches over"
        if name not in sae.spreads_over:
            raise ConfigError(
                [(f"distributed.{name}", f"would {doing} processes, and {kind.__name__} does not say that it trains "
                  f"so (spreads_over, see 'Writing plugins'); {_instead(name)}")]
            )  # fmt: skip
        if (changed := overridden(kind, "spreads_over")) is not None:
            raise ConfigError([(f"distributed.{name}", f"would {doing} processes, and {changed}; {_instead(name)}")])
    if features == 1:
        return
    check_features(sae.d_sae, features)
    if (reason := sae.why_not_split(features)) is not None:
        raise ConfigError([("distributed.features", f"is {features}, and {reason}")])
    known = {entry.name for entry in sae.table}
    odd = [entry.name for entry in sae.table if entry.split not in (None, "d_sae")]
    odd += [name for name, _ in sae.named_parameters() if name not in known]
    if odd:
        raise ConfigError(
            [("distributed.features", f"is {features}, and nobody says how {', '.join(odd)} would be split along the "
              f"features of {kind.__name__}; set it to 1")]
        )  # fmt: skip


def _instead(name: str) -> str:
    return "set it to 1" if name == "features" else "start one process, or as many as distributed.features"


_SAVING = (
    "cast_weights", "fold_activation_scale", "fold_affine", "load_public_tensors", "public_tensors", "restate",
    "shift_pre_activations",
)  # fmt: skip


def is_saved_by_parts(kind: type[SAEModule]) -> bool:
    """Whether what :meth:`SAEModule.public_tensors` makes of a part is that part of what it makes of the whole.

    A class that changes what is saved says so itself: see :attr:`saekit.sae.ways.Ways.saved_by_parts`.
    """
    lineage = kind.__mro__
    stated = next(number for number, one in enumerate(lineage) if "saved_by_parts" in vars(one))
    every_module = next(number for number, one in enumerate(lineage) if Ways in one.__bases__)
    return not any(name in vars(one) for one in lineage[: min(stated, every_module)] for name in _SAVING)


def saved_along(sae: SAEModule, tensors: Iterable[str]) -> dict[str, int]:
    """The dimension along which each of ``tensors``, as they are saved, is split; those that are not are left out."""
    known = {entry.name: entry.dims.index("d_sae") for entry in sae.table if entry.split == "d_sae"}
    known |= sae.saved_by_parts
    return {name: known[name] for name in tensors if name in known}


def infers_by_parts(sae: SAEModule) -> bool:
    """Whether the features of ``sae`` are split, and its parts give together what the whole gives."""
    kind = type(sae)
    says = "inference" in sae.spreads_over and overridden(kind, "spreads_over") is None
    return sae.share.parts > 1 and says and is_saved_by_parts(kind)


def keep_part(sae: SAEModule, features: Group, *, blank: bool = False) -> None:
    """From now on ``sae`` has the part of this process, of ``d_sae`` over the size of ``features`` features.

    ``blank``: zeros that take no memory, of which somebody makes weights.
    """
    own = sae.d_sae // features.size
    with torch.no_grad():
        for entry, value in _split(sae):
            part = value.narrow(entry.dims.index("d_sae"), features.rank * own, own)
            made = entry.memory(tuple(part.shape), part.dtype) if blank else _copy(entry, part)
            setattr(sae, entry.name, made.requires_grad_(value.requires_grad))
    _resize(sae, own, Share(features=features))


def whole_like(sae: SAEModule) -> SAEModule:
    """One with all features, on the CPU, of whose parameters those that are split are still to come."""
    share, whole = sae.share, copy.deepcopy(sae)
    vars(whole).pop("losses", None)
    _resize(whole, sae.d_sae * share.parts, WHOLE)
    for entry, value in _split(whole):
        made = entry.memory(entry.shape(whole.table.sizes), value.dtype)
        if entry.optional:  # as they begin, and nobody gives them starting values
            made.data.fill_(1)
        setattr(whole, entry.name, made.requires_grad_(value.requires_grad))
    for name, value in whole.named_parameters():
        if not any(entry.name == name for entry, _ in _split(whole)):
            value.data = value.data.cpu()
    return whole


def outline_of(sae: SAEModule) -> SAEModule:
    """What is known of the whole without its weights, which are on the ``meta`` device: sizes, options, sites, and how
    often features fire."""
    known = {id(value): _outline(value) for value in sae.parameters()}
    share, outline = sae.share, copy.deepcopy(sae, dict(known))
    _resize(outline, sae.d_sae * share.parts, WHOLE)
    for entry, value in _split(outline):
        setattr(
            outline, entry.name, nn.Parameter(value.new_empty(entry.shape(outline.table.sizes)), value.requires_grad)
        )
    return outline


def _outline(value: nn.Parameter) -> nn.Parameter:
    return nn.Parameter(torch.empty_like(value, device="meta"), value.requires_grad)


@torch.no_grad()
def gathered(sae: SAEModule) -> SAEModule:
    """One with all features, on every process and the device of ``sae``; all processes of a group must ask."""
    share, whole = sae.share, whole_like(sae)
    for entry, value in _split(sae):
        dim = entry.dims.index("d_sae")
        getattr(whole, entry.name).data.copy_(torch.cat(share.features.gather(value), dim=dim))
    return whole.to(sae.device)


def parts_of(tensors: dict[str, Tensor], along: Mapping[str, int], features: Group) -> dict[str, Tensor]:
    """Of whole ``tensors``, which are taken out of their dictionary, the part of this process.

    What is the memory of a file stays that; else a part is in memory of its own, so that the whole can go.
    """
    found = {}
    for name in list(tensors):
        value = tensors.pop(name)
        if name in along:
            own = value.shape[along[name]] // features.size
            part = value.narrow(along[name], features.rank * own, own)
            value = part if is_mapped(value) else part.clone()
        found[name] = value
    return found


@torch.no_grad()
def give_part(sae: SAEModule, whole: SAEModule) -> None:
    """Copy what ``whole`` has of the features of ``sae``, and what all have alike."""
    known, first = dict(_by_name(sae)), sae.share.first_feature(sae.d_sae)
    for name, value in whole.state_dict(keep_vars=True).items():
        entry = known.get(name)
        part = value if entry is None else value.narrow(entry.dims.index("d_sae"), first, sae.d_sae)
        sae.state_dict(keep_vars=True)[name].copy_(part)


def _by_name(sae: SAEModule) -> list[tuple[str, Parameter]]:
    return [(entry.name, entry) for entry, _ in _split(sae)]


def _split(sae: SAEModule) -> list[tuple[Parameter, nn.Parameter]]:
    """What has an axis of features along which it is split, as far as it is there."""
    there = ((entry, getattr(sae, entry.name)) for entry in sae.table if entry.split == "d_sae")
    return [(entry, value) for entry, value in there if value is not None]


def _copy(entry: Parameter, part: Tensor) -> nn.Parameter:
    made = entry.unwritten(tuple(part.shape), part.dtype, part.device)
    made.data.copy_(part)
    return made


def _resize(sae: SAEModule, d_sae: int, share: Share) -> None:
    sae.d_sae, sae.share = d_sae, share
    vars(sae).pop("table", None)
