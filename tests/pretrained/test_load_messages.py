"""What is said of folders that cannot be loaded: what is missing, and what to do."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import attrs
import pytest
import torch
from support.bad_forms import FORMS, good
from support.formats import GIVEN, copied, edit_json

from saekit import SAE, SAEFiles
from saekit.errors import SAEFormatError
from saekit.pretrained import verify
from saekit.runs.checks import start_files
from saekit.testing import fake_plugin, isolated_manager

_CONNOR = "gpt2-small_L0_Hcat_z_lr1.20e-03_l11.80e+00_ds64_bs4096_dc1.00e-06_rsanthropic_rie25000_nr4_v9"
_LLAMA = "Llama3_1-8B-Base-L3R-8x/"
LACKING = {
    ("saekit", "cfg.json"): "sae_lens lacks cfg.json beside sae_weights.safetensors",
    ("sae_lens", "cfg.json"): "sae_lens lacks cfg.json beside sae_weights.safetensors",
    ("sae_lens", "sae_weights.safetensors"): "sae_lens lacks sae_weights.safetensors beside cfg.json",
    ("sae_lens 2", "sae_weights.safetensors"): "sae_lens lacks sae_weights.safetensors beside cfg.json",
    ("gated", "sae_weights.safetensors"): "sae_lens lacks sae_weights.safetensors beside cfg.json",
    ("sparsify", "layers.2/cfg.json"): "sparsify lacks cfg.json beside layers.2/sae.safetensors",
    ("sparsify", "layers.2/sae.safetensors"): "sparsify lacks sae.safetensors beside layers.2/cfg.json",
    ("dictionary_learning", "ae.pt"): "dictionary_learning lacks ae.pt beside config.json",
    ("mntss", "W_dec_4.safetensors"): "mntss lacks W_dec_4.safetensors beside W_enc_4.safetensors",
    ("mntss", "W_enc_4.safetensors"): "mntss lacks W_enc_4.safetensors beside W_dec_4.safetensors",
    ("temporal", "layer_12/temporal/conf.yaml"): "temporal lacks conf.yaml beside layer_12/temporal/latest_ckpt.safete",
    ("temporal", "layer_12/temporal/latest_ckpt.safetensors"): "temporal lacks latest_ckpt.safetensors beside layer_12",
    ("llama_scope", f"{_LLAMA}hyperparams.json"): "llama_scope lacks hyperparams.json in the folder above Llama3_1-8B-",
    ("llama_scope", f"{_LLAMA}checkpoints/final.safetensors"): "llama_scope lacks checkpoints/final.safetensors beside",
    ("gemma_3", FORMS["gemma_3"].weights): "gemma_3 lacks params.safetensors beside resid_post/layer_9_width_16k_l0_s",
    ("llama_scope_r1_distill", FORMS["llama_scope_r1_distill"].weights): "llama_scope_r1_distill lacks sae_weights.sa",
    ("connor_rob_hook_z", f"{_CONNOR}.pt"): f"connor_rob_hook_z lacks {_CONNOR}.pt beside {_CONNOR}_cfg.json",
}
"""Of a form, the file that is missing, and what is said."""


@pytest.mark.parametrize("case", LACKING, ids=lambda case: f"{case[0]} {Path(case[1]).name[-30:]}")
def test_what_is_missing_is_said(tmp_path: Path, case: tuple[str, str]) -> None:
    folder = good(FORMS[case[0]], tmp_path)
    (folder / case[1]).unlink()
    with pytest.raises(SAEFormatError, match="no loader recognizes .*, which has") as error:
        SAE.load(folder)
    name, lacks, missing = LACKING[case].partition(" lacks ")
    told = str(error.value)
    assert f". It looks like a folder of saekit:{name} [" in told
    assert f"] that{lacks}{missing}" in told
    assert "name one" not in told
    assert "; or" not in told
    assert "\n" not in told


def test_a_model_looks_like_nothing(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    (tmp_path / "cfg.json").write_text('{"d_in": 8}')
    with pytest.raises(SAEFormatError, match="which has cfg.json, config.json. There are .*; name one: loader=..."):
        SAE.load(tmp_path)


class Knowing:
    """Of a format of two files."""

    def __init__(self, said: Any) -> None:
        self.said = said

    def detects(self, files: Any) -> bool:
        return {"a.json", "a.bin"} <= files.names

    def load(self, files: Any) -> Any: ...

    def missing_part(self, files: Any) -> Any:
        if isinstance(self.said, Exception):
            raise self.said
        return self.said


def test_loaders_of_plugins_say_it_too(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text("{}")

    def told(**saying: Any) -> str:
        plugins = [
            fake_plugin(
                "pretrained_loaders",
                name,
                build=lambda config, said=said: Knowing(said),
                config=attrs.make_class("Config", {}, frozen=True),
            )
            for name, said in saying.items()
        ]
        with pytest.raises(SAEFormatError) as error:
            SAE.load(tmp_path, plugins=isolated_manager(*plugins))
        return str(error.value)

    both = told(one="a.bin beside a.json", other="b.bin")
    assert "a folder of test:one [" in both
    assert "] that lacks a.bin beside a.json; or it looks like a folder of test:other [" in both
    assert "There are test:one; name one" in told(one=None)
    assert "failed in missing_part: KeyError: 'x'" in told(one=KeyError("x"))
    assert "missing_part returned 5, expected a text, or None" in told(one=5)


# ---- files that are not what their names say

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab\nsize 12345678\n"
PARTS = [(name, part) for name, form in FORMS.items() for part in ("weights", "config") if getattr(form, part)]


@pytest.mark.parametrize(("name", "part"), PARTS)
def test_pointers_of_git_lfs(tmp_path: Path, name: str, part: str) -> None:
    """Which a clone without git-lfs has in the place of large files."""
    form = FORMS[name]
    folder = good(form, tmp_path / "a")
    (folder / getattr(form, part)).write_bytes(POINTER)
    for loader in (form.loader,) if name in GIVEN else (form.loader, None):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # which of two loaders it is
            with pytest.raises(SAEFormatError, match="pointers? of git-LFS.*`git lfs pull` in that repo") as error:
                SAE.load(folder, loader=loader)
        assert Path(getattr(form, part)).name in str(error.value)


def test_pointers_that_are_looked_for(tmp_path: Path) -> None:
    """As many as are told, of files that loaders read."""
    for name in ("README.md", "a.txt", *(f"part-{number:02}.BIN" for number in range(12)), "b.json"):
        (tmp_path / name).write_bytes(POINTER)
    assert SAEFiles.in_folder(tmp_path).pointers() == ["b.json", *(f"part-{number:02}.BIN" for number in range(9))]


def test_what_a_pointer_says_of_its_size(tmp_path: Path) -> None:
    folder = good(FORMS["sae_lens"], tmp_path)
    for text, said in ((POINTER, ", which has 12,345,678 bytes: `git lfs"), (POINTER[:60], "place of the file: `git")):
        (folder / "sae_weights.safetensors").write_bytes(text)
        with pytest.raises(SAEFormatError, match=said):
            SAE.load(folder)


CUT = {
    "sae_lens": "is not a readable safetensors file: it is cut off: {} of {} bytes are there. Fetch or copy it again",
    "dictionary_learning": "nothing else is unpickled: it is cut off: {} bytes are there, and not its end. Fetch or",
    "gemma_2": "is not a readable .npz file: it is cut off: {} bytes are there, and not its end. Fetch or copy it",
    "sae_lens_legacy pt": "cannot be read: it is cut off: {} bytes are there, and not its end. Fetch or copy it again",
    "sae_lens_legacy gz": "cannot be read: it is cut off. Fetch or copy it again",
}


@pytest.mark.parametrize("name", CUT)
def test_files_that_are_cut_off_or_empty(tmp_path: Path, name: str) -> None:
    form = FORMS[name]
    file = good(form, tmp_path) / form.weights
    whole = file.read_bytes()
    for size in (len(whole) - 1, len(whole) // 2):
        file.write_bytes(whole[:size])
        with pytest.raises(SAEFormatError, match=CUT[name].format(f"{size:,}", f"{len(whole):,}")):
            SAE.load(tmp_path, loader=form.loader)
    file.write_bytes(b"")
    with pytest.raises(SAEFormatError, match="it is empty"):
        SAE.load(tmp_path, loader=form.loader)


def test_a_header_that_is_cut_off_and_what_is_no_header(tmp_path: Path) -> None:
    file = good(FORMS["sae_lens"], tmp_path) / "sae_weights.safetensors"
    whole = file.read_bytes()
    first = 8 + int.from_bytes(whole[:8], "little")
    file.write_bytes(whole[:50])
    with pytest.raises(SAEFormatError, match=f"it is cut off: 50 of at least {first} bytes are there"):
        SAE.load(tmp_path)
    for damaged in (b"\0" * 8 + whole[8:], whole[:9] + b"x" * 40 + whole[49:], b"some other text, which is no header"):
        file.write_bytes(damaged)
        with pytest.raises(SAEFormatError, match="is not a readable safetensors file") as error:
            SAE.load(tmp_path)
        assert "cut off" not in str(error.value)


def test_a_whole_archive_that_is_refused_is_not_called_cut_off(tmp_path: Path) -> None:
    file = good(FORMS["dictionary_learning"], tmp_path) / "ae.pt"
    torch.save({"a": Path("b")}, file)
    with pytest.raises(SAEFormatError, match="nothing else is unpickled") as error:
        SAE.load(tmp_path)
    assert "cut off" not in str(error.value)


# ---- names of what was published in the place of a path

JB = "gpt2-small-res-jb"
PUBLISHED = {
    JB: f"{JB} is a release of published SAEs: saekit.SAE.from_pretrained('{JB}', ID) loads one, and `saekit saes info",
    f"saekit:{JB}": f"saekit.SAE.from_pretrained('saekit:{JB}', ID) loads one",
    f"{JB}:blocks.8.hook_resid_pre": f"saekit.SAE.from_pretrained('{JB}', 'blocks.8.hook_resid_pre') loads it, and",
    f"{JB}:blocks.99.hook": f"saekit.SAE.from_pretrained('{JB}', ID) loads one",
    "goodfire-llama-3.1-8b-instruct": "saekit.SAE.from_pretrained('goodfire-llama-3.1-8b-instruct') loads it, and save",
    "google/gemma-scope-2b-pt-transcoders/layer_5": "saekit.SAE.from_hub('google/gemma-scope-2b-pt-transcoders', 'lay",
    "google/gemma-scope-2b-pt-mlp": "(RELEASE, ID) one of gemma-scope-2b-pt-mlp or gemma-scope-2b-pt-mlp-canonical",
    "runs/nowhere": "",
    "no:where": "",
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_names_where_a_path_belongs(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for load in (SAE.load, start_files, verify):
        with pytest.raises(SAEFormatError, match=f"the SAE folder {name} is not there") as error:
            load(name)
        notes = getattr(error.value, "__notes__", [])
        assert len(notes) == bool(PUBLISHED[name])
        assert PUBLISHED[name] in "".join(notes)
    Path(name).mkdir(parents=True)
    with pytest.raises(SAEFormatError, match="which has no files") as error:
        SAE.load(name)
    assert not getattr(error.value, "__notes__", [])


# ---- dictionary_learning: what config.json leaves out


@pytest.mark.parametrize("kind", ["topk", "batchtopk"])
def test_the_trainer_says_which_class_it_is(tmp_path: Path, kind: str) -> None:
    folder = copied(f"dictionary_learning_0.1.0_{kind}", tmp_path)
    whole = SAE.load(folder)
    edit_json(folder / "config.json", lambda table: table["trainer"].pop("dict_class"))
    name = "BatchTopK" if kind == "batchtopk" else "TopK"
    for trainer in (f"{name}Trainer", f"Trainer{name}"):  # the second is that of older versions
        edit_json(folder / "config.json", lambda table, name=trainer: table["trainer"].update(trainer_class=name))
        sae = SAE.load(folder)
        assert sae.info.architecture == whole.info.architecture == f"saekit:{kind}"
        x = torch.randn(4, 16, generator=torch.Generator().manual_seed(0))
        assert torch.equal(sae.encode(x), whole.encode(x))


@pytest.mark.parametrize(
    ("trainer", "message"),
    [
        ({"k": 8}, "and the config.json beside it has no dict_class nor trainer_class. Say it: "),
        ({"trainer_class": "Mine"}, "no dict_class and trainer_class 'Mine', which is the trainer of neither. Say it"),
        ({"trainer_class": 5}, "trainer_class in config.json beside ae.pt in .* is 5, expected a text"),
        (None, "and no config.json beside it says which. Say it: loader={'name': 'dictionary_learning', 'dict_class'"),
    ],
)
def test_a_class_that_nothing_says(tmp_path: Path, trainer: dict[str, Any] | None, message: str) -> None:
    folder = copied("dictionary_learning_0.1.0_topk", tmp_path)
    if trainer is None:
        (folder / "config.json").unlink()
    else:
        edit_json(folder / "config.json", lambda table: table.update(trainer=trainer))
    with pytest.raises(SAEFormatError, match=message):
        SAE.load(folder)
