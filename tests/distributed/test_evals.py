"""Evals of several processes: the numbers of one, whoever has made them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import attrs
import pytest
import torch
from support.caches import SITE
from support.processes import Call, together
from support.saes import at, drawn_sae
from support.spread_cases import CASES
from support.spread_evals import ALL, evaluated, manager, measured
from support.spread_runs import options
from support.sweeps import DOCUMENTS

from saekit.config.files import load_config
from saekit.data import Corpus
from saekit.distributed import ALONE
from saekit.testing import FakeBackend
from saekit.values import Histogram

EVALS = "support.spread_evals"
SAES: dict[str, dict[str, Any]] = {
    "standard": {"name": "standard"}, "topk": {"name": "topk", "k": 3}, "quiet": {"name": "quiet"}
}  # fmt: skip
BOTH = ((2, 1), (1, 2))
MEASURED = {
    "dealt out": ("standard", ALL),
    "largest": ("topk", ALL),
    "whole": ("standard", [*ALL, "whole", "simple"]),
    "quiet": ("quiet", ALL),
}
INFERRED = [
    "standard", "topk", "topk_in_units", "batchtopk", "matryoshka", "abstopk", "groupmax", "jumprelu", "gated",
    "crosscoder", "batchtopk_crosscoder", "transcoder_skip", "topk_transcoder_in_units", "jumprelu_transcoder",
    "groupmax_transcoder", "standard_finetuned_scale",
]  # fmt: skip


TOLD = {
    "whole": "whenever test:whole and test:simple measures it, which the first process does alone",
    "quiet": "whenever it is measured: QuietSAE does not say that its parts can be",
}
LIVE = {"name": "live", "store_batch_size_prompts": 2, "n_batches_in_buffer": 20}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An SAE for the fake model."""
    folder = tmp_path_factory.mktemp("saved") / "sae"
    at(drawn_sae(8, d_sae=12, dtype="float64"), "blocks.0.hook_resid_post").save(folder)
    return folder


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory, saved: Path) -> dict[str, list[Any]]:
    calls = {
        f"{name} {data}x{features}": Call(f"{EVALS}:measured", data, features, (SAES[sae], evals))
        for name, (sae, evals) in MEASURED.items()
        for data, features in BOTH
    }
    calls |= {name: Call(f"{EVALS}:inferred", 1, 2, (CASES[name],)) for name in INFERRED}
    calls |= {f"peeked {data}x{features}": Call(f"{EVALS}:peeked", data, features, (LIVE,)) for data, features in BOTH}
    calls["failed"] = Call(f"{EVALS}:failed", 2, 1, ())
    calls["evaluated"] = Call(f"{EVALS}:evaluated", 2, 1, (str(saved),))
    return together(calls, 2, tmp_path_factory.mktemp("evals"))


@pytest.mark.parametrize("mesh", ["2x1", "1x2"])
@pytest.mark.parametrize("name", list(MEASURED))
def test_the_numbers_are_those_of_one_process(found: dict[str, list[Any]], name: str, mesh: str) -> None:
    sae, evals = MEASURED[name]
    alone = measured(ALONE, SAES[sae], evals)
    first, second = found[f"{name} {mesh}"]
    assert second["found"] == {}
    assert (first["remarks"], second["remarks"]) == (alone["remarks"], ())
    assert list(first["found"]) == list(alone["found"])
    assert "evals/kl_div_with_sae_se" in first["found"]
    assert "evals/ce_loss_with_mean_ablation_se" in first["found"]
    for key, expected in alone["found"].items():
        value = first["found"][key]
        if mesh == "2x1" or isinstance(expected, Histogram):
            assert value == expected, f"{key}: to the last bit"
        else:
            assert value == pytest.approx(expected, rel=1e-12, abs=1e-13, nan_ok=True), key
    told = [text for text in first["told"] if "put together" in text]
    assert len(told) == (name in TOLD and mesh == "1x2")
    assert not [text for text in second["told"] if "put together" in text]
    if told:
        assert TOLD[name] in told[0]


def test_an_eval_that_says_nothing_is_run_whole_by_the_first(found: dict[str, list[Any]]) -> None:
    for mesh in ("2x1", "1x2"):
        first = found[f"whole {mesh}"][0]["found"]
        assert first["evals/tokens_seen"] == 7 * 16
        assert first["evals/contexts"] == 7
        assert first["evals/features"] == 12


def test_what_is_wrong_in_what_an_eval_returns_is_an_error_of_all(found: dict[str, list[Any]]) -> None:
    first, second = found["failed"]
    assert "the eval 'test:wordy' returned found = 'no number', expected a number" in first
    assert "of process 0: the eval 'test:wordy' returned found = 'no number'" in second


@pytest.mark.parametrize("name", INFERRED)
def test_parts_give_what_the_whole_gives(found: dict[str, list[Any]], name: str) -> None:
    for one in found[name]:
        assert one["same"]
        assert one["active"] > 20
        assert one["features"] < 1e-13
        assert one["outputs"] < 1e-13


def test_saved_saes_are_measured_by_all_and_told_once(found: dict[str, list[Any]], saved: Path) -> None:
    first, second = found["evaluated"]
    assert [path.name for path in saved.iterdir() if "evals" in path.name] == ["evals.json"]
    written = (saved / "evals.json").read_bytes()
    alone = evaluated(ALONE, str(saved))
    assert first["told"] == second["told"] == alone["told"], "to the last bit"
    assert "ce_recovered_from_mean" in alone["told"]["errors"]
    assert first["warned"] == alone["warned"] != []
    assert second["warned"] == []
    assert (saved / "evals.json").read_bytes() == written


@pytest.mark.parametrize("mesh", BOTH)
def test_estimates_are_of_rows_of_all(found: dict[str, list[Any]], mesh: tuple[int, int]) -> None:
    """As many as one process would look at: its buffer has 40 contexts."""
    config = load_config(options(Path("nowhere"), evals={"run": []}), plugins=manager())
    corpus, backend = Corpus.of(config.dataset, config.evals, DOCUMENTS), FakeBackend()
    shown = []
    for number in range(2):
        contexts = attrs.evolve(corpus, part=(number, 2)).contexts(backend).take(40)
        tokens = torch.from_numpy(contexts.tokens)
        shown.append(SITE.extract(backend.run(tokens, read={SITE.hook_name}).held[SITE.hook_name]).flatten(0, 1)[::2])
    for rows in found["peeked {}x{}".format(*mesh)]:
        assert len(rows) == 40 * 16
        assert torch.equal(rows, torch.cat(shown))
