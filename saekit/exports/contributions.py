"""What a feature does at each token of a window, by the direct path, as the runner of sae-lens 3.0.0 says it."""

from __future__ import annotations

from collections.abc import Sequence

import attrs

from saekit.analysis.attribution import AttentionSources
from saekit.analysis.loss_effects import LossEffects, TokenEffect
from saekit.errors import ModelError
from saekit.exports.schemas import Effect, Sources
from saekit.features.feature import Feature
from saekit.features.tables import SAETables
from saekit.features.windows import Window
from saekit.protocols import ModelBackend
from saekit.sae.module import SAEModule

__all__ = ["Contributions", "sources_of"]

_SHOWN = 5  # tokens that are raised, and lowered, at each, as sae_vis shows
_NOTHING = TokenEffect(0.0, (), ())


@attrs.define(eq=False)
class Contributions:
    """What features of an SAE do at tokens of the store's contexts; called with a feature and some of its windows."""

    of: LossEffects
    _feature: int = -1
    _told: dict[tuple[int, int], TokenEffect] = attrs.field(factory=dict)
    """Of that feature, by context and position."""
    _asked: set[tuple[int, int]] = attrs.field(factory=set)

    @classmethod
    def made_of(cls, features: SAETables, sae: SAEModule, backend: ModelBackend) -> Contributions:
        """:class:`DataError` for another SAE or model than the store's, :class:`ModelError` without a direct path."""
        try:
            return cls(LossEffects.of(features, sae, backend, "direct"))
        except ModelError as error:
            why = error.__cause__ or error
            raise ModelError(
                f"nothing can be said of what features do at each token: {why}. Leave the model out"
            ) from error

    def __call__(self, feature: Feature, windows: Sequence[Window]) -> list[Effect]:
        """The effects in each window."""
        if feature.index != self._feature:
            self._feature, self._told, self._asked = feature.index, {}, set()
        wider = [_with_the_one_before(feature, window) for window in windows]
        wider = [one for one in wider if not self._asked.issuperset(_places(one))]
        self._told |= self.of.of_tokens(feature.index, wider, _SHOWN)
        self._asked.update(*map(_places, wider))
        return [self._of_window(window) for window in windows]

    def _of_window(self, window: Window) -> Effect:
        """From what is told of its tokens; the loss of a token is of what the model makes of the one before it."""
        told = [self._told.get(place, _NOTHING) for place in _places(window)]
        before = [self._told.get((context, place - 1), _NOTHING) for context, place in _places(window)]
        raised, lowered = [one.raised for one in told], [one.lowered for one in told]
        return Effect([-(one.loss or 0.0) for one in before], raised, lowered)


def sources_of(features: SAETables, sae: SAEModule, backend: ModelBackend) -> Sources:
    """From which tokens an attention brings what makes features active; errors as of :class:`AttentionSources`."""
    sources = AttentionSources.of_store(features, sae, backend)
    return lambda feature, windows: sources.of_windows(features, feature.index, windows)


def _with_the_one_before(feature: Feature, window: Window) -> Window:
    before = min(window.start, 1)
    return feature.window(window.context, window.start, (before, len(window.ids) - 1))


def _places(window: Window) -> list[tuple[int, int]]:
    return [(window.context, window.start + number) for number in range(len(window.ids))]
