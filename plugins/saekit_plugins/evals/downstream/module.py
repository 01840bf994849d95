"""What the eval sums up."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

from saekit import ConfigError
from saekit.evals import AccumulatingEval, Sums, Totals, ratio
from saekit.measuring import Measure, Needs, Outcome, Seen
from saekit.values import EvalRun
from saekit_plugins.evals.downstream import DownstreamConfig

_LOSSES = {
    "clean": "ce_loss_without_sae",
    "spliced": "ce_loss_with_sae",
    "zero": "ce_loss_with_ablation",
    "mean": "ce_loss_with_mean_ablation",
}
"""The forwards, and what their losses are called."""
_MEASURES = {
    "ce_recovered": Measure("CE recovered", 1, "CE rec.", headline=1, fidelity=True, of_site=True),
    "ce_recovered_from_mean": Measure("CE recovered from the mean", 1, of_site=True),
    "ce_loss_with_sae": Measure("CE with the SAE", -1),
    "ce_loss_without_sae": Measure("CE without an SAE", of_model=True),
    "ce_loss_with_ablation": Measure("CE with zeros", of_model=True),
    "ce_loss_with_mean_ablation": Measure("CE with the mean", of_model=True),
    "kl_div_with_sae": Measure("KL divergence", -1, "KL", headline=4),
    "kl_div_with_ablation": Measure("KL with zeros", of_model=True),
    "kl_div_score": Measure("KL score", 1, of_site=True),
    "top1_agreement": Measure("top-1 agreement", 1, "top-1", headline=5),
    "n_tokens": Measure("tokens"),
}


_NO_LOSS = (
    "no token is predicted from the tokens that count, of which each is the last of its context: there are no losses"
)


class DownstreamEval(AccumulatingEval):
    """Losses of the model as it is, with what the SAE gives, with zeros and with the mean."""

    measures = _MEASURES
    shares_contexts = True

    def __init__(self, config: DownstreamConfig, *, run: EvalRun | None = None) -> None:
        wanted = config.mean_ablation_contexts
        contexts = run.contexts if wanted and run is not None else None
        if contexts is not None and len(contexts) < wanted:
            raise ConfigError(
                [("mean_ablation_contexts", f"is {wanted:,}, and there are {len(contexts):,} contexts: ask for fewer")]
            )
        self.config = config
        self.n_bootstrap = config.n_bootstrap
        self._guess = math.log(run.backend.d_vocab) if run is not None and not run.steps else math.inf
        """The loss of a model that knows nothing; in training, the run itself tells of it."""

    @property
    def needs(self) -> Needs:
        return Needs(
            clean=True,
            spliced=True,
            zero=True,
            mean=self.config.mean_ablation_contexts,
            kl=self.config.kl,
            top1=self.config.top1,
            batch_size=self.config.batch_size_prompts,
        )

    def update(self, sums: Sums, seen: Seen) -> None:
        forwards: dict[str, Outcome] = {"clean": seen.clean, "spliced": seen.spliced, "zero": seen.zero}
        if self.config.mean_ablation_contexts:
            forwards["mean"] = seen.mean
        kept = seen.kept.cpu()
        positions = kept.new_full((len(kept),), kept.shape[1], dtype=torch.int64)
        columns = {f"ce/{name}": seen.summed(forward.loss) for name, forward in forwards.items()}
        columns |= {"losses": kept[:, :-1].sum(1), "tokens": kept.sum(1), "positions": positions}
        for name in [name for name in forwards if name != "clean"]:
            if self.config.kl:
                columns[f"kl/{name}"] = seen.summed(forwards[name].kl)
            if self.config.top1:
                columns[f"agrees/{name}"] = seen.summed(forwards[name].agrees)
        sums.add(seen.numbers, columns)

    def metrics(self, totals: Totals) -> Mapping[str, Any]:
        n, tokens, names = totals["losses"], totals["tokens"], totals.sums.names
        ce = {name: ratio(totals[f"ce/{name}"], n) for name in _LOSSES if f"ce/{name}" in names}
        found = {_LOSSES[name]: loss for name, loss in ce.items()}
        found["ce_recovered"] = _recovered(ce, "zero")
        if "mean" in ce:
            found["ce_recovered_from_mean"] = _recovered(ce, "mean")
        if self.config.kl:
            spliced, zero = totals["kl/spliced"], totals["kl/zero"]
            found |= {"kl_div_with_sae": ratio(spliced, tokens), "kl_div_with_ablation": ratio(zero, tokens)}
            found["kl_div_score"] = ratio(zero - spliced, zero)
        if self.config.top1:
            found["top1_agreement"] = ratio(totals["agrees/spliced"], tokens)
        return found

    def counted(self, sums: Sums) -> dict[str, Any]:
        tokens = int(sums.column("tokens").sum())
        about = {"tokens_used": tokens, "tokens_of": int(sums.column("positions").sum())}
        if self.config.mean_ablation_contexts:
            about["mean_ablation_contexts"] = self.config.mean_ablation_contexts
        losses = sums.column("losses").sum()
        unread = (_NO_LOSS,) if tokens and not losses else ()
        return {"values": {"n_tokens": float(tokens)}, "about": about, "remarks": unread}

    def remarks(self, values: Mapping[str, float]) -> tuple[str, ...]:
        found, clean = [], values.get("ce_loss_without_sae")
        if clean is not None and clean > 0.95 * self._guess:
            found.append(
                f"the model's own loss is {clean:.2f} nats, hardly better than guessing ({self._guess:.2f}, the "
                "logarithm of its vocabulary); wrong model, tokenizer or text?"
            )
        than = {
            "ce_recovered": ("CE recovered", "zeros"),
            "ce_recovered_from_mean": ("CE recovered from mean", "the mean"),
        }
        found += [
            f"{name} is below 0: the SAE is worse than {what} in its place; wrong site, scale or model?"
            for key, (name, what) in than.items()
            if values.get(key, 0.0) < 0
        ]
        return tuple(found)


def _recovered(ce: Mapping[str, Any], ablated: str) -> Any:
    """``(CE_ablated − CE_spliced) / (CE_ablated − CE_clean)``, the ratio of the means; nan where nothing is lost."""
    return ratio(ce[ablated] - ce["spliced"], ce[ablated] - ce["clean"])
