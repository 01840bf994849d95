"""Evals are built with what they need of the run, and text is opened only for those that read it."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import attrs
import pytest
import torch
from support.runs import fake_config, manager, resume, train

import saekit
from saekit.commands.measured import show_evaluations
from saekit.errors import ConfigError
from saekit.testing import FakeBackend, FakeConfig, fake_plugin
from saekit.values import EvalRun

pytestmark = pytest.mark.usefixtures("one_thread")


def eval_seen(built: list[EvalRun], called: list[Any], **entry: Any) -> object:
    """One that remembers what it was built with, and the contexts of each call."""

    def build(config: FakeConfig, *, run: EvalRun) -> Any:
        built.append(run)

        def measure(sae: Any, *, backend: Any, sites: Any, contexts: Any) -> dict[str, float]:
            called.append(contexts)
            return {"norm": sae.W_enc.norm().item()}

        return measure

    return fake_plugin("evals", "seen", build=build, **entry)


def test_an_eval_is_built_with_what_it_needs_of_the_run(tmp_path: Path) -> None:
    built: list[EvalRun] = []
    called: list[Any] = []
    backend = FakeBackend()
    config = fake_config(tmp_path, evals={"run": ["seen"]})
    result = train(config, plugins=manager(backend, eval_seen(built, called)))
    (run,) = built
    assert run.backend is backend
    assert run.sites == saekit.Sites.one(saekit.Site(hook_name=config["site"]["hook_name"]))
    assert (run.name, run.device, run.steps) == ("sae", "cpu", 11)
    assert run.contexts is not None
    assert torch.equal(run.contexts, called[0])
    assert result.metrics["evals/norm"] == pytest.approx(result.sae.W_enc.norm().item(), rel=1e-4)


class Drawn:
    """Rows of its own, without a text or a model."""

    def __init__(self, config: DrawnConfig, *, stream: Any) -> None:
        self._stream, self._generator = stream, torch.Generator().manual_seed(0)

    @property
    def widths(self) -> dict[saekit.Site, int]:
        return dict.fromkeys(self._stream.sites, 8)

    def __iter__(self) -> Drawn:
        return self

    def __next__(self) -> saekit.Batch:
        return saekit.Batch(dict(self.peek()))

    def peek(self) -> dict[saekit.Site, torch.Tensor]:
        rows = torch.randn(self._stream.batch_size, 8, generator=self._generator)
        return dict.fromkeys(self._stream.sites, rows)

    def state_dict(self) -> dict[str, Any]:
        return {"generator": self._generator.get_state()}

    def load_state_dict(self, state: Any) -> None:
        self._generator.set_state(state["generator"])

    def close(self) -> None:
        pass


@attrs.frozen(kw_only=True)
class DrawnConfig:
    """No options."""


def test_a_run_whose_evals_read_no_text_needs_no_dataset(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    config = fake_config(tmp_path, {"name": "drawn"}, model={"backend": "none"}, training={"verbose": True})
    config["evals"] |= {"run": ["seen"], "held_out_every": 0}
    config["dataset"]["path"] = str(tmp_path / "nowhere.jsonl")
    built: list[EvalRun] = []
    called: list[Any] = []
    source = fake_plugin("activation_sources", "drawn", build=Drawn, config=DrawnConfig, needs_text=False)
    reads = manager(None, eval_seen([], []), source)
    with pytest.raises(ConfigError, match="evals.held_out_every: is 0, so no text is left to measure on"):
        train(config, plugins=reads, dataset=None)
    plugins = manager(None, eval_seen(built, called, needs_text=False), source)
    report = saekit.plan(config, plugins=plugins)
    assert not report.problems, report.problems
    capfd.readouterr()
    result = train(config, plugins=plugins, dataset=None)
    said = capfd.readouterr().err
    assert [line for line in said.splitlines() if line.endswith(" ...")][:2] == [
        "opening the activation source ...", "making the first weights ...",
    ]  # fmt: skip
    assert not any(words in said for words in ("the model", "tiny-python", "the text", "held-out text"))
    assert called
    assert set(map(type, called)) == {type(None)}
    assert built[-1].contexts is None
    assert "evals/norm" in result.metrics
    assert result.held_out is None
    again = saekit.evaluate(result.folder, evals=["seen"], plugins=plugins, verbose=False)
    assert again["norm"] == pytest.approx(result.metrics["evals/norm"], rel=1e-4)
    assert called[-1] is None
    show_evaluations(again)
    assert "of the SAE alone, without a model and a text" in capfd.readouterr().out
    with pytest.raises(ConfigError, match="model: is missing"):
        saekit.evaluate(result.folder, plugins=plugins, verbose=False)


def test_kl_of_the_spliced_model_in_an_eval(tmp_path: Path) -> None:
    """By the model's one forward, with the logits and with the SAE in the place of what a hook holds."""
    found: list[tuple[float, float]] = []

    def build(config: FakeConfig, *, run: EvalRun) -> Any:
        def kl(sae: Any, *, backend: Any, sites: Any, contexts: Any) -> dict[str, float]:
            (site,) = sites.inputs
            clean = backend.run(contexts, want="logits").logits.log_softmax(-1)

            def of(vectors: Any) -> float:
                put = {site.hook_name: lambda held: site.replace(held, vectors(site.extract(held)))}
                logits = backend.run(contexts, replace=put, want="logits").logits
                return (clean.exp() * (clean - logits.log_softmax(-1))).sum(-1).mean().item()

            found.append((of(lambda x: x), of(sae)))
            return {"kl": found[-1][1]}

        return kl

    result = train(
        fake_config(tmp_path, evals={"run": ["kl"]}), plugins=manager(None, fake_plugin("evals", "kl", build))
    )
    same, spliced = found[-1]
    assert same == pytest.approx(0, abs=1e-6)
    assert spliced > 1e-4
    assert result.metrics["evals/kl"] == spliced


@attrs.frozen(kw_only=True)
class OtherConfig:
    """No options."""


def test_an_eval_computes_without_gradients_and_may_ask_for_them(tmp_path: Path) -> None:
    """What a forward gives goes into the SAE as it is; nothing that an eval turns on is on for the next."""
    seen: list[bool] = []

    def build(config: FakeConfig, *, run: EvalRun) -> Any:
        def measure(sae: Any, *, backend: Any, sites: Any, contexts: Any) -> dict[str, float]:
            seen.append(torch.is_grad_enabled())
            x = sites.input_of(backend.run(contexts, read={sites.inputs[0].hook_name}).held)
            assert not sae(x).requires_grad
            assert not sae.encode(x).requires_grad
            with torch.enable_grad():
                held = backend.run(contexts, read={sites.inputs[0].hook_name}, want="loss", grad=True)
                (slope,) = torch.autograd.grad(held.loss.mean(), held.held[sites.inputs[0].hook_name])
                (sae(slope).sum()).backward()
            torch.set_grad_enabled(True)
            return {"slope": slope.norm().item()}

        return measure

    config = fake_config(tmp_path, evals={"run": ["sloped", "seen"], "every_n_steps": 4})
    others: list[Any] = []
    after = eval_seen([], others, config=OtherConfig)
    result = train(config, plugins=manager(None, fake_plugin("evals", "sloped", build), after))
    assert result.metrics["evals/slope"] > 0
    assert seen
    assert not any(seen)
    assert len(others) == len(seen)
    assert all(parameter.grad is None for parameter in result.sae.parameters())


class Counting(FakeBackend):
    """One whose forwards of three contexts, which only evals run, are counted."""

    @property
    def measured(self) -> int:
        return sum(shape[0] == 3 for shape in self.forwards)


def measured(folder: Path, **sections: Any) -> dict[str, Any]:
    return fake_config(folder, **sections, evals={"n_contexts": 3})


def test_saes_that_are_measured_together_share_clean_forwards_and_have_the_numbers_of_each_alone(
    tmp_path: Path,
) -> None:
    """Three times: twice after the same batch, and at the end; each that is worse than the mean says so once."""
    changes: list[dict[str, Any]] = [
        {},
        {"sae": {"d_sae": 20}, "site": {"hook_name": "blocks.1.hook_resid_post"}},
        {"sae": {"l1_coefficient": 2.0}},
    ]
    backend = Counting()
    with pytest.warns(RuntimeWarning) as caught:
        found = train([measured(tmp_path / "all", **change) for change in changes], plugins=manager(backend))
    sites = 2
    assert backend.measured == 3 * (1 + sites + len(changes)), "clean, zeros at each site, and each SAE"
    for change, result in list(zip(changes, found.results.values(), strict=True))[1:]:
        alone = train(measured(tmp_path / str(result.sae.d_sae), **change))
        assert {"evals/mse", "evals/ce_recovered_se"} < result.metrics.keys()
        assert result.metrics == alone.metrics
    worse = [name for name, one in found.results.items() if one.metrics["evals/explained_variance"] < 0]
    assert len(worse) > 1
    assert [str(one.message) for one in caught] == [
        f"{name}, the SAE at {found.results[name].sae.info.sites.name}: explained variance is below 0: the SAE is "
        "worse than the mean; wrong site, scale or model?"
        for name in worse
    ]


def test_a_run_says_what_its_last_evals_remark_even_if_it_was_stopped_after_them(tmp_path: Path) -> None:
    config = fake_config(tmp_path, evals={"every_n_steps": 11})
    words = r"^the SAE at blocks\.0\.hook_resid_post: explained variance is below 0: .*wrong site, scale or model\?$"
    with pytest.MonkeyPatch.context() as patch:

        def failing(*anything: Any) -> None:
            raise RuntimeError("as good as killed")

        patch.setattr("saekit.runs.trained.save_trained", failing)
        with warnings.catch_warnings(), pytest.raises(RuntimeError, match="as good as killed"):
            warnings.simplefilter("error")
            train(config)
    with pytest.warns(RuntimeWarning, match=words):
        resume(tmp_path / "run")


def test_a_run_is_not_lost_to_evals_that_contradict_each_other(tmp_path: Path) -> None:
    def giving(name: str, value: float, options: type) -> object:
        return fake_plugin("evals", name, lambda config, *, run: lambda *_, **__: {"norm": value}, options)

    plugins = manager(None, giving("one", 1.25, FakeConfig), giving("other", 9.0, DrawnConfig))
    told = "'test:one' and 'test:other' both give a number 'norm', 1.25 and 9, and one"
    with pytest.warns(RuntimeWarning, match=told):
        result = train(fake_config(tmp_path, evals={"run": ["one", "other"]}), plugins=plugins)
    assert result.metrics["evals/norm"] == 1.25
