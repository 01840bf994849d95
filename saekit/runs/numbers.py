"""The main numbers of an SAE in words: which metrics they are from, and what they are called."""

from __future__ import annotations

from collections.abc import Mapping

__all__ = ["main_numbers", "short_numbers"]

_SHORT = {"EV": "explained_variance", "L0": "l0", "CE recovered": "ce_recovered"}


def main_numbers(metrics: Mapping[str, float], d_sae: int) -> tuple[str, list[tuple[str, str]]]:
    """On what they were measured, and each with its name; those that there are."""
    held_out = any(name.startswith("evals/") for name in metrics)
    found = {name: _found(metrics, name) for name in ("explained_variance", "l0", "ce_recovered")}
    losses = [metrics.get(f"evals/ce_loss_{what}") for what in ("without_sae", "with_sae", "with_ablation")]
    facts: list[tuple[str, str]] = []
    if (value := found["explained_variance"]) is not None:
        facts.append(("explained variance", f"{value:.3f}"))
    if (value := found["l0"]) is not None:
        facts.append(("L0 (features firing per token)", f"{value:.1f} of {d_sae:,}"))
    if (value := found["ce_recovered"]) is not None:
        facts.append(("CE recovered", f"{value:.3f}"))
    if None not in losses:
        facts.append(("CE of the model / with the SAE / ablated", " / ".join(f"{loss:.3f}" for loss in losses)))
    if (value := metrics.get("sparsity/dead_features")) is not None:
        facts.append(("dead features, in training", f"{value:,.0f} of {d_sae:,}"))
    return ("on held-out text" if held_out else "in training"), facts


def short_numbers(metrics: Mapping[str, float], d_sae: int) -> str:
    """The same in one line."""
    found = {short: _found(metrics, name) for short, name in _SHORT.items()}
    parts = [f"{name} {value:.3g}" for name, value in found.items() if value is not None]
    if (dead := metrics.get("sparsity/dead_features")) is not None:
        parts.append(f"{dead:,.0f} of {d_sae:,} features dead")
    return ", ".join(parts) or "nothing measured"


def _found(metrics: Mapping[str, float], name: str) -> float | None:
    return metrics.get(f"evals/{name}", metrics.get(f"metrics/{name}"))
