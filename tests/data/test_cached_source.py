"""The cached source: every row once in each reading, from mapped files, and training as from the model itself."""

from __future__ import annotations

import itertools
import json
import os
import random
from collections import Counter
from pathlib import Path

import attrs
import numpy as np
import pytest
import torch
from support.caches import (
    DOCUMENTS,
    HEAD,
    LAST,
    SITE,
    SIZE,
    activations,
    cache,
    config,
    hashes,
    packed,
    rows_of,
    source,
    tensors,
    threads,
    train,
    with_options,
    write,
)

import saekit
from saekit.data.cache import CachedActivations, Manifest, read
from saekit.data.cache.manifest import Shard
from saekit.errors import DataError
from saekit.testing import FakeBackend

PREFETCH = pytest.mark.parametrize("prefetch", [False, True], ids=["plain", "prefetched"])


@PREFETCH
@pytest.mark.parametrize("block", [1, 4, 64])
@pytest.mark.parametrize("batch", [7, 24, 1000])
def test_a_reading_serves_every_row_once_with_its_origin(
    tmp_path: Path, batch: int, block: int, prefetch: bool
) -> None:
    write(tmp_path / "c", 13)
    read = source(tmp_path / "c", batch=batch, block_rows=block, prefetch=prefetch)
    batches = list(read)
    read.close()
    n = 13 * 8
    assert [len(found) for found in batches] == [batch] * (n // batch) + [n % batch] * (n % batch > 0)
    rows = rows_of(batches)[:, 0].long()
    assert sorted(rows.tolist()) == list(range(n))
    assert rows.tolist() != list(range(n)) or batch >= n
    for found in batches:
        number = found.activations[SITE][:, 0].long()
        assert torch.equal(found.activations[SITE], number[:, None].float().repeat(1, 8))
        assert torch.equal(found.activations[HEAD], -number[:, None].float().repeat(1, 4))
        assert torch.equal(found.tokens, number * 3 % 1000)
        assert torch.equal(found.documents, number * 2**33)
        assert torch.equal(found.positions, number % 8)


def test_nothing_of_the_model_is_lost(tmp_path: Path) -> None:
    """All rows of the model's activations on all of the text, once in each reading, in a new order each time."""
    run, text = config(tmp_path, dataset={"on_exhausted": "stop"}), DOCUMENTS[:20]
    manifest = cache(run, tokens=10**6, dataset=text)
    tokens, documents = packed(documents=text)
    assert len(manifest.shards) > 10
    wanted = Counter(
        zip(documents.flatten().tolist(), tokens.flatten().tolist(), itertools.cycle(range(SIZE)), strict=False)
    )
    read = source(tmp_path / "cache", batch=32, repeat=True, identity=dict(manifest.identity))
    assert manifest.rows % 32 == 0, "so that readings end where batches do"
    orders = []
    for _ in range(2):
        batches = [next(read) for _ in range(manifest.rows // 32)]
        origins = [torch.cat([getattr(b, name) for b in batches]) for name in ("documents", "tokens", "positions")]
        assert Counter(zip(*(origin.tolist() for origin in origins), strict=True)) == wanted
        for site, exact in activations(origins[1]).items():
            if site != LAST:
                assert torch.equal(rows_of(batches, site), exact)
        orders.append(origins[0].tolist())
    read.close()
    assert orders[0] != orders[1]
    result = train(with_options(run, "training", training_tokens=10**6), dataset=text)
    assert result.metrics["details/n_training_tokens"] == manifest.rows


def test_a_batch_is_of_all_shards(tmp_path: Path) -> None:
    write(tmp_path / "c", 400, per_shard=40, at_once=40)
    for block in (1, 16):
        first, other = source(tmp_path / "c", batch=320, block_rows=block), source(tmp_path / "c", batch=320, seed=4)
        rows = next(first).activations[SITE][:, 0].long()
        counts = torch.bincount(rows // 320, minlength=10)
        assert ((counts - 32) ** 2 / 32).sum() < 40, "chi squared with nine degrees of freedom"
        assert not torch.equal(rows, next(other).activations[SITE][:, 0].long()), "the seed decides"
        first.close()
        other.close()


@pytest.mark.parametrize("taken", [0, 1, 4, 5, 13])
@pytest.mark.parametrize(("saver", "loader"), [(False, False), (False, True), (True, False), (True, True)])
def test_a_saved_state_goes_on_with_the_very_same_batches(
    tmp_path: Path, taken: int, saver: bool, loader: bool
) -> None:
    write(tmp_path / "c", 13)  # 104 rows: the fifth batch of 24 is of two readings
    for block in (1, 8):
        one = source(tmp_path / "c", repeat=True, prefetch=saver, block_rows=block)
        two = source(tmp_path / "c", repeat=True, prefetch=loader, block_rows=block)
        for _ in range(2):
            next(two)  # it may have been anywhere
        for _ in range(taken):
            next(one)
        two.load_state_dict(json.loads(json.dumps(one.state_dict())))
        for _ in range(14):
            a, b = next(one), next(two)
            assert torch.equal(a.activations[SITE], b.activations[SITE])
            assert torch.equal(a.documents, b.documents)
        one.close()
        two.close()


def test_a_saved_state_outlives_an_extension_of_the_cache(tmp_path: Path) -> None:
    write(tmp_path / "c", 13)
    one = source(tmp_path / "c", repeat=True)
    for _ in range(3):
        next(one)
    state = one.state_dict()
    write(tmp_path / "c", 20)
    two = source(tmp_path / "c", repeat=True)
    assert not torch.equal(next(one).activations[SITE], next(two).activations[SITE])
    one.load_state_dict(state)
    two.load_state_dict(state)
    for _ in range(10):
        assert torch.equal(next(one).activations[SITE], next(two).activations[SITE])
    with pytest.raises(DataError, match="has 104 rows, and when the run was saved it had 160: restore it, or start"):
        one.load_state_dict(source(tmp_path / "c").state_dict())
    one.close()
    two.close()


@PREFETCH
def test_a_look_uses_nothing_up(tmp_path: Path, prefetch: bool) -> None:
    write(tmp_path / "c", 13)
    one, two = (source(tmp_path / "c", repeat=True, prefetch=prefetch) for _ in range(2))
    assert sorted(one.peek()[SITE][:, 0].tolist()) == list(range(104))
    for _ in range(4):
        assert torch.equal(next(one).activations[SITE], next(two).activations[SITE])
    assert len(one.peek()[SITE]) == 8, "those that are left"
    for _ in range(9):
        assert torch.equal(next(one).activations[SITE], next(two).activations[SITE])
    assert len(one.peek()[SITE]) == 104, "at the end of a reading, those of the next"
    assert torch.equal(next(one).activations[SITE], next(two).activations[SITE])
    one.close()
    two.close()


def test_batches_larger_than_the_cache(tmp_path: Path) -> None:
    write(tmp_path / "c", 2)
    read = source(tmp_path / "c", batch=40, repeat=True)
    assert torch.bincount(next(read).activations[SITE][:, 0].long()).tolist().count(3) == 8
    read.close()


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="looks for mappings where Linux lists them")
def test_nothing_is_left_after_close(tmp_path: Path) -> None:
    running = threads()
    write(tmp_path / "c", 13)
    assert threads() == running

    def mapped() -> int:
        return Path("/proc/self/maps").read_text().count(str(tmp_path))

    before = len(list(Path("/proc/self/fd").iterdir()))
    read = source(tmp_path / "c", repeat=True)
    batch = next(read)
    assert [thread.name for thread in threads() - running] == ["saekit-prefetch"]
    assert mapped() >= 16, "four files of four shards"
    read.close()
    assert threads() == running
    assert mapped() == 0
    assert len(list(Path("/proc/self/fd").iterdir())) == before
    assert batch.activations[SITE].sum() > 0, "batches are copies"
    read.close()


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads its memory where Linux says it")
def test_files_are_not_read_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of a file of 4 GB, with holes where nobody looks."""
    monkeypatch.setattr(read, "available_memory", lambda: 0)
    manifest = attrs.evolve(write(tmp_path / "c", 3, per_shard=3), shards=())
    contexts = 2**27 // 8
    home = tmp_path / "c/shard-00000"
    for name, row in [(f"{SITE.name}.safetensors", 32), ("tokens.safetensors", 4), ("documents.safetensors", 8)]:
        os.truncate(home / name, 4096 + contexts * 8 * row)
    rows = CachedActivations(tmp_path / "c", attrs.evolve(manifest, shards=[Shard(contexts, {})]), [SITE])
    assert len(rows) == 2**27

    def resident() -> int:
        (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmRSS"))
        return int(line.split()[1]) * 1024

    rows.advise(single_rows=True)
    before = resident()
    wanted = np.array(sorted([5, *random.Random(0).sample(range(30, 2**27), 500)]))
    batch = rows.take(wanted)
    assert batch.activations[SITE][:, 0].tolist() == [5.0] + [0.0] * 500
    assert resident() - before < 200e6
    rows.close()


# ---- training


def test_training_from_a_cache(tmp_path: Path) -> None:
    running = threads()
    cache(config(tmp_path), tokens=10**6)
    backend = FakeBackend()
    before = hashes(tmp_path / "cache")
    result = train(config(tmp_path), backend)
    assert result.sae.d_in == 8
    assert set(backend.forwards) == {(2, 7)}, "the model is asked for its widths, and no more"
    again = train(with_options(config(tmp_path), "activations.source", prefetch=False))
    assert all(torch.equal(a, b) for a, b in zip(result.sae.parameters(), again.sae.parameters(), strict=True))
    head = train(config(tmp_path, site={"hook_name": HEAD.hook_name, "hook_head_index": 1}))
    assert head.sae.d_in == 4
    assert hashes(tmp_path / "cache") == before
    assert threads() == running


def test_a_cache_that_ends(tmp_path: Path) -> None:
    running = threads()
    cache(config(tmp_path), tokens=50 * SIZE)  # 800 rows for 2,000 tokens

    def run(on_exhausted: str, tokens: int = 2000) -> saekit.TrainResult:
        return train(config(tmp_path, dataset={"on_exhausted": on_exhausted}, training={"training_tokens": tokens}))

    assert run("repeat").metrics["details/n_training_tokens"] == 2000
    stopped = run("stop")
    assert stopped.metrics["details/n_training_tokens"] == 800
    assert saekit.SAE.load(stopped.folder / "sae").d_sae == 64
    with pytest.raises(
        DataError, match=r"the data ended after 800 activations, and 2,000 were asked for \(training.tr"
    ):
        run("error")
    assert len(list(tmp_path.glob("runs/*/checkpoints/step-4/checkpoint.json"))) == 2, "what was learned is kept"
    assert run("error", 800).metrics["details/n_training_tokens"] == 800
    assert threads() == running


def scaled(size: float) -> FakeBackend:
    backend = FakeBackend()
    backend._weights = backend._embedding() * size
    return backend


def test_activations_are_normalized_as_live_ones_are(tmp_path: Path) -> None:
    """The factor is that of the cached rows, and the weights that are saved work on raw activations."""

    def run(size: float, source: str = "cached") -> saekit.TrainResult:
        options = config(
            tmp_path / str(size), sae={"b_dec_init_method": "mean"},
            training={"training_tokens": 4000, "lr": 0.02}, evals={"run": ["reconstruction"], "held_out_every": 5},
        )  # fmt: skip
        options["activations"]["normalize_activations"] = "expected_average_only_in"
        if source == "live":
            options["activations"]["source"] = {"name": "live", "store_batch_size_prompts": 8, "n_batches_in_buffer": 4}
        elif not (tmp_path / str(size)).exists():
            cache(options, scaled(size))
        return train(options, scaled(size))

    one, fifty, live = run(1.0), run(50.0), run(50.0, "live")
    manifest = Manifest.load(tmp_path / "50.0/cache")
    rows = torch.cat([shard[f"{SITE.name}.safetensors"] for shard in tensors(tmp_path / "50.0/cache", manifest)])
    scale = fifty.sae.info.metadata["activation_scale"]
    assert scale == pytest.approx(8**0.5 / rows.norm(dim=1).mean().item(), rel=1e-5)
    assert one.sae.info.metadata["activation_scale"] / scale == pytest.approx(50, rel=1e-5)
    assert live.sae.info.metadata["activation_scale"] == pytest.approx(scale, rel=0.05)
    for key in ("evals/explained_variance", "evals/l0", "losses/mse_loss", "evals/l2_ratio"):
        assert fifty.metrics[key] == pytest.approx(one.metrics[key], rel=1e-3)
    for key in ("evals/explained_variance", "evals/l2_ratio"):
        assert fifty.metrics[key] == pytest.approx(live.metrics[key], rel=0.1)
    assert fifty.metrics["evals/explained_variance"] > 0.5, "measured on raw activations"
    loaded = saekit.SAE.load(fifty.folder / "sae")
    missed = (loaded(rows) - rows).square().sum() / (rows - rows.mean(0)).square().sum()
    assert missed < 0.5
