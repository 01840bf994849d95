"""Known faults of sae-lens 3.0.0 in its data pipeline, by their numbers in the list of them, and what saekit does."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from support.tiny import run_config

import saekit
from saekit import cache_activations
from saekit.data import ContextPacker, TokenPolicy
from saekit.errors import DataError
from saekit.testing import FakeBackend, fake_plugin, isolated_manager

pytestmark = pytest.mark.usefixtures("way")

SITE = saekit.Site(hook_name="blocks.0.hook_resid_post")
DOCUMENTS = [{"tokens": [(7 * n + t) % 120 + 1 for t in range(20 + n % 13)]} for n in range(100)]


def fakes(backend: FakeBackend | None = None) -> saekit.PluginManager:
    made = backend or FakeBackend()
    return isolated_manager(fake_plugin("model_backends", build=lambda config, **_: made), builtins=True)


def cached_run(tmp_path: Path, *, documents: Any = DOCUMENTS, **sections: Any) -> dict[str, Any]:
    """A cache of everything, and a run that reads it."""
    folder = str(tmp_path / "cache")
    config = run_config(
        tmp_path / "runs",
        model={"backend": "test:fake"},
        site={"hook_name": SITE.hook_name},
        evals={"run": [], "split": None, "held_out_every": 0},
        activations={"cache": {"folder": folder, "tokens": 10**6}},
    )
    cache_activations(config, plugins=fakes(), dataset=documents)
    config["activations"]["source"] = {"name": "cached", "folder": folder}
    for name, section in sections.items():
        config[name] = config[name] | section
    return config


def rows_seen(config: dict[str, Any]) -> torch.Tensor:
    """The rows that an SAE was trained on."""
    seen: list[torch.Tensor] = []

    class Watching(saekit.SAE):
        def losses(self, x: torch.Tensor, step: Any) -> Any:
            seen.append(x.clone())
            loss = self.W_enc.sum() * 0
            from saekit.values import StepOutput

            return StepOutput(loss=loss, losses={}, output=x, fired=torch.ones(self.d_sae, dtype=torch.long))

    import attrs

    @attrs.frozen(kw_only=True)
    class WatchingConfig(saekit.SAEConfig):
        pass

    plugins = fakes()
    plugins.register(fake_plugin("sae_architectures", "watching", build=Watching, config=WatchingConfig), name="w")
    saekit.train(config | {"sae": {"name": "watching", "d_sae": 16}}, plugins=plugins, dataset=DOCUMENTS)
    return torch.cat(seen)


def test_fault_2_a_cache_is_read_to_its_end(tmp_path: Path) -> None:
    """The reference serves half of one file for ever."""
    config = cached_run(tmp_path, dataset={"on_exhausted": "stop"}, training={"training_tokens": 10**6})
    rows = rows_seen(config)
    manifest = saekit.data.cache.Manifest.load(tmp_path / "cache")
    assert len(rows) == manifest.rows
    stored = saekit.data.cache.CachedActivations(tmp_path / "cache", manifest, [SITE])
    everything = stored.take(torch.arange(manifest.rows).numpy()).activations[SITE]
    assert sorted(map(tuple, rows.tolist())) == sorted(map(tuple, everything.tolist()))


def test_fault_3_cached_activations_are_normalized_too(tmp_path: Path) -> None:
    """In the reference they bypass the factor that evals apply."""
    config = cached_run(tmp_path, dataset={"on_exhausted": "stop"}, training={"training_tokens": 10**6})
    config["activations"]["normalize_activations"] = "expected_average_only_in"
    assert rows_seen(config).norm(dim=1).mean().item() == pytest.approx(math.sqrt(8), rel=1e-5)


def test_fault_4_the_factor_is_estimated_first_and_saved(tmp_path: Path) -> None:
    """The reference estimates it late, on data that is then used up, and never saves it."""
    config = run_config(
        tmp_path,
        model={"backend": "test:fake"},
        site={"hook_name": SITE.hook_name},
        evals={"run": [], "split": None},
        sae={"b_dec_init_method": "mean"},
        training={"training_tokens": 256, "lr": 1e-30},
    )
    raw = saekit.train(config, plugins=fakes(), dataset=DOCUMENTS).sae
    config["activations"]["normalize_activations"] = "expected_average_only_in"
    result = saekit.train(config, plugins=fakes(), dataset=DOCUMENTS)
    scale = saekit.SAE.load(result.folder / "sae").info.metadata["activation_scale"]
    assert scale != 1
    assert torch.allclose(result.sae.b_dec, raw.b_dec, rtol=1e-5), (
        "b_dec was the mean of scaled rows; folded, of raw ones"
    )
    assert len(rows_seen(config | {"training": config["training"] | {"training_tokens": 10**4}})) == 10**4


def test_fault_17_the_model_runs_without_a_graph() -> None:
    from support.tiny import hooked_transformer

    backend = saekit.default_manager().build(
        "model_backends", "HookedTransformer", model=saekit.config.ModelConfig(), loaded=hooked_transformer()
    )
    held = backend.run(torch.ones(2, 5, dtype=torch.long), read={"blocks.1.hook_resid_post"}).held
    assert held
    assert not any(rows.requires_grad or rows.is_inference() for rows in held.values())


@pytest.mark.parametrize("source", ["live", "cached"])
def test_fault_21_data_that_ends(tmp_path: Path, source: str) -> None:
    """The reference raises a bare StopIteration, and everything is lost."""
    config = cached_run(tmp_path, training={"training_tokens": 10**6})
    if source == "live":
        config["activations"]["source"] = {"name": "live", "store_batch_size_prompts": 8, "n_batches_in_buffer": 4}
    config["dataset"]["on_exhausted"] = "stop"
    result = saekit.train(config, plugins=fakes(), dataset=DOCUMENTS)
    assert (result.folder / "sae/sae_weights.safetensors").is_file()
    there = result.metrics["details/n_training_tokens"]
    assert there == saekit.data.cache.Manifest.load(tmp_path / "cache").rows
    shutil.rmtree(tmp_path / "runs")
    config["dataset"]["on_exhausted"] = "error"
    with pytest.raises(DataError, match=rf"ended after {there:,.0f} activations, and 1,000,000 were asked for"):
        saekit.train(config, plugins=fakes(), dataset=DOCUMENTS)
    assert list(tmp_path.glob("runs/*/checkpoints/step-*/sae/sae_weights.safetensors"))


def test_fault_22_contexts_are_whole() -> None:
    """In the reference the first context lacks BOS on tokenized data, tails are dropped, long documents are cut off."""
    packer = ContextPacker(TokenPolicy(context_size=4, begin_batch=0, separator=0))
    contexts = [tokens.tolist() for doc in ([1, 2], list(range(3, 12)), [12]) for tokens, _ in packer.add(doc)]
    assert contexts == [[0, 1, 2, 0], [0, 3, 4, 5], [0, 6, 7, 8], [0, 9, 10, 11]]
    assert packer.state_dict()["tokens"] == [0, 12]


def test_fault_23_the_disk_estimate_is_right(tmp_path: Path) -> None:
    """The reference's is wrong by orders of magnitude."""
    documents = DOCUMENTS * 4
    config = cached_run(tmp_path, documents=documents)
    manifest = saekit.data.cache.Manifest.load(tmp_path / "cache")
    config["activations"]["cache"]["tokens"] = manifest.rows
    planned = saekit.plan(config, plugins=fakes(), dataset=documents).numbers["cache_bytes"]
    written = sum(file.stat().st_size for file in (tmp_path / "cache").rglob("*"))
    assert planned == pytest.approx(written, rel=0.05), "the manifest is a large part of so small a cache"
    assert planned == sum(file.stat().st_size for file in (tmp_path / "cache").rglob("*.safetensors"))


def test_fault_24_streams_are_pretokenized(tmp_path: Path) -> None:
    """The reference's pretokenizer fails on them."""
    records = [{"text": f"value_{n} = {n}\n" * 9} for n in range(50)]
    stream = datasets.Dataset.from_list(records).to_iterable_dataset(num_shards=3)
    config = {"dataset": {"context_size": 16}, "folder": str(tmp_path / "contexts"), "verbose": False}
    assert saekit.pretokenize(config, dataset=stream).contexts > 10
