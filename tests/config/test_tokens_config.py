"""Which tokens count, as options."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from saekit import ConfigError, load_config
from saekit.config import DatasetConfig, TokensConfig, TrainConfig
from saekit.config.files import dump_config

place = st.one_of(st.none(), st.integers(-20, 20))
slices = st.one_of(st.tuples(place), st.tuples(place, place), st.tuples(place, place, st.sampled_from([None, 1, 2, 7])))


@settings(max_examples=100)
@given(
    tokens=st.builds(
        TokensConfig,
        exclude_special_tokens=st.one_of(st.booleans(), st.lists(st.integers(0, 9999), max_size=4).map(tuple)),
        seqpos_slice=slices,
        mask_column=st.one_of(st.none(), st.just("mask")),
    ),
    dataset=st.builds(
        DatasetConfig,
        disable_concat_sequences=st.sampled_from([None, True, False]),
        chat_template=st.sampled_from([None, True, False, "{{ messages }}"]),
    ),
    form=st.sampled_from(["toml", "yaml", "json"]),
)
def test_round_trip(
    tmp_path_factory: pytest.TempPathFactory, tokens: TokensConfig, dataset: DatasetConfig, form: str
) -> None:
    config = TrainConfig(tokens=tokens, dataset=dataset)
    path = tmp_path_factory.mktemp("round") / f"run.{form}"
    path.write_text(dump_config(config, form), encoding="utf-8")
    assert load_config(path) == config


def test_a_file_writes_none_as_a_word(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text('[tokens]\nseqpos_slice = [1, "none"]\nexclude_special_tokens = [3, 0]\n')
    assert load_config(path).tokens == TokensConfig(seqpos_slice=(1, None), exclude_special_tokens=(3, 0))
    assert load_config({"tokens": {"seqpos_slice": [None, "none"]}}).tokens == TokensConfig()
    assert "[tokens]\nexclude_special_tokens = false\n\n" in dump_config(TrainConfig())
    assert not load_config({"tokens": {"exclude_special_tokens": []}}).tokens.chooses


@pytest.mark.parametrize(
    ("tokens", "path", "words"),
    [
        ({"seqpos_slice": []}, "seqpos_slice", r"is \[\], expected one to three numbers, as slice takes them"),
        ({"seqpos_slice": [1, 2, 3, 4]}, "seqpos_slice", r"is \[1, 2, 3, 4\], expected one to three numbers"),
        ({"seqpos_slice": [1, None, 0]}, "seqpos_slice", r"is \[1, None, 0\], whose step must be 1 or more"),
        ({"seqpos_slice": [9, None, -1]}, "seqpos_slice", r"is \[9, None, -1\], whose step must be 1 or more"),
        ({"seqpos_slice": [1.5]}, r"seqpos_slice\[0\]", "expected a whole number"),
        ({"seqpos_slice": 5}, "seqpos_slice", "expected a list, found 5"),
        (
            {"exclude_special_tokens": [3, -1]},
            "exclude_special_tokens",
            "must be true, false or token ids from 0, found",
        ),
        ({"exclude_special_tokens": "bos"}, "exclude_special_tokens", "expected true or false or a list"),
        ({"mask_column": " "}, "mask_column", "must be a name"),
    ],
)
def test_what_makes_no_sense_is_refused(tokens: dict[str, Any], path: str, words: str) -> None:
    with pytest.raises(ConfigError, match=rf"tokens\.{path}: {words}"):
        load_config({"tokens": tokens})


@pytest.mark.parametrize("places", [[8, 3], [16, None], [0, 0], [-1, -1]])
def test_something_of_a_context_must_be_left(places: list[int | None]) -> None:
    words = r"tokens\.seqpos_slice.* leaves no position of a context of 16 tokens \(dataset\.context_size\)"
    with pytest.raises(ConfigError, match=words):
        load_config({"dataset": {"context_size": 16}, "tokens": {"seqpos_slice": places}})


def test_the_names_of_sae_lens_are_found() -> None:
    with pytest.raises(ConfigError, match=r"is not an option here; it is tokens\.seqpos_slice"):
        load_config({"seqpos_slice": [1, None]})
    with pytest.raises(ConfigError, match=r"is a name of sae-lens; here it is dataset\.chat_template"):
        load_config({"use_chat_formatting": True})
    with pytest.raises(ConfigError, match="must be true, false or a template, not an empty text"):
        load_config({"dataset": {"chat_template": " "}})


def test_what_is_not_chosen_is_not_there() -> None:
    written = json.loads(dump_config(TrainConfig(), "json"))
    assert written["tokens"] == {"exclude_special_tokens": False, "seqpos_slice": None, "mask_column": None}
