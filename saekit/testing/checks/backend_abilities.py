"""What a model backend promises by the abilities that it has (:mod:`saekit.abilities`)."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import attrs

from saekit.abilities import (
    AttachesHooks,
    ExposesHooks,
    ForwardsOtherwise,
    HasModel,
    StartsInside,
    StatesProcessing,
    TranslatesHooks,
)
from saekit.errors import ModelError
from saekit.testing.checks.check import Checks, Fault, NotTried, Subject, must
from saekit.testing.checks.numbers import must_agree, must_be_equal
from saekit.testing.checks.tried_models import Tried, counted, state_of

if TYPE_CHECKING:
    from torch import Tensor

    from saekit.abilities import ExposedPoint

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
    ended: list[int] = []

    def begun(tokens: Tensor | None, so_far: int) -> Callable[[], None]:
        told.append((tokens, so_far))
        return functools.partial(ended.append, len(told))

    with backend.attached(put, on_tokens=begun):
        for _ in range(2):
            must_agree(f"logits with a replacement attached at {name!r}", tried.logits(), halved, _CLOSE)
        must(len(told) == 2, f"on_tokens is told of {len(told)} forwards, and there were 2")
        must(ended == [1, 2], "what on_tokens returns must be called when its forward has ended, before the next")
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


@CHECKS.add
def exposes_hooks(subject: Subject) -> None:
    """While names are ``exposed``, if they can be, each has a hook point, which leaves what passes as it is until
    something is hooked to it; of two contexts with one name the inner one ends first; afterwards the model has none,
    also when something was raised."""
    import torch

    tried = Tried.of(subject)
    if not isinstance(backend := tried.backend, ExposesHooks):
        raise NotTried("its library is told of no hook points")
    model: Any = backend.model if isinstance(backend, HasModel) else None
    names, value = [f"{tried.hooks[0]}.hook_sae_input", f"{tried.hooks[-1]}.hook_sae_acts_post"], torch.ones(2, 3, 5)
    clean = tried.logits()  # a library may add hooks of its own in the first forward
    before = _names_in(model), state_of(model)
    with backend.exposed(names) as points:
        must({*points} == {*names}, f"of {', '.join(names)} there are the points {', '.join(points) or 'none'}")
        for name in names:
            must(not points[name].is_hooked, f"the point {name!r} is hooked, and nobody has hooked anything to it")
            must_be_equal(f"what passes the point {name!r}", points[name](value), value)
        _is_met(model, names[0], points)
        inside = _names_in(model)
        with backend.exposed(names[:1]) as inner:
            must(not inner[names[0]].is_hooked, f"of two points {names[0]!r} the inner one has the outer one's hooks")
        must_be_equal("the hook points of the model, after the inner of two contexts", _names_in(model), inside)
        must_agree("logits with hook points exposed", tried.logits(), clean, _CLOSE)
    must_be_equal("of the model, afterwards", (_names_in(model), state_of(model)), before)
    try:
        with backend.exposed(names):
            raise _Deliberate
    except _Deliberate:
        pass
    must_be_equal("of the model, after something was raised", (_names_in(model), state_of(model)), before)


def _is_met(model: Any, name: str, points: Mapping[str, ExposedPoint]) -> None:
    """What the library's own ``add_hook``, if it has one, adds is met at the point, while it is there."""
    import torch

    add, reset, value = getattr(model, "add_hook", None), getattr(model, "reset_hooks", None), torch.ones(2, 3, 5)
    if add is None or reset is None:
        return
    add(name, lambda held, hook: 2 * held)
    must(points[name].is_hooked, f"what the model's add_hook put at {name!r} is not at the point there")
    must_be_equal(f"what passes the point {name!r}, hooked by the model's add_hook,", points[name](value), 2 * value)
    reset()
    must(not points[name].is_hooked, f"after the model's reset_hooks the point {name!r} is hooked")


def _names_in(model: Any) -> dict[str, list[str]]:
    """What the dictionaries of a model have, in which its library looks for hook points."""
    own = getattr(model, "__dict__", {})
    return {name: sorted(map(str, value)) for name, value in own.items() if isinstance(value, dict)}


@CHECKS.add
def states_processing(subject: Subject) -> None:
    """``processing``, if there, says yes or no by names, of a hook no more than of the model and the same; of metadata
    that says nothing, nothing; and of what was saved with an SAE of this model, the same."""
    tried = Tried.of(subject)
    if not isinstance(backend := tried.backend, StatesProcessing):
        raise NotTried("it does not say what was done to the weights")
    whole = backend.processing()
    odd = [name for name, done in whole.items() if type(name) is not str or type(done) is not bool]
    must(not odd, f"processing() has {', '.join(f'{name!r}: {whole[name]!r}' for name in odd)}; expected true or false")
    saved: dict[str, Any] = {"model_name": tried.backend.name, "model_processing": dict(whole)}
    for hook in (None, *tried.hooks):
        asked = "" if hook is None else repr(hook)
        here = backend.processing(hook)
        wrong = [name for name, done in here.items() if name not in whole or whole[name] != done]
        must(not wrong, f"processing({asked}) says {wrong} otherwise than processing()")
        unknown = backend.processing(hook, {})
        must(not unknown, f"of metadata that says nothing, processing({asked}) says {dict(unknown)}; expected nothing")
        there = backend.processing(hook, saved)
        differing = [name for name in here if name in there and here[name] != there[name]]
        must(not differing, f"of an SAE of this very model, processing({asked}) says {differing} otherwise")
        must(
            {*here} <= {*there}, f"of an SAE of this very model, processing({asked}) lacks {sorted({*here} - {*there})}"
        )


@CHECKS.add
def other_forwards(subject: Subject) -> None:
    """Other ways of forwards, if it has any, give the same but for rounding, each under an option of its own to write
    for it, and leave the model as it was, after errors, too."""
    tried = Tried.of(subject)
    if not isinstance(backend := tried.backend, ForwardsOtherwise):
        raise NotTried("it has one way of forwards")
    options = [f"model.backend.{name}=" for name in attrs.fields_dict(type(subject.options))]
    before, expected = state_of(subject.model), tried.backend.run(tried.tokens, read={*tried.hooks}, want="loss")
    for line, way in backend.other_forwards().items():
        known = any(line.startswith(option) and len(line) > len(option) for option in options)
        must(known, f"what to write is {line!r}, expected {' or '.join(options) or 'an option, which it has not'}")
        with way():
            found = tried.backend.run(tried.tokens, read={*tried.hooks}, want="loss")
        for name in tried.hooks:
            must_agree(f"what {name!r} holds with {line}", found.held[name], expected.held[name], 1e-4)
        must_agree(f"the loss with {line}", found.loss, expected.loss, 1e-4)
        with contextlib.suppress(_Deliberate), way():
            raise _Deliberate
        again = tried.backend.run(tried.tokens, read={*tried.hooks}, want="loss")
        must_be_equal(f"what is held after {line}", dict(again.held), dict(expected.held))
        must_be_equal(f"the loss after {line}", again.loss, expected.loss)
    must_be_equal("of the model, after other ways", state_of(subject.model), before)
