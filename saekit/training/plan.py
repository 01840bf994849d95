"""``saekit plan``: what a run would do, need and take, without running it."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from saekit.config import SAEConfig, TrainConfig
from saekit.data import ActivationStream, Contexts, Corpus, StreamContext
from saekit.data.activations import check_contexts
from saekit.data.cache.make import cache_sites, cached_contexts, plan_cache
from saekit.data.cache.read import available_memory
from saekit.data.opening import (
    build_backend,
    check_context_size,
    check_hooks,
    checked_width,
    open_source,
    open_stream,
)
from saekit.devices import resolve_device
from saekit.errors import DataError, SaekitError
from saekit.manager import PluginManager
from saekit.protocols import ActivationSource, Batch, ModelBackend
from saekit.sae.memory import release
from saekit.site import Site
from saekit.training.checks import check_run_folder, chosen_trackers
from saekit.training.planned import Plan
from saekit.training.setup import (
    give_weights,
    make_evals,
    make_schedule,
    make_trainer,
    sae_options,
)
from saekit.training.trainer import SAETrainer

if TYPE_CHECKING:
    from saekit.sae.module import SAE

__all__ = ["look"]

T = TypeVar("T")
_FORWARDS, _STEPS = 4, 3  # the first of each is not counted


def look(config: TrainConfig, plugins: PluginManager, model: object | None, dataset: object | None) -> Plan:
    """The plan of a run whose text and model :mod:`saekit.preflight` has found."""
    planner = _Planner(config, plugins)
    try:
        planner.look(model, dataset)
    finally:
        release()
    return Plan(planner.facts, planner.numbers, planner.problems, planner.warnings)


class _Planner:
    def __init__(self, config: TrainConfig, plugins: PluginManager) -> None:
        self.config, self.plugins = config, plugins
        self.options: SAEConfig = plugins.options("sae_architectures", config.sae)
        self.start: SAE | None = None
        self.facts: dict[str, str] = {}
        self.numbers: dict[str, float] = {}
        self.problems: list[str] = []
        self.warnings: list[str] = []

    def attempt(self, work: Callable[[], T]) -> T | None:
        """``work()``, or None with its error among the problems."""
        try:
            return work()
        except SaekitError as error:
            if str(error) not in self.problems:
                self.problems.append(str(error))
            return None

    def look(self, model: object | None, dataset: object | None) -> None:
        """Everything, as far as it can be reached."""
        config, plugins = self.config, self.plugins
        self.training()
        self.attempt(lambda: check_run_folder(config, config.checkpoints.name))
        self.attempt(lambda: resolve_device(config.training.device, "training.device"))
        self.attempt(lambda: make_evals(config, plugins))
        self.attempt(lambda: chosen_trackers(config, plugins))
        if (found := self.attempt(lambda: sae_options(config, plugins))) is not None:
            self.options, self.start = found
        schedule = self.attempt(lambda: make_schedule(config, plugins))
        corpus = self.attempt(lambda: Corpus.of(config.dataset, config.evals, dataset))
        backend = self.attempt(lambda: build_backend(config, plugins, model))
        if corpus is None or backend is None:
            return
        self.attempt(lambda: check_context_size(backend, corpus.context_size))
        fits = backend.n_ctx is None or corpus.context_size <= backend.n_ctx
        self.attempt(lambda: check_hooks(backend, [config.site], "site.hook_name"))
        stream = open_stream(config, corpus, plugins, backend, [config.site])
        there = config.site.hook_name in backend.hook_names()
        source = self.attempt(lambda: open_source(config, plugins, stream)) if there else None
        try:
            # A source that has not opened the text does without it, and evals may, too.
            if source is None or "contexts" in vars(stream) or config.evals.run:
                self.text(corpus, backend)
            width = self.attempt(lambda: stream.widths[config.site]) if there else None
            if width is None:
                return
            self.attempt(lambda: checked_width(stream, config.site, self.options.d_in))
            self.sizes(backend, stream, corpus, width)
            if source is not None:
                self.source(source)
            self.checkpoints()
            if schedule is not None and fits:
                self.attempt(lambda: self.duration(source, stream, corpus, backend, width, schedule))
        finally:
            if source is not None:
                source.close()

    def training(self) -> None:
        """What the configuration alone says."""
        training = self.config.training
        self.numbers |= {"steps": training.steps, "training_tokens": training.total_tokens}
        tuned = f", the last {training.finetuning_tokens:,} for fine-tuning" if training.finetuning_tokens else ""
        self.facts["training"] = (
            f"{training.steps:,} steps of {training.train_batch_size_tokens:,} tokens, "
            f"{training.total_tokens:,} in all{tuned}"
        )
        if training.dead_feature_window >= training.steps:
            self.warnings.append(
                f"training.dead_feature_window is {training.dead_feature_window}, so in {training.steps} steps no "
                "feature is ever counted as dead"
            )
        if training.feature_sampling_window > training.steps:
            self.warnings.append(
                f"training.feature_sampling_window is {training.feature_sampling_window}, so in {training.steps} steps "
                "no firing fractions are logged"
            )

    def text(self, corpus: Corpus, backend: ModelBackend) -> None:
        """The tokens that are put in, and the first context."""
        settled = corpus.config
        policy = self.attempt(lambda: corpus.policy(backend.special_tokens))
        if policy is None:
            return

        def name(token: int) -> str:
            kinds = [kind.upper() for kind, known in backend.special_tokens.items() if known == token]
            return f"{kinds[0] if kinds else 'token'} {''.join(backend.token_texts([token]))!r} (id {token})"

        begin = "with no token put before them" if policy.begin_batch is None else f"from {name(policy.begin_batch)} on"
        between = "nothing" if policy.separator is None else name(policy.separator)
        first = "" if policy.begin_sequence is None else f"; before each document {name(policy.begin_sequence)}"
        self.facts["contexts"] = f"{corpus.context_size} tokens, {begin}; between documents {between}{first}"
        if policy.begin_batch is None and backend.special_tokens.get("bos") is not None:
            self.warnings.append(
                "contexts do not begin with BOS (dataset.prepend_bos); most models were trained with it, and their "
                "activations are out of the ordinary without"
            )
        contexts = self.attempt(lambda: _first_context(corpus, backend))
        if contexts is not None:
            shown = "".join(backend.token_texts(contexts.tokens[0, :16].tolist()))
            self.facts["first context"] = f"{shown!r}..."
        evals = self.config.evals
        if evals.run and contexts is not None:
            self.attempt(lambda: corpus.held_out(backend, seed=0))
        held = f"split {evals.split!r}" if evals.split else f"one document in {evals.held_out_every}"
        self.facts["held out"] = f"{held}, {evals.n_contexts} contexts" if evals.run else "nothing"
        self.facts["when the text ends"] = str(settled.on_exhausted)

    def sizes(self, backend: ModelBackend, stream: StreamContext, corpus: Corpus, width: int) -> None:
        """Widths, memory and disk."""
        config, d_sae = self.config, self.options.features(width)
        parameters = 2 * width * d_sae + d_sae + width
        weights = parameters * getattr(torch, self.options.dtype).itemsize
        self.numbers |= {"d_in": width, "d_sae": d_sae, "sae_bytes": 4 * weights}
        self.facts["site"] = f"{config.site.name} of {backend.name}, width {width}"
        self.facts["SAE"] = f"{d_sae:,} features, {parameters:,} parameters"
        if d_sae < width:
            self.warnings.append(f"the SAE has fewer features ({d_sae}) than its input has dimensions ({width})")
        model_bytes = getattr(backend, "memory_bytes", lambda: 0)()
        if model_bytes:
            self.numbers["model_bytes"] = model_bytes
            self.facts["model memory"] = _bytes(model_bytes)
        self.facts["SAE memory"] = f"{_bytes(4 * weights)} (weights, gradients and Adam's moments)"
        self.facts["disk"] = f"{_bytes(weights + 4 * d_sae)} for each saved SAE"
        try:
            self.cache(stream, corpus)
        except SaekitError as error:  # training does without
            self.warnings.append(f"`saekit cache` could not write a cache for this run: {error}")

    def cache(self, stream: StreamContext, corpus: Corpus) -> None:
        """The size of the cache that ``saekit cache`` would write."""
        sites = cache_sites(self.config)
        check_context_size(stream.backend, corpus.context_size)
        check_hooks(stream.backend, sites, "activations.cache.sites")
        wide = open_stream(self.config, corpus, self.plugins, stream.backend, sites)
        contexts = cached_contexts(self.config, corpus.context_size)
        needed = plan_cache(self.config, wide, corpus.context_size).bytes_for(contexts)
        place = Path(self.config.activations.cache.folder).absolute()
        free = shutil.disk_usage(next(parent for parent in (place, *place.parents) if parent.exists())).free
        self.numbers["cache_bytes"] = needed
        self.facts["activation cache"] = f"{_bytes(needed)} if `saekit cache` writes it; {_bytes(free)} are free"

    def source(self, source: ActivationSource) -> None:
        """The memory that batches come from."""
        size = getattr(source, "memory_bytes", lambda: 0)()
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
        """What a run that can be resumed takes on the disk: weights, Adam's two moments, and the buffer."""
        keep = self.config.checkpoints.keep_last
        if not keep:
            self.facts["checkpoints"] = "none that a run could go on from (checkpoints.keep_last = 0)"
            return
        size = self.numbers["sae_bytes"] * 3 // 4 + self.numbers.get("buffer_bytes", 0)
        self.numbers["checkpoint_bytes"] = size
        self.facts["checkpoints"] = f"up to {_bytes(size)} each; {keep} are kept, and one more while it is written"

    def duration(
        self,
        source: ActivationSource | None,
        stream: StreamContext,
        corpus: Corpus,
        backend: ModelBackend,
        width: int,
        schedule: Any,
    ) -> None:
        """Seconds, from a few forwards (or reads) and steps."""
        if source is None or "contexts" in vars(stream):  # the source has opened the text, so it runs the model
            per_token, rows = _timed_forwards(stream, corpus.contexts(backend).take)
            what = "the model"
        else:
            per_token, rows = _timed(lambda: next(source, None), self.config.site)
            what = "reading activations"
        training = self.config.training
        if self.options.d_in in (None, width):
            trainer = make_trainer(self.config, self.plugins, backend, corpus, self.options, width, schedule)
            give_weights(trainer, self.config, corpus, lambda: {self.config.site: rows}, self.start)
            self.facts["SAE step"] = trainer.step_path()
            per_step = _timed_steps(trainer, rows)
        else:
            per_step = 0.0
        forward = per_token * training.total_tokens
        steps = per_step * training.steps
        self.numbers |= {"forward_seconds": forward, "step_seconds": steps, "seconds": forward + steps}
        self.facts["duration"] = (
            f"about {_duration(forward + steps)}: {what} {_duration(forward)}, the SAE {_duration(steps)}, less what "
            "overlaps; evals not counted"
        )


def _first_context(corpus: Corpus, backend: ModelBackend) -> Contexts:
    contexts = corpus.contexts(backend).take(1)
    check_contexts(len(contexts), corpus.context_size)
    return contexts


def _timed_forwards(stream: StreamContext, take: Callable[[int], Contexts]) -> tuple[float, Tensor]:
    """Seconds per token, and the activations that came out."""
    activations = ActivationStream(stream, 8)

    def forward() -> Batch | None:
        contexts = take(8)
        batch = activations.run(contexts) if len(contexts) else None
        if batch is not None and batch.activations[stream.sites[0]].device.type == "cuda":
            torch.cuda.synchronize()
        return batch

    return _timed(forward, stream.sites[0])


def _timed(make: Callable[[], Batch | None], site: Site) -> tuple[float, Tensor]:
    """The least seconds per token of a few batches, of which the first does not count, and all their rows.

    The least, since whatever else a machine does can only make a batch slower.
    """
    times, rows = [], []
    for _ in range(_FORWARDS):
        start = time.perf_counter()
        if (batch := make()) is None:
            break
        times.append((time.perf_counter() - start) / len(batch))
        rows.append(batch.activations[site])
    if not rows:
        raise DataError("there are no activations to time; is there any text?")
    return min(times[1:] or times), torch.cat(rows)


def _timed_steps(trainer: SAETrainer, rows: Tensor) -> float:
    """Seconds per step of the real trainer on a full batch."""
    training = trainer.training
    size = min(training.train_batch_size_tokens, training.total_tokens)
    batch = rows.repeat(-(-size // len(rows)), 1)[:size]
    times = []
    for _ in range(min(_STEPS, training.steps)):
        start = time.perf_counter()
        trainer.train_on(batch)
        if trainer.device.startswith("cuda"):
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return min(times[1:] or times)


def _bytes(size: float) -> str:
    for unit in ("bytes", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:,.3g} {unit}" if unit != "bytes" else f"{size:,.0f} bytes"
        size /= 1000
    return f"{size:,.3g} TB"


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = seconds / 60
    return f"{minutes:.0f} min" if minutes < 90 else f"{minutes / 60:.1f} h"
