"""Model backends against the libraries themselves."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from support.tiny import TOKENIZER, hooked_mamba, hooked_transformer, run_config, tokenizer

import saekit
from saekit.config import ModelConfig
from saekit.data import Corpus
from saekit.errors import ModelError
from saekit.protocols import ModelBackend

TOKENS = torch.randint(1, 2000, (3, 20), generator=torch.Generator().manual_seed(0))


def backend(model: object | None = None, choice: object = "HookedTransformer", **config: object) -> ModelBackend:
    made: ModelBackend = saekit.default_manager().build(
        "model_backends",
        choice,
        model=ModelConfig(**config),
        loaded=model,  # type: ignore[arg-type]
    )
    return made


@pytest.mark.parametrize(
    "hooks",
    [
        {"blocks.0.hook_resid_pre"},
        {"blocks.1.hook_resid_pre"},
        {"blocks.1.hook_resid_pre", "blocks.0.mlp.hook_post"},
        {"blocks.0.hook_resid_post"},
        {"blocks.1.attn.hook_z", "blocks.1.hook_resid_pre"},
        {"hook_embed"},
        {"ln_final.hook_normalized", "blocks.0.hook_mlp_out"},
    ],
)
def test_activations_are_those_of_a_whole_forward(hooks: set[str]) -> None:
    model = hooked_transformer()
    _, cache = model.run_with_cache(TOKENS)
    held = backend(model).run(TOKENS, read=hooks).held
    assert set(held) == hooks
    for name in hooks:
        assert torch.equal(held[name], cache[name])


def test_the_forward_stops_before_the_first_block_that_is_not_needed() -> None:
    model = hooked_transformer(n_layers=3)
    ran: list[int] = []
    for number, block in enumerate(model.blocks):
        block.register_forward_pre_hook(lambda module, args, number=number: ran.append(number))
    for hook, blocks in {
        "blocks.1.hook_resid_pre": [0],
        "blocks.1.hook_resid_post": [0, 1],
        "hook_embed": [],
        "ln_final.hook_normalized": [0, 1, 2],
    }.items():
        ran.clear()
        backend(model).run(TOKENS, read={hook})
        assert ran == blocks


def test_loss_with_and_without_replacements() -> None:
    model = hooked_transformer()
    expected = model(TOKENS, return_type="loss", loss_per_token=True)
    found = backend(model)
    assert torch.allclose(found.run(TOKENS, want="loss").loss, expected)
    same = found.run(TOKENS, replace={"blocks.0.hook_resid_post": lambda activation: activation}, want="loss").loss
    assert torch.allclose(same, expected)
    zeroed = found.run(TOKENS, replace={"blocks.1.hook_resid_post": torch.zeros_like}, want="loss").loss
    final = model.unembed(model.ln_final(torch.zeros(3, 20, 16)))
    assert torch.allclose(zeroed, model.loss_fn(final, TOKENS, per_token=True), atol=1e-5)
    assert not model.blocks[0].hook_resid_post.fwd_hooks, "nothing stays attached"


def test_the_embedded_model_is_what_its_card_says() -> None:
    found = backend(name="saekit/tiny-python")
    assert found.n_ctx == 128
    card = (TOKENIZER / "README.md").read_text()
    unigram, bigram, stated = (
        float(line.split("|")[2].strip(" *")) for line in card.splitlines() if line.startswith("|") and "." in line
    )
    assert stated < bigram - 0.5 < unigram
    config = saekit.load_config({"evals": {"split": "heldout", "n_contexts": 400}})
    contexts = Corpus.of(config.dataset, config.evals).held_out(found, seed=0)
    # Contexts of a file are alike: a quarter of all says what all say, and the first hundred do not.
    loss = found.run(contexts[3::4], want="loss").loss.mean().item()
    assert abs(loss - stated) < 0.15, "a sample of the held-out text"
    assert sum(p.stat().st_size for p in TOKENIZER.iterdir()) < 3_000_000


def test_a_hugging_face_folder(tmp_path: Path) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    hf = GPT2LMHeadModel(
        GPT2Config(vocab_size=2048, n_positions=64, n_embd=16, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0)
    ).eval()
    hf.save_pretrained(tmp_path / "gpt2-folder")
    tokenizer().save_pretrained(tmp_path / "gpt2-folder")
    found = backend(name=str(tmp_path / "gpt2-folder"))
    with torch.no_grad():
        expected = torch.nn.functional.cross_entropy(
            hf(TOKENS).logits[:, :-1].flatten(0, 1), TOKENS[:, 1:].flatten(), reduction="none"
        )
    assert torch.allclose(found.run(TOKENS, want="loss").loss.flatten(), expected, atol=1e-4)
    assert found.tokenize("def f(x):") == tokenizer()("def f(x):")["input_ids"]
    processing = ("fold_ln", "center_writing_weights", "center_unembed", "fold_value_biases")
    untouched = _options(from_pretrained_kwargs=dict.fromkeys(processing, False))
    raw = backend(name=str(tmp_path / "gpt2-folder"), choice=untouched)
    residual = raw.run(TOKENS, read={"blocks.1.hook_resid_pre"}).held["blocks.1.hook_resid_pre"]
    with torch.no_grad():
        expected = hf(TOKENS, output_hidden_states=True).hidden_states[1]
    assert torch.allclose(residual, expected, atol=1e-5), "unprocessed, the residual stream is the model's own"
    with pytest.raises(ModelError, match=r"can be \('fold_ln', .* found \['center'\]"):
        backend(name=str(tmp_path / "gpt2-folder"), choice=_options(from_pretrained_kwargs={"center": 1}))
    with pytest.raises(ModelError, match=r"neither config.json nor hooked_transformer.json"):
        backend(name=str(tmp_path))


def _options(**options: object) -> object:
    from saekit_plugins.backends.hooked_transformer import HookedTransformerOptions

    return HookedTransformerOptions(**options)  # type: ignore[arg-type]


def test_wrong_models() -> None:
    with pytest.raises(ModelError, match="model must be a HookedTransformer, found dict"):
        backend({})
    with pytest.raises(ModelError, match="model must be a HookedMamba, found HookedTransformer"):
        backend(hooked_transformer(), "HookedMamba")
    model = hooked_transformer()
    model.tokenizer = None
    with pytest.raises(ModelError, match="has no tokenizer, so it cannot read text"):
        backend(model).tokenize("x")


def test_mamba_activations_and_losses() -> None:
    model = hooked_mamba()
    found = backend(model, "HookedMamba")
    with torch.no_grad():
        expected = model(TOKENS, return_type="loss", loss_per_token=True)
        _, cache = model.run_with_cache(TOKENS, names_filter=["blocks.1.hook_resid_pre", "blocks.1.hook_ssm_input"])
    assert torch.allclose(found.run(TOKENS, want="loss").loss, expected)
    for name in ("blocks.1.hook_resid_pre", "blocks.1.hook_ssm_input"):
        assert torch.allclose(found.run(TOKENS, read={name}).held[name], cache[name])


def test_an_sae_trains_on_a_mamba(tmp_path: Path) -> None:
    config = run_config(
        tmp_path, model={"backend": "HookedMamba"}, site={"hook_name": "blocks.0.hook_resid_post"},
        training={"training_tokens": 8000, "lr": 0.01}, sae={"l1_coefficient": 0.01},
    )  # fmt: skip
    result = saekit.train(config, model=hooked_mamba())
    assert result.sae.d_in == 32
    assert result.metrics["evals/explained_variance"] > 0.5


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # mamba-lens leaves config.json open
def test_a_mamba_folder(tmp_path: Path) -> None:
    model = hooked_mamba()
    from mamba_lens.HookedMamba import (
        convert_hooked_mamba_config_to_original_config,
        convert_hooked_state_dict_to_original_state_dict,
    )

    config = convert_hooked_mamba_config_to_original_config(model.cfg)
    (tmp_path / "config.json").write_text(json.dumps({k: v for k, v in config.items() if k != "initializer_cfg"}))
    torch.save(
        convert_hooked_state_dict_to_original_state_dict(model.cfg, model.state_dict()), tmp_path / "pytorch_model.bin"
    )
    from saekit_plugins.backends.hooked_mamba import HookedMambaOptions

    found = backend(name=str(tmp_path), choice=HookedMambaOptions(tokenizer=str(TOKENIZER)))
    with torch.no_grad():
        assert torch.allclose(
            found.run(TOKENS, want="loss").loss, model(TOKENS, return_type="loss", loss_per_token=True), atol=1e-5
        )
    with pytest.raises(ModelError, match="there is no model folder './nowhere'"):
        backend(name="./nowhere", choice=HookedMambaOptions(tokenizer=str(TOKENIZER)))


def test_without_mamba_lens_the_message_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    import saekit.plugins.registry

    real = saekit.plugins.registry._importable
    monkeypatch.setattr(saekit.plugins.registry, "_importable", lambda name: name != "mamba_lens" and real(name))
    with pytest.raises(saekit.errors.MissingPackageError, match=r"pip install 'saekit\[mamba\]'"):
        backend(choice="HookedMamba")


def test_the_models_autocast_is_not_the_replacements() -> None:
    plugins = saekit.default_manager()
    found = plugins.build(
        "model_backends", "HookedTransformer", model=ModelConfig(autocast=True), loaded=hooked_transformer()
    )
    seen = []

    def replace(activation: torch.Tensor) -> torch.Tensor:
        seen.append((torch.eye(16) @ torch.eye(16)).dtype)
        return activation

    found.run(TOKENS, replace={"blocks.0.hook_resid_post": replace}, want="loss")
    assert seen == [torch.float32]


def test_a_fingerprint_tells_weights_apart() -> None:
    one, again, other = (backend(hooked_transformer(seed=seed)).fingerprint() for seed in (0, 0, 1))
    assert one == again != other
    model = hooked_transformer()
    for parameter in model.parameters():
        parameter.data.mul_(1.5)
    assert backend(model).fingerprint() != one
    for parameter in model.parameters():
        parameter.data.mul_(1 / 1.5)
    assert backend(model).fingerprint() == one, "up to rounding"
