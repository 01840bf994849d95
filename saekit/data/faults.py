"""Faults that are found one by one, told together."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from numbers import Integral
from typing import Any

from saekit.errors import ConfigError, DataError, ModelError, SaekitError

__all__ = ["TokenizingError", "check_all", "check_counts", "problems_of"]


class TokenizingError(DataError):
    """Processes that tokenize have failed, which is no document's fault."""


def check_all(*checks: Callable[[], object]) -> None:
    """Run every check; a single error is raised as it is, several as one :class:`ConfigError` with all of them."""
    errors: list[SaekitError] = []
    for check in checks:
        try:
            check()
        except SaekitError as error:
            errors.append(error)
    if len(errors) == 1:
        raise errors[0]
    if errors:
        raise ConfigError(list(dict.fromkeys(problem for error in errors for problem in problems_of(error))))


def problems_of(error: SaekitError) -> list[tuple[str, str]]:
    """Each fault that ``error`` tells of, as ``(option, message)``; those of models and data are one a line."""
    if isinstance(error, ConfigError):
        return list(error.problems)
    lines = str(error).splitlines() if isinstance(error, (DataError, ModelError)) else [str(error)]
    return [("", line) for line in lines]


def check_counts(state: Mapping[str, Any], *names: str) -> None:
    """:class:`ValueError` unless ``state``, which was read from a file, has whole numbers from 0 under ``names``."""
    for name in names:
        value = state[name]
        if not isinstance(value, Integral) or isinstance(value, bool) or not 0 <= int(value) < 2**63:
            raise ValueError(f"{name} of a saved state is {value!r}, expected a whole number from 0")
