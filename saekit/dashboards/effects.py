"""What removing features does to the loss, as a page shows it.  What can be asked for is checked without torch."""

from __future__ import annotations

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

    def ahead(self, features: Sequence[Feature], look: Look, report: Callable[[int], Any] = lambda done: None) -> None:
        """Find those of all windows that a page shows of ``features``; ``report`` is told how many are done."""
        from saekit.dashboards.data import shown_windows

        for start in range(0, len(features), _AT_ONCE):
            pairs = []
            for feature in features[start : start + _AT_ONCE]:
                top, drawn = shown_windows(feature, look)
                pairs += [(feature, one) for one in (*top, *(one for quantile in drawn for one in quantile.windows))]
            found = self.of.of_windows([(feature.index, window) for feature, window in pairs])
            self._known.update({_key(*pair): effects for pair, effects in zip(pairs, found, strict=True)})
            report(min(start + _AT_ONCE, len(features)))


def _key(feature: Feature, window: Window) -> tuple[int, int, int, int]:
    return feature.index, window.context, window.start, window.start + len(window.ids)
