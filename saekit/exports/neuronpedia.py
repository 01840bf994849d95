"""A feature store as Neuronpedia's files: batches of features, in one of three schemas.

- ``saedashboard``: ``batch-{i}.json`` from 0, as SAEDashboard writes it today.
- ``sae_lens_3``: ``batch-{i}.json`` from 1, as the runner of sae-lens 3.0.0 wrote it.
- ``bulk``: ``MODEL/SOURCE/features/batch-{i}.jsonl.gz`` and ``activations/``, with a few rows about the SAE, as
  Neuronpedia imports it.

Beside them lie ``skipped_indexes.json``, the features that are too rare to be shown, ``run_settings.json``, and
``tokens_{n}.pt``, the contexts.
"""

from __future__ import annotations

import io
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs
import numpy as np

from saekit._version import __version__
from saekit.cautions import warn
from saekit.exports.bulk import Bulk
from saekit.exports.examples import Texts, strict_json
from saekit.exports.folder import ExportFolder, exporting
from saekit.exports.schemas import Effects, RunnerOf3, SAEDashboard, Schema, Sources
from saekit.exports.settings import Settings
from saekit.features.store import SAEFeatures

__all__ = ["NeuronpediaExport"]

_LAYOUT = 1
"""Rises whenever the same store is written otherwise: what was begun before is not gone on with then."""
_WRITERS: Mapping[str, type[Schema]] = {"saedashboard": SAEDashboard, "sae_lens_3": RunnerOf3, "bulk": Bulk}


@attrs.frozen(eq=False)
class NeuronpediaExport:
    """What is to be written of one SAE."""

    sae: SAEFeatures
    settings: Settings
    effects: Effects | None = None
    """What says what features do at each token, for the schema of 3.0.0; None: nothing is said of that."""
    sources: Sources | None = None
    """What says from which tokens an attention brings what makes features active, for the others; likewise."""
    model: Mapping[str, Any] | None = None
    """Of that model, what tells it apart."""

    def shown_and_skipped(self) -> tuple[list[int], list[int]]:
        """The numbers of the features that are written, and of those that fire too rarely; both rise."""
        if self.settings.features is None:
            numbers = self.sae.indices
        else:
            found = [self.sae.feature(one, "numbers") for one in self.settings.features]
            numbers = np.unique(np.array([one.index for one in found], np.int64))
        fraction = self.sae.firing_fraction[np.searchsorted(self.sae.indices, numbers)]
        with np.errstate(divide="ignore"):
            often = np.log10(fraction) > self.settings.least
        return numbers[often].tolist(), numbers[~often].tolist()

    def home(self, folder: Path) -> Path:
        """Where its files go below ``folder``."""
        name = self.settings.name
        return folder / name.model / name.source if self.settings.schema == "bulk" else folder

    def write(self, folder: Path, now: str, report: Callable[[int], Any], *, overwrite: bool = False) -> Path:
        """Write what is not there yet; the folder of the files.  ``report`` is told of features."""
        shown, skipped = self.shown_and_skipped()
        texts = Texts(self.sae.store)
        home = self.home(folder)
        with exporting(home):
            target = ExportFolder.opened(home, self._identity(), now, overwrite=overwrite)
            writer = _WRITERS[self.settings.schema]
            schema = writer(self.sae, self.settings, texts, target.begun, self.effects, self.sources)
            self._warn(shown, skipped)
            for name, data in self._beside(schema, shown, skipped).items():
                if not target.has(name):
                    target.put({name: data})
            for number, batch in self._batches(shown, schema.first_batch):
                names = schema.files(number)
                if not target.has(*names):
                    target.put(schema.batch(number, batch))
                report(len(batch))
        return home

    def _batches(self, shown: Sequence[int], first: int) -> Iterator[tuple[int, list[int]]]:
        """Nearly equal parts, as NumPy splits an array."""
        if not shown:
            return
        parts = np.array_split(np.array(shown), math.ceil(len(shown) / self.settings.batch_size))
        yield from ((number, part.tolist()) for number, part in enumerate(parts, first))

    def _beside(self, schema: Schema, shown: Sequence[int], skipped: Sequence[int]) -> dict[str, bytes]:
        store, settings = self.sae.store, self.settings
        table = schema.skipped_table(skipped)
        found = {
            "skipped_indexes.json": strict_json(table, lambda: "skipped_indexes.json").encode(),
            "run_settings.json": (json.dumps(self._settings_table(shown), indent=1, allow_nan=False) + "\n").encode(),
        }
        if settings.schema == "bulk":
            return found | schema.about()
        return found | {f"tokens_{store.n_contexts}.pt": _tokens(store.contexts)}

    def _settings_table(self, shown: Sequence[int]) -> dict[str, Any]:
        store, settings, name = self.sae.store, self.settings, self.settings.name
        return {
            "schema": settings.schema,
            "model_id": name.model,
            "layer": name.layer,
            "sae_set": name.set,
            "sae_id_suffix": name.suffix,
            "model_name": store.model_name,
            "hook_name": ", ".join(self.sae.about.inputs),
            "dataset": str(store.manifest.dataset.get("dataset") or ""),
            "n_prompts_total": store.n_contexts,
            "n_tokens_in_prompt": store.context_size,
            "n_features": len(shown),
            "n_features_at_a_time": settings.batch_size,
            "sparsity_threshold": settings.least,
            "top_acts_group_size": settings.choice.top,
            "n_quantiles": settings.choice.quantiles,
            "quantile_group_size": settings.choice.per_quantile,
            "window": settings.choice.window,
            "seed": settings.choice.seed,
            "logit_contributions": self.effects is not None,
            "dfa": self.sources is not None,
            "saekit_version": __version__,
        }

    def _identity(self) -> dict[str, Any]:
        """What decides every byte of every file."""
        manifest, about = self.sae.store.manifest, self.sae.about
        sums = {
            name.partition("/")[2]: entry["sha256"]
            for name, entry in manifest.files.items()
            if name.startswith(f"{about.folder}/")
        }
        options = attrs.asdict(self.settings) | {"min_log_fraction": self.settings.least}
        return {
            "layout": _LAYOUT,
            "neuronpedia_id": str(self.settings.name),
            "options": options,
            "model": dict(manifest.model),
            "contexts": {"number": manifest.contexts, "size": manifest.context_size, "digest": manifest.digest},
            "SAE": about.identity,
            "features": sums,
            "effects": None if self.effects is None else dict(self.model or {}),
            "sources": None if self.sources is None else dict(self.model or {}),
        }

    def _warn(self, shown: Sequence[int], skipped: Sequence[int]) -> None:
        sae = self.sae
        if not shown:
            warn(
                f"none of the {len(skipped):,} features of {sae.name} fires on more than 10^{self.settings.least:g} of "
                "the tokens: there is no batch, and all of them are in skipped_indexes.json",
                UserWarning,
            )
        if sae.why_no_logits is not None:
            warn(f"{sae.name}: the fields about logits are empty, for {sae.why_no_logits}", UserWarning)
        missing = sae.about.d_sae - len(sae)
        if missing and self.settings.features is None:
            warn(
                f"{sae.name}: {missing:,} of its {sae.about.d_sae:,} features are not in the store, so they are in no "
                "batch, and not among the skipped ones",
                UserWarning,
            )


def _tokens(contexts: Any) -> bytes:
    """As ``torch.load(..., weights_only=True)`` reads it: ``[n_contexts, context_size]`` int64."""
    import torch

    found = io.BytesIO()
    torch.save(torch.from_numpy(contexts.astype(np.int64)), found)
    return found.getvalue()
