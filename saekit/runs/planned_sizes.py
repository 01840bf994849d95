"""What a run takes: sizes, memory and disk, counted from shapes, whether the model has weights or is only outlined."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import attrs
import torch

from saekit.abilities import HasMemory, KeepsRecipe, SourceForwards, StatesForwards
from saekit.config import SAEConfig, TrainConfig
from saekit.data import Corpus, StreamContext
from saekit.devices import resolve_device
from saekit.distributed.batches import shares_rows
from saekit.distributed.costs import Mesh
from saekit.distributed.world import ALONE, World
from saekit.errors import ConfigError, SaekitError
from saekit.evals.forwards import logit_contexts
from saekit.kinds import ACTIVATION_SOURCES, EVALS, SAE_ARCHITECTURES
from saekit.plugins.manager import PluginManager
from saekit.protocols import ActivationSource, ModelBackend
from saekit.reasons import reason
from saekit.runs.opening import check_context_size, check_hooks, open_stream
from saekit.runs.parts import moment_bytes, updates_numbers
from saekit.runs.planned_cache import cache_sites, cached_contexts, cached_rows, plan_cache
from saekit.runs.planned_memory import Memory, Need, Of, eval_bytes, free_disk
from saekit.runs.planned_mesh import advice, facts_of_layout, facts_of_mesh
from saekit.runs.planned_step import job_of
from saekit.runs.spreading import spread
from saekit.runs.timing import bytes_text, duration_text
from saekit.runs.working_memory import peak_bytes
from saekit.sae.build import build_module
from saekit.sae.init import starts_by_parts
from saekit.sae.module import SAEModule
from saekit.values import Ports

__all__ = ["Sizes", "devices_of"]

_TOKENIZING = 71e6
"""Bytes of a process that tokenizes: as measured with a tokenizer of 50,000 tokens on Linux."""
_PROMPTS = 16  # contexts in one forward of an eval that does not say how many it takes


@attrs.define
class Sizes:
    """What a run takes, and of what."""

    config: TrainConfig
    plugins: PluginManager
    options: SAEConfig
    stream: StreamContext
    corpus: Corpus
    ports: Ports
    world: World = ALONE
    """The processes that it is for; what is counted is of one of them."""
    free: Mapping[str, float] = attrs.field(factory=dict)
    """Bytes on each device, for advice."""
    known: Mapping[str, float] = attrs.field(factory=dict)
    """Numbers of the same run, counted from the model's outline."""
    facts: dict[str, str] = attrs.field(factory=dict)
    """In words."""
    numbers: dict[str, float] = attrs.field(factory=dict)
    """Bytes and widths."""
    warnings: list[str] = attrs.field(factory=list)
    memory: Memory = attrs.field(init=False)
    disk: float = 0
    """Bytes that the run folder grows to."""
    saved: float = 0
    """Bytes of an SAE as it is saved."""
    source: SourceForwards = attrs.field(factory=SourceForwards)
    """How the source runs the model."""
    _step_bytes: int = attrs.field(default=0, init=False)

    @property
    def backend(self) -> ModelBackend:
        return self.stream.backend

    def count(self, source: ActivationSource | None) -> Sizes:
        """All of it, for batches from ``source``, if it could be opened."""
        if isinstance(source, StatesForwards):
            self.source = source.source_forwards
        item = self.plugins.find(SAE_ARCHITECTURES, self.config.sae)
        # Memory is taken as it is written to, so this takes none.
        sae = build_module(item, self.options, self.ports, self.plugins)
        weights, saved = self._sae(sae)
        self.saved = saved
        whole = weights if self.world.features.size > 1 else 0
        drawn = whole if self.options.decoder_orthogonal_init or not starts_by_parts(sae.table) else 0
        kept = moment_bytes(self.config, self.plugins, sae)
        if kept is None:
            self.warnings.append("what the optimizer keeps is not known, and left out of memory and disk")
        self._arrange(sae, kept, source)
        written = kept  # by all processes with the same features
        if (world := self.world.column).size > 1:  # from here on, what one process has
            sae.to("meta")
            spread(sae, world)
            weights, written = self._weights(sae)[0], kept and moment_bytes(self.config, self.plugins, sae)
            kept = kept and moment_bytes(self.config, self.plugins, sae, world.data)
        if kept is not None:
            self.numbers["optimizer_bytes"] = kept
        self.numbers["sae_bytes"] = trained = 2 * weights + (kept or 0)
        buffer = self._buffer(source)
        trained_state, waiting = weights + (kept or 0), self._waiting(source, buffer)
        together = world.features.size * (weights + (written or 0)) + world.size * waiting
        checkpoint = self._checkpoints(saved, trained_state + waiting, together)
        if not checkpoint and self.config.checkpoints.n_checkpoints:
            checkpoint = saved  # to look at
        kept_last = self.config.checkpoints.keep_last > 0
        ending = saved + (0 if not kept_last or self.config.checkpoints.buffer == "recipe" else waiting)
        self._memory(sae, trained, buffer, checkpoint, ending, whole, drawn)
        if self.stream.has_model:
            try:
                self._cache()
            except SaekitError as error:  # training does without
                self.warnings.append(f"`saekit cache` could not write a cache for this run: {error}")
        return self

    def _sae(self, sae: SAEModule) -> tuple[int, int]:
        """The bytes of its weights, in training and as they are saved."""
        d_sae, ports, parameters = sae.d_sae, self.ports, sae.table.count()
        weights, saved = self._weights(sae)
        self.numbers |= {"d_in": ports.d_in, "d_sae": d_sae}
        self._sites()
        self.facts["SAE"] = f"{d_sae:,} features, {parameters:,} parameters"
        if d_sae < ports.d_in:
            self.warnings.append(f"the SAE has fewer features ({d_sae}) than its input has dimensions ({ports.d_in})")
        return weights, saved + 4 * d_sae

    def _weights(self, sae: SAEModule) -> tuple[int, int]:
        """The bytes of the weights of ``sae``, in training and as they are saved."""
        dtype = getattr(torch, self.options.dtype)
        saved = sae.table.count(lambda entry: entry.dtype(dtype).itemsize)
        return max(saved, sae.table.count() * torch.float32.itemsize), saved  # bfloat16 trains in float32

    def _arrange(self, sae: SAEModule, kept: int | None, source: ActivationSource | None) -> None:
        """How processes are arranged, what each of them sends, and which arrangement is best."""
        mesh = Mesh(self.world.data.size, self.world.features.size)
        shares = source is not None and shares_rows(source)
        by_numbers = kept is not None and updates_numbers(self.config, self.plugins, sae)
        device = _device(self.config.training.device, self.options.dtype)
        job = job_of(sae, self.config.training, device, kept, mesh=mesh, gathers_rows=shares, elementwise=by_numbers)
        self._step_bytes = int(job.step_bytes(mesh))
        self.facts |= facts_of_mesh(job, mesh) | facts_of_layout(job, self.world)
        if mesh.size > 1:
            self.numbers |= {"processes": mesh.size, "sent_bytes": job.sent_bytes(mesh)}
        if told := advice(sae, job, mesh, self.free.get(device), device):
            self.facts["advised processes"] = told

    def _sites(self) -> None:
        """What is read and written, and how wide it is."""
        ports, model = self.ports, self.backend.name
        inputs, targets = (
            ", ".join(f"{name} of {model}, width {width}" for name, width in widths.items())
            for widths in (ports.inputs, ports.targets)
        )
        if ports.same:
            self.facts["site" if len(ports.inputs) == 1 else "sites"] = inputs
            return
        self.numbers["d_out"] = ports.d_out
        self.facts |= {"inputs": inputs, "targets": targets}

    def _buffer(self, source: ActivationSource | None) -> int:
        """The memory that batches come from."""
        size = source.memory_bytes() if isinstance(source, HasMemory) else 0
        if size:
            self.numbers["buffer_bytes"] = size
        return size

    def _waiting(self, source: ActivationSource | None, rows: int) -> int:
        """What a checkpoint has of the buffer, which is ``rows`` in bytes: those, or a recipe."""
        recipe, forwards = source.recipe_size() if isinstance(source, KeepsRecipe) else (0, 0)
        if not forwards or not self.config.checkpoints.keep_last:
            return rows
        # A short run does not come to as many.
        trained = self.config.training.total_tokens // self.world.size // self.rows_per_forward()
        made = max(trained + self.source.buffered, 1)
        recipe, forwards = recipe * min(made, forwards) // forwards, min(made, forwards)
        self.numbers |= {"recipe_bytes": recipe, "recipe_forwards": forwards}
        chosen = self.config.checkpoints.buffer == "recipe"
        choice = "as it is" if chosen else "with checkpoints.buffer=recipe"
        each = " of each process" if self.world.size > 1 else ""
        self.facts["buffer in checkpoints"] = (
            f"{bytes_text(rows)}{each} as rows; about {bytes_text(recipe)} as a recipe ({choice}), and about "
            f"{forwards:,} forwards to go on from it"
        )
        return recipe if chosen else rows

    def time_recipe(self, seconds: float) -> None:
        """Say how long it takes to go on from a recipe, where a row that the model makes takes so many ``seconds``."""
        if (forwards := int(self.numbers.get("recipe_forwards", 0))) and self.stream.has_model:
            self.numbers["recipe_seconds"] = took = seconds * self.rows_per_forward() * forwards
            self.facts["buffer in checkpoints"] += f", {duration_text(took)}"

    def _checkpoints(self, saved: int, state: int, written: int) -> int:
        """The disk of saved SAEs, and of what a run goes on from: weights, what the optimizer keeps, and the buffer.

        ``state`` is what this process has of that, and is returned; ``written`` is what all write.
        """
        options = self.config.checkpoints
        saes = options.n_checkpoints + 1
        self.disk = saes * saved
        self.facts["disk"] = f"{bytes_text(saved)} for " + ("the SAE" if saes == 1 else f"each of {saes} saved SAEs")
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

    def _memory(
        self, sae: SAEModule, trained: int, buffer: int, checkpoint: int, ending: int, whole: int, drawn: int
    ) -> None:
        """``checkpoint`` is copied while the run trains, ``ending`` when it is saved.

        Of an SAE whose features are split, ``whole`` is what evals gather, and ``drawn`` what its start does.
        """
        model = _device(self.config.model.device, self.config.model.dtype)
        training = _device(self.config.training.device, self.options.dtype)
        held = [
            Need(Of.MODEL, model, self._model_bytes()),
            Need(Of.SAE, training, trained),
            Need(Of.BUFFER, self.buffer_device, buffer),
        ]
        step, forward, evaluated = self._step_bytes, 0, 0
        features = eval_bytes(sae, self._eval_prompts() * self.corpus.context_size)
        if self.stream.has_model:
            forward, evaluated = self._known_forwards() or self._forwards()
            self.numbers |= {"forward_bytes": forward, "eval_forward_bytes": evaluated}
        written = Need(Of.CHECKPOINT, "cpu", checkpoint)  # a copy, while whatever else is at work
        last = Need(Of.SAVING, "cpu", ending)  # when nothing changes any more
        turns = [
            [Need(Of.FORWARD, model, forward), Need(Of.STEP, training, step), written],
            [Need(Of.EVALS, model, evaluated), written],
            [Need(Of.EVALS, training, features + whole), written],
            [Need(Of.WHOLE, "cpu", drawn)],  # before any step
            [last],
        ]
        loading = Need(Of.LOADING, "cpu", self.known.get("loading_bytes", 0))
        self.memory = Memory(held, turns, [loading])
        self.numbers |= {"step_bytes": step, "eval_features_bytes": features}
        self.numbers["memory_bytes"] = sum(self.memory.needed().values())

    def forget_copies(self) -> None:
        """No checkpoint is written while the run trains: it ends before there is one."""
        self.memory = self.memory.without(Of.CHECKPOINT)
        self.numbers["memory_bytes"] = sum(self.memory.needed().values())

    def _model_bytes(self) -> int:
        size = self.backend.memory_bytes() if isinstance(self.backend, HasMemory) else 0
        if size:
            self.numbers["model_bytes"] = size
        return size

    def _known_forwards(self) -> tuple[int, int] | None:
        found = [self.known.get(name) for name in ("forward_bytes", "eval_forward_bytes")]
        return None if None in found else (int(found[0] or 0), int(found[1] or 0))

    def _forwards(self) -> tuple[int, int]:
        """The working memory of a forward in training, and of the largest in evals."""
        read = {site.hook_name for site in self.stream.sites}
        source = self.plugins.find(ACTIVATION_SOURCES, self.config.activations.source)
        training = self._peak(
            self.source.contexts if source.entry.needs_text else 0, lambda tokens: self.backend.run(tokens, read=read)
        )
        prompts = self._eval_prompts()
        evaluated = self._peak(prompts, lambda tokens: self.backend.run(tokens, want="loss"))
        return training, evaluated + (self._compared_logits(prompts) if evaluated else 0)

    @property
    def tokenizing(self) -> float:
        """Bytes of the processes that tokenize."""
        return _TOKENIZING * self.source.tokenizing

    def told_of_tokenizing(self) -> str:
        """The end of a sentence on the memory of the process; empty where there are none."""
        return (
            f"; beside it, processes that tokenize take about {bytes_text(size)}" if (size := self.tokenizing) else ""
        )

    def rows_per_forward(self) -> int:
        """Rows of one forward of the source, at most."""
        return self.source.contexts * self.stream.rows_per_context(self.corpus.context_size)

    def _compared_logits(self, prompts: int) -> int:
        """What logits take that are compared with those of the clean forward: both, in float32."""
        options = [self.plugins.options(EVALS, choice) for choice in self.config.evals.run]
        if not any(getattr(one, name, False) for one in options for name in ("kl", "top1")):
            return 0
        size = self.corpus.context_size
        return 2 * 4 * prompts * size * self.backend.d_vocab

    def _eval_prompts(self) -> int:
        """Contexts in the largest forward of evals."""
        measured = [
            getattr(self.plugins.options(EVALS, choice), "batch_size_prompts", _PROMPTS)
            for choice in self.config.evals.run
            if self.plugins.find(EVALS, choice).entry.needs_text
        ]
        device = _device(self.config.model.device, self.config.model.dtype)
        most = logit_contexts(self.backend, self.corpus.context_size, device)
        return min(max(measured, default=0), self.config.evals.n_contexts, most)

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
            with self.stream.model_lock:
                found = peak_bytes(lambda: forward(tokens))
        except Exception as error:  # what is wrong, the run itself will say
            self.warnings.append(
                f"a forward of the model could not be counted, and is left out of memory: {reason(error)}"
            )
            return 0
        return found * prompts // len(tokens)

    @property
    def buffer_device(self) -> str:
        """Where the rows of the source wait."""
        return self.source.device or _device(self.config.model.device, self.config.model.dtype)

    # ---- the cache

    def _cache(self) -> None:
        """The size of the cache that ``saekit cache`` would write."""
        stream, size = self.stream, self.corpus.context_size
        sites = cache_sites(self.config)
        check_context_size(stream.backend, size)
        check_hooks(stream.backend, sites, "activations.cache.sites")
        wide = open_stream(self.config, self.corpus, self.plugins, stream.backend, sites)
        wide.identity = {}  # it is the same size, and to find it out the text would be opened
        most = wide.rows_per_context(size)
        contexts = cached_contexts(self.config, most)
        rows = contexts * most if not (wide.choice.exclude or self.config.tokens.mask_column) else None
        needed = plan_cache(self.config, wide, size).bytes_for(contexts, rows or cached_rows(self.config))
        free = free_disk(self.config.activations.cache.folder)
        self.numbers["cache_bytes"] = needed
        words = f"{bytes_text(needed)} if `saekit cache` writes it; {bytes_text(free)} are free"
        self.facts["activation cache"] = words


def devices_of(config: TrainConfig, options: SAEConfig) -> list[str]:
    """Where the model, the SAE and what is written to checkpoints are."""
    asked = _device(config.model.device, config.model.dtype), _device(config.training.device, options.dtype), "cpu"
    return list(dict.fromkeys(asked))


def _device(asked: str, dtype: str) -> str:
    """``asked`` as it is on this machine, or would be on one that has it."""
    try:
        return resolve_device(asked, "", dtype)
    except ConfigError:
        return asked
