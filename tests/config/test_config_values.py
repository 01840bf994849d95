"""Single values: whole floats, NumPy's and torch's numbers, limits."""

from __future__ import annotations

import enum
import math
import subprocess
import sys
from pathlib import Path
from typing import Any, get_args

import attrs
import numpy as np
import pytest
import torch
from support.every_config import Bits, Color, EveryKind, Inner, Level, Mixed, every_config_class, manager

import saekit
from saekit.config import PLUGIN_KIND
from saekit.config.converter import ConfigConverter
from saekit.config.files import load_config, plain_config
from saekit.errors import ConfigError


def of(**options: Any) -> EveryKind:
    return ConfigConverter(manager()).structure({"required": 1, **options}, EveryKind)


def refused(**options: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        of(**options)
    return str(caught.value)


def test_whole_floats_are_whole_numbers() -> None:
    assert load_config({}, ["training.training_tokens=1e6"]).training.training_tokens == 10**6
    assert type(of(required=3.0).required) is int
    assert refused(required=3.9) == "required: expected a whole number, found 3.9"
    assert refused(required=1e300) == "required: expected a whole number, found 1e+300"
    assert refused(required=math.inf) == "required: expected a whole number, found inf"
    assert refused(required=True) == "required: expected a whole number, found True"
    assert of(mixture=3.0).mixture == 3.0
    assert type(of(mixture=3.0).mixture) is float
    assert type(of(token=3.0).token) is int


def test_numbers_of_numpy_and_torch_paths_and_types() -> None:
    config = load_config(
        {
            "training": {"seed": np.int64(3), "lr": np.float32(0.5), "device": torch.device("cuda:1"),
                         "verbose": np.bool_(False), "training_tokens": np.array(1e4)},
            "model": {"dtype": torch.bfloat16, "name": Path("a/b"), "autocast": torch.tensor(True)},
            "sae": {"name": np.str_("standard"), "d_sae": torch.tensor(64), "lp_norm": torch.tensor(2.0)},
            "dataset": {"data_files": np.array(["a", "b"])},
        }
    )  # fmt: skip
    training = config.training
    assert (training.seed, training.lr, training.device, training.verbose) == (3, 0.5, "cuda:1", False)
    assert (config.model.dtype, config.model.name, config.model.autocast) == ("bfloat16", "a/b", True)
    assert (config.sae.options.d_sae, config.sae.options.lp_norm, config.dataset.data_files) == (64, 2.0, ("a", "b"))
    for value in (training.seed, training.lr, training.verbose, training.training_tokens, config.sae.options.d_sae):
        assert type(value) in (int, float, bool)
    inside = of(words={"dtype": torch.float16, "n": np.arange(2), "where": Path("x"), "color": Color.RED}).words
    assert inside == {"dtype": "float16", "n": [0, 1], "where": "x", "color": "red"}
    assert "found tensor" in refused(required=torch.zeros(2, 2)) or "found [[" in refused(required=torch.zeros(2, 2))


def test_the_converter_imports_neither_torch_nor_numpy() -> None:
    code = "import sys, saekit.config.converter; sys.exit(bool({'torch', 'numpy'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_what_is_no_plain_data() -> None:
    assert refused(words={"a": object}) == (
        "words.a: expected plain data (numbers, texts, lists, tables), found <class 'object'>"
    )
    assert refused(words={3: 1}) == "words.3: expected keys that are a text, found 3"
    assert "anything[1].x" in refused(anything=[1, {"x": {1, 2}}])


def test_enums_paths_and_nested_classes() -> None:
    made = of(
        color="green", level=2, mixed="PAIR", bits=3, path="~x/y", spoken="no", colors=["red", "red"],
        inner={"size": 4, "deeper": [{"where": "z"}]}, several=[{}], by_number={"7": {"size": 1}, "8": None},
    )  # fmt: skip
    assert (made.color, made.level, made.mixed, made.bits) == (Color.GREEN, Level.HIGH, Mixed.PAIR, Bits.A | Bits.B)
    assert made.colors == {Color.RED}
    assert made.inner.deeper[0].where == Path("z")
    assert made.by_number == {7: Inner(size=1), 8: None}
    assert refused(color="gren") == "color: expected one of 'red', 'green', found 'gren'. Did you mean 'green'?"
    assert refused(level=9) == "level: expected one of 1, 2, found 9"
    assert refused(inner={"sizes": 3}) == "inner.sizes: is not an option. Did you mean 'size'?"
    assert refused(several=[{}, {"size": "x"}]) == "several[1].size: expected a whole number, found 'x'"
    assert refused(pair=[1]) == "pair: expected a list of 2, found 1: [1]"
    assert refused(by_number={"x": None}) == "by_number.x: expected keys that are a whole number, found 'x'"
    assert refused(table=[]) == "table: expected a table, found []"
    assert refused(mixture={}).startswith("mixture: expected a whole number or a number or a text or true or false")
    assert refused(nothing=0) == "nothing: expected none, found 0"


def test_an_object_of_a_section_in_a_dict_is_checked() -> None:
    section = saekit.config.TrainingConfig(verbose="yes")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="training.verbose: expected true or false, found 'yes'"):
        load_config({"training": section})


def _numbers() -> list[tuple[type, Any, type]]:
    found = []
    for cls in every_config_class():
        if cls.__module__ == "support.every_config":
            continue
        attrs.resolve_types(cls)
        for field in attrs.fields(cls):
            kinds = {field.type, *get_args(field.type)}
            found += [
                (cls, field, kind) for kind in (int, float) if kind in kinds and PLUGIN_KIND not in field.metadata
            ]
    return found


@pytest.mark.parametrize(("cls", "field", "kind"), _numbers(), ids=lambda v: getattr(v, "name", None))
def test_no_number_is_absurd(cls: type, field: Any, kind: type) -> None:
    """Neither inf nor nan, nor more than any machine holds."""
    values = [math.inf, -math.inf, math.nan] if kind is float else [10**20, 2**64, -(2**70)]
    if field.name == "lp_norm":
        values.remove(math.inf)  # the largest feature's
    needed = {other.name: 1 for other in attrs.fields(cls) if other.default is attrs.NOTHING}
    if cls is saekit.PretokenizeConfig:
        needed["folder"] = "x"
    for value in values:
        with pytest.raises(ConfigError) as caught:
            ConfigConverter(saekit.default_manager()).structure(needed | {field.name: value}, cls)
        assert field.name in str(caught.value)


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("sae.d_sae=1000000000000000", "sae.d_sae: must be at most 1,073,741,824, found 1000000000000000"),
        ("activations.source.n_batches_in_buffer=1000000000000", "n_batches_in_buffer: must be at most 16,777,216"),
        ("distributed.timeout_s=1e18", "distributed.timeout_s: must be at most 100,000,000, found 1e+18"),
        ("training.train_batch_size_tokens=1000000000000", "must be at most 1,073,741,824"),
        ("dataset.context_size=1000000000000", "must be at most 16,777,216"),
        ("training.training_tokens=1e15", None),
        ("training.training_tokens=1e16", "expected a whole number, found 1e"),
        ("training.training_tokens=10000000000000000", "must be at most 1,000,000,000,000,000"),
        ("training.seed=18446744073709551615", None),
        ("training.seed=18446744073709551616", "training.seed: expected a whole number of 64 bits"),
        ("training.seed=-1", "training.seed: must be 0 or more, and below 2"),
        ("training.lr=inf", "training.lr: must be a finite number, above 0, found inf"),
        ("training.lr=nan", "training.lr: must be a finite number, above 0, found nan"),
    ],
)
def test_limits(override: str, told: str | None) -> None:
    if told is None:
        load_config({}, [override])
        return
    with pytest.raises(ConfigError) as caught:
        load_config({}, [override])
    assert told in str(caught.value)


def test_the_largest_seed_seeds_everything() -> None:
    from saekit.runs.opening import seed_for
    from saekit.runs.randomness import seeded

    largest = 2**64 - 1
    with seeded(largest):
        torch.rand(1)
    torch.Generator().manual_seed(seed_for(largest, "init"))
    np.random.default_rng(largest)


class Odd(enum.Enum):
    NUMBER = 1.5
    NOTHING = None


@attrs.frozen
class Options:
    odd: Odd | None = Odd.NOTHING


def test_an_enum_class_may_have_any_values() -> None:
    converter = ConfigConverter(manager())
    assert plain_config(Options(), manager()) == {"odd": "NOTHING"}
    assert converter.structure({"odd": "NUMBER"}, Options) == Options(Odd.NUMBER)
    assert converter.structure({"odd": "none"}, Options) == Options(None)


def test_annotations_that_cannot_be_resolved() -> None:
    class Here:
        pass

    @attrs.frozen
    class Local:
        here: Here | None = None

    with pytest.raises(ConfigError, match=r"Local cannot be resolved: NameError: name 'Here' is not defined"):
        ConfigConverter(manager()).structure({}, Local)
