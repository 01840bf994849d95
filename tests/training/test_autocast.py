"""Autocast runs the SAE's products in bfloat16, and nothing else."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from support.processes import Case
from support.training import DOCUMENTS, fake_run, fit, lines, make_trainer, weights
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import saekit
from saekit import Forward
from saekit.testing import FakeBackend, fake_plugin, isolated_manager

pytestmark = pytest.mark.usefixtures("way")
PRODUCTS = (torch.ops.aten.mm.default, torch.ops.aten.addmm.default, torch.ops.aten.bmm.default)


class Products(TorchDispatchMode):
    """The types of the operands of every matrix product."""

    def __init__(self) -> None:
        super().__init__()
        self.dtypes: list[torch.dtype] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in PRODUCTS:
            self.dtypes += [arg.dtype for arg in args if isinstance(arg, Tensor) and arg.ndim == 2]
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("options", [{}, {"use_ghost_grads": True, "noise_scale": 0.1, "lp_norm": 2.0}], ids=str)
def test_autocast_runs_the_products_in_bfloat16(device: str, options: dict[str, Any]) -> None:
    runs = {}
    for autocast in (False, True):
        trainer = make_trainer(
            2000, device=device, asleep=4, dtype="float32", training={"autocast": autocast}, **options
        )
        with Products() as products:
            metrics = fit(trainer)
        wanted = torch.bfloat16 if autocast else torch.float32
        if trainer.sae.kernels == "reference" or autocast:
            assert len(products.dtypes) >= 2 * 5 * 20, "forward and backward, in every step"
        assert set(products.dtypes) == {wanted}
        for name, value in trainer.sae.named_parameters():
            assert value.dtype == torch.float32, name
        for name, state in trainer.optimizer.state_dict().items():
            assert {state["exp_avg"].dtype, state["exp_avg_sq"].dtype} == {torch.float32}, name
        runs[autocast] = (weights(trainer), metrics[-1])
    assert runs[True][1]["losses/overall_loss"] == pytest.approx(runs[False][1]["losses/overall_loss"], rel=0.02)
    assert runs[True][1]["losses/overall_loss"] != runs[False][1]["losses/overall_loss"]
    for name, value in runs[False][0].items():
        moved = (value - dict(make_trainer(asleep=4, dtype="float32").sae.named_parameters())[name].to(device)).norm()
        assert (value - runs[True][0][name]).norm() < 0.2 * moved, name


class Leaving(TorchDispatchMode):
    """Before each product, what happens to the process when another thread leaves an autocast."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in PRODUCTS:  # elsewhere torch may hold the lock of what it keeps
            torch.clear_autocast_cache()
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("asked", [{"training": {"autocast": True}}, {"dtype": "bfloat16"}], ids=str)
def test_what_other_threads_do_meanwhile_changes_no_digit(asked: dict[str, Any]) -> None:
    case = Case({"name": "topk", "k": 2}, **{"dtype": "float32"} | asked)
    found = []
    for mode in (nullcontext(), Leaving()):
        trainer = case.trainer(saekit.distributed.ALONE)
        with mode:
            metrics = [trainer.train_on(*trainer.rows_of(batch), batch) for batch in case.batches()]
        found.append(weights(trainer))
        assert trainer.rounds_products
        assert metrics[-1]["losses/auxiliary_reconstruction_loss"] > 0, "it reads W_dec, too"
    for name, value in found[0].items():
        assert torch.equal(value, found[1][name]), name


def test_autocast_in_a_run_is_the_saes_alone(tmp_path: Path) -> None:
    """The model's products stay as they are, and evals and the saved weights are float32."""
    asked: list[bool] = []

    class Watched(FakeBackend):
        def run(self, tokens: Tensor, **options: Any) -> Forward:
            asked.append(torch.is_autocast_enabled("cpu"))
            return super().run(tokens, **options)

    seen: list[tuple[bool, torch.dtype]] = []

    def build(config: object) -> Any:
        def watched(pre: Tensor) -> Tensor:
            seen.append((torch.is_autocast_enabled("cpu"), pre.dtype))
            return pre.relu()

        return watched

    backend = Watched()
    plugins = isolated_manager(
        fake_plugin("model_backends", build=lambda config, **services: backend),
        fake_plugin("activation_functions", "watched", build=build),
        builtins=True,
    )
    config = fake_run(
        tmp_path, sae={"activation": "watched"}, training={"autocast": True}, evals={"run": ["reconstruction"]}
    )
    result = saekit.train(config, plugins=plugins, dataset=DOCUMENTS)
    assert asked
    assert not any(asked)
    steps = len([line for line in lines(result.folder) if "losses/mse_loss" in line])
    assert [autocast for autocast, _ in seen[:steps]] == [True] * steps
    assert seen[steps:], "the eval"
    assert not any(autocast for autocast, _ in seen[steps:])
    assert result.sae.W_enc.dtype == torch.float32
