"""Where in a model a dictionary belongs: the sites that it reads and writes, as it says them and as it is told them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence, Set
from typing import Any

import attrs

from saekit.errors import ConfigError
from saekit.site import Site, Sites
from saekit.values import Ports, SAEInfo

__all__ = ["NO_PLACE", "NoSiteError", "Placed", "check_ports"]

NO_PLACE = "the SAE does not say where in the model it belongs"
_SCALE = "activation_scale"
_SAY_PLACE = (
    "hook_name", "hook_head_index", "hook_layer", "hook_name_out", "hook_head_index_out", "hook_layer_out",
    "hf_hook_name", "hf_hook_name_out", "neuronpedia_id",
)  # fmt: skip
"""What loaders and releases leave in metadata that says where in the model it belongs."""
_LAYER = re.compile(r"(?:^|[./])(\d+)(?=[.-]|$)")
"""In a hook's name (``blocks.8.hook_resid_pre``), and in Neuronpedia's of an SAE (``gpt2-small/8-res-jb``)."""


def check_ports(ports: Ports, sites: Sites) -> None:
    """As many sites as there are inputs and targets; what writes elsewhere than it reads must be told where."""
    problems = [
        (what, f"are {len(named)} ({_listed(named)}), and the SAE has {len(widths)} ({', '.join(widths)})")
        for what, named, widths in (("inputs", sites.inputs, ports.inputs), ("targets", sites.targets, ports.targets))
        if len(named) != len(widths)
    ]
    if not problems and sites.same and not ports.same:
        problems = [
            ("targets", f"are the inputs ({_listed(sites.inputs)}), and it is a transcoder, which writes elsewhere "
             f"({', '.join(ports.targets)}); give Sites(inputs, targets)")
        ]  # fmt: skip
    if problems:
        raise ConfigError(problems, "the sites")


def _listed(sites: Sequence[Site]) -> str:
    return ", ".join(site.name for site in sites)


class NoSiteError(ConfigError, AttributeError):
    """Of an SAE that does not know where it belongs.

    It is an :class:`AttributeError`, too, for whatever asks for each attribute that an object has: ``hasattr``,
    ``inspect.getmembers``, ``torch.jit.trace``.
    """


class Placed:
    """What :class:`saekit.sae.SAEModule` has of it."""

    info: SAEInfo
    ports: Ports

    @property
    def site(self) -> Site:
        """The site that it reads and writes; of one with several, the first that it reads.  Both can be set.

        ``sae.site = "blocks.8.hook_resid_pre"`` says where it belongs, to whatever takes it and to what :meth:`save`
        writes: a hook's name, a :class:`saekit.Site` for one attention head, or :class:`saekit.Sites` for a crosscoder
        or a transcoder.  Its :attr:`ports` are called by these names then, and what says another place in its metadata,
        such as ``neuronpedia_id``, goes.  :class:`saekit.errors.ConfigError` for sites that are not as many as it has,
        and where none is known that is asked for (it is an :class:`AttributeError` as well; ``sae.info.site`` is None
        then).
        """
        found = self.info.site
        if found is None:
            raise NoSiteError([("site", f"is missing: {NO_PLACE}; say it: sae.site = HOOK")])
        return found

    @site.setter
    def site(self, place: Site | Sites | str | None) -> None:
        self.sites = place

    @property
    def sites(self) -> Sites | None:
        """All sites that it reads and writes, None where they are not known.  Set as :attr:`site` is."""
        return self.info.sites

    @sites.setter
    def sites(self, place: Site | Sites | str | None) -> None:
        found = Sites.of(place) if isinstance(place, (Site, Sites, str)) and place != "" else None
        if found is None and place is not None:
            told = f"must be a hook's name, a saekit.Site or saekit.Sites, found {place!r}"
            raise ConfigError([("site", told)])
        metadata = _without_others(self.info.metadata, self.info.sites, found)
        if found is None:
            self.info = attrs.evolve(self.info, sites=None, metadata=metadata)
            return
        check_ports(self.ports, found)
        if self.ports.same and not found.same:
            told = f"are others ({_listed(found.targets)}) than the inputs, and this SAE writes what it reads"
            raise ConfigError([("targets", told)], "the sites")
        inputs, targets = (
            {site.name: width for site, width in zip(sites, widths.values(), strict=True)}
            for sites, widths in ((found.inputs, self.ports.inputs), (found.targets, self.ports.targets))
        )
        names = dict(zip((*self.ports.inputs, *self.ports.targets), (*inputs, *targets), strict=True))
        self.info = attrs.evolve(self.info, sites=found, metadata=_renamed(metadata, names))
        self.ports = Ports(inputs, targets)


def _without_others(metadata: Mapping[str, Any], before: Sites | None, found: Sites | None) -> Mapping[str, Any]:
    """``metadata`` without what says another place than ``found``: all that belonged to a place ``before``, too."""
    said = {name: metadata[name] for name in _SAY_PLACE if name in metadata}
    if before is None and found is None:
        return metadata
    agree: Set[str] = set()
    if found is not None:
        hooks = {
            "hook_name": found.inputs[0].hook_name, "hook_head_index": found.inputs[0].hook_head_index,
            "hook_name_out": found.targets[0].hook_name, "hook_head_index_out": found.targets[0].hook_head_index,
        }  # fmt: skip
        agree = {name for name, value in said.items() if name in hooks and value == hooks[name]}
        layers = {layer[1] for site in found.all if (layer := _LAYER.search(site.hook_name))}
        others = {name for name in said.keys() - hooks.keys() if not _may_be_of(said[name], layers)}
        if before in (None, found) and not others and said.keys() & hooks.keys() == agree:
            return metadata
    return {name: value for name, value in metadata.items() if name not in said or name in agree}


def _may_be_of(value: object, layers: Set[str]) -> bool:
    layer = _LAYER.search(str(value))
    return layer is None or not layers or layer[1] in layers


def _renamed(metadata: Mapping[str, Any], names: Mapping[str, str]) -> Mapping[str, Any]:
    """``metadata``, in which factors of sites go by their new names."""
    scale = metadata.get(_SCALE)
    if not isinstance(scale, Mapping):
        return metadata
    return {**metadata, _SCALE: {names.get(name, name): factor for name, factor in scale.items()}}
