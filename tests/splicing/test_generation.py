"""SAEs, and what is done to their features, while a model's own ``generate`` writes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.causal_lms import make_causal_lm
from support.saes import at, drawn_sae
from support.spliced import TOKENS, bridge, place, state
from torch import Tensor

import saekit
from saekit.errors import ModelError
from saekit.tokens import TokenChoice

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    # transformers has renamed it in 5.24; bridges of transformer_lens call it as it was.
    pytest.mark.filterwarnings("ignore:`past_key_values` is deprecated:FutureWarning"),
]

NEW = 6
Write = Callable[[Tensor, bool], Tensor]


def of_lens() -> tuple[Any, str, Write]:
    model = place("HookedTransformer").model

    def write(tokens: Tensor, cached: bool) -> Tensor:
        written: Tensor = model.generate(
            tokens, max_new_tokens=NEW, do_sample=False, stop_at_eos=False, use_past_kv_cache=cached, verbose=False
        )
        return written

    return model, "blocks.1.hook_resid_post", write


def of_bridge() -> tuple[Any, str, Write]:
    model = bridge()

    def write(tokens: Tensor, cached: bool) -> Tensor:
        options = {"max_new_tokens": NEW, "do_sample": False, "stop_at_eos": False, "verbose": False}
        written: Tensor = model.generate(tokens, use_past_kv_cache=cached, **options)
        return written

    return model, "blocks.1.hook_resid_post", write


def of_transformers(kind: str) -> tuple[Any, str, Write]:
    model = make_causal_lm(kind)
    place = {"gpt2": "transformer.h.1", "llama": "model.layers.1"}[kind]

    def write(tokens: Tensor, cached: bool) -> Tensor:
        written: Tensor = model.generate(
            tokens, max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False, use_cache=cached, pad_token_id=0,
            attention_mask=torch.ones_like(tokens),
        )  # fmt: skip
        return written

    return model, place, write


MODELS = {
    "HookedTransformer": of_lens,
    "TransformerBridge": of_bridge,
    "gpt2": lambda: of_transformers("gpt2"),
    "llama": lambda: of_transformers("llama"),
}


@pytest.fixture(scope="module", params=MODELS)
def writer(request: pytest.FixtureRequest) -> tuple[Any, str, Write]:
    return MODELS[request.param]()


def greedy(spliced: Any, tokens: Tensor) -> Tensor:
    """What greedy writing gives by whole forwards of the backend, one for each token."""
    for _ in range(NEW):
        logits = spliced.run(tokens, want="logits").logits
        tokens = torch.cat([tokens, logits[:, -1:].argmax(-1)], dim=1)
    return tokens


def steered(features: Tensor) -> Tensor:
    features = features.clone()
    features[..., 3] += 8
    features[..., 5] = 0
    return features


CHOICES: dict[str, dict[str, Any]] = {
    "every position": {},
    "all but the first": {"tokens": TokenChoice(seqpos_slice=(1, None))},
    "from the fifth on": {"tokens": TokenChoice(seqpos_slice=(5, None))},
    "all but some ids": {"tokens": TokenChoice(exclude=range(0, 2048, 3))},
    "as a mask says": {"mask": lambda tokens: tokens % 2 == 0},
}


@pytest.mark.parametrize("choice", CHOICES)
def test_writing_with_and_without_a_cache_is_what_whole_forwards_give(
    writer: tuple[Any, str, Write], choice: str
) -> None:
    model, hook, write = writer
    sae = at(drawn_sae(16, seed=4), hook)
    clean = write(TOKENS, True)
    if not torch.equal(clean, write(TOKENS, False)):
        pytest.skip("this library writes something else with a cache, of its own")
    before = state(model)
    with saekit.splice(model, sae, use_error_term=True, **CHOICES[choice]) as spliced:
        assert torch.equal(write(TOKENS, True), clean), "until somebody intervenes"
        spliced.hook(f"{hook}.hook_sae_acts_post", steered)
        expected = greedy(spliced, TOKENS)
        assert torch.equal(write(TOKENS, True), expected)
        assert torch.equal(write(TOKENS, False), expected)
        one = expected[:, : TOKENS.shape[1]][:1, :1]
        assert torch.equal(write(one, True), greedy(spliced, one)), "a prompt of one token after another prompt"
        assert torch.equal(write(one, False), greedy(spliced, one))
    assert not torch.equal(expected, clean)
    assert torch.equal(write(TOKENS, True), clean)
    assert state(model) == before


def test_a_forward_with_a_cache_knows_which_positions_came_before() -> None:
    model, hook, _ = of_transformers("llama")
    sae = at(drawn_sae(16, seed=4), hook)
    with saekit.splice(model, sae, tokens=TokenChoice(seqpos_slice=(3, 6))), torch.no_grad():
        whole = model(TOKENS).logits
        begun = model(TOKENS[:, :4], use_cache=True)
        rest = model(TOKENS[:, 4:], past_key_values=begun.past_key_values).logits
    torch.testing.assert_close(torch.cat([begun.logits, rest], dim=1), whole, rtol=1e-4, atol=1e-5)


def test_embeddings_that_come_from_elsewhere_have_no_token_ids() -> None:
    model, hook, write = of_lens()
    embeddings = torch.randn(2, 4, 16, generator=torch.Generator().manual_seed(0))
    with saekit.splice(model, at(drawn_sae(16), hook), tokens=TokenChoice(seqpos_slice=(1, None))):
        write(TOKENS, True)
        with pytest.raises(ModelError, match="those of this forward, .* are not known"):
            model.generate(embeddings, max_new_tokens=2, stop_at_eos=False, verbose=False, return_type="embeds")
        with pytest.raises(ModelError, match="are not known"):
            model(embeddings, start_at_layer=0)
        assert model(embeddings, start_at_layer=0, tokens=TOKENS[:, :4]).shape == (2, 4, 2048)


def test_an_sae_of_whole_sequences_needs_them() -> None:
    model, hook, write = of_lens()
    sae = saekit.SAE.from_dict({"name": "temporal", "d_in": 16, "d_sae": 32, "n_heads": 2, "bottleneck_factor": 4})
    with saekit.splice(model, at(sae, hook), use_error_term=True):
        assert write(TOKENS, False).shape == (2, 7 + NEW)
        with pytest.raises(ModelError, match="reads whole sequences, and this forward goes on after 7 positions"):
            write(TOKENS, True)


def test_so_does_one_of_transformer_lens() -> None:
    from transformer_lens.cache.key_value_cache import TransformerLensKeyValueCache

    model = place("HookedTransformer").model
    for hook in ("hook_embed", "blocks.1.hook_resid_post"):
        sae = at(drawn_sae(16, seed=4), hook)
        with saekit.splice(model, sae, tokens=TokenChoice(seqpos_slice=(3, 6))), torch.no_grad():
            whole = model(TOKENS)
            cache = TransformerLensKeyValueCache.init_cache(model.cfg, "cpu", len(TOKENS))
            parts = [model.run_with_hooks(part, past_kv_cache=cache) for part in (TOKENS[:, :4], TOKENS[:, 4:])]
        torch.testing.assert_close(torch.cat(parts, dim=1), whole, rtol=1e-4, atol=1e-5)
