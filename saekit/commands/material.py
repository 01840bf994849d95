"""The models and contexts that SAEs are measured with: each is opened once, for all SAEs that it is right for."""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import attrs

from saekit.abilities import HasModel
from saekit.backends.around import built_backend
from saekit.cautions import warn
from saekit.commands.looking import backend_of, checked_seed, corpus_of, load_model, numbers_of
from saekit.commands.subjects import Subject
from saekit.config import EvalsConfig, PluginChoice
from saekit.config.files import plain_config
from saekit.errors import ConfigError
from saekit.kinds import MODEL_BACKENDS
from saekit.plugins.building import origin_of
from saekit.plugins.manager import PluginManager
from saekit.runs.checks import has_model
from saekit.site import Site, Sites

if TYPE_CHECKING:
    from torch import Tensor

    from saekit.config import ModelConfig
    from saekit.data.corpus import Corpus
    from saekit.protocols import ModelBackend
    from saekit.splicing.doubts import Doubt
    from saekit.status import Status
    from saekit.tokens import Mask

__all__ = ["Group", "Material", "Text", "check_text_known"]


@attrs.frozen(eq=False, kw_only=True)
class Text:
    """What contexts are asked for."""

    dataset: object | None = None
    """None: the one that each SAE says."""
    contexts: Tensor | None = None
    """These, and no others."""
    n_contexts: int = 64
    context_size: int | None = None
    """None: that of each SAE."""
    seed: int = attrs.field(default=0, converter=checked_seed)
    mask: Mask | None = None
    """Which tokens count beside what SAEs say; None: those that the mask of an SAE's own text chooses."""


@attrs.frozen(eq=False, kw_only=True)
class Group:
    """SAEs that are measured together."""

    backend: ModelBackend
    contexts: Tensor
    """``[n, t]`` ids."""
    mask: Mask | None
    """Which of their tokens count, beside what each SAE says."""
    about: dict[str, dict[str, Any]] = attrs.field(factory=dict)
    """By the names of the SAEs what is known of each: plain data, and its ``sites``."""

    @property
    def names(self) -> list[str]:
        """Those of the SAEs."""
        return list(self.about)


@attrs.define(eq=False)
class Material:
    """What was opened so far."""

    plugins: PluginManager
    text: Text
    model: object | None = attrs.field(default=None, kw_only=True)
    """None: the one that each SAE says."""
    backend: PluginChoice | None = attrs.field(default=None, kw_only=True)
    """None: that of each SAE, with its options."""
    device: str = attrs.field(default="auto", kw_only=True)
    say: Status | None = attrs.field(default=None, kw_only=True)
    _backends: dict[str, ModelBackend] = attrs.field(factory=dict, init=False)
    _fits: dict[tuple[str, int, str], Sites] = attrs.field(factory=dict, init=False)
    _contexts: dict[str, tuple[Tensor, Tensor | None, int | None]] = attrs.field(factory=dict, init=False)
    _held: dict[str, tuple[int, str | None]] = attrs.field(factory=dict, init=False)
    _subjects: tuple[Subject, ...] = attrs.field(default=(), init=False)
    """Those that are measured together."""
    _told: set[str] = attrs.field(factory=set, init=False)
    """The SAEs whose configuration could not be loaded, as has been said."""

    def groups(self, subjects: Mapping[str, Subject], site: Site | Sites | str | None = None) -> Iterator[Group]:
        """The SAEs that share a model and contexts, with both; every SAE is checked before the first is given."""
        from saekit.splicing.doubts import begin_with_bos, doubts_of_place
        from saekit.splicing.fits import fitting_sites

        self._subjects = (*subjects.values(),)
        if self.text.contexts is None and self.text.dataset is None:
            for subject in subjects.values():  # before a model is loaded
                check_text_known(subject)
        groups: dict[tuple[int, str], Group] = {}
        for name, subject in subjects.items():
            backend = self.model_of(subject)
            fitting_sites(subject.sae, backend, site)  # before a text is read
            if self.text.contexts is not None:
                key, contexts, facts = "given", self._given(backend), {"dataset": "contexts that were given"}
                begins, own = begin_with_bos(contexts, backend), None
            else:
                key, contexts, own, facts, begins = self._read(subject, backend)
            mask = own if self.text.mask is None else self.text.mask
            sites = self._sites(subject, backend, site, begins, mask is not None)
            group = groups.setdefault((id(backend), key), Group(backend=backend, contexts=contexts, mask=mask))
            size, number = contexts.shape[1], len(contexts)
            group.about[name] = {
                **_of_model(backend), **facts, "context_size": size, "n_contexts": number, "sites": sites,
                **_unlike_training(doubts_of_place(subject.sae, backend, sites)),
            }  # fmt: skip
        yield from groups.values()

    def _sites(
        self,
        subject: Subject,
        backend: ModelBackend,
        site: Site | Sites | str | None,
        begins: bool | None,
        masked: bool,
    ) -> Sites:
        """Where the SAE is; what looks wrong is said once."""
        from saekit.splicing.fits import check_fits

        key = subject.name, id(backend), repr(site)
        if key not in self._fits:
            self._fits[key] = check_fits(subject.sae, backend, site, prepend_bos=begins, masked=masked)
        return self._fits[key]

    def _warn_of_fault(self, subject: Subject) -> None:
        """Where what a run's configuration would say is taken from its SAE: once for each."""
        if subject.fault is None or subject.name in self._told:
            return
        self._told.add(subject.name)
        warn(
            f"{subject.fault}\nThe model and the text are those that the SAE itself says, with their options left at "
            "the defaults; name others by model= and dataset=",
            RuntimeWarning,
        )

    def _say(self, text: str) -> None:
        if self.say is not None:
            self.say(text)

    # ---- models

    def model_of(self, subject: Subject) -> ModelBackend:
        """The one that is given, that of the run, or the one that the SAE says it was trained on.

        A name says which model, and the SAE with which backend and options, unless a backend is given, too.
        """
        if MODEL_BACKENDS.is_met_by(self.model):
            if self.backend is not None:
                raise ConfigError([("backend", "is for the name of a model, or for one that you have loaded; model is "
                                    f"a {type(self.model).__name__}, which has its own")])  # fmt: skip
            return self.model
        if self.model is None and self.backend is None and subject.backend is not None:
            return subject.backend
        if self.model is not None and not isinstance(self.model, (str, os.PathLike)):
            return self._opened("given", "that was given", lambda: self._load(self.model))
        config = subject.config
        if config is not None and not has_model(config, self.plugins):
            config = None
        if self.model is None:
            _check_named(subject, "model", "--model with a name or a folder")
        if config is not None and self.backend is None:
            return self._of_run(config.model)
        if self.model is None and config is None:
            self._warn_of_fault(subject)
        name = str(self.model) if self.model is not None else None if config is None else config.model.name
        return self._named(subject, name, None if config is None else config.model)

    def _of_run(self, model: ModelConfig) -> ModelBackend:
        model = model if self.device == "auto" else attrs.evolve(model, device=self.device)
        model = model if self.model is None else attrs.evolve(model, name=str(self.model))
        key = repr(plain_config(model, self.plugins))
        return self._opened(key, model.name, lambda: built_backend(model, self.plugins, None))

    def _named(self, subject: Subject, name: str | None, model: ModelConfig | None) -> ModelBackend:
        from saekit.splicing.doubts import model_name_of

        if self.backend is None:
            self._warn_of_fault(subject)
        name, about = name or model_name_of(subject.sae), subject.sae.info.metadata
        backend = self.backend or backend_of(about, about.get("model_class_name"), self.plugins)
        how = numbers_of(about) if model is None else {"dtype": model.dtype, "autocast": model.autocast}
        return self._opened(f"{name} {backend} {how}", name, lambda: self._load(name, backend=backend, **how))

    def _load(self, model: object, **how: Any) -> ModelBackend:
        how = {"backend": self.backend, "device": self.device, "plugins": self.plugins} | how
        return load_model(model, **how)

    def _opened(self, key: str, name: str, load: Any) -> ModelBackend:
        if key not in self._backends:
            self._say(f"loading the model {name}")
            self._backends[key] = load()
        return self._backends[key]

    # ---- contexts

    def _given(self, backend: ModelBackend) -> Tensor:
        from saekit.backends.asked import odd_tokens
        from saekit.evals.measured import checked_contexts

        contexts = checked_contexts(self.text.contexts)
        odd = odd_tokens(contexts.cpu(), backend) if len(contexts) else "there is none"
        if odd is not None:
            raise ConfigError([("contexts", f"must be token ids of {backend.name!r}, [n, context_size]: {odd}")])
        return contexts

    def _read(
        self, subject: Subject, backend: ModelBackend
    ) -> tuple[str, Tensor, Tensor | None, dict[str, Any], bool | None]:
        from saekit.runs.opening import check_context_size

        corpus, held_out = self._corpus(subject, backend)
        if self.text.context_size is not None:
            corpus = attrs.evolve(corpus, config=attrs.evolve(corpus.config, context_size=self.text.context_size))
        check_context_size(backend, corpus.context_size)
        key = repr((corpus.config, corpus.evals, id(corpus.dataset), corpus.mask, held_out))
        if key not in self._contexts:
            self._say("reading the text")
            self._contexts[key] = self._taken(corpus, backend, held_out)
        found, mask, first = self._contexts[key]
        facts = {
            "dataset": corpus.config.path if corpus.dataset is None else "a dataset from memory",
            "held_out": held_out,
            "seed": self.text.seed,
            **({} if first is None else {"drawn_from_first_documents": first}),
        }
        return key, found, mask, facts, corpus.config.prepend_bos

    def _taken(self, corpus: Corpus, backend: ModelBackend, held_out: bool) -> tuple[Tensor, Tensor | None, int | None]:
        """Contexts, their mask, and of how many documents they were drawn, where the text has more of them."""
        import torch

        from saekit.data.activations import check_contexts
        from saekit.data.sampling import sampled

        first = None
        if held_out:
            found, mask = corpus.held_out_masked(backend, self.text.seed)
        else:
            sample = sampled(corpus, backend, self.text.n_contexts, self.text.seed)
            taken, first = sample.contexts, sample.first
            check_contexts(len(taken), corpus.context_size)
            found = torch.from_numpy(taken.tokens)
            mask = None if taken.counts is None else torch.from_numpy(taken.counts)
        if len(found) < self.text.n_contexts:
            which = "held-out text" if held_out else "text"
            which = (
                which if first is None else f"{which}'s first {first:,} documents, no more of which are held in memory,"
            )
            warn(
                f"the {which} fills {len(found):,} contexts of {corpus.context_size:,} tokens, and "
                f"{self.text.n_contexts:,} were asked for (n_contexts): numbers are of those",
                RuntimeWarning,
            )
        return found, mask, first

    def _corpus(self, subject: Subject, backend: ModelBackend) -> tuple[Corpus, bool]:
        """The text, packed as for the SAE, and whether what was held out from its training is to be read of it."""
        from saekit.data.corpus import Corpus

        given, config = self.text.dataset, subject.config
        if given is None and subject.dataset is not None:
            given = subject.dataset
        if config is not None and (given is None or given is subject.dataset):
            evals = attrs.evolve(config.evals, n_contexts=self.text.n_contexts)
            if not evals.held_out_every and evals.split is None:
                raise ConfigError(
                    [("dataset", "is missing: the run trained on every document (evals.held_out_every=0), so none is "
                      "left to measure on; name another text")]
                )  # fmt: skip
            stopping, column = attrs.evolve(config.dataset, on_exhausted="stop"), config.tokens.mask_column
            return Corpus.of(stopping, evals, given, column), True
        if given is None or given is subject.dataset:
            self._warn_of_fault(subject)
        corpus = corpus_of(subject.sae, backend, given, self.plugins)
        about = subject.sae.info.metadata
        own = corpus.dataset is None and subject.was_trained_on(corpus.config.path)
        every, split = self._held_out_of(subject) if own else (0, None)
        if given is not None and corpus.dataset is None and not (every or split):
            every, split = self._held_out_by_others(corpus.config.path)
        mask = about.get("mask_column") if own else None
        if given is not None and corpus.dataset is None and not own:
            mask = self._mask_of_others(corpus.config.path)
        evals = EvalsConfig(run=(), n_contexts=self.text.n_contexts, held_out_every=every, split=split)
        return attrs.evolve(corpus, evals=evals, mask=mask), bool(every or split)

    def _held_out_of(self, subject: Subject) -> tuple[int, str | None]:
        """See :func:`_held_out`; what is assumed is said once."""
        if subject.name not in self._held:
            self._held[subject.name] = _held_out(subject)
        return self._held[subject.name]

    def _held_out_by_others(self, path: str) -> tuple[int, str | None]:
        """What all SAEs that were trained on the text at ``path`` have held out, so that others are measured on that,
        too; of those that do not agree, nothing."""
        of_it = [one for one in self._subjects if one.was_trained_on(path)]
        known = {self._held_out_of(one) for one in of_it if one.dataset is None} - {(0, None)}
        return next(iter(known)) if len(known) == 1 else (0, None)

    def _mask_of_others(self, path: str) -> str | None:
        """The column by which tokens of that text count for all of them; None where they do not agree."""
        of_it = [one for one in self._subjects if one.dataset is None and one.was_trained_on(path)]
        known = {one.sae.info.metadata.get("mask_column") for one in of_it}
        return next(iter(known)) if len(known) == 1 else None


def check_text_known(subject: Subject) -> None:
    """:class:`ConfigError` where the text of ``subject`` came from memory, and is no more there."""
    if subject.dataset is None:
        _check_named(subject, "dataset", "--dataset with a file or a name on the Hub")


def _check_named(subject: Subject, kind: str, option: str) -> None:
    """:class:`ConfigError` where what is needed came from memory: the configuration has another in its place.

    Likewise where its name is a path in another folder than this.
    """
    if kind not in subject.unnamed:
        for place, why in subject.away.items():
            if place.startswith(f"{kind}."):
                raise ConfigError([(place, f"{why}, or say {kind}=... ({option.split()[0]})")])
        return
    told = f"is missing: the run in {subject.unnamed[kind]} was trained with a {kind} from memory"
    name = subject.sae.info.metadata.get("model_name") if kind == "model" else None
    if isinstance(name, str) and name not in ("", "custom"):  # many models go by one name
        raise ConfigError(
            [(kind, f"{told}; its files call it {name!r}: if it is that, give {kind}={name!r} (--{kind} "
              f"{shlex.quote(name)}), or else {kind}=... from Python, or {option}")]
        )  # fmt: skip
    raise ConfigError(
        [(kind, f"{told}, which none of its files names. Give it: {kind}=... from Python, or {option} on the command "
          "line")]
    )  # fmt: skip


def _unlike_training(doubts: Sequence[Doubt]) -> dict[str, list[str]]:
    """What is surely not as in training, and what may not be."""
    surely, perhaps = ([one.text for one in doubts if one.certain is certain] for certain in (True, False))
    return {
        **({"unlike_training": surely} if surely else {}),
        **({"perhaps_unlike_training": perhaps} if perhaps else {}),
    }


def _of_model(backend: ModelBackend) -> dict[str, Any]:
    """What runs the model, and in which numbers."""
    origin = origin_of(backend)
    parameters = getattr(backend.model, "parameters", None) if isinstance(backend, HasModel) else None
    first = None if parameters is None else next(iter(parameters()), None)
    return {
        "model": backend.name,
        "backend": type(backend).__name__ if origin is None else origin.key,
        "dtype": None if first is None else str(first.dtype).removeprefix("torch."),
        "autocast": bool(getattr(backend, "autocast", False)),
    }


def _held_out(subject: Subject) -> tuple[int, str | None]:
    """What was held out from the training text of an SAE without its run; nothing is known of those of others."""
    from saekit.pretrained.provenance import OWN

    about = subject.sae.info.metadata
    every, split = about.get("held_out_every"), about.get("held_out_split")
    if isinstance(split, str):
        return 0, split
    if isinstance(every, int):
        return every, None
    ours = subject.sae.info.provenance.get("loader") in (OWN, None) and "training_tokens" in about
    if not ours:
        return 0, None
    assumed = EvalsConfig().held_out_every
    warn(
        f"{subject.name} does not say which documents were held out from its training, as SAEs of older saekit do not: "
        f"one document in {assumed} is taken to be, as it was by default. Where that was changed, name another text",
        RuntimeWarning,
    )
    return assumed, None
