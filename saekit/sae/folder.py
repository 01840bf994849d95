"""An SAE's folder: ``cfg.json``, ``sae_weights.safetensors``, ``sparsity.safetensors``, ``probe.safetensors``.

The layout is the one of sae-lens 6.  What only saekit knows stands in ``cfg.json`` under ``saekit``, which other
readers pass over.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from functools import reduce
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs
import torch
from torch import Tensor

from saekit.cautions import warn
from saekit.distributed.agreement import done_by_all
from saekit.errors import PlaceError, SAEFormatError, StorageError
from saekit.files.checksums import seal
from saekit.files.names import SAE_CONFIG, SAE_EVALS, SAE_FILES, SAE_PROBE, SAE_SPARSITY, SAE_WEIGHTS, fault_of_name
from saekit.files.storage import new_files, new_folder, nothing, read_json, replace_files, tidy
from saekit.files.strict_json import check_value, parse_object
from saekit.files.tensors import InPieces, save_tensors
from saekit.for_sae_lens import said_to_sae_lens
from saekit.sae.probe import Probe, probe_of
from saekit.sae.ways import INFERENCE, overridden
from saekit.site import Site
from saekit.transforms import NamedElsewhere
from saekit.values import is_scale
from saekit.weights import check_tensor, check_tensors

if TYPE_CHECKING:
    from saekit.sae.module import SAEModule

__all__ = [
    "CONFIG",
    "FORMAT",
    "PROBE",
    "SPARSITY",
    "TRANSFORMED",
    "WEIGHTS",
    "Contents",
    "contents_of",
    "part_of_run",
    "save_contents",
    "save_sae",
    "tell_of_name",
    "weights_dtype",
    "write_sae",
]

CONFIG, WEIGHTS, SPARSITY, PROBE = SAE_CONFIG, SAE_WEIGHTS, SAE_SPARSITY, SAE_PROBE
FORMAT = 1
TRANSFORMED = 2
"""The format of a folder whose SAE has an input transform: a saekit that knows none must not read it."""
# The metadata fields by which sae-lens 6 tells its own layout from older ones.
_LAYOUT = {"sae_lens_version": "6.0.0", "sae_lens_training_version": None}
# By these names sae-lens 6 knows what writes another site than it reads; by any other, an SAE of one site.
_TRANSCODERS = frozenset(f"{kind}transcoder" for kind in ("", "skip_", "jumprelu_", "jumprelu_skip_"))
_HALF = "sae_files"  # what is half written has a hidden name made of this


def save_sae(sae: SAEModule, path: Path) -> Path:
    """Write ``sae`` to the folder ``path``; returns ``path``.

    A folder that holds an SAE's files alone is replaced whole.  Into any other folder the SAE's own files go, in the
    place of those of an SAE that is there, and what was measured of that goes (``evals.json``); nothing else in it is
    touched, and until all are there it does not load.

    Raises :class:`SAEFormatError` for an SAE that could not be loaded again, before anything is touched, and
    :class:`StorageError` for a path that cannot be an SAE's folder, and when the disk fails.
    """
    save_contents(contents_of(sae), path)
    return path


def save_contents(contents: Contents, path: Path) -> None:
    """The same for what is to be written of one."""
    if "\0" in str(path):
        raise PlaceError(f"cannot save the SAE in {str(path)!r}: a path cannot hold a null character")
    try:
        target = Path(os.path.realpath(path))  # a link to a folder stays one
        _refuse(target, path)
        tidy(target.parent, target.name.__eq__)  # what a process that was killed in between has left
        if _is_ours_alone(target):
            with new_folder(target) as folder:
                contents.write(folder)
        else:
            _write_into(target, contents)
    except (OSError, UnicodeEncodeError) as error:
        raise StorageError(f"cannot save the SAE in {str(path)!r}: {error}") from error


def _refuse(target: Path, path: Path) -> None:
    """:class:`StorageError` says why ``target`` is no place for an SAE."""
    where = f"cannot save the SAE in {str(path)!r}: "
    if target.exists() and not target.is_dir():
        raise PlaceError(f"{where}there is a file of that name; give a folder, which may be new")
    if path.is_symlink() and not target.exists():
        raise PlaceError(f"{where}it is a symbolic link to {target}, which is not there")
    if not target.exists() and (fault := fault_of_name(target.name)):
        raise PlaceError(f"{where}the name {fault}; choose another")
    if kind := part_of_run(target):
        raise PlaceError(f"{where}it is {kind}; choose another folder, or a new one in it")
    for name in SAE_FILES:
        if os.path.lexists(target / name) and not (target / name).is_file():
            raise PlaceError(f"{where}{name} in it is not a file; choose another folder")
    if (target / CONFIG).exists() and not (target / WEIGHTS).exists() and not _is_config(target / CONFIG):
        raise PlaceError(f"{where}the {CONFIG} in it is not an SAE's; choose another folder")


def part_of_run(target: Path) -> str:
    """What a folder is of a run's that must stay what it is; nothing when it is free."""
    homes = _table(target.parent / "run.json").get("saes")
    if "saes" in _table(target / "run.json") or (isinstance(homes, dict) and target.name in homes.values()):
        return "a run folder"
    if isinstance(homes, dict) and target.name == "checkpoints":
        return "a run's folder of checkpoints"
    if "saes" in _table(target / "checkpoint.json"):
        return "a checkpoint"
    return "part of a checkpoint" if "saes" in _table(target.parent / "checkpoint.json") else ""


def _table(path: Path) -> dict[str, Any]:
    try:
        table = read_json(path)
    except (OSError, ValueError):
        return {}
    return table if isinstance(table, dict) else {}


def _is_config(path: Path) -> bool:
    """Whether a ``cfg.json`` is that of an SAE, of whatever library."""
    return bool({"saekit", "d_sae"} & _table(path).keys())


def _is_ours_alone(target: Path) -> bool:
    """Whether a folder may be swapped for another: it is not there, or holds files of an SAE and nothing else."""
    if not target.exists():
        return True
    if os.path.ismount(target) or _works_in(target):  # it must stay the same folder
        return False
    files = {item.name for item in os.scandir(target) if item.is_file(follow_symlinks=False)}
    own = {*SAE_FILES, SAE_EVALS} if CONFIG in files and _is_measured(target / SAE_EVALS) else {*SAE_FILES}
    return bool(files) and set(os.listdir(target)) == files <= own  # noqa: PTH208 - names


def _is_measured(path: Path) -> bool:
    """Whether an ``evals.json`` is of ``saekit.evaluate``."""
    return {"values", "errors", "about"} <= _table(path).keys()


def _works_in(folder: Path) -> bool:
    """Whether the process's current folder is ``folder`` or lies in it."""
    try:
        return Path.cwd().is_relative_to(folder)
    except OSError:  # it was removed
        return False


def _write_into(target: Path, contents: Contents) -> None:
    tidy(target, _HALF.__eq__)
    with new_files(target / _HALF) as home:
        written = contents.write(home)
        gone = [SAE_EVALS] if (target / CONFIG).is_file() and _is_measured(target / SAE_EVALS) else []
        new = {file: home / file if file in written else None for file in (*gone, *SAE_FILES)}
        replace_files(target, new, last=CONFIG)


def write_sae(sae: SAEModule, folder: Path) -> dict[str, str]:
    """Write the files of ``sae`` into ``folder``, which is there; returns their checksums."""
    return contents_of(sae).write(folder)


@attrs.frozen(eq=False)
class Contents:
    """What is to be written, checked as if it were read again."""

    config: dict[str, Any]
    """``cfg.json`` without the checksums."""
    tensors: Mapping[str, Tensor | InPieces]
    sparsity: Tensor | None
    probe: Probe | None = None

    def write(self, folder: Path, go_on: Callable[[], None] = nothing) -> dict[str, str]:
        """Write the files into ``folder``, which is there; returns their checksums.

        ``go_on`` is called from time to time; what it raises ends this.
        """
        sums = {WEIGHTS: save_tensors(folder / WEIGHTS, self.tensors, go_on=go_on)}
        if self.sparsity is not None:
            sums[SPARSITY] = save_tensors(folder / SPARSITY, {"sparsity": self.sparsity})
        if self.probe is not None:
            sums[PROBE] = save_tensors(folder / PROBE, self.probe.tensors, self.probe.facts)
        text = _text(self.config, sums)
        (folder / CONFIG).write_bytes(text)
        return sums | {CONFIG: hashlib.sha256(text).hexdigest()}


def contents_of(sae: SAEModule) -> Contents:
    """What the folder of ``sae`` holds; its tensors may be the SAE's own.

    :class:`SAEFormatError` says what of ``sae`` could not be loaded again.  Of one whose features are split, the
    processes of its group must all ask: each is given its part of the tensors, and all else is that of the whole.
    """
    contents, tensors = done_by_all(sae.share.features, lambda: _without_probe(sae))
    return attrs.evolve(contents, probe=probe_of(sae, tensors))


def _without_probe(sae: SAEModule) -> tuple[Contents, dict[str, Tensor]]:
    tensors, where = sae.public_tensors(), "the SAE that is to be saved"
    check_tensors(tensors, where)
    for name in (entry.name for entry in sae.table):
        if name in tensors:
            _check_shape(tensors[name], list(sae.table.shape(name)), name, where)
    sparsity = None
    if sae.log_sparsity is not None:
        check_tensor(sae.log_sparsity, "log_sparsity", where, minus_infinity=True)
        _check_shape(sae.log_sparsity, [sae.d_sae * sae.share.parts], "log_sparsity", where)
        sparsity = sae.log_sparsity.detach().cpu().float().contiguous()
    config = folder_config(sae, tensors)
    parse_object(_text(config, dict.fromkeys((WEIGHTS, SPARSITY), "0" * 64)), f"{CONFIG} of {where}")
    return Contents(config, tensors, sparsity), tensors


def _check_shape(value: Tensor, shape: list[int], name: str, where: str) -> None:
    if list(value.shape) != shape:
        raise SAEFormatError(f"{name} of {where} has shape {list(value.shape)}, expected {shape}")


def _text(config: Mapping[str, Any], sums: Mapping[str, str]) -> bytes:
    """``cfg.json`` with the checksums of the other files and its own."""
    own = {**config["saekit"], "sha256": sums, "seal": seal(config)}
    return (json.dumps({**config, "saekit": own}, indent=2) + "\n").encode()


def folder_config(sae: SAEModule, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """``cfg.json`` beside ``tensors``: what sae-lens 6 reads, and saekit's own part.

    The type of the weights is that of the tensors, whatever the SAE was made with.
    """
    dtype = str(weights_dtype(tensors)).removeprefix("torch.")
    _check_metadata(sae.info.metadata)
    site = sae.info.site if _has_one_site(sae) else None
    public = dict(_public_config(sae))
    said = public.pop("metadata", {})
    hook_name = site.hook_name if site else ""
    unscaled = public.get("normalize_activations", "none")  # an architecture may have a way of its own
    return {
        **public,
        "d_in": sae.d_in,
        **({} if sae.ports.same else {"d_out": sae.d_out}),
        "d_sae": sae.d_sae * sae.share.parts,
        "dtype": dtype,
        "device": "cpu",
        "apply_b_dec_to_input": sae.config.apply_b_dec_to_input,
        "normalize_activations": _normalization(sae, unscaled),
        "reshape_activations": "hook_z" if hook_name.endswith("hook_z") and not site_has_head(sae) else "none",
        "metadata": {
            **_LAYOUT,
            **sae.info.metadata,
            **said_to_sae_lens(sae.info.metadata, hook_name),
            **said,
            **_hooks(sae, transcoder=public["architecture"] in _TRANSCODERS),
        },
        "saekit": {
            "format": FORMAT if sae.input_transform is None else TRANSFORMED,
            "architecture": sae.info.architecture,
            "options": {**sae.saved_options(), "dtype": "float32" if dtype == "float16" else dtype},
            **({} if sae.input_transform is None else {"input_transform": sae.info.input_transform}),
            "site": _place(site) if site else None,
            **_ports(sae),
            "metadata": dict(sae.info.metadata),
            **_provenance(sae),
        },
    }


def _provenance(sae: SAEModule) -> dict[str, Any]:
    """Where it was read from, if that was no folder of saekit's: those say themselves what they are."""
    found = dict(sae.info.provenance)
    return {"provenance": found} if found.get("loader", "saekit") != "saekit" else {}


def _public_config(sae: SAEModule) -> dict[str, Any]:
    """The entries that name it to other libraries.

    At other sites than one, an SAE's name would be misread, and so would that of the class from which one of other
    mathematics is derived.
    """
    public = sae.public_config()
    known = sae.input_transform is None or _name_elsewhere(sae) is not None
    if known and _is_another(sae) is None and (_has_one_site(sae) or public["architecture"] in _TRANSCODERS):
        return public
    return {**public, "architecture": sae.info.architecture, "metadata": {}}


def _is_another(sae: SAEModule) -> str | None:
    """Why it may be another SAE than the name from :meth:`public_config` says, in words; None: it is that."""
    kind = type(sae)
    if (changed := overridden(kind, "public_config", INFERENCE)) is not None:
        return changed
    if "public_config" in vars(kind) and hasattr(kind, "activation"):  # a property, for which the class answers
        return None
    if vars(sae).get("given_activation", sae.activation) is sae.activation:
        return None
    return "its activation function is not the one that its options name"


def tell_of_name(sae: SAEModule) -> None:
    """Warn where an SAE is saved without the name by which sae-lens knows what its class is derived from."""
    public = str(sae.public_config()["architecture"])
    if public != sae.info.architecture and _has_one_site(sae) and (reason := _is_another(sae)) is not None:
        warn(
            f"the SAE is saved as '{sae.info.architecture}', which sae-lens does not know, and not as '{public}': "
            f"{reason}. If its outputs are those of a '{public}', define public_config in {type(sae).__name__}"
        )


def _normalization(sae: SAEModule, unscaled: str) -> str:
    """What is done to activations before the encoder, by the names of sae-lens; what it does not know by our own.

    ``unscaled`` is what an architecture does itself.
    """
    if sae.input_transform is None:
        return "expected_average_only_in" if sae.info.scale_is_unknown else unscaled
    chosen = sae.info.input_transform
    return _name_elsewhere(sae) or str(chosen["name"] if isinstance(chosen, Mapping) else chosen)


def _name_elsewhere(sae: SAEModule) -> str | None:
    transform = sae.input_transform
    return transform.name_elsewhere if isinstance(transform, NamedElsewhere) else None


def _has_one_site(sae: SAEModule) -> bool:
    """Whether it reads and writes one site."""
    return sae.ports.same and len(sae.ports.inputs) == 1


def _place(site: Site) -> dict[str, Any]:
    return {"hook_name": site.hook_name, "hook_head_index": site.hook_head_index}


def _hooks(sae: SAEModule, *, transcoder: bool) -> dict[str, Any]:
    """The sites by the names of sae-lens, which knows one that is read and, of a transcoder, one that is written."""
    sites = sae.info.sites
    if sites is None or len(sites.inputs) > 1 or len(sites.targets) > 1:
        return {}
    written = {f"{name}_out": value for name, value in _place(sites.targets[0]).items()}
    return _place(sites.inputs[0]) | ({} if sites.same and not transcoder else written)


def _ports(sae: SAEModule) -> dict[str, Any]:
    """The sites of what has other ones than one, with their widths, in order; where none are known, the ports' names
    and ``placed``, which says so."""
    if _has_one_site(sae):
        return {}
    known = {} if sae.info.sites is None else {site.name: site for site in sae.info.sites.all}
    placed = {} if known else {"placed": False}
    return placed | {
        option: [{**_place(known.get(name) or Site(hook_name=name)), "width": width} for name, width in widths.items()]
        for option, widths in (("inputs", sae.ports.inputs), ("targets", sae.ports.targets))
    }


def weights_dtype(tensors: Mapping[str, Tensor]) -> torch.dtype:
    """The type of an SAE's weights: the widest of its matrices, or where there are none of all."""
    matrices = [value for value in tensors.values() if value.ndim == 2] or list(tensors.values())
    return reduce(torch.promote_types, (value.dtype for value in matrices))


def _check_metadata(metadata: Mapping[str, Any]) -> None:
    try:
        text = json.dumps(metadata)
    except (TypeError, ValueError, RecursionError) as error:
        raise SAEFormatError(f"sae.info.metadata cannot be saved, as it is not plain JSON: {error}") from error
    check_value(dict(metadata), "sae.info.metadata")
    parse_object(text.encode(), "sae.info.metadata")  # 1 and "1" are one name there
    if not is_scale(scale := metadata.get("activation_scale", 1.0)):
        raise SAEFormatError(
            f"activation_scale in sae.info.metadata is {scale!r}, expected a number above 0, or one for each site by "
            "its name"
        )


def site_has_head(sae: SAEModule) -> bool:
    """Whether the SAE reads one head alone, so that it sees ``[..., d_head]`` and nothing to flatten."""
    return sae.info.site is not None and sae.info.site.hook_head_index is not None
