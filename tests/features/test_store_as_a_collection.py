"""A feature store as users reach into it, what it shows of itself, and what it says it does not keep."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.stores import LastKnown, small_sae, small_store

import saekit
from saekit.analysis.loss_effects import LossEffects
from saekit.analysis.token_set_files import check_asked
from saekit.dashboards.choosing import Choice, check_choice
from saekit.errors import ConfigError


@pytest.fixture(scope="module")
def sae() -> Any:
    return small_sae(context_size=12)


@pytest.fixture(scope="module")
def store(sae: Any, tmp_path_factory: pytest.TempPathFactory) -> saekit.FeatureStore:
    return small_store(tmp_path_factory.mktemp("store") / "of two", {"a": sae, "b": sae}, partners=5)


def test_it_has_a_length_features_and_saes(store: saekit.FeatureStore) -> None:
    assert len(store) == 48
    assert store
    assert [one.index for one in store] == [*range(24)] * 2
    assert store["b"] is store.saes["b"]
    assert store["b"][3].index == 3
    with pytest.raises(ConfigError, match="the store has several SAEs, a, b: choose one"):
        store[3]
    with pytest.raises(ConfigError, match="sae: must be one of the store's, a, b; found 'c'"):
        store["c"]
    with pytest.raises(ConfigError, match="must be 0 to 23 for b, found 24"):
        store["b"][24]
    assert "b" in store
    assert "c" not in store
    assert [one in store["b"] for one in (3, np.int64(23), 24, -1, 2**70, True, "b", 3.0, None)] == [True] * 2 + [
        False
    ] * 7
    assert store["b"][3] in store
    assert (store["b"][3] in store["b"], store["b"][3] in store["a"]) == (True, False)
    with pytest.raises(ConfigError, match="the store has several SAEs, a, b: choose one"):
        assert 3 in store
    for one in (store, store["b"]):
        with pytest.raises(TypeError, match="is not reversible"):
            reversed(one)  # type: ignore[call-overload]


def test_numbers_of_features_are_no_places(sae: Any, tmp_path: Path) -> None:
    store = small_store(tmp_path / "of few", {"a": sae}, features=[3, 7])
    assert [one.index for one in store] == [3, 7]
    assert [n for n in range(24) if n in store] == [3, 7]
    assert store[7].index == 7
    with pytest.raises(ConfigError, match="0 of a is not in the store, which has 2 of its 24"):
        store[0]


def test_fewer_partners_than_asked_for_are_told(store: saekit.FeatureStore) -> None:
    feature = store["a"][3]
    for ask in (feature.partners, feature.neurons, feature.alignment, feature.neighbors):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert len(ask(n=5)) == len(ask()) == 5
        with pytest.warns(UserWarning, match=r"keeps the 5 strongest .* 1,000 are asked for: .*partners=1000"):
            assert len(ask(n=1000)) == 5


def test_what_is_shown_is_short(store: saekit.FeatureStore, sae: Any) -> None:
    effects = LossEffects.of(store["a"], sae, LastKnown())
    assert repr(effects) == "LossEffects('exact', of 'a' in 'fake')"
    logits = store["a"][3].logits
    assert logits is not None
    assert len(repr(logits)) < 200
    assert repr(logits.top[0][1]) in repr(logits)
    assert "array(" not in repr(logits)
    assert "raises" in logits._repr_html_()


def test_what_an_sae_knows_of_itself_is_shown_short() -> None:
    long = {f"key_{n}": "x" * 500 for n in range(3)}
    info = saekit.SAEInfo(architecture="saekit:topk", options={"secret": "y" * 500}, metadata=long)
    assert repr(info).startswith("SAEInfo(architecture='saekit:topk', key_0='xxx")
    assert len(repr(info)) < 330
    assert "x" * 500 in info._repr_html_()
    assert "<td" in info._repr_html_()


def test_names_that_are_nearly_right() -> None:
    with pytest.raises(ConfigError, match=r"'digit' is neither a file nor one of .*\. Did you mean 'digits'\?"):
        check_asked(["digit"], None)
    with pytest.raises(
        ConfigError, match=r"must be firing, activation or logit, found 'fireing'\. Did you mean 'firing'"
    ):
        check_choice(Choice(top_by="fireing"))


class Spelling(LastKnown):
    """Its tokens are their numbers."""

    def token_texts(self, tokens: Any) -> list[str]:
        return [str(one) for one in tokens]


def test_token_sets_may_be_texts(sae: Any) -> None:
    how: dict[str, Any] = {"model": Spelling(), "features": [1], "permutations": 10, "verbose": False}
    numbers = list(range(10, 20))
    one, other = (
        saekit.token_set_enrichment(sae, {"tens": given}, **how) for given in (numbers, [str(one) for one in numbers])
    )
    assert other.scores.equals(one.scores)
    with pytest.warns(UserWarning, match="sets: 1 of the 11 texts of 'tens' are no token of the model: 'import'"):
        saekit.token_set_enrichment(sae, {"tens": [*map(str, numbers), "import"]}, **how)
    with pytest.raises(ConfigError, match="sets: 1 of the 1 texts of 'x' are no token of the model: 'import'"):
        saekit.token_set_enrichment(sae, {"x": ["import"]}, **how)
