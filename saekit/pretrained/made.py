"""SAEs from options alone, with starting weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import attrs

from saekit.ambient import ambient
from saekit.config.converter import ConfigConverter
from saekit.config.sae_lens_names import is_sae_of_sae_lens
from saekit.devices import resolve_device
from saekit.errors import ConfigError
from saekit.kinds import INPUT_TRANSFORMS, SAE_ARCHITECTURES
from saekit.plugins.manager import PluginManager, default_manager
from saekit.values import Ports

if TYPE_CHECKING:
    from saekit.sae.module import SAEModule

__all__ = ["made_from", "options_of"]


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
    if is_sae_of_sae_lens(table):
        raise ConfigError(
            "this is what an SAE of sae-lens states about itself, and not the options of one here: SAE.load(folder) "
            "reads it with its weights, and to_dict() of what that gives are the options. The hook is site=, and "
            "normalize_activations is input_transform"
        )
    if "architecture" in table and "name" not in table:
        table["name"] = table.pop("architecture")
    ports, transform = _ports(table.pop("ports", None), ports), table.pop("input_transform", None)
    bound = ConfigConverter(plugins).choice(table, SAE_ARCHITECTURES)
    config = bound.options
    if transform is not None:
        transform = ConfigConverter(plugins).choice(transform, INPUT_TRANSFORMS)
    if ports is None:
        if config.d_in is None:
            raise ConfigError([("d_in", "is missing: there is no model here whose activations would say it")])
        ports = Ports.one(config.d_in)
    elif config.d_in not in (None, ports.d_in):
        raise ConfigError([("d_in", f"is {config.d_in}, and the inputs are {ports.d_in} wide")])
    sae = build_module(bound.item, attrs.evolve(config, b_dec_init_method="zeros"), ports, plugins, transform)
    initialize(sae, torch.Generator().manual_seed(seed))
    return sae.to(device)


def options_of(sae: SAEModule) -> dict[str, Any]:
    """See :meth:`saekit.SAE.to_dict`."""
    options = {"name": sae.info.architecture, **sae.saved_options()}
    if sae.input_transform is not None:
        options["input_transform"] = sae.info.input_transform
    if sae.ports != Ports.one(sae.d_in):
        options["ports"] = {"inputs": dict(sae.ports.inputs), "targets": dict(sae.ports.targets)}
    return options


def _ports(said: object, given: Ports | None) -> Ports | None:
    """Those that options say, as :func:`options_of` writes them, or those that are given beside them."""
    if said is None:
        return given
    kinds = isinstance(said, Mapping) and "inputs" in said and {"inputs", "targets"} >= {*said}
    if not isinstance(said, Mapping) or not kinds or not all(map(_are_widths, said.values())):
        raise ConfigError(
            [("ports", f"is {said!r}, expected the widths of inputs, and of targets if they are others, by the names "
              'of their sites: {"inputs": {"a": 8}, "targets": {"b": 4}}')]
        )  # fmt: skip
    found = Ports(**{name: dict(widths) for name, widths in said.items()})
    if given not in (None, found):
        raise ConfigError([("ports", f"is {dict(said)!r}, and beside the options others are given: leave one out")])
    return found


def _are_widths(value: object) -> bool:
    return (
        isinstance(value, Mapping)
        and bool(value)
        and all(isinstance(name, str) and type(width) is int and width > 0 for name, width in value.items())
    )
