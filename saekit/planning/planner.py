"""``saekit plan``: what a run would do, need and take, without running it."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import attrs
import torch

from saekit.abilities import HasMemory
from saekit.ambient import ambient
from saekit.config import TrainConfig
from saekit.data import Corpus
from saekit.devices import resolve_device
from saekit.distributed.launched import check_layout
from saekit.errors import SaekitError
from saekit.kernels.workspace import SHARED
from saekit.kinds import ACTIVATION_SOURCES, SAE_ARCHITECTURES
from saekit.planning.duration import TimedRun
from saekit.planning.findings import Findings
from saekit.planning.lanes import PlannedLane, open_lanes
from saekit.planning.members import PlannedMember, training_doubts, training_text
from saekit.planning.memory import Verdict, free_disk, process_text, verdict
from saekit.planning.mesh import planned_world
from saekit.planning.other_ways import SIZES_FACT
from saekit.planning.outline import of_outline, outlined_for
from saekit.planning.plan import Plan, cannot_run, in_order
from saekit.planning.sae_sizes import devices_of
from saekit.planning.sizes import Sizes
from saekit.planning.text import counted_unread, look_at_texts, no_contexts
from saekit.planning.times import Stopwatch
from saekit.plugins.manager import PluginManager
from saekit.protocols import ModelBackend
from saekit.runs.checks import check_without_model, chosen_trackers, has_model
from saekit.runs.doubts import doubts_of_order, doubts_of_start
from saekit.runs.folder import check_run_folder
from saekit.runs.opening import (
    build_backend,
    check_context_size,
    check_hooks,
    checked_ports,
    sites_by_option,
)
from saekit.runs.parts import make_evals, make_schedule
from saekit.runs.setup import sae_options
from saekit.runs.spreading import check_spreads
from saekit.runs.sweep import check_together, member_names
from saekit.runs.working_memory import free_memory, resident, resident_peak
from saekit.status import Status
from saekit.values import Ports

if TYPE_CHECKING:
    from saekit.protocols import Eval
    from saekit.training.schedule import ComposedSchedule

__all__ = ["look"]


def look(
    configs: Sequence[TrainConfig],
    names: Sequence[str],
    plugins: PluginManager,
    model: object | None,
    dataset: object | None,
    *,
    load: bool = True,
    measure: bool = False,
    before: float = 0.0,
    say: Status,
) -> Plan:
    """The plan of a run of ``configs``, by the ``names`` of their SAEs, whose text and model
    :mod:`saekit.commands.preflight` has found.

    Without ``load`` the model is only outlined, and nothing is timed.  ``measure``: other ways to run the model are
    timed, too.  ``before``: seconds that went by, as they do in a run, before this could be asked.  ``say`` is
    told of what is done, with a line of what is found before it is timed.
    """
    planner = _Planner(configs, names, plugins, measure=measure, opening=Stopwatch(before))
    try:
        with ambient():
            planner.look(model, dataset, load=load, say=say)
    finally:
        SHARED.release()
    return planner.plan()


class _Planner:
    def __init__(
        self,
        configs: Sequence[TrainConfig],
        names: Sequence[str],
        plugins: PluginManager,
        *,
        measure: bool,
        opening: Stopwatch,
    ) -> None:
        self.plugins, self.measure, self.opening = plugins, measure, opening
        self.config = configs[0]
        """For what all have in common."""
        self.members = [
            PlannedMember(name, config, plugins.options(SAE_ARCHITECTURES, config.sae))
            for name, config in zip(names, configs, strict=True)
        ]
        self.configs = configs
        self.found = Findings(names)
        self.schedules: dict[str, ComposedSchedule] = {}
        self.evals: dict[str, Mapping[str, Eval]] = {}
        self.libraries: float | None = None
        """Bytes that the process has beside the model."""
        self.peak: float | None = None  # the most that it has, as far as parts of the run were tried
        self.world = planned_world(self.config)
        self.passed = False
        self.facts: dict[str, str] = {}
        self.numbers: dict[str, float] = {} if len(configs) == 1 else {"saes": len(configs)}
        self.counted: Sizes | None = None
        devices = [device for member in self.members for device in devices_of(member.config, member.options)]
        self.free = free_memory(list(dict.fromkeys(devices)))
        """Bytes on each device, before anything is loaded."""
        self.began = resident() or 0.0
        """Bytes that the process had then."""
        self.unmeasured = "the run could not be timed"
        """Why other ways to run the model are not."""

    def untimed(self, why: str) -> None:
        """What is not tried, and ``why``."""
        self.unmeasured = why
        self.facts["duration"] = f"not measured: {why}"

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
        problems, warnings = self.found.problems, [*self.found.warnings, *found.warnings]
        text = cannot_run(problems) or found.text
        return Plan(in_order(self.facts), self.numbers, problems, warnings, text, found.fits)

    def look(self, model: object | None, dataset: object | None, *, load: bool, say: Status) -> None:
        """Everything, as far as it can be reached."""
        self.early(load=load)
        if not self.together():
            self.untimed("these SAEs cannot be trained together")
            return
        config, mask = self.config, self.config.tokens.mask_column
        corpus = self.found.attempt(lambda: Corpus.of(config.dataset, config.evals, dataset, mask))
        if model is None and corpus is not None and has_model(config, self.plugins):
            self.count(corpus, told=not load)
        if not load or (self.counted is not None and self.counted.memory.lacking(self.free)):
            self.untimed("it does not fit" if load else "the model was not loaded")
            return
        backend = self.loaded(model)
        if corpus is None or backend is None:
            return
        self.make_evals(corpus, backend)
        fits, there = self.fitting(backend, corpus)
        with self.opening():
            lanes = self.found.attempt(lambda: self.open_lanes(self.members, corpus, backend))
            if lanes is None:
                return
        with contextlib.ExitStack() as opened:
            with self.opening():
                for lane in lanes if there else ():
                    lane.source = self.found.attempt(functools.partial(lane.opened, self.plugins), of=lane.names)
                    opened.callback(lane.close)
            self.texts(lanes, corpus, backend)
            if not there or not self.ports(lanes, backend):
                return
            self.doubts(lanes, backend)
            found = self.sizes(self.members, lanes, corpus, backend)
            rows = all(lane.source is not None or lane.stream.has_model for lane in lanes)
            whole = len(self.schedules) == len(self.members) and not any(one.refused for one in self.members)
            if found is not None and found.memory.lacking(self.free):
                self.untimed("it does not fit")
            elif found is not None and fits and rows and whole:
                say.line(f"counted so far: {self.plan().verdict}")
                say("trying a few batches")
                self.found.attempt(lambda: self.duration(lanes, corpus, backend))

    # ---- what needs neither the model nor the text

    def early(self, *, load: bool) -> None:
        """What configurations alone say, each for itself."""
        whole = len(self.members) > 1
        self.training()
        self.found.attempt(lambda: self.check_folder(alone=not whole))
        if self.world.saes.size > 1 and whole:
            self.found.attempt(lambda: check_layout(self.config.distributed, len(self.configs)))
        for member in self.members:
            self.early_of(member, load=load)

    def together(self) -> bool:
        """Whether they can share a run."""

        def check() -> bool:
            check_together(self.configs, self.plugins)
            return True

        return self.found.attempt(check) is not None

    def check_folder(self, *, alone: bool) -> None:
        """That a run folder of this name can be made, and folders of the SAEs in it."""
        name = self.config.checkpoints.name if alone else member_names(self.configs, self.plugins)[0]
        check_run_folder(self.config, name)

    def early_of(self, member: PlannedMember, *, load: bool) -> None:
        """What the configuration of one SAE says."""
        config, plugins, own = member.config, self.plugins, [member.name]
        attempt = functools.partial(self.found.attempt, of=own)
        self.found.doubt(*training_doubts(config.training), of=own)
        if load:  # else it may be planned for another machine
            attempt(lambda: resolve_device(config.training.device, "training.device", member.options.dtype))
        attempt(lambda: check_without_model(config, plugins))
        attempt(lambda: check_spreads([config], self.world.column))
        attempt(lambda: chosen_trackers(config, plugins))
        found = attempt(lambda: sae_options(config, plugins))
        member.refused = found is None
        if found is not None:
            member.options, member.start = found
            self.found.doubt(*doubts_of_start(config, member.start), of=own)
        schedule = attempt(lambda: make_schedule(config, plugins))
        if schedule is not None:
            self.schedules[member.name] = schedule
            if (remark := schedule.remark()) is not None:
                self.found.doubt(remark, of=own)

    def training(self) -> None:
        """How long it trains."""
        training = [member.config.training for member in self.members]
        steps, tokens = max(one.steps for one in training), max(one.total_tokens for one in training)
        self.numbers |= {"steps": steps, "training_tokens": tokens}
        self.facts["training"] = training_text({one.name: one.config.training for one in self.members})

    # ---- the model

    def loaded(self, model: object | None) -> ModelBackend | None:
        """The model, with the memory that loading it takes."""
        self.passed = model is not None
        build = functools.partial(build_backend, self.config, self.plugins, model)
        with self.opening():
            backend, peak = resident_peak(lambda: self.found.attempt(build))
        now, own = resident(), 0
        if isinstance(backend, HasMemory) and torch.device(backend.device).type == "cpu":
            own = backend.memory_bytes()
        if now is not None and backend is not None:
            self.libraries = max(now - own, 0.0)
            if peak is not None and not self.passed:
                self.numbers["loading_bytes"] = max(peak - self.libraries, 0.0)
        return backend

    def make_evals(self, corpus: Corpus, backend: ModelBackend) -> None:
        """What is measured of each SAE."""

        @functools.cache
        def held_out(number: int) -> torch.Tensor:  # read once for all SAEs, as a run does
            return attrs.evolve(corpus, evals=attrs.evolve(corpus.evals, n_contexts=number)).held_out(backend, seed=0)

        for member in self.members:
            measured = functools.partial(held_out, member.config.evals.n_contexts)
            given = member.config, self.plugins, backend, measured, self.device_of(member), member.name
            made = self.found.attempt(functools.partial(make_evals, *given), of=[member.name])
            self.evals[member.name] = made or {}

    def device_of(self, member: PlannedMember) -> str:
        """Where it trains, or the CPU where that is not there, which was said."""
        with contextlib.suppress(SaekitError):
            return resolve_device(member.config.training.device, "training.device", member.options.dtype)
        return "cpu"

    def fitting(self, backend: ModelBackend, corpus: Corpus) -> tuple[bool, bool]:
        """Whether contexts are short enough for the model, and whether all the sites are there."""
        if not has_model(self.config, self.plugins):
            return True, True
        self.found.attempt(lambda: check_context_size(backend, corpus.context_size))
        hooks, there = set(backend.hook_names()), True
        for member in self.members:
            ((option, sites),) = sites_by_option([member.config]).items()
            self.found.attempt(functools.partial(check_hooks, backend, sites, option), of=[member.name])
            there &= {site.hook_name for site in sites} <= hooks
        return backend.n_ctx is None or corpus.context_size <= backend.n_ctx, there

    # ---- batches

    def open_lanes(self, members: Sequence[PlannedMember], corpus: Corpus, backend: ModelBackend) -> list[PlannedLane]:
        """What batches come from, but for their sources."""
        doubt = self.found.doubt
        return open_lanes(members, self.plugins, corpus, backend, self.world, lambda text, names: doubt(text, of=names))

    def texts(self, lanes: Sequence[PlannedLane], corpus: Corpus, backend: ModelBackend) -> None:
        """The text, which training itself reads or only evals do, and what the model makes of it."""
        # A source that has not opened the text does without it, and evals may, too.
        some = any(lane.reads for lane in lanes) or any(one.config.evals.reads_text for one in self.members)
        if lanes[0].stream.has_model and some:
            with self.opening():  # as a run does
                found = look_at_texts(lanes, corpus, backend, self.found)
            self.facts |= found.facts
            self.numbers |= found.numbers

    def ports(self, lanes: Sequence[PlannedLane], backend: ModelBackend) -> bool:
        """The widths of the sites of all SAEs, and whether they are known; a stated one that is wrong is among the
        problems."""
        known = True
        for lane in lanes:
            widths = self.found.attempt(lane.widths, of=lane.names)
            for member in lane.members if widths is not None else ():
                assert widths is not None
                sites, d_in = member.config.sites, member.options.d_in
                check = functools.partial(checked_ports, widths, sites, d_in, backend.name)
                self.found.attempt(check, of=[member.name])
                member.ports = Ports.of(sites, widths)
            known &= widths is not None
        return known

    def doubts(self, lanes: Sequence[PlannedLane], backend: ModelBackend) -> None:
        """What looks wrong with the order of sites."""
        for sites in dict.fromkeys(config.sites for config in self.configs):
            own = [member.name for member in self.members if member.config.sites == sites]
            self.found.doubt(*doubts_of_order(backend, sites, lanes[0].stream.model_lock), of=own)

    # ---- what it takes

    def sizes(
        self, members: Sequence[PlannedMember], lanes: Sequence[PlannedLane], corpus: Corpus, backend: ModelBackend
    ) -> Sizes | None:
        """Widths, memory and disk; None where they cannot be counted."""
        counted = Sizes(members, lanes, self.plugins, corpus, backend, self.found, self.world, self.free, self.numbers)
        if self.found.attempt(counted.count) is None:
            return None
        self.numbers |= counted.numbers
        self.facts |= counted.facts
        self.counted = counted
        return counted

    def count(self, corpus: Corpus, *, told: bool) -> None:
        """What can be told before the model is loaded and the text is opened; ``told``: why it cannot is a problem."""
        first, again = Stopwatch(), Stopwatch()
        try:
            with first():
                outline = outlined_for(self.configs, self.plugins)
            with again():  # without what it imports, which a run does, too
                outlined_for(self.configs, self.plugins)
            self.opening.seconds += max(first.seconds - again.seconds, 0.0)
        except SaekitError:
            if told:
                self.found.attempt(lambda: outlined_for(self.configs, self.plugins))
            return  # to load it says what is wrong
        _, there = self.fitting(outline, corpus)
        if not there:
            return
        members = [attrs.evolve(one, config=of_outline(one.config, outline)) for one in self.members]
        lanes = self.found.attempt(lambda: self.open_lanes(members, corpus, outline))
        if lanes is None:
            return
        if told and (text := counted_unread(lanes, corpus)):
            self.facts["tokens"] = text
        with contextlib.ExitStack() as opened:
            for lane in lanes:
                lane.stream.contexts = lane.stream.own.contexts = no_contexts(outline, corpus)
                if self.plugins.find(ACTIVATION_SOURCES, lane.longest.config.activations.source).entry.needs_text:
                    with contextlib.suppress(SaekitError):  # with the text, it says what is wrong
                        lane.source = lane.opened(self.plugins)
                opened.callback(lane.close)
            if self.ports(lanes, outline):
                self.sizes(members, lanes, corpus, outline)

    def duration(self, lanes: Sequence[PlannedLane], corpus: Corpus, backend: ModelBackend) -> None:
        """Seconds, from a few forwards (or reads), steps and contexts that are measured."""
        assert self.counted is not None
        timed = TimedRun(
            self.plugins,
            self.world,
            corpus,
            backend,
            self.counted,
            opening=self.opening.seconds,
            alone=not self.passed,
            measure=self.measure,
        )
        try:
            timed.time(lanes, self.schedules, self.evals, any(lane.reads for lane in lanes))
        finally:  # what is known before a step is refused is worth telling
            self.peak = timed.peak
            self.numbers |= self.counted.numbers | timed.numbers
            self.facts |= self.counted.facts | timed.facts
            self.found.doubt(*timed.warnings)
