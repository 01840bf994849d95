"""`saekit plan` counts from a model's outline: nothing is loaded or allocated, and what does not fit is not tried."""

from __future__ import annotations

import resource
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs
import pytest
import torch
from support.causal_lms import causal_lm_folder
from support.command import cli
from support.tiny import hooked_transformer, run_config

import saekit
from saekit.backends import Backend, Hooks
from saekit.planning.memory import Memory, Need, Of, verdict
from saekit.runs.working_memory import peak_bytes
from saekit.testing import isolated_manager, plugin_of

pytestmark = pytest.mark.usefixtures("short_rehearsals")

WIDTH, VOCABULARY, LAYERS = 8192, 100_000, 64


@attrs.frozen(kw_only=True)
class BigOptions:
    """Options of a backend that states shapes."""


class Shapes(Backend):
    """A language model of 70 GB that is nowhere: its forward makes shapes."""

    name, device, n_ctx, d_vocab = "big", "meta", 4096, VOCABULARY
    special_tokens: Mapping[str, int | None] = {"bos": None, "eos": None, "sep": None}

    def __init__(self, fails: str = "") -> None:
        self.fails = fails

    def hook_names(self) -> Sequence[str]:
        return [f"layers.{layer}" for layer in range(LAYERS)]

    def tokenize(self, text: str) -> list[int]:
        pytest.fail("a text is read")

    def token_texts(self, tokens: Sequence[int]) -> list[str]:
        pytest.fail("a text is read")

    def memory_bytes(self) -> int:
        return 70_000_000_000

    def forward(self, tokens: torch.Tensor, hooks: Hooks) -> torch.Tensor | None:
        if self.fails:
            raise RuntimeError(self.fails)
        embedding = torch.empty(VOCABULARY, WIDTH, device="meta", dtype=torch.bfloat16)
        residual = embedding[tokens]
        for name in self.hook_names():
            residual = hooks(name, residual + residual)
        return None if hooks.done else residual @ embedding.T


def manager(outline: Callable[..., Any] | None) -> saekit.PluginManager:
    def build(config: Any, **services: Any) -> Any:
        raise saekit.ModelError("it is loaded")

    entry = saekit.Entry("big", BigOptions, build, outline=outline)
    return isolated_manager(plugin_of("model_backends", entry), builtins=True)


def config(tmp_path: Path, **sections: Any) -> dict[str, Any]:
    text = {"path": "somebody/texts", **sections.pop("dataset", {})}
    made = run_config(tmp_path, site={"hook_name": "layers.3"}, dataset=text, **sections)
    return made | {"model": {"name": "big", "backend": "big", **made.get("model", {})}}


def outline(config: Any, *, model: Any) -> Any:
    return Shapes()


def test_a_model_that_nobody_could_load_is_counted(tmp_path: Path) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    given = config(tmp_path, sae={"name": "topk", "d_sae": 65_536, "l1_coefficient": None}, evals={"split": None})
    del given["sae"]["l1_coefficient"]
    found = saekit.plan(given, plugins=manager(outline), load=False)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    assert found.problems == []
    parameters = 2 * WIDTH * 65_536 + 65_536 + WIDTH
    numbers = found.numbers
    assert (numbers["d_in"], numbers["d_sae"], numbers["steps"]) == (WIDTH, 65_536, 8)
    assert (numbers["model_bytes"], numbers["sae_bytes"]) == (70_000_000_000, 16 * parameters)
    assert numbers["buffer_bytes"] == (4 + 1) * 8 * 32 * WIDTH * 2, "bfloat16, as the model gives it"
    assert numbers["checkpoint_bytes"] == 12 * parameters + numbers["buffer_bytes"]
    assert grown < numbers["sae_bytes"] / 20
    assert found.facts["site"] == f"layers.3 of big, width {WIDTH}"
    assert found.facts["SAE"] == f"65,536 features, {parameters:,} parameters"
    assert found.facts["duration"] == "not measured: the model was not loaded"
    assert "the model 70 GB, the SAE in training 17.2 GB" in found.facts["memory on cpu"]
    assert list(tmp_path.iterdir()) == []


def test_what_does_not_fit_is_not_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("saekit.planning.planner.free_memory", lambda devices: dict.fromkeys(devices, 16e9))
    found = saekit.plan(config(tmp_path), plugins=manager(outline), measure=True)
    assert (found.problems, found.fits) == ([], False)
    assert found.facts["contexts in a forward"] == "not compared: it does not fit"
    assert found.facts["duration"] == "not measured: it does not fit"
    assert found.verdict.startswith("It does not fit on cpu: it needs about 71.")
    (warning,) = [text for text in found.warnings if "are needed on cpu" in text]
    assert warning.endswith("16 GB are free: choose model.dtype=bfloat16, or a smaller model")


def test_what_fits_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("saekit.planning.planner.free_memory", lambda devices: dict.fromkeys(devices, 1e12))
    found = saekit.plan(config(tmp_path), plugins=manager(outline))
    assert found.problems == ["it is loaded"]
    assert found.facts["memory on cpu"].endswith("; 1 TB are free"), "what was counted is told in any case"


def test_problems_are_found_before_anything_is_loaded(tmp_path: Path) -> None:
    given = config(tmp_path, sae={"d_in": 5}, dataset={"context_size": 8192})
    found = saekit.plan(given, plugins=manager(outline), load=False)
    assert found.problems == [
        "dataset.context_size: is 8192, but the model 'big' takes at most 4096 tokens",
        "sae.d_in: is 5, but layers.3 of 'big' has width 8192",
    ]
    assert found.verdict == "It cannot run: 2 problems."
    given["site"] = {"hook_name": "layer.3"}
    (problem,) = saekit.plan(given | {"dataset": {}}, plugins=manager(outline), load=False).problems
    assert "the model 'big' has no hook 'layer.3' (site.hook_name). Did you mean 'layers.3'" in problem


@pytest.mark.parametrize(
    ("made", "words"),
    [
        (None, "the backend 'test:big' cannot tell the sizes of a model before it is loaded"),
        (lambda config, *, model: Shapes("numbers are needed"), "in a forward of its outline: RuntimeError: numbers"),
        (lambda config, *, model: 3, "model backend 'test:big' (test 0): outline returned 3, which lacks"),
        ("saekit.nowhere:outline", "there is no module saekit.nowhere, of its outline, 'saekit.nowhere:outline'"),
    ],
    ids=["none", "its forward fails", "rubbish", "no module"],
)
def test_a_backend_that_cannot_outline(tmp_path: Path, made: Any, words: str) -> None:
    found = saekit.plan(config(tmp_path), plugins=manager(made), load=False)
    (problem,) = found.problems
    assert words in problem
    assert found.verdict == "It cannot run: 1 problem."


def test_an_outline_must_be_callable() -> None:
    with pytest.raises(saekit.SaekitError, match="outline is 3, expected a callable, or an import path"):
        manager(3)  # type: ignore[arg-type]


def test_of_another_machine(tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("it is this machine")
    given = config(tmp_path, training={"device": "cuda"})
    given["model"]["device"] = "cuda"
    found = saekit.plan(given, plugins=manager(outline), load=False)
    assert (found.problems, found.fits) == ([], None)
    assert "are free" not in found.facts["memory on cuda"]
    assert set(found.facts) >= {"memory on cuda", "memory on cpu"}, "a checkpoint is put together on the CPU"
    assert "of memory on cuda (not on this machine), " in found.verdict
    assert any("'cuda' cannot be used" in text for text in saekit.plan(given, plugins=manager(None)).problems)


def test_processes_that_tokenize_change_no_size(tmp_path: Path) -> None:
    given = config(tmp_path)
    alone = saekit.plan(given, plugins=manager(outline), load=False)
    given["activations"]["source"]["tokenize_processes"] = 2
    found = saekit.plan(given, plugins=manager(outline), load=False)
    assert alone.numbers["buffer_bytes"] > 0
    assert (found.problems, found.numbers) == ([], alone.numbers)


def test_the_outlines_of_saekit_have_the_sizes_of_their_models(tmp_path: Path) -> None:
    given = run_config(tmp_path)
    counted, measured = saekit.plan(given, load=False), saekit.plan(given)
    assert counted.problems == measured.problems == []
    # What only a source that was opened says, and memory without copies.
    later = {"silent_at_start", "loading_bytes", "peak_bytes", "forwards", "memory_bytes"}
    numbers = [
        {name: value for name, value in found.numbers.items() if name not in later and not name.endswith("seconds")}
        for found in (measured, counted)
    ]
    assert numbers[0] == numbers[1]
    assert measured.verdict.startswith("It fits: it needs about ")
    assert measured.fits is counted.fits is True
    model = hooked_transformer()
    passed = saekit.plan(given, model=model).numbers
    assert passed["forward_bytes"] > 0
    assert passed["eval_forward_bytes"] > passed["forward_bytes"], "logits are large"


def test_the_memory_of_work_is_that_of_what_lives_at_one_time() -> None:
    def work() -> torch.Tensor:
        first = torch.ones(1000)  # 4,000 bytes
        second = first * 2  # 8,000
        del first
        third = second[:10].view(2, 5)  # the same memory
        fourth = torch.cat([second, second])  # 12,000 beside it
        return fourth.sum() + third.sum()

    outside = torch.ones(1_000_000)
    assert 12_000 <= peak_bytes(work) <= 12_100
    assert peak_bytes(lambda: outside.view(10, -1).T) == 0, "it was there before"
    assert peak_bytes(lambda: torch.empty(1 << 40, device="meta") + 1) == 2 * 4 << 40


def test_the_greatest_of_what_is_done_in_turns_counts() -> None:
    held = [Need(Of.MODEL, "cuda", 10), Need(Of.BUFFER, "cpu", 3)]
    memory = Memory(held, [[Need(Of.STEP, "cuda", 2), Need(Of.FORWARD, "cuda", 2)], [Need(Of.EVALS, "cuda", 5)],
                           [Need(Of.CHECKPOINT, "cpu", 4)]])  # fmt: skip
    assert memory.needed() == {"cuda": 15, "cpu": 7}
    assert memory.facts({"cpu": 9}) == {
        "memory on cuda": "15 bytes (the model 10 bytes, evals 5 bytes)",
        "memory on cpu": "7 bytes (the buffer of activations 3 bytes, writing a checkpoint 4 bytes); 9 bytes are free",
    }
    assert verdict(memory, 5, {"cuda": 20, "cpu": 7}, 5).fits
    found = verdict(memory, 5, {"cuda": 14, "cpu": 7}, 4)
    assert found.fits is False
    assert found.text.startswith(
        "It does not fit on cuda and on disk: it needs about 15 bytes of memory on cuda (14 bytes are free), "
    )
    assert [text.partition(":")[0] for text in found.warnings] == [
        "about 15 bytes are needed on cuda, and 14 bytes are free",
        "about 5 bytes of disk are needed, and 4 bytes are free (checkpoints.folder)",
    ]


def test_from_the_command_line(tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text(saekit.dump_config(saekit.load_config(run_config(tmp_path / "runs"))))
    shown = cli("plan", "run.toml", "--no-load", cwd=tmp_path).stdout.splitlines()
    assert shown[-1].startswith("It fits: it needs about ")
    assert not any("first context" in line for line in shown)


@pytest.mark.parametrize("backend", ["HookedTransformer", "TransformerBridge", "AutoModelForCausalLM"])
def test_special_tokens_are_planned_without_a_tokenizer(tmp_path: Path, backend: str) -> None:
    hook = "transformer.h.1" if backend == "AutoModelForCausalLM" else "blocks.1.hook_resid_post"
    model = {"backend": backend, "name": str(causal_lm_folder("gpt2"))}
    tokens = {"exclude_special_tokens": True, "seqpos_slice": [2, None]}
    given = run_config(tmp_path, model=model, site={"hook_name": hook}, tokens=tokens)
    found = saekit.plan(given, load=False)
    assert found.problems == []
    assert (
        found.facts["tokens"] == "at most 30 of 32 of each context count: how many, the text says, and it was not read"
    )
    by_id = saekit.plan(given | {"tokens": {**tokens, "exclude_special_tokens": [0]}}, load=False)
    assert by_id.numbers == found.numbers, "sizes are those of any ids"
    if backend == "AutoModelForCausalLM":
        loaded = saekit.plan(given)
        assert loaded.problems == []
        assert loaded.facts["tokens"].endswith("of 2,048 tokens in the first 64 contexts count")


def test_positions_that_count_are_told_without_a_text(tmp_path: Path) -> None:
    found = saekit.plan(config(tmp_path, tokens={"seqpos_slice": [2, None]}), plugins=manager(outline), load=False)
    assert (found.problems, found.facts["tokens"]) == ([], "30 of 32 of each context count")


def test_what_does_not_fit_is_not_tried(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also with a model that was passed, which is not counted before it is there."""

    def tried(*given: Any) -> None:
        raise AssertionError("it was tried")

    monkeypatch.setattr("saekit.planning.planner.free_memory", lambda devices: dict.fromkeys(devices, 1e3))
    monkeypatch.setattr("saekit.planning.duration.TimedRun.time", tried)
    found = saekit.plan(run_config(tmp_path), model=hooked_transformer())
    assert found.fits is False
    assert found.facts["duration"] == "not measured: it does not fit"
