"""The activations that a run would train on, for code of a user's own."""

from __future__ import annotations

from collections.abc import Mapping
from types import TracebackType
from typing import Self

import attrs
import torch
from torch import Tensor

from saekit.ambient import ambient
from saekit.config import TrainConfig
from saekit.data import Corpus
from saekit.data.activations import check_contexts
from saekit.errors import ConfigError
from saekit.plugins.manager import PluginManager
from saekit.protocols import ModelBackend
from saekit.runs.checks import has_model
from saekit.runs.opening import loading_text, open_backend, open_source, open_stream, sites_by_option, widths_of
from saekit.status import Status
from saekit.values import Batch

__all__ = ["Activations"]


class Activations:
    """Batches of activations, as training reads them: an iterator, to be closed, best by ``with``.

    Each is a :class:`saekit.Batch`, whose tensors are the caller's to keep.  They end where training would.
    """

    @ambient()
    def __init__(
        self, config: TrainConfig, plugins: PluginManager, model: object | None, dataset: object | None, say: Status
    ) -> None:
        """Open what :func:`saekit.open_activations` has checked."""
        there = has_model(config, plugins)
        self._config, self._served = config, 0
        self._corpus = Corpus.of(config.dataset, config.evals, dataset, config.tokens.mask_column)
        if there:
            say(loading_text(config, plugins) if model is None else "looking at the model")
        self.backend: ModelBackend = open_backend(config, self._corpus, plugins, model, sites_by_option([config]))
        """The model, as :func:`saekit.load_model` gives it."""
        say("reading the text" if there else "opening the activation source")
        sites = config.sites.all
        self._stream = open_stream(config, self._corpus, plugins, self.backend, sites, left=lambda: self.left)
        self._source = open_source(config, plugins, self._stream)
        try:
            widths = widths_of(self._source, self._stream)
            self.widths: Mapping[str, int] = {site.name: widths[site] for site in sites}
            """How wide activations are, by the names of the sites."""
        except BaseException:
            self.close()
            raise

    def __repr__(self) -> str:
        widths = ", ".join(f"{name} [{width}]" for name, width in self.widths.items())
        return f"Activations({widths}, {self._served:,} of {self._config.training.total_tokens:,} tokens read)"

    @property
    def left(self) -> int:
        """Tokens that training would still read."""
        return self._config.training.total_tokens - self._served

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Batch:
        """``training.train_batch_size_tokens`` rows at each site, or what is left, before any normalization."""
        if not self.left:
            raise StopIteration
        with ambient():
            found = next(self._source).thinned(self.left)  # as training does with the last
            own = found.at(torch.arange(len(found)))  # a copy: the source uses its memory again
        self._served += len(own)
        return own

    @ambient()
    def contexts(self, n: int) -> Tensor:
        """The first ``n`` contexts of the text ``[n, context_size]``: token ids, packed as for training.

        Fewer where the text ends, if ``dataset.on_exhausted`` is not ``"repeat"``.
        """
        if isinstance(n, bool) or not isinstance(n, int) or n < 1:
            raise ConfigError([("n", f"is {n!r}, expected how many contexts, 1 or more")])
        if not self._stream.has_model:
            raise ConfigError("this configuration has no language model (model.backend=none), and so no contexts")
        corpus = attrs.evolve(self._corpus, mask=None)
        taken = corpus.contexts(self.backend).take(n)
        check_contexts(len(taken), corpus.context_size)
        return torch.from_numpy(taken.tokens)

    def close(self) -> None:
        """End the threads that read and run the model ahead."""
        self._source.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
