"""Evals of SAEs in their model, beside sae-lens' ``run_evals`` on the same SAE, model and tokens.

    python tests/bench/evals.py [--contexts 32] [--rounds 5] [--quick]

First the numbers that both find, then the time that both take: of one SAE and of eight, at a site in the upper half of
the model and at its first block; cross-entropy, KL, variance, sparsity, norms and firing of each feature, zero ablation
and no mean ablation.  saekit's time has the standard errors in it, which sae-lens does not make.  The two are timed in
turn.  Prints figures; it judges nothing.
"""

from __future__ import annotations

import argparse
import tempfile
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import attrs
import figures
import torch
from common import CONTEXT, PEER, VOCABULARY, Case, Times, language_model
from peers import version
from saekit_plugins.evals.downstream import DownstreamConfig

import saekit
from saekit.evals import Measured, measure
from saekit.kinds import EVALS
from saekit.measuring import Evaluation
from saekit.tokens import TokenChoice, special_ids

D_MODEL, LAYERS, D_SAE, K, BATCH = 512, 4, 4096, 32, 8
SITES = {"upper half": "blocks.2.hook_resid_post", "first block": "blocks.0.hook_resid_post"}
SAME = {
    "ce_loss_without_sae": "ce_loss_without_sae", "ce_loss_with_sae": "ce_loss_with_sae",
    "ce_loss_with_ablation": "ce_loss_with_ablation", "ce_loss_score": "ce_recovered",
    "kl_div_with_sae": "kl_div_with_sae", "kl_div_with_ablation": "kl_div_with_ablation",
    "kl_div_score": "kl_div_score", "explained_variance": "explained_variance", "mse": "mse",
    "cossim": "cosine_similarity", "l2_norm_in": "l2_norm_in", "l2_norm_out": "l2_norm_out", "l0": "l0", "l1": "l1",
}  # fmt: skip
"""sae-lens' names and ours of what means the same."""


def make_sae(inputs: torch.Tensor, hook: str, seed: int) -> Any:
    """A topk SAE of directions that some of ``inputs [n, d]`` have."""
    sae = saekit.SAE.from_dict({"name": "topk", "d_in": inputs.shape[1], "d_sae": D_SAE, "k": K})
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        mean = inputs.mean(0)
        rows = inputs[torch.randint(len(inputs), (D_SAE,), generator=generator)] - mean
        rows += 0.5 * rows.std() * torch.randn(rows.shape, generator=generator)
        sae.W_dec.copy_(rows / rows.norm(dim=1, keepdim=True))
        sae.W_enc.copy_(sae.W_dec.T)
        sae.b_dec.copy_(mean)
        given, wanted = sae(inputs) - mean, inputs - mean
        sae.W_enc.mul_((given * wanted).sum() / given.square().sum())  # as large as explains the most
    known = {"model_name": "none", "context_size": CONTEXT, "prepend_bos": False}
    sae.info = attrs.evolve(sae.info, sites=saekit.Sites.one(saekit.Site(hook_name=hook)), metadata=known)
    return sae


def by_saekit(saes: Sequence[Any], backend: Any, tokens: torch.Tensor, choice: TokenChoice) -> list[Evaluation]:
    """All SAEs in one pass."""
    plugins = saekit.default_manager()
    evals = {
        "reconstruction": plugins.build(EVALS, "reconstruction", run=None),
        "downstream": plugins.build(EVALS, DownstreamConfig(kl=True), run=None),
    }
    subjects = [Measured(sae, sae.info.sites, evals, choice) for sae in saes]
    found = measure(subjects, backend=backend, contexts=tokens)
    return [Evaluation.joined(evals[name].result(sums[name]) for name in evals) for sums in found]


class Peer:
    """sae-lens with the same SAEs, and the very same tokens in the same order."""

    def __init__(self, saes: Sequence[Any], model: Any, tokens: torch.Tensor) -> None:
        from sae_lens import SAE

        self.model, self.tokens = model, tokens
        self.records: Any = [{"tokens": row} for row in tokens.tolist()]
        with tempfile.TemporaryDirectory() as folder:
            paths = [sae.save(Path(folder) / str(number)) for number, sae in enumerate(saes)]
            self.saes: list[Any] = [SAE.load_from_disk(path) for path in paths]

    def __call__(self, *, exclude: bool = False) -> list[dict[str, float]]:
        """One SAE after the other, which is all that there is."""
        from sae_lens import ActivationsStore
        from sae_lens.evals import EvalConfig, run_evals
        from sae_lens.training.activation_scaler import ActivationScaler

        batches = len(self.tokens) // BATCH
        config = EvalConfig(
            batch_size_prompts=BATCH, n_eval_reconstruction_batches=batches,
            n_eval_sparsity_variance_batches=batches, compute_kl=True, compute_ce_loss=True, compute_l2_norms=True,
            compute_sparsity_metrics=True, compute_variance_metrics=True, compute_featurewise_density_statistics=True,
        )  # fmt: skip
        found = []
        for sae in self.saes:
            store = ActivationsStore.from_sae(self.model, sae, self.records, context_size=CONTEXT)
            groups, _ = run_evals(sae, store, self.model, ActivationScaler(), config, exclude_special_tokens=exclude)
            found.append({name: value for group in groups.values() for name, value in group.items()})
        return found


def agreement(sae: Any, backend: Any, tokens: torch.Tensor, peer: Peer) -> None:
    """What both find, and how far it is apart, with special tokens and without."""
    for exclude in (False, True):
        choice = TokenChoice(exclude=special_ids(backend)) if exclude else TokenChoice()
        (ours,), (theirs, *_) = by_saekit([sae], backend, tokens, choice), peer(exclude=exclude)
        print(f"  {'without special tokens' if exclude else 'all tokens'}:")
        for name, own in SAME.items():
            apart = abs(ours[own] - theirs[name]) / max(1.0, abs(theirs[name]))
            print(f"    {own:22} {ours[own]:14.7f} {theirs[name]:14.7f}   {apart:.1e}")
            found = {"saekit": ours[own], "sae-lens": theirs[name], "apart": f"{apart:.0e}"}
            figures.row(f"the same numbers, {'without special tokens' if exclude else 'all tokens'}", own, found)


def timed(tokens: torch.Tensor, rounds: int, cases: dict[str, Callable[[], object]], title: str) -> None:
    """A table of the time of each case, for each token."""

    def case(run: Callable[[], object]) -> Case:
        def once() -> int:
            run()
            return tokens.numel()

        return Case(once)

    base, peer = next(iter(cases)), next((name for name in cases if name.startswith("sae-lens")), None)
    times = Times({name: case(run) for name, run in cases.items()}, rounds)
    times.table(base, title)
    if peer is not None:
        figures.row(title, base, {f"sae-lens {version('sae-lens')} / it": times.ratio(peer, base)})


@torch.no_grad()
def main() -> None:
    """All of it."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--contexts", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="a small model, once: to see that it works")
    options = parser.parse_args()
    rounds = 1 if options.quick else options.rounds
    model = language_model(LAYERS, 64 if options.quick else D_MODEL)
    backend: Any = saekit.load_model(model)
    drawn = torch.Generator().manual_seed(0)
    tokens = torch.randint(VOCABULARY, (options.contexts, CONTEXT), generator=drawn)
    tokens[:, 0] = backend.special_tokens["bos"]
    print(f"{LAYERS} blocks, {options.contexts} contexts of {CONTEXT} tokens, topk with {D_SAE:,} features, k = {K}")
    if not PEER:
        figures.missing("sae-lens")
    for where, hook in SITES.items():
        print(f"{where}: {hook}")
        inputs = backend.run(tokens, read={hook}).held[hook].flatten(0, 1)
        saes = [make_sae(inputs, hook, seed) for seed in range(8)]
        if PEER and where == "upper half":
            agreement(saes[0], backend, tokens, Peer(saes[:1], model, tokens))
        for number in (1, 8):
            some, name = saes[:number], "saekit"
            cases: dict[str, Callable[[], object]] = {
                name: lambda some=some: by_saekit(some, backend, tokens, TokenChoice())  # type: ignore[misc]
            }
            if PEER:
                cases[f"sae-lens {version('sae-lens')}, {number}"] = Peer(some, model, tokens)
            timed(tokens, rounds, cases, f"{where}: {hook}, {number} SAE{'s' if number > 1 else ''}")


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    main()
