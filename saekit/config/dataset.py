"""The text."""

from __future__ import annotations

from typing import Literal

import attrs

from saekit.config.fields import Token, check, not_empty, path_field
from saekit.config.showing import changed_repr
from saekit.errors import ConfigError

__all__ = ["DatasetConfig"]

_token = check(
    lambda v: v in ("bos", "eos", "sep", "none") if isinstance(v, str) else v >= 0,
    '"bos", "eos", "sep", "none" or a token id',
)

_template = check(lambda v: isinstance(v, bool) or bool(v.strip()), "true, false or a template, not an empty text")


@attrs.frozen(kw_only=True)
class DatasetConfig:
    """The text, and how it becomes contexts."""

    path: str = path_field("saekit/python-stdlib", validator=not_empty)
    """A dataset on the Hub, a `save_to_disk` folder, or text, JSONL or parquet files.  `saekit/python-stdlib` reads the
    sources of the running Python's standard library."""
    name: str | None = None
    """The configuration of a Hub dataset that has several."""
    split: str = attrs.field(default="train", validator=not_empty)
    """The split to train on."""
    revision: str | None = None
    """The revision of a Hub dataset."""
    data_files: tuple[str, ...] = path_field(())
    """The files of a dataset to read, as names or patterns (`["data/part-*.parquet"]`).  Empty: those of the split."""
    streaming: bool = True
    """Read a Hub dataset as it is needed, without downloading all of it first."""
    column: str | None = None
    """The column to read.  None: the first of `tokens`, `input_ids` and `text` that is there."""
    context_size: int | None = attrs.field(default=None, validator=check(lambda v: v >= 2, "2 or more", most=2**24))
    """Tokens in a context, the prepended ones included.  None: that of pretokenized data, else 128."""
    prepend_bos: bool | None = None
    """Begin every context with the BOS token, exactly once.  None: as pretokenized data does, else true."""
    begin_batch_token: Token | None = attrs.field(default=None, validator=_token)
    """The token that begins every context when `prepend_bos` is off: `bos`, `eos`, `sep`, an id, or `none`.  None: as
    in pretokenized data, else `none`."""
    begin_sequence_token: Token | None = attrs.field(default=None, validator=_token)
    """The token put before each document.  None: as in pretokenized data, else `none`."""
    sequence_separator_token: Token | None = attrs.field(default=None, validator=_token)
    """The token put between two documents.  None: as in pretokenized data, else `bos`."""
    disable_concat_sequences: bool | None = None
    """One document in each context: shorter ones are left out, longer ones cut.  None: as in pretokenized data, else
    false."""
    chat_template: bool | str | None = attrs.field(default=None, validator=_template)
    """Documents are conversations, lists of messages with `role` and `content`, and become text by the tokenizer's chat
    template (`true`), or by this one: one of its templates by name, or one in full.  None: as in pretokenized data,
    else false."""
    on_exhausted: Literal["repeat", "stop", "error"] = "repeat"
    """When the text ends before training does: read it again, end training cleanly, or fail."""

    __repr__ = changed_repr

    def __attrs_post_init__(self) -> None:
        if self.prepend_bos is not False and self.begin_batch_token not in (None, "none", "bos"):
            raise ConfigError(
                [("begin_batch_token", f"is {self.begin_batch_token!r}, but prepend_bos begins contexts with BOS; "
                  "set dataset.prepend_bos=false to use another token")]
            )  # fmt: skip
