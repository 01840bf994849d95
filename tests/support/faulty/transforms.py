"""Input transforms that break a promise each."""

from __future__ import annotations

from typing import Any

import torch
from support.faulty.case import cases
from torch import Tensor

from saekit.transforms import Affine


class Scaled:
    """Nothing is wrong with it."""

    row_wise = True

    def __init__(self, config: Any) -> None:
        pass

    def size(self, x: Tensor) -> Tensor:
        return x.norm(dim=-1, keepdim=True) + 1e-6

    def read(self, x: Tensor) -> Tensor:
        return x / self.size(x)

    def written(self, y: Tensor, x: Tensor) -> Tensor:
        return y * self.size(x)


class Both(Scaled):
    def estimated(self, rows: Tensor) -> float:
        return 1.0


class Bare(Scaled):
    def size(self, x: Tensor) -> Tensor:
        return x.norm(dim=-1, keepdim=True)


class OfAll(Scaled):
    def size(self, x: Tensor) -> Tensor:
        return x.norm(dim=-1, keepdim=True).mean() + 1e-6 if x.numel() else x.sum(-1, keepdim=True)


class OneWay(Scaled):
    def written(self, y: Tensor, x: Tensor) -> Tensor:
        return y


class Detached(Scaled):
    def size(self, x: Tensor) -> Tensor:
        return super().size(x).detach()


class Whole:
    """Nothing is wrong with it."""

    row_wise = False

    def __init__(self, config: Any) -> None:
        pass

    def estimated(self, rows: Tensor) -> Any:
        return 2.0


class Twisted(Whole):
    def estimated(self, rows: Tensor) -> Any:
        matrix = 2 * torch.eye(rows.shape[1], dtype=torch.float64)
        return Affine(rows.double().mean(0), matrix, matrix)


class Careless(Whole):
    def estimated(self, rows: Tensor) -> Any:
        return 1 / float(rows.norm()) if rows.norm() else float("nan")


def unpicklable(config: Any) -> Scaled:
    class Inside(Scaled):
        pass

    return Inside(config)


CASES = cases(
    "input_transforms",
    {
        "build": (r"row_wise is True: expected read\(\) and written\(\), and not the others'", Both),
        "shape": ("of rows that are 0.0 everywhere it makes numbers that are not finite", Bare),
        "rows": ("a row that is read alone: off by", OfAll),
        "back": (r"written\(read\(x\), x\): off by", OneWay),
        "gradient": ("autograd's derivative of read is not that of small changes", Detached),
        "saving": ("Can't get local object|Can't pickle local object|cannot pickle", unpicklable),
        "estimate": ("rows mapped and back: off by", Twisted),
        "refusal": ("of rows of zeros it estimates nan", Careless),
    },
)
