"""Models to look at from Python, ``saekit.load_model``, and what SAEs say of theirs and of their text.

As in :mod:`saekit.commands.jobs`, what does the work is imported when what can be seen to be wrong has been looked at.
"""

from __future__ import annotations

import operator
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, cast

import attrs

from saekit.cautions import warn
from saekit.commands import preflight
from saekit.config import DatasetConfig, EvalsConfig, PluginChoice
from saekit.config.files import load_config, plain_config
from saekit.defaults import DEFAULT_BACKEND
from saekit.errors import ConfigError
from saekit.files.names import SAE_WEIGHTS
from saekit.for_sae_lens import ELSEWHERE, arguments, dtype_in
from saekit.kinds import MODEL_BACKENDS
from saekit.plugins.manager import PluginManager, default_manager
from saekit.plugins.text import short

if TYPE_CHECKING:
    from saekit.backends.around import LoadedModel
    from saekit.config.fields import Dtype
    from saekit.data.corpus import Corpus
    from saekit.protocols import ModelBackend
    from saekit.sae.module import SAEModule

__all__ = ["backend_of", "checked_seed", "corpus_of", "load_model", "numbers_of"]

_KWARGS = "from_pretrained_kwargs"

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
    dtype: Dtype | None = None,
    autocast: bool | None = None,
    plugins: PluginManager | None = None,
) -> LoadedModel:
    """A language model as saekit runs it, by its name or folder, around one that you have loaded, or that of an SAE.

    Of an SAE it is the model that it was trained on, loaded as it says: by which backend, with which options.  Where
    that still is not what it was trained on, as with other weights of the name, a ``UserWarning`` says so.

    ``backend`` is as ``model.backend`` of a configuration: a key, a table with ``name`` and options, or an object of
    its options.  Left out, a name is for ``HookedTransformer``, and a loaded model for the one backend that takes it.
    Of an SAE, the key of its own backend leaves the options that it says.  ``device``, ``dtype`` and ``autocast`` are
    as in ``model``, too: of a loaded model its own count; left out, they are an SAE's, else float32 without autocast.

    What is returned has ``tokenize(text)``, ``run(tokens, read=[hook, ...])``, ``unembedding()`` and more: see
    :class:`saekit.protocols.ModelBackend`; ``model`` is the model itself, as its library has it.  Raises
    :class:`saekit.errors.ModelError` for a model that cannot be loaded, and :class:`saekit.errors.ConfigError` for an
    SAE that does not say its model.
    """
    plugins = plugins or default_manager()
    sae = cast("SAEModule", model) if hasattr(model, "encode") and hasattr(model, "info") else None
    if sae is not None:
        about = sae.info.metadata
        model, own = _own_name(sae), backend_of(about, about.get("model_class_name"), plugins)
        backend = own if backend is None or _is_bare(backend, own) else backend
    named = isinstance(model, (str, os.PathLike))
    options: dict[str, Any] = {"device": device} | ({} if sae is None else numbers_of(sae.info.metadata))
    options |= {name: value for name, value in (("dtype", dtype), ("autocast", autocast)) if value is not None}
    options |= {} if backend is None else {"backend": backend}
    whole = load_config({"model": options | ({"name": model} if named else {})}, plugins=plugins)
    if named:
        _check_no_sae(model)
        preflight.of_model(whole, plugins).raise_any()
    from saekit.backends.around import backend_around, built_backend

    if named or backend is not None:
        found = built_backend(whole.model, plugins, None if named else model)
    else:
        found = backend_around(model, whole.model, plugins)
    if sae is not None:
        from saekit.splicing.doubts import doubts_of_place

        for doubt in doubts_of_place(sae, found):
            warn(doubt.text, UserWarning)
    return cast("LoadedModel", found)


def _check_no_sae(model: object) -> None:
    """:class:`ConfigError` where the folder of an SAE, or of a run, is named in the place of a model's."""
    place = os.fspath(cast("str", model))

    def has(*parts: str) -> bool:
        return os.path.isfile(os.path.join(place, *parts))  # noqa: PTH113, PTH118

    if not has("config.json") and (has(SAE_WEIGHTS) or (has("run.json") and has("sae", SAE_WEIGHTS))):
        told = f"{place!r} is the folder of an SAE. Its model is saekit.load_model(saekit.SAE.load({place!r}))"
        raise ConfigError([("model", told)])


def backend_of(about: Mapping[str, Any], kind: object, plugins: PluginManager) -> PluginChoice | None:
    """The backend by the name of the class that it wraps, with the options that the SAE's metadata has of it."""
    if kind is None and arguments(about) is not None:  # those of what loads a model by default
        kind = DEFAULT_BACKEND.rpartition(":")[2]
    items = [item for item in plugins.registry(MODEL_BACKENDS).items if item.entry.name == kind]
    if len(items) != 1:
        return None
    known = {f"model_{field.name}": field.name for field in attrs.fields(items[0].entry.config)}
    stated = {known[key]: value for key, value in about.items() if key in known and value is not None}
    kwargs = arguments(about) or stated.get(_KWARGS)
    if _KWARGS in known.values() and isinstance(kwargs, Mapping):  # sae-lens says options here among them, too
        own = {name: value for name, value in kwargs.items() if name in known.values()}
        rest = {name: value for name, value in kwargs.items() if name not in (*ELSEWHERE, *own)}
        stated = {_KWARGS: rest} | own | {name: value for name, value in stated.items() if name != _KWARGS}
    return {"name": items[0].key} | stated


def numbers_of(about: Mapping[str, Any]) -> dict[str, Any]:
    """The type of weights, and whether there was autocast, as far as an SAE's metadata says it."""
    dtype, autocast = dtype_in(about.get(f"model_{_KWARGS}")), about.get("model_autocast")
    return ({} if dtype is None else {"dtype": dtype}) | ({"autocast": True} if autocast is True else {})


def _own_name(sae: SAEModule) -> str:
    """The name of an SAE's model; of one that had no name, what is to be given in its place."""
    from saekit.splicing.doubts import model_name_of

    about = sae.info.metadata
    if about.get("model_name") == "custom":
        kwargs = about.get(f"model_{_KWARGS}")
        said = f", from_pretrained_kwargs {dict(kwargs)}" if isinstance(kwargs, Mapping) and kwargs else ""
        raise ConfigError(
            [("model", "is 'custom': the SAE was trained on a model that was passed from code, and does not say which "
              f"({about.get('model_class_name') or 'no backend is said'}{said}). Give it: saekit.load_model(NAME), or "
              "saekit.load_model(MODEL) with the model that you have loaded")]
        )  # fmt: skip
    return model_name_of(sae)


def _is_bare(backend: PluginChoice, own: PluginChoice | None) -> bool:
    """Whether a backend is said by the key of ``own`` alone, whose options then hold."""
    return isinstance(own, Mapping) and backend in (own["name"], own["name"].rpartition(":")[2])


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


def checked_seed(seed: Any) -> int:
    """A whole number of any library as our own; :class:`ConfigError` for what no generator of all that draw takes."""
    try:
        found = -1 if isinstance(seed, bool) else operator.index(seed)
    except TypeError:
        found = -1
    if not 0 <= found < 2**63:  # some take a negative one for its absolute value
        raise ConfigError([("seed", f"must be a whole number of 0 or more, below 2**63, found {short(seed)}")])
    return found
