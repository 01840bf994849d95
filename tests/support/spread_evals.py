"""What the processes of :mod:`support.processes` do that is about evals."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import attrs
import torch
from saekit_plugins.architectures.standard import StandardConfig
from saekit_plugins.architectures.standard.module import StandardSAE
from support import sweeps
from support.processes import Case
from support.spread_runs import options
from torch import Tensor

import saekit
from saekit.config.files import load_config
from saekit.distributed import World
from saekit.evals import AccumulatingEval, Sums
from saekit.measuring import Needs
from saekit.runs.measuring import evaluate
from saekit.runs.session import Session
from saekit.sae.once import features_and_outputs
from saekit.sae.splitting import gathered
from saekit.testing import FakeBackend, fake_plugin

ALL = [
    {"name": "reconstruction", "batch_size_prompts": 3},
    {"name": "downstream", "batch_size_prompts": 2, "kl": True, "top1": True, "mean_ablation_contexts": 5},
]


@attrs.frozen(kw_only=True)
class WholeConfig:
    """An eval that says nothing."""


class WholeEval(AccumulatingEval):
    """Counts the features of the SAE that it is started with, which it must have whole."""

    def __init__(self, config: WholeConfig, *, run: Any) -> None:
        self.run = run

    @property
    def needs(self) -> Needs:
        return Needs(features=True, batch_size=4)

    def start(self, sae: Any, sites: Any) -> Sums:
        sums = Sums()
        sums.norm = float(sae.W_dec.norm())  # type: ignore[attr-defined]
        return sums

    def update(self, sums: Any, seen: Any) -> None:
        sums.add(seen.numbers, {"tokens": seen.kept.sum(1)})

    def metrics(self, totals: Any) -> dict[str, Any]:
        return {"tokens_seen": totals["tokens"]}

    def counted(self, sums: Any) -> dict[str, Any]:
        return {"values": {"norm": sums.norm}}


def simple(config: Any, *, run: Any) -> Any:
    def measure(sae: Any, *, backend: Any, sites: Any, contexts: Tensor) -> dict[str, float]:
        return {"contexts": float(len(contexts)), "features": float(sae.encode(torch.ones(1, sae.d_in)).numel())}

    return measure


@attrs.frozen(kw_only=True)
class SimpleConfig:
    """A function."""


def wordy(config: Any, *, run: Any) -> Any:
    return lambda *_, **__: {"found": "no number"}


@attrs.frozen(kw_only=True)
class WordyConfig:
    """An eval that returns what is no number."""


@attrs.frozen(kw_only=True)
class QuietConfig(StandardConfig):
    """Trains with features split, and does not say that it can be measured so."""


class QuietSAE(StandardSAE):
    spreads_over = frozenset({"data", "features"})


def manager() -> saekit.PluginManager:
    return sweeps.manager(
        None,
        fake_plugin("sae_architectures", "quiet", build=QuietSAE, config=QuietConfig),
        fake_plugin("evals", "whole", build=WholeEval, config=WholeConfig),
        fake_plugin("evals", "simple", build=simple, config=SimpleConfig),
        fake_plugin("evals", "wordy", build=wordy, config=WordyConfig),
    )


def measured(world: World, sae: dict[str, Any], evals: list[Any]) -> dict[str, Any]:
    """What evals find of an SAE with its first weights; in all but the first process, nothing."""
    table = options(
        Path("nowhere"), sae={"d_sae": 12, "dtype": "float64", **sae}, evals={"run": evals, "n_contexts": 7}
    )
    config = load_config(table, plugins=manager())
    config = attrs.evolve(config, distributed=attrs.evolve(config.distributed, features=world.features.size))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        session = Session({"sae": config}, manager(), dataset=sweeps.DOCUMENTS, world=world)
        session.give_weights()
        found = evaluate(session, list(session.members.values()))["sae"]
        session.close()
    return {"found": found, "remarks": session.members["sae"].remarks, "told": [str(one.message) for one in caught]}


def failed(world: World) -> str:
    """The error of an eval that returns what is no number."""
    try:
        measured(world, {"name": "standard"}, ["wordy"])
    except saekit.SaekitError as error:
        return f"{type(error).__name__}: {error}"
    return "none"


def peeked(world: World, source: dict[str, Any]) -> Any:
    """The rows that starting weights and factors are estimated on."""
    table = options(Path("nowhere"), evals={"run": []}, activations={"source": source})
    config = load_config(table, plugins=manager())
    config = attrs.evolve(config, distributed=attrs.evolve(config.distributed, features=world.features.size))
    session = Session({"sae": config}, manager(), dataset=sweeps.DOCUMENTS, world=world)
    found = session.lanes[0].source.peek()[config.site]
    session.close()
    return found


def evaluated(world: World, folder: str) -> Any:
    """What :func:`saekit.evaluate` gives of an SAE that is saved in ``folder``, and what it warns of."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = saekit.evaluate(
            folder, model=FakeBackend(), evals=[*ALL, "whole", "simple"], n_contexts=7, plugins=manager(),
            contexts=torch.arange(7 * 16).view(7, 16) * 5 % 90, verbose=False,
        )  # fmt: skip
    return {"told": found.to_dict(), "warned": [str(one.message) for one in caught if one.category is UserWarning]}


def inferred(world: World, case: Case) -> dict[str, float]:
    """How far what the parts of an SAE give is from what the whole gives, relative to its largest number."""
    trainer = case.trainer(world)
    whole = gathered(trainer.sae) if world.features.size > 1 else copy.deepcopy(trainer.sae)
    x = torch.randn(50, whole.d_in, generator=torch.Generator().manual_seed(1), dtype=whole.dtype)
    features, outputs = features_and_outputs(whole, x)
    own, of_parts = features_and_outputs(trainer.raw_part(), x)
    dense = features.dense()
    return {
        "features": float((own.dense() - dense).abs().max() / dense.abs().max()),
        "outputs": float((of_parts - outputs).abs().max() / outputs.abs().max()),
        "active": float(len(features)),
        "same": float(own.shape == features.shape),
    }


__all__ = ["ALL", "evaluated", "inferred", "manager", "measured", "peeked"]
