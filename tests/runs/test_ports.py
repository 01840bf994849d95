"""Dictionaries of several sites: whole runs, stopped and gone on with, beside others, from a cache, saved."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from support import ports
from support.ports import EARLY, EMBED, HEAD, LATE, SITES, manager, run, train
from support.runs import pressing
from support.sweeps import CountingBackend, changed, fake, kept
from support.tiny import run_config

import saekit
from saekit.config import ModelConfig
from saekit.errors import ConfigError, ModelError, TrainingInterrupted
from saekit.kinds import MODEL_BACKENDS

pytestmark = pytest.mark.usefixtures("one_thread")
BOTH = saekit.Sites((EARLY, LATE))
EVERYTHING: dict[str, dict[str, Any]] = {
    "activations": {"normalize_activations": "expected_average_only_in"},
    "sae": {"b_dec_init_method": "mean"},
    "lr_schedule": {"name": "cosine"},
    "training": {"dead_feature_window": 2, "feature_sampling_window": 3},
    "evals": {"every_n_steps": 3},
    "checkpoints": {"name": "run"},
}
"""Whatever changes from step to step, on activations that are scaled."""


def test_a_run_with_two_inputs_and_another_target(tmp_path: Path) -> None:
    result = train(run(tmp_path))
    sae = result.sae
    assert sae.ports == saekit.Ports({EMBED.name: 8, HEAD.name: 4}, {LATE.name: 8})
    assert (tuple(sae.W_enc.shape), tuple(sae.W_dec.shape), tuple(sae.b_dec.shape)) == ((12, 20), (20, 8), (8,))
    assert sae.info.sites == SITES
    assert result.metrics["map/rows"] == 100  # the last of 1500 in batches of 200
    assert result.metrics["map/left"] == 1
    assert result.metrics["evals/explained_variance"] > 0
    loaded = saekit.SAE.load(result.folder, plugins=manager())
    assert loaded.info == sae.info
    assert loaded.ports == sae.ports
    assert loaded.info.site == EMBED
    x = torch.randn(5, 12)
    assert torch.equal(loaded(x), sae(x))
    assert result.folder.name.endswith("hook_embed+blocks.0.attn.hook_z.head1-to-blocks.1.hook_resid_post-1")


def test_several_targets_are_told_of_one_by_one(tmp_path: Path) -> None:
    metrics = train(run(tmp_path, BOTH, checkpoints={"name": "run"})).metrics
    for site in (EARLY, LATE):
        assert metrics[f"metrics/explained_variance/{site.name}"] < 1
        assert metrics[f"evals/explained_variance/{site.name}"] < 1
    whole = metrics["evals/explained_variance"]
    each = [metrics[f"evals/explained_variance/{site.name}"] for site in (EARLY, LATE)]
    assert min(each) < whole < max(each), "the later one is twice as large, and counts four times as much"
    assert whole == pytest.approx((each[0] + 4 * each[1]) / 5)


@pytest.mark.filterwarnings("ignore:the target .* lies before what is read:RuntimeWarning")
@pytest.mark.parametrize("sites", [SITES, BOTH, saekit.Sites((LATE,), (EARLY, EMBED))], ids=lambda s: s.name)
def test_stopped_and_gone_on_with_it_is_as_without_a_break(tmp_path: Path, sites: saekit.Sites) -> None:
    whole = train(run(tmp_path / "whole", sites, **EVERYTHING))
    config = run(tmp_path / "stopped", sites, **EVERYTHING)
    with pressing(4), pytest.raises(TrainingInterrupted):
        train(config)
    resumed = saekit.resume(tmp_path / "stopped" / "run", plugins=manager(), dataset=ports.DOCUMENTS)
    assert kept(resumed.folder) == kept(whole.folder)
    scale = resumed.sae.info.metadata["activation_scale"]
    assert set(scale) == {site.name for site in sites.all}
    for own, other in zip(whole.sae.parameters(), resumed.sae.parameters(), strict=True):
        assert torch.equal(own, other)


@pytest.mark.filterwarnings("ignore:the target .* lies before what is read:RuntimeWarning")
def test_beside_others_it_ends_as_alone_by_the_same_forwards(tmp_path: Path) -> None:
    ordinary = fake(tmp_path, training={"log_frequency": 1})
    scaled = {name: section for name, section in EVERYTHING.items() if name != "checkpoints"}
    configs = [
        ordinary,
        run(tmp_path),
        run(tmp_path, BOTH, **scaled),
        run(tmp_path, saekit.Sites((LATE,), (EARLY,)), training={"seed": 7}),
    ]
    for config in configs:
        config["activations"]["source"]["prefetch"] = False
    together, alone = CountingBackend(), CountingBackend()
    result = train(configs, plugins=manager(together))
    for config, found in zip(configs, result.results.values(), strict=True):
        one = train(changed(config, {"checkpoints": {"folder": str(tmp_path / "one")}}), plugins=manager(alone))
        assert kept(found.folder) == kept(one.folder)
        assert found.metrics == one.metrics
    assert len(alone.seen) > 2 * len(together.seen)
    assert "inputs=hook_embed+blocks.0.attn.hook_z.head1" in result.summary[1]["name"]


def cached(folder: Path, sites: saekit.Sites = SITES, **sections: Any) -> dict[str, Any]:
    config = run(folder, sites, evals={"run": [], "held_out_every": 0}, checkpoints={"name": "run"}, **sections)
    source = {"name": "cached", "folder": str(folder / "cache")}
    return config | {"activations": {"source": source, "cache": {"folder": str(folder / "cache")}}}


def test_a_cache_holds_every_site_and_says_which_are_missing(tmp_path: Path) -> None:
    config = cached(tmp_path)
    manifest = saekit.cache_activations(config, plugins=manager(), dataset=ports.DOCUMENTS)
    assert [rows.site for rows in manifest.sites] == [EMBED, HEAD, LATE]
    backend = CountingBackend()
    result = train(config, plugins=manager(backend))
    assert not backend.seen
    assert result.sae.ports.d_in == 12
    other = cached(tmp_path, saekit.Sites((EMBED,), (EARLY,)), training={"seed": 1})
    other["checkpoints"]["name"] = "other"
    with pytest.raises(saekit.DataError, match=f"the cache has .*{LATE.name}, the run {EARLY.name}"):
        train(other)


def test_a_run_without_a_model_reads_a_cache(tmp_path: Path) -> None:
    config = cached(tmp_path)
    saekit.cache_activations(config, plugins=manager(), dataset=ports.DOCUMENTS)
    with_model = train(config)
    alone = changed(config, {"model": {"backend": "none"}, "dataset": {"path": str(tmp_path / "nowhere")}})
    alone["checkpoints"]["name"] = "alone"
    assert not saekit.plan(alone, plugins=manager()).problems
    result = saekit.train(alone, plugins=manager())
    for own, other in zip(with_model.sae.parameters(), result.sae.parameters(), strict=True):
        assert torch.equal(own, other)
    assert "model_name" not in result.sae.info.metadata
    with pressing(3), pytest.raises(TrainingInterrupted):
        saekit.train(changed(alone, {"checkpoints": {"name": "again"}}), plugins=manager())
    resumed = saekit.resume(tmp_path / "again", plugins=manager())
    assert kept(resumed.folder) == kept(result.folder)


def test_what_needs_a_model_is_refused_without_one(tmp_path: Path) -> None:
    config = run(tmp_path, model={"backend": "none"})
    with pytest.raises(ConfigError) as caught:
        train(config)
    assert "activations.source: is 'saekit:live', which reads a text by a language model" in str(caught.value)
    assert (
        "evals.run: has saekit:reconstruction, saekit:downstream, which measure on a text by a language model"
        in str(caught.value)
    )
    with pytest.raises(ConfigError, match="model.backend: is 'saekit:none', and activations are written by running"):
        saekit.cache_activations(config, plugins=manager(), dataset=ports.DOCUMENTS)
    with pytest.raises(ModelError, match="model.backend is 'none', and a model was passed, a object"):
        saekit.default_manager().bound(MODEL_BACKENDS, "none").build(model=ModelConfig(), loaded=object())


def test_plan_tells_of_every_site(tmp_path: Path) -> None:
    plan = saekit.plan(run(tmp_path, **EVERYTHING), plugins=manager(), dataset=ports.DOCUMENTS)
    assert not plan.problems
    assert plan.facts["inputs"] == f"{EMBED.name} of fake, width 8, {HEAD.name} of fake, width 4"
    assert plan.facts["targets"] == f"{LATE.name} of fake, width 8"
    assert (plan.numbers["d_in"], plan.numbers["d_out"]) == (12, 8)
    assert "silent_at_start" in plan.numbers
    wrong = run(tmp_path, sae={"name": "test:map", "d_sae": 20, "d_in": 8})
    (problem,) = saekit.plan(wrong, plugins=manager(), dataset=ports.DOCUMENTS).problems
    assert problem == (
        "sae.d_in: is 8, but hook_embed of 'fake' has width 8, blocks.0.attn.hook_z.head1 of 'fake' has width 4: 12 "
        "side by side"
    )
    missing = run(tmp_path, saekit.Sites((saekit.Site(hook_name="hook_embd"),), (LATE,)))
    with pytest.raises(ModelError, match=r"no hook 'hook_embd' \(inputs, targets\)\. Did you mean 'hook_embed'"):
        train(missing)


def test_training_starts_from_one_that_was_saved(tmp_path: Path) -> None:
    """Its own scale is gone on with, so that nothing changes but by training."""
    first = train(run(tmp_path, **EVERYTHING))
    start = {"from_pretrained_path": str(first.folder), "lr": 1e-12, "training_tokens": 200}
    scaled = {"activations": EVERYTHING["activations"]}
    again = train(run(tmp_path, training=start, checkpoints={"name": "again"}, **scaled))
    assert again.sae.info.metadata["activation_scale"] == first.sae.info.metadata["activation_scale"]
    for own, other in zip(first.sae.parameters(), again.sae.parameters(), strict=True):
        torch.testing.assert_close(own, other, rtol=1e-5, atol=1e-6)
    turned = run(tmp_path, saekit.Sites((HEAD, EMBED), (LATE,)), training=start)
    with pytest.raises(ConfigError, match=r"inputs: is 'blocks.0.attn.hook_z.head1, hook_embed', but the SAE in"):
        train(turned)
    other = run(tmp_path, saekit.Sites((EMBED, HEAD)), training=start)
    with pytest.raises(ConfigError, match="targets: is 'hook_embed, blocks.0.attn.hook_z.head1', but the SAE in"):
        train(other)


def test_the_folder_names_the_sites(tmp_path: Path) -> None:
    def table(sites: saekit.Sites, name: str) -> dict[str, Any]:
        folder = train(run(tmp_path, sites, checkpoints={"name": name})).folder
        found: dict[str, Any] = json.loads((folder / "sae" / "cfg.json").read_text())
        return found

    whole = table(SITES, "several")
    assert (whole["d_in"], whole["d_out"]) == (12, 8)
    assert not {"hook_name", "hook_name_out"} & whole["metadata"].keys(), "sae-lens knows no dictionary of two inputs"
    assert whole["saekit"]["inputs"][1] == {"hook_name": HEAD.hook_name, "hook_head_index": 1, "width": 4}
    transcoder = table(saekit.Sites((EARLY,), (LATE,)), "two")
    assert (transcoder["d_in"], transcoder["d_out"]) == (8, 8)
    metadata = transcoder["metadata"]
    assert (metadata["hook_name"], metadata["hook_name_out"]) == (EARLY.hook_name, LATE.hook_name)
    one = table(saekit.Sites.one(EARLY), "one")
    assert "d_out" not in one
    assert "inputs" not in one["saekit"]
    assert one["saekit"]["site"] == {"hook_name": EARLY.hook_name, "hook_head_index": None}


def named(hook_name: str, head: int | None = None) -> saekit.Site:
    return saekit.Site(hook_name=f"blocks.{hook_name}", hook_head_index=head)


@pytest.mark.parametrize(
    ("sites", "architecture"),
    [
        (saekit.Sites((named("0.ln2.hook_normalized"),), (named("0.hook_mlp_out"),)), "test:map"),
        (saekit.Sites((named("0.hook_resid_post"), named("1.attn.hook_z", 0))), "standard"),
    ],
    ids=["map", "standard"],
)
def test_on_the_embedded_model(tmp_path: Path, sites: saekit.Sites, architecture: str) -> None:
    config = run_config(
        tmp_path,
        training={"lr": 0.01, "training_tokens": 8000},
        activations=EVERYTHING["activations"],
        evals={"split": None},
    )
    config["sae"] = {"name": architecture, "d_sae": 64, "b_dec_init_method": "mean"}
    config |= {"inputs": ports.tables(sites.inputs), "targets": ports.tables(sites.targets)}
    result = saekit.train(config, plugins=manager())
    assert result.sae.ports.same == (architecture == "standard")
    assert result.metrics["evals/explained_variance"] > 0.1
    assert result.metrics["evals/ce_loss_with_sae"] < result.metrics["evals/ce_loss_with_ablation"]
