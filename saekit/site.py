"""Places in a model where activations are read and replaced; the only module that knows the shapes of heads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from numbers import Integral
from typing import TYPE_CHECKING

import attrs

from saekit.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Site", "Sites", "flatten_heads"]


def _plain(head: int | None) -> int | None:
    """NumPy's whole numbers as Python's own, which can be saved."""
    return int(head) if isinstance(head, Integral) and not isinstance(head, bool) else head


@attrs.frozen(kw_only=True)
class Site:
    """Where a dictionary reads or writes: a hook of the model, and one attention head of it if wanted."""

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

    def replace(self, activations: Tensor, values: Tensor, kept: Tensor | None = None) -> Tensor:
        """``activations`` with the site's vectors replaced by ``values [b, t, d_in]``; the other heads stay.

        Where ``kept [b, t]`` is false, they stay as well, bit for bit.
        """
        self._check_shape(activations)
        values = values.to(activations.dtype)
        if kept is not None:
            import torch

            values = torch.where(kept[..., None], values, self.extract(activations))
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


@attrs.frozen
class Sites:
    """The sites that a dictionary reads and those that it writes, in the order in which their vectors lie side by side.

    :class:`ConfigError` for sites of which one is named twice, or overwritten by another.
    """

    inputs: tuple[Site, ...]
    targets: tuple[Site, ...] = attrs.field()
    """Left out: the inputs."""

    @targets.default
    def _inputs(self) -> tuple[Site, ...]:
        return self.inputs

    @classmethod
    def one(cls, site: Site) -> Sites:
        """Those of an SAE."""
        return cls((site,))

    @classmethod
    def of(cls, place: Sites | Site | str | None) -> Sites | None:
        """Those that are meant by a hook's name or a site of an SAE; what is none of these stays as it is."""
        if isinstance(place, str):
            place = Site(hook_name=place)
        return cls.one(place) if isinstance(place, Site) else place or None

    def __attrs_post_init__(self) -> None:
        problems = [("inputs", fault) for fault in _faults(self.inputs, written=self.same)]
        if not self.same:
            problems += [("targets", fault) for fault in _faults(self.targets, written=True)]
        if problems := problems or [("targets", fault) for fault in _faults(self.all, written=False)]:
            raise ConfigError(problems)

    @property
    def same(self) -> bool:
        """Whether the targets are the inputs."""
        return self.targets == self.inputs

    @property
    def all(self) -> tuple[Site, ...]:
        """Each once, the inputs first."""
        return tuple(dict.fromkeys((*self.inputs, *self.targets)))

    @property
    def name(self) -> str:
        """All of them as one word, for folders and logs: ``a``, ``a+b``, ``a-to-b``."""
        read, written = ("+".join(site.name for site in sites) for sites in (self.inputs, self.targets))
        return read if self.same else f"{read}-to-{written}"

    def input_of(self, held: Mapping[str, Tensor]) -> Tensor:
        """The inputs ``[b, t, d_in]``, side by side, from what hooks hold; of one site a view."""
        return _side_by_side(self.inputs, held)

    def target_of(self, held: Mapping[str, Tensor]) -> Tensor:
        """The targets ``[b, t, d_out]``, likewise."""
        return _side_by_side(self.targets, held)

    def replaced(
        self, hook_name: str, activations: Tensor, values: Mapping[str, Tensor], kept: Tensor | None = None
    ) -> Tensor:
        """What ``hook_name`` holds, with the vectors of each target there replaced by its ``values [b, t, width]``.

        Those are by the names of the targets.  Where ``kept [b, t]`` is false, all stays as it is.
        """
        for site in self.targets:
            if site.hook_name == hook_name:
                activations = site.replace(activations, values[site.name], kept)
        return activations


def _faults(sites: Sequence[Site], *, written: bool) -> list[str]:
    """What is wrong with ``sites`` that lie side by side, in words."""
    names = [site.name for site in sites]
    faults = [f"names {name} twice" for name in dict.fromkeys(names) if names.count(name) > 1]
    if not sites:
        faults.append("must be one site or more")
    whole = {site.hook_name for site in sites if site.hook_head_index is None}
    faults += [
        f"has {site.name}, which is a part of {site.hook_name}, a target, too: leave out one of them"
        for site in sites
        if written and site.hook_head_index is not None and site.hook_name in whole
    ]
    return faults


def _side_by_side(sites: Sequence[Site], held: Mapping[str, Tensor]) -> Tensor:
    if len(sites) == 1:
        return sites[0].extract(held[sites[0].hook_name])
    import torch

    return torch.cat([site.extract(held[site.hook_name]) for site in sites], dim=-1)


def flatten_heads(x: Tensor, d_in: int) -> tuple[Tensor, bool]:
    """``x [..., d_in]`` as it is, or ``x [..., head, d_head]`` with ``head * d_head = d_in`` flattened.

    The second value says whether heads were flattened; ``unflatten(-1, x.shape[-2:])`` undoes it.
    """
    if x.ndim and x.shape[-1] == d_in:
        return x, False
    if x.ndim >= 2 and x.shape[-1] * x.shape[-2] == d_in:
        return x.flatten(-2), True
    raise ConfigError(
        f"the SAE takes [..., {d_in}] or [..., head, d_head] with that product, its d_in; found {list(x.shape)}"
    )
