"""``saekit.splice``: SAEs in a model while a context is open.

As in :mod:`saekit.commands.jobs`, what does the work is imported when it is called.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Any, ParamSpec, TypeAlias, TypeVar

from saekit.commands.evaluating import ChosenTokens
from saekit.commands.material import Material, Text
from saekit.commands.stores import is_store
from saekit.commands.subjects import Subject, subjects_of
from saekit.config import PluginChoice
from saekit.errors import ConfigError, ModelError
from saekit.kinds import MODEL_BACKENDS
from saekit.plugins.manager import PluginManager, default_manager
from saekit.plugins.text import short
from saekit.site import Site, Sites

if TYPE_CHECKING:
    from saekit.protocols import ModelBackend
    from saekit.sae.module import SAEModule
    from saekit.splicing.attachment import Attachment
    from saekit.splicing.spliced import Spliced
    from saekit.tokens import Mask, TokenChoice

__all__ = ["splice"]

_Place: TypeAlias = "Site | Sites | str"
_WHAT = "the arguments of splice"
_P = ParamSpec("_P")
_T = TypeVar("_T")


def _for_one_block(make: Callable[_P, AbstractContextManager[_T]]) -> Callable[_P, AbstractContextManager[_T]]:
    """``make``, whose contexts say so where they are entered a second time."""

    @functools.wraps(make)
    def made(*args: _P.args, **kwargs: _P.kwargs) -> AbstractContextManager[_T]:
        return _OneBlock(make(*args, **kwargs))

    return made


class _OneBlock(AbstractContextManager[_T]):
    def __init__(self, context: AbstractContextManager[_T]) -> None:
        self._context, self._entered = context, False

    def __repr__(self) -> str:
        if self._entered:
            return "<saekit.splice(...), whose with block has begun: use what it gave>"
        return "<saekit.splice(...), which does nothing yet: with saekit.splice(model, saes) as spliced: ...>"

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        raise self._not_entered(f"before .{name} is asked for")

    def __call__(self, *_: Any, **__: Any) -> Any:
        raise self._not_entered("before the model is called")

    @staticmethod
    def _not_entered(when: str) -> ModelError:
        return ModelError(
            f"what saekit.splice(...) returns must be opened {when}: with saekit.splice(model, saes) as spliced: "
            "spliced.run(tokens), and what the model itself has, such as generate, inside the block, too"
        )

    def __enter__(self) -> _T:
        if self._entered:
            raise ModelError("what saekit.splice(...) returns is for one with block, and had its own: call it again")
        self._entered = True
        return self._context.__enter__()

    def __exit__(self, *raised: Any) -> bool | None:
        return self._context.__exit__(*raised)


@_for_one_block
@contextmanager
def splice(
    model_or_backend: object | None,
    saes: object,
    *,
    use_error_term: bool | None = None,
    tokens: TokenChoice | None = None,
    exclude_special_tokens: bool | Sequence[int] | None = None,
    seqpos_slice: Sequence[int | None] | None = None,
    mask: Mask | None = None,
    read: Collection[str] = (),
    sites: _Place | Sequence[_Place] | Mapping[str, _Place] | None = None,
    backend: PluginChoice | None = None,
    device: str = "auto",
    plugins: PluginManager | None = None,
) -> Iterator[Spliced]:
    """While the context is open, the model goes on with what ``saes`` make of what it holds at their sites.

    ``model_or_backend`` is what :func:`saekit.load_model` returned, or a model of a library, whose own functions meet
    the SAEs, too: ``model(tokens)`` and ``model.generate(...)``.  Afterwards, and after an exception, model and SAEs
    are as they were.  It may also be a name, or None for the model of the run or that the SAEs say: these are loaded as
    by :func:`saekit.evaluate`, by ``backend`` and ``device`` as there, and are ``.backend`` of what the block is given.

    ``saes`` are an SAE, what :func:`saekit.train` returned, a run folder, a sweep's, that of an SAE of any format, or
    ``RELEASE:ID``; or a list of these, or a mapping of names.  Several at one site are a chain: the second reads what
    the first gives.  A transcoder reads what the model holds at its input and writes at its target, in the same
    forward.  ``use_error_term`` adds back what each SAE misses, so that only interventions change anything; left out,
    it is as each SAE has it, and no SAE's own is changed.

    Those positions are replaced that each SAE was trained on, as far as it says so.  ``exclude_special_tokens`` and
    ``seqpos_slice`` say it anew, as for :func:`saekit.evaluate`, or ``tokens`` both at once; of these, ``mask`` chooses
    some: bool ``[b, t]``, or a function of the token ids ``[b, t]`` of each forward.  ``sites`` is where SAEs belong
    that do not say so themselves: one for all, one for each in their order, or by name.

    Inner points are named by the hook that an SAE reads first, ``{hook_name}.hook_sae_acts_post`` and so on; where
    several SAEs read it, by the site with its head or with a number (``{hook_name}[1]``), or as the names of a mapping
    ``{name: sae}`` say.  Those of ``read`` are kept of every forward: :attr:`Spliced.held`.

    Raises :class:`saekit.errors.ConfigError` for what does not fit together, :class:`saekit.errors.ModelError` for
    hooks that are not there.
    """
    plugins = plugins or default_manager()
    _check(use_error_term, tokens, exclude_special_tokens, seqpos_slice, mask)
    choice = ChosenTokens.asked_for(exclude_special_tokens, seqpos_slice)
    from saekit.ambient import ambient
    from saekit.splicing.spliced import Spliced

    with ambient():  # what is loaded does not depend on what the caller has set
        names, found, there = _found(model_or_backend, saes, backend, device, plugins)
    choices = [tokens or choice.asked_of(sae, there) for sae in found]
    attached = _attached(there, found, names, use_error_term, choices, mask, sites)
    with Spliced(there, attached, read=read).opened() as spliced:
        yield spliced


def _check(use_error_term: object, tokens: object, exclude: object, places: object, mask: object) -> None:
    """:class:`ConfigError` for what means nothing."""
    if mask is not None and not callable(mask) and str(getattr(mask, "dtype", "")) != "torch.bool":
        raise ConfigError([("mask", f"must be a bool tensor or a function that makes one, found {short(mask)}")], _WHAT)
    if not isinstance(use_error_term, bool | None):
        wanted = "must be True, False or None (as each SAE has it)"
        raise ConfigError([("use_error_term", f"{wanted}, found {short(use_error_term)}")], _WHAT)
    if tokens is None:
        return
    from saekit.tokens import TokenChoice

    if not isinstance(tokens, TokenChoice):
        wanted = "must be a TokenChoice, such as saekit.tokens.TokenChoice(exclude=[0])"
        raise ConfigError([("tokens", f"{wanted}, found {short(tokens)}")], _WHAT)
    if exclude is not None or places is not None:
        both = "says by id and by place which count: leave out exclude_special_tokens and seqpos_slice"
        raise ConfigError([("tokens", both)], _WHAT)


def _found(
    model: object | None, saes: Any, backend: PluginChoice | None, device: str, plugins: PluginManager
) -> tuple[list[str] | None, list[SAEModule], ModelBackend]:
    """The names of the SAEs, if they have been given any, the SAEs, and the model."""
    from saekit.devices import resolve_device

    names = list(saes) if isinstance(saes, Mapping) else None
    if odd := [name for name in names or () if not _is_name(name)]:
        raise ConfigError([("saes", f"must be by names of their own, in one line, found {short(odd[0])}")], _WHAT)
    known: Any = model if MODEL_BACKENDS.is_met_by(model) else None
    place = known.device if known is not None and device == "auto" else resolve_device(device, "device")
    given = {name: saes[name] for name in names} if names is not None else _listed(saes)
    found: list[Subject] = []
    for name, one in given.items():
        some = [*subjects_of(one, plugins, device=place).values()]
        if names is not None and len(some) != 1:
            raise ConfigError([("saes", f"{name!r} is {len(some)} SAEs ({short(one)}); give each a name")], _WHAT)
        found += some
    if not found:
        raise ConfigError([("saes", "names none; give an SAE, a folder, a run or RELEASE:ID")], _WHAT)
    material = Material(plugins, Text(), model=model, backend=backend, device=device)
    models = {id(there): there for there in map(material.model_of, found)}
    if len(models) > 1:
        which = " and ".join(dict.fromkeys(there.name for there in models.values()))
        raise ConfigError([("model", f"is missing: the SAEs are of several models, {which}")], _WHAT)
    return names, [one.sae for one in found], next(iter(models.values()))


def _listed(saes: Any) -> dict[Any, object]:
    is_one = isinstance(saes, str) or hasattr(saes, "encode") or is_store(saes) or not isinstance(saes, Iterable)
    return dict(enumerate([saes] if is_one else saes))


def _attached(
    backend: ModelBackend,
    saes: Sequence[SAEModule],
    names: Sequence[str] | None,
    use_error_term: bool | None,
    tokens: Sequence[TokenChoice],
    mask: Mask | None,
    sites: Any,
) -> list[Attachment]:
    from saekit.splicing.attachment import attachments
    from saekit.splicing.fits import check_fits

    pairs = [
        (sae, check_fits(sae, backend, place, masked=mask is not None))
        for sae, place in zip(saes, _places(sites, saes, names), strict=True)
    ]
    return attachments(pairs, names=names, use_error_term=use_error_term, tokens=tokens, mask=mask)


def _is_name(name: object) -> bool:
    return isinstance(name, str) and name.isprintable() and name.strip() == name != ""


def _places(sites: Any, saes: Sequence[SAEModule], names: Sequence[str] | None) -> list[Sites]:
    """Where each of ``saes`` is put."""
    if isinstance(sites, Mapping):
        if names is None:
            raise ConfigError([("sites", "are by the names of SAEs; give saes as a mapping {name: sae}, too")], _WHAT)
        if unknown := [name for name in sites if name not in names]:
            raise ConfigError([("sites", f"are by the names of SAEs, and none is called {unknown[0]!r}")], _WHAT)
        places = [sites.get(name) for name in names]
    elif isinstance(sites, str) or not isinstance(sites, Iterable):
        places = [sites] * len(saes)
    else:
        places = list(sites)
        if len(places) != len(saes):
            raise ConfigError([("sites", f"are {len(places)}, and there are {len(saes)} SAEs")], _WHAT)
    return [_place(place, sae) for place, sae in zip(places, saes, strict=True)]


def _place(place: Any, sae: SAEModule) -> Sites:
    found = Sites.of(place) or sae.info.sites
    if found is None:
        raise ConfigError(
            [("sites", f"are missing: {type(sae).__name__} does not say where in the model it belongs; give a hook's "
              "name, a saekit.Site or saekit.Sites")], _WHAT,
        )  # fmt: skip
    if not isinstance(found, Sites):
        raise ConfigError([("sites", f"must be a hook's name, a Site or Sites, found {short(place)}")], _WHAT)
    return found
