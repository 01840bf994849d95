"""A model with SAEs in it, for as long as a context is open."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

import attrs
import torch
from torch import Tensor

from saekit.abilities import AttachesHooks, ExposedPoint, ExposesHooks, HasModel, TranslatesHooks
from saekit.backends.asked import check_asked, checked_tokens
from saekit.backends.base import no_hook
from saekit.backends.forward import put
from saekit.backends.replacing import Replacing, replacement_of, replacements_of
from saekit.cautions import warn
from saekit.errors import ModelError
from saekit.protocols import ModelBackend
from saekit.reasons import alike
from saekit.sae.hooks import Watch
from saekit.site import Site
from saekit.splicing.attachment import Attachment, Passing
from saekit.splicing.doubts import begin_with_bos, doubt_of_bos
from saekit.values import Forward, Replacement, Want

__all__ = ["Intervention", "Spliced"]

_INNER = ".hook_sae_"


@attrs.frozen(eq=False)
class Intervention:
    """A function at an inner point."""

    name: str
    function: Replacement = attrs.field(repr=False)
    _among: list[Intervention] = attrs.field(repr=False)

    def remove(self) -> None:
        """From now on it is not called; to remove it twice does no harm."""
        if self in self._among:
            self._among.remove(self)


@attrs.frozen(eq=False)
class _Asked:
    """What one call of :meth:`Spliced.run` asks of inner points."""

    read: frozenset[str] = frozenset()
    replace: Mapping[str, Replacement] = attrs.field(factory=dict)
    grad: bool = False
    held: dict[str, Tensor] = attrs.field(factory=dict)


class Spliced:
    """A model whose forwards go through SAEs: what :func:`saekit.splice` gives.

    Of an SAE at the hook ``h``, ``h.hook_sae_input``, ``.hook_sae_acts_pre``, ``.hook_sae_acts_post [b, t, d_sae]``,
    ``.hook_sae_recons``, ``.hook_sae_error`` (with the error term) and ``.hook_sae_output`` can be read and replaced.
    """

    def __init__(self, backend: ModelBackend, attached: Sequence[Attachment], *, read: Collection[str] = ()) -> None:
        self.backend = backend
        """The model."""
        self.attachments = tuple(attached)
        """The SAEs, each with its place, in their order."""
        self._of = {name: one for one in self.attachments for name in one.points}
        self._interventions: list[Intervention] = []
        self._exposed: Mapping[str, ExposedPoint] = {}
        self._held = _Held()
        self._now = threading.local()
        self._is_open, self._has_looked = False, False
        self._read = frozenset([read] if isinstance(read, str) else read)
        for name in sorted(self._read):
            self._check_runs(name)

    def __repr__(self) -> str:
        if not self._is_open:
            return f"<Spliced: {self.backend.name!r}, as it was>"
        saes = [
            f"  {one.name}: {type(one.sae).__name__} of {one.sae.d_sae:,} features"
            + ("" if (read := _names(one.sites.inputs)) == one.name else f", reads {read}")
            + ("" if one.sites.same else f", writes {_names(one.sites.targets)}")
            + (", with its error term" if one.use_error_term else "")
            for one in self.attachments
        ]
        return "\n".join([f"<Spliced: {self.backend.name!r} with", *saes]) + ">"

    def __deepcopy__(self, memo: object) -> Spliced:
        raise ModelError("a splice cannot be copied, since it is of one model: copy the model, and splice the copy")

    if not TYPE_CHECKING:  # for which there is nothing else

        def __getattr__(self, name: str) -> object:
            model = self.backend.model if isinstance(vars(self).get("backend"), HasModel) else None
            hint = f". It is the model's own: call {name} of the model, inside the with block" * hasattr(model, name)
            raise AttributeError(f"a splice has no {name!r}{hint}")

    @property
    def names(self) -> list[str]:
        """Every inner point that runs, SAE by SAE."""
        return [name for name, one in self._of.items() if one.use_error_term or one.points[name] != "error"]

    @property
    def held(self) -> Mapping[str, Tensor]:
        """What the points of ``read`` of :func:`saekit.splice` held in the last forward, as far as it came."""
        return self._held

    @contextmanager
    def opened(self) -> Iterator[Spliced]:
        """The context in which the SAEs are there; afterwards the model is as it was."""
        if self._is_open:
            raise ModelError("this splice is open already")
        hooks = dict.fromkeys(hook for one in self.attachments for hook in (*one.read_at, *one.written_at))
        replace = {hook: functools.partial(self._at, hook) for hook in hooks}
        with ExitStack() as stack:
            if isinstance(self.backend, AttachesHooks):
                stack.enter_context(self.backend.attached(replace, on_tokens=self._begin))
                if isinstance(self.backend, ExposesHooks):
                    self._exposed = stack.enter_context(self.backend.exposed([*self._of]))
            else:
                self._check_hooks(hooks)
            self._is_open = True
            stack.callback(self._close)
            yield self

    @contextmanager
    def paused(self) -> Iterator[None]:
        """While the context is open, the model goes on as without these SAEs, whose hooks keep their places."""
        kept, self.attachments = self.attachments, ()
        try:
            yield
        finally:
            self.attachments = kept

    def _close(self) -> None:
        self._is_open, self._exposed = False, {}
        self._interventions.clear()
        self._now = threading.local()

    def hook(self, name: str, function: Replacing) -> Intervention:
        """From now on the model goes on with what ``function`` returns at the inner point ``name``.

        That holds in every forward, until the splice ends or ``.remove()`` is called on what is returned.  Of several
        at one point, each takes what the one before has left.  A tensor of the point's shape stands for itself, and a
        function ``(value, hook)``, as transformer_lens has them, is told the point's name: ``hook.name``.
        """
        self._check_open()
        self._check_runs(name)
        made = Intervention(name, replacement_of(name, function), self._interventions)
        self._interventions.append(made)
        return made

    def run(
        self,
        tokens: Tensor,
        *,
        read: Collection[str] = (),
        replace: Mapping[str, Replacing] | None = None,
        want: Want = "held",
        grad: bool = False,
    ) -> Forward:
        """As :meth:`saekit.protocols.ModelBackend.run`, with the SAEs in the model and their inner points as hooks.

        A hook of the model's own holds what the SAEs there have left.  What is put at hooks is as for :meth:`hook`.

        The forward goes as far as what is read, here or in every forward (``read`` of :func:`saekit.splice`), and as
        where functions were put by :meth:`hook`; :class:`ModelError` where all that is nothing.

        With ``grad``, loss and logits are differentiable by what was read, at inner points, too:
        ``torch.autograd.grad`` finds it, and ``backward`` leaves it in ``.grad``.  That is so where gradients are off
        (``torch.set_grad_enabled(False)``), too; what is computed of loss and logits there, such as
        ``logits[0, -1, 5]``, needs ``with torch.enable_grad():``.
        """
        self._check_open()
        read, put_there = [read] if isinstance(read, str) else list(read), replacements_of(replace)
        inner = {name for name in (*read, *put_there) if self._is_inner(name)}
        for name in inner:
            self._check_runs(name)
        asked = _Asked(frozenset(inner) & {*read}, {name: put_there.pop(name) for name in inner & {*put_there}}, grad)
        # The forward goes as far as where the points are.
        points = asked.read | self._watched()
        outer = {name for name in read if name not in inner} | {self._of[name].written_at[0] for name in points}
        check_asked(outer, replace, want, names="spliced.names, and those of the model, spliced.backend.hook_names(),")
        with self._asking(asked):
            if isinstance(self.backend, AttachesHooks):
                forward = self.backend.run(tokens, read=outer, replace=put_there, want=want, grad=grad)
            else:
                forward = self._composed(tokens, outer, put_there, want, grad)
        held = {**forward.held, **asked.held}
        return attrs.evolve(forward, held={name: held[name] for name in dict.fromkeys(read)})

    @contextmanager
    def _asking(self, asked: _Asked) -> Iterator[None]:
        before = vars(self._now).copy()
        self._now.asked = asked
        try:
            yield
        finally:
            vars(self._now).clear()
            vars(self._now).update(before)

    def _composed(
        self, tokens: Tensor, read: Collection[str], replace: Mapping[str, Replacement], want: Want, grad: bool
    ) -> Forward:
        """The forward of a backend that lets nothing stand in its model."""
        held: dict[str, Tensor] = {}
        hooks = dict.fromkeys(hook for one in self.attachments for hook in (*one.read_at, *one.written_at))

        def at(hook: str) -> Replacement:
            def replaced(activation: Tensor) -> Tensor:
                value = self._at(hook, activation)
                if hook in read:
                    held[hook] = _followed(value, grad)
                return replace[hook](value) if hook in replace else value

            return replaced

        self._begin(checked_tokens(tokens, self.backend), 0)
        # A forward that only reads may stop before anything is put where it reads last.
        whole: Want = "logits" if want == "held" and not hooks.keys().isdisjoint(read) else want
        composed = {**replace, **{hook: at(hook) for hook in hooks}}
        forward = self.backend.run(tokens, read=read, replace=composed, want=whole, grad=grad)
        forward = Forward(forward.held) if whole != want else forward
        return attrs.evolve(forward, held={**forward.held, **held})

    def _begin(self, tokens: Tensor | None, before: int) -> Callable[[], None]:
        """A forward begins; what is returned ends it, and then no tokens are known but those of one around it."""
        if not self._has_looked and tokens is not None and not before:
            self._look_at(tokens)
        self._held = _Held()
        around: Passing | None = getattr(self._now, "passing", None)
        self._now.passing = Passing(tokens, before)
        return functools.partial(setattr, self._now, "passing", around)

    def _look_at(self, tokens: Tensor) -> None:
        """Warn, once, of SAEs that were trained with another BOS than the first forward has."""
        self._has_looked = True
        begins = begin_with_bos(tokens, self.backend)
        if begins is None:
            return
        for said in dict.fromkeys(doubt_of_bos(one.sae, begins) for one in self.attachments):
            if said is not None:
                warn(said, UserWarning)

    def _at(self, hook: str, activation: Tensor) -> Tensor:
        """What the attachments make of what ``hook`` holds, one after the other."""
        if getattr(self._now, "passing", None) is None:
            self._begin(None, 0)
        for one in self.attachments:
            if hook in one.read_at or hook in one.written_at:
                activation = one.passed(hook, activation, self._now.passing, self._watch(one))
        return activation

    def _watch(self, one: Attachment) -> Watch:
        asked: _Asked = getattr(self._now, "asked", _Asked())
        wanted = {*asked.read, *asked.replace} | self._watched()
        points = {point: name for name, point in one.points.items() if name in wanted}

        def seen(point: str, value: Tensor) -> Tensor:
            return self._seen(points[point], value, asked)

        return Watch(frozenset(points), seen)

    def _watched(self) -> set[str]:
        """The inner points at which something happens in every forward."""
        hooked = {name for name, point in self._exposed.items() if point.is_hooked}
        return {*self._read} | {made.name for made in self._interventions} | hooked

    def _seen(self, name: str, value: Tensor, asked: _Asked) -> Tensor:
        """What the inner point ``name`` goes on with."""
        for made in [made for made in self._interventions if made.name == name]:
            value = put(name, value, made.function)
        if name in self._exposed and self._exposed[name].is_hooked:
            value = put(name, value, self._exposed[name])
        if name in self._read:
            self._held[name] = _followed(value, torch.is_grad_enabled())
        if name in asked.read:
            asked.held[name] = _followed(value, asked.grad)
        return put(name, value, asked.replace[name]) if name in asked.replace else value

    def _is_inner(self, name: str) -> bool:
        """Whether ``name`` is meant to be an inner point of one of these SAEs."""
        return name in self._of or (_INNER in name and name not in self.backend.hook_names())

    def _check_runs(self, name: str) -> None:
        """:class:`ModelError` unless there is an inner point ``name``, which runs."""
        if name not in self._of:
            own = self._own(name)
            hint = alike(name, self.names)
            if own is not None:
                hint = f". Did you mean {own!r}? It is what this model calls that place"
            raise ModelError(f"no SAE of this splice has the point {name!r}{hint}")
        if name not in self.names:
            raise ModelError(
                f"the point {name!r} does not run, since {self._of[name].name} is there without its error term: "
                "splice with use_error_term=True"
            )

    def _own(self, name: str) -> str | None:
        """The inner point that ``name`` means by another library's name of the hook; None: none is known."""
        hook, inner, point = name.rpartition(_INNER)
        if not inner or not isinstance(self.backend, TranslatesHooks):
            return None
        found = f"{self.backend.hook_like(hook)}{_INNER}{point}"
        return found if found in self._of else None

    def _check_open(self) -> None:
        if not self._is_open:
            raise ModelError("this splice has ended, and the model is as it was; use it inside its with block")

    def _check_hooks(self, hooks: Collection[str]) -> None:
        known = {*self.backend.hook_names()}
        for hook in hooks:
            if hook not in known:
                raise no_hook(self.backend, hook)


def _names(sites: Sequence[Site]) -> str:
    return " and ".join(
        one.hook_name if one.hook_head_index is None else f"head {one.hook_head_index} of {one.hook_name}"
        for one in sites
    )


class _Held(dict[str, Tensor]):
    """What points held, which says of another why it is not there."""

    def __missing__(self, name: str) -> Tensor:
        raise ModelError(
            f"spliced.held has no {name!r}: it has the points that saekit.splice(..., read=[...]) names, as far as the "
            f"last forward came to them, {', '.join(map(repr, self)) or 'which is none'}"
        )


def _followed(value: Tensor, grad: bool) -> Tensor:
    """``value``, which keeps its gradient if ``grad``, and has none else."""
    if not grad:
        return value.detach() if value.requires_grad else value
    if value.is_inference() or not value.is_floating_point():  # the caller's forward, or ids
        return value
    if value.requires_grad:
        value.retain_grad()
        return value
    return value.requires_grad_()  # where nothing before it learns, gradients begin here
