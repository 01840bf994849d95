"""Configurations of sae-lens runs, as options of saekit that mean the same, with a word about every key.

Flat ones of versions 2 to 5, as ``LanguageModelSAERunnerConfig`` saved them, and those of 6, with ``sae`` and
``logger``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import attrs

from saekit.config import TrainConfig
from saekit.config.files import load_config
from saekit.config.formats import write
from saekit.config.merging import Place, in_order, set_option
from saekit.config.sae_lens_keys import (
    BEFORE_4,
    KEPT,
    NEUTRAL,
    NO_PROCESSING,
    NORMALIZATIONS,
    OF_6,
    OF_ARCHITECTURES,
    Key,
)
from saekit.config.values import shown
from saekit.errors import ConfigError
from saekit.plugins.manager import PluginManager, default_manager

__all__ = ["Converted", "convert"]

_RECONSTRUCTION, _CACHED, _WANDB = "reconstruction", "cached", "wandb"
"""What sae-lens has one of."""
_CALLED = {"matryoshka_batchtopk": "matryoshka"}


@attrs.frozen
class Converted:
    """A configuration of saekit, and what became of every key of the other."""

    table: Mapping[str, Any]
    """As :func:`saekit.load_config` takes it."""
    renamed: Mapping[str, str]
    """Their keys to the options here, where these are called otherwise."""
    dropped: Mapping[str, str]
    """Their keys to why they are not needed: what they say is so here, or says nothing about training."""
    lost: Mapping[str, str]
    """Their keys to what they asked for, which is not here: the run is another without it."""
    assumed: Mapping[str, Any]
    """Keys that are not there, with the defaults of sae-lens that hold for that."""

    @property
    def toml(self) -> str:
        """The file."""
        return write(self.table, "toml")

    def report(self) -> list[str]:
        """A line for each key that is not simply the same here."""
        lines = [f"renamed: {theirs} is {ours}" for theirs, ours in self.renamed.items()]
        lines += [f"dropped: {theirs}: {why}" for theirs, why in self.dropped.items()]
        lines += [
            f"assumed: {theirs} is {shown(value)}, the default of sae-lens" for theirs, value in self.assumed.items()
        ]
        return lines + [f"NOT THE SAME: {theirs}: {why}" for theirs, why in self.lost.items()]


def convert(source: Mapping[str, Any], *, plugins: PluginManager | None = None) -> Converted:
    """What ``source``, the table of a run of sae-lens, is here; :class:`ConfigError` for what is no such table.

    What comes out is loaded once, so that it can be.
    """
    plugins = plugins or default_manager()
    flat, version = _flat(source)
    given = dict(flat)
    defaults = OF_6 if version >= 6 else BEFORE_4 if version < 4 else {}
    assumed = {key: value for key, value in defaults.items() if key not in flat and _concerns(key, flat)}
    work = _Work({**assumed, **flat}, version)
    work.all()
    table: dict[str, Any] = {}
    for path, value in in_order(work.options):
        set_option(table, path, value, Place(TrainConfig, plugins))
    load_config(table, plugins=plugins)
    order = [field.name for field in attrs.fields(TrainConfig)]
    table = {name: table[name] for name in sorted(table, key=order.index)}
    keys = list(given)
    said = {key: value for key, value in assumed.items() if key not in work.dropped}
    told = {**work.renamed, **work.dropped, **work.lost}
    for key in keys:  # those that several keys were made of, of which this one said nothing
        if flat[key] is None and key not in told:
            work.dropped[key] = "is null, and left out here"
    return Converted(
        table,
        {key: work.renamed[key] for key in keys if key in work.renamed},
        {key: work.dropped[key] for key in keys if key in work.dropped},
        {key: why for key, why in work.lost.items() if key in given},
        said,
    )


def _flat(source: Mapping[str, Any]) -> tuple[dict[str, Any], int]:
    """All keys, those of 6 in ``sae`` and ``logger`` with that before them, and the major version."""
    if not isinstance(source, Mapping):
        raise ConfigError(f"expected a table of options, found {type(source).__name__}")
    if "saekit" in source or {"training", "site"} <= source.keys():
        raise ConfigError("this is saekit's own already, and needs no conversion")
    nested = isinstance(source.get("sae"), Mapping)
    text = str(source.get("sae_lens_version") or source.get("sae_lens_training_version") or "")
    major = int(text.partition(".")[0]) if text.partition(".")[0].isdigit() else 6 if nested else 3
    hook = {"hook_name", "hook_point"} & source.keys()
    if not hook or not ({"lr", "train_batch_size_tokens", "training_tokens"} & source.keys() or nested):
        missing = "no options of training" if hook else "neither hook_name nor hook_point"
        raise ConfigError(
            f"this is no configuration of a run of sae-lens: it has {missing}. Expected what "
            "LanguageModelSAERunnerConfig saves (cfg.json of a checkpoint of 2 or 3, runner_cfg.json of 6)"
        )
    if not nested:
        if major >= 6:
            raise ConfigError("a configuration of sae-lens 6 has its SAE's options under sae, and this one has no sae")
        return dict(source), major
    flat = {key: value for key, value in source.items() if key not in ("sae", "logger")}
    for part in ("sae", "logger"):
        inner = source.get(part, {})
        if not isinstance(inner, Mapping):
            raise ConfigError([(part, f"expected a table, found {shown(inner)}")])
        flat |= {f"{part}.{key}": value for key, value in inner.items()}
    return flat, max(major, 6)


def _concerns(key: str, flat: Mapping[str, Any]) -> bool:
    """Whether a default is of an option that the architecture has."""
    name, _, option = key.rpartition(".")
    return name != "sae" or option in OF_ARCHITECTURES.get(str(flat.get("sae.architecture")), ())


class _Work:
    """One conversion while it is made: keys are taken one after the other, until none is left."""

    def __init__(self, keys: Mapping[str, Any], version: int) -> None:
        self.left = dict(keys)
        self.version = version
        self.options: list[tuple[str, Any]] = []
        self.renamed: dict[str, str] = {}
        self.dropped: dict[str, str] = {}
        self.lost: dict[str, str] = {}

    def all(self) -> None:
        """Everything.  What depends on several keys comes first and takes them."""
        for step in (self._sizes, self._architecture, self._model, self._devices, self._rates, self._evals,
                     self._source, self._trackers, self._folder):  # fmt: skip
            step()
        for key in list(self.left):
            self._one(key, self.left.pop(key))

    def take(self, key: str, default: Any = None) -> Any:
        """The value of a key, which is dealt with from here on."""
        return self.left.pop(key, default)

    def set(self, path: str, value: Any, *keys: str) -> None:
        """An option here, and the keys of theirs that it is made of."""
        self.options.append((path, value))
        for key in keys:
            if key.removeprefix("sae.").removeprefix("logger.") != path.rpartition(".")[2]:
                self.renamed[key] = path

    def _one(self, key: str, value: Any) -> None:
        if key.removeprefix("sae.") == "normalize_activations" and not _is_normalization(value):
            words = [name for name in NORMALIZATIONS if isinstance(name, str)]
            self.lost[key] = f"is {shown(value)}; there are {', '.join(words)}"
            return
        known: Key | None = KEPT.get(key) or KEPT.get(key.removeprefix("sae."))
        if known is not None:
            if value is not None or known.none is not None:
                self.set(known.path, known.none if value is None else known.of(value), key)
            else:
                self.dropped[key] = "is null, and left out here"
        elif key in NEUTRAL:
            why, neutral = NEUTRAL[key]
            (self.dropped if neutral is Any or value in neutral else self.lost)[key] = why
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
        name = self.take("architecture") or "standard"
        activation, more = "relu", dict(self.take("activation_fn_kwargs") or {})
        for key in ("activation_fn", "activation_fn_str"):
            activation = self.take(key) or activation
        if activation == "topk":
            name, k = "topk", more.pop("k", None)
            if k is None:
                raise ConfigError([("activation_fn_kwargs", "has no k, and activation_fn is topk: how many features?")])
            self.set("sae.name", name, "architecture")
            self.set("sae.k", k, "activation_fn_kwargs")
            self.set("sae.rescale_acts_by_decoder_norm", False)
            self.set("sae.aux_loss_coefficient", 0.0)
            self._leave_out("l1_coefficient", "l1_warm_up_steps", "lp_norm", "scale_sparsity_penalty_by_decoder_norm",
                            "mse_loss_normalization", "noise_scale", "use_ghost_grads")  # fmt: skip
        else:
            self.set("sae.name", name, "architecture")
            self.set("sae.activation", activation, "activation_fn")
        if more:
            self.lost["activation_fn_kwargs"] = f"is {shown(more)}, which the activation does not have here"

    def _of_6(self, name: str) -> None:
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
            if mode == of:
                self.set(path, value, key)
            elif value is not None:
                self.dropped[key] = f"is of the loss {of}, and that is {mode}"

    def _leave_out(self, *keys: str) -> None:
        for key in keys:
            if key in self.left:
                del self.left[key]
                self.dropped[key] = "is of another architecture"

    def _model(self) -> None:
        """Since 4, sae-lens loads models without processing their weights; here it is said."""
        backend = str(self.take("model_class_name") or "HookedTransformer")
        self.set("model.backend.name", backend, "model_class_name")
        options = dict(self.take("model_from_pretrained_kwargs") or {})
        if self.version >= 4 and backend == "HookedTransformer":
            options = {**NO_PROCESSING, **options}
        if options:
            self.set("model.backend.from_pretrained_kwargs", options, "model_from_pretrained_kwargs")
        else:
            self.dropped["model_from_pretrained_kwargs"] = "says nothing"

    def _devices(self) -> None:
        device, model = str(self.take("device") or "cpu"), self.take("llm_device")
        model = device if model in (None, "None") else str(model)
        self.set("training.device", device, "device")
        self.set("model.device", model, "llm_device")
        self.renamed["llm_device"] = "model.device"
        store = self.take("act_store_device")
        default = "with_model" if self.version < 6 else device
        store = default if store in (None, "None") else str(store)
        self.set("activations.source.act_store_device", store, "act_store_device")

    def _rates(self) -> None:
        lr, end, cycles = self.left.get("lr"), self.take("lr_end"), self.take("n_restart_cycles")
        name = str(self.take("lr_scheduler_name") or "constant").lower()
        self.set("lr_schedule.name", name, "lr_scheduler_name")
        if name == "constant":
            self.dropped |= {"lr_end": "is of the cosine schedules", "n_restart_cycles": "is of the cosine schedules"}
            return
        if end is None and isinstance(lr, int | float):
            end = lr / 10
        if end is not None:
            self.set("lr_schedule.end", end, "lr_end")
        if "restarts" in name:
            self.set("lr_schedule.n_restart_cycles", cycles or 1, "n_restart_cycles")
        elif cycles is not None:
            self.dropped["n_restart_cycles"] = "is of the schedule with restarts"

    def _evals(self) -> None:
        """Batches of prompts there; contexts here, and steps."""
        batches, prompts = self.take("n_eval_batches"), self.take("eval_batch_size_prompts")
        each = prompts or self.left.get("store_batch_size_prompts")
        if batches and each:
            self.set("evals.n_contexts", batches * each, "n_eval_batches")
        if prompts:
            self.set("evals.run", [{"name": _RECONSTRUCTION, "batch_size_prompts": prompts}], "eval_batch_size_prompts")
        prefix = "logger." if self.version >= 6 else ""
        logs, steps = self.take(f"{prefix}eval_every_n_wandb_logs"), self.left.get(f"{prefix}wandb_log_frequency")
        if logs and steps:
            self.set("evals.every_n_steps", logs * steps, f"{prefix}eval_every_n_wandb_logs")

    def _source(self) -> None:
        folder = self.take("cached_activations_path")
        if not self.take("use_cached_activations", False):
            self.dropped["use_cached_activations"] = "is false, as it is here"
            if folder is not None:
                self.dropped["cached_activations_path"] = "is not used there"
            return
        self.set("activations.source.name", _CACHED, "use_cached_activations")
        self.set("activations.source.folder", folder or "activations", "cached_activations_path")
        self.lost["use_cached_activations"] = "caches of sae-lens are of another format: write one with `saekit cache`"
        self.options = [one for one in self.options if one[0] != "activations.source.act_store_device"]
        self._leave_out("n_batches_in_buffer", "store_batch_size_prompts", "prefetch_llm_batches")

    def _trackers(self) -> None:
        prefix = "logger." if self.version >= 6 else ""
        wanted = self.take(f"{prefix}log_to_wandb", False)
        tracker = {"name": _WANDB}
        for option in ("project", "entity"):
            value = self.take(f"{prefix}wandb_{option}")
            if wanted and value is not None:
                tracker[option] = value
                self.renamed[f"{prefix}wandb_{option}"] = f"trackers[].{option}"
            elif value is not None:
                self.dropped[f"{prefix}wandb_{option}"] = "nothing is logged to W&B"
        if wanted:
            self.set("trackers", [tracker], f"{prefix}log_to_wandb")
        else:
            self.dropped[f"{prefix}log_to_wandb"] = "is false, and so it is here"

    def _folder(self) -> None:
        """One run folder has all here."""
        output, checkpoints = self.take("output_path"), self.take("checkpoint_path")
        folder = output or checkpoints
        if folder:
            self.set("checkpoints.folder", str(folder), "output_path" if output else "checkpoint_path")
        if output and checkpoints:
            self.dropped["checkpoint_path"] = "checkpoints lie in the run folder, which is in output_path"


def _is_normalization(value: object) -> bool:
    return value is None or (isinstance(value, (bool, str)) and value in NORMALIZATIONS)
