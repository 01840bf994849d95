"""Recipes say what `saekit plan` counts, from the configurations of the models that they name."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Mapping
from functools import cache

import pytest
from support.outlines import CONFIGS, put_in_cache

import saekit
from saekit.config.recipes import find_recipe, recipes
from saekit.planning.plan import Plan
from saekit.plugins.manager import default_manager

GPU = ["model.device=cuda", "training.device=cuda"]
CPU = ["model.device=cpu", "training.device=cpu"]
COUNTED = ("training", "site", "SAE", "memory on cuda", "memory on cpu", "disk")


@pytest.fixture(scope="module", autouse=True)
def _cache() -> None:
    for name, config in CONFIGS.items():
        put_in_cache(name, config)


@cache
def planned(name: str) -> Plan:
    """Without any weights."""
    config = saekit.recipe(name, CPU if name == "laptop" else GPU)
    found = saekit.plan(config, load=False)
    assert found.problems == []
    return found


def comment(facts: Mapping[str, str]) -> list[str]:
    """The lines of a recipe that say them."""
    lines = []
    for name in COUNTED:
        if name in facts:
            text = re.sub(r"; \S+ \w+ are free$", "", facts[name])
            text = re.sub(r"(\d) (\w?B|bytes)\b", "\\1\N{NO-BREAK SPACE}\\2", text)  # stay together
            lines += textwrap.wrap(text, 120, initial_indent=f"#   {name:16}", subsequent_indent="#" + " " * 19)
    return [line.replace("\N{NO-BREAK SPACE}", " ") for line in lines]


@pytest.mark.parametrize("name", [found.name for found in recipes()])
def test_the_sizes_in_a_recipe_are_those_that_plan_counts(name: str) -> None:
    if missing := default_manager().bound("model_backends", saekit.recipe(name).model.backend).item.missing():
        pytest.skip(f"{missing} is not installed")
    lines = find_recipe(name).comment
    start = next(n for n, line in enumerate(lines) if line.startswith("# Sizes:")) + 1
    end = next(n for n, line in enumerate(lines) if line.startswith("# Time:"))
    expected = comment(planned(name).facts)
    assert lines[start:end] == expected, "\n".join(["write:", *expected])


def test_they_are_the_models_that_they_are_said_to_be() -> None:
    """Names, hooks and widths of the libraries' own tables; parameters as they are published."""
    library = pytest.importorskip("transformer_lens.loading_from_pretrained")  # of transformer_lens 3
    from transformer_lens.supported_models import OFFICIAL_MODEL_NAMES

    official_names = {"gpt2-small-residual": "gpt2", "pythia-160m-attention": "EleutherAI/pythia-160m-deduped"}
    for name, official in official_names.items():
        assert library.get_official_model_name(saekit.recipe(name).model.name) == official
        assert official in OFFICIAL_MODEL_NAMES
    widths = {
        "gpt2-small-residual": 768, "pythia-160m-attention": 12 * 64, "gemma-2-2b-topk": 2304, "laptop": 128,
    }  # fmt: skip
    for name, width in widths.items():
        assert planned(name).numbers["d_in"] == width
    assert planned("gemma-2-2b-topk").numbers["model_bytes"] == pytest.approx(2_614_341_888 * 2, rel=1e-3)
    assert saekit.recipe("gemma-2-2b-topk").model.name in OFFICIAL_MODEL_NAMES
