"""What a feature does to the logits at each token of a window, by the direct path, as sae_vis has it.

At a token whose last residual stream is ``r``, of which the feature wrote ``f d``, it is
``log softmax(r W_U / std(r)) - log softmax((r - f d) W_U / std(r - f d))``: the last normalization without its weights
and its mean, and nothing of what later layers make of it.
"""

from __future__ import annotations

from collections.abc import Sequence

import attrs
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from saekit.abilities import KnowsResidualStream, StartsInside
from saekit.ambient import ambient
from saekit.analysis.directions import LogitPath, feature_directions, logit_path
from saekit.errors import DataError, ModelError
from saekit.exports.schemas import Effect
from saekit.features.feature import Feature
from saekit.features.subject import checksum
from saekit.features.tables import SAETables
from saekit.features.windows import Window
from saekit.protocols import ModelBackend
from saekit.sae.module import SAEModule
from saekit.site import Site, Sites
from saekit.splicing.fits import fitting_sites

__all__ = ["Contributions"]

_SHOWN = 5  # tokens that are raised, and lowered, at each, as sae_vis shows
_CONTEXTS = 32  # in a forward
_KEPT = 1024  # contexts whose streams are held
_ROWS = 256  # tokens whose logits are held at once


@attrs.define(eq=False)
class Contributions:
    """What features of ``sae`` do at tokens of the store's contexts; called with a feature and some of its windows."""

    features: SAETables
    sae: SAEModule
    backend: ModelBackend
    _last: str
    """The last residual stream."""
    _path: LogitPath
    _streams: dict[int, Tensor] = attrs.field(factory=dict)

    @classmethod
    def of(cls, features: SAETables, sae: SAEModule, backend: ModelBackend) -> Contributions:
        """:class:`DataError` for another SAE or model than the store's, :class:`ModelError` without a direct path."""
        made_with, own = features.store.manifest.model, backend.fingerprint()
        known = made_with.get("fingerprint")
        if made_with.get("name") != backend.name if known is None or own is None else known != own:
            raise DataError(
                f"the features were collected with the model {made_with.get('name')!r}, and {backend.name!r} is "
                "another: give that one (model)"
            )
        if checksum(sae) != features.about.checksum:
            raise DataError(f"the SAE is not the one whose features were collected as {features.name}: give that one")
        path = logit_path(sae, backend, _sites(features, sae, backend))
        if isinstance(path, str):
            raise ModelError(f"nothing can be said of what features do at each token: {path}. Leave the model out")
        last = backend.entry_of(()) if isinstance(backend, StartsInside) else None
        if last is None or not isinstance(backend, KnowsResidualStream) or not backend.in_residual_stream(last):
            raise ModelError(
                f"the backend of {backend.name!r} does not say which hook holds the last residual stream, so nothing "
                "can be said of what features do at each token. Leave the model out"
            )
        return cls(features, sae, backend, last, path)

    @ambient()
    @torch.no_grad()
    def __call__(self, feature: Feature, windows: Sequence[Window]) -> list[Effect]:
        """The effects in each window."""
        self._read({one.context for one in windows})
        number = torch.tensor([feature.index], device=self.sae.device)
        direction = self._path.in_residual_stream(feature_directions(self.sae, number))[0]
        return [self._of_window(direction, feature, window) for window in windows]

    def _of_window(self, direction: Tensor, feature: Feature, window: Window) -> Effect:
        """One window.  The loss of a token is of what the model makes of the one before it, which may lie outside."""
        size, before = len(window.ids), min(window.start, 1)
        values = np.array(feature.window(window.context, window.start, (before, size - 1)).values)
        loss = [0.0] * size
        raised: list[list[tuple[int, float]]] = [[] for _ in range(size)]
        lowered: list[list[tuple[int, float]]] = [[] for _ in range(size)]
        active = np.flatnonzero(values)
        for part in np.split(active, range(_ROWS, len(active), _ROWS)) if len(active) else ():
            change = self._change(window.context, window.start - before + part, values[part], direction)
            top, bottom = (signed.topk(min(_SHOWN, signed.shape[1])) for signed in (change, -change))
            for row, place in enumerate((part - before).tolist()):
                if place >= 0:
                    raised[place] = [*zip(top.indices[row].tolist(), top.values[row].tolist(), strict=True)]
                    lowered[place] = [*zip(bottom.indices[row].tolist(), (-bottom.values[row]).tolist(), strict=True)]
                if place + 1 < size:
                    loss[place + 1] = -float(change[row, window.ids[place + 1]])
        return Effect(loss, raised, lowered)

    def _change(
        self, context: int, places: NDArray[np.int64], values: NDArray[np.float64], direction: Tensor
    ) -> Tensor:
        """``[n, d_vocab]``: what activations ``values [n]`` at ``places [n]`` do to the logarithms of likelihoods."""
        stream = self._streams[context][torch.from_numpy(places)].to(self._path.unembedding)
        amount = torch.from_numpy(values).to(stream)[:, None]
        return self._log_likely(stream) - self._log_likely(stream - amount * direction.to(stream))

    def _log_likely(self, stream: Tensor) -> Tensor:
        """``[n, d_vocab]`` of last residual streams ``[n, d_model]``."""
        logits = (stream / stream.std(-1, correction=0, keepdim=True)) @ self._path.unembedding
        return logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)

    def _read(self, contexts: set[int]) -> None:
        """Have the streams of these contexts, and of some that were read before."""
        missing = sorted(contexts - self._streams.keys())
        while self._streams and len(self._streams) + len(missing) > _KEPT:
            gone = next((one for one in self._streams if one not in contexts), None)
            if gone is None:
                break
            del self._streams[gone]
        for start in range(0, len(missing), _CONTEXTS):
            some = missing[start : start + _CONTEXTS]
            tokens = torch.from_numpy(self.features.store.contexts[some].astype(np.int64))
            held = self.backend.run(tokens, read={self._last}).held[self._last]
            self._streams |= dict(zip(some, held.cpu(), strict=True))


def _sites(features: SAETables, sae: SAEModule, backend: ModelBackend) -> Sites:
    """Where the SAE reads and writes, by the names of this backend."""
    about, heads = features.about, sae.info.sites
    if heads is not None and [one.name for one in heads.inputs] == [*about.inputs]:
        return fitting_sites(sae, backend, None)
    inputs, targets = (tuple(Site(hook_name=name) for name in names) for names in (about.inputs, about.targets))
    return Sites(inputs, targets)
