"""Plugins of which each breaks one promise of its kind, by kind and by the name of the check that finds it."""

from __future__ import annotations

from support.faulty import (
    activations,
    architectures,
    backends,
    evals,
    loaders,
    optimizers,
    options,
    releases,
    schedules,
    sources,
    step_kernels,
    trackers,
    transforms,
)
from support.faulty.case import Case

EVERY_KIND = "every kind"
CASES: dict[tuple[str, str], Case] = {
    (kind, case.check): case
    for kind, cases in {
        EVERY_KIND: options.CASES,
        "activation_functions": activations.CASES,
        "activation_sources": sources.CASES,
        "evals": evals.CASES,
        "input_transforms": transforms.CASES,
        "lr_schedules": schedules.CASES,
        "model_backends": backends.CASES,
        "optimizers": optimizers.CASES,
        "pretrained_loaders": loaders.CASES,
        "releases": releases.CASES,
        "sae_architectures": architectures.CASES,
        "step_kernels": step_kernels.CASES,
        "trackers": trackers.CASES,
    }.items()
    for case in cases
}
