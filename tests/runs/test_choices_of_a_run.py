"""How often a run turns its configuration into plain data and looks names up: where it writes or compares, and once."""

from __future__ import annotations

import pickle
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from saekit_plugins.architectures.batchtopk.module import BatchTopKSAE
from saekit_plugins.architectures.standard.module import StandardSAE
from saekit_plugins.architectures.topk import TopKConfig
from saekit_plugins.architectures.topk.module import TopKSAE
from support.tiny import hooked_transformer, run_config

import saekit
from saekit.config import files
from saekit.config.converter import ConfigConverter
from saekit.plugins.registry import Registry


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often converters were made, configurations became plain data, and choices were looked up."""
    counts: Counter[str] = Counter()

    def count(owner: Any, name: str, what: str) -> None:
        original = getattr(owner, name)

        def counting(*args: Any, **kwargs: Any) -> Any:
            counts[what] += 1
            return original(*args, **kwargs)

        monkeypatch.setattr(owner, name, counting)

    count(ConfigConverter, "__init__", "converters")
    count(ConfigConverter, "structure", "structured")
    count(files, "plain_table", "plain")
    count(Registry, "get", "looked up")
    count(Registry, "of_config", "looked up")
    return counts


def test_one_training_run(tmp_path: Path, counted: Counter[str]) -> None:
    saekit.train(run_config(tmp_path), model=hooked_transformer())
    assert (counted["converters"], counted["structured"]) == (1, 1)
    # Written: config.toml, what trackers get, a checkpoint's facts, the SAE's options and how its model was loaded.
    # Compared: the source's options between SAEs that train together, the model's with a cache.
    # Looked through for relative paths: the whole, and the options of what it chooses as tables.
    assert counted["plain"] == 7 + 5
    # Eight that the configuration chooses, two evals among them, and the tracker that is always there, for the checks
    # and for the run.
    assert counted["looked up"] == 8 + 3


def test_a_sweep_has_one_converter(tmp_path: Path, counted: Counter[str]) -> None:
    configs = saekit.grid(run_config(tmp_path), {"sae.l1_coefficient": [1, 2]})
    counted.clear()
    saekit.train(configs, model=hooked_transformer())
    assert (counted["converters"], counted["structured"]) == (1, 2)


@pytest.mark.parametrize(
    ("choice", "kind"),
    [("standard", StandardSAE), ({"name": "topk", "k": 4}, TopKSAE), ({"name": "batchtopk", "k": 4}, BatchTopKSAE)],
)
def test_an_sae_is_of_a_class_that_can_be_imported_and_pickled(tmp_path: Path, choice: Any, kind: type) -> None:
    config = run_config(tmp_path) | {"sae": choice}
    config["sae"] = {"d_sae": 64} | ({"name": choice} if isinstance(choice, str) else choice)
    sae = saekit.train(config, model=hooked_transformer()).sae
    assert type(sae) is kind
    back = pickle.loads(pickle.dumps(sae))
    assert type(back) is kind
    x = torch.randn(3, sae.d_in, generator=torch.Generator().manual_seed(0))
    assert torch.equal(back.encode(x), sae.encode(x))
    assert back.config == sae.config


def test_plain_code_needs_no_names(tmp_path: Path) -> None:
    config = saekit.TrainConfig(sae=TopKConfig(k=3, d_sae=64), lr_schedule="cosine")
    loaded = saekit.load_config(config)
    assert loaded.sae.options.k == 3
    assert (loaded.sae.key, loaded.lr_schedule.key) == ("saekit:topk", "saekit:cosine")
    assert saekit.load_config(loaded) == loaded
