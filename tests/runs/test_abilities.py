"""What a plugin's object may do beside what its kind must: what stands for it can do just that."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from support.runs import fake_config, manager, train
from torch import Tensor

import saekit
from saekit.abilities import (
    HasMemory,
    HasTokenizer,
    Pauses,
    SourceForwards,
    StatesForwards,
    StatesRows,
    StatesWidths,
    TakesCheckpoints,
)
from saekit.data.shared import SharedForwards
from saekit.errors import PluginFailedError
from saekit.kinds import ACTIVATION_SOURCES
from saekit.runs.supervised import SupervisedSource
from saekit.runs.trackers import Trackers
from saekit.testing import FakeBackend, fake_plugin
from saekit.values import Batch, Metrics

SITE = saekit.Site(hook_name="blocks.0.hook_resid_post")
MEMBERS = {
    Pauses: "pause",
    StatesRows: "rows",
    StatesWidths: "widths",
    StatesForwards: "source_forwards",
    HasMemory: "memory_bytes",
}
FORWARDS = SourceForwards(contexts=3, buffered=5, tokenizing=1)


class Source:
    """Random rows at one site."""

    def __init__(self, *, stream: Any = None) -> None:
        self._batch_size, self.paused, self.closed = 8 if stream is None else stream.batch_size, 0, 0

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        return Batch({SITE: torch.randn(self._batch_size, FakeBackend.d_model)})

    def peek(self) -> Mapping[saekit.Site, Tensor]:
        return next(self).activations

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...

    def close(self) -> None:
        self.closed += 1


def _pause(self: Source) -> None:
    self.paused += 1


OWN: dict[str, Any] = {
    "pause": _pause,
    "rows": property(lambda self: 1000),
    "widths": property(lambda self: {SITE: FakeBackend.d_model}),
    "source_forwards": property(lambda self: FORWARDS),
    "memory_bytes": lambda self: 4096,
}


def source_with(names: set[str], **others: Any) -> type[Source]:
    return type("Own", (Source,), {**{name: OWN[name] for name in names}, **others})


def supervised(source: Any) -> SupervisedSource:
    return SupervisedSource(source, saekit.default_manager().get(ACTIVATION_SOURCES, "saekit:live"), [SITE], [])


def is_there(found: object, name: str) -> bool:
    """As ``isinstance`` looks for a protocol's members since Python 3.12."""
    try:
        inspect.getattr_static(found, name)
    except AttributeError:
        return False
    return True


@pytest.mark.parametrize("names", [some for n in range(6) for some in itertools.combinations(OWN, n)], ids=", ".join)
def test_a_supervised_source_can_do_what_the_source_can(names: tuple[str, ...]) -> None:
    source: Any = source_with(set(names))()
    found = supervised(source)
    for ability, name in MEMBERS.items():
        assert isinstance(source, ability) == isinstance(found, ability) == is_there(found, name) == (name in names)
    if "pause" in names:
        found.pause()
        assert source.paused == 1
    for name, value in (("rows", 1000), ("widths", {SITE: FakeBackend.d_model}), ("source_forwards", FORWARDS)):
        assert name not in names or getattr(found, name) == value
    assert "memory_bytes" not in names or found.memory_bytes() == 4096


class Kept(FakeBackend):
    tokenizer = None

    def memory_bytes(self) -> int:
        return 7


@pytest.mark.parametrize("backend", [FakeBackend(), Kept()])
def test_a_shared_model_can_do_what_the_model_can(backend: Any) -> None:
    reader = SharedForwards(backend).reader({SITE.hook_name})
    for ability, name in ((HasTokenizer, "tokenizer"), (HasMemory, "memory_bytes")):
        has = isinstance(backend, Kept)
        assert isinstance(backend, ability) == isinstance(reader, ability) == is_there(reader, name) == has


def fails(error: BaseException) -> Any:
    def fail(self: object) -> Any:
        raise error

    return fail


@pytest.mark.parametrize(
    ("own", "told"),
    [
        ({"widths": property(fails(KeyError("a")))}, "failed in widths: KeyError: 'a'"),
        (
            {"widths": property(lambda self: {SITE: 0})},
            ": widths returned .* expected a width of 1 or more for blocks.0",
        ),
        ({"rows": property(fails(ValueError("no rows")))}, "failed in rows: ValueError: no rows"),
        ({"source_forwards": property(fails(ValueError("none")))}, "failed in source_forwards: ValueError: none"),
        ({"source_forwards": SourceForwards(contexts=0)}, ": source_forwards returned .* expected 1 or more contexts"),
        ({"source_forwards": (16, 32)}, ": source_forwards returned .* expected saekit.abilities.SourceForwards"),
        ({"rows": lambda self, n: n}, ": rows returned .*, expected how many rows one reading has, a whole number"),
    ],
)
def test_an_ability_that_fails_is_named_and_the_source_closed(tmp_path: Path, own: dict[str, Any], told: str) -> None:
    made: list[Source] = []

    def build(config: Any, stream: Any) -> Source:
        made.append(source_with(set(), **own)(stream=stream))
        return made[-1]

    table = fake_config(tmp_path) | {"activations": {"source": "mine"}}
    with pytest.raises(PluginFailedError, match=rf"^activation source 'test:mine' \(test 0\) ?{told}"):
        train(table, plugins=manager(None, fake_plugin("activation_sources", "mine", build)))
    assert [source.closed for source in made] == [1]


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"contexts": "16"}, "expected 1 or more contexts, a whole number"),
        ({"buffered": 2.5}, "expected 1 or more buffered"),
        ({"tokenizing": -1}, "expected 0 or more tokenizing"),
        ({"ahead": 1}, "expected True or False as ahead"),
        ({"needed_line": None}, "expected text as needed_line"),
        ({"device": torch.device("cpu")}, "expected the name of a device, or None, as device"),
        ({"dtype": torch.float16}, "expected float32, bfloat16, float16, float64 or None as dtype"),
    ],
)
def test_what_is_stated_of_forwards_is_of_its_types(wrong: dict[str, Any], told: str) -> None:
    with pytest.raises(PluginFailedError, match=f"source_forwards returned .* {told}"):
        supervised(source_with(set(), source_forwards=SourceForwards(**wrong))())


def test_an_attribute_of_a_sources_own_is_its_own() -> None:
    assert not isinstance(supervised(source_with(set(), forwards=68)()), StatesForwards)


@pytest.mark.parametrize("name", ["pause", "memory_bytes"])
def test_a_method_that_fails_is_named(name: str) -> None:
    found = supervised(source_with(set(), **{name: fails(RuntimeError("broken"))})())
    with pytest.raises(PluginFailedError, match=rf"^activation source 'saekit:live' .* failed in {name}: RuntimeError"):
        getattr(found, name)()


def test_a_source_is_paused_when_no_batch_is_needed(tmp_path: Path) -> None:
    made: list[Source] = []

    def build(config: Any, stream: Any) -> Source:
        made.append(source_with({"pause"})(stream=stream))
        return made[-1]

    table = fake_config(tmp_path) | {"activations": {"source": "mine"}}
    train(table, plugins=manager(None, fake_plugin("activation_sources", "mine", build)))
    assert made[0].paused == 1


class Plain:
    def __init__(self) -> None:
        self.told: list[object] = []

    def log(self, metrics: Metrics, step: int) -> None:
        self.told.append(step)

    def close(self) -> None: ...


class Told(Plain):
    def log_checkpoint(self, folder: Path, step: int) -> None:
        self.told.append(folder)


class Without(Told):
    log_checkpoint = None  # type: ignore[assignment]


def test_trackers_that_take_checkpoints_are_told(tmp_path: Path) -> None:
    plain, told, without = Plain(), Told(), Without()
    assert [isinstance(one, TakesCheckpoints) for one in (plain, told, without)] == [False, True, False]
    trackers = Trackers({"plain": plain, "told": told, "without": without})
    trackers.log_checkpoint(tmp_path, 3)
    trackers.log({}, 4)
    trackers.close()
    assert (plain.told, told.told, without.told) == ([4], [tmp_path, 4], [4])
    assert not trackers.failed
