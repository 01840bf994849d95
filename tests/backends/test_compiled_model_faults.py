"""What is left behind when compiled code fails, and how failures are told."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.compiled import TOKENS, Counted, backend, close, halved, state, use
from support.tiny import hooked_mamba, hooked_transformer, needs_transformer_lens_3
from torch import Tensor

from saekit.errors import ModelError

pytestmark = [
    pytest.mark.usefixtures("fresh_compiler"),
    # What inductor imports uses what torch deprecates.
    pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning"),
]


def test_an_error_in_a_hook_leaves_all_as_it_was(counted: Counted) -> None:
    model = hooked_transformer()
    compiled = backend(model)
    before, loss = state(model), compiled.run(TOKENS, want="loss").loss
    for hook in ("blocks.1.hook_resid_pre", "blocks.0.hook_resid_post", "blocks.1.attn.hook_z"):
        for error in (ValueError("mine"), RuntimeError("mine"), torch._dynamo.exc.InternalTorchDynamoError("mine")):

            def broken(activation: Tensor, error: Exception = error) -> Tensor:
                raise error

            with pytest.raises(type(error)) as caught:
                compiled.run(TOKENS, replace={hook: broken}, want="loss")
            assert caught.value is error, hook
            assert state(model) == before
            assert close(compiled.run(TOKENS, want="loss").loss, loss)
            assert state(model) == before
    _, cache = model.run_with_cache(TOKENS)
    assert "blocks.0.attn.hook_z" in cache, "the model runs as ever"


def test_the_hook_points_of_a_mamba_are_left(counted: Counted) -> None:
    model, tokens = hooked_mamba(), TOKENS[:, :6]
    compiled = backend(model, mamba=True)
    seen: list[int] = []

    def look(activation: Tensor, hook: Any) -> None:
        seen.append(len(model.blocks[0].hook_h.hooks))

    for hook in (model.hook_embed, model.hook_norm):
        hook.add_perma_hook(look)
    compiled.run(tokens, replace={"blocks.1.hook_resid_pre": halved}, want="loss")
    assert counted.runs == 2
    assert seen == [6, 6], "those that mamba-lens made for this forward, before block 0 and after it"


class Failing(Counted):
    def __call__(self, graph: Any, inputs: Any) -> Callable[..., Any]:
        raise NotImplementedError("no such machine\nand a long report")


def test_a_failure_to_compile_is_said_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    use(Failing(), monkeypatch)
    model = hooked_transformer()
    before, compiled = state(model), backend(model)
    with pytest.raises(ModelError) as caught:
        compiled.run(TOKENS, read={"blocks.0.hook_resid_post"})
    assert str(caught.value) == (
        "the model cannot be compiled (model.compile): NotImplementedError: no such machine. Set model.compile=false "
        "to run it as it is"
    )
    assert caught.value.__suppress_context__, "torch's report is not shown"
    assert state(model) == before


def test_without_a_compiler_for_c() -> None:
    missing = {"cpp.cxx": (None, "no-such-compiler"), "fx_graph_cache": False}
    with (
        torch._inductor.config.patch(missing),
        pytest.raises(ModelError, match=r"\(model.compile\): InvalidCxxCompiler: No working C\+\+ compiler found"),
    ):
        backend(hooked_transformer(d_model=24)).run(TOKENS, want="loss")


def test_a_python_for_which_torch_has_no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    def refusing(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("torch.compile is not supported on Python 4+")

    monkeypatch.setattr(torch, "compile", refusing)
    with pytest.raises(ModelError, match=r"\(model.compile\): RuntimeError: torch.compile is not supported on Python"):
        backend(hooked_transformer()).run(TOKENS, want="loss")


def test_errors_of_the_computation_are_not_called_errors_of_compiling(monkeypatch: pytest.MonkeyPatch) -> None:
    failures: list[Exception] = []

    class Full(Counted):
        def outputs(self, outputs: Any) -> Any:
            raise failures[-1]

    use(Full(), monkeypatch)
    compiled = backend(hooked_transformer())
    for failure in (RuntimeError("a kernel failed"), MemoryError()):
        failures.append(failure)
        with pytest.raises(type(failure)) as caught:
            compiled.run(TOKENS, read={"blocks.0.hook_resid_post"})
        assert caught.value is failure


def test_other_models_are_refused() -> None:
    needs_transformer_lens_3()
    other = SimpleNamespace(run_with_hooks=None, hook_dict={}, cfg=SimpleNamespace(d_vocab=1, n_ctx=1), tokenizer=None)
    with pytest.raises(ModelError, match=r"model.compile is for HookedTransformer and HookedMamba, not for Simple"):
        backend(other)
