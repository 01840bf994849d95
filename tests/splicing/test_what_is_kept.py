"""What an open splice asks of a forward by itself: the points that it keeps, and the functions that were put there."""

from __future__ import annotations

import pytest
import torch
from support.saes import at, drawn_sae
from support.spliced import KINDS, TOKENS, place
from torch import Tensor

import saekit
from saekit.errors import ModelError

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("kind", KINDS)
def test_a_forward_goes_as_far_as_the_splice_reads(kind: str) -> None:
    there = place(kind)
    early, late = (f"{hook}.hook_sae_acts_post" for hook in (there.early, there.late))
    saes = [at(drawn_sae(there.width, seed=seed), hook) for seed, hook in enumerate((there.early, there.late))]
    with saekit.splice(there.target, saes, read=[late]) as spliced:
        assert spliced.run(TOKENS).held == {}
        expected = spliced.run(TOKENS, read=[late]).held[late]
        assert torch.equal(spliced.held[late], expected)
        spliced.run(TOKENS % 5, want="loss")
        assert not torch.equal(spliced.held[late], expected)
        forward = spliced.run(TOKENS, read=[early])
        assert [*forward.held] == [early]
        assert torch.equal(spliced.held[late], expected), "what is kept is of this forward, which reads less"


@pytest.mark.parametrize("kind", KINDS)
def test_a_forward_goes_as_far_as_functions_were_put(kind: str) -> None:
    there = place(kind)
    acts = f"{there.late}.hook_sae_acts_post"
    seen: list[Tensor] = []

    def recorded(value: Tensor) -> Tensor:
        seen.append(value)
        return value

    with saekit.splice(there.target, at(drawn_sae(there.width), there.late)) as spliced:
        handle = spliced.hook(acts, recorded)
        assert spliced.run(TOKENS).held == {}
        assert torch.equal(seen.pop(), spliced.run(TOKENS, read=[acts]).held[acts])
        seen.clear()
        spliced.run(TOKENS, read=[there.early])
        assert len(seen) == 1
        handle.remove()
        with pytest.raises(ModelError, match=r"^nothing is asked for, so .* \(spliced.names, .* lists them\)"):
            spliced.run(TOKENS)
        with pytest.raises(ModelError, match=r"nothing is asked for beside what replaces '.*acts_post', so that"):
            spliced.run(TOKENS, replace={acts: torch.zeros(3)})
        assert len(seen) == 1


def test_what_is_kept_is_of_the_last_forward_alone() -> None:
    there = place("AutoModelForCausalLM")
    acts, other = (f"{there.late}.hook_sae_{point}" for point in ("acts_post", "recons"))
    with saekit.splice(there.target, at(drawn_sae(there.width), there.late), read=[acts]) as spliced:
        with pytest.raises(ModelError, match=r"has no '.*acts_post': it has .*forward came to them, which is none"):
            spliced.held[acts]
        there.model(TOKENS)
        kept = spliced.held
        assert [*kept] == [acts]
        with pytest.raises(ModelError, match=r"has no '.*recons': .* came to them, '.*acts_post'"):
            spliced.held[other]
        spliced.backend.run(TOKENS, read=[there.early])  # which ends before the SAE
        assert not spliced.held
        assert [*kept] == [acts]


@pytest.mark.parametrize("kind", ["fake", "HookedTransformer"])
def test_odd_tokens_are_refused_there_too(kind: str) -> None:
    there = place(kind)
    with saekit.splice(there.target, at(drawn_sae(there.width), there.early)) as spliced:
        with pytest.raises(ModelError, match=r"those of one context are tokens\[None\]"):
            spliced.run(TOKENS[0], want="loss")
        assert spliced.run(TOKENS[0][None], want="loss").loss.shape == (1, 6)


def test_a_point_by_another_librarys_name_of_the_hook() -> None:
    there = place("AutoModelForCausalLM")
    with saekit.splice(there.target, drawn_sae(there.width), sites="blocks.0.hook_resid_post") as spliced:
        with pytest.raises(ModelError, match=r"Did you mean 'transformer.h.0.hook_sae_acts_post'\? It is what"):
            spliced.run(TOKENS, read=["blocks.0.hook_resid_post.hook_sae_acts_post"])
        with pytest.raises(ModelError, match="no SAE of this splice has the point 'blocks.1.hook_resid"):
            spliced.hook("blocks.1.hook_resid_post.hook_sae_acts_post", torch.zeros_like)
