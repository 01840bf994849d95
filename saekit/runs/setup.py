"""From a configuration to the objects of a run; every check here happens before the first long computation."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import attrs
import torch
from torch import Tensor

from saekit.config import CHOOSES_START, SAME_AT_START, SAEConfig, TrainConfig
from saekit.config.files import plain_config
from saekit.data import Corpus
from saekit.data.activations import check_contexts
from saekit.devices import resolve_device
from saekit.distributed.world import ALONE, World
from saekit.errors import ConfigError
from saekit.kinds import SAE_ARCHITECTURES
from saekit.plugins.manager import PluginManager
from saekit.pretrained.load import load_sae
from saekit.protocols import ModelBackend
from saekit.runs.checks import check_finetuning, has_model, start_files
from saekit.runs.metadata import metadata_of
from saekit.runs.opening import seed_for
from saekit.runs.parts import make_optimizer
from saekit.runs.randomness import seeded
from saekit.runs.spreading import spread
from saekit.runs.transforms import estimator_of, give_chosen, refuse_maps, starting_rows, transform_problems
from saekit.runs.watching import watching_of
from saekit.sae.build import build_module, initialize
from saekit.sae.casting import copied
from saekit.sae.init import starts_by_parts
from saekit.sae.module import SAEModule
from saekit.sae.parameters import Factor, factors_of, tensors_of
from saekit.sae.splitting import give_part, whole_like
from saekit.site import Site, Sites
from saekit.training.firing import FiringStatistics
from saekit.training.schedule import ComposedSchedule
from saekit.training.trainer import SAETrainer
from saekit.values import Batch, Ports, Scale

__all__ = [
    "give_weights",
    "looks_ahead",
    "make_trainer",
    "sae_options",
]


def sae_options(
    config: TrainConfig, plugins: PluginManager, d_sae: int | None = None, world: World = ALONE
) -> tuple[SAEConfig, SAEModule | None]:
    """The architecture's options, and the saved SAE that training starts from, if there is one.

    ``d_sae`` is given for a run that goes on, which needs no start any more.  Of a start, each process of ``world`` has
    the part that it trains, where the architecture knows of parts.  :class:`ConfigError` names what does not go
    together.
    """
    options: SAEConfig = plugins.options(SAE_ARCHITECTURES, config.sae)
    check_finetuning(config, options)
    if config.training.from_pretrained_path is None:
        return options, None
    if d_sae is not None:
        return attrs.evolve(options, d_sae=d_sae, expansion_factor=None), None
    split = world.features if world.features.size > 1 else None
    start = load_sae(start_files(config.training.from_pretrained_path), plugins=plugins, features=split)
    if options.d_sae is None and options.expansion_factor is None:
        options = attrs.evolve(options, d_sae=start.d_sae * start.share.parts)
    _check_start(config, options, start, plugins)
    return options, start


_INITIAL = (
    "decoder_orthogonal_init", "decoder_heuristic_init", "init_encoder_as_decoder_transpose", "b_dec_init_method",
)  # fmt: skip


def _check_start(config: TrainConfig, options: SAEConfig, start: SAEModule, plugins: PluginManager) -> None:
    """A run that starts from ``start`` must be of its kind, and cannot initialize it."""
    where = _start_of(config)
    problems = [
        (f"sae.{name}", f"chooses a start, but training starts from {where}; leave it out")
        for name in (*_INITIAL, *_marked(options, CHOOSES_START))
        if _is_chosen(options, name)
    ]
    wanted = plain_config(options, plugins)
    architecture = plugins.find(SAE_ARCHITECTURES, config.sae).key
    for name, own, saved in (
        ("sae.name", architecture, start.info.architecture),
        ("sae.activation", wanted["activation"], plain_config(start.config, plugins)["activation"]),
        ("sae.apply_b_dec_to_input", options.apply_b_dec_to_input, start.config.apply_b_dec_to_input),
        ("sae.d_sae", options.d_sae or options.features(start.d_in), start.d_sae * start.share.parts),
        ("sae.d_in", options.d_in or start.d_in, start.d_in),
        *_sites_compared(config.sites, start.ports),
    ):
        if own != saved:
            problems.append((name, f"is {own!r}, but {where} has {saved!r}"))
    problems += transform_problems(config, plugins, start, where)
    scale = _known_scale(config, start)
    problems += _decoder_problems(config, options, start, scale)
    alike = start.info.architecture == architecture and not {"inputs", "targets"} & {name for name, _ in problems}
    if alike and _differing(options, start) and (scale is not None or len(config.sites.all) == 1):
        problems += _meaning_problems(options, start, _scaled(start, scale or 1.0, config.sites), where)
    if problems:
        raise ConfigError(problems)


def _marked(options: SAEConfig, mark: str) -> list[str]:
    """The options with this metadata."""
    return [field.name for field in attrs.fields(type(options)) if field.metadata.get(mark)]


def _is_chosen(options: SAEConfig, name: str) -> bool:
    """Whether an option is not its default, and could be: some other options ask for another value of it."""
    default: Any = attrs.fields_dict(type(options))[name].default
    if getattr(options, name) == default:
        return False
    by_default: dict[str, Any] = {name: default}
    try:
        attrs.evolve(options, **by_default)
    except ConfigError:
        return False
    return True


def _sites_compared(sites: Sites, saved: Ports) -> Iterator[tuple[str, str, str]]:
    """What must be alike: one site may be another than before, several lie in one order."""
    for option, own, widths in (("inputs", sites.inputs, saved.inputs), ("targets", sites.targets, saved.targets)):
        if option == "inputs" or not (sites.same and saved.same):
            names, before = [site.name for site in own], [*widths]
            one = len(names) == len(before) == 1 and sites.same == saved.same
            yield option, "" if one else ", ".join(names), "" if one else ", ".join(before)


def _at_sites(ports: Ports, sites: Sites) -> Ports:
    """Those of the same widths at other sites."""
    inputs, targets = (
        {site.name: width for site, width in zip(some, widths.values(), strict=True)}
        for some, widths in ((sites.inputs, ports.inputs), (sites.targets, ports.targets))
    )
    return Ports(inputs, targets)


def _start_of(config: TrainConfig) -> str:
    return f"the SAE in {config.training.from_pretrained_path} (training.from_pretrained_path)"


def _known_scale(config: TrainConfig, start: SAEModule) -> Scale | None:
    """What a run from ``start`` multiplies activations by, if that is known before it sees any.

    An SAE that was trained on scaled activations goes on with its own factor.
    """
    if config.activations.normalize_activations is None or start.input_transform is not None:
        return 1.0
    known = start.info.metadata.get("activation_scale", 1.0)
    if isinstance(known, Mapping):  # of the same sites: another may have vectors of another size
        names = [site.name for site in config.sites.all]
        return {name: float(known[name]) for name in names} if set(names) == set(known) else None
    return float(known) if known != 1 else None


@torch.no_grad()
def _decoder_problems(
    config: TrainConfig, options: SAEConfig, start: SAEModule, scale: Scale | None
) -> list[tuple[str, str]]:
    """Rows that are to be kept at norm 1 must have it from the start, or the SAE would be another one.

    Where the scale of one site is not known yet, all of one norm will do; of several, nothing can be said.
    """
    kept = [entry.name for entry in type(start).parameters_of(options) if entry.unit_rows]
    if not kept or (scale is None and len(config.sites.all) > 1):
        return []
    tensors = _tensors_for(config.training.finetuning_method, start)
    if isinstance(scale, Mapping):
        read, written = _unfolding(scale, _at_sites(start.ports, config.sites))
        for name in kept:
            tensors[name] = tensors[name].clone()
            start.table[name].fold(tensors[name], {"d_in": read, "d_out": written})
    norms = start.share.all_features(torch.cat([tensors[name].norm(dim=-1).flatten() for name in kept]))
    if not isinstance(scale, Mapping):
        norms = norms / norms.mean() if scale is None else norms * scale
    if bool(((norms - 1).abs() < 1e-3).all()):
        return []
    on = "" if scale in (None, 1.0) else f" for activations scaled by {_scale_text(scale)}"
    return [
        ("sae.normalize_sae_decoder", f"keeps decoder rows at norm 1, and those of {_start_of(config)} have norms from "
         f"{norms.min():.4g} to {norms.max():.4g}{on}; set it to false")
    ]  # fmt: skip


def _unfolding(scale: Scale, ports: Ports) -> tuple[Factor, Factor]:
    """What to fold into an SAE for raw activations, so that it is one for activations times ``scale``."""
    read, written = factors_of(scale, ports)
    return 1 / read, 1 / written


def _scale_text(scale: Scale) -> str:
    if not isinstance(scale, Mapping):
        return f"{scale:.4g}"
    return ", ".join(f"{factor:.4g} at {name}" for name, factor in scale.items())


def _tensors_for(method: str | None, sae: SAEModule) -> dict[str, Tensor]:
    """The tensors of ``sae``, with factors in the matrix that they multiply where no fine-tuning is to come."""
    tensors = {name: value.detach() for name, value in tensors_of(sae).items()}
    return sae.table.folded(tensors) if method is None else tensors


def make_trainer(
    config: TrainConfig,
    plugins: PluginManager,
    backend: ModelBackend,
    corpus: Corpus,
    options: SAEConfig,
    ports: Ports,
    schedule: ComposedSchedule,
    name: str = "sae",
    world: World = ALONE,
) -> SAETrainer:
    """An SAE with everything that trains it; its weights are still to come."""
    device = resolve_device(config.training.device, "training.device", options.dtype)
    # An architecture may draw tensors of its own: the same ones alone and beside others.
    with seeded(seed_for(config.training.seed, "architecture")):
        sae: SAEModule = build_module(plugins.find(SAE_ARCHITECTURES, config.sae), options, ports, plugins)
    give_chosen(sae, config, plugins)
    sae.check_state()
    if config.training.finetuning_method is not None:
        sae.add_factors_for(config.training.finetuning_method)
        _check_something_is_tuned(config.training.finetuning_method, sae)
    if options.dtype == "bfloat16":
        sae.cast_weights(torch.float32)  # until it is saved
    spread(sae, world)
    sae.to(device)
    sae.kernels = config.training.kernels
    if config.training.compile:
        sae.compile_losses(config.training.compile_mode)
    sae.info = attrs.evolve(sae.info, sites=config.sites, metadata=metadata_of(config, backend, corpus, plugins))
    training = config.training
    return SAETrainer(
        name=name,
        sae=sae,
        sites=config.sites,
        optimizer=make_optimizer(config, plugins, sae, schedule, features=world.features, rows=world.data),
        firing=FiringStatistics(
            sae.d_sae,
            dead_after=training.dead_after,
            window=training.feature_sampling_window,
            device=device,
        ),
        generator=torch.Generator(device).manual_seed(seed_for(training.seed, "noise")),
        device=device,
        training=training,
        backend=backend if has_model(config, plugins) else None,
        world=world,
        watched=watching_of(config, plugins, sae),
    ).checked()


def _check_something_is_tuned(method: str, sae: SAEModule) -> None:
    """Before the main training, which would be lost if fine-tuning then had nothing to train."""
    if sae.table.trained_by(method):
        return
    others = sorted({f"'{group}'" for entry in sae.table for group in entry.groups})
    there = f"choose {' or '.join(others)}, or leave it out" if others else "no method does; leave it out"
    raise ConfigError(
        [("training.finetuning_method", f"is '{method}', which trains no parameter of a {type(sae).__name__}; {there}, "
          "with finetuning_tokens")]
    )  # fmt: skip


def looks_ahead(config: TrainConfig, options: SAEConfig, start: SAEModule | None) -> bool:
    """Whether :func:`give_weights` looks at the activations to come."""
    return estimator_of(config) is not None or (start is None and options.starts_from_activations)


def give_weights(
    trainer: SAETrainer,
    config: TrainConfig,
    corpus: Corpus,
    peek: Callable[[], Mapping[Site, Tensor]],
    start: SAEModule | None = None,
) -> None:
    """The first weights of a new run, and its activation scale, by a look at the activations to come if need be."""
    options = trainer.sae.config
    estimator = estimator_of(config)
    sample = _sample(peek(), config.sites, corpus) if looks_ahead(config, options, start) else None
    scale: Scale = 1.0
    if estimator is not None and sample is not None:
        known = None if start is None else _known_scale(config, start)
        scale, trainer.maps = (known, None) if known is not None else estimator.estimated(sample, config.sites)
        trainer.scale = scale
        if trainer.maps is not None:
            trainer.sae.check_foldable()  # now, not when training is done
    if start is not None:
        if trainer.maps is not None:
            raise refuse_maps(config, _start_of(config))
        if start.info.scale_is_unknown:
            scale = 1.0  # its weights are for scaled activations as they are
        if problems := _decoder_problems(config, options, start, scale):
            raise ConfigError(problems)
        by_parts = start.share.parts > 1
        _give(trainer, lambda sae: _copy_weights(start, trainer, sae, scale, _start_of(config)), by_parts=by_parts)
        return
    generator = torch.Generator().manual_seed(seed_for(config.training.seed, "init"))
    read, written = trainer.factors
    x, target = _starting_rows(sample, trainer) if sample is not None else (None, None)
    by_parts = starts_by_parts(trainer.sae.table)
    _give(
        trainer,
        lambda sae: initialize(sae, generator, x, read, target=target, target_scale=written),
        by_parts=by_parts,
    )


def _give(trainer: SAETrainer, give: Callable[[SAEModule], None], *, by_parts: bool) -> None:
    """Have ``give`` fill the SAE; of one whose features are split, it fills the whole unless it works ``by_parts``, and
    each process keeps its own."""
    if trainer.world.features.size == 1 or by_parts:
        give(trainer.sae)
        return
    whole = whole_like(trainer.sae)
    give(whole)
    give_part(trainer.sae, whole)


def _sample(peeked: Mapping[Site, Tensor], sites: Sites, corpus: Corpus) -> dict[Site, Tensor]:
    """``[n, d]`` at each site, on the CPU."""
    sample = {site: peeked[site].cpu() for site in sites.all}
    for rows in sample.values():
        check_contexts(len(rows), corpus.context_size)
    return sample


def _starting_rows(sample: Mapping[Site, Tensor], trainer: SAETrainer) -> tuple[Tensor, Tensor | None]:
    """Inputs and, where they are others, targets of the same tokens, as the SAE reads them but for a factor."""
    sites, ports = trainer.sites, trainer.sae.ports
    # A source may show more of one site than of another.
    n = min(len(rows) for rows in sample.values())
    rows = Batch({site: rows[:n] for site, rows in sample.items()})
    x = starting_rows(trainer, rows.rows_at(sites.inputs), ports.inputs)
    return x, None if sites.same else starting_rows(trainer, rows.rows_at(sites.targets), ports.targets)


@torch.no_grad()
def _copy_weights(start: SAEModule, trainer: SAETrainer, into: SAEModule, scale: Scale, where: str) -> None:
    """Those of an SAE for raw activations, for activations times ``scale``; ``where`` it is from."""
    sae = _scaled(start, scale, trainer.sites)
    if problems := list(_meaning_problems(trainer.sae.config, start, sae, where)):
        raise ConfigError(problems)
    # The weights as they are in training: what an architecture makes of them when it saves is not there yet.
    SAEModule.load_public_tensors(into, _tensors_for(trainer.training.finetuning_method, sae))
    into.after_update()  # rows that are to have norm 1 have it from the first step on


def _scaled(start: SAEModule, scale: Scale, sites: Sites) -> SAEModule:
    """That of an SAE for raw activations which does the same on activations times ``scale``, in float64."""
    sae = copied(start).double()  # once there and back must not cost digits
    if sae.input_transform is None:
        sae.fold_activation_scale(*_unfolding(scale, _at_sites(start.ports, sites)))
    return sae


def _differing(options: SAEConfig, sae: SAEModule) -> dict[str, Any]:
    """The options that decide what weights mean, with their values in ``sae``, where a run has others."""
    names = _marked(options, SAME_AT_START)
    return {name: found for name in names if (found := getattr(sae.config, name, None)) != getattr(options, name)}


def _meaning_problems(options: SAEConfig, start: SAEModule, scaled: SAEModule, where: str) -> Iterator[tuple[str, str]]:
    """Make ``scaled``, which is ``start`` for scaled activations, one of ``options``; what cannot be is told."""
    within = 8 * torch.finfo(start.dtype).eps
    for name, found in _differing(options, scaled).items():
        own, before = getattr(options, name), getattr(start.config, name)
        if scaled.restate(name, own, within=within):
            continue
        if before == own:  # it is the scale that does it
            yield (
                f"sae.{name}", f"is {own!r}, but with a scale for each site {where} needs {found!r}; set it to "
                f"{found!r}, or activations.normalize_activations to 'none'"
            )  # fmt: skip
        else:
            yield f"sae.{name}", f"is {own!r}, but {where} has {before!r}"
