"""``saekit cache``: the model's activations on the training text, written to disk."""

from __future__ import annotations

from pathlib import Path

import attrs

from saekit.ambient import ambient
from saekit.config import DistributedConfig, TrainConfig
from saekit.data.activations import ActivationStream, check_contexts
from saekit.data.cache.manifest import Manifest
from saekit.data.cache.together import CacheWriterOfMany
from saekit.data.cache.write import CacheWriter
from saekit.data.contexts import Contexts
from saekit.data.corpus import Corpus
from saekit.data.stream import StreamContext, kept_of
from saekit.distributed.world import World, open_world, uses_cuda
from saekit.errors import DataError
from saekit.planning.cache import cache_sites, cached_contexts, cached_rows, plan_cache
from saekit.plugins.manager import PluginManager
from saekit.progress import ProgressDisplay
from saekit.runs.counting import counted_of
from saekit.runs.opening import open_backend, open_stream, sites_by_option, warn_of
from saekit.runs.spreading import check_alike
from saekit.runs.timing import bytes_text
from saekit.status import Status

__all__ = ["write_cache"]


@ambient()
def write_cache(
    config: TrainConfig,
    plugins: PluginManager,
    model: object | None,
    dataset: object | None,
    say: Status | None = None,
) -> Manifest:
    """The work of :func:`saekit.cache_activations`; ``say`` is told what is being done.

    Of several processes, each runs the model for a part of the shards.
    """
    distributed = DistributedConfig(timeout_s=config.distributed.timeout_s)  # all processes share the shards
    with open_world(distributed, cuda=uses_cuda(config.model.device)) as world, world.accounted():
        check_alike(world, [config], plugins)
        return _written(config, plugins, model, dataset, say or Status(verbose=False), world)


def _written(
    config: TrainConfig, plugins: PluginManager, model: object | None, dataset: object | None, say: Status, world: World
) -> Manifest:
    dataset_config = attrs.evolve(config.dataset, on_exhausted="stop")
    corpus = Corpus.of(dataset_config, config.evals, dataset, config.tokens.mask_column)
    sites = cache_sites(config)
    say(f"loading the model {config.model.name}" if model is None else "looking at the model")
    named = sites_by_option([config])
    named["activations.cache.sites"] = tuple(site for site in sites if site not in config.sites.all)
    backend = open_backend(config, corpus, plugins, model, named)
    doubt = warn_of if world.main else _unsaid
    stream = open_stream(config, corpus, plugins, backend, sites, doubt=doubt)
    say("reading the text")
    contexts = stream.contexts  # opens the text, before the model runs
    said = counted_of(config, corpus, backend, stream)
    most = stream.rows_per_context(corpus.context_size)
    contexts_asked = cached_contexts(config, most)
    wanted = contexts_asked * most if said is None or not said.contexts else cached_rows(config)
    folder = Path(config.activations.cache.folder)
    with _writer(folder, plan_cache(config, stream, corpus.context_size), world) as writer:
        there = writer.manifest
        if there.ended:
            writer.check_space(there.contexts, there.rows)
        else:
            writer.check_space(contexts_asked, wanted)
        if there.position is not None:
            contexts.load_state_dict(there.position)
        say.rest()
        verbose = config.training.verbose and world.main
        _write(config, stream, writer, wanted, "" if said is None else f"; {said}", verbose=verbose)
        manifest = writer.manifest
    check_contexts(manifest.contexts, corpus.context_size)
    if not manifest.rows:
        raise DataError(
            f"no token of the text counts, so {str(folder)!r} has no activations: see tokens.exclude_special_tokens, "
            "tokens.seqpos_slice and tokens.mask_column"
        )
    if manifest.rows < wanted and config.dataset.on_exhausted == "error":
        raise DataError(
            f"the data ended after {manifest.rows:,} activations, and {wanted:,} were asked for; "
            f"those are in {str(folder)!r}. Ask for fewer (activations.cache.tokens), or set dataset.on_exhausted"
        )
    return manifest


def _unsaid(text: str) -> None:
    """The first process says it."""


def _writer(folder: Path, plan: Manifest, world: World) -> CacheWriter:
    return CacheWriter(folder, plan) if world.size == 1 else CacheWriterOfMany(folder, plan, world)


def _write(
    config: TrainConfig, stream: StreamContext, writer: CacheWriter, wanted: int, said: str, *, verbose: bool
) -> None:
    """Contexts from where the cache ends until there are ``wanted`` rows, or to the end of the data.

    No context more than that needs, however many the model takes at once.
    """
    activations = ActivationStream(stream, config.activations.cache.batch_size_prompts)
    most, there = stream.rows_per_context(writer.manifest.context_size), writer.manifest.rows
    done, ended = there, writer.manifest.ended
    needed = writer.manifest.bytes_for(-(-max(wanted, there) // most), max(wanted, there))
    with ProgressDisplay(wanted, doing="caching", verbose=verbose) as progress:
        sites = f"{len(stream.sites)} site{'s' * (len(stream.sites) != 1)}"
        progress.say(f"{wanted:,} activations of {sites}: {bytes_text(needed)} on disk{said}")
        while done < wanted and not ended:
            asked = min(config.activations.cache.batch_size_prompts, writer.room, -(-(wanted - done) // most))
            contexts = stream.contexts.take(asked)
            mine, ended = writer.mine, len(contexts) < asked
            if len(contexts) and mine:
                batch = activations.run(contexts)
                writer.add(batch, stream.contexts.state_dict(), len(contexts))
                done += len(batch)
            elif len(contexts):
                writer.pass_over(stream.contexts.state_dict(), len(contexts))
                done += _rows_of(stream, contexts)
            if mine or ended or done >= wanted:
                progress.update(done, before=there)
        writer.finish(ended=ended)


def _rows_of(stream: StreamContext, contexts: Contexts) -> int:
    """How many rows the model would give of ``contexts``."""
    return contexts.tokens.size if stream.counts_all else int(kept_of(stream.choice, contexts).sum())
