"""What saekit.splice is given, and what is done with what it returns."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from support.saes import at, drawn_sae
from support.spliced import TOKENS, place

import saekit
from saekit.errors import ConfigError, ModelError
from saekit.testing import FakeBackend
from saekit.tokens import TokenChoice

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"tokens": [0]}, r"tokens: must be a TokenChoice, such as .*TokenChoice\(exclude=\[0\]\), found \[0\]"),
        ({"use_error_term": "no"}, "use_error_term: must be True, False or None .*, found 'no'"),
        ({"use_error_term": 1}, "use_error_term: must be True, False or None .*, found 1"),
    ],
)
def test_what_means_nothing_is_refused(options: Any, expected: str) -> None:
    there = place("fake")
    with pytest.raises(ConfigError, match=expected), saekit.splice(there.backend, drawn_sae(8), **options):
        pass


@pytest.mark.parametrize("name", ["", "two\nlines", " ", "ends ", 3])
def test_names_are_in_one_line(name: Any) -> None:
    there = place("fake")
    with (
        pytest.raises(ConfigError, match="saes: must be by names of their own, in one line, found "),
        saekit.splice(there.backend, {name: at(drawn_sae(8), there.early)}),
    ):
        pass


def test_what_it_returns_is_for_one_block() -> None:
    there = place("AutoModelForCausalLM")
    once = saekit.splice(there.model, at(drawn_sae(16), there.early))
    expected = r"what saekit.splice\(...\) returns is for one with block, and had its own: call it again"
    with once as spliced:
        inside = there.model(TOKENS).logits
        with pytest.raises(ModelError, match=expected), once:
            pass
        assert torch.equal(there.model(TOKENS).logits, inside)
        assert "with" in repr(spliced)
    with pytest.raises(ModelError, match=expected), once:
        pass


def test_what_it_returns_is_opened_first() -> None:
    there = place("AutoModelForCausalLM")
    closed: Any = saekit.splice(there.model, at(drawn_sae(16), there.early))
    expected = r"must be opened before .{} is asked for: with saekit.splice\(model, saes\) as spliced: spliced.run"
    for name in ("run", "generate", "hook", "held"):
        with pytest.raises(ModelError, match=expected.format(name)):
            getattr(closed, name)
    with pytest.raises(ModelError, match="must be opened before the model is called: with"):
        closed(TOKENS)
    assert not hasattr(closed, "__wrapped__")


def test_what_only_the_model_has_is_called_of_the_model() -> None:
    there = place("AutoModelForCausalLM")
    with saekit.splice(there.model, at(drawn_sae(16), there.early)) as spliced:
        with pytest.raises(AttributeError, match="a splice has no 'generate'. It is the model's own: call generate of"):
            spliced.generate(TOKENS)  # type: ignore[attr-defined]
        with pytest.raises(AttributeError, match="a splice has no 'nonsense'$"):
            spliced.nonsense  # type: ignore[attr-defined]  # noqa: B018


@pytest.mark.parametrize("kind", ["HookedTransformer", "AutoModelForCausalLM", "bare"])
def test_a_tensor_and_a_function_as_transformer_lens_has_them_are_put_at_hooks(kind: str) -> None:
    there = place(kind)
    acts = f"{there.early}.hook_sae_acts_post"
    told = []

    def doubled(features: Any, hook: Any) -> Any:
        told.append(hook.name)
        return features * 2

    with saekit.splice(there.target, at(drawn_sae(there.width), there.early)) as spliced:
        for name in (acts, there.late):
            value = spliced.run(TOKENS, read=[name]).held[name]
            expected = spliced.run(TOKENS, replace={name: lambda held: held * 2}, want="logits").logits
            for given in (value * 2, doubled, lambda held, by=2, **hook: held * by):
                found = spliced.run(TOKENS, replace={name: given}, want="logits").logits
                torch.testing.assert_close(found, expected)
        handles = [spliced.hook(acts, given) for given in (torch.zeros_like(spliced.run(TOKENS, read=acts).held[acts]),
                                                           doubled)]  # fmt: skip
        held = spliced.run(TOKENS, read=[acts]).held[acts]
        assert not held.any(), handles
    assert told == [acts, there.late, acts]


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (
            0.0,
            r"what replaces '(.*)' must be a function of what the hook holds, .* or a tensor of its shape, f",
        ),
        (
            lambda: None,
            r"the function at '(.*)' takes \(\), and is called with what the hook holds alone",
        ),
        (lambda a, b: a, r"the function at '(.*)' takes \(a, b\), and is called with .* \(held, hook\)"),
        (torch.zeros(3), r"what replaces '(.*)' must be a tensor of shape \[2, 7, .*\], found \[3\]"),
        (lambda a: None, r"must be a tensor of shape .*, found NoneType: the function must return what the model goes"),
    ],
)
def test_what_cannot_be_put_at_a_hook_says_so(given: Any, expected: str) -> None:
    there = place("HookedTransformer")
    acts = f"{there.early}.hook_sae_acts_post"
    with saekit.splice(there.target, at(drawn_sae(16), there.early)) as spliced:
        for name in (acts, there.late):
            with pytest.raises(ModelError, match=expected):
                spliced.run(TOKENS, replace={name: given}, want="logits")
        with pytest.raises(ModelError, match=expected):
            spliced.hook(acts, given)
            spliced.run(TOKENS, want="logits")
    with pytest.raises(ModelError, match=expected):
        there.backend.run(TOKENS, replace={there.late: given}, want="logits")
    with pytest.raises(ModelError, match="replace is a mapping of functions by the names of hooks, found"):
        there.backend.run(TOKENS, replace=[(there.late, given)], want="logits")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"seqpos_slice": ("1:",)}, r"seqpos_slice: is \['1:'\], expected whole numbers and none"),
        ({"seqpos_slice": "1:"}, "seqpos_slice: must be one to three numbers, as slice takes them, found '1:'"),
        ({"seqpos_slice": 5}, "seqpos_slice: must be one to three numbers, as slice takes them, found 5"),
        ({"seqpos_slice": (1, None, 0)}, r"seqpos_slice: is \[1, None, 0\], whose step must be 1 or more"),
        ({"exclude": ["a"]}, "exclude: must be token ids from 0, found 'a' among them"),
        ({"exclude": 5}, "exclude: must be a list of token ids, found 5"),
    ],
)
def test_a_choice_of_tokens_that_means_nothing(options: Any, expected: str) -> None:
    with pytest.raises(ConfigError, match=expected):
        TokenChoice(**options)
    assert TokenChoice(exclude=torch.tensor([2, 1])) == TokenChoice(exclude=(1, 2), seqpos_slice=[None])


def test_what_cannot_be_copied_says_so() -> None:
    lens, hf = place("HookedTransformer"), place("AutoModelForCausalLM")
    with saekit.splice(lens.model, at(drawn_sae(16), lens.early)) as spliced:
        with pytest.raises(ModelError, match="a HookedTransformer cannot be copied while a splice of it is open: copy"):
            copy.deepcopy(lens.model)
        with pytest.raises(ModelError, match="a splice cannot be copied, since it is of one model"):
            copy.deepcopy(spliced)
    with pytest.raises(ModelError, match="a backend cannot be copied: copy its .model, and give the copy to saek"):
        copy.deepcopy(hf.backend)


def test_copies_that_are_made_outside_are_as_the_model() -> None:
    for there in (place("HookedTransformer"), place("AutoModelForCausalLM")):
        before = copy.deepcopy(there.model)
        with saekit.splice(there.model, at(drawn_sae(16), there.early)):
            pass
        expected = there.model(TOKENS)
        for made in (before, copy.deepcopy(there.model)):
            found = made(TOKENS)
            assert torch.equal(getattr(found, "logits", found), getattr(expected, "logits", expected))


def test_what_has_not_been_opened_says_how() -> None:
    context = saekit.splice(FakeBackend(), at(drawn_sae(8), "blocks.0.hook_resid_post"))
    assert (
        repr(context) == "<saekit.splice(...), which does nothing yet: with saekit.splice(model, saes) as spliced: ...>"
    )
    with context:
        assert repr(context) == "<saekit.splice(...), whose with block has begun: use what it gave>"


def test_a_splice_says_what_each_sae_reads() -> None:
    head, whole = saekit.Site(hook_name="blocks.0.attn.hook_z", hook_head_index=1), "blocks.0.hook_resid_post"
    saes = {"mine": at(drawn_sae(4), head), whole: at(drawn_sae(8), whole)}
    with saekit.splice(FakeBackend(), saes) as spliced:
        assert repr(spliced).splitlines() == [
            "<Spliced: 'fake' with",
            "  mine: StandardSAE of 24 features, reads head 1 of blocks.0.attn.hook_z",
            f"  {whole}: StandardSAE of 24 features>",
        ]
    with saekit.splice(FakeBackend(), saes["mine"]) as spliced:
        assert "  blocks.0.attn.hook_z: StandardSAE of 24 features, reads head 1 of blocks.0.attn.hook_z>" in repr(
            spliced
        )
