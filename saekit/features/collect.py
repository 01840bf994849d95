"""One pass over contexts in which the features of several SAEs are collected, and what is made of that."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import attrs
import torch
from torch import Tensor

from saekit.analysis.promoting import why_no_logits
from saekit.errors import DataError, StorageError
from saekit.evals.pieces import at_once
from saekit.features.effects import heads_of, logit_effects, statistics_tables, weight_tables
from saekit.features.estimate import (
    PART_ENTRIES,
    PART_TOKENS,
    UNIT_TOKENS,
    Estimate,
    Options,
    Seen,
    estimated,
)
from saekit.features.manifest import AboutSAE, StoreManifest
from saekit.features.merging import Bound, merge
from saekit.features.parts import Parts
from saekit.features.place import put_files
from saekit.features.subject import Collected, Rows, Sums
from saekit.features.together import neuron_partners, together
from saekit.files.mapped import mapped_tensors
from saekit.files.storage import new_folder, sha256, write_text
from saekit.files.tensors import save_tensors
from saekit.kernels.sparse import SparseFeatures
from saekit.protocols import ModelBackend

__all__ = ["Pass", "finish"]

_PROBED = 32  # contexts that an estimate is made from
Report = Callable[[int], Any]


@attrs.define(eq=False)
class Pass:
    """The pass of ``subjects`` over ``contexts [n, t]``, as far as ``parts`` have it."""

    subjects: Sequence[Collected]
    backend: ModelBackend
    contexts: Tensor
    batch_size: int
    """Contexts in a forward of the model; results do not depend on it, as far as those of the model do not."""
    mask: Tensor | None = None
    """``[n, t]`` bool: which tokens count, of those that each SAE takes; None: all of these."""

    def kept(self, one: Collected, which: Tensor | slice = slice(None)) -> Tensor:
        """``[b, t]`` bool: the tokens that count for an SAE, of some contexts."""
        found = one.tokens.kept(self.contexts[which])
        return found if self.mask is None else found & self.mask[which].to(found.device)

    def check_text(self) -> None:
        """:class:`DataError` for an SAE for which no token counts."""
        for one in self.subjects:
            if not bool(self.kept(one).any()):
                raise DataError(f"no token of the contexts counts for {one.name}: nothing can be collected")

    def estimate(self, options: Options) -> Estimate:
        """What it needs, from a few contexts that are spread over all."""
        number = min(_PROBED, len(self.contexts))
        some = torch.linspace(0, len(self.contexts) - 1, number).long().unique()
        next(self._batches(self.contexts[some[:1]]))  # what runs first may be slow
        began = time.perf_counter()
        seen = [[0, 0, 0, 0] for _ in self.subjects]  # tokens, rows, entries, pairs
        fired = [torch.zeros(len(one.features), dtype=torch.int64) for one in self.subjects]
        for which, found, _, _ in self._found(some):
            one, tally = self.subjects[which], seen[which]
            places = one.row_of[found.features]
            wanted = places >= 0
            has = torch.zeros(found.n, dtype=torch.bool).index_fill_(0, found.rows[wanted], True)
            fired[which] += torch.bincount(places[wanted], minlength=len(one.features))
            tally[0] += found.n
            tally[1] += int(has.sum())
            tally[2] += int(has[found.rows].sum())
            own, everything = (torch.bincount(rows, minlength=found.n) for rows in (found.rows[wanted], found.rows))
            tally[3] += int((own * everything).sum())
        seconds = (time.perf_counter() - began) / self.contexts[some].numel()
        tallies = [
            Seen(tokens, rows, entries, pairs, counts)
            for (tokens, rows, entries, pairs), counts in zip(seen, fired, strict=True)
        ]
        return estimated(self.subjects, tallies, tuple(self.contexts.shape), options, seconds)  # type: ignore[arg-type]

    def run(self, parts: Parts, report: Report) -> list[Sums]:
        """Go on after ``parts``, and add to them; the sums of each SAE in the end.  ``report`` is told of tokens."""
        sums = self._sums(parts)
        size, context_size = self._unit, self.contexts.shape[1]
        rows = [Rows() for _ in self.subjects]
        since, done = 0, parts.contexts
        for start in range(done, len(self.contexts), size):
            some = torch.arange(start, min(start + size, len(self.contexts)))
            for which, found, inputs, place in self._found(some):
                one = self.subjects[which]
                flat = self.kept(one, some).reshape(-1)[place - start * context_size :][: found.n].cpu()
                sums[which].add(found, one.own(found), inputs, flat)
                rows[which].add(found, one.row_of[found.features] >= 0, place)
            since += (tokens := len(some) * context_size)
            last = start + size >= len(self.contexts)
            if last or since >= PART_TOKENS or any(one.entries >= PART_ENTRIES for one in rows):
                self._save(parts, rows, sums, start + len(some))
                rows, since = [Rows() for _ in self.subjects], 0
            report(tokens)
        return sums

    def _sums(self, parts: Parts) -> list[Sums]:
        if parts.sums is None:
            return [Sums.of(one) for one in self.subjects]
        saved = {name: value.clone() for name, value in mapped_tensors(parts.sums).items()}
        return [Sums.from_tensors(saved, f"{which}.") for which in range(len(self.subjects))]

    def _save(self, parts: Parts, rows: Sequence[Rows], sums: Sequence[Sums], contexts: int) -> None:
        tensors = [
            found.tensors(one.row_of, len(one.features), one.dtype)
            for one, found in zip(self.subjects, rows, strict=True)
        ]
        every = {name: value for which, one in enumerate(sums) for name, value in one.tensors(f"{which}.").items()}
        parts.add(tensors, every, contexts)

    @property
    def _unit(self) -> int:
        """Contexts whose inputs are held at once.  It depends on their size alone, so that sums do as well."""
        return max(UNIT_TOKENS // self.contexts.shape[1], 1)

    def _batches(self, tokens: Tensor) -> Iterator[Mapping[str, Tensor]]:
        read = {site.hook_name for one in self.subjects for site in one.sites.inputs}
        for batch in tokens.split(self.batch_size):
            yield self.backend.run(batch, read=read).held

    def _found(self, contexts: Tensor) -> Iterator[tuple[int, SparseFeatures, Tensor, int]]:
        """Which SAE, what is active, on which inputs ``[n, d_in]``, and the place of the first of these.

        Of the ``contexts [b]`` of these numbers; places are right where they follow each other.  An SAE sees as many
        contexts at once, and the same, whatever the size of the model's batches.
        """
        context_size = self.contexts.shape[1]
        for some in contexts.split(self._unit):
            held: dict[str, list[Tensor]] = {}
            for batch in self._batches(self.contexts[some]):
                for name, value in batch.items():
                    held.setdefault(name, []).append(value)
            joined = {name: torch.cat(values) for name, values in held.items()}
            for which, one in enumerate(self.subjects):
                inputs, kept = one.sites.input_of(joined), self.kept(one, some)
                step = at_once(one.sae, context_size)
                for begin in range(0, len(some), step):
                    part = inputs[begin : begin + step]
                    found = one.active(part, kept[begin : begin + step])
                    yield which, found, part.reshape(-1, part.shape[-1]), int(some[begin]) * context_size


def finish(
    store: Path,
    parts: Parts,
    sums: Sequence[Sums],
    work: Pass,
    manifest: StoreManifest,
    options: Options,
    say: Callable[[str], Any],
) -> None:
    """Make the store of what ``parts`` have, in ``store``, where it is whole when the manifest is there.

    One that is there is replaced when the new one is complete.
    """
    whole = parts.folder / "whole"
    files: dict[str, dict[str, Any]] = {}
    if whole.exists():
        shutil.rmtree(whole)
    with new_folder(whole) as home:

        def put(name: str, tensors: Mapping[str, Tensor]) -> None:
            digest = save_tensors(home / name, {key: value.contiguous() for key, value in tensors.items()})
            files[name] = {"bytes": (home / name).stat().st_size, "sha256": digest}

        put("contexts.safetensors", {"contexts": work.contexts.int().cpu()})
        texts = work.backend.token_texts(list(range(work.backend.d_vocab)))
        write_text(home / "vocabulary.json", json.dumps(texts) + "\n")
        vocabulary = home / "vocabulary.json"
        files["vocabulary.json"] = {"bytes": vocabulary.stat().st_size, "sha256": sha256(vocabulary)}
        saes = []
        for which, (about, total) in enumerate(zip(manifest.saes, sums, strict=True)):
            (home / about.folder).mkdir()
            paths = parts.rows_of(which)
            saes.append(_of_sae(home, about, work, which, paths, total, options, put, files, say))
    put_files(store, whole)
    attrs.evolve(manifest, saes=saes, files=files).save(store)
    with suppress(OSError, StorageError):  # the next call does that
        parts.remove()


def _of_sae(
    home: Path,
    about: AboutSAE,
    work: Pass,
    which: int,
    paths: Sequence[Path],
    sums: Sums,
    options: Options,
    put: Callable[[str, Mapping[str, Tensor]], None],
    files: dict[str, dict[str, Any]],
    say: Callable[[str], Any],
) -> AboutSAE:
    """The files of one SAE."""
    one, folder = work.subjects[which], about.folder
    own = torch.from_numpy(one.features)
    say(f"putting the activations of {one.name} in order")
    target = home / folder / "activations.safetensors"
    found, digest = merge(
        paths,
        target,
        fired=sums.fired[own].numpy(),
        features=one.features,
        context_size=work.contexts.shape[1],
        dtype=one.dtype,
        bound=Bound(options.max_per_feature, options.top_kept, options.seed),
    )
    files[f"{folder}/{target.name}"] = {"bytes": target.stat().st_size, "sha256": digest}
    put(f"{folder}/index.safetensors", {"features": own, "fired": sums.fired[own], **found.tensors()})
    put(f"{folder}/kept.safetensors", {"kept": work.kept(one).cpu()})
    say(f"looking for what fires together with the features of {one.name}")
    tables = together(paths, one.features, sums, options.partners)
    put(f"{folder}/together.safetensors", tables | neuron_partners(sums, one.features, options.partners))
    say(f"looking where the features of {one.name} point")
    heads = heads_of(one, work.backend, work.contexts)
    put(f"{folder}/weights.safetensors", weight_tables(one, options.partners, heads))
    statistics, left_out = statistics_tables(one)
    put(f"{folder}/statistics.safetensors", statistics)
    why = why_no_logits(one.sae, work.backend, one.sites)
    if why is None:
        say(f"computing what the features of {one.name} do to the logits")
        put(f"{folder}/logits.safetensors", logit_effects(one, work.backend, options.logits))
    return attrs.evolve(about, tokens_counted=sums.tokens, why_no_logits=why, left_out=left_out)
