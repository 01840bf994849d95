"""What an SAE computes otherwise than it did, in words: causes that are known are tried, and named if they fit."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Any

import attrs
import torch
from torch import Tensor

from saekit.sae.probe import as_it_is, explained, norms_of, off_here, results
from saekit.weights import dtype_name

if TYPE_CHECKING:
    from saekit.sae.module import SAEModule

__all__ = ["Differences", "Expected"]

_TINY = 1e-30
_ROUNDED = 0.03
"""How far off, relative to itself, a row may be that was computed with weights rounded to 8 bits."""
_SHORT = {torch.bfloat16: "bfloat16", torch.float16: "float16"}


@attrs.frozen(eq=False)
class Expected:
    """What a probe says: see :class:`saekit.sae.probe.Probe`."""

    x: Tensor
    output: Tensor
    values: Tensor
    features: Tensor
    l0: Tensor
    facts: Mapping[str, Any]


@attrs.define(eq=False, slots=False)
class Differences:
    """What ``sae`` computes, and what it should."""

    sae: SAEModule
    said: Expected

    def told(self) -> list[str]:
        """What is otherwise, the cause if it is one of those that are known; nothing: an empty list."""
        texts = []
        if (before := self.said.facts.get("dtype")) not in (None, now := dtype_name(self.sae.dtype)):
            texts.append(f"the weights are {now}, and were {before} when they were saved")
        if self._fits(self.output, self.said.output) and self._same_features:
            return texts
        causes: tuple[Callable[[], str | None], ...] = (
            self._rounding, self._folded_norms, self._factor, self._activation_scale, self._centering, self._bias,
            self._threshold,
        )  # fmt: skip
        found = next((text for cause in causes if (text := cause()) is not None), None)
        return [*texts, *([found] if found else [self._damage(), *self._changed()]), *self._variance()]

    # ---- what is computed

    def _computed(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Features and outputs of rows, on the CPU."""
        with as_it_is(self.sae):
            features, output = results(self.sae, x)
            return features.float().cpu(), output.float().cpu()

    @cached_property
    def _both(self) -> tuple[Tensor, Tensor]:
        return self._computed(self.said.x)

    @property
    def output(self) -> Tensor:
        return self._both[1]

    @cached_property
    def values(self) -> Tensor:
        """``[n, m]``: of the features that the probe names."""
        return self._both[0].gather(1, self.said.features.long())

    @cached_property
    def l0(self) -> Tensor:
        """``[n]``: how many features are active."""
        return (self._both[0] != 0).sum(1)

    @cached_property
    def off(self) -> float:
        """How far off a row may be, relative to itself: by the coarser of the products that saved it and are here."""
        return max(float(self.said.facts["off"]), off_here(self.sae))

    def _fits(self, found: Tensor, expected: Tensor, off: float | None = None) -> bool:
        return bool((_relative(found, expected) <= (off or self.off)).all())

    @property
    def _same_features(self) -> bool:
        more = (self.l0 - self.said.l0).abs()
        return self._fits(self.values, self.said.values) and bool((more <= (self.said.l0 * 0.02).clamp_min(1)).all())

    @cached_property
    def _norms(self) -> dict[str, tuple[float, float]]:
        """Of the tensors, before and now, where both are known."""
        before: Mapping[str, float] = self.said.facts["norms"]
        now = norms_of(self._weights)
        return {name: (before[name], now[name]) for name in now if name in before}

    @cached_property
    def _weights(self) -> dict[str, Tensor]:
        """As they were read."""
        return {name: value.detach().cpu() for name, value in self.sae.named_parameters()}

    def _weight(self, *dims: str) -> Tensor | None:
        """The parameter of these dimensions."""
        name = self.sae.table.of_dims(*dims)
        return None if name is None else self._weights.get(name)

    # ---- causes

    def _rounding(self) -> str | None:
        """Most rows differ by little; where the largest features are chosen, a few may by much."""
        rows = torch.cat([_relative(self.output, self.said.output), _relative(self.values, self.said.values)])
        if (typical := rows.median().item()) > _ROUNDED:
            return None
        matrices = [value for value in self._weights.values() if value.ndim >= 2]
        for short, name in _SHORT.items():
            if matrices and all(bool((value.to(short).to(value.dtype) == value).all()) for value in matrices):
                return (
                    f"the weights were rounded to {name}: half of the rows differ by {100 * typical:.2g} % or more, as "
                    "that rounding makes"
                )
        return None

    def _folded_norms(self) -> str | None:
        """Outputs are the same, and features larger by a factor of each."""
        decoder = self._weight("d_sae", "d_out")
        if decoder is None or not self._fits(self.output, self.said.output) or not self._one_factor_each():
            return None
        norms = decoder.double().norm(dim=-1)
        if bool(((norms - 1).abs() < 1e-3).all()):
            return (
                "the norms of decoder rows were folded into the encoder: rows have norm 1, features are larger by what "
                "their rows were, and outputs are the same"
            )
        return "features are multiplied by a factor of each, and their decoder rows divided by it: outputs are the same"

    def _one_factor_each(self) -> bool:
        """Whether each feature has, in all rows, one factor of what it was."""
        active = self.said.values.abs() > self.said.values.abs().amax() * 1e-3
        ratios: dict[int, float] = {}
        for feature, before, now in zip(
            self.said.features[active].tolist(),
            self.said.values[active].tolist(),
            self.values[active].tolist(),
            strict=True,
        ):
            ratio = now / before
            if ratio <= 0 or abs(ratios.setdefault(feature, ratio) / ratio - 1) > 100 * self.off:
                return False
        return bool(ratios)

    def _factor(self) -> str | None:
        """What features add to outputs is the same but for one factor."""
        if not self._same_features:
            return None
        nothing, bias = torch.zeros(()), self._weight("d_out")
        less = f"outputs less {self.sae.table.of_dims('d_out')}"
        for what, constant in (("outputs", nothing), (less, nothing if bias is None else bias)):
            found, expected = self.output - constant.float(), self.said.output - constant.float()
            factor = _ratio(found, expected)
            if abs(factor - 1) > self.off and self._fits(found, factor * expected, 10 * self.off):
                return (
                    f"{what} are {factor:.5g} times as large as they were, and features are the same: a constant factor"
                )
        return None

    def _activation_scale(self) -> str | None:
        """It does on ``x`` what it did on a multiple of it."""
        before, now = self._norms.get(self.sae.table.of_dims("d_in", "d_sae") or "", (0.0, 0.0))
        if not before or not now or abs(now / before - 1) <= self.off:
            return None
        scale = now / before
        _, output = self._computed(self.said.x.double() / scale)
        if not self._fits(output * scale, self.said.output):
            return None
        known = self.sae.info.metadata.get("activation_scale")
        told = f" (activation_scale is {known:.5g})" if isinstance(known, int | float) else ""
        return (
            f"the weights do on x what they did on {scale:.5g} x: the factor by which activations are scaled was "
            f"folded in once more, or taken out{told}"
        )

    def _centering(self) -> str | None:
        """The decoder's bias is subtracted from inputs, or is not."""
        bias = self._weight("d_out")
        if bias is None or not self.sae.ports.same:
            return None
        subtracts = self.sae.config.apply_b_dec_to_input
        x = self.said.x.double() + (bias.double() if subtracts else -bias.double())
        if not self._fits(self._computed(x)[1], self.said.output, 10 * self.off):
            return None
        if subtracts:
            return "b_dec is subtracted from inputs (apply_b_dec_to_input), and was not when the SAE was saved"
        return "b_dec is not subtracted from inputs (apply_b_dec_to_input), and was when the SAE was saved"

    def _bias(self) -> str | None:
        """The same is added to all rows, beside what features make."""
        if not self._same_features:
            return None
        off = self.output - self.said.output
        if not self._fits(self.output - off.mean(0), self.said.output):
            return None
        norm = off.mean(0).norm().item()
        return f"all outputs are off by the same vector, of norm {norm:.4g}: b_dec is another, or is not added"

    def _threshold(self) -> str | None:
        """All features that were active are, and others, too."""
        active = self.values * (self.said.values != 0)
        if not bool((self.l0 > self.said.l0).any()) or not self._fits(active, self.said.values, 10 * self.off):
            return None
        before, now = (counts.float().mean().item() for counts in (self.said.l0, self.l0))
        return f"features are active that were not, {now:.4g} of a row for {before:.4g}: a threshold, or k, is left out"

    def _damage(self) -> str:
        rows, features = _relative(self.output, self.said.output), _relative(self.values, self.said.values)
        bad = int(((rows > self.off) | (features > self.off)).sum())
        return (
            f"{bad} of {len(rows)} rows come out otherwise, outputs off by up to {100 * rows.max().item():.3g} % and "
            f"features by up to {100 * features.max().item():.3g} %: weights are damaged, or of another SAE"
        )

    def _changed(self) -> list[str]:
        """The tensors whose norm is another."""
        found: dict[str, list[str]] = {}
        for name, (before, now) in self._norms.items():
            if abs(now - before) > 1e-4 * max(before, now):
                times = "is 0, and was not" if not now else f"is {now / before:.4g} times what it was" if before else (
                    "is not 0, and was"
                )  # fmt: skip
                found.setdefault(times, []).append(name)
        return [f"the norm of {' and of '.join(names)} {times}" for times, names in found.items()]

    def _variance(self) -> list[str]:
        before = self.said.facts.get("explained_variance")
        if before is None or self.said.facts.get("rows") != "activations":
            return []
        now = explained(self.said.x.float(), self.output)
        return [f"of the variance of the probe's rows {now:.4f} is explained, and {before:.4f} was"]


def _relative(found: Tensor, expected: Tensor) -> Tensor:
    """``[n]``: how far off each row is, relative to what it should be."""
    off: Tensor = torch.linalg.vector_norm(found - expected, dim=1)
    whole: Tensor = torch.linalg.vector_norm(expected, dim=1)
    return off / whole.clamp_min(_TINY)


def _ratio(found: Tensor, expected: Tensor) -> float:
    """The factor that makes ``expected`` most like ``found``."""
    return ((found * expected).sum() / expected.square().sum().clamp_min(_TINY)).item()
