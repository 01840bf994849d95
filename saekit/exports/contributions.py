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
from torch import Tensor

from saekit.abilities import KnowsResidualStream, StartsInside
from saekit.ambient import ambient
from saekit.analysis.directions import LogitPath, feature_directions, logit_path
from saekit.errors import DataError, ModelError
from saekit.exports.schemas import Effect
from saekit.features.feature import Feature
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


@attrs.frozen
class _AtToken:
    """What a feature does at a token on which it is active."""

    loss: float
    """To the loss of the next one."""
    raised: Sequence[tuple[int, float]]
    lowered: Sequence[tuple[int, float]]


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
    _feature: int = -1
    _told: dict[tuple[int, int], _AtToken] = attrs.field(factory=dict)
    """Of that feature, by context and position."""

    @classmethod
    def of(cls, features: SAETables, sae: SAEModule, backend: ModelBackend) -> Contributions:
        """``sae`` is the very one that the store is of.

        :class:`DataError` for another model than the store's, :class:`ModelError` without a direct path.
        """
        made_with, own = features.store.manifest.model, backend.fingerprint()
        known = made_with.get("fingerprint")
        if made_with.get("name") != backend.name if known is None or own is None else known != own:
            raise DataError(
                f"the features were collected with the model {made_with.get('name')!r}, and {backend.name!r} is "
                "another: give that one (model)"
            )
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
        if feature.index != self._feature:
            self._feature, self._told = feature.index, {}
        self._tell(feature, windows)
        return [self._of_window(window) for window in windows]

    def _of_window(self, window: Window) -> Effect:
        """From what is told of its tokens; the loss of a token is of what the model makes of the one before it."""
        nothing = _AtToken(0.0, (), ())
        places = range(window.start, window.start + len(window.ids))
        told = [self._told.get((window.context, place), nothing) for place in places]
        before = [self._told.get((window.context, place - 1), nothing) for place in places]
        return Effect([one.loss for one in before], [one.raised for one in told], [one.lowered for one in told])

    def _tell(self, feature: Feature, windows: Sequence[Window]) -> None:
        """Of every token of the windows, and the one before each, on which the feature is active: each once."""
        self._read({one.context for one in windows})
        wanted: dict[tuple[int, int], float] = {}
        for window in windows:
            before = min(window.start, 1)
            values = feature.window(window.context, window.start, (before, len(window.ids) - 1)).values
            places = range(window.start - before, window.start + len(window.ids))
            wanted |= {(window.context, n): value for n, value in zip(places, values, strict=True) if value}
        tokens = [one for one in wanted if one not in self._told]
        number = torch.tensor([feature.index], device=self.sae.device)
        direction = self._path.in_residual_stream(feature_directions(self.sae, number))[0]
        for start in range(0, len(tokens), _ROWS):
            some = tokens[start : start + _ROWS]
            self._told |= zip(some, self._at(some, [wanted[one] for one in some], direction), strict=True)

    def _at(self, tokens: Sequence[tuple[int, int]], values: Sequence[float], direction: Tensor) -> list[_AtToken]:
        """What is told of ``tokens``, by context and position, on which the feature has ``values``."""
        weights, size = self._path.unembedding, self.features.store.context_size
        stream = torch.stack([self._streams[context][place] for context, place in tokens]).to(weights)
        amount = torch.tensor(values, dtype=torch.float64).to(stream)[:, None]
        change = self._log_likely(stream) - self._log_likely(stream - amount * direction.to(stream))
        following = [min(place + 1, size - 1) for _, place in tokens]  # after the last one nobody asks
        ids = torch.tensor(
            [self.features.store.contexts[one[0], place] for one, place in zip(tokens, following, strict=True)]
        )
        loss = (-change.gather(1, ids.long().to(change.device)[:, None])[:, 0]).tolist()
        k = min(_SHOWN, change.shape[1])
        (top, most), (bottom, least) = (
            (x.indices.tolist(), x.values.tolist()) for x in (change.topk(k), (-change).topk(k))
        )
        return [
            _AtToken(
                loss[row],
                [*zip(top[row], most[row], strict=True)],
                [(token, -value) for token, value in zip(bottom[row], least[row], strict=True)],
            )
            for row in range(len(tokens))
        ]

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
