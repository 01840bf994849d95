"""What the processes of :mod:`support.processes` do with parts of an SAE: give them weights, save and load them."""

from __future__ import annotations

import copy
import gc
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import attrs
import torch
from support.processes import Case, part_of
from support.spread_cases import CASES

import saekit
from saekit.distributed import ALONE, World
from saekit.runs.setup import sae_options
from saekit.runs.spread_checkpoints import part_of_training
from saekit.runs.spread_saes import save_trained
from saekit.runs.state_files import read_state, write_state
from saekit.sae.folder import save_sae
from saekit.sae.transforms import SiteMaps
from saekit.training import SAETrainer
from saekit.transforms import Affine

_T = TypeVar("_T")
_WHOLE: dict[str, dict[str, Any]] = {}
"""By the case, the state of one process at the end."""

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
    key, trainer = repr(case), case.trainer(world)
    if key not in _WHOLE:
        alone = case.trainer(ALONE)
        for batch in case.batches():
            alone.train_on(*alone.rows_of(batch), part_of(batch, case, ALONE))
        _WHOLE[key] = alone.state_dict()
    state = copy.deepcopy(_WHOLE[key])
    if world.size > 1:
        state = part_of_training([state], trainer.sae.table, world.features.rank, world.features.size)
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


def saved(world: World, folder: str, alone: str) -> None:
    """Each by its parts, and by one process alone; in one way ``alone``, or in all."""
    for name, case, way in ways_to_save():
        if alone and way != alone:
            continue
        save_trained(prepared(case, way, world), Path(folder) / f"{name}-parts")
        if world.main:
            save_sae(prepared(case, way, ALONE).raw_sae(), Path(folder) / f"{name}-one")


LARGE = Case(
    {"name": "standard"}, widths=(512,), dtype="float32", d_sae=1 << 16,
    rows=8, steps=1,
)  # fmt: skip
"""256 MB of weights."""


def peaks(world: World, folder: str) -> dict[str, float]:
    """How much of the size of the whole each piece of work adds, at its peak, to the memory of this process."""
    found: dict[str, float] = {}

    def measured(what: str, work: Callable[[], _T]) -> _T:
        gc.collect()
        Path("/proc/self/clear_refs").write_text("5")  # begin to look for the peak anew
        before, result = _memory("VmRSS"), work()
        found[what] = (_memory("VmHWM") - before) / (2 * 512 * LARGE.d_sae * 4)
        return result

    _worked_on(attrs.evolve(LARGE, d_sae=64), world, Path(folder) / "few", measured)  # imports are not measured
    _worked_on(LARGE, world, Path(folder) / "many", measured)
    return found


def _worked_on(case: Case, world: World, place: Path, measured: Callable[[str, Callable[[], Any]], Any]) -> None:
    """Start, save, start from what was saved, and read a checkpoint of as many parts, to go on with half as many."""
    trainer = measured("start", lambda: case.trainer(world))
    measured("save", lambda: save_trained(trainer, place))
    training = attrs.evolve(case.config.training, from_pretrained_path=str(place))
    config = attrs.evolve(case.config, training=training)
    measured("load", lambda: sae_options(config, saekit.default_manager(), None, world))
    state = {"weights": trainer.state_dict()["weights"], "diverged": None, "firing": {}, "optimizer": {}}
    write_state(place.parent, f"{place.name}-{world.rank}", state)
    world.all.objects(None)
    table = trainer.sae.table
    del state

    def resumed() -> Any:
        states = [read_state(place.parent, f"{place.name}-{one}", mapped=True) for one in range(world.size)]
        return part_of_training(states, table, world.rank // 2, world.size // 2)

    measured("resume", resumed)


def _memory(kind: str) -> int:
    """In bytes, of what the system has for this process."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(next(line for line in status.splitlines() if line.startswith(kind)).split()[1])
