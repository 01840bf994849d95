"""Weights for activations as they are, from weights for what was made of them: factors, and affine maps."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from saekit.devices import widest
from saekit.errors import ConfigError
from saekit.sae.inputs import check_maps, check_scales
from saekit.sae.parameters import Factor, Parameter, ParameterTable, scale_of
from saekit.transforms import Affine, RowTransform
from saekit.values import Ports, SAEInfo

__all__ = ["Folding"]


class Folding:
    """What :class:`saekit.sae.SAEModule` has of it."""

    config: Any
    input_transform: RowTransform | None
    info: SAEInfo
    ports: Ports
    table: Any
    b_enc: nn.Parameter
    W_enc: nn.Parameter
    b_dec: nn.Parameter
    bypass: Callable[[Tensor], Tensor | None]

    @torch.no_grad()
    def fold_activation_scale(self, scale: Factor, target_scale: Factor | None = None) -> None:
        """From now on do on ``x`` what was done on ``scale · x``: ``W_enc · s``, ``W_dec / s``, ``b_dec / s``.

        What comes out was, and no longer is, ``target_scale`` times as large; left out, that is ``scale``.  Both are
        numbers, or vectors ``[d_in]`` and ``[d_out]`` with a factor for each port.  Features stay what they are, unless
        they are multiplied by the norms of decoder rows: then they, and their thresholds, are divided by the factor.
        :class:`ConfigError` for what is not finite and above 0.
        """
        check_scales(scale, target_scale, self.ports)
        self._check_no_transform("a factor")
        written = scale if target_scale is None else target_scale
        self.table.fold_scale(self, scale, written)
        if self.info.scale_is_unknown:  # until now
            self.info = self.info.with_known_scale(scale_of(scale, written, self.ports))

    @torch.no_grad()
    def fold_affine(self, read: Affine, written: Affine | None = None) -> None:
        """From now on do on ``x`` what was done on ``(x − mean) matrix`` by ``read``.

        What comes out was, and no longer is, mapped so by ``written``; left out, that is ``read``.  With ``M`` the
        matrix and ``μ`` the mean, ``M W_enc``, ``W_dec M⁻¹``, ``b_dec M⁻¹ + μ``, and ``b_enc − μ M W_enc`` unless
        ``b_dec`` is subtracted from inputs, which does the same.  Features stay what they are, so thresholds do.
        :class:`ConfigError` for a map of another width.
        """
        check_maps(read, written, self.ports)
        self.check_foldable()
        written = read if written is None else written
        for entry in self.table:
            if (value := getattr(self, entry.name)) is not None and entry.scale:
                _fold_into(value, entry, {"d_in": read, "d_out": written})
        wide, device = widest(self.b_dec.device), self.b_dec.device
        mean = read.mean.to(device, wide)
        if not self.config.apply_b_dec_to_input:
            self.shift_pre_activations(-mean @ self.W_enc.to(wide))
        shift = written.mean.to(device, wide)
        if (passed := self.bypass(mean.to(self.b_dec.dtype)[None])) is not None:
            shift = shift - passed[0].to(wide)
        self.b_dec.copy_(self.b_dec.to(wide) + shift)

    def check_foldable(self) -> None:
        """:class:`ConfigError` unless an affine map can be folded in."""
        self._check_no_transform("an affine map")
        _check_table(self.table)
        shifts = type(self).shift_pre_activations is not Folding.shift_pre_activations
        if not self.config.apply_b_dec_to_input and not shifts and getattr(self, "b_enc", None) is None:
            raise ConfigError(
                f"no mean can be folded into a {type(self).__name__}, which has no b_enc and does not say by "
                "shift_pre_activations which of its biases takes it"
            )

    def _check_no_transform(self, what: str) -> None:
        if self.input_transform is not None:
            raise ConfigError(
                f"{what} cannot be folded into this SAE: it normalizes each row by itself "
                f"({type(self.input_transform).__name__}) before its weights see it"
            )

    def shift_pre_activations(self, shift: Tensor) -> None:
        """Add ``shift [d_sae]`` to what a row times ``W_enc`` becomes.  Architectures with other biases override it."""
        self.b_enc.copy_(self.b_enc.to(shift.dtype) + shift)


def _check_table(table: ParameterTable) -> None:
    """:class:`ConfigError` unless matrices can be folded into all that meets inputs or makes outputs."""
    for entry in table:
        sized: tuple[str, ...] = ("d_in", "d_out")
        odd = [dim for dim in sized if dim in entry.dims and abs(entry.scale.get(dim, 0)) != 1]
        odd += [dim for dim in entry.scale if dim not in entry.dims]
        if odd:
            raise ConfigError(
                f"no matrix can be folded into {entry.name} [{', '.join(map(str, entry.dims))}], which does not "
                f"change with {odd[0]} as a matrix of one layer does"
            )


def _fold_into(value: Tensor, entry: Parameter, maps: Mapping[str, Affine]) -> None:
    """Multiply ``value`` in place by the matrices of ``maps``, as its powers of a scale say; means are for biases."""
    wide = value.to(widest(value.device))
    for dim, power in entry.scale.items():
        matrix = (maps[dim].matrix if power > 0 else maps[dim].inverse.T).to(wide)
        place = entry.dims.index(dim)
        wide = torch.tensordot(matrix, wide, dims=([1], [place])).movedim(0, place)
    value.copy_(wide)
