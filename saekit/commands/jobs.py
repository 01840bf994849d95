"""What saekit does, as functions: train, go on, plan, cache, read activations, pretokenize.

Each reads its configuration and asks :mod:`saekit.commands.preflight` what can be seen to be wrong, before it imports
what does the work.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, overload

import attrs

from saekit.commands import preflight
from saekit.config import PretokenizeConfig, TrainConfig
from saekit.config.files import load_config, load_configs
from saekit.distributed.launched import Launched, check_layout, check_mesh, refuse_several
from saekit.errors import ConfigError
from saekit.files.paths import folder_of
from saekit.garbage import uncollected
from saekit.planning.plan import Plan, cannot_run, names_of
from saekit.plugins.manager import PluginManager, default_manager
from saekit.runs.checks import alone_in
from saekit.runs.from_memory import check_config_names_all, unnamed

if TYPE_CHECKING:
    from saekit.commands.pretokenize import Pretokenized
    from saekit.data.cache.manifest import Manifest
    from saekit.runs.activations import Activations
    from saekit.runs.record import RunRecord
    from saekit.runs.results import SweepResult, TrainResult
    from saekit.status import Status

__all__ = [
    "ConfigSource", "cache_activations", "open_activations", "plan", "plan_after", "pretokenize", "resume", "train",
]  # fmt: skip

ConfigSource: TypeAlias = TrainConfig | Mapping[str, Any] | str | Path
"""A config, a dict, or the path of a TOML, YAML or JSON file."""


@overload
def train(
    cfg: ConfigSource,
    overrides: Sequence[str] = ...,
    *,
    plugins: PluginManager | None = ...,
    model: object | None = ...,
    dataset: object | None = ...,
) -> TrainResult: ...


@overload
def train(
    cfg: list[Any] | tuple[Any, ...],
    overrides: Sequence[str] = ...,
    *,
    plugins: PluginManager | None = ...,
    model: object | None = ...,
    dataset: object | None = ...,
) -> SweepResult: ...


def train(
    cfg: ConfigSource | list[Any] | tuple[Any, ...],
    overrides: Sequence[str] = (),
    *,
    plugins: PluginManager | None = None,
    model: object | None = None,
    dataset: object | None = None,
) -> TrainResult | SweepResult:
    """Train the SAE that ``cfg`` describes, or several on one run of the model: a list, as :func:`saekit.grid` makes.

    ``model`` is an in-memory model for the backend (a ``HookedTransformer``, say) and ``dataset`` a text, a list of
    texts or of ``{"text": ...}`` records, a pandas ``DataFrame`` or a HF ``Dataset``; they take the place of
    ``model.name`` and ``dataset.path``.  ``overrides`` (``"training.lr=1e-4"``) change the configuration, of several
    all.  ``plugins`` replaces the installed plugins.

    SAEs that are trained together must agree on the model, the text and the checkpoints; each ends as if it had been
    trained alone.  One that diverges is stopped, and the others go on.

    Raises :class:`saekit.errors.SaekitError` for what is wrong with the configuration, model or data.  When it is
    interrupted, it saves a checkpoint and raises :class:`saekit.errors.TrainingInterrupted`; :func:`resume` goes on.
    """
    plugins = plugins or default_manager()
    alone, sources = _sources(cfg)
    configs = load_configs(sources, _listed(overrides), plugins=plugins, kind=TrainConfig)
    for source, config in zip(sources, configs, strict=True):
        kinds = preflight.kinds_read([config], plugins)
        check_config_names_all(source, _listed(overrides), model=model, dataset=dataset, kinds=kinds)
    if not configs:
        raise ConfigError("there is no configuration to train: the list is empty")
    check_mesh(configs[0].distributed, Launched.here(os.environ))
    check_layout(configs[0].distributed, len(configs))
    preflight.of_training(configs, plugins, model, dataset, alone=alone).raise_any()
    with _status(configs) as say:
        with uncollected():
            from saekit.runs.run import begin
        return begin(configs, plugins, model, dataset, alone=alone, say=say)


def _sources(cfg: ConfigSource | list[Any] | tuple[Any, ...]) -> tuple[bool, Sequence[Any]]:
    """Whether ``cfg`` is one configuration, and those that it is or lists."""
    if isinstance(cfg, (TrainConfig, Mapping, str, Path)):
        return True, [cfg]
    if not isinstance(cfg, (list, tuple)):
        hint = "; put what it gives into a list" if isinstance(cfg, Iterable) else ""
        raise ConfigError(
            "expected a TrainConfig, a dict or the path of a configuration file, or a list of those, found "
            f"{type(cfg).__qualname__}{hint}"
        )
    return False, cfg


def resume(
    run: str | Path | TrainResult | SweepResult,
    cfg: ConfigSource | None = None,
    overrides: Sequence[str] = (),
    *,
    allow: Sequence[str] = (),
    plugins: PluginManager | None = None,
    model: object | None = None,
    dataset: object | None = None,
) -> TrainResult | Any:
    """Go on with the run in the folder ``run`` from its newest whole checkpoint, as if it had never stopped.

    What :func:`saekit.train` returned stands for its folder; of a sweep's a :class:`saekit.SweepResult` comes back.  A
    run that was stopped before its first checkpoint begins anew, with a warning.

    ``cfg`` (for a run of one SAE) and ``overrides`` (``"training.lr=1e-4"``) change its configuration; every option
    that then differs, and whatever else decides the activations, must be named in ``allow``, or it is a
    :class:`ConfigError` that names it.  A model or dataset that was passed from memory has to be passed again.  Another
    number of processes is a change of ``distributed.data``: rows may come in another order then.

    Raises :class:`saekit.errors.StorageError` when there is nothing to go on from.
    """
    from saekit.runs.record import RunRecord
    from saekit.runs.resuming import Resumption, UnusableCheckpointError

    plugins = plugins or default_manager()
    folder, unusable = folder_of(run), dict[Path, str]()
    record = RunRecord.read(folder)  # to lock a folder may put a file into it, so it must be a run's
    launched = Launched.here(os.environ)
    with contextlib.nullcontext() if launched.rank else alone_in(folder):
        while True:
            resumption = Resumption.of(record.folder, cfg, _listed(overrides), allow, plugins, model, dataset, unusable)
            begun = resumption.checkpoint is not None
            configs = list(resumption.configs.values())
            _check_here(resumption.record, configs, plugins, model, dataset)
            preflight.of_resume(configs, plugins, model, dataset, begun=begun).raise_any()
            with _status(configs) as say:
                with uncollected():
                    from saekit.runs.run import go_on
                try:
                    return go_on(resumption, plugins, model, dataset, say)
                except UnusableCheckpointError as error:  # the one before it, in a session that has seen none
                    unusable[error.checkpoint] = str(error)


def _check_here(
    record: RunRecord, configs: Sequence[TrainConfig], plugins: PluginManager, model: object, dataset: object
) -> None:
    """:class:`ConfigError` for files that are not here but where the run was started."""
    from saekit.runs.away import away

    start = None if record.started_in is None else Path(record.started_in)
    found = {option: told for config in configs for option, told in away(config, plugins, start).items()}
    given = [section for section, one in (("model.", model), ("dataset.", dataset)) if one is not None]
    if problems := [(option, told) for option, told in found.items() if not option.startswith((*given,))]:
        problems = [(option, f"{told}, or name its place: {option}=... --allow {option}") for option, told in problems]
        raise ConfigError(problems, str(record.folder))


def plan(
    cfg: ConfigSource | list[Any] | tuple[Any, ...],
    overrides: Sequence[str] = (),
    *,
    plugins: PluginManager | None = None,
    model: object | None = None,
    dataset: object | None = None,
    load: bool = True,
    measure: bool = False,
) -> Plan:
    """Check the run that ``cfg`` describes, and estimate it from a few timed forwards, steps and evals.

    Of a list, as :func:`saekit.train` takes it and :func:`saekit.grid` makes it, it is the run of all of them together:
    what they share counts once, and what differs says which SAE it is of.  A list of one is planned as that one, though
    a run of it has the folder of a sweep.  Nothing stays of what is written to time the disk.

    Memory and disk are counted from the model's configuration before its weights are loaded, or downloaded; where it
    does not fit, they are not.  Without ``load`` they never are: no text is opened and nothing is timed, and devices
    need not be there, so that a run can be planned for another machine.  With ``measure``, ``model.compile`` and other
    numbers of contexts in a forward are timed, too, which takes a minute or two; what pays is advised, with the lines
    to write.

    Arguments are those of :func:`saekit.train`.  What ``train`` would refuse is in :attr:`Plan.problems`, all of it
    that can be found; only a configuration that cannot be read at all is raised.  Where the text or the model is not
    there, that is found at once, and nothing can be said of the rest.
    """
    return plan_after(0.0, cfg, plugins, model, dataset, overrides=overrides, load=load, measure=measure)


def plan_after(
    before: float,
    cfg: ConfigSource | list[Any] | tuple[Any, ...],
    plugins: PluginManager | None = None,
    model: object | None = None,
    dataset: object | None = None,
    *,
    overrides: Sequence[str] = (),
    load: bool = True,
    measure: bool = False,
) -> Plan:
    """:func:`plan` of a run that begins so many seconds ``before`` this, as a command's process does."""
    if measure and not load:
        raise ConfigError(
            "--measure (measure=True) times forwards, and with --no-load (load=False) there is no model to time: leave "
            "one of them out"
        )
    begun = time.perf_counter()
    plugins = plugins or default_manager()
    _, sources = _sources(cfg)
    configs = load_configs(sources, _listed(overrides), plugins=plugins, kind=TrainConfig)
    if not configs:
        raise ConfigError("there is no configuration to plan: the list is empty")
    faults, texts = preflight.of_plan(configs, plugins, model, dataset)
    named = dict[str, None]()
    for source, config in zip(sources, configs, strict=True):
        kinds = preflight.kinds_read([config], plugins)
        absent = unnamed(source, _listed(overrides), model=model, dataset=dataset, kinds=kinds)
        named |= {f"{option}: {why}": None for option, why in absent}
    if faults.absent or named:
        texts = [*named, *texts]
        return Plan({}, {}, texts, [], cannot_run(texts))
    with _status(configs) as say:
        from saekit.planning.planner import look

        say("trying the model and a few steps" if load else "counting")
        before += time.perf_counter() - begun
        names = names_of(configs, plugins)
        found = look(configs, names, plugins, model, dataset, load=load, measure=measure, before=before, say=say)
    problems = list(dict.fromkeys([*texts, *found.problems]))
    return attrs.evolve(found, problems=problems, verdict=cannot_run(problems) or found.verdict)


def cache_activations(
    cfg: ConfigSource,
    overrides: Sequence[str] = (),
    *,
    plugins: PluginManager | None = None,
    model: object | None = None,
    dataset: object | None = None,
) -> Manifest:
    """Write the cache that ``activations.cache`` of a training configuration describes, or what is missing of it.

    ``model`` and ``dataset`` are as for :func:`saekit.train`.  Interrupted in any way, it is gone on with by the same
    call, after the last finished shard.  The text is read once, whatever ``dataset.on_exhausted`` says: when it ends
    early, the cache is shorter, or with ``"error"`` a :class:`DataError` is raised after what there is was written.

    Of several processes (``torchrun``), each runs the model for a part of the shards; the cache is that of one.
    """
    plugins = plugins or default_manager()
    config = load_config(cfg, _listed(overrides), plugins=plugins)
    check_config_names_all(cfg, _listed(overrides), model=model, dataset=dataset)
    preflight.of_cache(config, plugins, model, dataset).raise_any()
    with _status([config]) as say:
        from saekit.commands.cache import write_cache

        return write_cache(config, plugins, model, dataset, say)


def open_activations(
    cfg: ConfigSource,
    overrides: Sequence[str] = (),
    *,
    plugins: PluginManager | None = None,
    model: object | None = None,
    dataset: object | None = None,
) -> Activations:
    """Read by hand the batches of activations that ``cfg`` would train an SAE on.

    ``model`` and ``dataset`` are as for :func:`saekit.train`.  Of ``cfg`` those sections count that say what is read:
    ``model``, ``dataset``, ``site`` (or ``inputs`` and ``targets``), ``activations``, ``tokens``, ``evals`` for what is
    held out, and of ``training`` the batch size, the number of tokens and the seed.  ::

        with saekit.open_activations("run.toml") as activations:
            for batch in activations:
                rows = batch["blocks.1.hook_resid_post"]  # [n, d_in]

    The batches are those of the run, row by row, before any normalization, and end where training would.  Errors are
    those of :func:`saekit.train`.
    """
    refuse_several("reading activations by hand")
    plugins = plugins or default_manager()
    config = load_config(cfg, _listed(overrides), plugins=plugins)
    kinds = preflight.kinds_read([config], plugins)
    check_config_names_all(cfg, _listed(overrides), model=model, dataset=dataset, kinds=kinds)
    preflight.of_reading(config, plugins, model, dataset).raise_any()
    with _status([config]) as say:
        from saekit.runs.activations import Activations

        return Activations(config, plugins, model, dataset, say)


def pretokenize(
    cfg: PretokenizeConfig | Mapping[str, Any] | str | Path,
    overrides: Sequence[str] = (),
    *,
    plugins: PluginManager | None = None,
    model: object | None = None,
    dataset: object | None = None,
) -> Pretokenized:
    """Pack the text of ``cfg`` into contexts and save them or push them to the Hub.

    The contexts are those that training would make of the same text.  Beside them, ``saekit.json`` says how they were
    made, so that ``dataset.path`` alone makes training read them.  ``model`` and ``dataset`` are as for
    :func:`saekit.train`.
    """
    refuse_several("pretokenizing")
    plugins = plugins or default_manager()
    config = load_config(cfg, _listed(overrides), plugins=plugins, kind=PretokenizeConfig)
    preflight.of_pretokenize(config, plugins, model, dataset).raise_any()
    from saekit.commands.pretokenize import write_contexts

    return write_contexts(config, plugins, model, dataset)


def _listed(overrides: Sequence[str]) -> Sequence[str]:
    """``overrides``, checked; one text alone would be read letter by letter."""
    if isinstance(overrides, str):
        raise ConfigError(f"overrides must be a list of texts such as 'training.lr=1e-4', found {overrides!r}")
    return overrides


def _status(configs: Sequence[TrainConfig]) -> Status:
    """Says what is being done, as far as one of ``configs`` wants it said; at first torch is imported."""
    from saekit.status import Status

    shown = any(config.training.verbose for config in configs)
    status = Status(verbose=shown and Launched.here(os.environ).rank == 0)
    status.importing("torch")
    return status
