"""Who goes the fast way, and who does not."""

from __future__ import annotations

from typing import Any

import attrs
import pytest
import torch
from saekit_plugins.architectures.batchtopk import BatchTopKConfig
from saekit_plugins.architectures.jumprelu import JumpReLUConfig
from saekit_plugins.architectures.standard import StandardConfig
from saekit_plugins.architectures.topk import TopKConfig
from saekit_plugins.architectures.transcoder import JumpReLUTranscoderConfig
from support.kernels import built

from saekit.config import SAEConfig


@pytest.mark.parametrize(
    ("config", "change", "expected"),
    [
        (StandardConfig(), {"kernels": "reference"}, 'plain torch: kernels is "reference"'),
        (StandardConfig(dtype="float64"), {}, "plain torch: the weights are float64"),
        (
            StandardConfig(dtype="float64"),
            {"kernels": "fast"},
            "fast kernels, no first look in bfloat16: not for float64",
        ),
        (StandardConfig(dtype="bfloat16"), {"kernels": "fast"}, "plain torch: the weights are bfloat16"),
        (StandardConfig(use_ghost_grads=True), {}, "plain torch: use_ghost_grads has no fast path"),
        (StandardConfig(noise_scale=0.1), {}, "fast kernels, no first look in bfloat16: there is noise"),
        (StandardConfig(), {"activation": torch.nn.functional.softplus},
         "plain torch: the activation function declares no sparse support"),
    ],
)  # fmt: skip
def test_the_way_of_a_step_in_words(config: SAEConfig, change: dict[str, Any], expected: str) -> None:
    sae = built(attrs.evolve(config, d_sae=32))
    for name, value in change.items():
        setattr(sae, name, value)
    assert sae.step_path() == expected


def test_a_class_that_changes_the_mathematics_loses_the_fast_path() -> None:
    base = type(built(TopKConfig(d_sae=60, k=3)))
    for name in ("losses", "features_of", "pre_activations", "reconstruction", "training_features"):
        changed = type("Changed", (base,), {name: lambda self, *args, name=name: getattr(base, name)(self, *args)})
        sae = built(TopKConfig(d_sae=60, k=3))
        sae.__class__ = changed
        assert sae.why_reference() == f"Changed overrides {name}, and not step_kernels"
        assert sae.step_path().startswith("plain torch: ")
        vouched = type("Vouched", (changed,), {"step_kernels": base.step_kernels})
        sae.__class__ = vouched
        assert sae.why_reference() is None


@pytest.mark.parametrize(
    ("config", "name"),
    [
        (JumpReLUConfig(), "_sparsity"), (JumpReLUTranscoderConfig(), "_sparsity"), (StandardConfig(), "_drawn"),
        (TopKConfig(k=3), "feature_norms"), (TopKConfig(k=3), "k_aux"), (BatchTopKConfig(k=3), "aux_weight"),
    ],
)  # fmt: skip
def test_a_class_that_changes_what_the_mathematics_are_made_of_loses_the_fast_path(
    config: SAEConfig, name: str
) -> None:
    sae = built(attrs.evolve(config, d_sae=60))
    base = type(sae)
    assert sae.why_reference() is None
    between = type("Between", (base,), {name: next(vars(one)[name] for one in base.__mro__ if name in vars(one))})
    for kind in (between, type("Below", (between,), {})):
        sae.__class__ = kind
        assert sae.why_reference() == f"Between overrides {name}, and not step_kernels"
        with torch.no_grad():
            assert sae._kernel_for(torch.zeros(2, sae.d_in)) is None


def test_a_class_that_changes_how_it_is_saved_keeps_the_fast_path() -> None:
    names = ("__init__", "after_update", "public_tensors", "load_public_tensors", "saved_options", "extra_repr", "save")
    sae = built(TopKConfig(d_sae=60, k=3))
    base = type(sae)
    own = {name: getattr(base, name) for name in names} | {"_name": "own", "helper": lambda self: 3}
    sae.__class__ = type("Own", (base,), own)
    assert sae.why_reference() is None


def test_a_parameter_that_the_kernels_do_not_know_learns_by_autograd() -> None:
    sae = built(StandardConfig(d_sae=60))
    sae.gate = torch.nn.Parameter(torch.zeros(60))
    assert sae.step_path() == "plain torch: the kernels have no gradient for gate"
    sae.gate.requires_grad_(False)
    assert sae.why_reference() is None


def test_many_of_the_features_are_no_case_for_sparse_products() -> None:
    assert built(TopKConfig(d_sae=100, k=15)).why_reference() is None
    assert "k = 20 is so large a part" in str(built(TopKConfig(d_sae=100, k=20)).why_reference())


def test_an_infinite_norm_goes_by_autograd() -> None:
    assert built(StandardConfig(d_sae=60, lp_norm=float("inf"))).why_reference() is not None
