"""SAEs that train side by side on one model and one text.  One SAE is a session of one."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import attrs
import torch
from torch import Tensor

from saekit.abilities import CopiesState, Pauses
from saekit.config import TrainConfig
from saekit.data import Corpus, StreamContext
from saekit.data.shared import SharedForwards
from saekit.devices import resolve_device
from saekit.distributed.batches import SpreadSource, shares_rows, taken_over
from saekit.distributed.launched import check_features
from saekit.distributed.world import ALONE, World
from saekit.errors import SaekitError
from saekit.plugins.manager import PluginManager
from saekit.protocols import ActivationSource, Eval
from saekit.runs.checks import check_without_model, chosen_trackers, has_model
from saekit.runs.counting import Used
from saekit.runs.doubts import doubts_of_order, doubts_of_start
from saekit.runs.first_loss import first_loss, first_loss_text
from saekit.runs.opening import (
    check_start_widths,
    checked_ports,
    loading_text,
    open_backend,
    open_source,
    open_stream,
    seed_for,
    sites_by_option,
    warn_of,
    widths_of,
)
from saekit.runs.parts import make_evals, make_schedule
from saekit.runs.randomness import random_state, set_random_state
from saekit.runs.setup import give_weights, looks_ahead, make_trainer, sae_options
from saekit.runs.spreading import check_spreads, doubts_of_measuring
from saekit.runs.sweep import check_together, lane_key
from saekit.runs.waiting import metrics_of, metrics_state
from saekit.sae.module import SAEModule
from saekit.site import Site
from saekit.status import Say, Status
from saekit.training.elsewhere import Elsewhere, dealt_out
from saekit.training.loop import Lane, rows_left
from saekit.training.trainer import SAETrainer
from saekit.values import Histogram, Ports

__all__ = ["Member", "Session", "end_lane"]


@attrs.define(eq=False)
class Member:
    """One SAE of a session."""

    name: str
    config: TrainConfig
    trainer: SAETrainer
    evals: Mapping[str, Eval]
    start: SAEModule | None
    """The saved SAE that it starts from."""
    latest: dict[str, float] = attrs.field(factory=dict)
    """The last value of every metric."""
    remarks: tuple[str, ...] = ()
    """What looked wrong in its last evals, in words."""

    @property
    def here(self) -> bool:
        """Whether it trains in this process, and not in others alone."""
        return not isinstance(self.trainer, Elsewhere)

    def note(self, metrics: Mapping[str, float | Histogram]) -> None:
        """Remember the numbers among ``metrics``."""
        self.latest.update({name: value for name, value in metrics.items() if not isinstance(value, Histogram)})


def end_lane(source: ActivationSource, release: Callable[[], None]) -> None:
    """No SAE of a lane has steps left.

    What its source does ahead ends first: a forward that it made after that would be shared with nobody.
    """
    if isinstance(source, Pauses):
        source.pause()
    release()


def _source_state(source: ActivationSource, hold: Callable[[Any], Any]) -> Any:
    state = source.state_dict()
    return state if isinstance(source, CopiesState) and source.copies_state else hold(state)


class Session:
    """Everything that trains, opened and checked, and its state."""

    def __init__(
        self,
        configs: Mapping[str, TrainConfig],
        plugins: PluginManager,
        model: object | None = None,
        dataset: object | None = None,
        sizes: Mapping[str, int] | None = None,
        say: Status | None = None,
        world: World = ALONE,
    ) -> None:
        """Open what ``configs``, by the names of the SAEs, ask for; cheap checks come first."""
        self.plugins, self.world = plugins, world
        self.status = say or Status(verbose=False)
        self.say: Say = self.status
        """Is told what is being done; while a bar is shown, that shows it."""
        check_together(list(configs.values()), plugins)
        check_spreads(list(configs.values()), world)
        sizes = sizes or {}
        prepared = {name: _Prepared.of(config, plugins, sizes.get(name), world) for name, config in configs.items()}
        first = next(iter(configs.values()))
        self.corpus = Corpus.of(first.dataset, first.evals, dataset, first.tokens.mask_column)
        self.has_model = has_model(first, plugins)
        """Whether there is a language model; of those of a session, all or none have it."""
        if self.has_model:
            self.say(loading_text(first, plugins) if model is None else "looking at the model")
        self.backend = open_backend(first, self.corpus, plugins, model, sites_by_option(configs.values()))
        self._held_out: dict[tuple[int, int, str | None], tuple[Tensor, Tensor | None]] = {}
        self.say("reading the text" if self.has_model else "opening the activation source")
        for config in configs.values():
            self.held_out(config)
        self._streams: list[StreamContext] = []
        self.other_rows: list[str] = []
        """What is to be said of rows that did not come out as in the checkpoint, since the last state was loaded."""
        self.used: list[Used] = []
        """What each lane uses of the text."""
        self.lanes: list[Lane] = []
        try:
            self.members = self._open_lanes(configs, prepared)
            if first.checkpoints.keep_last:
                _ = self.identity  # found out now, before a source's thread reads the text as well
        except BaseException:
            self.close()
            raise
        self.told = 0
        """:attr:`tokens` when the observers were last told of a batch."""

    def _open_lanes(self, configs: Mapping[str, TrainConfig], prepared: Mapping[str, _Prepared]) -> dict[str, Member]:
        """A lane for all SAEs that can train on the very same batches."""
        groups: dict[str, list[str]] = {}
        for name, config in configs.items():
            groups.setdefault(lane_key(config, self.plugins), []).append(name)
        shared = SharedForwards(self.backend) if len(groups) > 1 else None
        releases = [self._open_stream([configs[name] for name in names], shared) for names in groups.values()]
        members, ports = dict[str, Member](), dict[str, Ports]()
        for stream, release, names in zip(self._streams, releases, groups.values(), strict=True):
            source = open_source(configs[names[0]], self.plugins, stream, self.backend)
            served = source if self.world.size == 1 else SpreadSource(source, self.world, shares=shares_rows(source))
            release = functools.partial(end_lane, served, release)
            self.lanes.append(Lane(served, [], beside=self.world.saes, release=release))
            used = Used.of(configs[names[0]], self.corpus, self.backend, stream)
            self.used.append(used)
            for text in used.doubts:
                warn_of(text)
            ports |= {name: self._ports(configs[name], prepared[name], widths_of(source, stream)) for name in names}
        weights = [prepared[name].weights(ports[name]) for name in configs]
        groups_of = dict(zip(configs, dealt_out(weights, self.world.saes.size), strict=True))
        for lane, used, names in zip(self.lanes, self.used, groups.values(), strict=True):
            for name in names:
                here = groups_of[name] == self.world.saes.rank
                members[name] = self._member(name, configs[name], prepared[name], ports[name], used, here=here)
                lane.trainers.append(members[name].trainer.in_turns(self.model_lock))
        self._warn_of_sites(members.values())
        return {name: members[name] for name in configs}

    def _warn_of_sites(self, members: Collection[Member]) -> None:
        """Say once what looks wrong with the sites of each, but would train."""
        texts = [text for member in members for text in doubts_of_start(member.config, member.start)]
        for sites in dict.fromkeys(member.config.sites for member in members):
            texts += doubts_of_order(self.backend, sites, self.model_lock)
        for text in dict.fromkeys(texts):
            warn_of(text)
        if self.world.main:
            doubts = (doubts_of_measuring(member.trainer.sae, member.evals) for member in members)
            for text in dict.fromkeys(itertools.chain.from_iterable(doubts)):
                warn_of(text)

    def _open_stream(self, configs: Sequence[TrainConfig], shared: SharedForwards | None) -> Callable[[], None]:
        """Add the stream of a lane; what is returned says that the lane needs no more of ``shared``."""
        sites = list(dict.fromkeys(site for config in configs for site in config.sites.all))
        reader = None if shared is None else shared.reader({site.hook_name for site in sites})
        stream = open_stream(
            configs[0],
            self.corpus,
            self.plugins,
            reader or self.backend,
            sites,
            beside=next(iter(self._streams), None),
            world=self.world,
            say=lambda text: self.say(text),
            differs=self.other_rows.append,
            left=functools.partial(rows_left, self.lanes, len(self._streams)),
            doubt=warn_of if self.world.main else _pass_over,  # each would count its own part of the text
        )
        self._streams.append(stream)
        if reader is None:
            return lambda: None
        reader.follow(lambda: stream.position)
        return reader.release

    def _ports(self, config: TrainConfig, prepared: _Prepared, widths: Mapping[Site, int]) -> Ports:
        ports = checked_ports(widths, config.sites, prepared.options.d_in, self.backend.name)
        if prepared.start is not None:
            check_start_widths(prepared.start, ports, self.backend.name)
        return ports

    def _member(
        self, name: str, config: TrainConfig, prepared: _Prepared, ports: Ports, used: Used, *, here: bool
    ) -> Member:
        trainer = make_trainer(
            config,
            self.plugins,
            self.backend,
            self.corpus,
            prepared.options,
            ports,
            prepared.schedule,
            name,
            self.world.column,
        )
        if not here:
            trainer = Elsewhere.of(trainer)
        info = trainer.sae.info
        trainer.sae.info = attrs.evolve(info, metadata={**info.metadata, **used.metadata})
        held_out = functools.partial(self.held_out, config)
        evals = make_evals(config, self.plugins, self.backend, held_out, trainer.device, name)
        return Member(name, config, trainer, evals, prepared.start)

    def held_out(self, config: TrainConfig) -> Tensor | None:
        """``[n, context_size]`` token ids that training never sees, if ``config`` measures anything."""
        return self.held_out_masked(config)[0]

    def held_out_masked(self, config: TrainConfig) -> tuple[Tensor | None, Tensor | None]:
        """The same with their mask, if the data has one; the same objects for all that are measured on the same."""
        if not (has_model(config, self.plugins) and config.evals.reads_text):
            return None, None
        key = (config.evals.n_contexts, config.training.seed, config.tokens.mask_column)
        if key not in self._held_out:
            corpus = attrs.evolve(self.corpus, evals=config.evals, mask=config.tokens.mask_column)
            self._held_out[key] = corpus.held_out_masked(self.backend, seed_for(config.training.seed, "held out"))
            for text in corpus.held_out_doubts(len(self._held_out[key][0])):
                warn_of(text)
        return self._held_out[key]

    def first_loss_text(self) -> str | None:
        """A line for people, if the model does no better than guessing; the batches stay what they are."""
        if next(iter(self.members.values())).config.model.compile:
            return None  # what is compiled for another shape may round otherwise in training
        held_out = next((tokens for tokens, _ in self._held_out.values()), None)
        lock = self.model_lock
        if held_out is None and all(stream.position is None for stream in self._streams):
            return None  # nobody reads the text
        if held_out is None:
            try:
                with lock:
                    held_out = torch.from_numpy(self.corpus.contexts(self.backend).take(8).tokens)
            except SaekitError:  # a source that needs no text may do without
                return None
        return first_loss_text(self.backend, first_loss(self.backend, held_out, lock))

    def give_weights(self) -> None:
        """The first weights of every SAE, each as if it were alone."""
        self.say("making the first weights")
        for lane in self.lanes:
            for trainer in lane.trainers:
                member = self.members[trainer.name]
                if member.here:
                    give_weights(trainer, member.config, self.corpus, lane.source.peek, member.start)
                elif looks_ahead(member.config, trainer.sae.config, member.start):
                    lane.source.peek()  # as those do who train it: what is shown may have to be made by all
                member.start = None

    @property
    def model_lock(self) -> AbstractContextManager[object]:
        """Held by whoever runs the model."""
        return self._streams[0].model_lock

    @property
    def identity(self) -> Mapping[str, Any]:
        """What decides the activations: option paths to plain values."""
        return self._streams[0].identity

    @property
    def tokens(self) -> int:
        """Tokens that the SAE that has seen the most has seen."""
        return max(member.trainer.tokens for member in self.members.values())

    @property
    def total_tokens(self) -> int:
        """Tokens that the SAE that is to see the most is to see."""
        return max(member.config.training.total_tokens for member in self.members.values())

    @property
    def batches(self) -> int:
        """Batches that were trained on, in all lanes together."""
        return sum(lane.batches for lane in self.lanes)

    @property
    def between_steps(self) -> bool:
        """Whether every SAE has seen the same batches as the others of its lane."""
        return not any(lane.stepping for lane in self.lanes)

    def stream_state(self, hold: Callable[[Any], Any] = lambda state: state) -> dict[str, Any]:
        """The state of the batches, and of the process's random numbers.

        What a source may work with as soon as it goes on is passed through ``hold``, which may copy it.
        """
        return {
            "lanes": [
                {
                    "source": _source_state(lane.source, hold),
                    "tokens": lane.tokens,
                    "batches": lane.batches,
                    "ended": lane.ended,
                    "untold": {trainer.name: metrics_state(metrics) for trainer, metrics in lane.untold},
                }
                for lane in self.lanes
            ],
            "told": self.told,
            "latest": {name: dict(member.latest) for name, member in self.members.items()},
            "remarks": {name: list(member.remarks) for name, member in self.members.items()},
            "random": random_state(),
        }

    def load_state(
        self,
        stream: Mapping[str, Any],
        training: Callable[[str], Mapping[str, Any]],
        before: Sequence[Mapping[str, Any]] = (),
    ) -> None:
        """Go on where ``stream`` and each SAE's ``training`` state were taken.

        ``before``, where there were more processes or fewer: the streams of all of them.  Where rows were computed
        again and are others, :attr:`other_rows` says so, and they are trained on.
        """
        self.other_rows.clear()
        for number, (lane, saved) in enumerate(zip(self.lanes, stream["lanes"], strict=True)):
            taken_over(lane.source, saved["source"], [one["lanes"][number]["source"] for one in before])
            lane.tokens, lane.batches = saved["tokens"], saved["batches"]
            lane.ended = saved["ended"] and self.corpus.config.on_exhausted != "repeat"  # it may be allowed by now
            lane.untold = [
                (self.members[name].trainer, metrics_of(metrics)) for name, metrics in saved["untold"].items()
            ]
        for name, member in self.members.items():
            member.trainer.load_state_dict(training(name))
            member.latest = dict(stream["latest"][name])
            member.remarks = tuple(stream.get("remarks", {}).get(name, ()))
        for lane in self.lanes:
            if not lane.training:
                lane.release()
        self.told = stream["told"]
        set_random_state(stream["random"])

    def close(self) -> None:
        """End every source."""
        for lane in self.lanes:
            lane.source.close()


def _pass_over(text: str) -> None:
    """The first process has said it."""


@attrs.frozen
class _Prepared:
    """What a configuration alone decides."""

    options: Any
    start: SAEModule | None
    schedule: Any

    @classmethod
    def of(cls, config: TrainConfig, plugins: PluginManager, d_sae: int | None, world: World) -> _Prepared:
        check_without_model(config, plugins)
        options, start = sae_options(config, plugins, d_sae, world)
        check_features(options.d_sae, world.features.size)
        resolve_device(config.training.device, "training.device", options.dtype)
        chosen_trackers(config, plugins)
        return cls(options, start, make_schedule(config, plugins))

    def weights(self, ports: Ports) -> int:
        """How many numbers its encoder and its decoder have together."""
        return int(self.options.features(ports.d_in)) * (ports.d_in + ports.d_out)
