"""Model backends that break a promise each."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import attrs
import torch
from support.faulty.case import Case, cases
from torch import Tensor

from saekit import Forward
from saekit.backends import Hooks, InsideBackend
from saekit.config import ModelConfig
from saekit.errors import ModelError
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


class Inferring(FakeBackend):
    """What it gives can take part in no gradient."""

    @contextmanager
    def running(self, tokens: Tensor, *, grad: bool) -> Iterator[None]:
        with super().running(tokens, grad=grad), torch.inference_mode(not grad):
            yield


class Picky(FakeBackend):
    def run(self, tokens: Tensor, **how: Any) -> Forward:
        if tokens.dtype != torch.long:
            raise TypeError("tokens must be of 64 bits")
        return super().run(tokens, **how)


class Lenient(FakeBackend):
    """Takes tokens without a batch, as its library does."""

    def run(self, tokens: Tensor, **how: Any) -> Forward:
        return super().run(tokens if tokens.ndim > 1 else tokens[None], **how)


class Wrapping(FakeBackend):
    """Takes ids below 0, as indices of torch are."""

    def run(self, tokens: Tensor, **how: Any) -> Forward:
        return super().run(tokens if tokens.ndim < 2 or tokens.is_floating_point() else tokens % 128, **how)


class Idle(FakeBackend):
    """Where nothing is asked for, nothing happens."""

    def run(self, tokens: Tensor, **how: Any) -> Forward:
        return super().run(tokens, **how) if {"want", "read"} & {*how} else Forward({})


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
        narrow = hooks("narrow", self._embedding()[tokens][..., :4])
        out = super().forward(tokens, hooks)
        return None if out is None else out + narrow.sum(-1, keepdim=True)


class Pointing(FakeBackend):
    """Its heads are added as they are."""

    def __init__(self, factor: float = 1) -> None:
        super().__init__()
        self.factor = factor

    def to_residual_stream(self, hook_name: str) -> Tensor | None:
        return self.factor * torch.eye(8) if hook_name == "blocks.0.attn.hook_z" else None


class Norming(Pointing):
    """They are normalized before."""

    def forward(self, tokens: Tensor, hooks: Hooks) -> Tensor | None:
        residual = hooks("hook_embed", self._embedding()[tokens])
        heads = hooks("blocks.0.attn.hook_z", residual.unflatten(-1, (2, 4)))
        normed = heads.flatten(-2) / heads.flatten(-2).norm(dim=-1, keepdim=True)
        residual = hooks("blocks.1.hook_resid_post", hooks("blocks.0.hook_resid_post", residual + normed))
        return None if hooks.done else residual @ self._embedding().T


class Restless(FakeBackend):
    def fingerprint(self) -> str:
        return f"model {next(COUNT)}"


class Looking(FakeBackend):
    """Its second block sees what comes later."""

    def forward(self, tokens: Tensor, hooks: Hooks) -> Tensor | None:
        self._weights = self._embedding() + 1e-3 * tokens.float().mean()
        return super().forward(tokens, hooks)


class Crowded(FakeBackend):
    """Scales with the number of contexts."""

    def forward(self, tokens: Tensor, hooks: Hooks) -> Tensor | None:
        out = super().forward(tokens, hooks)
        return None if out is None else out * len(tokens)


class Deaf(FakeBackend):
    """Its loss is of a forward without replacements."""

    def run(self, tokens: Tensor, *, replace: Any = None, want: Any = "held", **how: Any) -> Forward:
        found = super().run(tokens, replace=replace, want=want, **how)
        return super().run(tokens, want=want, **how) if want == "loss" else found


class Terse(FakeBackend):
    def no_hook(self, name: str) -> ModelError:
        return ModelError(f"no hook {name!r}")


class Cut(FakeBackend):
    """Gradients end at a replacement."""

    def run(self, tokens: Tensor, *, replace: Mapping[str, Any] | None = None, **how: Any) -> Forward:
        def cut(function: Any) -> Any:
            return lambda held: function(held).detach()

        return super().run(tokens, replace={name: cut(f) for name, f in (replace or {}).items()}, **how)


class Misled(FakeBackend):
    """Its end of text is none of its tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.special_tokens = {"bos": 0, "eos": 3, "sep": None}
        self.tokenizer = self

    bos_token_id, eos_token_id = 0, 4


@attrs.frozen(kw_only=True)
class Passing:
    """Takes whatever is passed on."""

    forward_kwargs: dict[str, Any] = attrs.field(factory=dict)
    """Nothing of it is used."""


class Frozen(FakeBackend, InsideBackend):
    """A forward from inside goes on with what it makes itself."""

    def entry_of(self, hooks: Collection[str]) -> str | None:
        return None if {"hook_embed", "blocks.0.attn.hook_z"} & {*hooks} else "blocks.0.hook_resid_post"

    def run_from(self, tokens: Tensor, entry: str, value: Tensor, **how: Any) -> Forward:
        return self.run(tokens, **how)


class Renaming(FakeBackend):
    def hook_like(self, name: str) -> str | None:
        return name if name in self.hook_names() else "blocks.9.hook_resid_post"


class Clinging(FakeBackend):
    """What was attached stays."""

    @contextmanager
    def attached(self, replace: Mapping[str, Any], *, on_tokens: Any = None) -> Iterator[None]:
        with super().attached(replace, on_tokens=on_tokens):
            yield
        self._attached = (*self._attached, (dict(replace), None))


def of(kind: Callable[[], Any]) -> Callable[..., Any]:
    return lambda config, **services: kind()


class Mindful(FakeBackend):
    """It never says that a forward has ended."""

    @contextmanager
    def attached(self, replace: Mapping[str, Any], *, on_tokens: Any = None) -> Iterator[None]:
        def told(tokens: Any, before: int) -> None:
            if on_tokens is not None:
                on_tokens(tokens, before)

        with super().attached(replace, on_tokens=told):
            yield


class Point:
    """A hook point of a library that has a dictionary of them."""

    def __init__(self) -> None:
        self.functions: list[Any] = []

    @property
    def is_hooked(self) -> bool:
        return bool(self.functions)

    def __call__(self, value: Tensor) -> Tensor:
        for function in self.functions:
            value = function(value, self)
        return value


class Library:
    def __init__(self) -> None:
        self.points: dict[str, Point] = {}

    def add_hook(self, name: str, function: Any) -> None:
        self.points[name].functions.append(function)

    def reset_hooks(self) -> None:
        for point in self.points.values():
            point.functions.clear()


class Exposing(FakeBackend):
    """Without a fault, so that faulty ones differ from it by theirs alone."""

    def __init__(self) -> None:
        super().__init__()
        self.model = Library()

    @contextmanager
    def exposed(self, names: Collection[str]) -> Iterator[Mapping[str, Any]]:
        points, before = self.model.points, dict(self.model.points)
        points.update({name: Point() for name in names})
        try:
            yield {name: points[name] for name in names}
        finally:
            points.clear()
            points.update(before)


class Forgetful(Exposing):
    """After an exception its points stay."""

    @contextmanager
    def exposed(self, names: Collection[str]) -> Iterator[Mapping[str, Any]]:
        before = dict(self.model.points)
        self.model.points.update({name: Point() for name in names})
        yield {name: self.model.points[name] for name in names}
        self.model.points = before


class Unheard(Exposing):
    """Its points are not those that the library hooks."""

    @contextmanager
    def exposed(self, names: Collection[str]) -> Iterator[Mapping[str, Any]]:
        with super().exposed(names):
            yield {name: Point() for name in names}


class Processed(FakeBackend):
    """Without a fault, likewise."""

    def processing(self, hook_name: str | None = None, about: Mapping[str, Any] | None = None) -> Mapping[str, bool]:
        known = (
            {"fold_ln": True, "center_writing_weights": False} if about is None else about.get("model_processing", {})
        )
        return known if hook_name is None else {name: done for name, done in known.items() if name == "fold_ln"}


class Presuming(Processed):
    """Knows of every SAE how its model was loaded."""

    def processing(self, hook_name: str | None = None, about: Mapping[str, Any] | None = None) -> Mapping[str, bool]:
        return super().processing(hook_name, None if about == {} else about)


class Contrary(Processed):
    """Says something else of a hook than of the model."""

    def processing(self, hook_name: str | None = None, about: Mapping[str, Any] | None = None) -> Mapping[str, bool]:
        found = dict(super().processing(hook_name, about))
        return found if hook_name is None else found | {"fold_ln": False}


class Blind(Processed):
    """Does not read what SAEs say."""

    def processing(self, hook_name: str | None = None, about: Mapping[str, Any] | None = None) -> Mapping[str, bool]:
        return {} if about is not None else super().processing(hook_name)


class Sidestepping(FakeBackend):
    """Its other way comes to something else."""

    factor = 1.01

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.scale = 1.0

    def forward(self, tokens: Tensor, hooks: Hooks) -> Tensor | None:
        found = super().forward(tokens, hooks)
        return None if found is None else found * self.scale

    @contextmanager
    def aside(self) -> Iterator[None]:
        self.scale = self.factor
        try:
            yield
        finally:
            self.scale = 1.0

    def other_forwards(self) -> Mapping[str, Callable[[], AbstractContextManager[None]]]:
        return {"model.backend.value=1": self.aside}


class Sidling(Sidestepping):
    """Without a fault, likewise."""

    factor = 1.000001


class Unwritten(Sidling):
    """Tells of an option that it has not."""

    def other_forwards(self) -> Mapping[str, Callable[[], AbstractContextManager[None]]]:
        return {"model.backend.aside=true": self.aside}


class Sticking(Sidling):
    """Goes on another way after an error."""

    @contextmanager
    def aside(self) -> Iterator[None]:
        self.scale = self.factor
        yield
        self.scale = 1.0


CASES = cases(
    "model_backends",
    {
        "build": (r"which lacks hook_names\(\)", of(Unhooked)),
        "values": ("d_vocab is 0, expected a whole number above 0", of(NoSizes)),
        "early_stop": ("the forward goes on to 'blocks.1.hook_resid_post' after 'hook_embed'", of(Thorough)),
        "other_forwards": ("the loss with model.backend.value=1: off by", of(Sidestepping)),
        "activations": ("what 'hook_embed' holds, read alone,: off by", of(Looking)),
        "one_context": ("the loss of one context: off by", of(Crowded)),
        "loss": ("the loss: off by 1 of the largest number", of(Doubled)),
        "identity": ("logits with 'hook_embed' replaced by itself: off by", of(lambda: Replacing(moved))),
        "zero": ("change no logits: replacements do not reach the model", of(lambda: Replacing(ignored))),
        "loss_after_replacing": ("the loss with 'hook_embed' replaced: off by", of(Deaf)),
        "two_hooks": ("replacements were called at .*, each once", of(lambda: Replacing(twice))),
        "nothing_left": ("logits, afterwards,: off by", of(Scarred)),
        "refusals": ("a hook that is not there raises ValueError", of(Curt)),
        "near_names": ("of 'hook_embe' it says \"no hook 'hook_embe'\", and names no hook", of(Terse)),
        "grad": ("without grad, gradients are recorded", of(Recording)),
        "grad_through": ("no gradient flows through a replacement at 'hook_embed'", of(Cut)),
        "types": ("tokens must be of 64 bits", of(Picky)),
        "tokenizer": (r"tokenize makes \[0\] of no text", of(Marking)),
        "special_tokens": ("the special token eos is 3, and the tokenizer's 4", of(Misled)),
        "unembedding": (r"its weights have the shape \[128, 8\], expected \[d_model, 128\]", of(Turned)),
        "residual_stream": ("it says yes of .*'narrow': 4.*, and the unembedding reads 8", of(Boasting)),
        "leads_to_residual_stream": (
            "coordinate 0 of blocks.0.attn.hook_z changes blocks.0.hook_resid_post, .* gives$",
            of(lambda: Pointing(2)),
        ),
        "fingerprint": ("it is 'model .*', and of the same weights 'model", of(Restless)),
        "starts_inside": ("the loss with .* replaced, from|does not go on with the value that is given", of(Frozen)),
        "translates_hooks": (r"hook_like\('no.such.hook'\) is not None", of(Renaming)),
        "attaches_hooks": ("logits after the inner of two was taken away: off by", of(Clinging)),
        "exposes_hooks": ("of the model, after something was raised, .*points: found", of(Forgetful)),
        "states_processing": (
            r"of metadata that says nothing, processing\(\) says .*; exp",
            of(Presuming),
        ),
    },
)
CASES += cases(
    "model_backends", {"attaches_hooks": ("what on_tokens returns must be called when its forward has", of(Mindful))}
)
CASES += cases(
    "model_backends",
    {"kwargs": (r"forward_kwargs = \{no_such_argument = 1\} is taken, and nothing of it used", of(FakeBackend))},
    config=Passing,
)
CASES += [
    Case(
        "dtype",
        "logits of a model in torch.float64 are torch.float32",
        fake_plugin("model_backends", build=of(FakeBackend)),
        lambda folder: {"models": {"fake": ModelConfig(device="cpu")}},
    ),
    Case(
        "outline",
        r"in its outline 'hook_embed' is on cpu, where it takes memory; expected meta",
        fake_plugin("model_backends", build=of(FakeBackend), outline=lambda config, *, model: FakeBackend()),
    ),
]
