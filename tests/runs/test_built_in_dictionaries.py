"""Built-in dictionaries on the embedded model: trained, gone on with, beside others, read by sae-lens."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.saved import READER, sae_lens_python
from support.tiny import run_config
from support.training import hashes

import saekit

ELSEWHERE = {
    "inputs": [{"hook_name": "blocks.0.ln2.hook_normalized"}],  # 128 wide
    "targets": [{"hook_name": "blocks.0.mlp.hook_pre"}],  # 512
}
SEVERAL = {"inputs": [{"hook_name": "blocks.0.hook_resid_post"}, {"hook_name": "blocks.1.hook_resid_post"}]}
KINDS: dict[str, dict[str, Any]] = {
    "gated": {"sae": {"name": "gated"}},
    "matryoshka": {"sae": {"name": "matryoshka", "k": 8}},
    "abstopk": {"sae": {"name": "abstopk", "k": 8}},
    "groupmax": {"sae": {"name": "groupmax", "k": 8}},
    "jumprelu": {"sae": {"name": "jumprelu"}},
    "transcoder": {"sae": {"name": "transcoder"}, **ELSEWHERE},
    "skip": {"sae": {"name": "jumprelu_transcoder", "skip_connection": True}, **ELSEWHERE},
    "topk": {"sae": {"name": "topk_transcoder", "k": 8, "skip_connection": True}, **ELSEWHERE},
    "sparsify": {
        "sae": {
            "name": "topk_transcoder",
            "k": 8,
            "k_start": 24,
            "k_warm_up_steps": 3,
            "skip_connection": True,
            "decoder_heuristic_init": False,
            "decoder_zero_init": True,
            "b_enc_init_method": "centered",
            "b_dec_init_method": "mean",
            "rescale_acts_by_decoder_norm": False,
            "mse_loss_normalization": "variance",
            "aux_loss_normalization": "none",
            "aux_loss_trains_encoder": False,
        },
        **ELSEWHERE,
    },
    "crosscoder": {"sae": {"name": "crosscoder", "l1_coefficient": 0.3, "l1_warm_up_steps": 3}, **SEVERAL},
    "batchtopk_crosscoder": {"sae": {"name": "batchtopk_crosscoder", "k": 32}, **SEVERAL},
}

LEAST = {
    "gated": 0.7, "matryoshka": 0.5, "jumprelu": 0.8, "transcoder": 0.5, "skip": 0.8, "topk": 0.8,
    "sparsify": 0.8, "crosscoder": 0.5, "batchtopk_crosscoder": 0.5,
}  # fmt: skip
"""The explained variance at the end, at least."""
OF_THEIR_OWN: dict[str, tuple[int, dict[str, Any]]] = {
    "matryoshka": (30_000, {}),
    "jumprelu": (24_000, {"initial_threshold": 0.02, "l0_coefficient": 0.1}),
}
"""Those that need more than 16,000 tokens for it, and options by which they need no more than this."""
WIDE = ("gated", "matryoshka", "jumprelu")
"""Those that need twice as many features for it."""
NOT_IN_SAE_LENS = ("topk", "sparsify", "crosscoder", "batchtopk_crosscoder")


def config(folder: Path, kind: str, name: str, tokens: int = 2048) -> dict[str, Any]:
    own = KINDS[kind] | {"sae": {"d_sae": 96, **KINDS[kind]["sae"]}}
    if "jumprelu" in own["sae"]["name"] and tokens < 10_000:
        own["sae"]["initial_threshold"] = 0.05  # from higher ones it takes more steps until features fire
    base = run_config(
        folder, training={"training_tokens": tokens, "dead_feature_window": 2, "lr": 2e-3}, checkpoints={"name": name},
        activations={"normalize_activations": "expected_average_only_in"},
    )  # fmt: skip
    return base | own


@pytest.fixture(scope="module")
def beside(tmp_path_factory: pytest.TempPathFactory) -> saekit.SweepResult:
    """All of them on one stream, and each beside a narrower one of its kind."""
    folder = tmp_path_factory.mktemp("beside")
    configs = [config(folder, kind, kind) for kind in KINDS]
    narrow = [config(folder, kind, f"{kind}-narrow") for kind in KINDS]
    for one in narrow:
        one["sae"]["d_sae"] = 64
    return cast(saekit.SweepResult, saekit.train(configs + narrow))


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> saekit.SweepResult:
    """All of them for half the steps, and then for the other half."""
    folder = tmp_path_factory.mktemp("stopped")
    half = saekit.train([config(folder, kind, kind, tokens=1024) for kind in KINDS])
    change = "training.training_tokens"
    return cast(saekit.SweepResult, saekit.resume(half.folder, overrides=[f"{change}=2048"], allow=[change]))


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_one_that_is_stopped_and_one_beside_others_end_with_the_same_bytes(
    tmp_path: Path, beside: saekit.SweepResult, stopped: saekit.SweepResult, kind: str
) -> None:
    whole = saekit.train(config(tmp_path, kind, "whole"))
    assert hashes(stopped.results[kind].folder) == hashes(whole.folder)
    assert hashes(beside.results[kind].folder) == hashes(whole.folder)
    assert 0 < whole.metrics["metrics/l0"] < 96
    loaded = saekit.SAE.load(whole.folder / "sae")
    read = 256 if kind.endswith("crosscoder") else 128
    x = torch.randn(20, read, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(loaded(x), whole.sae(x), atol=1e-5), "norms of topk are folded"
    assert loaded(x).shape == (20, 512 if "targets" in KINDS[kind] else read)


@pytest.fixture(scope="module")
def learned(tmp_path_factory: pytest.TempPathFactory) -> saekit.SweepResult:
    """Longer runs, on one stream."""
    folder, configs = tmp_path_factory.mktemp("learned"), []
    for kind in LEAST:
        tokens, own = OF_THEIR_OWN.get(kind, (16_000, {}))
        longer = config(folder, kind, kind, tokens=tokens)
        longer["sae"] |= {"d_sae": 256 if kind in WIDE else 128} | own
        longer["training"] |= {"lr": 1e-2 if kind == "jumprelu" else 5e-3, "log_frequency": 100}
        configs.append(longer)
    return cast(saekit.SweepResult, saekit.train(configs))


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "least"), LEAST.items())
def test_what_a_run_learns_and_sae_lens_6_makes_of_it(
    tmp_path: Path, learned: saekit.SweepResult, kind: str, least: float
) -> None:
    result = learned.results[kind]
    assert result.metrics["metrics/explained_variance"] > least
    assert result.metrics["metrics/l0"] < result.sae.d_sae / 2
    if kind in NOT_IN_SAE_LENS:
        return
    python = sae_lens_python()
    if python is None:
        pytest.skip("sae-lens 6 is not installed; name a Python that has it in SAEKIT_SAE_LENS_PYTHON")
    x = torch.randn(50, 128, generator=torch.Generator().manual_seed(0)) * 3
    save_file({"x": x}, tmp_path / "x.safetensors")
    command = [python, "-c", READER, result.folder / "sae", tmp_path / "x.safetensors", tmp_path / "out.safetensors"]
    found = subprocess.run(command, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    theirs = load_file(tmp_path / "out.safetensors")
    for name, own in (("out", result.sae(x)), ("features", result.sae.encode(x))):
        assert (theirs[name] - own).abs().max() <= 1e-5 * own.abs().max(), name
