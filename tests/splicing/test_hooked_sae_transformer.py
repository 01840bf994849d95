"""HookedSAETransformer, against what that of sae-lens 3.0.0 gave for the same calls."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import attrs
import pytest
import torch
from golden_splicing import calls
from saekit_plugins.architectures.standard import StandardConfig
from saekit_plugins.backends.hooked_sae_transformer import HookedSAETransformer
from safetensors.torch import load_file
from torch import Tensor

import saekit
from saekit import ConfigError, ModelError, Site, Sites
from saekit.sae.build import build_module

pytestmark = pytest.mark.usefixtures("one_thread")

GOLDEN = Path(__file__).parents[1] / "golden_splicing"
OF_LENS_3 = {"unembed.hook_in", "unembed.hook_out"}
"""Hook points that transformer_lens 1, with which sae-lens 3.0.0 was recorded, lacks."""


def sae_of(name: str, hook: str, d_sae: int, error_term: bool = False, head: int | None = None) -> saekit.SAE:
    config, plugins = StandardConfig(d_sae=d_sae, normalize_sae_decoder=False), saekit.default_manager()
    d_in = calls.D_IN if head is None else 4
    sae: Any = build_module(plugins.find("sae_architectures", config), config, d_in, plugins)
    sae.info = attrs.evolve(sae.info, sites=Sites.one(Site(hook_name=hook, hook_head_index=head)))
    sae.use_error_term = error_term
    return calls.filled(sae, name)  # type: ignore[no-any-return]


def named(name: str) -> saekit.SAE:
    return sae_of(name, *calls.SAES[name])


def model() -> Any:
    return calls.model_of(HookedSAETransformer)


@pytest.fixture(scope="module")
def ours() -> tuple[dict[str, Tensor], dict[str, Any]]:
    return calls.results(HookedSAETransformer, sae_of)


def must_agree(
    ours: tuple[dict[str, Tensor], dict[str, Any]], tensors: dict[str, Tensor], others: dict[str, Any]
) -> None:
    assert ours[0].keys() == tensors.keys()
    for key, theirs in tensors.items():
        mine = ours[0][key]
        if key.endswith((f"{calls.Z}.hook_sae_output", f"{calls.Z}.hook_sae_error")):  # which have heads there
            theirs = theirs.flatten(2)
        if key.endswith(".hook_sae_input"):  # which is centered there
            (name,) = (
                name for name in key.split("/")[1].split(":")[0].replace("_err", "").split()
                if key.endswith(f"{calls.SAES[name][0]}.hook_sae_input")
            )  # fmt: skip
            mine = mine - calls.numbers(f"{name}b_dec", torch.Size([calls.D_IN]))
        torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-5, msg=lambda text, key=key: f"{key}: {text}")
    assert ours[1].keys() == others.keys()
    for key, names in others.items():
        # There the SAE takes the place of the hook that it is attached to, and here that is cached, too.
        own = {name for name in ours[1][key] if name + ".hook_sae_output" in ours[1][key]} | OF_LENS_3
        assert [name for name in ours[1][key] if name not in own] == names, key


def test_calls_give_what_they_gave(ours: tuple[dict[str, Tensor], dict[str, Any]]) -> None:
    others = json.loads((GOLDEN / "sae_lens_3.json").read_text())
    must_agree(ours, load_file(GOLDEN / "sae_lens_3.safetensors"), others)


def test_calls_give_what_they_give_in_a_subprocess(
    ours: tuple[dict[str, Tensor], dict[str, Any]], tmp_path: Path
) -> None:
    python = os.environ.get("SAEKIT_SAE_LENS_3_PYTHON")
    if not python:
        pytest.skip("sae-lens 3.0.0 has an environment of its own; name its Python in SAEKIT_SAE_LENS_3_PYTHON")
    there = {**os.environ, "PYTHONPATH": ""}
    subprocess.run([python, GOLDEN / "make_golden_splicing.py", tmp_path], check=True, env=there, cwd=tmp_path)
    others = json.loads((tmp_path / "sae_lens_3.json").read_text())
    must_agree(ours, load_file(tmp_path / "sae_lens_3.safetensors"), others)


def state(model: Any) -> dict[str, list[int]]:
    """Every hook of every module, in order, by what is called."""
    return {
        f"{name}.{kind}": [*getattr(module, kind)]
        for name, module in model.named_modules()
        for kind in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    } | {"hook points": sorted(model.hook_dict)}  # type: ignore[dict-item]


def hooked(model: Any) -> Any:
    """With hooks before and after those of SAEs."""
    model.add_hook(calls.RESID, lambda x, hook: x * 1.1, is_permanent=True)
    model.add_hook(calls.RESID, lambda x, hook: x + 0.1)
    return model


@torch.no_grad()
def test_the_model_is_as_it_was_after_nested_repeated_and_raising_uses() -> None:
    lens = hooked(model())
    before, logits = state(lens), lens(calls.TOKENS)
    a, other, m = named("a"), named("other_a"), named("m")
    for _ in range(2):
        with lens.saes([a, m]), lens.saes([other]):
            lens(calls.TOKENS)
        with pytest.raises(ZeroDivisionError), lens.saes([a, other, m]):
            lens.run_with_saes(calls.TOKENS, saes=[other])
            raise ZeroDivisionError
    assert state(lens) == before
    assert torch.equal(lens(calls.TOKENS), logits)
    assert lens.acts_to_saes == {}


def test_it_is_made_of_what_load_model_returned() -> None:
    lens = model()
    made = HookedSAETransformer.from_model(saekit.load_model(lens))
    assert made.hook_dict is lens.hook_dict
    assert torch.equal(made.run_with_saes(calls.TOKENS, saes=named("a")), lens.run_with_saes(
        calls.TOKENS, saes=named("a")))  # fmt: skip
    with pytest.raises(ModelError, match="from_model takes a HookedTransformer, found a FakeBackend"):
        HookedSAETransformer.from_model(saekit.testing.FakeBackend())


@torch.no_grad()
def test_what_was_attached_before_keeps_its_place_among_the_hooks() -> None:
    lens = hooked(model())
    lens.add_sae(named("a"))
    lens.add_hook(calls.RESID, lambda x, hook: x - 0.3)
    lens.add_hook(f"{calls.RESID}.hook_sae_acts_post", lambda x, hook: x * 2)
    before, logits = state(lens), lens(calls.TOKENS)
    with lens.saes([named("other_a"), named("m")]):
        assert not torch.equal(lens(calls.TOKENS), logits)
    assert state(lens) == before
    assert torch.equal(lens(calls.TOKENS), logits)
    lens.reset_saes()
    assert len(lens.hook_dict[calls.RESID]._forward_hooks) == 3, "the hooks stay"


def test_the_error_term_of_an_attachment_is_not_the_saes() -> None:
    lens, a = model(), named("a")
    clean, spliced = lens(calls.TOKENS), lens.run_with_saes(calls.TOKENS, saes=a)
    with_error = lens.run_with_saes(calls.TOKENS, saes=a, use_error_term=True)
    torch.testing.assert_close(with_error, clean, atol=1e-5, rtol=1e-5)
    a.use_error_term = True
    assert torch.equal(lens.run_with_saes(calls.TOKENS, saes=a, use_error_term=False), spliced)
    with pytest.raises(ZeroDivisionError), lens.saes(a, use_error_term=False):
        assert torch.equal(lens(calls.TOKENS), spliced)
        raise ZeroDivisionError
    assert a.use_error_term
    lens.add_sae(a, use_error_term=False)
    with lens.saes(a, use_error_term=True):
        torch.testing.assert_close(lens(calls.TOKENS), clean, atol=1e-5, rtol=1e-5)
    assert torch.equal(lens(calls.TOKENS), spliced), "as it was attached"


def test_heads_of_one_hook_are_different_places() -> None:
    lens = model()
    first, second = sae_of("first", calls.Q, 10, head=0), sae_of("second", calls.Q, 10, head=1)

    def by_hand(x: Tensor, hook: Any) -> Tensor:
        return torch.stack([first(x[:, :, 0]), second(x[:, :, 1])], dim=2)

    expected = lens.run_with_hooks(calls.TOKENS, fwd_hooks=[(calls.Q, by_hand)])
    with lens.saes([first, second]):
        assert [*lens.acts_to_saes] == [f"{calls.Q}.head0", f"{calls.Q}.head1"]
        torch.testing.assert_close(lens(calls.TOKENS), expected)
        whole = sae_of("whole", calls.Q, 10)
        with lens.saes(whole):
            assert [*lens.acts_to_saes] == [calls.Q], "it takes the place of both"
        torch.testing.assert_close(lens(calls.TOKENS), expected)
        lens.reset_saes(f"{calls.Q}.head0")
        assert [*lens.acts_to_saes] == [f"{calls.Q}.head1"]
    lens.add_sae(first)
    lens.add_sae(second)
    lens.reset_saes(calls.Q)
    assert lens.acts_to_saes == {}


def test_what_is_added_or_reset_inside_a_context() -> None:
    lens, a, other, m = model(), named("a"), named("other_a"), named("m")
    with lens.saes(a):
        lens.add_sae(m)
    assert lens.acts_to_saes == {calls.MLP: m}, "at another hook it stays"
    with lens.saes([a, m]):
        lens.reset_saes()
        assert lens.acts_to_saes == {}
        lens.add_sae(other)
    assert lens.acts_to_saes == {calls.MLP: m}, "what was there is there again"
    with lens.saes(a):
        lens.reset_saes(calls.MLP)
    assert lens.acts_to_saes == {}


def test_special_tokens_can_be_left_out() -> None:
    lens, a = model(), named("a")
    ids = [1, 9]
    keep = ~torch.isin(calls.TOKENS, torch.tensor(ids))

    def by_hand(x: Tensor, hook: Any) -> Tensor:
        return torch.where(keep[..., None], a(x), x)

    expected = lens.run_with_hooks(calls.TOKENS, fwd_hooks=[(calls.RESID, by_hand)])
    found = lens.run_with_saes(calls.TOKENS, saes=a, exclude_special_tokens=ids)
    torch.testing.assert_close(found, expected)
    _, cache = lens.run_with_cache_with_saes(calls.TOKENS, saes=[a], exclude_special_tokens=ids)
    torch.testing.assert_close(cache[calls.RESID][~keep], lens.run_with_cache(calls.TOKENS)[1][calls.RESID][~keep])
    hook = (f"{calls.RESID}.hook_sae_acts_post", lambda x, hook: x)
    found = lens.run_with_hooks_with_saes(calls.TOKENS, saes=[a], exclude_special_tokens=ids, fwd_hooks=[hook])
    torch.testing.assert_close(found, expected)
    with pytest.raises(ConfigError, match="has no special tokens that are known; name their ids"):
        lens.add_sae(a, exclude_special_tokens=True)
    with pytest.raises(ModelError, match="call reset_saes"), lens.saes(a):
        copy.deepcopy(lens)
    assert torch.equal(copy.deepcopy(lens)(calls.TOKENS), lens(calls.TOKENS))
    assert lens.acts_to_saes == {}


def test_one_from_a_model_that_is_there_shares_its_weights() -> None:
    import transformer_lens

    plain = calls.model_of(transformer_lens.HookedTransformer)
    lens = HookedSAETransformer.from_model(plain)
    a = named("a")
    assert isinstance(lens, HookedSAETransformer)
    assert lens.W_E.data_ptr() == plain.W_E.data_ptr()
    assert torch.equal(lens.run_with_saes(calls.TOKENS, saes=a), model().run_with_saes(calls.TOKENS, saes=a))
    assert type(plain) is transformer_lens.HookedTransformer
    again = HookedSAETransformer.from_model(lens)
    assert torch.equal(
        again.run_with_saes(calls.TOKENS, saes=a, exclude_special_tokens=[1, 2, 3, 4, 5, 7, 8, 9]), again(calls.TOKENS)
    ), "all that is left out"
    with pytest.raises(ModelError, match="takes a HookedTransformer, found a Linear"):
        HookedSAETransformer.from_model(torch.nn.Linear(2, 2))


def test_saekit_takes_it_as_a_hooked_transformer() -> None:
    lens, a = model(), named("a")
    backend = saekit.load_model(lens)
    lens.add_sae(a)
    logits = backend.run(calls.TOKENS, want="logits").logits
    torch.testing.assert_close(logits, lens(calls.TOKENS))


MISTAKES = [
    (lambda lens: lens.add_sae(sae_of("a", "blocks.0.hook_resid_pots", 20)), ModelError,
     r"no hook 'blocks.0.hook_resid_pots'. Did you mean 'blocks.0.hook_resid_post'"),
    (lambda lens: lens.run_with_saes(calls.TOKENS, saes=[sae_of("a", calls.RESID, 20), sae_of("a", "zzz", 20)]),
     ModelError, "has no hook 'zzz'"),
    (lambda lens: lens.add_sae(sae_of("a", calls.Q, 20, head=5)), ConfigError, "hook_head_index 5 is out of range"),
    (lambda lens: lens.add_sae(torch.nn.Linear(8, 8)), TypeError, "an SAE of saekit is expected, found a Linear"),
    (lambda lens: lens.add_sae("gpt2"), TypeError, "an SAE of saekit is expected, found a str"),
    (lambda lens: lens.reset_saes("zzz"), ModelError, "has no hook 'zzz'"),
    (lambda lens: lens.reset_saes([calls.RESID, calls.MLP], [None]), ValueError,
     "as many prev_saes as act_names: found 1 and 2"),
]  # fmt: skip


@pytest.mark.parametrize(("call", "error", "message"), MISTAKES)
def test_mistakes(call: Any, error: type[Exception], message: str) -> None:
    lens = model()
    before = state(lens)
    with pytest.raises(error, match=message):
        call(lens)
    assert state(lens) == before, "nothing is attached"
    assert lens.acts_to_saes == {}


def test_transformer_lens_without_the_class_says_what_to_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformer_lens.HookedTransformer", None)
    monkeypatch.delitem(sys.modules, "saekit_plugins.backends.hooked_sae_transformer")
    with pytest.raises(ImportError, match=r"has no HookedTransformer.*saekit\.splice\(model, saes\)"):
        import saekit_plugins.backends.hooked_sae_transformer  # noqa: F401


def test_what_is_measured_of_a_model_with_saes_says_how_they_go() -> None:
    hooked, name = model(), next(iter(calls.SAES))
    hooked.add_sae(named(name))
    asked: dict[str, Any] = {"model": hooked, "contexts": torch.ones(2, 4, dtype=torch.long), "verbose": False}
    with pytest.raises(ModelError, match=r"attached to this one: it has SAEs\. Call its reset_saes\(\) first, or give"):
        saekit.evaluate(named(name), **asked)
    hooked.reset_saes()
    with saekit.splice(hooked, named(name)), pytest.raises(ModelError, match=r"a splice is open\. End its with block"):
        saekit.evaluate(named(name), **asked)
