"""What fails in training says whose it is, where several plugins work into each other's hands."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import attrs
import pytest
import torch
from saekit_plugins.architectures.standard import StandardConfig
from saekit_plugins.architectures.standard.module import StandardSAE
from saekit_plugins.architectures.topk.module import TopKKernel
from support.runs import fake_config, manager, train
from torch import Tensor

import saekit
from saekit.errors import ConfigError, DataError, LostProcessError, PluginFailedError, SaekitError
from saekit.runs.watching import watching_of
from saekit.sae import Parameter, init
from saekit.testing import FakeBackend, fake_plugin

pytestmark = pytest.mark.usefixtures("one_thread")


def table(folder: Path, **sae: Any) -> dict[str, Any]:
    found = fake_config(folder, evals={"run": []})
    found["sae"] = {"d_sae": 64, **sae}
    return found


class NamedOtherwise:
    """An activation function whose methods call themselves something else than ``self``."""

    def __call__(own, pre: Tensor) -> Tensor:  # noqa: N805
        return {}["no"]  # type: ignore[no-any-return]


def test_an_activation_function_is_not_asked_where_it_cannot_be_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Tensor] = []

    def wider(pre: Tensor) -> Tensor:
        calls.append(pre)
        return pre.double()

    own = manager(None, fake_plugin("activation_functions", "mine", lambda config: wider))
    sae = saekit.SAE.from_dict({"name": "standard", "d_in": 8, "d_sae": 16, "activation": "mine"}, plugins=own)
    config = saekit.load_config({"sae": {"name": "standard", "activation": "mine"}}, plugins=own)
    watching = watching_of(config, own, sae)

    def fails(error: Exception) -> str:
        with pytest.raises(SaekitError) as caught, watching("training_step"):
            raise error
        return str(caught.value).partition(" (")[0]

    assert fails(LostProcessError("gone")) == "gone"
    assert fails(ConfigError([("training.compile", "has no dtype")])) == "training.compile: has no dtype"
    assert fails(PluginFailedError("reported")) == "reported"
    assert calls == []
    assert fails(RuntimeError("broken")).startswith("SAE architecture 'saekit:standard'")
    assert fails(RuntimeError("not the same dtype")).startswith("activation function 'test:mine'")

    def lost(*args: Any, **more: Any) -> Tensor:
        raise RuntimeError("CUDA error: device-side assert triggered")

    monkeypatch.setattr(torch, "linspace", lost)
    assert fails(RuntimeError("not the same dtype")).startswith("SAE architecture")


@pytest.mark.parametrize(
    ("function", "told"),
    [
        (NamedOtherwise(), " failed in __call__: KeyError: 'no'"),
        (
            lambda pre: pre[..., :3],
            ": __call__ returned tensor(.*, float32[2, 3] for pre-activations float32[2, 64], exp",
        ),
        (lambda pre: None, ": __call__ returned None, no tensor for pre-activations float32[2, 64], expected the same"),
        (lambda pre: pre.double(), ": __call__ returned tensor(.*, float64[2, 64] for pre-activations float32[2, 64]"),
    ],
)
def test_an_activation_function(tmp_path: Path, function: Any, told: str) -> None:
    own = manager(None, fake_plugin("activation_functions", "mine", lambda config: function))
    who = re.escape("activation function 'test:mine' (test 0)" + told).replace(r"\.\*", ".*")
    with pytest.raises(PluginFailedError, match=f"^{who}"):
        train(table(tmp_path, activation="mine"), plugins=own)


@pytest.mark.parametrize("method", ["refuses", "leaves", "step", "remark", "groups"])
def test_a_step_kernel(method: str) -> None:
    def fail(self: Any, *arguments: Any, **options: Any) -> Any:
        raise KeyError(method)

    kernel = type("Mine", (TopKKernel,), {method: fail, "name": "mine"})
    own = manager(None, fake_plugin("step_kernels", "mine", lambda config: kernel(), serves=["saekit:topk"]))
    sae: Any = saekit.SAE.from_dict({"name": "topk", "d_in": 8, "d_sae": 32, "k": 2}, plugins=own)
    x = torch.randn(5, 8)
    step = saekit.StepInput(step=0, generator=torch.Generator(), dead=None, steps=9)
    asked = {"remark": sae.step_path, "groups": lambda: sae.encode_sparse(x)}
    with pytest.raises(
        PluginFailedError, match=rf"^step kernel 'test:mine' \(test 0\) failed in {method}: KeyError: '{method}'"
    ):
        asked.get(method, lambda: sae.training_step(x, step))()


def test_an_optimizer(tmp_path: Path) -> None:
    class Failing(torch.optim.SGD):
        def step(self, closure: Any = None) -> None:
            raise KeyError("moment")

    @attrs.frozen(kw_only=True)
    class Config(saekit.config.OptimizerConfig):
        """None of its own."""

    own = manager(
        None, fake_plugin("optimizers", "mine", lambda config, groups, lr: Failing(groups, lr), config=Config)
    )
    with pytest.raises(
        PluginFailedError, match=r"^optimizer 'test:mine' \(test 0\) failed in step: KeyError: 'moment'"
    ):
        train(table(tmp_path) | {"optimizer": {"name": "mine"}}, plugins=own)


def test_a_model_in_its_first_forward(tmp_path: Path) -> None:
    class Failing(FakeBackend):
        def run(self, tokens: Tensor, **options: Any) -> Any:
            raise KeyError("weights")

    with pytest.raises(PluginFailedError, match=r"^model backend 'test:fake' \(test 0\) failed in run: KeyError: 'we"):
        train(table(tmp_path), plugins=manager(Failing()))


@pytest.mark.parametrize(
    ("ids", "told"),
    [
        (
            lambda text: [7, 300_000],
            r"tokenize of the model backend returned the token id 300000 for document \d+, but ",
        ),
        (lambda text: "abc", r"tokenize of the model backend returned 'abc' for document \d+, expected token ids"),
    ],
)
def test_token_ids_of_a_model(tmp_path: Path, ids: Any, told: str) -> None:
    class Odd(FakeBackend):
        def tokenize(self, text: str) -> Any:
            return ids(text)

    with pytest.raises(DataError, match=told):
        train(table(tmp_path), plugins=manager(Odd()))


@attrs.frozen(kw_only=True)
class Config(StandardConfig):
    """Of an architecture that is not as it should be."""


@pytest.mark.parametrize(
    ("more", "told"),
    [
        ([Parameter("t", ("d_model",), init=init.zeros)], "returned Parameter(name='t'"),
        (
            [("t", 3)],
            "returned ('t', 3); expected Parameters of dimensions d_in, d_out, d_sae, inputs",
        ),
        ([Parameter("b_enc", ("d_sae",), init=init.zeros)], "returned Parameter(name='b_enc'"),
        (None, "returned None; expected Parameters of dim"),
    ],
)
def test_a_table_of_parameters(more: Any, told: str) -> None:
    class Odd(StandardSAE):
        @classmethod
        def parameters_of(cls, config: Any) -> Any:
            return () if more is None else (*super().parameters_of(config), *more)

    own = manager(None, fake_plugin("sae_architectures", "mine", Odd, config=Config))
    who = re.escape("SAE architecture 'test:mine' (test 0) failed in build: ValueError: parameters_of " + told)
    with pytest.raises(PluginFailedError, match=f"^{who}"):
        saekit.SAE.from_dict({"name": "mine", "d_in": 8, "d_sae": 32}, plugins=own)


@pytest.mark.parametrize("read", [lambda x: x[..., :3], lambda x: None])
def test_an_input_transform(read: Any) -> None:
    class Narrow:
        row_wise = True

        def read(self, x: Tensor) -> Any:
            return read(x)

        def written(self, y: Tensor, x: Tensor) -> Tensor:
            return y

    own = manager(None, fake_plugin("input_transforms", "mine", lambda config: Narrow()))
    sae: Any = saekit.SAE.from_dict({"name": "standard", "d_in": 8, "d_sae": 32}, plugins=own)
    sae.set_input_transform(own.build("input_transforms", "mine"))
    told = r"^input transform 'test:mine' \(test 0\): read returned (a tensor \[5, 3\]|None), expected one of the shape"
    with pytest.raises(PluginFailedError, match=told):
        sae.encode(torch.randn(5, 8))


@attrs.frozen(kw_only=True)
class OwnOptions:
    """Of a plugin that looks at them itself."""

    n: int = 3
    """A number."""


def refuse(*arguments: Any, **services: Any) -> Any:
    raise ConfigError([("n", "is odd"), ("training.lr", "is low")])


def test_the_place_of_an_option_that_a_precheck_refuses(tmp_path: Path) -> None:
    own = manager(None, fake_plugin("evals", "mine", lambda config, run: None, config=OwnOptions, precheck=refuse))
    found = fake_config(tmp_path, evals={"run": ["reconstruction", "mine"]})
    with pytest.raises(ConfigError) as caught:
        train(found, plugins=own)
    assert caught.value.problems == [("evals.run[1].n", "is odd"), ("training.lr", "is low")]


@pytest.mark.parametrize(
    ("kind", "sections", "place"),
    [
        ("lr_schedules", {"lr_schedule": "mine"}, "lr_schedule.n"),
        ("activation_sources", {"activations": {"source": "mine"}}, "activations.source.n"),
        ("evals", {"evals": {"run": ["mine"], "n_contexts": 4}}, "evals.run[0].n"),
    ],
)
def test_the_place_of_an_option_that_is_refused_when_it_is_built(
    tmp_path: Path, kind: str, sections: dict[str, Any], place: str
) -> None:
    own = manager(None, fake_plugin(kind, "mine", refuse, config=OwnOptions))
    with pytest.raises(ConfigError) as caught:
        train(table(tmp_path) | sections, plugins=own)
    assert caught.value.problems == [(place, "is odd"), ("training.lr", "is low")]
    assert any("In build of the" in note for note in caught.value.__notes__)


def test_the_place_of_an_option_of_an_sae() -> None:
    @attrs.frozen(kw_only=True)
    class Grouped(StandardConfig):
        k: int = 2
        """Of each group."""

    class Refusing(StandardSAE):
        def __init__(self, config: Any, **services: Any) -> None:
            raise ConfigError([("k", "is more than a group has")])

    own = manager(None, fake_plugin("sae_architectures", "mine", Refusing, config=Grouped))
    with pytest.raises(ConfigError, match="^sae.k: is more than a group has"):
        saekit.SAE.from_dict({"name": "mine", "d_in": 8, "d_sae": 32}, plugins=own)
