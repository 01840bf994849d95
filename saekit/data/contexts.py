"""Stage two: documents packed into contexts of one length; nothing lost, nothing doubled."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeAlias

import attrs
import numpy as np
import numpy.typing as npt

from saekit.data.chats import DocumentIds
from saekit.data.dealing import checked_before
from saekit.data.documents import Conversation, Document, Masked
from saekit.data.faults import TokenizingError, check_counts
from saekit.data.handover import handed_over
from saekit.data.packer import ContextPacker, IntArray, Packed, TokenPolicy
from saekit.data.reader import DocumentReader
from saekit.data.text import Documents
from saekit.data.tokenizing import Ids, ReadAhead, TokenizingProcesses
from saekit.errors import ConfigError, DataError

__all__ = ["ContextStream", "Contexts", "Piece"]

Piece: TypeAlias = Callable[[int, int], tuple[int, int]]
"""Of a document's number and its tokens, where what is read of it begins and ends."""


@attrs.frozen(eq=False)
class Contexts:
    """Some contexts, ``[n, context_size]`` token ids, and where each token is from."""

    tokens: IntArray
    documents: IntArray
    """``[n, context_size]``: the document's position in the dataset.  A token that was put in belongs to the document
    that follows it."""
    counts: npt.NDArray[np.bool_] | None = None
    """``[n, context_size]``: which tokens count, by the mask that the data has; one that was put in does not.  None:
    there is no mask."""

    def __len__(self) -> int:
        return len(self.tokens)


class ContextStream:
    """Contexts from documents; ``take(n)`` gives the next ``n``, fewer only when the data has ended.

    ``documents`` are :class:`saekit.data.Documents`, or texts and lists of token ids that can be read again, which
    ``repeat`` does for ever; ``tokenize`` turns a text into ids, or a conversation.  Of a document, no more is packed
    than ``take`` needs, so a long one costs no memory beyond its own tokens.  With ``masked``, documents have masks.
    """

    def __init__(
        self,
        documents: Documents | Iterable[str | Sequence[int]],
        tokenize: Callable[[Any], Sequence[int]],
        policy: TokenPolicy,
        *,
        d_vocab: int,
        repeat: bool,
        masked: bool = False,
        piece: Piece | None = None,
    ) -> None:
        self.policy = policy
        self._piece = piece
        self._documents = documents if isinstance(documents, Documents) else Documents(documents)
        self._tokenize = tokenize
        self._d_vocab = d_vocab
        self._repeat = repeat
        self._packer = ContextPacker(policy, masked=masked)
        self._ready: list[Packed] = []
        self._processes: TokenizingProcesses | None = None
        self._reader = self._reading(0)
        self._before = self._reader.state_dict()  # the reader's state before the document in hand
        self._number = 0
        self._document: IntArray = np.empty(0, dtype=np.int64)
        self._counts: npt.NDArray[np.bool_] | None = None  # which of its tokens do, where there is a mask
        self._offset = 0  # tokens of the document in hand that are packed
        self._inherited: list[Mapping[str, Any]] = []  # of other processes: see saekit.data.handover
        self._joins = False  # whether the document in hand has its beginning elsewhere
        self._epoch = 0
        self._tokens_this_epoch = 0
        self.contexts_served = 0
        self.on_repeat: Callable[[int], None] | None = None
        """Told of the text's tokens when it is about to be read for the second time."""

    def _reading(self, epoch: int) -> DocumentReader | ReadAhead:
        reader = self._documents.read(epoch)
        return reader if self._processes is None else ReadAhead(reader, self._processes)

    def tokenize_ahead(self, count: int, option: str) -> None:
        """From here on, ``count`` processes tokenize texts before they are asked for; :meth:`close` ends them.

        :class:`ConfigError` names the ``option`` where they cannot.
        """
        first = self._documents.first
        if first is not None and not isinstance(first, str):
            raise ConfigError([(option, f"is {count}, but the dataset holds token ids: nothing is to be tokenized. "
                                "Set it to 0")])  # fmt: skip
        if not (isinstance(self._tokenize, DocumentIds) and self._tokenize.elsewhere):
            raise ConfigError(
                [(option, f"is {count}, but the model's backend does not say that its tokenizer can work in another "
                  "process (saekit.abilities.TokenizesElsewhere). Set it to 0")]
            )  # fmt: skip
        self._processes = TokenizingProcesses(self._tokenize, count, option)
        state = self._reader.state_dict()
        self._reader = self._reading(self._epoch)
        self._reader.load_state_dict(state)

    def close(self) -> None:
        """End the processes that tokenize, if there are any; no more can be taken then."""
        if self._processes is not None:
            self._processes.close()

    def take(self, n: int) -> Contexts:
        """The next ``n`` contexts, or what is left."""
        while len(self._ready) < n and self._pack_a_piece():
            pass
        rows, self._ready = self._ready[:n], self._ready[n:]
        self.contexts_served += len(rows)
        if not rows:
            empty = np.empty((0, self.policy.context_size), dtype=np.int64)
            return Contexts(empty, empty)
        return Contexts(*(np.stack(column) for column in zip(*rows, strict=True)))

    @property
    def readings(self) -> int:
        """How often the text was read to its end."""
        return self._epoch

    @property
    def left_out(self) -> int:
        """Documents so far that were too short for a context of their own, where contexts are of one document."""
        return self._packer.left_out

    @property
    def cut(self) -> int:
        """Documents so far that were longer than that."""
        return self._packer.cut

    def _pack_a_piece(self) -> bool:
        if self._offset >= len(self._document) and not self._open_document():
            return False
        whole, size = self.policy.one_document, self.policy.context_size
        piece = slice(self._offset, len(self._document) if whole else self._offset + size)
        counts = None if self._counts is None else self._counts[piece]
        tokens, begins = self._document[piece], self._offset == 0
        self._ready += self._packer.extend(tokens, self._number, begins=begins, joins=self._joins, counts=counts)
        self._offset, self._joins = self._offset + len(tokens), False
        return True

    def _open_document(self) -> bool:
        """Take the next document that is not empty in hand; False when there is none."""
        if self._inherited and self._open_inherited():
            return True
        while True:
            before = self._reader.state_dict()
            read = next(self._reader, None)
            if read is None:
                if not self._start_again():
                    return False
                continue
            self._hold(*read)  # if it raises, the state is still that of the document before
            self._before = before
            if self._piece is not None:
                self._cut(self._piece)
            self._tokens_this_epoch += len(self._document)
            if len(self._document):
                return True

    def _hold(self, number: int, document: Document | Ids, offset: int = 0) -> None:
        tokens = self._checked(document, number)
        self._number, self._document, self._offset = number, tokens, offset
        self._counts = document.counts if isinstance(document, Masked) else None

    def _cut(self, piece: Piece) -> None:
        """Go on with a piece of the document in hand, which need not begin it."""
        self._offset, end = piece(self._number, len(self._document))
        self._document, self._joins = self._document[:end], self._offset > 0

    def _open_inherited(self) -> bool:
        """Take what is left of the next document in hand that another process had; False when nothing is."""
        if "packer" not in self._inherited[0]:  # it is the one in hand, and done
            self._inherited = self._inherited[1:]
        while self._inherited:
            left = self._inherited[0]
            self._hold_inherited(left)
            waiting = self._packer.state_dict()["tokens"]
            self._ready += self._packer.take_over(left["packer"])
            self._joins = bool(waiting) and not left["packer"]["tokens"]
            self._inherited = [{name: left[name] for name in left if name != "packer"}, *self._inherited[1:]]
            if self._offset < len(self._document):
                return True
            self._inherited = self._inherited[1:]
        self._put_down()
        return False

    def _hold_inherited(self, left: Mapping[str, Any]) -> None:
        self._put_down()
        if "document" not in left:
            return None
        for number, document in self._documents.all_from(left["reader"]):
            if number == left["document"]:
                return self._hold(number, document, left["offset"])
        raise DataError(f"document {left['document']} of the dataset, which was being read, is gone; restore the data")

    def _put_down(self) -> None:
        self._document, self._offset = np.empty(0, dtype=np.int64), 0

    def _start_again(self) -> bool:
        if not self._repeat:
            return False
        if self._epoch > self._dealt_until:
            self._check_any()
        if not self._epoch and self.on_repeat is not None:
            self.on_repeat(self._packed_tokens)
        self._epoch, self._tokens_this_epoch = self._epoch + 1, 0
        self._reader = self._reading(self._epoch)
        self._before = self._reader.state_dict()
        self._put_down()  # so that the state is one of this reading
        return True

    @property
    def _dealt_until(self) -> int:
        """The last reading of which other readers have read some, so that nothing may be left for this one."""
        return max((reading for places in self._documents.before for reading, _ in places), default=-1)

    def _check_any(self) -> None:
        """:class:`DataError` where the whole reading gave nothing: there would be no end of them."""
        if not self._tokens_this_epoch:
            nothing = "hold no tokens" if self._reader.state_dict()["next"] else "are not there"
            raise DataError(
                f"the dataset's documents {nothing}: there is nothing to train on. If evals hold documents "
                "out, see evals.held_out_every and evals.split"
            )
        if self.policy.one_document and not self.contexts_served and not self._ready:
            raise DataError(
                f"all {self.left_out:,} documents are too short for a context of their own of "
                f"{self.policy.context_size} tokens (dataset.disable_concat_sequences), so they are left out. Lower "
                "dataset.context_size, or let documents share contexts"
            )

    @property
    def _packed_tokens(self) -> int:
        """Tokens so far, those that were put in included."""
        contexts = self.contexts_served + len(self._ready)
        return contexts * self.policy.context_size + len(self._packer.state_dict()["tokens"])

    def _checked(self, document: Document | Ids, number: int) -> IntArray:
        made_here = isinstance(document, (str, Conversation, Ids))
        if isinstance(document, (str, Conversation, Ids)):
            ids = self._tokenized(document, number)
        else:
            ids = document.tokens if isinstance(document, Masked) else document
        try:
            tokens = np.asarray(ids, dtype=np.int64)
        except (TypeError, ValueError, OverflowError) as error:
            if not made_here:
                raise
            raise DataError(
                f"tokenize of the model backend returned {ids!r:.60} for document {number}, expected token ids"
            ) from error
        if len(tokens) and not (tokens.min() >= 0 and tokens.max() < self._d_vocab):
            bad = int(tokens.max()) if tokens.max() >= self._d_vocab else int(tokens.min())
            if made_here:
                raise DataError(
                    f"tokenize of the model backend returned the token id {bad} for document {number}, but its "
                    f"vocabulary (d_vocab) ends at {self._d_vocab - 1}: the model has another tokenizer than it reads"
                )
            raise DataError(
                f"document {number} holds the token id {bad}, but the vocabulary ends at "
                f"{self._d_vocab - 1}: the data was tokenized for another model"
            )
        return tokens

    def _tokenized(self, document: str | Conversation | Ids, number: int) -> Sequence[int]:
        try:
            return document.get() if isinstance(document, Ids) else self._tokenize(document)
        except TokenizingError:
            raise
        except DataError as error:
            raise DataError(f"document {number}: {error}") from error

    def state_dict(self) -> dict[str, Any]:
        """The position in the documents and inside one of them, and the few tokens that wait; plain data."""
        return {
            "reader": self._before,
            "offset": self._offset,
            "in_hand": len(self._document) > 0,
            "epoch": self._epoch,
            "tokens_this_epoch": self._tokens_this_epoch,
            "contexts_served": self.contexts_served,
            "ready": [tuple(column.tolist() for column in columns) for columns in self._ready],
            "packer": self._packer.state_dict(),
            **self._shared_state(),
        }

    def _shared_state(self) -> dict[str, Any]:
        """What there is to know where other processes read the same text, or did."""
        before = self._documents.before
        if self._documents.place == (0, 1) and not before:
            return {}
        state: dict[str, Any] = {"document": self._number, "dealt": [list(map(list, places)) for places in before]}
        if self._inherited:
            first, *others = self._inherited
            first = first if "packer" in first else {**first, "offset": self._offset}
            state |= {"inherited": [first, *others], "in_hand": False, "offset": 0}
        return state

    def taken_over(self, states: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """The state of this part of the text, where all of it was read as in ``states``, of other parts."""
        if len(states) == 1 and states[0]["in_hand"]:  # one process need not say which document it had
            read = self._documents.all_from(states[0]["reader"])
            found = (number for number, document in read if len(self._checked(document, number)))
            states = [{"document": next(found, 0), **states[0]}]
        return handed_over(states, *self._documents.place)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on with the very next context."""
        check_counts(state, "offset", "epoch", "contexts_served", "tokens_this_epoch")
        ready = [tuple(map(np.array, columns)) for columns in state["ready"]]
        shape, kinds = (self.policy.context_size,), "iib" if self._packer.masked else "ii"
        if not all(
            "".join(column.dtype.kind for column in columns) == kinds
            and {column.shape for column in columns} == {shape}
            for columns in ready
        ):
            raise ValueError(f"the contexts that wait in a saved state are not of {self.policy.context_size} token ids")
        self._documents = self._documents.dealt_anew(checked_before(state.get("dealt", ())))
        self._reader = self._reading(state["epoch"])
        self._reader.load_state_dict(state["reader"])
        self._before, self._joins = state["reader"], False
        self._inherited = []
        self._put_down()
        if state["in_hand"] and self._open_document():
            self._offset = state["offset"]
        self._inherited = list(state.get("inherited", ()))
        if self._inherited and "packer" not in self._inherited[0]:
            self._hold_inherited(self._inherited[0])
        self._epoch, self.contexts_served = state["epoch"], state["contexts_served"]
        self._tokens_this_epoch = state["tokens_this_epoch"]
        self._ready = ready
        self._packer.load_state_dict(state["packer"])
