"""Whose it is what fails in a step of training: the architecture, its activation function, or what rows go through."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from saekit.config import TrainConfig
from saekit.errors import ConfigError, PluginFailedError
from saekit.kinds import ACTIVATION_FUNCTIONS, INPUT_TRANSFORMS, SAE_ARCHITECTURES
from saekit.plugins.building import Part, blamed, returned
from saekit.plugins.manager import PluginManager
from saekit.sae.module import SAEModule

__all__ = ["watching_of"]


def watching_of(
    config: TrainConfig, plugins: PluginManager, sae: SAEModule
) -> Callable[[str], contextlib.AbstractContextManager[None]]:
    """What goes wrong in the SAE's own code says which plugin it is of."""
    item = plugins.find(SAE_ARCHITECTURES, config.sae)
    function = plugins.find(ACTIVATION_FUNCTIONS, sae.config.activation)
    parts: list[Part] = [(function, sae.activation)]
    if sae.input_transform is not None:
        parts.append((plugins.find(INPUT_TRANSFORMS, config.activations.normalize_activations), sae.input_transform))

    @contextlib.contextmanager
    def watching(doing: str) -> Iterator[None]:
        try:
            with blamed(item, doing, at_work=True, parts=parts):
                yield
        except (PluginFailedError, ConfigError) as error:
            made, fault = _of_the_activation(sae, _raised(error))
            if fault is not None:
                raise returned(function, "__call__", made, fault) from error
            raise

    return watching


def _raised(error: PluginFailedError | ConfigError) -> BaseException | None:
    """What was raised by the values in a step, if that is what an error is of; not what a configuration asks for."""
    if isinstance(error, ConfigError):
        return None if any(path for path, _ in error.problems) else error
    return error.__cause__


def _of_the_activation(sae: SAEModule, raised: BaseException | None) -> tuple[Any, str | None]:
    """What the activation function gives, and what is wrong with it, by which a step may have ``raised``; or None."""
    if raised is None:  # nothing was: what has come of the step was looked at, and is said already
        return None, None
    with contextlib.suppress(Exception), torch.no_grad():  # one that fails has been told of, and so has a device
        pre = torch.linspace(-1, 1, 2 * sae.d_sae, device=sae.device, dtype=sae.dtype).reshape(2, -1)
        made: Any = sae.activation(pre.clone())
        if not isinstance(made, Tensor) or made.shape != pre.shape or _is_odd(made.dtype, pre.dtype, raised):
            found, wanted = (
                f"{str(one.dtype).removeprefix('torch.')}{list(one.shape)}" if isinstance(one, Tensor) else "no tensor"
                for one in (made, pre)
            )
            return made, f"{found} for pre-activations {wanted}, expected the same shape and type"
    return None, None


def _is_odd(made: torch.dtype, given: torch.dtype, raised: BaseException) -> bool:
    """Whether a step may have failed by a type; a wider one is no fault where it failed by something else."""
    if torch.promote_types(made, given) == made and made.is_floating_point:
        return made != given and any(word in str(raised) for word in ("dtype", "scalar type"))
    return True
