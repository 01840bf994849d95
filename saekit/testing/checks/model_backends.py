"""What a model backend promises."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from saekit.abilities import HasMemory, HasTokenizer, KnowsResidualStream, LeadsToResidualStream
from saekit.config import ModelConfig
from saekit.errors import ModelError
from saekit.plugins.building import outlined
from saekit.reasons import error_text
from saekit.testing.checks.check import Checks, Fault, NotTried, Subject, must
from saekit.testing.checks.numbers import must_agree, must_be_equal, seeded
from saekit.testing.checks.tried_models import Tried, backend_of

if TYPE_CHECKING:
    from torch import Tensor


CHECKS = Checks()
_CLOSE = 1e-5
_TEXT = "def add(a, b):\n    return a + b\n"


class _Deliberate(Exception):  # noqa: N818 - not an error
    """Raised inside a forward."""


@CHECKS.add
def build(subject: Subject) -> None:
    """It is built from its options and the model's, and keeps to its protocol."""
    backend_of(subject)


@CHECKS.add
def values(subject: Subject) -> None:
    """Its name, device, sizes, special tokens and hooks are what the protocol says."""
    import torch

    backend = backend_of(subject)
    must(isinstance(backend.name, str) and backend.name, f"name is {backend.name!r}, expected a text")
    torch.device(backend.device)
    must(isinstance(backend.device, str), f"device is {backend.device!r}, expected a text, as torch spells it")
    must(_is_count(backend.d_vocab), f"d_vocab is {backend.d_vocab!r}, expected a whole number above 0")
    must(backend.n_ctx is None or _is_count(backend.n_ctx), f"n_ctx is {backend.n_ctx!r}, expected a number or None")
    special = backend.special_tokens
    must(isinstance(special, Mapping) and {"bos", "eos", "sep"} <= set(special), f"special_tokens are {special!r}")
    for name, token in special.items():
        fine = token is None or (isinstance(token, int) and 0 <= token < backend.d_vocab)
        must(fine, f"the special token {name} is {token!r}, expected an id below {backend.d_vocab}, or None")
    hooks = list(backend.hook_names())
    must(hooks and all(isinstance(name, str) and name for name in hooks), "hook_names() are not texts")
    must(len(set(hooks)) == len(hooks), "hook_names() has a name twice")


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


@CHECKS.add
def early_stop(subject: Subject) -> None:
    """A forward that only reads ends after the last hook that is read; what is read is the same as in a whole one."""
    tried = Tried.of(subject)
    first, last, later = tried.hooks[0], tried.hooks[-1], []

    def recorded(held: Tensor) -> Tensor:
        later.append(last)
        return held

    if first == last:
        raise NotTried("it has one hook alone")
    early = tried.backend.run(tried.tokens, read={first}, replace={last: recorded}).held[first].clone()
    must(not later, f"the forward goes on to {last!r} after {first!r}, the last hook that is read")
    with _counted(subject.model) as calls:
        tried.backend.run(tried.tokens, read={first})
        short = len(calls)
        tried.backend.run(tried.tokens, want="logits")
        must(
            not calls or 2 * short < len(calls),
            f"a forward for {first!r} calls {short} modules, as many as a whole one",
        )
    whole = tried.backend.run(tried.tokens, read={first}, want="logits").held[first]
    must_agree(f"what {first!r} holds in a forward that ends early", early, whole, _CLOSE)
    must(not tried.backend.run(tried.tokens).held, "a forward that reads nothing holds something")


@contextmanager
def _counted(model: object) -> Iterator[list[None]]:
    """A list that grows by each call of a module of ``model``."""
    import torch

    calls: list[None] = []
    handles = []
    if isinstance(model, torch.nn.Module):
        handles = [part.register_forward_hook(lambda *_: calls.append(None)) for part in model.modules()]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


@CHECKS.add
def loss(subject: Subject) -> None:
    """``loss [b, t - 1]`` is the cross-entropy of ``logits [b, t, d_vocab]`` for the next tokens, in nats."""
    from saekit.backends import next_token_loss

    tried = Tried.of(subject)
    logits = tried.logits()
    must(
        logits.shape[:2] == tried.tokens.shape, f"logits have the shape {list(logits.shape)}, expected [b, t, d_vocab]"
    )
    must(logits.shape[2] >= tried.backend.d_vocab, f"there are {logits.shape[2]} logits, and d_vocab is more")
    found = tried.backend.run(tried.tokens, want="loss").loss
    must_agree("the loss", found, next_token_loss(logits, tried.tokens.to(logits.device)), 1e-4)


@CHECKS.add
def identity(subject: Subject) -> None:
    """To put back what a hook holds changes nothing; what is read is what was there before anything was replaced."""
    tried = Tried.of(subject)
    clean = tried.logits()
    for name in tried.hooks:
        must_agree(f"logits with {name!r} replaced by itself", tried.logits(replace={name: lambda x: x}), clean, _CLOSE)
        before = tried.backend.run(tried.tokens, read={name}).held[name].clone()
        out = tried.backend.run(tried.tokens, read={name}, replace={name: lambda x: x * 0 + 1}, want="logits")
        must_agree(f"what {name!r} holds where it is replaced", out.held[name], before, _CLOSE)


@CHECKS.add
def zero(subject: Subject) -> None:
    """Zeros in the place of what hooks hold change the logits, and reach the hooks after them."""
    tried = Tried.of(subject)
    clean = tried.logits()
    zeroed = {name: lambda x: x * 0 for name in tried.hooks}
    must(
        not all(bool((tried.logits(replace={name: zeroed[name]}) - clean).abs().max() < 1e-6) for name in tried.hooks),
        f"zeros at {', '.join(tried.hooks)} change no logits: replacements do not reach the model",
    )
    read, last = tried.backend.run, tried.hooks[-1]
    if last != tried.hooks[0]:
        before = read(tried.tokens, read={last}).held[last].clone()
        after = read(tried.tokens, read={last}, replace={tried.hooks[0]: lambda x: x * 0}, want="logits").held[last]
        must((after - before).abs().max() > 1e-6, f"zeros at {tried.hooks[0]!r} do not reach {last!r}")


@CHECKS.add
def two_hooks(subject: Subject) -> None:
    """Two hooks can be read and replaced in one forward, each once; the later holds what the earlier's replacement
    makes of it."""
    tried = Tried.of(subject)
    if len(tried.hooks) < 2:
        raise NotTried("it has one hook alone")
    first, last = tried.hooks[0], tried.hooks[-1]
    calls: list[str] = []

    def halved(name: str) -> Any:
        def half(held: Tensor) -> Tensor:
            calls.append(name)
            return held / 2

        return half

    both = tried.backend.run(
        tried.tokens, read={first, last}, replace={first: halved(first), last: halved(last)}, want="logits"
    )
    must(calls == [first, last], f"replacements were called at {calls}, expected {[first, last]}, each once")
    alone = tried.backend.run(tried.tokens, read={last}, replace={first: lambda x: x / 2}, want="logits")
    must_agree(f"what {last!r} holds after {first!r} is replaced", both.held[last], alone.held[last], _CLOSE)
    before = tried.backend.run(tried.tokens, read={first}).held[first]
    must_agree(f"what {first!r} holds beside another", both.held[first], before, _CLOSE)


@CHECKS.add
def nothing_left(subject: Subject) -> None:
    """After a forward, one in which something was raised included, the model is as it was: hooks, mode, what learns."""
    tried = Tried.of(subject)
    before, clean = _state(subject.model), tried.logits()

    def fails(held: Tensor) -> Tensor:
        raise _Deliberate

    for name in tried.hooks:
        try:
            tried.backend.run(tried.tokens, replace={name: fails}, want="logits")
        except Exception:
            pass
        else:
            raise Fault(f"what a replacement at {name!r} raises is lost")
    must_be_equal("of the model, afterwards", _state(subject.model), before)
    must_agree("logits, afterwards,", tried.logits(), clean, _CLOSE)


def _state(model: object) -> dict[str, Any]:
    import torch

    if not isinstance(model, torch.nn.Module):
        return {}
    return {
        "hooks": sum(len(part._forward_hooks) + len(part._forward_pre_hooks) for part in model.modules()),
        "the mode": [part.training for part in model.modules()],
        "what learns": [name for name, value in model.named_parameters() if value.requires_grad],
        "gradients": [name for name, value in model.named_parameters() if value.grad is not None],
    }


@CHECKS.add
def refusals(subject: Subject) -> None:
    """A hook that is not there, and a replacement of another shape, are a :class:`saekit.errors.ModelError`."""
    tried = Tried.of(subject)
    cases: dict[str, dict[str, Any]] = {
        "a hook that is not there": {"read": {"no.such.hook"}},
        "a replacement of another shape": {"replace": {tried.hooks[0]: lambda x: x[..., :1]}, "want": "logits"},
    }
    for what, how in cases.items():
        try:
            tried.backend.run(tried.tokens, **how)
        except ModelError:
            continue
        except Exception as error:
            raise Fault(f"{what} raises {error_text(error)}, expected a ModelError") from error
        raise Fault(f"{what} is taken, expected a ModelError")


@CHECKS.add
def grad(subject: Subject) -> None:
    """Without ``grad`` nothing is recorded; with it, logits are differentiable by what was read, as small changes
    say."""
    import torch

    tried = Tried.of(subject)
    name = tried.hooks[-1]
    plain = tried.backend.run(tried.tokens, read={name}, want="logits")
    must(not plain.logits.requires_grad and not plain.held[name].requires_grad, "without grad, gradients are recorded")
    found = tried.backend.run(tried.tokens, read={name}, want="logits", grad=True)
    weights = torch.randn(found.logits.shape, generator=seeded(1)).to(found.logits)
    try:
        (slope,) = torch.autograd.grad((found.logits * weights).sum(), found.held[name])
    except RuntimeError as error:
        raise Fault(f"with grad, logits are not differentiable by what {name!r} holds: {error_text(error)}") from error
    size = float(found.held[name].detach().norm())
    direction = slope / slope.norm().clamp_min(1e-12) * size * 1e-2

    def moved(sign: int) -> float:
        logits = tried.logits(replace={name: lambda held: held + sign * direction})
        return float((logits.double() * weights.double()).sum())

    expected, along = (moved(1) - moved(-1)) / 2, float((slope * direction).sum())
    must(
        abs(along - expected) <= 0.05 * abs(expected) + 1e-3,
        f"by the gradient at {name!r} a small change makes {along:.4g}, and it makes {expected:.4g}",
    )


@CHECKS.add
def types(subject: Subject) -> None:
    """Tokens of any whole type do, and from memory of any kind; tensors come on the device of the backend."""
    import torch

    tried = Tried.of(subject)
    device = torch.device(tried.backend.device)
    out = tried.backend.run(tried.tokens, read={*tried.hooks}, want="logits")
    for what, value in {"logits": out.logits, **out.held}.items():
        must(value.device.type == device.type, f"{what} are on {value.device}, expected {device}")
    for given in (tried.tokens.int(), tried.tokens.T.contiguous().T):
        before = given.clone()
        again = tried.backend.run(given, want="logits").logits
        must_agree("logits of the same tokens", again, out.logits, _CLOSE)
        must_be_equal("the tokens, afterwards,", given, before)


@CHECKS.add
def tokenizer(subject: Subject) -> None:
    """``tokenize`` gives ids without special tokens, and ``token_texts`` says what they stand for."""
    backend = backend_of(subject)
    if isinstance(backend, HasTokenizer) and backend.tokenizer is None:
        raise NotTried("the model has no tokenizer")
    ids = backend.tokenize(_TEXT)
    fine = isinstance(ids, list) and all(isinstance(token, int) and 0 <= token < backend.d_vocab for token in ids)
    must(fine and ids, f"tokenize gives {ids!r:.80}, expected a list of ids below {backend.d_vocab}")
    must(backend.tokenize("") == [], f"tokenize makes {backend.tokenize('')} of no text")
    texts = backend.token_texts(ids)
    must(len(texts) == len(ids), f"token_texts gives {len(texts)} texts for {len(ids)} tokens")
    found, expected = ("".join("".join(text).split()).casefold() for text in (texts, _TEXT))
    must(found == expected, f"the texts of the tokens of {_TEXT!r} are {texts}")


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
def paths_to_residual_stream(subject: Subject) -> None:
    """What ``to_residual_stream``, if there, gives goes from what the hook holds to what ``unembedding`` reads."""
    tried = Tried.of(subject)
    if not isinstance(backend := tried.backend, LeadsToResidualStream):
        raise NotTried("the backend knows no ways into the residual stream")
    held = backend.run(tried.tokens, read=tried.hooks).held
    for hook in tried.hooks:
        if (weights := backend.to_residual_stream(hook)) is not None:
            expected = [held[hook].flatten(2).shape[-1], len(backend.unembedding()[0])]
            must(list(weights.shape) == expected, f"of {hook} it has the shape {list(weights.shape)}, not {expected}")


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
