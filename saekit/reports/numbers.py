"""Numbers as people read them: no exponents where there need be none, units, and as many digits as say something."""

from __future__ import annotations

import math

__all__ = ["count", "duration", "fraction", "number", "short_count", "size"]

_UNITS = ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k"))


def short_count(value: float) -> str:
    """``60k``, ``1.2M``: three digits at most, and no zeros at the end."""
    if not math.isfinite(value):
        return str(value)
    for unit, letter in _UNITS:
        if abs(value) >= 0.9995 * unit:
            return f"{float(f'{value / unit:.3g}'):,.10g}{letter}"
    return f"{float(f'{value:.3g}'):.10g}"


def count(value: float) -> str:
    """A number of things: ``1,300,000``."""
    return f"{value:,.0f}" if math.isfinite(value) else str(value)


def number(value: float) -> str:
    """Four digits, plain from 0.0001 to a million."""
    if not math.isfinite(value) or value == 0:
        return f"{value:g}"
    if 1e-4 <= abs(value) < 999.95:
        return f"{float(f'{value:.4g}'):.10f}".rstrip("0").rstrip(".")
    if 999.95 <= abs(value) < 999_999.5:
        return f"{value:,.0f}"
    if abs(value) >= 1e15 or abs(value) < 1e-4:
        mantissa, _, exponent = f"{value:.3g}".partition("e")
        return f"{mantissa}e{int(exponent or 0)}"
    return short_count(value)


def fraction(value: float) -> str:
    """Of explained variance and the like, three places; a fourth where it is nearly one."""
    return f"{value:.4f}" if 0.9985 <= value < 1 else f"{value:.3f}"


def duration(seconds: float) -> str:
    """``58 s``, ``12 min``, ``3 h 05 min``, ``2 d 4 h``."""
    if not math.isfinite(seconds) or seconds < 0:
        return "?"
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    if seconds < 99.5:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    if hours < 48:
        return f"{hours} h {minutes:02} min"
    return f"{hours // 24} d {hours % 24} h"


def size(bytes_: int) -> str:
    """Of a file: ``84 kB``."""
    return f"{bytes_ / 1e6:.1f} MB" if bytes_ >= 999_500 else f"{max(bytes_ / 1e3, 1):.0f} kB"
