"""SAEBench's core eval, and what its tests of custom SAEs look at, on SAEs of saekit: run by a Python that has both.

    python tests/analysis/saebench_run.py

Prints JSON: by architecture what SAEBench found, and what its own arithmetic finds of the SAE itself.
"""

from __future__ import annotations

import json
import warnings
from typing import Any

import attrs
import torch

import saekit
from saekit.analysis.saebench import for_saebench

SITE, CONTEXT, N = "blocks.1.hook_resid_post", 32, 8
OPTIONS: dict[str, dict[str, Any]] = {
    "standard": {"normalize_sae_decoder": False},
    "topk": {"k": 12, "rescale_acts_by_decoder_norm": False},
    "batchtopk": {"k": 12},
    "matryoshka": {"k": 12},
    "jumprelu": {},
    "gated": {},
    "matching_pursuit": {},
}


def made(name: str, options: dict[str, Any], inputs: torch.Tensor) -> Any:
    """One that reads each input's directions, so that what it gives is of some use."""
    sae = saekit.SAE.from_dict({"name": name, "d_in": inputs.shape[1], "d_sae": 256, **options})
    generator = torch.Generator().manual_seed(1)
    directions = torch.randn(256, inputs.shape[1], generator=generator)
    with torch.no_grad():
        sae.W_dec.copy_(
            directions / directions.norm(dim=1, keepdim=True) * (1 + torch.rand(256, 1, generator=generator))
        )
        if hasattr(sae, "W_enc"):
            sae.W_enc.copy_(sae.W_dec.T)
        sae.b_dec.copy_(inputs.mean(0))
    sae.after_update()
    known = {"model_name": "saekit/tiny-python", "context_size": CONTEXT, "prepend_bos": False}
    sae.info = attrs.evolve(sae.info, sites=saekit.Sites.one(saekit.Site(hook_name=SITE)), metadata=known)
    return sae


def of_saebench(sae: Any, model: Any, tokens: torch.Tensor) -> dict[str, Any]:
    """The numbers of its core eval."""
    from sae_bench.evals.core.eval_config import CoreEvalConfig
    from sae_bench.evals.core.main import run_evals
    from sae_bench.sae_bench_utils.general_utils import load_and_format_sae
    from sae_lens.training.activations_store import ActivationsStore

    loaded: Any = load_and_format_sae("saekit", sae, "cpu")
    bench = loaded[1].to(device="cpu", dtype=torch.float32)
    records: Any = [{"tokens": row} for row in tokens.tolist()]
    store = ActivationsStore(
        model=model, dataset=records, streaming=False, hook_name=SITE, hook_head_index=None, context_size=CONTEXT,
        d_in=bench.cfg.d_in, n_batches_in_buffer=2, total_training_tokens=10**6, store_batch_size_prompts=4,
        train_batch_size_tokens=64, prepend_bos=False, normalize_activations="none", device=torch.device("cpu"),
        dtype="float32",
    )  # fmt: skip
    config = CoreEvalConfig(
        batch_size_prompts=4, n_eval_reconstruction_batches=N // 4, n_eval_sparsity_variance_batches=N // 4,
        compute_kl=True, compute_ce_loss=True, compute_l2_norms=True, compute_sparsity_metrics=True,
        compute_variance_metrics=True, compute_featurewise_density_statistics=True,
        compute_featurewise_weight_based_metrics=True,
    )  # fmt: skip
    groups, features = run_evals(bench, store, model, config)
    json.dumps(bench.cfg.to_dict())
    found = {name: value for group in groups.values() for name, value in group.items()}
    return found | {
        "alive": sum(one > 0 for one in features["feature_density"]),
        "biases": len(features["encoder_bias"]),
    }


def of_itself(sae: Any, backend: Any, tokens: torch.Tensor) -> dict[str, float]:
    """The same of the SAE without the adapter."""
    x = backend.run(tokens, read={SITE}).held[SITE]
    output, features = sae(x), sae.encode(x)
    losses = {
        name: backend.run(tokens, replace=replace, want="loss").loss.mean().item()
        for name, replace in (("ce_loss_with_sae", {SITE: lambda _: output}), ("ce_loss_without_sae", {}))
    }
    return losses | {
        "l0": (features != 0).sum(-1).float().mean().item(),
        "l2_norm_out": output.norm(dim=-1).mean().item(),
        "cossim": torch.cosine_similarity(x, output, dim=-1).mean().item(),
        "alive": int((features != 0).any(0).any(0).sum()),
    }


@torch.no_grad()
def main() -> None:
    """All of it."""
    torch.set_num_threads(1)
    backend = saekit.load_model(device="cpu")
    model: Any = backend.model  # type: ignore[attr-defined]
    tokens = torch.randint(20, 2000, (N, CONTEXT), generator=torch.Generator().manual_seed(0))
    inputs = backend.run(tokens, read={SITE}).held[SITE].flatten(0, 1)
    found = {}
    for name, options in OPTIONS.items():
        sae = made(name, options, inputs)
        found[name] = {
            "saebench": of_saebench(for_saebench(sae), model, tokens),
            "itself": of_itself(sae, backend, tokens),
        }
    print(json.dumps(found))


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    main()
