"""Making a dictionary: the module that options describe, and its starting weights."""

from __future__ import annotations

from typing import Any

import attrs
import torch
from torch import Tensor

from saekit.config.files import plain_config
from saekit.errors import ConfigError, PluginFailedError
from saekit.kinds import ACTIVATION_FUNCTIONS
from saekit.plugins.building import built
from saekit.plugins.manager import PluginManager
from saekit.plugins.registry import Registered
from saekit.sae.module import SAEModule
from saekit.sae.parameters import Factor, Start
from saekit.values import Ports, SAEInfo

__all__ = ["build_module", "initialize"]


def build_module(item: Registered, config: Any, ports: Ports | int, plugins: PluginManager) -> SAEModule:
    """An uninitialized dictionary of the architecture ``item``; ``ports`` may be the width of an SAE's one site."""
    ports = Ports.one(ports) if isinstance(ports, int) else ports
    config = attrs.evolve(config, d_in=ports.d_in, d_sae=config.features(ports.d_in), expansion_factor=None)
    activation = plugins.build(ACTIVATION_FUNCTIONS, config.activation)
    try:
        sae: SAEModule = built(item, config, ports=ports, activation=activation)
    except (MemoryError, PluginFailedError) as error:
        if not isinstance(error, MemoryError) and not isinstance(error.__cause__, MemoryError):
            raise
        raise ConfigError([("sae.d_sae", f"is {config.d_sae:,}, which needs more memory than there is")]) from error
    sae.info = SAEInfo(architecture=item.key, options=plain_config(config, plugins))
    return sae


@torch.no_grad()
def initialize(
    sae: SAEModule,
    generator: torch.Generator,
    sample: Tensor | None = None,
    scale: Factor = 1.0,
    *,
    target: Tensor | None = None,
    target_scale: Factor | None = None,
) -> None:
    """Give ``sae`` the starting weights that its options and its table of parameters say.

    ``sample [n, d_in]`` are raw activations to come, which may be None for the ``b_dec_init_method`` ``zeros``, and
    ``scale`` is what they will be multiplied by.  ``target [n, d_out]`` and ``target_scale`` likewise, and by default
    the same.
    """
    start = Start(
        sae.config,
        generator,
        torch.promote_types(sae.dtype, torch.float32),
        sae.table,
        sample,
        sample if target is None else target,
        scale,
        scale if target_scale is None else target_scale,
    )
    for name, value in start.values().items():
        getattr(sae, name).copy_(value)
