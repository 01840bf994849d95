"""SAEs and models as ``saekit.evaluate`` takes them, and its choices of tokens."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support.causal_lms import WIDTH, causal_lm_folder
from support.fake_hub import FakeHub
from support.hub_releases import Published, hub_of
from support.saes import at, drawn_sae
from support.spliced import TOKENS, place
from support.sweeps import fake, manager, train

import saekit
from saekit.errors import ConfigError, SAEFormatError
from saekit.testing import FakeBackend
from saekit.tokens import TokenChoice

pytestmark = pytest.mark.usefixtures("one_thread")
RESID = "blocks.0.hook_resid_post"
BEGUN = torch.cat([torch.zeros(2, 1, dtype=torch.long), TOKENS[:, 1:]], 1)  # with BOS


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return train(fake(tmp_path_factory.mktemp("runs"), training={"training_tokens": 400}, evals={"run": []}))


def loss(model: Any, saes: Any, **options: Any) -> torch.Tensor:
    with saekit.splice(model, saes, **options) as spliced:
        found: torch.Tensor = spliced.run(BEGUN, want="loss").loss
    return found


def test_an_sae_is_given_by_its_run_its_folder_or_itself(result: Any) -> None:
    folder, plugins = Path(result.folder), manager()
    expected = loss(FakeBackend(), result.sae)
    for saes in (result, folder, str(folder), folder / "sae", [result], {"mine": folder}, folder.parent):
        for model in (FakeBackend(), None):
            torch.testing.assert_close(loss(model, saes, plugins=plugins), expected)
    with saekit.splice(None, result) as spliced:
        assert spliced.backend is result.backend
    with saekit.splice(None, {"mine": str(folder)}, plugins=plugins) as spliced:
        assert spliced.names[0] == "mine.hook_sae_input"
    with saekit.splice(FakeBackend(), [result, folder], plugins=plugins) as spliced:
        assert [one.name for one in spliced.attachments] == [f"{RESID}[1]", f"{RESID}[2]"]


def test_a_model_is_loaded_as_the_sae_says(tmp_path: Path) -> None:
    folder = causal_lm_folder("gpt2")
    about = {"model_name": str(folder), "model_class_name": "AutoModelForCausalLM"}
    sae = at(drawn_sae(WIDTH), "transformer.h.0", **about)
    loaded = saekit.load_model(folder, backend="AutoModelForCausalLM")
    for model in (None, str(folder), folder):
        torch.testing.assert_close(loss(model, sae), loss(loaded, sae))
    other = at(drawn_sae(WIDTH, seed=1), "transformer.h.1", **about)
    with saekit.splice(None, [sae, other]) as spliced:
        assert type(spliced.backend) is type(loaded), "one model for both"
    lens = at(drawn_sae(WIDTH), RESID, model_name=str(folder), model_class_name="HookedTransformer")
    with pytest.warns(UserWarning, match="loaded as HookedTransformer, with center_writing_weights = true"):
        expected = loss(loaded, lens)
    with pytest.warns(UserWarning, match="loaded as HookedTransformer, with center_writing_weights = true"):
        torch.testing.assert_close(loss(folder, lens, backend="AutoModelForCausalLM"), expected)


def test_what_no_model_is_known_for_says_so() -> None:
    sae = at(drawn_sae(8), RESID)
    with pytest.raises(ConfigError, match="model: is missing: the SAE does not say which model"):
        loss(None, sae)
    backend = {"backend": "AutoModelForCausalLM"}
    with pytest.raises(ConfigError, match="backend: is for the name of a model"):
        loss(FakeBackend(), sae, **backend)
    folders = [causal_lm_folder(kind) for kind in ("gpt2", "llama")]
    saes = [at(drawn_sae(WIDTH), "transformer.h.0", model_name=str(folder), model_class_name="AutoModelForCausalLM")
            for folder in folders]  # fmt: skip
    with pytest.raises(ConfigError, match=r"model: is missing: the SAEs are of several models, .*gpt2.* and .*llama"):
        loss(None, saes)


def test_what_is_no_sae_says_so(result: Any, tmp_path: Path) -> None:
    for given in (3, [3], {"a": None}):
        with pytest.raises(ConfigError, match="saes: must be an SAE, the result of saekit.train, a folder, or RELEASE"):
            loss(FakeBackend(), given)
    with pytest.raises(SAEFormatError, match="there is no file or folder nowhere, and no release of that name"):
        loss(FakeBackend(), "nowhere")
    for nothing in ([], {}):
        with pytest.raises(ConfigError, match="saes: names none; give an SAE"):
            loss(FakeBackend(), nothing)
    for name in "ab":
        train(fake(tmp_path, training={"training_tokens": 200}, evals={"run": []}, checkpoints={"name": name}))
    with pytest.raises(ConfigError, match="saes: 'mine' is 2 SAEs .*; give each a name"):
        loss(FakeBackend(), {"mine": tmp_path}, plugins=manager())


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[FakeHub]:
    one = Published("gpt2-small-res-jb", "blocks.0.hook_resid_pre", "sae_lens_3.0.0_standard")
    with hub_of(tmp_path, one) as hub:
        yield hub


def test_a_published_sae_is_given_by_its_name(hub: FakeHub) -> None:
    sae = saekit.SAE.from_pretrained("gpt2-small-res-jb", "blocks.0.hook_resid_pre")
    model = place("AutoModelForCausalLM").model
    with saekit.splice(model, "gpt2-small-res-jb:blocks.0.hook_resid_pre") as spliced:
        torch.testing.assert_close(spliced.attachments[0].sae.W_dec, sae.W_dec)


def test_tokens_are_chosen_as_evaluate_does() -> None:
    trained = at(drawn_sae(8), RESID, exclude_special_tokens=[5], seqpos_slice=[1, None])
    ids = TOKENS[0, :2].tolist()
    for options, expected in (
        ({"exclude_special_tokens": ids}, TokenChoice(exclude=ids, seqpos_slice=(1, None))),
        ({"exclude_special_tokens": True}, TokenChoice(exclude=[0], seqpos_slice=(1, None))),
        ({"exclude_special_tokens": False}, TokenChoice(seqpos_slice=(1, None))),
        ({"seqpos_slice": (2, None)}, TokenChoice(exclude=[5], seqpos_slice=(2, None))),
        ({"seqpos_slice": [None], "exclude_special_tokens": ids}, TokenChoice(exclude=ids)),
        ({}, TokenChoice(exclude=[5], seqpos_slice=(1, None))),
    ):
        with saekit.splice(FakeBackend(), trained, **options) as spliced:  # type: ignore[arg-type]
            assert spliced.attachments[0].tokens == expected, options
    odd: list[tuple[dict[str, Any], str]] = [
        ({"exclude_special_tokens": "all"}, "exclude_special_tokens: must be true, false or a list of token ids"),
        ({"exclude_special_tokens": [128]}, "has the token id 128, but the vocabulary of 'fake' ends at 127"),
        ({"seqpos_slice": ("1:",)}, r"seqpos_slice: is \['1:'\], expected whole numbers and none"),
        ({"seqpos_slice": [1], "tokens": TokenChoice()}, "tokens: says by id and by place which count: leave out"),
    ]
    for options, message in odd:
        with pytest.raises(ConfigError, match=message):
            loss(FakeBackend(), trained, **options)
