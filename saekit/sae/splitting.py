"""Features split over processes: each has its part of every parameter that has an axis of features."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from saekit.distributed.group import Group
from saekit.distributed.share import WHOLE, Share
from saekit.errors import ConfigError
from saekit.sae.parameters import Parameter
from saekit.sae.ways import overridden

if TYPE_CHECKING:
    from saekit.sae.module import SAEModule

__all__ = [
    "check_spread", "gathered", "give_part", "infers_by_parts", "keep_part", "outline_of", "spread_of", "whole_like",
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
    if sae.d_sae % features:
        raise ConfigError(
            [("distributed.features", f"is {features}, which does not divide the {sae.d_sae:,} features of the SAE")]
        )
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


def infers_by_parts(sae: SAEModule) -> bool:
    """Whether the features of ``sae`` are split, and its parts give together what the whole gives."""
    return sae.share.parts > 1 and "inference" in sae.spreads_over and overridden(type(sae), "spreads_over") is None


def keep_part(sae: SAEModule, features: Group) -> None:
    """From now on ``sae`` has the part of this process, of ``d_sae`` over the size of ``features`` features."""
    own = sae.d_sae // features.size
    with torch.no_grad():
        for entry, value in _split(sae):
            part = value.narrow(entry.dims.index("d_sae"), features.rank * own, own)
            _give(sae, entry, part, value)
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


def _give(sae: SAEModule, entry: Parameter, part: Tensor, like: nn.Parameter) -> None:
    made = entry.unwritten(tuple(part.shape), part.dtype, part.device)
    made.data.copy_(part)
    setattr(sae, entry.name, made.requires_grad_(like.requires_grad))


def _resize(sae: SAEModule, d_sae: int, share: Share) -> None:
    sae.d_sae, sae.share = d_sae, share
    vars(sae).pop("table", None)
