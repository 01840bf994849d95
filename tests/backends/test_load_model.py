"""``saekit.load_model``: a model by its name, or around one that is there, ready to run."""

from __future__ import annotations

import io
import shutil
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from saekit_plugins.backends.lens_versions import has_hooked_transformer
from saekit_plugins.backends.quiet_loading import without_bars
from support.causal_lms import causal_lm_folder
from support.tiny import TOKENIZER, hooked_transformer, tokenizer

import saekit
from saekit.devices import resolve_device
from saekit.errors import ConfigError, ModelError
from saekit.runs.opening import build_backend
from saekit.testing import FakeBackend, isolated_manager
from saekit.testing.fakes import FakeConfig, plugin_of


def gpt2() -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    shape = {"vocab_size": 2048, "n_positions": 64, "n_embd": 16, "n_layer": 3, "n_head": 2}
    made = GPT2LMHeadModel(GPT2Config(**shape, bos_token_id=0, eos_token_id=0)).eval()
    made.tokenizer = tokenizer()
    return made


def test_backends_are_given_a_device() -> None:
    """Not ``auto``, which torch does not know, wherever they are built."""
    given: list[str] = []

    def build(config: Any, *, model: Any, loaded: Any) -> FakeBackend:
        given.append(torch.empty(0, device=model.device).device.type)
        return FakeBackend()

    plugins = isolated_manager(plugin_of("model_backends", saekit.Entry("fake", FakeConfig, build)), builtins=True)
    saekit.load_model("x", backend="fake", plugins=plugins)
    build_backend(saekit.load_config({"model": {"name": "x", "backend": "fake"}}, plugins=plugins), plugins, None)
    saekit.load_model("x", backend="fake", device="meta", plugins=plugins)
    assert given == [torch.device(resolve_device("auto", "")).type] * 2 + ["meta"]


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


# ---- what is shown meanwhile


def test_transformers_shows_no_bars_of_what_saekit_loads_and_those_of_others_stay(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    folder, kinds = causal_lm_folder("gpt2"), ["AutoModelForCausalLM", "TransformerBridge"]
    for kind in kinds + ["HookedTransformer"] * has_hooked_transformer():
        saekit.load_model(folder, backend=kind)
    broken = shutil.copytree(folder, tmp_path / "broken")
    (broken / "model.safetensors").write_bytes(b"no weights")
    with pytest.raises(ModelError, match="cannot be loaded"):
        saekit.load_model(broken, backend="AutoModelForCausalLM")
    assert "Loading weights" not in "".join(capfd.readouterr())
    seen: list[Any] = []

    def own(factory: Any, args: Any, kwargs: Any) -> Any:
        seen.append(kwargs.get("desc"))
        return factory(*args, **kwargs)

    before = logging.set_tqdm_hook(own)
    try:
        saekit.load_model(folder, backend="AutoModelForCausalLM")
        assert seen == []
        AutoModelForCausalLM.from_pretrained(folder)
        assert seen == ["Loading weights"], "the user's own hook is there again"
    finally:
        logging.set_tqdm_hook(before)
    assert before is None, "nothing of ours is left"
    capfd.readouterr()
    AutoModelForCausalLM.from_pretrained(folder)
    assert "Loading weights" in "".join(capfd.readouterr())


def test_several_threads_that_load_leave_bars_as_they_were() -> None:
    from transformers.utils import logging

    entered, ends = threading.Barrier(2, timeout=20), threading.Event()

    def loads() -> None:
        with without_bars():
            entered.wait()
            ends.wait(20)

    thread = threading.Thread(target=loads)
    thread.start()
    with without_bars():
        entered.wait()
        assert logging.tqdm(range(1), file=io.StringIO()).disable
    shown = logging.tqdm(range(1), file=io.StringIO())
    assert not shown.disable, "another thread loads, and this one does not"
    shown.close()
    ends.set()
    thread.join()
    assert logging.set_tqdm_hook(None) is None


def test_texts_become_tokens_with_bos_before_them() -> None:
    model = FakeBackend()
    assert model.to_tokens("ab").tolist() == [[0, 97, 98]]
    assert model.to_tokens(["ab", "cd"], prepend_bos=False).tolist() == [[97, 98], [99, 100]]
    assert model.run(model.to_tokens("ab"), want="loss").loss.shape == (1, 2)
    with pytest.raises(ModelError, match="must come to equally many tokens, found 3 to 4; take one at a time"):
        model.to_tokens(["ab", "abc"])
    with pytest.raises(ModelError, match="found no text"):
        model.to_tokens([])
    with pytest.raises(ModelError, match="the text has no tokens"):
        model.to_tokens("", prepend_bos=False)
    model.special_tokens = {"bos": None}
    with pytest.raises(ModelError, match=r"has no BOS token; to_tokens\(text, prepend_bos=False\)"):
        model.to_tokens("ab")
