"""``params.safetensors`` of Gemma Scope 2, with a ``config.json`` beside it or without."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from saekit import Ports, PretrainedSAE, SAEFiles, Site, Sites
from saekit.cautions import warn
from saekit.errors import SAEFormatError
from saekit_plugins.loaders.gemma_scope import FED, Gemma3Config
from saekit_plugins.loaders.reading import (
    beside,
    fed,
    found_files,
    missing_beside,
    named,
    one_file,
    options,
    path_of,
    peeked,
    text,
)

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Gemma3Loader"]

_KIND = re.compile(r"(?:^|.*/)(resid_post|attn_out|mlp_out|transcoder|clt)(?:_all)?/", re.DOTALL)  # the nearest
_LAYER = re.compile(r".*layer_(\d+)", re.DOTALL)
_REPOSITORY = re.compile(r".*gemma-scope-2-(270m|1b|4b|12b|27b)-(pt|it)(?=/|$)", re.DOTALL)
_PATTERN = r"params\.safetensors|(?:.*/)?clt[^/]*/(?:[^/]+/)*[^/]*layer_\d+[^/]*\.safetensors"
_HOOKS = {"resid_post": "hook_resid_post", "attn_out": "attn.hook_z", "mlp_out": "hook_mlp_out"}
_TRANSCODERS = ("transcoder", "clt")
_NAMES = {"w_enc": "W_enc", "b_enc": "b_enc", "w_dec": "W_dec", "b_dec": "b_dec", "threshold": "threshold"}
_SKIP = {"affine_skip_connection": "W_skip.T"}
_HF = {"hf_hook_point_in": "hf_hook_name", "hf_hook_point_out": "hf_hook_name_out"}
_HF_KINDS = {
    "output": "resid_post",
    "self_attn.o_proj.input": "attn_out",
    "post_feedforward_layernorm.output": "mlp_out",
    "pre_feedforward_layernorm.output": "transcoder",
}
"""What is read of ``model.layers.N``, by the names of transformers."""
_LAYERS = {"270m": 18, "1b": 26, "4b": 34, "12b": 48, "27b": 62}


class Gemma3Loader:
    """JumpReLU; no bias is taken from the input.

    A cross-layer transcoder is one of several targets, a layer each, of which `sae.ports.split_target` makes outputs by
    name.
    """

    def __init__(self, config: Gemma3Config) -> None:
        self._sae, self._repo, self._kind = config.sae, config.repo, config.kind

    def detects(self, files: SAEFiles) -> float:
        names = found_files(files, _PATTERN)
        if not names:
            return 0.0
        path = path_of(files, names[0])
        said = peeked(files, beside(files, names[0], "config.json")).get("architecture") == "jump_relu"
        return 0.95 if said or _KIND.match(path) or _REPOSITORY.search(path) else 0.4

    def missing_part(self, files: SAEFiles) -> str | None:
        return missing_beside(files, r"config\.json", "params.safetensors", keys=("architecture", "hf_hook_point_in"))

    def load(self, files: SAEFiles) -> PretrainedSAE:
        name = one_file(files, _PATTERN, self._sae, "gemma_3")
        path, where = path_of(files, name), f"{name} in {files.place}"
        config, said = self._config(files, name)
        state = files.tensors(name)
        kind, number = self._place(path, said, config)
        if config.get("affine_connection") is True and "affine_skip_connection" not in state:
            raise SAEFormatError(f"{where} lacks affine_skip_connection, which the config.json beside it says is there")
        skip = "affine_skip_connection" in state
        others = self._fed(config, path)
        renamed = {theirs: ours for theirs, ours in _HF.items() if theirs in config}
        size = _size(config, self._repo or path)
        crossing = getattr(state.get("w_dec"), "ndim", 2) == 3
        _check_kind(kind, self._kind, where, like_transcoders=crossing or skip)
        if crossing or kind in _TRANSCODERS or skip:
            tensors = dict(state)
            layers = _flatten(tensors, where, number, _LAYERS.get(size)) if crossing else 1
            tensors = named(tensors, _NAMES | (_SKIP if skip else {}), where)
            return PretrainedSAE(
                architecture="saekit:jumprelu_transcoder",
                options=options(tensors, apply_b_dec_to_input=False, skip_connection=skip),
                tensors=tensors,
                **_ports(tensors, number, layers, _LAYERS.get(size)),
                **others,
                renamed=_NAMES | (_SKIP if skip else {}) | renamed,
            )
        tensors = named(state, _NAMES, where)
        hook = _HOOKS.get(kind or "")
        known = hook is not None and number is not None
        return PretrainedSAE(
            architecture="saekit:jumprelu",
            options=options(tensors, apply_b_dec_to_input=False),
            tensors=tensors,
            site=Site(hook_name=f"blocks.{number}.{hook}") if known else None,
            **others,
            renamed=_NAMES | renamed,
        )

    def _place(self, path: str, read: str | None, config: Mapping[str, Any]) -> tuple[str | None, int | None]:
        """What it is, and its layer: as the option says, what is ``read`` by ``config.json``, or else the path.

        That a transcoder is a cross-layer one, the path alone says.
        """
        said = None if read is None else re.fullmatch(r"model\.layers\.(\d+)\.(.+)", read)
        kind = None if said is None else _HF_KINDS.get(said[2])
        if (written := config.get("hf_hook_point_out")) is not None and written != read:
            kind = "transcoder"
        named, layer = _KIND.match(path), said or _LAYER.match(path)
        if named is not None and (kind is None or (kind == "transcoder" and named[1] == "clt")):
            kind = named[1]
        return self._kind or kind, None if layer is None else int(layer[1])

    def _config(self, files: SAEFiles, name: str) -> tuple[Mapping[str, Any], str | None]:
        """``config.json``, checked as far as it is used, and what it says is read, in the model's own names."""
        path = beside(files, name, "config.json")
        if path is None:
            return {}, None
        config, where = files.json(path), f"{path} in {files.place}"
        architecture = text(config, "architecture", where)
        if architecture not in (None, "jump_relu"):
            raise SAEFormatError(f"architecture in {where} is {architecture!r}, expected 'jump_relu'")
        text(config, "model_name", where)
        if not isinstance(config.get("affine_connection", False), bool | None):
            raise SAEFormatError(
                f"affine_connection in {where} is {config['affine_connection']!r}, expected true or false"
            )
        text(config, "hf_hook_point_out", where)
        return config, text(config, "hf_hook_point_in", where)

    def _fed(self, config: Mapping[str, Any], path: str) -> dict[str, Any]:
        model = config.get("model_name")
        said = _REPOSITORY.search(path if self._repo is None else f"/{self._repo}/")
        if model is None and said is not None:
            model = f"gemma-3-{said[1]}-{said[2]}"
        if model is not None:
            model = str(model).replace("-v3", "-3").removeprefix("google/")
            model = model.removesuffix("-pt") if "270m" in model else model
        hooks = {ours: config.get(theirs) for theirs, ours in _HF.items()}
        return fed({"model_name": None if model is None else f"google/{model}", **hooks}, FED)


def _check_kind(kind: str | None, option: str | None, where: str, *, like_transcoders: bool) -> None:
    """Against the weights, which show some transcoders to be such; others look like SAEs, which is said."""
    if like_transcoders and option in _HOOKS:
        raise SAEFormatError(
            f"the loader's option kind is {option!r}, but {where} has a skip connection or decoders of several layers, "
            "as transcoders alone have"
        )
    if kind is None and not like_transcoders:
        warn(
            f"{where} is read as an SAE, and may be a transcoder: the files are alike, and neither the path nor a "
            "config.json says what it is. loader={'name': 'gemma_3', 'kind': 'transcoder'} reads it as one, and "
            f"{' or '.join(map(repr, _HOOKS))} as kind says what it is for",
        )


def _size(config: Mapping[str, Any], path: str) -> str:
    """The model's, as in ``1b``."""
    said = _REPOSITORY.search(path) or re.search(r"-(270m|1b|4b|12b|27b)(?=-|$)", str(config.get("model_name")))
    return "" if said is None else said[1]


def _flatten(tensors: dict[str, Tensor], where: str, layer: int | None, depth: int | None) -> int:
    """Put the decoders of several layers, ``[d_sae, layers, d_out]``, side by side; returns how many there are."""
    decoders, bias = tensors["w_dec"], tensors.get("b_dec")
    _, layers, width = decoders.shape
    if bias is None or list(bias.shape) not in ([width], [layers, width]):
        found = "none" if bias is None else list(bias.shape)
        raise SAEFormatError(f"b_dec of {where} has shape {found}, expected {[width]} or {[layers, width]}")
    own = layer if layer is not None and layers == depth else 0
    if bias.ndim == 1:
        bias = _of_one(bias, own, layers)
    tensors |= {"w_dec": decoders.reshape(len(decoders), -1), "b_dec": bias.reshape(-1)}
    if (skip := tensors.get("affine_skip_connection")) is not None:
        if list(skip.shape[1:]) not in ([width], [layers, width]):
            raise SAEFormatError(
                f"affine_skip_connection of {where} has shape {list(skip.shape)}, expected [d_in, {width}] or "
                f"[d_in, {layers}, {width}]"
            )
        skip = _of_one(skip, own, layers) if skip.ndim == 2 else skip
        tensors["affine_skip_connection"] = skip.reshape(len(skip), -1)
    return layers


def _of_one(found: Tensor, own: int, layers: int) -> Tensor:
    """``[..., layers, d_out]`` of ``[..., d_out]``, which is for the layer itself."""
    whole = found.new_zeros(*found.shape[:-1], layers, found.shape[-1])
    whole[..., own, :] = found
    return whole


def _ports(tensors: Mapping[str, Tensor], layer: int | None, layers: int, depth: int | None) -> dict[str, Any]:
    d_in, width = tensors["W_enc"].shape[0], tensors["W_dec"].shape[1] // layers
    if layer is None:
        names = [f"output.{number}" for number in range(layers)] if layers > 1 else ["output"]
        return {"ports": Ports({"input": d_in}, dict.fromkeys(names, width))}
    first = 0 if layers == depth and layers > 1 else layer
    targets = [Site(hook_name=f"blocks.{number}.hook_mlp_out") for number in range(first, first + layers)]
    sites = Sites((Site(hook_name=f"blocks.{layer}.hook_mlp_in"),), tuple(targets))
    return {"sites": sites, "ports": Ports.of(sites, {sites.inputs[0]: d_in, **dict.fromkeys(targets, width)})}
