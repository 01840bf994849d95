"""Whose it is what fails in a step of training: the architecture, its activation function, or what rows go through."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from saekit.config import TrainConfig
from saekit.errors import SaekitError
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
        except SaekitError as error:
            made, fault = _of_the_activation(sae)
            if fault is not None:
                raise returned(function, "__call__", made, fault) from error
            raise

    return watching


@torch.no_grad()
def _of_the_activation(sae: SAEModule) -> tuple[Any, str | None]:
    """What the activation function gives, and what is wrong with it, by which a step may have failed; or None."""
    pre = torch.linspace(-1, 1, 2 * sae.d_sae, device=sae.device, dtype=sae.dtype).reshape(2, -1)
    made: Any = None
    with contextlib.suppress(Exception):  # one that fails has been told of
        made = sae.activation(pre.clone())
        if not isinstance(made, Tensor) or made.shape != pre.shape or made.dtype != pre.dtype:
            found, wanted = (
                f"{str(one.dtype).removeprefix('torch.')}{list(one.shape)}" if isinstance(one, Tensor) else "no tensor"
                for one in (made, pre)
            )
            return made, f"{found} for pre-activations {wanted}, expected the same shape and type"
    return made, None
