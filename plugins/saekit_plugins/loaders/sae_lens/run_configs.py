"""Configurations of sae-lens runs, as options of saekit that mean the same, with a word about every key.

Flat ones of versions 2 to 5, as ``LanguageModelSAERunnerConfig`` saved them, and those of 6, with ``sae`` and
``logger``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from saekit import ConfigError
from saekit.config import shown
from saekit.converted import ConvertedConfig
from saekit.for_sae_lens import NO_PROCESSING
from saekit_plugins.loaders.sae_lens.run_keys import (
    BEFORE_6,
    KEPT,
    NEUTRAL,
    NORMALIZATIONS,
    NOT_TRAINED,
    OF_6,
    OF_ARCHITECTURES,
    OTHER_NORMALIZATIONS,
    OTHERS_BEFORE_6,
    SPECIAL_TOKENS,
    Key,
)
from saekit_plugins.loaders.sae_lens.run_models import forwards, loading
from saekit_plugins.loaders.sae_lens.run_parts import devices, evals, folder, rates, source, trackers
from saekit_plugins.loaders.sae_lens.run_starts import from_saved, warm_up
from saekit_plugins.loaders.sae_lens.run_tables import flat_of, is_of_sae_lens, nested
from saekit_plugins.loaders.sae_lens.run_work import Work

__all__ = ["convert"]

_CALLED = {"matryoshka_batchtopk": "matryoshka"}


def convert(source: Mapping[str, Any]) -> ConvertedConfig | None:
    """What ``source``, the table of a run of sae-lens, is here; None for what is no table of sae-lens.

    :class:`ConfigError` for the table of an SAE and not of a run, and for a run that there cannot be here.
    """
    if not is_of_sae_lens(source):
        return None
    flat, version = flat_of(source)
    defaults = OF_6 if version >= 6 else BEFORE_6
    assumed = {key: value for key, value in defaults.items() if key not in flat and _concerns(key, flat)}
    work = _Conversion({**assumed, **flat}, version)
    work.all()
    lowered = [key for key in warm_up(work) if key in assumed]
    told = {**work.renamed, **work.changed, **work.dropped, **work.lost}
    for key, value in flat.items():  # those that several keys were made of, of which this one said nothing
        if value is None and key not in told and key not in work.said:
            work.dropped[key] = "is null, and left out here"
    return ConvertedConfig(
        table=nested(work.options),
        renamed=_of(flat, work.renamed),
        changed=_of([*flat, *lowered], work.changed),
        dropped=_of(flat, work.dropped),
        assumed={key: value for key, value in assumed.items() if key not in work.dropped},
        lost=_of(flat, work.lost),
    )


def _of(keys: Iterable[str], told: Mapping[str, str]) -> dict[str, str]:
    """In their order."""
    return {key: told[key] for key in keys if key in told}


def _concerns(key: str, flat: Mapping[str, Any]) -> bool:
    """Whether a default is of an option that the architecture has."""
    name, _, option = key.rpartition(".")
    if option.startswith("jumprelu_") and not name:
        return flat.get("architecture") == "jumprelu"
    return name != "sae" or option in OF_ARCHITECTURES.get(str(flat.get("sae.architecture")), ())


class _Conversion(Work):
    """What becomes of the model, the SAE and the sizes, and then of each key that is left."""

    def all(self) -> None:
        """Everything.  What depends on several keys comes first and takes them."""
        for step in (self._sizes, self._architecture, self._model):
            step()
        for part in (devices, rates, evals, source, trackers, folder):
            part(self)
        for key in list(self.left):
            self._one(key, self.left.pop(key))
        if self.given.get("from_pretrained_path") is not None:
            from_saved(self)

    def _one(self, key: str, value: Any) -> None:
        if key.removeprefix("sae.") == "normalize_activations" and not _is_normalization(value):
            words = [name for name in NORMALIZATIONS if isinstance(name, str)]
            self.lost[key] = f"is {shown(value)}; there are {', '.join(words)}"
            return
        if isinstance(value, str) and value in OTHER_NORMALIZATIONS:
            self.lost[key] = OTHER_NORMALIZATIONS[value]
        elif key == "exclude_special_tokens" and value is True:
            self.lost[key] = SPECIAL_TOKENS
        known: Key | None = KEPT.get(key) or KEPT.get(key.removeprefix("sae."))
        if key in NEUTRAL and (NEUTRAL[key][1] is Any or value in NEUTRAL[key][1]):
            self.dropped[key] = NEUTRAL[key][0]
        elif known is not None:
            if value is not None or known.none is not None:
                self.set(known.path, known.none if value is None else known.of(value), key)
            else:
                self.dropped[key] = "is null, and left out here"
        elif key in NEUTRAL:
            self.lost[key] = NEUTRAL[key][0]
        else:
            self.lost[key] = f"is {shown(value)}, of which saekit knows nothing"

    # ---- what depends on several keys

    def _sizes(self) -> None:
        """``d_sae`` says what ``expansion_factor`` says, and only one is given here."""
        size, factor = self.take("d_sae"), self.take("expansion_factor")
        if size is not None:
            self.set("sae.d_sae", size, "d_sae")
            if factor is not None:
                self.dropped["expansion_factor"] = "d_sae says it"
        elif factor is not None:
            self.set("sae.expansion_factor", factor, "expansion_factor")

    def _architecture(self) -> None:
        if self.version >= 6:
            self._of_6(str(self.take("sae.architecture", "standard")))
        else:
            self._before_6()
        dtype = str(self.take("dtype") or "float32").removeprefix("torch.")
        inner = self.take("sae.dtype")
        self.set("sae.dtype", dtype if inner is None else str(inner).removeprefix("torch."), "dtype")
        if dtype != "float32":
            self.set("activations.source.dtype", dtype, "dtype")

    def _before_6(self) -> None:
        name = str(self.take("architecture") or "standard")
        _check_trained(name, "architecture")
        activation, more = "relu", dict(self.take("activation_fn_kwargs") or {})
        for key in ("activation_fn", "activation_fn_str"):
            activation = self.take(key) or activation
        has_penalty = name == "standard"
        if activation == "topk":
            name = self._topk_before_6(name, more)
        elif name == "jumprelu":
            self.dropped |= dict.fromkeys(("activation_fn", "activation_fn_str"), "jumprelu is its own")
        else:
            self.set("sae.activation", activation, "activation_fn")
        self.set("sae.name", name, "architecture")
        if more:
            self.lost["activation_fn_kwargs"] = f"is {shown(more)}, which the activation does not have here"
        elif activation != "topk":
            self.dropped["activation_fn_kwargs"] = "says nothing"
        if name == "gated":
            self._gated_before_6()
        elif name == "jumprelu":
            self._jumprelu_before_6()
        elif name == "topk" and has_penalty and self.left.get("l1_coefficient"):
            penalty = self.take("l1_coefficient")
            self.lost["l1_coefficient"] = f"is {shown(penalty)}, a penalty beside the k, which topk does not have here"
        self._others(name)
        norm = self.take("decoder_heuristic_init_norm")
        if norm is not None and norm != 0.1 and self.left.get("decoder_heuristic_init"):
            self.lost["decoder_heuristic_init_norm"] = f"is {shown(norm)}, and decoder rows start here at norm 0.1"
        elif norm is not None:
            self.dropped["decoder_heuristic_init_norm"] = "decoder_heuristic_init says it"

    def _topk_before_6(self, name: str, more: dict[str, Any]) -> str:
        """Of the architecture `topk` of 4 and 5, AuxK as it is in 6; none where `topk` is the activation alone."""
        k = more.pop("k", None)
        if k is None:
            raise ConfigError([("activation_fn_kwargs", "has no k, and activation_fn is topk: how many features?")])
        if name not in ("standard", "topk"):
            raise ConfigError([("activation_fn", f"is 'topk', which {name} does not have here")])
        self.dropped |= dict.fromkeys(("activation_fn", "activation_fn_str"), "sae.name says it")
        self.set("sae.k", k, "activation_fn_kwargs")
        self.changed["activation_fn_kwargs"] = f"k is sae.k = {shown(k)}"
        self.set("sae.rescale_acts_by_decoder_norm", False)
        self.set("sae.aux_loss_coefficient", 1.0 if name == "topk" else 0.0)
        if name == "topk":
            self.set("sae.aux_loss_normalization", "none")
        return "topk"

    def _gated_before_6(self) -> None:
        """Its penalty is always weighed by the norms of the decoder's rows, which says nothing where these are 1."""
        self.set("sae.scale_sparsity_penalty_by_decoder_norm", not self.left.get("normalize_sae_decoder", True))
        self.set("sae.aux_loss_trains_decoder", True)
        if self.take("scale_sparsity_penalty_by_decoder_norm") is not None:
            self.dropped["scale_sparsity_penalty_by_decoder_norm"] = (
                "gated weighs its penalty by them in any case there"
            )

    def _jumprelu_before_6(self) -> None:
        """Its λ is called as that of the others, and its thresholds alone learn from the sparsity loss."""
        self.set("sae.sparsity_loss", "l0")
        self.set("sae.ste_to_input", False)
        self.set("sae.aux_loss_coefficient", 0.0)
        for theirs, ours in (("l1_coefficient", "l0_coefficient"), ("l1_warm_up_steps", "l0_warm_up_steps")):
            if (value := self.take(theirs)) is not None:
                self.set(f"sae.{ours}", value, theirs)
        self.lost["architecture"] = "is jumprelu, which learns the logarithms of its thresholds there, and these here"

    def _others(self, name: str) -> None:
        """The flat configurations have the options of all architectures; those that count there and have no place here
        are told."""
        for key, (architectures, idle) in OTHERS_BEFORE_6.items():
            if key not in self.left or name in architectures:
                continue
            value = self.take(key)
            if idle is Any:
                self.dropped[key] = "is of another architecture"
            elif value in idle:
                self.dropped[key] = f"is {shown(value)}, and {name} has none of it here"
            else:
                self.lost[key] = f"is {shown(value)}, which {name} does not have here"

    def _of_6(self, name: str) -> None:
        _check_trained(name, "sae.architecture")
        self.set("sae.name", _CALLED.get(name, name), "sae.architecture")
        norm = self.take("sae.decoder_init_norm", 0.1)
        self.set("sae.decoder_heuristic_init", norm is not None, "sae.decoder_init_norm")
        if norm not in (None, 0.1):
            self.lost["sae.decoder_init_norm"] = f"is {shown(norm)}, and decoder rows start here at norm 0.1"
        self.set("sae.normalize_sae_decoder", False)
        self.set("sae.init_encoder_as_decoder_transpose", True)
        self.set("sae.b_dec_init_method", "zeros")
        if name == "standard":
            self.set("sae.scale_sparsity_penalty_by_decoder_norm", True)
        elif name == "gated":
            self.set("sae.scale_sparsity_penalty_by_decoder_norm", True)
            self.set("sae.aux_loss_trains_decoder", True)
        elif name == "jumprelu":
            self._jumprelu()
        elif "sae.aux_loss_coefficient" in self.left:
            self.set("sae.aux_loss_normalization", "none")
        if name == "matryoshka_batchtopk":
            whole = not self.take("sae.use_matryoshka_aux_loss", False)
            self.set("sae.aux_loss_levels", "whole" if whole else "each", "sae.use_matryoshka_aux_loss")
            self.set("sae.level_loss", "sum")

    def _jumprelu(self) -> None:
        """sae-lens has no AuxK for it, and states what one of its losses alone uses whichever is chosen."""
        self.set("sae.aux_loss_coefficient", 0.0)
        mode = str(self.take("sae.jumprelu_sparsity_loss_mode", "step"))
        losses = {"step": "l0", "quadratic": "target_l0", "tanh": "tanh"}
        if mode not in losses:
            raise ConfigError([("sae.jumprelu_sparsity_loss_mode", f"is {mode!r}; there are {', '.join(losses)}")])
        self.set("sae.sparsity_loss", losses[mode], "sae.jumprelu_sparsity_loss_mode")
        for key, path, of in (("sae.target_l0", "sae.target_l0", "quadratic"),
                              ("sae.jumprelu_tanh_scale", "sae.tanh_scale", "tanh")):  # fmt: skip
            value = self.take(key)
            if mode == of and value is not None:
                self.set(path, value, key)
            elif value is not None:
                self.dropped[key] = f"is of the loss {of}, and that is {mode}"

    def _model(self) -> None:
        """Since 4, sae-lens loads models without processing their weights; here it is said."""
        backend = str(self.take("model_class_name") or "HookedTransformer")
        self.set("model.backend.name", backend, "model_class_name")
        options = dict(self.take("model_from_pretrained_kwargs") or {})
        if self.version >= 4 and backend == "HookedTransformer":
            options = {**NO_PROCESSING, **options}
        loading(self, backend, options)
        forwards(self, backend)


def _check_trained(name: str, key: str) -> None:
    if name in NOT_TRAINED:
        raise ConfigError(
            [(key, f"is {name!r}, which saekit reads and cannot train: there is no such run here. SAE.load reads what "
              "sae-lens has trained")]
        )  # fmt: skip


def _is_normalization(value: object) -> bool:
    return value is None or (isinstance(value, (bool, str)) and value in NORMALIZATIONS)
