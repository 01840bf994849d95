"""``cfg.json`` of any sae-lens as one table with today's names, every field of the right kind."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import attrs

from saekit import Site
from saekit.errors import ConfigError, SAEFormatError
from saekit.for_sae_lens import NO_PROCESSING, is_guess, major, no_token, said_by_sae_lens
from saekit_plugins.backends.model_folders import is_native

__all__ = ["RENAMED", "FoundConfig", "read_config"]

RENAMED = {"hook_point": "hook_name", "hook_point_layer": "hook_layer", "hook_point_head_index": "hook_head_index"}
SCALED = "expected_average_only_in"
TRANSFORMS = {"layer_norm": "saekit:layer_norm", "constant_norm_rescale": "saekit:constant_norm"}
"""What 4 to 6 do to each row as an SAE is used, and what it is called here."""
# What versions before 6, whose configurations are flat, say of the model, its text and what is taken of it.
_FED = (
    "model_name", "model_class_name", "model_from_pretrained_kwargs", "model_kwargs", "hook_layer", "context_size",
    "prepend_bos", "sequence_separator_token", "begin_batch_token", "begin_sequence_token", "exclude_special_tokens",
    "disable_concat_sequences", "seqpos_slice", "dataset_path", "is_dataset_tokenized", "neuronpedia_id",
    "sae_lens_training_version",
)  # fmt: skip
# In the metadata of 6, but not of what the SAE is fed: they have a place of their own, or are of the file alone.
_NOT_KEPT = ("hook_name", "hook_head_index", "sae_lens_version")
_KWARGS, _VERSION = "model_from_pretrained_kwargs", "sae_lens_training_version"
_NUMBER, _TEXT, _FLAG = (int, "a whole number above 0"), (str, "a text"), (bool, "true or false")
_KINDS: Mapping[str, tuple[type, str]] = {
    "d_in": _NUMBER,
    "d_sae": _NUMBER,
    "hook_name": _TEXT,
    "hook_name_out": _TEXT,
    "architecture": _TEXT,
    "activation": _TEXT,
    "apply_b_dec_to_input": _FLAG,
    "rescale_acts_by_decoder_norm": _FLAG,
    "activation_fn_kwargs": (dict, "an object"),
    "training_architecture_details": (dict, "an object"),
}


@attrs.frozen(kw_only=True)
class FoundConfig:
    """What ``cfg.json`` says, and what it leaves to be understood."""

    flat: Mapping[str, Any]
    """Everything, with today's names; nulls left out."""
    nulls: frozenset[str]
    """What is stated to be null."""
    version: int
    """The first number of the version of sae-lens that trained it; 0 where nobody knows."""
    d_in: int
    d_sae: int
    site: Site | None
    """None: the files do not name it, as those of 6 need not."""
    target: Site | None
    """That a transcoder writes, where it is named."""
    architecture: str
    activation: str
    apply_b_dec_to_input: bool
    scaled: bool
    """Whether training multiplied activations by a factor that is not folded into the weights."""
    input_transform: str | None
    """What is done to each row before the encoder."""
    metadata: dict[str, Any]
    """What the SAE is fed, as far as it is stated."""
    defaulted: tuple[str, ...]
    """What decides how the weights are used and is not stated, so that sae-lens's own default holds."""


def read_config(
    raw: Mapping[str, Any], place: str, normalized: str | None = None, hook_name: str | None = None
) -> FoundConfig:
    """``cfg.json``, checked; :class:`SAEFormatError` names ``place`` and the field.

    ``normalized`` is its ``normalize_activations``, where it says none, and ``hook_name`` the hook that it reads.
    """
    inner = raw.get("metadata")
    if inner is not None and not isinstance(inner, dict):
        raise SAEFormatError(f"metadata in {place} is {inner!r}, expected an object")
    flat = {name: value for name, value in {**(inner or {}), **raw}.items() if value is not None}
    flat = {RENAMED.get(name, name): value for name, value in flat.items()}
    # ReLU is the default only where neither spelling of the activation is there.
    flat["activation"] = flat.get("activation_fn", flat.get("activation_fn_str", "relu"))
    _add_hook(flat, place, hook_name)
    # 6 names the hook among the metadata, of SAEs that were trained on a model; before, it was always there.
    needed = ("d_in", "d_sae") if inner is not None else ("d_in", "d_sae", "hook_name")
    if missing := [name for name in needed if name not in flat]:
        raise SAEFormatError(f"{place} lacks {', '.join(missing)}")
    _check_kinds(flat, place)
    normalized = _normalized(flat, place, normalized)
    metadata = _metadata(flat, inner or raw, nested=bool(inner))
    return FoundConfig(
        flat=flat,
        nulls=frozenset(name for name, value in {**(inner or {}), **raw}.items() if value is None),
        version=major(flat.get(_VERSION) or _version(inner or raw, flat)),
        d_in=flat["d_in"],
        d_sae=flat["d_sae"],
        site=_site(flat, place),
        target=_site(flat, place, "_out"),
        architecture=flat.get("architecture", "standard"),
        activation=flat["activation"],
        apply_b_dec_to_input=flat.get("apply_b_dec_to_input", True),
        scaled=normalized == SCALED,
        input_transform=TRANSFORMS.get(normalized),
        metadata=metadata,
        defaulted=tuple(_defaulted(flat, metadata)),
    )


def _check_kinds(flat: Mapping[str, Any], place: str) -> None:
    for name, (kind, expected) in _KINDS.items():
        value = flat.get(name)
        if value is not None and (type(value) is not kind or (type(value) is int and value < 1) or value == ""):
            spelling = "activation_fn" if name == "activation" else name
            raise SAEFormatError(f"{spelling} in {place} is {value!r}, expected {expected}")


def _add_hook(flat: dict[str, Any], place: str, option: str | None) -> None:
    """The hook that the loader's option says, where the file names none."""
    if option is not None and flat.setdefault("hook_name", option) != option:
        raise SAEFormatError(
            f"the loader's option hook_name is {option!r}, but {place} says {flat['hook_name']!r}; leave the option out"
        )


def _site(flat: Mapping[str, Any], place: str, end: str = "") -> Site | None:
    """That of the fields whose names end in ``end``, if they are there."""
    if f"hook_name{end}" not in flat:
        return None
    try:
        return Site(hook_name=flat[f"hook_name{end}"], hook_head_index=flat.get(f"hook_head_index{end}"))
    except ConfigError as error:
        raise SAEFormatError(f"{place} does not say where the SAE belongs: {error}") from error


def _normalized(flat: Mapping[str, Any], place: str, option: str | None) -> str:
    """What activations went through, by the names of 4 to 6; ``option`` says it where the file does not."""
    found = flat.get("normalize_activations", "none")
    if found == "constant_scalar_rescale" and flat.get("architecture") == "temporal":  # an option of that
        found = "none"
    if isinstance(found, bool):  # of 2 and 3
        found = SCALED if found else "none"
    if found == "covariance_whitening":
        raise SAEFormatError(
            f"normalize_activations in {place} is {found!r}: it is a checkpoint of a training whose map of activations "
            "is not in these files. Load the SAE that the training left at its end, which has it in its weights"
        )
    if not isinstance(found, str) or found not in ("none", SCALED, *TRANSFORMS):
        expected = ", ".join(repr(name) for name in ("none", SCALED, *TRANSFORMS))
        raise SAEFormatError(f"normalize_activations in {place} is {found!r}, expected one of {expected}")
    if option is None or option == found:
        return str(found)
    if found != "none":
        raise SAEFormatError(
            f"the loader's option normalize_activations is {option!r}, but {place} says {found!r}; leave the option out"
        )
    return option


def _metadata(flat: Mapping[str, Any], raw: Mapping[str, Any], *, nested: bool) -> dict[str, Any]:
    names = [*_FED, *(name for name in raw if nested and name not in (*_FED, *_NOT_KEPT))]
    found = {name: flat[name] for name in names if name in flat} | no_token(raw)
    if isinstance(kwargs := found.get(_KWARGS), Mapping) and is_native(str(found.get("model_name"))):
        found[_KWARGS] = {name: value for name, value in kwargs.items() if name not in NO_PROCESSING}  # as it was saved
        return found
    return found | _said(found, raw, flat)


def _said(found: Mapping[str, Any], raw: Mapping[str, Any], flat: Mapping[str, Any]) -> dict[str, Any]:
    """How its model is loaded.  A null for the version of its training, as 6 writes it of older ones: unknown."""
    return said_by_sae_lens(found, _version(raw, flat), str(flat.get("hook_name", "")))


def _version(raw: Mapping[str, Any], flat: Mapping[str, Any]) -> object:
    """Of what is not said by which version it was trained, the one that wrote it; None where nobody knows."""
    return None if raw.get(_VERSION, "") is None else flat.get("sae_lens_version")


def _defaulted(flat: Mapping[str, Any], metadata: Mapping[str, Any]) -> list[str]:
    """Since 6, an SAE of a stated architecture has no other activation than its own."""
    missing = [name for name in ("architecture", "apply_b_dec_to_input") if name not in flat]
    if "architecture" in missing and not {"activation_fn", "activation_fn_str"} & set(flat):
        missing.append("activation_fn")
    if metadata.get(_KWARGS) != flat.get(_KWARGS) and is_guess(metadata):
        missing.append(_KWARGS)
    return missing
