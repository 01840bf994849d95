"""``model.backend.fused`` for models of transformer_lens.  A helper of its plugin, not a plugin."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any, TypeAlias

import attrs

from saekit.cautions import warn
from saekit_plugins.backends.compiled_parts import is_hooked

if TYPE_CHECKING:
    import torch
    from torch import Tensor

_INPUTS = ("query_input", "key_input", "value_input")
_STEPS = ("calculate_attention_scores", "apply_causal_mask", "calculate_z_scores")
_POSITIONS = 8  # of a try

_Make: TypeAlias = "Callable[[Any], Mapping[str, Any]]"
"""Of a module, what attributes run it fused."""


@attrs.frozen(eq=False)
class _Part:
    """What can run fused while nothing is hooked at its inner points."""

    module: Any
    make: _Make
    own: str
    """The attribute that decides whether somebody has replaced what would be fused."""
    kind: object
    """Parts of one kind are computed alike."""
    before: Any
    """What the attribute was when the model was passed; None: the method of its class."""

    def is_as_before(self) -> bool:
        """Whether nobody has replaced what would be fused, nor asked for more of it."""
        attributes = vars(self.module)
        if self.make is _attention and (any(step in attributes for step in _STEPS) or not _is_plain(self.module)):
            return False
        return attributes.get(self.own) is self.before

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
            except Exception as error:  # of a library that is another than is known here
                if "out of memory" in str(error).lower():
                    raise
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
        waves = torch.arange(_POSITIONS * width, dtype=torch.float64).sin().view(1, _POSITIONS, width)
        waves = waves.to(like.device, cfg.dtype)
        if self.make is not _attention:
            return [waves]
        if not (cfg.use_split_qkv_input or cfg.use_attn_in):
            return [waves] * len(_INPUTS)
        heads = [cfg.n_heads, *[getattr(cfg, "n_key_value_heads", None) or cfg.n_heads] * 2]
        return [waves.unsqueeze(2).expand(-1, -1, each, -1) for each in heads]


class FusedParts:
    """Runs attention, LayerNorm, RMSNorm and GPT-2's GELU by a few of torch's functions, where nobody looks inside.

    transformer_lens makes each in many steps, so that every number in between passes a hook: attention scores are
    ``[b, head, t, t]``.  Where nobody has a hook there, they need not be made.  What is replaced is put back after each
    forward, so that whoever has the model finds it as it was.  Each kind of part is tried on a few numbers, as soon as
    no hook would see them; one that does not come to the same is left as it is.
    """

    def __init__(self, model: Any) -> None:
        self._parts = [part for module in model.modules() if (part := _part(module)) is not None]
        self._exact: dict[object, bool] = {}
        self._try()

    def __len__(self) -> int:
        """How many parts run fused."""
        return sum(self._exact.get(part.kind, False) for part in self._parts)

    @property
    def kinds(self) -> set[str]:
        """The names of classes that run fused."""
        return {type(part.module).__name__ for part in self._parts if self._exact.get(part.kind)}

    def warn_if_none(self, name: str) -> None:
        """:class:`RuntimeWarning` where there is nothing to gain in the model ``name``."""
        if not len(self):
            warn(
                f"model.backend.fused does nothing for {name!r}: no attention, norm or GELU in it is known here "
                "and free of hooks",
                RuntimeWarning,
            )

    @contextmanager
    def at_work(self) -> Iterator[None]:
        """Inside, parts of the model run fused."""
        self._try()
        parts = [] if _all_are_watched() else self._parts
        with ExitStack() as undo:
            for part in parts:
                if self._exact.get(part.kind) and part.is_as_before():  # else of a forward around this one, or others'
                    for name, value in part.make(part.module).items():
                        _replace(undo, vars(part.module), name, value)
            yield

    def _try(self) -> None:
        """Each kind that has not been tried, on a part without any hook."""
        for part in self._parts:
            free = part.kind not in self._exact and not _all_are_watched() and part.is_as_before()
            if free and _is_free(*part.module.modules()):
                self._exact[part.kind] = part.is_exact()


def _all_are_watched() -> bool:
    from torch.nn.modules import module as torch_module

    return bool(torch_module._has_any_global_hook())


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
    if name in ("Attention", "GroupedQueryAttention"):
        return _Part(module, _attention, "forward", (cls, module.attn_type), None)
    if name in ("LayerNorm", "LayerNormPre", "RMSNorm", "RMSNormPre"):
        return _Part(module, _norm, "forward", cls, None)
    if getattr(function := vars(module).get("act_fn"), "__name__", "") == "gelu_new":
        return _Part(module, _gelu, "act_fn", (cls, "gelu_new"), function)
    return None


def _is_free(*points: Any) -> bool:
    """Whether nobody looks at what passes ``points``: asked as late as can be, since hooks may come with a forward."""
    return not any(is_hooked(point, ()) for point in points)


# ---- attention


def _is_plain(module: Any) -> bool:
    """Whether nothing is done to the scores but a mask and the softmax."""
    cfg = module.cfg
    biased = cfg.positional_embedding_type in ("alibi", "relative_positional_bias")
    capped = (getattr(cfg, "attn_scores_soft_cap", None) or 0) > 0
    return not (biased or capped or getattr(cfg, "use_attention_sinks", False))


def _attention(module: Any) -> Mapping[str, Any]:
    """Its forward, and the steps that it calls.

    Forwards may be made inside each other, by hooks at queries, say, and each is fused or not for itself: what it was
    called with, and then whether somebody looks at its scores, decides.
    """
    cls = type(module)
    calls: list[_Call] = []

    def forward(*inputs: Tensor, **options: Any) -> Tensor:
        others = [*inputs[len(_INPUTS) :], *(value for name, value in options.items() if name not in _INPUTS)]
        calls.append(_Call(fused=all(value is None for value in others)))  # not with a cache, or padding
        try:
            found: Tensor = cls.forward(module, *inputs, **options)
        finally:
            calls.pop()
        return found

    def calculate_attention_scores(q: Tensor, k: Tensor) -> Tensor:
        call = calls[-1]
        call.fused &= _is_free(module.hook_attn_scores, module.hook_pattern)
        if not call.fused:
            scores: Tensor = cls.calculate_attention_scores(module, q, k)
            return scores
        call.given = q, k
        return q.new_zeros(1, 1, 1, 1)  # what is made of it, nobody uses

    def apply_causal_mask(scores: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return scores if calls[-1].fused else cls.apply_causal_mask(module, scores, *args, **kwargs)

    def calculate_z_scores(v: Tensor, pattern: Tensor) -> Tensor:
        call = calls[-1]
        if call.given is None:
            z: Tensor = cls.calculate_z_scores(module, v, pattern)
        else:
            z = module.hook_z(_attended(module, *call.given, v))
        return z

    steps = (forward, calculate_attention_scores, apply_causal_mask, calculate_z_scores)
    return {step.__name__: step for step in steps}


@attrs.define(eq=False)
class _Call:
    """One forward of an attention."""

    fused: bool
    given: tuple[Tensor, Tensor] | None = None
    """Queries and keys of one that is fused."""


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

    cls, dtype = type(module), module.cfg.dtype
    full = dtype in (torch.float32, torch.float64)
    centers, weighs = cls.__name__.startswith("LayerNorm"), hasattr(module, "w")

    def forward(x: Tensor) -> Tensor:
        if not _is_free(module.hook_scale, module.hook_normalized):
            plain: Tensor = cls.forward(module, x)
            return plain
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


def _gelu(module: Any) -> Mapping[str, Any]:
    """In half precision each of its steps rounds, so there it stays."""
    import torch
    from torch.nn.functional import gelu

    plain = module.act_fn

    def act_fn(x: Tensor) -> Tensor:
        found: Tensor = gelu(x, approximate="tanh") if x.dtype in (torch.float32, torch.float64) else plain(x)
        return found

    return {"act_fn": act_fn}
