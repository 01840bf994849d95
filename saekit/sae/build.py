"""Making a dictionary: the module that options describe, and its starting weights."""

from __future__ import annotations

from typing import Any

import attrs
import torch
from torch import Tensor

from saekit.cautions import warn
from saekit.config import PluginChoice
from saekit.config.files import plain_config
from saekit.errors import ConfigError, PluginFailedError, PluginWarning, SaekitError
from saekit.kernels.kernel import Served
from saekit.kinds import ACTIVATION_FUNCTIONS, INPUT_TRANSFORMS, STEP_KERNELS
from saekit.plugins.building import built, placed
from saekit.plugins.choice import Choice
from saekit.plugins.manager import PluginManager
from saekit.plugins.registry import Registered
from saekit.reasons import last_line
from saekit.sae.module import SAEModule
from saekit.sae.parameters import Factor, Start
from saekit.transforms import RowTransform
from saekit.values import Ports, SAEInfo

__all__ = ["build_module", "give_transform", "initialize", "stated"]


def build_module(
    item: Registered,
    config: Any,
    ports: Ports | int,
    plugins: PluginManager,
    input_transform: PluginChoice | None = None,
) -> SAEModule:
    """An uninitialized dictionary of the architecture ``item``; ``ports`` may be the width of an SAE's one site.

    ``input_transform`` chooses what each row goes through, one that is row-wise; None: nothing.
    """
    ports = Ports.one(ports) if isinstance(ports, int) else ports
    config = attrs.evolve(config, d_in=ports.d_in, d_sae=config.features(ports.d_in), expansion_factor=None)
    activation = plugins.build(ACTIVATION_FUNCTIONS, config.activation)
    try:
        with placed(item, "sae"):
            sae: SAEModule = built(item, config, ports=ports, activation=activation)
    except (MemoryError, PluginFailedError) as error:
        if not isinstance(error, MemoryError) and not isinstance(error.__cause__, MemoryError):
            raise
        raise ConfigError([("sae.d_sae", f"is {config.d_sae:,}, which needs more memory than there is")]) from error
    # A class that states its public_config answers for the one that it has chosen.  No module: it may be one already.
    vars(sae)["given_activation"] = sae.activation if "public_config" in vars(type(sae)) else activation
    sae.info = SAEInfo(architecture=item.key, options=plain_config(config, plugins))
    sae.served_by = _serving(item.key, plugins)
    if input_transform is not None:
        give_transform(sae, input_transform, plugins)
    return sae


def _serving(key: str, plugins: PluginManager) -> Served:
    """The kernels of plugins for the architecture ``key``.  One that cannot be built is left out with a warning: it is
    only about speed."""
    found: list[Any] = []
    for item in plugins.registry(STEP_KERNELS).items:
        if key in item.entry.serves and not item.missing():
            try:
                found.append(plugins.build(STEP_KERNELS, item.key))
            except (SaekitError, ImportError) as error:
                text = f"the step kernel {item.key} is left out: {last_line(error)}"
                warn(text, PluginWarning)
    return Served(found)


def give_transform(sae: SAEModule, choice: PluginChoice, plugins: PluginManager) -> None:
    """Make ``sae`` one whose rows go through what ``choice`` says; :class:`ConfigError` where that cannot be."""
    bound = plugins.bound(INPUT_TRANSFORMS, choice)
    transform = bound.build()
    if not isinstance(transform, RowTransform):
        raise ConfigError(
            f"the input transform {bound.key} is estimated from data and folded into weights; a part of an SAE can "
            "only be what normalizes each row by itself"
        )
    sae.set_input_transform(transform)
    sae.info = attrs.evolve(sae.info, input_transform=stated(bound, plugins))


def stated(bound: Choice[Any], plugins: PluginManager) -> str | dict[str, Any]:
    """A choice as plain data, with all its options, so that other defaults change nothing."""
    options = plain_config(bound.options, plugins)
    return {"name": bound.key, **options} if options else bound.key


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
    the same.  Of one whose features are split, this process's part is made, where all starting values know how
    (:func:`saekit.sae.init.by_parts`).
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
        sae.share.parts,
        sae.share.features.rank,
    )
    start.give(sae)
