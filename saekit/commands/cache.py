"""``saekit cache``: the model's activations on the training text, written to disk."""

from __future__ import annotations

from pathlib import Path

import attrs

from saekit.ambient import ambient
from saekit.config import TrainConfig
from saekit.data.activations import ActivationStream, check_contexts
from saekit.data.cache.manifest import Manifest
from saekit.data.cache.write import CacheWriter
from saekit.data.corpus import Corpus
from saekit.data.stream import StreamContext
from saekit.errors import DataError
from saekit.plugins.manager import PluginManager
from saekit.progress import ProgressDisplay
from saekit.runs.opening import open_backend, open_stream, sites_by_option
from saekit.runs.planned_cache import cache_sites, cached_contexts, plan_cache
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
    """The work of :func:`saekit.cache_activations`; ``say`` is told what is being done."""
    say = say or Status(verbose=False)
    corpus = Corpus.of(attrs.evolve(config.dataset, on_exhausted="stop"), config.evals, dataset)
    sites = cache_sites(config)
    say(f"loading the model {config.model.name}" if model is None else "looking at the model")
    named = sites_by_option([config])
    named["activations.cache.sites"] = tuple(site for site in sites if site not in config.sites.all)
    backend = open_backend(config, corpus, plugins, model, named)
    stream = open_stream(config, corpus, plugins, backend, sites)
    say("reading the text")
    contexts = stream.contexts  # opens the text, before the model runs
    wanted = cached_contexts(config, corpus.context_size)
    folder = Path(config.activations.cache.folder)
    with CacheWriter(folder, plan_cache(config, stream, corpus.context_size)) as writer:
        writer.check_space(writer.manifest.contexts if writer.manifest.ended else wanted)
        if writer.manifest.position is not None:
            contexts.load_state_dict(writer.manifest.position)
        say.rest()
        _write(config, stream, writer, wanted)
        manifest = writer.manifest
    check_contexts(manifest.contexts, corpus.context_size)
    if manifest.contexts < wanted and config.dataset.on_exhausted == "error":
        raise DataError(
            f"the data ended after {manifest.rows:,} activations, and {wanted * corpus.context_size:,} were asked for; "
            f"those are in {str(folder)!r}. Ask for fewer (activations.cache.tokens), or set dataset.on_exhausted"
        )
    return manifest


def _write(config: TrainConfig, stream: StreamContext, writer: CacheWriter, wanted: int) -> None:
    """Contexts from where the cache ends to ``wanted``, or to the end of the data."""
    activations = ActivationStream(stream, config.activations.cache.batch_size_prompts)
    size, there = writer.manifest.context_size, writer.manifest.contexts
    done, ended = there, writer.manifest.ended
    needed = writer.manifest.bytes_for(max(wanted, there))
    with ProgressDisplay(wanted * size, doing="caching", verbose=config.training.verbose) as progress:
        progress.say(f"{wanted * size:,} activations of {len(stream.sites)} site(s): {needed / 1e9:,.2f} GB on disk")
        while done < wanted and not ended:
            asked = min(config.activations.cache.batch_size_prompts, writer.room, wanted - done)
            contexts = stream.contexts.take(asked)
            if len(contexts):
                writer.add(activations.run(contexts), stream.contexts.state_dict())
            done, ended = done + len(contexts), len(contexts) < asked
            progress.update(done * size, before=there * size)
        writer.finish(ended=ended)
