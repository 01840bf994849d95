"""Which tokens count: by what they are and by where they stand.

One choice is made once and saved with an SAE; training, caches, evals, splices and statistics ask it.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Self, TypeAlias

import attrs

from saekit.abilities import HasTokenizer
from saekit.config import TokensConfig
from saekit.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

    from saekit.protocols import ModelBackend

__all__ = ["Mask", "TokenChoice", "asked_tokens", "ids_of", "special_ids", "token_choice"]

_ANY_SIZE = 1 << 30
_AS_SLICE = "one to three numbers, as slice takes them"

Mask: TypeAlias = "Tensor | Callable[[Tensor], Tensor]"
"""Which positions count, of those that a :class:`TokenChoice` leaves: bool ``[b, t]``, or what makes it of the token
ids ``[b, t]`` of a forward."""


def ids_of(given: object) -> Tensor | None:
    """Token ids ``[b, t]``, where a forward is given some; those of one context may be ``[t]``.  None: others."""
    ids: Any = given
    if getattr(ids, "ndim", 0) not in (1, 2) or ids.is_floating_point():
        return None
    found: Tensor = ids if ids.ndim == 2 else ids[None]
    return found


def special_ids(backend: ModelBackend) -> frozenset[int]:
    """The ids of all special tokens of the model: those that its tokenizer calls so, and bos, eos and sep."""
    known = {token for token in backend.special_tokens.values() if token is not None}
    tokenizer = backend.tokenizer if isinstance(backend, HasTokenizer) else None
    return frozenset(known | set(getattr(tokenizer, "all_special_ids", ())))


def _ids(tokens: Iterable[int]) -> frozenset[int]:
    return frozenset(_one_list(tokens, "exclude", "a list of token ids"))


def _places(places: Any) -> Any:
    return _one_list(places, "seqpos_slice", _AS_SLICE)


def _one_list(value: object, option: str, expected: str) -> Any:
    problems: list[tuple[str, str]] = []
    found = _listed(value, option, expected, problems)
    if problems:
        raise ConfigError(problems, "the choice of tokens")
    return found


def _check_ids(choice: object, attribute: Any, value: frozenset[Any]) -> None:
    if odd := [token for token in value if type(token) is not int or token < 0]:
        raise ConfigError([(attribute.name, f"must be token ids from 0, found {odd[0]!r} among them")])


def _check_places(choice: object, attribute: Any, value: tuple[Any, ...]) -> None:
    TokensConfig(seqpos_slice=value)  # what is no slice there is none here


@attrs.frozen(kw_only=True)
class TokenChoice:
    """Those that count of contexts ``[b, t]``; by default all."""

    exclude: frozenset[int] = attrs.field(default=frozenset(), converter=_ids, validator=_check_ids)
    """Ids that do not count, wherever they stand."""
    seqpos_slice: tuple[int | None, ...] = attrs.field(default=(None,), converter=_places, validator=_check_places)
    """The positions of a context that count, as :class:`slice` takes them: ``(1,)`` is the first alone, ``(1, None)``
    all but that."""

    @property
    def takes_all(self) -> bool:
        """Whether every token counts."""
        return not self.exclude and not self.chooses_places

    @property
    def chooses_places(self) -> bool:
        """Whether some positions do not count."""
        places = slice(*self.seqpos_slice)
        return places.start not in (None, 0) or places.stop is not None or places.step not in (None, 1)

    def kept(self, tokens: Tensor, *, before: int = 0, length: int | None = None) -> Tensor:
        """``[b, t]`` bool: which of ``tokens [b, t]`` count.

        ``before`` positions of the context came before them, and it has ``length`` in all (``before + t``), from
        whose end negative numbers of the slice count.
        """
        import torch

        length = before + tokens.shape[1] if length is None else length
        by_place = torch.zeros(length, dtype=torch.bool)
        by_place[slice(*self.seqpos_slice)] = True
        kept = by_place[before : before + tokens.shape[1]].to(tokens.device).expand(tokens.shape)
        if not self.exclude:
            return kept.clone()
        excluded = torch.tensor(sorted(self.exclude), dtype=tokens.dtype, device=tokens.device)
        return kept & ~torch.isin(tokens, excluded)

    def metadata(self) -> dict[str, Any]:
        """As it is saved with an SAE: a choice that leaves nothing out has no entry."""
        found: dict[str, Any] = {}
        if self.exclude:
            found["exclude_special_tokens"] = sorted(self.exclude)
        if self.chooses_places:
            found["seqpos_slice"] = list(self.seqpos_slice)
        return found

    @classmethod
    def of_metadata(cls, metadata: Mapping[str, Any], special: Collection[int]) -> Self:
        """What :meth:`metadata`, or another library's, says; ``special`` are the ids that ``true`` means."""
        stated = metadata.get("exclude_special_tokens") or ()
        places: Sequence[int | None] = metadata.get("seqpos_slice") or (None,)
        excluded: Collection[int] = special if stated is True else stated
        return cls(exclude=excluded, seqpos_slice=tuple(places))


def token_choice(config: TokensConfig, backend: ModelBackend, *, section: str = "tokens.") -> TokenChoice:
    """The tokens that count by id and by position, with the ids of a model's tokens.

    :class:`ConfigError` for special tokens of a model that has none, and for ids that it lacks; it names the options
    with ``section`` before them.
    """
    chosen, option = config.exclude_special_tokens, f"{section}exclude_special_tokens"
    exclude = special_ids(backend) if chosen is True else frozenset(chosen or ())
    if chosen is True and not exclude:
        raise ConfigError(
            [(option, f"is true, and the model {backend.name!r} has no special tokens that are known; name their ids, "
              "or leave it out")]
        )  # fmt: skip
    if beyond := sorted(token for token in exclude if token >= backend.d_vocab and chosen is not True):
        raise ConfigError(
            [(option, f"has the token id {beyond[0]}, but the vocabulary of {backend.name!r} ends at "
              f"{backend.d_vocab - 1}")]
        )  # fmt: skip
    return TokenChoice(exclude=exclude, seqpos_slice=config.seqpos_slice or (None,))


def asked_tokens(exclude: object = None, places: object = None) -> TokensConfig:
    """What a caller's ``exclude_special_tokens`` and ``seqpos_slice`` say, as in a configuration.

    :class:`ConfigError` for what none could say, and for places that no context has.
    """
    problems: list[tuple[str, str]] = []
    if exclude is not None and not isinstance(exclude, bool):
        exclude = _listed(exclude, "exclude_special_tokens", "true, false or a list of token ids", problems)
    if places is not None:
        places = _listed(places, "seqpos_slice", _AS_SLICE, problems)
    if problems:
        raise ConfigError(problems)
    found = TokensConfig(
        exclude_special_tokens=exclude or False,
        seqpos_slice=places,
    )
    found.positions(_ANY_SIZE, section="", size="any size")
    return found


def _listed(value: object, option: str, expected: str, problems: list[tuple[str, str]]) -> Any:
    """The items of a list, set, array or tensor, numbers of other libraries as our own."""
    from saekit.plugins.text import short

    items = value.tolist() if hasattr(value, "tolist") else value
    if not isinstance(items, Iterable) or isinstance(items, (str, bytes, Mapping)):
        problems.append((option, f"must be {expected}, found {short(value)}"))
        return None
    return tuple(operator.index(one) if hasattr(one, "__index__") and type(one) is not bool else one for one in items)
