"""What the processes of :mod:`support.processes` do with parts of an SAE: give them weights, save and load them."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path

import attrs
import torch
from support.processes import Case, part_of
from support.spread_cases import CASES

from saekit.distributed import ALONE, World
from saekit.runs.spread_checkpoints import part_of_training
from saekit.runs.spread_saes import save_trained
from saekit.sae.folder import save_sae
from saekit.sae.transforms import SiteMaps
from saekit.training import SAETrainer
from saekit.transforms import Affine

OF_EVERY_ARCHITECTURE = (
    "standard", "standard_finetuned_scale", "topk", "topk_in_units", "batchtopk", "matryoshka", "abstopk", "groupmax",
    "jumprelu", "gated", "crosscoder", "batchtopk_crosscoder", "transcoder_skip", "topk_transcoder_in_units",
    "jumprelu_transcoder", "groupmax_transcoder",
)  # fmt: skip
WAYS = ("float64", "float32, scaled", "bfloat16, scaled", "float32, whitened")


def ways_to_save() -> Iterator[tuple[str, Case, str]]:
    for name, way in itertools.product(OF_EVERY_ARCHITECTURE, WAYS):
        if "scale" not in name or way == "float64":  # factors are in the decoder of what is saved, whatever it is in
            yield f"{name} {way}".replace(", ", "_").replace(" ", "_"), CASES[name], way


def prepared(case: Case, way: str, world: World) -> SAETrainer:
    """The same trained whole on every world, of which it has a part."""
    case = attrs.evolve(case, dtype=way.partition(",")[0], steps=3)
    alone = case.trainer(ALONE)
    for batch in case.batches():
        alone.train_on(*alone.rows_of(batch), part_of(batch, case, ALONE))
    trainer = alone
    if world.size > 1:
        trainer = case.trainer(world)
        state = part_of_training(alone.state_dict(), trainer.sae.table, world.features.rank, world.features.size)
        trainer.load_state_dict(state)
    ports = trainer.sae.ports
    widths = {**ports.inputs, **ports.targets}
    if "scaled" in way:
        trainer.scale = 1.7 if len(widths) == 1 else {name: 1.3 + number for number, name in enumerate(widths)}
    if "whitened" in way:
        generator = torch.Generator().manual_seed(1)
        trainer.maps = SiteMaps({name: _map(width, generator) for name, width in widths.items()})
    return trainer


def _map(width: int, generator: torch.Generator) -> Affine:
    matrix = torch.randn(width, width, generator=generator, dtype=torch.float64) + 2 * torch.eye(width)
    return Affine(torch.randn(width, generator=generator, dtype=torch.float64), matrix, matrix.inverse())


def saved(world: World, folder: str) -> None:
    """Each by its parts, and by one process alone."""
    for name, case, way in ways_to_save():
        save_trained(prepared(case, way, world), Path(folder) / f"{name}-parts")
        if world.main:
            save_sae(prepared(case, way, ALONE).raw_sae(), Path(folder) / f"{name}-one")
