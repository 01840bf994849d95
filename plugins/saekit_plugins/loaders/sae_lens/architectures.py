"""From the names of sae-lens's architectures to saekit's, with what becomes of options and tensors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import attrs

from saekit import load_config
from saekit.errors import ConfigError, SAEFormatError
from saekit_plugins.loaders.sae_lens.config import FoundConfig
from saekit_plugins.loaders.sae_lens.others import OTHERS

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Found", "architecture_of", "with_training"]

_READ = (
    "standard, topk, abstopk, jumprelu, batchtopk, matryoshka_batchtopk, gated, matching_pursuit, temporal, and "
    "transcoders"
)
_MATRYOSHKA = "matryoshka_batchtopk"
_ALIKE = (
    "mse_loss_normalization", "noise_scale", "use_ghost_grads", "b_dec_init_method", "decoder_heuristic_init",
    "decoder_orthogonal_init", "init_encoder_as_decoder_transpose",
)  # fmt: skip
_TRAINED = frozenset(_ALIKE) | {
    "l1_coefficient", "lp_norm", "l1_warm_up_steps", "scale_sparsity_penalty_by_decoder_norm", "bandwidth",
    "initial_threshold", "tanh_scale", "ste_to_input", "l0_coefficient", "l0_warm_up_steps", "target_l0",
    "pre_act_loss_coefficient", "sparsity_loss", "aux_loss_coefficient", "aux_loss_normalization", "threshold_lr",
    "aux_loss_levels", "level_loss",
}  # fmt: skip
"""Options here that count in training alone."""
_K = 32.0  # of a batchtopk whose file does not say: only training asks for it


@attrs.frozen
class Found:
    """An architecture of saekit, and what it needs."""

    key: str
    options: Mapping[str, Any]
    tensors: Mapping[str, Tensor]
    defaulted: tuple[str, ...] = ()
    d_out: int | None = None
    """The width of the site that it writes, where that is another than it reads."""


def architecture_of(config: FoundConfig, tensors: dict[str, Tensor], place: str) -> Found:
    """Which of saekit's architectures ``config`` and ``tensors`` are; :class:`SAEFormatError` if it has none."""
    name = config.architecture
    if name == "standard" and config.activation != "topk":  # 4 and 5 may call a topk that
        return Found("saekit:standard", {"activation": config.activation, **_standard_options(config)}, tensors)
    if name in ("standard", "topk", "abstopk"):
        return _topk(config, tensors, place)
    if name in OTHERS:
        return Found(*OTHERS[name](config, place), tensors)
    if name == "jumprelu":
        return _jumprelu(config, tensors, place)
    if name in ("batchtopk", "matryoshka_batchtopk"):
        return _batchtopk(config, tensors, place)
    if name == "gated":
        return _gated(config, tensors, place)
    if name in _TRANSCODERS:
        return _transcoder(config, tensors, place)
    raise SAEFormatError(f"architecture in {place} is {name!r}; this loader reads {_READ}")


def _said(config: FoundConfig) -> dict[str, Any]:
    """Options of training: of 6 those of a checkpoint, or, of what is for inference, of the details in its metadata."""
    return {**config.flat.get("training_architecture_details", {}), **config.flat}


def _standard_options(config: FoundConfig) -> dict[str, Any]:
    """How it was trained, where that is said: so it would train on.  6 weighs its penalty by norms in any case."""
    said, weighed = _said(config), "scale_sparsity_penalty_by_decoder_norm"
    options = _penalty(config, said, "l1_coefficient", "lp_norm", "l1_warm_up_steps")
    if config.version >= 6 and "l1_coefficient" in said:
        options[weighed] = True
    return options | ({weighed: said[weighed]} if weighed in said else {})


def _penalty(config: FoundConfig, said: Mapping[str, Any], *names: str) -> dict[str, Any]:
    """Those of ``names`` that are said; a coefficient only where it is one of a sum of squared errors, as since 3."""
    alike = config.version >= 3 and said.get("mse_loss_normalization", "none") == "none"
    return {name: said[name] for name in names if said.get(name) is not None and (alike or name != "l1_coefficient")}


def with_training(config: FoundConfig, found: Found) -> dict[str, Any]:
    """All its options, with those of training that 3 to 5 state by the same names; what cannot be so here is left out.

    None of training decides how weights are used: an SAE is loaded all the same.
    """
    options = {
        "d_in": config.d_in,
        "d_sae": config.d_sae,
        "apply_b_dec_to_input": config.apply_b_dec_to_input,
        "normalize_sae_decoder": False,
        **found.options,
    }
    if config.version < 6:
        options |= {name: config.flat[name] for name in _ALIKE if name in config.flat}
        options |= {"mse_loss_normalization": "none"} if "mse_loss_normalization" in config.nulls else {}
    if _is_accepted(found.key, options):
        return options
    kept = {name: value for name, value in options.items() if name not in _TRAINED}
    for name in _TRAINED & options.keys():
        if _is_accepted(found.key, kept | {name: options[name]}):
            kept[name] = options[name]
    return {name: kept[name] for name in options if name in kept}


def _is_accepted(key: str, options: Mapping[str, Any]) -> bool:
    try:
        load_config({"sae": {"name": key, **options}})
    except ConfigError:
        return False
    return True


def _topk(config: FoundConfig, tensors: dict[str, Tensor], place: str) -> Found:
    k = config.flat.get("k", config.flat.get("activation_fn_kwargs", {}).get("k"))
    if isinstance(k, bool) or not isinstance(k, int | float) or k != k // 1 or not 1 <= k <= config.d_sae:
        where = "k (or activation_fn_kwargs.k)"
        raise SAEFormatError(f"{where} in {place} is {k!r}, expected a whole number from 1 to d_sae = {config.d_sae}")
    key = "saekit:abstopk" if config.architecture == "abstopk" else "saekit:topk"
    return Found(key, {"k": int(k), **_rescale(config), **_auxk(_said(config))}, tensors)


def _rescale(config: FoundConfig) -> dict[str, bool]:
    """Before 6, and in its first versions, there is no such option, and norms do not count."""
    return {"rescale_acts_by_decoder_norm": config.flat.get("rescale_acts_by_decoder_norm", False)}


def _jumprelu(config: FoundConfig, tensors: dict[str, Tensor], place: str) -> Found:
    """A jumprelu, or a batchtopk, matryoshka or not, as it is used: features above one threshold, norms folded."""
    threshold = _thresholds(config, tensors, place)
    trained_as = str(config.flat.get("training_architecture", ""))
    one = bool((threshold == threshold[0]).all())
    if trained_as == "jumprelu" or "jumprelu_bandwidth" in config.flat or not one:
        return Found("saekit:jumprelu", _jumprelu_options(config), tensors)
    details = config.flat.get("training_architecture_details", {})
    k, defaulted = _k(details.get("k"), config, place)
    options = {"k": k, "rescale_acts_by_decoder_norm": False, **_auxk(details)}
    if trained_as == _MATRYOSHKA and details.get("matryoshka_widths"):
        return Found("saekit:matryoshka", options | _matryoshka_options(details, config, place), tensors, defaulted)
    return Found("saekit:batchtopk", options, tensors, defaulted)


def _thresholds(config: FoundConfig, tensors: dict[str, Tensor], place: str) -> Tensor:
    """``[d_sae]``, in the place of their logarithms, which training checkpoints of the first 6 hold."""
    if (logarithm := tensors.pop("log_threshold", None)) is not None:
        tensors["threshold"] = logarithm.exp()
    threshold = tensors.get("threshold")
    if threshold is None:
        raise SAEFormatError(f"{place} says {config.architecture!r}, but the weights beside it hold no threshold")
    if list(threshold.shape) != [config.d_sae]:
        raise SAEFormatError(f"threshold beside {place} has shape {list(threshold.shape)}, expected {[config.d_sae]}")
    return threshold


_JUMPRELU = {
    "jumprelu_bandwidth": "bandwidth",
    "jumprelu_init_threshold": "initial_threshold",
    "jumprelu_tanh_scale": "tanh_scale",
    "jumprelu_ste_to_input": "ste_to_input",
    "l0_coefficient": "l0_coefficient",
    "l0_warm_up_steps": "l0_warm_up_steps",
    "pre_act_loss_coefficient": "pre_act_loss_coefficient",
    "target_l0": "target_l0",
}
_SPARSITY_LOSSES = {"step": "l0", "quadratic": "target_l0", "tanh": "tanh"}


def _jumprelu_options(config: FoundConfig) -> dict[str, Any]:
    """How it was trained, where that is said: so it would train on.  sae-lens has no AuxK."""
    said = _said(config)
    if "jumprelu_bandwidth" not in said:
        return {}
    options = {ours: said[theirs] for theirs, ours in _JUMPRELU.items() if said.get(theirs) is not None}
    loss = _SPARSITY_LOSSES.get(str(said.get("jumprelu_sparsity_loss_mode")), "l0")
    for name, of_loss in (("target_l0", "target_l0"), ("tanh_scale", "tanh")):
        if loss != of_loss:
            options.pop(name, None)
    return options | {"sparsity_loss": loss, "aux_loss_coefficient": 0.0}


_TRANSCODERS = {
    "transcoder": ("saekit:transcoder", False),
    "skip_transcoder": ("saekit:transcoder", True),
    "jumprelu_transcoder": ("saekit:jumprelu_transcoder", False),
    "jumprelu_skip_transcoder": ("saekit:jumprelu_transcoder", True),
}
"""saekit's architecture, and whether it has a skip connection."""


def _transcoder(config: FoundConfig, tensors: dict[str, Tensor], place: str) -> Found:
    d_out = config.flat.get("d_out")
    if type(d_out) is not int or d_out < 1:
        raise SAEFormatError(f"d_out in {place} is {d_out!r}, expected a whole number above 0")
    if config.apply_b_dec_to_input:
        raise SAEFormatError(f"apply_b_dec_to_input in {place} is true or missing, and no transcoder does that")
    key, skip = _TRANSCODERS[config.architecture]
    if "jumprelu" in key:
        _thresholds(config, tensors, place)
    return Found(key, {"skip_connection": skip}, tensors, d_out=d_out)


def _batchtopk(config: FoundConfig, tensors: dict[str, Tensor], place: str) -> Found:
    """A training checkpoint: norms are not folded, and the threshold is one number."""
    threshold = tensors.pop("topk_threshold", None)
    if threshold is None or threshold.numel() != 1:
        found = "none" if threshold is None else f"shape {list(threshold.shape)}"
        raise SAEFormatError(
            f"{place} says {config.architecture!r}: expected one number topk_threshold beside it, found {found}"
        )
    if "k" not in config.flat:
        raise SAEFormatError(f"{place} lacks k")
    k, _ = _k(config.flat["k"], config, place)
    tensors["threshold"] = threshold.reshape(1).repeat(config.d_sae)
    options = {"k": k, **_rescale(config), **_auxk(config.flat)}
    if config.architecture == _MATRYOSHKA:
        return Found("saekit:matryoshka", options | _matryoshka_options(config.flat, config, place), tensors)
    return Found("saekit:batchtopk", options, tensors)


_AUXK = {"aux_loss_coefficient": "aux_loss_coefficient", "topk_threshold_lr": "threshold_lr"}


def _auxk(said: Mapping[str, Any]) -> dict[str, Any]:
    """How dead features and the threshold were trained, where that is said: AuxK is weighed in units of the loss."""
    options = {ours: said[theirs] for theirs, ours in _AUXK.items() if said.get(theirs) is not None}
    return options | ({"aux_loss_normalization": "none"} if "aux_loss_coefficient" in options else {})


def _matryoshka_options(said: Mapping[str, Any], config: FoundConfig, place: str) -> dict[str, Any]:
    """Its levels, and how it was trained where that is said: so it would train on."""
    widths, d_sae = said.get("matryoshka_widths"), config.d_sae
    if not isinstance(widths, list) or not widths or any(type(w) is not int or not 0 < w <= d_sae for w in widths):
        raise SAEFormatError(
            f"matryoshka_widths in {place} is {widths!r}, expected a list of whole numbers from 1 to d_sae = {d_sae}"
        )
    if sorted({*widths}) != widths:
        raise SAEFormatError(f"matryoshka_widths in {place} are {widths}, expected widths that rise")
    whole = not said.get("use_matryoshka_aux_loss") and said.get("aux_loss_coefficient")
    return {"widths": widths, "level_loss": "sum"} | ({"aux_loss_levels": "whole"} if whole else {})


def _gated(config: FoundConfig, tensors: dict[str, Tensor], place: str) -> Found:
    """sae-lens' reconstruction by gates trains the decoder, and its penalties are weighed by decoder norms."""
    if config.activation != "relu":
        raise SAEFormatError(f"the activation of the gated SAE in {place} is {config.activation!r}, expected 'relu'")
    options = _penalty(config, _said(config), "l1_coefficient", "l1_warm_up_steps")
    form = {"aux_loss_trains_decoder": True, "scale_sparsity_penalty_by_decoder_norm": True}
    return Found("saekit:gated", options | form, tensors)


def _k(k: object, config: FoundConfig, place: str) -> tuple[float, tuple[str, ...]]:
    if k is None:
        return min(_K, float(config.d_sae)), ("k",)
    if isinstance(k, bool) or not isinstance(k, int | float) or not 0 < k <= config.d_sae:
        raise SAEFormatError(f"k in {place} is {k!r}, expected a number above 0 and up to d_sae = {config.d_sae}")
    return float(k), ()
