"""What removing a feature does to the loss of the next token, in windows of text that a feature store has."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Literal, Self, TypeAlias

import attrs
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from saekit.abilities import StartsInside
from saekit.ambient import ambient
from saekit.analysis.direct_path import DirectPath
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

__all__ = ["Kind", "LossEffects", "TokenEffect", "WindowEffects", "check_kind", "check_same", "sites_in_store"]

Kind: TypeAlias = Literal["exact", "direct"]
WindowEffects: TypeAlias = "tuple[float | None, ...]"
"""For each token of a window, by how many nats the loss of the token after it rises; None: none comes after it."""

_KINDS = ("exact", "direct")
_MOST_CONTEXTS = 32  # in a forward: what is held of them is small, whatever the vocabulary
_LOGIT_BYTES = 1 << 26
_HEAD = re.compile(r"(.+)\.head(\d+)")
_Pairs: TypeAlias = "dict[tuple[int, int], NDArray[np.bool_]]"
"""Contexts with features, and of which of the context's positions ``[t]`` something is asked."""


@attrs.frozen
class TokenEffect:
    """What a feature does, by the direct path, at a token on which it is active."""

    loss: float | None
    """By how many nats removing it raises the loss of the token after it; None: none comes after it."""
    raised: Sequence[tuple[int, float]]
    """The tokens whose log probability it raises most, with by how much, the most first."""
    lowered: Sequence[tuple[int, float]]
    """Those whose log probability it lowers most, likewise."""


def check_kind(kind: object) -> None:
    """:class:`ConfigError` for what is neither a :data:`Kind` nor None."""
    if kind is not None and kind not in _KINDS:
        raise ConfigError([("loss_effects", f"must be 'exact', 'direct' or None, found {kind!r}")])


@attrs.frozen(eq=False, repr=False)
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
    kind: Kind
    _entry: str | None
    """Exact: where forwards begin."""
    _path: DirectPath | None = None

    def __repr__(self) -> str:
        return f"LossEffects({self.kind!r}, of {self.features.name!r} in {self.backend.name!r})"

    @classmethod
    def of(cls, features: SAETables, sae: SAEModule, backend: ModelBackend, kind: Kind = "exact") -> Self:
        """Those of the SAE that ``features`` of a store are of, in the model that the store was made with.

        :class:`DataError` where SAE or model are others, :class:`ModelError` where ``"direct"`` is asked for and no
        path is known that leads from what the SAE writes to the logits.
        """
        check_kind(kind)
        check_same(features, sae, backend)
        sites = sites_in_store(features, sae, backend)
        if kind == "direct":
            return cls(features, sae, backend, sites, kind, None, _direct(sae, backend, sites))
        targets = {site.hook_name for site in sites.targets}
        entry = backend.entry_of(targets) if isinstance(backend, StartsInside) else None
        return cls(features, sae, backend, sites, kind, entry)

    @ambient()
    @torch.no_grad()
    def of_windows(self, windows: Sequence[tuple[int, Window]]) -> list[WindowEffects]:
        """For each of ``windows``, which come with the number of a feature, the effects at its tokens."""
        size = self.features.store.context_size
        found = dict(self._of_pairs(self._asked(windows)))
        return [
            tuple(
                float(found[window.context, feature][place]) if place < size - 1 else None
                for place in range(window.start, window.start + len(window.ids))
            )
            for feature, window in windows
        ]

    def _asked(self, windows: Sequence[tuple[int, Window]]) -> _Pairs:
        pairs: _Pairs = {}
        for feature, window in windows:
            size = self.features.store.context_size
            asked = pairs.setdefault((window.context, feature), np.zeros(size, np.bool_))
            asked[window.start : window.start + len(window.ids)] = True
        return pairs

    @ambient()
    @torch.no_grad()
    def of_tokens(self, feature: int, windows: Sequence[Window], k: int) -> dict[tuple[int, int], TokenEffect]:
        """What a feature does at those tokens of ``windows`` on which it is active, by context and position, with the
        ``k`` tokens that it raises and lowers most.  Of effects by the direct path."""
        found: dict[tuple[int, int], TokenEffect] = {}
        pairs = self._asked([(feature, window) for window in windows])
        for batch, part, which, changes in self._parts(pairs):
            there = torch.from_numpy(np.stack([pairs[pair] for pair in part])).to(changes.device)
            there &= (changes != 0).any(-1)
            for row, place, change in self._log_changes(batch, which, changes, there):
                contexts = [part[one][0] for one in row.tolist()]
                at = [*zip(contexts, place.tolist(), strict=True)]
                losses = (-_at_next(batch, which[row], place, change)).tolist()
                found |= zip(at, self._told(at, losses, -change, k), strict=True)
        return found

    def _told(
        self, at: Sequence[tuple[int, int]], losses: Sequence[float], change: Tensor, k: int
    ) -> Iterator[TokenEffect]:
        """Of tokens, with by how much each of all tokens becomes likelier ``change [n, d_vocab]``."""
        k, last = min(k, change.shape[1]), self.features.store.context_size - 1
        most, least = change.topk(k), (-change).topk(k)
        raised, lowered = (
            [[*zip(ids, values, strict=True)] for ids, values in zip(indices.tolist(), sizes.tolist(), strict=True)]
            for indices, sizes in ((most.indices, most.values), (least.indices, -least.values))
        )
        for row, (_, place) in enumerate(at):
            yield TokenEffect(losses[row] if place < last else None, raised[row], lowered[row])

    def _of_pairs(self, pairs: _Pairs) -> Iterator[tuple[tuple[int, int], NDArray[np.float64]]]:
        """Of each the effects ``[t - 1]``; those after the last position that is asked about are left out."""
        for batch, part, which, changes in self._parts(pairs):
            asked = torch.from_numpy(np.stack([pairs[pair] for pair in part]))
            effects = (
                self._exact(batch, which, changes, _last(asked) + 2 if self._may_be_cut else None)
                if self._path is None
                else self._directly(batch, which, changes, asked)
            )
            yield from zip(part, effects.double().cpu().numpy(), strict=True)

    def _parts(self, pairs: _Pairs) -> Iterator[tuple[_Batch, list[tuple[int, int]], Tensor, Tensor]]:
        """A batch of contexts, some of ``pairs`` that are of it, which of its contexts each is of ``[b]``, and by how
        much what the SAE writes changes without the feature ``[b, t, d_out]``."""
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
                yield batch, part, which, batch.changes(which, [feature for _, feature in part])

    @cached_property
    def _may_be_cut(self) -> bool:
        """Whether what comes later in a context changes nothing before it, as in causal models: that is tried."""
        tokens = torch.from_numpy(self.features.store.contexts[:1].astype(np.int64))
        half = tokens.shape[1] // 2
        if half < 2:
            return False
        whole, cut = (self.backend.run(some, want="loss").loss for some in (tokens, tokens[:, :half]))
        return torch.allclose(whole[:, : half - 1], cut, rtol=1e-2, atol=1e-2)

    def _batch(self, contexts: Sequence[int]) -> _Batch:
        """The model as it is on some contexts of the store, and what the SAE finds there."""
        tokens = torch.from_numpy(self.features.store.contexts[contexts].astype(np.int64))
        read, direct = {site.hook_name for site in self.sites.inputs}, self._path is not None
        forwards = Forwards.of(
            self.backend,
            tokens,
            Needs(spliced=not direct),
            read=read | (set() if self._path is None else {self._path.last}),
            entries={self.sites: self._entry},
        )
        inputs = self.sites.input_of(forwards.held)
        inputs = inputs.to(device=self.sae.device, dtype=torch.promote_types(inputs.dtype, self.sae.dtype))
        step = at_once(self.sae, inputs.shape[1])
        found = SparseFeatures.joined([self.sae.encode_sparse(part) for part in inputs.split(step)])
        counts = torch.from_numpy(self.features.kept[contexts]).reshape(-1).to(found.rows.device)
        return _Batch(self.sae, forwards, inputs, found, counts)

    def _exact(self, batch: _Batch, which: Tensor, changes: Tensor, length: int | None) -> Tensor:
        """``[b, length - 1]``, of the contexts ``which [b]`` of a batch, with ``changes [b, t, d_out]``.

        What comes after the first ``length`` tokens, if that is given, changes nothing before it: it is left out.
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
        effects = torch.zeros(len(which), batch.forwards.tokens.shape[1] - 1, dtype=torch.float64)
        there = asked.to(changes.device) & (changes != 0).any(-1)
        there[:, -1] = False  # nothing comes after it
        for row, place, change in self._log_changes(batch, which, changes, there):
            effects[row, place] = -_at_next(batch, which[row], place, change)
        return effects

    def _log_changes(
        self, batch: _Batch, which: Tensor, changes: Tensor, there: Tensor
    ) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """For some of the tokens at a time where ``there [b, t]``: rows ``[n]``, places ``[n]``, and by how much log
        probabilities change without the feature ``[n, d_vocab]``."""
        assert self._path is not None
        residual = batch.forwards.held[self._path.last]
        rows, places = there.nonzero(as_tuple=True)
        size = max(_LOGIT_BYTES // (4 * self.backend.d_vocab), 1)
        for part in torch.arange(len(rows)).split(size) if len(rows) else ():
            row, place = rows[part].cpu(), places[part].cpu()
            written = changes[rows[part], places[part]]
            yield row, place, self._path.log_changes(residual[which[row], place], written)


def _last(asked: Tensor) -> int:
    """The last position that is asked about in any row of ``asked [b, t]``."""
    return int(asked.any(0).nonzero().max())


def _at_next(batch: _Batch, which: Tensor, places: Tensor, change: Tensor) -> Tensor:
    """``[n]`` of ``change [n, d_vocab]``: that of the token after each, or of itself where there is none."""
    tokens = batch.forwards.tokens
    following = tokens[which, (places + 1).clamp(max=tokens.shape[1] - 1)].to(change.device)
    return change.gather(-1, following[:, None])[:, 0].double().cpu()


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


def check_same(features: SAETables, sae: SAEModule, backend: ModelBackend) -> None:
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


def sites_in_store(features: SAETables, sae: SAEModule, backend: ModelBackend) -> Sites:
    """Where the store says that it reads and writes, by the names of this backend."""
    inputs, targets = (tuple(map(_site, names)) for names in (features.about.inputs, features.about.targets))
    hooks = {site.hook_name for site in (*inputs, *targets)}
    there = hooks <= {*backend.hook_names()}
    return fitting_sites(sae, backend, Sites(inputs, targets) if there else None)


def _site(name: str) -> Site:
    found = _HEAD.fullmatch(name)
    return Site(hook_name=name) if found is None else Site(hook_name=found[1], hook_head_index=int(found[2]))


def _direct(sae: SAEModule, backend: ModelBackend, sites: Sites) -> DirectPath:
    try:
        return DirectPath.of(sae, backend, sites)
    except ModelError as error:
        raise ModelError(
            f"there is no direct path to the loss: {error}. Ask for loss_effects='exact', which needs none"
        ) from error
