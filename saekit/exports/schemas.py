"""Neuronpedia's batches as SAEDashboard writes them today, and as the runner of sae-lens 3.0.0 wrote them."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar, TypeAlias

import attrs

from saekit.exports.examples import (
    Group,
    Texts,
    begins_with_bos,
    groups,
    numbers_of_feature,
    rounded,
    strict_json,
)
from saekit.exports.settings import Settings
from saekit.features.feature import Feature
from saekit.features.store import SAEFeatures
from saekit.features.windows import Window

__all__ = ["Effect", "Effects", "RunnerOf3", "SAEDashboard", "Schema", "Sources"]

_TABLE_ROWS, _LOGITS = 3, 10  # as both runners write them


@attrs.frozen
class Effect:
    """What a feature does at the tokens of a window."""

    loss: Sequence[float]
    """``[tokens]``: by how much it raises the loss of each, which it can from the second one on."""
    raised: Sequence[Sequence[tuple[int, float]]]
    """For each token those whose logits it raises most, with by how much; none where it is not active."""
    lowered: Sequence[Sequence[tuple[int, float]]]


Effects: TypeAlias = Callable[[Feature, Sequence[Window]], Sequence[Effect]]
"""What features do on the direct path, window by window."""


Sources: TypeAlias = Callable[[Feature, Sequence[Window]], Sequence[Sequence[float]]]
"""For each window what comes from each of its tokens to the one that it is about, through an attention."""


class Schema(ABC):
    """One way in which features are written."""

    first_batch: ClassVar[int] = 0
    digits: ClassVar[int] = 5

    def __init__(
        self,
        sae: SAEFeatures,
        settings: Settings,
        texts: Texts,
        now: str,
        effects: Effects | None = None,
        sources: Sources | None = None,
    ) -> None:
        self.sae, self.settings, self.texts, self.now = sae, settings, texts, now
        self.effects, self.sources = effects, sources
        self.cut = int(begins_with_bos(sae))
        """Tokens that are left out at the beginning of a context: BOS."""

    def files(self, number: int) -> list[str]:
        """The names of a batch's files."""
        return [f"batch-{number}.json"]

    @abstractmethod
    def batch(self, number: int, features: Sequence[int]) -> dict[str, bytes]:
        """The files of a batch."""

    def skipped_table(self, skipped: Sequence[int]) -> dict[str, Any]:
        """What ``skipped_indexes.json`` says."""
        name = self.settings.name
        return {
            "model_id": name.model,
            "layer": name.layer,
            "sae_set": name.set,
            "log_sparsity": self.settings.least,
            "skipped_indexes": [*skipped],
        }

    def about(self) -> dict[str, bytes]:
        """Further files about the SAE."""
        return {}

    def numbers(self, feature: Feature) -> dict[str, Any]:
        """Tables, logits and histograms."""
        return numbers_of_feature(feature, self.digits, rows=_TABLE_ROWS, logits=_LOGITS, texts=self.texts)

    def facts(self) -> dict[str, Any]:
        """The text that the features were collected on."""
        store = self.sae.store
        return {
            "n_prompts_total": store.n_contexts,
            "n_tokens_in_prompt": store.context_size,
            "dataset": str(store.manifest.dataset.get("dataset") or ""),
        }

    def what(self, feature: Feature) -> Callable[[], str]:
        """For messages."""
        return lambda: f"feature {feature.index} of {self.sae.name}"

    def json_of(self, feature: Feature, table: dict[str, Any]) -> str:
        """A feature's part of a batch."""
        return strict_json(table, self.what(feature))


class SAEDashboard(Schema):
    """That of SAEDashboard: floats with 5 decimals, and BOS left out."""

    def batch(self, number: int, features: Sequence[int]) -> dict[str, bytes]:
        name = self.settings.name
        head = {
            "model_id": name.model,
            "layer": name.layer_number,
            "sae_set": name.set,
            "sae_id_suffix": name.suffix,
        }
        rows = [self.json_of(one, self.feature(one)) for one in map(self.sae.feature, features)]
        return {self.files(number)[0]: _with_features(head, rows)}

    def feature(self, feature: Feature) -> dict[str, Any]:
        """All that is said of a feature."""
        return {
            "feature_index": feature.index,
            **self.numbers(feature),
            **self.facts(),
            "decoder_weights_dist": rounded(feature.head_shares() or [], self.digits),  # of an SAE of heads
            "vector": [],  # of features that are vectors of somebody's alone
            "activations": [*self.activations(feature)],
        }

    def activations(self, feature: Feature) -> Iterator[dict[str, Any]]:
        """The windows, those with the largest activations first."""
        for group in groups(feature, self.settings.choice, from_position=self.cut):
            bounds = self.bounds(group)
            sources = None if self.sources is None else self.sources(feature, group.windows)
            for number, window in enumerate(group.windows):
                cut = max(self.cut - window.start, 0)
                yield {
                    **bounds,
                    "tokens": self.texts.of_window(window, cut),
                    "values": rounded(window.values[cut:], self.digits),
                    "qualifying_token_index": window.at - cut,
                    **({} if sources is None else self._sources(sources[number][cut:], window.at - cut)),
                }

    def _sources(self, values: Sequence[float], target: int) -> dict[str, Any]:
        """What comes from each token to the one at ``target``."""
        found = rounded(values, self.digits)
        return {"dfa_values": found, "dfa_maxValue": max(found), "dfa_targetIndex": target}

    def bounds(self, group: Group) -> dict[str, Any]:
        """Of the interval."""
        low, high, share = rounded([group.low, group.high, group.share], 5)
        return {"bin_min": low, "bin_max": high, "bin_contains": share}


class RunnerOf3(Schema):
    """That of the runner of sae-lens 3.0.0: floats with 3 decimals, and windows with their first token.

    What a feature does at each token is empty where no model is there to say it.
    """

    first_batch, digits = 1, 3

    def batch(self, number: int, features: Sequence[int]) -> dict[str, bytes]:
        head = self._head()
        rows = [self.json_of(one, self.feature(one)) for one in map(self.sae.feature, features)]
        contexts = self.sae.store.n_contexts
        tail = {"n_batches_to_sample_from": contexts, "n_prompts_to_select": contexts}
        return {self.files(number)[0]: _with_features(head, rows, tail)}

    def _head(self) -> dict[str, Any]:
        name = self.settings.name
        return {"model_id": name.model, "layer": name.layer, "sae_id": name.source.partition("-")[2]}

    def skipped_table(self, skipped: Sequence[int]) -> dict[str, Any]:
        return self._head() | {"log_sparsity": self.settings.least, "skipped_indexes": [*skipped]}

    def feature(self, feature: Feature) -> dict[str, Any]:
        """All that is said of a feature."""
        return {
            "featureIndex": feature.index,
            **self.numbers(feature),
            "num_tokens_for_dashboard": self.sae.store.n_contexts,  # the runner counted prompts, whatever it is called
            "activations": [*self.activations(feature)],
        }

    def activations(self, feature: Feature) -> Iterator[dict[str, Any]]:
        """The windows, those with the largest activations first."""
        for group in groups(feature, self.settings.choice):
            low, high, share = rounded([group.low, group.high, group.share], 5)
            effects = None if self.effects is None else self.effects(feature, group.windows)
            for number, window in enumerate(group.windows):
                values = rounded(window.values, self.digits)
                yield {
                    "binMin": low,
                    "binMax": high,
                    "binContains": share,
                    "logitContributions": self._contributions(None if effects is None else effects[number], window),
                    "tokens": self.texts.of_window(window),
                    "values": values,
                    "maxValue": max(values),
                    "lossValues": [] if effects is None else rounded(effects[number].loss, self.digits),
                }

    def _contributions(self, effect: Effect | None, window: Window) -> str:
        """As JSON in a text, with an entry for each token that is empty where there is nothing to say."""

        def told(tokens: Sequence[tuple[int, float]]) -> dict[str, Any]:
            ids, values = [token for token, _ in tokens], [value for _, value in tokens]
            return {"t": self.texts.of(ids), "v": rounded(values, self.digits)} if ids else {}

        none: Sequence[Sequence[tuple[int, float]]] = [()] * len(window.ids)
        raised, lowered = (none, none) if effect is None else (effect.raised, effect.lowered)
        table = {"pos": [told(one) for one in raised], "neg": [told(one) for one in lowered]}
        return json.dumps(table, allow_nan=False)


def _with_features(head: dict[str, Any], rows: Sequence[str], tail: dict[str, Any] | None = None) -> bytes:
    """A batch as JSON, of features that are JSON already."""
    begin = json.dumps(head, allow_nan=False)[:-1]
    end = f", {json.dumps(tail, allow_nan=False)[1:]}" if tail else "}"
    return f'{begin}, "features": [{", ".join(rows)}]{end}'.encode()
