"""What looks wrong with an SAE in a model, though it runs."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING

from saekit.abilities import HasOtherNames, StatesProcessing
from saekit.errors import ConfigError
from saekit.plugins.building import origin_of
from saekit.protocols import ModelBackend
from saekit.site import Sites

if TYPE_CHECKING:
    from torch import Tensor

    from saekit.sae.module import SAEModule

__all__ = ["begin_with_bos", "doubt_of_bos", "doubts_of_fit", "kind_of", "model_name_of"]


def doubts_of_fit(
    sae: SAEModule,
    backend: ModelBackend,
    *,
    sites: Sites | None = None,
    prepend_bos: bool | None = None,
    masked: bool = False,
) -> list[str]:
    """What looks wrong with ``sae`` in this model, in words.

    That it was trained on another, on one whose weights were processed in another way as it was loaded, so that the
    hooks of ``sites`` (None: its own) held something else, with another BOS, or, unless a mask is there now
    (``masked``), on tokens that one chose.
    """
    about, found = sae.info.metadata, []
    trained_on, place = _named(about), _place(sae)
    if trained_on is not None and not _are_same(trained_on, backend):
        found.append(
            f"{place} was trained on activations of {trained_on!r}, and this model is {backend.name!r}; of another "
            "model its features mean nothing"
        )
    found += _of_processing(sae, backend, sites or sae.info.sites)
    if prepend_bos is not None and (said := doubt_of_bos(sae, prepend_bos)) is not None:
        found.append(said)
    if (column := about.get("mask_column")) and not masked:
        found.append(
            f"{place} was trained on tokens that the column {column!r} of its data chose, and none is read here: all "
            "that its other choices keep count. Give a mask (mask=) to leave out others"
        )
    return found


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


def _of_processing(sae: SAEModule, backend: ModelBackend, sites: Sites | None) -> list[str]:
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
    kind = about.get("model_class_name")
    trained = "a model" if not isinstance(kind, str) else f"a model loaded as {kind}"
    return [
        f"{_place(sae)} was trained on {trained}, with {_all_said(then)}, and this one, as {kind_of(backend)} has it, "
        f"is with {_all_said(now)}: {' and '.join(map(repr, hooks))} holds something else than what the SAE has "
        "learned. Load the model as in training: by the backend and with the options that the SAE names"
    ]


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


def _plain(name: str) -> str:
    """The last part of a name or folder, in small letters: ``openai-community/GPT2`` is ``gpt2``.

    A folder of the Hub's cache is the model that it holds.
    """
    if (cached := re.search(r"models--(?:[^/\\]*--)?([^/\\]+)[/\\]snapshots", name)) is not None:
        return cached.group(1).lower()
    return re.split(r"[/\\]", name.rstrip("/\\"))[-1].lower()
