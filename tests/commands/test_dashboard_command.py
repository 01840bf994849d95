"""``saekit dashboard``."""

from __future__ import annotations

import json
import re
from pathlib import Path

import attrs
import pytest
from typer.testing import CliRunner

import saekit
from saekit.cli import app
from saekit.dashboards.place import is_dashboard
from saekit.errors import ConfigError, DataError, SaekitError


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A TopK SAE of the embedded model, in a folder of its own."""
    sae = saekit.SAE.from_dict({"name": "topk", "d_in": 128, "d_sae": 64, "k": 4})
    known = {"model_name": "saekit/tiny-python", "dataset_path": "saekit/python-stdlib", "context_size": 32}
    sites = saekit.Sites.one(saekit.Site(hook_name="blocks.0.hook_resid_post"))
    sae.info = attrs.evolve(sae.info, sites=sites, metadata=known)
    return sae.save(tmp_path_factory.mktemp("saes") / "one")


def run(*arguments: object) -> str:
    done = CliRunner().invoke(app, ["dashboard", *map(str, arguments)], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.stdout


def test_the_command_collects_once_and_says_how_to_open_the_page(folder: Path, tmp_path: Path) -> None:
    labels = tmp_path / "labels.json"
    labels.write_text(json.dumps({"2": "the second"}))
    options = ("--features", "1,2,5-20", "--device", "cpu", "--labels", labels)
    told = run(folder, *options, "--n-contexts", "6", "--window", "3,1").splitlines()[-1]
    page = folder / "dashboard.html"
    assert re.fullmatch(
        rf"The dashboard is {page} \(\d\.\d MB\)\. Open it in a browser: {re.escape(page.as_uri())}", told
    )
    assert is_dashboard(page)
    assert '"label":"the second"' in page.read_text()
    assert '"loss_effect_kind":"exact"' in page.read_text(), "the model is the one that the SAE names"
    store = saekit.FeatureStore.open(folder / "features")
    assert (store.n_contexts, len(store.sae)) == (6, 64)
    run(folder / "features", "--out", tmp_path / "other.html", "--random", 3)
    assert is_dashboard(tmp_path / "other.html")
    with pytest.raises(DataError, match=r"n_contexts: there 6, wanted 7\nTo look at it, .*--folder \S+features-2"):
        run(folder, "--n-contexts", "7", "--device", "cpu")


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ("--features 1 --random 3", "features and random each say which features are shown: give one of them"),
        ("--features 1-", "features: must be numbers such as 1,2,5-20, or all, found"),
        ("--top-by size", "top_by: must be firing, activation or logit, found 'size'"),
        ("--window x", "window: must be tokens before and after, such as 10 or 20,5, or all; found 'x'"),
        ("--labels none.json", "labels: there is no file 'none.json'; it would say"),
        ("--out page", "a dashboard is one file NAME.html, or goes into a folder that is there; found 'page'"),
    ],
)
def test_a_mistake_is_told_before_anything_is_read(
    options: str, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SaekitError, match=re.escape(told)) as caught:
        run("nowhere", *options.split())
    assert caught.value.exit_code == 2
    assert isinstance(caught.value, ConfigError) or "--out" in options
    assert not list(tmp_path.iterdir())
