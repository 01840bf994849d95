"""Pretrained loader ``connor_rob_hook_z``: the attention SAEs of Kissane and Krzyzanowski for GPT-2 small.

A repository holds ``NAME.pt`` and ``NAME_cfg.json`` for each SAE.
"""

from __future__ import annotations

import pickle
import warnings
from collections.abc import Iterable
from typing import Any

import attrs

from saekit import Entry, PretrainedSAE, SAEFiles, Site, hookimpl
from saekit.errors import SAEFormatError

_SUFFIX = "_cfg.json"
_TENSORS = ("W_enc", "b_enc", "W_dec", "b_dec")


@attrs.frozen(kw_only=True)
class ConnorRobConfig:
    """Which SAE of the repository."""

    sae: str | None = None
    """`NAME` of `NAME.pt`.  None: the only one there."""


class ConnorRobLoader:
    """Reads ``.pt`` files by weights-only unpickling, which builds tensors and refuses everything else."""

    def __init__(self, config: ConnorRobConfig) -> None:
        self._name = config.sae

    def detects(self, files: SAEFiles) -> bool:
        return any(name.endswith(_SUFFIX) and f"{name[: -len(_SUFFIX)]}.pt" in files.names for name in files.names)

    def load(self, files: SAEFiles) -> PretrainedSAE:
        name = self._name or self._only(files)
        config = files.json(f"{name}{_SUFFIX}")
        if missing := [key for key in ("act_size", "dict_size", "act_name", "layer") if key not in config]:
            raise SAEFormatError(f"{name}{_SUFFIX} in {files.place} lacks {', '.join(missing)}")
        return PretrainedSAE(
            options={
                "d_in": config["act_size"],
                "d_sae": config["dict_size"],
                "activation": "saekit:relu",
                "apply_b_dec_to_input": True,
                "normalize_sae_decoder": False,
            },
            tensors=self._read(files, f"{name}.pt"),
            site=Site(hook_name=config["act_name"]),
            metadata={"model_name": "gpt2-small", "hook_layer": config["layer"], "context_size": 128,
                      "prepend_bos": True},
        )  # fmt: skip

    def _only(self, files: SAEFiles) -> str:
        names = sorted(name.removesuffix(_SUFFIX) for name in files.names if name.endswith(_SUFFIX))
        if len(names) != 1:
            raise SAEFormatError(
                f"{files.place} holds {len(names)} SAEs of this format; say which, as in "
                f"loader={{'name': 'connor_rob_hook_z', 'sae': {names[0] if names else 'NAME'!r}}}. "
                f"It has {', '.join(names)}"
            )
        return names[0]

    def _read(self, files: SAEFiles, name: str) -> dict[str, Any]:
        import torch

        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)  # about pickle protocols: what counts is what it refuses
                state = torch.load(files.path(name), map_location="cpu", weights_only=True)
        except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
            reason = str(error).strip().splitlines()[0]
            raise SAEFormatError(
                f"{name} in {files.place} is not a plain file of tensors, and nothing else is unpickled: {reason}"
            ) from error
        if not isinstance(state, dict) or not all(isinstance(state.get(key), torch.Tensor) for key in _TENSORS):
            found = ", ".join(map(str, state)) if isinstance(state, dict) else type(state).__name__
            raise SAEFormatError(f"{name} in {files.place} must hold {', '.join(_TENSORS)}, found {found}")
        return {key: state[key] for key in _TENSORS}


@hookimpl
def saekit_register_pretrained_loaders() -> Iterable[Entry]:
    summary = "attention-output SAEs of Kissane and Krzyzanowski (NAME.pt, NAME_cfg.json)"
    yield Entry("connor_rob_hook_z", ConnorRobConfig, _build, summary=summary)


def _build(config: ConnorRobConfig) -> ConnorRobLoader:
    return ConnorRobLoader(config)
