"""Models without weights, beside the models that they are the outlines of."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from saekit_plugins.backends.hooked_mamba import HookedMambaOptions
from saekit_plugins.backends.hooked_transformer import HookedTransformerOptions
from saekit_plugins.backends.huggingface import HuggingFaceOptions
from saekit_plugins.backends.lens_versions import has_hooked_transformer
from saekit_plugins.backends.transformer_bridge import TransformerBridgeOptions
from support.outlines import CONFIGS, put_in_cache
from support.tiny import TOKENIZER, hooked_mamba, needs_transformer_lens_3, tokenizer

import saekit
from saekit.config import ModelConfig
from saekit.errors import ModelError
from saekit.plugins.building import outlined

TOKENS = torch.randint(1, 2000, (2, 12), generator=torch.Generator().manual_seed(0))
SIZES = {"vocab_size": 2048, "n_positions": 64, "n_embd": 16, "n_layer": 2, "n_head": 2}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GPT-2 of Hugging Face, and a Mamba."""
    from transformers import GPT2Config, GPT2LMHeadModel

    base = tmp_path_factory.mktemp("models")
    GPT2LMHeadModel(GPT2Config(**SIZES, bos_token_id=0, eos_token_id=0)).save_pretrained(base / "gpt2")
    tokenizer().save_pretrained(base / "gpt2")
    if not has_hooked_transformer():  # nor a HookedMamba
        return base
    mamba = hooked_mamba()  # which imports mamba-lens without its dependencies' warnings
    from mamba_lens.HookedMamba import (
        convert_hooked_mamba_config_to_original_config,
        convert_hooked_state_dict_to_original_state_dict,
    )

    (base / "mamba").mkdir()
    config = convert_hooked_mamba_config_to_original_config(mamba.cfg)
    (base / "mamba/config.json").write_text(json.dumps({k: v for k, v in config.items() if k != "initializer_cfg"}))
    weights = convert_hooked_state_dict_to_original_state_dict(mamba.cfg, mamba.state_dict())
    torch.save(weights, base / "mamba/pytorch_model.bin")
    return base


MODELS: dict[str, tuple[Any, str]] = {
    "native": (HookedTransformerOptions(), "saekit/tiny-python"),
    "transformer_lens": (HookedTransformerOptions(), "gpt2"),
    "not folded": (HookedTransformerOptions(from_pretrained_kwargs={"fold_ln": False}), "gpt2"),
    "transformers": (HuggingFaceOptions(), "gpt2"),
    "bridge": (TransformerBridgeOptions(), "gpt2"),
    "compatible bridge": (TransformerBridgeOptions(compatibility_mode=True), "gpt2"),
    "bridge of a native folder": (TransformerBridgeOptions(), "saekit/tiny-python"),
    "mamba": (HookedMambaOptions(tokenizer=str(TOKENIZER), forward_kwargs={"fast_conv": False}), "mamba"),
}


def outline(options: Any, model: ModelConfig) -> Any:
    item = saekit.default_manager().find("model_backends", options)
    return outlined(item, options, model=model)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # mamba-lens leaves config.json open
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", MODELS)
def test_an_outline_is_of_its_model(folders: Path, kind: str, dtype: Any) -> None:
    if kind == "mamba":
        needs_transformer_lens_3()
        if dtype != "float32":
            pytest.skip("mamba-lens runs in float32 alone")
    options, name = MODELS[kind]
    model = ModelConfig(name=str(folders / name) if (folders / name).is_dir() else name, dtype=dtype, device="cpu")
    made = outline(options, model)
    loaded = saekit.default_manager().build("model_backends", options, model=model, loaded=None)
    for value in ("name", "n_ctx", "d_vocab"):
        assert getattr(made, value) == getattr(loaded, value), value
    assert made.hook_names() == loaded.hook_names()
    assert made.memory_bytes() == loaded.memory_bytes()
    assert all(value.is_meta for value in (*made.model.parameters(), *made.model.buffers()))
    switched_off = ("_in", "_input", "hook_h")  # which do not run as models are configured
    begun = ("blocks.1.hook_", "transformer.h.1.mlp", "hook_embed")
    read = {hook for hook in loaded.hook_names() if hook.startswith(begun) and not hook.endswith(switched_off)}
    own, its = loaded.run(TOKENS, read=read, want="loss"), made.run(TOKENS, read=read, want="loss")
    assert len(read) > 3
    for hook in read:
        assert (its.held[hook].shape, its.held[hook].dtype) == (own.held[hook].shape, own.held[hook].dtype), hook
        assert its.held[hook].is_meta
    assert its.loss.shape == own.loss.shape
    assert made.fingerprint() is None
    with pytest.raises(ModelError, match="has no tokenizer"):
        made.tokenize("x")


def test_what_the_hub_has_not(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ModelError, match="the model 'pythia-14m' cannot be loaded: We couldn't connect"):
        outline(HookedTransformerOptions(), ModelConfig(name="pythia-14m"))
    unknown = "transformer_lens knows no model 'gpt-2'" if has_hooked_transformer() else "'gpt-2' cannot be loaded"
    with pytest.raises(ModelError, match=f"{unknown}.* Did you mean 'gpt2'"):
        outline(HookedTransformerOptions(), ModelConfig(name="gpt-2"))
    with pytest.raises(ModelError, match="the configuration of the model 'nobody/nothing' cannot be loaded"):
        outline(HuggingFaceOptions(), ModelConfig(name="nobody/nothing"))
    needs_transformer_lens_3()
    with pytest.raises(ModelError, match="the configuration of the Mamba model 'nobody/mamba' cannot be loaded"):
        outline(HookedMambaOptions(), ModelConfig(name="nobody/mamba"))


def test_of_a_quantized_model_nothing_is_said() -> None:
    put_in_cache("somebody/small", CONFIGS["gpt2"] | {"quantization_config": {"quant_method": "gptq", "bits": 4}})
    with pytest.raises(ModelError, match="is quantized: how large it is shows when it is loaded"):
        outline(HuggingFaceOptions(), ModelConfig(name="somebody/small"))


def test_of_names_on_the_hub_only_the_configuration_is_needed() -> None:
    for name, config in CONFIGS.items():
        put_in_cache(name, config)
    parameters = {
        "gpt2": 124_439_808, "EleutherAI/pythia-160m-deduped": 162_322_944, "google/gemma-2-2b": 2_614_341_888,
    }  # fmt: skip
    for name, count in parameters.items():
        found = outline(HuggingFaceOptions(), ModelConfig(name=name, dtype="bfloat16"))
        assert sum(value.numel() for value in found.model.parameters()) == count, name
