"""What a dictionary is given: another width, whole numbers and impossible scales are errors that say what fits."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from saekit_plugins.architectures.batchtopk import BatchTopKConfig
from saekit_plugins.architectures.gated import GatedConfig
from saekit_plugins.architectures.jumprelu import JumpReLUConfig
from saekit_plugins.architectures.matryoshka import MatryoshkaConfig
from saekit_plugins.architectures.standard import StandardConfig
from saekit_plugins.architectures.topk import TopKConfig
from saekit_plugins.architectures.transcoder import TranscoderConfig
from support.kernels import seeded
from torch import Tensor

import saekit
from saekit.errors import ConfigError
from saekit.pretrained import SAE
from saekit.sae.build import build_module, initialize
from saekit.values import Ports, StepInput

D_IN, D_SAE = 6, 10
KINDS: list[Any] = [
    StandardConfig(d_sae=D_SAE), TopKConfig(d_sae=D_SAE, k=3), BatchTopKConfig(d_sae=D_SAE, k=3),
    JumpReLUConfig(d_sae=D_SAE), GatedConfig(d_sae=D_SAE), MatryoshkaConfig(d_sae=D_SAE, k=3, widths=(4, 0.5)),
    TranscoderConfig(d_sae=D_SAE, skip_connection=True),
]  # fmt: skip


def built(config: Any, ports: Ports | int = D_IN) -> SAE:
    plugins = saekit.default_manager()
    sae: Any = build_module(plugins.find("sae_architectures", config), config, ports, plugins)
    initialize(sae, seeded(), torch.randn(20, sae.d_in, generator=seeded()))
    return sae  # type: ignore[no-any-return]


TAKE_INPUTS: dict[str, Callable[[SAE, Tensor], object]] = {
    "forward": lambda sae, x: sae(x),
    "encode": lambda sae, x: sae.encode(x),
    "encode_sparse": lambda sae, x: sae.encode_sparse(x),
    "encode_topk": lambda sae, x: sae.encode_topk(x, 2),
    "centered": lambda sae, x: sae.centered(x),
    "pre_activations": lambda sae, x: sae.pre_activations(x),
    "with_bypass": lambda sae, x: sae.with_bypass(torch.zeros(4, 6), x),
    "training_step": lambda sae, x: sae.training_step(x, StepInput(step=0, generator=seeded())),
}
TAKE_FEATURES: dict[str, Callable[[SAE, Tensor], object]] = {
    "decode": lambda sae, features: sae.decode(features),
    "reconstruction": lambda sae, features: sae.reconstruction(features),
    "features_of": lambda sae, features: sae.features_of(features),
}


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("config", KINDS, ids=lambda config: type(config).__name__)
def test_another_width_is_named_by_every_method(config: Any, grad: bool) -> None:
    sae = built(config)
    with torch.set_grad_enabled(grad):
        for name, take in TAKE_INPUTS.items():
            if name == "with_bypass" and not isinstance(config, TranscoderConfig):
                continue
            for x in (torch.zeros(4, 7), torch.zeros(6, 4), torch.zeros(())):
                with pytest.raises(ConfigError, match=r"6\b.*d_in|d_in is 6|d_in; found"):
                    take(sae, x)
        for take in TAKE_FEATURES.values():
            for features in (torch.zeros(4, 6), torch.zeros(10, 4), torch.zeros(())):
                with pytest.raises(ConfigError, match=r"must be \[\.\.\., d_sae\], and d_sae is 10; found \["):
                    take(sae, features)


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.bool], ids=str)
@pytest.mark.parametrize("grad", [True, False])
def test_whole_numbers_are_no_activations(dtype: torch.dtype, grad: bool) -> None:
    sae, name = built(KINDS[0]), str(dtype).removeprefix("torch.")
    for methods, width, what in ((TAKE_INPUTS, D_IN, "(inputs|the rows of a step)"), (TAKE_FEATURES, D_SAE, ".*")):
        for key, take in methods.items():
            if key == "with_bypass":  # which looks at nothing where nothing passes
                continue
            words = rf"^{what} must be floating-point numbers, found {name} \[4, {width}\]; if these are not token ids"
            with torch.set_grad_enabled(grad), pytest.raises(ConfigError, match=words):
                take(sae, torch.ones(4, width, dtype=dtype))
    with pytest.raises(ConfigError, match="^like must be floating-point numbers, found"):
        sae.decode(torch.zeros(4, D_SAE), like=torch.ones(4, D_IN, dtype=dtype))


def test_other_floating_point_numbers_are_taken(way: str) -> None:
    """The result is in the type of an input, and else in that of the SAE."""
    sae = built(KINDS[0])
    x = torch.randn(4, D_IN, generator=seeded())
    features, expected = sae.encode(x), sae(x)
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            for dtype in (torch.float64, torch.bfloat16):
                assert sae(x.to(dtype)).dtype == dtype
                given = sae.decode(features.detach().to(dtype))
                assert given.dtype == torch.float32
                assert torch.allclose(given, expected, atol=0.05)


def test_what_an_input_does_not_fit() -> None:
    sae = built(KINDS[0])
    with pytest.raises(ConfigError, match=r"outputs are \[4, 6\], which cannot be like .* \[5, 6\]"):
        sae.decode(torch.zeros(4, D_SAE), like=torch.zeros(5, D_IN))
    transcoder = built(TranscoderConfig(d_sae=D_SAE, skip_connection=True), Ports({"a": D_IN}, {"b": 4}))
    with pytest.raises(ConfigError, match=r"by are \[3, 4\], which cannot be added to outputs \[2, 4\]"):
        transcoder.with_bypass(torch.zeros(2, 4), torch.zeros(3, D_IN))
    step = StepInput(step=0, generator=seeded(), target=torch.zeros(3, 5))
    with pytest.raises(ConfigError, match=r"target of a step must be \[n, d_out\], here \[3, 4\]; found \[3, 5\]"):
        transcoder.training_step(torch.zeros(3, D_IN), step)
    with pytest.raises(ConfigError, match=r"a step needs its target \[n, d_out\], and d_out is 4; found none"):
        transcoder.training_step(torch.zeros(3, D_IN), StepInput(step=0, generator=seeded()))


SCALES: list[tuple[Any, str]] = [
    (0, "scale is 0, and activations can only be multiplied by finite numbers above 0"),
    (-2.0, "scale is -2.0, and activations"),
    (math.nan, "scale is nan, and"),
    (math.inf, "scale is inf, and"),
    (True, r"scale must be a number or a tensor \[d_in\], found True"),
    ("2", r"scale must be a number or a tensor \[d_in\], found '2'"),
    (torch.tensor(0.0), "scale holds 0.0, and activations"),
    (torch.tensor([1.0, 2, math.nan, 1, 1, 1]), "scale holds nan, and activations"),
    (torch.tensor([1.0, 2, -3, 1, 1, 1]), "scale holds -3.0, and activations"),
    (torch.ones(5), r"scale must be a number or \[d_in\], and d_in is 6; found a tensor \[5\]"),
]


@pytest.mark.parametrize(("scale", "message"), SCALES, ids=lambda value: str(value)[:20])
def test_scales_that_scale_nothing(scale: Any, message: str) -> None:
    for config in KINDS[:-1]:
        sae = built(config)
        before = {name: value.clone() for name, value in sae.state_dict().items()}
        with pytest.raises(ConfigError, match=message):
            sae.fold_activation_scale(scale)
        with pytest.raises(ConfigError, match="target_" + message.replace("d_in", "d_out")):
            sae.fold_activation_scale(2.0, scale)
        assert all(torch.equal(value, before[name]) for name, value in sae.state_dict().items())
    with pytest.raises(ConfigError, match="each has a scale of its own, so give both"):
        built(KINDS[-1], Ports({"a": D_IN}, {"b": D_IN})).fold_activation_scale(2.0)


def test_a_scale_may_be_a_tensor_of_one_number() -> None:
    for config in KINDS[:-1]:
        one, other, x = built(config), built(config), torch.randn(9, D_IN, generator=seeded())
        one.fold_activation_scale(2.0)
        other.fold_activation_scale(torch.tensor(2.0))
        assert torch.allclose(one(x), other(x))


def test_ports_name_what_does_not_fit() -> None:
    ports = Ports({"a": 2, "b": 3}, {"c": 4})
    a, b = torch.zeros(5, 2), torch.ones(5, 3)
    assert ports.join_input({"b": b, "a": a, "other": a}).tolist() == [[0, 0, 1, 1, 1]] * 5
    for values, message in (
        ({"a": a}, "the input b is missing; there are a"),
        ({}, "the input a is missing; there are none"),
        ({"a": b, "b": a}, r"the input a must be \[\.\.\., 2\], found \[5, 3\]"),
        ({"a": a, "b": b[:4]}, r"the inputs are of different tokens: a is \[5, 2\], b \[4, 3\]"),
    ):
        with pytest.raises(ConfigError, match=message):
            ports.join_input(values)
    with pytest.raises(
        ConfigError, match=r"must be \[\.\.\., d_in\], and d_in is 5: a, b side by side; found \[5, 3\]"
    ):
        ports.split_input(b)
    with pytest.raises(ConfigError, match=r"must be \[\.\.\., d_out\], and d_out is 4: c side by side; found \[\]"):
        ports.split_target(torch.zeros(()))


# ---- what is meant for a function beside


def test_inputs_by_name_are_joined_first() -> None:
    """Whoever gives a crosscoder what forwards hold, or one input alone, learns what lays them side by side."""
    ports = saekit.Ports({"a": 2, "b": 4})
    sae = saekit.SAE.from_dict({"name": "crosscoder", "d_sae": 5}, ports=ports)
    held = {"a": torch.ones(3, 2), "b": torch.ones(3, 4)}
    step = saekit.StepInput(0, torch.Generator())
    for given in (
        sae,
        sae.encode,
        sae.encode_sparse,
        lambda x: sae.encode_topk(x, 2),
        lambda x: sae.training_step(x, step),
    ):
        joined = r"found dict: sae.ports.join_input\(values\) makes it of tensors by the names of the inputs \(a, b\)"
        with pytest.raises(ConfigError, match=joined):
            given(held)
        wide = r"d_in is 6: a \(2\) and b \(4\) side by side, as sae.ports.join_input\(values\) .* found \[3, 4\]"
        with pytest.raises(ConfigError, match=wide):
            given(held["b"])
        given(sae.ports.join_input(held))
        sae.zero_grad()
    assert sae.encode(torch.ones(3, 2, 3)).shape == (3, 5), "as heads are"
    for method in (sae.decode, sae.pre_activations):
        with pytest.raises(ConfigError, match="must be a tensor, found dict$"):
            method(held)


def test_an_sae_of_a_table_or_a_path_is_made_or_loaded_by_another_name() -> None:
    topk = type(saekit.SAE.from_dict({"name": "topk", "d_in": 4, "d_sae": 8, "k": 2}))
    for make in (
        lambda: saekit.SAE({"name": "topk"}), lambda: saekit.SAE("a/folder"), lambda: saekit.SAE(Path("a/folder")),
        lambda: saekit.SAE(d_in=4, d_sae=8), lambda: topk({"d_in": 4}),
    ):  # fmt: skip
        with pytest.raises(
            ConfigError, match=r"SAE\(...\) is how .* saekit.SAE.from_dict\({.*saekit.SAE.load\(folder\)"
        ):
            make()
    with pytest.raises(TypeError, match="missing"):
        saekit.SAE()


class Named(type(saekit.SAE.from_dict({"name": "topk", "d_in": 8, "d_sae": 16, "k": 4}))):  # type: ignore[misc]
    def __init__(self, label: str, config: Any, **how: Any) -> None:
        super().__init__(config, **how)
        self.label = label


def test_a_class_with_an_init_of_its_own_is_given_what_it_takes() -> None:
    made = saekit.SAE.from_dict({"name": "topk", "d_in": 8, "d_sae": 16, "k": 4})
    sae = Named("mine", made.config, ports=made.ports, activation=made.activation)
    assert (sae.label, sae.d_sae) == ("mine", 16)
    for kind in (Named, type(made)):
        with pytest.raises(ConfigError, match=rf"^{kind.__name__}\(\.\.\.\) is how saekit builds an architecture"):
            kind({"k": 4})
