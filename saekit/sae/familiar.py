"""What people know from sae-lens: ``cfg``, ``get_name``, ``fold_W_dec_norm``, and options that say where it is now."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Self

import attrs
import torch
from torch import Tensor, nn

from saekit.config import SAEConfig
from saekit.errors import ConfigError
from saekit.values import SAEInfo

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from saekit.distributed.share import Share
    from saekit.protocols import ActivationFunction
    from saekit.sae.parameters import ParameterTable

__all__ = ["Familiar"]


class Familiar(nn.Module):
    """What :class:`saekit.sae.module.SAEModule` has of it."""

    if TYPE_CHECKING:  # of the module itself
        config: SAEConfig
        info: SAEInfo
        activation: ActivationFunction
        d_in: int
        d_sae: int
        probe_rows: Tensor | None
        reads_sequences: ClassVar[bool]
        share: Share

        @property
        def dtype(self) -> torch.dtype: ...
        @property
        def device(self) -> torch.device: ...
        @property
        def table(self) -> ParameterTable: ...
        def decoder_norms(self) -> Tensor: ...
        def encode(self, x: Tensor) -> Tensor: ...
        def _without_hooks(self) -> AbstractContextManager[None]: ...

    @property
    def cfg(self) -> SAEConfig:
        """:attr:`config`, as sae-lens calls it."""
        return self.config

    def get_name(self) -> str:
        """What names it in plots and files, as far as it is known: ``sae_gpt2-small_blocks.8.hook_resid_pre_24576``.

        Of what has several sites all are named: ``a+b`` of a crosscoder, ``a-to-b`` of a transcoder.
        """
        known = (self.info.metadata.get("model_name"), self.info.sites and self.info.sites.name, self.d_sae)
        return "_".join(["sae", *(str(one) for one in known if one is not None)])

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        """The options say which type the weights have been moved to."""
        before = self.dtype
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self.dtype != before:
            self.state_dtype()
        return self

    def state_dtype(self) -> None:
        """Let the options say which type the weights are in."""
        name = str(self.dtype).removeprefix("torch.")
        self.config = attrs.evolve(self.config, dtype=name)  # type: ignore[arg-type]
        self.info = attrs.evolve(self.info, options={**self.info.options, "dtype": name})

    @torch.no_grad()
    def fold_W_dec_norm(self) -> None:
        """From now on every decoder row has norm 1, and its feature is so many times as large: outputs stay the same.

        Rows of norm 0 stay as they are.  :class:`ConfigError`, and nothing is changed, where it would change more than
        the features' sizes: with a non-linearity that does not keep proportions, or where features compete for a place
        among the largest.  What it makes of a few rows is looked at before and after.
        """
        self._check_sizes_are_free()
        norms, rows = self.decoder_norms(), self._few_rows()
        grown = [entry.name for entry in self.table if entry.grows and getattr(self, entry.name) is not None]
        # On the CPU: there may be no room for it twice on the device.
        kept = {name: torch.empty_like(getattr(self, name), device="cpu").copy_(getattr(self, name)) for name in grown}
        before = self._outputs(rows)
        self.table.grow_features(self, torch.where(norms > 0, norms, 1))
        off = _off(before, self._outputs(rows))
        if not off <= torch.finfo(self.dtype).eps ** 0.5:
            for name, value in kept.items():
                getattr(self, name).copy_(value)
            raise ConfigError(
                f"norms cannot be folded into the encoder of a {type(self).__name__}: its outputs would be others (by "
                f"{off:.2g} of their size), as where features are compared by size. It is as it was; an architecture "
                "that can do it otherwise overrides fold_W_dec_norm()"
            )

    def _few_rows(self) -> Tensor:
        """Inputs ``[n, d_in]``, or one sequence of them: its own, or random ones that make features active."""
        if self.probe_rows is not None:
            own = self.probe_rows.to(self.device, self.dtype)
            own = own[None] if self.reads_sequences else own
            if bool(self._outputs(own).isfinite().all(-1).any()):
                return own
        drawn = torch.randn(16, self.d_in, generator=torch.Generator().manual_seed(0)).to(self.device, self.dtype)
        rows = drawn[None] if self.reads_sequences else drawn
        for scale in (1, 8, 64, 512):
            with self._without_hooks():
                features = self.encode(rows * scale)
            active = ((features != 0).any(-1) & features.isfinite().all(-1)).sum()
            if 2 * int(self.share.features.sum(active)) >= len(drawn):
                return rows * scale
        return rows

    def _outputs(self, rows: Tensor) -> Tensor:
        devices = [self.device] if self.device.type == "cuda" else []
        with self._without_hooks(), torch.random.fork_rng(devices=devices):
            return self(rows, use_error_term=False)  # type: ignore[no-any-return]

    def _check_sizes_are_free(self) -> None:
        """:class:`ConfigError` unless features may be measured in another unit, each in its own."""
        numbers = torch.linspace(-4, 4, 65, device=self.device)
        if not torch.allclose(self.activation(numbers * 8), self.activation(numbers) * 8):
            raise ConfigError(
                "norms cannot be folded into the encoder: the activation function "
                f"{self.info.options.get('activation')} does not keep proportions, and other outputs would come of it"
            )


def _off(before: Tensor, after: Tensor) -> float:
    """How far off half of the outputs ``[..., d_out]`` are, of their size; of rows that were finite numbers.

    By rounding alone, a feature of a few rows may pass a threshold; where features compete, most rows differ.
    """
    wide = torch.promote_types(before.dtype, torch.float32)  # where norms of float16 are numbers
    told = before.isfinite().all(-1)
    before, after = before[told].to(wide), after[told].to(wide)
    return float(((after - before).norm(dim=-1) / before.norm(dim=-1).clamp_min(1e-30)).median())
