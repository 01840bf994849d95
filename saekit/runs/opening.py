"""From a configuration to the stages of its data; every check here comes before the first long computation."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from hashlib import blake2b
from typing import TypeAlias

import attrs

from saekit.abilities import HasModel, KeepsRecipe, StatesRows, StatesWidths
from saekit.backends.around import built_backend
from saekit.backends.base import no_hook
from saekit.backends.loading import check_nothing_attached
from saekit.cautions import warn
from saekit.config import TrainConfig
from saekit.data.contexts import ContextStream
from saekit.data.corpus import Corpus
from saekit.data.faults import check_all
from saekit.data.stream import StreamContext, refuse_other_rows
from saekit.distributed.world import ALONE, World
from saekit.errors import ConfigError, ModelError
from saekit.kinds import ACTIVATION_SOURCES, MODEL_BACKENDS
from saekit.plugins.building import placed
from saekit.plugins.manager import PluginManager
from saekit.protocols import ModelBackend
from saekit.runs.checks import has_model
from saekit.runs.identity import run_identity
from saekit.runs.supervised import SupervisedSource
from saekit.sae.module import SAEModule
from saekit.site import Site, Sites
from saekit.status import Say
from saekit.tokens import token_choice
from saekit.values import Ports

_MANY_READINGS = 10
Widths: TypeAlias = Mapping[Site, int]

__all__ = [
    "build_backend",
    "check_context_size",
    "check_hooks",
    "check_start_widths",
    "checked_ports",
    "loading_text",
    "open_backend",
    "open_source",
    "open_stream",
    "repeated",
    "seed_for",
    "sites_by_option",
    "sites_option",
    "warn_of",
    "widths_of",
    "widths_text",
]


def seed_for(seed: int, purpose: str) -> int:
    """A seed of its own for each thing that draws, so that none changes what another draws."""
    return int.from_bytes(blake2b(f"{seed}:{purpose}".encode(), digest_size=7).digest(), "big")


def open_backend(
    config: TrainConfig,
    corpus: Corpus,
    plugins: PluginManager,
    model: object | None,
    named: Mapping[str, Sequence[Site]],
) -> ModelBackend:
    """The model, checked against the context size, the tokens that are put in, and the sites, ``named`` by the options
    that they are from; it has not run yet.  All that does not fit is told at once."""
    check_nothing_attached(model, "what a run trains on or keeps")
    backend = build_backend(config, plugins, model)
    if not has_model(config, plugins):
        return backend
    check_all(
        lambda: check_context_size(backend, corpus.context_size),
        *(partial(check_hooks, backend, sites, option) for option, sites in named.items()),
        lambda: corpus.policy(backend.special_tokens),
        lambda: corpus.tokenize(backend),
        lambda: config.tokens.positions(corpus.context_size),
        lambda: token_choice(config.tokens, backend),
    )
    return backend


def loading_text(config: TrainConfig, plugins: PluginManager) -> str:
    """What is done by :func:`open_backend`, in words: the first time, most of it may be to import a library."""
    needed = plugins.find(MODEL_BACKENDS, config.model.backend).entry.requires
    first = [name for name in needed if name not in sys.modules]
    return (f"importing {', '.join(first)} and " if first else "") + f"loading the model {config.model.name}"


def build_backend(config: TrainConfig, plugins: PluginManager, model: object | None) -> ModelBackend:
    """The model, whether it fits or not; ``model`` may be a backend, of :func:`saekit.load_model`, around one."""
    if MODEL_BACKENDS.is_met_by(model):
        model = model.model if isinstance(model, HasModel) else model
    return built_backend(config.model, plugins, model)


def warn_of(text: str) -> None:
    """As a warning of Python's."""
    warn(text, RuntimeWarning)


def repeated(tokens: int, wanted: int, *, what: str = "the text has") -> str | None:
    """What to know of so many tokens of which ``wanted`` are trained on, if they are read very often."""
    if wanted < _MANY_READINGS * tokens:
        return None
    return (
        f"{what} {tokens:,} tokens, and training takes {wanted:,} (training.training_tokens), so each is read "
        f"{wanted / tokens:,.0f} times. Train on fewer tokens or on more text; dataset.on_exhausted=stop ends "
        "training with the text"
    )


def check_context_size(backend: ModelBackend, context_size: int) -> None:
    """Contexts must be no longer than the model takes."""
    if backend.n_ctx is not None and context_size > backend.n_ctx:
        raise ConfigError(
            [("dataset.context_size", f"is {context_size}, but the model {backend.name!r} takes at most "
              f"{backend.n_ctx} tokens")]
        )  # fmt: skip


def check_hooks(backend: ModelBackend, sites: Sequence[Site], option: str) -> None:
    """Every site's hook must be one of the model's; ``option`` is where the sites come from."""
    names = frozenset(backend.hook_names())
    wanted = dict.fromkeys(site.hook_name for site in sites)
    if problems := [str(no_hook(backend, name, option=option)) for name in wanted if name not in names]:
        raise ModelError("\n".join(problems))


def open_stream(
    config: TrainConfig,
    corpus: Corpus,
    plugins: PluginManager,
    backend: ModelBackend,
    sites: Sequence[Site],
    *,
    beside: StreamContext | None = None,
    world: World = ALONE,
    doubt: Callable[[str], None] = warn_of,
    say: Say = lambda text: None,
    differs: Callable[[str], None] = refuse_other_rows,
    left: Callable[[], int | None] = lambda: None,
) -> StreamContext:
    """What activations are made from; ``beside`` is another stream that runs the same model.

    ``doubt`` is told, in words, what looks wrong with the text, ``say`` what takes long, and ``differs`` where rows of
    a checkpoint do not come out as they did; ``left`` tells how many rows are still to be taken.
    """
    there, column = has_model(config, plugins), world.column
    corpus = attrs.evolve(corpus, mask=config.tokens.mask_column)
    if there:
        config.tokens.positions(corpus.context_size)

    def open_contexts(part: tuple[int, int] = (0, 1)) -> ContextStream:
        contexts = attrs.evolve(corpus, part=part).contexts(backend)
        for text in corpus.doubts(backend):
            doubt(text)
        wanted, size = config.training.total_tokens, corpus.context_size
        used = config.tokens.positions(size)

        def on_repeat(tokens: int) -> None:
            if (text := repeated(part[1] * tokens * used // size, wanted)) is not None:
                doubt(text)

        contexts.on_repeat = on_repeat
        return contexts

    return StreamContext(
        backend=backend,
        sites=sites,
        batch_size=config.training.train_batch_size_tokens,
        seed=seed_for(config.training.seed, "shuffle"),
        open_contexts=open_contexts,
        repeat=config.dataset.on_exhausted == "repeat",
        find_identity=(lambda: run_identity(config, corpus, plugins, backend)) if there else dict,
        has_model=there,
        model_lock=beside.model_lock if beside is not None else None,
        doubt=doubt,
        say=say,
        keeps_recipe=config.checkpoints.buffer == "recipe",
        differs=differs,
        choice=token_choice(config.tokens, backend) if there else None,
        masked=corpus.mask is not None,
        process=column.rank,
        processes=column.size,
        open_own=partial(open_contexts, (column.rank, column.size)),
        readers=world.saes,
        left=left,
    )


def open_source(
    config: TrainConfig, plugins: PluginManager, stream: StreamContext, backend: ModelBackend | None = None
) -> SupervisedSource:
    """The source of shuffled batches; ``backend`` is the model itself, where the stream's only stands for it."""
    model = plugins.find(MODEL_BACKENDS, config.model.backend), backend or stream.backend
    item = plugins.find(ACTIVATION_SOURCES, config.activations.source)
    with placed(item, "activations.source"):
        source = plugins.build(ACTIVATION_SOURCES, config.activations.source, stream=stream)
    try:
        found = SupervisedSource(source, item, stream.sites, [model], most=stream.batch_size)
        _check_recipe(found, stream)
    except BaseException:
        with contextlib.suppress(Exception):
            source.close()
        raise
    rows = found.rows if stream.repeat and isinstance(found, StatesRows) else 0
    if rows and (text := repeated(rows, config.training.total_tokens, what="the activations are of")):
        stream.doubt(text)
    return found


def _check_recipe(source: SupervisedSource, stream: StreamContext) -> None:
    """:class:`ConfigError` where states are to do without rows, and those of ``source`` may not."""
    if stream.keeps_recipe and not isinstance(source, KeepsRecipe):
        raise ConfigError(
            [("checkpoints.buffer", f"is 'recipe', and the activation source {source.key!r} does not say that it can "
              "compute its rows again (saekit.abilities.KeepsRecipe). Leave it out: checkpoints hold the rows then")]
        )  # fmt: skip


def sites_option(config: TrainConfig) -> str:
    """The options that name the sites."""
    return "inputs, targets" if config.inputs else "site.hook_name"


def sites_by_option(configs: Iterable[TrainConfig]) -> dict[str, tuple[Site, ...]]:
    """The sites of all of ``configs``, by the options that name them first."""
    found: dict[str, tuple[Site, ...]] = {}
    seen: set[Site] = set()
    for config in configs:
        option, sites = sites_option(config), config.sites.all
        found[option] = found.get(option, ()) + tuple(site for site in sites if site not in seen)
        seen.update(sites)
    return found


def widths_of(source: SupervisedSource, stream: StreamContext) -> Widths:
    """``d`` at each site of ``stream``: as the source states them, or else as the model has them."""
    if isinstance(source, StatesWidths):
        return source.widths
    if not stream.has_model:
        raise ConfigError(
            [("activations.source", f"is '{source.key}', which does not say how wide its activations are (widths), and "
              "this run has no language model to ask")]
        )  # fmt: skip
    return stream.widths


def checked_ports(widths: Widths, sites: Sites, stated: int | None, model: str) -> Ports:
    """Those at ``sites`` of the ``model``; a ``stated`` ``d_in`` that is not the inputs' sum is an error."""
    ports = Ports.of(sites, widths)
    if stated is not None and stated != ports.d_in:
        raise ConfigError([("sae.d_in", f"is {stated}, but {widths_text(ports.inputs, model)}")])
    return ports


def widths_text(widths: Mapping[str, int], model: str) -> str:
    """In words: what is how wide, and of several how wide all are together."""
    first, *others = [f"{name} of {model!r} has width {width}" for name, width in widths.items()]
    return first if not others else f"{', '.join([first, *others])}: {sum(widths.values())} side by side"


def check_start_widths(start: SAEModule, ports: Ports, model: str) -> None:
    """:class:`ConfigError` where the SAE that training starts from is for vectors of another size than ``ports``."""
    for own, found in ((start.ports.inputs, ports.inputs), (start.ports.targets, ports.targets)):
        if [*own.values()] != [*found.values()]:
            sizes = " and ".join(map(str, own.values()))
            raise ConfigError(
                [("training.from_pretrained_path", f"holds an SAE for vectors of {sizes}, but "
                  f"{widths_text(found, model)}")]
            )  # fmt: skip
