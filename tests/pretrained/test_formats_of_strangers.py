"""Formats that plugins write: what is asked of them, and what is said of those that fail."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from support.saved import make

import saekit
from saekit import SAE
from saekit.errors import UnknownKeyError
from saekit.pretrained import formats
from saekit.testing import fake_plugin, isolated_manager


class Stranger:
    def __init__(self, config: object) -> None:
        pass

    def detects(self, files: saekit.SAEFiles) -> bool:
        return "one.txt" in files.names

    def load(self, files: saekit.SAEFiles) -> saekit.PretrainedSAE:
        raise NotImplementedError


class Writing(Stranger):
    def write_sae(self, sae: SAE, folder: Path) -> None:
        (folder / "one.txt").write_text(str(sae.d_sae))


class Forgetting(Stranger):
    def write_sae(self, sae: SAE, folder: Path) -> None:
        pass


class Failing(Stranger):
    def write_sae(self, sae: SAE, folder: Path) -> None:
        (folder / "one.txt").write_text("half")
        raise ZeroDivisionError


def test_a_strangers_format(tmp_path: Path) -> None:
    def plugins(build: Any) -> saekit.PluginManager:
        return isolated_manager(fake_plugin("pretrained_loaders", "odd", build=build), builtins=True)

    sae = make()
    found = plugins(Writing)
    assert [key for key in formats(found) if key.endswith(":odd")]
    assert not [key for key in formats(plugins(Stranger)) if key.endswith(":odd")]
    sae.export(tmp_path / "a", "odd", plugins=found)
    assert (tmp_path / "a/one.txt").read_text() == "30"
    with pytest.raises(saekit.errors.PluginFailedError, match="write_sae returned None, and has written no file"):
        sae.export(tmp_path / "b", "odd", plugins=plugins(Forgetting))
    with pytest.raises(saekit.errors.PluginFailedError, match="failed in write_sae: ZeroDivisionError"):
        sae.export(tmp_path / "b", "odd", plugins=plugins(Failing))
    assert not (tmp_path / "b").exists()
    with pytest.raises(UnknownKeyError, match="Did you mean 'sparsify'"):
        sae.export(tmp_path / "b", "sparsfy")
