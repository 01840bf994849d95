"""saekit's own folders: ``cfg.json`` is checked field by field before anything is made of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import attrs

from saekit.config import NEEDED_TO_LOAD, SAME_AT_START
from saekit.errors import ConfigError, SAEFormatError
from saekit.files.checksums import Checksums, seal
from saekit.files.storage import sha256
from saekit.for_sae_lens import said_by_sae_lens
from saekit.sae.folder import CONFIG, FORMAT, PROBE, SPARSITY, TRANSFORMED, WEIGHTS
from saekit.saved import PretrainedSAE, SAEFiles
from saekit.site import Site, Sites
from saekit.values import Ports, SAEInfo, is_scale

__all__ = ["check_needed", "is_own", "read_own"]

_FIELDS: Mapping[str, tuple[type, ...]] = {
    "architecture": (str,),
    "options": (dict,),
    "metadata": (dict,),
    "site": (dict, type(None)),
}
_WORDS = {str: "a text", dict: "an object", type(None): "null"}
_NOTHING = object()


def is_own(files: SAEFiles) -> bool:
    """Whether saekit wrote the folder."""
    asked = files.chosen in ("", WEIGHTS)  # not for another file that happens to lie there
    return asked and CONFIG in files.names and "saekit" in files.json(CONFIG)


def read_own(files: SAEFiles, checksums: Checksums, faults: list[str] | None = None) -> PretrainedSAE:
    """What a folder of saekit holds; :class:`SAEFormatError` names the field that is not as it was written.

    ``checksums`` are told what those of the files should be.  With ``faults``, those that do not fit are added to them
    instead, and what is there is read all the same.
    """
    own = _checked(files, faults)
    sums = _sums(own, files)
    files.fetch(WEIGHTS, SPARSITY)
    for name, expected in sums.items():
        if name == PROBE:  # which nobody needs who does not ask for it
            continue
        if faults is None:
            checksums.expect(files.path(name), expected, _fault_of(name, expected, files))
        elif (found := sha256(files.path(name))) != expected:
            faults.append(str(_fault_of(name, expected, files)(found)))
    hook = (own["site"] or {}).get("hook_name", "")
    metadata = own["metadata"] | said_by_sae_lens(own["metadata"], hook_name=str(hook))  # saved by an older saekit
    scale = metadata.get("activation_scale", 1.0)
    if not is_scale(scale):
        raise _wrong(files, "metadata.activation_scale", scale, "a number above 0, or one for each site by its name")
    sparsity = None
    if SPARSITY in (sums or files.names):  # one that belongs to other weights is left alone
        sparsity = files.tensors(SPARSITY, only=("sparsity",), minus_infinity=True)["sparsity"]
    return PretrainedSAE(
        architecture=own["architecture"],
        options=own["options"],
        tensors=files.tensors(WEIGHTS),
        site=None if own["site"] is None else _site(own["site"], files),
        **_ports(own, files),
        log_sparsity=sparsity,
        activation_scale=None if SAEInfo(metadata=metadata).scale_is_unknown else 1.0,
        input_transform=_transform(own, files),
        metadata=metadata,
        provenance=_provenance(own, files),
    )


def _transform(own: Mapping[str, Any], files: SAEFiles) -> str | Mapping[str, Any] | None:
    """What rows go through; a folder of the format that says so must."""
    found = own.get("input_transform")
    if own["format"] == FORMAT and found is None:
        return None
    named = isinstance(found, str) or (isinstance(found, dict) and isinstance(found.get("name"), str))
    if own["format"] == FORMAT or not named:
        expected = f"the key of an input transform, or an object with its name and options, and format {TRANSFORMED}"
        raise _wrong(files, "input_transform", _NOTHING if found is None else found, expected)
    return found


def _provenance(own: Mapping[str, Any], files: SAEFiles) -> Mapping[str, Any]:
    """Of an SAE of another library, where saekit once read it."""
    found = own.get("provenance", {})
    if not isinstance(found, dict):
        raise _wrong(files, "provenance", found, "an object")
    return found


def _checked(files: SAEFiles, faults: list[str] | None) -> Mapping[str, Any]:
    """saekit's part of ``cfg.json``, with every field of the kind that it should be of."""
    table = files.json(CONFIG)
    own = table["saekit"]
    if not isinstance(own, dict):
        raise SAEFormatError(f"saekit in {CONFIG} of {files.place} is {_shown(own)}, expected an object")
    if type(own.get("format")) is not int or own["format"] not in (FORMAT, TRANSFORMED):
        raise SAEFormatError(
            f"{files.place} has format {_shown(own.get('format'))}, and this saekit reads {FORMAT} and {TRANSFORMED}: "
            f"update saekit to load it (saekit.format in {CONFIG})"
        )
    if "seal" in own and own["seal"] != seal(table):
        _raise_or_note(
            f"{CONFIG} in {files.place} is damaged or was changed after it was saved: it does not fit "
            f"saekit.seal. Restore it, or remove saekit.seal to accept the change",
            faults,
        )
    for key, kinds in _FIELDS.items():
        if key not in own or not isinstance(own[key], kinds):
            raise _wrong(files, key, own.get(key, _NOTHING), " or ".join(_WORDS[kind] for kind in kinds))
    return own


def _wrong(files: SAEFiles, field: str, found: object, expected: str) -> SAEFormatError:
    return SAEFormatError(
        f"saekit.{field} in {CONFIG} of {files.place} is missing or of the wrong kind: found {_shown(found)}, expected "
        f"{expected}"
    )


def _shown(value: object) -> str:
    text = "nothing" if value is _NOTHING else repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _sums(own: Mapping[str, Any], files: SAEFiles) -> Mapping[str, str]:
    """The checksums, which old folders and those that somebody has accepted as they are may lack."""
    sums = own.get("sha256", {})
    if not isinstance(sums, dict) or not all(isinstance(value, str) for value in sums.values()):
        raise _wrong(files, "sha256", sums, "an object of checksums by file name")
    if sums and WEIGHTS not in sums:
        raise SAEFormatError(f"saekit.sha256 in {CONFIG} of {files.place} has no checksum of {WEIGHTS}")
    return sums


def _fault_of(name: str, sha256: str, files: SAEFiles) -> Callable[[str], SAEFormatError]:
    """What to say of a file whose checksum is another: what was saved is what is read, or nobody is given the SAE."""

    def fault(found: str) -> SAEFormatError:
        return SAEFormatError(
            f"{name} in {files.place} is damaged or was changed after it was saved: its sha256 is {found[:12]}..., "
            f"expected {sha256[:12]}... Restore it, or remove saekit.sha256 from {CONFIG} to accept it"
        )

    return fault


def _raise_or_note(text: str, faults: list[str] | None) -> None:
    if faults is None:
        raise SAEFormatError(text)
    faults.append(text)


def _ports(own: Mapping[str, Any], files: SAEFiles) -> dict[str, Any]:
    """The sites of what has other ones than one, and how wide they are; not ``placed``: only its ports' names."""
    if not own.keys() & {"inputs", "targets"}:
        return {}
    inputs, targets = (_widths(own.get(option, _NOTHING), option, files) for option in ("inputs", "targets"))
    if differing := [site.name for site in inputs if targets.get(site, inputs[site]) != inputs[site]]:
        raise _wrong(files, "targets", own["targets"], f"the width of {differing[0]} that inputs say")
    try:
        sites = Sites(tuple(inputs), tuple(targets))
    except ConfigError as error:
        raise SAEFormatError(f"the sites in {CONFIG} of {files.place} do not go together: {error}") from error
    if (placed := own.get("placed", True)) not in (True, False):
        raise _wrong(files, "placed", placed, "true or false")
    return {"sites": sites if placed else None, "ports": Ports.of(sites, inputs | targets)}


def _widths(found: object, option: str, files: SAEFiles) -> dict[Site, int]:
    expected = "a list of sites, each with its width, a whole number of 1 or more"
    if not isinstance(found, list) or not all(isinstance(table, dict) for table in found):
        raise _wrong(files, option, found, expected)
    widths = {}
    for table in found:
        width = table.get("width", _NOTHING)
        if type(width) is not int or width < 1:
            raise _wrong(files, f"{option}.width", width, "a whole number of 1 or more")
        widths[_site({key: value for key, value in table.items() if key != "width"}, files)] = width
    return widths


def _site(table: Mapping[str, Any], files: SAEFiles) -> Site:
    try:
        if "hook_name" not in table:
            raise ConfigError([("hook_name", "is missing")])
        return Site(**table)
    except (TypeError, ConfigError) as error:
        raise SAEFormatError(f"saekit.site in {CONFIG} of {files.place} is not a site: {error}") from error


def check_needed(options: Mapping[str, Any], cls: type, where: str) -> None:
    """:class:`SAEFormatError` when options are missing that decide what the weights mean: none has a safe default."""
    fields: Any = attrs.fields(cls)
    needed = [field.name for field in fields if field.metadata.get(NEEDED_TO_LOAD) or field.metadata.get(SAME_AT_START)]
    if missing := [name for name in needed if name not in options]:
        raise SAEFormatError(
            f"saekit.options in {where} lacks {', '.join(missing)}, without which the weights cannot be understood; "
            "nothing takes its place. Write it there, or save the SAE anew"
        )
