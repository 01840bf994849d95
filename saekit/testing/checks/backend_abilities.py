"""What a model backend promises by the abilities that it has (:mod:`saekit.abilities`)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from saekit.abilities import AttachesHooks, HasModel, StartsInside, TranslatesHooks
from saekit.errors import ModelError
from saekit.testing.checks.check import Checks, Fault, NotTried, Subject, must
from saekit.testing.checks.numbers import must_agree, must_be_equal
from saekit.testing.checks.tried_models import Tried, counted, state_of

if TYPE_CHECKING:
    from torch import Tensor

CHECKS = Checks()
_CLOSE = 1e-5


class _Deliberate(Exception):  # noqa: N818 - not an error
    """Raised while replacements are attached."""


@CHECKS.add
def starts_inside(subject: Subject) -> None:
    """What ``run_from``, if there, gives from what ``entry_of`` names is what a whole forward gives, and hooks before
    it do not run."""
    tried = Tried.of(subject)
    if not isinstance(backend := tried.backend, StartsInside):
        raise NotTried("it begins every forward at the tokens")
    before, entries = state_of(subject.model), {name: backend.entry_of([name]) for name in tried.hooks}
    if not any(entries.values()):
        raise NotTried(f"it knows no entry for {', '.join(tried.hooks)}")
    for name, entry in entries.items():
        if entry is None:
            continue
        must(entry in tried.backend.hook_names(), f"entry_of([{name!r}]) is {entry!r}, which is no hook")
        must(backend.entry_of([name, entry]) == entry, f"{entry!r} is the entry of {name!r}, and not of both")
        _begins(tried, name, entry)
        for earlier in tried.hooks[: tried.hooks.index(name)]:
            if backend.entry_of([earlier, entry]) != entry:
                _does_not_run(tried, earlier, entry)
    must_be_equal("of the model, after forwards from inside", state_of(subject.model), before)


def _begins(tried: Tried, name: str, entry: str) -> None:
    """A forward from ``entry`` gives what a whole one does, at ``name`` and in the end."""
    backend: Any = tried.backend
    put: dict[str, Any] = {name: lambda held: held / 2}
    whole = backend.run(tried.tokens, read={name, entry}, want="logits")
    value, held, logits = (one.detach().clone() for one in (whole.held[entry], whole.held[name], whole.logits))
    loss = backend.run(tried.tokens, replace=put, want="loss").loss.clone()
    with counted(backend.model if isinstance(backend, HasModel) else None) as calls:
        found = backend.run_from(tried.tokens, entry, value, read={name}, want="logits")
        from_inside = len(calls)
        backend.run(tried.tokens, want="logits")
        must(from_inside <= len(calls) - from_inside, f"a forward from {entry!r} calls more modules than a whole one")
    must_agree(f"logits of a forward from {entry!r}", found.logits, logits, _CLOSE)
    must_agree(f"what {name!r} holds in a forward from {entry!r}", found.held[name], held, _CLOSE)
    again = backend.run_from(tried.tokens, entry, value, replace=put, want="loss").loss
    must_agree(f"the loss with {name!r} replaced, from {entry!r}", again, loss, 1e-4)
    other = backend.run_from(tried.tokens, entry, value * 0.5, want="logits").logits
    must((other - logits).abs().max() > 1e-6, f"a forward from {entry!r} does not go on with the value that is given")
    must_agree("logits of a whole forward, afterwards,", tried.logits(), logits, _CLOSE)


def _does_not_run(tried: Tried, earlier: str, entry: str) -> None:
    backend: Any = tried.backend
    value = backend.run(tried.tokens, read={entry}).held[entry].clone()
    ran: list[str] = []

    def recorded(held: Tensor) -> Tensor:
        ran.append(earlier)
        return held

    try:
        backend.run_from(tried.tokens, entry, value, replace={earlier: recorded}, want="loss")
    except ModelError:
        must(not ran, f"in a forward from {entry!r} the hook {earlier!r} runs, which comes before it")
    else:
        raise Fault(f"a replacement at {earlier!r} is taken in a forward from {entry!r}, which comes later")


@CHECKS.add
def translates_hooks(subject: Subject) -> None:
    """``hook_like``, if there, gives a name of its own as it is, a hook that is there for others, and None for what
    nobody knows; what leaves a block is what enters the next."""
    tried = Tried.of(subject)
    if not isinstance(backend := tried.backend, TranslatesHooks):
        raise NotTried("it knows no other names")
    names = [*tried.backend.hook_names()]
    for name in names:
        must(backend.hook_like(name) == name, f"hook_like({name!r}) is {backend.hook_like(name)!r}; it is its own name")
    must(backend.hook_like("no.such.hook") is None, "hook_like('no.such.hook') is not None")
    inside = ("resid_pre", "attn_out", "resid_mid", "mlp_out", "resid_post")
    for name in ["hook_embed", *(f"blocks.{number}.hook_{place}" for number in (0, 1) for place in inside)]:
        found = backend.hook_like(name)
        must(found is None or found in names, f"hook_like({name!r}) is {found!r}, which is no hook")
    left, enters = backend.hook_like("blocks.0.hook_resid_post"), backend.hook_like("blocks.1.hook_resid_pre")
    if left is not None and enters is not None:
        held = tried.backend.run(tried.tokens, read={left, enters}).held
        must_agree(f"{enters!r}, which enters block 1,", held[enters], held[left], _CLOSE)


@CHECKS.add
def attaches_hooks(subject: Subject) -> None:
    """What is ``attached``, if it can be, every forward meets, and is told of; afterwards all is as before, also when
    something was raised."""
    tried = Tried.of(subject)
    if not isinstance(backend := tried.backend, AttachesHooks):
        raise NotTried("nothing can be attached to it")
    name, before, clean = tried.hooks[-1], state_of(subject.model), tried.logits()
    put: dict[str, Any] = {name: lambda held: held / 2}
    halved, quartered = tried.logits(replace=put), tried.logits(replace={name: lambda held: held / 4})
    whole = tried.backend.run(tried.tokens, read={name}).held[name].clone()
    told: list[tuple[Tensor | None, int]] = []
    with backend.attached(put, on_tokens=lambda tokens, so_far: told.append((tokens, so_far))):
        for _ in range(2):
            must_agree(f"logits with a replacement attached at {name!r}", tried.logits(), halved, _CLOSE)
        must(len(told) == 2, f"on_tokens is told of {len(told)} forwards, and there were 2")
        for tokens, so_far in told:
            must(so_far == 0, f"on_tokens is told of {so_far} positions before the tokens, expected 0")
            given = None if tokens is None else tokens.cpu().long()
            must_be_equal("the tokens that on_tokens is told of", given, tried.tokens.cpu().long())
        held = tried.backend.run(tried.tokens, read={name}).held[name]
        must_agree(f"what {name!r} holds with a replacement attached", held, whole / 2, _CLOSE)
        with backend.attached(put):
            must_agree(f"logits with two attached at {name!r}", tried.logits(), quartered, _CLOSE)
        must_agree("logits after the inner of two was taken away", tried.logits(), halved, _CLOSE)
    must_agree("logits, afterwards,", tried.logits(), clean, _CLOSE)
    try:
        with backend.attached(put):
            raise _Deliberate
    except _Deliberate:
        pass
    must_agree("logits, after something was raised,", tried.logits(), clean, _CLOSE)
    must_be_equal("of the model, afterwards", state_of(subject.model), before)
    try:
        with backend.attached({"no.such.hook": lambda held: held}):
            pass
    except ModelError:
        return
    raise Fault("a hook that is not there is attached to, expected a ModelError")
