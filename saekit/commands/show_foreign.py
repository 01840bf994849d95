"""What ``saekit show`` says of an SAE in another library's files: whose format it is, and what is read of it.

Loaders are asked without torch; what they read is found by loading it, which imports torch.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from saekit.errors import PlaceError
from saekit.files.names import SAE_CONFIG
from saekit.plugins.manager import default_manager
from saekit.plugins.text import printable
from saekit.pretrained.detecting import UnrecognizedError, detected
from saekit.runs.place import RECORD
from saekit.saved import SAEFiles

if TYPE_CHECKING:
    from saekit.pretrained.sae import SAE

__all__ = ["show_foreign"]

_MOST_NAMES, _DEEPEST = 2000, 4
"""Of what is below a folder, so that a mistyped one is not looked through: ``layer_7/width_16k/average_l0_30`` is 3
deep."""

_MOST_FILES = 4


def show_foreign(place: Path, console: Console) -> None:
    """Print what the SAE in the folder, or the file of weights, ``place`` is.

    :class:`PlaceError` where no loader recognizes it, or so much is below the folder that none is asked, and
    :class:`saekit.errors.SAEFormatError` for what is wrong with files that one recognizes.
    """
    nothing = f"there is neither a run ({RECORD}) nor an SAE ({SAE_CONFIG}) in {place}, nor are there folders of runs"
    if not _is_small(place):
        raise PlaceError(
            f"{nothing}; for an SAE of another library give its own folder: below this one are more than "
            f"{_MOST_NAMES:,} files, or folders more than {_DEEPEST} deep, and so much is not looked through"
        )
    try:
        item = detected(SAEFiles.at(place), default_manager())
    except UnrecognizedError as error:
        raise PlaceError(
            nothing + (f"; {error.hint}" if error.hint else ", and no loader of another library's SAEs recognizes it")
        ) from error
    from saekit.pretrained.sae import SAE

    sae = SAE.load(place, loader=item.key)
    console.print(printable(f"{place}: an SAE"), style="bold", markup=False, highlight=False, soft_wrap=True)
    console.print()
    grid = Table.grid(padding=(0, 3, 0, 0))
    for name, value in (("format", f"{item.key}: {item.entry.summary}"), *_about(sae)):
        if value not in (None, ""):
            grid.add_row(Text(name, style="dim"), Text(printable(str(value))))
    console.print(grid)
    console.print()
    path = shlex.quote(str(place))
    for what, command in (
        ("in Python", f"sae = saekit.SAE.load({str(place)!r})"),
        ("as saekit's", f"saekit saes convert {path} FOLDER --to saekit"),
    ):
        line = printable(f"{'next' if what == 'in Python' else '':10}{what:14} {command}")
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def _is_small(place: Path) -> bool:
    """Whether no more is below ``place`` than there can be of an SAE, found without looking at more.

    Hidden folders may be deeper: downloads of the Hub keep notes in such a one.
    """
    left: list[tuple[str, int | None]] = [(str(place), 0)] if place.is_dir() else []
    names = 0
    for folder, depth in left:  # which grows
        with suppress(OSError), os.scandir(folder) as found:
            for one in found:
                names += 1
                if names > _MOST_NAMES:
                    return False
                if one.is_dir(follow_symlinks=False):
                    below = None if depth is None or one.name.startswith(".") else depth + 1
                    if below is not None and below > _DEEPEST:
                        return False
                    left.append((one.path, below))
    return True


def _about(sae: SAE) -> Iterator[tuple[str, Any]]:
    metadata = sae.info.metadata
    files = [*sae.info.provenance.get("files", ())]
    yield "files", ", ".join(files[:_MOST_FILES]) + (", ..." if len(files) > _MOST_FILES else "")
    yield "architecture", sae.info.architecture
    yield "features", f"{sae.d_sae:,}"
    yield "width", sae.d_in if sae.ports.same else f"{sae.d_in} to {sae.d_out}"
    yield "site", "not known" if sae.info.sites is None else sae.info.sites.name
    yield "model", metadata.get("model_name")
    yield "text", metadata.get("dataset_path")
    yield "context size", metadata.get("context_size")
    yield "type", str(sae.dtype).removeprefix("torch.")
    yield "rows", None if sae.input_transform is None else f"normalized: {sae.info.input_transform}"
