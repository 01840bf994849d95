"""Evals find what ``run_evals`` of sae-lens 6.54.12 finds, where the metrics mean the same: see docs/comparing.md."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from saekit_plugins.evals.downstream import DownstreamConfig
from safetensors import safe_open
from safetensors.torch import load_file
from support.saved import sae_lens_python

import saekit
from saekit.evals import Measured, measure
from saekit.kinds import EVALS
from saekit.measuring import Evaluation
from saekit.tokens import TokenChoice, special_ids

GOLDEN = Path(__file__).parents[1] / "golden_evals"
SAME = {
    "ce_loss_score": "ce_recovered",
    "ce_loss_without_sae": "ce_loss_without_sae",
    "ce_loss_with_sae": "ce_loss_with_sae",
    "ce_loss_with_ablation": "ce_loss_with_ablation",
    "kl_div_score": "kl_div_score",
    "kl_div_with_sae": "kl_div_with_sae",
    "kl_div_with_ablation": "kl_div_with_ablation",
    "explained_variance": "explained_variance",
    "mse": "mse",
    "cossim": "cosine_similarity",
    "l2_norm_in": "l2_norm_in",
    "l2_norm_out": "l2_norm_out",
    "l0": "l0",
    "l1": "l1",
    "dense": "dense_features",
}
"""sae-lens' names, and ours."""
ABLATED = ("ce_loss_score", "ce_loss_with_ablation", "kl_div_score", "kl_div_with_ablation")
"""sae-lens puts zeros at special tokens, too, where these are left out and keep what they hold in a splice."""
OTHERS = {
    "l2_ratio": "l2_ratio",  # theirs is the mean of ratios of tokens
    "relative_reconstruction_bias": "relative_reconstruction_bias",  # theirs is a mean over batches
    "explained_variance_legacy": None,
    "total_tokens_eval_reconstruction": None,  # those that are left out, too
    "total_tokens_eval_sparsity_variance": None,
}


def maker() -> Any:
    spec = importlib.util.spec_from_file_location("make_golden_evals", GOLDEN / "make_golden_evals.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def facts() -> tuple[dict[str, Any], dict[str, Any]]:
    with safe_open(GOLDEN / "sae_lens.safetensors", "pt") as file:
        known = file.metadata()
    return json.loads(known["metrics"]), json.loads(known["sites"])


METRICS, SITES = facts()
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def backend() -> Any:
    return saekit.load_model(device="cpu")


@pytest.fixture(scope="module")
def found(backend: Any) -> dict[tuple[str, str], Evaluation]:
    """All SAEs, with special tokens and without, in one pass."""
    tensors, make, plugins = load_file(GOLDEN / "sae_lens.safetensors"), maker().made, saekit.default_manager()
    evals = {
        "reconstruction": plugins.build(EVALS, "reconstruction", run=None),
        "downstream": plugins.build(EVALS, DownstreamConfig(kl=True), run=None),
    }
    subjects = {}
    for name, (hook, head) in SITES.items():
        sae = make(tensors[f"{name}.W_dec"], tensors[f"{name}.b_dec"], hook, head)
        for which, choice in (
            ("all tokens", TokenChoice()),
            ("without special tokens", TokenChoice(exclude=special_ids(backend))),
        ):
            subjects[name, which] = Measured(sae, sae.info.sites, evals, choice)
    sums = measure([*subjects.values()], backend=backend, contexts=tensors["tokens"].long())
    results = [Evaluation.joined(evals[name].result(one[name]) for name in evals) for one in sums]
    return dict(zip(subjects, results, strict=True))


@pytest.mark.parametrize("which", ["all tokens", "without special tokens"])
@pytest.mark.parametrize("site", list(SITES))
def test_the_same_numbers(found: dict[tuple[str, str], Evaluation], site: str, which: str) -> None:
    theirs, ours = METRICS[site][which], found[site, which]
    assert set(theirs) == {*SAME, *OTHERS, "fired"}
    left_out = ABLATED if which == "without special tokens" else ()
    gap = theirs["ce_loss_with_ablation"] - theirs["ce_loss_without_sae"]
    for name, own in SAME.items():
        if name not in left_out:  # theirs are means in float32, of which a score is a difference by a difference
            close = max(1e-5, 2e-6 / gap) if name == "ce_loss_score" else 1e-5
            assert ours[own] == pytest.approx(theirs[name], rel=close, abs=close), name
    assert ours.features["firing_fractions"].astype(bool).sum() == theirs["fired"]


@pytest.mark.parametrize("site", ["resid", "first_mlp"])
def test_special_tokens_that_are_left_out_are_ablated_by_sae_lens(
    backend: Any, found: dict[tuple[str, str], Evaluation], site: str
) -> None:
    tokens = load_file(GOLDEN / "sae_lens.safetensors")["tokens"].long()
    theirs, ours = METRICS[site]["without special tokens"], found[site, "without special tokens"]
    kept = TokenChoice(exclude=special_ids(backend)).kept(tokens)
    for where, expected in ((None, theirs["ce_loss_with_ablation"]), (kept, ours["ce_loss_with_ablation"])):

        def zeros(x: torch.Tensor, where: torch.Tensor | None = where) -> torch.Tensor:
            return torch.zeros_like(x) if where is None else x.masked_fill(where[..., None], 0)

        losses = backend.run(tokens, replace={SITES[site][0]: zeros}, want="loss").loss
        assert losses[kept[:, :-1]].mean().item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("site", list(SITES))
def test_other_means_are_near(found: dict[tuple[str, str], Evaluation], site: str) -> None:
    """A ratio of means and a mean of ratios are not the same, and near each other."""
    theirs, ours = METRICS[site]["all tokens"], found[site, "all tokens"]
    for name, own in OTHERS.items():
        if own is not None:
            assert ours[own] == pytest.approx(theirs[name], rel=0.05)
            assert ours[own] != pytest.approx(theirs[name], rel=1e-5)


@pytest.mark.slow
def test_sae_lens_still_finds_what_is_recorded(tmp_path: Path) -> None:
    python = sae_lens_python()
    if python is None:
        pytest.skip("sae-lens 6 is not installed; name a Python that has it in SAEKIT_SAE_LENS_PYTHON")
    script = tmp_path / "make.py"
    script.write_text((GOLDEN / "make_golden_evals.py").read_text())
    done = subprocess.run([python, "-W", "ignore", str(script)], capture_output=True, text=True, env=dict(os.environ))
    if "No module named 'saekit" in done.stderr:
        pytest.skip("the Python of SAEKIT_SAE_LENS_PYTHON has no saekit")
    assert done.returncode == 0, done.stderr
    with safe_open(tmp_path / "sae_lens.safetensors", "pt") as file:
        again = json.loads(file.metadata()["metrics"])
    for site, groups in METRICS.items():
        for which, metrics in groups.items():
            assert again[site][which] == pytest.approx(metrics, rel=1e-4, abs=1e-5), (site, which)
