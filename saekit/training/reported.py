"""What a step reports, looked at: names and shapes that would fail later, or take the place of saekit's own numbers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from numbers import Real

import torch
from torch import Tensor

from saekit.plugins.building import origin_of, wrong
from saekit.plugins.text import short
from saekit.sae.module import SAEModule
from saekit.values import StepOutput

__all__ = ["check_reported", "check_unchanged", "version_of"]

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


def version_of(x: Tensor | None) -> int:
    """A number that is another one once somebody has written into ``x``."""
    return 0 if x is None or x.is_inference() else x._version


def check_unchanged(
    sae: SAEModule, x: Tensor, target: Tensor | None, before: tuple[int, int], first: tuple[Tensor, Tensor]
) -> None:
    """:class:`PluginFailedError` where a step has written into ``x``, or into ``target``.

    ``before`` were their :func:`version_of`; ``first`` are the rows of which ``x`` was made, and a copy of some.
    """
    if (version_of(x), version_of(target)) == before:
        return
    rows, copied = first
    if x.data_ptr() == rows.data_ptr() and torch.equal(rows[: len(copied)], copied):
        return  # views of a buffer, into which its source writes other rows meanwhile
    name = "x" if version_of(x) != before[0] else "step.target"
    raise wrong(
        _maker(sae),
        f"a training step has written into {name}, which is the batch of all SAEs that train on it. Work on a copy: "
        f"{name}.clone()",
    )


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
    return not tensor and isinstance(value, Real)


def _seen(value: object) -> str:
    if not isinstance(value, Tensor):
        return short(value)
    return f"a tensor {list(value.shape)} of {str(value.dtype).removeprefix('torch.')}"
