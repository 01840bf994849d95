"""What sae-lens says otherwise of a model and its text: read as it means it, and written so that it loads the same."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import attrs
import pytest
import torch
from saekit_plugins.backends.model_folders import model_folder
from support.causal_lms import TOKENS, WIDTH, causal_lm_folder
from support.formats import edit_json
from support.saved import make
from support.tiny import needs_transformer_lens_3

import saekit
from saekit import SAE, ConfigError, ModelError
from saekit.commands.looking import backend_of, numbers_of
from saekit.for_sae_lens import BY_DEFAULT, NO_PROCESSING, said_by_sae_lens, said_to_sae_lens
from saekit.plugins.manager import default_manager
from saekit.pretrained.card import CardSAE, model_card
from saekit.pretrained.copying import read_config
from saekit.pretrained.overriding import overridden
from saekit.pretrained.provenance import provenance
from saekit.saved import PretrainedSAE

FIXTURES = Path(__file__).parents[1] / "fixtures"
LENS = {"model_class_name": "HookedTransformer", "model_from_pretrained_kwargs": {"center_writing_weights": False}}
HERE = {"model_class_name": "HookedTransformer", "model_from_pretrained_kwargs": {}}
DONE = {"fold_ln": True, "center_writing_weights": True}
HOOK = "blocks.1.hook_resid_post"


def saved(folder: Path, metadata: dict[str, Any], *, theirs: bool, hook: str = HOOK) -> Path:
    """An SAE with that metadata, in a folder of saekit or, without its part, as sae-lens 6 leaves one."""
    sae = make(hook, d_in=WIDTH)
    sae.info = attrs.evolve(sae.info, metadata=metadata)
    path = sae.save(folder)

    def change(table: dict[str, Any]) -> None:
        del table["saekit"]
        table["metadata"] = {"hook_name": hook, **metadata}

    if theirs:
        edit_json(path / "cfg.json", change)
    return path


@pytest.mark.parametrize(
    ("versions", "processed"),
    [
        ({"sae_lens_version": "6.54.12", "sae_lens_training_version": "6.54.12"}, False),
        ({"sae_lens_version": "6.0.0"}, False),
        ({"sae_lens_version": "6.54.12", "sae_lens_training_version": "4.4.5"}, False),
        ({"sae_lens_version": "6.54.12", "sae_lens_training_version": "3.0.0"}, True),
        ({"sae_lens_version": "6.54.12", "sae_lens_training_version": None}, True),
        ({}, True),
    ],
)
def test_since_4_a_model_is_processed_only_where_the_arguments_say_so(
    tmp_path: Path, versions: dict[str, str | None], processed: bool
) -> None:
    """With null for a version, as 6 writes it of older ones, nobody knows."""
    found = SAE.load(saved(tmp_path / "a", LENS | versions, theirs=True)).info.metadata["model_from_pretrained_kwargs"]
    assert found == (LENS["model_from_pretrained_kwargs"] if processed else NO_PROCESSING)


def test_an_unknown_version_stays_unknown_to_sae_lens(tmp_path: Path) -> None:
    """It takes its own for a key that is not there."""
    about = LENS | {"sae_lens_version": "6.54.12", "sae_lens_training_version": None}
    path = SAE.load(saved(tmp_path / "a", about, theirs=True)).save(tmp_path / "b")
    told = json.loads((path / "cfg.json").read_text())["metadata"]
    assert told["sae_lens_training_version"] is None
    assert told["model_from_pretrained_kwargs"] == LENS["model_from_pretrained_kwargs"]
    edit_json(path / "cfg.json", lambda table: table.pop("saekit"))
    assert SAE.load(path).info.metadata["model_from_pretrained_kwargs"] == LENS["model_from_pretrained_kwargs"]


@pytest.mark.parametrize(
    "metadata",
    [
        {"model_class_name": "AutoModelForCausalLM", "model_from_pretrained_kwargs": {}},
        {"model_class_name": "HookedMamba"},
        {"model_name": "gpt2"},
        HERE | {"model_autocast": False},
    ],
)
def test_nothing_else_is_completed(metadata: dict[str, Any]) -> None:
    assert said_by_sae_lens(metadata, "6.54.12", HOOK) == {}


def test_without_the_class_arguments_are_completed_at_a_hook_of_transformer_lens_which_is_a_guess(
    tmp_path: Path,
) -> None:
    about = {"model_from_pretrained_kwargs": {"fold_ln": True}, "sae_lens_version": "6.54.12"}
    sae = SAE.load(saved(tmp_path / "a", about, theirs=True))
    assert sae.info.metadata["model_from_pretrained_kwargs"] == {**NO_PROCESSING, "fold_ln": True}
    assert "model_class_name" not in sae.info.metadata
    assert "model_from_pretrained_kwargs" in sae.info.metadata["defaulted"]
    other = SAE.load(saved(tmp_path / "b", about, theirs=True, hook="model.layers.1")).info.metadata
    assert other["model_from_pretrained_kwargs"] == {"fold_ln": True}
    assert "model_from_pretrained_kwargs" not in other.get("defaulted", ())


def test_by_default_is_said_to_sae_lens_of_what_was_trained_so() -> None:
    """sae-lens 6 would process nothing."""
    done = {name: True for name, value in BY_DEFAULT.items() if value}
    assert len(done) == 4
    for about in (HERE | {"sae_lens_training_version": "3.0.0"}, HERE | {"model_autocast": False}):
        assert said_to_sae_lens(about) == {"model_from_pretrained_kwargs": done}
    old = {"sae_lens_training_version": "2.1.3", "model_from_pretrained_kwargs": {"fold_ln": False}}
    assert said_to_sae_lens(old, HOOK) == {"model_from_pretrained_kwargs": done | {"fold_ln": False}}
    for about in (old, HERE, HERE | {"sae_lens_training_version": "4.0.0"}):
        assert said_to_sae_lens(about) == {}


def test_an_sae_says_options_of_its_own_among_the_arguments() -> None:
    """As sae-lens 6 writes them; a type of weights counts where none is given."""
    plugins = default_manager()
    kwargs = {"torch_dtype": "torch.bfloat16", "device_map": "auto", "n_devices": 2, "revision": "main", "x": 1}
    about: dict[str, Any] = {"model_class_name": "AutoModelForCausalLM", "model_from_pretrained_kwargs": kwargs}
    assert backend_of(about, "AutoModelForCausalLM", plugins) == {
        "name": "saekit:AutoModelForCausalLM", "revision": "main", "from_pretrained_kwargs": {"x": 1}}  # fmt: skip
    assert numbers_of(about | {"model_autocast": True}) == {"dtype": "bfloat16", "autocast": True}
    assert numbers_of(HERE | {"model_autocast": False}) == {}
    unprocessed = HERE | {"model_processing": dict.fromkeys(BY_DEFAULT, False)}
    found = backend_of(unprocessed, "HookedTransformer", plugins)
    assert isinstance(found, dict)
    assert found["from_pretrained_kwargs"] == {name: False for name, value in BY_DEFAULT.items() if value}
    found = backend_of({"model_from_pretrained_kwargs": {"fold_ln": False}}, None, plugins)
    assert found == {"name": "saekit:HookedTransformer", "from_pretrained_kwargs": {"fold_ln": False}}


def test_the_model_of_one_of_6_is_loaded_as_it_loads_it(tmp_path: Path) -> None:
    """Its value biases are not folded, which nobody would hear of."""
    needs_transformer_lens_3()
    hook = "blocks.1.attn.hook_z"
    about = LENS | {"model_name": str(causal_lm_folder("gpt2")), "sae_lens_training_version": "6.54.12"}
    sae = SAE.load(saved(tmp_path / "a", about, theirs=True, hook=hook))
    plain = saekit.load_model(causal_lm_folder("gpt2"), backend={
        "name": "HookedTransformer", "from_pretrained_kwargs": dict(NO_PROCESSING)}, device="cpu")  # fmt: skip
    processed = saekit.load_model(causal_lm_folder("gpt2"), device="cpu")
    with saekit.splice(None, sae, device="cpu") as spliced:
        own = spliced.backend
    models = own, saekit.load_model(sae, device="cpu"), plain, processed
    found, alone, expected, other = (model.run(TOKENS, read=[hook]).held[hook] for model in models)
    assert torch.equal(found, expected)
    assert torch.equal(alone, expected)
    assert not torch.allclose(found, other, atol=1e-4)


def test_one_that_an_older_saekit_has_saved_is_completed_as_it_is_read(tmp_path: Path) -> None:
    sae = SAE.load(saved(tmp_path / "a", LENS | {"sae_lens_training_version": "6.54.12"}, theirs=False))
    assert sae.info.metadata["model_from_pretrained_kwargs"] == NO_PROCESSING


def test_what_was_done_to_weights_in_training_is_an_argument_for_sae_lens(tmp_path: Path) -> None:
    """Its part says it; saekit's, and what is read again, is as it was."""
    metadata = HERE | {"model_name": "gpt2", "model_processing": DONE, "model_autocast": False}
    path = saved(tmp_path / "a", metadata, theirs=False)
    table = json.loads((path / "cfg.json").read_text())
    assert table["metadata"]["model_from_pretrained_kwargs"] == DONE
    assert table["saekit"]["metadata"] == metadata == dict(SAE.load(path).info.metadata)
    asked = metadata | {"model_from_pretrained_kwargs": {"fold_ln": False, "n_ctx": 8}}
    asked["model_processing"] = {"fold_ln": False, "center_writing_weights": True}
    assert said_to_sae_lens(asked)["model_from_pretrained_kwargs"] == {
        "fold_ln": False, "n_ctx": 8, "center_writing_weights": True}  # fmt: skip
    assert said_to_sae_lens({"model_class_name": "AutoModelForCausalLM", "model_processing": DONE}) == {}


def test_what_sae_lens_was_told_is_read_again_and_nothing_of_what_was_asked_is_lost(tmp_path: Path) -> None:
    kwargs = {"n_ctx": 8, "center_writing_weights": False, "fold_value_biases": True}
    metadata = {**HERE, "model_from_pretrained_kwargs": kwargs, "model_processing": {
        "fold_ln": True, "center_writing_weights": False, "fold_value_biases": True}}  # fmt: skip
    path = saved(tmp_path / "a", metadata, theirs=False)
    told = json.loads((path / "cfg.json").read_text())["metadata"]["model_from_pretrained_kwargs"]
    assert told == kwargs | {"fold_ln": True}
    edit_json(path / "cfg.json", lambda table: table.pop("saekit"))
    assert SAE.load(path).info.metadata["model_from_pretrained_kwargs"] == told
    assert (
        said_to_sae_lens(HERE | {"model_processing": dict.fromkeys(DONE, False)})["model_from_pretrained_kwargs"] == {}
    )


def test_a_model_as_it_was_saved_takes_no_arguments_but_that_nothing_is_done(tmp_path: Path) -> None:
    about = LENS | {"model_name": "saekit/tiny-python"}
    path = saved(tmp_path / "a", HERE | about | {"model_processing": DONE}, theirs=False)
    edit_json(path / "cfg.json", lambda table: table.pop("saekit"))
    assert SAE.load(path).info.metadata["model_from_pretrained_kwargs"] == {}
    assert model_folder("saekit/tiny-python", dict(NO_PROCESSING)) is not None
    for kwargs in ({"fold_ln": True}, {"n_ctx": 8}, {"fold_ln": 0}):
        with pytest.raises(ModelError, match=r"do not apply .*where it is an SAE that says them, say the backend wit"):
            model_folder("saekit/tiny-python", kwargs)


def test_the_key_of_its_own_backend_leaves_the_options_of_an_sae() -> None:
    sae = make(HOOK)
    about = LENS | {"model_name": "saekit/tiny-python", "model_from_pretrained_kwargs": {"fold_ln": True}}
    sae.info = attrs.evolve(sae.info, metadata=about)
    for key in (None, "HookedTransformer", "saekit:HookedTransformer"):
        with pytest.raises(ModelError, match=r"do not apply"):
            saekit.load_model(sae, backend=key, device="cpu")
    bare: Any = {"name": "HookedTransformer", "from_pretrained_kwargs": {}}
    assert saekit.load_model(sae, backend=bare, device="cpu").name == "saekit/tiny-python"
    sae.info = attrs.evolve(sae.info, metadata=HERE | {"model_name": "saekit/tiny-python", "model_autocast": True})
    assert [saekit.load_model(sae, device="cpu", autocast=said).autocast for said in (None, False)] == [
        True, False]  # fmt: skip
    sae.info = attrs.evolve(sae.info, metadata=about | {"model_name": "custom"})
    with pytest.raises(ConfigError, match=r"'custom': .*HookedTransformer, from_pretrained_kwargs \{'fold_ln': True\}"):
        saekit.load_model(sae)


def test_no_token_is_null_for_sae_lens(tmp_path: Path) -> None:
    none = dict.fromkeys(("begin_batch_token", "begin_sequence_token", "sequence_separator_token"), "none")
    path = saved(tmp_path / "a", none, theirs=False)
    table = json.loads((path / "cfg.json").read_text())
    assert {name: table["metadata"][name] for name in none} == dict.fromkeys(none)
    assert dict(SAE.load(path).info.metadata) == none

    edit_json(path / "cfg.json", lambda table: table.pop("saekit"))  # as sae-lens saves it again
    assert SAE.load(path).info.metadata.items() >= none.items()
    assert said_to_sae_lens({"sequence_separator_token": "bos", "begin_batch_token": 0}) == {}


def test_the_model_of_an_sae_by_another_backend_with_its_options(tmp_path: Path) -> None:
    sae = make("transformer.h.1", d_in=WIDTH)
    about = {"model_name": str(causal_lm_folder("gpt2")), "model_class_name": "AutoModelForCausalLM"}
    sae.info = attrs.evolve(sae.info, metadata=about)
    kwargs = {"torch_dtype": "bfloat16", "device_map": None}
    sae.info = attrs.evolve(sae.info, metadata=about | {"model_from_pretrained_kwargs": kwargs})
    assert saekit.load_model(sae, device="cpu", dtype="float32").unembedding()[0].dtype == torch.float32
    model = saekit.load_model(sae, device="cpu")
    assert "transformer.h.1" in model.hook_names()
    assert model.unembedding()[0].dtype == torch.bfloat16
    sae.info = attrs.evolve(sae.info, metadata=about | {
        "model_fingerprint": "9 9 9 9", "model_processing": dict(model.processing())})  # type: ignore[attr-defined]  # fmt: skip
    with pytest.warns(UserWarning, match="with other weights than those of this model"):
        saekit.load_model(sae, device="cpu")
    sae.info = attrs.evolve(sae.info, metadata={})
    with pytest.raises(ConfigError, match="the SAE does not say which model it was trained on"):
        saekit.load_model(sae)
    path = sae.save(tmp_path / "run" / "sae")
    for there in ("config.json", None):  # a model with an SAE beside it, and a folder that is none of both
        if there:
            (path.parent / there).write_text("{}")
        with pytest.raises(ModelError):
            saekit.load_model(path.parent)
        (path.parent / "config.json").unlink(missing_ok=True)
    (path.parent / "run.json").write_text("{}")
    for place in (path, path.parent):
        with pytest.raises(ConfigError, match=r"is the folder of an SAE. Its model is saekit.load_model\(saekit.SAE"):
            saekit.load_model(place)


TRAINED = {
    "sae_lens_6.54.12_standard": {"l1_coefficient": 2, "lp_norm": 1.0, "l1_warm_up_steps": 3},
    "sae_lens_6.54.12_topk": {"aux_loss_coefficient": 1.0},
    "sae_lens_6.54.12_batchtopk": {"aux_loss_coefficient": 0.5, "topk_threshold_lr": 0.25},
    "sae_lens_6.54.12_gated": {"l1_coefficient": 4, "l1_warm_up_steps": 0},
}


@pytest.mark.parametrize("name", TRAINED)
def test_how_6_trained_it_is_what_its_details_say_and_the_rest_is_not_told(tmp_path: Path, name: str) -> None:
    """Options that these files do not state are defaults: nobody is told them as facts, saved again or not."""
    folder = shutil.copytree(FIXTURES / name, tmp_path / "a")
    details = TRAINED[name]

    def change(table: dict[str, Any]) -> None:
        table["metadata"]["training_architecture_details"] = {"decoder_init_norm": 0.1, **details}

    edit_json(folder / "cfg.json", change)
    sae = SAE.load(folder)
    called = {"topk_threshold_lr": "threshold_lr"}
    assert {theirs: getattr(sae.config, called.get(theirs, theirs)) for theirs in details} == details
    if "standard" in name:
        assert sae.config.scale_sparsity_penalty_by_decoder_norm
    if "aux_loss_coefficient" in details:
        assert sae.config.aux_loss_normalization == "none"
    for one in (sae, SAE.load(sae.save(tmp_path / "b"))):
        card = CardSAE(folder="", config=read_config(one.save(tmp_path / "c"))).configuration
        said = {f"sae.{called.get(theirs, theirs)}" for theirs in details}
        assert said <= card.keys()
        assert not {"sae.b_dec_init_method", "sae.decoder_heuristic_init", "sae.k_aux"} & card.keys()
    older = json.loads((tmp_path / "b/cfg.json").read_text())
    del older["saekit"]["provenance"]["not_stated"]
    assert CardSAE(folder="", config=older).configuration == {}


def edited(folder: Path, name: str, table: dict[str, Any]) -> SAE:
    """The SAE of a fixture that states more."""
    shutil.copytree(FIXTURES / name, folder)
    edit_json(folder / "cfg.json", lambda config: config.update(table))
    return SAE.load(folder)


@pytest.mark.parametrize(
    ("name", "details"),
    [
        ("standard", {"l1_coefficient": [1, 2], "lp_norm": 0, "l1_warm_up_steps": 3}),
        ("topk", {"aux_loss_coefficient": -1}),
        ("jumprelu", {"jumprelu_bandwidth": 0, "l0_coefficient": 2.0}),
    ],
)
def test_details_of_training_that_cannot_be_so_here_are_left_out(
    tmp_path: Path, name: str, details: dict[str, Any]
) -> None:
    """They are not needed for inference, and the others hold."""
    sae = edited(tmp_path / "a", f"sae_lens_6.54.12_{name}", {"training_architecture_details": details})
    unknown = sae.info.provenance["not_stated"]
    wrong = {"standard": {"l1_coefficient", "lp_norm"}, "topk": {"aux_loss_coefficient"}, "jumprelu": {"bandwidth"}}
    assert wrong[name] <= {*unknown}
    assert {getattr(sae.config, one) for one in ("l1_warm_up_steps", "l0_coefficient") if hasattr(sae.config, one)} <= {
        3, 2.0}  # fmt: skip


STATES = {"mse_loss_normalization": None, "noise_scale": 0.5, "use_ghost_grads": True, "b_dec_init_method": "mean"}


def test_what_3_states_of_training_is_known(tmp_path: Path) -> None:
    sae = edited(tmp_path / "a", "sae_lens_3.0.0_standard", STATES | {"l1_coefficient": 4})
    expected = STATES | {"mse_loss_normalization": "none", "l1_coefficient": 4}
    assert {name: getattr(sae.config, name) for name in expected} == expected
    assert not {*expected, "expansion_factor", "dtype"} & {*sae.info.provenance["not_stated"]}
    assert "lp_norm" in sae.info.provenance["not_stated"]
    assert "l1_coefficient" not in sae.info.metadata


@pytest.mark.parametrize(
    "table", [{"mse_loss_normalization": "dense_batch"}, {"sae_lens_training_version": "2.1.3"},
              {"sae_lens_training_version": None}],
)  # fmt: skip
def test_a_coefficient_of_other_units_is_none_here(tmp_path: Path, table: dict[str, Any]) -> None:
    sae = edited(tmp_path / "a", "sae_lens_3.0.0_standard", table | {"l1_coefficient": 4})
    assert sae.info.metadata["l1_coefficient"] == 4
    assert "l1_coefficient" in sae.info.provenance["not_stated"]
    assert sae.config.l1_coefficient != 4


def test_that_nothing_is_left_open_is_said() -> None:
    """Else a card takes all for unknown, as of what an older saekit has saved."""
    read = PretrainedSAE(architecture="saekit:topk", options={"k": 4}, tensors={}, metadata={})
    files: Any = SimpleNamespace(opened={}, repo=None, address="a")
    told = provenance(read, "x:y", files, {}, {"k": 4, "dtype": "float32", "expansion_factor": None})
    assert told == {"loader": "x:y", "not_stated": []}
    card = CardSAE(folder="", config={"saekit": {"options": {"k": 4}, "provenance": told}})
    assert card.configuration == {"sae.k": 4}
    assert "not_stated" not in provenance(read, "saekit", files, {}, {"k": 4})


def test_the_card_of_a_folder_that_sae_lens_wrote() -> None:
    place = {"hook_name": "blocks.0.hook_resid_pre", "hook_head_index": None}
    about = {"sae_lens_version": "6.54.12", "l0": 16.25, "num_dead_features": 3, "model_name": "gpt2", **place}
    card = CardSAE(folder="", config={"architecture": "topk", "d_in": 8, "metadata": about})
    expected = {"site": "blocks.0.hook_resid_pre", "model": "gpt2", "L0": "16.25", "dead features": "3"}
    assert expected.items() <= card.facts.items()
    assert "saved by [sae-lens](https://pypi.org/project/sae-lens/) 6.54.12" in model_card("a/b", [card])
    flat = {"hook_point": "blocks.1.attn.hook_z", "hook_point_head_index": 2, "model_name": "gpt2", "d_in": 8}
    old = CardSAE(folder="", config={**flat, "sae_lens_training_version": "2.1.3"})
    assert old.facts["site"] == "blocks.1.attn.hook_z.head2"
    assert old.facts["model"] == "gpt2"
    both = CardSAE(folder="", config={"metadata": {"hook_name": "a", "hook_name_out": "b"}})
    assert both.facts["site"] == "a to b"
    measured = CardSAE(folder="", config={"metadata": about}, metrics={"l0": 20})
    assert measured.facts["L0"] == "20", "what is given counts more"


def test_of_arguments_a_release_says_each_for_itself() -> None:
    read = PretrainedSAE(architecture="saekit:topk", options={}, tensors={}, metadata={
        "model_from_pretrained_kwargs": {**NO_PROCESSING}})  # fmt: skip
    files: Any = SimpleNamespace(about={"model_from_pretrained_kwargs": {"fold_ln": True}}, asked=(), place="here")
    found = overridden(read, files, "saekit:sae_lens").metadata["model_from_pretrained_kwargs"]
    assert found == {**NO_PROCESSING, "fold_ln": True}
