"""SAEs that train side by side on one model and one text.  One SAE is a session of one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import attrs
from torch import Tensor

from saekit.config import TrainConfig
from saekit.converter import ConfigConverter
from saekit.data import Corpus, StreamContext
from saekit.data.opening import checked_width, open_backend, open_source, open_stream, seed_for
from saekit.data.shared import SharedForwards
from saekit.devices import resolve_device
from saekit.errors import ConfigError
from saekit.manager import PluginManager
from saekit.protocols import Eval, Histogram
from saekit.sae.module import SAE
from saekit.training.loop import Lane
from saekit.training.metrics import eval_metrics
from saekit.training.randomness import random_state, set_random_state
from saekit.training.setup import (
    chosen_trackers,
    give_weights,
    make_evals,
    make_schedule,
    make_trainer,
    sae_options,
)
from saekit.training.trainer import SAETrainer

__all__ = ["Member", "Session"]


@attrs.define(eq=False)
class Member:
    """One SAE of a session."""

    name: str
    config: TrainConfig
    trainer: SAETrainer
    evals: Mapping[str, Eval]
    start: SAE | None
    """The saved SAE that it starts from."""
    latest: dict[str, float] = attrs.field(factory=dict)
    """The last value of every metric."""

    def note(self, metrics: Mapping[str, float | Histogram]) -> None:
        """Remember the numbers among ``metrics``."""
        self.latest.update({name: value for name, value in metrics.items() if not isinstance(value, Histogram)})


class Session:
    """Everything that trains, opened and checked, and its state."""

    def __init__(
        self,
        configs: Mapping[str, TrainConfig],
        plugins: PluginManager,
        model: object | None = None,
        dataset: object | None = None,
    ) -> None:
        """Open what ``configs``, by the names of the SAEs, ask for; cheap checks come first."""
        self.plugins = plugins
        self._check_together(configs)
        prepared = {name: _Prepared.of(config, plugins) for name, config in configs.items()}
        first = next(iter(configs.values()))
        self.corpus = Corpus.of(first.dataset, first.evals, dataset)
        sites = [config.site for config in configs.values()]
        self.backend = open_backend(first, self.corpus, plugins, model, sites)
        self._held_out: dict[tuple[int, int], Tensor] = {}
        for config in configs.values():
            self.held_out(config)
        self._streams: list[StreamContext] = []
        self.lanes: list[Lane] = []
        try:
            self.members = self._open_lanes(configs, prepared)
        except BaseException:
            self.close()
            raise
        self.batches = 0
        """Batches that were trained on, in all lanes together."""

    def _open_lanes(self, configs: Mapping[str, TrainConfig], prepared: Mapping[str, _Prepared]) -> dict[str, Member]:
        """A lane for all SAEs that can train on the very same batches."""
        groups: dict[str, list[str]] = {}
        for name, config in configs.items():
            groups.setdefault(self._lane_key(config), []).append(name)
        shared = SharedForwards(self.backend) if len(groups) > 1 else None
        for names in groups.values():
            config = configs[names[0]]
            sites = list(dict.fromkeys(configs[name].site for name in names))
            backend = shared.reader({site.hook_name for site in sites}) if shared else self.backend
            self._streams.append(
                open_stream(config, self.corpus, self.plugins, backend, sites, beside=next(iter(self._streams), None))
            )
        members: dict[str, Member] = {}
        for stream, names in zip(self._streams, groups.values(), strict=True):
            lane = Lane(open_source(configs[names[0]], self.plugins, stream), [])
            self.lanes.append(lane)
            for name in names:
                members[name] = self._member(name, configs[name], prepared[name], stream)
                lane.trainers.append(members[name].trainer)
        return {name: members[name] for name in configs}

    def _member(self, name: str, config: TrainConfig, prepared: _Prepared, stream: StreamContext) -> Member:
        d_in = checked_width(stream, config.site, prepared.options.d_in)
        trainer = make_trainer(
            config, self.plugins, self.backend, self.corpus, prepared.options, d_in, prepared.schedule, name
        )
        if prepared.start is not None and prepared.start.d_in != d_in:
            raise ConfigError(
                [("training.from_pretrained_path", f"holds an SAE for vectors of {prepared.start.d_in}, but "
                  f"{config.site.name} of {self.backend.name!r} has width {d_in}")]
            )  # fmt: skip
        return Member(name, config, trainer, prepared.evals, prepared.start)

    def _lane_key(self, config: TrainConfig) -> str:
        """What decides the batches, among configurations that share a model and a text."""
        table = ConfigConverter(self.plugins).unstructure(config)
        training = config.training
        return repr((table["activations"]["source"], training.train_batch_size_tokens, training.seed))

    def _check_together(self, configs: Mapping[str, TrainConfig]) -> None:
        """:class:`ConfigError` names what SAEs of one session cannot differ in."""
        tables = [ConfigConverter(self.plugins).unstructure(config) for config in configs.values()]
        for table in tables:
            table["evals"] = {name: table["evals"][name] for name in ("split", "held_out_every")}
            table["checkpoints"].pop("name")
        problems = [
            (f"{section}.{option}", f"differs between SAEs that are to be trained together ({value!r} and "
             f"{table[section][option]!r}); train them in runs of their own")
            for section in ("model", "dataset", "evals", "checkpoints")
            for table in tables[1:]
            for option, value in tables[0][section].items()
            if table[section][option] != value
        ]  # fmt: skip
        if problems:
            raise ConfigError(list(dict.fromkeys(problems)))

    def held_out(self, config: TrainConfig) -> Tensor | None:
        """``[n, context_size]`` token ids that training never sees, if ``config`` measures anything."""
        if not config.evals.run:
            return None
        key = (config.evals.n_contexts, config.training.seed)
        if key not in self._held_out:
            corpus = attrs.evolve(self.corpus, evals=config.evals)
            self._held_out[key] = corpus.held_out(self.backend, seed_for(config.training.seed, "held out"))
        return self._held_out[key]

    def give_weights(self) -> None:
        """The first weights of every SAE, each as if it were alone."""
        for lane in self.lanes:
            for trainer in lane.trainers:
                member = self.members[trainer.name]
                give_weights(trainer, member.config, self.corpus, lane.source.peek, member.start)
                member.start = None

    def evaluate(self, member: Member) -> dict[str, float | Histogram]:
        """What the evals of ``member`` find, under the names that are logged."""
        held_out = self.held_out(member.config)
        if held_out is None:
            return {}
        sae = member.trainer.raw_sae()
        found: dict[str, float] = {}
        with self._streams[0].model_lock:  # no source's thread may run the model while its hooks are in place
            for measure in member.evals.values():
                found |= measure(sae, backend=self.backend, site=member.config.site, contexts=held_out)
        return eval_metrics(sae, found)

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
    def between_steps(self) -> bool:
        """Whether every SAE has seen the same batches as the others of its lane."""
        return not any(lane.stepping for lane in self.lanes)

    def stream_state(self) -> dict[str, Any]:
        """The state of the batches, and of the process's random numbers."""
        return {
            "lanes": [
                {"source": lane.source.state_dict(), "tokens": lane.tokens, "ended": lane.ended} for lane in self.lanes
            ],
            "batches": self.batches,
            "latest": {name: dict(member.latest) for name, member in self.members.items()},
            "random": random_state(),
        }

    def load_state(self, stream: Mapping[str, Any], training: Callable[[str], Mapping[str, Any]]) -> None:
        """Go on where ``stream`` and each SAE's ``training`` state were taken."""
        for lane, saved in zip(self.lanes, stream["lanes"], strict=True):
            lane.source.load_state_dict(saved["source"])
            lane.tokens, lane.ended = saved["tokens"], saved["ended"]
        for name, member in self.members.items():
            member.trainer.load_state_dict(training(name))
            member.latest = dict(stream["latest"][name])
        self.batches = stream["batches"]
        set_random_state(stream["random"])

    def close(self) -> None:
        """End every source."""
        for lane in self.lanes:
            lane.source.close()


@attrs.frozen
class _Prepared:
    """What a configuration alone decides."""

    options: Any
    start: SAE | None
    schedule: Any
    evals: dict[str, Eval]

    @classmethod
    def of(cls, config: TrainConfig, plugins: PluginManager) -> _Prepared:
        resolve_device(config.training.device, "training.device")
        options, start = sae_options(config, plugins)
        chosen_trackers(config, plugins)
        return cls(options, start, make_schedule(config, plugins), make_evals(config, plugins))
