"""What removing a feature does to the loss of the next token, in windows of text that a feature store has."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Literal, Self, TypeAlias

import attrs
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from saekit.abilities import KnowsResidualStream, StartsInside
from saekit.ambient import ambient
from saekit.analysis.directions import LogitPath, logit_path
from saekit.errors import ConfigError, DataError, ModelError
from saekit.evals.forwards import Forwards, logit_contexts
from saekit.evals.pieces import at_once
from saekit.features.subject import checksum
from saekit.features.tables import SAETables
from saekit.features.windows import Window
from saekit.kernels.sparse import SparseFeatures
from saekit.measuring import Needs
from saekit.protocols import ModelBackend
from saekit.sae.module import SAEModule
from saekit.site import Site, Sites
from saekit.splicing.fits import fitting_sites
from saekit.tokens import TokenChoice

__all__ = ["Kind", "LossEffects", "WindowEffects", "check_kind"]

Kind: TypeAlias = Literal["exact", "direct"]
WindowEffects: TypeAlias = "tuple[float | None, ...]"
"""For each token of a window, by how many nats the loss of the token after it rises; None: none comes after it."""

_KINDS = ("exact", "direct")
_MOST_CONTEXTS = 32  # in a forward: what is held of them is small, whatever the vocabulary
_LOGIT_BYTES = 1 << 26
_HEAD = re.compile(r"(.+)\.head(\d+)")
_Pairs: TypeAlias = "dict[tuple[int, int], NDArray[np.bool_]]"
"""Contexts with features, and of which of the context's positions ``[t]`` something is asked."""


def check_kind(kind: object) -> None:
    """:class:`ConfigError` for what is neither a :data:`Kind` nor None."""
    if kind is not None and kind not in _KINDS:
        raise ConfigError([("loss_effects", f"must be 'exact', 'direct' or None, found {kind!r}")])


@attrs.frozen(eq=False)
class LossEffects:
    """What removing features of an SAE does to the loss: cross entropy without the feature less that with it, in nats.

    Above zero, the feature helps to predict the next token.  The context is the whole one of the store; the feature is
    removed from every token that counts.

    ``"exact"``: the model runs on with the feature set to 0 and everything else as it was: what the SAE misses is kept
    (its error term), and so are its other features.  ``"direct"`` leaves out what later layers make of the change:
    ``log softmax`` of ``r W_U / std(r)`` for the last residual stream ``r``, with what the feature writes and without
    it, at each position alone; without the weights and the mean of the last normalization, and without biases (the
    loss effect of sae_vis).
    """

    features: SAETables
    sae: SAEModule
    backend: ModelBackend
    sites: Sites
    tokens: TokenChoice
    kind: Kind
    _entry: str | None
    """Exact: where forwards begin.  Direct: the last residual stream."""
    _path: LogitPath | None = None

    @classmethod
    def of(cls, features: SAETables, sae: SAEModule, backend: ModelBackend, kind: Kind = "exact") -> Self:
        """Those of the SAE that ``features`` of a store are of, in the model that the store was made with.

        :class:`DataError` where SAE or model are others, :class:`ModelError` where ``"direct"`` is asked for and no
        path is known that leads from what the SAE writes to the logits.
        """
        check_kind(kind)
        _check_same(features, sae, backend)
        sites = _sites_of(features, sae, backend)
        tokens = TokenChoice.of_metadata(features.about.tokens, ())
        if kind == "direct":
            return cls(features, sae, backend, sites, tokens, kind, *_direct(sae, backend, sites))
        targets = {site.hook_name for site in sites.targets}
        entry = backend.entry_of(targets) if isinstance(backend, StartsInside) else None
        return cls(features, sae, backend, sites, tokens, kind, entry)

    @ambient()
    @torch.no_grad()
    def of_windows(self, windows: Sequence[tuple[int, Window]]) -> list[WindowEffects]:
        """For each of ``windows``, which come with the number of a feature, the effects at its tokens."""
        size = self.features.store.context_size
        pairs: _Pairs = {}
        for feature, window in windows:
            asked = pairs.setdefault((window.context, feature), np.zeros(size, np.bool_))
            asked[window.start : window.start + len(window.ids)] = True
        found = dict(self._of_pairs(pairs))
        return [
            tuple(
                float(found[window.context, feature][place]) if place < size - 1 else None
                for place in range(window.start, window.start + len(window.ids))
            )
            for feature, window in windows
        ]

    def _of_pairs(self, pairs: _Pairs) -> Iterator[tuple[tuple[int, int], NDArray[np.float64]]]:
        """Of each the effects ``[t - 1]``; those after the last position that is asked about are left out."""
        contexts = sorted({context for context, _ in pairs})
        last = {pair: int(asked.nonzero()[0][-1]) for pair, asked in pairs.items()}
        size = min(logit_contexts(self.backend, self.features.store.context_size), _MOST_CONTEXTS)
        for start in range(0, len(contexts), size):
            some = contexts[start : start + size]
            batch = self._batch(some)
            places = {context: place for place, context in enumerate(some)}
            mine = sorted((pair for pair in pairs if pair[0] in places), key=last.__getitem__)
            for begin in range(0, len(mine), size):
                part = mine[begin : begin + size]
                which = torch.tensor([places[context] for context, _ in part])
                changes = batch.changes(which, [feature for _, feature in part])
                asked = torch.from_numpy(np.stack([pairs[pair] for pair in part]))
                effects = (
                    self._exact(batch, which, changes, last[part[-1]] + 2)
                    if self._path is None
                    else self._directly(batch, which, changes, asked)
                )
                yield from zip(part, effects.double().cpu().numpy(), strict=True)

    def _batch(self, contexts: Sequence[int]) -> _Batch:
        """The model as it is on some contexts of the store, and what the SAE finds there."""
        tokens = torch.from_numpy(self.features.store.contexts[contexts].astype(np.int64))
        read, direct = {site.hook_name for site in self.sites.inputs}, self._path is not None
        forwards = Forwards.of(
            self.backend,
            tokens,
            Needs(spliced=not direct),
            read=read | ({self._entry} if direct and self._entry is not None else set()),
            entries={self.sites: None if direct else self._entry},
        )
        inputs = self.sites.input_of(forwards.held)
        inputs = inputs.to(device=self.sae.device, dtype=torch.promote_types(inputs.dtype, self.sae.dtype))
        step = at_once(self.sae, inputs.shape[1])
        found = SparseFeatures.joined([self.sae.encode_sparse(part) for part in inputs.split(step)])
        counts = self.tokens.kept(tokens).reshape(-1).to(found.rows.device)
        return _Batch(self.sae, forwards, inputs, found, counts)

    def _exact(self, batch: _Batch, which: Tensor, changes: Tensor, length: int) -> Tensor:
        """``[b, length - 1]``, of the contexts ``which [b]`` of a batch, with ``changes [b, t, d_out]``.

        What comes after the first ``length`` tokens changes nothing before it: it is left out.
        """
        forwards, names = batch.forwards, [site.name for site in self.sites.targets]
        held = {name: x[which.to(x.device), :length] for name, x in forwards.held.items()}
        repeated = attrs.evolve(forwards, tokens=forwards.tokens[which, :length], held=held)
        added = dict(zip(names, self.sae.ports.split_target(changes[:, :length]).values(), strict=True))
        # Added to what is there: that is the splice with its error term, without the rounding of taking apart.
        without = repeated.with_put(self.sites, lambda site, x: x + added[site.name].to(x.device), None)
        assert forwards.clean is not None
        assert forwards.clean.loss is not None
        assert without.loss is not None
        clean = forwards.clean.loss[which.to(without.loss.device)][:, : without.loss.shape[1]]
        return without.loss.double() - clean.double()

    def _directly(self, batch: _Batch, which: Tensor, changes: Tensor, asked: Tensor) -> Tensor:
        """``[b, t - 1]``: the same by the direct path, where ``asked [b, t]``."""
        assert self._path is not None
        assert self._entry is not None
        residual, tokens = batch.forwards.held[self._entry], batch.forwards.tokens
        effects = torch.zeros(len(which), tokens.shape[1] - 1, dtype=torch.float64)
        there = asked.to(changes.device) & (changes != 0).any(-1)
        rows, places = there[:, :-1].nonzero(as_tuple=True)
        weights = self._path.unembedding
        size = max(_LOGIT_BYTES // (4 * weights.shape[1]), 1)
        for part in torch.arange(len(rows)).split(size) if len(rows) else ():
            row, place = rows[part].cpu(), places[part].cpu()
            stream = residual[which[row], place].to(weights)
            change = self._path.in_residual_stream(changes[rows[part], places[part]])
            following = tokens[which[row], place + 1].to(weights.device)
            after, before = (_likelihood(x, weights, following) for x in (stream + change, stream))
            effects[row, place] = (before - after).double().cpu()
        return effects


def _likelihood(stream: Tensor, weights: Tensor, following: Tensor) -> Tensor:
    """``[n]``: the logarithm of the probability of the tokens ``following [n]``, of a last residual stream."""
    scale = stream.std(-1, correction=0, keepdim=True)  # as a normalization has it
    logits = (stream / scale) @ weights
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return logits.log_softmax(-1).gather(-1, following[:, None])[:, 0]


@attrs.frozen(eq=False)
class _Batch:
    """Contexts ``[u, t]``, and what a model and an SAE make of them."""

    sae: SAEModule
    forwards: Forwards
    inputs: Tensor
    """``[u, t, d_in]``, on the SAE's device."""
    found: SparseFeatures
    """What is active on them, ``u * t`` rows."""
    counts: Tensor
    """``[u * t]``: the tokens that count."""

    def changes(self, which: Tensor, features: Sequence[int]) -> Tensor:
        """``[b, t, d_out]``: by how much outputs on the contexts ``which [b]`` change without one feature each."""
        size, device = self.inputs.shape[1], self.inputs.device
        changes = self.inputs.new_zeros(len(features), size, self.sae.d_out)
        flat = changes.view(-1, self.sae.d_out)
        active = self.found.kept((self.found.values != 0) & self.counts[self.found.rows])
        places, rows, owners = [], [], []
        for number, (context, feature) in enumerate(zip(which.tolist(), features, strict=True)):
            of_it = active.rows[active.features == feature]
            of_it = of_it[of_it // size == context]
            rows.append(of_it)
            places.append(of_it % size + number * size)
            owners.append(torch.full_like(of_it, feature))
        row, place, owner = (torch.cat(x) for x in (rows, places, owners))
        for part in torch.arange(len(row), device=device).split(at_once(self.sae)) if len(row) else ():
            flat[place[part]] = self._without(row[part], owner[part]).to(flat)
        return changes

    def _without(self, rows: Tensor, features: Tensor) -> Tensor:
        """``[n, d_out]``: what is decoded of ``rows [n]`` without one feature each, less what is decoded of all."""
        first, last = (torch.searchsorted(self.found.rows, x) for x in (rows, rows + 1))
        numbers = torch.arange(len(rows), device=rows.device)
        lengths = last - first
        owners = numbers.repeat_interleave(lengths)
        entries = torch.arange(len(owners), device=rows.device) + (first - lengths.cumsum(0) + lengths)[owners]
        dense = self.found.values.new_zeros(len(rows), self.sae.d_sae)
        dense[owners, self.found.features[entries]] = self.found.values[entries]
        like = self.inputs.flatten(0, 1)[rows]
        if self.sae.reads_sequences:
            dense, like = dense[None], like[None]
        whole = self.sae.decode(dense, like=like)
        dense.view(-1, self.sae.d_sae)[numbers, features] = 0
        return (self.sae.decode(dense, like=like) - whole).reshape(-1, self.sae.d_out)


# ---- what is compared, and where it is


def _check_same(features: SAETables, sae: SAEModule, backend: ModelBackend) -> None:
    """:class:`DataError` unless the store was made with this SAE and this model."""
    made_with, own = features.store.manifest.model, backend.fingerprint()
    known = made_with.get("fingerprint")
    same = known == own if known is not None and own is not None else made_with.get("name") == backend.name
    if not same:
        what = "its weights differ" if known is not None and own is not None else f"it is called {backend.name!r}"
        raise DataError(
            f"what removing features of {features.name} does to the loss cannot be told of this model: the features "
            f"were collected with {made_with.get('name')!r}, and {what}. Give that model, or collect again"
        )
    if checksum(sae) != features.about.checksum:
        raise DataError(
            f"the SAE is not the one whose features were collected as {features.name}: its weights differ. Give that "
            "one, or collect again"
        )


def _sites_of(features: SAETables, sae: SAEModule, backend: ModelBackend) -> Sites:
    """Where the store says that it reads and writes, by the names of this backend."""
    inputs, targets = (tuple(map(_site, names)) for names in (features.about.inputs, features.about.targets))
    hooks = {site.hook_name for site in (*inputs, *targets)}
    there = hooks <= {*backend.hook_names()}
    return fitting_sites(sae, backend, Sites(inputs, targets) if there else None)


def _site(name: str) -> Site:
    found = _HEAD.fullmatch(name)
    return Site(hook_name=name) if found is None else Site(hook_name=found[1], hook_head_index=int(found[2]))


def _direct(sae: SAEModule, backend: ModelBackend, sites: Sites) -> tuple[str, LogitPath]:
    """The last residual stream, and the path there."""
    path = logit_path(sae, backend, sites)
    if isinstance(path, str):
        raise ModelError(f"there is no direct path to the loss: {path}. Ask for loss_effects='exact', which needs none")
    last = backend.entry_of(()) if isinstance(backend, StartsInside) else None
    if last is None or not isinstance(backend, KnowsResidualStream) or not backend.in_residual_stream(last):
        raise ModelError(
            f"there is no direct path to the loss: the backend of {backend.name!r} does not say which hook holds the "
            "last residual stream. Ask for loss_effects='exact', which needs none"
        )
    return last, path
