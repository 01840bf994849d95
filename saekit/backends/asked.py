"""What a forward is asked for, looked at before it runs: its tokens, and what is to be seen of it.

Importing this imports no torch.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any, get_args

from saekit.errors import ModelError
from saekit.plugins.text import short
from saekit.values import Want

if TYPE_CHECKING:
    from torch import Tensor

    from saekit.protocols import ModelBackend

__all__ = ["check_asked", "checked_tokens", "odd_tokens"]


def check_asked(read: Collection[str], replace: Mapping[str, object] | None, want: Want, *, names: str) -> None:
    """Raise :class:`saekit.errors.ModelError` where nothing would be seen of a forward, so that none would run.

    ``names`` is what lists the hooks, as users write it.
    """
    if want not in get_args(Want):
        raise ValueError(f"want must be one of {', '.join(map(repr, get_args(Want)))}, found {want!r}")
    if want == "held" and not read:
        found = "nothing is asked for"
        if replace:
            found = f"nothing is asked for beside what replaces {', '.join(map(repr, replace))}"
        raise ModelError(
            f"{found}, so that no forward would run: ask for want='logits' or want='loss', or with read=[...] for what "
            f"hooks hold ({names} lists them)"
        )


def checked_tokens(tokens: Any, backend: ModelBackend) -> Tensor:
    """``tokens [b, t]`` of a type that models take; :class:`saekit.errors.ModelError` for what is no token ids of the
    model of ``backend``."""
    if not hasattr(tokens, "contiguous"):
        raise ModelError(
            f"run takes token ids as a tensor [batch, position], found {short(tokens)}; those of a text are "
            f"{_of_text(backend)}"
        )
    if tokens.ndim != 2:
        hint = "; those of one context are tokens[None]" if tokens.ndim == 1 else ""
        raise ModelError(f"run takes token ids [batch, position], found a tensor of shape {list(tokens.shape)}{hint}")
    kind = str(tokens.dtype).removeprefix("torch.")
    if tokens.is_floating_point() or tokens.is_complex() or kind == "bool":
        hint = "" if kind == "bool" else "; if they are ids that became another type, give tokens.long()"
        raise ModelError(f"run takes token ids, which are whole numbers (int64), found {kind}{hint}")
    found: Tensor = tokens if kind in ("int32", "int64") else tokens.long()
    if (odd := odd_tokens(found, backend)) is not None:
        raise ModelError(odd)
    return found


def odd_tokens(tokens: Tensor, backend: ModelBackend) -> str | None:
    """Why the model of ``backend`` cannot take the ids ``tokens [b, t]``, in words; None: it can, as far as is known.

    Ids that are on a GPU are not looked at, since one would have to wait for it.
    """
    length, most = tokens.shape[1], backend.n_ctx
    if not length:
        return f"there is no token in contexts of the shape {list(tokens.shape)}"
    if most is not None and length > most and not getattr(backend, "runs_beyond_n_ctx", False):
        return (
            f"contexts of {length:,} tokens are too long: the model {backend.name!r} takes at most {most:,}; cut them "
            f"([:, :{most}]), or into several"
        )
    if tokens.device.type != "cpu" or not tokens.numel():
        return None
    low, high = map(int, tokens.aminmax())
    if low >= 0 and high < backend.d_vocab:
        return None
    where = ((tokens < 0) | (tokens >= backend.d_vocab)).nonzero()[0].tolist()
    return (
        f"the token id {int(tokens[tuple(where)])} at {where} is none of the model {backend.name!r}, whose ids are 0 "
        f"to {backend.d_vocab - 1:,}; those of a text are {_of_text(backend)}"
    )


def _of_text(backend: ModelBackend) -> str:
    """What gives the tokens of a text as ``run`` takes them, in code."""
    return "model.to_tokens(text)" if hasattr(backend, "to_tokens") else "torch.tensor([model.tokenize(text)])"
