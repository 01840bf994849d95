"""Makes ``tests/golden_evals/sae_lens.safetensors`` with sae-lens 6.54.12, in an environment that has it and saekit.

SAEs of the embedded model, made of the principal directions of its activations, and what sae-lens' ``run_evals`` finds
of them on contexts of Python's standard library, in which bos stands in the middle, too.  Tensors:
``tokens``, and of each site ``SITE.W_dec`` and ``SITE.b_dec`` in float16; metrics are JSON in the metadata, by site and
by whether special tokens count.
"""

from __future__ import annotations

import json
import tempfile
import textwrap
import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

HERE = Path(__file__).parent
N, CONTEXT, BATCH, PCS = 16, 48, 4, 24
SITES: dict[str, tuple[str, int | None]] = {
    "resid": ("blocks.1.hook_resid_post", None),
    "first_mlp": ("blocks.0.hook_mlp_out", None),
    "z": ("blocks.1.attn.hook_z", None),
    "one_head": ("blocks.1.attn.hook_z", 2),
}
_TEXTS = (json, textwrap, tempfile, warnings)


def contexts(backend: Any) -> Tensor:
    """``[N, CONTEXT]`` tokens: each begins with bos, and every third has one in the middle."""
    bos = backend.special_tokens["bos"]
    rows = []
    for index in range(N):
        text = Path(str(_TEXTS[index % len(_TEXTS)].__file__)).read_text()[2000 + 300 * index :]
        row = [bos, *backend.tokenize(text)[: CONTEXT - 1]]
        if index % 3 == 0:
            row[CONTEXT // 2] = bos
        rows.append(row)
    return torch.tensor(rows)


def weights(backend: Any, tokens: Tensor, hook: str, head: int | None) -> tuple[Tensor, Tensor]:
    """``W_dec [2 PCS, d]``, the first principal directions and their opposites, and ``b_dec [d]``, in float16."""
    held = backend.run(tokens, read={hook}).held[hook]
    rows = held.flatten(2) if head is None else held[:, :, head]
    rows = rows.flatten(0, 1).double()
    mean = rows.mean(0)
    directions = torch.linalg.svd(rows - mean, full_matrices=False).Vh[: min(PCS, rows.shape[1] // 2)]
    return torch.cat([directions, -directions]).half(), mean.half()


def made(W_dec: Tensor, b_dec: Tensor, hook: str, head: int | None) -> Any:
    """An SAE that explains its inputs by these directions, less a tenth of what they hold, so that few are active."""
    import attrs

    import saekit

    d_sae, d_in = W_dec.shape
    sae = saekit.SAE.from_dict({"name": "standard", "d_in": d_in, "d_sae": d_sae})
    with torch.no_grad():
        for name, value in (("W_dec", W_dec), ("W_enc", W_dec.T), ("b_dec", b_dec)):
            getattr(sae, name).copy_(value.float())
        sae.b_enc.fill_(-0.1)
    site = saekit.Site(hook_name=hook, hook_head_index=head)
    known = {"model_name": "saekit/tiny-python", "context_size": CONTEXT, "prepend_bos": True}
    sae.info = attrs.evolve(sae.info, sites=saekit.Sites.one(site), metadata=known)
    return sae


def found(sae: Any, model: Any, tokens: Tensor, *, exclude: bool) -> dict[str, float]:
    """The metrics of sae-lens by their names, without the groups that they are in."""
    from sae_lens import SAE, ActivationsStore
    from sae_lens.evals import EvalConfig, run_evals
    from sae_lens.training.activation_scaler import ActivationScaler

    with tempfile.TemporaryDirectory() as folder:
        theirs = SAE.load_from_disk(sae.save(Path(folder) / "sae"))
    records: Any = [{"tokens": row} for row in tokens.tolist()]
    store = ActivationsStore.from_sae(model, theirs, records, context_size=tokens.shape[1])
    batches = len(tokens) // BATCH
    config = EvalConfig(
        batch_size_prompts=BATCH, n_eval_reconstruction_batches=batches, n_eval_sparsity_variance_batches=batches,
        compute_kl=True, compute_ce_loss=True, compute_l2_norms=True, compute_sparsity_metrics=True,
        compute_variance_metrics=True, compute_featurewise_density_statistics=True,
    )  # fmt: skip
    groups, features = run_evals(theirs, store, model, ActivationScaler(), config, exclude_special_tokens=exclude)
    metrics = {name: value for group in groups.values() for name, value in group.items()}
    density = torch.tensor(features["feature_density"])
    return metrics | {"fired": float((density > 0).sum()), "dense": float((density > 0.1).sum())}


@torch.no_grad()
def main() -> None:
    """All of it."""
    import saekit

    torch.set_num_threads(1)
    backend = saekit.load_model(device="cpu")
    model: Any = backend.model  # type: ignore[attr-defined]
    tokens = contexts(backend)
    tensors, metrics = {"tokens": tokens.short()}, {}
    for name, (hook, head) in SITES.items():
        W_dec, b_dec = weights(backend, tokens, hook, head)
        sae = made(W_dec, b_dec, hook, head)
        tensors |= {f"{name}.W_dec": W_dec.contiguous(), f"{name}.b_dec": b_dec}
        metrics[name] = {
            ("without special tokens" if exclude else "all tokens"): found(sae, model, tokens, exclude=exclude)
            for exclude in (False, True)
        }
        print(name, json.dumps(metrics[name], indent=1))
    save_file(tensors, HERE / "sae_lens.safetensors", {"metrics": json.dumps(metrics), "sites": json.dumps(SITES)})


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    main()
