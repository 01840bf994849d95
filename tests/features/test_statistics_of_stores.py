"""Statistics of features from a store alone, and by what a store says of how often features fire."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from support.saes import at, drawn_sae
from support.tiny import hooked_transformer

import saekit
from saekit.analysis.feature_statistics import COLUMNS
from saekit.cli import app
from saekit.commands.summaries import summary_of
from saekit.errors import ConfigError, PlaceError
from saekit.splicing.fits import check_fits
from saekit.testing import FakeBackend


def test_a_store_alone_has_the_table_of_its_saes(store: Any, saes: Any) -> None:
    fractions = {name: torch.from_numpy(store.saes[name].firing_fraction) for name in saes}
    expected = saekit.feature_statistics(saes, model=FakeBackend(), fractions=fractions, verbose=False)
    for given in (store, store.folder, [str(store.folder)]):
        found = saekit.feature_statistics(given)
        assert [*found.columns] == [*COLUMNS]
        assert found.attrs["left_out"] == expected.attrs["left_out"]
        for name in COLUMNS:
            if found[name].dtype == np.float64:
                np.testing.assert_allclose(found[name], expected[name], rtol=2e-5, atol=2e-6, err_msg=name)
            else:
                assert found[name].tolist() == expected[name].tolist(), name


def test_some_features_have_their_rows_and_no_logits_where_none_are_asked_for(
    saes: Any, store: Any, collect: Any, tmp_path: Path
) -> None:
    some = saekit.feature_statistics(collect(saes["one"], tmp_path / "some", features=[3, 20]), logits=False)
    whole = saekit.feature_statistics(store)
    assert some["feature"].tolist() == [3, 20]
    assert some["b_enc"].tolist() == whole["b_enc"][[3, 20]].tolist()
    assert some["logit_std"].isna().all()
    ((_, why),) = some.attrs["left_out"].items()
    assert why["logit_std"] == "not asked for"


def test_how_often_features_fire_may_be_a_stores(store: Any, saes: Any, collect: Any, tmp_path: Path) -> None:
    found = saekit.feature_statistics({"other name": saes["two"]}, fractions=store, logits=False, verbose=False)
    with np.errstate(divide="ignore"):
        assert found["log_feature_sparsity"].tolist() == np.log10(store.saes["two"].firing_fraction).tolist()
    with pytest.raises(ConfigError, match=r"fractions: are of a feature store of other SAEs: .* has one, two, and no"):
        saekit.feature_statistics({"x": drawn_sae(8, d_sae=24)}, fractions=store, logits=False, verbose=False)
    some = collect(saes["one"], tmp_path / "some", features=[3, 20])
    with pytest.raises(ConfigError, match=r"fractions: are of 2 of the 24 features of one, which are in .*collect all"):
        saekit.feature_statistics({"one": saes["one"]}, fractions=some, logits=False, verbose=False)


@pytest.mark.parametrize("option", [{"model": "gpt2"}, {"site": "hook"}, {"fractions": torch.ones(24)}])
def test_what_is_for_saes_is_refused_with_a_store(store: Any, option: Any) -> None:
    with pytest.raises(ConfigError, match=f"{next(iter(option))}: is for SAEs: a feature store has the numbers of"):
        saekit.feature_statistics(store, **option)


def test_enrichment_takes_features_that_fire_in_a_store(store: Any, saes: Any) -> None:
    how: dict[str, Any] = {"model": FakeBackend(), "permutations": 0, "k": 24, "verbose": False}
    sets = {"low": [*range(20)]}
    live = set(np.flatnonzero(store.saes["one"].fired).tolist())
    for features in ("skewed", "random"):
        found = saekit.token_set_enrichment(saes["one"], sets, features=features, fractions=store, **how)
        assert set(found.features) == live < set(range(24))
    assert len(saekit.token_set_enrichment(saes["one"], sets, features="random", **how).features) == 24


def test_commands_take_a_store(store: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as done:
        app(["statistics", str(store.folder), "--out", str(tmp_path / "table.csv")])
    assert done.value.code in (0, None)
    assert "40 features are in" in capsys.readouterr().out


def test_a_summary_is_of_the_features_that_fire_and_of_columns_that_are_there() -> None:
    table = pd.DataFrame({
        "sae": pd.Categorical(["one"] * 3), "hook": pd.Categorical(["h"] * 3), "feature": range(3), "layer": [1] * 3,
        "dead": pd.array([False, False, True], dtype="boolean"), "log_feature_sparsity": [-1.0, -3.0, -np.inf],
        "b_enc": [-1e-9] * 3, "logit_std": [np.nan] * 3,
    })  # fmt: skip
    head, numbers, counts = summary_of(table)
    assert head == "one  h"
    row = next(line.split() for line in numbers.splitlines() if line.startswith("log_feature_sparsity"))
    assert row[1:4] == ["2.0", "-2.0", "1.4142"]  # of the two that fire
    assert "logit_std" not in numbers
    assert "-0.0" not in numbers
    assert counts == "3 features, 1 dead (log_feature_sparsity is of the others)"
    table["dead"] = pd.array([None] * 3, dtype="boolean")
    assert [*summary_of(table)][-1] == "3 features, unknown how many are dead"


def test_a_table_that_cannot_be_written_is_refused_before_anything_is_read(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for out, told in (("foo.xlsx", "written as .csv or .parquet"), ("file/foo.csv", "cannot write the table")):
        with pytest.raises(PlaceError, match=told):
            app(["statistics", str(tmp_path / "nothere"), "--out", str(tmp_path / out)])


def test_a_width_that_is_not_the_models_is_told_as_elsewhere() -> None:
    with pytest.raises(ConfigError, match="d_in") as refused:
        saekit.feature_statistics(at(drawn_sae(16), "blocks.0.hook_resid_post"), model=FakeBackend(), verbose=False)
    with pytest.raises(ConfigError) as elsewhere:
        check_fits(at(drawn_sae(16), "blocks.0.hook_resid_post"), FakeBackend())
    assert str(refused.value) == str(elsewhere.value)


def test_shares_of_heads_add_up(collect: Any, tmp_path: Path, store: Any) -> None:
    sae = at(drawn_sae(16, d_sae=4), "blocks.1.attn.hook_z")
    with torch.no_grad():
        sae.W_dec[3] = 0
        sae.W_dec[1, 8:] = 0
    found = collect(sae, tmp_path / "store", model=saekit.load_model(hooked_transformer()))
    norms = sae.W_dec.detach().unflatten(1, (2, 8)).norm(dim=2)
    assert found.feature(0).head_shares() == pytest.approx((norms[0] / norms[0].sum()).tolist())
    assert found.feature(1).head_shares() == [1, 0]
    assert found.feature(3).head_shares() == [0, 0]
    assert store.saes["one"].feature(0).head_shares() is None
