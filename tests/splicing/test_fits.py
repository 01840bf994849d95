"""Whether an SAE fits a model: every message, before anything long runs."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs
import pytest
import torch
from saekit_plugins.backends.aliases import also_called
from support.causal_lms import TOKENS, WIDTH, make_causal_lm
from support.ports import MapConfig, MapSAE
from support.saved import make
from support.tiny import hooked_transformer

import saekit
from saekit import ConfigError, ModelError, Ports, Site, Sites
from saekit.errors import SAEFormatError
from saekit.splicing import check_fits, doubts_of_fit, model_name_of
from saekit.testing import FakeBackend

pytestmark = pytest.mark.usefixtures("one_thread")

RESID, HEADS = "blocks.1.hook_resid_post", "blocks.0.attn.hook_z"


def sae_at(hook: str = RESID, d_in: int = 8, head: int | None = None, **about: Any) -> saekit.SAE:
    sae = make(hook, d_in=d_in, head=head)
    sae.info = attrs.evolve(sae.info, metadata=about)
    return sae


def mapping(inputs: Mapping[str, int], targets: Mapping[str, int], sites: Sites | None) -> MapSAE:
    sae = MapSAE(MapConfig(d_sae=4), ports=Ports(inputs, targets), activation=torch.relu)
    sae.info = saekit.SAEInfo(sites=sites)
    return sae


def refused(error: type[Exception], sae: Any, backend: Any, *sites: Any) -> str:
    with pytest.raises(error) as raised:
        check_fits(sae, backend, *sites)
    return str(raised.value)


class Translating(FakeBackend):
    """Knows one hook by another library's name."""

    def hook_like(self, name: str) -> str | None:
        return {"layers.1": RESID, "layers.0.z": HEADS}.get(name)


class Renamed(FakeBackend):
    def __init__(self, name: str, *others: str) -> None:
        super().__init__()
        self.name, self.others = name, others

    def other_names(self) -> Sequence[str]:
        return self.others


@pytest.fixture(autouse=True)
def no_warnings() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


@pytest.fixture(scope="module")
def lens() -> Any:
    return saekit.load_model(hooked_transformer())


def test_one_that_fits_gives_its_sites_at_the_cost_of_one_small_forward() -> None:
    backend, sae = FakeBackend(), sae_at()
    assert check_fits(sae, backend) == Sites.one(Site(hook_name=RESID))
    assert backend.forwards == [(2, 7)]
    check_fits(sae, backend)
    assert len(backend.forwards) == 1, "what is known of the model is not asked again"
    assert check_fits(sae, backend, "hook_embed") == Sites.one(Site(hook_name="hook_embed"))
    head = Site(hook_name=HEADS, hook_head_index=1)
    assert check_fits(sae_at(d_in=4), backend, head) == Sites.one(head)


def test_a_backend_that_cannot_be_remembered_is_asked_each_time() -> None:
    class Unhashable(FakeBackend):
        __hash__ = None  # type: ignore[assignment]

    backend = Unhashable()
    check_fits(sae_at(), backend)
    check_fits(sae_at(), backend)
    assert len(backend.forwards) == 2


def test_hooks_that_are_in_the_model_do_not_see_the_look_at_it(lens: Any) -> None:
    def never(*_: Any) -> None:
        raise AssertionError

    model = hooked_transformer(seed=1)
    handles = [model.hook_dict["hook_embed"].register_forward_hook(never), model.register_forward_pre_hook(never)]
    model.add_hook("blocks.0.hook_resid_post", never, is_permanent=True)
    before = [[*module._forward_hooks] for module in model.modules()]
    with pytest.raises(ConfigError, match="So wide are"):
        check_fits(sae_at(d_in=64), saekit.load_model(model))
    assert [[*module._forward_hooks] for module in model.modules()] == before
    for handle in handles:
        handle.remove()
    backend, seen = FakeBackend(), []
    with backend.attached({"hook_embed": seen.append}, on_tokens=never):
        check_fits(sae_at(), backend)
    assert seen == []


def test_a_model_is_looked_at_once_however_it_is_wrapped() -> None:
    model = hooked_transformer(seed=2)
    check_fits(sae_at(d_in=16), saekit.load_model(model))
    again = saekit.load_model(model)
    again.run = lambda *args, **kwargs: pytest.fail("it runs")  # type: ignore[method-assign]
    check_fits(sae_at(d_in=16), again)


SUCH_AS = f". It has {len(FakeBackend().hook_names())} hooks, such as {FakeBackend().hook_names()[0]!r}; "
SUCH_AS += "saekit.load_model(...).hook_names() lists them"


def test_an_unknown_hook_with_near_names() -> None:
    message = refused(ModelError, sae_at("blocks.1.hook_resid_pots"), FakeBackend())
    assert message == (
        "the model 'fake' has no hook 'blocks.1.hook_resid_pots'. Did you mean 'blocks.1.hook_resid_post' or "
        "'blocks.0.hook_resid_post'?"
    )
    message = refused(ModelError, sae_at("zzz"), FakeBackend())
    assert message == f"the model 'fake' has no hook 'zzz'{SUCH_AS}"


def test_every_hook_of_several_that_is_missing_is_named() -> None:
    sites = Sites((Site(hook_name="zzz"),), (Site(hook_name="qqq"),))
    message = refused(ModelError, mapping({"zzz": 8}, {"qqq": 8}, sites), FakeBackend())
    assert message == f"the model 'fake' has no hook 'zzz'{SUCH_AS}\nthe model 'fake' has no hook 'qqq'{SUCH_AS}"


def test_names_of_transformer_lens_are_translated() -> None:
    assert check_fits(sae_at("layers.1"), Translating()) == Sites.one(Site(hook_name=RESID))
    head = check_fits(sae_at("layers.0.z", d_in=4, head=1), Translating())
    assert head == Sites.one(Site(hook_name=HEADS, hook_head_index=1)), "the head stays"
    assert "has no hook 'layers.7'" in refused(ModelError, sae_at("layers.7"), Translating())
    sites = Sites((Site(hook_name="layers.1"),), (Site(hook_name="hook_embed"),))
    found = check_fits(mapping({"layers.1": 8}, {"hook_embed": 8}, sites), Translating())
    assert found == Sites((Site(hook_name=RESID),), (Site(hook_name="hook_embed"),))


def test_an_sae_of_transformer_lens_stands_in_a_model_of_transformers() -> None:
    sae = sae_at("blocks.1.hook_resid_post", d_in=WIDTH)
    backend = saekit.load_model(make_causal_lm("gpt2"))
    site = Site(hook_name="transformer.h.1")
    assert check_fits(sae, backend) == Sites.one(site)
    expected = backend.run(TOKENS, replace={site.hook_name: sae}, want="loss").loss
    with saekit.splice(backend, sae) as spliced:
        torch.testing.assert_close(spliced.run(TOKENS, want="loss").loss, expected)
    assert "has no hook 'blocks.9.hook_resid_post'" in refused(
        ModelError, sae_at("blocks.9.hook_resid_post", d_in=WIDTH), backend
    )


def test_another_width_names_site_width_and_hooks_that_have_it(lens: Any) -> None:
    message = refused(ConfigError, sae_at("blocks.0.hook_resid_post", d_in=64), lens)
    assert message == (
        "blocks.0.hook_resid_post: is 16 wide in 'custom', and the SAE expects 64 there (d_in is 64). So wide are "
        "'blocks.0.mlp.hook_post', 'blocks.1.mlp.hook_post', 'blocks.0.mlp.hook_pre'"
    )
    assert refused(ConfigError, sae_at(d_in=5), FakeBackend()) == (
        "blocks.1.hook_resid_post: is 8 wide in 'fake', and the SAE expects 5 there (d_in is 5)"
    )


def test_heads_that_were_forgotten_or_are_too_many() -> None:
    backend = FakeBackend()
    assert refused(ConfigError, sae_at(HEADS, d_in=4), backend).endswith(
        "One head of it is so wide: give hook_head_index, 0 to 1"
    )
    assert refused(ConfigError, sae_at(HEADS, d_in=8, head=1), backend).endswith(
        "is 4 wide in 'fake', and the SAE expects 8 there (d_in is 8). All heads of it are: leave hook_head_index out"
    )
    assert "hook_head_index 2 is out of range" in refused(ConfigError, sae_at(HEADS, d_in=4, head=2), backend)
    assert refused(ConfigError, sae_at(RESID, head=0), backend) == (
        "hook_head_index 0 was given, but hook 'blocks.1.hook_resid_post' has no heads: its shape is [2, 7, 8]. Leave "
        "hook_head_index out"
    )


def test_a_hook_that_does_not_run(lens: Any) -> None:
    assert "does not run as the model is configured" in refused(ModelError, sae_at("blocks.0.attn.hook_result"), lens)


def test_all_sites_of_what_has_several_are_checked() -> None:
    sites = Sites((Site(hook_name="hook_embed"),), (Site(hook_name=HEADS), Site(hook_name=RESID)))
    assert check_fits(mapping({"hook_embed": 8}, {HEADS: 8, RESID: 8}, sites), FakeBackend()) == sites
    message = refused(ConfigError, mapping({"hook_embed": 3}, {HEADS: 8, RESID: 5}, sites), FakeBackend())
    assert message == (
        "the SAE in this model has 2 problems:\n"
        "  - hook_embed: is 8 wide in 'fake', and the SAE expects 3 there (d_in is 3)\n"
        "  - blocks.1.hook_resid_post: is 8 wide in 'fake', and the SAE expects 5 there (d_out is 13)"
    )


def test_sites_that_are_not_as_many_as_the_sae_has() -> None:
    both = (Site(hook_name="hook_embed"), Site(hook_name=RESID))
    message = refused(ConfigError, sae_at(), FakeBackend(), Sites(both))
    assert "inputs: are 2 (hook_embed, blocks.1.hook_resid_post), and the SAE has 1 (x)" in message
    transcoder = mapping({"a": 8}, {"b": 8}, None)
    assert refused(ConfigError, transcoder, FakeBackend()) == (
        "sites: are missing: the SAE does not say where in the model it belongs; say it here, or for good: "
        "sae.site = HOOK"
    )
    assert refused(ConfigError, transcoder, FakeBackend(), RESID) == (
        "targets: are the inputs (blocks.1.hook_resid_post), and it is a transcoder, which writes elsewhere (b); give "
        "Sites(inputs, targets)"
    )


def test_weights_are_looked_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    sae, backend = sae_at(), FakeBackend()
    check_fits(sae, backend)
    with monkeypatch.context() as watched:
        watched.setattr("saekit.weights.pieces", lambda *_: pytest.fail("they are looked at again"))
        check_fits(sae, backend)


@pytest.mark.parametrize(("number", "kind"), [(torch.nan, "NaN"), (torch.inf, "infinite")])
def test_weights_that_are_not_finite(number: float, kind: str) -> None:
    sae, backend = sae_at(), FakeBackend()
    check_fits(sae, backend)
    with torch.no_grad():
        sae.W_dec[3, :2] = number
    assert refused(SAEFormatError, sae, backend) == (
        f"W_dec of the SAE at blocks.1.hook_resid_post holds 2 {kind} among 240 numbers, expected finite ones"
    )
    assert len(backend.forwards) == 1


def test_another_model_is_a_warning_that_names_both() -> None:
    with pytest.warns(UserWarning, match="trained on activations of 'gpt2-small', and this model is 'fake'") as found:
        check_fits(sae_at(model_name="gpt2-small"), FakeBackend())
    assert len(found) == 1
    assert Path(found[0].filename).name != "fits.py", "who called is told"


def test_another_site_is_a_warning_that_names_both() -> None:
    sae, backend = sae_at(model_name="fake"), FakeBackend()
    said = (
        "an SAE that was trained at blocks.1.hook_resid_post is put at hook_embed, where 'fake' holds something else; "
        "its features may mean nothing there: leave the site out, or take an SAE that was trained at this one"
    )
    with pytest.warns(UserWarning, match=re.escape(said)):
        check_fits(sae, backend, "hook_embed")
    with pytest.warns(UserWarning, match=re.escape(said)), saekit.splice(backend, sae, sites="hook_embed"):
        pass
    head = Site(hook_name=HEADS, hook_head_index=0)
    with pytest.warns(UserWarning, match=r"trained at blocks.0.attn.hook_z.head1 is put at blocks.0.attn.hook_z.head0"):
        check_fits(sae_at(HEADS, d_in=4, head=1, model_name="fake"), backend, head)
    check_fits(sae, backend, RESID)
    check_fits(sae_at("hook_embed", model_name="fake"), backend, "hook_embed")
    check_fits(sae_at("layers.7", model_name="fake"), Translating(), RESID)  # of which nothing is known
    check_fits(sae_at("layers.1", model_name="fake"), Translating(), RESID)
    with pytest.warns(UserWarning, match=r"was trained at layers.1 is put at hook_embed"):
        check_fits(sae_at("layers.1", model_name="fake"), Translating(), "hook_embed")


def test_two_names_of_what_is_the_same_are_one_site() -> None:
    backend = saekit.load_model(make_causal_lm("gpt2"))
    for trained_at in ("transformer.h.0", "blocks.0.hook_resid_post", "blocks.1.hook_resid_pre"):
        for here in ("transformer.h.0", "transformer.h.1.input"):
            check_fits(sae_at(trained_at, d_in=WIDTH, model_name="custom"), backend, here)
        with pytest.warns(UserWarning, match=rf"trained at {trained_at} is put at transformer.h.1, where"):
            check_fits(sae_at(trained_at, d_in=WIDTH, model_name="custom"), backend, "transformer.h.1")


def test_all_sites_of_a_transcoder_are_compared() -> None:
    own = Sites((Site(hook_name="hook_embed"),), (Site(hook_name=RESID),))
    other = Sites((Site(hook_name="hook_embed"),), (Site(hook_name="blocks.0.hook_resid_post"),))
    sae = mapping({"a": 8}, {"b": 8}, own)
    sae.info = attrs.evolve(sae.info, metadata={"model_name": "fake"})
    check_fits(sae, FakeBackend())
    with pytest.warns(UserWarning, match=r"trained at blocks.1.hook_resid_post is put at blocks.0.hook_resid_post, w"):
        check_fits(sae, FakeBackend(), other)


def test_a_model_of_another_name_and_the_same_weights_is_the_same() -> None:
    class Weighed(Renamed):
        def fingerprint(self) -> str:
            return "0.1 0.2"

    for trained_on, here in (("owner/one", "/models/two"), ("/models/two", "one"), ("one", "two")):
        assert doubts_of_fit(sae_at(model_name=trained_on, model_fingerprint="0.1 0.2"), Weighed(here)) == []
        (said,) = doubts_of_fit(sae_at(model_name=trained_on, model_fingerprint="0.3"), Weighed(here))
        assert said.endswith(
            f"of {trained_on!r}, and this model is {here!r}; of another model its features mean nothing"
        )


def test_a_folder_may_be_another_name_of_the_model() -> None:
    for trained_on, here in (("owner/one", "/models/two"), ("./two", "one"), (r"C:\models\a", "one")):
        (said,) = doubts_of_fit(sae_at(model_name=trained_on), Renamed(here))
        assert said.endswith(f"is {here!r}, which may be another name of it: if they are two models, features mean "
                             "nothing here"), said  # fmt: skip
    (said,) = doubts_of_fit(sae_at(model_name="owner/one"), Renamed("other/two"))
    assert said.endswith("of another model its features mean nothing")


def test_a_model_of_the_same_name_that_was_trained_further_is_another() -> None:
    def loaded(change: float = 0.0, dtype: torch.dtype = torch.float32) -> Any:
        model = hooked_transformer().to(dtype)
        with torch.no_grad():
            for values in model.parameters():
                values += change * values.std().nan_to_num(0) * torch.randn_like(values)
        return saekit.load_model(model)

    before = loaded()
    about = {"model_class_name": "HookedTransformer", "model_fingerprint": before.fingerprint()}
    about |= {"model_processing": dict(before.processing())}
    for name in ("custom", "gpt2"):
        sae = sae_at(d_in=16, model_name=name, **about)
        assert doubts_of_fit(sae, before) == doubts_of_fit(sae, loaded(dtype=torch.bfloat16)) == []
        (said,) = doubts_of_fit(sae, loaded(0.3))
        assert "with other weights than those of this model, 'custom': one of the two was trained further" in said
    otherwise = [{"model_class_name": "AutoModelForCausalLM"}, {"model_fingerprint": "of a plugin"}]
    for other in (*otherwise, {"model_processing": None}, {"model_fingerprint": None}):  # nothing is known
        found = doubts_of_fit(sae_at(d_in=16, model_name="gpt2", **about | other), loaded(0.3))
        assert not any("other weights" in said for said in found)


SAME = [
    ("gpt2", "gpt2"), ("GPT2", "openai-community/gpt2"), ("google/gemma-2-2b", "/models/gemma-2-2b/"),
    ("C:\\models\\gpt2", "gpt2"), ("custom", "gpt2"), ("gpt2", "custom"), ("", "gpt2"),
    ("gpt2", "/cache/models--openai-community--gpt2/snapshots/607a30d783dfa663caf39e06633721c8d4cfcd7e"),
]  # fmt: skip


@pytest.mark.parametrize(("trained_on", "here"), SAME)
def test_names_of_one_model(trained_on: str, here: str) -> None:
    assert doubts_of_fit(sae_at(model_name=trained_on), Renamed(here)) == []


@pytest.mark.parametrize(("trained_on", "here"), [("gpt2", "gpt2-xl"), ("gpt2-small", "gpt2"), ("pythia-70m", "gpt2")])
def test_names_of_two_models(trained_on: str, here: str) -> None:
    assert len(doubts_of_fit(sae_at(model_name=trained_on), Renamed(here))) == 1


def test_other_names_of_the_model_are_asked_of_its_backend() -> None:
    sae = sae_at(model_name="gpt2-small")
    assert doubts_of_fit(sae, Renamed("gpt2", "gpt2-small")) == []
    assert len(doubts_of_fit(sae, Renamed("gpt2", "gpt2-medium"))) == 1


def test_backends_know_the_names_of_transformer_lens(lens: Any) -> None:
    assert {"gpt2", "gpt2-small"} <= also_called("gpt2-small") == also_called("gpt2")
    assert "gpt2-medium" not in also_called("gpt2")
    assert {*lens.other_names()} == {"custom"}


def test_another_bos_policy_is_a_warning_that_names_both() -> None:
    sae, backend = sae_at(prepend_bos=True), FakeBackend()
    check_fits(sae, backend)
    check_fits(sae, backend, prepend_bos=True)
    with pytest.warns(
        UserWarning,
        match=re.escape(
            "the SAE at blocks.1.hook_resid_post was trained on contexts that begin with BOS (prepend_bos = true), and "
            "here they do not begin with BOS (prepend_bos = false)"
        ),
    ):
        check_fits(sae, backend, prepend_bos=False)
    with pytest.warns(UserWarning, match=r"\(prepend_bos = false\), and here they begin with BOS"):
        check_fits(sae_at(prepend_bos=False), backend, prepend_bos=True)
    check_fits(sae_at(), backend, prepend_bos=True)


def test_the_model_of_an_sae_that_does_not_say() -> None:
    assert model_name_of(sae_at(model_name="gpt2")) == "gpt2"
    for about in ({}, {"model_name": "custom"}, {"model_name": None}):
        with pytest.raises(ConfigError) as raised:
            model_name_of(sae_at(**about), "--model")
        assert str(raised.value) == (
            "--model: is missing: the SAE does not say which model it was trained on (model_name in its metadata). "
            "Give --model: a name, a folder or a model that you have loaded"
        )
