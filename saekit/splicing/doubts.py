"""What looks wrong with an SAE in a model, though it runs."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING

import attrs

from saekit.abilities import HasOtherNames, StatesProcessing
from saekit.errors import ConfigError
from saekit.plugins.building import origin_of
from saekit.protocols import ModelBackend
from saekit.site import Sites
from saekit.splicing.places import hold_the_same, own_site

if TYPE_CHECKING:
    from torch import Tensor

    from saekit.sae.module import SAEModule

__all__ = ["Doubt", "begin_with_bos", "doubt_of_bos", "doubts_of_fit", "doubts_of_place", "kind_of", "model_name_of"]

_OLDER = "model_autocast"  # all SAEs that saekit has trained say it, and those of others do not
_ROUNDED = 0.01  # the numbers of a fingerprint differ by less where weights are rounded to bfloat16


@attrs.frozen
class Doubt:
    """That activations may not be those that an SAE has learned."""

    text: str
    certain: bool = True
    """Whether they surely are others; else they may be the same."""


def doubts_of_fit(
    sae: SAEModule,
    backend: ModelBackend,
    *,
    sites: Sites | None = None,
    prepend_bos: bool | None = None,
    masked: bool | None = False,
) -> list[str]:
    """What looks wrong with ``sae`` in this model, in words.

    That it was trained on another, at another site than one of ``sites`` (None: its own) that holds something else, on
    a model whose weights were processed in another way as it was loaded, so that these sites held something else, with
    another BOS, or, unless a mask is there now (``masked``; None: none can be given), on tokens that one chose.
    """
    about, place = sae.info.metadata, _place(sae)
    found = [one.text for one in doubts_of_place(sae, backend, sites)]
    if prepend_bos is not None and (said := doubt_of_bos(sae, prepend_bos)) is not None:
        found.append(said)
    if (column := about.get("mask_column")) and not masked:
        found.append(
            f"{place} was trained on tokens that the column {column!r} of its data chose, and none is read here: all "
            f"that its other choices keep count{'' if masked is None else '. Give a mask (mask=) to leave out others'}"
        )
    return found


def doubts_of_place(sae: SAEModule, backend: ModelBackend, sites: Sites | None = None) -> list[Doubt]:
    """Of these, those that are not of the tokens: there, activations are not those that ``sae`` has learned."""
    found = _of_model(sae, backend) or _of_sites(sae, backend, sites)
    return found + _of_processing(sae, backend, sites or sae.info.sites)


def _of_model(sae: SAEModule, backend: ModelBackend) -> list[Doubt]:
    """That it was trained on another model, as names and weights say."""
    about = sae.info.metadata
    trained_on, weights = _named(about), about.get("model_fingerprint")
    if trained_on is None or _are_same(trained_on, backend):
        return _of_weights(sae, backend)
    if isinstance(weights, str) and weights == backend.fingerprint():
        return []
    said = f"{_place(sae)} was trained on activations of {trained_on!r}, and this model is {backend.name!r}"
    if weights is None and (_is_path(trained_on) or _is_path(backend.name)):
        told = f"{said}, which may be another name of it: if they are two models, features mean nothing here"
        return [Doubt(told, certain=False)]
    return [Doubt(f"{said}; of another model its features mean nothing")]


def _of_weights(sae: SAEModule, backend: ModelBackend) -> list[Doubt]:
    """That a model of this name, loaded in this way, had other weights in training: one was trained further."""
    about = sae.info.metadata
    processing = dict(backend.processing()) if isinstance(backend, StatesProcessing) else None
    loaded_alike = about.get("model_class_name") == kind_of(backend) and about.get("model_processing") == processing
    if not loaded_alike or not _differ(about.get("model_fingerprint"), backend.fingerprint()):
        return []
    name = _named(about)
    trained_on = "a model" if name is None else repr(name)
    return [Doubt(
        f"{_place(sae)} was trained on {trained_on} with other weights than those of this model, {backend.name!r}: one "
        "of the two was trained further, is another version, or is arranged otherwise by another version of its "
        "library; its features may mean something else here. Give the model that it was trained on",
        certain=False,
    )]  # fmt: skip


def _differ(then: object, now: str | None) -> bool:
    """Whether two fingerprints are of different weights; what cannot be read as numbers tells nothing."""
    if not isinstance(then, str) or now is None or then == now:
        return False
    try:
        pairs = zip(map(float, then.split()), map(float, now.split()), strict=True)
        return any(abs(one - other) > _ROUNDED for one, other in pairs)
    except ValueError:  # a plugin's own, or of another number of weights
        return False


def _of_sites(sae: SAEModule, backend: ModelBackend, sites: Sites | None) -> list[Doubt]:
    """That it stands where the model holds something else than where it was trained."""
    own = sae.info.sites
    if own is None or sites is None or own == sites or not sae.info.metadata:  # of what was made, nothing was learned
        return []
    moved = []
    both = (zip(own.inputs, sites.inputs, strict=False), zip(own.targets, sites.targets, strict=False))
    for then, now in dict.fromkeys(pair for pairs in both for pair in pairs):
        there = own_site(then, backend)  # None: the model has no such place, or nobody knows it
        if there is not None and not hold_the_same(there, now, backend):
            moved.append((then.name, now.name))
    if not moved:
        return []
    then_named, now_named = (" and ".join(names) for names in zip(*moved, strict=True))
    return [Doubt(
        f"an SAE that was trained at {then_named} is put at {now_named}, where {backend.name!r} holds something else; "
        "its features may mean nothing there: leave the site out, or take an SAE that was trained at this one"
    )]  # fmt: skip


def doubt_of_bos(sae: SAEModule, begins: bool) -> str | None:
    """That contexts begin with BOS, or do not, as they did not in training; None: it is the same, or not known."""
    before = sae.info.metadata.get("prepend_bos")
    if not isinstance(before, bool) or before == begins:
        return None
    return (
        f"{_place(sae)} was trained on contexts that {_begin(before)} (prepend_bos = {_said(before)}), and here they "
        f"{_begin(begins)} (prepend_bos = {_said(begins)}); activations differ, at the first positions most"
    )


def begin_with_bos(tokens: Tensor, backend: ModelBackend) -> bool | None:
    """Whether contexts ``[b, t]`` begin with BOS, all of them; None: the model has none, or padding comes first."""
    bos, pad = backend.special_tokens.get("bos"), backend.special_tokens.get("pad")
    if bos is None or tokens.ndim != 2 or not tokens.numel():
        return None
    first = tokens[:, 0]
    if pad is not None and pad != bos:
        first = first[first != pad]
    return bool((first == bos).all()) if len(first) else None


def model_name_of(sae: SAEModule, option: str = "model") -> str:
    """The name of the model that ``sae`` says it was trained on.

    ``option`` is what a user gives instead; :class:`saekit.errors.ConfigError` names it where ``sae`` does not say.
    """
    name = _named(sae.info.metadata)
    if name is None:
        raise ConfigError(
            [(option, "is missing: the SAE does not say which model it was trained on (model_name in its "
              f"metadata). Give {option}: a name, a folder or a model that you have loaded")]
        )  # fmt: skip
    return name


def _place(sae: SAEModule) -> str:
    return "the SAE" if sae.info.sites is None else f"the SAE at {sae.info.sites.name}"


def _begin(with_bos: bool) -> str:
    return "begin with BOS" if with_bos else "do not begin with BOS"


def _said(value: bool) -> str:
    return str(value).lower()


def _of_processing(sae: SAEModule, backend: ModelBackend, sites: Sites | None) -> list[Doubt]:
    """That hooks hold something else than in training, since weights were folded or centered, and now are not."""
    if sites is None or not isinstance(backend, StatesProcessing):
        return []
    about = sae.info.metadata
    then: dict[str, bool] = {}
    now: dict[str, bool] = {}
    hooks = []
    for hook in dict.fromkeys(site.hook_name for site in sites.all):
        here, there = backend.processing(hook), backend.processing(hook, about)
        if other := [name for name in here if name in there and here[name] != there[name]]:
            hooks.append(hook)
            now |= {name: here[name] for name in other}
            then |= {name: there[name] for name in other}
    if not hooks:
        return []
    kind, at = about.get("model_class_name"), " and ".join(map(repr, hooks))
    trained = "a model" if not isinstance(kind, str) else f"a model loaded as {kind}"
    this = f"this one, as {kind_of(backend)} has it, is with {_all_said(now)}"
    if _OLDER in about and "model_processing" not in about:
        told = (
            f"{_place(sae)} was trained on {trained}, by default with {_all_said(then)}; it is of an older saekit, and "
            f"does not say whether it was so. As {this}, {at} may hold something else than what it has learned"
        )
        return [Doubt(told, certain=False)]
    return [Doubt(
        f"{_place(sae)} was trained on {trained}, with {_all_said(then)}, and {this}: {at} holds something else than "
        "what the SAE has learned. Load the model as in training: by the backend and with the options that it names"
    )]  # fmt: skip


def kind_of(backend: ModelBackend) -> str:
    """What a backend is called in configurations; of one that nobody registered, its class."""
    origin = origin_of(backend)
    return type(backend).__name__ if origin is None else origin.entry.name


def _all_said(values: Mapping[str, bool]) -> str:
    return ", ".join(f"{name} = {_said(value)}" for name, value in values.items())


# ---- names of models


def _named(about: Mapping[str, object]) -> str | None:
    """None for a model that has no name, which transformer_lens calls custom."""
    name = about.get("model_name")
    return name if isinstance(name, str) and name not in ("", "custom") else None


def _are_same(name: str, backend: ModelBackend) -> bool:
    if backend.name in ("", "custom"):  # nobody knows
        return True
    wanted = _plain(name)
    if wanted == _plain(backend.name):
        return True
    others = backend.other_names() if isinstance(backend, HasOtherNames) else ()
    return wanted in map(_plain, others)


def _is_path(name: str) -> bool:
    """Whether it is a place on a disk, and no name of the Hub's, which is ``model`` or ``owner/model``."""
    return "\\" in name or name.count("/") > 1 or name[:1] in ".~/"


def _plain(name: str) -> str:
    """The last part of a name or folder, in small letters: ``openai-community/GPT2`` is ``gpt2``.

    A folder of the Hub's cache is the model that it holds.
    """
    if (cached := re.search(r"models--(?:[^/\\]*--)?([^/\\]+)[/\\]snapshots", name)) is not None:
        return cached.group(1).lower()
    return re.split(r"[/\\]", name.rstrip("/\\"))[-1].lower()
