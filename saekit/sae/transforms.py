"""What a dictionary does to its rows before it reads them, and to what it has decoded: input transforms.

Those of each row for itself are a part of the SAE (:class:`saekit.transforms.RowTransform`).  Those whose numbers are
estimated once are affine maps of all rows (:class:`saekit.transforms.Affine`): they are folded into the weights.
"""

from __future__ import annotations

from collections.abc import Mapping

import attrs
import torch
from torch import Tensor

from saekit.errors import ConfigError
from saekit.plugins.building import wrong
from saekit.plugins.text import short
from saekit.transforms import Affine, RowTransform
from saekit.values import Ports

__all__ = ["SiteMaps", "Transforming", "block_diagonal", "transformed_by", "undone_by"]


def transformed_by(affine: Affine, x: Tensor) -> Tensor:
    """``(x − mean) matrix`` of ``x [..., d]``."""
    return (x - affine.mean) @ affine.matrix


def undone_by(affine: Affine, z: Tensor) -> Tensor:
    """``z inverse + mean`` of ``z [..., d]``."""
    return z @ affine.inverse + affine.mean


def block_diagonal(maps: Mapping[str, Affine], widths: Mapping[str, int]) -> Affine:
    """The map of the sites in ``widths`` side by side."""
    some = [maps[name] for name in widths]
    matrix, inverse = (torch.block_diag(*(getattr(one, name) for one in some)) for name in ("matrix", "inverse"))
    return Affine(torch.cat([one.mean for one in some]), matrix, inverse)


@attrs.define(eq=False)
class SiteMaps:
    """The affine map of each site by its name, and where they are used."""

    maps: Mapping[str, Affine]
    """In float64, on the CPU."""
    _used: dict[tuple[torch.dtype, torch.device], dict[str, Affine]] = attrs.field(factory=dict, init=False)

    def _in(self, like: Tensor) -> dict[str, Affine]:
        """As ``like``: made once, for they are as large as the square of a site's width."""
        place = (like.dtype, like.device)
        if place not in self._used:
            self._used[place] = {name: Affine(*(value.to(like) for value in one)) for name, one in self.maps.items()}
        return self._used[place]

    def transformed(self, x: Tensor, widths: Mapping[str, int]) -> Tensor:
        """``x [n, d]``, the sites of ``widths`` side by side, each by its map."""
        parts = x.split([*widths.values()], dim=-1)
        found = [transformed_by(self._in(x)[name], part) for name, part in zip(widths, parts, strict=True)]
        return found[0] if len(found) == 1 else torch.cat(found, dim=-1)

    def undone(self, z: Tensor, widths: Mapping[str, int]) -> Tensor:
        """The way back."""
        parts = z.split([*widths.values()], dim=-1)
        found = [undone_by(self._in(z)[name], part) for name, part in zip(widths, parts, strict=True)]
        return found[0] if len(found) == 1 else torch.cat(found, dim=-1)

    def folds(self, ports: Ports) -> tuple[Affine, Affine]:
        """Those of all inputs, and of all targets, side by side: see :meth:`saekit.sae.SAEModule.fold_affine`."""
        return block_diagonal(self.maps, ports.inputs), block_diagonal(self.maps, ports.targets)

    def state_dict(self) -> dict[str, dict[str, Tensor]]:
        """All of it, as tensors by name."""
        return {name: dict(one._asdict()) for name, one in self.maps.items()}

    @classmethod
    def of(cls, state: Mapping[str, Mapping[str, Tensor]]) -> SiteMaps:
        """From what :meth:`state_dict` gave."""
        return cls({name: Affine(**one) for name, one in state.items()})


class Transforming:
    """What :class:`saekit.sae.SAEModule` has of row-wise transforms."""

    ports: Ports
    input_transform: RowTransform | None = None
    """What is done to each row before the encoder reads it, and undone on what is decoded; None: nothing.

    ``encode``, ``decode``, ``forward``, ``encode_sparse``, ``encode_topk`` and ``training_step`` take and give rows as
    the model has them.  The mathematics inside (``centered``, ``pre_activations``, ``reconstruction``, ``bypass``,
    ``losses``) are those of transformed rows, and so is the loss of a step, in which all rows count alike (Gao et al.
    2024, 2.1).
    """

    def set_input_transform(self, transform: RowTransform | None) -> None:
        """From now on, what rows go through.  :class:`ConfigError` where that cannot be."""
        if transform is not None and not self.ports.same:
            raise ConfigError(
                f"{type(transform).__name__} normalizes each row by its own numbers, and brings what is decoded back "
                f"by them; this dictionary reads {', '.join(self.ports.inputs)} and writes "
                f"{', '.join(self.ports.targets)}, whose rows have others. Choose 'expected_average_only_in' or "
                "'whitening', which have numbers for each site, or none"
            )
        self.input_transform = transform

    def transformed(self, x: Tensor) -> Tensor:
        """``x [..., d_in]`` as the encoder reads it: each input by :attr:`input_transform`, if there is one."""
        if self.input_transform is None:
            return x
        widths = [*self.ports.inputs.values()]
        if len(widths) == 1:
            return self._read(self.input_transform, x)
        return torch.cat([self._read(self.input_transform, part) for part in x.split(widths, dim=-1)], dim=-1)

    def _read(self, transform: RowTransform, x: Tensor) -> Tensor:
        read = transform.read(x)
        if not isinstance(read, Tensor) or read.shape != x.shape:
            found = f"a tensor {list(read.shape)}" if isinstance(read, Tensor) else short(read)
            raise wrong(transform, f"read returned {found}, expected one of the shape of x, {list(x.shape)}")
        return read

    def undone(self, y: Tensor, x: Tensor) -> Tensor:
        """``y [..., d_out]``, decoded, in the units of ``x [..., d_in]``, the rows that were read."""
        if self.input_transform is None:
            return y
        widths = [*self.ports.targets.values()]
        if len(widths) == 1:
            return self.input_transform.written(y, x)
        parts = zip(y.split(widths, dim=-1), x.split(widths, dim=-1), strict=True)
        return torch.cat([self.input_transform.written(*part) for part in parts], dim=-1)

    def undone_share(self, part: Tensor, x: Tensor) -> Tensor:
        """The share that ``part [..., d_out]``, which is added to what is decoded, has of what is undone by ``x``."""
        if self.input_transform is None:
            return part
        return self.undone(part, x) - self.undone(torch.zeros_like(part), x)

    def check_target(self, target: Tensor | None) -> None:
        """:class:`ConfigError` for a target of a step beside its rows, which are their own."""
        if self.input_transform is not None and target is not None:
            raise ConfigError("rows are normalized each by itself, so they are their own targets; give no other target")

    def check_like(self, like: Tensor | None) -> None:
        """:class:`ConfigError` where what is decoded needs the rows that were read, and ``like`` are not given."""
        if self.input_transform is not None and like is None:
            raise ConfigError(
                f"this SAE normalizes each row by its own numbers ({type(self.input_transform).__name__}), which are "
                "not in the features: give the rows too, decode(features, like=x). What is decoded in the units of "
                "normalized rows is reconstruction(features)"
            )
