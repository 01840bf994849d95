"""Of an SAE's metadata what sae-lens says otherwise: how its model was loaded, and that a token is not put in.

Importing this imports no torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

__all__ = ["NO_PROCESSING", "major", "no_token", "said_by_sae_lens", "said_to_sae_lens"]

NO_PROCESSING: Mapping[str, bool] = {
    "fold_ln": False, "center_writing_weights": False, "center_unembed": False,
    "refactor_factored_attn_matrices": False, "fold_value_biases": False,
}  # fmt: skip
"""What ``HookedTransformer.from_pretrained_no_processing`` passes, by which sae-lens loads models since 4."""
_LENS, _KIND, _KWARGS = "HookedTransformer", "model_class_name", "model_from_pretrained_kwargs"
_DONE_BY_DEFAULT = frozenset(NO_PROCESSING) - {"refactor_factored_attn_matrices"}  # by from_pretrained
_OF_SAEKIT = frozenset({"model_processing", "model_autocast"})  # all that saekit has trained says one of them
_TOKENS = ("begin_batch_token", "begin_sequence_token", "sequence_separator_token")


def major(version: object) -> int:
    """The first number of a version such as ``6.54.12``; 0 for what is none."""
    first = str(version or "").partition(".")[0]
    return int(first) if first.isdecimal() else 0


def said_to_sae_lens(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """What stands otherwise in the part of ``cfg.json`` that sae-lens 6 reads.

    It processes a model's weights only where the arguments say so: those say here what was done to them in training.
    """
    found: dict[str, Any] = {name: None for name in _TOKENS if metadata.get(name) == "none"}
    done = metadata.get("model_processing")
    if metadata.get(_KIND) == _LENS and isinstance(done, Mapping):
        asked = _table(metadata.get(_KWARGS))
        found[_KWARGS] = {**asked, **{name: bool(value) for name, value in done.items() if value or name in asked}}
    return found


def said_by_sae_lens(metadata: Mapping[str, Any], version: object = None) -> dict[str, Any]:
    """What is to be understood of ``metadata`` that a sae-lens wrote, of ``version`` where they do not say of which.

    Since 4, weights are processed only where the arguments say so, and before by default.  With what saekit trained
    stands what was done, and what :func:`said_to_sae_lens` has added for one of ``version`` is the default again.
    """
    kind, kwargs = metadata.get(_KIND), metadata.get(_KWARGS)
    if version is not None and kind == _LENS and "model_processing" in metadata:
        return {_KWARGS: {k: v for k, v in _table(kwargs).items() if v is not True or k not in _DONE_BY_DEFAULT}}
    stated = kind == _LENS or (kind is None and isinstance(kwargs, Mapping))
    if not stated or major(metadata.get("sae_lens_training_version") or version) < 4 or _OF_SAEKIT & metadata.keys():
        return {}
    return {_KIND: _LENS, _KWARGS: {**NO_PROCESSING, **_table(kwargs)}}


def no_token(raw: Mapping[str, Any]) -> dict[str, str]:
    """Those tokens that are null in a table of sae-lens: none is put there."""
    return {name: "none" for name in _TOKENS if name in raw and raw[name] is None}


def _table(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}
