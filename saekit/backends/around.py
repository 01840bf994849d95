"""A backend for a model: the one that it is, the one that takes an object, or the one that loads a name."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

import attrs

from saekit.abilities import HasModel, HasTokenizer, TranslatesHooks
from saekit.ambient import ambient
from saekit.config import ModelConfig
from saekit.config.files import load_config
from saekit.devices import resolve_device
from saekit.errors import ModelError, SaekitError
from saekit.kinds import MODEL_BACKENDS
from saekit.plugins.manager import PluginManager, default_manager
from saekit.protocols import ModelBackend

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["LoadedModel", "as_backend", "backend_around", "built_backend"]


class LoadedModel(ModelBackend, HasModel, HasTokenizer, TranslatesHooks, Protocol):
    """What :func:`saekit.load_model` returns, with what every backend that comes with saekit has beside.

    A plugin's may lack ``model``, ``tokenizer`` or ``hook_like``, for which :mod:`saekit.abilities` has protocols, and
    ``to_tokens``, which :class:`saekit.backends.Backend` has.
    """

    def to_tokens(self, text: str | Sequence[str], *, prepend_bos: bool = True) -> Tensor:
        """See :meth:`saekit.backends.Backend.to_tokens`."""


def as_backend(model: object, plugins: PluginManager | None = None) -> ModelBackend:
    """``model`` if it is a backend, else the one around it, or of its name, by the defaults of a configuration.

    Raises :class:`saekit.errors.ModelError` for a model that cannot be loaded, or that no backend takes.
    """
    if MODEL_BACKENDS.is_met_by(model):
        return model
    plugins = plugins or default_manager()
    if isinstance(model, (str, os.PathLike)):
        config = load_config({"model": {"name": model}}, plugins=plugins).model
        return built_backend(config, plugins, None)
    return backend_around(model, load_config({}, plugins=plugins).model, plugins)


def built_backend(config: ModelConfig, plugins: PluginManager, loaded: object | None) -> ModelBackend:
    """The backend that ``config`` chooses, of its model or around the one that is ``loaded``.

    It is given the device that ``auto`` stands for.
    """
    if config.device == "auto":
        config = attrs.evolve(config, device=resolve_device(config.device, "model.device", config.dtype))
    with ambient():
        return plugins.build(MODEL_BACKENDS, config.backend, model=config, loaded=loaded)


def backend_around(model: object, config: ModelConfig, plugins: PluginManager) -> ModelBackend:
    """The one backend that takes a loaded ``model``; :class:`saekit.errors.ModelError` for none and for several."""
    fits: dict[str, ModelBackend] = {}
    errors: dict[str, SaekitError] = {}
    items = {item.entry.build: item for item in plugins.registry(MODEL_BACKENDS).items}  # aliases are one
    for item in items.values():
        required = [field.name for field in attrs.fields(item.entry.config) if field.default is attrs.NOTHING]
        if item.entry.no_model or item.missing() or required:
            continue
        try:
            fits[item.key] = built_backend(attrs.evolve(config, backend=item.key), plugins, model)
        except SaekitError as error:
            errors[item.key] = error
    if len(fits) == 1:
        return next(iter(fits.values()))
    if fits:
        raise ModelError(f"several backends take a {type(model).__name__}: {', '.join(fits)}. Name one: backend=...")
    default = plugins.bound(MODEL_BACKENDS, config.backend).key
    raise errors.get(default) or ModelError(f"no backend takes a {type(model).__name__}: {', '.join(errors)}")
