"""What a list of releases promises."""

from __future__ import annotations

from typing import Any

from saekit.errors import SaekitError
from saekit.kinds import PRETRAINED_LOADERS
from saekit.released import Release
from saekit.testing.checks.check import Checks, Fault, Subject, must

CHECKS = Checks()


def _releases(subject: Subject) -> list[Any]:
    return [*subject.build().releases()]


@CHECKS.add
def build(subject: Subject) -> None:
    """It is built from the defaults of its options, and keeps to its protocol."""
    subject.build()


@CHECKS.add
def releases(subject: Subject) -> None:
    """It has releases, each with SAEs."""
    found = _releases(subject)
    must(found, "releases() gives none")
    for one in found:
        must(isinstance(one, Release), f"releases() gives {one!r}, expected a saekit.pretrained.Release")
        must(one.ids, f"the release {one.name!r} has no SAEs")


@CHECKS.add
def names(subject: Subject) -> None:
    """Each release has a name of its own, without what names are put together with."""
    found = [one.name for one in _releases(subject)]
    twice = sorted({name for name in found if found.count(name) > 1})
    must(not twice, f"there are several releases of the name {', '.join(twice)}")
    odd = [name for name in found if ":" in name or "/" in name or not name.strip()]
    must(not odd, f"{odd} are no names for releases: without : and /, please")


@CHECKS.add
def facts(subject: Subject) -> None:
    """What is said of every SAE is of the right kind."""
    for one in _releases(subject):
        try:
            one.saes  # noqa: B018 - they are read here
        except SaekitError as error:
            raise Fault(f"of the release {one.name!r}: {error}") from error


@CHECKS.add
def loaders(subject: Subject) -> None:
    """Every loader that a release names is there."""
    for one in _releases(subject):
        if one.loader is not None:
            try:
                subject.plugins.get(PRETRAINED_LOADERS, one.loader)
            except SaekitError as error:
                raise Fault(f"the release {one.name!r}: {str(error).splitlines()[0]}") from error


@CHECKS.add
def always_the_same(subject: Subject) -> None:
    """Asked again, it gives the same releases."""
    once, again = ([(one.name, one.ids) for one in _releases(subject)] for _ in range(2))
    must(once == again, "releases() gives others when it is asked again")
