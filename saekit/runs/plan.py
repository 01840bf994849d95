"""``saekit plan``: what a run would do, need and take, without running it."""

from __future__ import annotations

import functools
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import attrs
import torch

from saekit.ambient import ambient
from saekit.config import SAEConfig, TrainConfig, TrainingConfig
from saekit.data import Corpus, StreamContext
from saekit.data.cache.read import available_memory
from saekit.data.faults import problems_of
from saekit.devices import resolve_device
from saekit.errors import SaekitError
from saekit.kernels.workspace import SHARED
from saekit.kinds import SAE_ARCHITECTURES
from saekit.plugins.manager import PluginManager
from saekit.protocols import ActivationSource, HasMemory, ModelBackend
from saekit.runs.checks import check_without_model, chosen_trackers, has_model
from saekit.runs.doubts import doubts_of_order, doubts_of_start
from saekit.runs.folder import check_run_folder
from saekit.runs.opening import (
    build_backend,
    check_context_size,
    check_hooks,
    checked_ports,
    open_source,
    open_stream,
    sites_option,
    widths_of,
)
from saekit.runs.parts import make_evals, make_schedule, moment_bytes
from saekit.runs.planned import Plan
from saekit.runs.planned_cache import cache_sites, cached_contexts, plan_cache
from saekit.runs.planned_text import look_at_text
from saekit.runs.setup import (
    give_weights,
    make_trainer,
    sae_options,
)
from saekit.runs.supervised import SupervisedSource
from saekit.runs.timing import bytes_text as _bytes
from saekit.runs.timing import duration_text as _duration
from saekit.runs.timing import silent_at_start, timed, timed_forwards, timed_steps
from saekit.sae.build import build_module
from saekit.values import Batch, Ports

if TYPE_CHECKING:
    from saekit.sae.module import SAEModule
    from saekit.training.trainer import SAETrainer

__all__ = ["look"]

T = TypeVar("T")
_FIRINGS = 10.0  # of the average feature in the first step, for silence to mean something


def look(config: TrainConfig, plugins: PluginManager, model: object | None, dataset: object | None) -> Plan:
    """The plan of a run whose text and model :mod:`saekit.commands.preflight` has found."""
    planner = _Planner(config, plugins)
    try:
        with ambient():
            planner.look(model, dataset)
    finally:
        SHARED.release()
    return Plan(planner.facts, planner.numbers, planner.problems, planner.warnings)


class _Planner:
    def __init__(self, config: TrainConfig, plugins: PluginManager) -> None:
        self.config, self.plugins = config, plugins
        self.options: SAEConfig = plugins.options(SAE_ARCHITECTURES, config.sae)
        self.start: SAEModule | None = None
        self.facts: dict[str, str] = {}
        self.numbers: dict[str, float] = {}
        self.problems: list[str] = []
        self.warnings: list[str] = []

    def attempt(self, work: Callable[[], T]) -> T | None:
        """``work()``, or None with its error among the problems."""
        try:
            return work()
        except SaekitError as error:
            found = [f"{path}: {message}" if path else message for path, message in problems_of(error)]
        self.problems += [problem for problem in found if problem not in self.problems]
        return None

    def doubt(self, *texts: str) -> None:
        """Among the warnings, each once."""
        self.warnings += [text for text in dict.fromkeys(texts) if text not in self.warnings]

    def look(self, model: object | None, dataset: object | None) -> None:
        """Everything, as far as it can be reached."""
        config, plugins = self.config, self.plugins
        self.training()
        self.attempt(lambda: check_run_folder(config, config.checkpoints.name))
        device = self.attempt(lambda: resolve_device(config.training.device, "training.device", self.options.dtype))
        self.attempt(lambda: check_without_model(config, plugins))
        self.attempt(lambda: chosen_trackers(config, plugins))
        if (found := self.attempt(lambda: sae_options(config, plugins))) is not None:
            self.options, self.start = found
            self.doubt(*doubts_of_start(config, self.start))
        schedule = self.attempt(lambda: make_schedule(config, plugins))
        if schedule is not None and (remark := schedule.remark()) is not None:
            self.warnings.append(remark)
        corpus = self.attempt(lambda: Corpus.of(config.dataset, config.evals, dataset))
        backend = self.attempt(lambda: build_backend(config, plugins, model))
        if corpus is None or backend is None:
            return
        measured = functools.partial(corpus.held_out, backend, seed=0)
        self.attempt(lambda: make_evals(config, plugins, backend, measured, device or "cpu"))
        fits, there = self.fitting(backend, corpus)
        stream = open_stream(config, corpus, plugins, backend, config.sites.all, doubt=self.doubt)
        source = self.attempt(lambda: open_source(config, plugins, stream)) if there else None
        try:
            # A source that has not opened the text does without it, and evals may, too.
            reads = source is None or "contexts" in vars(stream)
            if stream.has_model and (reads or config.evals.reads_text):
                self.text(corpus, backend, reads=reads)
            ports = self.attempt(lambda: self.ports(source, stream)) if there else None
            if ports is None:
                return
            self.doubt(*doubts_of_order(backend, config.sites, stream.model_lock))
            self.sizes(backend, stream, corpus, ports)
            if source is not None:
                self.source(source)
            self.checkpoints()
            if found is not None and schedule is not None and fits and (source is not None or stream.has_model):
                self.attempt(lambda: self.duration(source, stream, corpus, backend, ports, schedule))
        finally:
            if source is not None:
                source.close()

    def fitting(self, backend: ModelBackend, corpus: Corpus) -> tuple[bool, bool]:
        """Whether contexts are short enough for the model, and whether all the sites are there."""
        if not has_model(self.config, self.plugins):
            return True, True
        sites = self.config.sites.all
        self.attempt(lambda: check_context_size(backend, corpus.context_size))
        self.attempt(lambda: check_hooks(backend, sites, sites_option(self.config)))
        fits = backend.n_ctx is None or corpus.context_size <= backend.n_ctx
        return fits, {site.hook_name for site in sites} <= set(backend.hook_names())

    def ports(self, source: SupervisedSource | None, stream: StreamContext) -> Ports:
        """The widths of the sites; a stated one that is wrong is among the problems."""
        widths = stream.widths if source is None else widths_of(source, stream)
        sites, model = self.config.sites, stream.backend.name
        self.attempt(lambda: checked_ports(widths, sites, self.options.d_in, model))
        return Ports.of(sites, widths)

    def training(self) -> None:
        """What the configuration alone says."""
        training = self.config.training
        self.numbers |= {"steps": training.steps, "training_tokens": training.total_tokens}
        tuned = f", the last {training.finetuning_tokens:,} for fine-tuning" if training.finetuning_tokens else ""
        self.facts["training"] = (
            f"{training.steps:,} steps of {training.train_batch_size_tokens:,} tokens, "
            f"{training.total_tokens:,} in all{tuned}"
        )
        if training.dead_after >= training.steps:
            self.warnings.append(
                f"training.dead_feature_window is {training.dead_after}, so in {training.steps} steps no "
                "feature is ever counted as dead"
            )
        window = attrs.fields(
            TrainingConfig
        ).feature_sampling_window.default  # which is for long runs: no fault of theirs
        if training.feature_sampling_window > training.steps and training.feature_sampling_window != window:
            self.warnings.append(
                f"training.feature_sampling_window is {training.feature_sampling_window}, so in {training.steps} steps "
                "no firing fractions are logged"
            )

    def text(self, corpus: Corpus, backend: ModelBackend, *, reads: bool) -> None:
        """The text, which training itself ``reads`` or only evals do, and what the model makes of it."""
        found = look_at_text(self.config, corpus, backend, self.attempt, reads=reads)
        self.facts |= found.facts
        self.doubt(*found.warnings)

    def sizes(self, backend: ModelBackend, stream: StreamContext, corpus: Corpus, ports: Ports) -> None:
        """Widths, memory and disk."""
        item = self.plugins.find(SAE_ARCHITECTURES, self.config.sae)
        # Memory is taken as it is written to, so this takes none.
        sae = self.attempt(lambda: build_module(item, self.options, ports, self.plugins))
        if sae is None:
            return
        d_sae, dtype = sae.d_sae, getattr(torch, self.options.dtype)
        parameters = sae.table.count()
        saved = sae.table.count(lambda entry: entry.dtype(dtype).itemsize)
        weights = max(saved, parameters * torch.float32.itemsize)  # bfloat16 trains in float32
        kept = moment_bytes(self.config, self.plugins, sae)
        self.numbers |= {"d_in": ports.d_in, "d_sae": d_sae, "sae_bytes": 2 * weights + (kept or 0)}
        self.numbers |= {"optimizer_bytes": kept} if kept is not None else {}
        self.sites(backend, ports)
        self.facts["SAE"] = f"{d_sae:,} features, {parameters:,} parameters"
        if d_sae < ports.d_in:
            self.warnings.append(f"the SAE has fewer features ({d_sae}) than its input has dimensions ({ports.d_in})")
        model_bytes = backend.memory_bytes() if isinstance(backend, HasMemory) else 0
        if model_bytes:
            self.numbers["model_bytes"] = model_bytes
            self.facts["model memory"] = _bytes(model_bytes)
        own = f", and the optimizer's {_bytes(kept)}" if kept is not None else "; what the optimizer keeps is not known"
        self.facts["SAE memory"] = f"{_bytes(2 * weights + (kept or 0))} (weights and gradients{own})"
        self.facts["disk"] = f"{_bytes(saved + 4 * d_sae)} for each saved SAE"
        if not stream.has_model:
            return
        try:
            self.cache(stream, corpus)
        except SaekitError as error:  # training does without
            self.warnings.append(f"`saekit cache` could not write a cache for this run: {error}")

    def sites(self, backend: ModelBackend, ports: Ports) -> None:
        """What is read and written, and how wide it is."""
        inputs, targets = (
            ", ".join(f"{name} of {backend.name}, width {width}" for name, width in widths.items())
            for widths in (ports.inputs, ports.targets)
        )
        if ports.same:
            self.facts["site" if len(ports.inputs) == 1 else "sites"] = inputs
            return
        self.numbers["d_out"] = ports.d_out
        self.facts |= {"inputs": inputs, "targets": targets}

    def cache(self, stream: StreamContext, corpus: Corpus) -> None:
        """The size of the cache that ``saekit cache`` would write."""
        sites = cache_sites(self.config)
        check_context_size(stream.backend, corpus.context_size)
        check_hooks(stream.backend, sites, "activations.cache.sites")
        wide = open_stream(self.config, corpus, self.plugins, stream.backend, sites, doubt=self.doubt)
        contexts = cached_contexts(self.config, corpus.context_size)
        needed = plan_cache(self.config, wide, corpus.context_size).bytes_for(contexts)
        place = Path(self.config.activations.cache.folder).absolute()
        free = shutil.disk_usage(next(parent for parent in (place, *place.parents) if parent.exists())).free
        self.numbers["cache_bytes"] = needed
        self.facts["activation cache"] = f"{_bytes(needed)} if `saekit cache` writes it; {_bytes(free)} are free"

    def source(self, source: ActivationSource) -> None:
        """The memory that batches come from."""
        size = source.memory_bytes() if isinstance(source, HasMemory) else 0
        if not size:
            return
        self.numbers["buffer_bytes"] = size
        self.facts["buffer memory"] = _bytes(size)
        available = available_memory()
        needed = size + self.numbers.get("sae_bytes", 0)
        on_cpu = resolve_device("auto", "") == "cpu"
        if on_cpu and needed > available:
            self.warnings.append(
                f"the buffer and the SAE need {_bytes(needed)}, and {_bytes(available)} of memory are free; lower "
                "activations.source.n_batches_in_buffer"
            )

    def checkpoints(self) -> None:
        """What a run that can be resumed takes on the disk: weights, what the optimizer keeps, and the buffer."""
        keep = self.config.checkpoints.keep_last
        if not keep:
            self.facts["checkpoints"] = "none that a run could go on from (checkpoints.keep_last = 0)"
            return
        if "sae_bytes" not in self.numbers:
            return  # there is no such SAE, which is among the problems
        kept = self.numbers.get("optimizer_bytes", 0)
        size = (self.numbers["sae_bytes"] + kept) // 2 + self.numbers.get("buffer_bytes", 0)
        self.numbers["checkpoint_bytes"] = size
        self.facts["checkpoints"] = f"up to {_bytes(size)} each; {keep} are kept, and one more while it is written"

    def first_step(self, trainer: SAETrainer, rows: Batch) -> None:
        """The features that no activation makes fire before anything is learnt."""
        silent, share = silent_at_start(trainer, rows)
        d_sae, n = trainer.sae.d_sae, min(len(rows), trainer.training.train_batch_size_tokens)
        self.numbers["silent_at_start"] = silent
        self.facts["silent at start"] = f"{silent:,} of {d_sae:,} features fire on none of the first {n:,} tokens"
        if silent > d_sae / 2 and share > _FIRINGS:  # with fewer, chance alone leaves many out
            self.warnings.append(
                f"{silent:,} of {d_sae:,} features fire on none of the first {n:,} tokens, though a feature fires "
                f"{share:,.0f} times on average; many may stay dead. Start b_dec at the mean of activations "
                '(sae.b_dec_init_method = "mean"), or choose fewer features'
            )

    def duration(
        self,
        source: SupervisedSource | None,
        stream: StreamContext,
        corpus: Corpus,
        backend: ModelBackend,
        ports: Ports,
        schedule: Any,
    ) -> None:
        """Seconds, from a few forwards (or reads) and steps."""
        if source is None or "contexts" in vars(stream):  # the source has opened the text, so it runs the model
            per_token, rows = timed_forwards(stream, corpus.contexts(backend).take)
            what = "the model"
        else:
            per_token, rows = timed(lambda: next(source, None), stream.sites)
            what = "reading activations"
        training = self.config.training
        if self.options.d_in in (None, ports.d_in):
            trainer = make_trainer(self.config, self.plugins, backend, corpus, self.options, ports, schedule)
            give_weights(trainer, self.config, corpus, lambda: rows.activations, self.start)
            self.facts["SAE step"] = trainer.step_path()
            self.first_step(trainer, rows)
            per_step = timed_steps(trainer, rows)
        else:
            per_step = 0.0
        forward = per_token * training.total_tokens
        steps = per_step * training.steps
        self.numbers |= {"forward_seconds": forward, "step_seconds": steps, "seconds": forward + steps}
        self.facts["duration"] = (
            f"about {_duration(forward + steps)}: {what} {_duration(forward)}, the SAE {_duration(steps)}, less what "
            "overlaps; evals not counted"
        )
