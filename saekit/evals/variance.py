"""How well and how sparsely an SAE reconstructs, summed in float64 over any number of batches."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import attrs
import torch
from torch import Tensor

from saekit.ambient import ambient
from saekit.devices import widest
from saekit.evals.pieces import at_once
from saekit.sae.module import SAEModule

__all__ = ["Reconstruction", "variance_metrics"]


_NEVER = -9.99  # log10 of the firing fraction of a feature that never fired, to which 1e-10 is added


@attrs.define
class _Variance:
    """Running sums of what is given of ``y [n, d]``."""

    d: int
    rows: int = 0
    squared_error: float = 0.0
    _center: Tensor = attrs.field(init=False)
    _sum: Tensor = attrs.field(init=False)
    _squares: float = 0.0

    def __attrs_post_init__(self) -> None:
        self._center = torch.zeros(self.d, dtype=torch.float64, device="cpu")
        self._sum = torch.zeros(self.d, dtype=torch.float64, device="cpu")

    def add(self, y: Tensor, output: Tensor) -> None:
        """Count ``y`` and ``output [n, d]``, in float64 on the CPU."""
        if not self.rows:
            self._center = y.mean(0)  # sums around a near mean keep their digits
        shifted = y - self._center
        self._sum += shifted.sum(0)
        self._squares += shifted.pow(2).sum().item()
        self.squared_error += (output - y).pow(2).sum().item()
        self.rows += len(y)

    @property
    def explained(self) -> float:
        """``1 − Σ‖y − ŷ‖² / Σ‖y − ȳ‖²``; nan where all is alike."""
        variance = self._squares - self._sum.pow(2).sum().item() / self.rows
        return 1 - self.squared_error / variance if variance > 0 else math.nan


@attrs.define
class Reconstruction:
    """Running sums over rows of targets ``y [n, d_out]``, which of an SAE are its inputs; :meth:`metrics` may be read
    at any time.

    Explained variance is ``1 − Σ‖y − ŷ‖² / Σ‖y − ȳ‖²`` with ȳ the mean over everything that was added.  With several
    ``targets``, widths by their names, it is told of each, too (``explained_variance/NAME``).

    ``never_fired`` counts the features that fired on none of ``n_tokens``, nor in training as far as that is known
    (:meth:`fires`); a feature that training calls dead has only not fired for a while.  Where nothing is known of
    training, it may still fire on up to ``3 / n_tokens`` of all tokens (95 %: the rule of three, Hanley and
    Lippman-Hand 1983).
    """

    d_out: int
    d_sae: int
    targets: Mapping[str, int] = attrs.field(factory=dict)
    l0: float = 0.0
    l1: float = 0.0
    cosine: float = 0.0
    norm_in: float = 0.0
    norm_out: float = 0.0
    _whole: _Variance = attrs.field(init=False)
    _each: Mapping[str, _Variance] = attrs.field(init=False)
    _fired: Tensor = attrs.field(init=False)
    _known: Tensor = attrs.field(init=False)

    def __attrs_post_init__(self) -> None:
        self._whole = _Variance(self.d_out)
        several = self.targets if len(self.targets) > 1 else {}
        self._each = {name: _Variance(width) for name, width in several.items()}
        self._fired = torch.zeros(self.d_sae, dtype=torch.float64, device="cpu")
        self._known = torch.zeros(self.d_sae, dtype=torch.bool, device="cpu")

    @property
    def rows(self) -> int:
        """How many were added."""
        return self._whole.rows

    def fires(self, features: Tensor) -> None:
        """These features, ``[d_sae]`` bool, are known to fire on other tokens."""
        self._known |= features.cpu()

    @torch.no_grad()
    def add(self, y: Tensor, output: Tensor, features: Tensor) -> None:
        """Count ``y`` and ``output [n, d_out]`` and ``features [n, d_sae]``."""
        y, output = y.cpu().double(), output.cpu().double()  # not every device has float64
        self._whole.add(y, output)
        if self._each:
            widths = [*self.targets.values()]
            parts = zip(self._each.values(), y.split(widths, 1), output.split(widths, 1), strict=True)
            for sums, wanted, given in parts:
                sums.add(wanted, given)
        active = features.abs() > 0  # some architectures have features below zero
        self._fired += active.sum(0).cpu()
        self.l0 += active.sum().item()
        self.l1 += features.abs().sum(dtype=widest(features.device)).item()
        norm_in, norm_out = y.norm(dim=-1), output.norm(dim=-1)
        self.norm_in += norm_in.sum().item()
        self.norm_out += norm_out.sum().item()
        self.cosine += ((y * output).sum(-1) / (norm_in * norm_out).clamp_min(1e-30)).sum().item()

    def metrics(self) -> dict[str, float]:
        """The numbers by name."""
        if not self.rows:
            raise ValueError("nothing was added")
        fractions = self._fired / self.rows
        return {
            "explained_variance": self._whole.explained,
            **{f"explained_variance/{name}": sums.explained for name, sums in self._each.items()},
            "mse": self._whole.squared_error / self.rows,
            "l0": self.l0 / self.rows,
            "l1": self.l1 / self.rows,
            "cosine_similarity": self.cosine / self.rows,
            "l2_norm_in": self.norm_in / self.rows,
            "l2_norm_out": self.norm_out / self.rows,
            "l2_ratio": self.norm_out / self.norm_in if self.norm_in > 0 else math.nan,
            "never_fired": float(((fractions == 0) & ~self._known).sum()),
            "dense_features": float((fractions > 0.1).sum()),
            "n_tokens": float(self.rows),
        }


@ambient()
@torch.no_grad()
def variance_metrics(sae: SAEModule, batches: Iterable[Tensor | tuple[Tensor, Tensor]]) -> dict[str, float]:
    """:class:`Reconstruction` of ``sae`` over batches of rows ``[n, d_in]``, or of rows with targets ``[n, d_out]``.

    What reads sequences (:attr:`saekit.sae.SAEModule.reads_sequences`) takes ``[batch, position, d_in]``.  Features are
    made for so many rows at once as fit into little memory, however large the batches are.
    """
    sums = Reconstruction(sae.d_out, sae.d_sae, sae.ports.targets)
    for batch in batches:
        rows, targets = (batch, None) if isinstance(batch, Tensor) else batch
        size = at_once(sae, math.prod(rows.shape[1:-1]))
        pieces = rows.split(size)
        for x, y in zip(pieces, [None] * len(pieces) if targets is None else targets.split(size), strict=True):
            x = x.to(sae.device)
            features = sae.encode(x)
            like = None if sae.input_transform is None else x
            output = sae.with_bypass(sae.decode(features, like=like), x)
            sums.add(*map(_rows, (x if y is None else y, output, features)))
            del features  # before the next ones are made
    if sae.log_sparsity is not None:
        sums.fires(sae.log_sparsity > _NEVER)
    return sums.metrics()


def _rows(values: Tensor) -> Tensor:
    return values.reshape(-1, values.shape[-1])
