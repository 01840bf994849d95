"""Colors that people tell apart who do not see all of them, on a light ground and on a dark one."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

__all__ = ["PALETTE", "colors_of"]

PALETTE = (
    ("#0072b2", "#58b4f0"),
    ("#d55e00", "#ff9350"),
    ("#009e73", "#35cfa2"),
    ("#c0599a", "#eba0cd"),
    ("#b87a00", "#f2c14e"),
    ("#3f9fd6", "#a6d8ff"),
    ("#6a3d9a", "#bda0ee"),
    ("#4d4d4d", "#c4c4c4"),
)
"""On a light ground and on a dark one: those of Okabe and Ito (2008) without the yellow, of which white would leave
nothing, and two more."""
_SHADES = (
    (0x44, 0x01, 0x54), (0x48, 0x24, 0x75), (0x41, 0x44, 0x87), (0x35, 0x5F, 0x8D), (0x2A, 0x78, 0x8E),
    (0x21, 0x91, 0x8C), (0x22, 0xA8, 0x84), (0x44, 0xBF, 0x70), (0x7A, 0xD1, 0x51), (0xBD, 0xDF, 0x26),
    (0xFD, 0xE7, 0x25),
)  # fmt: skip
"""viridis (van der Walt and Smith 2015), from dark to light in tenths."""
_ON_LIGHT, _ON_DARK = (0.0, 0.82), (0.36, 1.0)


def colors_of(values: Sequence[Hashable], *, ordered: bool = False) -> dict[Hashable, tuple[str, str]]:
    """For each value a color on a light ground and one on a dark.

    From dark to light where they are ``ordered``, and as different as can be where not; two are always different.
    """
    if len(values) <= 2 or (not ordered and len(values) <= len(PALETTE)):
        return dict(zip(values, PALETTE, strict=False))
    steps = [index / (len(values) - 1) for index in range(len(values))]
    if not ordered:  # neighbors far apart in shade, as far as there are so many
        steps = [steps[(index * 7) % len(values)] if len(values) % 7 else step for index, step in enumerate(steps)]
    return {
        value: (_shade(_within(step, _ON_LIGHT)), _shade(_within(step, _ON_DARK)))
        for value, step in zip(values, steps, strict=True)
    }


def _within(step: float, ends: tuple[float, float]) -> float:
    return ends[0] + step * (ends[1] - ends[0])


def _shade(place: float) -> str:
    """viridis at ``place`` between 0 and 1."""
    index = min(int(place * 10), 9)
    part = place * 10 - index
    mixed = (round(one + part * (other - one)) for one, other in zip(_SHADES[index], _SHADES[index + 1], strict=True))
    return "#" + "".join(f"{channel:02x}" for channel in mixed)
