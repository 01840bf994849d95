"""``saekit.dashboard``: a page of features that opens from disk.

As in :mod:`saekit.commands.jobs`, what does the work is imported when what can be seen to be wrong has been looked at.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from saekit.commands.beforehand import check_collecting
from saekit.commands.effects import effects_of
from saekit.commands.features import check_features
from saekit.commands.looking import checked_seed
from saekit.commands.stores import named_of, store_of
from saekit.dashboards.choosing import Choice, check_choice, chosen
from saekit.dashboards.effects import check_asked
from saekit.dashboards.place import check_page, page_in, write_page
from saekit.errors import ConfigError
from saekit.files.paths import as_path
from saekit.files.storage import check_file, read_json
from saekit.plugins.manager import PluginManager, default_manager
from saekit.plugins.text import short

if TYPE_CHECKING:
    from saekit.dashboards.data import Look
    from saekit.dashboards.effects import PageEffects
    from saekit.features.feature import Feature
    from saekit.features.store import FeatureStore
    from saekit.features.windows import Width
    from saekit.status import Status

__all__ = ["check_fit", "check_said", "dashboard", "labels_in", "labels_of", "names_of", "sizes_of"]

_PAGE = "dashboard.html"
_LONG = 10.0  # seconds
_LABELS = 'it would say {"3": "quotes", "17": "ends of lines"}, or that by the names of SAEs'
_DIGITS = 18  # of a number that is looked at
_MORE = 10**_DIGITS


def dashboard(
    what: object,
    *,
    features: Iterable[int] | Mapping[str, Iterable[int]] | str | None = None,
    random: int | None = None,
    top_by: str | None = None,
    count: int | None = None,
    sae: str | None = None,
    out: str | Path | None = None,
    window: Width = (10, 10),
    top: int = 20,
    quantiles: int = 5,
    per_quantile: int = 5,
    labels: Mapping[int, str] | Mapping[str, Mapping[int, str]] | None = None,
    title: str | None = None,
    seed: int = 0,
    loss_effects: str | None = "auto",
    overwrite: bool = False,
    folder: str | Path | None = None,
    verbose: bool = True,
    plugins: PluginManager | None = None,
    **collecting: Any,
) -> Path:
    """Write a page of features, one HTML file that needs no network, and return its path.

    ``what`` is a feature store, one SAE of it, or its folder; or what :func:`saekit.collect_features` takes.  Then the
    store is ``folder``, or beside the SAE: it is opened where it is there, and else collected first, by ``collecting``,
    which are options of that function (``model``, ``n_contexts``, ...); one that was made with others is refused.

    ``features`` are the numbers of those that are shown, for every SAE or by their names, or ``"all"``; ``random``
    draws so many of those that fire; ``top_by`` takes the ``count`` that fire most often (``"firing"``), most strongly
    (``"activation"``), or raise a logit most (``"logit"``).  Left out, it is 50 at random.  ``sae`` names one of
    several SAEs.  ``labels`` are what people call features, shown or not, by number, or by SAEs' names and numbers.

    Of each feature it has the ``top`` largest activations and ``per_quantile`` texts from each of ``quantiles``
    intervals, with so many tokens before and after (``window``; None: the whole context), drawn by ``seed``.
    ``loss_effects`` is how it tells what removing a feature does to the loss (see
    :class:`saekit.analysis.loss_effects.LossEffects`): ``"exact"``, as by default of SAEs, ``"direct"``, or None.
    The page is ``out``, or ``dashboard.html`` beside the store.  A dashboard there is replaced; another file only with
    ``overwrite``, and a store never.  :class:`saekit.errors.SaekitError` for what does not fit.
    """
    choice = Choice(features=_listed(features), random=random, top_by=top_by, count=count, seed=checked_seed(seed))
    place, sae = _checked(choice, loss_effects, (title, labels, sae), out, overwrite), named_of(what, sae)
    check_collecting(what, folder, collecting)
    from saekit.dashboards.data import Look
    from saekit.dashboards.page import page_data, page_html
    from saekit.status import Status

    look = Look(top=top, quantiles=quantiles, per_quantile=per_quantile, window=window, seed=choice.seed)
    fits = functools.partial(check_fit, sae=sae, features=choice.features, labels=labels)  # before collecting
    store = store_of(what, folder, collecting, verbose=verbose, plugins=plugins, check=fits)
    if place is None:
        check_page(place := store.folder.absolute().parent / _PAGE, overwrite=overwrite)
    shown = _chosen(store, names := names_of([*store.saes], sae), choice)
    known = labels_of(labels, sizes_of(store, names))
    with Status(verbose=verbose) as say:
        effects = effects_of(what, store, names, loss_effects, collecting, plugins or default_manager(), say)
        _tell_ahead(effects, shown, look, say)
        write_page(place, page_html(page_data(store, shown, look, effects=effects, labels=known, title=title)))
    return place


def _listed(features: Any) -> Any:
    """``features`` with lists for sets, indices, tensors and whatever else gives numbers, perhaps only once."""
    if isinstance(features, Mapping):
        return {name: _listed(own) for name, own in features.items()}
    if isinstance(features, (str, bytes)) or not isinstance(features, Iterable):
        return features
    found = features.tolist() if hasattr(features, "tolist") else list(features)
    return found if isinstance(found, list) else [found]


def _checked(
    choice: Choice, loss_effects: object, said: tuple[object, object, object], out: str | Path | None, overwrite: bool
) -> Path | None:
    """Where the page goes, if that is said, after what can be seen to be wrong without torch."""
    check_choice(choice)
    check_asked(loss_effects)
    check_said(*said)
    place = None if out is None else page_in(as_path(out))
    if place is not None:
        check_page(place, overwrite=overwrite)
    return place


def check_said(title: object, labels: object, sae: object) -> None:
    """:class:`ConfigError` for what cannot be a title, labels, or the name of an SAE, whatever the store has."""
    if title is not None and not _is_text(title):
        raise ConfigError([("title", f"must be a text that is valid Unicode, found {short(title)}")])
    if sae is not None and not (isinstance(sae, str) and sae):
        raise ConfigError([("sae", f"must be the name of an SAE, found {short(sae)}")])
    if labels is None:
        return
    if not isinstance(labels, Mapping):
        raise ConfigError([("labels", f"must be a mapping of numbers to texts, found {type(labels).__name__}")])
    by_name = _are_by_name(labels)
    if by_name and (odd := [name for name, one in labels.items() if not isinstance(one, Mapping)]):
        raise ConfigError([("labels", f"must be a mapping of numbers to texts for {odd[0]!r}, as for others")])
    for own in labels.values() if by_name else [labels]:
        for entry in own.items():
            _label(entry)


def _are_by_name(labels: Mapping[Any, Any]) -> bool:
    return any(isinstance(one, Mapping) for one in labels.values())


def _is_text(value: object) -> bool:
    """Whether it is a text that can be written: one with half of a surrogate pair cannot."""
    return isinstance(value, str) and not any("\ud800" <= character <= "\udfff" for character in value)


def _tell_ahead(
    effects: Mapping[str, PageEffects], features: Mapping[str, Sequence[Feature]], look: Look, say: Status
) -> None:
    """Compute the effects of all features of a page, many at once."""
    from saekit.progress import Counted

    for name, own in effects.items():
        said, number = f"computing what removing features of {name} does to the loss", len(features[name])
        say.rest()
        with Counted(number, said, "features", verbose=say.verbose) as report:
            own.ahead(features[name], look, report, functools.partial(_tell_how_long, say, own.of.kind))
    say("writing the page")


def _tell_how_long(say: Status, kind: str, seconds: float) -> None:
    """Where it takes long, what is quicker."""
    if seconds < _LONG:
        return
    quicker = "--no-loss-effects leaves that out (loss_effects=None)"
    if kind == "exact":
        quicker = f"--loss-effects direct is quicker (loss_effects='direct'), and {quicker}"
    say.line(f"what removing features does to the loss takes about {seconds / 60:,.1f} min more: {quicker}")


def names_of(known: Sequence[str], name: str | None) -> list[str]:
    """The SAEs of a store, of those ``known``, that are shown: all, or the one of that name."""
    if name is None:
        return [*known]
    if name not in known:
        raise ConfigError([("sae", f"must be one of the store's, {', '.join(known)}; found {name!r}")])
    return [name]


def sizes_of(store: FeatureStore, names: Sequence[str]) -> dict[str, int]:
    """How many features the SAEs ``names`` of a store have, those that were not collected among them."""
    return {name: store.saes[name].about.d_sae for name in names}


def check_fit(sizes: Mapping[str, int], sae: str | None, features: object, labels: object) -> None:
    """:class:`ConfigError` for what SAEs with so many features have not, as is seen before these are collected."""
    names = names_of([*sizes], sae)
    own = {name: sizes[name] for name in names}
    check_features(features, own)
    labels_of(labels, own)


def _chosen(store: FeatureStore, names: Sequence[str], choice: Choice) -> dict[str, list[Feature]]:
    """The features of each SAE that a page shows."""
    features = choice.features
    if isinstance(features, Mapping) and (unknown := [name for name in features if name not in names]):
        raise ConfigError([("features", f"names {unknown[0]!r}, and the SAEs are {', '.join(names)}")])
    return {name: chosen(store.saes[name], choice) for name in names}


def labels_of(labels: Any, sizes: Mapping[str, int]) -> dict[str, dict[int, str]]:
    """By SAE and number, of SAEs with so many features."""
    names = [*sizes]
    if labels is None:
        return {}
    if _are_by_name(labels):
        if unknown := [name for name in labels if name not in names]:
            raise ConfigError([("labels", f"names {short(unknown[0])}, and the SAEs are {', '.join(names)}")])
        by_name = labels
    elif len(names) == 1 or not labels:
        by_name = dict.fromkeys(names, labels)
    else:
        raise ConfigError([("labels", f"must be by the SAEs' names, {', '.join(names)}, where there are several")])
    return {name: dict(_label_in(one, name, sizes[name]) for one in own.items()) for name, own in by_name.items()}


def _label(entry: tuple[Any, Any]) -> tuple[int, str]:
    """A number, and what people call the feature."""
    number, text = entry
    index = _index(number)
    if index is None or not _is_text(text):
        raise ConfigError(
            [("labels", f"must be texts by the numbers of features, found {{{short(number)}: {short(text)}}}")]
        )
    return index, text


def _label_in(entry: tuple[Any, Any], name: str, d_sae: int) -> tuple[int, str]:
    index, text = _label(entry)
    if not 0 <= index < d_sae:
        raise ConfigError([("labels", f"are of features 0 to {d_sae - 1:,} of {name}, found {short(entry[0])}")])
    return index, text


def _index(number: Any) -> int | None:
    """The number that a key of JSON, or a whole number of any kind, is."""
    if isinstance(number, str):
        fits = number.isascii() and number.isdecimal()
        return int(number[-_DIGITS:]) if fits and not number[:-_DIGITS].strip("0") else _MORE if fits else None
    return operator.index(number) if hasattr(number, "__index__") and not isinstance(number, bool) else None


def labels_in(path: str) -> Any:
    """What a JSON file of labels says."""
    place = as_path(path)
    try:
        check_file(place)
        return read_json(place)
    except FileNotFoundError:
        raise ConfigError([("labels", f"there is no file {path!r}; {_LABELS}")]) from None
    except (OSError, ValueError) as error:
        raise ConfigError([("labels", f"{path!r} cannot be read as JSON: {error}; {_LABELS}")]) from error
