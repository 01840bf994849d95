"""One SAE at its sites: what it reads and writes as a forward comes by."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from typing import Any

import attrs
import torch
from torch import Tensor

from saekit.errors import ConfigError, ModelError
from saekit.sae.hooks import Watch
from saekit.sae.module import SAEModule
from saekit.site import Sites
from saekit.tokens import Mask, TokenChoice

__all__ = ["Attachment", "Passing", "attachments"]


@attrs.define(eq=False)
class Passing:
    """One forward, as far as it has come."""

    tokens: Tensor | None = None
    """``[b, t]``, where they are known."""
    before: int = 0
    """How many positions came before them."""
    inputs: dict[str, dict[str, Tensor]] = attrs.field(factory=dict)
    """By the names of attachments, and by hooks, what was held at those that they read: ``[b, t, ...]``."""
    outputs: dict[str, dict[str, Tensor]] = attrs.field(factory=dict)
    """Likewise what they give at targets that are still to come, by the sites' names: ``[b, t, width]``."""


@attrs.frozen(eq=False, kw_only=True)
class Attachment:
    """An SAE, where it is put, and how; it changes nothing of the SAE."""

    name: str
    """What its inner points begin with."""
    sae: SAEModule
    sites: Sites
    use_error_term: bool = False
    """Whether what the SAE misses is added back, so that the model goes on as without it until somebody intervenes."""
    tokens: TokenChoice = attrs.field(factory=TokenChoice)
    """The positions that are replaced; others stay bit for bit as they are."""
    mask: Mask | None = None
    """Of these the positions that are replaced; None: all."""

    def __attrs_post_init__(self) -> None:
        if len(self.written_at) > 1 and self.sites.same:
            raise self._out_of_order(self.sites.targets[0].hook_name, self.sites.inputs[1].hook_name)
        if len(self.written_at) > 1 and self.use_error_term:
            raise ConfigError(
                f"{self.name} writes at several hooks ({', '.join(self.written_at)}), one after the other, and the "
                "error is known when all are there: leave out use_error_term"
            )

    @property
    def read_at(self) -> list[str]:
        """The hooks that it reads."""
        return list(dict.fromkeys(site.hook_name for site in self.sites.inputs))

    @property
    def written_at(self) -> list[str]:
        """The hooks that it writes."""
        return list(dict.fromkeys(site.hook_name for site in self.sites.targets))

    @property
    def points(self) -> dict[str, str]:
        """The names of its inner points, with what the SAE calls them: ``acts_post`` and so on."""
        return {f"{self.name}.hook_sae_{point}": point for point in self.sae.hook_points}

    def passed(self, hook: str, activation: Tensor, now: Passing, watch: Watch) -> Tensor:
        """What the model goes on with at ``hook``, which holds ``activation``."""
        if hook in self.read_at:
            now.inputs.setdefault(self.name, {})[hook] = activation
        if hook not in self.written_at:
            return activation
        if self.name not in now.outputs:
            now.outputs[self.name] = self._outputs(now, hook, activation, watch)
        left = now.outputs[self.name]
        names = [site.name for site in self.sites.targets if site.hook_name == hook]
        here = {name: left.pop(name).to(activation.device) for name in names}
        if not left:
            del now.outputs[self.name]
        return self.sites.replaced(hook, activation, here, self._kept(now, activation))

    def _outputs(self, now: Passing, hook: str, activation: Tensor, watch: Watch) -> dict[str, Tensor]:
        """``[b, t, width]`` by the names of the targets; ``hook``, which holds ``activation``, is the first of them."""
        held, before = now.inputs.pop(self.name, {}), now.before
        if late := [name for name in self.read_at if name not in held]:
            raise self._out_of_order(hook, late[0])
        x = self.sites.input_of(held)
        if self.sae.reads_sequences and before:
            raise ModelError(
                f"{self.name} reads whole sequences, and this forward goes on after {before} positions, which a cache "
                "of keys and values stands for: generate without one (use_cache=False, use_past_kv_cache=False)"
            )
        there: dict[str, Any] = {"device": self.sae.device, "dtype": torch.promote_types(x.dtype, self.sae.dtype)}
        of = None
        if self.use_error_term and not self.sites.same:
            of = self.sites.target_of({hook: activation}).to(**there)
        with self.sae.watched(watch):
            y = self.sae(x.to(**there), use_error_term=self.use_error_term, of=of)
        parts = self.sae.ports.split_target(y).values()
        return {site.name: part for site, part in zip(self.sites.targets, parts, strict=True)}

    def _out_of_order(self, written: str, read: str) -> ModelError:
        return ModelError(
            f"{self.name} cannot stand in the model: it writes at {written!r}, which runs before {read!r}, which it "
            "reads. saekit.evaluate measures such a dictionary, with two forwards for each batch"
        )

    def _kept(self, now: Passing, activation: Tensor) -> Tensor | None:
        """``[b, t]`` bool: the positions that are replaced; None: all."""
        if self.tokens.takes_all and self.mask is None:
            return None
        shape = list(activation.shape[:2])
        if now.tokens is None or list(now.tokens.shape) != shape:
            found = "not known" if now.tokens is None else f"of shape {list(now.tokens.shape)}"
            raise ModelError(
                f"which positions {self.name} replaces depends on token ids, and those of this forward, whose "
                f"activations are {[*shape, '...']}, are {found}: give the model token ids [batch, position]"
            )
        kept = self.tokens.kept(now.tokens, before=now.before).to(activation.device)
        if self.mask is None:
            return kept
        mask = self.mask(now.tokens) if callable(self.mask) else self.mask
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool or list(mask.shape) != shape:
            found = f"{mask.dtype} {list(mask.shape)}" if isinstance(mask, Tensor) else type(mask).__name__
            raise ModelError(
                f"the mask must be torch.bool {shape}, as the tokens of this forward are, found {found}; a function "
                "that makes it of the tokens fits every forward, those of generate with a cache, too"
            )
        return kept & mask.to(activation.device)


def attachments(
    saes: Sequence[tuple[SAEModule, Sites]],
    *,
    names: Sequence[str] | None = None,
    taken: Collection[str] = (),
    use_error_term: bool | None = None,
    tokens: Sequence[TokenChoice] | None = None,
    mask: Mask | None = None,
) -> list[Attachment]:
    """One for each of ``saes``, in their order, under ``names`` or those of the hooks that they read.

    ``use_error_term`` is each SAE's own where it is left out.  ``taken`` are names that are given already.
    """
    names = names or _names([sites for _, sites in saes], taken)
    tokens = tokens or [TokenChoice()] * len(saes)
    return [
        Attachment(
            name=name,
            sae=sae,
            sites=sites,
            use_error_term=sae.use_error_term if use_error_term is None else use_error_term,
            tokens=choice,
            mask=mask,
        )
        for name, (sae, sites), choice in zip(names, saes, tokens, strict=True)
    ]


def _names(sites: Sequence[Sites], taken: Collection[str]) -> list[str]:
    """The hook that is read first; where several read it, with the head; else with a number."""
    first = [one.inputs[0] for one in sites]
    hooks = Counter([site.hook_name for site in first])
    whole = Counter([site.name for site in first])
    found: list[str] = []
    for site in first:
        names = [site.hook_name] * (hooks[site.hook_name] == 1) + [site.name] * (whole[site.name] == 1)
        numbered = (f"{site.name}[{number}]" for number in range(1, len(sites) + len(taken) + 2))
        found.append(next(name for name in (*names, *numbered) if name not in found and name not in taken))
    return found
