"""SAEs can be copied, pickled and sent to other processes, with everything that they know."""

from __future__ import annotations

import copy
import io
import multiprocessing
import pickle
from pathlib import Path
from typing import Any

import attrs
import pytest
import torch

import saekit
from saekit import SAE
from saekit.sae import HookPoint
from saekit.sae.build import build_module
from saekit.values import StepInput

ARCHITECTURES = [item.key for item in saekit.default_manager().registries["sae_architectures"].items
                 if item.key.startswith("saekit:")]  # fmt: skip


def make(architecture: str, *, activation: str = "saekit:relu", factor: bool = False) -> SAE:
    plugins = saekit.default_manager()
    item = plugins.get("sae_architectures", architecture)
    options = {"k": 4, "n_heads": 2, "bottleneck_factor": 2}
    small = {name: value for name, value in options.items() if name in attrs.fields_dict(item.entry.config)}
    sae = build_module(item, item.entry.config(d_sae=24, activation=activation, **small), 8, plugins)
    generator = torch.Generator().manual_seed(1)
    if factor:
        sae.add_scaling_factor()
    for value in sae.parameters():
        value.data.copy_(torch.randn(value.shape, generator=generator))
    for name, buffer in sae.named_buffers():
        buffer.fill_({"threshold_average": 0.3, "threshold_updates": 900}[name])  # as after some training
    sae.info = attrs.evolve(
        sae.info, sites=saekit.Sites.one(saekit.Site(hook_name="x", hook_head_index=1)), metadata={"context_size": 7}
    )
    sae.log_sparsity = torch.randn(24, generator=generator)
    sae.kernels = "reference"
    return sae


X = torch.randn(1, 5, 8, generator=torch.Generator().manual_seed(2))
"""One sequence, which some read whole."""


def same(found: SAE, sae: SAE) -> None:
    assert type(found) is type(sae)
    assert found is not sae
    assert (found.info, found.config, found.kernels) == (sae.info, sae.config, sae.kernels)
    assert torch.equal(found.log_sparsity, sae.log_sparsity)
    for mine, theirs in (
        (dict(found.named_parameters()), dict(sae.named_parameters())),
        (dict(found.named_buffers()), dict(sae.named_buffers())),
    ):
        assert list(mine) == list(theirs)
        for name, value in mine.items():
            assert torch.equal(value, theirs[name])
            assert (value.stride(), value.dtype, value.requires_grad) == (
                theirs[name].stride(), theirs[name].dtype, theirs[name].requires_grad
            )  # fmt: skip
            assert value.data_ptr() != theirs[name].data_ptr()
    assert torch.equal(found(X), sae(X))
    assert torch.equal(found.encode(X), sae.encode(X))


def through_torch(sae: SAE) -> SAE:
    file = io.BytesIO()
    torch.save(sae, file)
    file.seek(0)
    loaded: SAE = torch.load(file, weights_only=False)
    return loaded


WAYS = {"deepcopy": copy.deepcopy, "pickle": lambda sae: pickle.loads(pickle.dumps(sae)), "torch": through_torch}


@pytest.mark.parametrize("how", list(WAYS))
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_copies(architecture: str, how: str) -> None:
    sae = make(architecture, factor=True)
    sae.learn_only({"W_dec"})
    found = WAYS[how](sae)
    same(found, sae)
    found.W_dec.data.add_(1)
    assert not torch.equal(found(X), sae(X))


@pytest.mark.parametrize("how", list(WAYS))
def test_an_activation_of_its_own(how: str) -> None:
    same(
        WAYS[how](make("saekit:standard", activation="saekit:tanh-relu")),
        make("saekit:standard", activation="saekit:tanh-relu"),
    )


def _answer(saes: list[SAE], x: torch.Tensor, results: Any) -> None:
    results.put([(sae(x).tolist(), repr(sae.info)) for sae in saes])


@pytest.mark.slow
def test_another_process() -> None:
    context = multiprocessing.get_context("spawn")
    saes, results = [make(architecture).requires_grad_(False) for architecture in ARCHITECTURES], context.Queue()
    process = context.Process(target=_answer, args=(saes, X, results))
    process.start()
    answers = results.get(timeout=300)
    process.join(60)
    assert process.exitcode == 0
    for sae, (output, info) in zip(saes, answers, strict=True):
        assert torch.equal(torch.tensor(output), sae(X))
        assert info == repr(sae.info)


SEEN: list[HookPoint] = []


def double(features: torch.Tensor, hook: HookPoint) -> torch.Tensor:
    SEEN.append(hook)
    return 2 * features


@pytest.mark.parametrize("how", list(WAYS))
def test_hooks_travel(how: str) -> None:
    sae = make("saekit:standard")
    handle = sae.hook_sae_acts_post.add_hook(double)
    found = WAYS[how](sae)
    same(found, sae)
    SEEN.clear()
    found(X)
    assert [found.hook_sae_acts_post] == SEEN, "the copy's hook is told of the copy's hook point"
    handle.remove()
    assert not torch.equal(found(X), sae(X)), "and stays when the first one's is removed"


def test_a_hook_that_cannot_be_pickled_says_so() -> None:
    sae = make("saekit:standard")
    sae.hook_sae_acts_post.add_hook(lambda features, hook: None)
    with pytest.raises((AttributeError, pickle.PicklingError), match="lambda"):
        pickle.dumps(sae)
    assert torch.equal(copy.deepcopy(sae)(X), sae(X))


@pytest.mark.parametrize("how", list(WAYS))
def test_a_compiled_loss_is_of_the_copys_own_weights(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = []

    def compile_it(function: Any, mode: str) -> Any:
        compiled.append(mode)
        return lambda x, step: function(x, step)  # which no more than a compiled one can be pickled

    monkeypatch.setattr(torch, "compile", compile_it)
    sae = make("saekit:standard")
    sae.compile_losses("max-autotune")
    found = WAYS[how](sae)
    assert compiled == ["max-autotune"] * 2
    assert found.why_reference() == sae.why_reference()
    step = StepInput(step=3, generator=torch.Generator().manual_seed(0))
    assert torch.equal(found.losses(X[0], step).loss, sae.losses(X[0], step).loss)
    found.W_dec.data.mul_(3)
    assert not torch.equal(found.losses(X[0], step).loss, sae.losses(X[0], step).loss)


def test_a_saved_one_can_be_pickled(tmp_path: Path) -> None:
    sae = SAE.load(make("saekit:batchtopk").save(tmp_path / "sae"))
    same(pickle.loads(pickle.dumps(sae)), sae)
