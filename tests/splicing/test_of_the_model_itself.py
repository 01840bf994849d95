"""What is found of a model is not found inside a splice of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from support.saes import at, drawn_sae
from support.spliced import TOKENS, place

import saekit
from saekit.errors import ModelError

pytestmark = pytest.mark.usefixtures("one_thread")

OPEN = "is of the model itself, and something is attached to this one: a splice is open. End its with block first"
KINDS = ("HookedTransformer", "AutoModelForCausalLM", "fake")


@pytest.mark.filterwarnings("ignore:.*hardly better than guessing")  # models whose weights were drawn do
@pytest.mark.filterwarnings("ignore:explained variance is below 0")
@pytest.mark.parametrize("kind", KINDS)
def test_saes_are_not_measured_inside_a_splice(kind: str) -> None:
    there = place(kind)
    sae, other = (at(drawn_sae(there.width, seed=seed), there.late) for seed in range(2))
    options: dict[str, Any] = {"contexts": TOKENS, "n_bootstrap": 0, "verbose": False, "device": "cpu"}
    clean = saekit.evaluate(sae, model=there.backend, **options)
    with saekit.splice(there.target, other):
        for model in {id(one): one for one in (there.target, there.backend)}.values():
            with pytest.raises(ModelError, match=f"what is measured {OPEN}"):
                saekit.evaluate(sae, model=model, **options)
    assert saekit.evaluate(sae, model=there.backend, **options).values == clean.values


@pytest.mark.parametrize("what", ["model", "backend"])
def test_nothing_trains_and_nothing_is_cached_inside_a_splice(what: str, tmp_path: Path) -> None:
    there = place("AutoModelForCausalLM")
    given = getattr(there, what)
    config: dict[str, Any] = {
        "activations": {"cache": {"folder": str(tmp_path / "cache")}},
        "model": {"backend": "AutoModelForCausalLM"},
        "site": {"hook_name": there.late},
        "dataset": {"context_size": 8},
        "sae": {"name": "topk", "d_sae": 32, "k": 4},
        "training": {"training_tokens": 64, "train_batch_size_tokens": 32},
        "evals": {"run": []},
    }
    text = Dataset.from_dict({"input_ids": [[*range(1, 9)]] * 40})
    with saekit.splice(there.model, at(drawn_sae(there.width), there.early)):
        with pytest.raises(ModelError, match=f"what a run trains on or keeps {OPEN}"):
            saekit.train(config, model=given, dataset=text)
        with pytest.raises(ModelError, match=f"what a run trains on or keeps {OPEN}"):
            saekit.cache_activations(config, model=given, dataset=text)
    assert saekit.train(config, model=given, dataset=text).sae.d_sae == 32
