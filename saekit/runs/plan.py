"""``saekit plan``: what a run would do, need and take, without running it."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

import attrs
import torch

from saekit.abilities import HasMemory
from saekit.ambient import ambient
from saekit.config import SAEConfig, TrainConfig, TrainingConfig
from saekit.data import Corpus, StreamContext
from saekit.data.faults import problems_of
from saekit.data.stream import probe
from saekit.devices import resolve_device
from saekit.errors import ModelError, SaekitError
from saekit.kernels.workspace import SHARED
from saekit.kinds import ACTIVATION_SOURCES, MODEL_BACKENDS, SAE_ARCHITECTURES
from saekit.plugins.building import blamed, outlined
from saekit.plugins.manager import PluginManager
from saekit.protocols import ActivationSource, ModelBackend
from saekit.runs.checks import check_without_model, chosen_trackers, has_model
from saekit.runs.counting import Counted
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
from saekit.runs.other_ways import SIZES_FACT
from saekit.runs.parts import make_evals, make_schedule
from saekit.runs.planned import Plan, cannot_run, in_order
from saekit.runs.planned_duration import TimedRun
from saekit.runs.planned_memory import Verdict, free_disk, free_memory, process_text, verdict
from saekit.runs.planned_mesh import planned_world
from saekit.runs.planned_sizes import Sizes, devices_of
from saekit.runs.planned_text import look_at_text, no_contexts
from saekit.runs.planned_time import Stopwatch
from saekit.runs.setup import sae_options
from saekit.runs.spreading import check_spreads
from saekit.runs.supervised import SupervisedSource
from saekit.runs.working_memory import resident, resident_peak
from saekit.status import Status
from saekit.tokens import special_ids
from saekit.values import Ports

if TYPE_CHECKING:
    from saekit.protocols import Eval
    from saekit.sae.module import SAEModule

__all__ = ["look"]

T = TypeVar("T")


def look(
    config: TrainConfig,
    plugins: PluginManager,
    model: object | None,
    dataset: object | None,
    *,
    load: bool = True,
    measure: bool = False,
    before: float = 0.0,
    say: Status,
) -> Plan:
    """The plan of a run whose text and model :mod:`saekit.commands.preflight` has found.

    Without ``load`` the model is only outlined, and nothing is timed.  ``measure``: other ways to run the model are
    timed, too.  ``before``: seconds that went by, as they do in a run, before this could be asked.  ``say`` is
    told of what is done, with a line of what is found before it is timed.
    """
    planner = _Planner(config, plugins, measure=measure, opening=Stopwatch(before))
    try:
        with ambient():
            planner.look(model, dataset, load=load, say=say)
    finally:
        SHARED.release()
    return planner.plan()


def _of_outline(config: TrainConfig, outline: ModelBackend) -> TrainConfig:
    """``config``, with some id in the place of special tokens, which an outline has no tokenizer to tell.

    No size depends on which they are.
    """
    if config.tokens.exclude_special_tokens is not True or special_ids(outline):
        return config
    return attrs.evolve(config, tokens=attrs.evolve(config.tokens, exclude_special_tokens=(0,)))


def _reads(stream: StreamContext) -> bool:
    """Whether a source has opened the text."""
    return "contexts" in vars(stream) or "contexts" in vars(stream.own)


def _counted_unread(config: TrainConfig, corpus: Corpus, stream: StreamContext) -> str:
    """How many tokens count, as far as positions say it."""
    counted = Counted(stream.rows_per_context(corpus.context_size), corpus.context_size)
    by_text = stream.choice.exclude or config.tokens.mask_column is not None
    return f"at most {counted}: how many, the text says, and it was not read" if by_text else str(counted)


class _Planner:
    def __init__(self, config: TrainConfig, plugins: PluginManager, *, measure: bool, opening: Stopwatch) -> None:
        self.config, self.plugins, self.measure, self.opening = config, plugins, measure, opening
        self.evals: Mapping[str, Eval] = {}
        self.libraries: float | None = None
        """Bytes that the process has beside the model."""
        self.peak: float | None = None  # the most that it has, as far as parts of the run were tried
        self.options: SAEConfig = plugins.options(SAE_ARCHITECTURES, config.sae)
        self.world = planned_world(config)
        self.start: SAEModule | None = None
        self.refused = self.passed = False
        self.facts: dict[str, str] = {}
        self.numbers: dict[str, float] = {}
        self.problems: list[str] = []
        self.warnings: list[str] = []
        self.counted: Sizes | None = None
        self.free = free_memory(devices_of(config, self.options))
        """Bytes on each device, before anything is loaded."""
        self.began = resident() or 0.0
        """Bytes that the process had then."""
        self.unmeasured = "the run could not be timed"
        """Why other ways to run the model are not."""

    def attempt(self, work: Callable[[], T]) -> T | None:
        """``work()``, or None with its error among the problems."""
        try:
            return work()
        except SaekitError as error:
            found = [f"{path}: {message}" if path else message for path, message in problems_of(error)]
        self.problems += [problem for problem in found if problem not in self.problems]
        return None

    def untimed(self, why: str) -> None:
        """What is not tried, and ``why``."""
        self.unmeasured = why
        self.facts["duration"] = f"not measured: {why}"

    def doubt(self, *texts: str) -> None:
        """Among the warnings, each once."""
        self.warnings += [text for text in dict.fromkeys(texts) if text not in self.warnings]

    def plan(self) -> Plan:
        """What was found."""
        found = Verdict("")
        if self.measure:
            self.facts.setdefault(SIZES_FACT, f"not compared: {self.unmeasured}")
        if self.counted is not None:
            place = free_disk(self.config.checkpoints.folder)
            if self.libraries is not None and self.peak is not None:  # what no tensor shows is seen when it is tried
                self.libraries = max(self.libraries, self.peak - self.counted.memory.needed().get("cpu", 0.0))
            memory = self.counted.memory.beside(self.libraries or 0.0, self.counted.tokenizing)
            own = 0.0 if self.libraries is None else self.began  # a run has it instead of this process, not beside it
            free = {device: size + own * (device == "cpu") for device, size in self.free.items()}
            found = verdict(memory, self.counted.disk, free, place, self.world.size)
            self.facts |= self.counted.memory.facts(free)
            if self.libraries is not None and "cpu" in (needed := self.counted.memory.needed()):
                self.numbers["peak_bytes"] = self.libraries + needed["cpu"]
                told = process_text(needed["cpu"], self.libraries) + self.counted.told_of_tokenizing()
                self.facts["memory of the process"] = told
        warnings = [*self.warnings, *found.warnings]
        text = cannot_run(self.problems) or found.text
        return Plan(in_order(self.facts), self.numbers, self.problems, warnings, text, found.fits)

    def look(self, model: object | None, dataset: object | None, *, load: bool, say: Status) -> None:
        """Everything, as far as it can be reached."""
        config, plugins = self.config, self.plugins
        device = self.early(load=load)
        schedule = self.attempt(lambda: make_schedule(config, plugins))
        if schedule is not None and (remark := schedule.remark()) is not None:
            self.warnings.append(remark)
        mask = config.tokens.mask_column
        corpus = self.attempt(lambda: Corpus.of(config.dataset, config.evals, dataset, mask))
        if model is None and corpus is not None and has_model(config, plugins):
            self.count(corpus, told=not load)
        if not load or (self.counted is not None and self.counted.memory.lacking(self.free)):
            self.untimed("it does not fit" if load else "the model was not loaded")
            return
        backend = self.loaded(model)
        if corpus is None or backend is None:
            return
        measured = functools.partial(corpus.held_out, backend, seed=0)
        self.evals = self.attempt(lambda: make_evals(config, plugins, backend, measured, device or "cpu")) or {}
        fits, there = self.fitting(backend, corpus)
        with self.opening():
            stream = self.attempt(
                lambda: open_stream(
                    config, corpus, plugins, backend, config.sites.all, world=self.world, doubt=self.doubt
                )
            )
            if stream is None:
                return
            source = self.attempt(lambda: open_source(config, plugins, stream)) if there else None
        try:
            # A source that has not opened the text does without it, and evals may, too.
            reads = source is None or _reads(stream)
            if stream.has_model and (reads or config.evals.reads_text):
                self.text(corpus, backend, stream, reads=reads)
            ports = self.attempt(lambda: self.ports(source, stream)) if there else None
            if ports is None:
                return
            self.doubt(*doubts_of_order(backend, config.sites, stream.model_lock))
            found = self.sizes(stream, corpus, ports, source)
            tried = found is not None and schedule is not None and fits and not self.refused
            if found is not None and found.memory.lacking(self.free):
                self.untimed("it does not fit")
            elif tried and (source is not None or stream.has_model):
                say.line(f"counted so far: {self.plan().verdict}")
                say("trying a few batches")
                self.attempt(lambda: self.duration(source, stream, corpus, backend, ports, schedule))
        finally:
            if source is not None:
                source.close()

    def loaded(self, model: object | None) -> ModelBackend | None:
        """The model, with the memory that loading it takes."""
        self.passed = model is not None
        with self.opening():
            backend, peak = resident_peak(lambda: self.attempt(lambda: build_backend(self.config, self.plugins, model)))
        now, own = resident(), 0
        if isinstance(backend, HasMemory) and torch.device(backend.device).type == "cpu":
            own = backend.memory_bytes()
        if now is not None and backend is not None:
            self.libraries = max(now - own, 0.0)
            if peak is not None and not self.passed:
                self.numbers["loading_bytes"] = max(peak - self.libraries, 0.0)
        return backend

    def early(self, *, load: bool) -> str | None:
        """What needs neither the model nor the text; gives the device, if it is there."""
        config, plugins = self.config, self.plugins
        self.training()
        self.attempt(lambda: check_run_folder(config, config.checkpoints.name))
        device = None
        if load:  # else it may be planned for another machine
            device = self.attempt(lambda: resolve_device(config.training.device, "training.device", self.options.dtype))
        self.attempt(lambda: check_without_model(config, plugins))
        self.attempt(lambda: check_spreads([config], self.world.column))
        self.attempt(lambda: chosen_trackers(config, plugins))
        found = self.attempt(lambda: sae_options(config, plugins))
        self.refused = found is None
        if found is not None:
            self.options, self.start = found
            self.doubt(*doubts_of_start(config, self.start))
        return device

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
            f"{training.steps:,} step{'s' * (training.steps != 1)} of {training.batch_text} tokens, "
            f"{training.total_tokens:,} in all{tuned}"
        )
        if training.dead_after >= training.steps:
            self.warnings.append(
                f"training.dead_feature_window is {training.dead_after}, so in {training.steps} steps no "
                "feature is ever counted as dead"
            )
        window = attrs.fields(TrainingConfig).feature_sampling_window.default  # for long runs: no fault of theirs
        if training.feature_sampling_window > training.steps and training.feature_sampling_window != window:
            self.warnings.append(
                f"training.feature_sampling_window is {training.feature_sampling_window}, so in {training.steps} steps "
                "no firing fractions are logged"
            )

    def text(self, corpus: Corpus, backend: ModelBackend, stream: StreamContext, *, reads: bool) -> None:
        """The text, which training itself ``reads`` or only evals do, and what the model makes of it."""
        with self.opening():  # as a run does
            found = look_at_text(self.config, corpus, backend, self.attempt, stream, reads=reads)
        self.facts |= found.facts
        self.numbers |= found.numbers
        self.doubt(*found.warnings)

    def sizes(
        self,
        stream: StreamContext,
        corpus: Corpus,
        ports: Ports,
        source: ActivationSource | None,
        config: TrainConfig | None = None,
    ) -> Sizes | None:
        """Widths, memory and disk; None where they cannot be counted."""
        own = config or self.config
        counted = Sizes(own, self.plugins, self.options, stream, corpus, ports, self.world, self.free, self.numbers)
        if self.attempt(lambda: counted.count(source)) is None:
            return None
        self.numbers |= counted.numbers
        self.facts |= counted.facts
        self.doubt(*counted.warnings)
        self.counted = counted
        return counted

    def outlined(self) -> ModelBackend:
        """The model without its weights; :class:`ModelError` where its backend cannot make one."""
        chosen = self.plugins.bound(MODEL_BACKENDS, self.config.model.backend)
        made: ModelBackend | None = outlined(chosen.item, chosen.options, model=self.config.model)
        if made is None:
            raise ModelError(f"the backend {chosen.key!r} cannot tell the sizes of a model before it is loaded")
        sites = [site for site in self.config.sites.all if site.hook_name in made.hook_names()]
        with blamed(chosen.item, "a forward of its outline"):  # of some models, shapes depend on numbers
            probe(made, sites)
        return made

    def count(self, corpus: Corpus, *, told: bool) -> None:
        """What can be told before the model is loaded and the text is opened; ``told``: why it cannot is a problem."""
        first, again = Stopwatch(), Stopwatch()
        try:
            with first():
                outline = self.outlined()
            with again():  # without what it imports, which a run does, too
                self.outlined()
            self.opening.seconds += max(first.seconds - again.seconds, 0.0)
        except SaekitError:
            if told:
                self.attempt(self.outlined)
            return  # to load it says what is wrong
        _, there = self.fitting(outline, corpus)
        if not there:
            return
        config = _of_outline(self.config, outline)
        stream = self.attempt(
            lambda: open_stream(config, corpus, self.plugins, outline, config.sites.all, world=self.world)
        )
        if stream is None:
            return
        if told and stream.has_model and not stream.counts_all:
            self.facts["tokens"] = _counted_unread(config, corpus, stream)
        stream.contexts = stream.own.contexts = no_contexts(outline, corpus)
        source = None
        if self.plugins.find(ACTIVATION_SOURCES, self.config.activations.source).entry.needs_text:
            with contextlib.suppress(SaekitError):  # with the text, it says what is wrong
                source = open_source(self.config, self.plugins, stream)
        ports = self.attempt(lambda: self.ports(source, stream))
        if ports is not None:
            self.sizes(stream, corpus, ports, source, config)
        if source is not None:
            source.close()

    def duration(
        self,
        source: SupervisedSource | None,
        stream: StreamContext,
        corpus: Corpus,
        backend: ModelBackend,
        ports: Ports,
        schedule: Any,
    ) -> None:
        """Seconds, from a few forwards (or reads), steps and contexts that are measured."""
        assert self.counted is not None
        timed = TimedRun(
            self.config,
            self.plugins,
            self.options,
            self.world,
            stream,
            corpus,
            backend,
            ports,
            self.counted,
            opening=self.opening.seconds,
            start=self.start,
            alone=not self.passed,
            measure=self.measure,
        )
        timed.time(source, schedule, self.evals, _reads(stream))
        self.peak = timed.peak
        self.numbers |= self.counted.numbers | timed.numbers
        self.facts |= self.counted.facts | timed.facts
        self.doubt(*timed.warnings)
