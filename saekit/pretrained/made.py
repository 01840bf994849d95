"""SAEs from options alone, with starting weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import attrs

from saekit.ambient import ambient
from saekit.config.converter import ConfigConverter
from saekit.devices import resolve_device
from saekit.errors import ConfigError
from saekit.kinds import SAE_ARCHITECTURES
from saekit.plugins.manager import PluginManager, default_manager
from saekit.values import Ports

if TYPE_CHECKING:
    from saekit.sae.module import SAEModule

__all__ = ["made_from"]


@ambient()
def made_from(
    options: Mapping[str, Any], ports: Ports | None, seed: int, device: str, plugins: PluginManager | None
) -> SAEModule:
    """See :meth:`saekit.SAE.from_dict`."""
    import torch

    from saekit.sae.build import build_module, initialize

    device = resolve_device(device, "device")
    plugins = plugins or default_manager()
    table = dict(options)
    if "architecture" in table and "name" not in table:
        table["name"] = table.pop("architecture")
    bound = ConfigConverter(plugins).choice(table, SAE_ARCHITECTURES)
    config = bound.options
    if ports is None:
        if config.d_in is None:
            raise ConfigError([("d_in", "is missing: there is no model here whose activations would say it")])
        ports = Ports.one(config.d_in)
    elif config.d_in not in (None, ports.d_in):
        raise ConfigError([("d_in", f"is {config.d_in}, and the inputs are {ports.d_in} wide")])
    sae = build_module(bound.item, attrs.evolve(config, b_dec_init_method="zeros"), ports, plugins)
    initialize(sae, torch.Generator().manual_seed(seed))
    return sae.to(device)
