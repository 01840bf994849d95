"""``model.backend.fused`` for models of transformer_lens.  A helper of its plugin, not a plugin."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any, TypeAlias

import attrs

from saekit_plugins.backends.compiled_parts import is_hooked

if TYPE_CHECKING:
    import torch
    from torch import Tensor

_INPUTS = ("query_input", "key_input", "value_input")
_WIDTH_OF_A_TRY = 8  # positions

_Make: TypeAlias = "Callable[[Any], Mapping[str, Any]]"
"""Of a module, what attributes run it fused."""


@attrs.frozen(eq=False)
class _Part:
    """What can run fused while nothing is hooked at ``points``."""

    module: Any
    points: tuple[str, ...]
    make: _Make
    kind: object
    """Parts of one kind are computed alike."""

    def fused(self) -> Mapping[str, Any]:
        """The attributes of the module that run it so while nobody looks inside, and as it is when somebody does: a
        forward may be made inside another, with hooks of its own."""
        found = self.make(self.module)
        if "forward" not in found:
            return found
        forward, plain = found["forward"], self.module.forward

        def either(*args: Any, **kwargs: Any) -> Any:
            seen = any(is_hooked(getattr(self.module, point), ()) for point in self.points)
            return (plain if seen else forward)(*args, **kwargs)

        return {**found, "forward": either}

    def is_exact(self) -> bool:
        """Whether it computes, but for rounding, what the library's own code does, on a few numbers."""
        import torch

        with torch.no_grad(), torch.autocast(self._like.device.type, enabled=False):
            given = self._given()
            try:
                expected = type(self.module).forward(self.module, *given)
                with ExitStack() as undo:
                    for name, value in self.make(self.module).items():
                        _replace(undo, vars(self.module), name, value)
                    found = self.module.forward(*given)
            except Exception:  # of a library that is another than is known here
                return False
        close = {torch.float64: 1e-9, torch.float32: 1e-4}.get(expected.dtype, 0.05) * expected.abs().max()
        return expected.shape == found.shape and bool(((found - expected).abs() <= close).all())

    @property
    def _like(self) -> torch.Tensor:
        import torch

        return next(self.module.parameters(), torch.empty(0, dtype=self.module.cfg.dtype))

    def _given(self) -> list[Tensor]:
        import torch

        like, cfg = self._like, self.module.cfg
        width = getattr(self.module, "length", None) or cfg.d_model
        waves = torch.arange(_WIDTH_OF_A_TRY * width, dtype=torch.float64).sin().view(1, _WIDTH_OF_A_TRY, width)
        return [waves.to(like.device, cfg.dtype)] * (len(_INPUTS) if self.make is _attention else 1)


class FusedParts:
    """Runs attention, LayerNorm, RMSNorm and GPT-2's GELU by a few of torch's functions, where nobody looks inside.

    transformer_lens makes each in many steps, so that every number in between passes a hook: attention scores are
    ``[b, head, t, t]``.  Where nobody has a hook there, they need not be made.  What is replaced is put back after each
    forward, so that whoever has the model finds it as it was.  Each kind of part is tried on a few numbers first; one
    that does not come to the same is left as it is.
    """

    def __init__(self, model: Any) -> None:
        parts = [part for module in model.modules() if (part := _part(module)) is not None]
        tried: dict[object, bool] = {}
        for part in parts:
            if part.kind not in tried and not any(is_hooked(point, ()) for point in part.module.modules()):
                tried[part.kind] = part.is_exact()
        self._parts = [part for part in parts if tried.get(part.kind)]

    def __len__(self) -> int:
        return len(self._parts)

    @contextmanager
    def at_work(self) -> Iterator[None]:
        """Inside, parts of the model run fused."""
        from torch.nn.modules import module as torch_module

        parts = [] if torch_module._has_any_global_hook() else self._parts
        with ExitStack() as undo:
            for part in parts:
                if "forward" not in vars(part.module):  # of a forward around this one, or of somebody else
                    for name, value in part.fused().items():
                        _replace(undo, vars(part.module), name, value)
            yield


def _replace(undo: ExitStack, attributes: dict[str, Any], name: str, value: object) -> None:
    if name in attributes:
        undo.callback(attributes.__setitem__, name, attributes[name])
    else:
        undo.callback(attributes.pop, name)
    attributes[name] = value


def _part(module: Any) -> _Part | None:
    cls = type(module)
    if cls.__module__.partition(".")[0] != "transformer_lens" or any(p.is_meta for p in module.parameters()):
        return None
    name = cls.__name__
    if name in ("Attention", "GroupedQueryAttention") and _is_plain(module):
        return _Part(module, ("hook_attn_scores", "hook_pattern"), _attention, (cls, module.attn_type))
    if name in ("LayerNorm", "LayerNormPre", "RMSNorm", "RMSNormPre"):
        return _Part(module, ("hook_scale", "hook_normalized"), _norm, cls)
    if _has_gelu_new(module):
        return _Part(module, (), _gelu, (cls, "gelu_new"))
    return None


# ---- attention


def _is_plain(module: Any) -> bool:
    """Whether nothing is done to the scores but a mask and the softmax."""
    cfg = module.cfg
    biased = cfg.positional_embedding_type in ("alibi", "relative_positional_bias")
    capped = (getattr(cfg, "attn_scores_soft_cap", None) or 0) > 0
    return not (biased or capped or getattr(cfg, "use_attention_sinks", False))


def _attention(module: Any) -> Mapping[str, Any]:
    plain = type(module).forward

    def forward(*inputs: Tensor, **options: Any) -> Tensor:
        others = [*inputs[len(_INPUTS) :], *(value for name, value in options.items() if name not in _INPUTS)]
        # A cache, or padding, is left to the library's own steps.
        steps = _steps(module) if all(value is None for value in others) else {}
        with ExitStack() as undo:
            for name, value in steps.items():
                _replace(undo, vars(module), name, value)
            found: Tensor = plain(module, *inputs, **options)
        return found

    return {"forward": forward}


def _steps(module: Any) -> Mapping[str, Any]:
    """What takes the place of an attention's own steps between queries and keys, and what comes of values."""
    given: list[tuple[Tensor, Tensor]] = []

    def calculate_attention_scores(q: Tensor, k: Tensor) -> Tensor:
        given.append((q, k))
        return q.new_zeros(1, 1, 1, 1)  # what is made of it, nobody uses

    def apply_causal_mask(scores: Tensor, *_: object, **__: object) -> Tensor:
        return scores

    def calculate_z_scores(v: Tensor, pattern: Tensor) -> Tensor:
        q, k = given.pop()
        z: Tensor = module.hook_z(_attended(module, q, k, v))
        return z

    return {step.__name__: step for step in (calculate_attention_scores, apply_causal_mask, calculate_z_scores)}


def _attended(module: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """``[b, t, head, d_head]`` of queries, keys and values of that shape, the latter of fewer heads perhaps."""
    from torch.nn.functional import scaled_dot_product_attention

    causal = (getattr(module, "_attention_dir_override", None) or module.cfg.attention_dir) == "causal"
    mask = None
    if causal and module.attn_type != "global":  # the library's own: 0, and -inf where a query does not look
        mask = type(module).apply_causal_mask(module, q.new_zeros(1, 1, q.shape[1], k.shape[1]))
    heads = q.shape[2]
    k, v = (each.repeat_interleave(heads // each.shape[2], dim=2) if each.shape[2] < heads else each for each in (k, v))
    out = scaled_dot_product_attention(
        q.transpose(1, 2),
        k.transpose(1, 2),
        v.to(q.dtype).transpose(1, 2),
        attn_mask=mask,
        is_causal=causal and mask is None,
        scale=1 / float(module.attn_scale),
    )
    return out.transpose(1, 2).to(v.dtype)


# ---- norms and activation functions


def _norm(module: Any) -> Mapping[str, Any]:
    import torch
    from torch.nn.functional import layer_norm

    dtype, full = module.cfg.dtype, module.cfg.dtype in (torch.float32, torch.float64)
    centers, weighs = type(module).__name__.startswith("LayerNorm"), hasattr(module, "w")

    def forward(x: Tensor) -> Tensor:
        wide = x if full else x.to(torch.float32)
        if not centers:
            squares = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square() / x.shape[-1]
            x = (wide / (squares + module.eps).sqrt()).to(dtype)
            return x * module.w.to(x.device) if weighs else x
        if weighs and full:
            return layer_norm(wide, x.shape[-1:], module.w, module.b, module.eps).to(dtype)
        x = layer_norm(wide, x.shape[-1:], eps=module.eps).to(dtype)
        return x * module.w + module.b if weighs else x

    return {"forward": forward}


def _has_gelu_new(module: Any) -> bool:
    """In half precision each of its steps rounds, so there it stays."""
    import torch

    function, dtype = vars(module).get("act_fn"), getattr(getattr(module, "cfg", None), "dtype", None)
    return getattr(function, "__name__", "") == "gelu_new" and dtype in (torch.float32, torch.float64)


def _gelu(module: Any) -> Mapping[str, Any]:
    from torch.nn.functional import gelu

    return {"act_fn": lambda x: gelu(x, approximate="tanh")}
