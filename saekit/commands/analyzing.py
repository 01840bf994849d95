"""``saekit.feature_statistics`` and ``saekit.token_set_enrichment``: what the weights of SAEs tell, without text.

As in :mod:`saekit.commands.jobs`, what does the work is imported when what can be seen to be wrong has been looked at.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from saekit.commands.beforehand import check_named
from saekit.commands.material import Material, Text
from saekit.commands.preflight import check_writable
from saekit.commands.stores import store_given, which_of
from saekit.commands.subjects import Subject, subjects_of, the_one
from saekit.errors import ConfigError, ModelError, PlaceError, SaekitError
from saekit.files.paths import as_path
from saekit.plugins.manager import PluginManager, default_manager
from saekit.site import Site, Sites

if TYPE_CHECKING:
    from pandas import DataFrame

    from saekit.analysis.directions import LogitPath
    from saekit.analysis.tsea import Enrichment
    from saekit.features.store import FeatureStore

__all__ = ["feature_statistics", "opened_store", "table_place", "token_set_enrichment", "write_table"]


def feature_statistics(
    saes: object,
    *,
    model: object | None = None,
    site: Site | Sites | str | None = None,
    fractions: Mapping[str, Any] | Any | None = None,
    logits: bool = True,
    device: str = "auto",
    verbose: bool = True,
    plugins: PluginManager | None = None,
) -> DataFrame:
    """A table with a row for each feature of each of ``saes``, which are given as for :func:`saekit.evaluate`.

    - ``sae``, ``hook``, ``feature``, and ``layer``: how many blocks come before what the SAE reads;
    - ``log_feature_sparsity``: log10 of the fraction of tokens on which it fires, -inf if on none; ``dead``: whether
      that is so.  They are of the last window of training, unless ``fractions [d_sae]`` are given, of several SAEs by
      name, or a :class:`saekit.FeatureStore` of them, whose text they are of then;
    - ``encoder_decoder_cosine``: of its column of ``W_enc`` and its row of ``W_dec``; ``b_enc``; ``b_dec_projection``:
      ``b_dec`` times its row of ``W_dec``;
    - ``logit_mean``, ``logit_std``, ``logit_skewness``, ``logit_kurtosis``: over the vocabulary, of what it adds to the
      logits, ``W_dec W_U``, through ``W_O`` at ``hook_z`` and ``W_out`` inside an MLP; the kurtosis of a normal
      distribution is 3.  ``logits=False`` leaves them out, and no model is loaded.

    What cannot be said is NaN, and ``attrs["left_out"]`` of the table says why, by SAE and column.  ``model`` is a
    name, a loaded model, or what :func:`saekit.load_model` returned; left out, that of each SAE.  Memory does not grow
    with features times vocabulary.  A :class:`saekit.FeatureStore`, or its folder, in the place of ``saes`` is read
    alone: no SAE and no model is needed, and the table is of the features in it.  Raises
    :class:`saekit.errors.SaekitError` for what cannot be found or does not fit.
    """
    plugins = plugins or default_manager()
    (alone,) = saes if isinstance(saes, (list, tuple)) and len(saes) == 1 else (saes,)
    if (store := store_given(alone)) is not None:
        _only_of_saes({"model": model, "site": site, "fractions": fractions})
        name = which_of(alone)
        chosen = store.saes if name is None else {name: store.saes[name]}
        return _joined({name: one.statistics(logits=logits) for name, one in chosen.items()})
    check_named(saes)
    from saekit.devices import resolve_device
    from saekit.status import Status

    with Status(verbose=verbose) as say:
        say("reading the SAEs")
        subjects = subjects_of(saes, plugins, device=resolve_device(device, "device"))
        given = _by_name(fractions, subjects)
        material = Material(plugins, Text(), model=model, device=device, say=say)
        paths = {name: _path(one, material, site, logits) for name, one in subjects.items()}
    sites = {name: _sites(one, site) for name, one in subjects.items()}
    return _tables(subjects, sites, paths, given, verbose)


def _tables(
    subjects: Mapping[str, Subject],
    sites: Mapping[str, Sites | None],
    paths: Mapping[str, LogitPath | str],
    fractions: Mapping[str, Any],
    verbose: bool,
) -> DataFrame:
    """The tables of all, one below the other."""
    from saekit.analysis.feature_statistics import statistics_table
    from saekit.progress import Counted

    tables = dict[str, Any]()
    total = sum(one.sae.d_sae for one in subjects.values())
    with Counted(total, "looking at features", "features", verbose=verbose) as report:
        for name, one in subjects.items():
            tables[name] = statistics_table(
                one.sae, name=name, sites=sites[name], path=paths[name], fractions=fractions.get(name), report=report
            )
    return _joined(tables)


def _joined(tables: Mapping[str, DataFrame]) -> DataFrame:
    """One below the other."""
    import pandas as pd

    left_out = {name: why for name, own in tables.items() if (why := own.attrs.pop("left_out"))}
    every = [*tables.values()]
    whole = pd.concat(every, ignore_index=True) if len(every) > 1 else every[0]
    for column in ("sae", "hook"):
        whole[column] = whole[column].astype("category")
    whole.attrs["left_out"] = left_out
    return whole


def opened_store(folder: str | None) -> FeatureStore | None:
    """The feature store that a command line names; None: none is named."""
    from saekit.features.store import FeatureStore

    return None if folder is None else FeatureStore.open(folder)


def _only_of_saes(options: Mapping[str, Any]) -> None:
    for name, value in options.items():
        if value is not None:
            raise ConfigError([(name, "is for SAEs: a feature store has the numbers of its own model and text")])


def _by_name(fractions: Any, subjects: Mapping[str, Subject]) -> dict[str, Any]:
    from saekit.features.store import FeatureStore

    if fractions is None:
        return {}
    if isinstance(fractions, FeatureStore):
        from saekit.features.statistics import fractions_of

        return {name: fractions_of([*fractions.saes.values()], one.sae, name) for name, one in subjects.items()}
    if not isinstance(fractions, Mapping):
        if len(subjects) > 1:
            told = f"must be a mapping of the names {', '.join(subjects)}, where there are several SAEs"
            raise ConfigError([("fractions", told)])
        return {next(iter(subjects)): fractions}
    if unknown := sorted(set(fractions) - set(subjects)):
        raise ConfigError([("fractions", f"are of {unknown[0]!r}, and the SAEs are {', '.join(subjects)}")])
    return dict(fractions)


def _sites(subject: Subject, site: Site | Sites | str | None) -> Sites | None:
    if isinstance(site, str):
        site = Site(hook_name=site)
    return Sites.one(site) if isinstance(site, Site) else site or subject.sae.info.sites


def _path(subject: Subject, material: Material, site: Site | Sites | str | None, logits: bool) -> LogitPath | str:
    """The way to the logits; or why there is none: of a model that is not known, that too."""
    from saekit.analysis.directions import logit_path
    from saekit.splicing.fits import fitting_sites

    if not logits:
        return "not asked for"
    sites = _sites(subject, site)
    if sites is None:
        return "the SAE does not say where in the model it belongs"
    if material.model is not None:
        fitting_sites(subject.sae, backend := material.model_of(subject), sites)
        return logit_path(subject.sae, backend, sites)
    try:
        backend = material.model_of(subject)
    except SaekitError as error:
        raise ModelError(f"{error}. logits=False (--no-logits) looks at the weights alone") from error
    fitting_sites(subject.sae, backend, sites)
    return logit_path(subject.sae, backend, sites)


def table_place(path: str | Path) -> Path:
    """Where a table goes; :class:`PlaceError` for a name that is neither ``.csv`` nor ``.parquet``, and for a folder
    in which nothing can be written."""
    place = as_path(path)
    if place.suffix not in (".csv", ".parquet"):
        raise PlaceError(f"a table is written as .csv or .parquet, found {str(place)!r}")
    if place.is_dir():
        raise PlaceError(f"{str(place)!r} is a folder: name a file for the table")
    check_writable(str(place.parent), f"cannot write the table {str(place)!r}: {{}}")
    return place


def write_table(table: DataFrame, path: str | Path) -> Path:
    """Write a table as its name says, ``.csv`` or ``.parquet``, whole or not at all."""
    from io import BytesIO

    from saekit.files.storage import write_bytes

    place = table_place(path)
    if place.suffix == ".csv":
        data = table.to_csv(index=False).encode()
    else:
        packed = BytesIO()
        table.to_parquet(packed, index=False)
        data = packed.getvalue()
    write_bytes(place, data)
    return place


def token_set_enrichment(
    sae: object,
    sets: Mapping[str, Any] | Iterable[str] | str | None = None,
    *,
    model: object | None = None,
    features: Sequence[int] | str = "skewed",
    k: int = 100,
    fractions: Any | None = None,
    regex: Mapping[str, str] | None = None,
    names: Iterable[str] | None = None,
    tagger: Any | None = None,
    permutations: int = 1000,
    min_size: int = 5,
    seed: int = 0,
    site: Site | Sites | str | None = None,
    out: str | Path | None = None,
    device: str = "auto",
    verbose: bool = True,
    plugins: PluginManager | None = None,
) -> Enrichment:
    """Which sets of tokens the features of an SAE promote or suppress: token set enrichment analysis (TSEA).

    ``sae`` is an SAE, what :func:`saekit.train` returned, a folder, a run, or ``RELEASE:ID``.  ``sets`` are kinds
    (``first_letter``, ``capitals``, ``digits``, ``punctuation``, ``space``, ``names``, ``part_of_speech``; left out,
    all but the last) and files, which :func:`saekit.analysis.tsea.read_token_sets` reads; or a mapping of names to ids
    of tokens or their whole texts.  ``regex`` are patterns of further sets by name, ``names`` first names in the place
    of those that ship, ``tagger`` has ``tag([word])`` in the place of nltk's.

    ``features`` are numbers, ``"all"``, or ``k`` of them: ``"skewed"``, whose logits are skewed most to the right, or
    ``"random"``, both of those that fire: in the last window of training, or by ``fractions [d_sae]``, or a
    :class:`saekit.FeatureStore` that has the SAE.  Sets of fewer than ``min_size`` tokens get no score.  For
    ``permutations`` and ``seed`` see :func:`saekit.analysis.tsea.enrich`.  ``out`` is a folder for a page and tables.

    What is returned has ``table()``, ``scores`` and ``signed_scores``, ``manhattan()``, ``overlay(feature)`` and
    ``write(folder)``.  Raises :class:`saekit.errors.SaekitError` for what cannot be found or does not fit.
    """
    plugins = plugins or default_manager()
    _check_enrichment(sae, sets, regex, permutations, min_size, out)
    from saekit.analysis.tsea import check_features, enrich, rows_of_work
    from saekit.devices import resolve_device
    from saekit.progress import Counted
    from saekit.status import Status

    with Status(verbose=verbose) as say:
        say("reading the SAE")
        subject = the_one(sae, plugins, device=resolve_device(device, "device"))
        name = subject.name
        check_features(features, k, subject.sae.d_sae)
        fired = _by_name(fractions, {name: subject}).get(name)
        backend = Material(plugins, Text(), model=model, device=device, say=say).model_of(subject)
        say("choosing sets of tokens")
        chosen = _sets(sets, backend, regex, names, tagger)
    with Counted(
        rows_of_work(subject.sae, features, k, permutations), "ordering tokens", "rows", verbose=verbose
    ) as report:
        found = enrich(
            subject.sae, chosen, backend=backend, sites=_sites(subject, site), features=features, k=k,
            fractions=fired, permutations=permutations, min_size=min_size, seed=seed, name=name, report=report,
        )  # fmt: skip
    return _written(found, out)


def _written(found: Enrichment, out: str | Path | None) -> Enrichment:
    if out is not None:
        found.write(out)
    return found


def _check_enrichment(
    sae: object, sets: Any, regex: Mapping[str, str] | None, permutations: int, min_size: int, out: str | Path | None
) -> None:
    """What can be seen to be wrong before an SAE or a model is read."""
    from saekit.analysis.token_set_files import check_asked, check_numbers

    check_named(sae)
    check_numbers(permutations, min_size)
    named = [] if sets is None or isinstance(sets, Mapping) else [sets] if isinstance(sets, str) else [*sets]
    check_asked(named, regex)
    if out is not None:
        check_writable(str(as_path(out)), f"cannot write token set enrichment into {str(out)!r}: {{}}")


def _has_texts(given: object) -> bool:
    """Whether a set lists texts of tokens, and not their ids alone."""
    return isinstance(given, (list, tuple)) and any(isinstance(one, str) for one in given)


def _sets(
    sets: Any, backend: Any, regex: Mapping[str, str] | None, names: Iterable[str] | None, tagger: Any
) -> Mapping[str, Any]:
    from saekit.analysis.token_set_files import sets_of
    from saekit.analysis.token_sets import vocabulary_of
    from saekit.analysis.tsea import chosen_sets, token_sets

    if isinstance(sets, Mapping):
        named = {name: given for name, given in sets.items() if _has_texts(given)}
        found = sets_of(named, backend, "sets", lambda told: ConfigError([("sets", told)]))
        return {**sets, **found, **(token_sets(backend, (), regex=regex) if regex else {})}
    asked = [sets] if isinstance(sets, str) else None if sets is None else [*sets]
    return chosen_sets(vocabulary_of(backend), asked, regex=regex, names=names, tagger=tagger)
