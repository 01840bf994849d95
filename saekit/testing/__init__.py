"""What plugin authors test with.  Importing this imports no torch.

::

    from saekit.testing import FakeBackend, isolated_manager

    def test_my_schedule():
        plugins = isolated_manager(my_module)
        schedule = plugins.build("lr_schedules", "halving", lr=1.0, steps=100)
        assert schedule(0) == 1.0
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import attrs

from saekit.backends.base import Backend
from saekit.backends.forward import Hooks
from saekit.kinds import KINDS, Kind, kind_of
from saekit.plugins.hookspecs import hookimpl
from saekit.plugins.manager import PluginManager
from saekit.plugins.registry import Entry
from saekit.testing.sparse import check_sparse_activation

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "FakeBackend",
    "FakeConfig",
    "check_sparse_activation",
    "fake_plugin",
    "isolated_manager",
    "plugin_of",
]


def isolated_manager(*plugins: object, distribution: str = "test", builtins: bool = False) -> PluginManager:
    """A manager with these plugins (modules, or objects with hook methods) and no installed ones.

    The plugins appear as coming from ``distribution``.  With ``builtins``, saekit's own plugins are there too, and
    nobody else's.
    """
    manager = PluginManager(discover=False)
    if builtins:
        _register_builtins(manager)
    for number, plugin in enumerate(plugins):
        name = getattr(plugin, "__name__", type(plugin).__name__)
        manager.register(
            plugin, name=name if number == 0 else f"{name}.{number}", distribution=distribution, version="0"
        )
    return manager


def _register_builtins(manager: PluginManager) -> None:
    from importlib.metadata import distribution

    own = distribution("saekit")
    for point in sorted(own.entry_points.select(group="saekit"), key=lambda point: point.name):
        manager.register(point.load(), name=point.name, distribution="saekit", version=own.version)


def plugin_of(kind: Kind[Any] | str, *entries: Entry) -> object:
    """A plugin that returns ``entries`` from the hook of ``kind``, such as ``lr_schedules``."""

    def hook() -> Iterable[Entry]:
        return entries

    hook.__name__ = kind_of(kind).hook
    return SimpleNamespace(__name__=f"fake_{kind}", **{hook.__name__: hookimpl(hook)})


@attrs.frozen(kw_only=True)
class FakeConfig:
    """Options of a fake plugin."""

    value: int = 0
    """Any number."""


def fake_plugin(
    kind: Kind[Any] | str,
    name: str = "fake",
    build: Callable[..., Any] | None = None,
    config: type = FakeConfig,
    **entry: Any,
) -> object:
    """A plugin with one entry of ``kind``; without ``build``, it builds ``(kind, config, services)``.

    That tuple passes for what the kind promises, and does nothing.
    """
    kind = str(kind)
    if kind not in KINDS:
        raise ValueError(f"there is no kind {kind!r}; the kinds are {', '.join(KINDS)}")

    return plugin_of(kind, Entry(name, config, build or _echo(kind), **entry))


@functools.cache
def _echo(kind: str) -> Callable[..., Any]:
    """One ``build`` per kind, so that fakes may share an options class as aliases do."""

    def build(config: Any, **services: Any) -> Any:
        return _Echo((kind, config, services))

    return build


class _Echo(tuple[str, Any, Mapping[str, Any]]):
    """What was asked for, with every method and value that its kind must have."""

    end = 0.0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self

    def __getattr__(self, name: str) -> Any:
        if name in (*KINDS[self[0]].methods, *KINDS[self[0]].values):
            return self
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")


class FakeBackend(Backend):
    """A tiny language model for tests: an embedding that is doubled by each of two blocks, and an unembedding.

    Its hooks are ``hook_embed``, ``blocks.0.hook_resid_post``, ``blocks.1.hook_resid_post`` (``[b, t, 8]``) and
    ``blocks.0.attn.hook_z`` (``[b, t, 2, 4]``); its tokenizer gives each character a token, and its only special token
    is ``bos`` (0).
    """

    name = "fake"
    device = "cpu"
    n_ctx: int | None = 64
    d_vocab = 128
    d_model = 8

    def __init__(self, seed: int = 0) -> None:
        self.special_tokens: Mapping[str, int | None] = {"bos": 0, "eos": None, "sep": None}
        self.forwards: list[tuple[int, ...]] = []
        """The shape of the tokens of every forward so far."""
        self._seed = seed
        self._weights: Tensor | None = None

    def hook_names(self) -> Sequence[str]:
        return ["hook_embed", "blocks.0.attn.hook_z", "blocks.0.hook_resid_post", "blocks.1.hook_resid_post"]

    def tokenize(self, text: str) -> list[int]:
        return [min(ord(character), self.d_vocab - 1) for character in text]

    def token_texts(self, tokens: Sequence[int]) -> list[str]:
        return [chr(token) for token in tokens]

    def unembedding(self) -> tuple[Tensor, Tensor | None]:
        return self._embedding().T, None

    def forward(self, tokens: Tensor, hooks: Hooks) -> Tensor | None:
        self.forwards.append(tuple(tokens.shape))
        embedding = self._embedding()
        residual = hooks("hook_embed", embedding[tokens])
        heads = hooks("blocks.0.attn.hook_z", residual.reshape(*residual.shape[:2], 2, 4))
        residual = hooks("blocks.0.hook_resid_post", residual + heads.flatten(-2))
        residual = hooks("blocks.1.hook_resid_post", residual * 2)
        return None if hooks.done else residual @ embedding.T

    def _embedding(self) -> Tensor:
        import torch

        if self._weights is None:
            with torch.inference_mode(False):  # gradients may be asked for later
                generator = torch.Generator().manual_seed(self._seed)
                self._weights = torch.randn(self.d_vocab, self.d_model, generator=generator)
        return self._weights
