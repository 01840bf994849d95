"""Pretrained loader ``sae_lens_legacy``: single files of sae-lens 2 and before, ``.pt``, ``.pkl`` and ``.pkl.gz``.

They are pickles of a configuration object beside tensors, or of a group of whole modules.  No pickle is run.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import attrs

from saekit import Entry, PretrainedSAE, SAEFiles, hookimpl
from saekit.errors import SAEFormatError
from saekit_plugins.loaders.reading import found_files, one_file
from saekit_plugins.loaders.sae_lens import SaeLensConfig, SaeLensLoader

_PATTERN = r"(?![^/]*log_feature_sparsity\.)[^/]*\.(?:pt|pkl|pkl\.gz)"  # which lies beside, and is no SAE
_TENSORS = ("W_enc", "b_enc", "W_dec", "b_dec", "scaling_factor")


@attrs.frozen(kw_only=True)
class SaeLensLegacyConfig(SaeLensConfig):
    """Which file, and what it does not say."""

    member: str | None = None
    """Of a file that holds a group of SAEs, which one.  None: the only one."""


class SaeLensLegacyLoader:
    """Reads the configuration's attributes and the tensors, as the folders of 2.x have them."""

    def __init__(self, config: SaeLensLegacyConfig) -> None:
        self._sae, self._member = config.sae, config.member
        known = SaeLensConfig(
            activation_scale=config.activation_scale,
            normalize_activations=config.normalize_activations,
            hook_name=config.hook_name,
        )
        self._rest = SaeLensLoader(known)

    def detects(self, files: SAEFiles) -> float:
        names = found_files(files, _PATTERN)
        if not names:
            return 0.0
        # A name that ends in .pt says little: every other loader that knows it is surer.
        return 0.2 if all(name.endswith(".pt") and "sparse_autoencoder" not in name for name in names) else 0.5

    def load(self, files: SAEFiles) -> PretrainedSAE:
        name = one_file(files, _PATTERN, self._sae, "sae_lens_legacy")
        where = f"{name} in {files.place}"
        config, state = self._parts(files.objects(name), where)
        used = {key: value for key, value in state.items() if key in _TENSORS}
        if unknown := sorted(set(map(str, state)) - set(_TENSORS)):
            raise SAEFormatError(f"{where} has {', '.join(unknown[:8])}, of which this format knows nothing")
        if missing := [key for key in _TENSORS[:4] if key not in used]:
            raise SAEFormatError(f"{where} lacks {', '.join(missing)}")
        SAEFiles.check_weights(used, where)
        return self._rest.read(_flat(config), used, where)

    def _parts(self, found: Any, where: str) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
        """Configuration and tensors, of a file of one or of a group."""
        if isinstance(found, dict) and isinstance(found.get("autoencoders"), dict):
            found = self._of_group(found["autoencoders"], found.get("cfg"), where)
        if not isinstance(found, dict) or not all(isinstance(found.get(part), dict) for part in ("cfg", "state_dict")):
            shown = ", ".join(map(str, found)) if isinstance(found, dict) else type(found).__name__
            raise SAEFormatError(
                f"{where} must hold cfg and state_dict, or a group of SAEs; found {shown or 'nothing'}"
            )
        return found["cfg"], found["state_dict"]

    def _of_group(self, group: Mapping[str, Any], config: Any, where: str) -> Any:
        name = next(iter(group)) if self._member is None and len(group) == 1 else self._member
        if name is None or name not in group:
            wanted = (
                "say which: loader={'name': 'sae_lens_legacy', 'member': ...}" if name is None else f"none is {name!r}"
            )
            raise SAEFormatError(f"{where} holds {len(group)} SAEs ({', '.join(map(str, group))}); {wanted}")
        module = group[name]
        if not isinstance(module, dict) or not isinstance(module.get("_parameters"), dict):
            raise SAEFormatError(f"{name} of {where} is no module with parameters")
        own = module.get("cfg")
        return {"cfg": own if isinstance(own, dict) else config, "state_dict": module["_parameters"]}


def _flat(config: Mapping[str, Any]) -> dict[str, Any]:
    """As ``cfg.json`` of 2.x says it: attributes of plain values."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(key, str) and isinstance(value, str | int | float | bool | list | dict):
            flat[key.lstrip("_")] = value
    d_in, factor = flat.get("d_in"), flat.get("expansion_factor")
    if "d_sae" not in flat and isinstance(d_in, int) and isinstance(factor, int):
        flat["d_sae"] = d_in * factor
    return flat


@hookimpl
def saekit_register_pretrained_loaders() -> Iterable[Entry]:
    summary = "single files of sae-lens 2 and before (.pt, .pkl, .pkl.gz)"
    yield Entry("sae_lens_legacy", SaeLensLegacyConfig, f"{__name__}:SaeLensLegacyLoader", summary=summary)
