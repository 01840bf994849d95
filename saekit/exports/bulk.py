"""The files that Neuronpedia imports in bulk: rows of its tables, as SAEDashboard writes them since 2026."""

from __future__ import annotations

import gzip
import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

from saekit.exports.examples import strict_json
from saekit.exports.schemas import SAEDashboard
from saekit.features.feature import Feature

__all__ = ["Bulk"]

_LETTERS = "0123456789abcdefghijklmnopqrstuvwxyz"
_ID_LENGTH = 25


class Bulk(SAEDashboard):
    """Feature rows and activation rows in files of their own, compressed, and rows about model, set, source, release.

    ``index`` is a number there, though the table has a text: so it is written by SAEDashboard, and read.
    """

    def files(self, number: int) -> list[str]:
        return [f"{kind}/batch-{number}.jsonl.gz" for kind in ("features", "activations")]

    def batch(self, number: int, features: Sequence[int]) -> dict[str, bytes]:
        rows: list[str] = []
        activations: list[str] = []
        for feature in map(self.sae.feature, features):
            table = self.feature(feature)
            shown = [self._activation(feature, place, one) for place, one in enumerate(table["activations"])]
            rows.append(strict_json(self._row(table, shown), self.what(feature)))
            activations += [strict_json(one, self.what(feature)) for one in shown]
        return {name: _lines(some) for name, some in zip(self.files(number), (rows, activations), strict=True)}

    def about(self) -> dict[str, bytes]:
        """The rows about the SAE, a file for each table."""
        tables = {
            "release": self._release(),
            "model": self._model(),
            "sourceset": self._set(),
            "source": self._source(),
        }
        return {
            f"{name}.jsonl": (strict_json(table, lambda name=name: f"{name}.jsonl") + "\n").encode()  # type: ignore[misc]
            for name, table in tables.items()
        }

    def _row(self, table: Mapping[str, Any], shown: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        name = self.settings.name
        own = ("feature_index", "activations", "vector", "n_prompts_total", "n_tokens_in_prompt", "dataset")
        return {
            "modelId": name.model,
            "layer": name.source,
            "index": table["feature_index"],
            "creatorId": self.settings.credits.creator_id,
            "createdAt": self.now,
            "maxActApprox": max((one["maxValue"] for one in shown), default=0.0),
            "hasVector": False,
            "vector": [],
            "vectorLabel": None,
            "vectorDefaultSteerStrength": 10.0,
            "hookName": ", ".join(self.sae.about.inputs),
            "topkCosSimIndices": [],
            "topkCosSimValues": [],
            **{key: value for key, value in table.items() if key not in own},
            "sourceSetName": name.set,
        }

    def _activation(self, feature: Feature, place: int, one: Mapping[str, Any]) -> dict[str, Any]:
        name, values = self.settings.name, one["values"]
        return {
            "id": _row_id(f"{name}/{feature.index}/{place}"),
            "tokens": one["tokens"],
            "index": feature.index,
            "layer": name.source,
            "modelId": name.model,
            "maxValue": max(values),
            "maxValueTokenIndex": values.index(max(values)),
            "minValue": min(values),
            "values": values,
            "creatorId": self.settings.credits.creator_id,
            "dataSource": None,
            "dataIndex": None,
            "dfaValues": one.get("dfa_values", []),
            "dfaTargetIndex": one.get("dfa_targetIndex"),
            "dfaMaxValue": one.get("dfa_maxValue"),
            "createdAt": self.now,
            "lossValues": [],
            "logitContributions": None,
            "binMin": one["bin_min"],
            "binMax": one["bin_max"],
            "binContains": one["bin_contains"],
            "qualifyingTokenIndex": one["qualifying_token_index"],
            "zIndices": None,
            "zValues": None,
        }

    @property
    def _release_name(self) -> str:
        return self.settings.credits.release or self.settings.name.set

    def _release(self) -> dict[str, Any]:
        who = self.settings.credits
        text = who.description or self._release_name
        return {
            "name": self._release_name,
            "description": text,
            "creatorName": who.creator_name,
            "creatorId": who.creator_id,
            "visibility": "PUBLIC",
            "isNewUi": False,
            "featured": False,
            "descriptionShort": text,
            "urls": [who.url] if who.url else [],
            "creatorEmail": None,
            "creatorNameShort": who.creator_name,
            "defaultSourceSetName": None,
            "defaultSourceId": None,
            "defaultUmapSourceIds": [],
            "createdAt": self.now,
        }

    def _model(self) -> dict[str, Any]:
        model = self.settings.name.model
        return {
            "id": model,
            "instruct": model.endswith("-it"),
            "creatorId": self.settings.credits.creator_id,
            "displayNameShort": model,
            "displayName": model,
            "tlensId": None,
            "dimension": None,
            "visibility": "PUBLIC",
            "defaultSourceSetName": None,
            "defaultSourceId": None,
            "inferenceEnabled": False,
            "layers": 0,
            "neuronsPerLayer": 0,
            "createdAt": self.now,
            "owner": "",
            "updatedAt": self.now,
            "website": None,
        }

    def _set(self) -> dict[str, Any]:
        name, who = self.settings.name, self.settings.credits
        return {
            "modelId": name.model,
            "name": name.set,
            "creatorId": who.creator_id,
            "hasDashboards": True,
            "visibility": "PUBLIC",
            "description": who.description,
            "type": "",
            "creatorName": who.creator_name,
            "urls": [],
            "creatorEmail": None,
            "releaseName": self._release_name,
            "defaultOfModelId": None,
            "defaultRange": 1,
            "defaultShowBreaks": True,
            "showDfa": self.sources is not None,
            "showCorrelated": False,
            "showHeadAttribution": False,
            "showUmap": False,
            "createdAt": self.now,
        }

    def _source(self) -> dict[str, Any]:
        name, facts, known = self.settings.name, self.facts(), self.sae.about.metadata
        return {
            "id": name.source,
            "modelId": name.model,
            "setName": name.set,
            "creatorId": self.settings.credits.creator_id,
            "hasDashboards": True,
            "inferenceEnabled": False,
            "inferenceHosts": [],
            "saelensConfig": None,
            "saelensRelease": known.get("release"),
            "saelensSaeId": known.get("sae_id"),
            "hfRepoId": None,
            "hfFolderId": None,
            "visibility": "PUBLIC",
            "defaultOfModelId": None,
            "hasUmap": False,
            "hasUmapLogSparsity": False,
            "hasUmapClusters": False,
            "num_prompts": facts["n_prompts_total"],
            "num_tokens_in_prompt": facts["n_tokens_in_prompt"],
            "dataset": facts["dataset"],
            "notes": None,
            "createdAt": self.now,
        }


def _row_id(name: str) -> str:
    """25 letters and digits, beginning with ``c`` as a CUID does; the same for the same row, whoever writes it."""
    number, found = int.from_bytes(hashlib.sha256(name.encode()).digest()), ""
    while len(found) < _ID_LENGTH - 1:
        number, letter = divmod(number, len(_LETTERS))
        found += _LETTERS[letter]
    return f"c{found}"


def _lines(rows: Sequence[str]) -> bytes:
    """Compressed, and the same for the same rows."""
    return gzip.compress("".join(f"{row}\n" for row in rows).encode(), 5, mtime=0)
