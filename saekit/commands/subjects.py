"""The SAEs that are measured: objects, folders, runs, sweeps and published ones, with what is known of their text."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs

from saekit.commands.saes import published
from saekit.config import TrainConfig
from saekit.config.files import load_config
from saekit.errors import ConfigError, SaekitError
from saekit.files.checksums import stated_weights
from saekit.files.names import SAE_CONFIG, SAE_EVALS
from saekit.files.paths import as_path
from saekit.plugins.manager import PluginManager
from saekit.plugins.text import short
from saekit.runs.away import away, started_in
from saekit.runs.from_memory import from_memory
from saekit.runs.place import RECORD

if TYPE_CHECKING:
    from saekit.protocols import ModelBackend
    from saekit.sae.module import SAEModule

__all__ = ["Subject", "at_home", "subjects_of", "the_one"]

_CONFIG = "config.toml"


@attrs.frozen(eq=False, kw_only=True)
class Subject:
    """An SAE that is to be measured."""

    name: str
    sae: SAEModule
    file: Path | None = None
    """Where its numbers go, beside it; None: nowhere."""
    config: TrainConfig | None = None
    """That of its run, where it is known."""
    fault: str | None = None
    """Why it is not, where there is one."""
    backend: ModelBackend | None = None
    """The model of its run, where that is in memory."""
    dataset: Any = None
    """The text of its run, likewise."""
    unnamed: Mapping[str, Path] = attrs.field(factory=dict)
    """What its run was given from memory, so that no configuration names it: ``model``, ``dataset``, with the run."""

    away: Mapping[str, str] = attrs.field(factory=dict)
    """Options of the configuration that name what is not here, but where its run was started, each with why."""

    started_in: Path | None = None
    """The working directory of its run, where that says so."""

    def was_trained_on(self, path: str) -> bool:
        """Whether ``path`` names the text that the SAE says, wherever its run was started."""
        own = self.sae.info.metadata.get("dataset_path")
        if not isinstance(own, str) or self.started_in is None:
            return path == own
        return path == own or Path(path).absolute() == self.started_in / own

    @property
    def weights(self) -> dict[str, str]:
        """``weights_sha256``, as the folder that it is from states it; nothing where none does."""
        known = None if self.file is None else stated_weights(self.file.parent)
        return {} if known is None else {"weights_sha256": known}


def subjects_of(
    saes: object, plugins: PluginManager, *, device: str, loader: Any = None, releases: Sequence[str] = ()
) -> dict[str, Subject]:
    """What ``saes`` are, by name: one of them, a list, or a mapping of names.

    Each is an SAE, what :func:`saekit.train` returned, or a text or path: a run folder, a sweep's, that of an SAE of
    any format, or ``RELEASE:ID``; what it returned of a sweep stands for all of them.  Those that are read go to
    ``device``.  :class:`ConfigError` for anything else.
    """
    found: dict[str, Subject] = {}
    for name, one in _named(saes):
        for subject in _read(name, one, plugins, device, loader, releases):
            unique, number = subject.name, 1
            while unique in found:
                number += 1
                unique = f"{subject.name} ({number})"
            found[unique] = attrs.evolve(subject, name=unique)
    if not found:
        raise ConfigError([("saes", "names none; give an SAE, a folder, a run or RELEASE:ID")])
    return found


def the_one(sae: object, plugins: PluginManager, *, device: str) -> Subject:
    """The one SAE that ``sae`` is, as for :func:`subjects_of`; :class:`ConfigError` for several."""
    subjects = subjects_of(sae, plugins, device=device)
    if len(subjects) > 1:
        raise ConfigError([("sae", f"must be one SAE, found {len(subjects)}: {', '.join(subjects)}; name one")])
    return next(iter(subjects.values()))


def _named(saes: object) -> Iterator[tuple[str | None, object]]:
    if hasattr(saes, "results") and hasattr(saes, "diverged"):  # a sweep's
        saes = saes.results
    if isinstance(saes, Mapping):
        yield from ((str(name), one) for name, one in saes.items())
    elif isinstance(saes, Sequence) and not isinstance(saes, str):
        yield from ((None, one) for one in saes)
    else:
        yield None, saes


def _read(
    name: str | None, one: Any, plugins: PluginManager, device: str, loader: Any, releases: Sequence[str]
) -> Iterator[Subject]:
    if hasattr(one, "encode") and hasattr(one, "info"):
        yield Subject(name=name or one.get_name(), sae=one)
    elif hasattr(one, "corpus") and hasattr(one, "sae"):
        yield from _of_result(name, one, plugins)
    elif isinstance(one, (str, Path)):
        yield from _of_path(name, one, plugins, device, loader, releases)
    else:
        if hasattr(one, "saes") and hasattr(one, "folder"):
            _check_no_store(one.folder)
        if hasattr(one, "store") and hasattr(one.store, "folder"):
            _check_no_store(one.store.folder)
        expected = "an SAE, the result of saekit.train, a folder, or RELEASE:ID"
        raise ConfigError([("saes", f"must be {expected}, found {short(one)}")])


def _of_result(name: str | None, result: Any, plugins: PluginManager) -> Iterator[Subject]:
    folder = Path(result.folder)
    yield Subject(
        name=name or folder.name,
        sae=result.sae,
        file=folder / "sae" / SAE_EVALS,
        backend=result.backend,
        dataset=result.corpus.dataset,
        **_config(folder, plugins, result.sae),
    )


def _of_path(
    name: str | None, path: str | Path, plugins: PluginManager, device: str, loader: Any, releases: Sequence[str]
) -> Iterator[Subject]:
    from saekit.pretrained.sae import SAE

    if (asked := published(str(path), releases)) is not None:
        sae = SAE.from_pretrained(*asked, loader=loader, releases=releases, device=device, plugins=plugins)
        yield Subject(name=name or str(path), sae=sae)
        return
    place = as_path(path)
    homes = [place]
    if place.is_dir() and not any((place / part).exists() for part in (SAE_CONFIG, "sae")):
        homes = sorted(home for home in place.iterdir() if (home / "sae" / SAE_CONFIG).is_file())
        if not homes:
            _check_no_store(place)
        homes = homes or [place]
    for home in homes:
        sae = SAE.load(home, loader=loader, device=device, plugins=plugins)
        own = home / "sae" if (home / "sae" / SAE_CONFIG).is_file() and not (home / SAE_CONFIG).exists() else home
        file = own / SAE_EVALS if own.is_dir() else own.with_name(f"{own.name}.{SAE_EVALS}")
        run = own.resolve().parent if own.name == "sae" else own
        label = str(home) if name is None else name if len(homes) == 1 else f"{name}/{home.name}"
        yield Subject(name=label, sae=sae, file=file, **_config(run, plugins, sae))


def _check_no_store(place: Path) -> None:
    """:class:`ConfigError` says what a folder is that lies in a run, or in a feature store, and is no SAE."""
    from saekit.features.manifest import is_store

    if is_store(place):
        run = place.parent
        its = f", such as {str(run)!r}" if (run / "sae" / SAE_CONFIG).is_file() or (run / SAE_CONFIG).is_file() else ""
        told = f"{str(place)!r} is a feature store, and here the SAE is needed, whose weights are not in it"
        raise ConfigError([("saes", f"{told}: name its run or its folder{its}")])
    if is_store(place.parent):
        told = f"{str(place)!r} is a part of the feature store {str(place.parent)!r}"
        raise ConfigError([("saes", f"{told}: name that, where a store is taken (one of its SAEs by sae=NAME, --sae "
                            "NAME), or the run or folder of the SAE")])  # fmt: skip
    if (place.parent / RECORD).is_file():
        told = f"{str(place)!r} is no SAE but a part of the run {str(place.parent)!r}"
        raise ConfigError([("saes", f"{told}: name that, or the folder of an SAE in it")])


def at_home(found: Mapping[str, Subject], plugins: PluginManager) -> dict[str, Subject]:
    """``found``, of which those that are objects read from a folder know it, and its run.

    An object without a name of its own is called by its place in the model.  Its weights may have changed since they
    were read, so that numbers of them do not belong beside the files: this is for what compares checksums.
    """
    known: dict[str, Subject] = {}
    for name, one in found.items():
        place = one.sae.read_from if one.file is None else None
        if place is not None and place.is_dir():
            run = place.parent if place.name == "sae" else place
            one = attrs.evolve(one, file=place / SAE_EVALS, **_config(run, plugins, one.sae))
        sites = one.sae.info.sites
        own = sites.name if sites is not None and name == one.sae.get_name() else name
        known[own if own not in known else name] = one
    return {name: attrs.evolve(one, name=name) for name, one in known.items()}


def _config(folder: Path, plugins: PluginManager, sae: SAEModule) -> dict[str, Any]:
    """That of the run in ``folder``, or why it cannot be loaded, by the names of :class:`Subject`'s fields."""
    file = folder / _CONFIG
    if not file.is_file():
        return {}
    try:
        kinds = {*from_memory(folder)}
        if sae.info.metadata.get("dataset_path", "") is None:  # says so itself, wherever its folder was copied
            kinds.add("dataset")
        config = load_config(file, plugins=plugins)
        start = started_in(folder)
        found = {"config": config, "unnamed": dict.fromkeys(kinds, folder), "started_in": start}
        return found | {"away": away(config, plugins, start)}
    except SaekitError as error:
        return {"fault": f"{file} cannot be loaded: {error}"}
