"""``saekit saes`` and ``saekit convert-config``: what they print, how they fail, and that they import nothing heavy."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from support import warm
from support.command import cli

import saekit
from saekit.commands.saes import found_release, info, info_text, listed, table, verified
from saekit.commands.terminal.saes import app
from saekit.errors import ConfigError, SAEFormatError, UnknownKeyError
from saekit.pretrained.catalog import Catalog, find_sae
from saekit.pretrained.hooks_of import hook_of

OF_2 = Path(__file__).parents[1] / "fixtures/sae_lens_2.1.3_folder/cfg.json"


@pytest.fixture(scope="module")
def catalog() -> Catalog:
    return Catalog()


def test_the_list_is_of_all(catalog: Catalog) -> None:
    text = table(listed(catalog))
    assert len(text.splitlines()) == 170 + 3
    assert text.endswith("170 releases, 13,857 SAEs")
    assert "gpt2-small-res-jb                                    13    gpt2-small" in text


def test_the_list_is_narrowed(catalog: Catalog) -> None:
    rows = listed(catalog, model="gemma-2-2b", hook="blocks.12.hook_resid_post", loader="gemma_2")
    assert {row["release"] for row in rows} == {"gemma-scope-2b-pt-res", "gemma-scope-2b-pt-res-canonical"}
    assert all(sae_id.startswith("layer_12/") for row in rows for sae_id in row["ids"])
    assert len(listed(catalog, hook="hook_embed")) == 2
    assert len(listed(catalog, model="gpt2-small", hook="hook_resid_mid")) == 2, "a hook without its block"
    assert listed(catalog, model="llama-3.1-8b-instruct") == listed(catalog, model="meta-llama/Llama-3.1-8B-Instruct")


def test_a_folder_is_no_release_and_has_no_probe(tmp_path: Path) -> None:
    folder = Path(__file__).parents[1] / "fixtures/goodfire"
    with pytest.raises(UnknownKeyError, match="there is no release") as error:
        found_release(str(folder), ())
    assert error.value.__notes__ == [f"{folder} is a path here: saekit show {folder} shows what it is"]
    with pytest.raises(UnknownKeyError, match="there is no release") as error:
        found_release(str(tmp_path / "nowhere"), ())
    assert not getattr(error.value, "__notes__", [])
    with pytest.raises(SAEFormatError, match="has no probe.safetensors, .* `saekit saes convert` makes a folder of it"):
        verified(str(folder), None)


def hooks_of(rows: list[dict[str, Any]], catalog: Catalog) -> set[str | None]:
    found = [(catalog.find(row["release"]), row["ids"]) for row in rows]
    return {hook_of(release, release.saes[one]) for release, ids in found for one in ids}


def test_a_part_of_a_name_will_do(catalog: Catalog) -> None:
    models = {row["model"] for row in listed(catalog, model="Gemma_2")}
    assert models == {"gemma-2-2b", "gemma-2-9b", "gemma-2-27b", "gemma-2-9b-it", "gemma-2b", "gemma-2b-it"}
    assert {row["model"] for row in listed(catalog, model="gemma-2b")} == {"gemma-2b"}, "what is exact goes before"
    of_gpt2 = {row["model"] for row in listed(catalog, model="gpt2")}
    assert of_gpt2 == {"gpt2-small"}
    for hook in ("12.resid_post", "blocks.12.resid_post", "layer 12 resid_post"):
        assert hooks_of(listed(catalog, model="gemma-2-2b", hook=hook), catalog) == {"blocks.12.hook_resid_post"}
    twelfth = hooks_of(listed(catalog, model="gemma-2-2b", hook="12"), catalog)
    assert twelfth >= {"blocks.12.hook_resid_post", "blocks.12.hook_mlp_out"}
    assert all(str(hook).startswith("blocks.12.") for hook in twelfth)
    assert listed(catalog, hook="resid_post") == listed(catalog, hook="hook_resid_post")
    some = info(catalog.find("gemma-scope-2b-pt-res"), hook="12")["saes"]
    assert {one["hook_name"] for one in some} == {"blocks.12.hook_resid_post"}
    with pytest.raises(UnknownKeyError, match="no SAE of gpt2-small-res-jb has the hook 'mlp'. There are blocks.0."):
        info(catalog.find("gpt2-small-res-jb"), hook="mlp")
    for number in ("12", 12):
        with pytest.raises(UnknownKeyError, match="Did you mean 'layer_12/width_16k/canonical' or 'layer_12/"):
            find_sae(catalog.find("gemma-scope-2b-pt-res-canonical"), number)  # type: ignore[arg-type]


def test_the_table_is_as_narrow_as_the_terminal(catalog: Catalog) -> None:
    rows = listed(catalog, model="gemma-2-2b", hook="12.resid_post")
    *lines, last = table(rows, columns=80).splitlines()
    assert max(map(len, lines)) <= 80
    assert lines[0].split() == ["release", "SAEs", "model"]
    assert last.endswith(" SAEs (loader and repository: in a wider terminal, or with --json)")
    assert table(rows, columns=500) == table(rows)
    assert table([rows[0] | {"ids": ["a"]}]).endswith("\n1 release, 1 SAE")


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ({"model": "gema-2b"}, "no release has the model 'gema-2b'. Did you mean 'gemma-2b'"),
        ({"loader": "gema_3"}, "no release has the loader 'gema_3'. Did you mean 'gemma_3'"),
        ({"hook": "blocks.1.hook_resid_prre"}, "Did you mean 'blocks.1.hook_resid_pre'"),
        ({"hook": "hook_resid_pst"}, "hook 'hook_resid_pst'. Did you mean 'hook_resid_post' or"),
        ({"hook": "13", "model": "gpt2"}, "no release of model 'gpt2' has the hook '13'. There are blocks.0."),
        ({"hook": ""}, "no release has the hook ''."),
        ({"model": " "}, "no release has the model ' '."),
        ({"loader": "zzzz"}, "no release has the loader 'zzzz'. There are connor_rob_hook_z, deepseek_r1"),
    ],
)
def test_what_no_release_has(catalog: Catalog, wanted: dict[str, Any], message: str) -> None:
    with pytest.raises(UnknownKeyError) as caught:
        listed(catalog, **wanted)
    assert message in str(caught.value)


def test_what_is_known_of_one(catalog: Catalog) -> None:
    release = catalog.find("gpt2-small-res-jb")
    data = info(release, find_sae(release, "blocks.8.hook_resid_pre"))
    assert (data["l0"], data["explained_variance"]) == (60.0, 0.9)
    assert data["neuronpedia"] == "https://www.neuronpedia.org/gpt2-small/8-res-jb"
    text = info_text(data)
    assert text.endswith('saekit.SAE.from_pretrained("gpt2-small-res-jb", "blocks.8.hook_resid_pre")')
    unknown = info_text(info(catalog.find("gemma-scope-2b-pt-res"), catalog.find("gemma-scope-2b-pt-res").saes[
        "embedding/width_4k/average_l0_6"]))  # fmt: skip
    assert "l0, explained_variance: not known" in unknown
    whole = info_text(info(release))
    assert "blocks.11.hook_resid_post  blocks.11.hook_resid_post  70.0  0.77" in whole
    assert "overrides.model_from_pretrained_kwargs" in whole


def test_the_commands(tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text('[mine]\nrepo = "a/b"\nsaes = {x = "y"}')
    rows = json.loads(cli("saes", "list", "--loader", "goodfire", "--json", watch=True).stdout)
    assert (rows[0]["release"], rows[0]["ids"]) == ("goodfire-llama-3.1-8b-instruct", ["layer_19"])
    one = json.loads(
        cli("saes", "info", "mine", "x", "--json", "--releases", "mine.toml", cwd=tmp_path, watch=True).stdout
    )
    assert (one["release"], one["path"], one["l0"], one["source"]) == ("mine", "y", None, "user")
    for arguments, message in (
        (
            ("info", "gpt2-small-res-jbb"),
            "error: there is no release 'gpt2-small-res-jbb'. Did you mean 'gpt2-small-res-jb'",
        ),
        (("info", "gpt2-small-res-jb", "blocks.8"), "Did you mean 'blocks.8.hook_resid_pre'"),
        (("list", "--releases", "gone.toml"), "error: the releases in gone.toml cannot be read: No such file"),
    ):
        assert message in cli("saes", *arguments, check=2, watch=True).stderr


def test_names_are_completed(tmp_path: Path) -> None:
    code = "import sys; sys.argv[0] = 'saekit'; from saekit.cli import main; main()"
    for words, expected in (
        ("saes info gpt2-small-res-j", ["gpt2-small-res-jb", "gpt2-small-res-jb-feature-splitting"]),
        ("saes info gpt2-small-res-jb blocks.11", ["blocks.11.hook_resid_pre", "blocks.11.hook_resid_post"]),
        ("saes list --loader gemma_", ["gemma_2", "gemma_2_transcoder", "gemma_3"]),
        ("saes list --model mis", ["mistral-7b"]),
    ):
        environment = os.environ | {"_SAEKIT_COMPLETE": "complete_fish", "_TYPER_COMPLETE_ARGS": f"saekit {words}",
                                    "_TYPER_COMPLETE_FISH_ACTION": "get-args"}  # fmt: skip
        done = warm.python("-c", code, env=environment, cwd=tmp_path, light=True)
        assert [line.partition("\t")[0] for line in done.stdout.splitlines()] == expected


def test_a_configuration_is_converted(tmp_path: Path) -> None:
    found = cli("convert-config", OF_2, tmp_path / "run.toml", watch=True)
    assert not found.stdout
    assert "renamed: hook_point is site.hook_name" in found.stderr
    assert "dropped: expansion_factor: d_sae says it" in found.stderr
    assert saekit.load_config(tmp_path / "run.toml").sae.options.d_sae == 64
    again = cli("convert-config", OF_2, tmp_path / "run.toml", check=2, watch=True)
    assert "is there already; choose another name" in again.stderr
    printed = json.loads(cli("convert-config", OF_2, "--json", watch=True).stdout)
    assert printed["renamed"]["hook_point"] == "site.hook_name"
    (tmp_path / "a.json").write_text('{"d_in": 3}')
    assert (
        "no configuration of a run that can be converted"
        in cli("convert-config", tmp_path / "a.json", check=2, watch=True).stderr
    )


def test_an_sae_is_converted_and_verified(tmp_path: Path) -> None:
    from saekit.commands.saes import converted, verified

    sae = saekit.SAE.from_dict({"name": "standard", "d_in": 4, "d_sae": 8, "normalize_sae_decoder": False})
    sae.save(tmp_path / "own")
    said = converted(str(tmp_path / "own"), str(tmp_path / "theirs"), "dictionary_learning", None, ())
    assert said == f"sae_8 (saekit:standard) is in {tmp_path}/theirs as dictionary_learning"
    x = torch.randn(5, 4)
    assert torch.allclose(saekit.SAE.load(tmp_path / "theirs")(x), sae(x), atol=1e-6)
    assert verified(str(tmp_path / "own"), None).endswith("own: as it was saved")
    with (tmp_path / "own/sae_weights.safetensors").open("r+b") as file:
        file.seek(-4, 2)
        file.write(b"\0\0\x80?")  # 1.0
    with pytest.raises(SAEFormatError, match="is not as it was saved:\n  - "):
        verified(str(tmp_path / "own"), None)


def test_a_release_of_one_sae_needs_no_id(tmp_path: Path) -> None:
    from saekit.commands.saes import converted, verified

    saekit.SAE.from_dict({"name": "standard", "d_in": 4, "d_sae": 8}).save(tmp_path / "files/only")
    (tmp_path / "a.toml").write_text('[mine]\nfolder = "files"\nsaes = { only = {} }\n')
    releases = [str(tmp_path / "a.toml")]
    for number, name in enumerate(("mine", "mine:only", "user:mine", "user:mine:only")):
        assert verified(name, None, releases) == f"{name}: as it was saved"
        converted(name, str(tmp_path / str(number)), "saekit", None, releases)
        assert saekit.SAE.load(tmp_path / str(number)).d_sae == 8
    with (tmp_path / "files/only/probe.safetensors").open("r+b") as file:
        file.seek(-4, 2)
        file.write(b"\xff\xff\0\0")
    with pytest.raises(SAEFormatError, match="probe.safetensors in .* is damaged or was changed"):
        verified("mine", None, releases)


def test_mistakes_about_conversion_need_no_torch(tmp_path: Path) -> None:
    for arguments, message in (
        (("convert", "nowhere", "b", "--to", "sae_lens"), "there is no file or folder nowhere, and no release"),
        (("convert", "gpt2-small-res-jb:blocks.8", "b", "--to", "sae_lens"), "Did you mean 'blocks.8.hook_resid_pre'"),
        (("convert", "gpt2-small-res-jb", "b", "--to", "sae_lens"), "has 13 SAEs; say which. It has blocks.0"),
        (("verify", "gpt2-small-res-j"), "Did you mean 'gpt2-small-res-jb'"),
        (("verify", "nowhere"), "there is no file or folder nowhere, and no release of that name. RELEASE:ID n"),
        (
            ("convert", ".", "b", "--to", "sae_lns"),
            "no format is called 'sae_lns'. Did you mean 'sae_lens'? There are saekit, ",
        ),
    ):
        assert message in cli("saes", *arguments, cwd=tmp_path, check=2, watch=True).stderr


def test_a_model_may_be_named_alone(capsys: pytest.CaptureFixture[str]) -> None:
    app(["list", "gpt2"], standalone_mode=False)
    alone = capsys.readouterr().out
    app(["list", "--model", "gpt2"], standalone_mode=False)
    assert alone == capsys.readouterr().out
    assert "gpt2-small-res-jb" in alone
    with pytest.raises(ConfigError, match="--model: is 'gpt2', beside 'gemma', which is a model, too; give one"):
        app(["list", "gemma", "--model", "gpt2"], standalone_mode=False)
