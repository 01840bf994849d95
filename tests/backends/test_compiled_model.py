"""``model.compile``: compiled code really runs, and hooks see and change what they do without it."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from support.compiled import HOOKS, TOKENS, Counted, backend, close, halved, real_compiler, use
from support.tiny import hooked_mamba, hooked_transformer, needs_transformer_lens_3, run_config
from torch import Tensor

import saekit

pytestmark = [
    pytest.mark.usefixtures("fresh_compiler"),
    # What inductor imports uses what torch deprecates.
    pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning"),
]

# ---- the same numbers


def test_activations_and_losses_are_those_of_the_model_itself(counted: Counted) -> None:
    model = hooked_transformer()
    plain, compiled = backend(model, compile=False), backend(model)
    loss = plain.run(TOKENS, want="loss").loss
    for hook in HOOKS:
        expected, changed = (
            plain.run(TOKENS, read={hook}).held,
            plain.run(TOKENS, replace={hook: halved}, want="loss").loss,
        )
        counted.runs = 0
        assert close(compiled.run(TOKENS, read={hook}).held[hook], expected[hook]), hook
        assert counted.runs > 0, hook
        counted.runs = 0
        assert close(compiled.run(TOKENS, replace={hook: halved}, want="loss").loss, changed), hook
        assert (changed - loss).abs().max() > 1e-6, hook
        assert counted.runs >= 3, hook
        counted.runs = 0
        assert close(compiled.run(TOKENS, want="loss").loss, loss), hook
        assert counted.runs == 4, "two blocks, the final normalization and the unembedding"


def test_where_nothing_is_compiled_that_is_said(counted: Counted) -> None:
    model = hooked_transformer()
    plain, compiled = backend(model, compile=False), backend(model)
    hooks = {"hook_embed", "blocks.0.hook_resid_pre"}
    expected = plain.run(TOKENS, read=hooks).held
    with pytest.warns(
        RuntimeWarning, match="model.compile does nothing for hook_embed: no part that runs for it"
    ) as told:
        found = compiled.run(TOKENS, read=hooks).held
    assert [one.filename for one in told] == [__file__]
    found = compiled.run(TOKENS, read=hooks).held  # once
    assert all(torch.equal(found[hook], expected[hook]) for hook in hooks)
    assert not counted.runs
    changed = plain.run(TOKENS, replace=dict.fromkeys(hooks, halved), want="loss").loss
    assert close(compiled.run(TOKENS, replace=dict.fromkeys(hooks, halved), want="loss").loss, changed)
    assert counted.runs == 4


@pytest.fixture
def real() -> Iterator[None]:
    with real_compiler():
        yield


@pytest.mark.usefixtures("real")
def test_with_the_real_compiler() -> None:
    torch._dynamo.utils.counters.clear()
    model = hooked_transformer()
    plain, compiled = backend(model, compile=False), backend(model)
    for hooks in ({"blocks.1.hook_resid_pre"}, {"blocks.0.hook_resid_post", "blocks.1.attn.hook_z"}):
        expected, found = plain.run(TOKENS, read=hooks).held, compiled.run(TOKENS, read=hooks).held
        assert all(close(found[hook], expected[hook]) for hook in hooks)
    replacements = {"blocks.0.hook_resid_post": halved}
    assert close(
        compiled.run(TOKENS, replace=replacements, want="loss").loss,
        plain.run(TOKENS, replace=replacements, want="loss").loss,
    )
    assert torch._dynamo.utils.counters["inductor"], "inductor has worked"
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert graphs == 4, "blocks, a normalization, an MLP, the unembedding"


def test_autocast_is_in_effect_in_compiled_code(counted: Counted) -> None:
    model, hook = hooked_transformer(), "blocks.1.hook_resid_post"
    plain, compiled = backend(model, compile=False, autocast=True), backend(model, autocast=True)
    full = backend(model, compile=False).run(TOKENS, read={hook}).held[hook]
    found = compiled.run(TOKENS, read={hook}).held[hook]
    assert counted.runs == 2
    assert torch.equal(found, plain.run(TOKENS, read={hook}).held[hook])
    assert not close(found, full)


def test_a_mamba(counted: Counted) -> None:
    model, tokens = hooked_mamba(), TOKENS[:, :6]
    plain, compiled = backend(model, mamba=True, compile=False), backend(model, mamba=True)
    for hook in ("blocks.1.hook_resid_post", "blocks.1.hook_resid_pre", "blocks.1.hook_ssm_input", "blocks.1.hook_h.3"):
        counted.runs = 0
        assert close(compiled.run(tokens, read={hook}).held[hook], plain.run(tokens, read={hook}).held[hook])
        assert counted.runs == (2 if "resid_post" in hook else 1)
        assert close(
            compiled.run(tokens, replace={hook: halved}, want="loss").loss,
            plain.run(tokens, replace={hook: halved}, want="loss").loss,
        )
    assert counted.graphs == 1, "both blocks, all hooks"
    assert close(compiled.run(tokens, want="loss").loss, plain.run(tokens, want="loss").loss)
    assert counted.graphs == 1


@pytest.mark.parametrize("mamba", [False, True])
def test_a_forward_from_inside(counted: Counted, mamba: bool) -> None:
    model, tokens = hooked_mamba() if mamba else hooked_transformer(), TOKENS[:, :6]
    plain, compiled = backend(model, mamba=mamba, compile=False), backend(model, mamba=mamba)
    for entry, blocks in (
        ("blocks.1.hook_resid_pre", 1),
        ("blocks.0.hook_resid_post", 1),
        ("blocks.1.hook_resid_post", 0),
    ):
        whole = plain.run(tokens, read={entry}, want="loss")
        counted.runs = 0
        assert close(compiled.run_from(tokens, entry, whole.held[entry], want="loss").loss, whole.loss), entry
        assert counted.runs == blocks + (0 if mamba else 2), "of transformer_lens, the norm and the unembedding, too"


# ---- compiled code really runs


def test_what_is_returned_comes_from_compiled_code(monkeypatch: pytest.MonkeyPatch) -> None:
    class Tampering(Counted):
        def outputs(self, outputs: Any) -> Any:
            return [output + 1 for output in outputs]

    use(Tampering(), monkeypatch)
    model, hook = hooked_transformer(), "blocks.0.hook_resid_post"
    plain, compiled = backend(model, compile=False), backend(model)
    expected = plain.run(TOKENS, read={hook}).held[hook]
    assert close(compiled.run(TOKENS, read={hook}).held[hook], expected + 1)
    assert not close(
        compiled.run(TOKENS, replace={hook: torch.zeros_like}, want="loss").loss,
        plain.run(TOKENS, replace={hook: torch.zeros_like}, want="loss").loss,
    )


def test_blocks_do_not_run_as_they_are(counted: Counted, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformer_lens.hook_points import HookPoint

    ran: list[str] = []

    def forward(self: Any, x: Tensor) -> Tensor:
        if not torch.compiler.is_compiling():
            ran.append(self.name)
        return x

    monkeypatch.setattr(HookPoint, "forward", forward)
    compiled = backend(hooked_transformer())
    compiled.run(TOKENS, read={"blocks.0.hook_resid_post"})
    assert ran == ["hook_embed", "hook_pos_embed", "blocks.0.hook_resid_post"]
    ran.clear()
    compiled.run(TOKENS, replace={"blocks.1.hook_resid_pre": halved}, want="loss")
    assert ran == ["hook_embed", "hook_pos_embed", "blocks.1.hook_resid_pre"]
    ran.clear()
    compiled.run(TOKENS, replace={"blocks.1.attn.hook_z": halved}, want="loss")
    assert not [name for name in ran if name.startswith(("blocks.0.", "blocks.1.ln", "blocks.1.mlp.", "ln_final"))]
    assert {"blocks.1.attn.hook_z", "blocks.1.hook_resid_mid"} < set(ran)


def test_the_mode_is_torchs(counted: Counted) -> None:
    with pytest.warns(RuntimeWarning, match="does nothing for hook_embed"):  # a forward that is quick
        backend(hooked_transformer(), compile_mode="max-autotune-no-cudagraphs").run(TOKENS, read={"hook_embed"})
    assert set(counted.modes) == {"max-autotune-no-cudagraphs"}


def test_outputs_of_cuda_graphs_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    class Static(Counted):
        """Gives the same memory at each run, as CUDA graphs do."""

        memory: Tensor | None = None

        def outputs(self, outputs: Any) -> Any:
            if self.memory is None:
                self.memory = torch.empty_like(outputs[0])
            return [self.memory.copy_(outputs[0])]

    use(Static(), monkeypatch)
    model, hooks = hooked_transformer(), {"blocks.0.hook_resid_post", "blocks.1.hook_resid_post"}
    compiled = backend(model, compile_mode="reduce-overhead")
    found = compiled.run(TOKENS, read=hooks).held
    compiled.run(TOKENS + 1, read=hooks)
    expected = backend(model, compile=False).run(TOKENS, read=hooks).held
    assert all(close(found[hook], expected[hook]) for hook in hooks)


def test_layers_may_share_a_module(counted: Counted) -> None:
    model, hook = hooked_transformer(), "blocks.0.hook_resid_mid"
    model.blocks[1].mlp = model.blocks[0].mlp
    expected = backend(model, compile=False).run(TOKENS, replace={hook: halved}, want="loss").loss
    model.blocks[1].hook_resid_mid.add_perma_hook(lambda activation, hook: None)
    assert close(backend(model).run(TOKENS, replace={hook: halved}, want="loss").loss, expected)
    assert "forward" not in vars(model.blocks[0].mlp)


# ---- how often it is compiled


def test_no_hook_compiles_anything_again(counted: Counted) -> None:
    compiled = backend(hooked_transformer(n_layers=3))
    compiled.run(TOKENS, want="loss")
    assert counted.graphs == 3, "one for all blocks, one for the final normalization, one for the unembedding"
    for hook in ("blocks.0.hook_resid_mid", "blocks.2.attn.hook_z", "blocks.1.mlp.hook_post"):
        compiled.run(TOKENS, replace={hook: halved}, want="loss")
    graphs = counted.graphs
    assert graphs == 5, "and attention and MLP; the normalizations of blocks are of the same class"
    for hook in HOOKS:
        for factor in (1.0, 2.0):
            compiled.run(TOKENS, replace={hook: lambda activation, factor=factor: activation * factor}, want="loss")
            compiled.run(TOKENS, read={hook})
    assert counted.graphs == graphs


def test_no_number_of_tokens_compiles_for_ever(counted: Counted) -> None:
    compiled = backend(hooked_transformer())
    hooks = {"blocks.1.hook_resid_post"}
    compiled.run(torch.zeros(1, 7, dtype=torch.long), read=hooks)  # the probe
    graphs = []
    for shape in ((16, 32), (16, 32), (5, 32), (8, 32), (2, 50), (3, 3), (1, 32), (1, 9), (4, 4)):
        compiled.run(torch.ones(shape, dtype=torch.long), read=hooks)
        graphs.append(counted.graphs)
    assert graphs == [2, 2, 2, 2, 2, 2, 3, 3, 3], "one of each: the first; others; one context of other lengths"


# ---- hooks of the model's owner


Undo = Callable[[], Any]


def _permanent(model: Any) -> Undo:
    hook = model.blocks[0].hook_mlp_out
    hook.add_perma_hook(lambda activation, hook: activation * 0.5)
    return lambda: hook.remove_hooks(including_permanent=True)


def _at_the_end(model: Any) -> Undo:
    hook = model.blocks[0].hook_resid_post
    hook.add_perma_hook(lambda activation, hook: activation * 0.5)
    return lambda: hook.remove_hooks(including_permanent=True)


def _on_attention(model: Any) -> Undo:
    return model.blocks[0].attn.register_forward_hook(lambda module, args, out: out * 0.5).remove


def _before_mlp(model: Any) -> Undo:
    return model.blocks[0].mlp.register_forward_pre_hook(lambda module, args: (args[0] * 0.5,)).remove


def _on_a_block(model: Any) -> Undo:
    return model.blocks[0].register_forward_hook(lambda module, args, out: out * 0.5).remove


def _own_forward(model: Any) -> Undo:
    mlp = model.blocks[0].mlp
    real = mlp.forward

    compiled = []

    def forward(x: Tensor) -> Tensor:
        compiled.append(torch.compiler.is_compiling())
        return real(x) * 0.5

    def undo() -> None:
        del mlp.forward
        assert not any(compiled), "it may do what cannot be compiled"

    mlp.forward = forward
    return undo


def _everywhere(model: Any) -> Undo:
    return torch.nn.modules.module.register_module_forward_hook(
        lambda module, args, out: out * 0.5 if type(module).__name__ == "MLP" else None
    ).remove


def test_hooks_of_the_owner_go_on_working(counted: Counted) -> None:
    model, hook = hooked_transformer(), "blocks.1.hook_resid_post"
    plain, compiled = backend(model, compile=False), backend(model)
    before, loss = (
        compiled.run(TOKENS, read={hook}).held[hook],
        compiled.run(TOKENS, want="loss").loss,
    )  # compiled without
    for add in (_permanent, _at_the_end, _on_attention, _before_mlp, _on_a_block, _own_forward, _everywhere):
        undo, name = add(model), add.__name__
        try:
            counted.runs = 0
            with pytest.warns(RuntimeWarning, match="does nothing") if add is _everywhere else nullcontext():
                found = compiled.run(TOKENS, read={hook}).held[hook]
            assert close(found, plain.run(TOKENS, read={hook}).held[hook]), name
            assert not close(found, before), name
            assert bool(counted.runs) == (add is not _everywhere), name
            assert close(compiled.run(TOKENS, want="loss").loss, plain.run(TOKENS, want="loss").loss), name
            assert close(
                compiled.run(TOKENS, replace={hook: halved}, want="loss").loss,
                plain.run(TOKENS, replace={hook: halved}, want="loss").loss,
            ), name
            assert not close(compiled.run(TOKENS, want="loss").loss, loss), name
        finally:
            undo()
        assert close(compiled.run(TOKENS, read={hook}).held[hook], before), name


def test_what_others_compile_with_hooks_is_not_this_code(counted: Counted) -> None:
    model = hooked_transformer()
    block = model.blocks[0]
    block.attn.attn_scale = float(block.attn.attn_scale)
    backend(model).run(TOKENS, read={"blocks.0.hook_resid_post"})
    block.hook_mlp_out.add_perma_hook(lambda activation, hook: activation * 0.5)
    with torch.inference_mode(), torch.autocast("cpu", enabled=False):
        resid = torch.randn(3, 20, 16)
        expected = block(resid)
        assert close(torch.compile(type(block).forward)(block, resid), expected)


# ---- in threads and in a run


def test_another_thread_uses_the_same_code(counted: Counted) -> None:
    model, hook = hooked_transformer(), "blocks.0.hook_resid_post"
    compiled, found = backend(model), []
    thread = threading.Thread(target=lambda: found.append(compiled.run(TOKENS, read={hook}).held[hook]))
    thread.start()
    thread.join()
    assert counted.graphs == 1
    assert torch.equal(compiled.run(TOKENS, read={hook}).held[hook], found[0])
    assert (counted.graphs, counted.runs) == (1, 2)
    assert set(counted.modes) == {"default"}


def test_a_run_trains_on_a_compiled_model(counted: Counted, tmp_path: Path) -> None:
    needs_transformer_lens_3()
    metrics, lines = [], []
    for compiled in (False, True):
        config = run_config(
            tmp_path / str(compiled), site={"hook_name": "blocks.0.hook_resid_post"}, model={"compile": compiled},
            evals={"every_n_steps": 4},
        )  # fmt: skip
        result = saekit.train(config)
        metrics.append(result.metrics)
        (log,) = (tmp_path / str(compiled)).rglob("*.jsonl")
        lines.append([json.loads(line) for line in log.read_text().splitlines()])
        assert bool(counted.runs) == compiled
    numbers = [{k: v for k, v in found.items() if "second" not in k and "time" not in k} for found in metrics]
    assert numbers[1] == pytest.approx(numbers[0], rel=1e-3, abs=1e-4)
    assert len(lines[0]) == len(lines[1])
    assert counted.graphs <= 6, "blocks for the probe and for other shapes; the final normalization; the unembedding"
