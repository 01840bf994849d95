"""Names of transformer_lens for modules of transformers: what is there is what transformer_lens holds."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from support.causal_lms import BLOCKS, KINDS, LAYERS, TOKENS, causal_lm_folder, make_causal_lm
from support.tiny import hooked_mamba, hooked_transformer

import saekit
from saekit import ModelError
from saekit.abilities import TranslatesHooks
from saekit.config import ModelConfig
from saekit.runs.opening import check_hooks

UNPROCESSED = dict.fromkeys(("fold_ln", "center_writing_weights", "center_unembed", "fold_value_biases"), False)


def built(options: Any, loaded: object | None = None, **config: Any) -> Any:
    return saekit.default_manager().build("model_backends", options, model=ModelConfig(**config), loaded=loaded)


@cache
def both(kind: str) -> tuple[Any, Any]:
    """The backend of transformers, and that of transformer_lens without its changes to weights."""
    from saekit_plugins.backends.hooked_transformer import HookedTransformerOptions

    name = str(causal_lm_folder(kind))
    lens = built(HookedTransformerOptions(from_pretrained_kwargs=UNPROCESSED), name=name)
    return built("AutoModelForCausalLM", name=name), lens


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_there_is_what_transformer_lens_holds(kind: str) -> None:
    found, lens = both(kind)
    assert isinstance(found, TranslatesHooks)
    assert isinstance(lens, TranslatesHooks)
    lens.model.set_use_hook_mlp_in(True)
    names = {name: path for name in lens.hook_names() if (path := found.hook_like(name)) is not None}
    expected = lens.run(TOKENS, read=names, want="logits").held
    held = found.run(TOKENS, read=set(names.values()), want="logits").held
    for name, path in names.items():
        assert torch.allclose(held[path], expected[name].flatten(2), atol=1e-5, rtol=1e-5), (name, path)
    common = {"hook_resid_pre", "hook_resid_post", "hook_attn_out", "hook_mlp_out", "hook_mlp_in", "attn.hook_z",
              "mlp.hook_pre", "mlp.hook_post"}  # fmt: skip
    heads = {"attn.hook_q", "attn.hook_k", "attn.hook_v", "mlp.hook_pre_linear"}
    inside = common | {"gpt2": {"hook_resid_mid"}, "neox": set()}.get(kind, heads | {"hook_resid_mid"})
    assert set(names) == {"hook_embed", *(f"blocks.{n}.{name}" for n in range(LAYERS) for name in inside)}


@pytest.mark.parametrize("kind", KINDS)
def test_modules_have_their_places_in_transformer_lens(kind: str) -> None:
    found, lens = both(kind)
    there = {path: name for path in found.hook_names() if (name := lens.hook_like(path)) is not None}
    assert len(there) >= 7 * LAYERS
    held = found.run(TOKENS, read=there, want="logits").held
    expected = lens.run(TOKENS, read=set(there.values()), want="logits").held
    for path, name in there.items():
        assert torch.allclose(held[path], expected[name].flatten(2), atol=1e-5, rtol=1e-5), (name, path)
    for n in range(LAYERS):
        assert there[f"{BLOCKS[kind]}.{n}"] == f"blocks.{n}.hook_resid_post"
        assert there[f"{BLOCKS[kind]}.{n}.input"] == f"blocks.{n}.hook_resid_pre"


@pytest.mark.parametrize(
    "family",
    ["gpt2", "gpt_neo", "neox", "gptj", "phi", "llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2",
     "gemma3_text", "olmo", "olmo2", "phi3"],
)  # fmt: skip
def test_what_attention_and_mlp_add_makes_the_residual_stream(family: str) -> None:
    """Of every family that is known, as its own forward has it."""
    found = built("AutoModelForCausalLM", make_causal_lm(family))

    def hook(name: str) -> str | None:
        like: str | None = found.hook_like(f"blocks.1.{name}")
        return like

    names = {name: hook(name) for name in (
        "hook_resid_pre", "hook_attn_out", "hook_resid_mid", "hook_mlp_out", "hook_resid_post", "hook_mlp_in",
    )}  # fmt: skip
    read = {path for path in names.values() if path is not None}
    held = found.run(TOKENS, read=read, want="logits").held
    at = {name: held[path] for name, path in names.items() if path is not None}
    before, after = at["hook_resid_pre"], at["hook_resid_post"]
    assert torch.allclose(before + at["hook_attn_out"] + at["hook_mlp_out"], after, atol=1e-5)
    if "hook_resid_mid" in at:
        assert torch.allclose(before + at["hook_attn_out"], at["hook_resid_mid"], atol=1e-6)
        assert torch.equal(at["hook_mlp_in"], at["hook_resid_mid"])
    else:
        assert family in ("neox", "gptj", "phi"), "their attention and MLP read the same"
        assert torch.equal(at["hook_mlp_in"], before)
    for name in ("attn.hook_z", "mlp.hook_post"):
        place = hook(name)
        assert place is not None
        assert place.endswith(".input")
        (projected,) = found.run(TOKENS, read={place.removesuffix(".input")}).held.values()
        assert projected.shape[-1] == before.shape[-1], "what is projected is as wide as the residual stream"
    (embedded,) = found.run(TOKENS, read={found.hook_like("hook_embed")}).held.values()
    table = found.model.get_input_embeddings()(TOKENS).detach()
    assert torch.allclose(embedded / embedded.norm(), table / table.norm(), atol=1e-6), "Gemma scales it"


def test_the_residual_stream_of_other_families_is_found_by_a_forward() -> None:
    found = built("AutoModelForCausalLM", make_causal_lm("stablelm"))
    assert found.hook_like("blocks.2.hook_resid_pre") == "model.layers.2.input"
    assert found.hook_like("blocks.2.hook_resid_post") == "model.layers.2"
    assert found.hook_like("blocks.2.hook_mlp_out") is None, "what is in a block of it, is not known"
    assert found.hook_like("blocks.9.hook_resid_post") is None


def test_a_name_of_its_own_is_itself_and_others_are_none() -> None:
    found, lens = both("gpt2")
    mamba = built("HookedMamba", hooked_mamba())
    for backend in (found, lens, mamba):
        assert all(backend.hook_like(name) == name for name in backend.hook_names())
        for name in ("blocks.1.ln1.hook_scale.x", "no.such.hook", "blocks.x.hook_resid_post", ""):
            assert backend.hook_like(name) is None
    for name in ("blocks.1.ln1.hook_normalized", "blocks.1.attn.hook_pattern", "ln_final.hook_normalized",
                 "hook_pos_embed", "blocks.1.attn.hook_q", "blocks.7.hook_resid_post"):  # fmt: skip
        assert found.hook_like(name) is None
    assert built("HookedTransformer", hooked_transformer()).hook_like("transformer.h.1") is None, "of no known family"


def test_an_unknown_name_that_another_library_has_for_a_place_is_answered_with_the_models_own() -> None:
    found, lens = both("llama")
    places = {"hook_resid_pre": ".input", "hook_resid_post": "", "hook_mlp_out": ".mlp"}
    for name, own in {f"blocks.1.{name}": f"model.layers.1{place}" for name, place in places.items()}.items():
        said = rf"has no hook '{name}'. Did you mean '{own}'\? It is what this model calls that place$"
        with pytest.raises(ModelError, match=said):
            found.run(TOKENS, read=[name])
        with pytest.raises(ModelError, match=said), found.attached({name: lambda held: held}):
            pass
        with pytest.raises(ModelError, match=rf"has no hook '{own}'. Did you mean '{name}'\? It is what this model"):
            lens.run(TOKENS, read=[own])
    with pytest.raises(ModelError, match=r"no hook 'blocks.9.hook_resid_pre'(\. It has|$)"):
        found.run(TOKENS, read=["blocks.9.hook_resid_pre"])
    bridge = built("TransformerBridge", name=str(causal_lm_folder("llama")))
    with pytest.raises(ModelError, match=r"no hook 'model.layers.1'. Did you mean 'blocks.1.hook_resid_post'\?"):
        bridge.run(TOKENS, read=["model.layers.1"])


def test_a_configuration_that_names_another_librarys_hook_is_told_the_models_own() -> None:
    found, _ = both("llama")
    with pytest.raises(ModelError, match=r"'blocks.1.hook_resid_pre' \(site\). Did you mean 'model.layers.1.input'\?"):
        check_hooks(found, [saekit.Site(hook_name="blocks.1.hook_resid_pre")], "site")
