"""Faults that are found one by one, told together."""

from __future__ import annotations

from collections.abc import Callable

from saekit.errors import ConfigError, DataError, ModelError, SaekitError

__all__ = ["check_all", "problems_of"]


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
