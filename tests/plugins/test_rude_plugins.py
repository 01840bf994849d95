"""Loaders, architectures and backends that fail or give what they should not: each is named, and stops no other."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import attrs
import pytest
import torch

import saekit
from saekit.config import ModelConfig, SAEConfig
from saekit.errors import ModelError, PluginFailedError, PluginWarning, SAEFormatError
from saekit.plugins.manager import PluginManager
from saekit.sae.build import build_module
from saekit.testing import FakeBackend, fake_plugin, isolated_manager

KIND = "pretrained_loaders"


class Loader:
    """Of any format, by what it is made of."""

    def __init__(self, detects: Callable[[Any], Any], load: Callable[[Any], Any] = lambda files: None) -> None:
        self.detects, self.load = detects, load


def raises(error: BaseException) -> Callable[..., Any]:
    def function(*args: Any, **kwargs: Any) -> Any:
        raise error

    return function


def tiny(files: Any) -> saekit.PretrainedSAE:
    tensors = {"W_enc": torch.ones(2, 4), "b_enc": torch.zeros(4), "W_dec": torch.ones(4, 2), "b_dec": torch.zeros(2)}
    return saekit.PretrainedSAE(options={"d_in": 2, "d_sae": 4, "normalize_sae_decoder": False}, tensors=tensors)


def loaders(**loaders: Any) -> PluginManager:
    """A manager with these beside saekit's own; an exception is raised in build."""
    manager = isolated_manager(builtins=True)
    for name, loader in loaders.items():
        config = attrs.make_class("Config", [], frozen=True)
        build = raises(loader) if isinstance(loader, BaseException) else lambda config, loader=loader: loader
        manager.register(fake_plugin(KIND, name, build=build, config=config), name=name, distribution=f"{name}-dist")
    return manager


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "some.file").write_text("x")
    return tmp_path


BAD = {
    "detecting": (
        Loader(raises(KeyError("no"))),
        "'detecting-dist:detecting' (detecting-dist) failed in detects: KeyEr",
    ),
    "exiting": (
        Loader(raises(SystemExit(2))),
        "'exiting-dist:exiting' (exiting-dist) failed in detects: SystemExit: 2",
    ),
    "building": (
        ValueError("bad\x1b[2J"),
        r"'building-dist:building' (building-dist) failed in build: ValueError: bad\x1b",
    ),
    "nothing": (None, "'nothing-dist:nothing' (nothing-dist): build returned None, expected a pretrained loader"),
    "half": (
        SimpleNamespace(detects=bool),
        "half-dist:half' (half-dist): build returned namespace(detects=<class 'bool'>)",
    ),
    "unclear": (
        Loader(lambda files: torch.ones(2)),
        "'unclear-dist:unclear' (unclear-dist) failed in detects: RuntimeErr",
    ),
    "importing": (
        Loader(raises(ImportError("gone"))),
        "ImportError: gone In detects of the pretrained loader 'importing",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_a_loader_that_fails_to_look_stops_no_other(folder: Path, name: str) -> None:
    loader, said = BAD[name]
    plugins = loaders(**{name: loader}, good=Loader(lambda files: "some.file" in files.names, tiny))
    with pytest.warns(PluginWarning) as warned:
        assert saekit.SAE.load(folder, plugins=plugins).d_sae == 4
    (text,) = [str(warning.message) for warning in warned]
    assert said in text
    with pytest.raises(SAEFormatError, match="no loader recognizes") as caught:
        saekit.SAE.load(folder, plugins=loaders(**{name: loader}))
    assert said in str(caught.value)
    assert "\x1b" not in str(caught.value) + text


def test_a_loader_that_is_not_asked_is_not_built(folder: Path) -> None:
    plugins = loaders(bad=ValueError("bad"), good=Loader(raises(KeyError()), tiny))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert saekit.SAE.load(folder, loader="good", plugins=plugins).d_sae == 4


@pytest.mark.parametrize(
    ("load", "error", "said"),
    [
        (lambda files: None, PluginFailedError, "load returned None, expected a saekit.PretrainedSAE"),
        (lambda files: {}, PluginFailedError, "load returned {}, expected a saekit.PretrainedSAE"),
        (raises(IndexError("cut")), PluginFailedError, "failed in load: IndexError: cut"),
        (raises(SAEFormatError("not mine")), SAEFormatError, "not mine"),
    ],
)
def test_what_fails_in_reading_names_the_loader(folder: Path, load: Any, error: type[Exception], said: str) -> None:
    with pytest.raises(error) as caught:
        saekit.SAE.load(folder, plugins=loaders(mine=Loader(lambda files: "some.file" in files.names, load)))
    whole = " ".join([str(caught.value), *getattr(caught.value, "__notes__", [])])
    assert said in whole
    assert "pretrained loader 'mine-dist:mine' (mine-dist)" in whole


def test_an_architecture_that_is_none() -> None:
    kind = attrs.frozen(kw_only=True)(type("Config", (SAEConfig,), {"__module__": __name__}))
    plugins = isolated_manager(
        fake_plugin("sae_architectures", "odd", build=lambda config, **more: torch.nn.Linear(2, 4), config=kind),
        builtins=True,
    )
    item = plugins.get("sae_architectures", "odd")
    with pytest.raises(PluginFailedError) as caught:
        build_module(item, kind(d_sae=4), 2, plugins)
    assert "SAE architecture 'test:odd' (test 0): build returned Linear(" in str(caught.value)
    assert "which lacks encode(), decode(), losses(), training_step()" in str(caught.value)


class Partial(FakeBackend):
    run = None  # type: ignore[assignment]

    @property
    def tokenizer(self) -> Any:
        raise AssertionError("what need not be there is not asked for")


class WithProperties(FakeBackend):
    @property
    def special_tokens(self) -> Any:
        raise AssertionError("a property may take long, so it is not asked")

    @special_tokens.setter
    def special_tokens(self, value: Any) -> None: ...


@pytest.mark.parametrize(
    ("made", "error", "said"),
    [
        (FakeBackend, PluginFailedError, "a class, expected a model backend: an instance of it"),
        (Partial(), PluginFailedError, r"which lacks run\(\); expected a model backend"),
        (
            object(),
            PluginFailedError,
            r"which lacks hook_names\(\), tokenize\(\), .* name, device, n_ctx, d_vocab, special_",
        ),
        (ModelError("no such model"), ModelError, "no such model"),
        (MemoryError(), PluginFailedError, r"'test:fake' \(test 0\) failed in build: MemoryError"),
        (WithProperties(), None, ""),
    ],
)
def test_backends(made: Any, error: type[Exception] | None, said: str) -> None:
    build = raises(made) if isinstance(made, BaseException) else lambda config, **services: made
    plugins = isolated_manager(fake_plugin("model_backends", build=build))
    if error is None:
        assert plugins.build("model_backends", "fake", model=ModelConfig(), loaded=None) is made
        return
    with pytest.raises(error, match=said) as caught:
        plugins.build("model_backends", "fake", model=ModelConfig(), loaded=None)
    whole = " ".join([str(caught.value), *getattr(caught.value, "__notes__", [])])
    assert "model backend 'test:fake' (test 0)" in whole
