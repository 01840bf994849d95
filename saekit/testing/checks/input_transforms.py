"""What an input transform promises."""

from __future__ import annotations

import pickle
from typing import TYPE_CHECKING, Any

from saekit.defaults import DEFAULT_ARCHITECTURE
from saekit.errors import SaekitError
from saekit.reasons import error_text
from saekit.testing.checks.check import Checks, Fault, NotTried, Subject, must
from saekit.testing.checks.numbers import is_number, must_agree, must_be_equal, seeded
from saekit.transforms import Affine, RowTransform, WholeTransform

if TYPE_CHECKING:
    from torch import Tensor

CHECKS = Checks()
_D = 7
_TOLERANCES = {"float64": 1e-8, "float32": 1e-4, "bfloat16": 0.1}
_BACK = 1e-3  # what is added to a denominator may be left over


def _rows(*shape: int, dtype: str = "float64", seed: int = 0) -> Tensor:
    """``[..., 7]`` of different sizes, with a mean."""
    import torch

    x = torch.randn(*shape, _D, generator=seeded(seed), dtype=torch.float64)
    sizes = torch.rand(*shape, 1, generator=seeded(seed + 1), dtype=torch.float64) * 3 + 0.5
    return (x * sizes + torch.linspace(-1, 2, _D, dtype=torch.float64)).to(getattr(torch, dtype))


def _row_wise(subject: Subject) -> Any:
    transform = subject.build()
    if not transform.row_wise:
        raise NotTried("it is not row-wise")
    return transform


def _whole(subject: Subject) -> Any:
    transform = subject.build()
    if transform.row_wise:
        raise NotTried("it is row-wise")
    return transform


@CHECKS.add
def build(subject: Subject) -> None:
    """It is built from its options, and keeps to the protocol that its ``row_wise`` says, and to no other."""
    transform = subject.build()
    row_wise = transform.row_wise
    must(isinstance(row_wise, bool), f"row_wise is {row_wise!r}, expected true or false")
    row, whole = isinstance(transform, RowTransform), isinstance(transform, WholeTransform)
    expected = "read() and written()" if row_wise else "estimated()"
    must((row, whole) == (row_wise, not row_wise), f"row_wise is {row_wise}: expected {expected}, and not the others'")


@CHECKS.add
def shape(subject: Subject) -> None:
    """Any shape and every type is kept, what it is given stays as it is, and rows without a size stay finite."""
    import torch

    transform = _row_wise(subject)
    for dtype in _TOLERANCES:
        for size in ((0,), (5,), (2, 3)):
            x = _rows(*size, dtype=dtype)
            given = x.clone()
            for what, found in (("read", transform.read(x)), ("written", transform.written(x, x))):
                must(
                    isinstance(found, torch.Tensor) and found.shape == x.shape and found.dtype == x.dtype,
                    f"{what} turns {list(x.shape)} of {x.dtype} into {_told(found)}",
                )
            must_be_equal("what it was given, afterwards", x, given)
    for value in (0.0, 2.0):
        x = torch.full((2, _D), value)
        read = transform.read(x)
        fine = bool(read.isfinite().all()) and bool(transform.written(read, x).isfinite().all())
        must(fine, f"of rows that are {value} everywhere it makes numbers that are not finite")


def _told(found: Any) -> str:
    return f"{list(found.shape)} of {found.dtype}" if hasattr(found, "dtype") else repr(found)[:60]


@CHECKS.add
def rows(subject: Subject) -> None:
    """What becomes of a row does not depend on the other rows, nor on what was asked before."""
    transform = _row_wise(subject)
    x, y = _rows(6), _rows(6, seed=4)
    read, written = transform.read(x), transform.written(y, x)
    transform.read(_rows(3, seed=8) * 100)
    for number in range(len(x)):
        one = slice(number, number + 1)
        must_agree("a row that is read alone", transform.read(x[one]), read[one], 1e-12)
        must_agree("a row that is written alone", transform.written(y[one], x[one]), written[one], 1e-12)


@CHECKS.add
def back(subject: Subject) -> None:
    """What was read comes back as it was, and ``written`` is affine in what was decoded."""
    import torch

    transform = _row_wise(subject)
    x, y, zero = _rows(40), _rows(40, seed=4), torch.zeros(40, _D, dtype=torch.float64)
    must_agree("written(read(x), x)", transform.written(transform.read(x), x), x, _BACK)
    at_zero = transform.written(zero, x)
    double = transform.written(2 * y, x) - at_zero
    must_agree("twice what was decoded", double, 2 * (transform.written(y, x) - at_zero), 1e-9)


@CHECKS.add
def gradient(subject: Subject) -> None:
    """Autograd's derivative is that of small changes, and results in float32 and bfloat16 are nearly the same."""
    import torch

    transform = _row_wise(subject)
    x, y = _rows(3).requires_grad_(), _rows(3, seed=4).requires_grad_()
    for what, inputs in (("read", (x,)), ("written", (y, x))):
        try:
            torch.autograd.gradcheck(getattr(transform, what), inputs)
        except Exception as error:
            raise Fault(f"autograd's derivative of {what} is not that of small changes: {error_text(error)}") from error
    for dtype in ("float32", "bfloat16"):
        rounded = _rows(9, dtype=dtype)
        expected = transform.read(rounded.double())
        must_agree(f"read in {dtype}", transform.read(rounded), expected, _TOLERANCES[dtype])


@CHECKS.add
def saving(subject: Subject) -> None:
    """It can be pickled, and an SAE with it is saved and loaded as it was."""
    import torch

    from saekit.kinds import SAE_ARCHITECTURES
    from saekit.pretrained.load import load_sae
    from saekit.sae.build import build_module, initialize
    from saekit.sae.folder import save_sae
    from saekit.saved import SAEFiles

    transform, x = _row_wise(subject), _rows(5)
    copy = pickle.loads(pickle.dumps(transform))
    must_be_equal("what its pickle reads", copy.read(x), transform.read(x))
    item = subject.plugins.get(SAE_ARCHITECTURES, DEFAULT_ARCHITECTURE)
    config = item.entry.config(d_sae=9, dtype="float64")
    sae = build_module(item, config, _D, subject.plugins, subject.options)
    initialize(sae, seeded())
    again = load_sae(SAEFiles.at(save_sae(sae, subject.place / "sae")), plugins=subject.plugins)
    with torch.no_grad():
        must_be_equal("the SAE that was saved and loaded", again(x), sae(x))


@CHECKS.add
def estimate(subject: Subject) -> None:
    """It estimates a number above 0, or a map with its inverse, the same for the same rows, which stay as they are."""
    transform = _whole(subject)
    for dtype in ("float64", "float32"):
        sample = _rows(400, dtype=dtype)
        given = sample.clone()
        found = transform.estimated(sample)
        must_be_equal("the rows that it was given, afterwards", sample, given)
        again = transform.estimated(sample)
        if not isinstance(found, Affine):
            must(is_number(found) and 0 < found < float("inf"), f"it estimates {found!r}, expected a number above 0")
            must(again == found, f"of the same rows it estimates {found!r}, and {again!r}")
            continue
        must_be_equal("the map of the same rows", tuple(again), tuple(found))
        shapes = [list(value.shape) for value in found]
        must(shapes == [[_D], [_D, _D], [_D, _D]], f"its map has the shapes {shapes} for rows of {_D}")
        z = (sample.double() - found.mean.double()) @ found.matrix.double()
        must_agree("rows mapped and back", z @ found.inverse.double() + found.mean.double(), sample, 1e-4)


@CHECKS.add
def refusal(subject: Subject) -> None:
    """Of rows that are all zero it says that it cannot, or estimates finite numbers; it breaks nothing."""
    import torch

    transform = _whole(subject)
    try:
        found = transform.estimated(torch.zeros(20, _D))
    except SaekitError:
        return
    values = found if isinstance(found, Affine) else (torch.tensor(float(found)),)
    must(all(bool(value.isfinite().all()) for value in values), f"of rows of zeros it estimates {found!r:.60}")
