"""Batches of activations by hand are those that a run trains on."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from support.training import DOCUMENTS, fake_run, fakes, train
from torch import Tensor

import saekit
from saekit import ConfigError, ModelError
from saekit.runs.activations import Activations
from saekit.training import SAETrainer

pytestmark = pytest.mark.usefixtures("one_thread")
HOOK = "blocks.0.hook_resid_post"


def opened(config: dict[str, Any]) -> Activations:
    return saekit.open_activations(config, plugins=fakes(), dataset=DOCUMENTS)


def trained_on(config: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> Tensor:
    """All rows that steps were made on, in their order."""
    seen: list[Tensor] = []
    own = SAETrainer.train_on

    def watched(self: SAETrainer, rows: Tensor, *others: Any) -> Any:
        seen.append(rows.clone())
        return own(self, rows, *others)

    with monkeypatch.context() as patch:
        patch.setattr(SAETrainer, "train_on", watched)
        train(config)
    return torch.cat(seen)


@pytest.mark.parametrize("source", ["live", "live, as few forwards as needed", "cached"])
def test_they_are_those_of_the_run(source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = fake_run(tmp_path / "runs", training={"training_tokens": 1000})  # the last batch is smaller
    if source == "cached":
        config["activations"] = {"cache": {"folder": str(tmp_path / "cache")}}
        saekit.cache_activations(config, plugins=fakes(), dataset=DOCUMENTS)
        config["activations"]["source"] = {"name": "cached", "folder": str(tmp_path / "cache")}
    elif source != "live":
        config["activations"] = {"source": {**config["activations"]["source"], "refill": "needed"}}
    with opened(config) as activations:
        assert (activations.left, activations.widths) == (1000, {HOOK: 8})
        batches = list(activations)
        assert repr(activations) == f"Activations({HOOK} [8], 1,000 of 1,000 tokens read)"
    assert [len(batch) for batch in batches] == [256, 256, 256, 232]
    assert torch.equal(torch.cat([batch[HOOK] for batch in batches]), trained_on(config, monkeypatch))
    assert list((tmp_path / "runs").iterdir()), "the run's own"


def test_nothing_is_written_and_no_thread_is_left(tmp_path: Path) -> None:
    before = threading.active_count()
    with opened(fake_run(tmp_path / "runs")) as activations:
        next(activations)
    assert threading.active_count() == before
    assert not list(tmp_path.iterdir())


def test_contexts_are_those_of_the_text_and_give_its_activations(tmp_path: Path) -> None:
    with opened(fake_run(tmp_path)) as activations, torch.no_grad():
        contexts = activations.contexts(100)
        assert torch.equal(activations.contexts(3), contexts[:3]), "reading them moves nothing on"
        assert contexts.shape == (100, 32)
        held = activations.backend.run(contexts, read=[HOOK]).held[HOOK].flatten(0, 1)
        batch = next(activations)
    assert batch.tokens is not None
    places = [(held == row).all(1).nonzero()[0, 0] for row in batch[HOOK][:16]]
    assert torch.equal(contexts.flatten()[torch.stack(places)], batch.tokens[:16])


def test_mistakes_are_told(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"has no hook 'blocks.7.hook_resid_post'"):
        opened(fake_run(tmp_path, site={"hook_name": "blocks.7.hook_resid_post"}))
    with pytest.raises(ConfigError, match="overrides must be a list of texts"):
        saekit.open_activations({}, "training.lr=1")
    with opened(fake_run(tmp_path)) as activations:
        with pytest.raises(ConfigError, match=r"n: is 0, expected how many contexts, 1 or more"):
            activations.contexts(0)
        with pytest.raises(KeyError, match=f"'hook_embed': this batch has {HOOK}"):
            next(activations)["hook_embed"]


def test_of_a_source_of_its_own_there_are_no_contexts() -> None:
    config = {"model": {"backend": "none"}, "activations": {"source": "toy"}, "evals": {"held_out_every": 0, "run": []}}
    with saekit.open_activations(config, ["training.verbose=false"]) as activations:
        assert len(next(activations)) == 4096
        with pytest.raises(ConfigError, match="no language model"):
            activations.contexts(1)
