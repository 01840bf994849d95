"""Going on with a run: what may have changed, and what is put back."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs

from saekit.config import TrainConfig
from saekit.config_files import load_config
from saekit.converter import ConfigConverter
from saekit.errors import ConfigError, DataError, StorageError
from saekit.manager import PluginManager
from saekit.training.checkpoints import Checkpoint, newest_checkpoint, versions
from saekit.training.record import RunRecord, differences
from saekit.training.session import Session

__all__ = ["Resumption"]


@attrs.frozen
class Resumption:
    """A run that is to go on, checked as far as its files allow."""

    record: RunRecord
    configs: Mapping[str, TrainConfig]
    checkpoint: Checkpoint
    allow: frozenset[str]

    @classmethod
    def of(
        cls,
        folder: Path,
        cfg: Any,
        overrides: Sequence[str],
        allow: Sequence[str],
        plugins: PluginManager,
        model: object | None,
        dataset: object | None,
    ) -> Resumption:
        """See :func:`saekit.resume`; :class:`ConfigError` names every option that was changed and not allowed."""
        record = RunRecord.read(folder)
        given = {"model": model, "dataset": dataset}
        if missing := [kind for kind in record.in_memory if given[kind] is None]:
            raise ConfigError(
                f"the run in {folder} was started with a {' and a '.join(missing)} from memory; pass "
                f"{' and '.join(f'{kind}=...' for kind in missing)} to saekit.resume again"
            )
        old = record.configs(plugins)
        new = _changed(old, cfg, overrides, plugins, folder)
        changed: dict[str, tuple[Any, Any]] = {}
        for name, config in new.items():
            changed |= differences(old[name], config, plugins)
        refuse(changed, frozenset(allow))
        if unused := sorted(set(allow) - set(changed) - _identity_options()):
            raise ConfigError(f"allowed to change, but the same as before: {', '.join(unused)}")
        checkpoint = newest_checkpoint(folder)
        _check_left(checkpoint, new, folder)
        return cls(record, new, checkpoint, frozenset(allow))

    def load_into(self, session: Session) -> None:
        """Put back what the checkpoint holds."""
        saved = self.checkpoint.facts
        now = dict(session.identity)
        refuse(
            {
                path: (value, now.get(path))
                for path, value in saved["identity"].items()
                if value is not None and now.get(path) is not None and value != now[path]
            },
            self.allow,
        )
        for package, version in versions().items():
            if saved["versions"].get(package) != version:
                warnings.warn(
                    f"the checkpoint was written with {package} {saved['versions'].get(package)}, and this is "
                    f"{version}: the numbers may differ in the last digits from those of a run without a break",
                    RuntimeWarning,
                    stacklevel=3,
                )
        try:
            session.load_state(self.checkpoint.stream(), self.checkpoint.training)
        except (KeyError, TypeError, ValueError, RuntimeError, DataError) as error:
            raise StorageError(
                f"{self.checkpoint.folder} does not fit the run as it is now: {type(error).__name__}: {error}"
            ) from error


def _changed(
    old: Mapping[str, TrainConfig], cfg: Any, overrides: Sequence[str], plugins: PluginManager, folder: Path
) -> dict[str, TrainConfig]:
    """The configurations to go on with."""
    if cfg is not None and len(old) > 1:
        raise ConfigError(
            f"{folder} is a sweep of {len(old)} SAEs, so one configuration cannot take the place of theirs; change "
            "options of all of them with section.option=value"
        )
    if cfg is not None:
        return {name: load_config(cfg, overrides, plugins=plugins) for name in old}
    plain = ConfigConverter(plugins).unstructure
    return {name: load_config(plain(config), overrides, plugins=plugins) for name, config in old.items()}


def refuse(changed: Mapping[str, tuple[Any, Any]], allow: frozenset[str]) -> None:
    """:class:`ConfigError` for everything that changed and is not in ``allow``."""
    problems = [
        (path, f"was {before!r} when the run was saved, and is {now!r} now; a run that goes on as it was cannot change "
         f"it. To change it all the same: --allow {path} (or allow=[{path!r}])")
        for path, (before, now) in changed.items()
        if path not in allow
    ]  # fmt: skip
    if problems:
        raise ConfigError(problems, "the resumed run")


def _identity_options() -> set[str]:
    """What is compared beside the configuration."""
    return {"model.weights", "dataset.contents"}


def _check_left(checkpoint: Checkpoint, configs: Mapping[str, TrainConfig], folder: Path) -> None:
    saes = checkpoint.facts["saes"]
    if set(saes) != set(configs):
        raise StorageError(f"{checkpoint.folder} holds {', '.join(saes)}, but the run has {', '.join(configs)}")
    left = [
        name
        for name, config in configs.items()
        if saes[name]["diverged"] is None and saes[name]["tokens"] < config.training.total_tokens
    ]
    if checkpoint.facts["finished"] and not left:
        raise ConfigError(
            f"the run in {folder} is finished. To train it longer, raise training.training_tokens and allow it: "
            f"saekit train --resume {folder} training.training_tokens=... --allow training.training_tokens"
        )
