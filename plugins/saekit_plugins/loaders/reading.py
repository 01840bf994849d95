"""What loaders share: which of several files it is, tensors by other names, and numbers that must be right."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import attrs

from saekit import PretrainedSAE, SAEFiles, Site
from saekit.errors import ConfigError, SAEFormatError

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "LINEAR", "OneOfSeveral", "OtherName", "ReLUFileLoader", "beside", "fed", "found_files", "layer_of",
    "missing_beside", "named", "one_file", "options", "path_of", "peeked", "site", "tensors_of", "text", "whole_number",
]  # fmt: skip

LINEAR = {"encoder.weight": "W_enc.T", "encoder.bias": "b_enc", "decoder.weight": "W_dec.T", "decoder.bias": "b_dec"}
"""torch's two linear layers, whose weights are `[out, in]`."""


@attrs.frozen(kw_only=True)
class OneOfSeveral:
    """Which SAE, where there are several."""

    sae: str | None = None
    """The path of its file of weights, or of the folder of that, in what is loaded.  None: the only one there."""


class OtherName:
    """Put before a loader, which has two names: by the second it detects nothing, for both would be equally sure."""

    def detects(self, files: SAEFiles) -> float:
        return 0.0

    def missing_part(self, files: SAEFiles) -> str | None:
        return None


def layer_of(name: str) -> int:
    """The number in the name of a file that has one, as in ``layer_6.safetensors``."""
    return int("".join(filter(str.isdigit, name.rpartition("/")[2])))


_WORDS = (
    (r"\(\?![^()]*\)|\(\?:[^()|]*/\)[*?]", ""),  # what a name is not, and folders that may be there
    (r"\((?!\?)([^()]*)\)", r"\1"),
    (r"\[\^/\]\*", "*"),
    (r"\\d\+", "N"),
    (r"\\\.", "."),
    (r"\(\?:", "("),
    (r"\|", " or "),
    (r"\w\?$", ""),
)


def _as_names(pattern: str) -> str:
    """A pattern of names for people: ``layer_N.safetensors``."""
    for part, word in _WORDS:
        pattern = re.sub(part, word, pattern)
    return pattern


def found_files(files: SAEFiles, pattern: str) -> list[str]:
    """The names that end, from a ``/`` on, in what ``pattern`` matches; where one file was asked for, that alone."""
    ending = re.compile(f"(?:.*/)?(?:{pattern})", re.DOTALL)
    names = [files.chosen] if files.chosen else sorted(files.names)
    return [name for name in names if ending.fullmatch(name)]


def one_file(files: SAEFiles, pattern: str, wanted: str | None, loader: str) -> str:
    """The one file of weights, or the one that ``wanted``, the option ``sae``, says."""
    found = found_files(files, pattern)
    if wanted is not None:
        found = [name for name in found if wanted.strip("/") in (name, name.rpartition("/")[0])]
    if len(found) == 1:
        return found[0]
    everything = found_files(files, pattern)
    shown = ", ".join(everything[:10]) + (", ..." if len(everything) > 10 else "")
    if not everything:
        has = ", ".join(sorted(files.names)[:10]) or "no files"
        raise SAEFormatError(
            f"{loader} reads {_as_names(pattern)}, and there is no such file in {files.place}, which has {has}"
        )
    if wanted is not None:
        raise SAEFormatError(f"{files.place} has no SAE {wanted!r}; it has {shown}")
    folders = [name.rpartition("/")[0] for name in everything]
    if all(folders) and len(set(folders)) == len(folders):
        some = ", ".join(folders[:10]) + (", ..." if len(folders) > 10 else "")
        raise SAEFormatError(f"{files.place} holds {len(everything)} SAEs; name the folder of one of them: {some}")
    raise SAEFormatError(
        f"{files.place} holds {len(everything)} SAEs; say which, as in loader={{'name': {loader!r}, 'sae': "
        f"{everything[0]!r}}}. It has {shown}"
    )


def beside(files: SAEFiles, name: str, *others: str) -> str | None:
    """The first of ``others`` that lies in the folder of ``name``."""
    folder = name.rpartition("/")[0]
    paths = [f"{folder}/{other}" if folder else other for other in others]
    return next((path for path in paths if path in files.names), None)


def missing_beside(files: SAEFiles, pattern: str, *others: str, keys: Collection[str] = ()) -> str | None:
    """What :class:`saekit.abilities.KnowsParts` says: the first of ``others``, where none lies beside a file there is.

    That file's name fits ``pattern``, and with ``keys`` it is of JSON and has these.
    """
    for name in found_files(files, pattern):
        if beside(files, name, *others) is None and (not keys or {*keys} <= peeked(files, name).keys()):
            return f"{others[0]} beside {name}"
    return None


def path_of(files: SAEFiles, name: str) -> str:
    """The whole path of a file, with the repository: for formats in which it says what the SAE is for."""
    return f"{files.address}/{name}"


def peeked(files: SAEFiles, name: str | None) -> Mapping[str, Any]:
    """A small file of JSON while a format is detected: nothing of one that is not there or cannot be read."""
    try:
        return {} if name is None or name not in files.names else files.json(name)
    except SAEFormatError:
        return {}


def named(
    state: Mapping[str, Any], names: Mapping[str, str], where: str, *, unused: Collection[str] = ()
) -> dict[str, Tensor]:
    """``state`` by saekit's names: ``names`` says them by theirs, with ``.T`` for those that lie the other way.

    ``unused`` may be there and do not count.  :class:`SAEFormatError` for what is missing or unknown, for tensors that
    cannot be weights, and for a matrix that is none.
    """
    missing = [name for name in names if name not in state]
    unknown = [name for name in state if name not in names and name not in unused]
    if missing or unknown:
        faults = [f"lacks {', '.join(missing)}"] * bool(missing)
        faults += [f"has {', '.join(unknown[:8])}, of which this format knows nothing"] * bool(unknown)
        raise SAEFormatError(f"{where} {', and '.join(faults)}; expected {', '.join(names)}")
    found = {}
    for theirs, ours in names.items():
        value = state[theirs]
        SAEFiles.check_weights({theirs: value}, where)
        if ours.startswith("W_") and value.ndim != 2:
            raise SAEFormatError(f"{theirs} of {where} has shape {list(value.shape)}, expected a matrix")
        found[ours.removesuffix(".T")] = value.T if ours.endswith(".T") else value
    return found


def tensors_of(files: SAEFiles, name: str, names: Mapping[str, str]) -> dict[str, Tensor]:
    """:func:`named` of a file of which nothing else is wanted."""
    return named(files.tensors(name), names, f"{name} in {files.place}")


def options(tensors: Mapping[str, Tensor], *, apply_b_dec_to_input: bool, **others: Any) -> dict[str, Any]:
    """The options of an SAE whose sizes are those of its ``W_enc [d_in, d_sae]``."""
    d_in, d_sae = tensors["W_enc"].shape
    return {
        "d_in": d_in,
        "d_sae": d_sae,
        "apply_b_dec_to_input": apply_b_dec_to_input,
        "normalize_sae_decoder": False,
        **others,
    }


def fed(stated: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """``metadata`` and ``defaulted`` of a :class:`PretrainedSAE`: what is stated, else what a format's SAEs share."""
    known = {name: value for name, value in stated.items() if value is not None}
    return {"metadata": {**defaults, **known}, "defaulted": [name for name in defaults if name not in known]}


def site(hook_name: str, where: str) -> Site:
    """The site of a hook that a file names."""
    try:
        return Site(hook_name=hook_name)
    except ConfigError as error:
        raise SAEFormatError(f"{where} does not say where the SAE belongs: {error}") from error


def whole_number(table: Mapping[str, Any], name: str, where: str, most: int | None = None) -> int:
    """A whole number of 1 or more, and at most ``most``."""
    value = table.get(name)
    if type(value) is not int or value < 1 or (most is not None and value > most):
        limits = "of 1 or more" if most is None else f"from 1 to {most}"
        raise SAEFormatError(f"{name} in {where} is {value!r}, expected a whole number {limits}")
    return value


def text(table: Mapping[str, Any], name: str, where: str) -> str | None:
    """A text, where there is one; None or no such field: None."""
    value = table.get(name)
    if value is not None and (not isinstance(value, str) or not value):
        raise SAEFormatError(f"{name} in {where} is {value!r}, expected a text")
    return value


class ReLUFileLoader:
    """Reads a file of a ReLU SAE whose name says its model and layer; no bias is taken from the input.

    The format has no field for the rest, which is the same for all of it.
    """

    key: ClassVar[str]
    pattern: ClassVar[str]
    """Of the name: its groups are the model and the layer."""
    names: ClassVar[Mapping[str, str]]
    owner: ClassVar[str]
    """Of the models."""
    defaults: ClassVar[Mapping[str, Any]]
    """Metadata that the format has no field for."""

    def __init__(self, config: OneOfSeveral) -> None:
        self._sae = config.sae

    def detects(self, files: SAEFiles) -> float:
        return 0.9 if found_files(files, self.pattern) else 0.0

    def load(self, files: SAEFiles) -> PretrainedSAE:
        name = one_file(files, self.pattern, self._sae, self.key)
        tensors = tensors_of(files, name, self.names)
        said = re.search(f"{self.pattern}$", name)
        model, layer = said.groups() if said else ("", "")
        return PretrainedSAE(
            options=options(tensors, apply_b_dec_to_input=False, activation="saekit:relu"),
            tensors=tensors,
            site=site(f"blocks.{int(layer)}.hook_resid_post", name),
            **fed({"model_name": f"{self.owner}/{model}"}, self.defaults),
            renamed=self.names,
        )
