"""SAEs in models of every backend: what comes out, and what is left when they are gone."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from support.saes import at, drawn_sae, given, identity_sae
from support.spliced import KINDS, TOKENS, Place, place, sae_state, state
from torch import Tensor

import saekit
from saekit.abilities import AttachesHooks
from saekit.errors import ConfigError, ModelError, SAEFormatError

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(params=KINDS)
def there(request: pytest.FixtureRequest) -> Iterator[Place]:
    """Each backend; after the test its model is as it was, and gives the very same."""
    found = place(request.param)
    clean = logits(found)  # in its first forward, a bridge puts up hooks of its own
    before = state(found.target)
    yield found
    if request.param not in ("fake", "bare"):
        assert state(found.target) == before
    assert torch.equal(logits(found), clean)


def logits(there: Place, **options: Any) -> Tensor:
    return there.backend.run(TOKENS, want="logits", **options).logits


def by_hand(there: Place, sae: Any, hook: str) -> Tensor:
    """The logits with what ``sae`` makes of the hook in its place, by a replacement that the test writes."""
    return logits(there, replace={hook: lambda x: sae.decode(sae.encode(x))})


def test_an_identity_changes_nothing(there: Place) -> None:
    with saekit.splice(there.target, at(identity_sae(there.width), there.early)) as spliced:
        assert torch.equal(spliced.run(TOKENS, want="logits").logits, logits(there))


def test_the_model_goes_on_with_what_the_sae_gives(there: Place) -> None:
    sae = at(drawn_sae(there.width), there.early)
    expected = by_hand(there, sae, there.early)
    assert not torch.allclose(expected, logits(there), atol=1e-2)
    with saekit.splice(there.target, sae) as spliced:
        assert torch.equal(spliced.run(TOKENS, want="logits").logits, expected)
        held = spliced.run(TOKENS, read=[there.early, there.late]).held
    clean = there.backend.run(TOKENS, read=[there.early]).held[there.early]
    torch.testing.assert_close(held[there.early], given(sae, clean), msg="a hook that is read holds what was put there")
    assert [*held] == [there.early, there.late]


def test_two_sites_and_then_two_saes_on_one(there: Place) -> None:
    first, second = at(drawn_sae(there.width, seed=1), there.early), at(drawn_sae(there.width, seed=2), there.late)
    both = logits(there, replace={there.early: first, there.late: second})
    chain = logits(there, replace={there.early: lambda x: second(first(x))})
    with saekit.splice(there.target, [first, second]) as spliced:
        assert torch.equal(spliced.run(TOKENS, want="logits").logits, both)
    with saekit.splice(there.target, [first, second], sites=there.early) as spliced:
        assert torch.equal(spliced.run(TOKENS, want="logits").logits, chain), "the second reads what the first gives"
        assert [one.name for one in spliced.attachments] == [f"{there.early}[1]", f"{there.early}[2]"]


def test_with_the_error_term_only_interventions_change_anything(there: Place) -> None:
    sae = at(drawn_sae(there.width), there.early)
    acts = f"{there.early}.hook_sae_acts_post"

    def ablated(features: Tensor) -> Tensor:
        features = features.clone()
        features[..., 3] = 0
        return features

    def truth(x: Tensor) -> Tensor:
        features = sae.encode(x)
        return x - features[..., 3:4] * sae.W_dec[3]

    clean, expected = logits(there), logits(there, replace={there.early: truth})
    with saekit.splice(there.target, sae, use_error_term=True) as spliced:
        torch.testing.assert_close(spliced.run(TOKENS, want="logits").logits, clean, rtol=1e-4, atol=1e-4)
        found = spliced.run(TOKENS, replace={acts: ablated}, want="logits").logits
        handle = spliced.hook(acts, ablated)
        assert torch.equal(spliced.run(TOKENS, want="logits").logits, found), "for as long as it is there"
        handle.remove()
        handle.remove()
        torch.testing.assert_close(spliced.run(TOKENS, want="logits").logits, clean, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(found, clean, atol=1e-2)


def test_the_error_term_of_an_attachment_is_its_own(there: Place) -> None:
    sae = at(drawn_sae(there.width), there.early)
    spliced_out = by_hand(there, sae, there.early)
    before = sae_state(sae)
    with (
        saekit.splice(there.target, sae, use_error_term=True),
        saekit.splice(there.target, sae, use_error_term=False, sites=there.late) as inner,
        pytest.raises(RuntimeError, match="mine"),
    ):
        assert not sae.use_error_term
        inner.hook(f"{there.late}.hook_sae_acts_post", raising)
        inner.run(TOKENS, want="logits")
    assert sae_state(sae) == before
    sae.use_error_term = True
    with saekit.splice(there.target, sae) as spliced:
        assert spliced.attachments[0].use_error_term, "left out, it is the SAE's own"
    with saekit.splice(there.target, sae, use_error_term=False) as spliced:
        assert torch.equal(spliced.run(TOKENS, want="logits").logits, spliced_out)
    assert sae.use_error_term


def raising(x: Tensor) -> Tensor:
    raise RuntimeError("mine")


def test_nested_splices_each_stand_after_the_one_around(there: Place) -> None:
    outer, inner = at(drawn_sae(there.width, seed=1), there.early), at(drawn_sae(there.width, seed=2), there.early)
    alone, both = by_hand(there, outer, there.early), logits(there, replace={there.early: lambda x: inner(outer(x))})
    only_inner = by_hand(there, inner, there.early)
    stands = isinstance(there.backend, AttachesHooks)
    with saekit.splice(there.target, outer) as first:
        with saekit.splice(there.target, inner) as second:
            # Of a backend in which nothing can stand, each knows only its own.
            assert torch.equal(second.run(TOKENS, want="logits").logits, both if stands else only_inner)
        assert torch.equal(first.run(TOKENS, want="logits").logits, alone)
        assert "as it was" in repr(second)
        assert there.early in repr(first)
        for use in (lambda: second.run(TOKENS), lambda: second.hook("x", raising)):
            with pytest.raises(ModelError, match="this splice has ended"):
                use()


def test_an_exception_in_a_forward_leaves_everything_as_it_was(there: Place) -> None:
    sae = at(drawn_sae(there.width), there.early)
    own = sae.hook_sae_acts_post.add_hook(lambda features, point: features * 2)
    before, doubled = sae_state(sae), sae(torch.ones(1, there.width))
    with pytest.raises(RuntimeError, match="mine"), saekit.splice(there.target, sae, use_error_term=True) as spliced:
        spliced.run(TOKENS, replace={f"{there.early}.hook_sae_acts_post": raising}, want="logits")
    assert sae_state(sae) == before
    assert torch.equal(sae(torch.ones(1, there.width)), doubled)
    own.remove()


def test_bad_arguments_say_what_was_found(there: Place) -> None:
    sae = drawn_sae(there.width)
    cases: list[tuple[Any, dict[str, Any], type[Exception], str]] = [
        (sae, {}, ConfigError, "StandardSAE does not say where in the model it belongs"),
        (sae, {"sites": there.early[:-1] + "x"}, ModelError, f"Did you mean .*{there.early}"),
        (sae, {"sites": [there.early, there.late]}, ConfigError, "are 2, and there are 1 SAEs"),
        (sae, {"sites": {"a": there.early}}, ConfigError, "give saes as a mapping"),
        ({"a": sae}, {"sites": {"b": there.early}}, ConfigError, "none is called 'b'"),
        ("nowhere", {"sites": there.early}, SAEFormatError, "there is no file or folder nowhere, and no release"),
        (sae, {"sites": 3}, ConfigError, "must be a hook's name, a Site or Sites, found 3"),
        (sae, {"sites": there.early, "mask": torch.ones(2, 7)}, ConfigError, "mask: must be a bool tensor"),
        (sae, {"sites": there.early, "read": ["y"]}, ModelError, "no SAE of this splice has the point 'y'"),
    ]
    for saes, options, error, message in cases:
        with pytest.raises(error, match=message), saekit.splice(there.target, saes, **options):
            raise AssertionError(message)
