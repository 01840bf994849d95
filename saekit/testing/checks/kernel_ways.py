"""What a step kernel does, beside what autograd does: of one that an architecture lists, and of one that serves it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from saekit.testing.checks.dictionaries import copied, must_be_one_step, rows, stepped
from saekit.testing.checks.numbers import must_agree

if TYPE_CHECKING:
    from saekit.pretrained.sae import SAE

__all__ = ["must_infer_alike", "must_step_alike"]

_EXACT = 1e-9


def must_step_alike(fast: SAE, plain: SAE, where: str) -> None:
    """Steps of ``fast`` are those of ``plain`` by autograd: the first, a later one, with some and with all features
    dead.  Neither is changed."""
    for number, dead in ((0, 0.0), (3, 0.0), (3, 0.4), (9, 1.0)):
        one, other = copied(fast), copied(plain, "reference")
        found, expected = (stepped(sae, step=number, dead=dead) for sae in (one, other))
        must_be_one_step(one, found, other, expected, where=f" ({where})", tolerance=_EXACT)


def must_infer_alike(fast: SAE, plain: SAE, where: str) -> None:
    """Features, outputs, and what is decoded of ``fast`` are those of ``plain`` by plain torch."""
    import torch

    fast, plain = copied(fast), copied(plain, "reference")
    x = rows(fast.ports)[0].to(fast.device)
    with torch.no_grad():
        features = plain.encode(x)
        must_agree(f"features ({where})", fast.encode(x), features, _EXACT)
        must_agree(f"outputs ({where})", fast(x), plain(x), _EXACT)
        must_agree(f"decoded features ({where})", fast.decode(features), plain.decode(features), _EXACT)
