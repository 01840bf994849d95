"""Pretrained loader ``mwhanna``: per-layer transcoders of the Qwen3 models, ``layer_6.safetensors``.

``circuit-tracer`` reads sets of these.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs

from saekit import Entry, Ports, PretrainedSAE, SAEFiles, Sites, hookimpl
from saekit.errors import SAEFormatError
from saekit_plugins.loaders.reading import (
    OneOfSeveral,
    OtherName,
    beside,
    fed,
    found_files,
    layer_of,
    named,
    one_file,
    options,
    path_of,
    site,
    text,
    whole_number,
)  # fmt: skip
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

_PATTERN = r"layer_\d+\.safetensors"
_NAMES = {"W_enc": "W_enc.T", "b_enc": "b_enc", "W_dec": "W_dec", "b_dec": "b_dec"}
_HOOKS = {"feature_input_hook": "mlp.hook_in", "feature_output_hook": "hook_mlp_out"}
_DEFAULTS: Mapping[str, Any] = {
    "prepend_bos": True, "dataset_path": "monology/pile-uncopyrighted",
    "model_class_name": "HookedTransformer", "model_from_pretrained_kwargs": {"fold_ln": False},
}  # fmt: skip
_MODEL = re.compile(r"qwen3-(\d+(?:\.\d+)?)b(?![a-z0-9])", re.IGNORECASE)  # in the repository's name
_RUNS = ("wandb-config.yaml", "wanb-config.yaml")  # the second as it is spelled in one repository


@attrs.frozen(kw_only=True)
class MwhannaConfig(OneOfSeveral):
    """Which layer."""


@attrs.frozen(kw_only=True)
class MwhannaTranscoderConfig(MwhannaConfig):
    """The same, by the name that sae-lens's registry gives it."""


class MwhannaLoader:
    """ReLU, from what an MLP reads to what it writes, of a model whose norms are not folded into its weights."""

    def __init__(self, config: MwhannaConfig) -> None:
        self._sae = config.sae

    def detects(self, files: SAEFiles) -> float:
        names = found_files(files, _PATTERN)
        if not names:
            return 0.0
        return 0.9 if beside(files, names[0], *_RUNS, "config.yaml") else 0.5

    def load(self, files: SAEFiles) -> PretrainedSAE:
        name = one_file(files, _PATTERN, self._sae, "mwhanna")
        where = f"{name} in {files.place}"
        state = files.tensors(name)
        skips = "W_skip" in state  # [d_out, d_in], as others write this layout
        tensors = named(state, _NAMES | ({"W_skip": "W_skip"} if skips else {}), where)
        run, config = _table(files, beside(files, name, *_RUNS)), _table(files, beside(files, name, "config.yaml"))
        _check_sizes(run, list(tensors["W_enc"].shape), where)
        layer = layer_of(name)
        said = f"config.yaml beside {where}"
        hooks = fed({name: text(config, name, said) for name in _HOOKS}, _HOOKS)
        read, written = (site(f"blocks.{layer}.{hooks['metadata'][name]}", where) for name in _HOOKS)
        own = told(config, said)
        others: dict[str, Any] = {"metadata": own, "defaulted": []}
        if own is None:
            others = _fed(run, config, where, path_of(files, name))
        ports = Ports({read.name: tensors["W_enc"].shape[0]}, {written.name: tensors["W_dec"].shape[1]})
        return PretrainedSAE(
            architecture="saekit:transcoder",
            options=options(tensors, apply_b_dec_to_input=False, activation="saekit:relu", skip_connection=skips),
            tensors=tensors,
            sites=Sites((read,), (written,)),
            ports=ports,
            metadata=others["metadata"],
            defaulted=[*hooks["defaulted"], *others["defaulted"]],
            renamed=_NAMES | ({"batch_size": "context_size"} if "batch_size" in run else {}),
        )

    def write_sae(self, sae: SAE, folder: Path) -> None:
        tensors, sites = checked(sae, "mwhanna", ("saekit:transcoder",)), sae.info.sites
        if sites is None or len(sites.inputs) + len(sites.targets) > 2:
            found = "no sites" if sites is None else f"the sites {sites.name}"
            raise SAEFormatError(
                f"mwhanna has no place for {found}; it has for one that is read and one that is written"
            )
        (layer, read), (written_in, written) = (in_layer(at[0], "mwhanna") for at in (sites.inputs, sites.targets))
        if written_in != layer:
            raise SAEFormatError(f"mwhanna has no place for what reads layer {layer} and writes layer {written_in}")
        said = sae.info.metadata
        run = {"d_model": sae.d_in, "d_feature": sae.d_sae, "batch_size": said.get("context_size")}
        config = {
            "model_kind": "transcoder_set", "feature_input_hook": read, "feature_output_hook": written,
            "model_name": said.get("model_name"), **kept(sae, FED),
        }  # fmt: skip
        skip = {"W_skip": "W_skip"} if "W_skip" in tensors else {}
        write_tensors(folder / f"layer_{layer}.safetensors", as_theirs(tensors, _NAMES | skip))
        write_yaml(folder / "config.yaml", {name: value for name, value in config.items() if value is not None})
        of_run = {name: {"value": value} for name, value in run.items() if value is not None}
        write_yaml(folder / _RUNS[0], of_run)


class _OtherName(OtherName, MwhannaLoader):
    """The same, by another name."""


def _table(files: SAEFiles, name: str | None) -> Mapping[str, Any]:
    return {} if name is None else files.yaml(name)


def _value(run: Mapping[str, Any], name: str) -> Any:
    """Of a field as W&B writes them: a table with a value."""
    field = run.get(name)
    return field.get("value") if isinstance(field, dict) else field


def _check_sizes(run: Mapping[str, Any], found: list[int], where: str) -> None:
    """Against what the run says of itself."""
    for name, size in zip(("d_model", "d_feature"), found, strict=True):
        said = _value(run, name)
        if said is not None and said != size:
            raise SAEFormatError(f"{name} beside {where} is {said!r}, and the encoder there is for {size}")


def _fed(run: Mapping[str, Any], config: Mapping[str, Any], where: str, path: str) -> dict[str, Any]:
    found: dict[str, Any] = {"model_name": text(config, "model_name", f"config.yaml beside {where}")}
    if found["model_name"] is None and (said := _MODEL.search(path)) is not None:  # one repository has no config.yaml
        found["model_name"] = f"Qwen/Qwen3-{said[1]}B"
    if (rows := _value(run, "batch_size")) is not None:  # of one text each
        found["context_size"] = whole_number({"batch_size": rows}, "batch_size", f"the YAML beside {where}")
    return fed(found, _DEFAULTS)


@hookimpl
def saekit_register_pretrained_loaders() -> Iterable[Entry]:
    summary = "per-layer transcoders (layer_6.safetensors, config.yaml)"
    yield Entry("mwhanna", MwhannaConfig, f"{__name__}:MwhannaLoader", summary=summary)
    other = "another name of mwhanna, which sae-lens's registry uses"
    yield Entry("mwhanna_transcoder", MwhannaTranscoderConfig, f"{__name__}:_OtherName", summary=other)
