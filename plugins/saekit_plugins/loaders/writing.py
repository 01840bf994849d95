"""What loaders share that write their format: what a format has no place for, and files of plain tensors and tables.

A format has no fields for most of what saekit knows of an SAE.  It stands in an entry of its own, ``saekit_metadata``,
which others pass over.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from saekit import Site
from saekit.errors import SAEFormatError
from saekit.values import is_scale

if TYPE_CHECKING:
    from torch import Tensor

    from saekit import SAE

__all__ = [
    "FED", "METADATA", "as_theirs", "checked", "in_layer", "kept", "one_site", "told", "write_json", "write_pickle",
    "write_tensors", "write_yaml",
]  # fmt: skip

METADATA = "saekit_metadata"
FED = (
    "model_name", "model_class_name", "model_from_pretrained_kwargs", "context_size", "prepend_bos", "dataset_path",
    "exclude_special_tokens", "seqpos_slice", "sequence_separator_token",
)  # fmt: skip
"""The metadata that all SAEs of a set share."""
_RELU = ("saekit:relu", {"name": "saekit:relu"})


def checked(sae: SAE, form: str, architectures: Collection[str]) -> dict[str, Tensor]:
    """The tensors of ``sae`` that are to be written.

    :class:`SAEFormatError` for one of another architecture than ``architectures``, or that is another function than
    its tensors alone say.
    """
    if sae.info.architecture not in architectures:
        allowed = ", ".join(sorted(architectures))
        raise SAEFormatError(f"{form} has no place for the architecture {sae.info.architecture}; it has for {allowed}")
    if (activation := sae.info.options.get("activation", _RELU[0])) not in _RELU:
        raise SAEFormatError(f"{form} has no place for the activation {activation!r}; it has for saekit:relu")
    tensors = sae.public_tensors()
    if sae.saved_options().get("rescale_acts_by_decoder_norm"):
        off = (tensors["W_dec"].double().norm(dim=1) - 1).abs().max().item()
        if off > 1e-5:
            raise SAEFormatError(
                f"{form} has no place for rescale_acts_by_decoder_norm, and in bfloat16 norms cannot be folded "
                f"(they are up to {off:.2g} off 1): export sae.to(torch.float32)"
            )
    return tensors


def as_theirs(tensors: Mapping[str, Tensor], names: Mapping[str, str]) -> dict[str, Tensor]:
    """``tensors`` by the names of a format, which ``names`` gives to saekit's as :func:`reading.named` takes them."""
    return {
        theirs: (tensors[ours[:-2]].T if ours.endswith(".T") else tensors[ours]).contiguous()
        for theirs, ours in names.items()
    }


def one_site(sae: SAE, form: str) -> Site | None:
    """The one site of an SAE, if it is known; :class:`SAEFormatError` for what has others, and for one head alone."""
    if not sae.ports.same or len(sae.ports.inputs) > 1:
        raise SAEFormatError(
            f"{form} has no place for other sites than one ({', '.join(sae.ports.targets)} are written)"
        )
    return _whole(sae.info.site, form)


def _whole(site: Site | None, form: str) -> Site | None:
    if site is not None and site.hook_head_index is not None:
        raise SAEFormatError(f"{form} has no place for one head alone ({site.name})")
    return site


def in_layer(site: Site, form: str) -> tuple[int, str]:
    """The layer of a hook, and its name there: of ``blocks.3.hook_mlp_out`` 3 and ``hook_mlp_out``."""
    said = re.fullmatch(r"blocks\.(\d+)\.(.+)", (_whole(site, form) and site.hook_name) or "")
    if said is None:
        raise SAEFormatError(f"{form} has no place for the hook {site.name}, expected one of a layer: blocks.LAYER....")
    return int(said[1]), said[2]


def kept(sae: SAE, only: Collection[str] | None = None) -> dict[str, Any]:
    """What is written of the metadata, all or some of it, for :func:`told`."""
    return {METADATA: {name: value for name, value in sae.info.metadata.items() if only is None or name in only}}


def told(config: Mapping[str, Any], where: str) -> dict[str, Any] | None:
    """The metadata, in a file that saekit has written."""
    found = config.get(METADATA)
    if found is None:
        return None
    if not isinstance(found, dict) or not is_scale(found.get("activation_scale", 1.0)):
        raise SAEFormatError(f"{METADATA} in {where} is {str(found)[:60]!r}, expected the metadata of an SAE")
    return found


def write_json(path: Path, table: Mapping[str, Any]) -> None:
    """A file of JSON, and its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(table, indent=4) + "\n", encoding="utf-8")


def write_yaml(path: Path, table: Mapping[str, Any]) -> None:
    """A file of YAML."""
    import yaml

    path.write_text(yaml.safe_dump(json.loads(json.dumps(table)), sort_keys=True), encoding="utf-8")


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """A file of safetensors, and its folder."""
    from safetensors.torch import save_file

    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(dict(tensors), path)


def write_pickle(path: Path, state: Mapping[str, Tensor]) -> None:
    """A file of tensors by name, as torch saves them and weights-only unpickling reads them."""
    import torch

    torch.save({name: value.clone() for name, value in state.items()}, path)  # a view would bring its whole storage
