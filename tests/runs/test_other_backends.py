"""`saekit plan` says how fast a run's model forwards through other backends."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from support.causal_lms import causal_lm, causal_lm_folder
from support.tiny import needs_transformer_lens_3, run_config

import saekit
from saekit.planning import other_backends

pytestmark = pytest.mark.usefixtures("one_thread", "short_rehearsals")

TABLE: dict[str, Any] = {"name": "HookedTransformer", "from_pretrained_kwargs": dict.fromkeys(
    ("fold_ln", "center_writing_weights", "center_unembed", "fold_value_biases"), False)}  # fmt: skip


def told(folder: Path, name: object, backend: Any, hook: str, **given: Any) -> str | None:
    config = run_config(
        folder, model={"name": str(name), "backend": backend}, site={"hook_name": hook},
        training={"training_tokens": 600}, evals={"run": []},
    )  # fmt: skip
    plan = saekit.plan(config, **given)
    assert plan.problems == []
    return plan.facts.get("other backends")


def test_the_other_backend_is_timed(tmp_path: Path) -> None:
    """A bridge, which is never the quickest, is not loaded to see."""
    needs_transformer_lens_3()  # with 4, HookedTransformer is a bridge
    name = causal_lm_folder("llama")
    text = told(tmp_path, name, TABLE, "blocks.1.hook_resid_post")
    # Which one it is, this machine says at this moment; advice comes with what is faster, and with that alone.
    speed = r"would forward (\d+\.\d\d × ((?P<faster>faster)|slower)|as fast) here"
    size = r"a second copy of the model, [\d.]+ kB, was loaded to see"
    advice = r"(?(faster): write model\.backend={} and site\.hook_name={})"
    lines = advice.format("AutoModelForCausalLM", r"model\.layers\.1")
    assert re.fullmatch(rf"AutoModelForCausalLM {speed} \(hooks model\.layers\.1; {size}\){lines}", str(text))
    text = told(tmp_path, name, "AutoModelForCausalLM", "model.layers.1.mlp")
    lines = advice.format("HookedTransformer", r"blocks\.1\.hook_mlp_out")
    assert re.fullmatch(rf"HookedTransformer {speed} \(hooks blocks\.1\.hook_mlp_out; {size}\){lines}", str(text))


def test_that_activations_differ_is_said(tmp_path: Path) -> None:
    """transformer_lens takes the mean out of what a GPT-2 adds to the residual stream."""
    needs_transformer_lens_3()
    text = told(tmp_path, causal_lm_folder("gpt2"), "AutoModelForCausalLM", "transformer.h.1")
    assert "(hooks blocks.1.hook_resid_post; what they hold there is not the same; a second copy" in str(text)
    advice = ": for SAEs of those write model.backend=HookedTransformer and site.hook_name=blocks.1.hook_resid_post"
    assert str(text).endswith(advice) == ("faster here" in str(text))


def test_what_cannot_be_compared_is_not_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = causal_lm_folder("gpt2")
    passed = causal_lm("gpt2")
    assert told(tmp_path, "any", "AutoModelForCausalLM", "transformer.h.1", model=passed) is None, "passed from code"
    assert told(tmp_path, folder, "HookedTransformer", "blocks.1.attn.hook_q") is None, "no module holds it"
    assert told(tmp_path, "saekit/tiny-python", "HookedTransformer", "blocks.1.hook_resid_post") is None
    alone = tmp_path / "alone"
    shutil.copytree(folder, alone)
    config = json.loads((alone / "config.json").read_text())
    (alone / "config.json").write_text(json.dumps(config | {"architectures": ["StrangeForCausalLM"]}))
    assert told(tmp_path, alone, "AutoModelForCausalLM", "transformer.h.1") is None, "unknown to transformer_lens"
    monkeypatch.setattr(other_backends, "_MOST", 1000.0)
    assert told(tmp_path, folder, "AutoModelForCausalLM", "transformer.h.1") is None, "too large for a second copy"
