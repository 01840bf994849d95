"""What saekit.splice is given, and what is done with what it returns."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from support.saes import at, drawn_sae
from support.spliced import TOKENS, place

import saekit
from saekit.errors import ConfigError, ModelError

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"tokens": [0]}, r"tokens: must be a TokenChoice, such as .*TokenChoice\(exclude=\[0\]\), found \[0\]"),
        ({"use_error_term": "no"}, "use_error_term: must be True, False or None .*, found 'no'"),
        ({"use_error_term": 1}, "use_error_term: must be True, False or None .*, found 1"),
    ],
)
def test_what_means_nothing_is_refused(options: Any, expected: str) -> None:
    there = place("fake")
    with pytest.raises(ConfigError, match=expected), saekit.splice(there.backend, drawn_sae(8), **options):
        pass


@pytest.mark.parametrize("name", ["", "two\nlines", " ", "ends ", 3])
def test_names_are_in_one_line(name: Any) -> None:
    there = place("fake")
    with (
        pytest.raises(ConfigError, match="saes: must be by names of their own, in one line, found "),
        saekit.splice(there.backend, {name: at(drawn_sae(8), there.early)}),
    ):
        pass


def test_what_it_returns_is_for_one_block() -> None:
    there = place("AutoModelForCausalLM")
    once = saekit.splice(there.model, at(drawn_sae(16), there.early))
    expected = r"what saekit.splice\(...\) returns is for one with block, and had its own: call it again"
    with once as spliced:
        inside = there.model(TOKENS).logits
        with pytest.raises(ModelError, match=expected), once:
            pass
        assert torch.equal(there.model(TOKENS).logits, inside)
        assert "with" in repr(spliced)
    with pytest.raises(ModelError, match=expected), once:
        pass


def test_what_cannot_be_copied_says_so() -> None:
    lens, hf = place("HookedTransformer"), place("AutoModelForCausalLM")
    with saekit.splice(lens.model, at(drawn_sae(16), lens.early)) as spliced:
        with pytest.raises(ModelError, match="a HookedTransformer cannot be copied while a splice of it is open: copy"):
            copy.deepcopy(lens.model)
        with pytest.raises(ModelError, match="a splice cannot be copied, since it is of one model"):
            copy.deepcopy(spliced)
    with pytest.raises(ModelError, match="a backend cannot be copied: copy its .model, and give the copy to saek"):
        copy.deepcopy(hf.backend)


def test_copies_that_are_made_outside_are_as_the_model() -> None:
    for there in (place("HookedTransformer"), place("AutoModelForCausalLM")):
        before = copy.deepcopy(there.model)
        with saekit.splice(there.model, at(drawn_sae(16), there.early)):
            pass
        expected = there.model(TOKENS)
        for made in (before, copy.deepcopy(there.model)):
            found = made(TOKENS)
            assert torch.equal(getattr(found, "logits", found), getattr(expected, "logits", expected))
