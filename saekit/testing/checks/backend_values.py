"""What a model backend promises of values, types and options beside its forward."""

from __future__ import annotations

import contextlib
import copy
import io
from collections.abc import Mapping
from typing import Any

import attrs

from saekit.abilities import HasMemory, HasTokenizer, KnowsResidualStream
from saekit.config import ModelConfig
from saekit.errors import ModelError, SaekitError
from saekit.plugins.building import built, outlined
from saekit.reasons import error_text
from saekit.testing.checks.check import Checks, Fault, NotTried, Subject, must
from saekit.testing.checks.numbers import must_agree
from saekit.testing.checks.tried_models import Tried, backend_of

CHECKS = Checks()
TEXT = "def add(a, b):\n    return a + b\n"


@CHECKS.add
def tokenizer(subject: Subject) -> None:
    """``tokenize`` gives ids without special tokens, and ``token_texts`` says what they stand for."""
    backend = backend_of(subject)
    if isinstance(backend, HasTokenizer) and backend.tokenizer is None:
        raise NotTried("the model has no tokenizer")
    ids = backend.tokenize(TEXT)
    fine = isinstance(ids, list) and all(isinstance(token, int) and 0 <= token < backend.d_vocab for token in ids)
    must(fine and ids, f"tokenize gives {ids!r:.80}, expected a list of ids below {backend.d_vocab}")
    must(backend.tokenize("") == [], f"tokenize makes {backend.tokenize('')} of no text")
    texts = backend.token_texts(ids)
    must(len(texts) == len(ids), f"token_texts gives {len(texts)} texts for {len(ids)} tokens")
    found, expected = ("".join("".join(text).split()).casefold() for text in (texts, TEXT))
    must(found == expected, f"the texts of the tokens of {TEXT!r} are {texts}")


@CHECKS.add
def special_tokens(subject: Subject) -> None:
    """Those that it says there are, are the tokenizer's, have a text each, and can be run."""
    import torch

    backend = backend_of(subject)
    there = {name: token for name, token in backend.special_tokens.items() if token is not None}
    tokenizer = backend.tokenizer if isinstance(backend, HasTokenizer) else None
    for name, token in there.items():
        if tokenizer is not None:
            own = getattr(tokenizer, f"{name}_token_id", token)
            must(own == token, f"the special token {name} is {token}, and the tokenizer's {own}")
    ids = [*there.values()]
    if not ids:
        raise NotTried("it has no special tokens")
    if not isinstance(backend, HasTokenizer) or tokenizer is not None:
        texts = backend.token_texts(ids)
        must(len(texts) == len(ids), f"token_texts gives {len(texts)} texts for {len(ids)} special tokens")
    out = backend.run(torch.tensor([ids + ids]), want="logits").logits
    must(bool(out.isfinite().all()), f"of the special tokens {there} logits are not finite")


@CHECKS.add
def dtype(subject: Subject) -> None:
    """A model in float64 or bfloat16 gives logits and a residual stream of that type, the same but for rounding, or is
    refused with a ModelError."""
    import torch

    tried = Tried.of(subject)
    if subject.model is None:
        raise NotTried("give models= a model or a saekit.config.ModelConfig")
    knows = isinstance(tried.backend, KnowsResidualStream)
    hooks = [name for name in tried.hooks if knows and tried.backend.in_residual_stream(name)]  # type: ignore[attr-defined]
    whole = tried.backend.run(tried.tokens, read=hooks, want="logits")
    for kind, tolerance in ((torch.float64, 1e-4), (torch.bfloat16, 0.2)):
        try:
            made = _in(kind, subject)
        except SaekitError:
            continue
        found = made.run(tried.tokens, read=hooks, want="logits")
        must(found.logits.dtype == kind, f"logits of a model in {kind} are {found.logits.dtype}")
        must_agree(f"logits in {kind}", found.logits, whole.logits, tolerance)
        for name in hooks:
            must(found.held[name].dtype == kind, f"in a model in {kind}, {name!r} holds {found.held[name].dtype}")


def _in(kind: Any, subject: Subject) -> Any:
    """The backend of the model in that type."""
    model = subject.model
    if isinstance(model, ModelConfig):
        name: Any = str(kind).removeprefix("torch.")
        return subject.build(model=attrs.evolve(model, dtype=name), loaded=None)
    if not hasattr(model, "to"):
        raise NotTried("its models have no types that can be changed")
    made = copy.deepcopy(model)
    with contextlib.redirect_stdout(io.StringIO()):  # of transformer_lens, which tells what it does
        made = made.to(kind)
    return subject.build(model=ModelConfig(device="cpu"), loaded=made)


@CHECKS.add
def kwargs(subject: Subject) -> None:
    """What options pass on to a library, such as ``forward_kwargs``, is refused where the library does not take it."""
    names = [
        field.name
        for field in attrs.fields(type(subject.options))
        if field.name.endswith("_kwargs") and isinstance(getattr(subject.options, field.name), Mapping)
    ]
    if not names:
        raise NotTried("it has no options that are passed on")
    tried = Tried.of(subject)
    model = subject.model
    config, loaded = (model, None) if isinstance(model, ModelConfig) else (ModelConfig(device="cpu"), model)
    for name in names:
        try:
            options = attrs.evolve(subject.options, **{name: {"no_such_argument": 1}})
            built(subject.item, options, model=config, loaded=loaded).run(tried.tokens, want="logits")
        except SaekitError:
            continue
        except Exception as error:
            raise Fault(
                f"{name} = {{no_such_argument = 1}} raises {error_text(error)}, expected a ModelError"
            ) from error
        raise Fault(f"{name} = {{no_such_argument = 1}} is taken, and nothing of it used; expected a ModelError")


@CHECKS.add
def unembedding(subject: Subject) -> None:
    """``unembedding`` is a matrix ``[d_model, d_vocab]`` and a bias or None; or a ModelError where there is none."""
    backend = backend_of(subject)
    try:
        weights, bias = backend.unembedding()
    except ModelError as error:
        raise NotTried(str(error)) from None
    must(
        weights.ndim == 2 and weights.shape[1] >= backend.d_vocab,
        f"its weights have the shape {list(weights.shape)}, expected [d_model, {backend.d_vocab}]",
    )
    fine = bias is None or list(bias.shape) == [weights.shape[1]]
    must(fine, f"its bias has the shape {[] if bias is None else list(bias.shape)}, expected [{weights.shape[1]}]")


@CHECKS.add
def residual_stream(subject: Subject) -> None:
    """What ``in_residual_stream``, if there, says yes of is as wide as what ``unembedding`` reads."""
    tried = Tried.of(subject)
    if not isinstance(backend := tried.backend, KnowsResidualStream):
        raise NotTried("the backend does not know the residual stream")
    held = backend.run(tried.tokens, read=tried.hooks).held
    widths = {hook: held[hook].shape[-1] for hook in tried.hooks if backend.in_residual_stream(hook)}
    read = len(backend.unembedding()[0]) if widths else 0
    must(set(widths.values()) <= {read}, f"it says yes of {widths}, by their widths, and the unembedding reads {read}")


@CHECKS.add
def fingerprint(subject: Subject) -> None:
    """``fingerprint`` is the same text each time, or None; ``memory_bytes``, if there, a whole number."""
    backend, again = backend_of(subject), backend_of(subject)
    found = backend.fingerprint()
    must(found is None or (isinstance(found, str) and found), f"it is {found!r}, expected a text or None")
    must(found == again.fingerprint(), f"it is {found!r}, and of the same weights {again.fingerprint()!r}")
    if isinstance(backend, HasMemory):
        bytes_ = backend.memory_bytes()
        must(isinstance(bytes_, int) and bytes_ >= 0, f"memory_bytes() is {bytes_!r}, expected a whole number")


@CHECKS.add
def outline(subject: Subject) -> None:
    """The outline of a model, where there is one, has the name, the sizes and the hooks of the model; its forwards make
    the shapes and types of the model's, and no numbers."""
    model, entry = subject.model, subject.item.entry
    if entry.outline is None:
        raise NotTried("the entry has no outline")
    if model is not None and not isinstance(model, ModelConfig):
        raise NotTried("an outline is of a model that is named: give models= a saekit.config.ModelConfig")
    made = outlined(subject.item, subject.options, model=model or ModelConfig(device="cpu"))
    tried = Tried.of(subject)
    for name in ("name", "n_ctx", "d_vocab"):
        own, its = getattr(tried.backend, name), getattr(made, name)
        must(own == its, f"the {name} of its outline is {its!r}, and the model's {own!r}")
    must(list(made.hook_names()) == list(tried.backend.hook_names()), "the hooks of its outline are others")
    if isinstance(tried.backend, HasMemory):
        own, its = tried.backend.memory_bytes(), made.memory_bytes()
        must(abs(its - own) <= 0.01 * own, f"memory_bytes() of its outline is {its}, and the model's {own}")
    held = tried.backend.run(tried.tokens, read={*tried.hooks}).held
    for name, found in made.run(tried.tokens, read={*tried.hooks}).held.items():
        own, its = (list(held[name].shape), held[name].dtype), (list(found.shape), found.dtype)
        must(own == its, f"in its outline {name!r} holds {its}, and in the model {own}")
        must(found.is_meta, f"in its outline {name!r} is on {found.device}, where it takes memory; expected meta")
