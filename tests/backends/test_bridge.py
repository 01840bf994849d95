"""Model backend ``TransformerBridge``."""

from __future__ import annotations

import importlib
import shutil
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from saekit_plugins.backends.hooked_mamba import HookedMambaOptions
from saekit_plugins.backends.hooked_transformer import HookedTransformerOptions
from saekit_plugins.backends.native_models import gpt2_config
from saekit_plugins.backends.transformer_bridge import TransformerBridgeOptions
from support.causal_lms import KINDS, TOKENS, causal_lm, causal_lm_folder, make_causal_lm
from support.tiny import TOKENIZER, run_config, tokenizer

import saekit
from saekit.abilities import AttachesHooks, ExposesHooks, StartsInside, TranslatesHooks
from saekit.config import ModelConfig
from saekit.errors import ConfigError, MissingPackageError, ModelError
from saekit.testing import check_plugin

pytestmark = pytest.mark.usefixtures("one_thread")

COMPATIBLE = TransformerBridgeOptions(compatibility_mode=True)
OPTIONS = {"plain": TransformerBridgeOptions(), "compatible": COMPATIBLE}


def bridge(kind: str, options: Any = None, **config: Any) -> Any:
    config = {"device": "cpu"} | config
    return saekit.load_model(causal_lm_folder(kind), backend=options or OPTIONS["plain"], **config)


@cache
def shared(kind: str, how: str = "plain") -> Any:
    """The same object each time: leave it as it is."""
    return bridge(kind, OPTIONS[how])


def booted(kind: str = "gpt2", read_by: Any = None) -> Any:
    """A bridge as a user makes one."""
    from transformer_lens.model_bridge import TransformerBridge

    made: Any = TransformerBridge
    how = {"tokenizer": read_by or tokenizer(), "device": "cpu"}
    return made.boot_transformers(f"tiny-{kind}", hf_model=make_causal_lm(kind), **how)


@pytest.fixture
def version_4(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is done with transformer_lens 4, whichever is installed."""
    for module in ("hooked_transformer", "hooked_mamba"):
        monkeypatch.setattr(f"saekit_plugins.backends.{module}.has_hooked_transformer", lambda: False)
        monkeypatch.setattr(f"saekit_plugins.backends.{module}.lens_version", lambda: "4.3.0")


@pytest.mark.parametrize("kind", ["gpt2", "neox", "folder"])
def test_it_keeps_what_a_backend_promises(kind: str) -> None:
    """One passed from code, and in compatibility mode a folder, of which there is an outline, too."""
    plugin = importlib.import_module("saekit_plugins.backends.transformer_bridge")
    if kind == "folder":
        model: object = ModelConfig(name=str(causal_lm_folder("gpt2")), device="cpu")
        configs: dict[str, Any] = {"configs": {"TransformerBridge": COMPATIBLE}}
    else:
        model, configs = booted(kind), {}
    report = check_plugin(plugin, models={"TransformerBridge": model}, **configs)
    reasons = [str(outcome.not_tried) for outcome in report.not_tried]
    known = ("it has one way of forwards",) + ("an outline is of a model that is named",) * (kind != "folder")
    assert not [reason for reason in reasons if not reason.startswith(known)]


def read_together(backend: Any, names: list[str]) -> tuple[Any, dict[str, str]]:
    """A forward that reads and puts back those of ``names`` that run, and of the others what is said of them."""
    silent: dict[str, str] = {}
    while True:
        wanted = [name for name in names if name not in silent]
        put = {name: lambda x: x for name in wanted if name != "rotary_emb.hook_in"}
        try:
            return backend.run(TOKENS, read=wanted, replace=put, want="logits"), silent
        except ModelError as error:
            silent |= {name: str(error) for name in wanted if repr(name) in str(error)}


@pytest.mark.parametrize("how", OPTIONS)
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "qwen2"])  # which is a Llama with biases
def test_every_hook_is_read_and_put_back(kind: str, how: str) -> None:
    """The hooks of one block and those outside, each alone as it comes; both names of a place are the same."""
    backend = shared(kind, how)
    clean = backend.run(TOKENS, want="logits").logits
    names = [name for name in backend.hook_names() if name.startswith("blocks.1.") or not name.startswith("blocks.")]
    together, silent = read_together(backend, names)
    assert torch.allclose(together.logits, clean, atol=1e-4)
    ran = {name for name in names if name not in silent}
    for name in sorted(ran) if how == "plain" else []:
        if not (held := together.held[name]).is_floating_point():
            continue
        out = backend.run(TOKENS, read=[name], replace={name: lambda x: x}, want="logits", grad=True)
        assert torch.allclose(out.logits, clean, atol=1e-4), name
        assert torch.allclose(out.held[name], held, atol=1e-4), name
        if name != "rotary_emb.hook_in":  # it says which type and device, and no numbers
            slopes = torch.autograd.grad(out.logits[..., 3].pow(2).sum(), out.held[name])
            assert slopes[0].abs().max() > 0, name
    assert {"blocks.1.hook_resid_pre", "blocks.1.hook_in", "blocks.1.attn.hook_z", "blocks.1.attn.o.hook_in"} <= ran
    assert not any(name.startswith(("hook_", "ln_final", "unembed", "embed")) for name in silent)
    why = "does not run as the model is configured (the bridge has hook points that run only after a switch"
    assert all(why in message for message in silent.values())
    assert torch.equal(together.held["blocks.1.hook_resid_post"], together.held["blocks.1.hook_out"])
    assert together.held["blocks.1.hook_resid_post"].shape == (*TOKENS.shape, 16)


def test_hooks_are_listed_with_transformer_lens_names_first() -> None:
    for how in OPTIONS:
        names = shared("llama", how).hook_names()
        assert names.index("blocks.0.hook_resid_pre") < names.index("blocks.0.hook_in")
        assert names.index("blocks.0.hook_in") < names.index("blocks.1.hook_resid_pre")
        assert "hook_pos_embed" not in names, "what a Llama rotates by is no embedding, and two tensors"
        assert "hook_pos_embed" in shared("gpt2", how).hook_names()


def test_the_residual_stream_under_both_names() -> None:
    backend = shared("gpt2")
    found = [name for name in backend.hook_names() if backend.in_residual_stream(name) and "blocks.1" in name]
    assert set(found) == {
        "blocks.1.hook_resid_pre", "blocks.1.hook_in", "blocks.1.hook_resid_mid", "blocks.1.ln2.hook_in",
        "blocks.1.hook_attn_out", "blocks.1.attn.hook_out", "blocks.1.hook_mlp_out", "blocks.1.mlp.hook_out",
        "blocks.1.hook_resid_post", "blocks.1.hook_out",
    }  # fmt: skip
    assert backend.in_residual_stream("hook_pos_embed")
    assert not backend.in_residual_stream("blocks.1.attn.hook_z")


def test_a_forward_ends_after_the_last_hook_that_is_read() -> None:
    backend = bridge("llama")
    calls: list[str] = []
    for number, block in enumerate(backend.model.blocks):
        block.mlp.register_forward_hook(lambda *_, number=number: calls.append(f"mlp {number}"))
    backend.run(TOKENS, read=["blocks.1.hook_resid_mid"])
    assert calls == ["mlp 0"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_forward_begins_inside(kind: str) -> None:
    """Blocks before do not run, and the numbers are those of a whole forward."""
    backend = shared(kind)
    assert isinstance(backend, StartsInside)
    calls: list[int] = []
    watching = [
        block.mlp.register_forward_hook(lambda *_, number=number: calls.append(number))
        for number, block in enumerate(backend.model.blocks)
    ]
    for hook, entry, blocks in (
        ("blocks.1.attn.hook_z", "blocks.1.hook_resid_pre", [1, 2]),
        ("blocks.1.hook_out", "blocks.1.hook_resid_post", [2]),
        ("ln_final.hook_normalized", "blocks.2.hook_resid_post", []),
    ):
        assert backend.entry_of([hook]) == entry
        how: dict[str, Any] = {"read": [hook], "replace": {hook: lambda held: held * 0.5}, "want": "loss"}
        value = backend.run(TOKENS, read=[entry]).held[entry]
        whole = backend.run(TOKENS, **how)
        calls.clear()
        begun = backend.run_from(TOKENS, entry, value, **how)
        assert calls == blocks
        assert torch.equal(begun.loss, whole.loss)
        assert torch.equal(begun.held[hook], whole.held[hook])
    for one in watching:
        one.remove()
    assert backend.entry_of(["hook_embed"]) is None
    with pytest.raises(ModelError, match="hook 'blocks.0.hook_in' of .* does not run in a forward that begins at"):
        backend.run_from(TOKENS, "blocks.1.hook_resid_pre", value, read=["blocks.0.hook_in"])


def test_names_of_places_in_other_libraries() -> None:
    backend = shared("llama")
    assert isinstance(backend, TranslatesHooks)
    assert backend.hook_like("blocks.1.hook_mlp_out") == "blocks.1.hook_mlp_out"
    assert backend.hook_like("model.layers.1") == "blocks.1.hook_resid_post"
    assert backend.hook_like("model.layers.9") is None
    assert backend.hook_like("nothing") is None
    with pytest.raises(ModelError, match="has no hook 'blocks.1.hook_resid_pos'. Did you mean 'blocks.1.hook_resid_po"):
        backend.run(TOKENS, read=["blocks.1.hook_resid_pos"])


@pytest.mark.filterwarnings("ignore:.past_key_values. is deprecated:FutureWarning")  # transformer_lens 4.3 uses it
def test_hooks_stand_while_the_library_generates() -> None:
    backend = shared("gpt2")
    assert isinstance(backend, AttachesHooks)
    prompt, told = TOKENS[:1, :5], []
    clean = backend.model.generate(prompt, max_new_tokens=4, do_sample=False, verbose=False)
    if not torch.equal(clean, make_causal_lm("gpt2").generate(prompt, max_new_tokens=4, do_sample=False)):
        pytest.skip("this transformer_lens generates something else with this transformers: its cache is not read")
    before = backend.model(prompt)
    with backend.attached(
        {"blocks.1.hook_resid_post": lambda held: held * 0 + 1}, on_tokens=lambda ids, kept: told.append((ids, kept))
    ):
        other = backend.model.generate(prompt, max_new_tokens=4, do_sample=False, verbose=False)
    assert not torch.equal(other, clean)
    assert [(ids.shape[1], kept) for ids, kept in told] == [(5, 0), (1, 5), (1, 6), (1, 7)]
    assert torch.equal(backend.model(prompt), before)
    assert not any(point.fwd_hooks for point in backend.model.hook_dict.values())


def test_the_library_sees_points_that_are_exposed() -> None:
    backend = shared("gpt2")
    assert isinstance(backend, ExposesHooks)
    name = "blocks.1.hook_resid_post.hook_sae_acts_post"
    with backend.exposed([name]) as points, backend.attached({"blocks.1.hook_resid_post": points[name]}):
        _, cache = backend.model.run_with_cache(TOKENS)
        changed = backend.model.run_with_hooks(TOKENS, fwd_hooks=[(name, lambda held, hook: held * 0)])
    assert torch.equal(cache[name], cache["blocks.1.hook_resid_post"])
    assert not torch.allclose(changed, backend.model(TOKENS), atol=1e-2)
    assert name not in backend.model.hook_dict


def test_a_bridge_passed_from_code() -> None:
    model = booted()
    model.blocks[0].mlp.train()
    modes = [part.training for part in model.modules()]
    backend: Any = saekit.load_model(model)
    assert backend.model is model
    assert (backend.name, backend.n_ctx, backend.d_vocab) == ("tiny-gpt2", 64, 2048)
    expected = causal_lm("gpt2")(TOKENS).logits
    assert torch.allclose(backend.run(TOKENS, want="logits").logits, expected, atol=1e-5)
    assert [part.training for part in model.modules()] == modes
    with pytest.raises(ConfigError, match="compatibility_mode: is True, which says how a model is loaded, and this"):
        saekit.load_model(model, backend=COMPATIBLE)
    with pytest.raises(ModelError, match="It is a TransformerBridge, .*: model.backend=TransformerBridge"):
        saekit.load_model(model, backend="HookedTransformer")
    with pytest.raises(ModelError, match="model must be a TransformerBridge, found GPT2LMHeadModel. .*AutoModelFor"):
        saekit.load_model(causal_lm("gpt2"), backend="TransformerBridge")


def test_an_sae_trains_on_a_bridge(tmp_path: Path) -> None:
    """The name that it is saved with is one of transformer_lens, so that other backends know the place, too."""
    model = {"name": str(causal_lm_folder("qwen2")), "backend": "TransformerBridge", "device": "cpu"}
    site = {"hook_name": "blocks.1.attn.hook_z"}
    config = run_config(tmp_path, model=model, site=site, training={"training_tokens": 600}, evals={"split": None})
    result = saekit.train(config, dataset=[{"text": f"def f(x):\n    return x + {n}\n" * 20} for n in range(40)])
    assert result.sae.d_in == 16, "two heads of eight, flattened"
    assert result.sae.info.site == saekit.Site(hook_name="blocks.1.attn.hook_z")
    assert result.sae.info.metadata["model_class_name"] == "TransformerBridge"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fold_ln": False}, "fold_ln: is for model.backend.compatibility_mode=true"),
        ({"from_pretrained_kwargs": {"trust_remote_code": True}}, "trust_remote_code is refused: no code that comes"),
        ({"from_pretrained_kwargs": {"attn_implementation": "sdpa"}}, "attn_implementation is eager in a bridge"),
        ({"from_pretrained_kwargs": {"dtype": "float16"}}, "dtype is an option of its own"),
        ({"from_pretrained_kwargs": {"fold_ln": False}}, "fold_ln is an option of model.backend, for its compat"),
    ],
)
def test_options_that_cannot_be(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        TransformerBridgeOptions(**options)


def test_what_cannot_be_loaded_is_said(tmp_path: Path) -> None:
    def loading(name: Any, options: Any = None, **config: Any) -> None:
        saekit.load_model(name, backend=options or OPTIONS["plain"], device="cpu", **config)

    with pytest.raises(ModelError, match="there is no model folder './nowhere'"):
        loading("./nowhere")
    with pytest.raises(ModelError, match=r"from_pretrained_kwargs do not apply to 'saekit/tiny-python': \['variant'\]"):
        loading("saekit/tiny-python", TransformerBridgeOptions(from_pretrained_kwargs={"variant": "fp16"}))
    with pytest.raises(ModelError, match="neither config.json nor hooked_transformer.json"):
        loading(tmp_path)
    with pytest.raises(ModelError, match=r"the model 'pythia-14n' cannot be loaded.*Did you mean .*pythia-14m"):
        loading("pythia-14n")
    with pytest.raises(ModelError, match="there is no tokenizer folder './no-tokenizer'"):
        loading(causal_lm_folder("gpt2"), TransformerBridgeOptions(tokenizer="./no-tokenizer"))
    with pytest.raises(ModelError, match=r"the forward of .* does not take \['foo'\] \(model.backend.forward_kwargs\)"):
        bridge("gpt2", TransformerBridgeOptions(forward_kwargs={"foo": 1})).run(TOKENS, want="logits")
    from transformers import CTRLConfig, CTRLLMHeadModel

    folder = shutil.copytree(TOKENIZER, tmp_path / "ctrl", ignore=shutil.ignore_patterns("hooked*", "model*"))
    shape = {"vocab_size": 2048, "n_positions": 16, "n_embd": 8, "dff": 8, "n_layer": 1, "n_head": 2}
    CTRLLMHeadModel(CTRLConfig(**shape)).save_pretrained(folder)
    with pytest.raises(ModelError, match="makes no bridge of .*, a CTRLLMHeadModel: .*AutoModelForCausalLM"):
        loading(folder)
    with pytest.raises(ModelError, match="cannot be processed as for a HookedTransformer: .*rotary"):
        bridge("llama", TransformerBridgeOptions(compatibility_mode=True, refactor_factored_attn_matrices=True))


def test_forward_options_reach_the_model() -> None:
    last = bridge("gpt2", TransformerBridgeOptions(forward_kwargs={"logits_to_keep": 2})).run(TOKENS, want="logits")
    assert torch.allclose(last.logits, shared("gpt2").run(TOKENS, want="logits").logits[:, -2:], atol=1e-5)


def test_random_numbers_stay_where_they_were() -> None:
    causal_lm_folder("gpt2")  # of which making it draws some
    state = torch.get_rng_state()
    saekit.load_model(device="cpu", backend=COMPATIBLE)
    bridge("gpt2")
    assert torch.equal(state, torch.get_rng_state())


def test_types_of_numbers() -> None:
    found = bridge("llama", dtype="bfloat16").run(TOKENS, read=["blocks.1.hook_resid_post"], want="logits")
    assert found.held["blocks.1.hook_resid_post"].dtype == found.logits.dtype == torch.bfloat16
    assert saekit.load_model(dtype="float64", device="cpu", backend=COMPATIBLE).unembedding()[0].dtype == torch.float64
    with pytest.raises(ConfigError, match="model.compile.*is not for TransformerBridge"):
        model = ModelConfig(name=str(causal_lm_folder("gpt2")), compile=True)
        saekit.default_manager().build("model_backends", COMPATIBLE, model=model, loaded=None)


@pytest.mark.usefixtures("version_4")
def test_hooked_transformer_where_there_is_none_any_more() -> None:
    """It is a bridge in compatibility mode; what only HookedTransformer has is refused before anything is loaded."""
    assert type(saekit.load_model(device="cpu")).__name__ == "BridgeBackend"
    of_names = HookedTransformerOptions(from_pretrained_kwargs={"n_ctx": 32, "fold_ln": False})
    with pytest.raises(ConfigError, match=r"from_pretrained_kwargs.n_ctx: transformer_lens 4.3.0 is installed, which"):
        saekit.load_model("gpt2", backend=of_names)
    with pytest.raises(ModelError, match="from_pretrained_kwargs do not apply to 'saekit/tiny-python'"):
        saekit.load_model(backend=HookedTransformerOptions(from_pretrained_kwargs={"fold_ln": True}))
    saekit.load_model(backend=HookedTransformerOptions(from_pretrained_kwargs={"fold_ln": False}), device="cpu")
    with pytest.raises(ConfigError, match="model.compile: transformer_lens 4.3.0 .*pip install 'transformer-lens<4'"):
        model = ModelConfig(compile=True)
        saekit.default_manager().build("model_backends", "HookedTransformer", model=model, loaded=None)
    lens = SimpleNamespace(run_with_hooks=None, hook_dict={}, cfg=None, tokenizer=None)
    with pytest.raises(ModelError, match="the cfg of the model, a SimpleNamespace, lacks d_vocab and n_ctx"):
        saekit.load_model(lens, backend="HookedTransformer")
    with pytest.raises(ModelError, match="model must be a HookedTransformer, found dict"):
        saekit.load_model({}, backend="HookedTransformer")


@pytest.mark.usefixtures("version_4")
def test_mamba_says_which_transformer_lens_it_needs() -> None:
    options = HookedMambaOptions(tokenizer=str(TOKENIZER))
    with pytest.raises(
        MissingPackageError, match=r"transformer_lens 3 alone, and 4.3.0 is installed.*'transformer-lens<4'"
    ):
        saekit.load_model("state-spaces/mamba-130m", backend=options)
    plugin = importlib.import_module("saekit_plugins.backends.hooked_mamba")
    (entry,) = plugin.saekit_register_model_backends()
    assert "which needs transformer_lens 3" in entry.summary


def test_a_hooked_transformer_that_gpt2_cannot_compute() -> None:
    options = {"n_layers": 1, "d_model": 8, "n_ctx": 4, "d_head": 4, "d_vocab": 9, "act_fn": "gelu"}
    assert gpt2_config(options | {"use_local_attn": False, "seed": 3}, "it").n_head == 2
    wrong = {"positional_embedding_type": "rotary", "rotary_dim": 4, "act_fn": "solu_ln"}
    with pytest.raises(ModelError) as found:
        gpt2_config(options | wrong, "the model")
    message = (
        "the model has act_fn = 'solu_ln', positional_embedding_type = 'rotary', rotary_dim = 4, which GPT-2 has not"
    )
    assert message in str(found.value)
    assert "pip install 'transformer-lens<4'" in str(found.value)
    with pytest.raises(ModelError, match="d_head = 4"):
        gpt2_config(options | {"n_heads": 4}, "the model")
