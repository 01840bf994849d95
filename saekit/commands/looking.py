"""Models and SAEs to look at from Python: ``saekit.load_model`` and ``saekit.top_texts``.

As in :mod:`saekit.commands.jobs`, what does the work is imported when what can be seen to be wrong has been looked at.
"""

from __future__ import annotations

import operator
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import attrs

from saekit.commands import preflight
from saekit.commands.beforehand import check_named
from saekit.commands.subjects import Subject, at_home, the_one
from saekit.config import DatasetConfig, EvalsConfig, PluginChoice
from saekit.config.files import load_config, plain_config
from saekit.errors import ConfigError
from saekit.kinds import MODEL_BACKENDS
from saekit.plugins.manager import PluginManager, default_manager
from saekit.plugins.text import short
from saekit.site import Site, Sites

if TYPE_CHECKING:
    from torch import Tensor

    from saekit.analysis.feature_texts import TopTexts
    from saekit.backends.around import LoadedModel
    from saekit.config.fields import Dtype
    from saekit.data.corpus import Corpus
    from saekit.protocols import ModelBackend
    from saekit.runs.results import TrainResult
    from saekit.sae.module import SAEModule

__all__ = ["backend_of", "corpus_of", "load_model", "top_texts"]

_ABOUT_TOKENS = (
    "context_size", "prepend_bos", "begin_batch_token", "begin_sequence_token", "sequence_separator_token"
)  # fmt: skip
_OF_ITS_TEXT = ("disable_concat_sequences", "chat_template")
"""What is taken over where the text is the SAE's own; another one may have other documents."""


def load_model(
    model: object = "saekit/tiny-python",
    *,
    backend: PluginChoice | None = None,
    device: str = "auto",
    dtype: Dtype = "float32",
    autocast: bool = False,
    plugins: PluginManager | None = None,
) -> LoadedModel:
    """A language model as saekit runs it, by its name or folder, or around one that you have loaded.

    ``backend`` is as ``model.backend`` of a configuration: a key, a table with ``name`` and options, or an object of
    its options.  Left out, a name is for ``HookedTransformer``, and a loaded model for the one backend that takes it.
    ``device``, ``dtype`` and ``autocast`` are as in ``model``, too; of a loaded model its own count.

    What is returned has ``tokenize(text)``, ``run(tokens, read=[hook, ...])``, ``unembedding()`` and more: see
    :class:`saekit.protocols.ModelBackend`; ``model`` is the model itself, as its library has it.  Raises
    :class:`saekit.errors.ModelError` for a model that cannot be loaded.
    """
    plugins = plugins or default_manager()
    named = isinstance(model, (str, os.PathLike))
    options: dict[str, Any] = {"device": device, "dtype": dtype, "autocast": autocast}
    options |= {} if backend is None else {"backend": backend}
    whole = load_config({"model": options | ({"name": model} if named else {})}, plugins=plugins)
    if named:
        preflight.of_model(whole, plugins).raise_any()
    from saekit.backends.around import backend_around, built_backend

    if named or backend is not None:
        found = built_backend(whole.model, plugins, None if named else model)
    else:
        found = backend_around(model, whole.model, plugins)
    return cast("LoadedModel", found)


def top_texts(
    sae: SAEModule | TrainResult | str | Path,
    *,
    model: object | None = None,
    dataset: object | None = None,
    features: Sequence[int] | Literal["best", "random"] = "best",
    k: int = 5,
    texts: int = 5,
    tokens: int = 100_000,
    site: Site | Sites | str | None = None,
    diverse: bool = False,
    seed: int = 0,
    verbose: bool = True,
    plugins: PluginManager | None = None,
) -> TopTexts:
    """The texts on which features of any SAE fire most, and the tokens that the features promote.

    ``sae`` is an SAE, what :func:`saekit.train` returned, a folder, a run, or ``RELEASE:ID``.

    ``features`` are numbers, or ``k`` of them: ``"best"`` are easy to read, each firing on different words that mean
    something alike; ``"random"`` are drawn by ``seed`` among those that fire.  The ``texts`` strongest places of each
    are found in about so many ``tokens``, in bounded memory; ``diverse`` shows no token twice while there are others.

    ``model`` is a name, a model that you have loaded, or what :func:`load_model` returned; left out, the one that the
    SAE was trained on, with the options of its run.  ``dataset`` is text in memory as for :func:`saekit.train`, or
    options as of ``dataset`` in a configuration (``{"path": "owner/name"}``); left out, the training text.  ``site`` is
    where an SAE belongs that does not say so itself.  Of what :func:`saekit.train` returned, in place of an
    SAE, model and held-out text are used.

    What is returned shows itself in prompts and notebooks; its items have ``feature``, ``frequency``, ``examples``
    (each with ``tokens`` and ``activations``), ``promotes`` and ``suppresses``, which are None where the SAE does not
    write to the residual stream.  Raises :class:`saekit.errors.SaekitError` for what cannot be found or does not fit.
    """
    plugins, features = plugins or default_manager(), _numbers(features)
    check_named(sae)
    _check_counts(features, k=k, texts=texts, tokens=tokens)
    from saekit.commands.material import Material, Text, check_text_known
    from saekit.devices import resolve_device
    from saekit.progress import ProgressDisplay
    from saekit.splicing.fits import sites_of
    from saekit.status import Status

    with Status(verbose=verbose) as say:
        result = _result_of(sae)
        subject = _with_its_run(the_one(sae, plugins, device=resolve_device("auto", "device")), plugins)
        sae = subject.sae
        _check_features(sae, features)
        wanted = sites_of(sae, site, "site")
        if dataset is None:
            check_text_known(subject)
            dataset = None if result is not None and result.held_out is not None else subject.dataset
        backend = Material(plugins, Text(), model=model, say=say).model_of(subject)
        say("reading the text")
        sites, contexts = _contexts(sae, backend, wanted, dataset, result, tokens, plugins)
    from saekit.analysis.top_texts import find_top_texts

    with ProgressDisplay(contexts.numel(), doing="looking", verbose=verbose) as progress:
        return find_top_texts(
            sae, backend=backend, sites=sites, contexts=contexts, features=features, k=k, texts=texts,
            diverse=diverse, seed=seed, report=progress.update,
        )  # fmt: skip


def _numbers(features: Any) -> Any:
    """``features`` as a text or a list of whole numbers, of a list, a tensor, an array or whatever else gives them."""
    if isinstance(features, str):
        return features
    try:
        given = features.tolist() if hasattr(features, "tolist") else list(features)
        found = [operator.index(number) for number in given if not isinstance(number, bool)]
        if len(found) == len(given):
            return found
    except TypeError:
        pass
    expected = "must be 'best', 'random' or a list of numbers of features"
    raise ConfigError([("features", f"{expected}, found {short(features)}")], "the arguments of top_texts")


def _check_features(sae: SAEModule, features: Any) -> None:
    if not isinstance(features, str) and (wrong := [number for number in features if not 0 <= number < sae.d_sae]):
        told = f"are 0 to {sae.d_sae - 1:,} of this SAE, found {wrong[0]}"
        raise ConfigError([("features", told)], "the arguments of top_texts")


def _check_counts(features: Any, **counts: int) -> None:
    """:class:`ConfigError` for numbers that mean nothing."""
    problems = [
        (name, f"must be a whole number of 1 or more, found {count!r}")
        for name, count in counts.items() if type(count) is not int or count < 1
    ]  # fmt: skip
    if isinstance(features, str):
        if features not in ("best", "random"):
            problems.append(("features", f"must be 'best', 'random' or numbers of features, found {features!r}"))
    elif not features:
        problems.append(("features", "names none; give numbers of features, 'best' or 'random'"))
    if problems:
        raise ConfigError(problems, "the arguments of top_texts")


def _result_of(sae: object) -> TrainResult | None:
    """What :func:`saekit.train` returned, if ``sae`` is that, or the one of a list or a sweep."""
    if hasattr(sae, "results") and hasattr(sae, "diverged"):  # a sweep's
        sae = sae.results
    several = [*sae.values()] if isinstance(sae, Mapping) else sae
    if isinstance(several, Sequence) and not isinstance(several, str):
        return _result_of(several[0]) if len(several) == 1 else None
    return cast("TrainResult", sae) if hasattr(sae, "corpus") else None


def _with_its_run(subject: Subject, plugins: PluginManager) -> Subject:
    """``subject``, which of an SAE that was read from a run knows what that was given from memory.

    Of such an object no more: it is what it says itself, which may have been changed since.
    """
    (home,) = at_home({subject.name: subject}, plugins).values()
    return attrs.evolve(subject, unnamed=home.unnamed)


def backend_of(about: Mapping[str, Any], kind: object, plugins: PluginManager) -> PluginChoice | None:
    """The backend by the name of the class that it wraps, with the options that the SAE's metadata has of it."""
    items = [item for item in plugins.registry(MODEL_BACKENDS).items if item.entry.name == kind]
    if len(items) != 1:
        return None
    known = {f"model_{field.name}": field.name for field in attrs.fields(items[0].entry.config)}
    stated = {known[key]: value for key, value in about.items() if key in known and value is not None}
    return {"name": items[0].key} | stated


def _contexts(
    sae: SAEModule,
    backend: ModelBackend,
    wanted: Sites,
    dataset: object | None,
    result: TrainResult | None,
    tokens: int,
    plugins: PluginManager,
) -> tuple[Sites, Tensor]:
    """Where the SAE is in the model, and token ids ``[n, context_size]``, of about so many tokens."""
    import torch

    from saekit.ambient import ambient
    from saekit.data.activations import check_contexts
    from saekit.runs.opening import check_context_size
    from saekit.splicing.fits import check_fits

    with ambient():
        if result is not None and dataset is None and result.held_out is not None:
            corpus = result.corpus
            sites = check_fits(sae, backend, wanted, prepend_bos=corpus.config.prepend_bos, masked=None)
            evals = attrs.evolve(corpus.evals, n_contexts=max(tokens // corpus.context_size, 1))
            return sites, attrs.evolve(corpus, evals=evals).held_out(backend, seed=0)
        corpus = corpus_of(sae, backend, dataset, plugins)
        sites = check_fits(sae, backend, wanted, prepend_bos=corpus.config.prepend_bos, masked=None)
        check_context_size(backend, corpus.context_size)
        found = corpus.contexts(backend).take(max(tokens // corpus.context_size, 1)).tokens
    check_contexts(len(found), corpus.context_size)
    return sites, torch.from_numpy(found)


def corpus_of(sae: SAEModule, backend: ModelBackend, dataset: object | None, plugins: PluginManager) -> Corpus:
    """The text, packed as it was for the SAE, as far as its metadata says; what is pretokenized stays as it is."""
    from saekit.data.corpus import Corpus
    from saekit.data.in_memory import is_name
    from saekit.data.packed import Packed

    about = sae.info.metadata
    given: dict[str, Any] = {}
    if isinstance(dataset, DatasetConfig):
        given, dataset = plain_config(dataset, plugins, spare=True), None
    elif isinstance(dataset, os.PathLike) or (isinstance(dataset, str) and is_name(dataset)):
        given, dataset = {"path": os.fspath(dataset)}, None
    elif isinstance(dataset, Mapping) and isinstance(dataset.get("path"), (str, os.PathLike)):
        given, dataset = dict(dataset), None
    elif dataset is None:
        if not isinstance(about.get("dataset_path"), str):
            raise ConfigError([("dataset", "is missing: the SAE does not say which text it was trained on")])
        given = {"path": about["dataset_path"]}
    config = load_config({"dataset": given}, plugins=plugins).dataset
    if dataset is not None or Packed.at(config) is None:
        config = _packed_alike(config, given, about, backend, plugins)
    config = attrs.evolve(config, on_exhausted="stop")
    return Corpus.of(config, EvalsConfig(run=(), held_out_every=0), dataset)


def _packed_alike(
    config: DatasetConfig,
    given: Mapping[str, Any],
    about: Mapping[str, Any],
    backend: ModelBackend,
    plugins: PluginManager,
) -> DatasetConfig:
    """``config`` with the options about tokens that the SAE's metadata has, where they are not ``given``."""
    own = list(given) == ["path"] and given["path"] == about.get("dataset_path")
    names = (*_ABOUT_TOKENS, *_OF_ITS_TEXT) if own else _ABOUT_TOKENS
    known = {name: about[name] for name in names if about.get(name) is not None}
    size = known.get("context_size")
    if "context_size" not in given and size is not None and (type(size) is not int or size < 1):
        raise ConfigError(
            [("dataset.context_size", f"is {short(size)} in the SAE's metadata, expected a whole number of 1 or more; "
              "say it with the text: dataset={'path': ..., 'context_size': ...}")]
        )  # fmt: skip
    if isinstance(size, int) and backend.n_ctx is not None:
        known["context_size"] = min(size, backend.n_ctx)
    try:
        return load_config({"dataset": {**known, **given}}, plugins=plugins).dataset
    except ConfigError:  # of another library, or of an older one
        return config
