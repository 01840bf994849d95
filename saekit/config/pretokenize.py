"""Text to contexts, as a job of its own."""

from __future__ import annotations

import attrs

from saekit.config.dataset import DatasetConfig
from saekit.config.fields import a_seed, at_least_1, check, path_field
from saekit.config.model import ModelConfig
from saekit.config.showing import changed_repr
from saekit.errors import ConfigError

__all__ = ["PretokenizeConfig"]


@attrs.frozen(kw_only=True)
class PretokenizeConfig:
    """One run of `saekit pretokenize`: text in, shuffled contexts out.  The text is read once; when it ends before
    `max_contexts`, `dataset.on_exhausted=error` fails, and the others write what there is."""

    dataset: DatasetConfig = attrs.field(factory=DatasetConfig)
    """The text, and how it becomes contexts."""
    model: ModelConfig = attrs.field(factory=ModelConfig)
    """The model whose tokenizer is used, unless `tokenizer` names another."""
    tokenizer: str | None = path_field(None)
    """A Hugging Face tokenizer, by its folder, its name on the Hub, or that of a model that ships with saekit or a
    plugin; no model is loaded then."""
    folder: str | None = path_field(None)
    """The folder to write, which must be new.  Training reads it with `dataset.path`."""
    hub_repo_id: str | None = None
    """The dataset repository on the Hub to push to, as `owner/name`."""
    hub_revision: str | None = None
    """The branch to push to.  None: the repository's main one."""
    hub_private: bool = True
    """Make the repository private, if it is new."""
    shuffle: bool = True
    """Shuffle the contexts."""
    seed: int = attrs.field(default=42, validator=a_seed)
    """Seeds the shuffle."""
    num_proc: int = attrs.field(default=1, validator=check(lambda v: v >= 1, "1 or more", most=1024))
    """Processes that tokenize."""
    max_contexts: int | None = attrs.field(default=None, validator=at_least_1)
    """Stop after this many contexts.  None: all of the data."""
    verbose: bool = True
    """Show progress."""

    __repr__ = changed_repr

    def __attrs_post_init__(self) -> None:
        if self.folder is None and self.hub_repo_id is None:
            raise ConfigError([("folder", "is missing: name a folder to write, a hub_repo_id to push to, or both")])
        if self.hub_revision is not None and self.hub_repo_id is None:
            raise ConfigError([("hub_revision", "says where to push, but there is no hub_repo_id")])
