"""Of an SAE's metadata what sae-lens says otherwise: how its model was loaded, and that a token is not put in.

Importing this imports no torch.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

__all__ = [
    "BY_DEFAULT",
    "DTYPES",
    "ELSEWHERE",
    "NO_PROCESSING",
    "arguments",
    "dtype_in",
    "is_guess",
    "major",
    "no_token",
    "said_by_sae_lens",
    "said_to_sae_lens",
]

NO_PROCESSING: Mapping[str, bool] = {
    "fold_ln": False, "center_writing_weights": False, "center_unembed": False,
    "refactor_factored_attn_matrices": False, "fold_value_biases": False,
}  # fmt: skip
"""What ``HookedTransformer.from_pretrained_no_processing`` passes, by which sae-lens loads models since 4."""
BY_DEFAULT: Mapping[str, bool] = {name: name != "refactor_factored_attn_matrices" for name in NO_PROCESSING}
"""What ``HookedTransformer.from_pretrained`` does, by which sae-lens loaded models before."""
_LENS, _KIND, _KWARGS, _VERSION = (
    "HookedTransformer", "model_class_name", "model_from_pretrained_kwargs", "sae_lens_training_version"
)  # fmt: skip
ELSEWHERE = ("dtype", "torch_dtype", "device", "device_map", "n_devices", "trust_remote_code")
"""What sae-lens passes to ``from_pretrained``, and here is said otherwise (``model.dtype``) or is not there at all."""
DTYPES = ("float32", "bfloat16", "float16", "float64")
_OF_SAEKIT = frozenset({"model_processing", "model_autocast"})  # all that saekit has trained says one of them
_TOKENS = ("begin_batch_token", "begin_sequence_token", "sequence_separator_token")
_LENS_HOOK = re.compile(r"blocks\.\d+\..+|hook_\w+|ln_final\..+|unembed\..+")


def major(version: object) -> int:
    """The first number of a version such as ``6.54.12``; 0 for what is none."""
    first = str(version or "").partition(".")[0]
    return int(first) if first.isdecimal() else 0


def said_to_sae_lens(metadata: Mapping[str, Any], hook_name: str = "") -> dict[str, Any]:
    """What stands otherwise in the part of ``cfg.json`` that sae-lens 6 reads, of an SAE at ``hook_name``.

    It processes a model's weights only where the arguments say so: those say here what was done to them in training,
    of SAEs of sae-lens 2 and 3, and of older ones of saekit, what is done by default.
    """
    found: dict[str, Any] = {name: None for name in _TOKENS if metadata.get(name) == "none"}
    if not _is_lens(metadata, hook_name):
        return found
    done, asked = metadata.get("model_processing"), _table(metadata.get(_KWARGS))
    if isinstance(done, Mapping):
        found[_KWARGS] = {**asked, **{name: bool(value) for name, value in done.items() if value or name in asked}}
    elif 0 < major(metadata.get(_VERSION)) < 4 or "model_autocast" in metadata:
        found[_KWARGS] = {**{name: True for name, value in BY_DEFAULT.items() if value}, **asked}
    return found


def said_by_sae_lens(metadata: Mapping[str, Any], version: object = None, hook_name: str = "") -> dict[str, Any]:
    """What is to be understood of ``metadata`` that a sae-lens wrote, of ``version`` where they do not say of which.

    Since 4, weights are processed only where the arguments say so, and before by default.  With what saekit trained
    stands what was done.  Where nobody says of which version it is, nothing is added.
    """
    if major(metadata.get(_VERSION) or version) < 4 or _OF_SAEKIT & metadata.keys():
        return {}
    if not _is_lens(metadata, hook_name):
        return {}
    return {_KWARGS: {**NO_PROCESSING, **_table(metadata.get(_KWARGS))}}


def is_guess(metadata: Mapping[str, Any]) -> bool:
    """Whether it is by the hook alone that arguments are taken for those of a ``HookedTransformer``."""
    return metadata.get(_KIND) is None


def arguments(metadata: Mapping[str, Any]) -> dict[str, Any] | None:
    """What a ``HookedTransformer`` is loaded with to be as it was in training; None: of another backend, or not said.

    Of a model that was loaded before, the arguments say nothing, and what was seen of its weights does.
    """
    if metadata.get(_KIND) not in (None, _LENS) or not (_KWARGS in metadata or metadata.get(_KIND) == _LENS):
        return None
    asked, done = _table(metadata.get(_KWARGS)), _table(metadata.get("model_processing"))
    seen = {name: done[name] for name, value in BY_DEFAULT.items() if name in done and bool(done[name]) != value}
    return {**seen, **asked}


def dtype_in(kwargs: object) -> str | None:
    """The type of weights that arguments of ``from_pretrained`` say, as saekit calls it; None: none, or another."""
    table = _table(kwargs)
    said = (str(table.get(name)).removeprefix("torch.") for name in ("dtype", "torch_dtype"))
    return next((name for name in said if name in DTYPES), None)


def no_token(raw: Mapping[str, Any]) -> dict[str, str]:
    """Those tokens that are null in a table of sae-lens: none is put there."""
    return {name: "none" for name in _TOKENS if name in raw and raw[name] is None}


def _is_lens(metadata: Mapping[str, Any], hook_name: str) -> bool:
    """Whether the model is a ``HookedTransformer``: as is said, or as arguments and a hook of that kind let guess."""
    if metadata.get(_KIND) is None:
        return isinstance(metadata.get(_KWARGS), Mapping) and _LENS_HOOK.fullmatch(hook_name) is not None
    return bool(metadata[_KIND] == _LENS)


def _table(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}
