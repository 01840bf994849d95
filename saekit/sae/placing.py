"""Where in a model a dictionary belongs: the sites that it reads and writes, as it says them and as it is told them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import attrs

from saekit.errors import ConfigError
from saekit.site import Site, Sites
from saekit.values import Ports, SAEInfo

__all__ = ["NO_PLACE", "NoSiteError", "Placed", "check_ports"]

NO_PLACE = "the SAE does not say where in the model it belongs"
_SCALE = "activation_scale"


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
        or a transcoder.  Its :attr:`ports` are called by these names then.  :class:`saekit.errors.ConfigError` for
        sites that are not as many as it has, and where none is known that is asked for (it is an
        :class:`AttributeError` as well; ``sae.info.site`` is None then).
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
        if found is None:
            self.info = attrs.evolve(self.info, sites=None)
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
        self.info = attrs.evolve(self.info, sites=found, metadata=_renamed(self.info.metadata, names))
        self.ports = Ports(inputs, targets)


def _renamed(metadata: Mapping[str, Any], names: Mapping[str, str]) -> Mapping[str, Any]:
    """``metadata``, in which factors of sites go by their new names."""
    scale = metadata.get(_SCALE)
    if not isinstance(scale, Mapping):
        return metadata
    return {**metadata, _SCALE: {names.get(name, name): factor for name, factor in scale.items()}}
