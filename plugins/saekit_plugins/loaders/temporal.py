"""Pretrained loader ``temporal``: ``conf.yaml`` and ``latest_ckpt.safetensors``, as in ``canrager/temporalSAEs``."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import attrs

from saekit import Entry, PretrainedSAE, SAEFiles, Site, hookimpl
from saekit.errors import SAEFormatError
from saekit_plugins.loaders.reading import (
    OneOfSeveral,
    beside,
    fed,
    found_files,
    missing_beside,
    named,
    one_file,
    path_of,
    text,
    whole_number,
)

if TYPE_CHECKING:
    from torch import Tensor

_PATTERN = r"latest_ckpt\.safetensors"
_NAMES = {"D": "W_dec", "b": "b_dec"}
_UNTIED = {"E": "W_enc"}
_RENAMED = {"scaling_factor": "input_scale", "dimin": "d_in", "model_hf_name": "model_name"}
_LAYER = re.compile(r"(?:^|/)layer_(\d+)(?:/|$)")


@attrs.frozen(kw_only=True)
class TemporalLoaderConfig(OneOfSeveral):
    """Which of the layers."""


class TemporalLoader:
    """The layer, and so the site, is in the path alone; a copy that has lost it has none."""

    def __init__(self, config: TemporalLoaderConfig) -> None:
        self._sae = config.sae

    def detects(self, files: SAEFiles) -> float:
        return 0.95 if any(beside(files, name, "conf.yaml") for name in found_files(files, _PATTERN)) else 0.0

    def missing_part(self, files: SAEFiles) -> str | None:
        return missing_beside(files, r"latest_ckpt\.safetensors", "conf.yaml") or missing_beside(
            files, r"temporal/conf\.yaml", "latest_ckpt.safetensors"
        )

    def load(self, files: SAEFiles) -> PretrainedSAE:
        name = one_file(files, _PATTERN, self._sae, "temporal")
        said = beside(files, name, "conf.yaml")
        if said is None:
            raise SAEFormatError(f"{files.place} has no conf.yaml beside {name}")
        conf, where = files.yaml(said), f"{said} in {files.place}"
        sae, model = _table(conf, "sae", where), _table(conf, "llm", where)
        tied = sae.get("tied_weights")
        if not isinstance(tied, bool):
            raise SAEFormatError(f"tied_weights in {where} is {tied!r}, expected true or false")
        tensors = _tensors(files.tensors(name), tied, f"{name} in {files.place}")
        d_in, d_sae = _sizes(model, sae, tensors["W_dec"], where)
        options = _options(sae, where)
        files.check_factor(options["input_scale"], f"scaling_factor in {where}")
        layer = _LAYER.search(path_of(files, name).rpartition("/")[0])
        return PretrainedSAE(
            architecture="saekit:temporal",
            options={
                "d_in": d_in,
                "d_sae": d_sae,
                "apply_b_dec_to_input": True,
                **options,
                "tied_weights": tied,
            },
            tensors=tensors,
            site=None if layer is None else Site(hook_name=f"blocks.{int(layer[1])}.hook_resid_post"),
            **fed({"model_name": text(model, "model_hf_name", where)}, {"prepend_bos": True}),
            renamed=_NAMES | (_UNTIED if not tied else {}) | _RENAMED,
        )


def _table(conf: Mapping[str, Any], name: str, where: str) -> Mapping[str, Any]:
    found = conf.get(name)
    if not isinstance(found, dict):
        raise SAEFormatError(f"{name} in {where} is {found!r}, expected a table")
    return found


def _tensors(state: Mapping[str, Tensor], tied: bool, where: str) -> dict[str, Tensor]:
    """Those of attention as they are called; the architecture checks them."""
    attention = {name: value for name, value in state.items() if name.startswith("attn_layers.")}
    names = _NAMES if tied else _NAMES | _UNTIED
    return attention | named(state, names, where, unused=attention)


def _sizes(model: Mapping[str, Any], sae: Mapping[str, Any], W_dec: Tensor, where: str) -> tuple[int, int]:
    d_in = whole_number(model, "dimin", where)
    factor = _number(sae, "exp_factor", where)
    d_sae = int(d_in * factor)
    if list(W_dec.shape) != [d_sae, d_in]:
        raise SAEFormatError(f"D beside {where} has shape {list(W_dec.shape)}, and that says {[d_sae, d_in]}")
    return d_in, d_sae


def _options(sae: Mapping[str, Any], where: str) -> dict[str, Any]:
    kind = text(sae, "sae_diff_type", where)
    if kind not in ("relu", "topk"):
        raise SAEFormatError(f"sae_diff_type in {where} is {kind!r}, expected 'relu' or 'topk'")
    found: dict[str, Any] = {
        name: whole_number(sae, name, where) for name in ("n_heads", "n_attn_layers", "bottleneck_factor")
    }
    if kind == "topk":
        found["kval_topk"] = whole_number(sae, "kval_topk", where)
    return found | {"sae_diff_type": kind, "input_scale": _number(sae, "scaling_factor", where)}


def _number(table: Mapping[str, Any], name: str, where: str) -> float:
    value = table.get(name)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise SAEFormatError(f"{name} in {where} is {value!r}, expected a number above 0")
    return float(value)


@hookimpl
def saekit_register_pretrained_loaders() -> Iterable[Entry]:
    summary = "temporal SAEs (conf.yaml, latest_ckpt.safetensors)"
    yield Entry("temporal", TemporalLoaderConfig, f"{__name__}:TemporalLoader", summary=summary)
