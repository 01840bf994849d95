"""Whatever a configuration says, a file says it back: every class, every format, None wherever it is allowed."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import attrs
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from support.every_config import EveryKind, Inner, config_of, every_config_class, manager

import saekit
from saekit.config import DatasetConfig, TrainConfig
from saekit.config.converter import ConfigConverter, unsupported_options
from saekit.config.files import plain_config
from saekit.config.formats import READERS, write

FORMS = ["toml", "yaml", "json"]
PLUGINS = manager()


def there_and_back(config: Any, form: str) -> Any:
    converter = ConfigConverter(PLUGINS)
    checked = converter.structure(config, type(config))
    text = write(plain_config(checked, PLUGINS, spare=form == "toml"), form)
    text.encode()
    back = converter.structure(READERS[f".{form}"](text), type(config))
    assert back == checked
    return back


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("cls", every_config_class(), ids=lambda cls: cls.__qualname__)
def test_every_class_in_every_format(cls: type, form: str) -> None:
    @settings(max_examples=12, phases=[Phase.generate])  # what fails is said by its seed
    @given(st.integers(0, 2**32))
    def check(seed: int) -> None:
        there_and_back(config_of(cls, random.Random(seed)), form)

    check()


def test_none_everywhere() -> None:
    """All options that may be None are None, those that are not by default among them."""
    inner = Inner(where=None, size=None)
    config = EveryKind(
        required=None, text_or_none=None, number_or_none=None, word_or_none=None, literal_none=None, level=None,
        inner=inner, inner_or_none=None, several=[inner], pair=(1, None), table={"a": None, "none": 1},
        by_number={3: None}, anything=[None, {"none": True}, {"none_": None}], mixture=(None, 1.0), token=None,
        words={"none": None},
    )  # fmt: skip
    for form in FORMS:
        assert there_and_back(config, form) == config
        back = there_and_back(TrainConfig(trackers=(config, {"name": "every", "required": 3})), form)
        assert back.trackers == (config, EveryKind(required=3))


@pytest.mark.parametrize("form", FORMS)
def test_none_as_a_text_is_no_none(form: str) -> None:
    config = EveryKind(required=1, text_or_none="none", word_or_none="none", token="none", mixture="none")
    assert there_and_back(config, form) == config
    for config in (
        TrainConfig(dataset=DatasetConfig(begin_sequence_token="none", name="none")),
        TrainConfig(dataset=DatasetConfig(begin_sequence_token=None, name=None)),
    ):
        assert there_and_back(config, form) == config


def test_how_none_is_written(tmp_path: Path) -> None:
    """Left out where that says it, else `{none = true}` in TOML and null elsewhere; `none` where no text could be."""
    config = EveryKind(required=None, text_or_none=None, token=None)
    toml = write(plain_config(config, PLUGINS, spare=True), "toml")
    assert "[text_or_none]\nnone = true" in toml
    assert "token" not in toml
    assert "text_or_none: null" in write(plain_config(config, PLUGINS), "yaml")
    assert saekit.load_config({}, ["sae.d_sae=none"]).sae == saekit.load_config({}, ["sae.d_sae={none=true}"]).sae
    name = saekit.load_config({"checkpoints": {"name": "a"}}, ["checkpoints.name={none=true}"]).checkpoints.name
    assert name is None
    assert saekit.load_config({}, ["checkpoints.name=none"]).checkpoints.name == "none"


@settings(max_examples=60)
@given(st.dictionaries(st.text(max_size=5), st.text(max_size=20) | st.floats(allow_nan=False) | st.none()))
def test_texts_and_numbers_in_every_format(table: dict[str, Any]) -> None:
    for form in FORMS:
        assert READERS[f".{form}"](write(table, form)) == table, form


def test_the_default_is_supported_by_its_own_rules() -> None:
    for cls in every_config_class():
        assert unsupported_options(cls) == [], cls


def test_a_field_that_is_no_option() -> None:
    @attrs.frozen(kw_only=True)
    class Derived:
        _width: int = 3
        twice: int = attrs.field(init=False, default=6)

    converter = ConfigConverter(PLUGINS)
    assert plain_config(Derived(width=4), PLUGINS) == {"_width": 4}
    assert converter.structure({"_width": 4}, Derived) == Derived(width=4)
