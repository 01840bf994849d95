"""Dictionaries of several sites: a whole run, stopped and gone on with, beside others, from a cache, saved and loaded."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support.ports import EMBED, HEAD, LATE, SITES, manager, run, train

import saekit

pytestmark = pytest.mark.usefixtures("one_thread")


def test_a_run_with_two_inputs_and_another_target(tmp_path: Path) -> None:
    result = train(run(tmp_path))
    sae = result.sae
    assert sae.ports == saekit.Ports({EMBED.name: 8, HEAD.name: 4}, {LATE.name: 8})
    assert (tuple(sae.W_enc.shape), tuple(sae.W_dec.shape), tuple(sae.b_dec.shape)) == ((12, 20), (20, 8), (8,))
    assert sae.info.sites == SITES
    assert result.metrics["map/rows"] == 100  # the last of 1500 in batches of 200
    assert result.metrics["map/left"] == 1
    assert result.metrics["evals/explained_variance"] > 0
    assert result.metrics["evals/ce_loss_with_sae"] < result.metrics["evals/ce_loss_with_ablation"]
    loaded = saekit.SAE.load(result.folder, plugins=manager())
    assert loaded.info == sae.info
    assert loaded.ports == sae.ports
    x = torch.randn(5, 12)
    assert torch.equal(loaded(x), sae(x))
