"""SAEs that several processes save together, beside checkpoints: at the end, and those to look at."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import cast

import torch

from saekit.distributed.agreement import agreed
from saekit.plugins.manager import PluginManager
from saekit.pretrained.sae import SAE
from saekit.sae.folder import Contents, contents_of, save_contents
from saekit.sae.part_folder import PartContents, part_contents_of, whole_in_first
from saekit.sae.splitting import is_saved_by_parts
from saekit.training.trainer import SAETrainer

__all__ = ["contents_in", "sae_of", "save_trained"]


def contents_in(trainer: SAETrainer) -> Contents | PartContents | None:
    """What the folder of the SAE in ``trainer`` will hold, as far as it is for this process to write or to hand over.

    All processes must ask; :class:`SAEFormatError`, in one of them, for an SAE that could not be loaded again.
    """
    world = trainer.world
    if world.features.size > 1 and is_saved_by_parts(type(trainer.sae)):
        return None if world.data.rank else part_contents_of(trainer.raw_part())
    sae = trainer.raw_sae()
    return contents_of(sae) if world.main else None


def save_trained(trainer: SAETrainer, path: Path) -> None:
    """Write the SAE in ``trainer`` to the folder ``path``, as :func:`saekit.sae.folder.save_sae` does.

    All processes must ask.  Where one fails, all do, and what was there is there still.
    """
    world, saes = trainer.world, dict[str, Contents | PartContents]()

    def prepare() -> None:
        if (contents := contents_in(trainer)) is not None:
            saes[""] = contents

    def save() -> None:
        with whole_in_first(world.behind, saes) as whole:
            for contents in whole.values():
                save_contents(contents, path)

    for work in (prepare, save):
        agreed(world.all, work, "save the SAE")


def sae_of(trainer: SAETrainer, saved: Path, plugins: PluginManager) -> SAE | Callable[[], SAE]:
    """The trained SAE as it is in the folder ``saved``, or what reads it from there.

    It is read where weights are saved otherwise than they are trained, as with the norms of decoder rows folded in:
    features are the same, but nobody shall find other directions here than in the folder.  That is done at once, as the
    folder may change; of several processes, and where there is no memory for it, when it is asked for, so that no
    process has an SAE whole that does not.
    """
    trained, world = trainer.sae, trainer.world
    read = functools.partial(SAE.load, saved.absolute(), device=trainer.device, plugins=plugins)
    if world.features.size > 1 or (world.size > 1 and not trained.saved_as_it_is):
        return read
    if trained.saved_as_it_is:
        return cast(SAE, trainer.raw_sae())  # architectures derive from it
    for parameter in trained.parameters():
        parameter.grad = None  # in the place of which it comes
    try:
        return read()
    except (MemoryError, torch.OutOfMemoryError):
        return read
