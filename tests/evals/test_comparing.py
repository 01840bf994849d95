"""Which of several SAEs is better, as far as the same contexts can tell."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import attrs
import numpy as np
import pytest
from saekit_plugins.evals.downstream.module import DownstreamEval
from saekit_plugins.evals.reconstruction.module import ReconstructionEval

from saekit.errors import ConfigError
from saekit.evals import Sums
from saekit.evals.accumulating import finished
from saekit.evals.comparing import differences, widening
from saekit.evals.comparison import Comparison
from saekit.measuring import Evaluation, Measure

MEASURES = {**ReconstructionEval.measures, **DownstreamEval.measures}
"""What the built-in evals say of their numbers."""


def metrics(totals: Any) -> dict[str, Any]:
    return {
        "ce_recovered": (totals["zero"] - totals["sae"]) / (totals["zero"] - totals["clean"]),
        "explained_variance": 1 - totals["error"] / totals["variance"],
        "l0": totals["active"] / totals["tokens"],
    }


class Text:
    """Contexts, some harder than others."""

    def __init__(self, n: int, seed: int) -> None:
        self.rng, self.n = np.random.default_rng(seed), n
        self.clean = self.rng.gamma(20, 3, n)
        self.zero = self.clean + self.rng.gamma(9, 6, n)
        self.variance = self.rng.gamma(5, 50, n)

    def sae(self, *, worse: float = 0.0, l0: float = 30.0, draws: int = 300) -> Evaluation:
        """What one SAE does on them, which loses about a tenth, and ``worse`` more of what there is to lose."""
        lost = self.rng.beta(4, 36, (2, self.n)) + worse
        sums = Sums()
        sums.add(
            range(self.n),
            {
                "clean": self.clean, "zero": self.zero, "sae": self.clean + (self.zero - self.clean) * lost[0],
                "error": self.variance * lost[1], "variance": self.variance, "tokens": np.full(self.n, 128.0),
                "active": self.rng.poisson(128 * l0, self.n),
            },
        )  # fmt: skip
        return finished(sums, metrics, draws, measures=MEASURES)


def test_one_that_is_worse_is_told_apart_and_a_copy_is_not() -> None:
    text = Text(40, 0)
    good = text.sae()
    found = Comparison(evaluations={"good": good, "copy": good, "bad": text.sae(worse=0.05)})
    same = found.pair("ce_recovered", "good", "copy")
    assert (same.difference, same.error, same.low, same.high) == (0, 0, 0, 0)
    assert not same.distinguishable
    assert found.verdict(same) == ("good and copy are not distinguishable in CE recovered: 0.000 (0.000 to 0.000)")
    other = found.pair("ce_recovered", "bad", "good")
    assert other.distinguishable
    assert other.difference == pytest.approx(-0.05, abs=0.02)
    assert other.joint_low <= other.low < other.difference < other.high <= other.joint_high < 0
    assert other.difference == pytest.approx(-found.pair("ce_recovered", "good", "bad").difference)
    words = found.verdict(other)
    assert words.startswith("good is better than bad in CE recovered by 0.0")
    numbers = [float(part.strip("()")) for part in words.split() if part.strip("()")[0].isdigit()]
    assert numbers == pytest.approx([-other.difference, -other.joint_high, -other.joint_low], abs=6e-4)
    assert "good and bad are not distinguishable in L0" in " ".join(found.verdicts())


def test_less_is_better_where_it_is_a_loss() -> None:
    text = Text(40, 1)
    one, two = text.sae(), text.sae(worse=0.05)
    lost = {name: attrs.evolve(evaluation,
                               values={"kl_div_with_sae": 1 - evaluation["ce_recovered"]},
                               resampled={"kl_div_with_sae": 1 - evaluation.resampled["ce_recovered"]})
            for name, evaluation in (("one", one), ("two", two))}  # fmt: skip
    found = Comparison(evaluations=lost)
    (pair,) = found.pairs
    assert pair.difference < 0
    assert found.verdict(pair).startswith("one is better than two in KL divergence by 0.0")


def test_a_strangers_eval_says_which_is_better_and_what_is_told_first() -> None:
    text = Text(40, 1)
    one, two = text.sae(), text.sae(worse=0.05)
    names = {"share_lost": "ce_recovered", "share_kept": "explained_variance", "of_text": "l0"}
    measures = {
        "share_lost": Measure("share lost", -1, "lost", headline=1, fidelity=True),
        "share_kept": Measure("share kept", 1),
        "of_text": Measure("of the text alone", of_model=True),
    }

    def renamed(evaluation: Evaluation, known: Mapping[str, Measure]) -> Evaluation:
        return Evaluation(
            values={
                **{new: evaluation[old] for new, old in names.items()},
                "share_lost": 1 - evaluation["ce_recovered"],
                "l0": evaluation["l0"],
            },
            resampled={
                **{new: evaluation.resampled[old] for new, old in names.items()},
                "share_lost": 1 - evaluation.resampled["ce_recovered"],
                "l0": evaluation.resampled["l0"] - (10 if evaluation is two else 0),
            },
            contexts=evaluation.contexts,
            measures=known,
        )

    found = Comparison(evaluations={"one": renamed(one, measures), "two": renamed(two, measures)})
    assert [pair.metric for pair in found.pairs] == ["share_lost", "share_kept", "l0"]
    assert [pair.metric for pair in found.headlines] == ["share_lost"]
    assert found.verdicts()[0].startswith("one is better than two in share lost by 0.0")
    assert found.verdicts()[1].startswith("one is better in share lost than two, with no more")
    assert found.verdict(found.pair("share_kept", "two", "one")).startswith("one is better than two in share kept")
    assert found.text().splitlines()[0].split() == ["lost"]
    assert found.rows()[0]["share_lost"] == 1 - one["ce_recovered"]
    unsaid = Comparison(evaluations={"one": renamed(one, {}), "two": renamed(two, {})})
    assert "two has more share lost than one by 0.0" in " ".join(unsaid.verdicts())
    assert len(unsaid.pairs) == 4
    with pytest.raises(TypeError, match=r"measures must be a mapping of names to saekit\.measuring\.Measure, found 3"):
        Evaluation(values={}, measures=3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="better"):
        Measure("more", 2)


def test_a_number_of_one_of_several_targets_means_what_that_of_all_means() -> None:
    found = Evaluation(values={"mse": 2.0, "mse/a": 1.0}, measures={"mse": Measure("squared error", -1, headline=1)})
    assert found.measure("mse/a") == Measure("squared error of a", -1)
    assert found.headlines == ["mse"]


def test_fidelity_that_is_paid_for_with_features_is_said_to_be() -> None:
    text = Text(60, 2)
    found = Comparison(evaluations={"small": text.sae(worse=0.05), "large": text.sae(l0=60)})
    assert "large has more L0 than small by 29.95 (29.7" in found.verdicts()[2]
    assert found.verdicts()[-1] == (
        "large is better in CE recovered and explained variance and has more features per token than small: compare "
        "SAEs of one L0 to tell which is the better method"
    )
    found = Comparison(evaluations={"large": text.sae(worse=0.05, l0=60), "small": text.sae()})
    assert found.verdicts()[-1] == (
        "small is better in CE recovered and explained variance than large, with no more features per token"
    )


def test_of_several_the_frontier_is_told_and_not_each_pair() -> None:
    text = Text(60, 2)
    saes = {"sparse": text.sae(l0=20, worse=0.05), "dense": text.sae(l0=60), "waste": text.sae(l0=60, worse=0.1)}
    saes |= {f"worse {n}": text.sae(l0=70 + n, worse=0.2) for n in range(5)}
    found = Comparison(evaluations=saes)
    frontier, *beaten, more, densities, fidelity = found.summary()
    assert frontier.startswith("frontier of L0 and CE recovered, from sparse to dense: sparse (0.")
    assert "), dense (0." in frontier
    assert len(frontier.split(" at ")) == 3, "these two alone"
    assert beaten[0].startswith("waste is beaten in CE recovered, with no more features per token, by ")
    assert (len(beaten), more) == (4, "and 2 more are beaten so")
    assert densities.startswith("told apart in L0: ")
    assert densities.endswith(" of 28 pairs")
    assert fidelity.startswith("told apart in CE recovered: ")
    assert len(found.text().splitlines()) < 30 < len(found.verdicts())
    assert "- what is said of each two: --pairs, or .verdicts()" in found.text()
    assert all(f"- {verdict}" in found.text(pairs=True) for verdict in found.verdicts()[:50])
    two = Comparison(evaluations={name: saes[name] for name in ("sparse", "dense")})
    assert two.summary() == two.verdicts()


def told_apart(n: int, saes: int, times: int) -> tuple[float, float]:
    """How often any of SAEs that are alike are told apart, and how often a pair's own interval leaves out 0."""
    any_of_them, alone = [], []
    for seed in range(times):
        text = Text(n, 100 + seed)
        pairs = differences({str(number): text.sae() for number in range(saes)}, ["ce_recovered", "explained_variance"])
        for metric in ("ce_recovered", "explained_variance"):
            own = [pair for pair in pairs if pair.metric == metric]
            any_of_them.append(any(pair.distinguishable for pair in own))
            alone += [pair.low > 0 or pair.high < 0 for pair in own]
    return float(np.mean(any_of_them)), float(np.mean(alone))


@pytest.mark.parametrize(("n", "saes"), [(24, 2), (64, 2), (40, 4)])
def test_what_is_alike_is_told_apart_in_one_case_of_twenty(n: int, saes: int) -> None:
    """At whatever number of contexts, and in all pairs of several SAEs together."""
    together, alone = told_apart(n, saes, 160)  # 320 cases: a standard error of 1.2 %
    assert 0.015 < together < 0.09
    assert 0.015 < alone < 0.09


def test_a_true_difference_is_in_its_interval() -> None:
    held = []
    for seed in range(120):
        text = Text(40, 500 + seed)
        (pair,) = differences({"a": text.sae(), "b": text.sae(worse=0.03)}, ["ce_recovered"])
        held.append(pair.low < 0.03 < pair.high)
    assert 0.89 < np.mean(held) < 0.99


def test_few_contexts_have_wide_intervals() -> None:
    t = {3: 3.182446, 7: 2.364624, 15: 2.131450, 63: 1.998341}  # of 95 %, by degrees of freedom
    for degrees, quantile in t.items():
        expected = math.sqrt((degrees + 1) / degrees) * quantile / 1.959964
        assert widening(degrees + 1) == pytest.approx(expected, rel=0.003 if degrees > 3 else 0.02)
    assert math.isnan(widening(1))
    text = Text(6, 3)
    assert "6 contexts are few" in " ".join(Comparison(evaluations={"a": text.sae(), "b": text.sae()}).rules())


def test_one_context_cannot_tell() -> None:
    text = Text(1, 4)
    found = Comparison(evaluations={"a": text.sae(), "b": text.sae()})
    assert found.pairs == ()
    assert found.rows()[0]["l0_low"] is None


def test_contexts_that_are_not_the_same_are_refused() -> None:
    found = {"a": Text(10, 5).sae(), "b": Text(12, 5).sae()}
    with pytest.raises(ConfigError, match="a was measured on 10 contexts and b on 12, which are not the same"):
        differences(found)
    one = attrs.evolve(found["a"], about={"contexts_digest": "1"})
    other = attrs.evolve(found["a"], about={"contexts_digest": "2"})
    with pytest.raises(ConfigError, match="Measure both on the same text"):
        differences({"a": one, "b": other})


def with_values(evaluation: Evaluation, **resampled: Any) -> Evaluation:
    drawn: Mapping[str, Any] = {**evaluation.resampled, **resampled}
    return attrs.evolve(evaluation, resampled=drawn)


def test_numbers_that_never_vary_and_numbers_that_are_none() -> None:
    text = Text(20, 6)
    one, other = text.sae(), text.sae()
    one = attrs.evolve(with_values(one, l0=np.full(300, 32.0)), values={**one.values, "l0": 32.0})
    other = attrs.evolve(with_values(other, l0=np.full(300, 64.0)), values={**other.values, "l0": 64.0})
    found = Comparison(evaluations={"k32": one, "k64": other})
    pair = found.pair("l0", "k64", "k32")
    assert (pair.difference, pair.joint_low, pair.joint_high, pair.distinguishable) == (32, 32, 32, True)
    assert found.verdict(pair) == "k64 has more L0 than k32 by 32 (32 to 32)"
    broken = with_values(other, ce_recovered=np.full(300, math.nan))
    found = Comparison(evaluations={"one": one, "broken": broken})
    pair = found.pair("ce_recovered", "one", "broken")
    assert not pair.distinguishable
    assert "cannot be compared in CE recovered" in found.verdict(pair)
    plain = found.to_dict()
    assert next(one for one in plain["pairs"] if one["metric"] == "ce_recovered")["low"] is None


def test_few_contexts_are_those_in_which_tokens_count() -> None:
    sums = Sums()
    sums.add(range(30), {"x": np.arange(30.0)})
    sums.leave_out(range(2, 30))
    left = finished(sums, lambda totals: {"x": totals["x"]}, 50)
    assert (left.values, left.contexts) == ({"x": 1.0}, (0, 1))
    found = Comparison(evaluations={"one": left, "other": left})
    assert found.rules()[-1] == "2 contexts are few: intervals of fewer than 10 are not to be relied on."
    sums.leave_out([1])
    left = finished(sums.merged(Sums()), lambda totals: {"x": totals["x"]}, 50)
    assert Comparison(evaluations={"one": left, "other": left}).rules() == [
        "Only one context has tokens that count: there are no intervals, and nothing can be told apart."
    ]


def test_saes_at_other_sites_are_not_better_in_what_is_of_a_site() -> None:
    text = Text(40, 0)
    sites = {"early": "blocks.0", "late": "blocks.1", "also late": "blocks.1"}
    evaluations = {"early": text.sae(), "late": text.sae(worse=0.2, l0=60), "also late": text.sae(worse=0.4)}
    found = Comparison(evaluations=evaluations, sites=sites)
    said = found.verdict(found.pair("ce_recovered", "early", "late"))
    assert said.startswith("early and late are at other sites, of which CE recovered does not say which is better: ")
    assert found.verdict(found.pair("l0", "early", "late")).startswith("late has more L0 than early by ")
    better = [verdict for verdict in found.verdicts() if "better in" in verdict]
    assert better
    assert not any("early" in verdict for verdict in better)
    assert found.verdicts()[-1].startswith("SAEs at other sites are not compared in CE recovered, explained variance: ")
    head, first, *_ = found.text().splitlines()
    assert (head.split()[0], first.split()[:2]) == ("site", ["early", "blocks.0"])
    assert ">site<" in found._repr_html_()
    here = Comparison(evaluations=evaluations)
    assert here.verdict(here.pair("ce_recovered", "early", "late")).startswith("early is better than late")
    assert not any("other sites" in verdict for verdict in here.verdicts())


def test_one_sae_twice_is_said_to_be_the_same() -> None:
    text = Text(40, 0)
    good = text.sae()
    found = Comparison(evaluations={"one": good, "two": good, "bad": text.sae(worse=0.2)})
    assert found.verdicts()[0] == "one and two are the same: so are all their numbers"
    assert not any("one and two" in verdict for verdict in found.verdicts()[1:])


def test_misspelled_numbers_get_near_names() -> None:
    text = Text(20, 0)
    found = Comparison(evaluations={"one": text.sae(), "two": text.sae()})
    with pytest.raises(KeyError, match="not compared in 'ce_recoverd'. Did you mean 'ce_recovered'"):
        found.pair("ce_recoverd", "one", "two")
    with pytest.raises(KeyError, match="'oen' and 'two' were not compared in 'l0'. Did you mean 'one'"):
        found.pair("l0", "oen", "two")
    with pytest.raises(KeyError, match="there is no number 'ce_recoverd'. Did you mean 'ce_recovered'"):
        found.evaluations["one"]["ce_recoverd"]


def test_differences_stand_in_the_order_of_the_verdicts() -> None:
    text = Text(20, 0)
    found = Comparison(evaluations={"one": text.sae(), "two": text.sae(), "three": text.sae()})
    _, differences_ = found.tables()
    labels = [found.measure(pair.metric).label for pair in found.headlines]
    assert [row[0] for row in differences_["rows"]][: len(labels)] == labels
