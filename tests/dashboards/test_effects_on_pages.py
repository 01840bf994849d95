"""What removing features does to the loss, on a page: when it is told, and that it is what was computed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from support.odd_tokens import LATE, OddBackend, collected, several_saes
from support.saes import at

import saekit
from saekit.analysis.loss_effects import LossEffects
from saekit.commands.dashboards import _tell_how_long
from saekit.dashboards.effects import PageEffects
from saekit.errors import ConfigError, SaekitError
from saekit.status import Status

SHOWN = [5, 7, 3]
NAMES = ["topk", "transcoder", "crosscoder"]


@pytest.fixture(scope="module")
def some(tmp_path_factory: pytest.TempPathFactory, contexts: torch.Tensor) -> tuple[dict[str, Any], Path]:
    """SAEs, and the folder of their store."""
    saes = {name: sae for name, sae in several_saes().items() if name in NAMES}
    return saes, collected(saes, tmp_path_factory.mktemp("effects") / "store", contexts).folder


def saes_of(page: Path) -> list[dict[str, Any]]:
    text = page.read_text(encoding="utf-8").split('<script type="application/json" id="data">')[1]
    found: list[dict[str, Any]] = json.loads(text[: text.index("</script>")])["saes"]
    return found


def windows(feature: dict[str, Any]) -> list[dict[str, Any]]:
    return [*feature["top"], *(one for quantile in feature["quantiles"] for one in quantile["windows"])]


def test_a_page_of_saes_tells_what_removing_features_does(
    some: tuple[dict[str, Any], Path], contexts: torch.Tensor, tmp_path: Path
) -> None:
    saes, folder = some
    asked: dict[str, Any] = {"model": OddBackend(), "contexts": contexts, "device": "cpu", "verbose": False}
    page = saekit.dashboard(saes, folder=folder, features=SHOWN, top=2, per_quantile=1, out=tmp_path, **asked)
    store = saekit.FeatureStore.open(folder)
    for name, found in zip(NAMES, saes_of(page), strict=True):
        effects = LossEffects.of(store.saes[name], saes[name], OddBackend())
        for index in SHOWN:
            feature, own = found["features"][str(index)], store.saes[name].feature(index)
            assert feature["loss_effect_kind"] == "exact"
            assert (windows(feature) == []) == (index == 3 and name != "crosscoder")
            for one in windows(feature):
                shown = own.window(one["context"], one["start"] + one["at"], (10, 10))
                (wanted,) = effects.of_windows([(index, shown)])
                known = len([value for value in wanted if value is not None])
                assert one["loss_effects"][:known] == pytest.approx([*wanted][:known], rel=6e-3, abs=1e-5)
                assert one["loss_effects"][known:] == [*wanted][known:]
    assert any(any(one["loss_effects"][:-1]) for one in windows(saes_of(page)[0]["features"]["5"]))


def test_what_was_found_ahead_is_not_computed_again(
    some: tuple[dict[str, Any], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    saes, folder = some
    own = saekit.FeatureStore.open(folder).saes["topk"]
    effects = PageEffects(LossEffects.of(own, saes["topk"], OddBackend()))
    look, done = saekit.dashboards.Look(top=3, per_quantile=1), list[int]()
    alone = [saekit.dashboards.feature_data(own.feature(index), look, effects=effects) for index in SHOWN]
    takes = list[float]()
    effects.ahead([own.feature(index) for index in SHOWN], look, done.append, takes.append)
    assert done == [2, 1]
    assert len(takes) == 1
    assert takes[0] > 0
    monkeypatch.setattr(LossEffects, "of_windows", None)
    assert [saekit.dashboards.feature_data(own.feature(index), look, effects=effects) for index in SHOWN] == alone


def test_what_takes_long_says_so_and_what_is_quicker(capsys: pytest.CaptureFixture[str]) -> None:
    with Status() as say:
        _tell_how_long(say, "exact", 3.0)
        assert not capsys.readouterr().err
        _tell_how_long(say, "exact", 90.0)
        told = capsys.readouterr().err
        _tell_how_long(say, "direct", 90.0)
    assert told.startswith("what removing features does to the loss takes about 1.5 min more: --loss-effects direct")
    assert "--no-loss-effects" in told
    assert "--loss-effects direct" not in capsys.readouterr().err


def test_a_store_alone_says_nothing_of_the_loss(some: tuple[dict[str, Any], Path], tmp_path: Path) -> None:
    _, folder = some
    for way in ("auto", None):
        page = saekit.dashboard(folder, out=tmp_path, features=[5], loss_effects=way)
        feature = saes_of(page)[0]["features"]["5"]
        assert feature["loss_effect_kind"] is None
        assert not [one for one in windows(feature) if "loss_effects" in one]
    with pytest.raises(ConfigError, match=r"'exact' needs the SAE.*folder=.*store.*Without it: loss_effects=None"):
        saekit.dashboard(folder, out=tmp_path, features=[5], loss_effects="exact")


def test_what_is_missing_for_effects_is_told_with_the_way_without(
    some: tuple[dict[str, Any], Path], contexts: torch.Tensor, tmp_path: Path
) -> None:
    saes, folder = some
    asked: dict[str, Any] = {"out": tmp_path, "features": [5], "verbose": False, "folder": folder}
    nameless = at(several_saes()["topk"], LATE)
    with pytest.raises(ConfigError, match="model") as raised:
        saekit.dashboard(nameless, **asked, sae="topk")
    assert raised.value.__notes__ == [
        "That is for what removing features does to the loss. Without it: loss_effects=None (--no-loss-effects)"
    ]
    with pytest.raises(SaekitError, match="there is no direct path to the loss: what is written are several sites"):
        saekit.dashboard(
            saes, loss_effects="direct", sae="crosscoder", model=OddBackend(), contexts=contexts, device="cpu", **asked
        )
    with pytest.raises(ConfigError, match="the store has features of transcoder, and none of .* is that SAE"):
        saekit.dashboard({"topk": saes["topk"]}, **asked, loss_effects="exact", sae="transcoder")
    assert not list(tmp_path.iterdir())
    page = saekit.dashboard(saes, **asked, loss_effects=None)
    assert saes_of(page)[0]["features"]["5"]["loss_effect_kind"] is None
