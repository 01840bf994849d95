"""The live source: every activation once, and a saved state that goes on with the very same batches."""

from __future__ import annotations

import itertools
import threading
import time
import warnings
from collections.abc import Collection
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from saekit_plugins.sources.live import LiveConfig
from support.tiny import hooked_transformer, run_config
from torch import Tensor

import saekit
from saekit import Forward
from saekit.data import ActivationStream, ContextStream, StreamContext, TokenPolicy
from saekit.errors import ConfigError, DataError, ModelError, PluginFailedError
from saekit.protocols import ActivationSource
from saekit.testing import FakeBackend, fake_plugin, isolated_manager
from saekit.values import Batch

SITE = saekit.Site(hook_name="blocks.0.hook_resid_post")
OTHER = saekit.Site(hook_name="blocks.0.attn.hook_z", hook_head_index=1)
DOCUMENTS = [[(7 * n + t) % 120 + 1 for t in range(10 + n % 13)] for n in range(60)]
PREFETCH = pytest.mark.parametrize("prefetch", [False, True], ids=["plain", "prefetched"])


def stream_of(
    backend: Any = None, *, repeat: bool = False, batch: int = 24, sites: Collection[saekit.Site] = (SITE,)
) -> StreamContext:
    backend = backend or FakeBackend()

    def contexts() -> ContextStream:
        return ContextStream(DOCUMENTS, list, TokenPolicy(context_size=8), d_vocab=128, repeat=repeat)

    return StreamContext(backend=backend, sites=list(sites), batch_size=batch, seed=3, open_contexts=contexts)


def source(stream: StreamContext | None = None, *, repeat: bool = False, **options: Any) -> Any:
    small = {"store_batch_size_prompts": 4, "n_batches_in_buffer": 4, "prefetch": False}
    config = LiveConfig(**(small | options))
    return saekit.default_manager().build("activation_sources", config, stream=stream or stream_of(repeat=repeat))


def expected() -> tuple[Tensor, Tensor, Tensor]:
    """The model's activations on the packed documents, with tokens and documents, row by row."""
    packed = ContextStream(DOCUMENTS, list, TokenPolicy(context_size=8), d_vocab=128, repeat=False).take(10**6)
    tokens = torch.from_numpy(packed.tokens)
    rows = FakeBackend().run(tokens, read={SITE.hook_name}).held[SITE.hook_name].flatten(0, 1)
    return rows, tokens.flatten(), torch.from_numpy(packed.documents).flatten()


def test_what_is_not_of_every_context_is_refused() -> None:
    """Here it comes only with more contexts than the model was looked at with."""

    class Once(FakeBackend):
        def run(self, tokens: Tensor, **options: Any) -> Forward:
            return super().run(tokens[:2], **options)

    words = r"^the hook 'blocks.0.hook_resid_post' holds a tensor of shape \[2, 8, 8\] for \[4, 8\] tokens; an"
    with pytest.raises(ConfigError, match=words):
        next(source(stream_of(Once())))


def threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name == "saekit-prefetch"]


@PREFETCH
def test_every_activation_is_served_once_with_its_origin(prefetch: bool) -> None:
    live = source(prefetch=prefetch)
    assert isinstance(live, ActivationSource)
    batches: list[Batch] = list(live)
    live.close()
    assert all(len(batch) == 24 for batch in batches[:-1])
    served = torch.cat([batch.activations[SITE] for batch in batches])
    origins = torch.stack(
        [torch.cat([getattr(b, name) for b in batches]) for name in ("documents", "tokens", "positions")], 1
    )
    rows, tokens, documents = expected()
    assert len(served) == len(rows)
    wanted = torch.stack([documents, tokens, torch.arange(len(rows)) % 8], 1)
    # Each row is its own: sort both by everything that is known of it.
    assert sorted(map(tuple, origins.tolist())) == sorted(map(tuple, wanted.tolist()))
    by_token = FakeBackend().run(origins[:, 1:2], read={SITE.hook_name}).held[SITE.hook_name][:, 0]
    assert torch.allclose(served, by_token), "the fake model's activations depend on the token alone"
    assert not torch.equal(served, rows), "shuffled"


def test_prefetching_changes_no_batch() -> None:
    plain, ahead = source(repeat=True), source(repeat=True, prefetch=True)
    for _ in range(60):
        one, two = next(plain), next(ahead)
        assert torch.equal(one.activations[SITE], two.activations[SITE])
        assert torch.equal(one.documents, two.documents)
    assert threads()
    ahead.close()
    assert not threads()


@pytest.mark.parametrize("batches", [1, 2, 5, 6, 11])
def test_nobody_waits_for_forwards_that_nobody_takes(batches: int) -> None:
    """Where it is known how many rows a run takes, the thread makes those forwards that the caller alone would make."""
    plain, stream = stream_of(repeat=True), stream_of(repeat=True)
    taken = 0
    stream.left = lambda: (batches - taken) * stream.batch_size - 7  # the last batch is thinned
    one, two = source(plain), source(stream, prefetch=True)
    for _ in range(batches):
        assert torch.equal(next(one).activations[SITE], next(two).activations[SITE])
        taken += 1
    time.sleep(0.1)  # for what it must not begin
    assert isinstance(plain.backend, FakeBackend)
    assert isinstance(stream.backend, FakeBackend)
    assert len(stream.backend.forwards) == len(plain.backend.forwards)
    two.close()


def test_a_run_makes_no_forwards_ahead_that_it_does_not_take(tmp_path: Path) -> None:
    """Of SAEs of other lengths, the longest counts: a filling, and one more when half of it is served."""
    backend = FakeBackend()
    plugins = isolated_manager(fake_plugin("model_backends", build=lambda config, **_: backend), builtins=True)
    config = run_config(tmp_path, model={"backend": "test:fake"}, evals={"run": []})
    config["site"] = {"hook_name": SITE.hook_name}
    configs = [{**config, "training": {**config["training"], "training_tokens": n}} for n in (500, 1500)]
    saekit.train(configs, plugins=plugins)
    assert backend.forwards.count((8, 32)) == 4 + 3, "of 256 rows, as the 6 batches"


def test_of_saes_of_several_lengths_each_takes_what_it_needs(tmp_path: Path) -> None:
    """As if it were alone, on shared forwards; 1,500 activations are of 6 forwards, not 7."""
    backend = FakeBackend()
    plugins = isolated_manager(fake_plugin("model_backends", build=lambda config, **_: backend), builtins=True)
    source = {"name": "live", "store_batch_size_prompts": 8, "n_batches_in_buffer": 4, "refill": "needed"}
    config = run_config(tmp_path, model={"backend": "test:fake"}, evals={"run": []}, activations={"source": source})
    config["site"] = {"hook_name": SITE.hook_name}
    short, long = ({**config, "training": {**config["training"], "training_tokens": n}} for n in (500, 1500))
    together = saekit.train([short, long], plugins=plugins)
    assert backend.forwards.count((8, 32)) == 6
    for one, config in zip(together.results.values(), (short, long), strict=True):
        alone = saekit.train(config, plugins=plugins)
        for name, value in alone.sae.state_dict().items():
            assert torch.equal(one.sae.state_dict()[name], value)


def test_filling_that_takes_long_is_told_of(monkeypatch: pytest.MonkeyPatch) -> None:
    """In fewer words as it goes on; and of the first filling alone, others happen while the SAE trains."""
    seconds = itertools.count()
    monkeypatch.setattr("saekit_plugins.sources.live.time", SimpleNamespace(monotonic=lambda: next(seconds)))
    stream, said = stream_of(), list[str]()
    stream.say = said.append
    live = source(stream, n_batches_in_buffer=12)
    for _ in live:
        pass
    assert said == [f"filling the buffer, {n} of 384 activations" for n in (32, 96, 224)]
    said.clear()
    stream = stream_of()
    stream.say, stream.left = said.append, lambda: 100
    next(source(stream, n_batches_in_buffer=12, refill="needed"))
    assert said == [f"filling the buffer, {n} of 100 activations" for n in (32, 96)]


def test_a_look_uses_nothing_up() -> None:
    one, two = source(), source()
    looked = one.peek()[SITE]
    assert len(looked) == 128
    assert all(torch.equal(a.activations[SITE], b.activations[SITE]) for a, b in zip(one, two, strict=True))


@PREFETCH
@pytest.mark.parametrize("taken", [0, 1, 5, 17])
def test_a_pause_ends_the_thread_and_changes_nothing(taken: int, prefetch: bool) -> None:
    paused, other = source(repeat=True, prefetch=prefetch), source(repeat=True)
    for _ in range(taken):
        next(paused)
        next(other)
    state = paused.state_dict()
    paused.pause()
    assert not threads()
    assert paused.state_dict()["contexts"] == state["contexts"]
    for _ in range(20):
        assert torch.equal(next(paused).activations[SITE], next(other).activations[SITE])
    paused.close()


@PREFETCH
@pytest.mark.parametrize("taken", [0, 1, 2, 5, 17, 40])
def test_a_saved_state_goes_on_with_the_very_same_batches(taken: int, prefetch: bool) -> None:
    one, two = source(repeat=True, prefetch=prefetch), source(repeat=True, prefetch=not prefetch)
    for _ in range(3):
        next(two)  # it may have been anywhere
    for _ in range(taken):
        next(one)
    two.load_state_dict(one.state_dict())
    for _ in range(30):
        a, b = next(one), next(two)
        assert torch.equal(a.activations[SITE], b.activations[SITE])
        assert torch.equal(a.tokens, b.tokens)
    one.close()
    two.close()


def test_several_sites_share_their_tokens() -> None:
    backend = FakeBackend()
    live = source(stream_of(backend, sites=[SITE, OTHER]))
    batch = next(live)
    assert {site: rows.shape for site, rows in batch.activations.items()} == {SITE: (24, 8), OTHER: (24, 4)}
    heads = batch.activations[OTHER]
    assert torch.allclose(heads, backend._embedding()[batch.tokens].reshape(-1, 2, 4)[:, 1])
    assert {shape for shape in backend.forwards if shape[0] == 4} == {(4, 8)}, "one forward for both"
    assert backend.forwards.count((4, 8)) == 4


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "float64"])
def test_the_type_in_the_buffer(dtype: str) -> None:
    live = source(dtype=dtype, prefetch=False, act_store_device="cpu")
    batch = next(live)
    assert batch.activations[SITE].dtype == getattr(torch, dtype)
    assert live.memory_bytes() == 4 * 4 * 8 * 8 * getattr(torch, dtype).itemsize
    exact = FakeBackend().run(batch.tokens[:, None], read={SITE.hook_name}).held[SITE.hook_name][:, 0]
    assert torch.equal(batch.activations[SITE], exact.to(getattr(torch, dtype)))


def test_a_device_that_is_not_there() -> None:
    with pytest.raises(ConfigError, match="activations.source.act_store_device: 'cuda:7' cannot be used"):
        source(act_store_device="cuda:7")


class Cramped(FakeBackend):
    """A model that can take ``most`` contexts of the text at once; it is looked at with shorter ones."""

    def __init__(self, most: int, error: BaseException) -> None:
        super().__init__()
        self.most, self.error = most, error

    def run(self, tokens: Tensor, **options: Any) -> Forward:
        if len(tokens) > self.most and tokens.shape[1] > 7:
            raise self.error
        return super().run(tokens, **options)


OUT_OF_MEMORY = [
    torch.OutOfMemoryError("CUDA out of memory."),
    RuntimeError("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory: you tried 9 bytes"),
    MemoryError(),
]


@pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=lambda error: type(error).__name__)
def test_out_of_memory_halves_the_forward_with_one_warning(error: BaseException) -> None:
    backend = Cramped(1, error)
    stream = stream_of(backend)
    assert stream.widths == {SITE: 8}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        batches = list(ActivationStream(stream, 4))
    assert [str(w.message) for w in caught] == [
        "the model ran out of memory on 4 contexts at once; it goes on with fewer. Lower the source's batch size "
        "(store_batch_size_prompts) to avoid the attempt"
    ]
    assert set(backend.forwards) == {(2, 7), (1, 8)}
    rows, tokens, documents = expected()
    assert torch.equal(torch.cat([batch.activations[SITE] for batch in batches]), rows)
    assert torch.equal(torch.cat([batch.tokens for batch in batches]), tokens)
    assert torch.equal(torch.cat([batch.documents for batch in batches]), documents)


def test_out_of_memory_on_one_context_says_what_to_do() -> None:
    stream = stream_of(Cramped(0, MemoryError()))
    with (
        pytest.warns(RuntimeWarning, match="out of memory on 4 contexts"),
        pytest.raises(ModelError, match="on one context of 8 tokens. Lower dataset.context_size"),
    ):
        next(ActivationStream(stream, 4))


def test_other_errors_of_the_model_are_not_out_of_memory() -> None:
    with pytest.raises(RuntimeError, match="shape mismatch"):
        next(ActivationStream(stream_of(Cramped(2, RuntimeError("shape mismatch"))), 4))


def test_an_error_in_the_thread_ends_the_run_and_the_thread(tmp_path: Path) -> None:
    class Failing(FakeBackend):
        def run(self, tokens: Tensor, **options: Any) -> Forward:
            if len(self.forwards) > 7:
                assert threading.current_thread().name == "saekit-prefetch"
                raise OSError("the network drive is gone")
            return super().run(tokens, **options)

    plugins = isolated_manager(fake_plugin("model_backends", build=lambda config, **_: Failing()), builtins=True)
    config = run_config(tmp_path, model={"backend": "test:fake"}, site={"hook_name": SITE.hook_name}, evals={"run": []})
    with pytest.raises(PluginFailedError, match="the network drive is gone"):
        saekit.train(config, plugins=plugins)
    assert not threads()
    assert list(tmp_path.glob("*/checkpoints/step-*")), "what was learned until then is saved"


def test_no_thread_survives_a_run(tmp_path: Path) -> None:
    saekit.train(run_config(tmp_path))
    assert not threads()


def test_prefetching_and_evals_do_not_meet_in_the_model(tmp_path: Path) -> None:
    """Evals replace activations by hooks on the very modules that the thread runs."""
    config = run_config(tmp_path, evals={"every_n_steps": 1}, training={"training_tokens": 4000})
    model = hooked_transformer()
    weights = []
    for prefetch in (False, True):
        config["activations"]["source"]["prefetch"] = prefetch
        result = saekit.train(config, model=model)
        weights.append(result.sae.W_enc.detach().clone())
        assert not any(point.fwd_hooks for point in model.hook_dict.values())
    assert torch.equal(*weights)


def test_activations_carry_no_graph() -> None:
    model = hooked_transformer()
    backend = saekit.default_manager().build(
        "model_backends", "HookedTransformer", model=saekit.config.ModelConfig(), loaded=model
    )
    batch = next(source(stream_of(backend, sites=[saekit.Site(hook_name="blocks.1.hook_resid_post")])))
    (rows,) = batch.activations.values()
    assert rows.grad_fn is None
    assert not rows.requires_grad


def test_autocast_runs_the_model_in_bfloat16(tmp_path: Path) -> None:
    model = hooked_transformer()
    seen = []
    model.blocks[0].mlp.hook_pre.register_forward_hook(lambda module, args, output: seen.append(output.dtype))
    for autocast, dtype in ((False, torch.float32), (True, torch.bfloat16)):
        seen.clear()
        saekit.train(run_config(tmp_path, model={"autocast": autocast}), model=model)
        assert set(seen) == {dtype}


def test_how_well_a_batch_is_mixed_is_logged(tmp_path: Path) -> None:
    documents = [{"text": f"value_{n} = {n}"} for n in range(500)]
    config = run_config(tmp_path, evals={"run": [], "split": None})
    result = saekit.train(config, dataset=documents)
    assert 32 <= result.metrics["details/distinct_documents"] <= 256


def test_the_stages_hand_out_ordinary_tensors() -> None:
    """Whoever trains on them directly needs what autograd can save."""
    backend = saekit.default_manager().build(
        "model_backends", "HookedTransformer", model=saekit.config.ModelConfig(), loaded=hooked_transformer()
    )
    (rows,) = next(ActivationStream(stream_of(backend, sites=[SITE]), 4)).activations.values()
    weight = torch.ones(rows.shape[1], requires_grad=True)
    (rows * weight).sum().backward()
    assert weight.grad is not None


def test_rows_are_no_view_of_what_the_model_holds() -> None:
    """Which keeps other heads in memory, and which its next forward may write over."""
    given: list[Tensor] = []

    class Watched(FakeBackend):
        def run(self, tokens: Tensor, **options: Any) -> Forward:
            given.append((found := super().run(tokens, **options)).held[OTHER.hook_name])
            return found

    (rows,) = next(ActivationStream(stream_of(Watched(), sites=[OTHER]), 4)).activations.values()
    expected = rows.clone()
    given[0].zero_()
    assert torch.equal(rows, expected)
    assert rows.untyped_storage().nbytes() == rows.nbytes


def test_float16_that_overflows_is_an_error() -> None:
    backend = FakeBackend()
    backend._weights = backend._embedding() * 1e5
    with pytest.raises(DataError, match="which float16 cannot hold: choose bfloat16"):
        next(source(stream_of(backend), dtype="float16"))


def test_a_buffer_that_does_not_fit_says_what_to_lower() -> None:
    live = source(n_batches_in_buffer=2**24, store_batch_size_prompts=2**12)
    with pytest.raises(ConfigError, match="cannot be allocated on cpu: lower activations.source.n_batches_in_buffer"):
        next(live)


def test_a_saved_buffer_of_other_options_is_refused() -> None:
    one, two = source(prefetch=False), source(prefetch=False, n_batches_in_buffer=5)
    next(one)
    with pytest.raises(DataError, match="the saved buffer has 128 rows of .*, but this run's has 160"):
        two.load_state_dict(one.state_dict())


def test_a_smaller_batch_is_spread_over_a_whole_one() -> None:
    batch = Batch({SITE: torch.arange(10.0)[:, None]}, documents=torch.arange(10))
    assert batch.thinned(4).documents.tolist() == [0, 2, 5, 7]
    assert batch.thinned(4).activations[SITE][:, 0].tolist() == [0, 2, 5, 7]
    assert len(batch.thinned(1)) == 1
    assert batch.thinned(10) is batch.thinned(99) is batch


@PREFETCH
@pytest.mark.parametrize("batches", [1, 2, 5, 6, 11, 30])
def test_a_buffer_that_takes_what_is_needed_makes_no_other_forwards(batches: int, prefetch: bool) -> None:
    """Those of the rows that training takes, whatever a thread makes ahead; until the end nears, the same batches."""
    stream, taken = stream_of(repeat=True), 0
    rows = batches * stream.batch_size - 7
    stream.left = lambda: rows - taken * stream.batch_size
    full, needed = source(repeat=True), source(stream, prefetch=prefetch, refill="needed")
    served = []
    for _ in range(batches):
        batch = next(needed)
        if rows - taken * stream.batch_size >= 2 * 128:  # the buffer and what a refill adds
            assert torch.equal(next(full).activations[SITE], batch.activations[SITE])
        served.append(torch.stack([batch.documents, batch.tokens, batch.positions], 1))
        taken += 1
        time.sleep(0.002 * prefetch)
    needed.close()
    assert isinstance(stream.backend, FakeBackend)
    assert stream.backend.forwards.count((4, 8)) == -(-rows // 32)
    assert sum(map(len, served)) >= rows
    assert rows + 32 < len(expected()[0]), "the text is not read again"
    assert len(torch.cat(served).unique(dim=0)) == sum(map(len, served)), "each is served once"


def test_each_of_several_processes_makes_what_its_part_needs() -> None:
    """With a thread and without: what is left is of all of them, and need not fall by as much as each has taken."""

    def served(*, prefetch: bool) -> list[Tensor]:
        stream, taken = stream_of(repeat=True, batch=48), list[Tensor]()
        stream.processes, stream._open_own = 2, stream._open_contexts
        stream.left = lambda: 480 - 48 * len(taken) - 110 * (len(taken) >= 5)  # others have taken more than this one
        live = source(stream, prefetch=prefetch, refill="needed")
        for _ in range(8):
            taken.append(next(live).activations[SITE])
            time.sleep(0.01 * prefetch)  # for what the thread makes ahead
        live.close()
        assert isinstance(stream.backend, FakeBackend)
        assert prefetch or stream.backend.forwards.count((4, 8)) == 6, "as the rows that it has served"
        return taken

    assert all(torch.equal(one, two) for one, two in zip(served(prefetch=False), served(prefetch=True), strict=True))


def test_what_is_needed_is_looked_at_anew_where_a_run_goes_on() -> None:
    """From a saved state with the very same batches; for longer, with as many more."""
    streams = [stream_of(repeat=True) for _ in range(3)]
    whole, parted, longer = (source(stream, refill="needed") for stream in streams)
    for stream, most in zip(streams, (10, 10, 14), strict=True):
        stream.left = lambda stream=stream, most=most: most * 24 - 24 * taken.get(id(stream), 0)
    taken: dict[int, int] = {}

    def take(live: Any, stream: StreamContext) -> Tensor:
        batch = next(live).activations[SITE]
        taken[id(stream)] = taken.get(id(stream), 0) + 1
        return batch

    wanted = [take(whole, streams[0]) for _ in range(10)]
    for number in range(7):
        assert torch.equal(take(parted, streams[1]), wanted[number])
    for live, stream, more in ((source(streams[1], refill="needed"), streams[1], 3), (longer, streams[2], 7)):
        taken[id(stream)] = 7
        live.load_state_dict(parted.state_dict())
        found = [take(live, stream) for _ in range(more)]
        assert all(len(batch) == 24 for batch in found)
        assert more > 3 or all(torch.equal(one, two) for one, two in zip(found, wanted[7:], strict=True))
