"""A model passed from code stays as it was, and one of another kind is told what to do."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from saekit_plugins.backends.hooked_mamba import HookedMambaOptions
from saekit_plugins.backends.hooked_transformer import HookedTransformerOptions
from saekit_plugins.backends.huggingface import HuggingFaceOptions
from support.tiny import hooked_mamba, hooked_transformer, needs_transformer_lens_3, run_config, tokenizer

import saekit
from saekit.config import ModelConfig
from saekit.errors import ConfigError, DataError, ModelError


def gpt2() -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=8, n_head=2, n_positions=16, vocab_size=20))


TOKENS = torch.randint(1, 2000, (2, 20), generator=torch.Generator().manual_seed(0))
SMALL = {"training": {"training_tokens": 600}, "evals": {"n_contexts": 2, "split": "heldout"}}


def backend(model: object, choice: object = "HookedTransformer", **config: Any) -> Any:
    return saekit.default_manager().build("model_backends", choice, model=ModelConfig(**config), loaded=model)


def partly_training() -> Any:
    """Some parameters learn and some do not, and some modules are in training mode."""
    model = hooked_transformer().train()
    model.blocks[0].eval()
    model.unembed.W_U.requires_grad_(False)
    return model


def state(model: Any) -> tuple[list[bool], list[bool]]:
    return [p.requires_grad for p in model.parameters()], [m.training for m in model.modules()]


def fails(work: Callable[[], object]) -> None:
    with pytest.raises(DataError, match="'text'"):
        work()


@pytest.mark.parametrize("what", ["train", "a list", "plan", "cache", "pretokenize", "a failure"])
def test_a_model_stays_as_it_was(tmp_path: Path, what: str) -> None:
    model = partly_training()
    before = state(model)
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    config = run_config(tmp_path, **SMALL, activations={"cache": {"folder": str(tmp_path / "c"), "tokens": 600}})
    if what == "train":
        result = saekit.train(config, model=model)
        assert result.backend.run(result.held_out, want="loss").loss.isfinite().all(), "it can still be used"
        assert not result.backend.run(result.held_out, want="loss").loss.requires_grad
    elif what == "a list":
        saekit.train(saekit.grid(config, {"training.seed": [1, 2]}), model=model)
    elif what == "plan":
        assert not saekit.plan(config, model=model).problems
    elif what == "cache":
        saekit.cache_activations(config, model=model)
    elif what == "pretokenize":
        folder = str(tmp_path / "p")
        saekit.pretokenize(
            {"folder": folder, "max_contexts": 9, "verbose": False, "dataset": {"context_size": 32}}, model=model
        )
    else:
        broken = [{"text": "some words " * 9}, {"body": 1}]  # long before the run has its tokens
        config["evals"] = {"run": [], "held_out_every": 0}
        fails(lambda: saekit.train(config, model=model, dataset=broken))
    assert state(model) == before
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    model(TOKENS, return_type="loss").backward()
    assert any(p.grad is not None for p in model.parameters()), "and it can be trained"


def test_forwards_are_those_of_evaluation_mode() -> None:
    """Dropout does nothing, also beside a forward in another thread, and is on again afterwards."""
    import threading

    model = hooked_transformer()
    model.blocks[0].mlp.register_module("dropout", torch.nn.Dropout(0.5))
    run = model.blocks[0].mlp.forward
    model.blocks[0].mlp.forward = lambda x: model.blocks[0].mlp.dropout(run(x))
    expected = backend(model.eval()).run(TOKENS, want="loss").loss
    found = backend(model.train())
    losses: list[Any] = [None] * 6

    def work(number: int) -> None:
        for _ in range(20):
            losses[number] = found.run(TOKENS, want="loss").loss
            assert torch.equal(losses[number], expected)

    threads = [threading.Thread(target=work, args=[number]) for number in range(len(losses))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(loss, expected) for loss in losses)
    assert all(module.training for module in model.modules())
    with pytest.raises(ZeroDivisionError):
        found.run(TOKENS, replace={"blocks.0.hook_resid_post": lambda activation: activation * (1 / 0)}, want="loss")
    assert all(module.training for module in model.modules()), "also after an error"


def test_training_gives_the_same_as_on_a_frozen_model(tmp_path: Path) -> None:
    config = run_config(tmp_path, **SMALL, model={"autocast": True})
    frozen = hooked_transformer().eval().requires_grad_(False)
    one = saekit.train(config, model=frozen)
    other = saekit.train(config, model=hooked_transformer().train())
    assert torch.equal(one.sae.W_enc, other.sae.W_enc)
    assert one.metrics == other.metrics


def test_autocast_of_the_caller_keeps_no_copy_of_the_weights() -> None:
    """Such a copy, made where there are no gradients, would end the caller's own training."""
    model = hooked_transformer()
    found = backend(model, autocast=True)
    with torch.autocast("cpu", torch.bfloat16):
        found.run(TOKENS, want="loss")
        model(TOKENS, return_type="loss").backward()


def test_a_mamba_without_its_backend_is_told_which_one() -> None:
    with pytest.raises(ModelError, match="a HookedMamba, and its backend must be named: model.backend=HookedMamba"):
        backend(hooked_mamba())
    with pytest.raises(ModelError, match="found HookedTransformer. .*: model.backend=HookedTransformer"):
        backend(hooked_transformer(), "HookedMamba")


def test_other_objects_are_told_what_to_do() -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    with pytest.raises(ModelError, match="found str. A model is chosen by its name with model.name = 'gpt2'"):
        backend("gpt2")
    hf = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_positions=8, n_embd=4, n_layer=1, n_head=1))
    with pytest.raises(ModelError, match="found GPT2LMHeadModel. .* named: model.backend=AutoModelForCausalLM"):
        backend(hf)
    model = hooked_transformer()
    with pytest.raises(ModelError, match="found str. A model is chosen by its name with model.name = 'm'"):
        backend("m", "HookedMamba")
    vars(model)["cfg"] = object()
    with pytest.raises(ModelError, match="the cfg of the model, a HookedTransformer, lacks d_vocab and n_ctx"):
        backend(model)


def test_a_mamba_in_half_precision_is_refused_before_it_fails() -> None:
    half = torch.nn.Module.to(hooked_mamba(), torch.bfloat16)
    with pytest.raises(
        ModelError, match=r"mamba-lens runs no model in bfloat16 without .*: choose float32 \(model.dtype\)"
    ):
        backend(half, "HookedMamba")


def test_fast_paths_of_mamba_without_their_packages() -> None:
    from saekit_plugins.backends.hooked_mamba import HookedMambaOptions

    choice = HookedMambaOptions(forward_kwargs={"fast_conv": True, "fast_ssm": True, "warn_disabled_hooks": False})
    with pytest.raises(ConfigError) as caught:
        backend(hooked_mamba(), choice)
    assert [path for path, _ in caught.value.problems] == [
        "model.backend.forward_kwargs.fast_conv", "model.backend.forward_kwargs.fast_ssm",
    ]  # fmt: skip
    assert "pip install causal-conv1d (for CUDA), or leave it out" in str(caught.value)
    assert "pip install mamba-ssm" in str(caught.value)
    slow = HookedMambaOptions(forward_kwargs={"fast_conv": False, "fast_ssm": False})
    assert backend(hooked_mamba(), slow).run(TOKENS, want="loss").loss.isfinite().all()


def unknown_tokens_only() -> Any:
    """A tokenizer with an unknown token and neither BOS nor EOS."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"<unk>": 0} | {f"w{n}": n + 1 for n in range(99)}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>")


def test_the_unknown_token_is_not_taken_for_bos(tmp_path: Path) -> None:
    """transformer_lens gives a tokenizer without BOS the name of one, and the library gives that the id of <unk>."""
    needs_transformer_lens_3()
    from transformer_lens import HookedTransformer, HookedTransformerConfig
    from transformers import AutoTokenizer

    unknown_tokens_only().save_pretrained(tmp_path / "t")
    lone = AutoTokenizer.from_pretrained(tmp_path / "t")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        shape = {"n_layers": 1, "d_model": 8, "n_ctx": 64, "d_head": 4, "n_heads": 2, "d_mlp": 8, "act_fn": "gelu"}
        model = HookedTransformer(HookedTransformerConfig(**shape, d_vocab=100, device="cpu"), lone)
    assert (model.tokenizer.bos_token_id, model.tokenizer.unk_token_id) == (0, 0), "the trap"
    assert backend(model).special_tokens == {"bos": None, "eos": None, "sep": None}
    config = run_config(tmp_path / "r", site={"hook_name": "blocks.0.hook_resid_post"}, evals={"split": None})
    with pytest.raises(DataError) as caught:
        saekit.train(config, model=model, dataset=[{"text": "w1 w2 w3 " * 99}] * 99)
    assert "dataset.prepend_bos asks for the tokenizer's bos token, and it has none" in str(caught.value)
    assert "dataset.sequence_separator_token asks for the tokenizer's bos token" in str(caught.value), "both at once"
    # The embedded model's one special token is all of them, and so are those of GPT-2.
    assert backend(hooked_transformer()).special_tokens["bos"] == tokenizer().bos_token_id == 0


@pytest.mark.parametrize(
    ("make", "options", "name"),
    [
        (hooked_transformer, HookedTransformerOptions(from_pretrained_kwargs={"fold_ln": False}),
         "from_pretrained_kwargs: is {'fold_ln': False}"),
        (hooked_mamba, HookedMambaOptions(tokenizer="somebody/tokens"), "tokenizer: is 'somebody/tokens'"),
        (gpt2, HuggingFaceOptions(attn_implementation="eager"), "attn_implementation: is 'eager'"),
        (gpt2, HuggingFaceOptions(tokenizer="somebody/tokens", revision="v2"), "revision: is 'v2'"),
    ],
)  # fmt: skip
def test_options_of_loading_are_not_for_a_model_that_is_there(
    make: Callable[[], object], options: object, name: str
) -> None:
    words = (
        f"model.backend.{re.escape(name)}, which says how a model is loaded, and this one was passed from code: leave"
    )
    with pytest.raises(ConfigError, match=words):
        backend(make(), options)


def test_missing_tokens_are_told_with_every_other_fault(tmp_path: Path) -> None:
    """By train, cache and pretokenize at once, and by a plan each by itself."""
    model = hooked_transformer()
    model.tokenizer = unknown_tokens_only()
    tokens = {"begin_sequence_token": "eos", "sequence_separator_token": "sep", "context_size": 65}
    site = {"hook_name": "blocks.7.hook_resid_post"}
    config = run_config(tmp_path / "r", site=site, dataset=tokens, evals={"split": None})
    dataset = [{"text": "w1 w2 w3 " * 99}] * 99
    said = [
        "dataset.context_size: is 65, but the model 'custom' takes at most 64 tokens",
        "the model 'custom' has no hook 'blocks.7.hook_resid_post' (site.hook_name)",
        "dataset.prepend_bos asks for the tokenizer's bos token, and it has none. It has none at all; set it to false",
        "dataset.begin_sequence_token asks for the tokenizer's eos token, and it has none.",
        "dataset.sequence_separator_token asks for the tokenizer's sep token, and it has none.",
    ]
    runs: list[Callable[[], object]] = [
        lambda: saekit.train(config, model=model, dataset=dataset),
        lambda: saekit.train(saekit.grid(config, {"training.seed": [1, 2]}), model=model, dataset=dataset),
        lambda: saekit.cache_activations(config, model=model, dataset=dataset),
    ]
    for run in runs:
        with pytest.raises(ConfigError) as caught:
            run()
        assert [text for text in said if text not in str(caught.value)] == []
        assert len(caught.value.problems) == len(said)
    found = saekit.plan(config, model=model, dataset=dataset)
    assert all(sum(problem.startswith(text) for problem in found.problems) == 1 for text in said), found.problems
    assert len(found.problems) == len(said)
    made = {"folder": str(tmp_path / "p"), "verbose": False, "dataset": tokens | {"column": "body"}}
    with pytest.raises(ConfigError) as caught:
        saekit.pretokenize(made, model=model, dataset=dataset)
    assert [text for text in said if text not in str(caught.value)] == [said[1]]
    assert "has no column 'body'" in str(caught.value)
