"""Tokens that a mask leaves out do not count in a store."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.sweeps import manager
from support.tiny import run_config

import saekit
from saekit.errors import ConfigError, DataError

HOOK = "blocks.1.hook_resid_post"


@pytest.fixture(scope="module")
def mask() -> torch.Tensor:
    found = torch.rand(60, 12, generator=torch.Generator().manual_seed(9)) < 0.4
    found[7] = False
    return found


@pytest.fixture(scope="module")
def masked(saes: Any, collect: Any, mask: torch.Tensor, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return collect(saes, tmp_path_factory.mktemp("masked") / "store", mask=mask)


def test_what_a_mask_leaves_out_does_not_count(
    masked: Any, store: Any, dense: Any, contexts: torch.Tensor, mask: torch.Tensor
) -> None:
    for name, counted in (("one", mask), ("two", mask & (contexts != 0))):
        sae = masked.saes[name]
        assert sae.tokens_counted == int(counted.sum()) < store.saes[name].tokens_counted
        assert np.array_equal(sae.kept, counted)
        values = dense[name].where(counted[..., None], 0).double()
        for feature in sae:
            own = values[..., feature.index]
            assert feature.fired == int((own != 0).sum())
            assert feature.mean == pytest.approx(float(own[counted].mean()))
            assert all(
                counted[context, position]
                for context, position in zip(feature.contexts, feature.positions, strict=True)
            )
        x = values[counted].numpy()
        busiest = sae.feature(int(sae.fired.argmax()))
        for partner in busiest.partners(n=3):
            expected = np.corrcoef(x[:, busiest.index], x[:, partner.index])[0, 1]
            assert partner.pearson == pytest.approx(expected, abs=1e-6)
        windows = busiest.top(50) + [window for one in busiest.quantiles(3, 40) for window in one.windows]
        assert all(window.counted[window.at] for window in windows)


def test_a_function_of_tokens_is_a_mask(saes: Any, collect: Any, contexts: torch.Tensor, tmp_path: Path) -> None:
    by_function = collect(saes["one"], tmp_path / "function", mask=lambda tokens: tokens % 3 > 0)
    by_tensor = collect(saes["one"], tmp_path / "tensor", mask=contexts % 3 > 0)
    assert by_function.manifest == by_tensor.manifest


def test_a_store_of_another_mask_is_another(masked: Any, saes: Any, collect: Any, mask: torch.Tensor) -> None:
    assert collect(saes, masked.folder, mask=mask).manifest == masked.manifest
    with pytest.raises(DataError, match=r"the mask \(a checksum\): there .*, wanted none"):
        collect(saes, masked.folder)


def test_a_mask_of_other_contexts_is_refused(saes: Any, collect: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"mask: .*60, 12.*found \[3, 12\]"):
        collect(saes["one"], tmp_path / "store", mask=torch.ones(3, 12, dtype=torch.bool))
    assert not (tmp_path / "store").exists()


@pytest.mark.filterwarnings("ignore:.*wrong site, scale or model")  # it is hardly trained
def test_the_mask_of_a_runs_own_text_is_taken(tmp_path: Path) -> None:
    drawn = np.random.default_rng(0)
    rows = [
        {"tokens": drawn.integers(1, 120, 40).tolist(), "mask": drawn.integers(0, 2, 40).tolist()} for _ in range(30)
    ]
    result = saekit.train(
        run_config(
            tmp_path,
            model={"backend": "fake"},
            site={"hook_name": HOOK},
            tokens={"mask_column": "mask"},
            training={"training_tokens": 256},
            evals={"split": None, "held_out_every": 3, "n_contexts": 6, "run": []},
        ),
        dataset=rows,
        plugins=manager(),
    )
    how: dict[str, Any] = {"n_contexts": 6, "verbose": False, "plugins": manager()}
    store = saekit.collect_features(result, folder=tmp_path / "store", **how)
    held = saekit.evaluate(result, evals=["reconstruction"], save=False, device="cpu", **how)
    assert store.sae.tokens_counted == held.about["tokens_used"] < 0.7 * store.contexts.size
