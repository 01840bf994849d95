"""A tiny language model for tests."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from saekit.backends.base import Backend
from saekit.backends.forward import Hooks

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["FakeBackend"]


class FakeBackend(Backend):
    """A tiny language model for tests: an embedding that is doubled by each of two blocks, and an unembedding.

    Its hooks are ``hook_embed``, ``blocks.0.hook_resid_post``, ``blocks.1.hook_resid_post`` (``[b, t, 8]``) and
    ``blocks.0.attn.hook_z`` (``[b, t, 2, 4]``); its tokenizer gives each character a token, and its only special token
    is ``bos`` (0).
    """

    name = "fake"
    device = "cpu"
    n_ctx: int | None = 64
    d_vocab = 128
    d_model = 8

    def __init__(self, seed: int = 0) -> None:
        self.special_tokens: Mapping[str, int | None] = {"bos": 0, "eos": None, "sep": None}
        self.forwards: list[tuple[int, ...]] = []
        """The shape of the tokens of every forward so far."""
        self._seed = seed
        self._weights: Tensor | None = None

    def hook_names(self) -> Sequence[str]:
        return ["hook_embed", "blocks.0.attn.hook_z", "blocks.0.hook_resid_post", "blocks.1.hook_resid_post"]

    def tokenize(self, text: str) -> list[int]:
        return [min(ord(character), self.d_vocab - 1) for character in text]

    def token_texts(self, tokens: Sequence[int]) -> list[str]:
        return [chr(token) for token in tokens]

    def in_residual_stream(self, hook_name: str) -> bool:
        return hook_name in self.hook_names() and hook_name != "blocks.0.attn.hook_z"

    def unembedding(self) -> tuple[Tensor, Tensor | None]:
        return self._embedding().T, None

    def forward(self, tokens: Tensor, hooks: Hooks) -> Tensor | None:
        self.forwards.append(tuple(tokens.shape))
        embedding = self._embedding()
        residual = hooks("hook_embed", embedding[tokens])
        heads = hooks("blocks.0.attn.hook_z", residual.reshape(*residual.shape[:2], 2, 4))
        residual = hooks("blocks.0.hook_resid_post", residual + heads.flatten(-2))
        residual = hooks("blocks.1.hook_resid_post", residual * 2)
        return None if hooks.done else residual @ embedding.T

    def _embedding(self) -> Tensor:
        import torch

        if self._weights is None:
            with torch.inference_mode(False):  # gradients may be asked for later
                generator = torch.Generator().manual_seed(self._seed)
                self._weights = torch.randn(self.d_vocab, self.d_model, generator=generator)
        return self._weights
