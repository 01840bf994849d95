"""Options that files, copies and people cannot cope with."""

from __future__ import annotations

from typing import Any

import attrs
from support.faulty.case import Case

from saekit.testing import fake_plugin


def relu(config: Any) -> Any:
    return lambda pre: pre.relu()


@attrs.frozen(kw_only=True)
class Counted:
    """Changes what it is given."""

    value: int = attrs.field(default=0, converter=lambda value: value + 1)
    """Any number."""


def made_inside() -> type:
    @attrs.frozen(kw_only=True)
    class Hidden:
        """No pickle finds it."""

    return Hidden


@attrs.frozen(kw_only=True)
class Silent:
    """Says nothing of its option."""

    value: int = 0


def of(config: type) -> object:
    return fake_plugin("activation_functions", build=relu, config=config)


CASES = [
    Case("options_round_trip", r"from toml comes Counted\(value=\d\), expected Counted", of(Counted)),
    Case("options_are_plain", "cannot be pickled", of(made_inside())),
    Case("options_are_explained", "Silent says nothing of value; expected a docstring line under each", of(Silent)),
]
