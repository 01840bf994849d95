"""Model backend ``none``: there is no language model, and activations are the source's own."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

import attrs

from saekit import Entry, ModelError, hookimpl

if TYPE_CHECKING:
    from torch import Tensor

    from saekit.config import ModelConfig


@attrs.frozen(kw_only=True)
class NoModelConfig:
    """No language model: for activations that are on disk, or made by the source itself.  No text is opened."""


class NoModel:
    """Has no hooks, and refuses what a model would have to do."""

    name = "none"
    device = "cpu"
    n_ctx: int | None = None
    d_vocab = 1
    special_tokens: Mapping[str, int | None] = {"bos": None, "eos": None, "sep": None}

    def hook_names(self) -> Sequence[str]:
        return []

    def tokenize(self, text: str) -> list[int]:
        _refuse("tokens")

    def token_texts(self, tokens: Sequence[int]) -> list[str]:
        _refuse("texts of tokens")

    def run(self, tokens: Tensor, **options: Any) -> NoReturn:
        _refuse("activations of its own, and no loss")

    def unembedding(self) -> NoReturn:
        _refuse("unembedding")

    def fingerprint(self) -> str | None:
        return None


def _refuse(what: str) -> NoReturn:
    raise ModelError(f"this run has no language model (model.backend=none), and so no {what}")


def _build(config: NoModelConfig, *, model: ModelConfig, loaded: object | None) -> NoModel:
    if loaded is not None:
        raise ModelError(
            f"model.backend is 'none', and a model was passed, a {type(loaded).__name__}; leave out one of the two"
        )
    return NoModel()


@hookimpl
def saekit_register_model_backends() -> Iterable[Entry]:
    yield Entry(
        "none", NoModelConfig, _build, summary="no language model: activations of the source's own", no_model=True
    )
