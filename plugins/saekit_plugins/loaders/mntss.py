"""Pretrained loader ``mntss``: layers of cross-layer transcoders, ``W_enc_4.safetensors`` and ``W_dec_4.safetensors``.

Their features are read in one layer and written to it and all that come after it.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs

from saekit import Entry, Ports, PretrainedSAE, SAEFiles, Sites, hookimpl
from saekit.config import check
from saekit.errors import SAEFormatError
from saekit_plugins.loaders.reading import OtherName, beside, fed, found_files, named, options, site, text
from saekit_plugins.loaders.writing import (
    FED,
    as_theirs,
    checked,
    in_layer,
    kept,
    told,
    write_tensors,
    write_yaml,
)  # fmt: skip

if TYPE_CHECKING:
    from saekit import SAE

_PATTERN = r"W_enc_\d+\.safetensors"
_HOOKS = {"feature_input_hook": "hook_resid_mid", "feature_output_hook": "hook_mlp_out"}
_DEFAULTS: Mapping[str, Any] = {
    "prepend_bos": True, "model_class_name": "HookedTransformer", "model_from_pretrained_kwargs": {"fold_ln": False},
}  # fmt: skip


@attrs.frozen(kw_only=True)
class MntssConfig:
    """Which layer."""

    layer: int | None = attrs.field(default=None, validator=check(lambda value: value >= 0, "0 or more"))
    """The layer that is read.  None: the only one there."""


@attrs.frozen(kw_only=True)
class MntssCltLayerConfig(MntssConfig):
    """The same, by the name that sae-lens's registry gives it."""


class MntssLoader:
    """ReLU.  Each layer that is written is a target of its own; `sae.ports.split_target` names them.

    ``b_dec`` is that of the layer itself, and the others have none here.
    """

    def __init__(self, config: MntssConfig) -> None:
        self._layer = config.layer

    def detects(self, files: SAEFiles) -> float:
        names = found_files(files, _PATTERN)
        return 0.9 if any(beside(files, name, _decoder(name)) for name in names) else 0.0

    def missing_part(self, files: SAEFiles) -> str | None:
        for name in found_files(files, r"W_(?:enc|dec)_\d+\.safetensors"):
            file = name.rpartition("/")[2]
            other = file.replace("W_enc_", "W_dec_") if "W_enc_" in file else file.replace("W_dec_", "W_enc_")
            if beside(files, name, other) is None:
                return f"{other} beside {name}"
        return None

    def locate(self, path: str, names: Collection[str]) -> str | None:
        """Releases say the layer alone."""
        encoder = f"W_enc_{path}.safetensors"
        return encoder if encoder in names else None

    def load(self, files: SAEFiles) -> PretrainedSAE:
        import torch

        layer, encoder = self._chosen(files)
        decoder = beside(files, encoder, _decoder(encoder))
        if decoder is None:
            raise SAEFormatError(f"{files.place} has no {_decoder(encoder)} beside {encoder}")
        where = f"{encoder} in {files.place}"
        tensors = named(files.tensors(encoder), _names(layer), where)
        decoders = files.tensors(decoder, only=(f"W_dec_{layer}",))[f"W_dec_{layer}"]
        width = len(tensors["b_dec"])
        if tensors["b_dec"].ndim != 1 or decoders.ndim != 3 or decoders.shape[2] != width:
            raise SAEFormatError(
                f"W_dec_{layer} in {files.place} has shape {list(decoders.shape)} and b_dec_{layer} "
                f"{list(tensors['b_dec'].shape)}, expected [d_sae, layers, d_out] and [d_out]"
            )
        layers = decoders.shape[1]
        tensors["W_dec"] = decoders.reshape(len(decoders), -1)
        tensors["b_dec"] = torch.cat([tensors["b_dec"], tensors["b_dec"].new_zeros((layers - 1) * width)])
        said = beside(files, encoder, "config.yaml")
        config = {} if said is None else files.yaml(said)
        config_where = f"{said} in {files.place}"
        hooks = fed({name: text(config, name, config_where) for name in _HOOKS}, _HOOKS)
        read, written = hooks["metadata"].values()
        source = site(f"blocks.{layer}.{read}", where)
        targets = [site(f"blocks.{n}.{written}", where) for n in range(layer, layer + layers)]
        sites = Sites((source,), tuple(targets))
        own = told(config, config_where)
        others = fed({"model_name": text(config, "model_name", config_where)}, _DEFAULTS if own is None else {})
        return PretrainedSAE(
            architecture="saekit:transcoder",
            options=options(tensors, apply_b_dec_to_input=False, activation="saekit:relu", skip_connection=False),
            tensors=tensors,
            sites=sites,
            ports=Ports.of(sites, {source: tensors["W_enc"].shape[0], **dict.fromkeys(targets, width)}),
            metadata=others["metadata"] if own is None else own,
            defaulted=[*hooks["defaulted"], *others["defaulted"]],
            renamed={**_names(layer), f"W_dec_{layer}": "W_dec"},
        )

    def write_sae(self, sae: SAE, folder: Path) -> None:
        tensors, sites = checked(sae, "mntss", ("saekit:transcoder",)), sae.info.sites
        if sites is None or len(sites.inputs) > 1:
            found = "no sites" if sites is None else f"the sites {sites.name}"
            raise SAEFormatError(
                f"mntss has no place for {found}; it has for one that is read, and any that are written"
            )
        layer, read = in_layer(sites.inputs[0], "mntss")
        layers, hooks = zip(*(in_layer(site, "mntss") for site in sites.targets), strict=True)
        widths = [*sae.ports.targets.values()]
        if [*layers] != [*range(layer, layer + len(layers))] or len({*hooks}) > 1 or len({*widths}) > 1:
            raise SAEFormatError(
                f"mntss has no place for what writes {', '.join(sae.ports.targets)}, of widths {widths}; it has for "
                f"one hook of layer {layer} and all that come after it, of one width"
            )
        first, rest = tensors["b_dec"].split([widths[0], sum(widths[1:])])
        if bool(rest.any()):
            raise SAEFormatError("mntss has no place for a b_dec of later layers, each of which has its own file")
        if "W_skip" in tensors:
            raise SAEFormatError("mntss has no place for a skip connection")
        config = {
            "model_kind": "cross_layer_transcoder", "feature_input_hook": read, "feature_output_hook": hooks[0],
            "model_name": sae.info.metadata.get("model_name"), **kept(sae, FED),
        }  # fmt: skip
        write_tensors(folder / f"W_enc_{layer}.safetensors", as_theirs({**tensors, "b_dec": first}, _names(layer)))
        decoders = tensors["W_dec"].reshape(sae.d_sae, len(layers), widths[0]).contiguous()
        write_tensors(folder / f"W_dec_{layer}.safetensors", {f"W_dec_{layer}": decoders})
        write_yaml(folder / "config.yaml", {name: value for name, value in config.items() if value is not None})

    def _chosen(self, files: SAEFiles) -> tuple[int, str]:
        found = {int(re.findall(r"\d+", name)[-1]): name for name in found_files(files, _PATTERN)}
        layer = next(iter(found)) if self._layer is None and len(found) == 1 else self._layer
        if layer is None or layer not in found:
            wanted = "say which layer: loader={'name': 'mntss', 'layer': ...}" if layer is None else f"no layer {layer}"
            raise SAEFormatError(
                f"{files.place} holds {len(found)} layers of a cross-layer transcoder "
                f"({', '.join(map(str, sorted(found))) or 'none'}): {wanted}"
            )
        return layer, found[layer]


class _OtherName(OtherName, MntssLoader):
    """The same, by another name."""


def _names(layer: int) -> Mapping[str, str]:
    return {f"W_enc_{layer}": "W_enc.T", f"b_enc_{layer}": "b_enc", f"b_dec_{layer}": "b_dec"}


def _decoder(encoder: str) -> str:
    """The name of the file of decoders."""
    return encoder.rpartition("/")[2].replace("W_enc_", "W_dec_")


@hookimpl
def saekit_register_pretrained_loaders() -> Iterable[Entry]:
    summary = "layers of cross-layer transcoders (W_enc_4.safetensors, W_dec_4.safetensors)"
    yield Entry("mntss", MntssConfig, f"{__name__}:MntssLoader", summary=summary)
    other = "another name of mntss, which sae-lens's registry uses"
    yield Entry("mntss_clt_layer_transcoder", MntssCltLayerConfig, f"{__name__}:_OtherName", summary=other)
