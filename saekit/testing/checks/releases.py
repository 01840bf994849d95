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
    """It has releases, each of a name of its own, and every SAE's facts can be read."""
    found = _releases(subject)
    must(found, "releases() gives none")
    for one in found:
        must(isinstance(one, Release), f"releases() gives {one!r}, expected a saekit.pretrained.Release")
        must(one.ids, f"the release {one.name!r} has no SAEs")
        try:
            one.saes  # noqa: B018 - they are read here
        except SaekitError as error:
            raise Fault(f"of the release {one.name!r}: {error}") from error
    names = [one.name for one in found]
    twice = sorted({name for name in names if names.count(name) > 1})
    must(not twice, f"there are several releases of the name {', '.join(twice)}")


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
