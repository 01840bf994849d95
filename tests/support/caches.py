"""Small caches of activations that several test files use."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import attrs
import torch
from saekit_plugins.sources.cached import CachedConfig
from safetensors import safe_open
from support.tiny import run_config
from torch import Tensor

import saekit
from saekit.commands import cache as make
from saekit.config import DatasetConfig, EvalsConfig
from saekit.data import Corpus, StreamContext
from saekit.data.cache import CacheWriter, Manifest
from saekit.data.cache.manifest import SiteRows
from saekit.testing import FakeBackend, fake_plugin, isolated_manager
from saekit.values import Batch

SITE = saekit.Site(hook_name="blocks.0.hook_resid_post")
LAST = saekit.Site(hook_name="blocks.1.hook_resid_post")
HEAD = saekit.Site(hook_name="blocks.0.attn.hook_z", hook_head_index=1)
SIZE = 16
WORDS = ["def", "return", "self", "lambda x: x", "for i in", "import", "yield", "(0, 1)", "[]", "{}"]
DOCUMENTS = [{"text": " ".join(WORDS[(n * k + k) % 10] for k in range(20 + n % 17))} for n in range(60)]


OTHERS = [{"hook_name": LAST.hook_name}, {"hook_name": HEAD.hook_name, "hook_head_index": 1}]
FAKE_RUN: dict[str, dict[str, Any]] = {
    "model": {"backend": "test:fake"},
    "dataset": {"context_size": SIZE},
    "site": {"hook_name": SITE.hook_name},
    "evals": {"run": [], "split": None, "held_out_every": 0},
}

# ---- caches whose rows are numbered, written without a model


def plan(*, per_shard: int = 4, dtype: str = "float32", size: int = 8, **identity: Any) -> Manifest:
    itemsize = getattr(torch, dtype).itemsize
    sites = [SiteRows(SITE, 8, dtype, itemsize), SiteRows(HEAD, 4, dtype, itemsize)]
    return Manifest(identity=identity, sites=sites, context_size=size, contexts_per_shard=per_shard)


def numbered(start: int, contexts: int, size: int = 8) -> Batch:
    """Rows that tell their own number, and whose origins follow from it."""
    rows = torch.arange(start * size, (start + contexts) * size)
    held = {SITE: rows[:, None].float().repeat(1, 8), HEAD: -rows[:, None].float().repeat(1, 4)}
    return Batch(held, tokens=rows * 3 % 1000, documents=rows * 2**33, positions=rows % size)


def write(folder: Path, contexts: int, *, at_once: int = 3, **options: Any) -> Manifest:
    """Write numbered rows until there are ``contexts``, or what is missing of them."""
    with CacheWriter(folder, plan(**options)) as writer:
        size, done = writer.manifest.context_size, writer.manifest.contexts
        assert (writer.manifest.position or {"next": 0})["next"] == done, "the text goes on where the rows end"
        while done < contexts:
            count = min(at_once, writer.room, contexts - done)
            writer.add(numbered(done, count, size), {"next": done + count})
            done += count
        writer.finish(ended=False)
        return writer.manifest


def source(
    folder: Path, *, sites: tuple[saekit.Site, ...] = (SITE, HEAD), batch: int = 24, seed: int = 3,
    repeat: bool = False, identity: dict[str, Any] | None = None, backend: Any = None, **options: Any,
) -> Any:  # fmt: skip
    """The plugin on a cache, with a model that may only be probed and no text at all."""

    def no_text() -> Any:
        raise AssertionError("a cache needs no text")

    stream = StreamContext(
        backend=backend or FakeBackend(), sites=sites, batch_size=batch, seed=seed, open_contexts=no_text,
        repeat=repeat, find_identity=lambda: identity or {},
    )  # fmt: skip
    config = CachedConfig(folder=str(folder), **options)
    return saekit.default_manager().build("activation_sources", config, stream=stream)


# ---- whole runs on the fake model


def manager(backend: FakeBackend) -> saekit.PluginManager:
    return isolated_manager(fake_plugin("model_backends", build=lambda config, **services: backend), builtins=True)


def config(folder: Path, **sections: dict[str, Any]) -> dict[str, Any]:
    """A run that caches three sites in ``folder/cache``, and trains on one of them from there."""
    place = str(folder / "cache")
    return run_config(
        folder / "runs",
        **{name: FAKE_RUN.get(name, {}) | sections.get(name, {}) for name in FAKE_RUN | sections},
        activations={
            "source": {"name": "cached", "folder": place},
            "cache": {"folder": place, "sites": OTHERS, "batch_size_prompts": 4},
        },
    )


def with_options(run: dict[str, Any], section: str, **options: Any) -> dict[str, Any]:
    """``run`` with options of ``section``, such as ``activations.cache``, changed."""
    first, *rest = section.split(".", 1)
    inner = with_options(run[first], rest[0], **options) if rest else run[first] | options
    return run | {first: inner}


def cache(
    run: dict[str, Any],
    backend: FakeBackend | None = None,
    *,
    per_shard: int = 10,
    dataset: Any = DOCUMENTS,
    **options: Any,
) -> Manifest:
    """``saekit cache`` of ``run``, with shards of few contexts; ``options`` are those of ``activations.cache``."""
    planned = make.plan_cache

    def smaller(*arguments: Any) -> Manifest:
        return attrs.evolve(planned(*arguments), contexts_per_shard=per_shard)

    with mock.patch.object(make, "plan_cache", smaller):
        return saekit.cache_activations(
            with_options(run, "activations.cache", **options),
            plugins=manager(backend or FakeBackend()),
            dataset=dataset,
        )


def train(run: dict[str, Any], backend: FakeBackend | None = None, dataset: Any = DOCUMENTS) -> saekit.TrainResult:
    return saekit.train(run, plugins=manager(backend or FakeBackend()), dataset=dataset)


def packed(size: int = SIZE, documents: Any = DOCUMENTS) -> tuple[Tensor, Tensor]:
    """``[contexts, size]`` token and document ids of the text."""
    options = DatasetConfig(context_size=size, on_exhausted="stop")
    corpus = Corpus.of(options, EvalsConfig(run=(), held_out_every=0), documents)
    contexts = corpus.contexts(FakeBackend()).take(10**6)
    return torch.from_numpy(contexts.tokens), torch.from_numpy(contexts.documents)


def activations(tokens: Tensor) -> dict[saekit.Site, Tensor]:
    """What the fake model holds, by its definition: each token's embedding, doubled by each block."""
    embedded = FakeBackend()._embedding()[tokens.flatten()]
    return {SITE: 2 * embedded, LAST: 4 * embedded, HEAD: embedded[:, 4:]}


def tensors(folder: Path, manifest: Manifest) -> list[dict[str, Tensor]]:
    """Every tensor of each shard, as the safetensors library reads it."""
    found = []
    for number in range(len(manifest.shards)):
        held = {}
        for path in (folder / manifest.shard_folder(number)).iterdir():
            with safe_open(path, "pt") as file:
                (name,) = file.keys()
                held[path.name] = file.get_tensor(name)
                assert name == {"tokens": "token_ids", "documents": "document_ids"}.get(path.stem, "activations")
        found.append(held)
    return found


# ---- what is on disk


def files(folder: Path) -> Iterator[Path]:
    """Every file but the lock, in order."""
    return (path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != ".lock")


def hashes(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files(folder)}


def marks(folder: Path, manifest: Manifest) -> dict[str, tuple[int, int]]:
    """What tells whether a finished shard was touched: the inode and the time of each of its files."""
    homes = [folder / manifest.shard_folder(number) for number in range(len(manifest.shards))]
    found = {path: path.stat() for home in homes for path in (home, *sorted(home.iterdir()))}
    return {str(path.relative_to(folder)): (stat.st_ino, stat.st_mtime_ns) for path, stat in found.items()}


def leftovers(folder: Path) -> list[str]:
    return [str(path.relative_to(folder)) for path in folder.rglob(".*") if path.name != ".lock"]


def flip(path: Path, offset: int) -> None:
    """Change one bit of a file; ``offset`` may be negative, from the end."""
    data = bytearray(path.read_bytes())
    data[offset] ^= 1
    path.write_bytes(data)


def rows_of(batches: list[Batch], site: saekit.Site = SITE) -> Tensor:
    return torch.cat([batch.activations[site] for batch in batches])


def threads() -> set[threading.Thread]:
    """Of those that run, saekit's own."""
    return {thread for thread in threading.enumerate() if thread.name.startswith("saekit")}
