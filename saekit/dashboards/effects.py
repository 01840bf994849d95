"""What removing features does to the loss, as a page shows it.  What can be asked for is checked without torch."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import attrs

from saekit.errors import ConfigError

if TYPE_CHECKING:
    from saekit.analysis.loss_effects import LossEffects, WindowEffects
    from saekit.dashboards.data import EffectKind, Look
    from saekit.features.feature import Feature
    from saekit.features.windows import Window

__all__ = ["PageEffects", "check_asked"]

_ASKED = ("auto", "exact", "direct", None)
_AT_ONCE = 16  # features, whose windows fill batches of forwards
_FIRST = 2  # those that tell how long the others take


def check_asked(kind: object) -> None:
    """:class:`ConfigError` for what is no way to tell of the loss."""
    if kind not in _ASKED:
        raise ConfigError(
            [
                (
                    "loss_effects",
                    f"must be 'exact', 'direct', 'auto' (exact where the SAE is known), or None; found {kind!r}",
                )
            ]
        )


@attrs.frozen(eq=False)
class PageEffects:
    """See :class:`saekit.dashboards.data.Effects`; of many features at once, when they are told :meth:`ahead`."""

    of: LossEffects
    _known: dict[tuple[int, int, int, int], WindowEffects] = attrs.field(factory=dict, init=False)
    """By feature, context, and where a window begins and ends."""

    @property
    def kind(self) -> EffectKind:
        """What the page calls it."""
        return "exact" if self.of.kind == "exact" else "direct path"

    def __call__(self, feature: Feature, windows: Sequence[Window]) -> list[WindowEffects]:
        """For each window and each of its tokens the change in nats, or None."""
        keys = [_key(feature, window) for window in windows]
        if any(key not in self._known for key in keys):
            return self.of.of_windows([(feature.index, window) for window in windows])
        return [self._known[key] for key in keys]

    def ahead(
        self,
        features: Sequence[Feature],
        look: Look,
        report: Callable[[int], Any] = lambda count: None,
        takes: Callable[[float], Any] = lambda seconds: None,
    ) -> None:
        """Find those of all windows that a page shows of ``features``.

        ``report`` is told how many more are done, and ``takes`` once, after the first, how many seconds the others take
        about.
        """
        from saekit.dashboards.data import shown_windows

        began = time.perf_counter()
        bounds = [0, *range(_FIRST, len(features), _AT_ONCE), len(features)]
        for start, stop in itertools.pairwise(bounds):
            pairs = []
            for feature in features[start:stop]:
                top, drawn = shown_windows(feature, look)
                pairs += [(feature, one) for one in (*top, *(one for quantile in drawn for one in quantile.windows))]
            found = self.of.of_windows([(feature.index, window) for feature, window in pairs])
            self._known.update({_key(*pair): effects for pair, effects in zip(pairs, found, strict=True)})
            report(stop - start)
            if not start and stop < len(features):
                takes((time.perf_counter() - began) / stop * (len(features) - stop))


def _key(feature: Feature, window: Window) -> tuple[int, int, int, int]:
    return feature.index, window.context, window.start, window.start + len(window.ids)
