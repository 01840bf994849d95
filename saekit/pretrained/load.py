"""From files to an SAE: choose the loader, let it read, check what it read, build and fill the module."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import attrs

from saekit.ambient import ambient
from saekit.cautions import warn
from saekit.config import NEEDED_TO_LOAD, SAME_AT_START, PluginChoice
from saekit.config.converter import ConfigConverter
from saekit.devices import resolve_device
from saekit.errors import ConfigError, SAEFormatError, SaekitError, UnknownKeyError
from saekit.files.checksums import Checksums
from saekit.kinds import INPUT_TRANSFORMS, PRETRAINED_LOADERS, SAE_ARCHITECTURES
from saekit.plugins.choice import Choice
from saekit.plugins.manager import PluginManager, default_manager
from saekit.plugins.registry import Registered
from saekit.plugins.text import short
from saekit.pretrained.detecting import detected, read_with
from saekit.pretrained.overriding import overridden
from saekit.pretrained.provenance import OWN, checksums, provenance, verify
from saekit.protocols import PretrainedLoader
from saekit.saved import PretrainedSAE, SAEFiles
from saekit.site import Site, Sites
from saekit.values import Ports, SAEInfo

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from saekit.distributed.group import Group
    from saekit.sae.module import SAEModule

__all__ = ["build_sae", "load_sae", "loader_of"]

_DTYPES = ("float32", "bfloat16", "float64")


@ambient()
def load_sae(
    files: SAEFiles,
    *,
    loader: PluginChoice | Choice[PretrainedLoader] | None = None,
    device: str = "cpu",
    dtype: str | torch.dtype | None = None,
    plugins: PluginManager | None = None,
    faults: list[str] | None = None,
    origin: Mapping[str, Any] | None = None,
    checked: Callable[[SAEModule, SAEFiles], None] | None = None,
    features: Group | None = None,
) -> SAEModule:
    """The SAE in ``files``, read by ``loader``, or by the one loader that recognizes them.

    Its weights are in ``dtype``, or else in the files' type.  With ``faults``, checksums that do not fit are added to
    them, and what is there is read all the same.  ``origin`` is what its provenance says beside that.  ``checked``
    is called with the SAE as it lies in the files: in ``dtype`` it is only afterwards.  ``features`` are processes of
    which each is given its part of the features, where the architecture knows of parts; all of them must ask.
    """
    from saekit.pretrained.own import read_own

    dtype = _name_of(dtype)
    device = resolve_device(device, "device", dtype)
    plugins = plugins or default_manager()
    choice = loader_of(files, plugins) if loader is None else loader
    with Checksums() as sums, _a_processor_for_them():
        files = files.unopened(sums)
        try:
            if choice is None:
                read, key = read_own(files, sums, faults), OWN
            else:
                bound = _bound(choice, plugins)
                read, key = read_with(bound, files), bound.key
            if isinstance(read.tensors, Mapping):  # from now on nobody else's, so that each is free in its turn
                read = attrs.evolve(read, tensors=dict(read.tensors))
            read = overridden(read, files, key)
            try:
                first = dtype if checked is None else None
                sae = build_sae(
                    read,
                    plugins,
                    files.place,
                    own=choice is None,
                    dtype=first,
                    device=device,
                    spent=True,
                    features=features,
                    loader=key,
                )
            except SAEFormatError as error:
                raise _of_files(error, files) from error
        except SaekitError:
            verify(files, sums)  # a damaged file explains whatever it was
            raise
        found = checksums(files, sums)
    known = read.provenance or provenance(read, key, files, found, _of_training(sae))
    sae.info = attrs.evolve(sae.info, provenance={**known, **(origin or {})})
    return _as_wanted(sae.to(device), files, dtype, checked)


def _of_training(sae: SAEModule) -> Mapping[str, Any]:
    """Its options but those that decide how weights are used: what a loader does not say of these is always so."""
    fields = attrs.fields_dict(type(sae.config))
    fixed = {name for name, one in fields.items() if {NEEDED_TO_LOAD, SAME_AT_START} & one.metadata.keys()}
    return {name: value for name, value in sae.info.options.items() if name not in fixed}


def _as_wanted(
    sae: SAEModule, files: SAEFiles, dtype: str | None, checked: Callable[[SAEModule, SAEFiles], None] | None
) -> SAEModule:
    if checked is not None:
        checked(sae, files.unopened())
        if dtype is not None:
            import torch

            sae.cast_weights(getattr(torch, dtype))
    if dtype is not None:
        sae.state_dtype()
    return sae


def _bound(choice: PluginChoice | Choice[PretrainedLoader], plugins: PluginManager) -> Choice[PretrainedLoader]:
    return choice if isinstance(choice, Choice) else ConfigConverter(plugins).choice(choice, PRETRAINED_LOADERS)


def loader_of(files: SAEFiles, plugins: PluginManager) -> Choice[PretrainedLoader] | None:
    """The one loader that recognizes ``files``; None: they are saekit's own, which need none."""
    from saekit.pretrained.own import is_own

    if is_own(files.unopened()):
        return None
    return plugins.bound(PRETRAINED_LOADERS, detected(files.unopened(), plugins).key)


@contextmanager
def _a_processor_for_them() -> Iterator[None]:
    """Leave checksums a processor: torch's threads wait for each other busily, and on two that takes twice as long.

    What is done meanwhile gives the same numbers with any of them.
    """
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(max(1, threads - 1))
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _name_of(dtype: str | torch.dtype | None) -> str | None:
    """``float32`` for ``torch.float32``, too."""
    name = None if dtype is None else str(dtype).removeprefix("torch.")
    if name not in (None, *_DTYPES):
        raise ConfigError([("dtype", f"is {name!r}, expected one of {', '.join(_DTYPES)}, or None for the files' own")])
    return name


def _of_files(error: SAEFormatError, files: SAEFiles) -> SAEFormatError:
    """The same, with the files that were read, unless it names one of them."""
    if any(name in str(error) for name in files.opened):
        return error
    return SAEFormatError(f"{error} (read from {', '.join(sorted(files.opened))})")


def build_sae(
    read: PretrainedSAE,
    plugins: PluginManager,
    place: str = "the saved SAE",
    *,
    own: bool = False,
    dtype: str | None = None,
    device: str = "cpu",
    spent: bool = False,
    features: Group | None = None,
    loader: str = "",
) -> SAEModule:
    """The module that ``read`` describes, with its weights; nothing in it is taken for right unchecked.

    ``place`` and ``loader``, its key, are for messages; ``own``: it was read from a folder that saekit wrote.
    ``dtype`` is that of its weights, by default the one that they were read in, and ``device`` where they are put.
    ``spent``: ``read.tensors`` is a dictionary that may be emptied, so that hardly anything is in memory twice.
    ``features``: see :func:`load_sae`.
    """
    import torch

    from saekit.sae.build import build_module
    from saekit.sae.parameters import to_hold
    from saekit.sae.taking import take_over

    _check(read, place, loader)
    item = _architecture(read, plugins, place)
    config = _config(read, item, plugins, place, own)
    ports = _ports(read, config, place)
    try:
        with to_hold(read.tensors):
            sae = build_module(item, config, ports, plugins, _transform(read, plugins, place))
        _check_sparsity(read, sae.d_sae)
        tensors = read.tensors if spent and isinstance(read.tensors, dict) else dict(read.tensors)
        tensors = _of_part(sae, tensors, features)
        take_over(sae, tensors, _type_while_read(sae, read, dtype), torch.device(device))
    except (ConfigError, SAEFormatError) as error:
        raise SAEFormatError(f"the SAE in {place}: {error}") from error
    if read.activation_scale not in (None, 1) and not ports.same:
        raise SAEFormatError(
            f"the SAE in {place} has one activation scale, {read.activation_scale}, and its inputs "
            f"({', '.join(ports.inputs)}) and targets ({', '.join(ports.targets)}) are scaled each by its own: load it "
            "without a scale, and call sae.fold_activation_scale(factor, target_factor)"
        )
    metadata = SAEInfo(metadata=read.metadata).with_scale(read.activation_scale).metadata
    sae.info = attrs.evolve(sae.info, sites=_sites(read), metadata=metadata)
    if read.activation_scale not in (None, 1):
        sae.fold_activation_scale(read.activation_scale)
    if dtype is not None:
        sae.cast_weights(getattr(torch, dtype))
    sae.log_sparsity = None if read.log_sparsity is None else read.log_sparsity.detach().clone()
    if sae.info.scale_is_unknown:
        warn(
            f"the SAE in {place} was trained on activations scaled to mean norm sqrt(d_in), and its folder does not "
            "hold the factor: scale its input before use, or fold the factor in with "
            f"sae.fold_activation_scale({'factor' if ports.same else 'factor, target_factor'}) and save it",
        )
    return sae


def _of_part(sae: SAEModule, tensors: dict[str, Tensor], features: Group | None) -> dict[str, Tensor]:
    """``tensors``; where ``features`` share the SAE, it becomes a part, and of them there is that part."""
    from saekit.sae.splitting import is_saved_by_parts, keep_part, parts_of, saved_along

    if features is None or not is_saved_by_parts(type(sae)) or sae.d_sae % features.size:
        return tensors
    along = saved_along(sae, tensors)
    keep_part(sae, features, blank=True)
    return parts_of(tensors, along, features)


def _type_while_read(sae: SAEModule, read: PretrainedSAE, wanted: str | None) -> torch.dtype:
    """That which is ``wanted``, where no more than rounding each number leads to it."""
    import torch

    from saekit.sae.module import SAEModule

    own: torch.dtype = getattr(torch, sae.config.dtype)
    found: torch.dtype = own if wanted is None else getattr(torch, wanted)
    plain = all(
        getattr(type(sae), name) is getattr(SAEModule, name) for name in ("cast_weights", "load_public_tensors")
    )
    return found if plain and read.activation_scale in (None, 1) else own


_EXPECTED: Mapping[str, tuple[Any, str]] = {
    "architecture": (str, "the key of an architecture, a text"),
    "options": (Mapping, "a dict"),
    "tensors": (Mapping, "a dict of tensors"),
    "metadata": (Mapping, "a dict"),
    "site": (Site | None, "a saekit.Site, such as saekit.Site(hook_name=...), or None"),
    "sites": (Sites | None, "a saekit.Sites, or None"),
    "ports": (Ports | None, "a saekit.Ports, or None"),
}


def _check(read: PretrainedSAE, place: str, loader: str) -> None:
    from saekit.weights import check_tensor, check_tensors

    for name, (kind, expected) in _EXPECTED.items():
        if not isinstance(value := getattr(read, name), kind):
            by = f"the loader {loader}" if loader else "its loader"
            raise SAEFormatError(f"the SAE in {place}: {by} gave {short(value)} as {name}, expected {expected}")
    _check_ports(read, place)
    check_tensors(read.tensors, place)
    if read.log_sparsity is not None:
        check_tensor(read.log_sparsity, "log_sparsity", place, minus_infinity=True)
    scale = read.activation_scale
    if scale is not None and not 0 < scale < float("inf"):
        raise SAEFormatError(f"the activations of the SAE in {place} are scaled by {scale}, expected a number above 0")


def _architecture(read: PretrainedSAE, plugins: PluginManager, place: str) -> Registered:
    try:
        return plugins.get(SAE_ARCHITECTURES, read.architecture)
    except UnknownKeyError as error:
        raise UnknownKeyError(f"the architecture of the SAE in {place}: {error}") from None


def _config(read: PretrainedSAE, item: Registered, plugins: PluginManager, place: str, own: bool) -> Any:
    """The architecture's options; the type of the weights is that of the tensors, unless a loader wants another."""
    from saekit.pretrained.own import check_needed
    from saekit.sae.folder import CONFIG

    options = dict(read.options)
    if own:
        check_needed(options, item.entry.config, f"{CONFIG} of {place}")
    if read.tensors and (own or "dtype" not in options):
        options["dtype"] = _dtype(read)
    try:
        return ConfigConverter(plugins).structure(options, item.entry.config, "the saved SAE's options")
    except ConfigError as error:
        source = f" (saekit.options in {CONFIG})" if own else ""
        raise SAEFormatError(f"the SAE in {place}: its options do not fit {item.key}: {error}{source}") from error


def _dtype(read: PretrainedSAE) -> str:
    """That of the weights, where an SAE can have it.  Weights that a factor is folded into are not rounded again."""
    import torch

    from saekit.sae.folder import weights_dtype

    dtype = weights_dtype(read.tensors)
    rounds = dtype == torch.bfloat16 and read.activation_scale not in (None, 1)
    return "float32" if dtype == torch.float16 or rounds else str(dtype).removeprefix("torch.")


def _transform(read: PretrainedSAE, plugins: PluginManager, place: str) -> PluginChoice | None:
    """What rows go through, with a plugin that is there."""
    if read.input_transform is None:
        return None
    try:
        return ConfigConverter(plugins).choice(read.input_transform, INPUT_TRANSFORMS)
    except UnknownKeyError as error:
        raise UnknownKeyError(f"the input transform of the SAE in {place}: {error}") from None


def _ports(read: PretrainedSAE, config: Any, place: str) -> Ports:
    if read.ports is not None:
        return read.ports
    if config.d_in is None:
        raise SAEFormatError(f"{place} says d_in nowhere: a loader gives it among the options")
    return Ports.one(config.d_in) if read.site is None else Ports.one(config.d_in, read.site.name)


def _sites(read: PretrainedSAE) -> Sites | None:
    return read.sites if read.site is None else Sites.one(read.site)


def _check_ports(read: PretrainedSAE, place: str) -> None:
    """Sites and widths are of the same names."""
    sites, ports = _sites(read), read.ports
    if sites is None or (ports is None and read.site is not None):
        return
    named = [[site.name for site in some] for some in (sites.inputs, sites.targets)]
    wide = None if ports is None else [[*ports.inputs], [*ports.targets]]
    if named != wide:
        raise SAEFormatError(f"the loader of {place} gave the sites {named}, and widths of {wide}")


def _check_sparsity(read: PretrainedSAE, d_sae: int) -> None:
    if read.log_sparsity is not None and list(read.log_sparsity.shape) != [d_sae]:
        raise SAEFormatError(
            f"the weights do not fit the options: the log sparsity has shape {list(read.log_sparsity.shape)}, "
            f"expected {[d_sae]}"
        )
