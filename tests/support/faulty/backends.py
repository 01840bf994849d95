"""Model backends that break a promise each."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from support.faulty.case import Case, cases
from torch import Tensor

from saekit import Forward
from saekit.backends import Hooks
from saekit.testing import FakeBackend, fake_plugin

COUNT = itertools.count()


class Unhooked(FakeBackend):
    hook_names = None  # type: ignore[assignment]


class NoSizes(FakeBackend):
    d_vocab = 0


class Thorough(FakeBackend):
    def run(self, tokens: Tensor, *, want: Any = "held", **how: Any) -> Forward:
        return super().run(tokens, want="logits" if want == "held" else want, **how)


class Doubled(FakeBackend):
    def run(self, tokens: Tensor, **how: Any) -> Forward:
        found = super().run(tokens, **how)
        return Forward(found.held, loss=2 * found.loss) if how.get("want") == "loss" else found


class Replacing(FakeBackend):
    """Makes something else of every replacement."""

    def __init__(self, change: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.change = change

    def run(self, tokens: Tensor, *, replace: Mapping[str, Any] | None = None, **how: Any) -> Forward:
        def changed(function: Any) -> Any:
            return lambda held: self.change(function, held)

        return super().run(tokens, replace={name: changed(f) for name, f in (replace or {}).items()}, **how)


def moved(function: Any, held: Tensor) -> Tensor:
    return function(held) + 0.1


def ignored(function: Any, held: Tensor) -> Tensor:
    function(held)
    return held


def twice(function: Any, held: Tensor) -> Tensor:
    function(held)
    return function(held)


class Scarred(FakeBackend):
    scar = 0.0

    def run(self, tokens: Tensor, **how: Any) -> Forward:
        try:
            found = super().run(tokens, **how)
        except Exception:
            self.scar = 1.0
            raise
        return Forward(found.held, logits=found.logits + self.scar) if how.get("want") == "logits" else found


class Curt(FakeBackend):
    def run(self, tokens: Tensor, *, read: Any = (), **how: Any) -> Forward:
        return super().run(tokens, read={[*self.hook_names()][self.hook_names().index(name)] for name in read}, **how)


class Recording(FakeBackend):
    def run(self, tokens: Tensor, *, grad: bool = False, **how: Any) -> Forward:
        return super().run(tokens, grad=True, **how)


class Picky(FakeBackend):
    def run(self, tokens: Tensor, **how: Any) -> Forward:
        if tokens.dtype != torch.long:
            raise TypeError("tokens must be of 64 bits")
        return super().run(tokens, **how)


class Marking(FakeBackend):
    def tokenize(self, text: str) -> list[int]:
        return [0, *super().tokenize(text)]


class Turned(FakeBackend):
    def unembedding(self) -> tuple[Tensor, Tensor | None]:
        return self._embedding(), None


class Boasting(FakeBackend):
    def hook_names(self) -> Sequence[str]:
        return [*super().hook_names(), "narrow"]

    def in_residual_stream(self, hook_name: str) -> bool:
        return True

    def forward(self, tokens: Tensor, hooks: Hooks) -> Tensor | None:
        hooks("narrow", self._embedding()[tokens][..., :4])
        return super().forward(tokens, hooks)


class Restless(FakeBackend):
    def fingerprint(self) -> str:
        return f"model {next(COUNT)}"


def of(kind: Callable[[], Any]) -> Callable[..., Any]:
    return lambda config, **services: kind()


CASES = cases(
    "model_backends",
    {
        "build": (r"which lacks hook_names\(\)", of(Unhooked)),
        "values": ("d_vocab is 0, expected a whole number above 0", of(NoSizes)),
        "early_stop": ("the forward goes on to 'blocks.1.hook_resid_post' after 'hook_embed'", of(Thorough)),
        "loss": ("the loss: off by 1 of the largest number", of(Doubled)),
        "identity": ("logits with 'hook_embed' replaced by itself: off by", of(lambda: Replacing(moved))),
        "zero": ("change no logits: replacements do not reach the model", of(lambda: Replacing(ignored))),
        "two_hooks": ("replacements were called at .*, each once", of(lambda: Replacing(twice))),
        "nothing_left": ("logits, afterwards,: off by", of(Scarred)),
        "refusals": ("a hook that is not there raises ValueError", of(Curt)),
        "grad": ("without grad, gradients are recorded", of(Recording)),
        "types": ("tokens must be of 64 bits", of(Picky)),
        "tokenizer": (r"tokenize makes \[0\] of no text", of(Marking)),
        "unembedding": (r"its weights have the shape \[128, 8\], expected \[d_model, 128\]", of(Turned)),
        "residual_stream": ("it says yes of .*'narrow': 4.*, and the unembedding reads 8", of(Boasting)),
        "fingerprint": ("it is 'model .*', and of the same weights 'model", of(Restless)),
    },
)
CASES.append(
    Case(
        "outline",
        r"in its outline 'hook_embed' is on cpu, where it takes memory; expected meta",
        fake_plugin("model_backends", build=of(FakeBackend), outline=lambda config, *, model: FakeBackend()),
    )
)
