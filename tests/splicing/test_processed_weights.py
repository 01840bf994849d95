"""What transformer_lens does to weights decides what hooks hold: an SAE that was trained on other ones says so."""

from __future__ import annotations

import warnings
from typing import Any

import attrs
import pytest
from support.causal_lms import KINDS, TOKENS, WIDTH, causal_lm_folder
from support.saved import make
from support.sweeps import manager
from support.tiny import hooked_transformer, needs_transformer_lens_3

import saekit
from saekit import ConfigError
from saekit.data import Corpus
from saekit.runs import metadata_of
from saekit.splicing import check_fits, doubts_of_fit
from saekit.testing import FakeBackend

pytestmark = pytest.mark.usefixtures("one_thread")
RESID = "blocks.1.hook_resid_post"
PLACES = ("hook_resid_pre", "hook_resid_mid", "hook_resid_post", "hook_attn_out", "hook_mlp_out", "attn.hook_z",
          "mlp.hook_pre", "mlp.hook_post", "attn.hook_v", "attn.hook_q")  # fmt: skip
LENS = {"model_class_name": "HookedTransformer", "model_from_pretrained_kwargs": {}}
HUGGING_FACE = {"model_class_name": "AutoModelForCausalLM"}


def sae_of(about: dict[str, Any], kind: str = "gpt2", hook: str = RESID) -> saekit.SAE:
    sae = make(hook, d_in=WIDTH)
    sae.info = attrs.evolve(sae.info, metadata={"model_name": str(causal_lm_folder(kind)), **about})
    return sae


def loaded(kind: str, backend: Any = "AutoModelForCausalLM") -> Any:
    return saekit.load_model(causal_lm_folder(kind), backend=backend)


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_said_where_hooks_hold_something_else_and_nowhere_else(kind: str) -> None:
    needs_transformer_lens_3()
    here, lens = loaded(kind), loaded(kind, "HookedTransformer")
    names = {name: found for place in PLACES if (found := here.hook_like(name := f"blocks.1.{place}")) is not None}
    names = {name: found for name, found in names.items() if name in lens.hook_names()}
    assert len(names) >= 5
    theirs, ours = lens.run(TOKENS, read=[*names]).held, here.run(TOKENS, read=[*names.values()]).held
    for name, found in names.items():
        differ = bool((theirs[name].flatten() - ours[found].flatten()).abs().max() > 1e-3)
        for backend, about, hook in ((here, LENS, found), (lens, HUGGING_FACE, name)):
            now, then = backend.processing(hook), backend.processing(hook, {"model_name": "a", **about})
            assert differ == any(now[key] != then[key] for key in now.keys() & then.keys()), (name, now, then)


def test_the_warning_names_both_and_the_hook() -> None:
    needs_transformer_lens_3()
    said = doubts_of_fit(sae_of(LENS), loaded("gpt2"), sites=saekit.Sites.one(saekit.Site(hook_name="transformer.h.1")))
    assert len(said) == 1
    assert "trained on a model loaded as HookedTransformer, with center_writing_weights = true" in said[0]
    assert "as AutoModelForCausalLM has it, is with center_writing_weights = false: 'transformer.h.1' holds" in said[0]
    with pytest.warns(UserWarning, match="something else than what the SAE has learned"):
        check_fits(sae_of(LENS), loaded("gpt2"))
    lens = loaded("gpt2", "HookedTransformer")
    with pytest.warns(UserWarning, match="loaded as AutoModelForCausalLM, with center_writing_weights = false"):
        check_fits(sae_of(HUGGING_FACE, hook="transformer.h.1"), lens)
    plain = {"name": "HookedTransformer", "from_pretrained_kwargs": {"center_writing_weights": False}}
    assert doubts_of_fit(sae_of(HUGGING_FACE), loaded("gpt2", plain)) == []
    assert len(doubts_of_fit(sae_of({"model_class_name": "HookedTransformer", "model_from_pretrained_kwargs": {
        "center_writing_weights": False}}), lens)) == 1  # fmt: skip


@pytest.mark.parametrize("compatible", [False, True])
def test_bridges_say_whether_they_were_made_compatible(compatible: bool) -> None:
    bridge = loaded("gpt2", {"name": "TransformerBridge", "compatibility_mode": compatible})
    other, same = (HUGGING_FACE, LENS) if compatible else (LENS, HUGGING_FACE)
    assert len(doubts_of_fit(sae_of(other), bridge)) == 1
    assert doubts_of_fit(sae_of(same), bridge) == []
    trained = {"model_class_name": "TransformerBridge", "model_compatibility_mode": compatible}
    assert doubts_of_fit(sae_of(trained), bridge) == []
    trained["model_compatibility_mode"] = not compatible
    assert "center_writing_weights" in doubts_of_fit(sae_of(trained), bridge)[0]


def test_what_was_seen_in_training_counts_more_than_what_a_name_promises() -> None:
    plain = saekit.load_model(hooked_transformer())  # passed from code, and never processed
    seen = dict(plain.processing())  # type: ignore[attr-defined]
    assert seen == {"fold_ln": False, "center_writing_weights": False}
    assert doubts_of_fit(sae_of(LENS | {"model_processing": seen}), plain) == []
    assert doubts_of_fit(sae_of({"model_name": "custom"} | LENS), plain) == [], "nobody knows"


def test_what_an_sae_does_not_say_is_a_doubt_or_nothing() -> None:
    here, older = loaded("gpt2"), LENS | {"model_autocast": False}
    (said,) = doubts_of_fit(sae_of(older), here, sites=saekit.Sites.one(saekit.Site(hook_name="transformer.h.1")))
    assert "was trained on a model loaded as HookedTransformer, by default with center_writing_weights = true" in said
    assert (
        "it is of an older saekit, and does not say whether it was so. As this one, as AutoModelForCausalLM has" in said
    )
    assert said.endswith("'transformer.h.1' may hold something else than what it has learned")
    assert doubts_of_fit(sae_of(older | {"model_processing": {}}), here) == [], "nothing was known"
    (strong,) = doubts_of_fit(sae_of(older | {"model_processing": {"center_writing_weights": True}}), here)
    assert "'blocks.1.hook_resid_post' holds something else" in strong
    assert doubts_of_fit(sae_of(older | {"model_name": "./a/folder/elsewhere/tiny-gpt2"}), here) == [], "of any kind"


def test_that_nothing_is_known_of_the_weights_is_saved() -> None:
    class Unknown(FakeBackend):
        def processing(self, hook_name: str | None = None, about: Any = None) -> dict[str, bool]:
            return {}

    plugins = manager(Unknown())
    config = saekit.load_config({"model": {"backend": "fake"}, "site": {"hook_name": RESID}}, plugins=plugins)
    corpus: Any = Corpus.of(config.dataset, config.evals, None)
    assert metadata_of(config, Unknown(), corpus, plugins)["model_processing"] == {}
    assert "model_processing" not in metadata_of(config, FakeBackend(), corpus, plugins)


def test_a_name_is_loaded_as_the_sae_says_unless_a_backend_is_named() -> None:
    needs_transformer_lens_3()
    folder = causal_lm_folder("gpt2")
    quick: dict[str, Any] = {"contexts": TOKENS, "verbose": False, "n_bootstrap": 0, "evals": ["reconstruction"]}
    centered, plain = sae_of(LENS), sae_of(HUGGING_FACE, hook="transformer.h.1")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message=".*wrong site, scale or model")
        found = saekit.evaluate({"a": centered, "b": plain}, model=folder, **quick)
    assert [one.about["backend"] for one in found.values()] == [
        "saekit:HookedTransformer",
        "saekit:AutoModelForCausalLM",
    ]
    assert found["a"].about["dtype"] == "float32"
    assert found["a"].about["autocast"] is False
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        other = saekit.evaluate(centered, model=folder, backend="AutoModelForCausalLM", **quick)
    assert sum("center_writing_weights" in str(one.message) for one in said) == 1
    assert other.about["backend"] == "saekit:AutoModelForCausalLM"
    assert other["explained_variance"] != pytest.approx(found["a"]["explained_variance"], abs=1e-3)
    with pytest.raises(ConfigError, match="backend: is for the name of a model"):
        saekit.evaluate(centered, model=loaded("gpt2"), backend="HookedTransformer", **quick)


def test_options_that_an_sae_says_are_off_stay_off() -> None:
    from saekit.commands.looking import backend_of
    from saekit.plugins.manager import default_manager

    about = {"model_compatibility_mode": True, "model_fold_ln": False, "model_tokenizer": ""}
    found = backend_of(about, "TransformerBridge", default_manager())
    assert found == {"name": "saekit:TransformerBridge", "compatibility_mode": True, "fold_ln": False, "tokenizer": ""}
