"""What fires together, and what features do to outputs: against numpy, and by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.saes import at, drawn_sae
from support.tiny import hooked_transformer

import saekit
from saekit.features import collect as collecting
from saekit.features import together as firing
from saekit.testing import FakeBackend

HOOK = "blocks.1.hook_resid_post"


@pytest.mark.parametrize("name", ["one", "two"])
def test_partners_are_those_of_numpy(store: Any, dense: Any, contexts: torch.Tensor, name: str) -> None:
    counted = contexts != 0 if name == "two" else torch.ones_like(contexts, dtype=torch.bool)
    x = dense[name][counted].double().numpy()
    with np.errstate(invalid="ignore", divide="ignore"):
        pearson = np.corrcoef(x.T)
        cosine = (x.T @ x) / np.sqrt(np.outer((x**2).sum(0), (x**2).sum(0)))
        fires = x != 0
        both = fires.T.astype(int) @ fires
        either = (fires[:, :, None] | fires[:, None, :]).sum(0)
        jaccard = both / either
    for feature in store.saes[name]:
        i = feature.index
        others = [j for j in range(x.shape[1]) if j != i and both[i, j]]
        for by, matrix in (("pearson", pearson), ("jaccard", jaccard)):
            found = feature.partners(by)
            assert len(found) == min(20, len(others))
            expected = sorted(others, key=lambda j: -matrix[i, j])[: len(found)]
            assert np.allclose([matrix[i, one.index] for one in found], [matrix[i, j] for j in expected], atol=1e-9)
            for one in found:
                assert one.pearson == pytest.approx(pearson[i, one.index], abs=1e-6)
                assert one.cosine == pytest.approx(cosine[i, one.index], abs=1e-6)
                assert one.jaccard == pytest.approx(jaccard[i, one.index], abs=1e-6)


def test_neurons_are_the_coordinates_of_the_hook(store: Any, dense: Any, contexts: torch.Tensor) -> None:
    held = FakeBackend().run(contexts, read=[HOOK]).held[HOOK].reshape(-1, 8).double().numpy()
    x = dense["one"].reshape(-1, 24).double().numpy()
    for feature in store.saes["one"]:
        found = feature.neurons()
        if feature.dead:
            assert found == []
            continue
        expected = np.corrcoef(x[:, feature.index], held.T)[0, 1:]
        assert [one.index for one in found] == np.argsort(-expected).tolist()
        assert np.allclose([one.pearson for one in found], np.sort(expected)[::-1], atol=1e-6)
        assert all(one.jaccard is None for one in found)


def counting(function: Any, calls: list[str]) -> Any:
    def called(*arguments: Any) -> None:
        calls.append(function.__name__)
        function(*arguments)

    return called


def test_sums_by_any_blocks_products_and_threads_are_the_same(
    store: Any, saes: Any, collect: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def partners(found: Any) -> Any:
        return [[*map(vars_of, feature.partners(by))] for feature in found for by in ("pearson", "jaccard")]

    def vars_of(one: Any) -> tuple[Any, ...]:
        return one.index, round(one.pearson, 5), round(one.cosine, 5), round(one.jaccard, 5)

    usual = partners(store.saes["one"])
    calls: list[str] = []
    monkeypatch.setattr(firing, "_DENSE", 0)
    monkeypatch.setattr(collecting, "UNIT_TOKENS", 60)
    monkeypatch.setattr(collecting, "PART_TOKENS", 120)
    ways = {
        "_add_product": ({"_BYTES": 1, "_WIDTH": 1}, {"_MEASURED": 1}, {"_MKL": False}),
        "_add_dense": ({"_DENSE": 1 << 40, "_ROWS": 17}, {"_DENSE": 1 << 40, "_BYTES": 1}),
    }
    for way, options in ways.items():
        for number, changed in enumerate(options):
            calls.clear()
            with monkeypatch.context() as patch:
                for name, value in changed.items():
                    patch.setattr(firing, name, value)
                for name in ways:
                    patch.setattr(firing, name, counting(getattr(firing, name), calls))
                other = collect(saes["one"], tmp_path / f"{way}-{number}")
            assert partners(other.sae) == usual
            assert set(calls) == {way}


def test_blocks_and_threads_change_no_byte(
    saes: Any, collect: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(firing, "_DENSE", 0)
    monkeypatch.setattr(firing, "_WIDTH", 8)  # then sums of three parts are made together
    for name, tokens in (("UNIT_TOKENS", 60), ("PART_TOKENS", 120)):
        monkeypatch.setattr(collecting, name, tokens)
    folders = []
    for size, threads in ((1 << 26, 1), (1, 1), (1500, 3)):
        monkeypatch.setattr(firing, "_BYTES", size)
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        folders.append(collect(saes["one"], tmp_path / f"{size}-{threads}").folder)
    assert len({(folder / "sae-0" / "together.safetensors").read_bytes() for folder in folders}) == 1


def test_ties_go_to_the_lowest_numbers_and_rows_may_be_short() -> None:
    values = torch.tensor([[1.0, 3, 3, 3], [0, 2, 0, 1]])
    none = torch.tensor([[False, False, False, False], [True, False, True, True]])
    found = firing.strongest("value", {"value": values, "other": -values}, 2, none)
    assert found["index"].tolist() == [[1, 2], [1, -1]]
    assert found["value"].tolist() == [[3, 3], [2, 0]]
    assert found["other"].tolist() == [[-3, -3], [-2, 0]]


def test_alignment_and_neighbors_are_those_of_the_decoder(store: Any, saes: Any) -> None:
    rows = saes["one"].W_dec.detach()
    unit = rows / rows.norm(dim=1, keepdim=True)
    for feature in store.saes["one"]:
        row = rows[feature.index]
        expected = row.sort(descending=True)
        assert [index for index, _, _ in feature.alignment()] == expected.indices.tolist()
        assert [value for _, value, _ in feature.alignment()] == expected.values.tolist()
        shares = row[expected.indices].abs() / row.abs().sum()
        assert np.allclose([share for _, _, share in feature.alignment()], shares)
        cosines = unit @ unit[feature.index]
        cosines[feature.index] = -9
        assert [index for index, _ in feature.neighbors(5)] == cosines.topk(5).indices.tolist()


def test_logits_are_the_direction_times_the_unembedding(store: Any, saes: Any) -> None:
    weights = FakeBackend().unembedding()[0]
    for feature in store.saes["one"]:
        expected = saes["one"].W_dec[feature.index].detach() @ weights
        found = feature.logits
        top, bottom = expected.topk(20), (-expected).topk(20)
        assert [number for number, _, _ in found.top] == top.indices.tolist()
        assert np.allclose([value for _, _, value in found.top], top.values, atol=1e-5)
        assert [number for number, _, _ in found.bottom] == bottom.indices.tolist()
        assert found.top[0][1] == chr(found.top[0][0])
        assert found.histogram.counts.sum() == 128
        assert np.allclose(found.histogram.edges[[0, -1]], [expected.min(), expected.max()], atol=1e-5)
        assert (found.mean, found.std) == pytest.approx((float(expected.mean()), float(expected.std(correction=0))))


@pytest.mark.parametrize(
    ("hook", "head", "width"),
    [("attn.hook_z", None, 16), ("attn.hook_z", 1, 8), ("mlp.hook_post", None, 64), ("attn.hook_q", None, 16)],
)
def test_directions_go_through_the_weights_behind_the_hook(
    collect: Any, tmp_path: Path, contexts: torch.Tensor, hook: str, head: int | None, width: int
) -> None:
    model = hooked_transformer()
    site = saekit.Site(hook_name=f"blocks.1.{hook}", hook_head_index=head)
    sae = at(drawn_sae(width, d_sae=4), site)
    feature = collect(sae, tmp_path / "store", model=saekit.load_model(model)).feature(2)
    if hook == "attn.hook_q":
        assert feature.logits is None
        assert feature.sae.why_no_logits == (
            "blocks.1.attn.hook_q is not in the residual stream, and the backend knows no weights that lead there"
        )
        return
    block = model.blocks[1]
    weights = block.mlp.W_out if hook == "mlp.hook_post" else block.attn.W_O.flatten(0, 1)
    weights = weights if head is None else block.attn.W_O[head]
    expected = (sae.W_dec[2] @ weights @ model.W_U).detach()
    assert [number for number, _, _ in feature.logits.top] == expected.topk(20).indices.tolist()
    assert feature.logits.top[0][2] == pytest.approx(float(expected.max()), rel=1e-5)
