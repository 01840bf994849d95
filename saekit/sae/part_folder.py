"""An SAE's folder, where each process has a part of the features: the first writes it, and nobody has the whole."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping

import attrs
from torch import Tensor

from saekit.distributed.group import Group
from saekit.distributed.handing import Collecting, Parted, collecting, hand_over, own_pieces
from saekit.files.storage import nothing
from saekit.files.tensors import in_order
from saekit.sae.folder import Contents, contents_of
from saekit.sae.module import SAEModule
from saekit.sae.splitting import saved_along

__all__ = ["PartContents", "part_contents_of", "whole_in_first"]


@attrs.frozen(eq=False)
class PartContents:
    """What is to be written of an SAE, with this process's part of its tensors."""

    rest: Contents
    """All that is no part: what the first process writes beside the tensors."""
    tensors: Mapping[str, Tensor]
    along: Mapping[str, int]
    """The dimension along which a tensor is split; those that all have alike are not in it."""
    part: int
    parts: int

    def whole(self, others: Collecting) -> Contents:
        """In the first process: all of it, of which the others hand over their parts while it is written."""
        tensors = {
            name: Parted(value, self.along[name], self.parts, others) if name in self.along else value
            for name, value in self.tensors.items()
        }
        return attrs.evolve(self.rest, tensors=tensors)


def part_contents_of(part: SAEModule) -> PartContents:
    """What the folder of the whole holds, in each of the processes that have parts of it, which all ask.

    Its tensors may be the part's own.  :class:`SAEFormatError` says what could not be loaded again; the others have
    :class:`StorageError` then.
    """
    contents, features = contents_of(part), part.share.features
    tensors = {name: value for name, value in contents.tensors.items() if isinstance(value, Tensor)}
    rest = attrs.evolve(contents, tensors={})
    return PartContents(rest, tensors, saved_along(part, tensors), features.rank, features.size)


@contextlib.contextmanager
def whole_in_first(
    group: Group, saes: Mapping[str, Contents | PartContents], go_on: Callable[[], None] = nothing
) -> Iterator[Mapping[str, Contents]]:
    """The SAEs that this process is to write, whole: those that it has so, and in the first of ``group`` all of parts.

    Those that have parts hand them over before they go on, and must have the same ``saes`` in the same order.
    """
    split = [sae for sae in saes.values() if isinstance(sae, PartContents)]
    if group.rank and split:
        pieces = ((one.tensors[name], one.along[name]) for one in split for name in _handed(one))
        hand_over(group, own_pieces(pieces, split[0].part, split[0].parts), go_on)
    if group.rank:
        yield {name: sae for name, sae in saes.items() if isinstance(sae, Contents)}
        return
    with contextlib.ExitStack() as stack:
        whole = {name: sae for name, sae in saes.items() if isinstance(sae, Contents)}
        if split:
            others = stack.enter_context(collecting(group, split[0].parts))
            whole |= {name: sae.whole(others) for name, sae in saes.items() if isinstance(sae, PartContents)}
        yield {name: whole[name] for name in saes}


def _handed(sae: PartContents) -> list[str]:
    """The names of the tensors of which parts are handed over, in their order."""
    return [name for name in in_order(sae.tensors) if name in sae.along]
