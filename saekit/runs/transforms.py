"""What activations go through in a run: a part of the SAE, a factor, or an affine map that is folded in the end."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import attrs
import torch
from torch import Tensor

from saekit.config import TrainConfig
from saekit.errors import ConfigError, PluginFailedError
from saekit.kinds import INPUT_TRANSFORMS
from saekit.plugins.building import blamed, returned
from saekit.plugins.choice import Choice
from saekit.plugins.manager import PluginManager, default_manager
from saekit.sae.build import give_transform, stated
from saekit.sae.module import SAEModule
from saekit.sae.transforms import SiteMaps
from saekit.site import Site, Sites
from saekit.training.trainer import SAETrainer
from saekit.transforms import Affine, RowTransform, WholeTransform
from saekit.values import Scale, is_scale

__all__ = ["Estimator", "estimator_of", "give_chosen", "refuse_maps", "starting_rows", "transform_problems"]

_OPTION = "activations.normalize_activations"


def give_chosen(sae: SAEModule, config: TrainConfig, plugins: PluginManager) -> None:
    """Make a row-wise transform, if one is chosen, a part of ``sae``."""
    chosen = _row_wise(config, plugins)
    if chosen is None:
        return
    try:
        give_transform(sae, chosen, plugins)
    except ConfigError as error:
        raise ConfigError([(_OPTION, f"is '{chosen.key}': {error}")]) from None


def _row_wise(config: TrainConfig, plugins: PluginManager) -> Choice[Any] | None:
    chosen = _bound(config, plugins)
    return chosen if chosen is not None and isinstance(chosen.build(), RowTransform) else None


def estimator_of(config: TrainConfig, plugins: PluginManager | None = None) -> Estimator | None:
    """What estimates a factor or a map of each site, if that is chosen."""
    chosen = _bound(config, plugins)
    transform = None if chosen is None else chosen.build()
    if chosen is None or isinstance(transform, RowTransform):
        return None
    if not isinstance(transform, WholeTransform):
        fault = "which is neither a RowTransform nor a WholeTransform of saekit.transforms"
        raise returned(chosen.item, "build", transform, fault)
    return Estimator(chosen, transform)


def _bound(config: TrainConfig, plugins: PluginManager | None) -> Choice[Any] | None:
    chosen = config.activations.normalize_activations
    if chosen is None or isinstance(chosen, Choice):
        return chosen
    return (plugins or default_manager()).bound(INPUT_TRANSFORMS, chosen)


def starting_rows(trainer: SAETrainer, rows: Tensor, widths: Mapping[str, int]) -> Tensor:
    """Raw ``rows [n, d]`` as the SAE in ``trainer`` is to read them, but for a factor."""
    if trainer.maps is None and trainer.sae.input_transform is None:
        return rows
    rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
    return trainer.sae.transformed(rows) if trainer.maps is None else trainer.maps.transformed(rows, widths)


@attrs.frozen(eq=False)
class Estimator:
    """A transform whose numbers are estimated on the first activations."""

    choice: Choice[Any]
    transform: WholeTransform

    def estimated(self, sample: Mapping[Site, Tensor], sites: Sites) -> tuple[Scale, SiteMaps | None]:
        """What activations are multiplied by, of several sites each by its own factor; or their maps."""
        found = {site.name: self._of(sample[site]) for site in sites.all}
        if all(isinstance(one, Affine) for one in found.values()):
            return 1.0, SiteMaps({name: one for name, one in found.items() if isinstance(one, Affine)})
        factors = {name: float(one) for name, one in found.items() if not isinstance(one, Affine)}
        if len(factors) < len(found):
            raise returned(self.choice.item, "estimated", found, "factors of some sites and maps of others")
        return (factors if len(factors) > 1 else next(iter(factors.values()))), None

    def _of(self, rows: Tensor) -> float | Affine:
        with blamed(self.choice.item, "estimated"), torch.no_grad():
            found: Any = self.transform.estimated(rows)
        if not isinstance(found, Affine):
            if not is_scale(found) or isinstance(found, Mapping):
                raise returned(self.choice.item, "estimated", found, "expected a number above 0, or an Affine")
            return float(found)
        made = Affine(*(value.detach().to("cpu", torch.float64) for value in found))
        if fault := _fault(made, rows.shape[1]):
            raise PluginFailedError(f"estimated of {self.choice.key} returned {fault}")
        return made


def _fault(affine: Affine, d: int) -> str | None:
    for name, value in affine._asdict().items():
        if list(value.shape) != ([d] if name == "mean" else [d, d]):
            return f"the {name} {list(value.shape)}, and activations are {d} wide"
        if not bool(value.isfinite().all()):
            return f"a {name} with numbers that are not finite"
    there_and_back = affine.matrix @ affine.inverse
    off = float((there_and_back - torch.eye(d, dtype=torch.float64, device="cpu")).abs().max())
    return f"an inverse that is not that of its matrix: off by {off:.2g}" if off > 1e-6 else None


def transform_problems(
    config: TrainConfig, plugins: PluginManager, start: SAEModule, where: str
) -> Iterator[tuple[str, str]]:
    """Why a run cannot start from ``start``: what its weights read is transformed otherwise."""
    chosen, saved = _row_wise(config, plugins), start.info.input_transform
    own = None if chosen is None else stated(chosen, plugins)
    if own != saved:
        before = "normalizes no rows" if saved is None else f"has {saved!r}"
        yield _OPTION, f"is {_shown(config)}, but {where} {before}"
    elif start.info.scale_is_unknown and config.activations.normalize_activations is None:
        yield (
            _OPTION, f"is 'none', but {where} was trained on scaled activations, by a factor that its files do not "
            "hold; set it to 'expected_average_only_in'"
        )  # fmt: skip


def refuse_maps(config: TrainConfig, where: str) -> ConfigError:
    """Why a run whose activations go through affine maps cannot start from saved weights."""
    return ConfigError(
        [(_OPTION, f"is {_shown(config)}, a map that changes the norms of decoder rows, by which features are compared "
          f"and trained, and {where} has weights for activations as they are; leave out one of the two")]
    )  # fmt: skip


def _shown(config: TrainConfig) -> str:
    chosen = config.activations.normalize_activations
    return repr(chosen.key if isinstance(chosen, Choice) else chosen or "none")
