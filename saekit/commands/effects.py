"""The SAEs and the model of a feature store, for what removing features does to the loss."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from saekit.commands.stores import is_store
from saekit.commands.subjects import Subject, subjects_of
from saekit.errors import ConfigError, SaekitError
from saekit.plugins.manager import PluginManager

if TYPE_CHECKING:
    from saekit.dashboards.effects import PageEffects
    from saekit.features.store import FeatureStore
    from saekit.status import Status

__all__ = ["effects_of"]

_WITHOUT = "Without it: loss_effects=None (--no-loss-effects)"


def effects_of(
    what: object,
    store: FeatureStore,
    names: Sequence[str],
    kind: str | None,
    collecting: Mapping[str, Any],
    plugins: PluginManager,
    say: Status,
) -> dict[str, PageEffects]:
    """For the SAEs ``names`` of ``store`` what removing their features does.

    ``what`` are the SAEs, as :func:`saekit.collect_features` takes them, or a store, of which ``"auto"`` tells nothing.
    The model is the one that each SAE says, or ``model`` of ``collecting``, on ``device``.
    """
    if kind is None:
        return {}
    alone = is_store(what)
    if alone and kind == "auto":
        return {}
    if alone:
        raise ConfigError(
            f"loss_effects={kind!r} needs the SAE, and a feature store does not have it: give the SAE or its run, and "
            f"the store as folder={str(store.folder)!r}. {_WITHOUT}"
        )
    from saekit.analysis.loss_effects import LossEffects
    from saekit.commands.material import Material, Text
    from saekit.dashboards.effects import PageEffects
    from saekit.devices import resolve_device

    device = collecting.get("device") or "auto"
    found = subjects_of(what, plugins, device=resolve_device(device, "device"))
    way: Literal["exact", "direct"] = "direct" if kind == "direct" else "exact"
    material = Material(plugins, Text(), model=collecting.get("model"), device=device, say=say)
    effects = {}
    try:
        for name in names:
            subject = _named(found, store, name)
            backend = material.model_of(subject)
            effects[name] = PageEffects(LossEffects.of(store.saes[name], subject.sae, backend, way))
    except SaekitError as error:
        error.add_note(f"That is for what removing features does to the loss. {_WITHOUT}")
        raise
    return effects


def _named(found: Mapping[str, Subject], store: FeatureStore, name: str) -> Subject:
    """The SAE that the store calls ``name``."""
    from saekit.features.subject import checksum

    wanted = store.saes[name].about.checksum
    for one in found.values():
        if checksum(one.sae) == wanted:
            return one
    raise ConfigError(f"the store has features of {name}, and none of {', '.join(found)} is that SAE: give it, too")
