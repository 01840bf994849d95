"""Batches and caches of the tokens that count alone, against a loop over every token."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import attrs
import pytest
import torch
from saekit_plugins.sources.live import LiveConfig
from support import caches
from support.caches import HEAD, SITE, SIZE

import saekit
from saekit.commands import cache as making
from saekit.config import TokensConfig
from saekit.data import ActivationStream, Contexts, ContextStream, StreamContext, TokenPolicy
from saekit.data.cache import CachedActivations, Manifest, verify_cache
from saekit.data.documents import Form
from saekit.data.text import Documents
from saekit.errors import DataError
from saekit.testing import FakeBackend
from saekit.tokens import TokenChoice, ids_of, token_choice
from saekit.values import Batch

DOCUMENTS = [[(7 * n + t * t) % 12 for t in range(10 + n % 13)] for n in range(60)]
RECORDS = [
    {"tokens": tokens, "mask": [(n * k + k) % 3 > 0 for k in range(len(tokens))]} for n, tokens in enumerate(DOCUMENTS)
]
CHOICES: dict[str, TokensConfig] = {
    "positions": TokensConfig(seqpos_slice=(1, None)),
    "every other, not the end": TokensConfig(seqpos_slice=(None, -2, 2)),
    "ids": TokensConfig(exclude_special_tokens=(3, 5, 9)),
    "special": TokensConfig(exclude_special_tokens=True),
    "mask": TokensConfig(mask_column="mask"),
    "all of it": TokensConfig(seqpos_slice=(1, 7), exclude_special_tokens=(3, 0), mask_column="mask"),
}
Row = tuple[int, int, int]


def stream_of(tokens: TokensConfig, *, repeat: bool = False, records: Any = RECORDS, batch: int = 24) -> StreamContext:
    masked = tokens.mask_column is not None

    def contexts() -> ContextStream:
        read = Documents(records, "tokens", form=Form(mask=tokens.mask_column))
        policy = TokenPolicy(context_size=8, separator=0)
        return ContextStream(read, list, policy, d_vocab=128, repeat=repeat, masked=masked)

    backend = FakeBackend()
    return StreamContext(
        backend=backend, sites=[SITE, HEAD], batch_size=batch, seed=3, open_contexts=contexts, repeat=repeat,
        choice=token_choice(tokens, backend), masked=masked,
    )  # fmt: skip


def live(stream: StreamContext, **options: Any) -> Any:
    options = {"store_batch_size_prompts": 4, "n_batches_in_buffer": 6, "prefetch": False} | options
    return saekit.default_manager().build("activation_sources", LiveConfig(**options), stream=stream)


def looped(contexts: Contexts, tokens: TokensConfig) -> Iterator[Row]:
    """``(document, token, position)`` of every token that counts."""
    chosen = tokens.exclude_special_tokens
    excluded = (0,) if chosen is True else chosen or ()
    places = range(contexts.tokens.shape[1])[slice(*(tokens.seqpos_slice or (None,)))]
    for row in range(len(contexts)):
        for position, token in enumerate(contexts.tokens[row].tolist()):
            if position not in places or token in excluded:
                continue
            if contexts.counts is not None and not contexts.counts[row][position]:
                continue
            yield int(contexts.documents[row][position]), token, position


def rows_of(*batches: Batch) -> list[Row]:
    columns = [torch.cat([getattr(b, name) for b in batches]) for name in ("documents", "tokens", "positions")]
    return list(zip(*(column.tolist() for column in columns), strict=True))


def check_rows(*batches: Batch) -> None:
    """The activations are of the tokens that a batch says: in the fake model they depend on those alone."""
    for batch in batches:
        held = FakeBackend().run(batch.tokens[:, None], read={SITE.hook_name, HEAD.hook_name}).held
        for site in (SITE, HEAD):
            assert torch.equal(batch.activations[site], site.extract(held[site.hook_name])[:, 0])


@pytest.mark.parametrize("tokens", CHOICES.values(), ids=CHOICES)
def test_forwards_give_the_rows_that_count_in_order(tokens: TokensConfig) -> None:
    contexts = stream_of(tokens).contexts.take(10**6)
    wanted = list(looped(contexts, tokens))
    assert 0 < len(wanted) < contexts.tokens.size
    forwards = list(ActivationStream(stream_of(tokens), 4))
    assert rows_of(*forwards) == wanted
    check_rows(*forwards)


@pytest.mark.parametrize("tokens", CHOICES.values(), ids=CHOICES)
def test_batches_have_each_row_that_counts_once(tokens: TokensConfig) -> None:
    batches = list(live(stream_of(tokens)))
    assert {len(batch) for batch in batches[:-1]} == {24}
    assert sorted(rows_of(*batches)) == sorted(looped(stream_of(tokens).contexts.take(10**6), tokens))
    check_rows(*batches)
    assert live(stream_of(tokens)).peek()[SITE].shape[0] >= 24


def test_a_thread_and_a_break_change_no_batch() -> None:
    tokens = CHOICES["all of it"]
    plain, ahead = live(stream_of(tokens, repeat=True)), live(stream_of(tokens, repeat=True), prefetch=True)
    for number in range(40):
        if number in (3, 17, 30):
            again = live(stream_of(tokens, repeat=True), prefetch=number == 17)
            again.load_state_dict(ahead.state_dict())
            ahead.close()
            ahead = again
        one, two = next(plain), next(ahead)
        assert rows_of(one) == rows_of(two)
        assert torch.equal(one.activations[SITE], two.activations[SITE])
    ahead.close()


def test_where_all_count_nothing_is_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TokenChoice, "kept", None)
    assert sum(map(len, live(stream_of(TokensConfig())))) == stream_of(TokensConfig()).contexts.take(999).tokens.size


@pytest.mark.parametrize("repeat", [True, False])
def test_text_of_which_nothing_counts_ends(repeat: bool) -> None:
    source = live(stream_of(TokensConfig(exclude_special_tokens=tuple(range(12))), repeat=repeat))
    if repeat:
        with pytest.raises(
            DataError, match=r"no token of the text counts: what tokens\.exclude_special_tokens, tokens"
        ):
            next(source)
    else:
        assert list(source) == []


def test_forwards_of_which_nothing_counts_are_passed_over() -> None:
    records = [{"tokens": [1] * 8, "mask": [int(n == 40)] * 8} for n in range(60)]
    stream = stream_of(TokensConfig(mask_column="mask"), records=records, repeat=True, batch=8)
    first = next(iter(ActivationStream(stream, 1)))
    assert set(first.documents.tolist()) == {40}


def test_a_half_of_a_forward_that_ran_out_of_memory_is_cut_alike() -> None:
    tokens = CHOICES["all of it"]

    class Small(FakeBackend):
        def run(self, tokens: torch.Tensor, **options: Any) -> saekit.Forward:
            if len(tokens) > 2:
                raise MemoryError
            return super().run(tokens, **options)

    stream = stream_of(tokens)
    stream.backend = Small()
    with pytest.warns(RuntimeWarning, match="goes on with fewer"):
        forwards = list(ActivationStream(stream, 8))
    assert rows_of(*forwards) == rows_of(*ActivationStream(stream_of(tokens), 8))


def test_ids_that_the_model_lacks_are_refused() -> None:
    backend = FakeBackend()
    with pytest.raises(saekit.ConfigError, match=r"has the token id 128, but the vocabulary of 'fake' ends at 127"):
        token_choice(TokensConfig(exclude_special_tokens=(128,)), backend)
    backend.special_tokens = {"bos": None, "eos": None, "sep": None}
    with pytest.raises(saekit.ConfigError, match="is true, and the model 'fake' has no special tokens that are known"):
        token_choice(TokensConfig(exclude_special_tokens=True), backend)


# ---- caches


WORDS = [{"tokens": d["tokens"], "mask": d["mask"]} for d in RECORDS] * 6


def cached(folder: Path, chosen: dict[str, Any], **options: Any) -> tuple[dict[str, Any], Manifest]:
    run = caches.config(folder, tokens=chosen)
    return run, caches.cache(run, dataset=WORDS, **({"tokens": 700} | options))


def read(folder: Path, manifest: Manifest) -> Batch:
    cache = CachedActivations(folder / "cache", manifest, [SITE, HEAD])
    return cache.take(torch.arange(len(cache)).numpy())


@pytest.mark.parametrize("name", CHOICES)
def test_a_cache_has_the_rows_that_count(tmp_path: Path, name: str) -> None:
    tokens = {key: value for key, value in attrs.asdict(CHOICES[name]).items() if value}
    run, manifest = cached(tmp_path, tokens)
    verify_cache(tmp_path / "cache")
    config = saekit.load_config(run, plugins=caches.manager(FakeBackend()))
    corpus = saekit.data.Corpus.of(config.dataset, config.evals, WORDS, config.tokens.mask_column)
    contexts = corpus.contexts(FakeBackend()).take(manifest.contexts)
    found = read(tmp_path, manifest)
    assert rows_of(found) == list(looped(contexts, CHOICES[name]))
    check_rows(found)
    assert manifest.rows == len(found) == sum(shard.rows or 0 for shard in manifest.shards)
    per_context = manifest.rows_per_context
    assert per_context is not None
    assert 700 <= manifest.rows < 700 + per_context, "no context more than is needed"
    assert Manifest.load(tmp_path / "cache").shards == manifest.shards
    assert json.loads((tmp_path / "cache/manifest.json").read_text())["format"] == 2


def test_how_it_is_written_makes_no_difference_to_what_is_in_it(tmp_path: Path) -> None:
    tokens = {"exclude_special_tokens": [3, 5], "seqpos_slice": [1, "none"]}
    _, whole = cached(tmp_path / "whole", tokens)
    _, fewer = cached(tmp_path / "parts", tokens, tokens=300)
    _, parts = cached(tmp_path / "parts", tokens, batch_size_prompts=7)
    assert fewer.rows < parts.rows
    assert rows_of(read(tmp_path / "parts", parts)) == rows_of(read(tmp_path / "whole", whole))
    assert torch.equal(
        read(tmp_path / "parts", parts).activations[SITE], read(tmp_path / "whole", whole).activations[SITE]
    )


def test_another_choice_is_refused_by_the_fields_that_differ(tmp_path: Path) -> None:
    run, _ = cached(tmp_path, {"seqpos_slice": [1, "none"], "exclude_special_tokens": [3]})
    words = r"tokens\.seqpos_slice: the cache has \[1, None\], the run \[2, None\]"
    with pytest.raises(DataError, match=words) as caught:
        caches.train(run | {"tokens": {"seqpos_slice": [2, "none"], "exclude_special_tokens": [3]}}, dataset=WORDS)
    assert "exclude_special_tokens" not in str(caught.value)
    with pytest.raises(DataError, match=r"tokens\.exclude_special_tokens: the cache has \[3\], the run None"):
        caches.train(run | {"tokens": {}}, dataset=WORDS)
    with pytest.raises(
        DataError, match=r"holds another activation cache.*\n.*tokens\.exclude_special_tokens: there \[3\]"
    ):
        caches.cache(run | {"tokens": {"seqpos_slice": [1, "none"]}}, dataset=WORDS)


def test_a_run_that_chooses_refuses_a_cache_of_all(tmp_path: Path) -> None:
    run, manifest = cached(tmp_path, {})
    assert json.loads((tmp_path / "cache/manifest.json").read_text())["format"] == 1
    assert not any(name.startswith("tokens.") for name in manifest.identity)
    with pytest.raises(DataError, match=r"tokens\.mask_column: the cache has None, the run 'mask'"):
        caches.train(run | {"tokens": {"mask_column": "mask"}}, dataset=WORDS)


@pytest.mark.parametrize("tokens", [{"exclude_special_tokens": [3, 5]}, {"seqpos_slice": [1, "none"]}, {}])
def test_the_size_is_known_before_to_a_hundredth(tmp_path: Path, tokens: dict[str, Any]) -> None:
    run = caches.config(tmp_path, tokens=tokens)
    run = caches.with_options(run, "activations.cache", tokens=3000)
    live_run = caches.with_options(run, "activations", source="live")
    planned = saekit.plan(live_run, plugins=caches.manager(FakeBackend()), dataset=WORDS)
    assert planned.problems == []
    manifest = saekit.cache_activations(run, plugins=caches.manager(FakeBackend()), dataset=WORDS)
    assert abs(planned.numbers["cache_bytes"] / manifest.nbytes - 1) < 0.01
    share = planned.numbers.get("tokens_used_share", 1.0)
    assert share == pytest.approx(manifest.rows / (manifest.contexts * SIZE), abs=0.02)


def test_a_disk_that_is_full_is_seen_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, int | None]] = []
    monkeypatch.setattr(
        making.CacheWriter, "check_space", lambda self, contexts, rows=None: asked.append((contexts, rows))
    )
    cached(tmp_path, {"seqpos_slice": [4, "none"]}, tokens=120)
    assert asked == [(10, 120)], "twelve of a context's sixteen"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"rows": 10**6}, r"shards\[0\]\.rows: found 1,000,000, and 10 contexts have 15 each at most"),
        ({"rows": -1}, r"shards\[0\]\.rows: found -1, expected a whole number of 0 or more"),
        ({"rows": 3}, r"expected .* for 3 numbers of int32"),
    ],
)
def test_a_manifest_that_contradicts_itself_is_named(tmp_path: Path, change: dict[str, Any], words: str) -> None:
    cached(tmp_path, {"seqpos_slice": [1, "none"]}, tokens=160)
    file = tmp_path / "cache/manifest.json"
    table = json.loads(file.read_text())
    table["shards"][0] |= change
    file.write_text(json.dumps(table))
    with pytest.raises(DataError, match=words):
        Manifest.load(tmp_path / "cache")


def test_a_cache_of_nothing_is_an_error(tmp_path: Path) -> None:
    ids = list(range(100))
    with pytest.raises(DataError, match="no token of the text counts, so .* has no activations: see tokens.exclude"):
        cached(tmp_path, {"exclude_special_tokens": ids})
    with pytest.raises(DataError, match="has no activations: no token of its text counts"):
        caches.source(tmp_path / "cache")


def test_cached_batches_have_each_row_once(tmp_path: Path) -> None:
    _, manifest = cached(tmp_path, {"exclude_special_tokens": [3, 5]})
    source = caches.source(tmp_path / "cache", identity=dict(manifest.identity))
    batches = list(itertools.islice(source, 1000))
    assert sorted(rows_of(*batches)) == sorted(rows_of(read(tmp_path, manifest)))
    check_rows(*batches)
    source.close()


def test_ids_of_a_forward_are_told_from_what_else_it_is_given() -> None:
    ids = torch.arange(6).reshape(2, 3)
    assert ids_of(ids) is ids
    assert ids_of(ids[0]).tolist() == [[0, 1, 2]]  # type: ignore[union-attr]
    for other in (ids.float(), ids[None], ids[0, 0], "text", [1, 2], None):
        assert ids_of(other) is None
