"""How processes are arranged, and what is said where they do not fit; in one process."""

from __future__ import annotations

import signal
from collections import Counter
from typing import Any

import attrs
import pytest
import torch
from support.processes import Case
from support.spread_cases import CASES
from support.sweeps import GainConfig, GainSAE
from torch import Tensor

import saekit
from saekit import ConfigError, DataError
from saekit.config import DistributedConfig, OptimizerConfig, TrainConfig
from saekit.data.text import Documents
from saekit.distributed import ALONE, WHOLE, World, open_world
from saekit.distributed.batches import thinned
from saekit.distributed.group import Group
from saekit.distributed.launched import Launched, check_mesh, refuse_several
from saekit.kinds import SAE_ARCHITECTURES
from saekit.runs import session
from saekit.runs.spreading import check_spreads
from saekit.sae.build import build_module
from saekit.sae.splitting import check_spread, give_part, keep_part, whole_like
from saekit.testing import fake_plugin, isolated_manager
from saekit.values import Batch


class Part(Group):
    """A group whose other processes are not there."""

    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size = rank, size

    def sum(self, value: Tensor) -> Tensor:
        raise AssertionError("nobody is asked")


@pytest.mark.parametrize(
    ("size", "config", "mesh"), [(1, {}, (1, 1)), (4, {}, (4, 1)), (4, {"features": 2, "data": 2}, (2, 2))]
)
def test_what_features_leave_over_is_for_data(size: int, config: dict[str, int], mesh: tuple[int, int]) -> None:
    assert check_mesh(DistributedConfig(**config), Launched(size=size)) == mesh


@pytest.mark.parametrize(
    ("size", "config", "said"),
    [
        (1, {"features": 2}, "distributed.features: asks for 2 processes, and this is one: start it with torchrun "
         "--nproc-per-node 2"),
        (1, {"features": 2, "data": 3}, "asks for 6 processes"),
        (1, {"data": 2}, "distributed.data: asks for 2 processes"),
        (4, {"features": 3}, "distributed.features: is 3, which does not divide the 4 processes"),
        (4, {"features": 2, "data": 4}, "distributed.data: is 4, and 4 processes with distributed.features = 2 leave"),
    ],
)  # fmt: skip
def test_a_mesh_that_does_not_fit_is_refused(size: int, config: dict[str, int], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        check_mesh(DistributedConfig(**config), Launched(size=size))
    assert said in str(caught.value)


def test_a_process_knows_its_number_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    assert Launched.here({}) == Launched.here({"RANK": "0"}) == Launched()
    assert Launched.here({"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1"}) == Launched(3, 4, 1)
    with pytest.raises(ConfigError, match="the environment variable RANK is 'first', expected a whole number"):
        Launched.here({"RANK": "first", "WORLD_SIZE": "4"})
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match=r"2 processes were started \(torchrun\), and pretokenizing is for one"):
        refuse_several("pretokenizing")
    with pytest.raises(ConfigError, match="pretokenizing is for one"):
        saekit.pretokenize({})


def test_one_process_is_a_world_that_asks_nobody() -> None:
    with open_world(DistributedConfig()) as world:
        assert world is ALONE
    assert world.share() is world.share((3, 4)) is WHOLE
    x = torch.randn(5, 3)
    assert WHOLE.sum(x) is WHOLE.alike(x) is WHOLE.all_features(x) is WHOLE.all_rows(x) is WHOLE.total(x) is x
    assert torch.equal(WHOLE.row_mean(x), x.mean(0))


@pytest.mark.parametrize("parts", [2, 3])
def test_every_document_is_of_one_part(parts: int) -> None:
    documents = Documents([str(number) for number in range(20)], keep=lambda index: index % 4 != 3)
    read = [[number for number, _ in documents.part(part, parts).read()] for part in range(parts)]
    assert Counter(number for part in read for number in part) == Counter(n for n in range(20) if n % 4 != 3)
    assert max(map(len, read)) - min(map(len, read)) <= 1, "those that are held out make no part smaller"


def test_a_part_goes_on_where_it_was() -> None:
    part = Documents([str(number) for number in range(20)], keep=lambda index: index % 4 != 3).part(1, 3)
    reader, again = part.read(), part.read()
    before = [next(reader) for _ in range(2)]
    again.load_state_dict(reader.state_dict())
    assert [*before, *again] == [*part.read()]


def test_fewer_documents_than_processes_are_told() -> None:
    with pytest.raises(DataError, match="the dataset has 2 documents to train on, and 3 processes share them"):
        Documents(["one", "two"]).part(0, 3)


def test_a_last_batch_is_thinned_over_all_processes() -> None:
    whole = torch.arange(12.0)[:, None]
    site = saekit.Site(hook_name="x")
    expected = Batch({site: whole}).thinned(7).activations[site]
    found = []
    for rank, part in enumerate(whole.split([5, 4, 3])):
        world = attrs.evolve(ALONE, data=Part(rank, 3))
        batch = thinned(Batch({site: part}, counts=(5, 4, 3)), 7, world)
        assert sum(batch.counts) == batch.whole == 7
        assert batch.counts[rank] == len(batch)
        found.append(batch.activations[site])
    assert torch.equal(torch.cat(found), expected)


@pytest.mark.parametrize("name", ["standard_finetuned_scale", "gated", "transcoder_skip", "jumprelu"])
def test_parts_are_those_of_the_whole(name: str) -> None:
    whole = CASES[name].trainer(ALONE).sae
    part = CASES[name].trainer(ALONE).sae
    for value in part.parameters():
        value.data.zero_()
    keep_part(part, Part(1, 2))
    assert part.d_sae == part.table.sizes["d_sae"] == 16
    give_part(part, whole)
    for entry in part.table:
        own, all_of_it = getattr(part, entry.name), getattr(whole, entry.name)
        if own is None:
            assert all_of_it is None
        elif entry.split is None:
            assert torch.equal(own, all_of_it)
        else:
            assert torch.equal(own, all_of_it.narrow(entry.dims.index("d_sae"), 16, 16))
            assert own.requires_grad == all_of_it.requires_grad
    again = whole_like(part)
    assert again.d_sae == 32
    assert {n: p.shape for n, p in again.named_parameters()} == {n: p.shape for n, p in whole.named_parameters()}
    assert again.share is WHOLE


def test_what_cannot_be_split_says_why() -> None:
    def refused(case: Case, features: int) -> str:
        with pytest.raises(ConfigError) as caught:
            check_spread(case.trainer(ALONE).sae, 1, features)
        return str(caught.value)

    assert "is 4, and its 2 groups of features (sae.k) are not as many in each part" in refused(
        Case({"name": "groupmax", "k": 2}), 4
    )
    assert "is 3, which does not divide the 32 features of the SAE" in refused(Case({"name": "topk", "k": 2}), 3)
    check_spread(Case({"name": "groupmax", "k": 2}).trainer(ALONE).sae, 4, 2)


def test_features_that_cannot_be_split_are_refused_before_the_model_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session, "open_backend", lambda *given: pytest.fail("it is loaded"))
    config, world = Case({"name": "topk", "k": 2}, d_sae=33).config, World(features=Part(0, 2))
    with pytest.raises(ConfigError, match="distributed.features: is 2, which does not divide the 33 features"):
        session.Session({"sae": config}, saekit.default_manager(), world=world)


def test_a_subclass_that_changes_the_mathematics_says_so_anew() -> None:
    plugins = isolated_manager(
        fake_plugin("sae_architectures", "gain", build=GainSAE, config=GainConfig), builtins=True
    )
    options = GainConfig(d_sae=12)
    sae = build_module(plugins.find(SAE_ARCHITECTURES, options), options, 8, plugins)
    with pytest.raises(ConfigError, match="would split batches over processes, and GainSAE does not say"):
        check_spread(sae, 2, 1)
    standard: Any = type(CASES["standard"].trainer(ALONE).sae)
    changed = type("Louder", (standard,), {"losses": lambda self, x, step: None})
    other = CASES["standard"].trainer(ALONE).sae
    other.__class__ = changed
    with pytest.raises(ConfigError, match="Louder overrides losses, and not spreads_over"):
        check_spread(other, 2, 1)


def test_kernels_say_themselves_where_they_work() -> None:
    gated = CASES["gated"].trainer(ALONE).sae
    gated.kernels, gated.spread = "fast", frozenset({"data"})
    assert gated.why_reference() is None
    gated.spread = frozenset({"data", "features"})
    assert gated.why_reference() is None
    topk: Any = CASES["topk"].trainer(ALONE).sae
    inherits = type("Own", (type(topk.step_kernels[0]),), {})
    kind = type("OwnTopK", (type(topk),), {"step_kernels": (inherits(),)})
    topk.__class__, topk.kernels = kind, "fast"
    assert topk.why_reference() is None
    topk.spread = frozenset({"data"})
    assert topk.why_reference() == "the kernels do not work where data are split over processes"


def test_an_optimizer_must_work_number_by_number() -> None:
    class Whole(torch.optim.SGD):
        def __init__(self, config: Any, *, groups: Any, lr: float) -> None:
            super().__init__(groups, lr=lr)

    @attrs.frozen(kw_only=True)
    class WholeConfig(OptimizerConfig):
        """None."""

    plugins = isolated_manager(fake_plugin("optimizers", "whole", build=Whole, config=WholeConfig), builtins=True)
    weights = [("w", torch.nn.Parameter(torch.ones(2)))]
    from saekit.training import ScheduledOptimizer

    def build(features: Group) -> Any:
        return ScheduledOptimizer(
            weights, lambda **given: plugins.build("optimizers", WholeConfig(), **given), lambda step: 0.1,
            features=features,
        )  # fmt: skip

    build(Group())
    with pytest.raises(ConfigError, match="optimizer: is Whole, which does not say that it updates each number by"):
        build(Part(0, 2))


def test_signals_are_not_handled_while_processes_wait_for_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else one would end, for a signal, only when torch returns: where another has gone, at the timeout."""
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    both = (signal.SIGINT, signal.SIGTERM)
    seen: list[list[Any]] = []

    def joined(*rest: Any, **more: Any) -> World:
        seen.append([signal.getsignal(number) for number in both])
        if len(seen) == 3:
            raise RuntimeError("nobody answers")
        return ALONE

    monkeypatch.setattr(saekit.distributed.world, "_joined", joined)
    before = [signal.signal(signal.SIGINT, signal.default_int_handler), signal.signal(signal.SIGTERM, signal.SIG_IGN)]
    try:
        with open_world(DistributedConfig()):
            seen.append([signal.getsignal(number) for number in both])
        with pytest.raises(RuntimeError, match="nobody answers"), open_world(DistributedConfig()):
            pass
        seen.append([signal.getsignal(number) for number in both])
    finally:
        for number, handler in zip(both, before, strict=True):
            signal.signal(number, handler)
    outside, inside = [signal.default_int_handler, signal.SIG_IGN], [signal.SIG_DFL, signal.SIG_IGN]
    assert seen == [inside, outside, inside, outside]


@pytest.mark.parametrize("option", ["training.device", "model.device"])
def test_one_gpu_for_all_processes_is_refused(option: str) -> None:
    section, name = option.split(".")
    config = attrs.evolve(TrainConfig(), **{section: attrs.evolve(getattr(TrainConfig(), section), **{name: "cuda:1"})})
    world = World(Part(0, 2), Part(0, 2))
    with pytest.raises(ConfigError, match=rf"{option}: is 'cuda:1', one GPU for all processes .* set it to 'cuda'"):
        check_spreads([config], world)
    check_spreads([TrainConfig()], world)
    check_spreads([config], ALONE)
