"""``model.backend.fused``: torch's fused functions give what transformer_lens' own steps give, and hooks see those."""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import Any

import attrs
import pytest
import torch
from saekit_plugins.backends.fused_parts import FusedParts
from saekit_plugins.backends.hooked_transformer import HookedTransformerOptions, TransformerLensBackend
from support.causal_lms import KINDS, causal_lm_folder
from support.compiled import TOKENS, halved, state
from support.tiny import needs_transformer_lens_3, run_config, tokenizer
from torch import Tensor

import saekit
from saekit.config import ModelConfig
from saekit.data import Corpus
from saekit.planning.other_ways import Compared
from saekit.runs.identity import run_identity

UNPROCESSED = dict.fromkeys(("fold_ln", "center_writing_weights", "center_unembed", "fold_value_biases"), False)
PATTERN, LAST = "blocks.1.attn.hook_pattern", "blocks.1.hook_resid_post"


@pytest.fixture(autouse=True)
def _needs_3() -> None:
    needs_transformer_lens_3()


def made(**options: Any) -> Any:
    """An untrained HookedTransformer whose every parameter is random."""
    from transformer_lens import HookedTransformer, HookedTransformerConfig

    shape = {"n_layers": 2, "d_model": 16, "n_ctx": 64, "d_head": 8, "n_heads": 2, "d_mlp": 32, "d_vocab": 2048}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        config = HookedTransformerConfig(**{"act_fn": "gelu", "seed": 0, "device": "cpu"} | shape | options)
        model = HookedTransformer(config, tokenizer())
    drawn = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for value in model.parameters():
            value.copy_(torch.randn(value.shape, generator=drawn) * 0.3)
    return model


def backend(model: Any, **options: Any) -> TransformerLensBackend:
    """Of a model, or of the folder of that name."""
    name, loaded = (model, None) if isinstance(model, str) else ("made", model)
    built: TransformerLensBackend = saekit.default_manager().build(
        "model_backends",
        HookedTransformerOptions(**{"fused": True} | options),
        model=ModelConfig(name=name, device="cpu"),
        loaded=loaded,
    )
    return built


def parts(of: TransformerLensBackend) -> set[str]:
    assert of._fused is not None
    return of._fused.kinds


def assert_alike(fused: TransformerLensBackend, plain: TransformerLensBackend) -> None:
    """At every hook that runs, each alone, whatever is replaced, and in the loss of every token."""
    there = plain.run(TOKENS, read={LAST}).held[LAST].abs().max()
    for hook in plain.hook_names():
        try:
            expected = plain.run(TOKENS, read={hook}).held[hook]
        except saekit.ModelError:  # it does not run in this model
            continue
        found = fused.run(TOKENS, read={hook}).held[hook]
        assert torch.allclose(found, expected, atol=1e-5 * float(there), rtol=1e-5, equal_nan=True), hook
    for replace in ({}, {"blocks.0.attn.hook_z": halved}, {PATTERN: halved}):
        losses = [one.run(TOKENS, replace=replace, want="loss").loss for one in (fused, plain)]
        assert torch.allclose(*losses, atol=1e-5), replace


@pytest.mark.parametrize("kwargs", [{}, UNPROCESSED], ids=["processed", "unprocessed"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_hook_of_every_family_holds_what_it_held(kind: str, kwargs: dict[str, bool]) -> None:
    fused, plain = (
        backend(str(causal_lm_folder(kind)), from_pretrained_kwargs=kwargs, fused=on) for on in (True, False)
    )
    assert plain._fused is None
    assert_alike(fused, plain)
    attention = {"llama": "GroupedQueryAttention", "qwen2": "GroupedQueryAttention"}.get(kind, "Attention")
    norm = ("RMSNorm" if "Grouped" in attention else "LayerNorm") + ("" if kwargs else "Pre")
    assert parts(fused) == {attention, norm} | ({"MLP"} if kind == "gpt2" else set())


@pytest.mark.parametrize(
    "options",
    [
        {"use_local_attn": True, "attn_types": ["global", "local"], "window_size": 5},
        {"attention_dir": "bidirectional"},
        {"scale_attn_by_inverse_layer_idx": True, "normalization_type": "RMS", "act_fn": "gelu_new"},
        {"use_attn_scale": False, "normalization_type": None},
        {"positional_embedding_type": "rotary", "rotary_dim": 4, "parallel_attn_mlp": True},
        {"dtype": torch.float64, "act_fn": "gelu_new"},
    ],
    ids=["local", "bidirectional", "by layer", "not scaled", "rotary", "float64"],
)
def test_every_attention_holds_what_it_held(options: dict[str, Any]) -> None:
    model = made(**options)
    fused = backend(model)
    assert "Attention" in parts(fused)
    assert_alike(fused, backend(model, fused=False))


@pytest.mark.parametrize(
    "options", [{"attn_scores_soft_cap": 2.0}, {"positional_embedding_type": "alibi"}], ids=["capped", "alibi"]
)
def test_what_else_is_done_to_scores_is_done(options: dict[str, Any]) -> None:
    model = made(**options)
    fused = backend(model)
    assert "Attention" not in parts(fused)
    assert_alike(fused, backend(model, fused=False))


def test_half_precision_comes_to_the_same_within_its_own() -> None:
    model = made(act_fn="gelu_new").to(torch.bfloat16)
    model.cfg.dtype = torch.bfloat16
    fused, plain = backend(model), backend(model, fused=False)
    assert fused._fused is not None
    numbers, plain_gelu = torch.linspace(-4, 4, 99).bfloat16(), model.blocks[0].mlp.act_fn
    with fused._fused.at_work():
        assert model.blocks[0].mlp.act_fn is not plain_gelu
        assert torch.equal(model.blocks[0].mlp.act_fn(numbers), plain_gelu(numbers)), "each of its steps rounds"
    hook = "blocks.1.hook_resid_post"
    found, expected = (one.run(TOKENS, read={hook}).held[hook].float() for one in (fused, plain))
    assert (found - expected).norm() < 0.02 * expected.norm()


def test_gradients_are_those_of_its_own_steps() -> None:
    model, found = made(act_fn="gelu_new"), []
    for one in (backend(model), backend(model, fused=False)):
        added = torch.zeros(16, requires_grad=True)

        def shifted(activation: Tensor, added: Tensor = added) -> Tensor:
            return activation + added

        loss = one.run(TOKENS, replace={"blocks.0.hook_resid_pre": shifted}, want="loss", grad=True).loss
        found += torch.autograd.grad(loss.sum(), added)
    assert found[1].abs().max() > 1e-3
    assert torch.allclose(*found, rtol=1e-4, atol=1e-5)


def test_padding_is_left_to_the_library() -> None:
    model = made()
    model.tokenizer.padding_side = "left"
    tokens = TOKENS.clone()
    tokens[0, :7] = model.tokenizer.pad_token_id
    try:
        losses = [backend(model, fused=on).run(tokens, want="loss").loss for on in (True, False)]
    finally:
        model.tokenizer.padding_side = "right"
    assert torch.allclose(*losses, atol=1e-5, equal_nan=True)


def test_hooks_of_the_owner_see_all_scores() -> None:
    model, seen = made(), list[Tensor]()
    fused = backend(model)
    model.hook_dict[PATTERN].add_hook(lambda pattern, hook: seen.append(pattern), is_permanent=True)
    fused.run(TOKENS, read={"blocks.1.hook_resid_post"})
    assert [pattern.shape for pattern in seen] == [(3, 2, 20, 20)]
    assert torch.allclose(seen[0].sum(-1), torch.ones(3, 2, 20))


@pytest.mark.parametrize("outside", ["blocks.0.hook_resid_post", "blocks.1.attn.hook_q", "blocks.1.attn.hook_z"])
def test_a_forward_inside_another_has_its_own_hooks(outside: str) -> None:
    """Inside the very attention that is at work, too."""
    model = made()
    fused, plain = backend(model), backend(model, fused=False)
    held: dict[str, Tensor] = {}

    def inner(activation: Tensor) -> Tensor:
        if not held:  # this hook is there in the inner forward, too
            held[PATTERN] = torch.empty(0)
            held.update(fused.run(TOKENS, read={PATTERN}).held)
        return activation

    loss = fused.run(TOKENS, replace={outside: inner}, want="loss").loss
    assert torch.allclose(held[PATTERN], plain.run(TOKENS, read={PATTERN}).held[PATTERN], atol=1e-6)
    assert torch.allclose(loss, plain.run(TOKENS, want="loss").loss, atol=1e-5)


def test_padding_inside_a_forward_is_left_to_the_library() -> None:
    model = made()
    fused, mask, seen = backend(model), torch.ones_like(TOKENS), list[Tensor]()
    mask[0, :7] = 0
    expected = model(TOKENS, attention_mask=mask)

    def inner(activation: Tensor) -> Tensor:
        if not seen:
            seen.append(torch.empty(0))
            seen.append(model(TOKENS, attention_mask=mask))
        return activation

    fused.run(TOKENS, replace={"blocks.1.attn.hook_q": inner}, want="loss")
    assert torch.allclose(seen[1], expected, atol=1e-5, equal_nan=True)
    assert not torch.allclose(expected[0, -1], model(TOKENS)[0, -1], atol=1e-3)


def test_a_hook_that_comes_during_a_forward_sees_all_scores() -> None:
    model, seen = made(), list[Tensor]()
    fused = backend(model)

    def adding(activation: Tensor) -> Tensor:
        model.hook_dict[PATTERN].add_hook(lambda pattern, hook: seen.append(pattern))
        return activation

    fused.run(TOKENS, replace={"blocks.1.attn.hook_q": adding}, want="loss")
    assert [pattern.shape for pattern in seen] == [(3, 2, 20, 20)]


def test_hooks_of_all_modules_see_all_scores() -> None:
    from torch.nn.modules.module import register_module_forward_hook

    model, seen = made(), list[Tensor]()
    handle = register_module_forward_hook(
        lambda module, given, out: seen.append(out) if module is model.hook_dict[PATTERN] else None
    )
    try:
        with pytest.warns(RuntimeWarning, match=r"model.backend.fused does nothing for 'custom': no attention") as told:
            fused = backend(model)
        assert [one.filename for one in told] == [__file__], "where this module's backend() builds it"
        assert not seen, "nothing is tried before their eyes"
        fused.run(TOKENS, read={"blocks.1.hook_resid_post"})
    finally:
        handle.remove()
    assert [tuple(pattern.shape) for pattern in seen] == [(3, 2, 20, 20)]
    fused.run(TOKENS, want="loss")
    assert parts(fused) == {"Attention", "LayerNorm"}, "tried as soon as they have gone"


def test_the_model_is_left_as_it_was() -> None:
    model = made(act_fn="gelu_new")
    before = state(model)
    fused = backend(model)

    def fails(activation: Tensor) -> Tensor:
        raise ZeroDivisionError

    fused.run(TOKENS, want="loss")
    with pytest.raises(ZeroDivisionError):
        fused.run(TOKENS, replace={"blocks.1.attn.hook_z": fails}, want="loss")
    assert state(model) == before
    assert model.blocks[0].mlp.act_fn.__name__ == "gelu_new"


@pytest.mark.parametrize("fault", ["another result", "another step"])
def test_a_library_that_computes_otherwise_is_left_alone(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each kind is tried on a few numbers first, and whoever has hooks there does not notice."""
    from transformer_lens.components import Attention

    model, seen = made(), list[Tensor]()
    model.hook_dict["blocks.0.attn.hook_q"].add_hook(lambda q, hook: seen.append(q), is_permanent=True)
    plain = Attention.calculate_z_scores
    if fault == "another result":
        forward = Attention.forward
        monkeypatch.setattr(Attention, "forward", lambda self, *inputs, **kwargs: 2 * forward(self, *inputs, **kwargs))
        monkeypatch.setattr(Attention, "calculate_z_scores", lambda self, v, pattern: plain(self, v, pattern / 3))
    else:
        monkeypatch.setattr(
            Attention, "calculate_z_scores", lambda self, v, pattern: plain(self, v, pattern * pattern.shape[-1])
        )
    assert parts(backend(model)) == {"LayerNorm"}
    assert not seen


@pytest.mark.parametrize("what", ["activation", "mask", "scores"])
def test_what_the_owner_changes_afterwards_counts(what: str) -> None:
    model = made(act_fn="gelu_new")
    fused, plain = backend(model), backend(model, fused=False)
    before = plain.run(TOKENS, want="loss").loss
    if what == "activation":
        model.blocks[1].mlp.act_fn = torch.relu
    elif what == "mask":
        model.blocks[1].attn.apply_causal_mask = lambda scores, *args, **kwargs: scores
    else:
        model.blocks[1].attn.cfg.attn_scores_soft_cap = 0.5
    expected = plain.run(TOKENS, want="loss").loss
    assert not torch.allclose(expected, before, atol=1e-3)
    assert torch.allclose(fused.run(TOKENS, want="loss").loss, expected, atol=1e-5)


def test_inputs_by_head_are_fused_too() -> None:
    model = made()
    model.set_use_split_qkv_input(True)
    fused = backend(model)
    assert "Attention" in parts(fused)
    assert_alike(fused, backend(model, fused=False))


def test_half_precision_that_autocast_makes_rounds_each_step_of_gelu() -> None:
    model = made(act_fn="gelu_new")
    found = []
    for fused in (True, False):
        one = backend(model, fused=fused)
        with torch.autocast("cpu", torch.bfloat16):
            found.append(one.run(TOKENS, read={"blocks.0.mlp.hook_post"}).held["blocks.0.mlp.hook_post"])
    assert found[0].dtype == found[1].dtype
    assert (found[0] - found[1]).float().norm() < 0.02 * found[1].float().norm()


def test_caches_and_checkpoints_of_before_fit_where_it_is_not_chosen(tmp_path: Path) -> None:
    config = saekit.load_config(run_config(tmp_path))
    plugins, one = saekit.default_manager(), saekit.load_model("saekit/tiny-python")
    corpus = Corpus.of(config.dataset, config.evals, None)
    identity = run_identity(config, corpus, plugins, one)
    assert set(identity["model.backend"]) == {"name", "from_pretrained_kwargs", "forward_kwargs"}
    chosen = attrs.evolve(config, model=attrs.evolve(config.model, backend=HookedTransformerOptions(fused=True)))
    assert run_identity(chosen, corpus, plugins, one)["model.backend"]["fused"] is True


def test_outlines_have_no_fused_parts() -> None:
    assert not len(FusedParts(made().to("meta")))


def test_compiling_and_fusing_are_two_ways_to_the_same() -> None:
    with pytest.raises(saekit.ConfigError, match=r"model\.backend\.fused: and model\.compile are two ways to the same"):
        saekit.default_manager().build(
            "model_backends",
            HookedTransformerOptions(fused=True),
            model=ModelConfig(name="made", compile=True),
            loaded=made(),
        )


def test_a_plan_says_what_it_gains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def told(**backend: Any) -> str | None:
        model = {"name": "saekit/tiny-python", "backend": {"name": "HookedTransformer", **backend}}
        config = run_config(tmp_path, model=model, training={"training_tokens": 600}, evals={"run": []})
        return saekit.plan(config).facts.get("other forwards")

    monkeypatch.setattr(Compared, "pays", True)  # whatever this machine does at this moment
    text = str(told())
    assert re.fullmatch(r"\d+\.\d\d × faster here, the same but for rounding: write model\.backend\.fused=true", text)
    assert told(fused=True) is None
    written = saekit.load_config(run_config(tmp_path), overrides=[text.rpartition(" ")[2]])
    assert written.model.backend == HookedTransformerOptions(fused=True)
