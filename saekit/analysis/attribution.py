"""From which tokens an attention brings what makes a feature active: direct feature attribution.

An attention's heads hold ``z[t] = Σ_s pattern[t, s] v[s]``, so the linear part of the pre-activation of a feature of an
SAE that reads them, ``z[t] · W_enc[:, f]``, is a sum over source positions ``s`` (Kissane et al. 2024, "Interpreting
attention layer outputs with sparse autoencoders").
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Self

import attrs
import numpy as np
import torch
from torch import Tensor

from saekit.ambient import ambient
from saekit.analysis.loss_effects import check_same, sites_in_store
from saekit.errors import ModelError
from saekit.features.tables import SAETables
from saekit.features.windows import Window
from saekit.protocols import ModelBackend
from saekit.sae.module import SAEModule
from saekit.site import Site, Sites
from saekit.splicing.fits import fitting_sites

__all__ = ["AttentionSources", "SourceValues"]

_Z, _PATTERN, _V = "hook_z", "hook_pattern", "hook_v"
_CONTEXTS = 32  # in a forward
_ROWS = 4  # on which it is seen whether the encoder is what it is taken for

SourceValues = tuple[float, ...]
"""For each token of a window, what comes from there to the token that the window is about."""


@attrs.frozen(eq=False)
class AttentionSources:
    """What each source position contributes to the pre-activations of features of an SAE at ``hook_z``.

    The contributions of all positions of a context sum up to ``z · W_enc[:, f]``: the pre-activation without what is
    the same for every input (``b_enc``, and ``b_dec`` where it is subtracted).  Of an SAE of one head they are its.
    """

    sae: SAEModule
    backend: ModelBackend
    site: Site
    pattern: str
    """The hook that holds ``[b, head, target position, source position]``."""
    values: str
    """The hook that holds ``[b, position, head, d_head]``; a head of it may serve several of the pattern."""

    @classmethod
    def of(cls, sae: SAEModule, backend: ModelBackend, sites: Sites | Site | str | None = None) -> Self:
        """``sites`` as for :func:`saekit.splice`; left out, those that the SAE names.

        :class:`ModelError` for an SAE that does not read the heads of an attention, or not linearly, and for a model
        without hooks of that attention's pattern and values.
        """
        inputs = fitting_sites(sae, backend, sites).inputs
        (site,) = inputs if len(inputs) == 1 else (None,)
        if site is None or not site.hook_name.endswith(_Z):
            read = ", ".join(one.name for one in inputs)
            raise ModelError(
                "features have source positions only where an SAE reads the heads of an attention (hook_z), and it "
                f"reads {read}"
            )
        if sae.input_transform is not None or sae.reads_sequences:
            raise ModelError("features of this SAE are no linear function of what is read, so they have no sources")
        stem = site.hook_name.removesuffix(_Z)
        names = {*backend.hook_names()}
        if missing := [stem + name for name in (_PATTERN, _V) if stem + name not in names]:
            raise ModelError(
                f"the model {backend.name!r} has no hook {', '.join(missing)}, so nothing can be said of source "
                "positions. HookedTransformer and TransformerBridge have them"
            )
        return cls(sae, backend, site, stem + _PATTERN, stem + _V)

    @classmethod
    def of_store(cls, features: SAETables, sae: SAEModule, backend: ModelBackend) -> Self:
        """Those of the SAE that ``features`` of a store are of; :class:`DataError` for another SAE or model."""
        check_same(features, sae, backend)
        return cls.of(sae, backend, sites_in_store(features, sae, backend))

    @ambient()
    @torch.no_grad()
    def at(self, tokens: Tensor, feature: int, rows: Sequence[int], places: Sequence[int]) -> Tensor:
        """``[n, t]``: of contexts ``tokens [b, t]``, for each of ``rows`` and ``places`` what ``feature`` gets there
        from every position; 0 from those that come later.

        In float32, or wider where model or SAE are.  :class:`ModelError` where the model does not hold
        ``pattern · values`` at its heads.
        """
        held = self.backend.run(tokens, read={self.site.hook_name, self.pattern, self.values}).held
        row, place = (torch.tensor([*numbers], dtype=torch.long) for numbers in (rows, places))
        z = held[self.site.hook_name]
        heads, width = z.shape[-2:]
        values = held[self.values]
        values = values.reshape(*tokens.shape, -1, width)[row.to(values.device)]
        pattern = held[self.pattern]
        pattern = pattern[row.to(pattern.device), :, place.to(pattern.device)]  # [n, head, source]
        dtype = torch.promote_types(torch.promote_types(z.dtype, self.sae.dtype), torch.float32)
        z = z[row.to(z.device), place.to(z.device)].to(dtype)
        pattern, values = pattern.to(z), values.to(z)
        values = values.repeat_interleave(heads // values.shape[2], dim=2)
        self._check_product(torch.einsum("nhs,nshd->nhd", pattern, values), z)
        towards = self._encoder(feature, z)
        if self.site.hook_head_index is not None:
            head = self.site.hook_head_index
            pattern, values, towards = pattern[:, head, None], values[:, :, head, None], towards[None]
        else:
            towards = towards.reshape(heads, width)
        return torch.einsum("nhs,nshd,hd->ns", pattern, values, towards)

    def of_windows(self, features: SAETables, feature: int, windows: Sequence[Window]) -> list[SourceValues]:
        """For each of ``windows`` of a store's contexts, what comes from its tokens to the one that it is about."""
        contexts = sorted({one.context for one in windows})
        found: dict[int, list[float]] = {}
        for start in range(0, len(contexts), _CONTEXTS):
            some = contexts[start : start + _CONTEXTS]
            mine = [number for number, one in enumerate(windows) if one.context in some]
            rows = [some.index(windows[number].context) for number in mine]
            tokens = torch.from_numpy(features.store.contexts[some].astype(np.int64))
            told = self.at(tokens, feature, rows, [windows[number].position for number in mine])
            found |= zip(mine, told.tolist(), strict=True)
        return [tuple(found[n][one.start : one.start + len(one.ids)]) for n, one in enumerate(windows)]

    def _encoder(self, feature: int, z: Tensor) -> Tensor:
        """``[d_in]``: the feature's column of the encoder, if it makes pre-activations of ``z [n, heads, d]``."""
        weights = getattr(self.sae, "W_enc", None)
        if isinstance(weights, Tensor) and weights.shape == (self.sae.d_in, self.sae.d_sae):
            column = weights.detach()[:, feature].to(z)
            some = self.site.extract(z[:_ROWS, None])[:, 0].to(device=self.sae.device, dtype=self.sae.dtype)
            both = self.sae.pre_activations(torch.cat([some, torch.zeros_like(some)]))[:, feature].detach().to(z)
            linear = both[: len(some)] - both[len(some) :]
            if torch.allclose(linear, some.to(z) @ column, rtol=1e-2, atol=1e-2 * (1 + float(linear.abs().max()))):
                return column
        raise ModelError("features of this SAE are no linear function of what is read, so they have no sources")

    def _check_product(self, product: Tensor, z: Tensor) -> None:
        size = float(z.abs().max()) if z.numel() else 0.0
        if not torch.allclose(product, z, rtol=0.02, atol=0.02 * size):  # in bfloat16, too
            raise ModelError(
                f"{self.site.hook_name} of {self.backend.name!r} does not hold {self.pattern} times {self.values}, so "
                "nothing can be said of source positions"
            )
