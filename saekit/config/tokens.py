"""Which tokens count."""

from __future__ import annotations

from typing import Any

import attrs

from saekit.config.fields import not_empty
from saekit.config.showing import changed_repr
from saekit.errors import ConfigError

__all__ = ["TokensConfig"]


def _as_choice(value: Any) -> Any:
    """No ids mean the same as false."""
    return value if isinstance(value, bool) else tuple(value) if isinstance(value, (list, tuple)) and value else False


def _as_places(value: Any) -> Any:
    """Slices that leave nothing out all mean the same as none."""
    if not isinstance(value, (list, tuple)):
        return value
    return None if 1 <= len(value) <= 3 and all(item is None for item in value) else tuple(value)


def _check_ids(_: object, attribute: Any, value: Any) -> None:
    for token in () if isinstance(value, bool) else value:
        if type(token) is not int or token < 0:
            raise ConfigError(
                [(attribute.name, f"must be true, false or token ids from 0, found {token!r} among them")]
            )


def _check_slice(_: object, attribute: Any, value: Any) -> None:
    if value is None:
        return

    def refuse(why: str) -> ConfigError:
        return ConfigError([(attribute.name, f"is {list(value)!r}, {why}")])

    if not 1 <= len(value) <= 3:
        raise refuse("expected one to three numbers, as slice takes them: [stop], [start, stop] or [start, stop, step]")
    if any(item is not None and type(item) is not int for item in value):
        raise refuse("expected whole numbers and none")
    if len(value) == 3 and value[2] is not None and value[2] < 1:
        raise refuse("whose step must be 1 or more")


@attrs.frozen(kw_only=True)
class TokensConfig:
    """Which tokens count, in training, caches, evals and statistics.  The model reads all of them; the SAE sees those
    that count.  By default all do."""

    exclude_special_tokens: bool | tuple[int, ...] = attrs.field(
        default=False, converter=_as_choice, validator=_check_ids
    )
    """Special tokens that do not count, wherever they stand: all of the model's (`true`), or those with these ids."""
    seqpos_slice: tuple[int | None, ...] | None = attrs.field(
        default=None, converter=_as_places, validator=_check_slice
    )
    """The positions of a context that count, as `slice` takes them: `[5]` are the first five, `[1, "none"]` all but the
    first, `["none", "none", 2]` every other.  None: all."""
    mask_column: str | None = attrs.field(default=None, validator=not_empty)
    """A column of pretokenized data that says which tokens count, by a 0 or 1 for each.  Tokens that are put in do
    not."""

    __repr__ = changed_repr

    @property
    def chooses(self) -> bool:
        """Whether some tokens may not count."""
        return self != TokensConfig()

    def positions(
        self, context_size: int, *, section: str = "tokens.", size: str = "{} tokens (dataset.context_size)"
    ) -> int:
        """How many positions of a context may count; :class:`ConfigError`, which has ``section`` before the option and
        ``size`` with that of a context, for none."""
        places = self.seqpos_slice or (None,)
        count = len(range(context_size)[slice(*places)])
        if not count:
            of = f"a context of {size.format(context_size)}"
            raise ConfigError([(f"{section}seqpos_slice", f"is {list(places)!r}, which leaves no position of {of}")])
        return count
