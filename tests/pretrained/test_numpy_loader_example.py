"""The example plugin, installed beside saekit's built wheel in an environment made for it."""

from __future__ import annotations

import ast
import importlib
import json
from pathlib import Path

import numpy as np
import pytest
from support.installed import ROOT, built_wheel, fresh_environment, run

import saekit
from saekit.errors import SAEFormatError
from saekit.testing import isolated_manager

EXAMPLE = ROOT / "examples" / "saekit-numpy-loader"

CHECK = """
import json, sys
import numpy as np, torch
import saekit

sae = saekit.SAE.load(sys.argv[1])
x = torch.from_numpy(np.load(sys.argv[2]))
print(json.dumps({"saekit": saekit.__file__, "site": sae.info.site.hook_name, "out": sae(x).tolist()}))
"""


def test_it_is_short() -> None:
    assert len((EXAMPLE / "saekit_numpy_loader.py").read_text().splitlines()) <= 40


def test_it_uses_the_public_interface_only() -> None:
    tree = ast.parse((EXAMPLE / "saekit_numpy_loader.py").read_text())
    modules = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert modules == {"saekit", "saekit.errors"}
    names = {a.name for node in tree.body if isinstance(node, ast.ImportFrom) and node.module == "saekit"
             for a in node.names}  # fmt: skip
    assert names <= set(saekit.__all__)


def arrays_of(rng: np.random.Generator) -> dict[str, np.ndarray]:
    shapes = {"W_enc": (5, 9), "b_enc": (9,), "W_dec": (9, 5), "b_dec": (5,)}
    return {name: rng.normal(size=shape, scale=0.3).astype(np.float32) for name, shape in shapes.items()}


GOOD = arrays_of(np.random.default_rng(0))


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({}, "does not hold an SAE: KeyError"),
        (GOOD | {"W_enc": np.zeros(3)}, "does not hold an SAE: ValueError"),
        (GOOD | {"b_enc": np.array([{}] * 9)}, "Object arrays cannot be loaded"),
        (GOOD | {"W_dec": GOOD["W_dec"].T}, r"W_dec has shape \[5, 9\], expected \[9, 5\]"),
        (GOOD | {"more": np.zeros(3)}, "more is not a tensor of this architecture"),
        (b"", "does not hold an SAE: EOFError"),
        (b"PK\x03\x04 cut off", "does not hold an SAE: BadZipFile"),
    ],
    ids=["empty", "vector", "pickle", "transposed", "more", "no bytes", "cut off"],
)
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # numpy leaves a cut-off file open
def test_bad_files(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, arrays: object, message: str) -> None:
    monkeypatch.syspath_prepend(EXAMPLE)
    plugins = isolated_manager(importlib.import_module("saekit_numpy_loader"), builtins=True)
    if isinstance(arrays, bytes):
        (tmp_path / "x.npz").write_bytes(arrays)
    else:
        np.savez(tmp_path / "x.npz", **arrays)
    with pytest.raises(SAEFormatError, match=message):
        saekit.SAE.load(tmp_path, plugins=plugins)


@pytest.mark.slow
def test_the_example_in_a_fresh_environment(tmp_path: Path) -> None:
    wheel = built_wheel(tmp_path / "dist")
    assert wheel.stat().st_size < 4_000_000
    python, fresh, environment = fresh_environment(tmp_path, wheel, EXAMPLE)

    rng = np.random.default_rng(1)
    arrays = arrays_of(rng)
    (tmp_path / "sae").mkdir()
    np.savez(tmp_path / "sae" / "any.npz", hook_name="blocks.3.hook_resid_pre", **arrays)
    x = rng.normal(size=(7, 5)).astype(np.float32)
    np.save(tmp_path / "x.npy", x)

    found = json.loads(run(python, "-c", CHECK, tmp_path / "sae", tmp_path / "x.npy", cwd=tmp_path, env=environment))
    assert Path(found["saekit"]).is_relative_to(fresh), "the built wheel, not the checkout"
    assert found["site"] == "blocks.3.hook_resid_pre"
    features = np.maximum((x - arrays["b_dec"]) @ arrays["W_enc"] + arrays["b_enc"], 0)
    assert np.abs(np.array(found["out"]) - (features @ arrays["W_dec"] + arrays["b_dec"])).max() < 1e-6

    listed = json.loads(run(fresh.parents[2] / "bin" / "saekit", "plugins", "--json", cwd=tmp_path, env=environment))
    (loader,) = [item for item in listed["plugins"] if item["key"] == "saekit-numpy-loader:npz"]
    assert (loader["kind"], loader["version"]) == ("pretrained_loaders", "0.1.0")
    assert sum(item["key"] == "saekit:cosine" for item in listed["plugins"]) == 1
