"""Which tokens count and how contexts begin: said once, checked before anything long, the same for all."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import attrs
import numpy as np
import pytest
import torch
from support.saved import make
from support.sweeps import manager
from support.tiny import run_config

import saekit
from saekit import ConfigError
from saekit.cli import app
from saekit.commands.terminal.completing import complete_backend, complete_eval
from saekit.commands.terminal.measuring import places_of
from saekit.evals.engine import measure
from saekit.evals.measured import Measured
from saekit.runs.opening import seed_for
from saekit.site import Sites
from saekit.testing import FakeBackend
from saekit.tokens import asked_tokens, token_choice

SITE = "blocks.0.hook_resid_post"
CONTEXTS = torch.randint(1, 120, (4, 12), generator=torch.Generator().manual_seed(0))
QUICK: dict[str, Any] = {"n_bootstrap": 0, "verbose": False, "save": False}
pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:.*wrong site, scale or model"),  # they were hardly trained
    pytest.mark.filterwarnings("ignore:.*hardly better than guessing"),  # a fake model does
]


def sae_of(**about: Any) -> saekit.SAE:
    sae = make(SITE, d_in=8)
    sae.info = attrs.evolve(sae.info, metadata=about)
    return sae


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"exclude_special_tokens": [-5, 10**9]}, "exclude_special_tokens: must be true, false or token ids from 0"),
        ({"exclude_special_tokens": [3, 10**9]}, "exclude_special_tokens: has the token id 1000000000, but the voc"),
        ({"exclude_special_tokens": "bos"}, "exclude_special_tokens: must be true, false or a list of token ids"),
        ({"exclude_special_tokens": 3}, "exclude_special_tokens: must be true, false or a list of token ids, found 3"),
        ({"seqpos_slice": ("a",)}, r"seqpos_slice: is \['a'\], expected whole numbers and none"),
        ({"seqpos_slice": 5}, "seqpos_slice: must be one to three numbers, as slice takes them, found 5"),
        ({"seqpos_slice": (0, 0)}, r"seqpos_slice: is \[0, 0\], which leaves no position of a context of any size"),
        ({"seqpos_slice": (12, None)}, r"seqpos_slice: is \[12, None\], which leaves no position of a context of 12 t"),
        ({"seed": -1}, r"seed: must be a whole number of 0 or more, below 2\*\*63, found -1"),
        ({"seed": 1.5}, "seed: must be a whole number of 0 or more, .* found 1.5"),
        ({"seed": np.array([1, 2])}, "seed: must be a whole number of 0 or more"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("function", [saekit.evaluate, saekit.compare])
def test_nonsense_is_refused_before_anything_is_measured(options: Any, message: str, function: Any) -> None:
    backend = FakeBackend()
    saes = sae_of() if function is saekit.evaluate else {"a": sae_of(), "b": sae_of()}
    how = {name: value for name, value in QUICK.items() if name != "save" or function is saekit.evaluate}
    with pytest.raises(ConfigError, match=message):
        function(saes, model=backend, contexts=CONTEXTS, **how, **options)
    assert (4, 12) not in backend.forwards


def test_a_model_without_special_tokens_has_none_to_leave_out() -> None:
    backend = FakeBackend()
    backend.special_tokens = {}
    with pytest.raises(
        ConfigError, match="exclude_special_tokens: is true, and the model 'fake' has no special tokens"
    ):
        saekit.evaluate(sae_of(), model=backend, contexts=CONTEXTS, exclude_special_tokens=True, **QUICK)


def test_numbers_of_other_libraries_are_numbers() -> None:
    backend = FakeBackend()
    for ids in ({3, 4}, np.array([3, 4]), torch.tensor([4, 3]), (np.int64(3), 4)):
        assert token_choice(asked_tokens(ids, np.array([1, 5])), backend).metadata() == {
            "exclude_special_tokens": [3, 4], "seqpos_slice": [1, 5]
        }  # fmt: skip


def test_what_an_sae_says_may_leave_no_token_either() -> None:
    backend = FakeBackend()
    with pytest.raises(ConfigError, match="no token of the contexts counts for the SAE at blocks.0.hook_resid_post"):
        saekit.evaluate(sae_of(seqpos_slice=[20, None]), model=backend, contexts=CONTEXTS, **QUICK)
    assert (4, 12) not in backend.forwards


def test_a_mask_of_tokens_needs_the_contexts_in_comparisons_too() -> None:
    with pytest.raises(ConfigError, match="mask: must be a function of tokens, where the contexts are not given"):
        saekit.compare({"a": sae_of(), "b": sae_of()}, model=FakeBackend(), mask=CONTEXTS > 3, verbose=False)


def test_contexts_that_are_given_are_looked_at_for_bos() -> None:
    begun = torch.cat([torch.zeros(4, 1, dtype=torch.long), CONTEXTS], 1)
    how: dict[str, Any] = {"model": FakeBackend(), **QUICK}
    with pytest.warns(UserWarning, match=r"contexts that begin with BOS \(prepend_bos = true\), and here they do not"):
        saekit.evaluate(sae_of(prepend_bos=True), contexts=CONTEXTS, **how)
    with pytest.warns(UserWarning, match="that do not begin with BOS .* and here they begin with BOS"):
        saekit.evaluate(sae_of(prepend_bos=False), contexts=begun, **how)
    saekit.evaluate({"a": sae_of(prepend_bos=True), "b": sae_of()}, contexts=begun, **how)


def test_a_splice_looks_once_at_how_its_first_forward_begins() -> None:
    backend = FakeBackend()
    begun = torch.cat([torch.zeros(4, 1, dtype=torch.long), CONTEXTS], 1)
    with saekit.splice(backend, sae_of(prepend_bos=True)) as spliced:
        with pytest.warns(UserWarning, match="trained on contexts that begin with BOS .* and here they do not") as said:
            spliced.run(CONTEXTS, want="loss")
        assert len(said) == 1
        spliced.run(CONTEXTS, want="loss")
    with saekit.splice(backend, sae_of(prepend_bos=True)) as spliced:
        spliced.run(begun, want="loss")
    backend.special_tokens = {"bos": 0, "pad": 127}
    padded = torch.cat([torch.full((4, 1), 127), CONTEXTS], 1)
    with saekit.splice(backend, sae_of(prepend_bos=True)) as spliced:
        spliced.run(padded, want="loss")  # where padding comes first, nobody knows


def test_that_a_mask_is_lacking_is_said_in_a_splice_too() -> None:
    sae = sae_of(mask_column="answer")
    unread = "tokens that the column 'answer' of its data chose, and none is read here"
    with pytest.warns(UserWarning, match=unread), saekit.splice(FakeBackend(), sae):
        pass
    with saekit.splice(FakeBackend(), sae, mask=lambda tokens: tokens > 3):
        pass
    with pytest.warns(UserWarning, match="the column 'answer'"):
        saekit.evaluate(sae, model=FakeBackend(), contexts=CONTEXTS, **QUICK)
    saekit.evaluate(sae, model=FakeBackend(), contexts=CONTEXTS, mask=lambda tokens: tokens > 3, **QUICK)


def test_a_run_is_measured_with_the_mask_of_its_own_text(tmp_path: Path) -> None:
    drawn = np.random.default_rng(0)
    rows = [
        {"tokens": drawn.integers(1, 120, 40).tolist(), "mask": drawn.integers(0, 2, 40).tolist()} for _ in range(90)
    ]
    config = run_config(
        tmp_path,
        model={"backend": "fake"},
        site={"hook_name": SITE},
        tokens={"mask_column": "mask"},
        training={"training_tokens": 256, "seed": 42},
        evals={"split": None, "held_out_every": 3, "n_contexts": 6, "run": ["reconstruction"]},
    )
    result = saekit.train(config, dataset=rows, plugins=manager())
    same: dict[str, Any] = {"evals": ["reconstruction"], "n_contexts": 6, "plugins": manager()} | QUICK
    same["seed"] = seed_for(42, "held out")
    found = saekit.evaluate(result, **same)
    assert found.about["masked"]
    assert 0 < found.about["tokens_used"] < 0.7 * found.about["tokens_of"]
    assert found["explained_variance"] == pytest.approx(result.metrics["evals/explained_variance"], rel=1e-6)
    other = saekit.evaluate(result, mask=lambda tokens: tokens > 0, **same)
    assert other.about["tokens_used"] > found.about["tokens_used"]


def test_an_sae_of_others_is_measured_on_the_tokens_that_count_for_the_one_of_the_text(tmp_path: Path) -> None:
    drawn, path = np.random.default_rng(0), tmp_path / "text.jsonl"
    rows = [{"tokens": drawn.integers(1, 120, 40).tolist(), "mask": drawn.integers(0, 2, 40).tolist()}] * 30
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    about = {"context_size": 12, "prepend_bos": False}
    own = sae_of(dataset_path=str(path), mask_column="mask", held_out_every=3, **about)
    asked: dict[str, Any] = {"model": FakeBackend(), "dataset": str(path), "n_contexts": 4, "evals": ["reconstruction"]}
    found = saekit.evaluate({"own": own, "other": sae_of(**about)}, seed=np.int64(3), **asked, **QUICK)
    assert found["own"].about["masked"]
    assert found["own"].about["held_out"]
    assert found["own"].about["seed"] == 3
    for name in ("tokens_used", "masked", "held_out", "contexts_digest"):
        assert found["own"].about[name] == found["other"].about[name], name


def test_each_sae_has_the_mean_over_as_many_contexts_as_its_eval_says() -> None:
    from saekit.evals.means import mean_of, read_means

    backend = FakeBackend()
    sites = Sites.one(saekit.Site(hook_name=SITE))
    subjects = [Measured(sae_of(), sites, {"downstream": _downstream(number)}) for number in (1, 3)]
    means = read_means(subjects, backend=backend, contexts=CONTEXTS)
    held = backend.run(CONTEXTS, read=[SITE]).held[SITE].double()
    for subject, number in zip(subjects, (1, 3), strict=True):
        mean = mean_of(means, sites.targets[0], subject, torch.zeros(8, dtype=torch.float64))
        torch.testing.assert_close(mean, held[:number].mean((0, 1)))
    together = measure(subjects, backend=backend, contexts=CONTEXTS)
    for subject, sums in zip(subjects, together, strict=True):
        (alone,) = measure([subject], backend=backend, contexts=CONTEXTS)
        told = [subject.evals["downstream"].result(one["downstream"]).values for one in (sums, alone)]
        assert told[0] == told[1]


def test_what_is_worse_than_the_mean_in_the_models_loss_says_so() -> None:
    values = {"ce_recovered": 0.5, "ce_recovered_from_mean": -0.1}
    (said,) = _downstream(1).remarks(values)
    assert said.startswith("CE recovered from mean is below 0: the SAE is worse than the mean in its place")
    assert _downstream(1).remarks({"ce_recovered": 0.5}) == ()


def _downstream(number: int) -> Any:
    from saekit_plugins.evals.downstream import DownstreamConfig
    from saekit_plugins.evals.downstream.module import DownstreamEval

    return DownstreamEval(DownstreamConfig(mean_ablation_contexts=number, n_bootstrap=0))


@pytest.mark.parametrize(
    ("text", "places"),
    [("1:", (1, None)), ("0:64", (0, 64)), ("::2", (None, None, 2)), ("5", (5,)), (":-1", (None, -1)), (None, None)],
)
def test_places_are_typed_as_slices(text: str | None, places: object) -> None:
    assert places_of(text) == places


@pytest.mark.parametrize("text", ["a", "1:2:3:4", "", "1.5:"])
def test_other_places_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=r"--seqpos-slice: is .* expected START:STOP"):
        places_of(text)


@pytest.mark.parametrize("command", ["eval", "compare"])
def test_the_command_line_hands_over_all_that_is_typed(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, Any] = {}

    def called(saes: Any, **options: Any) -> Any:
        given.update(options)
        raise ConfigError("enough")

    room = "evaluating.evaluate" if command == "eval" else "comparing.compare"
    monkeypatch.setattr(f"saekit.commands.{room}", called)
    words = f"{command} a b --model m --backend AutoModelForCausalLM --site {SITE} --seqpos-slice 1:9 --n-contexts 3"
    with pytest.raises(ConfigError, match="enough"):
        app(words.split(), standalone_mode=False)
    asked = {name: given[name] for name in ("model", "backend", "site", "seqpos_slice", "n_contexts")}
    assert asked == {
        "model": "m", "backend": "AutoModelForCausalLM", "site": SITE, "seqpos_slice": (1, 9), "n_contexts": 3
    }  # fmt: skip


def test_the_tab_key_offers_backends_with_a_model_and_evals() -> None:
    nothing: Any = None
    backends = complete_backend(nothing, "")
    assert {"HookedTransformer", "AutoModelForCausalLM", "TransformerBridge"} <= {*backends}
    assert "none" not in backends
    assert {"reconstruction", "downstream"} <= {*complete_eval(nothing, "")}
