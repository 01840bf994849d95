"""From files to an SAE: choose the loader, let it read, build and fill the module."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import attrs

from saekit.config import PluginChoice
from saekit.converter import ConfigConverter
from saekit.errors import ConfigError, SAEFormatError
from saekit.manager import PluginManager, default_manager
from saekit.plugin_building import built
from saekit.pretrained.detecting import read_with, recognised
from saekit.pretrained.files import PretrainedSAE, SAEFiles
from saekit.registry import Registered
from saekit.sae.folder import CONFIG, FORMAT, SPARSITY, WEIGHTS
from saekit.site import Site
from saekit.storage import sha256

if TYPE_CHECKING:
    from torch import Tensor

    from saekit.sae.module import SAE

__all__ = ["build_module", "build_sae", "load_sae", "read_tensors"]


def load_sae(
    files: SAEFiles, *, loader: PluginChoice | None = None, device: str = "cpu", plugins: PluginManager | None = None
) -> SAE:
    """The SAE in ``files``, read by ``loader``, or by the one loader that recognises them."""
    plugins = plugins or default_manager()
    if loader is None and _is_own(files):
        return build_sae(_read_own(files), plugins).to(device)
    choice = _detected(files, plugins).key if loader is None else loader
    options = ConfigConverter(plugins).choice(choice, "pretrained_loaders")
    return build_sae(read_with(plugins, options, files), plugins).to(device)


def _detected(files: SAEFiles, plugins: PluginManager) -> Registered:
    items = [item for item in plugins.registries["pretrained_loaders"].items if _usable(item)]
    found, failed = recognised(items, files)
    if len(found) == 1:
        return found[0]
    names = ", ".join(item.key for item in found or items)
    if found:
        raise SAEFormatError(f"several loaders recognise {files.place}: {names}. Name one: loader=...")
    shown = ", ".join(sorted(files.names)[:10]) or "no files"
    raise SAEFormatError(
        f"no loader recognises {files.place}, which has {shown}. There are {names}; name one: loader=..."
        + "".join(f"\n{text}" for text in failed)
    )


def _usable(item: Registered) -> bool:
    """Whether the loader can be tried as it is: nothing is missing and no option is required."""
    return not item.missing() and all(field.default is not attrs.NOTHING for field in attrs.fields(item.entry.config))


def _is_own(files: SAEFiles) -> bool:
    return CONFIG in files.names and isinstance(files.json(CONFIG).get("saekit"), dict)


def _read_own(files: SAEFiles) -> PretrainedSAE:
    own = files.json(CONFIG)["saekit"]
    if own.get("format") != FORMAT:
        raise SAEFormatError(
            f"{files.place} has format {own.get('format')!r}, and this saekit reads {FORMAT}: update saekit to load it"
        )
    for key, kind in (("architecture", str), ("options", dict), ("metadata", dict), ("site", (dict, type(None)))):
        if not isinstance(own.get(key), kind):
            raise SAEFormatError(f"saekit.{key} in {CONFIG} of {files.place} is missing or of the wrong kind")
    _check_sums(own.get("sha256", {}), files)
    sparsity = read_tensors(files, SPARSITY) if SPARSITY in files.names else {}
    return PretrainedSAE(
        architecture=own["architecture"],
        options=own["options"],
        tensors=read_tensors(files, WEIGHTS),
        site=_site(own["site"], files),
        log_sparsity=sparsity.get("sparsity"),
        metadata=own["metadata"],
    )


def _check_sums(sums: object, files: SAEFiles) -> None:
    """What was saved is what is read: a damaged file is found before its numbers are used."""
    for name, expected in sums.items() if isinstance(sums, dict) else ():
        if (found := sha256(files.path(name))) != expected:
            raise SAEFormatError(
                f"{name} in {files.place} is damaged or was changed after it was saved: its sha256 is {found[:12]}..., "
                f"expected {str(expected)[:12]}... Restore it, or remove saekit.sha256 from {CONFIG} to accept it"
            )


def _site(table: Mapping[str, Any] | None, files: SAEFiles) -> Site | None:
    try:
        return None if table is None else Site(**table)
    except (TypeError, ConfigError) as error:
        raise SAEFormatError(f"saekit.site in {CONFIG} of {files.place} is not a site: {error}") from error


def read_tensors(files: SAEFiles, name: str) -> dict[str, Tensor]:
    """The tensors of a safetensors file; a damaged file is a :class:`SAEFormatError`."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(files.path(name))
    except SafetensorError as error:
        raise SAEFormatError(f"{name} in {files.place} is not a readable safetensors file: {error}") from error


def build_sae(read: PretrainedSAE, plugins: PluginManager) -> SAE:
    """The module that ``read`` describes, with its weights."""
    item = plugins.get("sae_architectures", read.architecture)
    try:
        config: Any = ConfigConverter(plugins).structure(
            dict(read.options), item.entry.config, "the saved SAE's options"
        )
    except ConfigError as error:
        raise SAEFormatError(f"the saved SAE's options do not fit {item.key}: {error}") from error
    d_in = config.d_in or read.tensors["b_dec"].shape[0]
    expected = [d_in, config.features(d_in)]
    if "W_enc" in read.tensors and list(read.tensors["W_enc"].shape) != expected:  # before anything is allocated
        found = list(read.tensors["W_enc"].shape)
        raise SAEFormatError(f"the weights do not fit the options: W_enc has shape {found}, expected {expected}")
    sae = build_module(item, config, d_in, plugins)
    sae.info = attrs.evolve(sae.info, site=read.site, metadata=dict(read.metadata))
    sae.load_public_tensors(read.tensors)
    sae.log_sparsity = read.log_sparsity
    return sae


def build_module(item: Registered, config: Any, d_in: int, plugins: PluginManager) -> SAE:
    """An uninitialised SAE of the architecture ``item``."""
    from saekit.sae.records import SAEInfo

    config = attrs.evolve(config, d_in=d_in, d_sae=config.features(d_in), expansion_factor=None)
    activation = plugins.build("activation_functions", config.activation)
    sae: SAE = built(item, config, d_in=d_in, activation=activation)
    sae.info = SAEInfo(architecture=item.key, options=ConfigConverter(plugins).unstructure(config))
    return sae
