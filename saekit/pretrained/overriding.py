"""What a release says of an SAE counts more than what its files say."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import attrs

from saekit.errors import ConfigError, SAEFormatError
from saekit.saved import PretrainedSAE, SAEFiles
from saekit.site import Site

__all__ = ["overridden"]

_KWARGS = "model_from_pretrained_kwargs"
_FED = ("model_name", "dataset_path", _KWARGS, "context_size", "prepend_bos")


def overridden(read: PretrainedSAE, files: SAEFiles, loader: str) -> PretrainedSAE:
    """``read`` with what is said about ``files`` beside them, as far as ``loader`` has not heeded it itself."""
    about = files.about
    if not about:
        return read
    if "normalize_activations" in about and "normalize_activations" not in files.asked:
        raise SAEFormatError(
            f"the release of {files.place} says normalize_activations = {about['normalize_activations']!r}, and the "
            f"loader {loader} does nothing with that: another loader, or the release without it"
        )
    said = {name: about[name] for name in _FED if name in about}
    if _KWARGS in said and isinstance(read.metadata.get(_KWARGS), Mapping):  # of each argument what is said last counts
        said[_KWARGS] = {**read.metadata[_KWARGS], **said[_KWARGS]}
    changes: dict[str, Any] = {
        "metadata": {**read.metadata, **said},
        "defaulted": [name for name in read.defaulted if name not in about],  # what it says is no default of the format
    }
    if "hook_name" in about:
        changes |= _placed(read, about["hook_name"], files.place)
    if "norm_scaling_factor" in about and "norm_scaling_factor" not in files.asked:
        if read.activation_scale is None:
            changes["activation_scale"] = about["norm_scaling_factor"]
        elif read.activation_scale != 1:  # that is where nothing was multiplied: then it is left alone
            files.check_factor(read.activation_scale, f"what {loader} has read")
    return attrs.evolve(read, **changes)


def _placed(read: PretrainedSAE, hook_name: str, place: str) -> Mapping[str, Any]:
    if read.sites is not None or read.ports is not None:
        raise SAEFormatError(f"the release of {place} says hook_name = {hook_name!r}, and the SAE has several sites")
    head = None if read.site is None else read.site.hook_head_index
    try:
        return {"site": Site(hook_name=hook_name, hook_head_index=head)}
    except ConfigError as error:
        raise SAEFormatError(f"the release of {place} does not say where the SAE belongs: {error}") from error
