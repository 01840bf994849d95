"""What the processes of :mod:`support.processes` do that is about runs: text, sources, folders, what is refused."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any

import attrs
import pytest
import torch
from support import sweeps
from support.compiled import Counted, use
from support.processes import Case, Found, trained
from support.sweeps import DOCUMENTS, GainConfig, GainSAE
from torch import Tensor

import saekit
from saekit import Batch, Entry, SaekitError
from saekit.config.files import load_config
from saekit.distributed import World
from saekit.runs.session import Session
from saekit.testing import FakeConfig
from saekit.testing.fakes import plugin_of

FEW = [document for number, document in enumerate(DOCUMENTS) if number % 3 or number % 2]
"""Of other lengths for every other process."""


class SeededSource:
    """Knows of no other process, and draws every row."""

    def __init__(self, config: Any, stream: Any) -> None:
        self._site, self._n = stream.sites[0], stream.batch_size
        self._generator = torch.Generator().manual_seed(stream.seed)
        self.widths = dict.fromkeys(stream.sites, 8)
        self._left = 5

    def __iter__(self) -> SeededSource:
        return self

    def __next__(self) -> Batch:
        if not self._left:
            raise StopIteration
        self._left -= 1
        return Batch({self._site: torch.randn(self._n, 8, generator=self._generator)})

    def peek(self) -> dict[Any, Tensor]:
        return {self._site: torch.ones(self._n, 8)}

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Any) -> None: ...

    def close(self) -> None: ...


@attrs.frozen(kw_only=True)
class MoodyConfig:
    """Draws by the process's own number, too."""


class MoodySource(SeededSource):
    def __init__(self, config: Any, stream: Any) -> None:
        super().__init__(config, stream)
        self._generator.manual_seed(int(os.environ["RANK"]))


@attrs.frozen(kw_only=True)
class TurnedConfig:
    """Draws whole numbers, and has them in the order of the process's own number."""


class TurnedSource(SeededSource):
    def __init__(self, config: Any, stream: Any) -> None:
        super().__init__(config, stream)
        self._process = stream.process

    def __next__(self) -> Batch:
        rows = super().__next__().activations[self._site].mul(8).round()
        return Batch({self._site: rows.roll(self._process, 0)})


@attrs.frozen(kw_only=True)
class BrokenConfig:
    """Draws rows of which one is no number."""


class BrokenSource(SeededSource):
    def __next__(self) -> Batch:
        batch = super().__next__()
        batch.activations[self._site][3] = torch.nan
        return batch


def manager() -> saekit.PluginManager:
    seeded = Entry("seeded", FakeConfig, SeededSource)
    moody, turned = Entry("moody", MoodyConfig, MoodySource), Entry("turned", TurnedConfig, TurnedSource)
    broken = Entry("broken", BrokenConfig, BrokenSource)
    return sweeps.manager(None, plugin_of("activation_sources", seeded, moody, turned, broken))


def options(folder: Path, **sections: Any) -> dict[str, Any]:
    """A run of one process or of several, which leaves no checkpoints."""
    checkpoints = {"keep_last": 0, **sections.pop("checkpoints", {})}
    return sweeps.fake(folder, checkpoints=checkpoints, **sections)


def trained_on(world: World, **sections: Any) -> list[Batch]:
    """Every batch of a session, on this process."""
    config = load_config(options(Path("nowhere"), evals={"run": []}, **sections), plugins=manager())
    config = attrs.evolve(config, distributed=attrs.evolve(config.distributed, features=world.features.size))
    session = Session({"sae": config}, manager(), dataset=FEW, world=world)
    return list(session.lanes[0].source)


def text(world: World) -> list[dict[str, Any]]:
    """Of each batch of the whole text: what it is of, and how many rows others have."""
    batches = trained_on(world, dataset={"on_exhausted": "stop"})
    return [
        {"counts": one.counts, "rows": len(one), "documents": one.documents, "tokens": one.tokens, "first":
         next(iter(one.activations.values()))} for one in batches
    ]  # fmt: skip


def of_stranger(world: World, name: str) -> list[Tensor] | str:
    """The rows of a source that knows of no other process; or what is said of it."""
    try:
        batches = trained_on(world, activations={"source": {"name": name}})
    except SaekitError as error:
        return str(error)
    return [next(iter(batch.activations.values())) for batch in batches]


def run(world: World, folder: str, changes: dict[str, Any]) -> dict[str, Any]:
    """A whole run on the fake model: what each process is given of it; or what is refused."""
    features = {"distributed": {"features": world.features.size}}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            result = saekit.train(options(Path(folder), **changes, **features), plugins=manager(), dataset=DOCUMENTS)
    except SaekitError as error:
        return {"error": str(error)}
    weights = {name: value.detach().clone() for name, value in result.sae.state_dict().items()}
    return {"folder": str(result.folder), "weights": weights, "sparsity": result.sae.log_sparsity,
            "metrics": dict(result.metrics)}  # fmt: skip


def of_strangers_architecture(world: World, folder: str) -> str:
    """What is said of an architecture that does not know of many processes."""
    assert GainSAE.spreads_over == frozenset()
    assert GainConfig().penalty
    return str(run(world, folder, {"sae": {"name": "gain", "d_sae": 12}})["error"])


def compiled(world: World, cases: dict[str, Case]) -> dict[str, tuple[Found, int]]:
    """Steps whose losses ``torch.compile`` traces; what it makes of them runs as it is, and how often is counted."""
    counted = Counted()
    found = {}
    with pytest.MonkeyPatch.context() as patch:
        use(counted, patch)
        for name, case in cases.items():
            before = counted.runs
            found[name] = trained(attrs.evolve(case, training={**case.training, "compile": True}), world)
            found[name] = found[name], counted.runs - before
    return found
