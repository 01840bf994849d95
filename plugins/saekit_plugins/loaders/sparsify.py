"""Pretrained loader ``sparsify``: SAEs and transcoders of EleutherAI's sparsify, ``HOOKPOINT/sae.safetensors``."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs

from saekit import Entry, Ports, PretrainedSAE, SAEFiles, Site, Sites, hookimpl
from saekit.errors import SAEFormatError
from saekit_plugins.loaders.reading import (
    OneOfSeveral,
    beside,
    found_files,
    missing_beside,
    named,
    one_file,
    options,
    path_of,
    peeked,
    text,
    whole_number,
)  # fmt: skip
from saekit_plugins.loaders.writing import as_theirs, checked, kept, one_site, told, write_json, write_tensors

if TYPE_CHECKING:
    from torch import Tensor

    from saekit import SAE

_PATTERN = r"sae\.safetensors"
_NAMES = {"encoder.weight": "W_enc.T", "encoder.bias": "b_enc", "W_dec": "W_dec", "b_dec": "b_dec"}
_FLAGS = ("transcode", "skip_connection", "multi_topk", "normalize_decoder", "signed")
_HOOK_POINT = re.compile(r"/(?:layers|h|blocks)\.(\d+)(?:\.([a-z_]+))?(?:/seed\d+)?/sae\.safetensors$")
_EMBEDDING = re.compile(r"/(?:embed_tokens|wte|embed_in)(?:/seed\d+)?/sae\.safetensors$")
_WRITTEN: Mapping[str | None, str] = {
    None: "hook_resid_post",
    "mlp": "hook_mlp_out",
    "attn": "hook_attn_out",
    "self_attn": "hook_attn_out",
    "attention": "hook_attn_out",
}
_READ: Mapping[str | None, str] = {None: "hook_resid_pre", "mlp": "mlp.hook_in"}


@attrs.frozen(kw_only=True)
class SparsifyConfig(OneOfSeveral):
    """Which of the hook points."""


class SparsifyLoader:
    """Reads ``cfg.json`` and ``sae.safetensors``, and what the ``config.json`` above them says of the model."""

    def __init__(self, config: SparsifyConfig) -> None:
        self._sae = config.sae

    def detects(self, files: SAEFiles) -> float:
        for name in found_files(files, _PATTERN):
            if (config := beside(files, name, "cfg.json")) is not None:
                return 1.0 if {"k", "d_in"} <= peeked(files, config).keys() else 0.5
        return 0.0

    def missing_part(self, files: SAEFiles) -> str | None:
        return missing_beside(
            files, r"cfg\.json", "sae.safetensors", keys=("d_in", "k", "expansion_factor")
        ) or missing_beside(files, _PATTERN, "cfg.json")

    def load(self, files: SAEFiles) -> PretrainedSAE:
        name = one_file(files, _PATTERN, self._sae, "sparsify")
        folder = name.removesuffix("sae.safetensors")
        where = f"{folder}cfg.json in {files.place}"
        config = files.json(f"{folder}cfg.json")
        (d_in, d_sae, k), kind = _sizes(config, where), text(config, "activation", where) or "topk"
        transcodes, skips = config.get("transcode") is True, config.get("skip_connection") is True
        names = _NAMES | ({"W_skip": "W_skip"} if skips else {})
        tensors = named(files.tensors(name), names, f"{name} in {files.place}")
        if list(tensors["W_enc"].shape) != [d_in, d_sae]:
            raise SAEFormatError(
                f"encoder.weight of {name} in {files.place} has shape {list(tensors['W_enc'].T.shape)}, and {where} "
                f"says {[d_sae, d_in]}"
            )
        own, found = told(config, where), _site(path_of(files, name), _WRITTEN)
        metadata = _metadata(files, folder) if own is None else own
        centered = not (transcodes or skips)
        options_ = options(tensors, apply_b_dec_to_input=centered, k=k, rescale_acts_by_decoder_norm=False)
        if centered:
            return PretrainedSAE(
                architecture=f"saekit:{kind}", options=options_, tensors=tensors, site=found, metadata=metadata,
                renamed=_NAMES,
            )  # fmt: skip
        place = _ports(path_of(files, name), tensors)
        if not transcodes:
            tensors, place = _bias_for_what_is_read(tensors), _same(found, d_in)
        return PretrainedSAE(
            architecture=f"saekit:{kind}_transcoder",
            options=options_ | {"skip_connection": skips},
            tensors=tensors,
            **place,
            metadata=metadata,
            renamed=_NAMES,
        )

    def write_sae(self, sae: SAE, folder: Path) -> None:
        tensors, transcodes = checked(sae, "sparsify", _WRITTEN_AS), not sae.ports.same
        if not transcodes and not sae.config.apply_b_dec_to_input:
            raise SAEFormatError("sparsify has no place for apply_b_dec_to_input = false in an SAE")
        hook_point = _hook_point(sae)
        own, said = folder / hook_point, sae.info.metadata
        skips, options_ = "W_skip" in tensors, sae.saved_options()
        kind = sae.info.architecture.removeprefix("saekit:").removesuffix("_transcoder")
        config = {
            "activation": kind, "expansion_factor": max(sae.d_sae // sae.d_in, 1), "normalize_decoder": False,
            "num_latents": sae.d_sae, "k": options_["k"], "multi_topk": False, "skip_connection": skips,
            "transcode": transcodes, "d_in": sae.d_in,
        }  # fmt: skip
        run = {
            "model": said.get("model_name"),
            "dataset": said.get("dataset_path"),
            "ctx_len": said.get("context_size"),
        }
        write_tensors(own / "sae.safetensors", as_theirs(tensors, _NAMES | ({"W_skip": "W_skip"} if skips else {})))
        write_json(own / "cfg.json", config | kept(sae))
        if hook_point:
            write_json(folder / "config.json", {name: value for name, value in run.items() if value is not None})


# ---- writing

_WRITTEN_AS = ("saekit:topk", "saekit:groupmax", "saekit:topk_transcoder", "saekit:groupmax_transcoder")
_NAME = re.compile(r"[\w.-]+(/seed\d+)?", re.ASCII)
_MODULES: Mapping[str, str] = {"hook_resid_post": "", "hook_mlp_out": ".mlp", "hook_attn_out": ".self_attn"}
_FROM: Mapping[str, str] = {"hook_resid_post": "hook_resid_pre", "hook_mlp_out": "mlp.hook_in"}


def _hook_point(sae: SAE) -> str:
    """The module whose output is written, as the name of a folder; "" where no site is known."""
    if sae.ports.same:
        read = written = one_site(sae, "sparsify")
    else:
        if len(sae.ports.inputs) + len(sae.ports.targets) > 2 or sae.d_out != sae.d_in:
            raise SAEFormatError(
                f"sparsify has no place for {len(sae.ports.inputs)} inputs of width {sae.d_in} and "
                f"{len(sae.ports.targets)} targets of width {sae.d_out}; it has for one of each, of one width"
            )
        sites = sae.info.sites
        read, written = (None, None) if sites is None else (sites.inputs[0], sites.targets[0])
    if read is None or written is None:
        return ""
    known = sae.info.metadata.get("hf_hook_name")
    if written.name == "hook_embed" and sae.ports.same:
        return "embed_tokens"
    said = re.fullmatch(r"(blocks\.(\d+)\.)(\w+)", written.name)
    wanted = f"{said[1]}{_FROM.get(said[3])}" if said else ""
    if said is None or said[3] not in _MODULES or (not sae.ports.same and read.name != wanted):
        raise SAEFormatError(
            f"sparsify has no place for what reads {read.name} and writes {written.name}; it has for outputs of "
            "blocks, MLPs and attention (hook_resid_post, hook_mlp_out, hook_attn_out), and for whole blocks and MLPs"
        )
    if isinstance(known, str) and _NAME.fullmatch(known) and _site(f"/{known}/sae.safetensors", _WRITTEN) == written:
        return known  # as its files had it
    return f"layers.{said[2]}{_MODULES[said[3]]}"


# ---- reading


def _sizes(config: Mapping[str, Any], where: str) -> tuple[int, int, int]:
    """d_in, d_sae and k, of a file of which nothing says what saekit does not do."""
    for name in _FLAGS:
        if not isinstance(config.get(name, False), bool):
            raise SAEFormatError(f"{name} in {where} is {config[name]!r}, expected true or false")
    activation = text(config, "activation", where) or "topk"
    if activation not in ("topk", "groupmax"):
        raise SAEFormatError(
            f"activation in {where} is {activation!r}, which this loader cannot read; it reads 'topk' and 'groupmax'"
        )
    if config.get("signed"):
        raise SAEFormatError(f"signed in {where} is true, and this loader reads no features below 0")
    d_in = whole_number(config, "d_in", where)
    if config.get("num_latents") in (0, None):
        d_sae = d_in * whole_number(config, "expansion_factor", where)
    else:
        d_sae = whole_number(config, "num_latents", where)
    k = whole_number(config, "k", where, most=d_sae)
    if activation == "groupmax" and d_sae % k:
        raise SAEFormatError(f"k in {where} is {k}, and {d_sae} latents are not so many groups of one size")
    return d_in, d_sae, k


def _site(path: str, hooks: Mapping[str | None, str]) -> Site | None:
    """That of the hook point in ``path``, as far as it is known."""
    if _EMBEDDING.search(path) and hooks is _WRITTEN:
        return Site(hook_name="hook_embed")
    said = _HOOK_POINT.search(path)
    if said is None or said[2] not in hooks:
        return None
    return Site(hook_name=f"blocks.{int(said[1])}.{hooks[said[2]]}")


def _ports(path: str, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """From the input of the module to its output."""
    read, written = _site(path, _READ), _site(path, _WRITTEN)
    known = read is not None and written is not None
    names = (read.name, written.name) if read is not None and written is not None else ("input", "output")
    ports = Ports({names[0]: tensors["W_enc"].shape[0]}, {names[1]: tensors["W_dec"].shape[1]})
    return {"ports": ports, "sites": Sites((read,), (written,)) if known and read and written else None}


def _same(site: Site | None, width: int) -> dict[str, Any]:
    """Of a skip connection around an SAE: what is written is what is read."""
    port = {"input" if site is None else site.name: width}
    return {"ports": Ports(port, port), "sites": None if site is None else Sites.one(site)}


def _bias_for_what_is_read(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """With the encoder's bias for inputs from which no ``b_dec`` is taken: ``b_enc - b_dec W_enc``.

    A bias that is rounded to half of a float32 would be another, so all are at least float32.
    """
    import torch

    wide = {name: value if value.dtype == torch.float64 else value.float() for name, value in tensors.items()}
    shift = wide["b_dec"].double() @ wide["W_enc"].double()
    return wide | {"b_enc": (wide["b_enc"].double() - shift).to(wide["b_enc"].dtype)}


def _metadata(files: SAEFiles, folder: str) -> dict[str, Any]:
    """What the run says of its model and text, in the folder of the hook points."""
    above = folder.rstrip("/")
    hook_point = above.rpartition("/")[2] if not above.rpartition("/")[2].startswith("seed") else above
    metadata: dict[str, Any] = {"hf_hook_name": hook_point} if above else {}
    while above:
        above = above.rpartition("/")[0]
        name = f"{above}/config.json" if above else "config.json"
        if name in files.names:
            config, where = files.json(name), f"{name} in {files.place}"
            found = {"model_name": text(config, "model", where), "dataset_path": text(config, "dataset", where)}
            if "ctx_len" in config:
                metadata["context_size"] = whole_number(config, "ctx_len", where)
            return metadata | {key: value for key, value in found.items() if value is not None}
    return metadata


@hookimpl
def saekit_register_pretrained_loaders() -> Iterable[Entry]:
    summary = "SAEs and transcoders of sparsify (HOOKPOINT/sae.safetensors)"
    yield Entry("sparsify", SparsifyConfig, f"{__name__}:SparsifyLoader", summary=summary)
