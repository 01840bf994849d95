"""Pretrained loader ``mntss``: layers of cross-layer transcoders, ``W_enc_4.safetensors`` and ``W_dec_4.safetensors``.

Their features are read in one layer and written to it and all that come after it.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable

import attrs

from saekit import Entry, Ports, PretrainedSAE, SAEFiles, Sites, hookimpl
from saekit.config import check
from saekit.errors import SAEFormatError
from saekit_plugins.loaders.reading import beside, found_files, named, options, site, text

_PATTERN = r"W_enc_\d+\.safetensors"


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
        read = {f"W_enc_{layer}": "W_enc.T", f"b_enc_{layer}": "b_enc", f"b_dec_{layer}": "b_dec"}
        tensors = named(files.tensors(encoder), read, where)
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
        hooks = [text(config, f"feature_{end}_hook", f"{said} in {files.place}") for end in ("input", "output")]
        source = site(f"blocks.{layer}.{hooks[0] or 'hook_resid_mid'}", where)
        targets = [site(f"blocks.{n}.{hooks[1] or 'hook_mlp_out'}", where) for n in range(layer, layer + layers)]
        sites = Sites((source,), tuple(targets))
        model = text(config, "model_name", f"{said} in {files.place}")
        return PretrainedSAE(
            architecture="saekit:transcoder",
            options=options(tensors, apply_b_dec_to_input=False, activation="saekit:relu", skip_connection=False),
            tensors=tensors,
            sites=sites,
            ports=Ports.of(sites, {source: tensors["W_enc"].shape[0], **dict.fromkeys(targets, width)}),
            metadata={
                **({} if model is None else {"model_name": model}),
                "prepend_bos": True,
                "model_from_pretrained_kwargs": {"fold_ln": False},
            },
            defaulted=[
                f"feature_{end}_hook" for end, hook in zip(("input", "output"), hooks, strict=True) if hook is None
            ],
        )

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


class _OtherName(MntssLoader):
    """Detects nothing: two names of one loader would be equally sure."""

    def detects(self, files: SAEFiles) -> float:
        return 0.0


def _decoder(encoder: str) -> str:
    """The name of the file of decoders."""
    return encoder.rpartition("/")[2].replace("W_enc_", "W_dec_")


@hookimpl
def saekit_register_pretrained_loaders() -> Iterable[Entry]:
    summary = "layers of cross-layer transcoders (W_enc_4.safetensors, W_dec_4.safetensors)"
    yield Entry("mntss", MntssConfig, f"{__name__}:MntssLoader", summary=summary)
    other = "another name of mntss, which sae-lens's registry uses"
    yield Entry("mntss_clt_layer_transcoder", MntssCltLayerConfig, f"{__name__}:_OtherName", summary=other)
