"""The tables of runs of sae-lens, flat and with all keys, and those of saekit, nested."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from saekit import ConfigError
from saekit.config import shown
from saekit.for_sae_lens import major

__all__ = ["flat_of", "is_of_sae_lens", "nested"]

_KNOWN_BY = frozenset({"hook_name", "hook_point", "sae_lens_version", "sae_lens_training_version"})
_OTHERS_BY = frozenset({"reshape_activations", "begin_batch_token"})


def is_of_sae_lens(source: Mapping[str, Any]) -> bool:
    """Whether anything in it is: of later versions the version, of earlier ones the hook; of an SAE of 6 likewise, and
    what is no run."""
    tables = [table for table in (source, source.get("metadata")) if isinstance(table, Mapping)]
    return bool(_OTHERS_BY & source.keys()) or any(_KNOWN_BY & table.keys() for table in tables)


def flat_of(source: Mapping[str, Any]) -> tuple[dict[str, Any], int]:
    """All keys, those of 6 in ``sae`` and ``logger`` with that before them, and the major version."""
    nested = isinstance(source.get("sae"), Mapping)
    _refuse_others(source)
    _refuse_pretokenizing(source)
    if isinstance(source.get("metadata"), Mapping) and not _KNOWN_BY & source.keys():
        raise ConfigError(
            "this is the configuration of an SAE of sae-lens 6, not of the run that trained it: that is in the "
            "runner_cfg.json beside it, which LanguageModelSAERunnerConfig saves. Give that"
        )
    stated = major(source.get("sae_lens_version") or source.get("sae_lens_training_version"))
    version = stated or (6 if nested else 3)
    hook = {"hook_name", "hook_point"} & source.keys()
    if not hook or not ({"lr", "train_batch_size_tokens", "training_tokens"} & source.keys() or nested):
        missing = "no options of training" if hook else "neither hook_name nor hook_point"
        raise ConfigError(
            f"this is no configuration of a run of sae-lens: it has {missing}. Expected what "
            "LanguageModelSAERunnerConfig saves (cfg.json of a checkpoint of 2 or 3, runner_cfg.json of 6); the "
            "cfg.json of an SAE needs no conversion: saekit.SAE.load(folder) reads it with the weights"
        )
    if not nested:
        if version >= 6:
            raise ConfigError("a configuration of sae-lens 6 has its SAE's options under sae, and this one has no sae")
        return dict(source), version
    flat = {key: value for key, value in source.items() if key not in ("sae", "logger")}
    for part in ("sae", "logger"):
        inner = source.get(part, {})
        if not isinstance(inner, Mapping):
            raise ConfigError([(part, f"expected a table, found {shown(inner)}")])
        flat |= {f"{part}.{key}": value for key, value in inner.items()}
    return flat, max(version, 6)


def _refuse_others(source: Mapping[str, Any]) -> None:
    """:class:`ConfigError` for configurations of what sae-lens runs beside the training of one SAE."""
    if "saes" in source or "hook_names" in source:
        raise ConfigError(
            "this is a MultiSAETrainingRunnerConfig of sae-lens, of several SAEs that are trained on one model's "
            "activations. Here each has a configuration of its own, and saekit.train([...]) trains them in one pass; "
            "saekit.grid, or `saekit train run.toml --grid site.hook_name=A,B`, makes those that differ in a few "
            "options. Convert the LanguageModelSAERunnerConfig of one of them for a start"
        )
    if "new_cached_activations_path" in source and "lr" not in source:
        raise ConfigError(
            "this is a CacheActivationsRunnerConfig of sae-lens, which trains nothing. Here `saekit cache` writes "
            "activations, with the configuration of the run that is to read them: activations.cache.folder is "
            "new_cached_activations_path, activations.cache.tokens training_tokens, activations.cache.dtype dtype, and "
            "activations.cache.batch_size_prompts model_batch_size"
        )


def _refuse_pretokenizing(source: Mapping[str, Any]) -> None:
    if "begin_batch_token" in source and "lr" not in source:
        raise ConfigError(
            "this is a PretokenizeRunnerConfig of sae-lens, which trains nothing. Here `saekit pretokenize` writes "
            "contexts, with a configuration of its own: `saekit config --of pretokenize > contexts.toml`"
        )


def nested(options: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    """Tables in tables, a choice's name before its options."""
    table: dict[str, Any] = {}
    for path, value in sorted(options, key=lambda option: (option[0].count("."), not option[0].endswith(".name"))):
        *sections, name = path.split(".")
        inner = table
        for section in sections:
            inner = inner.setdefault(section, {})
        inner[name] = value
    return table
