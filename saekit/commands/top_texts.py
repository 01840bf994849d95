"""``saekit.top_texts``: the texts on which features of an SAE fire most.

As in :mod:`saekit.commands.jobs`, what does the work is imported when what can be seen to be wrong has been looked at.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import attrs

from saekit.commands.beforehand import check_named
from saekit.commands.looking import checked_seed, corpus_of
from saekit.commands.material import Material, Text, check_text_known
from saekit.commands.subjects import Subject, at_home, the_one
from saekit.errors import ConfigError
from saekit.plugins.manager import PluginManager, default_manager
from saekit.plugins.text import short
from saekit.site import Site, Sites

if TYPE_CHECKING:
    from torch import Tensor

    from saekit.analysis.feature_texts import TopTexts
    from saekit.protocols import ModelBackend
    from saekit.runs.results import TrainResult
    from saekit.sae.module import SAEModule

__all__ = ["top_texts"]


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
    plugins, features, seed = plugins or default_manager(), _numbers(features), checked_seed(seed)
    check_named(sae)
    _check_counts(features, k=k, texts=texts, tokens=tokens)
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
        sites, contexts = _contexts(sae, backend, wanted, dataset, result, tokens, seed, plugins)
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


def _contexts(
    sae: SAEModule,
    backend: ModelBackend,
    wanted: Sites,
    dataset: object | None,
    result: TrainResult | None,
    tokens: int,
    seed: int,
    plugins: PluginManager,
) -> tuple[Sites, Tensor]:
    """Where the SAE is in the model, and token ids ``[n, context_size]``, of about so many tokens."""
    import torch

    from saekit.ambient import ambient
    from saekit.data.activations import check_contexts
    from saekit.data.sampling import sampled
    from saekit.runs.opening import check_context_size
    from saekit.splicing.fits import check_fits

    with ambient():
        if result is not None and dataset is None and result.held_out is not None:
            corpus = result.corpus
            sites = check_fits(sae, backend, wanted, prepend_bos=corpus.config.prepend_bos, masked=None)
            evals = attrs.evolve(corpus.evals, n_contexts=max(tokens // corpus.context_size, 1))
            return sites, attrs.evolve(corpus, evals=evals).held_out(backend, seed)
        corpus = corpus_of(sae, backend, dataset, plugins)
        sites = check_fits(sae, backend, wanted, prepend_bos=corpus.config.prepend_bos, masked=None)
        check_context_size(backend, corpus.context_size)
        found = sampled(corpus, backend, max(tokens // corpus.context_size, 1), seed).contexts.tokens
    check_contexts(len(found), corpus.context_size)
    return sites, torch.from_numpy(found)
