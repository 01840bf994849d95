"""What a store holds is what a plain loop over the model and the SAE finds."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from support.ports import EMBED, LATE
from support.saes import at, drawn_sae

import saekit
from saekit.errors import ConfigError, DataError
from saekit.features import collect as collecting
from saekit.features import estimate, merging
from saekit.features.effects import statistics_tables, weight_tables
from saekit.runs.working_memory import peak_bytes
from saekit.testing import FakeBackend

HOOK = "blocks.1.hook_resid_post"


def column(feature: Any, shape: tuple[int, int]) -> torch.Tensor:
    found = torch.zeros(shape)
    found[feature.contexts, feature.positions] = torch.from_numpy(feature.values)
    return found


def bytes_of(store: saekit.FeatureStore) -> dict[str, bytes]:
    return {str(path.relative_to(store.folder)): path.read_bytes() for path in store.folder.rglob("*.safetensors")}


@pytest.mark.parametrize("name", ["one", "two"])
def test_activations_are_the_columns_of_the_full_encode(store: Any, dense: Any, name: str) -> None:
    for feature in store.saes[name]:
        assert torch.equal(column(feature, (60, 12)), dense[name][..., feature.index]), feature.index
        assert feature.complete
        assert feature.sampled.all()


def test_numbers_are_those_of_a_plain_loop(store: Any, dense: Any, contexts: torch.Tensor) -> None:
    for name, counted in (("one", torch.ones_like(contexts, dtype=torch.bool)), ("two", contexts != 0)):
        sae = store.saes[name]
        assert sae.tokens_counted == int(counted.sum())
        assert np.array_equal(sae.kept, counted)
        for feature in sae:
            values = dense[name][..., feature.index][counted].double()
            active = values[values != 0]
            assert feature.fired == len(active)
            assert feature.firing_fraction == len(active) / len(values)
            assert feature.mean == pytest.approx(float(values.mean()))
            assert feature.dead == (not len(active))
            assert (feature.maximum, feature.minimum) == (
                (float(active.max()), float(active.min())) if len(active) else (0, 0)
            )
            if len(active) > 1:
                counts, edges = np.histogram(active.numpy(), 50)
                assert np.allclose(feature.histogram().edges, edges)
                assert np.abs(feature.histogram().counts - counts).sum() <= 2, "a number at a bound may be in either"
                assert feature.histogram(7).counts.sum() == len(active)
    assert store.saes["one"].dead.tolist() == [4, 9]
    assert 3 in store.saes["two"].dead


def test_tokens_and_texts_need_no_model(store: Any, contexts: torch.Tensor) -> None:
    assert np.array_equal(store.contexts, contexts)
    assert store.vocabulary == tuple(FakeBackend().token_texts(range(128)))
    window = store.saes["one"].feature(0).window(2, 5, None)
    assert window.text == "".join(chr(token) for token in contexts[2].tolist())


@pytest.mark.parametrize("batch_size", [1, 7, 100])
def test_the_size_of_batches_changes_no_byte(
    saes: Any, collect: Any, store: Any, tmp_path: Path, batch_size: int
) -> None:
    other = collect(saes, tmp_path / "store", batch_size=batch_size)
    assert bytes_of(other) == bytes_of(store)


def test_one_forward_serves_all_saes(saes: Any, collect: Any, tmp_path: Path, contexts: torch.Tensor) -> None:
    backend = FakeBackend()
    collect(saes, tmp_path / "both", model=backend, batch_size=60)
    both = backend.forwards.count((60, 12))
    backend.forwards.clear()
    collect(saes["one"], tmp_path / "one", model=backend, batch_size=60)
    assert both == backend.forwards.count((60, 12)) == 1


def test_an_sae_gives_the_same_alone(saes: Any, collect: Any, store: Any, tmp_path: Path) -> None:
    alone = collect(saes["two"], tmp_path / "alone")
    own = {name: data for name, data in bytes_of(store).items() if name.startswith("sae-1")}
    assert {name.replace("sae-0", "sae-1"): data for name, data in bytes_of(alone).items() if "sae-" in name} == own
    assert alone.feature(5).fired == store.saes["two"].feature(5).fired


def test_some_features_are_what_they_are_among_all(saes: Any, collect: Any, store: Any, tmp_path: Path) -> None:
    some = collect(saes, tmp_path / "some", features={"one": [20, 3, 3], "two": range(5, 8)})
    assert some.saes["one"].indices.tolist() == [3, 20]
    assert some.saes["two"].indices.tolist() == [5, 6, 7]
    for name, sae in some.saes.items():
        for one in sae:
            other = store.saes[name].feature(one.index)
            assert np.array_equal(one.values, other.values)
            assert np.array_equal(one.positions, other.positions)
            assert one.partners() == other.partners()
            assert one.partners("jaccard") == other.partners("jaccard")
            assert one.neurons() == other.neurons()
            assert np.allclose(one.neighbors(), other.neighbors())
            assert one.alignment() == other.alignment()
    with pytest.raises(ConfigError, match="feature: 4 of one is not in the store, which has 2 of its 24; collect it"):
        some.saes["one"].feature(4)
    with pytest.raises(ConfigError, match="feature: must be 0 to 23 for one, found 24"):
        some.saes["one"].feature(24)
    with pytest.raises(ConfigError, match=r"several SAEs, one, two: choose one"):
        some.feature(3)


@pytest.mark.parametrize("dtype", ["float64", "bfloat16"])
def test_values_keep_their_type(collect: Any, tmp_path: Path, dtype: str, contexts: torch.Tensor) -> None:
    sae = at(drawn_sae(8, d_sae=12).to(getattr(torch, dtype)), HOOK, model_name="fake")
    store = collect(sae, tmp_path / "store")
    with torch.no_grad():
        expected = sae.encode(FakeBackend().run(contexts, read=[HOOK]).held[HOOK])
    feature = store.feature(2)
    found = torch.zeros(60, 12, dtype=expected.dtype)
    found[feature.contexts, feature.positions] = torch.from_numpy(feature.values).to(expected.dtype)
    assert torch.equal(found, expected[..., 2])


def test_transcoders_and_several_sites_have_stores(collect: Any, tmp_path: Path, contexts: torch.Tensor) -> None:
    transcoder = at(drawn_sae(8, 8, d_sae=12), "hook_embed", targets=(HOOK,), model_name="fake")
    store = collect(transcoder, tmp_path / "transcoder")
    with torch.no_grad():
        expected = transcoder.encode(FakeBackend().run(contexts, read=["hook_embed"]).held["hook_embed"])
    assert torch.equal(column(store.feature(1), (60, 12)), expected[..., 1])
    assert [*store.sae.about.targets] == [HOOK]
    assert store.feature(1).logits is not None

    ports = saekit.Ports({EMBED.name: 8, LATE.name: 8})
    crosscoder = saekit.SAE.from_dict({"name": "crosscoder", "d_sae": 12}, ports=ports)
    several = collect(at(crosscoder, EMBED, LATE, model_name="fake"), tmp_path / "several")
    held = FakeBackend().run(contexts, read=[EMBED.hook_name, LATE.hook_name]).held
    with torch.no_grad():
        expected = crosscoder.encode(torch.cat([held[EMBED.hook_name], held[LATE.hook_name]], -1))
    assert torch.allclose(column(several.feature(1), (60, 12)), expected[..., 1], atol=1e-6)
    assert several.feature(1).logits is None
    assert several.sae.why_no_logits == f"what is written are several sites, {EMBED.name}, {LATE.name}"


def test_a_temporal_sae_reads_sequences(collect: Any, tmp_path: Path, contexts: torch.Tensor) -> None:
    sae = at(
        saekit.SAE.from_dict({"name": "temporal", "d_sae": 16, "d_in": 8, "n_heads": 2, "bottleneck_factor": 4}),
        HOOK,
        model_name="fake",
    )
    store = collect(sae, tmp_path / "store")
    with torch.no_grad():
        expected = sae.encode(FakeBackend().run(contexts, read=[HOOK]).held[HOOK])
    for feature in store.sae:
        assert torch.allclose(column(feature, (60, 12)), expected[..., feature.index], atol=1e-6)


def test_of_a_busy_feature_a_fair_sample_and_the_largest_are_kept(
    saes: Any, collect: Any, store: Any, tmp_path: Path
) -> None:
    bounded = collect(saes["one"], tmp_path / "store", max_per_feature=40, top_kept=5)
    busiest = int(store.saes["one"].fired.argmax())
    whole, some = store.saes["one"].feature(busiest), bounded.feature(busiest)
    assert whole.fired == some.fired > 40
    assert not some.complete
    assert some.sampled.sum() <= 40
    assert np.array_equal(some.histogram().counts, whole.histogram().counts), "it is of all"
    assert some.top(5) == whole.top(5), "with all activations around them"
    with pytest.raises(ConfigError, match="n: must be 5 or less for feature"):
        some.top(6)
    with pytest.raises(ConfigError, match="a sample is stored, not all"):
        some.histogram(10)
    for quantile in some.quantiles(4, 6, window=None):
        for window in quantile.windows:
            assert window == whole.window(window.context, window.position, None)
            assert quantile.low <= window.value <= quantile.high
    rarest = min(store.saes["one"], key=lambda one: one.fired or 1e9)
    assert bounded.feature(rarest.index).complete


def test_shares_of_a_feature_that_is_complete_by_its_largest_are_exact(
    saes: Any, collect: Any, store: Any, tmp_path: Path
) -> None:
    bounded = collect(saes["one"], tmp_path / "store", max_per_feature=10, top_kept=1000)
    busiest = int(store.saes["one"].fired.argmax())
    whole, some = store.saes["one"].feature(busiest), bounded.feature(busiest)
    assert some.complete
    assert some.sampled.all()
    assert some.quantiles(4, 5) == whole.quantiles(4, 5)


def test_shares_and_draws_of_a_sample_stand_for_all(saes: Any, collect: Any, store: Any, tmp_path: Path) -> None:
    bounded = collect(saes["one"], tmp_path / "store", max_per_feature=40, top_kept=12)
    busiest = int(store.saes["one"].fired.argmax())
    whole, some = store.saes["one"].feature(busiest), bounded.feature(busiest)
    assert some.quantiles(1, 1)[0].share == pytest.approx(1), "all tokens are in the one interval"
    high, *low = some.quantiles(8, 10_000, zeros=False)
    exact = whole.quantiles(8, 0, zeros=False)
    assert high.share == exact[0].share, "of the largest all are stored"
    assert sum(one.share for one in low) == pytest.approx(sum(one.share for one in exact[1:]), rel=0.1)
    places = [*zip(some.contexts.tolist(), some.positions.tolist(), some.values, some.sampled, strict=True)]
    others = 0
    for quantile in low[-3:]:
        inside = [one for one in places if quantile.low <= float(one[2]) <= quantile.high]
        drawn = {(one.context, one.position) for one in quantile.windows}
        assert drawn == {(context, position) for context, position, _, sampled in inside if sampled}
        others += sum(not sampled for *_, sampled in inside)
    assert others, "there are some in contexts that are stored for their largest, which no draw may prefer"


def test_what_it_takes_is_said_before_and_is_so(
    saes: Any, tmp_path: Path, collect: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    many = torch.randint(1, 128, (150, 64), generator=torch.Generator().manual_seed(1))
    store = collect(saes["one"], tmp_path / "store", contexts=many, verbose=True)
    said = capsys.readouterr().err
    (line,) = [line for line in said.splitlines() if "of memory beside the model" in line]
    stored = sum(path.stat().st_size for path in store.folder.rglob("*") if path.is_file())
    told = float(line.rpartition("while it works, ")[2].split(" MB in the end")[0]) * 1e6
    assert told == pytest.approx(stored, rel=0.08)


def test_memory_does_not_grow_with_the_text_and_is_what_was_said(
    saes: Any, collect: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(collecting, "PART_TOKENS", 1 << 9)
    monkeypatch.setattr(collecting, "UNIT_TOKENS", 1 << 8)
    monkeypatch.setattr(merging, "_ENTRIES", 1 << 10)
    generator = torch.Generator().manual_seed(1)
    peaks = []
    for number in (30, 120):
        some = torch.randint(1, 128, (number, 32), generator=generator)
        peaks.append(peak_bytes(partial(collect, saes["one"], tmp_path / str(number), contexts=some)))
    assert peaks[1] < 1.3 * peaks[0] + 8 * 120 * 32, "but for the tokens"
    assert peaks[1] < 3e8


def test_copies_of_the_decoder_are_in_what_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a wide SAE and few features, where they are most of it; what is constant is left out."""
    monkeypatch.setattr(estimate, "PART_ENTRIES", 1 << 8)
    monkeypatch.setattr(estimate, "UNIT_TOKENS", 1 << 6)
    monkeypatch.setattr(estimate, "_MERGING", 0)
    wide = saekit.SAE.from_dict({"name": "topk", "k": 2, "d_sae": 1 << 12, "d_in": 64})
    one: Any = SimpleNamespace(sae=wide, features=np.array([1, 2]), dtype=torch.float32)
    seen = estimate.Seen(64, 0, 0, 0, torch.zeros(2))
    told = estimate.estimated([one], [seen], (1, 64), estimate.Options(), 0.0)
    peak = max(peak_bytes(lambda: weight_tables(one, 20)), peak_bytes(lambda: statistics_tables(one)))
    assert 0.5 * told.memory < peak < told.memory
    more = estimate.estimated([one], [seen], (1, 64), estimate.Options(), 0.0, 50_000)
    assert more.seconds > told.seconds > 0, "logits take time, too"


def test_parts_grow_with_the_sums_that_are_written_with_each(saes: Any) -> None:
    one = SimpleNamespace(features=np.arange(1000), sae=SimpleNamespace(d_in=100, d_sae=1000))
    sums = 8 * (1000 * 100 + 3 * 1000 + 2 * 100)
    assert estimate.part_scale([one], 1000) == pytest.approx(sums / 40_000)  # type: ignore[list-item]
    assert estimate.part_scale([one], 1 << 20) == 1  # type: ignore[list-item]


@pytest.mark.parametrize(
    ("features", "message"),
    [
        ([24], "features: must be numbers from 0 to 23 for one, found 24"),
        ([-1, 2], "found -1"),
        ([], "found none"),
        ([1.5], "found 1.5"),
        ("best", "must be numbers of features or \"all\", found 'best'"),
        ({"three": [1]}, "names 'three', and the SAEs are one"),
    ],
)
def test_features_out_of_range_are_refused(
    saes: Any, collect: Any, tmp_path: Path, features: Any, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        collect({"one": saes["one"]}, tmp_path / "store", features=features)
    assert not (tmp_path / "store").exists()


def test_what_cannot_be_collected_says_why(saes: Any, collect: Any, tmp_path: Path, contexts: torch.Tensor) -> None:
    with pytest.raises(ConfigError, match="folder: is missing: the SAE is in no folder of its own"):
        collect(saes["one"], None)
    with pytest.raises(ConfigError, match="max_per_feature: must be a whole number of 1 or more, found 0"):
        collect(saes["one"], tmp_path / "a", max_per_feature=0)
    nameless = at(drawn_sae(8), HOOK)
    with pytest.raises(ConfigError, match="does not say which model"):
        collect(nameless, tmp_path / "b", model=None)
    damaged = at(drawn_sae(8), HOOK, model_name="fake")
    with torch.no_grad():
        damaged.W_enc.fill_(3e38)
    with pytest.raises(DataError, match="gives activations that are no finite numbers"):
        collect(damaged, tmp_path / "c")
    assert not (tmp_path / "c").exists(), "nothing is left of what never began"
    with pytest.raises(ConfigError, match="no token of the contexts counts for"):
        collect(saes["two"], tmp_path / "d", contexts=torch.zeros(2, 5, dtype=torch.long))
