"""What a grid is, in Python and on the command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import attrs
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from saekit_plugins.architectures.standard import StandardConfig
from saekit_plugins.schedules.cosine import CosineConfig
from saekit_plugins.sources.live import LiveConfig

import saekit
from saekit.config.files import dump_config, parse_grid
from saekit.errors import ConfigError

pytestmark = pytest.mark.usefixtures("one_thread")


def test_the_last_axis_of_a_grid_changes_fastest() -> None:
    axes = {"sae.l1_coefficient": [1, 5], "training.lr": [1e-4, 3e-4, 1e-3], "training.seed": range(2)}
    found = [(c.sae.options.l1_coefficient, c.training.lr, c.training.seed) for c in saekit.grid({}, axes)]
    assert found == [(l1, lr, seed) for l1 in (1.0, 5.0) for lr in (1e-4, 3e-4, 1e-3) for seed in (0, 1)]
    assert saekit.grid({}, {}) == [saekit.load_config({})]


@settings(max_examples=30)
@given(
    widths=st.lists(st.integers(1, 1000), min_size=1, max_size=4),
    rates=st.lists(st.floats(1e-9, 1.0, exclude_min=True), min_size=1, max_size=3),
    seeds=st.lists(st.integers(0, 99), min_size=1, max_size=3),
)
def test_a_grid_is_the_product_of_its_axes(widths: list[int], rates: list[float], seeds: list[int]) -> None:
    base = saekit.load_config({"training": {"verbose": False}, "sae": {"l1_coefficient": 2.0, "name": "standard"}})
    configs = saekit.grid(base, {"sae.d_sae": widths, "training.lr": rates, "training.seed": seeds})
    assert len(configs) == len(widths) * len(rates) * len(seeds)
    for index, config in enumerate(configs):
        rest, seed = divmod(index, len(seeds))
        width, rate = divmod(rest, len(rates))
        point = {"lr": rates[rate], "seed": seeds[seed]}
        assert config == attrs.evolve(
            base, sae=attrs.evolve(base.sae.options, d_sae=widths[width]), training=attrs.evolve(base.training, **point)
        )


def test_a_grid_starts_from_a_file_a_dict_or_a_config(tmp_path: Path) -> None:
    table = {"training": {"seed": 3}, "sae": {"name": "standard", "l1_coefficient": 2.0, "d_sae": 32}}
    config = saekit.load_config(table)
    (tmp_path / "run.toml").write_text(dump_config(config))
    axes = {"sae.d_sae": [64, 128]}
    expected = [attrs.evolve(config, sae=attrs.evolve(config.sae.options, d_sae=width)) for width in (64, 128)]
    for base in (table, config, tmp_path / "run.toml", str(tmp_path / "run.toml")):
        assert saekit.grid(base, axes) == expected
    assert table["sae"]["d_sae"] == 32, "what was passed stays as it was"


def test_plugins_and_their_options_are_axes() -> None:
    schedules = ["constant", {"name": "cosine", "end": 1e-5}, CosineConfig(end=2e-5)]
    found = [config.lr_schedule for config in saekit.grid({}, {"lr_schedule": schedules})]
    assert found == ["saekit:constant", CosineConfig(end=1e-5), CosineConfig(end=2e-5)]
    assert schedules[1] == {"name": "cosine", "end": 1e-5}

    ends = [
        c.lr_schedule.options.end for c in saekit.grid({"lr_schedule": "cosine"}, {"lr_schedule.end": [1e-6, 1e-5]})
    ]
    assert ends == [1e-6, 1e-5]
    sources = saekit.grid(
        {}, {"activations.source.n_batches_in_buffer": [8, 16], "sae.activation": ["relu", "tanh-relu"]}
    )
    assert [config.activations.source for config in sources] == [
        LiveConfig(n_batches_in_buffer=n) for n in (8, 8, 16, 16)
    ]
    assert [config.sae.options.activation for config in sources] == ["saekit:relu", "saekit:tanh-relu"] * 2


@pytest.mark.parametrize("base", [StandardConfig(d_sae=8), {"name": "standard", "d_sae": 8}])
def test_options_of_a_plugin_that_is_an_object(base: Any) -> None:
    found = [config.sae for config in saekit.grid({"sae": base}, {"sae.l1_coefficient": [1, 2]})]
    assert found == [StandardConfig(d_sae=8, l1_coefficient=1.0), StandardConfig(d_sae=8, l1_coefficient=2.0)]


@pytest.mark.parametrize("plugin_first", [True, False])
def test_a_plugin_and_its_options_as_axes_in_any_order(plugin_first: bool) -> None:
    table = {"name": "standard", "d_sae": 8}
    axes = [("sae", [table, StandardConfig(d_sae=16)]), ("sae.l1_coefficient", [1.0, 2.0])]
    found = [
        (c.sae.options.d_sae, c.sae.options.l1_coefficient)
        for c in saekit.grid({}, dict(axes if plugin_first else axes[::-1]))
    ]
    expected = [(8, 1.0), (8, 2.0), (16, 1.0), (16, 2.0)]
    assert found == (expected if plugin_first else [expected[n] for n in (0, 2, 1, 3)])
    assert table == {"name": "standard", "d_sae": 8}, "what was passed stays as it was"


def test_axes_are_whatever_holds_several_values() -> None:
    for axis in ((1.0, 2.0), np.array([1.0, 2.0]), torch.tensor([1.0, 2.0]), (float(n) for n in (1, 2)), [1, 2]):
        assert [config.sae.options.l1_coefficient for config in saekit.grid({}, {"sae.l1_coefficient": axis})] == [
            1.0,
            2.0,
        ]


@pytest.mark.parametrize(
    ("axes", "message"),
    [
        ({"training.lr": []}, r"training.lr: an axis of a grid needs a list of values, found \[\]"),
        ({"training.lr": 1e-4}, "training.lr: an axis of a grid needs a list of values, found 0.0001"),
        ({"lr_schedule": "cosine"}, "lr_schedule: an axis of a grid needs a list of values, found 'cosine'"),
        ({"lr_schedule": {"name": "cosine"}}, "lr_schedule: an axis of a grid needs a list"),
        ({"training.l": [1e-4]}, "training.l: is not an option. Did you mean 'lr'"),
        ({"trainnig.lr": [1e-4]}, "trainnig: is not an option. Did you mean 'training'"),
        ({"sae.l1_coeficient": [1]}, "sae.l1_coeficient: is not an option. Did you mean 'l1_coefficient'"),
        ({"lr_schedule": ["cosin"]}, "Did you mean 'cosine'"),
        ({"training.lr": [1e-4, "fast"]}, "training.lr: expected a number, found 'fast'"),
        ({"training.lr": [1e-4, -1.0]}, "training.lr: must be above 0, found -1.0"),
        ({"training.lr.x": [1]}, "lr is 0.0004, which has no options to set"),
    ],
    ids=str,
)
def test_bad_axes(axes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        saekit.grid(saekit.load_config({}), axes)


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("sae.l1_coefficient=1,5", [1, 5]),
        ("training.lr=1e-4,3e-4", [1e-4, 3e-4]),
        ("training.lr = 1e-4 , 3e-4", [1e-4, 3e-4]),
        ("training.lr=[1e-4, 3e-4]", [1e-4, 3e-4]),
        ("sae.activation=relu,tanh-relu", ["relu", "tanh-relu"]),
        ("training.autocast=true,false", [True, False]),
        ("sae.activation=relu", ["relu"]),
        ('site.hook_name="a,b",c', ["a,b", "c"]),
        ("site.hook_name='a,b','c'", ["a,b", "c"]),
        ('evals.run=[["reconstruction"], []]', [["reconstruction"], []]),
        ('evals.run=["reconstruction"],[]', [["reconstruction"], []]),
        ('lr_schedule={name = "cosine", end = 1e-5},constant', [{"name": "cosine", "end": 1e-5}, "constant"]),
        ("a.b=x=1,y=2", ["x=1", "y=2"]),
    ],
)
def test_axes_on_the_command_line(text: str, values: list[Any]) -> None:
    path = text.partition("=")[0].strip()
    assert parse_grid([text]) == {path: values}
    assert [type(value) for value in parse_grid([text])[path]] == [type(value) for value in values]


@given(values=st.lists(st.one_of(st.integers(-(10**9), 10**9), st.booleans(), st.floats(1e-12, 1e12)), min_size=1))
def test_numbers_on_the_command_line(values: list[float]) -> None:
    text = ",".join(json.dumps(value) for value in values)
    assert parse_grid([f"a.b={text}", "c.d=1"]) == {"a.b": values, "c.d": [1]}
    assert parse_grid([f"a.b=[{text}]"]) == {"a.b": values}


@given(
    values=st.lists(
        st.text(
            st.characters(codec="ascii", exclude_characters='"\\', min_codepoint=32, max_codepoint=126), max_size=9
        ),
        min_size=1,
    )
)
def test_texts_in_quotes_on_the_command_line(values: list[str]) -> None:
    assert parse_grid(["a.b=" + ",".join(f'"{value}"' for value in values)]) == {"a.b": values}


@pytest.mark.parametrize("text", ["lr", "=1,2", "training..lr=1", "training.lr=", "training.lr= "])
def test_what_is_no_axis(text: str) -> None:
    with pytest.raises(ConfigError, match="is not an axis of a grid; write section.option=value,value"):
        parse_grid([text])


def test_an_axis_twice() -> None:
    with pytest.raises(ConfigError, match="training.lr: is an axis of the grid twice"):
        parse_grid(["training.lr=1e-4", "sae.d_sae=8", "training.lr=3e-4"])
