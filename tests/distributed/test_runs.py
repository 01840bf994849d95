"""Runs of two processes: who reads what, who writes, what is refused before anything runs."""

from __future__ import annotations

import json
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import attrs
import pytest
import torch
from support.processes import Call, Results, trained
from support.spread_cases import CASES, label
from support.spread_runs import FEW, SeededSource, manager, options, run

import saekit
from saekit.config.files import load_config
from saekit.data import Corpus
from saekit.distributed import ALONE
from saekit.testing import FakeBackend

BOTH = pytest.mark.parametrize("mesh", [(2, 1), (1, 2)], ids=["data", "features"])
Mesh = tuple[int, int]
COMPILED = {"gated": attrs.evolve(CASES["gated"], steps=4)}
RUNS: dict[str, dict[str, Any]] = {
    "topk run": {"sae": {"name": "topk", "k": 3, "d_sae": 12}, "evals": {"every_n_steps": 4}},
    "odd batches": {"training": {"train_batch_size_tokens": 201}},
}


def calls(folder: Path) -> dict[str, Call]:
    runs, made = "support.spread_runs", {}
    for data, features in ((2, 1), (1, 2)):
        made |= {
            label("text", data, features): Call(f"{runs}:text", data, features),
            label("seeded", data, features): Call(f"{runs}:of_stranger", data, features, ("seeded",)),
            label("moody", data, features): Call(f"{runs}:of_stranger", data, features, ("moody",)),
            label("turned", data, features): Call(f"{runs}:of_stranger", data, features, ("turned",)),
            label("broken", data, features): Call(f"{runs}:of_stranger", data, features, ("broken",)),
            label("gain", data, features): Call(f"{runs}:of_strangers_architecture", data, features, (str(folder),)),
        }
        for name, changes in RUNS.items():
            place = str(folder / f"{name}-{data}x{features}")
            made[label(name, data, features)] = Call(f"{runs}:run", data, features, (place, changes))
    made["compiled"] = Call(f"{runs}:compiled", 1, 2, (COMPILED,))  # where they tell each other most
    return made


def expected_tokens() -> Counter[tuple[int, int]]:
    """Document and token of every row, where two read every other document each."""
    config = load_config(options(Path("nowhere"), dataset={"on_exhausted": "stop"}), plugins=manager())
    rows: Counter[tuple[int, int]] = Counter()
    for number in range(2):
        corpus = Corpus.of(config.dataset, config.evals, FEW)
        contexts = attrs.evolve(corpus, part=(number, 2)).contexts(FakeBackend()).take(10**6)
        rows.update(zip(contexts.documents.ravel().tolist(), contexts.tokens.ravel().tolist(), strict=True))
    return rows


@BOTH
def test_every_token_is_read_once(mesh: Mesh, found: Results) -> None:
    data, features = mesh
    processes = found[label("text", data, features)]
    read = processes if data > 1 else processes[:1]  # those of a feature group have the same rows
    seen: Counter[tuple[int, int]] = Counter()
    for batches in read:
        for batch in batches:
            seen.update(zip(batch["documents"].tolist(), batch["tokens"].tolist(), strict=True))
    assert seen == expected_tokens()


@BOTH
def test_all_make_as_many_steps_though_one_text_is_longer(mesh: Mesh, found: Results) -> None:
    data, features = mesh
    one, other = found[label("text", data, features)]
    assert len(one) == len(other) > 3
    for mine, theirs in zip(one, other, strict=True):
        if features > 1:
            assert torch.equal(mine["first"], theirs["first"])
            assert mine["counts"] == theirs["counts"] == ()
        elif mine["counts"]:
            assert mine["counts"] == theirs["counts"] == (mine["rows"], theirs["rows"])
    whole = [batch["rows"] if features > 1 else sum(batch["counts"] or (batch["rows"],)) for batch in one]
    assert whole[0] == 200
    assert whole[-1] < 200, "one text ends before the other"
    assert all(before >= after for before, after in pairwise(whole))


@BOTH
def test_a_source_that_knows_nothing_of_it_is_cut(mesh: Mesh, found: Results) -> None:
    data, features = mesh
    processes = found[label("seeded", data, features)]
    config = load_config(options(Path("nowhere"), evals={"run": []}), plugins=manager())
    stream: Any = attrs.make_class("Stream", ["sites", "batch_size", "seed"])
    from saekit.runs.opening import seed_for

    source = SeededSource(None, stream([config.site], 200, seed_for(config.training.seed, "shuffle")))
    for number, batch in enumerate(source):
        whole = batch.activations[config.site]
        parts = [process[number] for process in processes]
        assert torch.equal(torch.cat(parts) if data > 1 else parts[1], whole)


@BOTH
def test_a_source_that_differs_between_processes_is_told(mesh: Mesh, found: Results) -> None:
    """Also one that has the same rows in another order."""
    for said in [*found[label("moody", *mesh)], *found[label("turned", *mesh)]]:
        assert "gave other rows in this process than in another" in said


@BOTH
def test_rows_that_are_no_numbers_are_alike_where_all_have_them(mesh: Mesh, found: Results) -> None:
    """They are told as what they are, by the loss."""
    for batches in found[label("broken", *mesh)]:
        assert len(batches) == 5


@BOTH
def test_a_run_leaves_one_folder(mesh: Mesh, found: Results) -> None:
    first, second = found[label("topk run", *mesh)]
    assert first["folder"] == second["folder"]
    folder = Path(first["folder"])
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]
    assert {path.name for path in folder.iterdir()} == {"config.toml", "metrics.jsonl", "run.json", "sae"}
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert len({line["step"] for line in lines}) >= 8
    assert any("evals/ce_loss_with_sae" in line for line in lines)
    saved = saekit.SAE.load(folder / "sae")
    for result in (first, second):
        assert torch.equal(result["weights"]["b_dec"], first["weights"]["b_dec"])
        assert torch.equal(result["sparsity"], first["sparsity"])
        assert list(result["weights"]["W_dec"].shape) == [12, 8]
    assert saved.d_sae == 12
    assert torch.equal(saved.b_dec, first["weights"]["b_dec"])


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("odd batches", "training.train_batch_size_tokens: is 201, which 2 processes cannot share evenly"),
    ],
)
@BOTH
def test_what_does_not_work_is_refused(name: str, said: str, mesh: Mesh, found: Results) -> None:
    for result in found[label(name, *mesh)]:
        assert said in result["error"]


def test_compiled_steps_are_those_of_one_process(found: Results) -> None:
    """What processes tell each other is between what is compiled."""
    for name, case in COMPILED.items():
        alone = trained(case)
        for result in found["compiled"]:
            several, runs = result[name]
            assert runs >= case.steps
            for key, value in several.weights.items():
                torch.testing.assert_close(value, alone.weights[key], rtol=0, atol=1e-10)


@BOTH
def test_an_architecture_must_say_that_it_works_so(mesh: Mesh, found: Results) -> None:
    name = "data" if mesh[0] > 1 else "features"
    for said in found[label("gain", *mesh)]:
        assert f"distributed.{name}: would split" in said
        assert "GainSAE does not say that it trains so (spreads_over" in said


def test_the_metrics_of_two_are_those_of_one(found: Results, tmp_path: Path) -> None:
    """On rows that are the same."""
    changes: dict[str, Any] = {"sae": {"name": "topk", "k": 3, "d_sae": 12}, "evals": {"every_n_steps": 4}}
    alone = run(ALONE, str(tmp_path), changes)
    for mesh in ((2, 1), (1, 2)):
        both = found[label("topk run", *mesh)][0]["metrics"]
        assert both.keys() == alone["metrics"].keys()
        assert both["details/n_training_tokens"] == alone["metrics"]["details/n_training_tokens"]
