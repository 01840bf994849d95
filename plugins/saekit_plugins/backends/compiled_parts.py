"""``model.compile`` for models of transformer_lens and mamba-lens.  A helper of their plugins, not a plugin."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from types import FunctionType
from typing import TYPE_CHECKING, Any

from saekit import ModelError
from saekit.cautions import warn

if TYPE_CHECKING:
    from torch.nn import Module

_FIRST, _LAST = "hook_resid_pre", "hook_resid_post"
_BLOCKS = {("transformer_lens", "TransformerBlock"), ("mamba_lens", "HookedMambaBlock")}
"""Classes whose forward begins with the first of these hooks and ends with the last."""
_CUDA_GRAPHS = ("reduce-overhead", "max-autotune")


class CompiledParts:
    """Runs the largest parts of a model that no hook interferes with as compiled code, and the rest as it is.

    Compiled code knows no hooks: it is made of parts while they have none, and used only then.  So hooks of any kind
    take effect, and none of them makes torch compile again.  A part is a block or, when something is hooked inside it,
    the attention, MLP or normalization in it.  The first and last hook of a block run before and after its compiled
    code, so that the residual stream can be read and replaced between compiled blocks.
    """

    def __init__(self, model: Any, mode: str) -> None:
        import numpy as np
        from transformer_lens.hook_points import HookPoint

        if not any(cls.__name__ == "HookedTransformer" for cls in type(model).__mro__):
            raise ModelError(
                f"model.compile is for HookedTransformer and HookedMamba, not for {type(model).__name__}; set it to "
                "false"
            )
        self._model, self._mode = model, mode
        self.calls = 0
        """Of compiled parts."""
        self._compiled: dict[Any, Callable[..., Any]] = {}  # by the forward of a class: all layers share it
        self._no_hooks = {name: HookPoint() for name in (_FIRST, _LAST)}
        self._numpy = [
            (vars(module), name)
            for module in model.modules()
            for name, value in vars(module).items()
            if isinstance(value, np.generic)
        ]
        self._warned = False

    @contextmanager
    def except_at(self, hooks: Collection[str]) -> Iterator[None]:
        """Inside, parts of the model without ``hooks``, and without hooks that others have put there, run compiled."""
        import numpy as np
        from torch.nn.modules import module as torch_module

        hooked = {id(self._module(name)) for name in hooks}
        parts: list[Module] = []
        if not torch_module._has_any_global_hook():
            for child in self._model.children():
                self._visit(child, hooked, parts)
        before = self.calls
        with ExitStack() as undo:
            for part in parts:
                vars(part)["forward"] = self._forward(part, hooked)
                undo.callback(vars(part).pop, "forward", None)  # twice, where layers share a module
            for attributes, name in self._numpy:
                # TransformerLens holds NumPy scalars, and torch's guards on them fail in inference mode.
                if isinstance(value := attributes.get(name), np.generic):
                    attributes[name] = value.item()
                    undo.callback(attributes.__setitem__, name, value)
            yield
        if self.calls == before and not self._warned:
            self._warned = True
            warn(
                f"model.compile does nothing for {', '.join(sorted(hooks)) or 'this model'}: no part that runs for it "
                "is free of hooks",
                RuntimeWarning,
            )

    def _module(self, name: str) -> Module:
        """The hook point ``name``, or what makes it when the model runs (the state of a Mamba at each position)."""
        while True:
            try:
                module: Module = self._model.get_submodule(name)
            except AttributeError:
                name = name.rpartition(".")[0]
            else:
                return module

    def _visit(self, module: Module, hooked: Collection[int], parts: list[Module]) -> tuple[bool, bool]:
        """Whether ``module`` can be within a part, and whether it has hook points; adds the parts it consists of."""
        import torch

        inner: list[Module] = []
        free, has_points, ends = True, False, _ends(module)
        for name, child in module._modules.items():
            if child is not None:
                child_is_free, child_has_points = self._visit(child, hooked, inner)
                free &= child_is_free or name in ends
                has_points |= child_has_points
        own_forward = "forward" in vars(module)
        # A module without hook points is a single operation as a rule: nothing to gain.
        if free and has_points and not own_forward and type(module).forward is not torch.nn.Module.forward:
            parts.append(module)
        else:
            parts += inner
        return free and not is_hooked(module, hooked), has_points or hasattr(type(module), "add_hook")

    def _forward(self, part: Module, hooked: Collection[int]) -> Callable[..., Any]:
        """What ``part`` runs instead of its forward."""
        compiled = self._compile(type(part).forward)
        ends: dict[str, Any] = {name: point for name in _ends(part) if is_hooked(point := part._modules[name], hooked)}

        def forward(*args: Any, **kwargs: Any) -> Any:
            self.calls += 1
            if _FIRST in ends:
                args = (ends[_FIRST](args[0]), *args[1:])
            with self._silent(part, ends):
                out = self._run(compiled, part, *args, **kwargs)
            return ends[_LAST](out) if _LAST in ends else out

        return forward

    @contextmanager
    def _silent(self, part: Module, ends: Mapping[str, Any]) -> Iterator[None]:
        """``part`` as it is without hooks at its ``ends``, and without the hook points for single positions."""
        changing = [(vars(point), points) for point in part._modules.values() if (points := _points(point))]
        part._modules.update({name: self._no_hooks[name] for name in ends})
        for attributes, _ in changing:
            attributes["hooks"] = {}
        try:
            yield
        finally:
            part._modules.update(ends)
            for attributes, points in changing:
                attributes["hooks"] = points

    def _compile(self, forward: Any) -> Callable[..., Any]:
        import torch

        if forward not in self._compiled:
            # A copy of the code, by which torch keeps what it compiled: who else compiles the class may have hooks.
            own = FunctionType(
                forward.__code__.replace(), forward.__globals__, forward.__name__, forward.__defaults__,
                forward.__closure__,
            )  # fmt: skip
            own.__kwdefaults__ = forward.__kwdefaults__
            try:
                self._compiled[forward] = torch.compile(own, mode=self._mode)
            except RuntimeError as error:  # a Python or platform for which torch has no compiler
                raise _failure(error) from None
        return self._compiled[forward]

    def _run(self, compiled: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        import torch

        from saekit.kernels import is_of_compiler

        try:
            out = compiled(*args, **kwargs)
        except Exception as error:
            if "out of memory" in str(error).lower():
                raise
            if isinstance(error, (RuntimeError, MemoryError)) and not is_of_compiler(error):
                raise  # of the code that was compiled
            raise _failure(error) from None
        # The memory of a CUDA graph's output is used again by the next graph.
        return out.clone() if self._mode in _CUDA_GRAPHS and isinstance(out, torch.Tensor) else out


def _ends(module: Module) -> tuple[str, ...]:
    cls = type(module)
    return (_FIRST, _LAST) if (cls.__module__.partition(".")[0], cls.__name__) in _BLOCKS else ()


def is_hooked(module: Any, hooked: Collection[int]) -> bool:
    """Whether something happens when ``module`` is called that its class does not know of."""
    return bool(
        id(module) in hooked
        or module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in vars(module)
        or ((points := _points(module)) and any(is_hooked(point, hooked) for point in points.values()))
    )


def _points(module: Any) -> dict[str, Any]:
    """The hook points for single positions that mamba-lens makes while a model runs, if ``module`` has such."""
    attributes = vars(module)
    return attributes["hooks"] if "make_input_dependent_postfixes" in attributes else {}


def _failure(error: Exception) -> ModelError:
    """What went wrong in one line, instead of torch's report."""
    cause: BaseException = error
    while isinstance(inner := getattr(cause, "inner_exception", None), BaseException):
        cause = inner
    lines = [line.strip() for line in str(cause).splitlines() if line.strip()]
    reason = next((line for line in lines if "error:" in line), lines[0] if lines else "")
    return ModelError(
        f"the model cannot be compiled (model.compile): {type(cause).__name__}: {reason}. Set model.compile=false to "
        "run it as it is"
    )
