"""``saekit.compare`` and ``saekit compare``: SAEs of one model on the same contexts."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import attrs
import pytest
import torch
from support.tiny import hooked_transformer
from typer.testing import CliRunner

import saekit
from saekit.cli import app
from saekit.errors import ConfigError, PlaceError
from saekit.evals.comparison import Comparison

pytestmark = pytest.mark.filterwarnings("ignore:.*hardly better than guessing")  # a random model does

SITE = "blocks.0.hook_resid_post"


@pytest.fixture(scope="module")
def backend() -> Any:
    return saekit.load_model(hooked_transformer(), device="cpu")


@pytest.fixture(scope="module")
def contexts() -> torch.Tensor:
    return torch.randint(2048, (12, 16), generator=torch.Generator().manual_seed(0))


def made(backend: Any, contexts: torch.Tensor, noise: float = 0.0, site: str = SITE, k: int = 8, **known: Any) -> Any:
    """An SAE of the principal directions of what the model holds, and their opposites, with ``noise`` on them."""
    held = backend.run(contexts, read={site}).held[site]
    rows = held.flatten(0, 1).double()
    basis = torch.linalg.svd(rows - rows.mean(0), full_matrices=False).Vh.float()
    basis = basis + noise * torch.randn(basis.shape, generator=torch.Generator().manual_seed(1))
    sae = saekit.SAE.from_dict({"name": "topk", "d_in": 16, "d_sae": 32, "k": k})
    with torch.no_grad():
        sae.W_dec.copy_(torch.cat([basis, -basis]) / basis.norm(dim=1).repeat(2)[:, None])
        sae.W_enc.copy_(sae.W_dec.T)
        sae.b_dec.copy_(rows.mean(0))
    metadata = {"model_name": backend.name, "context_size": 16, "prepend_bos": False, **known}
    sae.info = attrs.evolve(sae.info, sites=saekit.Sites.one(saekit.Site(hook_name=site)), metadata=metadata)
    return sae


@pytest.fixture(scope="module")
def found(backend: Any, contexts: torch.Tensor, tmp_path_factory: pytest.TempPathFactory) -> Comparison:
    good, bad = made(backend, contexts), made(backend, contexts, noise=0.4)
    return saekit.compare(
        {"good": good, "copy": good, "bad": bad}, model=backend, contexts=contexts, verbose=False, kl=True,
        out=tmp_path_factory.mktemp("compared") / "new" / "folder",
    )  # fmt: skip


def test_a_copy_is_not_told_apart_and_a_worse_one_is(found: Comparison) -> None:
    for metric in ("explained_variance", "ce_recovered", "l0", "kl_div_with_sae", "mse"):
        same = found.pair(metric, "good", "copy")
        assert (same.difference, same.error) == (0, 0)
        assert not same.distinguishable
        assert "not distinguishable" in found.verdict(same)
    for metric in ("explained_variance", "mse"):
        worse = found.pair(metric, "good", "bad")
        assert worse.distinguishable
        assert found.verdict(worse).startswith("good is better than bad in ")
    assert found.pair("l0", "good", "bad").difference == 0
    assert "good is better in" in found.verdicts()[-1] or "copy is better in" in found.verdicts()[-1]


def test_numbers_are_those_of_evaluate(found: Comparison, backend: Any, contexts: torch.Tensor) -> None:
    alone = saekit.evaluate(made(backend, contexts), model=backend, contexts=contexts, verbose=False, save=False)
    for name in ("explained_variance", "ce_recovered", "l0"):
        assert found.evaluations["good"][name] == pytest.approx(alone[name])


def test_what_is_written(found: Comparison) -> None:
    data, picture, page = found.files
    told = json.loads(data.read_text())
    assert told["saes"]["bad"]["values"]["explained_variance"] == found.evaluations["bad"]["explained_variance"]
    assert len(told["pairs"]) == len(found.pairs)
    assert {pair["verdict"] for pair in told["pairs"]} >= {*found.verdicts()[1:3]}
    assert told["about"]["n_contexts"] == 12
    assert "The intervals of all 3 pairs hold at once for each metric" in " ".join(told["rules"])
    assert picture.read_bytes().startswith(b"\x89PNG")
    text = page.read_text()
    shown = json.loads(text.split('id="data">')[1].split("</script>")[0])
    (group,) = shown["groups"]
    assert [chart["title"] for chart in group["charts"]] == ["Explained variance over L0", "CE recovered over L0"]
    (line, _, _) = group["charts"][0]["lines"]
    ((low, high),) = line["bars"]["y"]
    assert low < line["y"][0] < high
    assert line["labels"] == ["good"]
    assert [table["title"] for table in shown["tables"]] == ["Numbers, ± standard error", "Differences"]
    assert "https://" not in text


def test_what_is_printed(found: Comparison) -> None:
    lines = str(found).splitlines()
    assert lines[0].split() == ["CE", "rec.", "EV", "L0", "KL"]
    assert lines[1].split()[0] == "good"
    assert any(line.startswith("- frontier of L0 and CE recovered, from sparse to dense: ") for line in lines)
    assert not any(line.startswith("- good is better than bad") for line in lines), "only where it is asked for"
    pairs = found.text(pairs=True).splitlines()
    assert any(line.startswith("- good is better than bad in explained variance by 0.") for line in pairs)
    assert any("paired by 12 contexts" in line for line in lines)
    assert lines[-1].startswith("Written: ")
    assert "Verdicts" in found._repr_html_()


def test_several_sites_are_said(backend: Any, contexts: torch.Tensor) -> None:
    saes = {"first": made(backend, contexts), "second": made(backend, contexts, site="blocks.1.hook_resid_post")}
    found = saekit.compare(saes, model=backend, contexts=contexts, verbose=False, n_bootstrap=50)
    assert found.sites == {"first": SITE, "second": "blocks.1.hook_resid_post"}
    assert "at 2 sites" in found.where[0]
    heads = next(found.tables())["head"]
    assert heads[:2] == ["SAE", "site"]
    assert found.files == ()


def test_what_cannot_be_compared(backend: Any, contexts: torch.Tensor, tmp_path: Path) -> None:
    one = made(backend, contexts)
    how: dict[str, Any] = {"model": backend, "contexts": contexts, "verbose": False}
    with pytest.raises(ConfigError, match="must be two or more to be compared, found 1: alone"):
        saekit.compare({"alone": one}, **how)
    with pytest.raises(ConfigError, match="one context cannot say how much contexts differ"):
        saekit.compare([one, one], n_contexts=1, **how)
    special = made(backend, contexts, exclude_special_tokens=[0])
    with pytest.raises(ConfigError, match=r"other tokens count for a than for b \(a: all tokens and b: .*\[0\]"):
        saekit.compare({"a": one, "b": special}, **how)
    assert saekit.compare({"a": one, "b": special}, exclude_special_tokens=True, n_bootstrap=20, **how).pairs
    (tmp_path / "file").write_text("")
    with pytest.raises(PlaceError, match="it is a file; give a folder"):
        saekit.compare([one, one], out=tmp_path / "file", **how)


def test_other_models_are_refused(backend: Any, contexts: torch.Tensor, tmp_path: Path) -> None:
    def result(of: Any) -> Any:
        return SimpleNamespace(
            sae=made(of, contexts), backend=of, folder=tmp_path, corpus=SimpleNamespace(dataset=None)
        )

    model = hooked_transformer()
    model.cfg.model_name = "another"
    other, named = (saekit.load_model(one, device="cpu") for one in (hooked_transformer(seed=1), model))
    runs, how = {"a": result(backend), "b": result(other)}, {"contexts": contexts, "verbose": False}
    with pytest.raises(ConfigError, match=r"'custom' of a has other weights than that of b: losses of two models"):
        saekit.compare(runs, **how)
    with pytest.raises(ConfigError, match="a is of the model 'custom' and c of 'another'"):
        saekit.compare({"a": result(backend), "c": result(named)}, **how)
    assert saekit.compare(runs, model=backend, n_bootstrap=20, **how).pairs


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """SAEs of the embedded model, without their runs."""
    backend = saekit.load_model(device="cpu")
    tokens = torch.randint(2048, (8, 32), generator=torch.Generator().manual_seed(0))
    held = backend.run(tokens, read={SITE}).held[SITE].flatten(0, 1)
    home, found = tmp_path_factory.mktemp("saes"), {}
    for name, size in (("one", 32), ("other", 32), ("long", 24)):
        sae = saekit.SAE.from_dict({"name": "topk", "d_in": held.shape[1], "d_sae": 64, "k": 8}, seed=len(found))
        with torch.no_grad():
            sae.b_dec.copy_(held.mean(0))
        known = {"model_name": "saekit/tiny-python", "dataset_path": "saekit/python-stdlib", "context_size": size}
        sae.info = attrs.evolve(sae.info, sites=saekit.Sites.one(saekit.Site(hook_name=SITE)), metadata=known)
        found[name] = sae.save(home / name)
    return found


@pytest.mark.filterwarnings("ignore:.*worse than.*:UserWarning")
def test_the_command(folders: dict[str, Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    paths = [str(folders["one"]), str(folders["other"])]
    arguments = ["compare", *paths, "--n-contexts", "4", "--device", "cpu", "--out", str(out), "--json"]
    done = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    told = json.loads(done.stdout)
    assert list(told["saes"]) == ["one", "other"], "by what paths do not have in common"
    assert told["about"]["context_size"] == 32
    assert sorted(path.name for path in out.iterdir()) == ["compare.html", "compare.json", "compare.png"]
    assert json.loads((out / "compare.json").read_text()) == told
    with pytest.raises(
        ConfigError, match=r"one and long would be measured on other contexts \(context_size 32 and 24\)"
    ):
        CliRunner().invoke(app, ["compare", str(folders["one"]), str(folders["long"])], catch_exceptions=False)
