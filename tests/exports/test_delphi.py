"""delphi's cache: read as delphi reads it, it is what the SAE gives."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from saekit_plugins.backends.hook_names import layout_of
from safetensors.numpy import load_file
from support.failing_disk import failing_at
from support.stores import HOOK, LastKnown, dense, small_sae, small_store, some_contexts
from typer.testing import CliRunner

import saekit
from saekit.cli import app
from saekit.errors import ConfigError, DataError, PlaceError, StorageError
from saekit.exports import delphi
from saekit.exports.delphi import module_path_of


@pytest.fixture
def export(store: Any, tmp_path: Path) -> Any:
    def exported(features: Any = store, **options: Any) -> Path:
        given = {"folder": tmp_path / "out", "module_path": "layers.1", "verbose": False} | options
        return saekit.export_delphi(features, **given)

    return exported


def read(home: Path, shape: tuple[int, ...]) -> np.ndarray[Any, Any]:
    """As delphi does: from the names of files and what is in them alone."""
    found = np.zeros(shape, np.float16)
    for path in home.glob("*.safetensors"):
        first = int(path.stem.split("_")[0])
        data = load_file(path)
        locations = data["locations"].astype(np.int64)
        found[locations[:, 0], locations[:, 1], locations[:, 2] + first] = data["activations"]
    return found


def test_what_is_read_is_what_the_sae_gives(export: Any, tmp_path: Path) -> None:
    home = export(n_splits=5)
    assert home == tmp_path / "out" / "layers.1"
    truth = dense(small_sae())
    truth[truth.abs() <= 1e-5] = 0
    assert np.array_equal(read(home, truth.shape), truth.half().numpy())
    ranges = sorted(tuple(map(int, path.stem.split("_"))) for path in home.glob("*.safetensors"))
    bounds = torch.linspace(0, 24, 6).long().tolist()
    assert ranges == [(first, after - 1) for first, after in itertools.pairwise(bounds)]
    for path in home.glob("*.safetensors"):
        data = load_file(path)
        assert data["locations"].dtype == np.uint16
        assert data["activations"].dtype == np.float16
        assert np.array_equal(data["tokens"], some_contexts())
        rows = data["locations"].tolist()
        assert rows == sorted(rows), "token by token, as a forward finds them"
    config = json.loads((home / "config.json").read_text())
    assert (config["cache_ctx_len"], config["n_tokens"], config["n_splits"], config["model_name"]) == (
        12,
        480,
        5,
        "fake",
    )
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["layers.1"], "delphi takes each for a module"


def test_numbers_are_wider_where_they_must_be(export: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(delphi, "_NARROW", 30)  # of 40 contexts
    home = export(n_splits=1)
    assert load_file(home / "0_23.safetensors")["locations"].dtype == np.uint32
    truth = dense(small_sae())
    truth[truth.abs() <= 1e-5] = 0
    assert np.array_equal(read(home, truth.shape), truth.half().numpy())


def test_a_store_without_all_is_refused_with_what_to_collect(tmp_path: Path, export: Any, store: Any) -> None:
    sample = small_store(tmp_path / "sample", max_per_feature=10, top_kept=2)
    most = int(store.sae.fired.max())
    with pytest.raises(DataError, match=rf"a sample of the activations.* max_per_feature={most} \(--max-per-feature\)"):
        export(sample)
    some = small_store(tmp_path / "some", features=[1, 2])
    with pytest.raises(DataError, match=r"has 2 of the 24 features .* Collect all \(features='all'\)"):
        export(some)
    large = small_sae()
    with torch.no_grad():
        large.W_enc.mul_(1e5)
    with pytest.raises(DataError, match=r"activations up to .*, and delphi's cache holds float16, up to 65,504"):
        export(small_store(tmp_path / "large", large))
    assert not (tmp_path / "out").exists()


class Family:
    """What backends of a family of models know of hooks."""

    def __init__(self, name: str) -> None:
        self._layout = layout_of(name)

    def hook_like(self, name: str) -> str | None:
        assert self._layout is not None
        return self._layout.module_hook(name)


def test_paths_are_those_of_modules_of_transformers() -> None:
    gpt2, llama = Family("gpt2"), Family("llama")
    assert module_path_of("blocks.1.hook_resid_post", gpt2) == "h.1"
    assert module_path_of("blocks.1.hook_resid_pre", llama) == "layers.0", "what the one before it gives"
    assert module_path_of("blocks.2.hook_mlp_out", llama) == "layers.2.mlp"
    assert module_path_of("model.layers.2.mlp", None) == "layers.2.mlp"
    assert module_path_of("transformer.h.2.input", None) == "h.1"
    for hook, backend in (("blocks.0.hook_resid_pre", llama), ("blocks.1.attn.hook_z", gpt2)):
        with pytest.raises(ConfigError, match=r"module_path: is missing: .* delphi names modules by their outputs"):
            module_path_of(hook, backend)
    with pytest.raises(
        ConfigError, match=r"is a name of transformer_lens; pass a model of transformers, .* or say the"
    ):
        module_path_of(HOOK, None)
    with pytest.raises(ConfigError, match=r"is a name of transformer_lens; say the path, such as layers.5"):
        module_path_of("blocks.1.nothing", gpt2)


def test_the_module_is_named_by_a_model(store: Any, export: Any, tmp_path: Path) -> None:
    class Translating(LastKnown):
        def hook_like(self, name: str) -> str | None:
            return Family("gpt2").hook_like(name)

    home = export(module_path=None, model=Translating())
    assert home == tmp_path / "out" / "h.1"
    with pytest.raises(ConfigError, match=r"module_path: is missing: .*'blocks.1.hook_resid_post' is a name of"):
        export(module_path=None)
    for bad, why in (("../up", "is a path"), ("", "is not a name"), ("..", "names a folder")):
        with pytest.raises(ConfigError, match=rf"module_path: {why}.* expected such as layers.5"):
            export(module_path=bad)
    for splits in (0, 25, 1.5, True):
        with pytest.raises(ConfigError, match=r"n_splits: must be"):
            export(n_splits=splits)


def test_all_of_it_is_there_or_nothing(export: Any, tmp_path: Path) -> None:
    with (
        pytest.raises(
            StorageError, match=r"No space left on device\. Nothing of it is kept, .* the same call makes it$"
        ),
        failing_at(5, tmp_path / "out"),
    ):
        export()
    assert not (tmp_path / "out").exists()
    home = export()
    before = {path.name: path.read_bytes() for path in home.iterdir()}
    with pytest.raises(PlaceError, match=r"is there already: name another folder, or say overwrite \(--overwrite\)"):
        export(n_splits=2)
    assert {path.name: path.read_bytes() for path in home.iterdir()} == before
    export(n_splits=2, overwrite=True)
    assert sorted(path.name for path in home.iterdir()) == ["0_11.safetensors", "12_23.safetensors", "config.json"]
    (home / "mine.txt").write_text("")
    with pytest.raises(PlaceError, match=r"holds something else than delphi's cache: name another folder"):
        export(overwrite=True)


def test_the_config_of_a_model_is_no_cache(export: Any, tmp_path: Path) -> None:
    home = export()
    for path in home.iterdir():
        path.unlink()
    for text in ('{"hidden_size": 8}', "{"):
        (home / "config.json").write_text(text)
        with pytest.raises(PlaceError, match=r"holds something else than delphi's cache: name another folder"):
            export(overwrite=True)
        assert (home / "config.json").read_text() == text


def test_both_commands(store: Any, tmp_path: Path) -> None:
    def run(*words: object) -> str:
        done = CliRunner().invoke(app, ["export", *map(str, words)])
        assert done.exit_code == 0, (done.output, done.exception)
        return done.stdout.strip()

    assert run("delphi", store.folder, "--folder", tmp_path / "d", "--module-path", "layers.1") == str(
        tmp_path / "d" / "layers.1"
    )
    words = ["neuronpedia", store.folder, "--folder", tmp_path / "n", "--id", "a/2-b", "--features", "1-3"]
    assert run(*words, "--window", "2,1", "--top", "4") == str(tmp_path / "n")
    batch = json.loads((tmp_path / "n" / "batch-0.json").read_text())
    assert (batch["model_id"], batch["layer"], len(batch["features"])) == ("a", 2, 3)
    done = CliRunner().invoke(app, ["export", "neuronpedia", str(store.folder), "--window", "5"])
    assert "window: must be two whole numbers, such as 5,5, found '5'" in str(done.exception)
