"""Architectures that are derived from others: what they may be called elsewhere, and what may be folded into them."""

from __future__ import annotations

import contextlib
import copy
import json
from pathlib import Path
from typing import Any

import attrs
import pytest
import torch
from saekit_plugins.architectures.matryoshka.module import MatryoshkaSAE
from saekit_plugins.architectures.standard import StandardConfig
from saekit_plugins.architectures.standard.module import StandardSAE
from saekit_plugins.architectures.topk import TopKConfig
from saekit_plugins.architectures.topk.module import TopKSAE
from torch import Tensor

import saekit
from saekit import SAE, SAEConfig, StepOutput
from saekit.errors import ConfigError, SAEFormatError
from saekit.testing import fake_plugin, isolated_manager

SIZES = {"d_in": 6, "d_sae": 24}


@attrs.frozen(kw_only=True)
class Standard(StandardConfig):
    """Its own options class."""


@attrs.frozen(kw_only=True)
class TopK(TopKConfig):
    """Its own options class."""


class Doubled(TopKSAE):
    def features_of(self, pre: Tensor) -> Tensor:
        return super().features_of(pre) * 2


class Shrunk(TopKSAE):
    def reconstruction(self, features: Tensor) -> Tensor:
        return super().reconstruction(features) / 2


class Helped(TopKSAE):
    def _largest(self, pre: Tensor, k: int) -> Tensor:
        return super()._largest(pre, 1)


class Activated(TopKSAE):
    def __init__(self, config: Any, *, ports: Any, activation: Any) -> None:
        super().__init__(config, ports=ports, activation=activation)
        self.activation = Tripled()


class Tripled:
    def __call__(self, pre: Tensor) -> Tensor:
        return pre.relu() * 3


class ActivatedAndNamed(Activated):
    def public_config(self) -> dict[str, Any]:
        return super().public_config()


class MadeAnew(TopKSAE):
    @property
    def activation(self) -> Any:
        return Tripled()

    @activation.setter
    def activation(self, given: Any) -> None:
        pass

    def public_config(self) -> dict[str, Any]:
        return super().public_config()


class Shifted(StandardSAE):
    def pre_activations(self, x: Tensor) -> Tensor:
        return super().pre_activations(x) - 0.1


class Penalized(StandardSAE):
    def losses(self, x: Tensor, step: Any) -> StepOutput:
        found = super().losses(x, step)
        return found._replace(loss=found.loss + self.W_enc.square().sum())


class Named(Doubled):
    def public_config(self) -> dict[str, Any]:
        return super().public_config()


class _Beside:
    def public_config(self) -> dict[str, Any]:
        return {"architecture": "topk"}


class Mixed(_Beside, TopKSAE):
    pass


class MixedAndDoubled(Mixed):
    def features_of(self, pre: Tensor) -> Tensor:
        return super().features_of(pre) * 2


def manager_of(kind: type, config: type) -> saekit.PluginManager:
    return isolated_manager(fake_plugin("sae_architectures", "mine", kind, config=config), builtins=True)


@pytest.mark.parametrize(
    ("kind", "config", "name"),
    [
        (Doubled, TopK, "test:mine"),
        (Shrunk, TopK, "test:mine"),
        (Helped, TopK, "test:mine"),
        (Activated, TopK, "test:mine"),
        (Shifted, Standard, "test:mine"),
        (MixedAndDoubled, TopK, "test:mine"),
        (Penalized, Standard, "standard"),  # which matters in training alone
        (Named, TopK, "topk"),
        (Mixed, TopK, "topk"),
        (ActivatedAndNamed, TopK, "topk"),
        (MadeAnew, TopK, "topk"),
    ],
)
def test_the_name_of_what_it_is_derived_from(tmp_path: Path, kind: type, config: type, name: str) -> None:
    plugins = manager_of(kind, config)
    more = {"k": 3} if config is TopK else {}
    sae = SAE.from_dict({"name": "mine", **SIZES, **more}, plugins=plugins)
    said = rf"as 'test:mine', which sae-lens does not know, and not as '\w+': .* public_config in {kind.__name__}$"
    for folder, one in (("saved", sae), ("copy", copy.deepcopy(sae))):
        with pytest.warns(UserWarning, match=said) if name == "test:mine" else contextlib.nullcontext():
            one.save(tmp_path / folder)
    for folder in ("saved", "copy"):
        assert json.loads((tmp_path / folder / "cfg.json").read_text())["architecture"] == name
    if name == "test:mine":
        with pytest.raises(SAEFormatError, match="sae_lens has no place for this test:mine: sae-lens 6 has none like"):
            sae.export(tmp_path / "exported", format="sae_lens", plugins=plugins)
    else:
        sae.export(tmp_path / "exported", format="sae_lens", plugins=plugins)
        assert json.loads((tmp_path / "exported/cfg.json").read_text())["architecture"] == name
    x = torch.randn(9, 6, generator=torch.Generator().manual_seed(0))
    again = SAE.load(tmp_path / "saved", plugins=plugins)
    assert type(again) is kind
    assert torch.allclose(again(x), sae(x), rtol=1e-5, atol=1e-6)


def test_an_activation_function_in_the_place_of_its_own_is_told(tmp_path: Path) -> None:
    sae = SAE.from_dict({"name": "topk", **SIZES, "k": 3})
    sae.save(tmp_path / "own")
    sae.activation = Tripled()
    sae.info = attrs.evolve(sae.info, architecture="test:mine")
    with pytest.warns(UserWarning, match="not as 'topk': its activation function is not the one that its options name"):
        sae.save(tmp_path / "other")


def test_levels_matter_in_training_alone(tmp_path: Path) -> None:
    sae = SAE.from_dict({"name": "matryoshka", **SIZES, "k": 3, "widths": [8, 24]})
    assert isinstance(sae, MatryoshkaSAE)
    sae.save(tmp_path / "saved")
    assert json.loads((tmp_path / "saved/cfg.json").read_text())["architecture"] == "jumprelu"


@attrs.frozen(kw_only=True)
class Competing(SAEConfig):
    """Of a dictionary whose features are compared by size."""


class Largest(SAE):
    def features_of(self, pre: Tensor) -> Tensor:
        values, places = self.activation(pre).topk(4, dim=-1)
        return torch.zeros_like(pre).scatter(-1, places, values)


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
def test_norms_of_features_that_compete_are_not_folded(dtype: str) -> None:
    plugins = manager_of(Largest, Competing)
    sae = SAE.from_dict({"name": "mine", **SIZES, "normalize_sae_decoder": False, "dtype": dtype}, plugins=plugins)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        sae.W_dec.mul_((torch.rand(24, 1, generator=generator) * 3 + 0.1).to(sae.dtype))
    before = {name: value.clone() for name, value in sae.state_dict().items()}
    with pytest.raises(ConfigError, match=r"of a Largest: its outputs would be others \(by 0\.\d+ of their size\)"):
        sae.fold_W_dec_norm()
    assert all(torch.equal(value, before[name]) for name, value in sae.state_dict().items())
    with torch.no_grad():  # of one norm, all keep their places
        sae.W_dec.mul_(3 / sae.decoder_norms()[:, None])
    x = torch.randn(9, 6, generator=generator).to(sae.dtype)
    output = sae(x)
    sae.fold_W_dec_norm()
    assert torch.allclose(sae(x), output, rtol=1e-4, atol=0.1 if dtype == "bfloat16" else 1e-4)
    assert torch.allclose(sae.decoder_norms().double(), torch.ones(24, dtype=torch.float64), atol=1e-2)
