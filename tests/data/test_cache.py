"""Activations on disk: every row of the model's with its origin, read in any order, and only where they fit."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import attrs
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
    files,
    hashes,
    manager,
    marks,
    packed,
    source,
    tensors,
    train,
    with_options,
    write,
)

import saekit
from saekit.data import Corpus
from saekit.data.cache import Manifest, verify_cache
from saekit.errors import ConfigError, DataError, ModelError, StorageError
from saekit.planning.cache import plan_cache
from saekit.runs.opening import open_stream
from saekit.testing import FakeBackend

# ---- writing


def test_every_row_is_written_with_its_origin(tmp_path: Path) -> None:
    backend = FakeBackend()
    tokens, documents = packed()
    manifest = cache(config(tmp_path), backend, tokens=50 * SIZE - 3)
    assert (manifest.contexts, manifest.rows) == (50, 50 * SIZE)
    assert [shard.contexts for shard in manifest.shards] == [10] * 5
    assert sum(shape[0] for shape in backend.forwards if shape[1] == SIZE) == 50, "all sites in one pass"
    rows = activations(tokens)
    for number, shard in enumerate(tensors(tmp_path / "cache", manifest)):
        contexts, vectors = slice(10 * number, 10 * (number + 1)), slice(160 * number, 160 * (number + 1))
        assert torch.equal(shard["tokens.safetensors"], tokens[contexts].int())
        assert torch.equal(shard["documents.safetensors"], documents[contexts])
        for site in (SITE, LAST, HEAD):
            assert torch.equal(shard[f"{site.name}.safetensors"], rows[site][vectors])
    assert {path.name for path in (tmp_path / "cache").iterdir()} == {
        ".lock", "manifest.json", *(f"shard-{number:05d}" for number in range(5))
    }  # fmt: skip


def test_the_manifest_says_what_the_cache_is(tmp_path: Path) -> None:
    made = cache(config(tmp_path), tokens=25 * SIZE)
    table = json.loads((tmp_path / "cache/manifest.json").read_text())
    assert table["rows"] == 25 * SIZE
    assert table["identity"]["model.backend"] == {"name": "test:fake", "value": 0}
    plain = {name: value for name, value in table["identity"].items() if not isinstance(value, (dict, list))}
    assert plain.items() >= {
        "model.name": "fake", "model.dtype": "float32", "dataset.path": "in memory",
        "dataset.split": "train", "dataset.context_size": SIZE, "dataset.begin_batch_token": 0,
        "dataset.sequence_separator_token": 0, "evals.held_out_every": 0,
    }.items()  # fmt: skip
    assert {"dataset.revision", "dataset.name", "dataset.column", "model.autocast"} <= set(table["identity"])
    assert [(site["site"]["hook_name"], site["d_in"], site["dtype"]) for site in table["sites"]] == [
        (SITE.hook_name, 8, "float32"), (LAST.hook_name, 8, "float32"), (HEAD.hook_name, 4, "float32")
    ]  # fmt: skip
    assert table["saekit_version"] == saekit.__version__
    on_disk = hashes(tmp_path / "cache")
    for number, shard in enumerate(table["shards"]):
        assert len(shard["files"]) == 5
        for name, entry in shard["files"].items():
            path = f"shard-{number:05d}/{name}"
            assert entry["sha256"] == on_disk[path]
            assert entry["bytes"] == (tmp_path / "cache" / path).stat().st_size
    assert Manifest.load(tmp_path / "cache") == made


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float64"])
def test_the_type_on_disk(tmp_path: Path, dtype: str) -> None:
    run = config(tmp_path, dataset={"on_exhausted": "stop"})
    manifest = cache(run, dtype=dtype, tokens=15 * SIZE)
    exact = activations(packed()[0][:15])[SITE].to(getattr(torch, dtype))
    shards = tensors(tmp_path / "cache", manifest)
    assert torch.equal(torch.cat([shard[f"{SITE.name}.safetensors"] for shard in shards]), exact)
    assert manifest.sites[0].row_bytes == 8 * exact.itemsize
    (batch,) = source(tmp_path / "cache", sites=(SITE,), batch=1000, identity=dict(manifest.identity))
    assert torch.equal(batch.activations[SITE], exact)
    assert train(run).metrics["details/n_training_tokens"] == 240


def test_float16_is_refused_where_it_would_make_infinities(tmp_path: Path) -> None:
    backend = FakeBackend()
    backend._weights = backend._embedding() * 30_000
    with pytest.raises(DataError, match=r"blocks.* as large as 2\d\d,\d+, which float16 cannot hold.*=bfloat16"):
        cache(config(tmp_path), backend, dtype="float16")
    assert cache(config(tmp_path), backend, dtype="bfloat16").rows


def test_shards_are_as_large_as_asked_for(tmp_path: Path) -> None:
    run = saekit.load_config(
        with_options(config(tmp_path), "activations.cache", shard_megabytes=3), plugins=manager(FakeBackend())
    )
    corpus = Corpus.of(run.dataset, run.evals, DOCUMENTS)
    stream = open_stream(run, corpus, manager(FakeBackend()), FakeBackend(), [HEAD, SITE])
    assert plan_cache(run, stream, SIZE).contexts_per_shard == 3_000_000 // (8 * 4 * SIZE), "the widest site's file"


def test_the_text_that_ends(tmp_path: Path) -> None:
    tokens, _ = packed()
    there = len(tokens) * SIZE
    run = config(tmp_path, dataset={"on_exhausted": "error"})
    with pytest.raises(
        DataError, match=rf"ended after {there:,} activations, and 100,000 were asked for; those are in"
    ):
        cache(run, tokens=100_000)
    run = config(tmp_path)
    manifest = cache(run, tokens=100_000)
    assert manifest.ended
    assert manifest.contexts == len(tokens), "the tail does not fill a context, and nothing is read twice"
    assert manifest.contexts % 10, "a short last shard"
    last = tensors(tmp_path / "cache", manifest)[-1]
    assert torch.equal(last["tokens.safetensors"], tokens[-(len(tokens) % 10) :].int())
    assert verify_cache(tmp_path / "cache") == manifest
    with pytest.raises(DataError, match="does not fill one context of 16 tokens"):
        cache(config(tmp_path / "short"), dataset=[{"text": "x"}])
    assert cache(config(tmp_path / "short")).rows, "nothing was there to go on with"
    fewer = cache(config(tmp_path, dataset={"on_exhausted": "error"}), tokens=50 * SIZE)
    assert fewer.contexts == len(tokens), "all that is asked for now is there"


@pytest.mark.parametrize("first", [20, 25], ids=["whole shards", "a short shard"])
def test_more_tokens_go_on_where_the_text_was(tmp_path: Path, first: int) -> None:
    run, tokens = config(tmp_path), packed()[0]
    before = marks(tmp_path / "cache", cache(run, tokens=first * SIZE))
    backend = FakeBackend()
    manifest = cache(run, backend, tokens=47 * SIZE)
    assert manifest.contexts == 47
    assert sum(shape[0] for shape in backend.forwards if shape[1] == SIZE) == 47 - first
    assert before.items() <= marks(tmp_path / "cache", manifest).items(), "finished shards are left alone"
    shards = tensors(tmp_path / "cache", manifest)
    assert torch.equal(torch.cat([shard["tokens.safetensors"] for shard in shards]), tokens[:47].int())
    rows = torch.cat([shard[f"{SITE.name}.safetensors"] for shard in shards])
    assert torch.equal(rows, activations(tokens[:47])[SITE])
    everything = hashes(tmp_path / "cache")
    assert cache(run, tokens=12 * SIZE) == manifest, "fewer are there already"
    assert hashes(tmp_path / "cache") == everything


def test_streamed_text_goes_on_where_it_was(tmp_path: Path) -> None:
    """The library's own position in a stream of records is kept in the manifest."""
    file = tmp_path / "text.jsonl"
    file.write_text("".join(json.dumps(document) + "\n" for document in DOCUMENTS))
    run = config(tmp_path, dataset={"path": str(file)})
    cache(run, tokens=33 * SIZE, dataset=None)
    assert json.loads((tmp_path / "cache/manifest.json").read_text())["position"]["reader"]["records"]
    manifest = cache(run, tokens=10**6, dataset=None)
    shards = tensors(tmp_path / "cache", manifest)
    tokens, documents = packed()
    assert torch.equal(torch.cat([shard["tokens.safetensors"] for shard in shards]), tokens.int())
    assert torch.equal(torch.cat([shard["documents.safetensors"] for shard in shards]), documents)


# ---- the disk


def test_the_space_needed_is_known_before(tmp_path: Path) -> None:
    documents = [{"text": f"{n} " * 2000} for n in range(200)]
    run = with_options(config(tmp_path), "activations.cache", tokens=100_000, batch_size_prompts=512)
    manifest = cache(run, per_shard=2000, dataset=documents)
    assert manifest.contexts == 6250
    planned = attrs.evolve(manifest, shards=(), position=None)
    estimate = planned.bytes_for(6250)
    there = list(files(tmp_path / "cache"))
    assert estimate == sum(path.stat().st_size for path in there if path.name != "manifest.json")
    for whole in (sum(path.stat().st_size for path in there), sum(path.stat().st_blocks * 512 for path in there)):
        assert estimate == pytest.approx(whole, rel=0.01)
    # For more on top of a short last shard, too.
    cache(run, per_shard=2000, dataset=documents, tokens=120_000)
    more = sum(path.stat().st_size for path in files(tmp_path / "cache") if path.name != "manifest.json")
    assert manifest.bytes_for(7500) == more


def test_too_little_space_is_refused_before_the_model_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    free = 0
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**12, 10**12 - free, free))
    run, backend = config(tmp_path), FakeBackend()
    needed = 100 * SIZE * (8 * 4 + 8 * 4 + 4 * 4 + 4 + 8) + 10 * 5 * 4096
    free = needed - 1
    words = r"cache' needs [0-9.]+ MB, and the disk has [0-9.]+ MB free. Write fewer tokens"
    with pytest.raises(StorageError, match=words):
        cache(run, backend, tokens=100 * SIZE)
    assert backend.forwards == [(2, 7)], "the probe for the widths"
    assert not list(files(tmp_path / "cache"))
    free = needed
    assert cache(run, tokens=100 * SIZE).contexts == 100
    free = 0
    assert cache(run, tokens=100 * SIZE).contexts == 100, "nothing is missing"
    free = (needed // 10) - 1
    with pytest.raises(StorageError, match=r"activations.cache.dtype\), or elsewhere \(activations.cache.folder\)"):
        cache(run, tokens=110 * SIZE)
    free = needed // 10
    assert cache(run, tokens=110 * SIZE).contexts == 110, "what is there needs no room"


def test_a_large_number_is_said_in_gigabytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**12, 10**12 - 5, 2 * 10**9))
    with pytest.raises(StorageError, match=r"needs 920\.\d\d GB, and the disk has 2.00 GB free"):
        cache(config(tmp_path), tokens=10**10, per_shard=100_000)


# ---- what does not fit


def test_a_cache_that_is_another_one_is_not_gone_on_with(tmp_path: Path) -> None:
    cache(config(tmp_path), tokens=10 * SIZE)
    before = hashes(tmp_path / "cache")
    other = config(tmp_path, dataset={"context_size": 32, "prepend_bos": False}, model={"dtype": "float64"})
    with pytest.raises(DataError, match="holds another activation cache, so it cannot be gone on with") as caught:
        cache(other, sites=[], dtype="float16", per_shard=5)
    lines = {line.strip() for line in str(caught.value).splitlines() if line.startswith("  - ")}
    assert lines == {
        "- dataset.context_size: there 16, wanted 32",
        "- dataset.begin_batch_token: there 0, wanted None",
        "- model.dtype: there 'float32', wanted 'float64'",
        f"- sites' name: there ['{SITE.name}', '{LAST.name}', '{HEAD.name}'], wanted ['{SITE.name}']",
        "- sites' d_in: there [8, 8, 4], wanted [8]",
        "- sites' dtype: there ['float32', 'float32', 'float32'], wanted ['float16']",
        "- context_size: there 16, wanted 32",
    }
    assert "Remove it, or choose another folder (activations.cache.folder)" in str(caught.value)
    assert hashes(tmp_path / "cache") == before


def test_a_folder_with_other_things_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "cache/shard-00003").mkdir(parents=True)
    (tmp_path / "cache/thesis.tex").write_text("years of work")
    with pytest.raises(DataError, match=r"is no activation cache and holds shard-00003, thesis.tex; choose another"):
        cache(config(tmp_path))
    assert {path.name for path in (tmp_path / "cache").iterdir()} == {"shard-00003", "thesis.tex"}
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="cannot write the activation cache .*file.*: File exists"):
        write(tmp_path / "file", 3)


def test_a_manifest_that_does_not_fit_the_run_is_refused_field_by_field(tmp_path: Path) -> None:
    manifest = cache(config(tmp_path))
    backend = FakeBackend()
    backend.name = "another"
    run = config(
        tmp_path, dataset={"context_size": 32, "prepend_bos": False, "sequence_separator_token": 5, "split": "dev"},
        site={"hook_name": "hook_embed"}, evals={"held_out_every": 20}, model={"dtype": "bfloat16", "autocast": True},
    )  # fmt: skip
    with pytest.raises(DataError, match=r"the activation cache '.*cache' was not made for this run:\n") as caught:
        train(run, backend)
    lines = [line for line in str(caught.value).splitlines() if line.startswith("  - ")]
    assert lines == [
        "  - model.name: the cache has 'fake', the run 'another'",
        "  - model.dtype: the cache has 'float32', the run 'bfloat16'",
        "  - model.autocast: the cache has False, the run True",
        "  - dataset.split: the cache has 'train', the run 'dev'",
        "  - dataset.context_size: the cache has 16, the run 32",
        "  - dataset.begin_batch_token: the cache has 0, the run None",
        "  - dataset.sequence_separator_token: the cache has 0, the run 5",
        "  - evals.held_out_every: the cache has 0, the run 20",
        f"  - site: the cache has {SITE.name}, {LAST.name}, {HEAD.name}, the run hook_embed",
    ]
    assert "Change the run to fit, or write another cache (activations.cache.folder)" in str(caught.value)
    assert not backend.forwards, "before the model runs"
    assert not (tmp_path / "runs").exists()
    wider = attrs.evolve(manifest, sites=[attrs.evolve(rows, d_in=16) for rows in manifest.sites])
    with pytest.raises(
        DataError, match=f"made for this run:\n  - d_in at {SITE.name}: the cache has 16, the model 8\n"
    ):
        wider.check_fits(manifest.identity, {SITE: 8}, tmp_path / "cache")
    with pytest.raises(DataError, match=f"has no site hook_embed; it has {SITE.name}, {LAST.name}, {HEAD.name}"):
        manifest.site(saekit.Site(hook_name="hook_embed"))


def test_no_cache(tmp_path: Path) -> None:
    run, folder = config(tmp_path), tmp_path / "cache"
    with pytest.raises(DataError, match="cache' is not there. `saekit cache run.toml` writes one"):
        train(run)
    folder.mkdir()
    with pytest.raises(DataError, match="cache' has no manifest.json. `saekit cache run.toml` writes one"):
        train(run)
    manifest = cache(run)
    attrs.evolve(manifest, shards=(), position=None).save(folder)
    with pytest.raises(DataError, match="cache' is empty: `saekit cache` found too little text"):
        train(run)
    for text, message in [
        ("{}", "manifest.json cannot be read: KeyError: 'format'"),
        ("[", "cannot be read: JSONDecodeError"),
        ("[1]", "cannot be read: TypeError"),
        ('{"format": 2}', "has format 2, and this saekit reads 1: update saekit to read it"),
    ]:
        (folder / "manifest.json").write_text(text)
        with pytest.raises(DataError, match=message):
            train(run)
        with pytest.raises(DataError, match=message):
            cache(run)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("sections", "error", "message"),
    [
        ({"cache": {"sites": [{"hook_name": "blocks.0.hook_resid_pots"}]}}, ModelError, "Did you mean 'blocks.0.hook_"),
        ({"cache": {"sites": [{"hook_name": "hook_embed", "hook_head_index": 0}]}}, ConfigError, "has no heads"),
        ({"cache": {"tokens": 0}}, ConfigError, "activations.cache.tokens: must be"),
        ({"cache": {"dtype": "int8"}}, ConfigError, "activations.cache.dtype"),
        ({"cache": {"folder": " "}}, ConfigError, "activations.cache.folder"),
        ({"source": {"name": "cached", "folder": ""}}, ConfigError, "activations.source.folder"),
        (
            {"source": {"name": "cached", "block_rows": 0}},
            ConfigError,
            "activations.source.block_rows: must be 1 to 65536",
        ),
    ],
    ids=str,
)
def test_mistakes_write_nothing(tmp_path: Path, sections: dict, error: type[Exception], message: str) -> None:
    run = config(tmp_path)
    for name, options in sections.items():
        run = with_options(run, f"activations.{name}", **options)
    with pytest.raises(error, match=message):
        cache(run)
    assert not list(tmp_path.iterdir())
