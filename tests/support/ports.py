"""A dictionary of several sites, and runs of it on the fake model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import attrs
from support import sweeps
from support.sweeps import DOCUMENTS, changed
from torch import Tensor

import saekit
from saekit import SAE
from saekit.config import NEEDED_TO_LOAD
from saekit.testing import FakeBackend, fake_plugin
from saekit.values import StepInput, StepOutput

EMBED = saekit.Site(hook_name="hook_embed")
HEAD = saekit.Site(hook_name="blocks.0.attn.hook_z", hook_head_index=1)
EARLY = saekit.Site(hook_name="blocks.0.hook_resid_post")
LATE = saekit.Site(hook_name="blocks.1.hook_resid_post")
SITES = saekit.Sites((EMBED, HEAD), (LATE,))
WIDTHS = {EMBED: 8, HEAD: 4, EARLY: 8, LATE: 8}


@attrs.frozen(kw_only=True)
class MapConfig(saekit.SAEConfig):
    """Reads some sites and gives others."""

    apply_b_dec_to_input: bool = attrs.field(default=False, metadata={NEEDED_TO_LOAD: True})
    """Inputs are other sites than targets."""
    normalize_sae_decoder: bool = False
    """Rows of any norm."""
    penalty: float = 0.01
    """Weight of the sum of activations."""


class MapSAE(SAE):
    """Asks for the target, the batch and the number of steps."""

    config: MapConfig

    def losses(self, x: Tensor, step: StepInput) -> StepOutput:
        assert (step.target is None) == self.ports.same
        assert step.batch is not None
        assert step.steps is not None
        features = self.features_of(self.pre_activations(x))
        output = self.reconstruction(features)
        mse = (output - step.target_for(x)).pow(2).sum(-1).mean()
        loss = mse + self.config.penalty * features.sum(-1).mean()
        left = {"map/left": float(step.steps - step.step), "map/rows": float(len(step.batch))}
        return StepOutput(loss, {"mse_loss": mse.detach()}, output.detach(), (features > 0).sum(0), metrics=left)


def manager(backend: FakeBackend | None = None, *others: object) -> saekit.PluginManager:
    architecture = fake_plugin("sae_architectures", "map", build=MapSAE, config=MapConfig)
    return sweeps.manager(backend, architecture, *others)


def tables(sites: tuple[saekit.Site, ...]) -> list[dict[str, Any]]:
    return [attrs.asdict(site) for site in sites]


def run(folder: Path, sites: saekit.Sites = SITES, **sections: Mapping[str, Any]) -> dict[str, Any]:
    """A short run of the map at ``sites``."""
    base = sweeps.fake(folder, sae={"name": "test:map", "d_sae": 20}, training={"log_frequency": 1})
    del base["site"]
    there = {"inputs": tables(sites.inputs), "targets": tables(sites.targets)}
    return changed(base, sections) | there


def train(configs: Any, plugins: saekit.PluginManager | None = None, **options: Any) -> Any:
    return saekit.train(configs, plugins=plugins or manager(), **({"dataset": DOCUMENTS} | options))
