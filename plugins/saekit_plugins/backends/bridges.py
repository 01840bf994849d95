"""Models of transformer_lens' TransformerBridge, as backends.  A helper of the backends' plugins, not a plugin."""

from __future__ import annotations

import inspect
import math
import re
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import cached_property
from typing import TYPE_CHECKING, Any

import attrs

from saekit import ModelError
from saekit.backends import Hooks
from saekit_plugins.backends.aliases import also_called
from saekit_plugins.backends.hook_names import RESIDUAL, Layout, layout_of
from saekit_plugins.backends.layered import LayeredBackend, causal_mask, checked_kwargs, output_weights
from saekit_plugins.backends.lens_hooks import exposed, hooked_by_name
from saekit_plugins.backends.processing import NOTHING, at_hooks, of_metadata

if TYPE_CHECKING:
    from torch import Tensor

    from saekit.abilities import ExposedPoint, OnTokens
    from saekit_plugins.backends.layer_order import LayerOrder

__all__ = ["BridgeBackend"]

_NORMS = ("hook_scale", "hook_normalized")
_OURS = {"input", "input_ids", "return_type", "loss_per_token", "labels", "start_at_layer", "stop_at_layer", "kwargs"}
"""What a forward of saekit's decides itself."""


class BridgeBackend(LayeredBackend):
    """A ``TransformerBridge``, with the names of its hook points, and its other names for them, as hooks."""

    why_silent = (
        " (the bridge has hook points that run only after a switch such as set_use_attn_result(True) or "
        "set_use_hook_mlp_in(True), and some that no forward of this model reaches; pass the model from code with the "
        "switch on, or take another hook)"
    )

    def __init__(
        self,
        model: Any,
        *,
        forward_kwargs: Mapping[str, Any] | None = None,
        processed: Mapping[str, bool] | None = None,
        **known: Any,
    ) -> None:
        super().__init__(model, tokenizer=model.tokenizer, **known)
        self._forward_kwargs = dict(forward_kwargs or {})
        self._processed = processed

    @cached_property
    def _points(self) -> dict[str, Any]:
        """Every name with its hook point: TransformerLens' names, then the bridge's own, in the order of the model."""
        points: dict[str, Any] = self.model.hook_dict
        by_point: dict[int, list[str]] = {}
        for name, point in points.items():
            by_point.setdefault(id(point), []).append(name)
        tables = id(points.get("rotary_emb.hook_out"))  # two tensors, which some call hook_pos_embed
        return {
            name: point
            for key, names in by_point.items()
            if key != tables
            for name in sorted(names, key=lambda one: one == points[one].name)
            for point in (points[name],)
        }

    def hook_names(self) -> Sequence[str]:
        return list(self._points)

    def other_names(self) -> Collection[str]:
        return also_called(self.name)

    def hook_like(self, name: str) -> str | None:
        """A hook of its own, or the one where transformers' module of that path has its place."""
        if name in self._points:
            return name
        found = None if self._layout is None else self._layout.lens_hook(name)
        return found if found in self._points else None

    def in_residual_stream(self, hook_name: str) -> bool:
        return hook_name in self._residual

    def to_residual_stream(self, hook_name: str) -> Tensor | None:
        """Those of the component that attention or an MLP ends with; none where a norm lies behind it, or a gate.

        Of families that are known; others may multiply what is added.
        """
        found = re.match(r"blocks\.(\d+)\.", hook_name)
        point, points = self._points.get(hook_name), self._points
        if point is None or found is None or self._layout is None:
            return None
        block = f"blocks.{found[1]}"
        for part, last in (("attn", "o"), ("mlp", "out")):
            before = [points.get(f"{block}.{part}.{last}.hook_in")]
            if part == "mlp" and f"{block}.mlp.gate.hook_out" not in points:
                before.append(points.get(f"{block}.mlp.in.hook_out"))
            added = points.get(f"{block}.{part}.hook_out")
            if any(point is one for one in before) and added is points.get(f"{block}.hook_{part}_out"):
                component = getattr(getattr(self.model.blocks[int(found[1])], part), last, None)
                return output_weights(getattr(component, "original_component", None))
        return None

    @cached_property
    def _layout(self) -> Layout | None:
        config = self.model.original_model.config.get_text_config()
        return layout_of(config.model_type, parallel=getattr(config, "use_parallel_residual", False))

    def processing(self, hook_name: str | None = None, about: Mapping[str, Any] | None = None) -> Mapping[str, bool]:
        """See :class:`saekit.abilities.StatesProcessing`; of a bridge in compatibility mode that was passed from code,
        nothing is known."""
        known = self._processed
        if known is None:
            known = {} if getattr(self.model, "compatibility_mode", False) else NOTHING
        names = [name for name, point in self._points.items() if point is self._points.get(hook_name or "")]
        return at_hooks(known if about is None else of_metadata(about), hook_name and names, self.model)

    @cached_property
    def _residual(self) -> frozenset[str]:
        found = {id(point) for name, point in self._points.items() if RESIDUAL.fullmatch(name)}
        return frozenset(name for name, point in self._points.items() if id(point) in found)

    def unembedding(self) -> tuple[Tensor, Tensor | None]:
        try:
            return self.model.W_U, self.model.b_U
        except AttributeError:
            return super().unembedding()

    def logits(self, tokens: Tensor) -> Tensor:
        # Without a cache of keys and values, which nobody reads.
        plain = {"use_cache": False} if "use_cache" in self._accepted else {}
        options: dict[str, Any] = (
            {"return_type": "logits"} | plain | dict(checked_kwargs(self, self._forward_kwargs, self._accepted))
        )
        if tokens.is_meta:  # the library looks at the numbers of a mask that it makes itself, and there are none
            options["attention_mask"] = causal_mask(tokens)
        logits: Tensor = self.model(tokens, **options)
        return logits

    def forward(self, tokens: Tensor, hooks: Hooks) -> Tensor | None:
        with ExitStack() as quiet:
            if any(name.endswith(_NORMS) for name in hooks.names):
                # Where something is put at a norm's hooks, a bridge computes the norm by itself, and warns of rounding.
                quiet.enter_context(warnings.catch_warnings())
                warnings.simplefilter("ignore")
            if hooks.entry is not None and self._order is not None:
                at = self._place(hooks.entry)
                end = None if at.endswith(".input") else self._points[hooks.entry]
                quiet.enter_context(self._order.begun_at(at, end))
            return super().forward(tokens, hooks)

    def _last_before(self, hooks: Collection[str]) -> str | None:
        if any(name not in self._met for name in hooks):
            return None
        first = min((self._met[name] for name in hooks), default=math.inf)
        return next((name for name in reversed(self._ends) if self._met[name] <= first), None)

    @cached_property
    def _order(self) -> LayerOrder | None:
        blocks = getattr(self.model, "blocks", ())
        found = self._observed(self.model.original_model, len(blocks))
        return found if found is not None and all(a is b for a, b in zip(found.stack, blocks, strict=True)) else None

    @cached_property
    def _met(self) -> dict[str, int]:
        """By the name of a hook: when a forward meets it; those that none meets are not there."""
        paths = {id(module): path for path, module in self.model.original_model.named_modules()}
        met = {} if self._order is None else self._order.met
        places = {name: paths.get(id(point)) for name, point in self._points.items()}
        return {name: met[path] for name, path in places.items() if path is not None and path in met}

    @cached_property
    def _ends(self) -> list[str]:
        """The first and last hook of every block."""
        both = ("hook_resid_pre", "hook_resid_post")
        names = [f"blocks.{number}.{name}" for number in range(len(self.model.blocks)) for name in both]
        return names if all(name in self._met for name in names) else []

    def _place(self, entry: str) -> str:
        """The block's input or output, by its path in the model of transformers."""
        assert self._order is not None
        for end in self._ends:
            if self._points[end] is self._points[entry]:
                return f"{self._order.path}.{end.split('.')[1]}" + (".input" if end.endswith("_pre") else "")
        raise ModelError(f"a forward of {self.name!r} cannot begin at the hook {entry!r}")

    def begins(self, tell: OnTokens) -> AbstractContextManager[None]:
        return self._begins(tell, self.model.original_model)  # which the bridge calls, and which generates

    @contextmanager
    def exposed(self, names: Collection[str]) -> Iterator[Mapping[str, ExposedPoint]]:
        """See :class:`saekit.abilities.ExposesHooks`: `run_with_cache`, `run_with_hooks` and `add_hook` know them."""
        points = self.model._hook_registry
        with exposed(names, points) as found, hooked_by_name(self.model, points):
            yield found

    def _hooked_module(self, name: str) -> Any:
        return self._points.get(name)

    def _attach(self, name: str, hooked: Callable[[Tensor], Tensor]) -> _Attached:
        if (point := self._points.get(name)) is None:
            raise self.no_hook(name)

        def at(activation: Tensor, hook: Any) -> Tensor:
            value = hooked(activation)
            # By another object the library knows that it must go on with this one.
            return value.view_as(value) if value is activation and value.requires_grad else value

        # It brings what the point holds into TransformerLens' shape, and back; reset_hooks leaves what is permanent.
        point.add_hook(at, is_permanent=True)
        return _Attached(point, point.fwd_hooks[-1])

    @cached_property
    def _accepted(self) -> frozenset[str]:
        """The options of a forward."""
        forwards = (self.model.forward, self.model.original_model.forward)
        return frozenset(name for forward in forwards for name in inspect.signature(forward).parameters) - _OURS


@attrs.frozen
class _Attached:
    """A hook at a hook point."""

    point: Any
    handle: Any

    def remove(self) -> None:
        self.handle.hook.remove()
        self.point.fwd_hooks[:] = [one for one in self.point.fwd_hooks if one is not self.handle]
