"""``saekit bench``: how fast this machine trains and uses SAEs, and by which way."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from saekit.errors import ConfigError
from saekit.plugins.manager import PluginManager, default_manager
from saekit.plugins.text import printable
from saekit.status import Status

if TYPE_CHECKING:
    from rich.console import Console

    from saekit.runs.benching import Bench, Found, Timed

__all__ = ["bench", "show_machine", "size_of"]

_BUSY = 0.3  # of the processors, at work for others, which changes what is measured
_UNSTEADY = (
    "~: calls of it, or of mm1, lie far apart, or there was time for one alone, so that another run may give another "
    "number: close other programs, give it more time (--seconds), or ask for one size and architecture alone"
)


def bench(asked: Bench | None = None, *, plugins: PluginManager | None = None, verbose: bool = True) -> Found:
    """Time what is asked for; see :class:`saekit.runs.benching.Bench`."""
    from saekit.runs.benching import Bench, time_machine

    with Status(verbose=verbose) as say:
        return time_machine(asked or Bench(), plugins or default_manager(), say)


def size_of(text: str) -> tuple[int, int]:
    """``512x4096``: a width and a number of features."""
    width, _, features = text.partition("x")
    try:
        found = int(width), int(features)
    except ValueError:
        found = (0, 0)
    if min(found) < 1:
        raise ConfigError([("--size", f"takes a width and a number of features, such as 512x4096; found {text!r}")])
    return found


def show_machine(found: Found, console: Console) -> None:
    """A table for each size, the ways, and what would change them."""
    from rich.table import Table

    def line(text: str) -> None:
        console.print(printable(text), markup=False, highlight=False, soft_wrap=True)

    line(found.machine.name)
    if found.busy is not None and found.busy > _BUSY * found.machine.cores:
        line(f"other programs were at work when it began (load {found.busy:.1f}): times may be too long")
    names = _names(found.timed)
    for size, timed in _by_size(found.timed).items():
        first = timed[0]
        product = statistics.median(one.product for one in timed)
        line("")
        line(
            f"{size[0]:,} → {size[1]:,}, float32, batches of {first.rows:,}; mm1, one product with the encoder: "
            f"{_number(first.microseconds(product))} µs per token, {first.flops_in(product) / 1e9:,.0f} GFLOP/s"
        )
        table = Table(box=None, pad_edge=False, header_style="bold")
        table.add_column("µs per token (× mm1)")
        for head in ("L0", "Step", "In plain torch", *first.uses):
            table.add_column(head, justify="right", no_wrap=True)
        for one in timed:
            plain = "the same" if one.why_plain is not None else _times(one, "plain", one.plain)
            uses = [_times(one, name, seconds) for name, seconds in one.uses.items()]
            table.add_row(
                printable(names[one.architecture]),
                "–" if one.l0 is None else f"{one.l0:.0f}",
                _times(one, "step", one.step),
                plain,
                *uses,
            )
        console.print(table)
    line("")
    if any(one.unsteady(name) for one in found.timed for name in one.calls):
        line(_UNSTEADY)
    for text in _ways(found.timed):
        line(text)


def _by_size(timed: Iterable[Timed]) -> dict[tuple[int, int], list[Timed]]:
    found: dict[tuple[int, int], list[Timed]] = {}
    for one in timed:
        found.setdefault((one.d_in, one.d_sae), []).append(one)
    return found


def _names(timed: Sequence[Timed]) -> dict[str, str]:
    """What to call architectures: by their distribution only where two have one name."""
    keys = list(dict.fromkeys(one.architecture for one in timed))
    short = [key.partition(":")[2] for key in keys]
    return {key: name if short.count(name) == 1 else key for key, name in zip(keys, short, strict=True)}


def _times(one: Timed, name: str, seconds: float) -> str:
    mark = "~" if one.unsteady(name) or one.unsteady("product") else ""
    return f"{mark}{_number(one.microseconds(seconds))} ({seconds / one.product:.2f})"


def _number(value: float) -> str:
    """With three digits, or all before the point."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _ways(timed: Sequence[Timed]) -> list[str]:
    """How steps are made, why, and what other values of ``training.kernels`` would do."""
    names = _names(timed)
    ways: dict[tuple[str, str | None, str | None], list[Timed]] = {}
    for one in timed:
        ways.setdefault((one.path, one.why_plain, one.if_fast), []).append(one)
    lines = []
    for (path, why_plain, if_fast), those in ways.items():
        called = ", ".join(dict.fromkeys(names[one.architecture] for one in those))
        sizes = {(one.d_in, one.d_sae) for one in those}
        where = "" if len(sizes) == len(_by_size(timed)) else f" ({_sizes_text(sizes)})"
        lines.append(f"{called}{where}: {path}")
        if why_plain is None:
            slower = sorted(one.plain / one.step for one in those)
            most = f" to {slower[-1]:.1f}" if len(slower) > 1 else ""
            lines += [
                f"  training.kernels=reference takes plain torch: steps take {slower[0]:.1f}{most} times as long",
                "  training.kernels=fast changes nothing here",
            ]
        elif if_fast is None:
            lines.append("  training.kernels=fast takes the fast kernels")
        else:
            lines.append(f"  training.kernels=fast is refused: {if_fast}")
        for reason in (reasons := dict.fromkeys(one.if_int8 for one in those)):
            of = [one for one in those if one.if_int8 == reason]
            where = f" ({_sizes_text({(one.d_in, one.d_sae) for one in of})})" if len(reasons) > 1 else ""
            int8 = "takes a first look in 8-bit integers" if reason is None else f"is refused: {reason}"
            lines.append(f"  training.kernels=int8{where} {int8}")
    lines += [f"not at work here: {text}" for text in dict.fromkeys(text for one in timed for text in one.others)]
    return lines


def _sizes_text(sizes: Iterable[tuple[int, int]]) -> str:
    return ", ".join(f"{width:,} → {features:,}" for width, features in sorted(sizes))
