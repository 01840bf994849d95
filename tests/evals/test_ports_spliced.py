"""What is put in the place of targets, against the fake model's own arithmetic."""

from __future__ import annotations

import math

import pytest
import torch
from saekit_plugins.evals.downstream import DownstreamConfig
from saekit_plugins.evals.downstream.module import DownstreamEval
from support.ports import EARLY, EMBED, HEAD, LATE, WIDTHS, MapConfig, MapSAE
from torch import Tensor

import saekit
from saekit.analysis.examples import feature_peaks
from saekit.evals import variance_metrics
from saekit.testing import FakeBackend

OTHER_HEAD = saekit.Site(hook_name=HEAD.hook_name, hook_head_index=0)
HEADS = saekit.Site(hook_name=HEAD.hook_name)
pytestmark = pytest.mark.usefixtures("one_thread")
ALL = WIDTHS | {OTHER_HEAD: 4, HEADS: 8}
TOKENS = torch.randint(128, (5, 9), generator=torch.Generator().manual_seed(2))


def built(sites: saekit.Sites) -> MapSAE:
    sae = MapSAE(MapConfig(d_sae=30, dtype="float64"), ports=saekit.Ports.of(sites, ALL), activation=torch.relu)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.3)
    return sae


def held(embedding: Tensor) -> dict[saekit.Site, Tensor]:
    """What the model holds where nothing is replaced."""
    return {
        EMBED: embedding, HEADS: embedding, OTHER_HEAD: embedding[..., :4], HEAD: embedding[..., 4:],
        EARLY: 2 * embedding, LATE: 4 * embedding,
    }  # fmt: skip


def loss(put: dict[saekit.Site, Tensor], embedding: Tensor, table: Tensor) -> float:
    """The model's loss with ``put`` in the place of what it holds."""
    embedding = put.get(EMBED, embedding)
    heads = put.get(HEADS, embedding).clone()
    heads[..., :4], heads[..., 4:] = put.get(OTHER_HEAD, heads[..., :4]), put.get(HEAD, heads[..., 4:])
    early = put.get(EARLY, embedding + heads)
    logits = put.get(LATE, 2 * early) @ table.T
    picked = logits[:, :-1].log_softmax(-1).gather(-1, TOKENS[:, 1:, None])
    return float(-picked.mean())


@pytest.mark.parametrize(
    "sites",
    [
        saekit.Sites((EMBED,), (LATE,)),
        saekit.Sites((EMBED, HEAD), (LATE,)),
        saekit.Sites((HEAD,), (EARLY,)),
        saekit.Sites((EARLY, LATE)),
        saekit.Sites((LATE,), (EMBED, HEAD)),
        saekit.Sites((LATE,), (EARLY,)),
        saekit.Sites((EMBED,), (OTHER_HEAD, HEAD)),
        saekit.Sites((HEAD, OTHER_HEAD)),
        saekit.Sites.one(EARLY),
        saekit.Sites.one(HEAD),
        saekit.Sites.one(HEADS),
    ],
    ids=lambda sites: sites.name,
)
def test_spliced(sites: saekit.Sites) -> None:
    backend, sae = FakeBackend(), built(sites)
    table = backend._embedding().double()
    embedding = table[TOKENS]
    inputs = torch.cat([held(embedding)[site] for site in sites.inputs], dim=-1)
    with torch.no_grad():
        given = sae(inputs).split([ALL[site] for site in sites.targets], dim=-1)
    found = DownstreamEval(DownstreamConfig(batch_size_prompts=2))(sae, backend=backend, sites=sites, contexts=TOKENS)
    reconstructed = loss(dict(zip(sites.targets, given, strict=True)), embedding, table)
    ablated = loss({site: torch.zeros_like(held(embedding)[site]) for site in sites.targets}, embedding, table)
    clean = loss({}, embedding, table)
    assert found["ce_loss_without_sae"] == pytest.approx(clean, rel=1e-5)
    assert found["ce_loss_with_sae"] == pytest.approx(reconstructed, rel=1e-5)
    assert found["ce_loss_with_ablation"] == pytest.approx(ablated, rel=1e-5)
    assert found["ce_recovered"] == pytest.approx((ablated - reconstructed) / (ablated - clean), rel=1e-4)
    assert len(backend.forwards) == 9, "three for each batch"


def test_explained_variance_is_that_of_targets() -> None:
    sites = saekit.Sites((EMBED,), (HEAD, LATE))
    sae = built(sites)
    generator = torch.Generator().manual_seed(1)
    x, y = (torch.randn(70, width, generator=generator, dtype=torch.float64) + 1 for width in (8, 12))
    found = variance_metrics(sae, [(x[:50], y[:50]), (x[50:], y[50:])])
    with torch.no_grad():
        output = sae(x)
    for name, columns in {"": slice(0, 12), f"/{HEAD.name}": slice(0, 4), f"/{LATE.name}": slice(4, 12)}.items():
        wanted, given = y[:, columns], output[:, columns]
        expected = 1 - float((wanted - given).pow(2).sum() / (wanted - wanted.mean(0)).pow(2).sum())
        assert found[f"explained_variance{name}"] == pytest.approx(expected, rel=1e-12)
    assert found["l2_norm_in"] == pytest.approx(float(y.norm(dim=1).mean()))
    assert math.isnan(variance_metrics(sae, [(x[:3], torch.ones(3, 12, dtype=torch.float64))])["explained_variance"])


def test_peaks_are_of_all_inputs() -> None:
    sites = saekit.Sites((EMBED, HEAD), (LATE,))
    backend, sae = FakeBackend(), built(sites)
    embedding = backend._embedding().double()[TOKENS]
    with torch.no_grad():
        features = sae.encode(torch.cat([embedding, embedding[..., 4:]], dim=-1))[:, 1:]  # not of BOS
    peaks = feature_peaks(sae, backend=backend, sites=sites, contexts=TOKENS, n=1, batch_size=2)
    assert torch.equal(peaks.fired, (features > 0).sum((0, 1)))
    torch.testing.assert_close(peaks.values[0], features.amax((0, 1)).float())
