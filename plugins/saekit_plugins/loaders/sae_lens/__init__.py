"""Pretrained loader ``sae_lens``: the folders that sae-lens 2 to 6 write, training checkpoints of 6 among them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import attrs

from saekit import Entry, Ports, PretrainedSAE, SAEFiles, Site, Sites, hookimpl
from saekit.config import check
from saekit.errors import SAEFormatError
from saekit_plugins.loaders.reading import OneOfSeveral, beside, found_files, missing_beside, one_file
from saekit_plugins.loaders.sae_lens.architectures import architecture_of, with_training
from saekit_plugins.loaders.sae_lens.config import RENAMED, FoundConfig, read_config

if TYPE_CHECKING:
    from torch import Tensor

    from saekit import SAE
    from saekit.converted import ConvertedConfig

CONFIG, WEIGHTS, SPARSITY, SCALER = (
    "cfg.json", "sae_weights.safetensors", "sparsity.safetensors", "activation_scaler.json",
)  # fmt: skip

_PATTERN = r"sae_weights\.safetensors"
_FINE_TUNED = "finetuning_scaling_factor"


@attrs.frozen(kw_only=True)
class SaeLensConfig(OneOfSeveral):
    """What the files may not say.  A folder may have an SAE in each of its folders, as groups of 2.x do."""

    activation_scale: float | None = attrs.field(default=None, validator=check(lambda value: value > 0, "above 0"))
    """What activations were multiplied by in training, for SAEs that were trained on scaled ones and whose files do not
    say by how much.  It is folded into the weights."""
    normalize_activations: Literal["expected_average_only_in", "constant_norm_rescale", "layer_norm"] | None = None
    """What activations went through in training, where the files do not say so or say `none`."""
    hook_name: str | None = None
    """The hook that is read, where the files do not name it: those of sae-lens 6 need not."""


class SaeLensLoader:
    """Reads ``cfg.json``, ``sae_weights.safetensors`` and, where they are there, ``sparsity.safetensors`` and, of
    training checkpoints, ``activation_scaler.json``."""

    def __init__(self, config: SaeLensConfig) -> None:
        self._sae, self._scale, self._normalized = config.sae, config.activation_scale, config.normalize_activations
        self._hook_name = config.hook_name

    def detects(self, files: SAEFiles) -> float:
        if {CONFIG, WEIGHTS} <= files.names:
            return float(files.chosen in ("", WEIGHTS))
        return 0.8 if any(beside(files, name, CONFIG) for name in found_files(files, _PATTERN)) else 0.0

    def missing_part(self, files: SAEFiles) -> str | None:
        return missing_beside(files, r"cfg\.json", WEIGHTS, keys=("d_in", "d_sae")) or missing_beside(
            files, _PATTERN, CONFIG
        )

    def load(self, files: SAEFiles) -> PretrainedSAE:
        if not files.chosen and (self._sae is not None or not {CONFIG, WEIGHTS} & files.names):
            folder = one_file(files, _PATTERN, self._sae, "sae_lens").rpartition("/")[0]
            files = files.within(folder) if folder else files
        files.fetch(CONFIG, WEIGHTS, SPARSITY, SCALER)
        sparsity = None
        if SPARSITY in files.names:
            sparsity = files.tensors(SPARSITY, only=("sparsity",), minus_infinity=True)["sparsity"]
        saved = _saved_scale(files) if SCALER in files.names else None
        config = files.json(CONFIG)
        if (said := files.said("normalize_activations")) is not None:
            config["normalize_activations"] = said
        return self.read(config, files.tensors(WEIGHTS), f"{CONFIG} in {files.place}", sparsity=sparsity, saved=saved)

    def write_sae(self, sae: SAE, folder: Path) -> None:
        """saekit's own folder, which sae-lens 6 reads where it has the architecture."""
        sae.export(folder, format="saekit")
        if json.loads((folder / CONFIG).read_text(encoding="utf-8"))["architecture"] == sae.info.architecture:
            raise SAEFormatError(f"sae_lens has no place for this {sae.info.architecture}: sae-lens 6 has none like it")

    def convert_config(self, table: Mapping[str, Any]) -> ConvertedConfig | None:
        """Those of runs of sae-lens 2 to 6."""
        from saekit_plugins.loaders.sae_lens.run_configs import convert

        return convert(table)

    def read(
        self,
        raw: Mapping[str, Any],
        tensors: Mapping[str, Tensor],
        place: str,
        *,
        sparsity: Tensor | None = None,
        saved: float | None = None,
    ) -> PretrainedSAE:
        """What the contents of the files say: of ``cfg.json``, the weights, and the scaler's factor."""
        config = read_config(raw, place, self._normalized, self._hook_name)
        if config.flat.get(_FINE_TUNED) is True and _FINE_TUNED not in tensors:
            raise SAEFormatError(f"{place} says {_FINE_TUNED}, and the weights beside it hold no such tensor")
        architecture = architecture_of(config, _with_one_factor(dict(tensors)), place)
        defaulted = [*config.defaulted, *architecture.defaulted]
        options = with_training(config, architecture)
        return PretrainedSAE(
            architecture=architecture.key,
            options=options,
            tensors=architecture.tensors,
            **_place_of(config, architecture.d_out),
            log_sparsity=sparsity,
            activation_scale=self._activation_scale(config, place, saved),
            input_transform=config.input_transform,
            metadata={
                **config.metadata,
                **_hook_alone(config, architecture.d_out),
                **_other_units(config, options),
                **_defaulted(defaulted),
            },
            renamed={theirs: ours for theirs, ours in RENAMED.items() if theirs in raw},
        )

    def _activation_scale(self, config: FoundConfig, place: str, saved: float | None) -> float | None:
        """The factor of a training checkpoint, or the one that the user knows."""
        if not config.scaled:
            if saved is not None or self._scale is not None:
                said = f"{SCALER} says" if saved is not None else "activation_scale is"
                raise SAEFormatError(
                    f"{place} says that activations were not scaled, and {said} "
                    f"{saved or self._scale}: only one of them can be right"
                )
            return 1.0
        if saved is not None and self._scale is not None and saved != self._scale:
            where = place.removeprefix(f"{CONFIG} in ")
            raise SAEFormatError(
                f"activation_scale is {self._scale}, but {SCALER} in {where} says {saved}; leave the option out"
            )
        return self._scale if saved is None else saved


def _place_of(config: FoundConfig, d_out: int | None) -> dict[str, Any]:
    """Its site, or of a transcoder those that it reads and writes; either may be named nowhere."""
    if d_out is None:
        return {"site": config.site}
    read, written = config.site or Site(hook_name="input"), config.target or Site(hook_name="output")
    known = config.site is not None and config.target is not None
    return {
        "sites": Sites((read,), (written,)) if known else None,
        "ports": Ports({read.name: config.d_in}, {written.name: d_out}),
    }


def _hook_alone(config: FoundConfig, d_out: int | None) -> dict[str, Any]:
    """What a transcoder reads, where nothing names what it writes: there are no sites then, and this is not lost."""
    if d_out is None or config.target is not None or config.site is None:
        return {}
    head = config.site.hook_head_index
    return {"hook_name": config.site.hook_name, **({} if head is None else {"hook_head_index": head})}


def _other_units(config: FoundConfig, options: Mapping[str, Any]) -> dict[str, Any]:
    """A coefficient of flat files that is none here, for it is of another sum of errors."""
    name = "l1_coefficient"
    return {name: config.flat[name]} if name in config.flat and not {name, "l0_coefficient"} & options.keys() else {}


def _saved_scale(files: SAEFiles) -> float | None:
    scale = files.json(SCALER).get("scaling_factor")
    if scale is None:
        return None
    if isinstance(scale, bool) or not isinstance(scale, int | float) or not 0 < scale < float("inf"):
        raise SAEFormatError(
            f"scaling_factor in {SCALER} of {files.place} is {scale!r}, expected a number above 0, or null"
        )
    return float(scale)


def _defaulted(names: list[str]) -> Mapping[str, Any]:
    return {"defaulted": names} if names else {}


def _with_one_factor(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """With a ``scaling_factor`` only where it does something."""
    for name in ("scaling_factor", _FINE_TUNED):  # of 2.x, and of 3 to 5
        factor = tensors.pop(name, None)
        if factor is not None and not bool((factor == 1).all()):
            tensors["scaling_factor"] = factor
    return tensors


@hookimpl
def saekit_register_pretrained_loaders() -> Iterable[Entry]:
    yield Entry("sae_lens", SaeLensConfig, _build, summary="folders of sae-lens 2 to 6 (cfg.json, safetensors)")


def _build(config: SaeLensConfig) -> SaeLensLoader:
    return SaeLensLoader(config)
