"""What a dictionary may be given: vectors of its widths, in floating-point numbers, and scales that scale."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from saekit.errors import ConfigError
from saekit.sae.parameters import Factor
from saekit.transforms import Affine
from saekit.values import Ports

__all__ = [
    "check_input", "check_maps", "check_rows", "check_scales", "check_sequences", "check_size", "check_type",
    "check_width",
]  # fmt: skip


def check_input(x: Tensor, ports: Ports) -> None:
    """:class:`ConfigError` unless ``x`` can be the inputs of ``ports``, side by side."""
    if isinstance(x, Mapping):
        raise ConfigError(
            f"inputs must be a tensor [..., d_in], found {type(x).__name__}: sae.ports.join_input(values) makes it of "
            f"tensors by the names of the inputs ({', '.join(ports.inputs)})"
        )
    check_type(x, "inputs")
    if len(ports.inputs) > 1 and ports.d_in not in (*x.shape[-1:], math.prod(x.shape[-2:])):
        sites = " and ".join(f"{name} ({width})" for name, width in ports.inputs.items())
        raise ConfigError(
            f"inputs must be [..., d_in], and d_in is {ports.d_in}: {sites} side by side, as "
            f"sae.ports.join_input(values) makes them of tensors by these names; found {list(x.shape)}"
        )


def check_width(values: Tensor, width: int, name: str, what: str) -> None:
    """:class:`ConfigError` unless ``values`` are ``[..., width]``; ``name`` is the width's, ``what`` the values'."""
    _check_is_tensor(values, what)
    if values.ndim == 0 or values.shape[-1] != width:
        raise ConfigError(f"{what} must be [..., {name}], and {name} is {width}; found {list(values.shape)}")
    check_type(values, what)


def check_type(values: Tensor, what: str) -> None:
    """:class:`ConfigError` for whole numbers, such as the token ids that somebody took for activations."""
    _check_is_tensor(values, what)
    if not values.is_floating_point():
        name = str(values.dtype).removeprefix("torch.")
        raise ConfigError(
            f"{what} must be floating-point numbers, found {name} {list(values.shape)}; if these are not token ids, "
            "but what is meant, give them as .float()"
        )


def _check_is_tensor(values: object, what: str) -> None:
    if not hasattr(values, "is_floating_point"):
        made = "" if isinstance(values, Mapping) else "; torch.as_tensor(...) makes one"
        raise ConfigError(f"{what} must be a tensor, found {type(values).__name__}{made}")


def check_sequences(rows: Tensor, architecture: str) -> None:
    """:class:`ConfigError` unless ``rows`` are ``[batch, position, d_in]``."""
    if rows.ndim != 3:
        raise ConfigError(
            f"{architecture} reads whole sequences, for what it finds at a position depends on those before it: inputs "
            f"must be [batch, position, d_in], found {list(rows.shape)}; one sequence [position, d_in] is x[None]"
        )


def check_size(values: Tensor, shape: Sequence[int], what: str, wanted: str) -> None:
    """:class:`ConfigError` unless ``values`` can take the ``shape``, which is ``wanted``."""
    if values.numel() != math.prod(shape):
        raise ConfigError(f"{what} are {list(values.shape)}, which cannot be {wanted} {list(shape)}")


def check_rows(x: Tensor, target: Tensor | None, ports: Ports) -> None:
    """:class:`ConfigError` unless ``x`` is ``[n, d_in]`` and ``target``, if there is one, ``[n, d_out]``."""
    check_input(x, ports)
    if x.ndim != 2:
        raise ConfigError(f"the rows of a step must be [n, d_in], and d_in is {ports.d_in}; found {list(x.shape)}")
    check_width(x, ports.d_in, "d_in", "the rows of a step")
    if target is None:
        if ports.d_out != ports.d_in:
            raise ConfigError(f"a step needs its target [n, d_out], and d_out is {ports.d_out}; found none")
        return
    if target.shape != (len(x), ports.d_out):
        raise ConfigError(
            f"the target of a step must be [n, d_out], here {[len(x), ports.d_out]}; found {list(target.shape)}"
        )


def check_scales(scale: Any, target_scale: Any, ports: Ports) -> None:
    """:class:`ConfigError` unless both are finite and above 0: a number, or one for each column."""
    _check_scale(scale, ports.d_in, "d_in", "scale")
    if target_scale is not None:
        _check_scale(target_scale, ports.d_out, "d_out", "target_scale")
    elif not ports.same:
        raise ConfigError("inputs and targets are other sites: each has a scale of its own, so give both")


def _check_scale(scale: Factor, width: int, name: str, what: str) -> None:
    """:class:`ConfigError` unless activations of ``width`` can be multiplied by ``scale``."""
    expected = "activations can only be multiplied by finite numbers above 0"
    if isinstance(scale, Tensor):
        if scale.ndim and scale.shape != (width,):
            raise ConfigError(
                f"{what} must be a number or [{name}], and {name} is {width}; found a tensor {list(scale.shape)}"
            )
        fine = (scale > 0) & (scale < torch.inf)
        if not bool(fine.all()):
            raise ConfigError(f"{what} holds {scale[~fine].flatten()[0].item()!r}, and {expected}")
    elif isinstance(scale, bool) or not isinstance(scale, int | float):
        raise ConfigError(f"{what} must be a number or a tensor [{name}], found {scale!r}")
    elif not 0 < scale < math.inf:
        raise ConfigError(f"{what} is {scale!r}, and {expected}")


def check_maps(read: Affine, written: Affine | None, ports: Ports) -> None:
    """:class:`ConfigError` unless both are finite maps, of all inputs and of all targets."""
    if written is None and not ports.same:
        raise ConfigError("inputs and targets are other sites: each has a map of its own, so give both")
    for affine, width, name in ((read, ports.d_in, "d_in"), (written or read, ports.d_out, "d_out")):
        for what, value in affine._asdict().items():
            shape = [width] if what == "mean" else [width, width]
            if list(value.shape) != shape or not bool(value.isfinite().all()):
                raise ConfigError(
                    f"the {what} of an affine map must be {shape}, of finite numbers, as {name} is {width}; found "
                    f"{list(value.shape)}"
                )
