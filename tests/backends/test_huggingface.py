"""The backend ``AutoModelForCausalLM`` against what transformers itself says."""

from __future__ import annotations

import json
import re
import shutil
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from support.runs import pressing
from support.tiny import run_config, tokenizer
from torch import Tensor

import saekit
from saekit.config import ModelConfig
from saekit.errors import ConfigError, ModelError, TrainingInterrupted

TOKENS = torch.randint(1, 2000, (3, 20), generator=torch.Generator().manual_seed(0))
BLOCKS = {"gpt2": "transformer.h", "llama": "model.layers", "neox": "gpt_neox.layers"}
SPECIAL = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": None}


@cache
def _made(kind: str) -> Any:
    from transformers import (
        GPT2Config,
        GPT2LMHeadModel,
        GPTNeoXConfig,
        GPTNeoXForCausalLM,
        LlamaConfig,
        LlamaForCausalLM,
    )

    torch.manual_seed(0)
    shape = {"vocab_size": 2048, "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2,
             "intermediate_size": 32, "max_position_embeddings": 64} | SPECIAL  # fmt: skip
    if kind == "gpt2":
        # Dropout, so that a forward in training mode would show.
        return GPT2LMHeadModel(GPT2Config(vocab_size=2048, n_positions=64, n_embd=16, n_layer=3, n_head=2, **SPECIAL))
    if kind == "llama":
        return LlamaForCausalLM(LlamaConfig(**shape, num_key_value_heads=1))
    return GPTNeoXForCausalLM(GPTNeoXConfig(**shape))


def with_tanh(made: Any) -> Any:
    """The same GPT-2 with the GELU that transformers makes in one step."""
    import copy

    config = copy.deepcopy(made.config)
    config.activation_function = "gelu_pytorch_tanh"
    other = type(made)(config).eval()
    other.load_state_dict(made.state_dict())
    return other


def model(kind: str) -> Any:
    made = _made(kind).eval()
    made.tokenizer = tokenizer()
    return made


def backend(loaded: object | None = None, options: Any = "AutoModelForCausalLM", **config: Any) -> Any:
    return saekit.default_manager().build("model_backends", options, model=ModelConfig(**config), loaded=loaded)


def options(**given: Any) -> Any:
    from saekit_plugins.backends.huggingface import HuggingFaceOptions

    return HuggingFaceOptions(**given)


def attached(module: torch.nn.Module) -> int:
    return sum(len(part._forward_hooks) + len(part._forward_pre_hooks) for part in module.modules())


@pytest.fixture(params=list(BLOCKS))
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GPT-2 with its tokenizer, as save_pretrained writes it."""
    where = tmp_path_factory.mktemp("models") / "tiny-gpt2"
    _made("gpt2").save_pretrained(where)
    tokenizer().save_pretrained(where)
    return where


def test_hooks_hold_the_hidden_states(kind: str) -> None:
    made, blocks = model(kind), BLOCKS[kind]
    with torch.no_grad():
        states = made(TOKENS, output_hidden_states=True).hidden_states  # transformers leaves hooks of its own for it
    before = attached(made)
    names = [f"{blocks}.{n}" for n in (0, 1)] + [f"{blocks}.{n}.input" for n in (0, 1, 2)]
    held = backend(made).run(TOKENS, read=names).held
    assert set(held) == set(names)
    assert set(names) < set(backend(made).hook_names())
    for n in (0, 1):
        assert torch.equal(held[f"{blocks}.{n}"], states[n + 1])
        assert not held[f"{blocks}.{n}"].requires_grad
    for n in (0, 1, 2):
        assert torch.equal(held[f"{blocks}.{n}.input"], states[n])
    assert attached(made) == before


def test_loss_and_logits_are_the_models_own(kind: str) -> None:
    made = model(kind)
    with torch.no_grad():
        expected = made(TOKENS, labels=TOKENS)
    found = backend(made)
    assert torch.equal(found.run(TOKENS, want="logits").logits, expected.logits)
    loss = found.run(TOKENS, want="loss").loss
    assert loss.shape == (3, 19)
    assert torch.allclose(loss.mean(), expected.loss, atol=1e-6)


def test_the_forward_ends_with_the_last_module_that_is_read(kind: str) -> None:
    made, blocks = model(kind), BLOCKS[kind]
    ran: list[int] = []
    layers = made.get_submodule(blocks)
    undo = [layer.register_forward_hook(lambda *_, n=n: ran.append(n)) for n, layer in enumerate(layers)]
    before = attached(made)
    found = backend(made)
    for names, blocks_run in (({f"{blocks}.0"}, [0]), ({f"{blocks}.2.input"}, [0, 1]), ({f"{blocks}.1.mlp"}, [0])):
        ran.clear()
        found.run(TOKENS, read=names)
        assert ran == blocks_run
        assert attached(made) == before
    ran.clear()
    found.run(TOKENS, read={f"{blocks}.0"}, want="logits")
    assert ran == [0, 1, 2]
    for handle in undo:
        handle.remove()


def test_replacements(kind: str) -> None:
    made, blocks = model(kind), BLOCKS[kind]
    found, before = backend(made), attached(made)
    clean = found.run(TOKENS, want="logits").logits
    states = found.run(TOKENS, read=[f"{blocks}.1", f"{blocks}.2.input"]).held
    for name in (f"{blocks}.1", f"{blocks}.2.input", f"{blocks}.1.mlp"):
        same = found.run(TOKENS, replace={name: torch.clone}, want="logits").logits
        assert torch.equal(same, clean), "put back as it is"
        zeroed = found.run(TOKENS, read={name}, replace={name: torch.zeros_like}, want="logits")
        assert not torch.allclose(zeroed.logits, clean)
        assert zeroed.held[name].any(), "what is read is what was there before"
    # What follows goes on with what was put there.
    doubled = found.run(TOKENS, read={f"{blocks}.2.input"}, replace={f"{blocks}.1": lambda h: 2 * h}).held
    assert torch.equal(doubled[f"{blocks}.2.input"], 2 * states[f"{blocks}.1"])
    # Attention returns a tuple, whose other parts stay; two in one forward are both made.
    attention = next(name for name in (f"{blocks}.1.attn", f"{blocks}.1.self_attn", f"{blocks}.1.attention")
                     if name in found.hook_names())  # fmt: skip
    without = found.run(
        TOKENS, read={f"{blocks}.1", f"{blocks}.1.input"},
        replace={attention: torch.zeros_like, f"{blocks}.1.mlp": torch.zeros_like},
    ).held  # fmt: skip
    assert torch.equal(without[f"{blocks}.1"], without[f"{blocks}.1.input"]), "without both, the block does nothing"
    assert attached(made) == before


def test_a_replacement_must_keep_the_shape() -> None:
    made = model("gpt2")
    found, before = backend(made), attached(made)
    with pytest.raises(
        ModelError, match=r"replaces 'transformer.h.1' must be .* shape \[3, 20, 16\], found \[3, 20, 8\]"
    ):
        found.run(TOKENS, replace={"transformer.h.1": lambda held: held[..., :8]}, want="loss")
    with pytest.raises(ModelError, match="found NoneType"):
        found.run(TOKENS, replace={"transformer.h.1": lambda held: None}, want="loss")
    with pytest.raises(ModelError, match="has no hook 'transformer.h.9'"):
        found.run(TOKENS, read={"transformer.h.0", "transformer.h.9"})
    with pytest.raises(ModelError, match=r"the hook 'transformer.h' of 'custom' does not run"):
        found.run(TOKENS, read={"transformer.h"})  # a list of modules
    assert attached(made) == before


def test_rows_that_a_module_flattens_have_their_positions_back() -> None:
    made = model("gpt2")

    class Flat(torch.nn.Module):
        def __init__(self, inner: Any) -> None:
            super().__init__()
            self.inner, self.rows = inner, torch.nn.Identity()

        def forward(self, x: Tensor) -> Tensor:
            return self.rows(self.inner(x).flatten(0, 1)).unflatten(0, x.shape[:2])

    block = made.transformer.h[1]
    expected = backend(made).run(TOKENS, read={"transformer.h.1.mlp"}).held["transformer.h.1.mlp"]
    mlp, block.mlp = block.mlp, Flat(block.mlp)
    try:
        found = backend(made)
        held = found.run(TOKENS, read={"transformer.h.1.mlp.rows"}).held["transformer.h.1.mlp.rows"]
        assert torch.equal(held, expected)
        zero = {"transformer.h.1.mlp.rows": torch.zeros_like}
        assert not found.run(TOKENS, read={"transformer.h.1.mlp"}, replace=zero).held["transformer.h.1.mlp"].any()
        run = found.run(TOKENS, read={"transformer.h.1.mlp.rows"}, want="loss", grad=True)
        (gradient,) = torch.autograd.grad(run.loss.sum(), run.held["transformer.h.1.mlp.rows"])
        assert gradient.shape == (3, 20, 16)
    finally:
        block.mlp = mlp


@pytest.mark.parametrize("frozen", [True, False])
def test_gradients(kind: str, frozen: bool) -> None:
    """To what is read, and to what the replacement uses, against finite differences."""
    made, hook = model(kind).double(), f"{BLOCKS[kind]}.1"
    made.requires_grad_(not frozen)
    found = backend(made)
    try:
        run = found.run(TOKENS, read={hook}, want="loss", grad=True)
        assert torch.equal(run.loss.detach(), found.run(TOKENS, want="loss").loss)
        (gradient,) = torch.autograd.grad(run.loss.sum(), run.held[hook])
        direction = torch.randn(gradient.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))

        def moved(by: float) -> Tensor:
            replace = {hook: lambda held: held + by * direction}
            return found.run(TOKENS, replace=replace, want="loss").loss.sum()

        # Llama normalizes in float32, whatever its type.
        slope = (moved(1e-5) - moved(-1e-5)) / 2e-5
        assert torch.allclose((gradient * direction).sum(), slope, rtol=1e-3 if kind == "llama" else 1e-6)
        scale = torch.ones(16, dtype=torch.float64, requires_grad=True)
        found.run(TOKENS, replace={hook: lambda held: held * scale}, want="loss", grad=True).loss.sum().backward()
        assert torch.allclose(scale.grad, (gradient * run.held[hook].detach()).sum((0, 1)))
    finally:
        made.float().requires_grad_(True).zero_grad()


def test_what_is_made_once_for_all_contexts_is_no_site(tmp_path: Path) -> None:
    """Rotary embeddings are [1, position, d]: one forward of one context would not show it."""
    config = run_config(tmp_path, model={"backend": "AutoModelForCausalLM"}, site={"hook_name": "model.rotary_emb"})
    message = (
        r"^the hook 'model.rotary_emb' holds a tensor of shape \[1, 7, 8\] for \[2, 7\] tokens; an SAE needs one "
        r"vector per token: \[batch, position, \.\.\.\]"
    )
    found = saekit.plan(config, model=model("llama"))
    assert [problem for problem in found.problems if re.match(message, problem)] == found.problems != []
    with pytest.raises(ConfigError, match=message):
        saekit.train(config, model=model("llama"))
    assert not list(tmp_path.iterdir())


def test_gradients_are_kept_only_where_they_are_asked_for() -> None:
    made = model("gpt2")
    found = backend(made)
    run = found.run(TOKENS, read={"transformer.h.1"}, want="logits")
    assert not run.logits.requires_grad
    assert not run.held["transformer.h.1"].requires_grad
    with torch.no_grad():
        assert found.run(TOKENS, want="logits", grad=True).logits.requires_grad, "whatever the caller has set"
    with pytest.raises(ValueError, match="not asked for its loss"):
        run.loss  # noqa: B018
    with pytest.raises(ValueError, match="want must be one of 'held', 'loss', 'logits'"):
        found.run(TOKENS, want="both")


def test_the_unembedding_makes_the_logits(kind: str) -> None:
    made = model(kind)
    found = backend(made)
    weights, bias = found.unembedding()
    head = next(name for name, module in made.named_modules() if module is made.get_output_embeddings())
    run = found.run(TOKENS, read={f"{head}.input"}, want="logits")
    assert weights.shape == (16, 2048)
    assert bias is None
    with torch.no_grad():
        assert torch.allclose(run.held[f"{head}.input"] @ weights, run.logits, atol=1e-6)


def test_autocast_runs_products_in_bfloat16_and_leaves_the_weights() -> None:
    made = model("llama")
    plain, cast = backend(made), backend(made, autocast=True)
    seen = []

    def look(held: Tensor) -> Tensor:
        seen.append((torch.eye(4) @ torch.eye(4)).dtype)
        return held

    hook = "model.layers.1.mlp"
    run = cast.run(TOKENS, read={hook}, replace={hook: look}, want="loss")
    assert run.held[hook].dtype == torch.bfloat16
    assert seen == [torch.float32], "what is put in its place is not the model's"
    assert run.loss.dtype == torch.float32
    assert torch.allclose(run.loss, plain.run(TOKENS, want="loss").loss, atol=0.05)
    assert {p.dtype for p in made.parameters()} == {torch.float32}


def test_a_model_that_is_passed_stays_as_it_was(tmp_path: Path) -> None:
    made = model("gpt2").train()
    made.transformer.h[0].eval()
    made.lm_head.weight.requires_grad_(False)
    before = [p.requires_grad for p in made.parameters()], [m.training for m in made.modules()]
    weights, hooks = {name: value.clone() for name, value in made.state_dict().items()}, attached(made)
    config = run_config(
        tmp_path, site={"hook_name": "transformer.h.1"}, model={"backend": "AutoModelForCausalLM"},
        training={"training_tokens": 600}, evals={"n_contexts": 2},
    )  # fmt: skip
    try:
        result = saekit.train(config, model=made)
        assert result.sae.d_in == 16
        assert ([p.requires_grad for p in made.parameters()], [m.training for m in made.modules()]) == before
        assert all(torch.equal(value, weights[name]) for name, value in made.state_dict().items())
        assert attached(made) == hooks
        expected = backend(made.eval()).run(TOKENS, want="loss").loss
        assert torch.equal(backend(made.train()).run(TOKENS, want="loss").loss, expected), "without dropout"
    finally:
        made.requires_grad_(True)


def test_a_folder_is_trained_on_and_resumed(folder: Path, tmp_path: Path) -> None:
    """With the backend's default options; a run that was stopped and goes on is the one that never was."""
    whole, part = (
        run_config(
            tmp_path / name, site={"hook_name": "transformer.h.1"}, checkpoints={"name": "run"},
            model={"name": str(folder), "backend": "AutoModelForCausalLM"}, evals={"n_contexts": 2},
        )
        for name in ("whole", "part")
    )  # fmt: skip
    expected = saekit.train(whole)
    assert 7 < expected.metrics["evals/ce_loss_without_sae"] < 8.5, "about log 2048, for it is untrained"
    assert expected.sae.info.metadata["model_class_name"] == "AutoModelForCausalLM"
    with pressing(4), pytest.raises(TrainingInterrupted):
        saekit.train(part)
    found = saekit.resume(tmp_path / "part/run")
    assert found.metrics == expected.metrics
    for name, value in expected.sae.state_dict().items():
        assert torch.equal(found.sae.state_dict()[name], value), name


def test_weights_and_dtype_of_a_folder(folder: Path) -> None:
    made = model("gpt2")
    found = backend(name=str(folder))
    assert type(found.model.transformer.h[0].mlp.act) is torch.nn.GELU, "transformers' own takes eight steps"
    logits = found.run(TOKENS, want="logits").logits
    assert torch.equal(logits, backend(with_tanh(made)).run(TOKENS, want="logits").logits)
    assert torch.allclose(logits, backend(made).run(TOKENS, want="logits").logits, atol=1e-6)
    assert (found.name, found.d_vocab, found.n_ctx) == (str(folder), 2048, 64)
    assert found.special_tokens["bos"] == 0
    assert found.tokenize("def f(x):") == tokenizer()("def f(x):")["input_ids"]
    assert "".join(found.token_texts(found.tokenize("def f(x):"))) == "def f(x):"
    assert found.fingerprint() == backend(made).fingerprint()
    assert found.memory_bytes() == sum(p.nbytes for p in made.parameters())
    assert not any(p.requires_grad for p in found.model.parameters())
    half = backend(name=str(folder), dtype="bfloat16")
    assert type(half.model.transformer.h[0].mlp.act) is type(made.transformer.h[0].mlp.act)
    run = half.run(TOKENS, read={"transformer.h.1"}, want="loss")
    assert run.held["transformer.h.1"].dtype == torch.bfloat16
    assert run.loss.dtype == torch.float32
    eager = backend(name=str(folder), options=options(attn_implementation="eager"))
    assert eager.model.config._attn_implementation == "eager"
    assert torch.allclose(eager.run(TOKENS, want="logits").logits, found.run(TOKENS, want="logits").logits, atol=1e-5)


def test_the_residual_stream_is_that_of_transformer_lens(folder: Path) -> None:
    from saekit_plugins.backends.hooked_transformer import HookedTransformerOptions

    unprocessed = ("fold_ln", "center_writing_weights", "center_unembed", "fold_value_biases")
    lens = backend(
        name=str(folder), options=HookedTransformerOptions(from_pretrained_kwargs=dict.fromkeys(unprocessed, False))
    )
    found = backend(name=str(folder))
    for n in range(3):
        other, hook = f"blocks.{n}.hook_resid_post", f"transformer.h.{n}"
        held, expected = found.run(TOKENS, read={hook}).held[hook], lens.run(TOKENS, read={other}).held[other]
        assert torch.allclose(held, expected, atol=1e-5)
        one = found.run(TOKENS, replace={hook: lambda h: h / 2}, want="loss").loss
        assert torch.allclose(one, lens.run(TOKENS, replace={other: lambda h: h / 2}, want="loss").loss, atol=1e-4)
    assert torch.allclose(found.unembedding()[0], lens.unembedding()[0])
    head = lens.run(TOKENS, read={"ln_final.hook_normalized"}, want="logits")
    weights, bias = lens.unembedding()
    assert torch.allclose(head.held["ln_final.hook_normalized"] @ weights + bias, head.logits, atol=1e-4)


def test_the_tokenizer_may_be_elsewhere(folder: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    _made("llama").save_pretrained(bare)
    with pytest.raises(ModelError, match=r"the tokenizer '.*bare' cannot be loaded"):
        backend(name=str(bare))
    assert (
        backend(name=str(bare), options=options(tokenizer=str(folder))).tokenize("def")
        == tokenizer()("def")["input_ids"]
    )
    with pytest.raises(ModelError, match=r"there is no tokenizer folder './t' \(model.backend.tokenizer\)"):
        choice = {"name": "AutoModelForCausalLM", "tokenizer": "./t"}
        saekit.train(run_config(tmp_path, model={"name": str(bare), "backend": choice}))
    alone = _made("neox")
    if hasattr(alone, "tokenizer"):
        del alone.tokenizer
    assert backend(alone).special_tokens == {"bos": None, "eos": None, "sep": None}
    with pytest.raises(ModelError, match="the model 'custom' has no tokenizer"):
        backend(alone).tokenize("def")


def test_code_that_comes_with_a_model_is_not_run(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "m")
    config = json.loads((tmp_path / "m/config.json").read_text())
    code = {"AutoConfig": "model.Config", "AutoModelForCausalLM": "model.Model"}
    (tmp_path / "m/config.json").write_text(json.dumps(config | {"model_type": "strange", "auto_map": code}))
    (tmp_path / "m/model.py").write_text("raise SystemExit('its code ran')")
    with pytest.raises(ModelError, match="needs code of its own, and saekit runs no code that comes with a model"):
        backend(name=str(tmp_path / "m"))


def test_pretokenize_and_cache(folder: Path, tmp_path: Path) -> None:
    """Whatever else asks a model for something."""
    chosen = {"name": str(folder), "backend": "AutoModelForCausalLM"}
    made = saekit.pretokenize(
        {
            "folder": str(tmp_path / "p"),
            "max_contexts": 9,
            "verbose": False,
            "dataset": {"context_size": 32},
            "model": chosen,
        }
    )
    assert made.contexts == 9
    config = run_config(
        tmp_path, site={"hook_name": "transformer.h.1.mlp.input"}, model=chosen,
        activations={"cache": {"folder": str(tmp_path / "c"), "tokens": 600}},
    )  # fmt: skip
    plan = saekit.plan(config)
    assert not plan.problems
    assert plan.facts["site"].endswith("width 16")
    assert saekit.cache_activations(config).contexts >= 18


def test_what_cannot_be(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="trust_remote_code is refused: no code that comes with a model is run"):
        options(from_pretrained_kwargs={"trust_remote_code": True})
    with pytest.raises(ConfigError, match="revision is an option of its own"):
        options(from_pretrained_kwargs={"revision": "x"})
    with pytest.raises(ConfigError, match="compiled code knows no hooks"):
        backend(model("gpt2"), compile=True)
    with pytest.raises(ModelError, match="is a model of transformer_lens; .*model.backend=HookedTransformer"):
        backend()
    with pytest.raises(ModelError, match="there is no model folder './nowhere'"):
        backend(name="./nowhere")
    with pytest.raises(ModelError, match="must be an AutoModelForCausalLM, found str. .* model.name = 'gpt2'"):
        backend("gpt2")
    from support.tiny import hooked_transformer

    with pytest.raises(ModelError, match="It is a HookedTransformer, .*: model.backend=HookedTransformer"):
        backend(hooked_transformer())
    config = run_config(tmp_path, model={"name": "./nowhere", "backend": "AutoModelForCausalLM"})
    with pytest.raises(ModelError, match="there is no model folder './nowhere'"):
        saekit.train(config)
    config = run_config(tmp_path, model={"name": str(folder), "backend": "AutoModelForCausalLM"})
    with pytest.raises(ModelError, match="has no hook 'blocks.1.hook_resid_post'"):
        saekit.train(config)
