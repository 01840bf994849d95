"""What activation functions declare of themselves."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from saekit_plugins.activations.relu import Relu
from saekit_plugins.activations.tanh_relu import TanhRelu
from saekit_plugins.architectures.standard import StandardConfig
from support.kernels import built, seeded

from saekit.testing import check_sparse_activation
from saekit.values import StepInput


class Wrong(Relu):
    """Relu, but for what a case changes."""


def changed(**methods: Any) -> Wrong:
    return type("Changed", (Wrong,), methods)()


@pytest.mark.parametrize("activation", [Relu(), TanhRelu()], ids=lambda activation: type(activation).__name__)
def test_the_built_in_activations_are_what_they_declare(activation: Any) -> None:
    check_sparse_activation(activation)


@pytest.mark.parametrize(
    ("activation", "message"),
    [
        (torch.relu, "declares no sparse support"),
        (changed(__call__=lambda self, pre: torch.nn.functional.gelu(pre)), "negative somewhere"),
        (changed(__call__=lambda self, pre: torch.nn.functional.softplus(pre)), "not zero wherever pre <= 0"),
        (changed(__call__=lambda self, pre: pre.relu() / (1 + pre.relu().sum())), "every number by itself"),
        (changed(__call__=lambda self, pre: pre.relu().square()), "pre_gradient is not what autograd finds"),
        (changed(__call__=lambda self, pre: pre.data.relu_() + pre * 0), "changes its argument"),
        (changed(__call__=lambda self, pre: pre.relu()[:1]), "turns the shape"),
        (changed(pre_gradient=lambda self, gradient, features: gradient), "pre_gradient is not what autograd finds"),
        (changed(in_place=lambda self, pre: pre.relu()), "does not write over its argument"),
        (changed(in_place=lambda self, pre: pre.clamp_(0, 1)), "not what calling it returns"),
    ],
)
def test_a_false_declaration_is_found(activation: Any, message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        check_sparse_activation(activation)


def test_an_activation_without_a_declaration_trains_by_autograd() -> None:
    sae = built(StandardConfig(d_sae=30))
    sae.activation = torch.nn.functional.softplus
    x = torch.randn(10, 12, generator=seeded())
    assert sae.why_reference() == "the activation function declares no sparse support"
    result = sae.training_step(x, StepInput(step=0, generator=seeded()))
    assert result.fired.tolist() == [10] * 30
    assert sae.W_enc.grad is not None
    with torch.no_grad():
        assert torch.allclose(sae.encode(x), torch.nn.functional.softplus(sae.pre_activations(x)))
