"""Activations of several sites: a scale for each, and starts made of the right ones.  The source is a test's own."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import attrs
import pytest
import torch
from support.ports import MapConfig, MapSAE, tables
from support.tiny import run_config
from support.training import make_trainer
from torch import Tensor

import saekit
from saekit.data import StreamContext
from saekit.errors import ConfigError, PluginFailedError
from saekit.testing import fake_plugin, isolated_manager
from saekit.values import Batch

A, B, C = (saekit.Site(hook_name=name) for name in "abc")
WIDTHS = {A: 6, B: 3, C: 5}
PEEKED = {A: 300, B: 200, C: 250}
"""A source may show more of one site than of another."""


@attrs.frozen(kw_only=True)
class DrawnConfig:
    """Numbers, of a size of its own at each site."""

    states: bool = True
    """Say how wide they are."""
    lies: bool = False
    """About their widths."""


def sample(site: saekit.Site, rows: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(10 * seed + ord(site.hook_name))
    size = {A: 1.0, B: 20.0, C: 0.05}[site]
    return (torch.randn(rows, WIDTHS[site], generator=generator, dtype=torch.float64) + 1.5) * size


class Drawn:
    def __init__(self, config: DrawnConfig, *, stream: StreamContext) -> None:
        self._stream, self._lies, self._made = stream, config.lies, 0

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        self._made += 1
        n = self._stream.batch_size
        return Batch({site: sample(site, n, self._made) for site in self._stream.sites}, tokens=torch.arange(n))

    def peek(self) -> Mapping[saekit.Site, Tensor]:
        return {site: sample(site, PEEKED[site]) for site in self._stream.sites}

    def state_dict(self) -> dict[str, Any]:
        return {"made": self._made}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._made = state["made"]

    def close(self) -> None:
        pass


class WideDrawn(Drawn):
    @property
    def widths(self) -> Mapping[saekit.Site, int]:
        return {site: width + self._lies for site, width in WIDTHS.items()}


def manager() -> saekit.PluginManager:
    def build(config: DrawnConfig, *, stream: StreamContext) -> Drawn:
        return (WideDrawn if config.states else Drawn)(config, stream=stream)

    return isolated_manager(
        fake_plugin("sae_architectures", "map", build=MapSAE, config=MapConfig),
        fake_plugin("activation_sources", "drawn", build=build, config=DrawnConfig, needs_text=False),
        builtins=True,
    )


def config(folder: Path, sites: saekit.Sites, **sections: dict[str, Any]) -> dict[str, Any]:
    """A run that does not move: what it begins with is what is saved."""
    own: dict[str, dict[str, Any]] = {
        "model": {"backend": "none"},
        "activations": {"source": {"name": "drawn"}, "normalize_activations": "expected_average_only_in"},
        "sae": {"name": "test:map", "d_sae": 16, "dtype": "float64", "b_dec_init_method": "mean"},
        "training": {"lr": 1e-30, "training_tokens": 500, "train_batch_size_tokens": 100},
        "evals": {"run": [], "split": None},
    }
    for name, options in sections.items():
        own[name] = own.get(name, {}) | options
    table = run_config(folder, **own)
    table["sae"].pop("l1_coefficient")
    if "from_pretrained_path" in table["training"]:
        table["sae"].pop("b_dec_init_method")
    return table | {"inputs": tables(sites.inputs), "targets": tables(sites.targets)}


def train(table: dict[str, Any]) -> saekit.TrainResult:
    return saekit.train(table, plugins=manager())


@pytest.mark.parametrize(
    "sites", [saekit.Sites((A, B), (C,)), saekit.Sites((B, A)), saekit.Sites((C,), (A, C))], ids=lambda s: s.name
)
def test_each_site_is_scaled_by_its_own_norm(tmp_path: Path, sites: saekit.Sites) -> None:
    sae = train(config(tmp_path, sites)).sae
    scale = sae.info.metadata["activation_scale"]
    assert set(scale) == {site.name for site in sites.all}
    for site in sites.all:
        norm = sample(site, PEEKED[site]).norm(dim=1).mean()
        assert scale[site.name] == pytest.approx(math.sqrt(WIDTHS[site]) / float(norm), rel=1e-12)
    shown = min(PEEKED[site] for site in sites.all)
    means = torch.cat([sample(site, PEEKED[site])[:shown].mean(0) for site in sites.targets])
    torch.testing.assert_close(sae.b_dec.detach(), means, rtol=1e-12, atol=0)


def test_the_scale_is_folded_into_what_is_saved(tmp_path: Path) -> None:
    """In float64: the SAE of raw activations does what the one of scaled activations did."""
    sites = saekit.Sites((A, B), (C,))
    table = config(tmp_path, sites)
    raw = train(table).sae
    table["activations"]["normalize_activations"] = "none"
    plain = train(table).sae  # of the same weights, but for b_dec
    scale = raw.info.metadata["activation_scale"]
    read = torch.cat([torch.full((WIDTHS[site],), scale[site.name], dtype=torch.float64) for site in sites.inputs])
    with torch.no_grad():
        plain.b_dec.mul_(scale["c"])
        x = torch.cat([sample(site, 40, seed=9) for site in sites.inputs], dim=1)
        torch.testing.assert_close(raw(x), plain(x * read) / scale["c"], rtol=1e-12, atol=0)
        torch.testing.assert_close(raw.encode(x), plain.encode(x * read), rtol=1e-12, atol=1e-14)


def largest(kind: str, rescale: bool) -> dict[str, Any]:
    """The options of one that has the largest features, with rows of other norms than 1."""
    sae: dict[str, Any] = {"name": kind, "k": 4, "rescale_acts_by_decoder_norm": rescale}
    sae |= dict.fromkeys(("apply_b_dec_to_input", "normalize_sae_decoder"), False)
    return sae | ({"threshold_lr": 1e-9} if kind == "batchtopk" else {})  # it stands still


FIRST = {"b_dec_init_method": "zeros", "init_encoder_as_decoder_transpose": False, "decoder_heuristic_init": False}
"""How weights begin that do not begin as those of another."""


@pytest.mark.parametrize("rescale", [True, False])
@pytest.mark.parametrize("kind", ["topk", "batchtopk"])
@pytest.mark.parametrize("sites", [saekit.Sites((A, B)), saekit.Sites((A,), (C,))], ids=lambda s: s.name)
def test_a_saved_one_is_the_same_on_scaled_activations(
    tmp_path: Path, kind: str, rescale: bool, sites: saekit.Sites
) -> None:
    """But for one whose option would have to change for it, with scales of several targets."""
    sae = largest(kind, rescale)
    first = train(config(tmp_path, sites, sae=sae | FIRST, activations={"normalize_activations": "none"}))
    start = {"from_pretrained_path": str(first.folder), "training_tokens": 1}
    table = config(tmp_path, sites, sae=sae, training=start | {"train_batch_size_tokens": 1})
    if rescale and len(sites.targets) > 1:
        needs = (
            "sae.rescale_acts_by_decoder_norm: is True, but with a scale for each site the SAE in .* needs False; set "
            "it to False, or activations.normalize_activations to 'none'$"
        )
        with pytest.raises(ConfigError, match=needs):
            train(table)
        return
    x = torch.cat([sample(site, 40, seed=9) for site in sites.inputs], dim=1)
    with torch.no_grad():
        torch.testing.assert_close(train(table).sae(x), first.sae(x), rtol=1e-6, atol=1e-6)


NORMALIZE = {False: "none", True: "expected_average_only_in"}


@pytest.mark.parametrize(
    ("before", "after", "scaled", "scales"),
    [
        # What was scaled site by site has its norms folded in; by these scales they are all 1.
        (True, True, True, True),
        (True, False, True, True),
        # Folding the norms in changes nothing either, and then any scale may come.
        (True, False, False, False),
        (True, False, False, True),
        (False, False, True, True),
    ],
)
@pytest.mark.parametrize("kind", ["topk", "batchtopk"])
def test_norms_may_be_folded_in_before_training_goes_on(
    tmp_path: Path, kind: str, before: bool, after: bool, scaled: bool, scales: bool
) -> None:
    """``before`` and ``after``: if features are rescaled; ``scaled`` and ``scales``: if activations are."""
    sites = saekit.Sites((A, B))
    normalized = {"normalize_activations": NORMALIZE[scaled]}
    first = train(config(tmp_path, sites, sae=largest(kind, before) | FIRST, activations=normalized))
    assert first.sae.config.rescale_acts_by_decoder_norm is (before and not scaled)
    start = {"from_pretrained_path": str(first.folder), "training_tokens": 1, "train_batch_size_tokens": 1}
    normalized = {"normalize_activations": NORMALIZE[scales]}
    table = config(tmp_path, sites, sae=largest(kind, after), training=start, activations=normalized)
    assert not saekit.plan(table, plugins=manager()).problems
    second = train(table).sae
    x = torch.cat([sample(site, 40, seed=9) for site in sites.inputs], dim=1)
    with torch.no_grad():
        assert first.sae.encode(x).count_nonzero() > 100
        torch.testing.assert_close(second(x), first.sae(x), rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(second.encode(x), first.sae.encode(x), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("normalize", [False, True])
def test_norms_that_are_not_alike_cannot_be_taken_out_again(tmp_path: Path, normalize: bool) -> None:
    normalized = {"normalize_activations": NORMALIZE[normalize]}
    sites = saekit.Sites((A,), (A, C)) if normalize else saekit.Sites((A,), (C,))
    first = train(config(tmp_path, sites, sae=largest("topk", False) | FIRST, activations=normalized))
    start = {"from_pretrained_path": str(first.folder)}
    table = config(tmp_path, sites, sae=largest("topk", True), training=start, activations=normalized)
    said = rf"sae.rescale_acts_by_decoder_norm: is True, but the SAE in {re.escape(str(first.folder))} .* has False"
    assert [re.fullmatch(said, problem) is not None for problem in saekit.plan(table, plugins=manager()).problems] == [
        True
    ]
    with pytest.raises(ConfigError, match=f"^{said}$"):
        train(table)


def test_a_target_among_the_inputs_has_one_scale(tmp_path: Path) -> None:
    saved = train(config(tmp_path, saekit.Sites((A, B), (B,)))).folder
    sae = saekit.SAE.load(saved, plugins=manager())
    assert set(sae.info.metadata["activation_scale"]) == {"a", "b"}


def test_a_source_of_its_own_trains_without_a_model(tmp_path: Path) -> None:
    table = config(
        tmp_path, saekit.Sites((A, B), (C,)), training={"lr": 1e-3, "log_frequency": 1, "training_tokens": 9000}
    )
    result = train(table | {"dataset": {"path": str(tmp_path / "nowhere")}})
    first = saekit.train(table | {"training": table["training"] | {"training_tokens": 100}}, plugins=manager()).metrics[
        "losses/mse_loss"
    ]
    assert result.metrics["losses/mse_loss"] < 0.8 * first
    assert result.held_out is None
    plan = saekit.plan(table, plugins=manager())
    assert not plan.problems
    assert plan.facts["inputs"] == "a of none, width 6, b of none, width 3"
    assert "first context" not in plan.facts


def test_widths_must_be_said_and_be_true(tmp_path: Path) -> None:
    sites = saekit.Sites((A,), (B,))
    silent = {"source": {"name": "drawn", "states": False}}
    with pytest.raises(ConfigError, match="activations.source: is 'test:drawn', which does not say how wide"):
        train(config(tmp_path, sites, activations=silent))
    lying = {"source": {"name": "drawn", "lies": True}, "normalize_activations": "none"}
    with pytest.raises(PluginFailedError, match="test:drawn.* whose rows at a are not 7 wide"):
        train(config(tmp_path, sites, activations=lying, sae={"b_dec_init_method": "zeros"}))
    with pytest.raises(PluginFailedError, match="test:drawn.* widths .* expected a width of 1 or more for d"):
        train(config(tmp_path, saekit.Sites((A,), (saekit.Site(hook_name="d"),))))
    with pytest.raises(ConfigError, match="sae.apply_b_dec_to_input: takes what is added to"):
        train(config(tmp_path, sites, sae={"apply_b_dec_to_input": True}))


def test_rows_of_one_site_are_the_very_ones_of_the_batch() -> None:
    """No step pays for sites that it does not have."""
    batch = Batch({site: sample(site, 10) for site in WIDTHS})
    assert batch.rows_at([A]) is batch.activations[A]
    torch.testing.assert_close(batch.rows_at([C, A])[:, :5], batch.activations[C], rtol=0, atol=0)
    trainer = make_trainer()
    x, target = trainer.rows_of(Batch({saekit.Site(): batch.activations[A]}))
    assert x is batch.activations[A]
    assert target is None
