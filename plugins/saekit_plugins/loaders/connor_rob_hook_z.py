"""Pretrained loader ``connor_rob_hook_z``: the attention SAEs of Kissane and Krzyzanowski for GPT-2 small.

A repository holds ``NAME.pt`` and ``NAME_cfg.json`` for each SAE.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import attrs

from saekit import Entry, PretrainedSAE, SAEFiles, Site, hookimpl
from saekit.errors import SAEFormatError
from saekit_plugins.loaders.reading import fed, found_files

if TYPE_CHECKING:
    from torch import Tensor

_SUFFIX = "_cfg.json"
_TENSORS = ("W_enc", "b_enc", "W_dec", "b_dec")
_FED = {"model_name": "model_name", "hook_layer": "layer", "context_size": "seq_len"}
_RENAMED = {
    "act_size": "d_in", "dict_size": "d_sae", "act_name": "hook_name", "layer": "hook_layer",
    "seq_len": "context_size",
}  # fmt: skip
_KINDS: Mapping[str, tuple[type, int]] = {
    "act_size": (int, 1), "dict_size": (int, 1), "act_name": (str, 0), "layer": (int, 0), "model_name": (str, 0),
    "seq_len": (int, 1),
}  # fmt: skip


@attrs.frozen(kw_only=True)
class ConnorRobConfig:
    """Which SAE of the repository."""

    sae: str | None = None
    """`NAME` of `NAME.pt`.  None: the only one there."""


class ConnorRobLoader:
    """Reads ``.pt`` files by weights-only unpickling, which builds tensors and refuses everything else."""

    def __init__(self, config: ConnorRobConfig) -> None:
        self._name = config.sae

    def detects(self, files: SAEFiles) -> float:
        return 0.9 if _names(files) else 0.0

    def missing_part(self, files: SAEFiles) -> str | None:
        for name in found_files(files, rf"[^/]*{_SUFFIX}"):
            weights = name.removesuffix(_SUFFIX) + ".pt"
            if weights not in files.names:
                return f"{weights} beside {name}"
        return None

    def load(self, files: SAEFiles) -> PretrainedSAE:
        name = self._name or self._only(files)
        place = f"{name}{_SUFFIX} in {files.place}"
        config = _checked(files.json(f"{name}{_SUFFIX}"), place)
        return PretrainedSAE(
            options={
                "d_in": config["act_size"],
                "d_sae": config["dict_size"],
                "activation": "saekit:relu",
                "apply_b_dec_to_input": True,
                "normalize_sae_decoder": False,
            },
            tensors=_tensors(files, f"{name}.pt"),
            site=Site(hook_name=config["act_name"]),
            # What the file leaves out is the same for all of this format.
            **fed(
                {ours: config.get(theirs) for ours, theirs in _FED.items()},
                {"model_name": "gpt2-small", "context_size": 128, "prepend_bos": True},
            ),
            renamed={theirs: ours for theirs, ours in _RENAMED.items() if theirs in config},
        )

    def _only(self, files: SAEFiles) -> str:
        names = _names(files)
        if len(names) != 1:
            raise SAEFormatError(
                f"{files.place} holds {len(names)} SAEs of this format; say which, as in "
                f"loader={{'name': 'connor_rob_hook_z', 'sae': {names[0] if names else 'NAME'!r}}}. "
                f"It has {', '.join(names)}"
            )
        return names[0]


def _tensors(files: SAEFiles, name: str) -> dict[str, Tensor]:
    if unknown := [one for one in files.state(name) if one not in _TENSORS]:
        found = ", ".join(unknown[:8])
        raise SAEFormatError(f"{name} in {files.place} has {found}, of which this format knows nothing")
    return files.tensors(name, only=_TENSORS)


def _names(files: SAEFiles) -> list[str]:
    """Of the SAEs that are there; where one file was asked for, of that alone."""
    names = sorted(name.removesuffix(_SUFFIX) for name in files.names if name.endswith(_SUFFIX))
    return [name for name in names if f"{name}.pt" in files.names and files.chosen in ("", f"{name}.pt")]


def _checked(config: Mapping[str, Any], place: str) -> Mapping[str, Any]:
    """The configuration, with every field that is used of the right kind."""
    if missing := [name for name in ("act_size", "dict_size", "act_name", "layer") if name not in config]:
        raise SAEFormatError(f"{place} lacks {', '.join(missing)}")
    for name, (kind, least) in _KINDS.items():
        value = config.get(name)
        if name in config and (type(value) is not kind or (isinstance(value, int) and value < least) or value == ""):
            expected = "a text" if kind is str else f"a whole number, at least {least}"
            raise SAEFormatError(f"{name} in {place} is {value!r}, expected {expected}")
    return config


@hookimpl
def saekit_register_pretrained_loaders() -> Iterable[Entry]:
    summary = "attention-output SAEs of Kissane and Krzyzanowski (NAME.pt, NAME_cfg.json)"
    yield Entry("connor_rob_hook_z", ConnorRobConfig, _build, summary=summary)


def _build(config: ConnorRobConfig) -> ConnorRobLoader:
    return ConnorRobLoader(config)
