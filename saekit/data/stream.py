"""What an activation source is built from."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch

from saekit.distributed.group import Group
from saekit.errors import ConfigError, DataError
from saekit.protocols import ModelBackend
from saekit.site import Site
from saekit.tokens import TokenChoice

if TYPE_CHECKING:
    from torch import Tensor

    from saekit.data.contexts import Contexts, ContextStream

__all__ = ["PROBED", "StreamContext", "check_by_token", "kept_of", "probe", "refuse_other_rows"]

PROBED = 2, 7
"""Contexts and positions of the tokens that a model is looked at with.  So many positions are unlike any usual number
of heads, so that [batch, head, ...] is not taken for them; and what is made once for all contexts is seen to be."""


def refuse_other_rows(text: str) -> None:
    """:class:`DataError` with ``text``."""
    raise DataError(text)


class StreamContext:
    """Everything that a source of activations may draw on.

    ``contexts`` opens the dataset and ``widths`` runs the model, each when it is first asked for: a source that reads
    its activations from elsewhere needs no text.
    """

    def __init__(
        self,
        *,
        backend: ModelBackend,
        sites: Sequence[Site],
        batch_size: int,
        seed: int,
        open_contexts: Callable[[], ContextStream],
        repeat: bool = True,
        find_identity: Callable[[], Mapping[str, Any]] = dict,
        model_lock: threading.RLock | None = None,
        has_model: bool = True,
        doubt: Callable[[str], None] = lambda text: None,
        say: Callable[[str], object] = lambda text: None,
        keeps_recipe: bool = False,
        differs: Callable[[str], None] = refuse_other_rows,
        choice: TokenChoice | None = None,
        masked: bool = False,
        process: int = 0,
        processes: int = 1,
        open_own: Callable[[], ContextStream] | None = None,
        readers: Group | None = None,
        left: Callable[[], int | None] = lambda: None,
    ) -> None:
        self.backend = backend
        self.choice = choice or TokenChoice()
        """Which tokens count: batches are of these alone.  A mask of the data comes with the contexts."""
        self.counts_all = self.choice.takes_all and not masked
        """Whether every token does."""
        self.sites = tuple(sites)
        """The sites to read: all inputs and targets of every dictionary that trains on these batches."""
        self.batch_size = batch_size
        """Rows in a batch."""
        self.process, self.processes = process, processes
        """The number of this process, from 0, and how many train together.  Each opens a source: see :attr:`own`."""
        self.readers = readers or Group()
        """Processes that read the same text, each for SAEs of its own: they can deal its forwards out among them."""
        self.seed = seed
        """For the source's own generators."""
        self.repeat = repeat
        """Whether data that ends is read again (``dataset.on_exhausted = "repeat"``)."""
        self.has_model = has_model
        """Whether ``backend`` is a language model: a run may have none, and then the source alone knows of activations.
        It states their widths (:class:`saekit.abilities.StatesWidths`), and there are no contexts."""
        self.model_lock = model_lock or threading.RLock()
        """Held while the model runs; a source that runs it in a thread of its own must hold it for each forward."""
        self.doubt = doubt
        """To be told, in words, of what looks wrong but would run."""
        self.say = say
        """To be told, in words, what is being done where that takes long."""
        self.keeps_recipe = keeps_recipe
        """Whether states are to hold how rows can be computed again, in the place of those that wait to be served."""
        self.differs = differs
        """To be told, in words, where rows that were computed again are not those that were saved; the caller goes on
        with the new ones when this returns."""
        self.left = left
        """Rows that are still to be taken, by all processes together; None: that is not known.  A source may do without
        what nobody will take, and must serve the same rows."""
        self._open_contexts, self._find_identity, self._open_own = open_contexts, find_identity, open_own

    @cached_property
    def contexts(self) -> ContextStream:
        """The packed contexts of the training text."""
        return self._open_contexts()

    @cached_property
    def own(self) -> StreamContext:
        """What this process has of it: a part of each batch, and the contexts of a part of the documents.

        For sources that share rows (:class:`saekit.abilities.SharesRows`).  One process has all of it.
        """
        if self.processes == 1:
            return self
        own = copy.copy(self)
        vars(own).pop("contexts", None)
        own.batch_size = self.batch_size // self.processes
        own._open_contexts = self._open_own or self._open_contexts
        return own

    def afresh(self) -> StreamContext:
        """The same part of the text, which nobody has begun to read."""
        other = copy.copy(self)
        vars(other).pop("contexts", None)
        return other

    def rows_per_context(self, context_size: int) -> int:
        """Tokens of a context that may count, at most."""
        return len(range(context_size)[slice(*self.choice.seqpos_slice)])

    @property
    def position(self) -> int | None:
        """Contexts that were taken from the text so far; None: nobody has opened it."""
        contexts: ContextStream | None = vars(vars(self).get("own", self)).get("contexts")
        return None if contexts is None else contexts.contexts_served

    @cached_property
    def identity(self) -> Mapping[str, Any]:
        """What decides the activations (model, text, tokens): option paths to plain values."""
        return self._find_identity()

    @cached_property
    def _probed(self) -> dict[Site, tuple[int, torch.dtype]]:
        with self.model_lock:
            return probe(self.backend, self.sites)

    @property
    def widths(self) -> dict[Site, int]:
        """The width ``d_in`` of each site, found by running the model on a few tokens."""
        return {site: width for site, (width, _) in self._probed.items()}

    @property
    def dtypes(self) -> dict[Site, torch.dtype]:
        """The type of the numbers at each site."""
        return {site: dtype for site, (_, dtype) in self._probed.items()}


def kept_of(choice: TokenChoice, contexts: Contexts) -> Tensor:
    """``[n, context_size]`` bool: which tokens of ``contexts`` count, by the choice and by their mask."""
    kept = choice.kept(torch.from_numpy(contexts.tokens))
    return kept if contexts.counts is None else kept & torch.from_numpy(contexts.counts)


def probe(backend: ModelBackend, sites: Sequence[Site]) -> dict[Site, tuple[int, torch.dtype]]:
    """``d_in`` and dtype at each site, by one forward; :class:`ConfigError` for a hook without a vector per token."""
    tokens = torch.zeros(PROBED, dtype=torch.long)
    held = backend.run(tokens, read={site.hook_name for site in sites}).held if sites else {}
    found = {}
    for site in sites:
        values = held[site.hook_name]
        check_by_token(site, values, tokens)
        found[site] = (site.extract(values).shape[-1], values.dtype)
    return found


def check_by_token(site: Site, values: Tensor, tokens: Tensor) -> None:
    """:class:`ConfigError` unless the ``values`` that the hook of ``site`` holds are ``[batch, position, ...]``."""
    if values.shape[:2] != tokens.shape:
        raise ConfigError(
            f"the hook {site.hook_name!r} holds a tensor of shape {list(values.shape)} for {list(tokens.shape)} "
            "tokens; an SAE needs one vector per token: [batch, position, ...]"
        )
