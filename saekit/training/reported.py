"""What a step reports, looked at: names and shapes that would fail later, or take the place of saekit's own numbers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from saekit.plugins.building import origin_of, wrong
from saekit.plugins.text import short
from saekit.sae.module import SAEModule
from saekit.values import StepOutput

__all__ = ["Unwritten", "check_reported"]

_FEW = 64

_LINES = ("step", "seconds")  # of each line of metrics.jsonl
_OURS = {
    "losses/overall_loss", "metrics/explained_variance", "metrics/explained_variance_std", "metrics/l0",
    "metrics/mean_log10_feature_sparsity", "sparsity/mean_passes_since_fired", "sparsity/dead_features",
    "sparsity/below_1e-5", "sparsity/below_1e-6", "details/grad_norm", "details/current_learning_rate",
    "details/n_training_tokens", "details/distinct_documents", *_LINES,
}  # fmt: skip
_ROOMS = ("evals/", "weights/", "plots/", "metrics/explained_variance/")


def check_reported(sae: SAEModule, result: StepOutput, rows: int) -> None:
    """:class:`PluginFailedError`, which names the plugin, unless ``result`` of a step on ``rows`` is as it should be.

    It looks at names, types and shapes, and never at numbers, for which one would wait.
    """
    fault = _fault(sae, result, rows) if isinstance(result, StepOutput) else f"returned {short(result)}, expected one"
    if fault:
        raise wrong(_maker(sae), f"the saekit.StepOutput of a training step {fault}")


class Unwritten:
    """The batch of a step, which must be after it what it was: a few rows from all over it are kept, and compared.

    Only where torch counts a write, so that nothing waits for the device otherwise.  That alone tells nothing: of views
    of a buffer, into which its source writes other rows meanwhile, torch counts those, too.
    """

    def __init__(self, **given: tuple[Tensor | None, Tensor | None]) -> None:
        """What is given, as StepInput calls it, each with the rows of which it was made."""
        self._noted = [
            (name, x, rows, _version(x), _few(x).clone()) for name, (x, rows) in given.items() if x is not None
        ]

    def check(self, sae: SAEModule) -> None:
        """:class:`PluginFailedError` where a step of ``sae`` has written into any of it."""
        for name, x, rows, version, few in self._noted:
            if _version(x) == version or torch.allclose(_few(x), few, rtol=0, atol=0, equal_nan=True):
                continue
            shared = rows is not None and x.untyped_storage().data_ptr() == rows.untyped_storage().data_ptr()
            why = "is the batch of all SAEs that train on it" if shared else "must stay as it is"
            place = "x" if name == "x" else f"step.{name}"
            raise wrong(
                _maker(sae), f"a training step has written into {place}, which {why}. Work on a copy: {place}.clone()"
            )


def _version(x: Tensor) -> int:
    """A number that is another one once somebody has written into ``x``."""
    return 0 if x.is_inference() else x._version


def _few(x: Tensor) -> Tensor:
    """Rows from all over ``x``, 64 at most."""
    return x.detach()[:: -(-len(x) // _FEW) or 1]


def _maker(sae: SAEModule) -> object:
    """What has made the step: a kernel of a plugin's, or the architecture."""
    kernel, _ = sae._training_kernel()
    return kernel if kernel is not None and origin_of(kernel) is not None else sae


def _fault(sae: SAEModule, result: StepOutput, rows: int) -> str | None:
    """What is wrong, in words that go on from "the StepOutput"."""
    shapes = {"output": ([rows, sae.d_out], "[n, d_out]"), "fired": ([sae.d_sae], "[d_sae]")}
    for field, (shape, of) in shapes.items():
        value = getattr(result, field)
        if not isinstance(value, Tensor) or list(value.shape) != shape:
            return f"has {field}={_seen(value)}, expected a tensor {of}, which is {shape}"
    if not _is_scalar(result.loss, tensor=True):
        return f"has loss={_seen(result.loss)}, expected a tensor of one number"
    for field, tensor in (("losses", True), ("coefficients", False), ("metrics", False)):
        named = getattr(result, field)
        if not isinstance(named, Mapping):
            return f"has {field}={short(named)}, expected a mapping of numbers by name"
        for name, value in named.items():
            if not isinstance(name, str) or not name:
                return f"has {field} of the name {short(name)}, expected a text"
            if not _is_scalar(value, tensor=tensor):
                one = "a tensor of one number" if tensor else "a number, or a tensor of one"
                return f"has {field}[{name!r}] = {_seen(value)}, expected {one}"
    return _taken(result)


def _taken(result: StepOutput) -> str | None:
    """Names under which saekit logs other numbers, or that are given twice."""
    seen: dict[str, str] = {}
    for field, name, logged in _logged(result):
        if logged in _OURS or logged.startswith(_ROOMS):
            return f"has {field}[{name!r}], logged as {logged!r}, which is a name of saekit's own; give it another"
        if logged in seen:
            return (
                f"has {field}[{name!r}] and {seen[logged]}, which are both logged as {logged!r}; give it another name"
            )
        seen[logged] = f"{field}[{name!r}]"
    return None


def _logged(result: StepOutput) -> Iterator[tuple[str, str, str]]:
    """Each number: where it is, its name there, and the name under which it is logged."""
    for field, before in (("losses", "losses/"), ("coefficients", "details/current_"), ("metrics", "")):
        yield from ((field, name, before + name) for name in getattr(result, field))


def _is_scalar(value: object, *, tensor: bool) -> bool:
    if isinstance(value, Tensor):
        return value.numel() == 1 and not value.is_complex()
    if tensor or isinstance(value, (str, bytes)) or getattr(value, "size", 1) != 1:
        return False
    try:
        float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        return False
    return True


def _seen(value: object) -> str:
    if not isinstance(value, Tensor):
        return short(value)
    return f"a tensor {list(value.shape)} of {str(value.dtype).removeprefix('torch.')}"
