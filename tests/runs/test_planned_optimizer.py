"""What `saekit plan` says that an optimizer keeps is what it keeps."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from saekit_plugins.optimizers.signum import SignumConfig
from saekit_plugins.optimizers.signum.module import Signum
from support.caches import DOCUMENTS
from support.runs import fake_config, manager, train

import saekit
from saekit.config import OptimizerConfig
from saekit.runs.checkpoints import newest_checkpoint
from saekit.testing import fake_plugin

pytestmark = pytest.mark.usefixtures("one_thread")


class HalfKept(Signum):
    """Keeps its moment in bfloat16."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            for parameter in group["params"]:
                self.state[parameter].setdefault("momentum", torch.zeros_like(parameter, dtype=torch.bfloat16))


def sgd(config: object, *, groups: list[dict[str, Any]], lr: float) -> torch.optim.Optimizer:
    return torch.optim.SGD(groups, lr=lr)


def for_large_matrices(config: object, *, groups: list[dict[str, Any]], lr: float) -> torch.optim.Optimizer:
    if any(parameter.ndim == 2 and min(parameter.shape) < 8 for group in groups for parameter in group["params"]):
        raise ValueError("these are no matrices")
    return torch.optim.SGD(groups, lr=lr)


BUILDS: dict[str, tuple[Any, float]] = {
    "saekit:adam": (None, 2),
    "saekit:signum": (None, 1),
    "half": (lambda config, **given: HalfKept(SignumConfig(), **given), 0.5),
    "sgd": (sgd, 0),
}


def plugins(build: Callable[..., Any] | None) -> saekit.PluginManager:
    own = [] if build is None else [fake_plugin("optimizers", "mine", config=OptimizerConfig, build=build)]
    return manager(None, *own)


def config_in(folder: Path, **sections: Any) -> dict[str, Any]:
    """Without fine-tuning, which adds parameters."""
    training = {"finetuning_tokens": 0, "finetuning_method": None}
    return fake_config(folder, training=training, **sections)


def planned(config: Any, build: Callable[..., Any] | None) -> Any:
    found = saekit.plan(config, plugins=plugins(build), dataset=DOCUMENTS)
    assert not found.problems
    return found


@pytest.mark.parametrize("name", BUILDS)
def test_it_is_what_a_run_of_it_keeps(name: str, tmp_path: Path) -> None:
    build, copies = BUILDS[name]
    config = config_in(tmp_path) | {"optimizer": "mine" if build else name}
    found = planned(config, build)
    result = train(config, plugins=plugins(build))
    weights = sum(parameter.nbytes for parameter in result.sae.parameters())
    assert found.numbers["optimizer_bytes"] == copies * weights
    assert found.numbers["sae_bytes"] == (2 + copies) * weights
    assert found.numbers["checkpoint_bytes"] - found.numbers["buffer_bytes"] == (1 + copies) * weights
    if build is None:
        state = newest_checkpoint(tmp_path / "run").training("sae")["optimizer"]
        kept = [value for own in state.values() for value in own.values() if isinstance(value, torch.Tensor)]
        assert sum(value.nbytes for value in kept if value.ndim) == found.numbers["optimizer_bytes"]


def test_it_is_told_in_words(tmp_path: Path) -> None:
    config = config_in(tmp_path) | {"optimizer": "signum"}
    found = planned(config, None)
    assert "(the SAE in training 13.2 kB, " in found.facts["memory on cpu"]
    assert found.numbers["optimizer_bytes"] == 4384


def test_the_moments_of_bfloat16_are_float32(tmp_path: Path) -> None:
    config = config_in(tmp_path, sae={"dtype": "bfloat16"})
    found = planned(config, None).numbers
    assert found["optimizer_bytes"] * 2 == found["sae_bytes"]


def test_one_that_cannot_be_asked(tmp_path: Path) -> None:
    config = config_in(tmp_path) | {"optimizer": "mine"}
    found = planned(config, for_large_matrices)
    assert "optimizer_bytes" not in found.numbers
    assert "what the optimizer keeps is not known, and left out of memory and disk" in found.warnings
