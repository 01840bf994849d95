"""What architectures have in common whose dead features learn by AuxK what the others leave over.

Gao et al. 2024, "Scaling and evaluating sparse autoencoders", A.2.
"""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor

from saekit import SAE, StepInput
from saekit.devices import at_hand
from saekit.kernels import Encoder, FastStep, add_auxk, add_fixed_auxk
from saekit.sae import auxk_loss, not_compiled, variance_ratio

__all__ = ["RevivingSAE"]


class RevivingSAE(SAE):
    """Its options have ``aux_loss_coefficient`` and ``k_aux``."""

    config: Any
    aux_by_size: ClassVar[bool] = False
    """Whether dead features are chosen by the size of what they would be, as those are that may be below zero."""

    @property
    def aux_coefficient(self) -> float:
        """The weight of AuxK before its units: 0: none."""
        return self.config.aux_loss_coefficient  # type: ignore[no-any-return]

    @property
    def aux_shrinks(self) -> bool:
        """Whether AuxK is less when fewer than ``k_aux`` features are dead: in the paper it is not."""
        return False

    @property
    def aux_trains_encoder(self) -> bool:
        """Whether AuxK trains the encoder, too."""
        return True

    @property
    def aux_above_zero(self) -> bool:
        """Whether AuxK takes pre-activations below zero for zeros: in the paper it does not."""
        return False

    @property
    def k_aux(self) -> int:
        """Dead features of a row that AuxK trains."""
        return self.config.k_aux or max(self.d_in // 2, 1)

    def feature_norms(self) -> Tensor | None:
        """``[d_sae]``: what pre-activations are multiplied by before they are compared; None: nothing."""
        return None

    def aux_weight(self, target: Tensor, output: Tensor) -> float | Tensor:
        """What AuxK is multiplied by, for ``target`` and its reconstructions ``output``, ``[n, d_out]`` both."""
        # Where next to nothing is left over, its units are so small that AuxK would crowd out the reconstruction.
        return (self.aux_coefficient * variance_ratio(target, output, self.share)).clamp_max(1)

    def aux_loss(self, pre: Tensor, target: Tensor, output: Tensor, dead: Tensor | None) -> Tensor:
        """AuxK with its weight, for autograd: a scalar."""
        if dead is None or not self.aux_coefficient or not self._may_be_any(dead):
            return pre.new_zeros(())
        loss = auxk_loss(
            self._as_auxk_sees(pre), target, output, self.scaled_decoder(), dead, self.k_aux, self.feature_norms(),
            shrink=self.aux_shrinks, by_size=self.aux_by_size, above_zero=self.aux_above_zero, share=self.share,
        )  # fmt: skip
        return loss * self.aux_weight(target, output)

    def _as_auxk_sees(self, pre: Tensor) -> Tensor:
        if self.aux_trains_encoder:
            return pre
        return pre.detach() if self.aux_by_size else pre.detach().relu()

    @not_compiled
    def _may_be_any(self, dead: Tensor) -> bool:
        """Looking costs a CPU nothing, and another device would be waited for."""
        return not at_hand(dead.device) or bool(self.share.count(int(dead.sum()), dead))

    def add_aux_loss(
        self,
        fast: FastStep,
        encoder: Encoder,
        dead: Tensor,
        unit: Tensor | None = None,
        output: Tensor | None = None,
        among: slice = slice(None),
    ) -> Tensor:
        """The same without autograd, of the features that are ``dead [d_sae]``; its gradients go to ``fast``'s.

        ``unit`` is what it is counted in, a scalar; ``output`` is by default that of ``fast``.  Of the features only
        those ``among`` count, in one piece.
        """
        if not self.aux_coefficient:
            return fast.target.new_zeros(())
        waits = not at_hand(dead.device)
        if not waits:
            numbers = dead[among].nonzero().squeeze(1) + (among.start or 0)
            if not self.share.count(len(numbers), numbers):
                return fast.target.new_zeros(())
        output = fast.output if output is None else output
        weight, norms = self.aux_weight(fast.target, output), self.feature_norms()
        if unit is not None:
            weight = weight / unit
        how: dict[str, Any] = {
            "shrink": self.aux_shrinks,
            "above_zero": self.aux_above_zero,
            "trains_encoder": self.aux_trains_encoder,
            "output": output,
        }
        if waits:
            return add_fixed_auxk(fast, encoder, dead, self.k_aux, weight, norms, among=among, **how)
        return add_auxk(fast, encoder, numbers, self.k_aux, weight, norms, share=self.share, **how)

    def waits(self, step: StepInput) -> bool:
        """Whether a step without autograd would wait for the device, to choose among dead features."""
        return self.revives(step) and self.share.parts > 1 and not at_hand(self.device)

    def revives(self, step: StepInput) -> bool:
        """Whether a step looks for dead features."""
        return bool(self.aux_coefficient) and step.dead is not None
