"""What ``saekit show`` says of an SAE in another library's files: whose format it is, and what is read of it.

Loaders are asked without torch; what they read is found by loading it.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator
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


def show_foreign(place: Path, console: Console) -> None:
    """Print what the SAE in the folder, or the file of weights, ``place`` is.

    :class:`PlaceError` where no loader recognizes it, and :class:`saekit.errors.SAEFormatError` for what is wrong with
    files that one does.
    """
    try:
        item = detected(SAEFiles.at(place), default_manager())
    except UnrecognizedError as error:
        raise PlaceError(
            f"there is neither a run ({RECORD}) nor an SAE ({SAE_CONFIG}) in {place}, nor are there folders of runs"
            + (f"; {error.hint}" if error.hint else ", and no loader of another library's SAEs recognizes it")
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


def _about(sae: SAE) -> Iterator[tuple[str, Any]]:
    metadata = sae.info.metadata
    yield "architecture", sae.info.architecture
    yield "features", f"{sae.d_sae:,}"
    yield "width", sae.d_in if sae.ports.same else f"{sae.d_in} to {sae.d_out}"
    yield "site", "not known" if sae.info.sites is None else sae.info.sites.name
    yield "model", metadata.get("model_name")
    yield "text", metadata.get("dataset_path")
    yield "context size", metadata.get("context_size")
    yield "type", str(sae.dtype).removeprefix("torch.")
    yield "rows", None if sae.input_transform is None else f"normalized: {sae.info.input_transform}"
