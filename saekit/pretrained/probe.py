"""Whether an SAE computes what it did when it was saved: what its folder's probe says, in words where it differs."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs

from saekit.ambient import ambient
from saekit.config import PluginChoice
from saekit.errors import SAEFormatError
from saekit.files.faults import cut_off
from saekit.files.names import SAE_PROBE
from saekit.files.storage import sha256
from saekit.files.strict_json import parse_object
from saekit.plugins.manager import PluginManager
from saekit.pretrained.asking import hinting_at_release
from saekit.pretrained.differences import Differences
from saekit.pretrained.load import load_sae
from saekit.reasons import reason
from saekit.saved import SAEFiles

if TYPE_CHECKING:
    from saekit.pretrained.differences import Expected
    from saekit.sae.module import SAEModule

__all__ = ["check", "findings", "verify"]


def verify(path: str | Path, *, loader: PluginChoice | None = None, plugins: PluginManager | None = None) -> list[str]:
    """What of the SAE in a folder is not as it was when it was saved, in plain words; an empty list: nothing.

    Checksums are compared, and what the SAE computes with the probe beside its weights.  That is made for folders that
    somebody has converted, rounded or edited, so weights that do not fit their checksum are looked at all the same.
    :class:`saekit.errors.SAEFormatError` for a path that is no folder of an SAE, and for one without a probe.
    """
    with hinting_at_release(path, plugins):
        files = SAEFiles.at(path)
    _check_probe_is_there(files)
    faults: list[str] = []
    try:
        sae = load_sae(files, loader=loader, plugins=plugins, faults=faults)
    except SAEFormatError as error:
        return [*faults, str(error)]
    return faults + findings(sae, files)


def check(sae: SAEModule, files: SAEFiles) -> None:
    """:class:`SAEFormatError` when ``sae``, which was read from ``files``, does not compute what their probe says."""
    if found := findings(sae, files):
        raise SAEFormatError(
            f"the SAE in {files.place} is not as it was saved:" + "".join(f"\n  - {one}" for one in found)
        )


@ambient()
def findings(sae: SAEModule, files: SAEFiles) -> list[str]:
    """What of ``sae`` does not fit the probe in ``files``, in words."""
    _check_probe_is_there(files)
    path, where = files.path(SAE_PROBE), f"{SAE_PROBE} in {files.place}"
    said = _checksum(files)
    if said is not None and sha256(path) != said:
        return [
            f"{where} is damaged or was changed, so that nothing can be compared with it: its sha256 is not that in "
            "cfg.json"
        ]
    return Differences(sae, _read(path, where, sae)).told()


def _check_probe_is_there(files: SAEFiles) -> None:
    if SAE_PROBE not in files.names:
        raise SAEFormatError(
            f"{files.place} has no {SAE_PROBE}, so that there is nothing to compare the SAE with; saekit writes one "
            "when it saves an SAE. `saekit show` says whether it can be read all the same, and `saekit saes convert` "
            "makes a folder of it that has a probe"
        )


def _checksum(files: SAEFiles) -> str | None:
    """That of the probe, where ``cfg.json`` has one."""
    try:
        found = files.json("cfg.json")["saekit"]["sha256"][SAE_PROBE] if "cfg.json" in files.names else None
    except (SAEFormatError, KeyError, TypeError):
        return None
    return found if isinstance(found, str) else None


def _read(path: Path, where: str, sae: SAEModule) -> Expected:
    """What the probe says; :class:`SAEFormatError` for one that is none, or of an SAE of other sizes."""
    from safetensors import safe_open

    from saekit.pretrained.differences import Expected
    from saekit.weights import check_tensor

    try:
        with safe_open(path, "pt") as file:
            facts = dict(file.metadata() or {})
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no dictionary
    except Exception as error:  # the library raises its own errors for damaged files
        raise SAEFormatError(f"{where} is not a readable safetensors file: {cut_off(path) or reason(error)}") from error
    fields = [field.name for field in attrs.fields(Expected) if field.name != "facts"]
    if missing := [name for name in fields if name not in tensors]:
        raise SAEFormatError(f"{where} lacks {', '.join(missing)}")
    n, m = len(tensors["l0"].reshape(-1)), tensors["values"].shape[-1]
    shapes = {"x": [n, sae.d_in], "output": [n, sae.d_out], "values": [n, m], "features": [n, m], "l0": [n]}
    for name, shape in shapes.items():
        if list(tensors[name].shape) != shape:
            raise SAEFormatError(
                f"{name} of {where} has shape {list(tensors[name].shape)}, and of this SAE it is {shape}"
            )
        if name not in ("features", "l0"):
            check_tensor(tensors[name], name, where)
    kinds = {str(tensors[name].dtype) for name in ("features", "l0")}
    if kinds != {"torch.int32"} or bool(((tensors["features"] < 0) | (tensors["features"] >= sae.d_sae)).any()):
        raise SAEFormatError(f"{where} names features that this SAE, of {sae.d_sae}, does not have")
    return Expected(**{name: tensors[name] for name in fields}, facts=_facts(facts, where))


def _facts(said: Mapping[str, str], where: str) -> dict[str, Any]:
    """Of the header, those that are needed as numbers."""
    try:
        norms, off = parse_object(said["norms"].encode(), where), float(said["off"])
        numbers = {name: float(said[name]) for name in ("explained_variance",) if name in said}
        sound = 0 < off < 1 and all(isinstance(one, float) and math.isfinite(one) for one in norms.values())
    except (KeyError, ValueError) as error:
        raise SAEFormatError(f"the header of {where} is not as saekit writes it: {reason(error)}") from error
    if not sound:
        raise SAEFormatError(f"the header of {where} is not as saekit writes it: {said['off']}, {said['norms'][:60]}")
    return {**said, **numbers, "norms": norms, "off": off}
