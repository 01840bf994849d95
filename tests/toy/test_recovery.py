"""How well true features are found: known answers."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

import saekit
from saekit.sae.module import SAEModule
from saekit.toy import ToyConfig, ToyModel, match_directions, measure_recovery


def apart(**options: object) -> ToyModel:
    """Four features along the four axes."""
    config = ToyConfig(n_features=4, n_hidden=4, feature_probability=0.3, **options)  # type: ignore[arg-type]
    model = ToyModel(config)
    model.W.data = torch.eye(4)
    return model


def reads(directions: Tensor, architecture: str = "standard", **options: object) -> SAEModule:
    """An SAE whose features are the projections on ``directions``."""
    rows = normalize(directions, dim=1)
    table = {"name": architecture, "d_in": rows.shape[1], "d_sae": len(rows), **options}
    sae = saekit.SAE.from_dict(table, device="cpu")
    with torch.no_grad():
        sae.W_dec.copy_(rows)
        sae.W_enc.copy_(rows.T)
        sae.b_enc.zero_()
        sae.b_dec.zero_()
    return sae


def test_an_sae_of_the_true_directions_finds_all() -> None:
    found = measure_recovery(reads(torch.eye(4)[[2, 0, 3, 1]]), apart(), rows=500)
    assert found.matches.tolist() == [1, 3, 0, 2]
    for name in ("mmcs", "mmcs_of_found", "matched_cosine", "precision", "recall", "f1", "explained_variance"):
        assert getattr(found, name) == pytest.approx(1.0), name
    assert found.l0 == found.true_l0 == pytest.approx(1.2, abs=0.15)
    assert found.silent == 0
    assert "matches" not in found.as_dict()


def test_each_way_says_something_else() -> None:
    """Two true directions are found, one twice; a third is between two; the opposite of one never fires."""
    half = torch.tensor([[0.0, 0.0, 1.0, 1.0]])
    directions = torch.cat([torch.eye(4)[[0, 0, 1]], half, -torch.eye(4)[:1]])
    found = measure_recovery(reads(directions), apart(), rows=2000)
    near = 0.5**0.5
    assert found.mmcs == pytest.approx((1 + 1 + near + near) / 4)
    assert found.mmcs_of_found == pytest.approx((1 + 1 + 1 + near) / 4), "the silent one does not count"
    assert found.matched_cosine == pytest.approx((1 + 1 + near + 0) / 4)
    assert found.silent == 1
    # The one between fires where either does; of the feature without a match, nothing is right.
    either = 1 - 0.7**2
    assert found.precision == pytest.approx((1 + 1 + 0.3 / either + 0) / 4, abs=0.02)
    assert found.recall == pytest.approx((1 + 1 + 1 + 0) / 4)
    assert found.f1 == pytest.approx((1 + 1 + 2 * 0.3 / (either + 0.3) + 0) / 4, abs=0.02)


def test_fewer_features_than_true_ones_leave_some_without_a_match() -> None:
    found = measure_recovery(reads(torch.eye(4)[[3]]), apart(), rows=500)
    assert found.matches.tolist() == [-1, -1, -1, 0]
    assert found.recall == found.precision == found.mmcs == pytest.approx(0.25)


def test_where_features_are_signed_a_direction_and_its_opposite_are_the_same() -> None:
    found = measure_recovery(reads(-torch.eye(4), "abstopk", k=4), apart(), rows=500)
    assert found.mmcs == found.recall == pytest.approx(1.0)
    assert measure_recovery(reads(-torch.eye(4)), apart(), rows=500).mmcs == 0.0


def test_an_sae_of_another_width_is_refused() -> None:
    with pytest.raises(ValueError, match="reads 3 and writes 3 numbers, and the toy model's hidden layer has 4"):
        measure_recovery(reads(torch.eye(3)), apart())


@pytest.mark.parametrize(("n", "k"), [(1, 1), (2, 4), (4, 4), (5, 3), (6, 5)])
def test_matches_are_the_best_of_all(n: int, k: int) -> None:
    generator = torch.Generator().manual_seed(n * k)
    for _ in range(10):
        true, found = (torch.randn(rows, 3, generator=generator, dtype=torch.float64) for rows in (n, k))
        matches, cosines = match_directions(true, found)
        every = (normalize(true, dim=1) @ normalize(found, dim=1).T).clamp_min(0)
        ways = itertools.permutations([*range(k), *[-1] * max(n - k, 0)], n)
        best = max(sum(every[i, j].item() for i, j in enumerate(way) if j >= 0) for way in ways)
        assert cosines.sum().item() == pytest.approx(best)
        given = matches[matches >= 0].tolist()
        assert len(given) == len(set(given))
        assert torch.equal(cosines > 0, matches >= 0)
