"""``saekit.load_model``: a model by its name, or around one that is there, ready to run."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.tiny import TOKENIZER, hooked_transformer, tokenizer

import saekit
from saekit.errors import ConfigError, ModelError
from saekit.testing import FakeBackend, isolated_manager
from saekit.testing.fakes import FakeConfig, plugin_of


def gpt2() -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    shape = {"vocab_size": 2048, "n_positions": 64, "n_embd": 16, "n_layer": 3, "n_head": 2}
    made = GPT2LMHeadModel(GPT2Config(**shape, bos_token_id=0, eos_token_id=0)).eval()
    made.tokenizer = tokenizer()
    return made


def test_by_name() -> None:
    """As the documentation says how to use one."""
    backend: Any = saekit.load_model("saekit/tiny-python", device="cpu")
    tokens = torch.tensor([backend.tokenize("def add(a, b):\n    return a")])
    last = [name for name in backend.hook_names() if name.endswith("hook_resid_post")][-1]
    held = backend.run(tokens, read=[last]).held[last]
    assert held.shape == (*tokens.shape, 128)
    logits = backend.run(tokens, want="logits").logits
    weights, bias = backend.unembedding()
    normalized = backend.model.ln_final(held)
    assert torch.allclose(normalized @ weights + bias, logits, atol=1e-4)
    assert "".join(backend.token_texts(tokens[0].tolist())) == "def add(a, b):\n    return a"
    assert saekit.load_model(TOKENIZER).name == str(TOKENIZER)
    assert saekit.load_model(dtype="float64", device="cpu").run(tokens, want="logits").logits.dtype == torch.float64


def test_around_models_that_are_there() -> None:
    lens, hf = hooked_transformer(), gpt2()
    backend: Any = saekit.load_model(lens)
    assert backend.model is lens
    other: Any = saekit.load_model(hf)
    assert other.model is hf
    assert "transformer.h.1.mlp" in other.hook_names()
    residual = {name for name in other.hook_names() if other.in_residual_stream(name)}
    ends = ("", ".input", ".attn", ".mlp", ".ln_2.input")
    assert residual == {f"transformer.h.{n}{end}" for n in range(3) for end in ends} | {"transformer.wte"}
    options = {"name": "HookedTransformer", "forward_kwargs": {"prepend_bos": False}}
    assert saekit.load_model(lens, backend=options)._forward_kwargs == {"prepend_bos": False}  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("model", "options", "error", "message"),
    [
        ("./nowhere", {}, ModelError, "there is no model folder './nowhere'"),
        ("saekit/tiny-python", {"backend": "HookedTransfomer"}, saekit.SaekitError, "Did you mean 'HookedTransformer'"),
        ("saekit/tiny-python", {"dtype": "float23"}, ConfigError, "model.dtype: expected one of 'float32'"),
        ("saekit/tiny-python", {"device": "gpu"}, ConfigError, "model.device: 'gpu' cannot be used"),
        (object(), {}, ModelError, "model must be a HookedTransformer, found object"),
        (3, {}, ModelError, "model must be a HookedTransformer, found int"),
    ],
)
def test_what_cannot_be_loaded_is_said(model: Any, options: dict[str, Any], error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        saekit.load_model(model, **options)


def test_a_model_that_several_backends_take() -> None:
    def one(config: object, **services: Any) -> FakeBackend:
        return FakeBackend()

    def two(config: object, **services: Any) -> FakeBackend:
        return FakeBackend()

    class OtherConfig(FakeConfig):
        pass

    entries = [saekit.Entry("one", FakeConfig, one), saekit.Entry("alias", FakeConfig, one)]
    plugins = isolated_manager(plugin_of("model_backends", *entries), builtins=True)
    assert saekit.load_model({}, plugins=plugins).name == "fake", "an alias is no other"
    entries.append(saekit.Entry("two", OtherConfig, two))
    plugins = isolated_manager(plugin_of("model_backends", *entries), builtins=True)
    with pytest.raises(ModelError, match="several backends take a dict: test:alias, test:two. Name one: backend=..."):
        saekit.load_model({}, plugins=plugins)
    assert saekit.load_model({}, backend="two", plugins=plugins).name == "fake"
