"""Backends that can begin a forward inside the model."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING

from saekit.backends.asked import check_asked, checked_tokens
from saekit.backends.base import Backend
from saekit.errors import ModelError
from saekit.values import Forward, Replacement, Want

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["InsideBackend"]


class InsideBackend(Backend):
    """A :class:`saekit.backends.Backend` with the ability :class:`saekit.abilities.StartsInside`.

    A subclass says which :meth:`entry_of` some hooks there is, and its ``forward`` begins at ``hooks.entry``, where
    that is not None: what ``hooks`` returns for that hook is what the model goes on with.
    """

    @abstractmethod
    def entry_of(self, hooks: Collection[str]) -> str | None:
        """See :meth:`saekit.abilities.StartsInside.entry_of`."""

    def run_from(
        self,
        tokens: Tensor,
        entry: str,
        value: Tensor,
        *,
        read: Collection[str] = (),
        replace: Mapping[str, Replacement] | None = None,
        want: Want = "held",
        grad: bool = False,
    ) -> Forward:
        """See :meth:`saekit.abilities.StartsInside.run_from`.

        :class:`saekit.errors.ModelError` where no forward can begin at ``entry``, and for a hook that runs before it.
        """
        import torch

        read = [read] if isinstance(read, str) else read
        self._check_entry(entry, {*read, *(replace or ())})
        tokens = checked_tokens(tokens, self)
        if value.shape[:2] != tokens.shape:
            raise ModelError(
                f"what {entry!r} holds must be of the same tokens: [{', '.join(map(str, tokens.shape))}, ...], found "
                f"the shape {list(value.shape)}"
            )
        check_asked(read, replace, want, names="model.hook_names()")
        with torch.inference_mode(False):
            value = value.to(self.device)
            if value.is_inference():  # of the caller's, which no gradient may go through
                value = value.clone()
            if grad and not value.requires_grad:
                value = value.detach()  # gradients may begin here, and the caller's own stays as it is
        return self._run(tokens, read, replace, want, grad, (entry, value))

    def _check_entry(self, entry: str, hooks: Collection[str]) -> None:
        if (found := self.entry_of([entry])) != entry:
            if entry not in self.hook_names():
                raise self.no_hook(entry)
            hint = "" if found is None else f"; before it, it can at {found!r}"
            raise ModelError(f"a forward of {self.name!r} cannot begin at the hook {entry!r}{hint}")
        for name in sorted(hooks):
            if self.entry_of([entry, name]) != entry:
                if name not in self.hook_names():
                    raise self.no_hook(name)
                raise ModelError(
                    f"the hook {name!r} of {self.name!r} does not run in a forward that begins at {entry!r}"
                )
