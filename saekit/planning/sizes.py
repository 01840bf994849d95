"""What a run takes: sizes, memory and disk, counted from shapes, whether the model has weights or is only outlined."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial

import attrs
import torch

from saekit.abilities import HasMemory
from saekit.config import TrainConfig
from saekit.data import Corpus
from saekit.data.shared import MOST_KEPT
from saekit.distributed.batches import shares_rows
from saekit.distributed.costs import Mesh
from saekit.distributed.world import ALONE, World
from saekit.errors import SaekitError
from saekit.kinds import ACTIVATION_SOURCES, EVALS
from saekit.planning.cache import cache_sites, cached_contexts, cached_rows, plan_cache
from saekit.planning.evals import measurings
from saekit.planning.findings import Findings, of_all
from saekit.planning.lanes import PlannedLane, held_bytes, recipe_seconds, recipe_text
from saekit.planning.members import PlannedMember, here_of, longest_of
from saekit.planning.memory import Memory, Need, Of, free_disk
from saekit.planning.mesh import facts_of_layout, facts_of_mesh
from saekit.planning.sae_sizes import SAESizes, device_of, eval_prompts, site_facts, training_device
from saekit.plugins.manager import PluginManager
from saekit.protocols import ModelBackend
from saekit.reasons import reason
from saekit.runs.opening import check_context_size, check_hooks, open_stream
from saekit.runs.timing import bytes_text
from saekit.runs.working_memory import peak_bytes
from saekit.site import Site

__all__ = ["Sizes"]

_TOKENIZING = 71e6
"""Bytes of a process that tokenizes: as measured with a tokenizer of 50,000 tokens on Linux."""


@attrs.define
class Sizes:
    """What a run of ``members`` takes, and of what; of many processes, what one of them does."""

    members: Sequence[PlannedMember]
    lanes: Sequence[PlannedLane]
    plugins: PluginManager
    corpus: Corpus
    backend: ModelBackend
    findings: Findings
    world: World = ALONE
    free: Mapping[str, float] = attrs.field(factory=dict)
    """Bytes on each device, for advice."""
    known: Mapping[str, float] = attrs.field(factory=dict)
    """Numbers of the same run, counted from the model's outline."""
    facts: dict[str, str] = attrs.field(factory=dict)
    """In words."""
    numbers: dict[str, float] = attrs.field(factory=dict)
    """Bytes and widths."""
    memory: Memory = attrs.field(init=False)
    disk: float = 0
    """Bytes that the run folder grows to."""
    saes: dict[str, SAESizes] = attrs.field(factory=dict)
    """Of each SAE, by its name."""
    context_bytes: int = attrs.field(default=0, init=False)
    """What hooks hold of one context, where lanes share forwards."""
    here: Sequence[PlannedMember] = attrs.field(init=False)
    """The SAEs that one process trains: all, but where they are laid out over processes."""

    @property
    def config(self) -> TrainConfig:
        """For what all have in common."""
        return self.members[0].config

    @property
    def has_model(self) -> bool:
        return self.lanes[0].stream.has_model

    def count(self) -> Sizes | None:
        """All of it, for batches from the sources of the lanes; None where an SAE cannot be made, which is among the
        findings."""
        groups = self.world.saes.size
        self.here = here_of(self.members, groups) if groups > 1 else self.members
        for lane in self.lanes:
            lane.count(self.world.column.size)  # which take the same batches together
        if not self._count_saes():
            return None
        own = [self.saes[member.name] for member in self.here]
        if all(one.kept is not None for one in self.saes.values()):
            self.numbers["optimizer_bytes"] = sum(one.kept or 0 for one in own)
        self.numbers["sae_bytes"] = sum(one.trained for one in own)
        if buffer := sum(lane.counted.buffer for lane in self.lanes):
            self.numbers["buffer_bytes"] = buffer
        waiting = sum(lane.counted.waiting for lane in self.lanes)
        self._tell_of_recipes()
        saved, state = sum(one.saved for one in own), sum(one.state for one in own) + waiting
        together = sum(one.written for one in self.saes.values()) + self.world.column.size * waiting
        checkpoint = self._checkpoints(state, together)
        chosen = self.config.checkpoints
        if not checkpoint and chosen.n_checkpoints:
            checkpoint = saved  # to look at
        ending = saved + (0 if not chosen.keep_last or chosen.buffer == "recipe" else waiting)
        self._memory(own, checkpoint, ending)
        if self.has_model:
            try:
                self._cache()
            except SaekitError as error:  # training does without
                self.findings.doubt(f"`saekit cache` could not write a cache for this run: {error}")
        return self

    @property
    def saved(self) -> float:
        """Bytes of all SAEs as they are saved."""
        return sum(one.saved for one in self.saes.values())

    # ---- the SAEs

    def _count_saes(self) -> bool:
        """The sizes of each SAE, those that are alike once; whether all could be counted."""
        kinds: dict[str, SAESizes | None] = {}
        for lane in self.lanes:
            shares = lane.source is not None and shares_rows(lane.source)
            for member in lane.members:
                kind, size = f"{shares} {member.measured(self.plugins)}", self.corpus.context_size
                if kinds.get(kind) is None:
                    given = member, self.plugins, self.world, self.backend, size, self.free
                    work = partial(SAESizes.of, *given, shares=shares)
                    kinds[kind] = self.findings.attempt(work, of=[member.name])
                if (found := kinds[kind]) is not None:
                    self.saes[member.name] = found
                    self.findings.doubt(*found.doubts, of=[member.name])
        if len(self.saes) < len(self.members):
            return False
        self._tell_of_saes()
        return True

    def _tell_of_saes(self) -> None:
        found, mesh = self.saes, Mesh(self.world.data.size, self.world.features.size)
        self.numbers |= {name: max(getattr(one, name) for one in found.values()) for name in ("d_in", "d_sae")}
        if any(member.ports is not None and not member.ports.same for member in self.members):
            self.numbers["d_out"] = max(one.d_out for one in found.values())
        self._merge({member.name: site_facts(member, self.backend.name) for member in self.members})
        texts = {member.name: found[member.name].text for member in self.members}
        if len(texts) == 1:
            self.facts["SAE"] = next(iter(texts.values()))
        else:
            told, alike = of_all(texts, texts), len({*texts.values()}) == 1
            self.facts["SAEs"] = f"{len(texts)}, {told} each" if alike else f"{len(texts)}: {told}"
            self.facts["names"] = _listed(texts)
        self._merge({name: facts_of_mesh(one.job, mesh) for name, one in found.items()})
        largest = max(found.values(), key=lambda one: one.trained)
        numbers = sum(lane.numbers for lane in self.lanes)
        self.facts |= facts_of_layout(largest.job, self.world, numbers, len(self.here), len(self.members))
        if mesh.size > 1:
            sent = sum(one.job.sent_bytes(mesh) for one in found.values())
            self.numbers |= {"processes": mesh.size, "sent_bytes": sent}
        if largest.advice:
            self.facts["advised processes"] = largest.advice

    def _merge(self, facts: Mapping[str, Mapping[str, str]]) -> None:
        """Tell what is told of each SAE, by its name, once."""
        for what in dict.fromkeys(what for own in facts.values() for what in own):
            texts = {name: own[what] for name, own in facts.items() if what in own}
            self.facts[what] = of_all(texts, facts)

    # ---- batches and checkpoints

    def _tell_of_recipes(self, per_forward: Callable[[PlannedLane], float] | None = None) -> None:
        chosen, several = self.config.checkpoints.buffer == "recipe", self.world.size > 1
        if text := recipe_text(self.lanes, chosen=chosen, each=several, per_forward=per_forward):
            self.facts["buffer in checkpoints"] = text
            found = [lane.counted.recipe for lane in self.lanes]
            self.numbers |= {"recipe_bytes": sum(own for own, _ in found)}
            self.numbers |= {"recipe_forwards": sum(forwards for _, forwards in found)}

    def time_recipe(self, seconds: Callable[[PlannedLane], float]) -> None:
        """Say how long it takes to go on from a recipe, where a forward for a lane takes so many ``seconds``."""
        if self.numbers.get("recipe_forwards") and self.has_model:
            self.numbers["recipe_seconds"] = recipe_seconds(self.lanes, seconds)
            self._tell_of_recipes(seconds)

    def _checkpoints(self, state: int, written: int) -> int:
        """The disk of saved SAEs, and of what a run goes on from: weights, what the optimizer keeps, and the buffer.

        ``state`` is what this process has of that, and is returned; ``written`` is what all write.
        """
        options, number = self.config.checkpoints, len(self.members)
        each = options.n_checkpoints + 1
        self.disk = each * self.saved
        if number > 1:
            self.facts["disk"] = f"{bytes_text(self.disk)} for {each * number} saved SAEs"
        else:
            what = "the SAE" if each == 1 else f"each of {each} saved SAEs"
            self.facts["disk"] = f"{bytes_text(self.saved)} for {what}"
        if not options.keep_last:
            self.facts["disk"] += "; no checkpoint that the run could go on from (checkpoints.keep_last=0)"
            return 0
        self.numbers["checkpoint_bytes"] = written
        self.disk += (options.keep_last + 1) * written
        self.facts["disk"] += (
            f", and up to {bytes_text(written)} for each of {options.keep_last} checkpoints and one more that is being "
            "written"
        )
        return state

    # ---- memory

    def _memory(self, own: Sequence[SAESizes], checkpoint: int, ending: int) -> None:
        """``checkpoint`` is copied while the run trains, ``ending`` when it is saved; ``own``: the SAEs that this
        process has."""
        model = device_of(self.config.model.device, self.config.model.dtype)
        devices = [training_device(member) for member in self.here]
        several = len(self.members) > 1
        forward = evaluated = kept = 0
        if self.has_model:
            forward, evaluated = self._known_forwards() or self._forwards()
            self.numbers |= {"forward_bytes": forward, "eval_forward_bytes": evaluated}
            kept = self._kept_forwards()
        trained = _by_device(devices, [one.trained for one in own], sum)
        held = [
            Need(Of.MODEL, model, self._model_bytes()),
            *(Need(Of.SAES if several else Of.SAE, device, size) for device, size in trained.items()),
            *(Need(Of.BUFFER, device, size) for device, size in self.buffers.items()),
            Need(Of.KEPT, model, kept),
        ]
        step = _by_device(devices, [one.step for one in own], max)  # they make their steps in turn
        features = _by_device(devices, [one.features for one in own], max)
        beside = self._measured_beside()
        written = Need(Of.CHECKPOINT, "cpu", checkpoint)  # a copy, while whatever else is at work
        last = Need(Of.SAVING, "cpu", ending)  # when nothing changes any more
        turns = [
            [Need(Of.FORWARD, model, forward), *(Need(Of.STEP, *one) for one in step.items()), written],
            [Need(Of.EVALS, model, evaluated), written],
            [*(Need(Of.EVALS, device, size + beside.get(device, 0)) for device, size in features.items()), written],
            [Need(Of.WHOLE, "cpu", max(one.drawn for one in own))],  # before any step
            [last],
        ]
        loading = Need(Of.LOADING, "cpu", self.known.get("loading_bytes", 0))
        self.memory = Memory(held, turns, [loading])
        self.numbers |= {"step_bytes": max(one.step for one in own)}
        self.numbers |= {"eval_features_bytes": max(one.features for one in own)}
        self.numbers["memory_bytes"] = sum(self.memory.needed().values())

    def _measured_beside(self) -> dict[str, int]:
        """What evals hold of SAEs beside those in training, of all that are measured together at one time."""
        found: dict[str, int] = {}
        for one in measurings(self.lanes, self.here):
            saes = [self.saes[member.name] for member in one.members]
            held = _by_device(map(training_device, one.members), [own.whole + own.copied for own in saes], sum)
            found |= {device: max(size, found.get(device, 0)) for device, size in held.items()}
        return found

    def forget_copies(self) -> None:
        """No checkpoint is written while the run trains: it ends before there is one."""
        self.memory = self.memory.without(Of.CHECKPOINT)
        self.numbers["memory_bytes"] = sum(self.memory.needed().values())

    @property
    def buffers(self) -> dict[str, int]:
        """The memory that batches come from, by the device where they wait."""
        places = [self.place_of(lane) for lane in self.lanes]
        return _by_device(places, [lane.counted.buffer for lane in self.lanes], sum)

    def place_of(self, lane: PlannedLane) -> str:
        """Where the rows of ``lane`` wait."""
        return lane.counted.source.device or device_of(self.config.model.device, self.config.model.dtype)

    @property
    def kept_on_cpu(self) -> float:
        """Bytes of forwards that wait there for other lanes."""
        model = device_of(self.config.model.device, self.config.model.dtype)
        return self.numbers.get("kept_bytes", 0.0) * (torch.device(model).type == "cpu")

    def reads_all(self) -> TrainConfig:
        """A configuration whose forwards are those of the run: it reads the hooks of all SAEs."""
        if len(self.members) == 1:
            return self.config
        sites = {site.hook_name: site for member in self.members for site in member.config.sites.all}
        config = longest_of(self.members).config
        if len(sites) == 1:
            return attrs.evolve(config, site=next(iter(sites.values())), inputs=(), targets=())
        return attrs.evolve(config, site=Site(), inputs=tuple(sites.values()), targets=())

    def _model_bytes(self) -> int:
        size = self.backend.memory_bytes() if isinstance(self.backend, HasMemory) else 0
        if size:
            self.numbers["model_bytes"] = size
        return size

    def _kept_forwards(self) -> int:
        """Forwards that wait until all lanes have come to them, when most do: the first lane has filled its buffer."""
        needing = [lane for lane in self.lanes if self._runs_model(lane)]
        if len(needing) < 2:
            return 0
        contexts = max(lane.counted.source.contexts * lane.forwards_at_once for lane in needing)
        self.context_bytes = held_bytes(needing, self.backend)
        self.numbers["kept_bytes"] = kept = min(contexts * self.context_bytes, MOST_KEPT)
        return kept

    def _runs_model(self, lane: PlannedLane) -> bool:
        return self.plugins.find(ACTIVATION_SOURCES, lane.longest.config.activations.source).entry.needs_text

    def _known_forwards(self) -> tuple[int, int] | None:
        found = [self.known.get(name) for name in ("forward_bytes", "eval_forward_bytes")]
        return None if None in found else (int(found[0] or 0), int(found[1] or 0))

    def _forwards(self) -> tuple[int, int]:
        """The working memory of a forward in training, and of the largest in evals."""
        read = {site.hook_name for lane in self.lanes for site in lane.stream.sites}
        contexts = max((lane.counted.source.contexts for lane in self.lanes if self._runs_model(lane)), default=0)
        training = self._peak(contexts, lambda tokens: self.backend.run(tokens, read=read))
        size, measured = self.corpus.context_size, [member.config for member in self.here]
        prompts = max(eval_prompts(config, self.plugins, self.backend, size) for config in measured)
        # Of several SAEs, what hooks hold is kept for all that are measured on it.
        also = read if len(self.here) > 1 else set()
        evaluated = self._peak(prompts, lambda tokens: self.backend.run(tokens, read=also, want="loss"))
        return training, evaluated + (self._compared_logits(prompts) if evaluated else 0)

    def _compared_logits(self, prompts: int) -> int:
        """What logits take that are compared with those of the clean forward: both, in float32."""
        options = [self.plugins.options(EVALS, choice) for one in self.members for choice in one.config.evals.run]
        if not any(getattr(one, name, False) for one in options for name in ("kl", "top1")):
            return 0
        return 2 * 4 * prompts * self.corpus.context_size * self.backend.d_vocab

    def _peak(self, prompts: int, forward: Callable[[torch.Tensor], object]) -> int:
        """The working memory of a forward of so many contexts; where tensors have memory, as that of one says it.

        0 where that cannot be told.
        """
        backend, size = self.backend, self.corpus.context_size
        outlined = torch.device(backend.device).type == "meta"
        tokens = torch.zeros(prompts if outlined else min(prompts, 1), size, dtype=torch.long)
        if not len(tokens) or (backend.n_ctx is not None and size > backend.n_ctx):
            return 0
        try:
            with self.lanes[0].stream.model_lock:
                found = peak_bytes(lambda: forward(tokens))
        except Exception as error:  # what is wrong, the run itself will say
            self.findings.doubt(
                f"a forward of the model could not be counted, and is left out of memory: {reason(error)}"
            )
            return 0
        return found * prompts // len(tokens)

    @property
    def tokenizing(self) -> float:
        """Bytes of the processes that tokenize."""
        return _TOKENIZING * sum(lane.counted.source.tokenizing for lane in self.lanes)

    def told_of_tokenizing(self) -> str:
        """The end of a sentence on the memory of the process; empty where there are none."""
        return (
            f"; beside it, processes that tokenize take about {bytes_text(size)}" if (size := self.tokenizing) else ""
        )

    # ---- the cache

    def _cache(self) -> None:
        """The size of the cache that ``saekit cache`` would write."""
        config, size = longest_of(self.members).config, self.corpus.context_size
        sites = list(dict.fromkeys(site for member in self.members for site in cache_sites(member.config)))
        check_context_size(self.backend, size)
        check_hooks(self.backend, sites, "activations.cache.sites")
        wide = open_stream(config, self.corpus, self.plugins, self.backend, sites)
        wide.identity = {}  # it is the same size, and to find it out the text would be opened
        most = wide.rows_per_context(size)
        contexts = cached_contexts(config, most)
        rows = contexts * most if not (wide.choice.exclude or config.tokens.mask_column) else None
        needed = plan_cache(config, wide, size).bytes_for(contexts, rows or cached_rows(config))
        free = free_disk(config.activations.cache.folder)
        self.numbers["cache_bytes"] = needed
        all_sites = len(sites) > len(cache_sites(config))
        how = " with the sites of all (activations.cache.sites)" if all_sites else ""
        words = f"{bytes_text(needed)} if `saekit cache` writes it{how}; {bytes_text(free)} are free"
        self.facts["activation cache"] = words


def _by_device(devices: Iterable[str], sizes: Iterable[int], put: Callable[[list[int]], int]) -> dict[str, int]:
    """``sizes`` on each of ``devices``, put together."""
    found: dict[str, list[int]] = {}
    for device, size in zip(devices, sizes, strict=True):
        found.setdefault(device, []).append(size)
    return {device: put(own) for device, own in found.items()}


def _listed(names: Iterable[str]) -> str:
    """All of a few, and of many the first and the last."""
    few = list(names)
    return ", ".join(few if len(few) <= 8 else [*few[:3], f"... {few[-1]}"])
