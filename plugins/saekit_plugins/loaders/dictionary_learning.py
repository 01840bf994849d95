"""Pretrained loader ``dictionary_learning``: the run folders of that library, ``ae.pt`` and ``config.json``.

What an SAE is follows from the names of its tensors: the class that ``config.json`` records is not always that of the
weights.  Two classes have the same names, and only there the record decides.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs

from saekit import Entry, PretrainedSAE, SAEFiles, Site, hookimpl
from saekit.errors import SAEFormatError
from saekit_plugins.loaders.reading import (
    LINEAR,
    OneOfSeveral,
    OtherName,
    beside,
    found_files,
    missing_beside,
    named,
    one_file,
    options,
    peeked,
    text,
    whole_number,
)  # fmt: skip
from saekit_plugins.loaders.writing import (
    as_theirs,
    checked,
    in_layer,
    kept,
    one_site,
    told,
    write_json,
    write_pickle,
)  # fmt: skip

if TYPE_CHECKING:
    from torch import Tensor

    from saekit import SAE

_PATTERN = r"ae\.pt"
_OWN = {"W_enc": "W_enc", "b_enc": "b_enc", "W_dec": "W_dec", "b_dec": "b_dec"}
_UNBIASED = {name: ours for name, ours in LINEAR.items() if name != "decoder.bias"}
_STATE = ("k", "threshold", "group_sizes")
_GATED = {
    "decoder_bias": "b_dec", "encoder.weight": "W_enc.T", "decoder.weight": "W_dec.T", "r_mag": "r_mag",
    "gate_bias": "b_gate", "mag_bias": "b_mag",
}  # fmt: skip
_WRITTEN = {"resid_post": "hook_resid_post", "attn_out": "hook_attn_out", "mlp_out": "hook_mlp_out"}


@attrs.frozen
class _Form:
    """What the tensors of a class are called."""

    classes: tuple[str, ...]
    """As ``dict_class`` records them."""
    names: Mapping[str, str]
    state: frozenset[str] = frozenset()
    """What else there is, which is no weight of a matrix or bias; ``k`` may be in ``config.json`` alone."""
    apply_b_dec_to_input: bool = True


_ALIKE = ("AutoEncoderTopK", "BatchTopKSAE")
_TRAINER = re.compile(r"(?:Trainer)?(Batch)?TopK(?:Trainer)?")
_TOPK = _UNBIASED | {"b_dec": "b_dec"}
_FORMS = (
    _Form(("AutoEncoder", "AutoEncoderNew"), LINEAR, apply_b_dec_to_input=False),
    _Form(("AutoEncoder", "AutoEncoderNew"), _UNBIASED | {"bias": "b_dec"}),
    _Form(_ALIKE, _TOPK, frozenset({"k", "threshold"})),
    _Form(("AutoEncoderTopK",), _TOPK, frozenset({"k"})),
    _Form(("MatryoshkaBatchTopKSAE",), _OWN, frozenset(_STATE)),
    _Form(("JumpReluAutoEncoder",), _OWN, frozenset({"threshold"}), apply_b_dec_to_input=False),
    _Form(("GatedAutoEncoder",), _GATED),
)
_CLASSES = frozenset({name for form in _FORMS for name in form.classes})


@attrs.frozen(kw_only=True)
class DictionaryLearningConfig(OneOfSeveral):
    """What the files may not say."""

    dict_class: str | None = None
    """The class of the SAE, such as `BatchTopKSAE`, where no `config.json` and no names of tensors say it."""


@attrs.frozen(kw_only=True)
class DictionaryLearning1Config(DictionaryLearningConfig):
    """The same, by the name that sae-lens's registry gives it."""


class DictionaryLearningLoader:
    """Features are as the weights give them: that library's own default rescales decoder rows to norm 1 instead."""

    def __init__(self, config: DictionaryLearningConfig) -> None:
        self._sae, self._class = config.sae, config.dict_class

    def detects(self, files: SAEFiles) -> float:
        names = found_files(files, _PATTERN)
        if not names:
            return 0.0
        return 1.0 if "trainer" in peeked(files, beside(files, names[0], "config.json")) else 0.6

    def missing_part(self, files: SAEFiles) -> str | None:
        return missing_beside(files, r"config\.json", "ae.pt", keys=("trainer",))

    def load(self, files: SAEFiles) -> PretrainedSAE:
        name = one_file(files, _PATTERN, self._sae, "dictionary_learning")
        where, said = f"{name} in {files.place}", beside(files, name, "config.json")
        config = {} if said is None else files.json(said)
        config_where = f"config.json beside {where}"
        trainer = _object(config, "trainer", config_where)
        recorded = self._class or text(trainer, "dict_class", config_where)
        state = files.state(name)
        form = _form(state, recorded, where)
        tensors = named(state, form.names, where, unused=form.state)
        if recorded is None and form.classes == _ALIKE:
            recorded = _class_of_trainer(trainer, config_where if said is not None else None, where)
        key, own = _architecture(state, form, recorded, trainer, tensors, where)
        hook, defaulted = _site(trainer, config_where)
        metadata = told(config, config_where)
        if metadata is None:
            metadata = _metadata(trainer, _object(config, "buffer", config_where), config_where)
        return PretrainedSAE(
            architecture=key,
            options=options(tensors, apply_b_dec_to_input=form.apply_b_dec_to_input, **own),
            tensors=tensors,
            site=hook,
            metadata=metadata,
            defaulted=defaulted,
            renamed={theirs: ours for theirs, ours in form.names.items() if theirs != ours},
        )

    def write_sae(self, sae: SAE, folder: Path) -> None:
        tensors = checked(sae, "dictionary_learning", _WRITTEN_AS)
        kind, names = _kind(sae)
        state = as_theirs(tensors, names)
        trainer: dict[str, Any] = {"dict_class": kind, "activation_dim": sae.d_in, "dict_size": sae.d_sae}
        if "threshold" in tensors:
            state["threshold"] = tensors["threshold"]
        if "TopK" in kind:
            trainer["k"] = _whole_k(sae.config)
            state |= _scalars(trainer["k"], state.get("threshold"))
        if kind.startswith("Matryoshka"):
            state["group_sizes"], trainer["group_weights"] = _groups(sae.config, sae.d_sae)
        trainer |= _named_site(one_site(sae, "dictionary_learning"))
        said = sae.info.metadata
        trainer |= {"lm_name": said["model_name"]} if "model_name" in said else {}
        buffer = {"d_submodule": sae.d_in, "io": "out", "ctx_len": said.get("context_size")}
        write_pickle(folder / "ae.pt", state)
        write_json(folder / "config.json", {"trainer": trainer, "buffer": buffer, **kept(sae)})


class _OtherName(OtherName, DictionaryLearningLoader):
    """The same, by another name."""


def _object(config: Mapping[str, Any], name: str, where: str) -> Mapping[str, Any]:
    found = config.get(name)
    if found is not None and not isinstance(found, dict):
        raise SAEFormatError(f"{name} in {where} is {found!r}, expected an object")
    return found or {}


def _form(state: Mapping[str, Any], recorded: str | None, where: str) -> _Form:
    """By the tensors' names; the class that is recorded must be one that can have them."""
    if recorded is not None and recorded not in _CLASSES:
        raise SAEFormatError(
            f"dict_class of {where} is {recorded!r}, which this loader does not know; it knows "
            f"{', '.join(sorted(_CLASSES))}"
        )
    found = [form for form in _FORMS if {*state, *(("k",) if "k" in form.state else ())} == {*form.names, *form.state}]
    if not found:
        raise SAEFormatError(
            f"{where} holds {', '.join(list(state)[:12]) or 'nothing'}, which are the tensors of none of "
            f"{', '.join(sorted(_CLASSES))}"
        )
    if recorded is not None and recorded not in found[0].classes:
        raise SAEFormatError(
            f"dict_class of {where} is {recorded!r}, and its tensors are those of {' or '.join(found[0].classes)}"
        )
    return found[0]


def _architecture(
    state: Mapping[str, Any],
    form: _Form,
    recorded: str | None,
    trainer: Mapping[str, Any],
    tensors: dict[str, Tensor],
    where: str,
) -> tuple[str, dict[str, Any]]:
    """saekit's architecture and its own options; adds the thresholds to ``tensors``."""
    kind = form.classes[0] if len(form.classes) == 1 or "AutoEncoder" in form.classes else recorded
    if kind == "AutoEncoder":
        return "saekit:standard", {"activation": "saekit:relu"}
    if kind == "GatedAutoEncoder":
        return "saekit:gated", {}
    d_sae = tensors["W_enc"].shape[1]
    if kind == "JumpReluAutoEncoder":
        tensors |= named({"threshold": state["threshold"]}, {"threshold": "threshold"}, where)
        return "saekit:jumprelu", {}
    k = _k(state, trainer, d_sae, where)
    if kind == "AutoEncoderTopK":
        return "saekit:topk", {"k": k, "rescale_acts_by_decoder_norm": False}
    # -1 stands for a threshold that training has not come to: features are above zero.
    threshold = max(_scalar(state, "threshold", where), 0.0)
    tensors["threshold"] = tensors["b_enc"].new_full((d_sae,), threshold)
    own = {"k": float(k), "rescale_acts_by_decoder_norm": False}
    if kind == "MatryoshkaBatchTopKSAE":
        return "saekit:matryoshka", own | _levels(state, trainer, d_sae, where)
    return "saekit:batchtopk", own


def _class_of_trainer(trainer: Mapping[str, Any], config: str | None, where: str) -> str:
    """The class of those that are alike, where ``config``, if there is one, names the trainer alone."""
    name = None if config is None else text(trainer, "trainer_class", config)
    if name is not None and (said := _TRAINER.fullmatch(name)):
        return _ALIKE[1 if said[1] else 0]
    why = "no config.json beside it says which"
    if config is not None:
        found = "nor trainer_class" if name is None else f"and trainer_class {name!r}, which is the trainer of neither"
        why = f"the config.json beside it has no dict_class {found}"
    raise SAEFormatError(
        f"{where} may be an {' or a '.join(_ALIKE)}, which have the same tensors, and {why}. Say it: "
        "loader={'name': 'dictionary_learning', 'dict_class': ...}"
    )


def _levels(state: Mapping[str, Any], trainer: Mapping[str, Any], d_sae: int, where: str) -> dict[str, Any]:
    """Where levels end, which the file says by the features that each adds; and their weights, if they are recorded."""
    import torch

    sizes = state["group_sizes"]
    whole = isinstance(sizes, torch.Tensor) and not sizes.is_floating_point() and sizes.ndim == 1 and len(sizes)
    if not whole or bool((sizes < 1).any()) or int(sizes.sum()) != d_sae:
        found = sizes.tolist() if isinstance(sizes, torch.Tensor) else sizes
        raise SAEFormatError(f"group_sizes of {where} should be whole numbers that add up to {d_sae}, found {found!r}")
    levels = {"widths": sizes.cumsum(0).tolist(), "level_loss": "mean", "aux_loss_levels": "whole"}
    weights = trainer.get("group_weights")
    if weights is None:
        return levels
    numbers = isinstance(weights, list) and all(type(weight) in (int, float) for weight in weights)
    if not numbers or len(weights) != len(sizes):
        raise SAEFormatError(
            f"group_weights in config.json beside {where} is {weights!r}, expected a number for each of the "
            f"{len(sizes)} groups"
        )
    return levels | {"level_weights": [float(weight) for weight in weights]}


def _k(state: Mapping[str, Any], trainer: Mapping[str, Any], d_sae: int, where: str) -> int:
    found = {"k": whole_number({"k": int(_scalar(state, "k", where))}, "k", where, d_sae)} if "k" in state else {}
    if trainer.get("k") is not None:
        recorded = whole_number(trainer, "k", f"config.json beside {where}", d_sae)
        if found and found["k"] != recorded:
            raise SAEFormatError(f"k of {where} is {found['k']}, and config.json beside it says {recorded}")
        found["k"] = recorded
    if not found:
        raise SAEFormatError(f"neither {where} nor the config.json beside it says k, without which it is no topk SAE")
    return found["k"]


def _scalar(state: Mapping[str, Any], name: str, where: str) -> float:
    import torch

    value = state[name]
    if not isinstance(value, torch.Tensor) or value.numel() != 1 or not bool(value.isfinite().all()):
        found = list(value.shape) if isinstance(value, torch.Tensor) else value
        raise SAEFormatError(f"{name} of {where} should be one finite number, found {found!r}")
    return float(value)


def _site(trainer: Mapping[str, Any], where: str) -> tuple[Site | None, tuple[str, ...]]:
    """Where the SAE belongs, and what of it is not stated: the library writes the residual stream's for that."""
    submodule = text(trainer, "submodule_name", where)
    said = re.fullmatch(r"(resid_post|attn_out|mlp_out)_layer_(\d+)", submodule or "")
    if said is not None:
        return Site(hook_name=f"blocks.{int(said[2])}.{_WRITTEN[said[1]]}"), ()
    layer = trainer.get("layer")
    if submodule is not None or layer is None:
        return None, ()
    if type(layer) is not int or layer < 0:
        raise SAEFormatError(f"layer in {where} is {layer!r}, expected a whole number of 0 or more")
    return Site(hook_name=f"blocks.{layer}.hook_resid_post"), ("hook_name",)


def _metadata(trainer: Mapping[str, Any], buffer: Mapping[str, Any], where: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    if (model := text(trainer, "lm_name", where)) is not None:
        found["model_name"] = model.rpartition("/")[2]
    if buffer.get("ctx_len") is not None:
        found["context_size"] = whole_number(buffer, "ctx_len", where)
    if (submodule := text(trainer, "submodule_name", where)) is not None:
        found["submodule_name"] = submodule
    return found


# ---- writing

_WRITTEN_AS = tuple(f"saekit:{name}" for name in ("standard", "topk", "batchtopk", "matryoshka", "jumprelu", "gated"))


def _kind(sae: SAE) -> tuple[str, Mapping[str, str]]:
    """The class that computes what ``sae`` does, and its names for tensors; each takes the bias from inputs or not."""
    kinds = {
        ("saekit:standard", True): ("AutoEncoder", _UNBIASED | {"bias": "b_dec"}),
        ("saekit:standard", False): ("AutoEncoderNew", LINEAR),
        ("saekit:topk", True): ("AutoEncoderTopK", _TOPK),
        ("saekit:batchtopk", True): ("BatchTopKSAE", _TOPK),
        ("saekit:matryoshka", True): ("MatryoshkaBatchTopKSAE", _OWN),
        ("saekit:gated", True): ("GatedAutoEncoder", _GATED),
        ("saekit:jumprelu", False): ("JumpReluAutoEncoder", _OWN),
    }
    centered = sae.config.apply_b_dec_to_input
    if (found := kinds.get((sae.info.architecture, centered))) is None:
        raise SAEFormatError(
            f"dictionary_learning has a place for {sae.info.architecture} with apply_b_dec_to_input = "
            f"{str(not centered).lower()} alone, and this has {str(centered).lower()}"
        )
    return found


def _whole_k(config: Any) -> int:
    if config.k != int(config.k):
        raise SAEFormatError(f"dictionary_learning has no place for k = {config.k:g}; it has for whole numbers")
    return int(config.k)


def _scalars(k: int, thresholds: Tensor | None) -> dict[str, Tensor]:
    """What that library keeps beside the weights; -1 stands for a threshold that was never set."""
    import torch

    if thresholds is None:
        threshold = torch.tensor(-1.0)
    elif bool((thresholds == thresholds[0]).all()):
        threshold = thresholds[0]
    else:
        raise SAEFormatError("dictionary_learning has no place for thresholds of several values; it has for one")
    return {"k": torch.tensor(k, dtype=torch.int32), "threshold": threshold}


def _groups(config: Any, d_sae: int) -> tuple[Tensor, list[float]]:
    """The features that each level adds, and its weight, of which that library takes the mean."""
    import torch

    ends, factors = config.level_ends(d_sae), config.level_factors(d_sae)
    return torch.tensor(ends).diff(prepend=torch.zeros(1, dtype=torch.int64)), [one * len(ends) for one in factors]


def _named_site(site: Site | None) -> dict[str, Any]:
    if site is None:
        return {}
    layer, hook = in_layer(site, "dictionary_learning")
    if hook not in _WRITTEN.values():
        raise SAEFormatError(
            f"dictionary_learning has no place for the hook {site.name}; it has for {', '.join(_WRITTEN.values())}"
        )
    submodule = next(name for name, ours in _WRITTEN.items() if ours == hook)
    return {"layer": layer, "submodule_name": f"{submodule}_layer_{layer}"}


@hookimpl
def saekit_register_pretrained_loaders() -> Iterable[Entry]:
    yield Entry(
        "dictionary_learning",
        DictionaryLearningConfig,
        f"{__name__}:DictionaryLearningLoader",
        summary="run folders of dictionary_learning (ae.pt, config.json)",
    )
    yield Entry(
        "dictionary_learning_1",
        DictionaryLearning1Config,
        f"{__name__}:_OtherName",
        summary="another name of dictionary_learning, which sae-lens's registry uses",
    )
