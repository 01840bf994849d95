"""The model and the text that a store is made of, and folders that cannot take it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support.saes import at, drawn_sae

from saekit.commands import material
from saekit.errors import DataError, PlaceError
from saekit.files import writers
from saekit.testing import FakeBackend

HOOK = "blocks.1.hook_resid_post"


def test_the_model_is_loaded_as_the_sae_says(collect: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def load(model: Any, *, backend: Any, **how: Any) -> FakeBackend:
        asked.append((model, backend))
        return FakeBackend()

    monkeypatch.setattr(material, "load_model", load)
    kwargs = {"fold_ln": False, "center_writing_weights": False}
    about = {"model_class_name": "HookedTransformer", "model_from_pretrained_kwargs": kwargs}
    collect(at(drawn_sae(8, d_sae=4), HOOK, model_name="fake", **about), tmp_path / "store", model=None)
    ((name, backend),) = asked
    assert name == "fake"
    assert backend == {"name": "saekit:HookedTransformer", "from_pretrained_kwargs": kwargs}


@pytest.mark.parametrize(
    ("dataset", "options", "message"),
    [
        (["short"], {"context_size": 64}, "the data does not fill one context of 64 tokens"),
        ([], {"context_size": 8}, "the dataset has no documents"),
    ],
)
def test_text_that_fills_no_context_is_refused(
    collect: Any, tmp_path: Path, dataset: Any, options: Any, message: str
) -> None:
    sae = at(drawn_sae(8, d_sae=4), HOOK, model_name="fake", prepend_bos=False)
    with pytest.raises(DataError, match=message):
        collect(sae, tmp_path / "store", contexts=None, dataset=dataset, **options)
    assert not (tmp_path / "store").exists()


def test_fewer_contexts_than_were_asked_for_are_said(collect: Any, tmp_path: Path) -> None:
    sae = at(drawn_sae(8, d_sae=4), HOOK, model_name="fake", prepend_bos=False)
    how: dict[str, Any] = {"contexts": None, "dataset": ["some text of a few letters"] * 4, "context_size": 8}
    with pytest.warns(RuntimeWarning, match=r"fills \d+ contexts of 8 tokens, and 500 were asked for \(n_contexts\)"):
        store = collect(sae, tmp_path / "store", n_contexts=500, **how)
    assert 0 < store.n_contexts < 500


def test_a_folder_that_cannot_be_written_is_named(
    collect: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(folder: Path) -> Any:
        raise PermissionError(13, "Permission denied", str(folder))

    monkeypatch.setattr(writers, "locked", refused)
    (tmp_path / "store").mkdir()
    sae = at(drawn_sae(8, d_sae=4), HOOK, model_name="fake")
    with pytest.raises(
        PlaceError, match=r"nothing can be written into '.*store': Permission denied\. Name another fold"
    ):
        collect(sae, tmp_path / "store")
    assert not any((tmp_path / "store").iterdir())


def test_a_window_shows_no_more_than_the_text_has(collect: Any, tmp_path: Path) -> None:
    """Neither padding nor tokens of another context: a peak at the first and at the last position."""
    sae = at(drawn_sae(8, d_sae=4), HOOK, model_name="fake")
    contexts = torch.tensor([[*b"abcd"], [*b"wxyz"]])
    feature = collect(sae, tmp_path / "store", contexts=contexts).feature(0)
    shown = {(i, j): feature.window(i, j, (6, 6)).text for i in (0, 1) for j in range(4)}
    assert shown == {(i, j): text for i, text in enumerate(("abcd", "wxyz")) for j in range(4)}
    assert (feature.window(0, 0, (2, 1)).text, feature.window(1, 3, (1, 2)).text) == ("ab", "yz")
