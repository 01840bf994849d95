"""Dictionaries that read at some hooks and write at others, in one forward."""

from __future__ import annotations

import pytest
import torch
from support.saes import at, drawn_sae, given
from support.spliced import KINDS, TOKENS, place
from torch import Tensor

import saekit
from saekit import Ports, Site, Sites
from saekit.errors import ConfigError, ModelError
from saekit.tokens import TokenChoice

pytestmark = pytest.mark.usefixtures("one_thread")

READ, WRITTEN = "blocks.1.ln2.hook_normalized", "blocks.1.hook_mlp_out"


def test_a_transcoder_takes_the_place_of_the_mlp() -> None:
    there = place("HookedTransformer")
    model, sae = there.model, at(drawn_sae(16, 16), READ, targets=(WRITTEN,))
    _, cache = model.run_with_cache(TOKENS)
    with torch.no_grad():
        block = model.blocks[1]
        output = (cache[READ] @ sae.W_enc + sae.b_enc).relu() @ sae.W_dec + sae.b_dec
        residual = model.blocks[2](cache["blocks.1.hook_resid_mid"] + output)
        expected = model.unembed(model.ln_final(residual))
    with saekit.splice(model, sae) as spliced:
        torch.testing.assert_close(spliced.run(TOKENS, want="logits").logits, expected, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(model(TOKENS), expected, rtol=1e-4, atol=1e-4)
        assert spliced.attachments[0].name == READ
        assert f"writes {WRITTEN}" in repr(spliced)
        held = spliced.run(TOKENS, read=[READ, WRITTEN, f"{READ}.hook_sae_output"]).held
    assert torch.equal(held[READ], cache[READ]), "what it reads stays"
    torch.testing.assert_close(held[WRITTEN], output)
    torch.testing.assert_close(held[f"{READ}.hook_sae_output"], output)
    assert block.mlp is not None


def test_its_error_is_that_of_what_the_model_really_holds() -> None:
    there = place("HookedTransformer")
    sae = at(drawn_sae(16, 16), READ, targets=(WRITTEN,))
    clean = there.backend.run(TOKENS, read=[READ, WRITTEN], want="logits")
    acts = f"{READ}.hook_sae_acts_post"

    def off(features: Tensor) -> Tensor:
        return features * (torch.arange(24) != 5)

    with saekit.splice(there.model, sae, use_error_term=True) as spliced:
        torch.testing.assert_close(spliced.run(TOKENS, want="logits").logits, clean.logits, rtol=1e-4, atol=1e-4)
        held = spliced.run(TOKENS, read=[f"{READ}.hook_sae_error", acts]).held
        found = spliced.run(TOKENS, read=[WRITTEN], replace={acts: off}).held[WRITTEN]
    with torch.no_grad():
        error = clean.held[WRITTEN] - sae(clean.held[READ])
        lacking = held[acts][..., 5:6] * sae.W_dec[5]
    torch.testing.assert_close(held[f"{READ}.hook_sae_error"], error, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found, clean.held[WRITTEN] - lacking, rtol=1e-4, atol=1e-4)
    assert not sae.use_error_term


def test_it_reads_what_earlier_saes_have_left() -> None:
    there = place("HookedTransformer")
    early = at(drawn_sae(16, seed=3), "blocks.1.hook_resid_mid")
    sae = at(drawn_sae(16, 16), READ, targets=(WRITTEN,))
    with saekit.splice(there.model, early) as spliced:
        changed = spliced.run(TOKENS, read=[READ]).held[READ]
    with saekit.splice(there.model, [sae, early]) as spliced:
        found = spliced.run(TOKENS, read=[f"{READ}.hook_sae_input", WRITTEN]).held
    torch.testing.assert_close(found[f"{READ}.hook_sae_input"], changed)
    torch.testing.assert_close(found[WRITTEN], given(sae, changed))


@pytest.mark.parametrize("kind", KINDS)
def test_it_stands_in_every_model_with_masks(kind: str) -> None:
    there = place(kind)
    sae = at(drawn_sae(there.width, there.width), there.early, targets=(there.late,))
    held = there.backend.run(TOKENS, read=[there.early, there.late]).held
    with saekit.splice(there.target, sae, tokens=TokenChoice(seqpos_slice=(2, None))) as spliced:
        found = spliced.run(TOKENS, read=[there.late]).held[there.late]
    assert torch.equal(found[:, :2], held[there.late][:, :2])
    torch.testing.assert_close(found[:, 2:], given(sae, held[there.early])[:, 2:])


def crosscoder(inputs: tuple[str, ...], targets: tuple[str, ...], width: int) -> tuple[object, Sites]:
    sites = Sites(tuple(Site(hook_name=name) for name in inputs), tuple(Site(hook_name=name) for name in targets))
    ports = Ports(dict.fromkeys(inputs, width), dict.fromkeys(targets, width))
    name = "transcoder" if inputs != targets else "standard"
    sae = saekit.SAE.from_dict({"name": name, "d_sae": 24, "apply_b_dec_to_input": False}, ports=ports)
    return sae, sites


def test_several_inputs_and_several_targets_each_at_its_hook() -> None:
    there = place("HookedTransformer")
    reads = ("blocks.0.hook_mlp_out", "blocks.1.hook_attn_out")
    writes = ("blocks.1.hook_mlp_out", "blocks.2.hook_mlp_out")
    sae, sites = crosscoder(reads, writes, 16)
    held = there.backend.run(TOKENS, read=reads).held
    with saekit.splice(there.model, sae, sites=sites) as spliced:
        found = spliced.run(TOKENS, read=[*writes, f"{reads[0]}.hook_sae_acts_post"]).held
    with torch.no_grad():
        output = sae(torch.cat([held[name] for name in reads], dim=-1))
    for name, part in zip(writes, output.split(16, dim=-1), strict=True):
        torch.testing.assert_close(found[name], part)
    assert found[f"{reads[0]}.hook_sae_acts_post"].shape == (2, 7, 24)
    error = pytest.raises(ConfigError, match="writes at several hooks .* leave out use_error_term")
    with error, saekit.splice(there.model, sae, sites=sites, use_error_term=True):
        pass


def test_what_would_have_to_be_read_before_it_is_there_is_refused() -> None:
    there = place("HookedTransformer")
    early, late = "blocks.0.hook_mlp_out", "blocks.2.hook_mlp_out"
    sae, sites = crosscoder((late,), (early,), 16)
    with saekit.splice(there.model, sae, sites=sites) as spliced:
        for use in (lambda: spliced.run(TOKENS, want="logits"), lambda: there.model(TOKENS)):
            message = f"writes at '{early}', which runs before '{late}', which it reads. saekit.evaluate"
            with pytest.raises(ModelError, match=message):
                use()
    sae, sites = crosscoder((early, late), (early, late), 16)
    error = pytest.raises(ModelError, match="runs before .* which it reads. saekit.evaluate")
    with error, saekit.splice(there.model, sae, sites=sites):
        pass
