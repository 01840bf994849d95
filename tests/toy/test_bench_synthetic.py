"""``saekit bench-synthetic``."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from saekit_plugins.architectures.standard import StandardConfig
from saekit_plugins.architectures.topk import TopKConfig
from support.runs import pressing

import saekit
from saekit import ConfigError
from saekit.commands.bench_synthetic import BenchResult, _Work, bench_synthetic, show_bench
from saekit.errors import UnknownKeyError
from saekit.toy import ToyModel
from saekit.toy.synthetic import Setting, SyntheticBench, averaged, sparsity_choices

QUICK: dict[str, Any] = {"steps": 20, "batch_size": 128, "n_hidden": 8, "l0": (1,), "correlated": (0,)}


@pytest.fixture(scope="module")
def benched(tmp_path_factory: pytest.TempPathFactory) -> tuple[BenchResult, Path]:
    folder = tmp_path_factory.mktemp("bench")
    bench = SyntheticBench(architectures=("topk", "matryoshka"), superposition=(4, 1), seeds=2, **QUICK)
    return bench_synthetic(bench, folder / "new", verbose=False), folder / "new"


def test_every_architecture_is_measured_on_every_kind_of_data(benched: tuple[BenchResult, Path]) -> None:
    result, _ = benched
    told = [(row["architecture"], row["setting"]["n_features"], row["seed"]) for row in result.rows]
    assert sorted(told) == sorted(
        (f"saekit:{name}", n, seed) for name in ("topk", "matryoshka") for n in (32, 8) for seed in (0, 1)
    )
    whole = [row for row in result.rows if "problem" not in row]
    assert all(0 < row["mmcs"] <= 1 and 0 <= row["precision"] <= 1 and 0 <= row["recall"] <= 1 for row in whole)
    assert {row["options"]["k"] for row in whole} == {1}
    assert all(row["true_l0"] == pytest.approx(1, abs=0.05) for row in whole)
    assert len({row["mmcs"] for row in whole}) == len(whole), "each seed has directions of its own"
    (problem,) = {row["problem"] for row in result.rows if "problem" in row}
    assert "sae.widths: are" in problem, "what some data are too small for is told, and the rest is measured"


def test_numbers_a_picture_and_a_page_are_written(benched: tuple[BenchResult, Path]) -> None:
    result, folder = benched
    assert sorted(path.name for path in folder.iterdir()) == ["synthetic.html", "synthetic.json", "synthetic.png"]
    assert sorted(result.files) == sorted(folder.iterdir())
    table = json.loads((folder / "synthetic.json").read_text(), parse_constant=pytest.fail)
    assert table["rows"] == list(result.rows)
    assert table["bench"]["steps"] == 20
    page = (folder / "synthetic.html").read_text()
    assert "matryoshka" in page
    assert "http://" not in page.replace("http://www.w3.org", "")
    assert "https://" not in page


def test_the_table_has_the_mean_over_seeds(benched: tuple[BenchResult, Path]) -> None:
    result, _ = benched
    console = Console(file=io.StringIO(), width=200)
    show_bench(result, console)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    rows = [
        row["mmcs"]
        for row in result.rows
        if row["architecture"] == "saekit:topk" and row["setting"]["superposition"] == 4
    ]
    assert f"{sum(rows) / 2:.3f}" in text
    assert text.count("topk") == 2
    assert "saekit:matryoshka (l0 1, correlated 0, superposition 1, seed 0): " in text


def test_of_each_axis_the_first_value_stays_while_another_changes() -> None:
    found = SyntheticBench(l0=(2, 1), correlated=(0, 1), superposition=(2, 4)).settings()
    assert found == {
        Setting(2, 0, 2, 20): ["l0", "correlated", "superposition"],
        Setting(1, 0, 2, 20): ["l0"],
        Setting(2, 1, 2, 20): ["correlated"],
        Setting(2, 0, 4, 20): ["superposition"],
    }
    paired = Setting(2, 0.5, 2, 20).toy(0)
    assert (paired.n_features, paired.n_correlated_pairs, paired.mean_l0) == (40, 10, pytest.approx(2))


def test_rows_are_of_the_size_that_defaults_are_made_for() -> None:
    setting = Setting(2, 0, 2, 20)
    model = ToyModel.random(setting.toy(0))
    model.W.data *= setting.length()
    rows = model.hidden(model.draw(20_000, torch.Generator().manual_seed(0)))
    assert rows.square().sum(1).mean().item() == pytest.approx(20, rel=0.1)


def test_k_is_the_true_l0_and_of_coefficients_several_are_tried() -> None:
    setting = Setting(2.4, 0, 2, 20)
    assert sparsity_choices(TopKConfig, setting, 40) == [{"d_sae": 40, "k": 2}]
    tried = [options["l1_coefficient"] for options in sparsity_choices(StandardConfig, setting, 40)]
    assert tried == pytest.approx([1.5, 5, 15])


def test_means_are_over_seeds_alone() -> None:
    numbers = dict.fromkeys(("precision", "recall", "f1", "l0", "true_l0"), 1.0)
    where = {"l0": 1, "correlated": 0, "superposition": 2}
    rows = [{"architecture": name, "setting": where, "seed": seed, "mmcs": mmcs, **numbers}
            for name, seed, mmcs in (("a", 0, 0.5), ("a", 1, 1.0), ("b", 0, 0.25))]  # fmt: skip
    assert [(row["architecture"], row["mmcs"], row["n"]) for row in averaged(rows)] == [("a", 0.75, 2), ("b", 0.25, 1)]


def test_what_cannot_be_tried_is_left_out_and_told_where_it_was_named(tmp_path: Path) -> None:
    bench = SyntheticBench(superposition=(4,), **QUICK)
    tried, left_out = _Work(bench, saekit.default_manager(), tmp_path).architectures()
    assert {"saekit:standard", "saekit:topk", "saekit:gated", "saekit:jumprelu"} <= {item.key for item in tried}
    assert {"saekit:crosscoder", "saekit:transcoder", "saekit:temporal"} <= {*left_out}
    assert "for inference alone" in left_out["saekit:temporal"]
    with pytest.raises(ConfigError, match="for inference alone"):
        bench_synthetic(SyntheticBench(architectures=("temporal",), **QUICK), verbose=False)
    with pytest.raises(UnknownKeyError, match="Unknown SAE architecture 'topl'. Did you mean 'topk'"):
        bench_synthetic(SyntheticBench(architectures=("topl",), **QUICK), verbose=False)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"l0": (0,)}, "l0: must be one or more numbers, each above 0; found 0"),
        ({"correlated": (0, 2)}, "correlated: must be one or more numbers, each from 0 to 1; found 2"),
        ({"superposition": ()}, "superposition: must be one or more numbers, each above 0; found none"),
        ({"l0": (2, 50), "superposition": (1,)}, "l0: is 50, and 1 features for each of 20 dimensions are 20 features"),
    ],
)
def test_data_that_cannot_be_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        SyntheticBench(**options)


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from saekit.cli import app

    words = ["bench-synthetic", "topk", "--l0", "1", "--correlated", "0", "--superposition", "2", "--hidden", "4"]
    app([*words, "--steps", "3", "--folder", str(tmp_path), "--json"], standalone_mode=False)
    (row,) = json.loads(capsys.readouterr().out)["rows"]
    assert row["architecture"] == "saekit:topk"
    with pytest.raises(ConfigError, match="--l0 takes numbers with commas between, such as 2,1,4; found 'a'"):
        app(["bench-synthetic", "--l0", "a"], standalone_mode=False)


def test_one_that_is_interrupted_names_no_checkpoint_that_is_gone() -> None:
    with pressing(2), pytest.raises(KeyboardInterrupt, match="interrupted; nothing is kept of this bench"):
        bench_synthetic(SyntheticBench(architectures=("topk",), superposition=(2,), **QUICK), verbose=False)
