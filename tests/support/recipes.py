"""A model whose activations depend on all contexts that it is run on at once."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from saekit import Forward
from saekit.testing import FakeBackend


class Mixing(FakeBackend):
    """Each context adds what all contexts of its forward are, by their order: run with others, it has other bits."""

    def __init__(self, factor: float = 1.0, most: int = 10**9) -> None:
        """``factor``: of what is added; ``most``: contexts of 8 tokens that fit into memory."""
        super().__init__()
        self.factor, self.most = factor, most

    def run(self, tokens: Tensor, **options: Any) -> Forward:
        if len(tokens) > self.most and tokens.shape[1] == 8:
            raise MemoryError
        made = super().run(tokens, **options)
        if options.get("want", "held") != "held":
            return made
        places = torch.arange(1, len(tokens) + 1, dtype=torch.float64)[:, None]
        shift = self.factor * torch.sin((tokens * places).sum() / 7919).float()
        return Forward({name: values + shift for name, values in made.held.items()})
