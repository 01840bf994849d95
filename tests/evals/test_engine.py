"""Evals share forwards, and what they find is what closed forms, torch and plain loops find."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import numpy as np
import pytest
import torch
from saekit_plugins.architectures.standard import StandardConfig
from saekit_plugins.evals.downstream import DownstreamConfig
from saekit_plugins.evals.downstream.module import DownstreamEval
from saekit_plugins.evals.reconstruction import ReconstructionConfig
from saekit_plugins.evals.reconstruction.module import ReconstructionEval
from support.ports import EARLY, EMBED, HEAD, LATE, WIDTHS, MapConfig, MapSAE
from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div

import saekit
from saekit.backends import Hooks, next_token_loss
from saekit.errors import ConfigError
from saekit.evals import AccumulatingEval, Measured, Sums, Totals, differences, measure
from saekit.evals.calling import Asked, all_called
from saekit.measuring import Evaluation, Needs, Seen
from saekit.sae.build import build_module
from saekit.testing import FakeBackend
from saekit.tokens import TokenChoice
from saekit.values import Forward

TOKENS = torch.randint(1, 128, (6, 10), generator=torch.Generator().manual_seed(3))
TOKENS[:, 0] = 0  # BOS
MIDDLE = saekit.Sites.one(EARLY)
pytestmark = pytest.mark.usefixtures("one_thread")


class Small(FakeBackend):
    """Logits of a size that probabilities differ."""

    def _embedding(self) -> Tensor:
        return super()._embedding() / 6


class Inside(Small):
    """One that begins inside, and counts how often each block runs."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = [0, 0]
        self._from: Tensor | None = None

    def entry_of(self, hooks: Collection[str]) -> str | None:
        late = set(hooks) <= {"blocks.1.hook_resid_post", "blocks.0.hook_resid_post"}
        return "blocks.0.hook_resid_post" if late else None

    def forward(self, tokens: Tensor, hooks: Hooks) -> Tensor | None:
        if self._from is None:
            self.blocks = [count + 1 for count in self.blocks]
            return super().forward(tokens, hooks)
        self.blocks[1] += 1
        residual = hooks("blocks.0.hook_resid_post", self._from)
        residual = hooks("blocks.1.hook_resid_post", residual * 2)
        return None if hooks.done else residual @ self._embedding().T

    def run_from(self, tokens: Tensor, entry: str, value: Tensor, **how: Any) -> Forward:
        assert entry == "blocks.0.hook_resid_post"
        self._from = value
        try:
            return self.run(tokens, **how)
        finally:
            self._from = None


def standard(width: int = 8, d_sae: int = 24, seed: int = 0) -> saekit.SAE:
    plugins, config = saekit.default_manager(), StandardConfig(d_sae=d_sae)
    sae = build_module(plugins.find("sae_architectures", config), config, width, plugins)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return sae


def identity(width: int = 8) -> saekit.SAE:
    sae = standard(width, 2 * width)
    with torch.no_grad():
        both = torch.cat([torch.eye(width), -torch.eye(width)])
        for name, values in {"W_enc": both.T, "W_dec": both, "b_enc": torch.zeros(2 * width)}.items():
            getattr(sae, name).copy_(values)
        sae.b_dec.zero_()
    return sae


def nothing(width: int = 8) -> saekit.SAE:
    sae = standard(width)
    with torch.no_grad():
        sae.W_dec.zero_()
        sae.b_dec.zero_()
    return sae


def evals(batch_size: int = 16, **downstream: Any) -> dict[str, Any]:
    how = {"batch_size_prompts": batch_size, "n_bootstrap": 20}
    return {
        "rows": ReconstructionEval(ReconstructionConfig(**how)),
        "model": DownstreamEval(DownstreamConfig(**how, **downstream)),
    }


def found(
    sae: saekit.SAE,
    *,
    backend: FakeBackend | None = None,
    sites: saekit.Sites = MIDDLE,
    tokens: TokenChoice | None = None,
    mask: Any = None,
    batch_size: int = 16,
    contexts: Tensor = TOKENS,
    **downstream: Any,
) -> Evaluation:
    chosen = evals(batch_size, **downstream)
    subject = Measured(sae, sites, chosen, tokens or TokenChoice())
    (sums,) = measure([subject], backend=backend or Small(), contexts=contexts, mask=mask)
    return Evaluation.joined(one.result(sums[name]) for name, one in chosen.items())


# ---- how often what runs


def subjects(chosen: dict[str, Any]) -> list[Measured]:
    saes = [Measured(standard(seed=seed), MIDDLE, chosen) for seed in range(3)]
    return [*saes, Measured(standard(), saekit.Sites.one(LATE), chosen)]


def test_each_forward_runs_once_for_all_saes() -> None:
    for options, each in (({}, 0), ({"mean_ablation_contexts": 2}, 1), ({"kl": True, "top1": True}, 0)):
        backend = Small()
        measure(subjects(evals(batch_size=3, **options)), backend=backend, contexts=TOKENS)
        batches, targets, saes = 2, 2, 4
        per_batch = 1 + targets * (1 + each) + saes
        assert len(backend.forwards) == batches * per_batch + each, "one more reads the means"


def test_what_does_not_need_losses_takes_one_early_forward_and_the_sae_runs_once() -> None:
    backend, sae, seen = Small(), standard(), []
    sae.hook_sae_input.add_hook(lambda x, hook: seen.append(len(x)))
    measure([Measured(sae, MIDDLE, {"rows": evals()["rows"]})], backend=backend, contexts=TOKENS)
    assert len(backend.forwards) == 1
    measure([Measured(sae, MIDDLE, evals())], backend=backend, contexts=TOKENS)
    assert seen == [6, 6], "once for rows and once for rows and losses together"


def test_forwards_begin_inside_where_the_model_can() -> None:
    whole, inside = Small(), Inside()
    chosen = evals(batch_size=3, mean_ablation_contexts=3, kl=True)
    results = [measure(subjects(chosen), backend=backend, contexts=TOKENS) for backend in (whole, inside)]
    for one, other in zip(*results, strict=True):
        for name, sums in one.items():
            assert chosen[name].result(other[name]).numbers() == chosen[name].result(sums).numbers()
    assert inside.blocks[0] == 3, "one for each batch, and one for the means"
    assert inside.blocks[1] == len(whole.forwards)
    elsewhere = [Measured(standard(), saekit.Sites.one(EMBED), chosen)]
    inside.blocks = [0, 0]
    measure(elsewhere, backend=inside, contexts=TOKENS)
    assert inside.blocks[0] == inside.blocks[1], "whole forwards, where no entry is known"


def test_saes_are_called_together_with_the_very_numbers_of_each_alone() -> None:
    """Losses of logits, and batches of other sizes, would round otherwise: those have a pass of their own."""

    def asked(seed: int, guard: Any = nullcontext, **how: Any) -> Asked:
        return Asked(standard(seed=seed), MIDDLE, evals(**how), guard)

    ways: list[dict[str, Any]] = [{}, {}, {"kl": True}, {"batch_size": 4}]
    backend = Small()
    together = all_called([asked(n, **how) for n, how in enumerate(ways)], backend=backend, contexts=TOKENS)
    assert len(backend.forwards) == (1 + 1 + 2) + 3 + 2 * 3
    for number, (how, told) in enumerate(zip(ways, together, strict=True)):
        (alone,) = all_called([asked(number, **how)], backend=Small(), contexts=TOKENS)
        assert alone.found == told.found
        assert alone.remarks == told.remarks


def test_a_fault_is_that_of_the_eval_of_the_sae_that_has_it() -> None:
    class Failing(ReconstructionEval):
        def update(self, sums: Sums, seen: Seen) -> None:
            raise RuntimeError("no")

    inside: list[tuple[int, str]] = []

    @contextmanager
    def guard(number: int, name: str) -> Iterator[None]:
        try:
            yield
        except RuntimeError:
            inside.append((number, name))
            raise

    chosen = [evals(), {"fails": Failing(ReconstructionConfig())} | evals()]
    asked = [Asked(standard(), MIDDLE, each, functools.partial(guard, n)) for n, each in enumerate(chosen)]
    with pytest.raises(RuntimeError, match="no"):
        all_called(asked, backend=Small(), contexts=TOKENS)
    assert inside == [(1, "fails")]


# ---- known answers


@pytest.mark.parametrize("site", [EARLY, HEAD, saekit.Site(hook_name=HEAD.hook_name)], ids=lambda site: site.name)
def test_an_identity_recovers_all_and_zeros_nothing(site: saekit.Site) -> None:
    width, sites = WIDTHS.get(site, 8), saekit.Sites.one(site)
    same = found(identity(width), sites=sites, kl=True, top1=True)
    assert same["ce_recovered"] == pytest.approx(1, abs=1e-6)
    assert same["explained_variance"] == pytest.approx(1, abs=1e-12)
    assert same["kl_div_with_sae"] == pytest.approx(0, abs=1e-6)
    assert (same["top1_agreement"], same["kl_div_score"]) == (1, pytest.approx(1, abs=1e-5))
    assert same["relative_reconstruction_bias"] == pytest.approx(1)
    assert not same.remarks
    zero = found(nothing(width), sites=sites, kl=True)
    assert zero["ce_recovered"] == zero["kl_div_score"] == 0
    assert zero["explained_variance"] <= 0


def test_numbers_of_rows_are_those_of_closed_forms() -> None:
    sae = standard()
    numbers = found(sae, batch_size=4)
    x = Small().run(TOKENS, read={EARLY.hook_name}).held[EARLY.hook_name].double()
    with torch.no_grad():
        features, output = sae.encode(x.float()).double(), sae(x.float()).double()
    y, given, f = (values.flatten(0, 1).numpy() for values in (x, output, features))
    norms, given_norms = np.linalg.norm(y, axis=1), np.linalg.norm(given, axis=1)
    dot = (y * given).sum(1)
    expected = {
        "explained_variance": 1 - ((y - given) ** 2).sum() / ((y - y.mean(0)) ** 2).sum(),
        "mse": ((y - given) ** 2).sum(1).mean(),
        "cosine_similarity": (dot / norms / given_norms).mean(),
        "l2_norm_in": norms.mean(),
        "l2_norm_out": given_norms.mean(),
        "l2_ratio": given_norms.mean() / norms.mean(),
        "relative_reconstruction_bias": (given**2).sum(1).mean() / dot.mean(),
        "l0": (f != 0).sum(1).mean(),
        "l1": np.abs(f).sum(1).mean(),
        "silent_features": ((f != 0).sum(0) == 0).sum(),
        "dense_features": ((f != 0).mean(0) > 0.1).sum(),
        "n_tokens": 60,
    }
    assert {name: numbers[name] for name in expected} == pytest.approx(expected, rel=1e-5)
    assert numbers.features["firing_fractions"] == pytest.approx((f != 0).mean(0))
    fired = numbers.histograms["log10_firing_fractions"]
    assert sum(fired.counts) == 24 - expected["silent_features"]


def test_a_large_mean_takes_no_digits_of_the_variance() -> None:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(40, 8, generator=generator, dtype=torch.float64) + 1e6
    sae = standard().to(torch.float64)
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.zero_()
        sae.b_dec.fill_(1e6)
    explained = saekit.evals.variance_metrics(sae, rows.split(7))["explained_variance"]
    spread = (rows - rows.mean(0)).square().sum()
    assert explained == pytest.approx(float(1 - (rows - 1e6).square().sum() / spread), rel=1e-6)


def test_divergence_is_that_of_torch() -> None:
    backend, sae = Small(), standard()
    numbers = found(sae, backend=backend, kl=True, top1=True, batch_size=2)
    clean = backend.run(TOKENS, want="logits").logits
    put: dict[str, Callable[[Tensor], Tensor]] = {"sae": lambda held: sae(held), "ablation": torch.zeros_like}
    for name, function in put.items():
        with torch.no_grad():
            logits = backend.run(TOKENS, replace={EARLY.hook_name: function}, want="logits").logits
        logs = logits.flatten(0, 1).double().log_softmax(-1)
        expected = kl_div(logs, clean.flatten(0, 1).double().log_softmax(-1), log_target=True, reduction="batchmean")
        assert numbers[f"kl_div_with_{name}"] == pytest.approx(float(expected), rel=1e-5)
        if name == "sae":
            agrees = (logits.argmax(-1) == clean.argmax(-1)).double().mean()
            assert numbers["top1_agreement"] == float(agrees)
            loss = cross_entropy(logits[:, :-1].flatten(0, 1), TOKENS[:, 1:].flatten())
            assert numbers["ce_loss_with_sae"] == pytest.approx(float(loss), rel=1e-6)
    assert found(sae, backend=backend)["ce_loss_with_sae"] == pytest.approx(numbers["ce_loss_with_sae"], rel=1e-6)


def test_tokens_without_probability_add_nothing_to_a_divergence() -> None:
    class Masked(Small):
        def forward(self, tokens: Tensor, hooks: Hooks) -> Tensor | None:
            logits = super().forward(tokens, hooks)
            return logits if logits is None else logits.index_fill(-1, torch.tensor([0, 5]), -torch.inf)

    numbers = found(standard(), backend=Masked(), kl=True, tokens=TokenChoice(exclude=[0, 5]))
    assert math.isfinite(numbers["kl_div_with_sae"])
    assert numbers["kl_div_with_sae"] > 0


def test_mean_ablation_puts_the_mean_over_the_first_contexts() -> None:
    choice = TokenChoice(exclude=[0])
    numbers = found(standard(4), sites=saekit.Sites.one(HEAD), tokens=choice, mean_ablation_contexts=2, batch_size=4)
    held = Small().run(TOKENS[:2], read={HEAD.hook_name}).held[HEAD.hook_name]
    mean = held[:, 1:, 1].flatten(0, 1).mean(0)  # without BOS

    def put(activations: Tensor) -> Tensor:
        changed = activations.clone()
        changed[:, 1:, 1] = mean
        return changed

    loss = Small().run(TOKENS, replace={HEAD.hook_name: put}, want="loss").loss[:, 1:].mean()
    assert numbers["ce_loss_with_mean_ablation"] == pytest.approx(float(loss), rel=1e-6)
    clean, spliced = numbers["ce_loss_without_sae"], numbers["ce_loss_with_sae"]
    assert numbers["ce_recovered_from_mean"] == pytest.approx((float(loss) - spliced) / (float(loss) - clean), rel=1e-4)
    assert numbers.about["mean_ablation_contexts"] == 2
    with pytest.raises(ConfigError, match="means are to be read from 9 contexts, and there are 6"):
        found(standard(), mean_ablation_contexts=9)


def test_a_transcoder_writes_what_it_makes_of_the_clean_forward() -> None:
    sites = saekit.Sites((EMBED,), (LATE,))
    sae = MapSAE(MapConfig(d_sae=12), ports=saekit.Ports.of(sites, WIDTHS), activation=torch.relu)
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)) * 0.3)
    backend = Small()
    embedding = backend._embedding()[TOKENS]
    with torch.no_grad():
        logits = sae(embedding) @ backend._embedding().T
    expected = cross_entropy(logits[:, :-1].flatten(0, 1), TOKENS[:, 1:].flatten())
    numbers = found(sae, backend=backend, sites=sites)
    assert numbers["ce_loss_with_sae"] == pytest.approx(float(expected), rel=1e-5)
    assert numbers["l2_norm_in"] == pytest.approx(float((4 * embedding).norm(dim=-1).mean()), rel=1e-5)


# ---- which tokens


def test_positions_that_do_not_count_stay_and_are_left_out_of_every_mean() -> None:
    sae, backend = standard(), Small()
    allowed = torch.rand(TOKENS.shape, generator=torch.Generator().manual_seed(5)) > 0.3
    choice = TokenChoice(exclude=[0, 7], seqpos_slice=(None, 8))
    kept = choice.kept(TOKENS) & allowed
    by_tensor = found(sae, backend=backend, tokens=choice, mask=allowed, batch_size=4, kl=True)

    def put(held: Tensor) -> Tensor:
        return torch.where(kept[..., None], sae(held), held)

    with torch.no_grad():
        x = backend.run(TOKENS, read={EARLY.hook_name}).held[EARLY.hook_name]
        loss = backend.run(TOKENS, replace={EARLY.hook_name: put}, want="loss").loss
        rows, output, features = x[kept], sae(x)[kept], sae.encode(x)[kept]
    assert by_tensor["ce_loss_with_sae"] == pytest.approx(float(loss[kept[:, :-1]].mean()), rel=1e-6)
    explained = 1 - (rows - output).square().sum() / (rows - rows.mean(0)).square().sum()
    assert by_tensor["explained_variance"] == pytest.approx(float(explained), rel=1e-4)
    assert by_tensor["l0"] == pytest.approx(float((features != 0).sum(1).double().mean()))
    assert by_tensor["n_tokens"] == int(kept.sum())
    assert (by_tensor.about["tokens_used"], by_tensor.about["tokens_of"]) == (int(kept.sum()), 60)
    by_function = found(sae, tokens=choice, mask=lambda tokens: tokens % 3 > 0)
    by_ids = found(sae, tokens=choice, mask=TOKENS % 3 > 0)
    assert by_function.numbers() == by_ids.numbers()


@pytest.mark.parametrize("mask", [lambda tokens: tokens, lambda tokens: "all", torch.ones(6, 9, dtype=torch.bool)])
def test_what_is_no_mask_is_refused(mask: Any) -> None:
    with pytest.raises(ConfigError, match=r"mask: must say true or false of each token.*\[6, 10\].*; found"):
        found(standard(), mask=mask)


def test_contexts_in_which_no_token_counts_are_none() -> None:
    mask = torch.zeros_like(TOKENS, dtype=torch.bool)
    mask[[1, 4, 5]] = True
    part = found(standard(), mask=mask, kl=True, batch_size=2)
    alone = found(standard(), contexts=TOKENS[[1, 4, 5]], kl=True)
    assert (part.contexts, alone.contexts) == ((1, 4, 5), (0, 1, 2))
    assert part.values == pytest.approx(alone.values)
    assert part.errors == pytest.approx(alone.errors)
    assert all(part.resampled[name] == pytest.approx(drawn) for name, drawn in alone.resampled.items())


def test_one_context_that_counts_has_no_error_and_says_so() -> None:
    mask = torch.zeros_like(TOKENS, dtype=torch.bool)
    mask[2] = True
    one = found(standard(), mask=mask)
    assert (one.contexts, one.errors, one.resampled) == ((2,), {}, {})
    assert "only one context has tokens that count, so that no number has an error" in one.remarks


@pytest.mark.parametrize("rows", [5, 7, 12])
def test_a_mask_of_other_contexts_is_refused_before_anything_runs(rows: int) -> None:
    backend, mask = Small(), torch.ones(rows, 10, dtype=torch.bool)
    with pytest.raises(ConfigError, match=rf"bool, \[6, 10\] as the contexts; found \[{rows}, 10\], torch.bool"):
        found(standard(), backend=backend, mask=mask, batch_size=3)
    assert backend.forwards == []
    assert found(standard(), mask=np.ones((6, 10), bool)).values == found(standard()).values


def test_outputs_that_are_no_numbers_are_counted_and_nothing_else_warns() -> None:
    sae = standard()
    with torch.no_grad():
        sae.W_dec.mul_(1e30)
        sae.W_enc.mul_(1e9)
        sae.b_dec.add_(1e38)
    broken = found(sae)
    held = Small().run(TOKENS, read={EARLY.hook_name}).held[EARLY.hook_name]
    count = 60 - int(sae(held).isfinite().all(-1).sum())
    assert count
    assert f"{count} of 60 outputs of the SAE are not finite: too large for their type?" in broken.remarks
    assert [pair.metric for pair in differences({"a": broken, "b": found(standard())}, ["mse"])] == ["mse"]


def test_losses_of_the_last_position_are_said_to_be_none() -> None:
    last = found(standard(), tokens=TokenChoice(seqpos_slice=(-1, None)))
    assert math.isnan(last["ce_recovered"])
    assert any(remark.startswith("no token is predicted from the tokens that count") for remark in last.remarks)


def test_batches_change_no_number() -> None:
    choice = TokenChoice(exclude=[0])
    whole = found(standard(), tokens=choice, kl=True, top1=True, mean_ablation_contexts=2)
    for size in (1, 4):
        parts = found(standard(), tokens=choice, kl=True, top1=True, mean_ablation_contexts=2, batch_size=size)
        assert parts.numbers() == pytest.approx(whole.numbers(), rel=1e-6)


def test_half_precision_is_summed_in_more_digits() -> None:
    class Half(Small):
        def _embedding(self) -> Tensor:
            return super()._embedding().to(torch.bfloat16)

    half, whole = found(identity(), backend=Half(), kl=True), found(identity(), kl=True)
    logits = Half().run(TOKENS, want="logits").logits
    assert half["ce_loss_without_sae"] == pytest.approx(
        float(next_token_loss(logits, TOKENS).double().mean()), rel=1e-6
    )
    assert half["ce_loss_without_sae"] == pytest.approx(whole["ce_loss_without_sae"], rel=0.02)


# ---- evals of others


class Wants(AccumulatingEval):
    """What it is shown beside what it asks for."""

    def __init__(self, needs: Needs, look: Callable[[Seen], Any]) -> None:
        self._needs, self.look = needs, look
        self.shown: list[Any] = []

    @property
    def needs(self) -> Needs:
        return self._needs

    def update(self, sums: Sums, seen: Seen) -> None:
        self.shown.append(self.look(seen))
        sums.add(seen.numbers, {"n": seen.kept.sum(1)})

    def metrics(self, totals: Totals) -> dict[str, Any]:
        return {"n": totals["n"]}


def test_an_eval_sees_what_it_asked_for_and_nothing_else() -> None:
    both = Wants(
        Needs(rows=True, features=True, spliced=True, logits=True, clean=True),
        lambda seen: (seen.features.n, seen.outputs.shape, seen.spliced.logits.shape, seen.clean.loss.shape),
    )
    backend = Small()
    measure([Measured(standard(), MIDDLE, {"it": both, **evals(batch_size=4)})], backend=backend, contexts=TOKENS)
    assert both.shown == [(10 * b, (b, 10, 8), (b, 10, 128), (b, 9)) for b in (4, 2)]
    for what, look in {
        "rows": lambda seen: seen.outputs,
        "features": lambda seen: seen.features,
        "zero": lambda seen: seen.zero,
        "kl": lambda seen: seen.clean.kl,
    }.items():
        with pytest.raises(ValueError, match=f"this was not asked for: the eval's needs must have {what}"):
            Wants(Needs(clean=True), look)(standard(), backend=backend, sites=MIDDLE, contexts=TOKENS)


def test_gradients_and_the_sae_stay_as_they_are() -> None:
    sae = standard()
    sae.use_error_term = True
    before = {name: value.clone() for name, value in sae.state_dict().items()}
    numbers = found(sae)
    assert sae.use_error_term
    assert abs(numbers["ce_recovered"] - 1) > 0.01, "what is measured is the reconstruction, without its error"
    assert all(torch.equal(before[name], value) for name, value in sae.state_dict().items())
    assert all(parameter.grad is None for parameter in sae.parameters())
