"""What is logged, under the names that the field's dashboards use."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from saekit.distributed.share import WHOLE, Share
from saekit.errors import PluginError, PluginFailedError
from saekit.sae.module import SAEModule
from saekit.values import Histogram, Ports, StepOutput

__all__ = ["eval_metrics", "histogram", "numbers_of", "step_metrics", "window_metrics"]


@torch.no_grad()
def step_metrics(
    target: Tensor,
    result: StepOutput,
    *,
    since_fired: Tensor,
    dead: Tensor,
    lr: float,
    grad_norm: Tensor,
    tokens: int,
    ports: Ports,
    share: Share = WHOLE,
) -> dict[str, float]:
    """The metrics of a step towards ``target [n, d_out]``, of which and of the features ``share`` is this process's.

    ``result`` has the numbers and counts of the whole batch.  Reading them is the one place that waits for the device.
    Of a target that is the same in all rows but for rounding, as in a batch of one, no variance can be explained: that
    is left out.
    """
    dtype = torch.promote_types(result.loss.dtype, torch.float32)
    explained, unlike = _explained(target, result.output, ports, share)
    values: dict[str, Tensor] = {f"losses/{name}": value for name, value in result.losses.items()}
    values |= {
        "losses/overall_loss": result.loss,
        **explained,
        "metrics/l0": share.features.sum(result.fired.sum()) / share.n(len(target)),
        "sparsity/mean_passes_since_fired": share.all_features(since_fired).to(dtype).mean(),
        "sparsity/dead_features": share.features.sum(dead.sum()),
        "details/grad_norm": grad_norm,
    }
    values |= {
        name: torch.as_tensor(value if isinstance(value, Tensor) else float(value), device=result.loss.device)
        for name, value in result.metrics.items()
    }
    read = [*values.values(), *unlike.values()]
    numbers = torch.stack([value.detach().to(dtype).reshape(()) for value in read]).tolist()
    still = {name for name, rows in zip(unlike, numbers[len(values) :], strict=True) if rows == 0}
    found = zip(values, numbers[: len(values)], strict=True)
    return {name: value for name, value in found if name not in still} | {
        "details/current_learning_rate": lr,
        **{f"details/current_{name}": float(value) for name, value in result.coefficients.items()},
        "details/n_training_tokens": tokens,
    }


def _squares(target: Tensor, output: Tensor, share: Share) -> tuple[Tensor, Tensor, Tensor]:
    """Of each row of the whole batch ``‖y − ŷ‖²`` and ``‖y − ȳ‖²``, ``[n]`` both, and how many are unlike the mean."""
    deviation = target - share.row_mean(target)
    # Of equal rows the mean need not be one of them; what is not finite is unlike anything.
    unlike = ~(deviation.abs() <= _rounding(target.dtype) * target.abs()).all(-1)
    squares, variances = (target - output).pow(2).sum(-1), deviation.pow(2).sum(-1)
    return share.all_rows(squares), share.all_rows(variances), share.total(unlike.sum())


def _rounding(dtype: torch.dtype) -> float:
    """How far a mean of equal numbers may be from them, for each of their own size; narrow types are summed in a wider
    one."""
    return torch.finfo(dtype).eps + 32 * torch.finfo(torch.promote_types(dtype, torch.float32)).eps


def _explained(
    target: Tensor, output: Tensor, ports: Ports, share: Share
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The explained variance, and of each of several targets, and by the same names how many rows are unlike their
    mean."""
    squares, variances, rows = _squares(target, output, share)
    name = "metrics/explained_variance"
    found = {
        name: 1 - squares.sum() / variances.sum(),
        f"{name}_std": (1 - squares / variances.clamp_min(1e-20)).std(correction=0),
    }
    unlike = dict.fromkeys(found, rows)
    if len(ports.targets) > 1:
        given = ports.split_target(output)
        for of, wanted in ports.split_target(target).items():
            squares, variances, rows = _squares(wanted, given[of], share)
            unlike[f"{name}/{of}"] = rows
            found[f"{name}/{of}"] = 1 - squares.sum() / variances.sum()
    return found, unlike


def histogram(values: Tensor, bins: int = 64) -> Histogram:
    """``bins`` equal bins from the least to the largest of the finite ``values``; wider where those are all but one."""
    finite = values.detach().cpu().double().flatten()  # not every device has float64
    numbers = finite[finite.isfinite()].numpy()
    low, high = (numbers.min(), numbers.max()) if len(numbers) else (0.0, 0.0)
    alike = high - low <= 1e-12 * max(abs(low), abs(high))  # too near to each other for edges between them
    counts, edges = np.histogram(numbers, bins, (low - 0.5, high + 0.5) if alike else (low, high))
    return Histogram(tuple(counts.tolist()), tuple(edges.tolist()))


def window_metrics(fractions: Tensor) -> dict[str, float | Histogram]:
    """The metrics of one firing window from ``fractions [d_sae]``, whose device is waited for once."""
    fractions = fractions.cpu()
    logs = torch.log10(fractions + 1e-10)
    return {
        "plots/feature_density_line_chart": histogram(logs),
        "metrics/mean_log10_feature_sparsity": logs.mean().item(),
        "sparsity/below_1e-5": (fractions < 1e-5).sum().item(),
        "sparsity/below_1e-6": (fractions < 1e-6).sum().item(),
    }


_FAMILIAR = {
    "ce_recovered": "CE_loss_score",
    "ce_loss_without_sae": "ce_loss_without_sae",
    "ce_loss_with_sae": "ce_loss_with_sae",
    "ce_loss_with_ablation": "ce_loss_with_ablation",
    "l2_norm_in": "l2_norm_in",
    "l2_norm_out": "l2_norm",
    "l2_ratio": "l2_ratio",
}
"""Names under which dashboards of sae-lens look for evals, below ``metrics/``."""


def numbers_of(key: str, found: object) -> dict[str, float]:
    """What the eval ``key`` has ``found``, as plain numbers; :class:`PluginFailedError` for anything else."""
    if not isinstance(found, Mapping):
        raise PluginFailedError(f"the eval '{key}' returned {found!r:.60}, expected numbers by name")
    numbers = {}
    for name, value in found.items():
        try:
            numbers[str(name)] = float(value)
        except (TypeError, ValueError, RuntimeError, OverflowError) as error:
            raise PluginFailedError(f"the eval '{key}' returned {name} = {value!r:.60}, expected a number") from error
    return numbers


def apart(found: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """What evals have ``found``, by their keys, as one.

    :class:`PluginError` where two give other numbers by one name.
    """
    whole, doubts = as_one(found)
    if doubts:
        raise PluginError(doubts[0])
    return whole


def as_one(found: Mapping[str, Mapping[str, float]]) -> tuple[dict[str, float], list[str]]:
    """The same, the first number of each name, and in words where another eval gives another by that name."""
    whole: dict[str, float] = {}
    owners: dict[str, str] = {}
    doubts = []
    for key, numbers in found.items():
        for name, value in numbers.items():
            before = whole.setdefault(name, value)
            owner = owners.setdefault(name, key)
            # Sums over other batches, or in narrower types, are rounded otherwise.
            alike = math.isclose(value, before, rel_tol=1e-4, abs_tol=1e-12)
            if not alike and not (math.isnan(value) and math.isnan(before)):
                doubts.append(
                    f"the evals {owner!r} and {key!r} both give a number {name!r}, {before:.9g} and {value:.9g}, and "
                    "one would hide the other. Leave one of them out (evals.run, evals=[...]), or give the number "
                    "another name in the eval that is yours"
                )
    return whole, doubts


def eval_metrics(found: Mapping[str, float]) -> dict[str, float | Histogram]:
    """The numbers that evals have ``found``, by the names under which they are logged."""
    named: dict[str, float | Histogram] = {f"evals/{name}": value for name, value in found.items()}
    named |= {f"metrics/{known}": found[name] for name, known in _FAMILIAR.items() if name in found}
    return named


def weight_metrics(sae: SAEModule) -> dict[str, float | Histogram]:
    """Histograms of its weights; of one whose features are split, all processes of the group must ask."""
    named: dict[str, float | Histogram] = {}
    for entry in sae.table:
        if entry.histogram is not None and (value := getattr(sae, entry.name)) is not None:
            numbers = value.detach() if value.ndim == 1 else value.detach().norm(dim=-1)
            named[f"weights/{entry.histogram}"] = histogram(
                sae.share.all_features(numbers.flatten()) if entry.split == "d_sae" else numbers
            )
    return named
