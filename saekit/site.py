"""A place in a model where activations are read and replaced; the only module that knows the shapes of heads."""

from __future__ import annotations

from numbers import Integral
from typing import TYPE_CHECKING

import attrs

from saekit.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Site", "flatten_heads"]


def _plain(head: int | None) -> int | None:
    """NumPy's whole numbers as Python's own, which can be saved."""
    return int(head) if isinstance(head, Integral) and not isinstance(head, bool) else head


@attrs.frozen(kw_only=True)
class Site:
    """Where the SAE reads: a hook of the model, and one attention head of it if wanted."""

    hook_name: str = attrs.field(default="blocks.1.hook_resid_post")
    """The model's name of the hook point."""
    hook_head_index: int | None = attrs.field(default=None, converter=_plain)
    """Take this head alone, at a hook with activations `[batch, position, head, d_head]`.  Without it, heads are
    flattened to `head * d_head`."""

    @hook_name.validator
    def _check_name(self, attribute: attrs.Attribute[str], value: object) -> None:
        if not isinstance(value, str):
            raise ConfigError([(attribute.name, f"must be a text, found {value!r}")])

    @hook_head_index.validator
    def _check_head(self, attribute: attrs.Attribute[int | None], value: object) -> None:
        if isinstance(value, bool) or not isinstance(value, int | None):
            raise ConfigError([(attribute.name, f"must be a whole number or None, found {value!r}")])
        if isinstance(value, int) and value < 0:
            raise ConfigError([(attribute.name, f"must be 0 or more, found {value}")])

    @property
    def name(self) -> str:
        """The site as one word, for folders and logs."""
        head = "" if self.hook_head_index is None else f".head{self.hook_head_index}"
        return self.hook_name + head

    def extract(self, activations: Tensor) -> Tensor:
        """The site's vectors ``[batch, position, d_in]`` from what the hook holds.

        ``activations`` is ``[b, t, d]`` or, at hooks with heads, ``[b, t, head, d_head]``.
        """
        self._check_shape(activations)
        if activations.ndim == 3:
            return activations
        if self.hook_head_index is not None:
            return activations[:, :, self.hook_head_index]
        return activations.flatten(-2)

    def replace(self, activations: Tensor, values: Tensor) -> Tensor:
        """``activations`` with the site's vectors replaced by ``values [b, t, d_in]``; the other heads stay."""
        self._check_shape(activations)
        values = values.to(activations.dtype)
        if activations.ndim == 3:
            return values
        if self.hook_head_index is None:
            return values.reshape(activations.shape)
        replaced = activations.clone()
        replaced[:, :, self.hook_head_index] = values
        return replaced

    def _check_shape(self, activations: Tensor) -> None:
        shape = list(activations.shape)
        if len(shape) not in (3, 4):
            raise ConfigError(
                f"hook {self.hook_name!r} holds a tensor of shape {shape}; an SAE needs [batch, position, d] or "
                f"[batch, position, head, d_head]"
            )
        if self.hook_head_index is None:
            return
        if len(shape) == 3:
            raise ConfigError(
                f"hook_head_index {self.hook_head_index} was given, but hook {self.hook_name!r} has no heads: its "
                f"shape is {shape}. Leave hook_head_index out"
            )
        if self.hook_head_index >= shape[2]:
            raise ConfigError(
                f"hook_head_index {self.hook_head_index} is out of range: hook {self.hook_name!r} has {shape[2]} heads"
            )


def flatten_heads(x: Tensor, d_in: int) -> tuple[Tensor, bool]:
    """``x [..., d_in]`` as it is, or ``x [..., head, d_head]`` with ``head * d_head = d_in`` flattened.

    The second value says whether heads were flattened; ``unflatten(-1, x.shape[-2:])`` undoes it.
    """
    if x.shape[-1] == d_in:
        return x, False
    if x.ndim >= 2 and x.shape[-1] * x.shape[-2] == d_in:
        return x.flatten(-2), True
    raise ConfigError(f"the SAE takes [..., {d_in}] or [..., head, d_head] with that product, found {list(x.shape)}")
