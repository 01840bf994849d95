"""What looks wrong with a run, but trains: told by ``saekit plan``, and by the run as warnings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from saekit.config import TrainConfig
from saekit.data.stream import PROBED
from saekit.protocols import ModelBackend
from saekit.runs.randomness import seeded
from saekit.sae.module import SAEModule
from saekit.site import Site, Sites
from saekit.training.trainer import SAETrainer
from saekit.values import Replacement

__all__ = ["doubts_of_density", "doubts_of_features", "doubts_of_order", "doubts_of_start"]

_FIRINGS = 10.0  # of the average feature, for silence to mean something
_FAR = 1.5  # times as many active features on held-out text as in training, or in training as there
_CHANGED = 1e-6  # of the largest value: more than rounding, if a device rounds otherwise the second time


def doubts_of_start(config: TrainConfig, start: SAEModule | None) -> list[str]:
    """Of a run that starts from a saved SAE: that it was trained at other sites."""
    before, now = None if start is None else start.info.sites, config.sites
    if before is None or before == now:
        return []
    option = "inputs and targets" if config.inputs else "site.hook_name"
    return [
        f"the SAE in {config.training.from_pretrained_path} (training.from_pretrained_path) was trained at "
        f"{before.name}, and this run trains it at {now.name}; to go on where it was, name that in {option}"
    ]


def doubts_of_order(
    backend: ModelBackend, sites: Sites, lock: AbstractContextManager[object] | None = None
) -> list[str]:
    """Of what writes other sites than it reads: targets that the model does not compute from what is read.

    It is found by moving what hooks hold, on a few tokens, and looking at what changes; nothing else does.
    """
    targets = [site for site in sites.targets if site not in sites.inputs]
    if not targets:
        return []
    read = ", ".join(site.name for site in sites.inputs)
    found = []
    try:
        with lock or nullcontext(), seeded(0), torch.no_grad():
            clean = _held(backend, sites.all)
            after = _changed(clean, _held(backend, targets, moved=sites.inputs))
            for target in targets:
                if target in after:
                    continue
                if _changed(clean, _held(backend, sites.inputs, moved=[target])):
                    found.append(
                        f"the target {target.name} lies before what is read ({read}), which the model makes from it; "
                        "if the two are swapped, exchange inputs and targets"
                    )
                else:
                    found.append(f"the target {target.name} does not depend on what is read ({read}), nor that on it")
    except Exception:  # these are only doubts; whatever is wrong here, the run itself will say
        return []
    return found


def _held(backend: ModelBackend, sites: Sequence[Site], moved: Sequence[Site] = ()) -> dict[Site, Tensor]:
    """The vectors at ``sites`` on a few tokens, while those at ``moved`` are other ones."""
    tokens = torch.zeros(PROBED, dtype=torch.long)
    hooks = dict.fromkeys(site.hook_name for site in moved)
    replace: Mapping[str, Replacement] = {hook: _moving(hook, moved) for hook in hooks}
    held = backend.run(tokens, read={site.hook_name for site in sites}, replace=replace).held
    return {site: site.extract(held[site.hook_name]) for site in sites}


def _moving(hook: str, sites: Sequence[Site]) -> Replacement:
    def move(activations: Tensor) -> Tensor:
        for site in sites:
            if site.hook_name == hook:
                values = site.extract(activations)
                noise = torch.randn(values.shape, device="cpu").to(values)
                activations = site.replace(activations, values + noise * (1 + values.std()))
        return activations

    return move


def _changed(before: Mapping[Site, Tensor], now: Mapping[Site, Tensor]) -> set[Site]:
    return {
        site
        for site, values in now.items()
        if bool((values - before[site]).abs().max() > _CHANGED * before[site].abs().max())
    }


def doubts_of_features(config: TrainConfig, trainer: SAETrainer, l0: float) -> list[str]:
    """Of an SAE that is trained: that most features are dead, where they had the time to fire.

    ``l0`` is how many were active on average.  Of a window so short that chance leaves many out, nothing is said.
    """
    d_sae, window = trainer.d_sae, min(trainer.training.dead_after, trainer.step - 1)
    dead = trainer.sae.share.count(int((own := trainer.firing.since_fired > window).sum()), own)
    batch = trainer.training.train_batch_size_tokens
    firings = window * batch * max(l0, 1.0) / d_sae
    if dead <= d_sae / 2 or firings < _FIRINGS:
        return []
    advice = []
    if config.activations.normalize_activations is None:
        advice.append("scale activations (activations.normalize_activations=expected_average_only_in)")
    if trainer.sae.config.b_dec_init_method == "zeros":
        advice.append("start b_dec at their mean (sae.b_dec_init_method=mean)")
    advice += ["train on more tokens (training.training_tokens)", "choose fewer features (sae.d_sae)"]
    return [
        f"{dead:,} of {d_sae:,} features ({dead / d_sae:.0%}) of the SAE at {config.sites.name} are dead at the end of "
        f"training: they have not fired in its last {window:,} steps of {batch:,} tokens, on each of which {l0:.3g} "
        f"features are active. What helps: {', '.join(advice)}, or ask for less sparsity"
    ]


def doubts_of_density(config: TrainConfig, trainer: SAETrainer, metrics: Mapping[str, float]) -> list[str]:
    """Of an SAE whose features compete over a batch in training, and over nothing outside: that many more, or fewer,
    are active there, as where the threshold between them follows training slowly and there was little of it.

    ``metrics`` are its newest.  Where nothing was measured on held-out text, nothing is said.
    """
    trained, held_out = metrics.get("metrics/l0"), metrics.get("evals/l0")
    if trainer.sae.competes_over != "all" or not trained or held_out is None:
        return []
    if trained / _FAR < held_out < _FAR * trained:
        return []
    advice = ["train on more tokens (training.training_tokens)"]
    rate = getattr(trainer.sae.config, "threshold_lr", None)  # of architectures that call it so
    if rate is not None:
        advice.append(f"have the threshold follow faster (sae.threshold_lr, which is {rate:g})")
    return [
        f"on held-out text {held_out:.3g} features of the SAE at {config.sites.name} are active on a token, and in "
        f"training {trained:.3g}: there they compete over a batch, and elsewhere each is active above a threshold, an "
        f"average over batches, which after {trainer.step:,} steps is not where training is. What helps: "
        + ", or ".join(advice)
    ]
