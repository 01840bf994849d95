"""``HookedSAETransformer``: a HookedTransformer with the methods of the class of that name in sae-lens.

It is for code that was written for that class; :func:`saekit.splice` does the work, and does it on every backend.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import cached_property
from importlib.metadata import version
from typing import Any, Self, TypeAlias

import attrs

from saekit import SAE, ModelError, Site, Sites, load_model
from saekit.abilities import HasModel
from saekit.backends import Backend
from saekit.errors import MissingPackageError
from saekit.protocols import ModelBackend
from saekit.splicing import Spliced, attachments, check_fits
from saekit.tokens import TokenChoice, asked_tokens, special_ids, token_choice

try:
    from transformer_lens.HookedTransformer import HookedTransformer
except ModuleNotFoundError as error:
    raise MissingPackageError(
        f"transformer_lens {version('transformer-lens')} has no HookedTransformer, which HookedSAETransformer is one "
        "of. Use saekit.splice(model, saes), which takes a TransformerBridge, too, or install 'transformer-lens<4'"
    ) from error

__all__ = ["HookedSAETransformer"]

_SAEs: TypeAlias = SAE | Sequence[SAE]
_Excluded: TypeAlias = bool | Collection[int] | None
"""Token ids that are left as they are; True: the special ones; False: none; None: those that training left out."""


@attrs.frozen(eq=False)
class _Attached:
    """One SAE in the model."""

    name: str
    sae: SAE
    sites: Sites
    spliced: Spliced
    _stack: ExitStack = attrs.field(factory=ExitStack)

    def open(self) -> None:
        self._stack.enter_context(self.spliced.opened())

    def close(self) -> None:
        """To close it twice does no harm."""
        self._stack.close()

    def is_called(self, name: str) -> bool:
        first = self.sites.inputs[0]
        return name in (self.name, first.name, first.hook_name)


def _share_a_place(one: Sites, other: Sites) -> bool:
    return any(_overlap(first, second) for first in _places(one) for second in _places(other))


def _places(sites: Sites) -> tuple[Site, ...]:
    """What it takes for itself: what it writes, and the name of what it reads first."""
    return (*sites.targets, sites.inputs[0])


def _overlap(one: Site, two: Site) -> bool:
    heads = {one.hook_head_index, two.hook_head_index}
    return one.hook_name == two.hook_name and (None in heads or len(heads) == 1)


class HookedSAETransformer(HookedTransformer):
    """A HookedTransformer to which SAEs can be attached.

    While one is attached, every forward goes on with what it gives, and its inner points are hook points of the model:
    ``{hook_name}.hook_sae_acts_post [b, t, d_sae]`` and so on.  The hook point that it is attached to stays, with all
    hooks of others there; those that were added before see what the SAE reads, those after what it writes.

    An SAE takes the place of those that are attached to the same site; SAEs of different heads of one hook stand side
    by side.  A site that the model lacks, or of another width, is an error.
    """

    _attached: tuple[_Attached, ...] = ()

    @classmethod
    def from_model(cls, model: HookedTransformer | ModelBackend) -> Self:
        """The HookedTransformer ``model`` with these methods.  It shares all weights and hook points with ``model``,
        which may be what :func:`saekit.load_model` returned."""
        model = model.model if isinstance(model, HasModel) and isinstance(model, Backend) else model
        if not isinstance(model, HookedTransformer):
            raise ModelError(f"from_model takes a HookedTransformer, found a {type(model).__name__}")
        made = cls.__new__(cls)
        made.__dict__.update(model.__getstate__() if isinstance(model, HookedSAETransformer) else model.__dict__)
        return made

    @property
    def acts_to_saes(self) -> dict[str, SAE]:
        """What is attached, by the name of the hook; where SAEs of several heads are there, with the head's number."""
        return {one.name: one.sae for one in self._attached}

    def add_sae(self, sae: SAE, use_error_term: bool | None = None, exclude_special_tokens: _Excluded = None) -> None:
        """Attach ``sae`` until :meth:`reset_saes` is called, in place of what is attached to its site.

        ``use_error_term`` adds back what it misses; None: as the SAE has it, whose own setting stays as it is.
        ``exclude_special_tokens`` are ids of tokens at which the model's own activations stay; True stands for the
        special tokens of its tokenizer, and None for those that the SAE was trained without.
        """
        self._put(self._made(sae, use_error_term, exclude_special_tokens))

    def reset_saes(
        self, act_names: str | Sequence[str] | None = None, prev_saes: Sequence[SAE | None] | None = None
    ) -> None:
        """Remove the SAEs that are attached to the hooks ``act_names``; None: all.

        ``prev_saes`` are attached in their places, one for each name; None: nothing.
        """
        names = [*self.acts_to_saes] if act_names is None else [act_names] if isinstance(act_names, str) else act_names
        instead = [*prev_saes] if prev_saes else [None] * len(names)
        if len(names) != len(instead):
            raise ValueError(f"there must be as many prev_saes as act_names: found {len(instead)} and {len(names)}")
        new: list[_Attached] = []
        gone: list[_Attached] = []
        for name, sae in zip(names, instead, strict=True):
            here = [one for one in self._attached if one.is_called(name)]
            if not here and name not in self.hook_dict:
                raise self._backend.no_hook(name)
            gone += here
            if sae is not None:
                new += self._made(sae, None, None, here[0].sites if here else Sites.one(Site(hook_name=name)))
        self._remove(gone)
        self._put(new)

    @contextmanager
    def saes(
        self,
        saes: _SAEs = (),
        reset_saes_end: bool = True,
        use_error_term: bool | None = None,
        exclude_special_tokens: _Excluded = None,
    ) -> Iterator[Self]:
        """While the context is open, ``saes`` are attached, in place of those that are attached to their sites.

        Afterwards all that was attached to these is there again, as it was, also after an exception; with
        ``reset_saes_end`` off, ``saes`` stay instead.  The other arguments are those of :meth:`add_sae`.
        """
        new = self._made(saes, use_error_term, exclude_special_tokens)
        if not reset_saes_end:
            self._put(new)
            yield self
            return
        before = self._attached
        hidden = self._sharing(new)
        with ExitStack() as paused:
            # They keep their places among the hooks, and their points those of the user.
            for one in hidden:
                paused.enter_context(one.spliced.paused())
            self._attached = tuple(one for one in before if one not in hidden)
            try:
                self._put(new)
                yield self
            finally:
                self._remove(self._sharing(new))
                added = [one for one in self._attached if one not in before]
                self._attached = (*(one for one in before if one in self._attached or one in hidden), *added)

    def run_with_saes(
        self,
        *model_args: Any,
        saes: _SAEs = (),
        reset_saes_end: bool = True,
        use_error_term: bool | None = None,
        exclude_special_tokens: _Excluded = None,
        **model_kwargs: Any,
    ) -> Any:
        """What the model gives for the other arguments, within :meth:`saes`."""
        with self.saes(saes, reset_saes_end, use_error_term, exclude_special_tokens):
            return self(*model_args, **model_kwargs)

    def run_with_cache_with_saes(
        self,
        *model_args: Any,
        saes: _SAEs = (),
        reset_saes_end: bool = True,
        use_error_term: bool | None = None,
        exclude_special_tokens: _Excluded = None,
        return_cache_object: bool = True,
        remove_batch_dim: bool = False,
        **kwargs: Any,
    ) -> Any:
        """``run_with_cache`` within :meth:`saes`.  The cache has the SAEs' inner points."""
        kwargs |= {"return_cache_object": return_cache_object, "remove_batch_dim": remove_batch_dim}
        with self.saes(saes, reset_saes_end, use_error_term, exclude_special_tokens):
            return self.run_with_cache(*model_args, **kwargs)

    def run_with_hooks_with_saes(
        self,
        *model_args: Any,
        saes: _SAEs = (),
        reset_saes_end: bool = True,
        use_error_term: bool | None = None,
        exclude_special_tokens: _Excluded = None,
        fwd_hooks: Sequence[tuple[str | Callable[[str], bool], Callable[..., Any]]] = (),
        bwd_hooks: Sequence[tuple[str | Callable[[str], bool], Callable[..., Any]]] = (),
        **kwargs: Any,
    ) -> Any:
        """``run_with_hooks`` within :meth:`saes`.  Hooks may be at the SAEs' inner points, too."""
        kwargs |= {"fwd_hooks": [*fwd_hooks], "bwd_hooks": [*bwd_hooks]}
        with self.saes(saes, reset_saes_end, use_error_term, exclude_special_tokens):
            return self.run_with_hooks(*model_args, **kwargs)

    @cached_property
    def _backend(self) -> Backend:
        return load_model(self)  # type: ignore[return-value]

    def _made(
        self, saes: _SAEs, use_error_term: bool | None, excluded: _Excluded, sites: Sites | None = None
    ) -> list[_Attached]:
        """Attachments that are not there yet; of those that share a place the last."""
        given: list[Any] = [*saes] if isinstance(saes, (list, tuple)) else [saes]
        for sae in given:
            if not isinstance(sae, SAE):
                raise TypeError(
                    f"an SAE of saekit is expected, found a {type(sae).__name__}; saekit.SAE.load reads those of others"
                )
        found = [(sae, check_fits(sae, self._backend, sites)) for sae in given]
        found = [
            (sae, its)
            for number, (sae, its) in enumerate(found)
            if not any(_share_a_place(its, later) for _, later in found[number + 1 :])
        ]
        stay = [one.sites for one in self._attached if not any(_share_a_place(one.sites, its) for _, its in found)]
        others = [its.inputs[0].hook_name for its in (*stay, *(its for _, its in found))]
        return [
            self._at(sae, its, others.count(its.inputs[0].hook_name) > 1, use_error_term, excluded)
            for sae, its in found
        ]

    def _at(self, sae: SAE, sites: Sites, by_head: bool, use_error_term: bool | None, excluded: _Excluded) -> _Attached:
        """``sae`` at ``sites``, by the name of the hook, or with the head's number where others are there, too."""
        name = sites.inputs[0].name if by_head else sites.inputs[0].hook_name
        tokens = [self._choice(sae, excluded)]
        made = attachments([(sae, sites)], names=[name], use_error_term=use_error_term, tokens=tokens)
        return _Attached(name, sae, sites, Spliced(self._backend, made))

    def _choice(self, sae: SAE, excluded: _Excluded) -> TokenChoice:
        if excluded is None:
            return TokenChoice.of_metadata(sae.info.metadata, special_ids(self._backend))
        return token_choice(asked_tokens(excluded), self._backend, section="")

    def _sharing(self, new: Sequence[_Attached]) -> list[_Attached]:
        """What is attached where ``new`` are, or would be."""
        return [one for one in self._attached if any(_share_a_place(one.sites, other.sites) for other in new)]

    def _put(self, new: Sequence[_Attached]) -> None:
        self._remove(self._sharing(new))
        for one in new:
            one.open()
            self._attached = (*self._attached, one)

    def _remove(self, gone: Sequence[_Attached]) -> None:
        for one in reversed(gone):
            one.close()
        self._attached = tuple(one for one in self._attached if one not in gone)

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickles, which nothing is attached to."""
        if self._attached:
            raise ModelError("a model is copied without its SAEs: call reset_saes(), and attach them to the copy")
        return {name: value for name, value in self.__dict__.items() if name not in ("_attached", "_backend")}
