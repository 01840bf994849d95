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
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import attrs

from saekit.hookspecs import hookimpl
from saekit.manager import PluginManager
from saekit.protocols import ActivationFunction, Replacement, SparseActivation
from saekit.registry import KINDS, Entry

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


def plugin_of(kind: str, *entries: Entry) -> object:
    """A plugin that returns ``entries`` from the hook of ``kind``, such as ``lr_schedules``."""

    def hook() -> Iterable[Entry]:
        return entries

    hook.__name__ = f"saekit_register_{kind}"
    return SimpleNamespace(__name__=f"fake_{kind}", **{hook.__name__: hookimpl(hook)})


def check_sparse_activation(activation: ActivationFunction) -> None:
    """Verify that ``activation`` is what it declares by having the methods of a ``SparseActivation``.

    :class:`AssertionError` says what is not as it should be.  Numbers are compared with autograd's in float64.
    """
    import torch

    assert isinstance(activation, SparseActivation), (
        f"{activation!r} declares no sparse support: it needs in_place(pre) and pre_gradient(gradient, features)"
    )
    generator = torch.Generator().manual_seed(0)
    pre = torch.randn(64, 33, dtype=torch.float64, generator=generator) * 3
    pre[0, :4] = torch.tensor([0.0, -0.0, 1e-300, -1e-300])
    before = pre.clone()
    leaf = pre.clone().requires_grad_()
    features = activation(leaf)
    assert torch.equal(leaf.detach(), before), "calling it changes its argument"
    assert features.shape == pre.shape, f"it turns the shape {list(pre.shape)} into {list(features.shape)}"
    found = features.detach()
    assert bool((found >= 0).all()), "it is negative somewhere"
    assert not bool(found[pre <= 0].any()), "it is not zero wherever pre <= 0"
    alone = torch.cat([activation(number) for number in pre.flatten().split(1)]).reshape(pre.shape)
    assert torch.equal(alone, found), "it does not work on every number by itself"
    upstream = torch.randn(pre.shape, dtype=torch.float64, generator=generator)
    (expected,) = torch.autograd.grad(features, leaf, upstream)
    assert not bool(expected[pre <= 0].any()), "its derivative is not zero wherever pre <= 0"
    kept = found.clone()
    gradient = activation.pre_gradient(upstream.clone(), found)
    assert torch.equal(found, kept), "pre_gradient changes the features"
    assert torch.allclose(gradient, expected, rtol=1e-12, atol=1e-12), "pre_gradient is not what autograd finds"
    flat = activation.pre_gradient(upstream.flatten(), found.flatten())
    assert torch.equal(flat, gradient.flatten()), "pre_gradient does not work on every number by itself"
    written = activation.in_place(pre)
    assert torch.equal(written, found), "in_place is not what calling it returns"
    assert written.data_ptr() == pre.data_ptr(), "in_place does not write over its argument"


@attrs.frozen(kw_only=True)
class FakeConfig:
    """Options of a fake plugin."""

    value: int = 0
    """Any number."""


def fake_plugin(
    kind: str, name: str = "fake", build: Callable[..., Any] | None = None, config: type = FakeConfig, **entry: Any
) -> object:
    """A plugin with one entry of ``kind``; without ``build``, it builds ``(kind, config, services)``."""
    if kind not in KINDS:
        raise ValueError(f"there is no kind {kind!r}; the kinds are {', '.join(KINDS)}")

    return plugin_of(kind, Entry(name, config, build or _echo(kind), **entry))


@functools.cache
def _echo(kind: str) -> Callable[..., Any]:
    """One ``build`` per kind, so that fakes may share an options class as aliases do."""

    def build(config: Any, **services: Any) -> Any:
        return kind, config, services

    return build


class FakeBackend:
    """A tiny language model for tests: an embedding that is doubled by each of two blocks, and an unembedding.

    Keeps to :class:`saekit.protocols.ModelBackend`.  Its hooks are ``hook_embed``, ``blocks.0.hook_resid_post``,
    ``blocks.1.hook_resid_post`` (``[b, t, 8]``) and ``blocks.0.attn.hook_z`` (``[b, t, 2, 4]``); its tokenizer gives
    each character a token, and its only special token is ``bos`` (0).
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

    def activations(self, tokens: Tensor, hooks: Collection[str]) -> dict[str, Tensor]:
        held: dict[str, Tensor] = {}

        def keep(name: str) -> Replacement:
            def look(activation: Tensor) -> Tensor:
                held[name] = activation
                return activation

            return look

        self._residual(tokens, {name: keep(name) for name in hooks})
        return held

    def loss(self, tokens: Tensor, replacements: Mapping[str, Replacement] | None = None) -> Tensor:
        from torch.nn.functional import cross_entropy

        logits = self._residual(tokens, replacements or {}) @ self._embedding().T
        flat = cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten(), reduction="none")
        return flat.reshape(tokens.shape[0], -1)

    def _residual(self, tokens: Tensor, replace: Mapping[str, Replacement]) -> Tensor:
        self.forwards.append(tuple(tokens.shape))
        same: Replacement = lambda activation: activation  # noqa: E731
        residual = replace.get("hook_embed", same)(self._embedding()[tokens])
        heads = replace.get("blocks.0.attn.hook_z", same)(residual.reshape(*residual.shape[:2], 2, 4))
        residual = replace.get("blocks.0.hook_resid_post", same)(residual + heads.flatten(-2))
        return replace.get("blocks.1.hook_resid_post", same)(residual * 2)

    def _embedding(self) -> Tensor:
        import torch

        if self._weights is None:
            generator = torch.Generator().manual_seed(self._seed)
            self._weights = torch.randn(self.d_vocab, self.d_model, generator=generator)
        return self._weights
