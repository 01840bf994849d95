"""``saekit export``: a feature store as files that others read.

As in :mod:`saekit.commands.jobs`, what does the work is imported when what can be seen to be wrong has been looked at.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs

from saekit.commands.stores import is_store, named_of, store_beside
from saekit.errors import ConfigError, DataError
from saekit.exports.naming import NeuronpediaName
from saekit.exports.settings import SCHEMAS, Choice, Credits, Settings
from saekit.files.paths import as_path
from saekit.pretrained.catalog import Catalog, find_sae

if TYPE_CHECKING:
    from saekit.features.store import FeatureStore, SAEFeatures

__all__ = ["export_delphi", "export_neuronpedia", "name_of", "neuronpedia_name"]


def export_neuronpedia(
    features: object,
    *,
    folder: str | Path | None = None,
    neuronpedia_id: str | None = None,
    schema: str = "saedashboard",
    sae: str | None = None,
    numbers: Sequence[int] | str = "all",
    batch_size: int = 128,
    min_log_fraction: float | None = None,
    top: int = 20,
    quantiles: int = 5,
    per_quantile: int = 5,
    window: tuple[int, int] | None = None,
    seed: int = 0,
    contributions: bool = False,
    attribution: bool = False,
    model: object | None = None,
    weights: object | None = None,
    device: str = "auto",
    about: Mapping[str, str] | None = None,
    overwrite: bool = False,
    verbose: bool = True,
) -> Path:
    """Write features for Neuronpedia, in batches; the folder in which they are.

    ``features`` is a feature store, one SAE of it, its folder, or the run or SAE that it lies beside; ``sae`` is one.
    ``schema`` is that of SAEDashboard today, ``"sae_lens_3"`` that of the runner of 3.0.0, ``"bulk"`` that which
    Neuronpedia imports, for which ``about`` says whose the SAE is (:class:`saekit.exports.settings.Credits`).
    ``neuronpedia_id``, such as ``gpt2-small/8-res-jb``, gives model, layer and set; left out, it is what the SAE says.

    Features that fire on a fraction of ``10 ** min_log_fraction`` of the tokens or less (-6; of 3.0.0: -5) are not
    written, but listed in ``skipped_indexes.json``.  Of others there are the ``top`` windows and ``per_quantile`` from
    each of ``quantiles``, of whole contexts or of ``window`` tokens before and after.

    With ``contributions``, the schema of 3.0.0 says what a feature does at each token, by the direct path; with
    ``attribution``, the others from which tokens an attention brings what makes it active (DFA).  Both need the SAE:
    ``features`` is the run or SAE, or ``weights`` is; and its model, or the one that is given.

    Each batch is there whole or not at all; asked for again, an export goes on where it stopped.  Another one in
    ``folder`` is an error, unless ``overwrite``.  :class:`saekit.errors.SaekitError` for what cannot be found or fit.
    """
    _check(schema, batch_size, min_log_fraction, choice := Choice(top, quantiles, per_quantile, window, seed))
    known = _credits(about or {})
    asked = _asked(contributions, attribution, schema, model=model, weights=weights)
    name = None if neuronpedia_id is None else NeuronpediaName.of(neuronpedia_id)
    store = store_beside(features)
    one = _one_sae(store, named_of(features, sae))
    settings = Settings(
        schema=schema,
        name=neuronpedia_name(one) if name is None else name,
        features=_numbers(numbers),
        batch_size=batch_size,
        min_log_fraction=min_log_fraction,
        choice=choice,
        credits=known,
    )
    told = _told(one, asked, model, features if weights is None else weights, device)
    place = store.folder.with_name(f"{store.folder.name}-neuronpedia") if folder is None else as_path(folder)
    return _written(one, settings, told, place, overwrite, verbose)


def _written(
    one: SAEFeatures, settings: Settings, told: Mapping[str, Any], place: Path, overwrite: bool, verbose: bool
) -> Path:
    from saekit.exports.neuronpedia import NeuronpediaExport
    from saekit.features.windows import check_width

    check_width(settings.choice.window)
    if settings.schema == "saedashboard":
        _ = settings.name.layer_number
    export = NeuronpediaExport(one, settings, **told)
    now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S")
    shown, skipped = export.shown_and_skipped()
    line = f"exporting {len(shown):,} features of {one.name}"
    if skipped:
        line += f"; {len(skipped):,} are skipped, which fire on 10^{settings.least:g} of the tokens or fewer"
    return _counted(len(shown), verbose, line, lambda report: export.write(place, now, report, overwrite=overwrite))


def _counted(features: int, verbose: bool, told: str, write: Callable[[Callable[[int], Any]], Path]) -> Path:
    """What ``write`` gives, which is told how to tell that some more features are done."""
    from saekit.progress import ProgressDisplay

    done = 0
    with ProgressDisplay(features, doing="exporting", unit="features", verbose=verbose) as progress:
        progress.say(told)

        def report(count: int) -> None:
            nonlocal done
            done += count
            progress.update(done)

        return write(report)


def export_delphi(
    features: object,
    *,
    folder: str | Path | None = None,
    module_path: str | None = None,
    model: object | None = None,
    sae: str | None = None,
    n_splits: int = 5,
    overwrite: bool = False,
    verbose: bool = True,
) -> Path:
    """Write a feature store as delphi's cache, ``folder/MODULE/{first}_{last}.safetensors``; the module's folder.

    ``features`` and ``sae`` as for :func:`saekit.export_neuronpedia`.  The store must have every activation of every
    feature.  ``module_path`` is the module's path in transformers, such as ``layers.5``; left out, it is made of the
    hook's name, for which a ``model`` of transformers is needed where that is one of transformer_lens.
    :class:`saekit.errors.SaekitError` for what does not fit.
    """
    if isinstance(n_splits, bool) or not isinstance(n_splits, int) or n_splits < 1:
        raise ConfigError([("n_splits", f"must be a whole number of 1 or more, found {n_splits!r}")])
    store = store_beside(features)
    one = _one_sae(store, named_of(features, sae))
    from saekit.backends.around import as_backend
    from saekit.exports.delphi import DelphiCache, module_path_of
    from saekit.exports.folder import exporting

    if module_path is None:
        if len(one.about.inputs) != 1:
            raise ConfigError([("module_path", f"is missing: {one.name} reads several places, and has no one module")])
        module_path = module_path_of(one.about.inputs[0], None if model is None else as_backend(model))
    cache = DelphiCache(one, module_path, n_splits)
    place = store.folder.with_name(f"{store.folder.name}-delphi") if folder is None else as_path(folder)
    with exporting(place, whole=True):
        told = f"exporting {len(one):,} features of {one.name}, {len(one.dead):,} of which never fire"
        number = one.about.d_sae
        return _counted(number, verbose, told, lambda report: cache.write(place, report, overwrite=overwrite))


def neuronpedia_name(sae: SAEFeatures) -> NeuronpediaName:
    """What the SAE says that Neuronpedia calls it; :class:`ConfigError` where it does not."""
    known = sae.about.metadata.get("neuronpedia_id")
    if not known:
        raise ConfigError(
            [("neuronpedia_id", f"is missing: {sae.name} does not say what Neuronpedia calls it; give it, such as "
              "neuronpedia_id='gpt2-small/8-res-jb' (--id)")]
        )  # fmt: skip
    return NeuronpediaName.of(known)


def name_of(sae: str, which: str | None = None, known: str | None = None) -> NeuronpediaName:
    """A name at Neuronpedia as it is written, or that of the SAE of a feature store, a run, or a release.

    Of a store, ``which`` names one of several SAEs, and ``known`` is what Neuronpedia calls it.
    """
    if as_path(sae).exists():
        one = _one_sae(store_beside(sae), which)
        return neuronpedia_name(one) if known is None else NeuronpediaName.of(known)
    if which is not None or known is not None:
        raise ConfigError(f"--sae and --id are for a feature store or a run, and {sae!r} is none: leave them out")
    release, colon, sae_id = sae.rpartition(":")
    if not colon or "/" in release:
        return NeuronpediaName.of(sae)
    found = find_sae(Catalog(()).find(release), sae_id)
    if found.neuronpedia is None:
        raise ConfigError([("neuronpedia_id", f"is not known of {sae}: nobody has said that Neuronpedia has it")])
    return NeuronpediaName.of(found.neuronpedia)


def _one_sae(store: FeatureStore, name: str | None) -> SAEFeatures:
    if name is None:
        if len(store.saes) > 1:
            raise ConfigError([("sae", f"is missing: the store has {', '.join(store.saes)}; name one (--sae)")])
        return store.sae
    if name not in store.saes:
        raise ConfigError([("sae", f"{name!r} is not in the store, which has {', '.join(store.saes)}")])
    return store.saes[name]


def _numbers(numbers: Sequence[int] | str) -> list[int] | None:
    if isinstance(numbers, str):
        if numbers != "all":
            raise ConfigError([("numbers", f'must be numbers of features or "all", found {numbers!r}')])
        return None
    found = [*numbers]
    odd = [one for one in found if not _is_whole(one)]
    if odd or not found:
        raise ConfigError([("numbers", f"must be whole numbers, found {odd[0]!r}" if odd else "names none")])
    return sorted({one.__index__() for one in found})


def _is_whole(value: object) -> bool:
    """Whether it is a whole number, of whatever library."""
    try:
        return not isinstance(value, bool) and operator.index(value) is not None  # type: ignore[arg-type]
    except TypeError:
        return False


def _credits(about: Mapping[str, str]) -> Credits:
    known = {field.name for field in attrs.fields(Credits)}
    for name, value in about.items():
        if name not in known or not isinstance(value, str):
            raise ConfigError(
                [("about", f"may have {', '.join(sorted(known))}, each a text; found {name!r}: {value!r}")]
            )
    return Credits(**about)


def _asked(contributions: bool, attribution: bool, schema: str, **told: object) -> str | None:
    """What the model is asked for: ``effects``, ``sources`` or nothing; :class:`ConfigError` for what does not fit."""
    if contributions and schema != "sae_lens_3":
        raise ConfigError([("contributions", f"are for the schema 'sae_lens_3': {schema!r} has no place for them")])
    if attribution and schema == "sae_lens_3":
        raise ConfigError([("attribution", f"is for 'saedashboard' and 'bulk': {schema!r} has no place for it")])
    given = next((name for name, value in told.items() if value is not None), None)
    if given is not None and not contributions and not attribution:
        raise ConfigError(
            [(given, "is for what features do at each token, and where that comes from: ask for contributions "
              "(--contributions) or attribution (--attribution)")]
        )  # fmt: skip
    return "effects" if contributions else "sources" if attribution else None


def _check(schema: object, batch_size: object, least: object, choice: Choice) -> None:
    problems = []
    counts = {name: value for name, value in attrs.asdict(choice).items() if name != "window"}
    if schema not in SCHEMAS:
        problems.append(("schema", f"must be one of {', '.join(SCHEMAS)}, found {schema!r}"))
    for name, value, low in (("batch_size", batch_size, 1), *((name, value, 0) for name, value in counts.items())):
        if isinstance(value, bool) or not isinstance(value, int) or value < low:
            problems.append((name, f"must be a whole number of {low} or more, found {value!r}"))
    if least is not None and (
        isinstance(least, bool) or not isinstance(least, (int, float)) or not -math.inf < least <= 0
    ):
        problems.append(
            ("min_log_fraction", f"must be the logarithm of a fraction, so 0 or less, such as -6; found {least!r}")
        )
    if problems:
        raise ConfigError(problems)


def _told(one: SAEFeatures, what: str | None, model: object | None, weights: object, device: str) -> dict[str, Any]:
    """What says what features do at each token, or where that comes from, and of which model."""
    if what is None:
        return {}
    from saekit.commands.material import Material, Text
    from saekit.commands.subjects import subjects_of
    from saekit.devices import resolve_device
    from saekit.exports.contributions import Contributions, sources_of
    from saekit.features.subject import checksum
    from saekit.plugins.manager import default_manager
    from saekit.status import Status

    if is_store(weights):
        raise ConfigError(
            [("weights", "is missing: what features do at each token is told by the SAE, and a feature store has not "
              "its weights; give it, or where it lies (--weights)")]
        )  # fmt: skip
    plugins = default_manager()
    found = subjects_of(weights, plugins, device=resolve_device(device, "device"))
    subject = next((some for some in found.values() if checksum(some.sae) == one.about.checksum), None)
    if subject is None:
        raise DataError(f"{', '.join(found)} is not the SAE whose features were collected as {one.name}: give that one")
    with Status(verbose=False) as say:
        backend = Material(plugins, Text(), model=model, device=device, say=say).model_of(subject)
    known = {"model": one.store.manifest.model}
    if what == "effects":
        return known | {"effects": Contributions.made_of(one, subject.sae, backend)}
    return known | {"sources": sources_of(one, subject.sae, backend)}
