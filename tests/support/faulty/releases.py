"""Lists of releases that break a promise each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import attrs
from support.faulty.case import cases

from saekit.pretrained import Release, Releases
from saekit.pretrained.releases import releases_of

SAES = {"first": "a/path", "second": {"l0": 3}}


def listed(**releases: Any) -> Callable[..., Releases]:
    """What builds a list of these, by name: their fields beside the repository."""
    table = {name: {"repo": "owner/repository", "saes": SAES, **fields} for name, fields in releases.items()}
    return lambda config: releases_of(table, "test", "a test")


def of(*releases: object) -> Callable[..., Any]:
    return lambda config: Releases(releases)  # type: ignore[arg-type]


def one(**changes: Any) -> Release:
    (release,) = listed(good={})(None).releases()
    return attrs.evolve(release, **changes)


def growing() -> Callable[..., Any]:
    asked: list[Release] = []

    def build(config: object) -> Releases:
        asked.append(one(name=f"a{len(asked)}"))
        return Releases(tuple(asked))

    return build


CASES = cases(
    "releases",
    {
        "build": ("a class, expected a release list: an instance of it", lambda config: Releases),
        "releases": ("releases\\(\\) gives 3, expected a saekit.pretrained.Release", of(3)),
        "names": ("there are several releases of the name good", of(one(), one())),
        "facts": ("of the release 'wrong': wrong.saes.a.l0: expected a number, found 'x'",
                  listed(wrong={"saes": {"a": {"l0": "x"}}})),
        "loaders": ("the release 'lost': Unknown pretrained loader 'nobodys'", listed(lost={"loader": "nobodys"})),
        "always_the_same": ("gives others when it is asked again", growing()),
    },
)  # fmt: skip
