"""Training on the tokens that count: the same as on contexts from which the others were cut by hand."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from support import caches
from support.runs import contents, fake_config, manager, resume, stopped, train, without

import saekit
from saekit.backends.base import Backend
from saekit.errors import ConfigError
from saekit.planning import rehearsal
from saekit.testing import FakeBackend

SIZE = 16
CONTEXTS = [[0, *(1 + (n * n + 3 * n * k + k * k) % 90 for k in range(SIZE - 1))] for n in range(80)]
RECORDS = [{"tokens": tokens, "mask": [0] + [1] * (SIZE - 1)} for tokens in CONTEXTS]
WHOLE: dict[str, Any] = {"context_size": SIZE, "prepend_bos": False, "sequence_separator_token": "none"}
FORMS: dict[str, dict[str, Any]] = {
    "positions": {"seqpos_slice": [1, "none"]},
    "special": {"exclude_special_tokens": True},
    "ids": {"exclude_special_tokens": [0]},
    "mask": {"mask_column": "mask"},
    "all": {},
    "two ids": {"exclude_special_tokens": [0, 7]},
    "all ways": {"exclude_special_tokens": [0, 7, 9], "mask_column": "mask", "seqpos_slice": ["none", -2]},
}
pytestmark = pytest.mark.usefixtures("one_thread")


def config(folder: Path, tokens: dict[str, Any], **sections: dict[str, Any]) -> dict[str, Any]:
    evals = {"run": [], "held_out_every": 0}
    dataset = WHOLE | sections.pop("dataset", {})
    return fake_config(folder, tokens=tokens, **({"evals": evals} | sections), dataset=dataset)


@pytest.fixture(scope="module")
def cut(tmp_path_factory: pytest.TempPathFactory) -> saekit.TrainResult:
    """The truth: contexts whose first tokens were cut, in a model that knows nothing of what stands before."""
    records = [{"tokens": tokens[1:]} for tokens in CONTEXTS]
    run = config(tmp_path_factory.mktemp("cut"), {}, dataset={"context_size": SIZE - 1})
    return train(run, dataset=records)


def weights(result: saekit.TrainResult) -> dict[str, torch.Tensor]:
    return dict(result.sae.state_dict())


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], saekit.TrainResult]:
    """Each form by itself, once."""
    return cache(lambda form: train(config(tmp_path_factory.mktemp(form), FORMS[form]), dataset=RECORDS))


def same(one: saekit.TrainResult, other: saekit.TrainResult) -> bool:
    """Weights, the factor of activations, and every metric, firing fractions and dead features among them."""
    assert one.metrics == other.metrics
    assert one.sae.info.metadata.get("activation_scale") == other.sae.info.metadata.get("activation_scale")
    ours, theirs = weights(one), weights(other)
    return all(torch.equal(ours[name], theirs[name]) for name in theirs)


Alone = Callable[[str], saekit.TrainResult]


def test_the_sae_is_that_of_contexts_that_were_cut(cut: saekit.TrainResult, alone: Alone) -> None:
    """With a scale, a mean to start from and ghost gradients: all of it is of counted rows."""
    assert same(alone("positions"), cut)
    assert same(alone("special"), alone("ids"))
    assert same(alone("special"), alone("mask"))
    assert not torch.equal(weights(alone("all"))["W_enc"], weights(cut)["W_enc"])


def test_caches_train_the_sae_of_contexts_that_were_cut(tmp_path: Path) -> None:
    """A cache reads its rows in an order of their own number, so how many a forward may have makes no difference."""

    def trained(name: str, tokens: dict[str, Any], records: Any, size: int = SIZE) -> saekit.TrainResult:
        run = caches.config(tmp_path / name, tokens=tokens, dataset=WHOLE | {"context_size": size})
        caches.cache(run, dataset=records, tokens=60 * (SIZE - 1))
        return caches.train(run, dataset=records)

    truth = trained("cut", {}, [{"tokens": tokens[1:]} for tokens in CONTEXTS], SIZE - 1)
    for form in ("mask", "ids"):
        assert same(trained(form, FORMS[form], RECORDS), truth)


def test_what_counts_is_saved_with_the_sae_and_told_by_the_run(alone: Alone) -> None:
    result = alone("positions")
    about = saekit.SAE.load(result.folder / "sae").info.metadata
    used = {"used": 15, "of": 16, "contexts": 1}
    assert about["seqpos_slice"] == [1, None]
    assert about["tokens_used"] == used
    assert "exclude_special_tokens" not in about
    assert json.loads((result.folder / "run.json").read_text())["used"] == {"tokens_used": used}
    sparse = alone("two ids")
    about = sparse.sae.info.metadata
    seen = [token for tokens in CONTEXTS[:64] for token in tokens]
    assert about["exclude_special_tokens"] == [0, 7]
    assert about["tokens_used"] == {
        "used": sum(token not in (0, 7) for token in seen), "of": len(seen), "contexts": 64
    }  # fmt: skip
    masked = alone("mask")
    assert masked.sae.info.metadata["mask_column"] == "mask"


def test_where_all_count_nothing_is_said(alone: Alone) -> None:
    result = alone("all")
    names = {"tokens_used", "seqpos_slice", "exclude_special_tokens", "mask_column", "chat_template", "documents_used"}
    assert not names & set(result.sae.info.metadata)
    assert "used" not in json.loads((result.folder / "run.json").read_text())


def test_a_run_that_was_stopped_goes_on_with_the_very_next_row(tmp_path: Path, alone: Alone) -> None:
    stopped(config(tmp_path, FORMS["all ways"]), 5, dataset=RECORDS)
    resumed = resume(tmp_path / "run", dataset=RECORDS)
    skipped = ("checkpoints/step-5/", "config.toml")
    assert without(contents(resumed.folder), *skipped) == without(contents(alone("all ways").folder), *skipped)


def test_saes_that_choose_otherwise_train_beside_each_other_as_alone(tmp_path: Path, alone: Alone) -> None:
    forms = ["all", "positions", "mask", "two ids"]
    backend = FakeBackend()
    together = train([config(tmp_path, FORMS[form]) for form in forms], dataset=RECORDS, plugins=manager(backend))
    for form, result in zip(forms, together.results.values(), strict=True):
        file = "sae/sae_weights.safetensors"
        assert (result.folder / file).read_bytes() == (alone(form).folder / file).read_bytes()
        assert result.sae.info.metadata == alone(form).sae.info.metadata
    shapes = [shape for shape in backend.forwards if shape == (4, SIZE)]
    assert len(shapes) < 2 * -(-2700 // (4 * (SIZE - 1))), "one forward for all of them"


def test_a_cache_says_what_counts(tmp_path: Path) -> None:
    run = caches.config(tmp_path, tokens={"exclude_special_tokens": [0, 7]}, dataset=WHOLE)
    manifest = caches.cache(run, dataset=RECORDS, tokens=900)
    kept = sum(token not in (0, 7) for tokens in CONTEXTS[: manifest.contexts] for token in tokens)
    assert manifest.rows == kept
    result = caches.train(run, dataset=RECORDS)
    assert result.sae.info.metadata["exclude_special_tokens"] == [0, 7]
    assert result.sae.info.metadata["tokens_used"]["contexts"] == 64


@pytest.mark.parametrize(
    ("form", "words"),
    [
        ("positions", "15 of 16 of each context count"),
        ("two ids", "of 1,024 tokens in the first 64 contexts count"),
        ("mask", "960 of 1,024 tokens in the first 64 contexts count"),
    ],
)
def test_a_plan_says_how_many_count(tmp_path: Path, form: str, words: str) -> None:
    found = saekit.plan(config(tmp_path, FORMS[form]), plugins=manager(), dataset=RECORDS)
    assert found.problems == []
    assert words in found.facts["tokens"]


def test_a_banner_says_how_many_count(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train(config(tmp_path, FORMS["mask"], training={"verbose": True}), dataset=RECORDS)
    assert "960 of 1,024 tokens in the first 64 contexts count" in capsys.readouterr().err


def test_a_text_of_which_nothing_counts_is_a_warning_of_the_plan(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rehearsal, "_LIMIT", 0.05)
    run = config(tmp_path, {"exclude_special_tokens": list(range(100))})
    found = saekit.plan(run, plugins=manager(), dataset=RECORDS)
    assert found.problems == []
    assert found.facts["duration"].startswith("not measured: no token of ")
    assert "contexts one after the other counts (tokens.exclude_special_tokens" in found.facts["duration"]
    assert any(
        "0 of 1,024 tokens in the first 64 contexts count: see tokens.exclude" in text for text in found.warnings
    )


def test_what_cannot_be_is_refused_before_anything_runs(tmp_path: Path) -> None:
    backend = FakeBackend()
    with pytest.raises(ConfigError, match=r"tokens\.exclude_special_tokens: has the token id 500, but the vocabulary"):
        train(config(tmp_path, {"exclude_special_tokens": [500]}), dataset=RECORDS, plugins=manager(backend))
    assert not backend.forwards
    found = saekit.plan(config(tmp_path, {"exclude_special_tokens": [500]}), plugins=manager(), dataset=RECORDS)
    assert any("has the token id 500" in problem for problem in found.problems)
    none = config(tmp_path, FORMS["positions"], model={"backend": "none"})
    with pytest.raises(ConfigError, match=r"tokens: chooses which tokens count, and this run has no language model"):
        train(none, dataset=RECORDS, plugins=manager())


def test_features_are_shown_on_tokens_that_count(alone: Alone) -> None:
    from saekit.analysis.examples import feature_peaks

    result = alone("all ways")
    contexts = torch.tensor(CONTEXTS[:20])
    backend: Backend = FakeBackend()
    peaks = feature_peaks(result.sae, backend=backend, sites=result.sae.info.sites, contexts=contexts)
    held = backend.run(contexts, read={"blocks.0.hook_resid_post"}).held["blocks.0.hook_resid_post"]
    features = result.sae.encode(held).detach()
    fired, counted = torch.zeros(result.sae.d_sae, dtype=torch.long), 0
    for row, tokens in enumerate(contexts.tolist()):
        for position, token in enumerate(tokens[:-2]):
            counted += token not in (0, 7, 9)
            if token not in (0, 7, 9) and position > 0:  # the first is passed over in any case
                fired += features[row, position] != 0
    assert torch.equal(peaks.fired, fired)
    assert peaks.tokens == counted


def test_evals_of_a_run_leave_out_what_does_not_count(tmp_path: Path) -> None:
    """The mask of held-out contexts, and the choice that the SAE has: both leave the same tokens here."""
    measured = {"run": ["reconstruction"], "held_out_every": 5, "n_contexts": 6}
    found = {
        form: train(config(tmp_path / form, FORMS[form], evals=measured), dataset=RECORDS) for form in ("mask", "ids")
    }
    evals = {form: {k: v for k, v in one.metrics.items() if k.startswith("evals/")} for form, one in found.items()}
    assert evals["mask"]
    assert evals["mask"] == evals["ids"]
    result = found["mask"]
    held = result.backend.run(result.held_out, read={"blocks.0.hook_resid_post"}).held["blocks.0.hook_resid_post"]
    x = held[:, 1:].reshape(-1, 8).double()
    error = (x - result.sae(x.float()).detach().double()).square().sum()
    explained = 1 - error / (x - x.mean(0)).square().sum()
    assert result.metrics["evals/explained_variance"] == pytest.approx(float(explained), abs=1e-5)
    words = "was trained on tokens that the column 'mask' of its data chose, and none"
    masked, worse, begun = (pytest.warns(UserWarning, match=said) for said in (words, "than the mean", "with BOS"))
    with masked, worse, begun:
        whole = saekit.evaluate(result, contexts=result.held_out, evals=["reconstruction"], verbose=False, save=False)
    assert whole
