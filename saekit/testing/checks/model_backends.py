"""What a model backend promises."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any

from saekit.errors import ModelError
from saekit.reasons import error_text
from saekit.testing.checks import backend_abilities, backend_paths, backend_values
from saekit.testing.checks.check import Checks, Fault, NotTried, Subject, must
from saekit.testing.checks.numbers import must_agree, must_be_equal, seeded
from saekit.testing.checks.tried_models import Tried, backend_of, counted, state_of

if TYPE_CHECKING:
    from torch import Tensor


CHECKS = Checks()
_CLOSE = 1e-5


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
def activations(subject: Subject) -> None:
    """What hooks hold is the same in every forward, read alone or together; it is of these tokens, and no position
    sees those after it."""
    tried = Tried.of(subject)
    together = _held(tried, tried.tokens, tried.hooks)
    other = tried.tokens.clone()
    other[:, -1] = other[:, -1] % 50 + 1  # another token, in any vocabulary
    changed = _held(tried, other, tried.hooks)
    for name in tried.hooks:
        must_agree(
            f"what {name!r} holds, read alone,", _held(tried, tried.tokens, [name])[name], together[name], _CLOSE
        )
        after, before = changed[name][:, :-1], together[name][:, :-1]
        must_agree(f"what {name!r} holds before a token that is another one", after, before, _CLOSE)
    far = any(bool((changed[name][:, -1] - together[name][:, -1]).abs().max() > 1e-6) for name in tried.hooks)
    must(far, f"another token changes nothing at {', '.join(tried.hooks)}")


def _held(tried: Tried, tokens: Tensor, hooks: Collection[str]) -> dict[str, Tensor]:
    """Clones: what a forward holds may be written over by the next."""
    return {name: value.clone() for name, value in tried.backend.run(tokens, read=hooks).held.items()}


@CHECKS.add
def one_context(subject: Subject) -> None:
    """A batch of one context gives what it does among others."""
    tried = Tried.of(subject)
    all_of_them = tried.backend.run(tried.tokens, read=tried.hooks, want="loss")
    held, losses = {name: value.clone() for name, value in all_of_them.held.items()}, all_of_them.loss.clone()
    alone = tried.backend.run(tried.tokens[1:2], read=tried.hooks, want="loss")
    must_agree("the loss of one context", alone.loss, losses[1:2], 1e-4)
    for name in tried.hooks:
        must_agree(f"what {name!r} holds of one context", alone.held[name], held[name][1:2], 1e-4)


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
    with counted(subject.model) as calls:
        tried.backend.run(tried.tokens, read={first})
        short = len(calls)
        tried.backend.run(tried.tokens, want="logits")
        must(
            not calls or 2 * short < len(calls),
            f"a forward for {first!r} calls {short} modules, as many as a whole one",
        )
    whole = tried.backend.run(tried.tokens, read={first}, want="logits").held[first]
    must_agree(f"what {first!r} holds in a forward that ends early", early, whole, _CLOSE)


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
def loss_after_replacing(subject: Subject) -> None:
    """A replacement reaches the loss as it reaches the logits."""
    from saekit.backends import next_token_loss

    tried = Tried.of(subject)
    clean = tried.backend.run(tried.tokens, want="loss").loss.clone()
    far = False
    for name in tried.hooks:
        put: dict[str, Any] = {name: lambda x: x / 2 + 0.1}
        found = tried.backend.run(tried.tokens, replace=put, want="loss").loss.clone()
        expected = next_token_loss(tried.logits(replace=put), tried.tokens.to(found.device))
        must_agree(f"the loss with {name!r} replaced", found, expected, 1e-4)
        far = far or bool((found - clean).abs().max() > 1e-6)
    must(far, f"replacements at {', '.join(tried.hooks)} do not reach the loss")


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
    before, clean = state_of(subject.model), tried.logits()

    def fails(held: Tensor) -> Tensor:
        raise _Deliberate

    for name in tried.hooks:
        try:
            tried.backend.run(tried.tokens, replace={name: fails}, want="logits")
        except Exception:
            pass
        else:
            raise Fault(f"what a replacement at {name!r} raises is lost")
    must_be_equal("of the model, afterwards", state_of(subject.model), before)
    must_agree("logits, afterwards,", tried.logits(), clean, _CLOSE)


@CHECKS.add
def refusals(subject: Subject) -> None:
    """What no forward can be made of is a :class:`saekit.errors.ModelError`: a hook that is not there, a replacement of
    another shape, tokens that are not ids ``[b, t]`` of the model, and a forward of which nothing is wanted."""
    tried = Tried.of(subject)
    cases: dict[str, dict[str, Any]] = {
        "a hook that is not there": {"read": {"no.such.hook"}},
        "a replacement of another shape": {"replace": {tried.hooks[0]: lambda x: x[..., :1]}, "want": "logits"},
        "a forward of which nothing is wanted": {},
        "a replacement of which nothing would be seen": {"replace": {tried.hooks[0]: lambda x: x}},
    }
    odd = {
        "tokens without a batch": tried.tokens[0],
        "tokens that are no whole numbers": tried.tokens.float(),
        "a token below 0": tried.tokens - tried.tokens.max() - 1,
        "a token beyond the vocabulary": tried.tokens + tried.backend.d_vocab,
    }
    if (most := tried.backend.n_ctx) is not None and not getattr(tried.backend, "runs_beyond_n_ctx", False):
        odd["a context that is too long"] = tried.tokens[:1, :1].expand(1, most + 1)
    given = [(what, tried.tokens, how) for what, how in cases.items()]
    for what, tokens, how in [*given, *((what, tokens, {"want": "loss"}) for what, tokens in odd.items())]:
        try:
            tried.backend.run(tokens, **how)
        except ModelError:
            continue
        except Exception as error:
            raise Fault(f"{what} raises {error_text(error)}, expected a ModelError") from error
        raise Fault(f"{what} is taken, expected a ModelError")


@CHECKS.add
def near_names(subject: Subject) -> None:
    """A hook that is misspelled is refused in words that name one that is spelled alike."""
    tried = Tried.of(subject)
    known = [*tried.backend.hook_names()]
    for name in tried.hooks:
        wrong = name[:-1] if name[:-1] not in known else name + "x"
        try:
            tried.backend.run(tried.tokens, read={wrong})
        except ModelError as error:
            text = str(error)
        else:
            raise Fault(f"the hook {wrong!r}, which is not there, is read; expected a ModelError")
        named = text.replace(repr(wrong), "")
        must(
            any(repr(one) in named or one in named.split() for one in known),
            f"of {wrong!r} it says {text!r}, and names no hook that is spelled alike",
        )


@CHECKS.add
def grad(subject: Subject) -> None:
    """Without ``grad`` nothing is recorded, and what is given are ordinary tensors; with it, logits are differentiable
    by what was read, as small changes say."""
    import torch

    tried = Tried.of(subject)
    name = tried.hooks[-1]
    plain = tried.backend.run(tried.tokens, read={name}, want="logits")
    must(not plain.logits.requires_grad and not plain.held[name].requires_grad, "without grad, gradients are recorded")
    must(
        not plain.logits.is_inference() and not plain.held[name].is_inference(),
        "without grad, a forward gives inference tensors, which nothing that learns can take: use torch.no_grad()",
    )
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
def grad_through(subject: Subject) -> None:
    """With ``grad``, the loss is differentiable by what a replacement uses, as small changes say."""
    import torch

    tried = Tried.of(subject)
    for name in dict.fromkeys((tried.hooks[0], tried.hooks[-1])):

        def total(factor: Any, name: str = name, *, grad: bool = False) -> Tensor:
            put = {name: lambda held: held * factor}
            return tried.backend.run(tried.tokens, replace=put, want="loss", grad=grad).loss.double().sum()

        factor = torch.tensor(0.9, device=tried.backend.device, requires_grad=True)
        try:
            (slope,) = torch.autograd.grad(total(factor, grad=True), factor)
        except RuntimeError as error:
            raise Fault(f"no gradient flows through a replacement at {name!r}: {error_text(error)}") from error
        step = 1e-2
        expected = float(total(0.9 + step) - total(0.9 - step)) / (2 * step)
        must(
            abs(float(slope) - expected) <= 0.05 * abs(expected) + 1e-2,
            f"by the gradient through a replacement at {name!r} the loss changes by {float(slope):.4g}, and it does by "
            f"{expected:.4g}",
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


CHECKS.extend(backend_values.CHECKS)
CHECKS.extend(backend_abilities.CHECKS)
CHECKS.extend(backend_paths.CHECKS)
