"""What looks wrong but trains is said by the plan and by the run; what is certainly wrong is refused."""

from __future__ import annotations

import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support import ports, sweeps
from support.ports import EARLY, EMBED, HEAD, LATE, tables
from support.sweeps import DOCUMENTS, fake

import saekit
from saekit.backends import Backend
from saekit.errors import ConfigError
from saekit.runs.doubts import doubts_of_density, doubts_of_order
from saekit.testing import FakeBackend

pytestmark = pytest.mark.usefixtures("one_thread")
SWAPPED = (
    f"the target {EARLY.name} lies before what is read ({LATE.name}), which the model makes from it; if the two are "
    "swapped, exchange inputs and targets"
)


def transcoder(folder: Path, inputs: Any, targets: Any, kind: str = "transcoder", **sections: Any) -> dict[str, Any]:
    config = fake(folder, sae={"name": kind, "d_sae": 20}, **sections)
    del config["site"]
    return config | {"inputs": tables(inputs), "targets": tables(targets)}


def told(config: Any) -> tuple[list[str], list[str]]:
    """The warnings of the plan, and those of the run."""
    plan = saekit.plan(config, plugins=ports.manager(), dataset=DOCUMENTS)
    assert not plan.problems, plan.problems
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        ports.train(config)
    return plan.warnings, [str(one.message) for one in caught]


# ---- the order of sites


def test_a_target_that_lies_before_what_is_read(tmp_path: Path) -> None:
    for found in told(transcoder(tmp_path, [LATE], [EARLY])):
        assert found.count(SWAPPED) == 1
    for sites in (([EMBED], [LATE]), ([EARLY], [LATE]), ([HEAD], [EARLY])):
        for found in told(transcoder(tmp_path, *sites)):
            assert not [text for text in found if "what is read" in text]


def test_a_sweep_says_it_once_for_all(tmp_path: Path) -> None:
    configs = saekit.grid(transcoder(tmp_path, [LATE], [EARLY]), {"training.seed": [1, 2]}, plugins=ports.manager())
    with pytest.warns(RuntimeWarning) as caught:
        ports.train(configs)
    assert [str(one.message) for one in caught].count(SWAPPED) == 1


def order(*names: str, read: int = 1) -> list[str]:
    sites = tuple(saekit.Site(hook_name=name) for name in names)
    return doubts_of_order(Branches(), saekit.Sites(sites[:read], sites[read:]))


class Branches(FakeBackend):
    """Two hooks that are made of one, beside each other, and one that nothing is made of."""

    def hook_names(self) -> list[str]:
        return ["first", "left", "right", "last"]

    def forward(self, tokens: Any, hooks: Any) -> Any:
        first = hooks("first", self._embedding()[tokens])
        left, right = hooks("left", first * 2), hooks("right", first * 3)
        last = hooks("last", left + right)
        return None if hooks.done else last @ self._embedding().T


def test_the_order_is_what_the_model_computes_from_what() -> None:
    assert order("first", "left") == order("left", "last") == order("first", "left", "last") == []
    (before,) = order("left", "first")
    assert before.startswith("the target first lies before what is read (left), which")
    (beside,) = order("left", "right")
    assert beside == "the target right does not depend on what is read (left), nor that on it"
    assert order("first", "left", "right", "last", read=3) == []
    assert order("left", "right", "first", read=2)[0].startswith("the target first lies before what is read (left, rig")
    assert order("first", "first", "last", read=1) == [], "one of the targets is read as well"


def test_a_model_that_cannot_be_asked_raises_no_doubt() -> None:
    class Stubborn(FakeBackend):
        def run(self, tokens: Any, **options: Any) -> Any:
            raise RuntimeError("not now")

    assert doubts_of_order(Stubborn(), saekit.Sites((LATE,), (EARLY,))) == []


def test_looking_changes_nothing() -> None:
    backend, before = FakeBackend(), torch.get_rng_state()
    doubts_of_order(backend, saekit.Sites((LATE,), (EARLY,)))
    assert torch.equal(before, torch.get_rng_state())
    assert isinstance(backend, Backend)
    assert set(backend.forwards) == {(2, 7)}


# ---- transcoders


@pytest.mark.parametrize(
    ("kind", "sae"),
    [("transcoder", "standard"), ("jumprelu_transcoder", "jumprelu"), ("topk_transcoder", "topk")],
)
def test_a_transcoder_without_targets_is_refused(tmp_path: Path, kind: str, sae: str) -> None:
    ways: list[tuple[dict[str, Any], str]] = [
        (fake(tmp_path, sae={"name": kind, "d_sae": 20}), "is missing"),
        (transcoder(tmp_path, [EARLY], [], kind), "is missing"),
        (transcoder(tmp_path, [EARLY], [EARLY], kind), "names the very sites that are read"),
    ]
    for config, found in ways:
        config["sae"] |= {"k": 4} if "topk" in kind else {}
        message = (
            f"targets: {found}: a transcoder gives the activations at other sites than it reads ({EARLY.name}). Name "
            f"them in targets, and what is read in inputs; for what gives back what it reads, sae.name is '{sae}'"
        )
        with pytest.raises(ConfigError) as caught:
            ports.train(config)
        assert str(caught.value) == message
        assert saekit.plan(config, plugins=ports.manager(), dataset=DOCUMENTS).problems == [message]
    assert not list(tmp_path.iterdir())


def test_a_plan_of_more_active_features_than_there_are(tmp_path: Path) -> None:
    target = {"name": "jumprelu", "sparsity_loss": "target_l0", "target_l0": 32}
    for sae, option in (({"name": "topk", "k": 32}, "k"), ({"name": "batchtopk", "k": 32}, "k"), (target, "target_l0")):
        config = fake(tmp_path, sae={"d_sae": 20, **sae})
        message = f"sae.{option}: is 32, but there are only 20 features"
        assert saekit.plan(config, plugins=ports.manager(), dataset=DOCUMENTS).problems == [message]
        with pytest.raises(ConfigError, match=message):
            ports.train(config)


@pytest.mark.parametrize(("kind", "option"), [("standard", "l1"), ("jumprelu", "l0"), ("transcoder", "l1")])
def test_a_coefficient_that_is_never_reached(tmp_path: Path, kind: str, option: str) -> None:
    config = transcoder(tmp_path, [EMBED], [LATE], kind)
    config["sae"] |= {f"{option}_warm_up_steps": 9, "apply_b_dec_to_input": False}
    message = (
        rf"sae.{option}_warm_up_steps: is 9, and training has 8 steps, so {option}_coefficient would never be reached"
    )
    with pytest.raises(ConfigError, match=message):
        ports.train(config)
    config["sae"][f"{option}_warm_up_steps"] = 8
    assert not saekit.plan(config, plugins=ports.manager(), dataset=DOCUMENTS).problems


# ---- a start at another site


def test_a_start_at_another_site(tmp_path: Path) -> None:
    first = sweeps.train(fake(tmp_path, checkpoints={"name": "first"}))
    start = {"from_pretrained_path": str(first.folder)}
    words = (
        f"the SAE in {first.folder} (training.from_pretrained_path) was trained at {EARLY.name}, and this run trains "
        f"it at {LATE.name}; to go on where it was, name that in site.hook_name"
    )
    for found in told(fake(tmp_path, training=start, site={"hook_name": LATE.hook_name})):
        assert found.count(words) == 1
    for found in told(fake(tmp_path, training=start)):
        assert not [text for text in found if "was trained at" in text]


# ---- dead features

DEAD: dict[str, Any] = {"training": {"training_tokens": 8000, "dead_feature_window": 20, "lr": 1e-9}}


@pytest.mark.parametrize("kind", ["standard", "jumprelu"])
def test_mostly_dead_features_are_told_with_numbers(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asleep(monkeypatch, 60)
    config = fake(tmp_path, sae={"name": kind, "d_sae": 80}, **DEAD)
    with pytest.warns(RuntimeWarning, match="dead at the end") as caught:
        result = sweeps.train(config)
    (text,) = [str(one.message) for one in caught if "dead at the end" in str(one.message)]
    dead, l0 = int(result.metrics["sparsity/dead_features"]), result.metrics["metrics/l0"]
    assert dead >= 60
    assert text.startswith(
        f"{dead} of 80 features ({dead / 80:.0%}) of the SAE at {EARLY.name} are dead at the end of training: they "
        f"have not fired in its last 20 steps of 200 tokens, on each of which {l0:.3g} features are active. What "
        "helps: scale activations (activations.normalize_activations=expected_average_only_in), "
    )
    assert ("b_dec_init_method" in text) == (kind == "standard"), "what the run has already is no advice"
    assert text.endswith("train on more tokens (training.training_tokens), choose fewer features (sae.d_sae), or ask "
                         "for less sparsity")  # fmt: skip
    assert saekit.SAE.load(result.folder, plugins=sweeps.manager()).d_sae == 80, "all is saved"


def test_nothing_is_said_where_most_fire_or_had_no_time_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Warnings are errors here."""
    asleep(monkeypatch, 30)
    sweeps.train(fake(tmp_path / "few", sae={"name": "standard", "d_sae": 80}, **DEAD))
    asleep(monkeypatch, 60)
    short = {"training_tokens": 1000, "train_batch_size_tokens": 10, "dead_feature_window": 3, "lr": 1e-9}
    sweeps.train(fake(tmp_path / "short", sae={"name": "standard", "d_sae": 80}, training=short))


def asleep(monkeypatch: pytest.MonkeyPatch, features: int) -> None:
    """SAEs of which so many features never fire."""
    from saekit.runs import session

    give = session.give_weights

    def given(trainer: Any, *rest: Any) -> None:
        give(trainer, *rest)
        with torch.no_grad():
            trainer.sae.b_enc[:features] = -1e4
            trainer.sae.b_enc[features:] = 3.0

    monkeypatch.setattr(session, "give_weights", given)


# ---- active features outside training


def _density(sae: Any, step: int = 40, **metrics: float) -> list[str]:
    config = saekit.load_config({"site": {"hook_name": EARLY.hook_name}}, plugins=saekit.default_manager())
    trainer: Any = SimpleNamespace(sae=sae, step=step)
    return doubts_of_density(config, trainer, {name.replace("_", "/"): value for name, value in metrics.items()})


def test_a_threshold_that_is_not_where_training_is_is_told() -> None:
    competing = SimpleNamespace(competes_over="all", config=SimpleNamespace(threshold_lr=0.01))
    assert _density(competing, metrics_l0=32.0, evals_l0=133.4) == [
        f"on held-out text 133 features of the SAE at {EARLY.name} are active on a token, and in training 32: there "
        "they compete over a batch, and elsewhere each is active above a threshold, an average over batches, which "
        "after 40 steps is not where training is. What helps: train on more tokens (training.training_tokens), or "
        "have the threshold follow faster (sae.threshold_lr, which is 0.01)"
    ]
    for held_out, number in ((47.0, 0), (22.0, 0), (48.1, 1), (21.0, 1), (0.0, 1)):
        assert len(_density(competing, metrics_l0=32.0, evals_l0=held_out)) == number, held_out
    assert not _density(competing, metrics_l0=32.0), "nothing was measured"
    (text,) = _density(SimpleNamespace(competes_over="all", config=object()), metrics_l0=32.0, evals_l0=1.0)
    assert text.endswith("What helps: train on more tokens (training.training_tokens)"), "it has no such option"
    for alike in ("features", None):
        assert not _density(SimpleNamespace(competes_over=alike, config=object()), metrics_l0=32.0, evals_l0=133.0)


def test_a_run_tells_of_it(tmp_path: Path) -> None:
    with pytest.warns(RuntimeWarning, match="which after 8 steps is not where training is"):
        sweeps.train(fake(tmp_path, sae={"name": "batchtopk", "d_sae": 12, "k": 0.4}, training={"lr": 0.1}))
    both = saekit.grid(
        fake(tmp_path / "two", sae={"name": "batchtopk", "d_sae": 12, "k": 0.4}, training={"lr": 0.1}),
        {"sae.k": [0.4, 6.0]}, plugins=sweeps.manager(),
    )  # fmt: skip
    with pytest.warns(RuntimeWarning, match="^0_k=0.4: on held-out text "):
        sweeps.train(both)
