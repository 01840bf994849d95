"""The plugins that are chosen where nobody says which: the only names of plugins that the kernel has.

Each is the qualified key of a built-in one, and an option's default: whatever is chosen in its place is as good.
"""

from __future__ import annotations

__all__ = [
    "ALWAYS_TRACKED", "BENCHED", "DEFAULT_ACTIVATION", "DEFAULT_ARCHITECTURE", "DEFAULT_BACKEND", "DEFAULT_EVALS",
    "DEFAULT_OPTIMIZER", "DEFAULT_SCHEDULE", "DEFAULT_SOURCE", "NO_MODEL", "TOY_SOURCE",
]  # fmt: skip

DEFAULT_BACKEND = "saekit:HookedTransformer"
DEFAULT_ACTIVATION = "saekit:relu"
DEFAULT_SOURCE = "saekit:live"
DEFAULT_ARCHITECTURE = "saekit:standard"
"""Also of a saved SAE whose loader does not say."""
DEFAULT_OPTIMIZER = "saekit:adam"
DEFAULT_SCHEDULE = "saekit:constant"
DEFAULT_EVALS = ("saekit:reconstruction", "saekit:downstream")
ALWAYS_TRACKED = "saekit:jsonl"
"""The tracker that every run has, whatever others it has: reports read what it writes."""
NO_MODEL, TOY_SOURCE = "saekit:none", "saekit:toy"
"""The backend and the source of `saekit bench-synthetic`."""
BENCHED = ("saekit:standard", "saekit:topk", "saekit:batchtopk")
"""The architectures that `saekit bench` times where nobody names others."""
