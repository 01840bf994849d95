"""Forwards that begin inside a model, against whole ones."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import pytest
import torch
from support.causal_lms import BLOCKS, LAYERS, TOKENS, causal_lm, causal_lm_folder, make_causal_lm
from support.tiny import hooked_mamba, hooked_transformer
from torch import Tensor, nn

import saekit
from saekit.abilities import StartsInside
from saekit.backends import Hooks, InsideBackend, next_token_loss
from saekit.config import ModelConfig
from saekit.errors import ModelError
from saekit.testing import FakeBackend, check_plugin, fake_plugin

pytestmark = pytest.mark.usefixtures("one_thread")

FAMILIES = ("gpt2", "llama", "neox", "gemma2", "serial neox")
LENS = ("HookedTransformer", "HookedMamba")


def built(key: str, loaded: object | None = None, options: Any = None, **config: Any) -> Any:
    manager = saekit.default_manager()
    return manager.build("model_backends", options or key, model=ModelConfig(**config), loaded=loaded)


@cache
def backend(kind: str) -> Any:
    if kind == "HookedTransformer":
        return built(kind, hooked_transformer(n_layers=LAYERS))
    if kind == "HookedMamba":
        return built(kind, hooked_mamba())
    made = make_causal_lm("neox", use_parallel_residual=False) if kind == "serial neox" else None
    return built("AutoModelForCausalLM", causal_lm(kind) if made is None else made)


def blocks(kind: str) -> str:
    return "blocks" if kind in LENS else BLOCKS[kind.removeprefix("serial ")]


def ends(kind: str, layer: int) -> tuple[str, str]:
    """The hooks that hold what enters a block, and what leaves it."""
    path = f"{blocks(kind)}.{layer}"
    return (f"{path}.hook_resid_pre", f"{path}.hook_resid_post") if kind in LENS else (f"{path}.input", path)


def inner(kind: str, layer: int) -> str:
    """A hook inside a block."""
    name = {"HookedTransformer": "hook_mlp_out", "HookedMamba": "hook_out_proj"}.get(kind, "mlp")
    return f"{blocks(kind)}.{layer}.{name}"


def last_hook(kind: str) -> str:
    """A hook after all blocks."""
    known = {"HookedTransformer": "ln_final.hook_normalized", "HookedMamba": "hook_norm"}
    if kind in known:
        return known[kind]
    head = backend(kind).model.get_output_embeddings()
    return next(name for name, module in backend(kind).model.named_modules() if module is head) + ".input"


@cache
def whole_forward(kind: str) -> Any:
    """Logits of a whole forward, and what it holds where blocks begin and end, inside the last ones, and after all."""
    places = {name for layer in range(count(kind)) for name in ends(kind, layer)}
    read = {*places, inner(kind, 1), inner(kind, count(kind) - 1), last_hook(kind)}
    return backend(kind).run(TOKENS, read=read, want="logits")


def count(kind: str) -> int:
    """How many blocks there are."""
    return len(backend(kind).model.get_submodule(blocks(kind)))


@contextmanager
def counted(kind: str) -> Iterator[list[int]]:
    """The numbers of the blocks that run."""
    ran: list[int] = []
    layers = backend(kind).model.get_submodule(blocks(kind))
    undo = [layer.register_forward_pre_hook(lambda *_, n=n: ran.append(n)) for n, layer in enumerate(layers)]
    try:
        yield ran
    finally:
        for handle in undo:
            handle.remove()


@pytest.fixture(params=[*FAMILIES, *LENS])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_the_entry_is_the_last_one_before_all_hooks(kind: str) -> None:
    found, n = backend(kind), count(kind)
    for layer in range(n):
        first, last = ends(kind, layer)
        assert found.entry_of([first]) == first
        assert found.entry_of([last]) == last
        assert found.entry_of([inner(kind, layer)]) == first
        assert found.entry_of({last_hook(kind), inner(kind, layer), last}) == first
    assert found.entry_of([last_hook(kind)]) == ends(kind, n - 1)[1] == found.entry_of([])
    embedded = (
        "hook_embed" if kind in LENS else next(name for name in found.hook_names() if "emb" in name or "wte" in name)
    )
    assert found.entry_of([embedded, inner(kind, 1)]) is None
    assert found.entry_of(["no.such.hook"]) is None


def test_what_comes_out_is_what_a_whole_forward_gives(kind: str) -> None:
    """Bit for bit, without and with replacements, and no block before the entry runs."""
    found, n, whole = backend(kind), count(kind), whole_forward(kind)
    for layer in (0, n - 1):
        for skipped, entry in zip((layer, layer + 1), ends(kind, layer), strict=True):
            later = [name for name in (inner(kind, n - 1), last_hook(kind)) if found.entry_of([entry, name]) == entry]
            halves: Any = {name: lambda held: held / 2 for name in (entry, *later[:1])}
            changed = found.run(TOKENS, read={entry, *later}, replace=halves, want="loss")
            with counted(kind) as ran:
                begun = found.run_from(TOKENS, entry, whole.held[entry], read={entry, *later}, want="logits")
                assert ran == list(range(skipped, n))
            assert torch.equal(begun.logits, whole.logits), entry
            for name in (entry, *later):
                assert torch.equal(begun.held[name], whole.held[name]), name
            again = found.run_from(TOKENS, entry, whole.held[entry], read=later, replace=halves, want="loss")
            assert torch.equal(again.loss, changed.loss)
            assert not torch.equal(again.loss, next_token_loss(begun.logits, TOKENS))
            for name in later:
                assert torch.equal(again.held[name], changed.held[name]), name


def test_a_forward_from_inside_ends_early_too(kind: str) -> None:
    found = backend(kind)
    entry, hook = ends(kind, 0)[1], inner(kind, 1)
    whole = whole_forward(kind).held
    with counted(kind) as ran:
        begun = found.run_from(TOKENS, entry, whole[entry], read={hook}).held
        assert ran == [1]
        ran.clear()
        assert torch.equal(found.run_from(TOKENS, entry, whole[entry], read={entry}).held[entry], whole[entry])
        assert ran == []
    assert torch.equal(begun[hook], whole[hook])


def test_gradients_begin_at_the_entry(kind: str) -> None:
    found = backend(kind)
    for entry in ends(kind, 1):
        whole = found.run(TOKENS, read={entry}, want="loss", grad=True)
        (expected,) = torch.autograd.grad(whole.loss.sum(), whole.held[entry])
        value = whole_forward(kind).held[entry]
        begun = found.run_from(TOKENS, entry, value, read={entry}, want="loss", grad=True)
        (gradient,) = torch.autograd.grad(begun.loss.sum(), begun.held[entry])
        assert torch.allclose(gradient, expected, atol=1e-7)
        assert not value.requires_grad
        given = value.clone().requires_grad_()
        found.run_from(TOKENS, entry, given, want="loss", grad=True).loss.sum().backward()
        assert torch.allclose(given.grad, expected, atol=1e-7)
        assert not found.run_from(TOKENS, entry, given, want="loss").loss.requires_grad
    for parameter in found.model.parameters():
        parameter.grad = None


def test_the_model_stays_as_it_was(kind: str) -> None:
    """After an exception, too, and when forwards are nested."""
    found, (entry, after) = backend(kind), ends(kind, 1)
    modules = [*found.model.named_modules()]
    hooks = [(len(part._forward_hooks), len(part._forward_pre_hooks)) for _, part in modules]
    whole = whole_forward(kind)

    def fails(held: Tensor) -> Tensor:
        raise KeyError("mine")

    def nested(held: Tensor) -> Tensor:
        if not inside:  # in forwards inside this one, the hooks of this one are met, too
            inside.append(held)
            inside[0] = found.run_from(TOKENS, after, held, want="logits").logits
            inside.append(found.run(TOKENS, want="logits").logits)
        return held

    with pytest.raises(KeyError, match="mine"):
        found.run_from(TOKENS, entry, whole.held[entry], replace={after: fails}, want="loss")
    inside: list[Tensor] = []
    outer = found.run_from(TOKENS, entry, whole.held[entry], replace={after: nested}, want="logits").logits
    for logits in (outer, *inside, found.run(TOKENS, want="logits").logits):
        assert torch.equal(logits, whole.logits)
    assert [*found.model.named_modules()] == modules
    assert [(len(part._forward_hooks), len(part._forward_pre_hooks)) for _, part in modules] == hooks


def test_hooks_of_others_are_met_once(kind: str) -> None:
    """What a hook that stays in the model does before the entry is in its value, and is not done again."""
    found = backend(kind)
    for entry in ends(kind, 1):
        where, how = (entry.removesuffix(".input"), "pre") if entry.endswith(".input") else (entry, "")
        module = found.model.get_submodule(where)
        if how:
            handle = module.register_forward_pre_hook(lambda module, args: (args[0] * 2, *args[1:]))
        else:
            handle = module.register_forward_hook(lambda module, args, out: out * 2)
        try:
            whole = found.run(TOKENS, read={entry}, want="logits")
            begun = found.run_from(TOKENS, entry, whole.held[entry], want="logits")
        finally:
            handle.remove()
        assert torch.equal(begun.logits, whole.logits), entry
        assert not torch.equal(begun.logits, whole_forward(kind).logits)


def test_what_is_attached_is_in_the_value_or_met_later(kind: str) -> None:
    found = backend(kind)
    for entry in ends(kind, 1):
        with found.attached({entry: lambda held: held * 2, inner(kind, 1): lambda held: held / 2}):
            whole = found.run(TOKENS, read={entry}, want="logits")
            begun = found.run_from(TOKENS, entry, whole.held[entry], want="logits")
            assert torch.equal(begun.logits, whole.logits), entry
        assert not torch.equal(begun.logits, whole_forward(kind).logits)


def test_what_a_forward_from_inside_refuses(kind: str) -> None:
    found, (entry, after) = backend(kind), ends(kind, 1)
    value = whole_forward(kind).held[entry]
    with pytest.raises(ModelError, match="has no hook 'no.such'"):
        found.run_from(TOKENS, entry, value, read={"no.such"})
    with pytest.raises(ModelError, match="has no hook 'no.such'"):
        found.run_from(TOKENS, "no.such", value)
    with pytest.raises(
        ModelError, match=f"cannot begin at the hook '{inner(kind, 1)}'; before it, it can at '{entry}'"
    ):
        found.run_from(TOKENS, inner(kind, 1), value)
    for name in (inner(kind, 0), entry):
        with pytest.raises(ModelError, match=f"'{name}' of .* does not run in a forward that begins at '{after}'"):
            found.run_from(TOKENS, after, value, read={name})
    with pytest.raises(ModelError, match=r"must be of the same tokens: \[3, 20, \.\.\.\], found the shape \[2, 20"):
        found.run_from(TOKENS, entry, value[:2])


def test_layers_that_return_tuples() -> None:
    """As those of older versions of transformers do."""

    class InTuple(nn.Module):
        def __init__(self, layer: nn.Module) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
            return self.layer(hidden[0] if isinstance(hidden, tuple) else hidden, *args, **kwargs), None

    made = make_causal_lm("llama")
    expected = built("AutoModelForCausalLM", made).run(TOKENS, want="logits").logits
    made.model.layers = nn.ModuleList(InTuple(layer) for layer in made.model.layers)
    made.model.norm.register_forward_pre_hook(lambda module, args: args[0][:1])
    found = built("AutoModelForCausalLM", made)
    for entry in ("model.layers.1.input", "model.layers.1", "model.layers.2"):
        whole = found.run(TOKENS, read={entry}, want="logits")
        assert found.entry_of([entry]) == entry
        assert torch.equal(whole.logits, expected)
        assert torch.equal(found.run_from(TOKENS, entry, whole.held[entry], want="logits").logits, expected)


def test_models_whose_layers_hand_on_more_are_refused() -> None:
    """One of which a later layer takes something of the first, and one whose layers run twice."""
    shared, kept = make_causal_lm("gpt2"), dict[str, Tensor]()

    class Late(nn.Module):
        def __init__(self, layer: nn.Module) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
            return self.layer(hidden + kept["first"], *args, **kwargs)

    shared.transformer.h[0].register_forward_hook(lambda module, args, out: kept.update(first=out))
    shared.transformer.h[2] = Late(shared.transformer.h[2])
    found = built("AutoModelForCausalLM", shared)
    assert found.entry_of(["transformer.h.2"]) == "transformer.h.2", "after which nothing of it is used"
    assert found.entry_of(["transformer.h.2.layer.mlp"]) is None
    twice = make_causal_lm("gpt2")
    twice.transformer.h[1] = twice.transformer.h[0]
    assert built("AutoModelForCausalLM", twice).entry_of(["transformer.h.2.mlp"]) is None


def test_a_lens_model_that_masks_padding_or_adds_positions_late() -> None:
    model = hooked_transformer(n_layers=2)
    found = built("HookedTransformer", model)
    tokens = TOKENS.clone()
    tokens[0, :3] = model.tokenizer.pad_token_id if model.tokenizer.pad_token_id is not None else 0
    entry = "blocks.1.hook_resid_pre"
    side = model.tokenizer.padding_side
    try:
        model.tokenizer.padding_side = "left"
        whole = found.run(tokens, read={entry}, want="loss")
        assert torch.equal(found.run_from(tokens, entry, whole.held[entry], want="loss").loss, whole.loss)
    finally:
        model.tokenizer.padding_side = side
    assert not torch.equal(found.run(tokens, want="loss").loss, whole.loss)
    model.cfg.positional_embedding_type = "shortformer"
    assert found.entry_of([entry]) is None
    model.cfg.positional_embedding_type = "standard"
    from saekit_plugins.backends.hooked_transformer import HookedTransformerOptions

    options = HookedTransformerOptions(forward_kwargs={"prepend_bos": True})
    assert built("HookedTransformer", model, options).entry_of([entry]) is None


class Begins(FakeBackend, InsideBackend):
    """A stranger's, that calls its hooks itself."""

    def entry_of(self, hooks: Collection[str]) -> str | None:
        entry = "blocks.0.hook_resid_post"
        return entry if {entry, "blocks.1.hook_resid_post"} >= {*hooks} else None

    def forward(self, tokens: Tensor, hooks: Hooks) -> Tensor | None:
        if hooks.entry is None:
            return super().forward(tokens, hooks)
        residual = hooks("blocks.1.hook_resid_post", hooks(hooks.entry, hooks.given) * 2)
        return None if hooks.done else residual @ self._embedding().T


def test_a_backend_of_ones_own_begins_inside() -> None:
    promises = ["starts_inside", "attaches_hooks"]
    report = check_plugin(fake_plugin("model_backends", build=lambda config, **services: Begins()), only=promises)
    assert [outcome.check for outcome in report.outcomes] == promises
    found, entry, tokens = Begins(), "blocks.0.hook_resid_post", TOKENS % 100
    with found.attached({entry: lambda held: held + 1}):
        whole = found.run(tokens, read={entry}, want="logits")
        begun = found.run_from(tokens, entry, whole.held[entry], want="logits")
    assert torch.equal(begun.logits, whole.logits), "what is attached at the entry is in its value"
    assert len(found.forwards) == 1


def test_a_folder_begins_inside_in_both_libraries() -> None:
    for key, entry in (
        ("AutoModelForCausalLM", "gpt_neox.layers.1"),
        ("HookedTransformer", "blocks.1.hook_resid_post"),
    ):
        found = built(key, name=str(causal_lm_folder("neox")))
        whole = found.run(TOKENS, read={entry}, want="loss")
        assert torch.equal(
            found.run_from(TOKENS, found.entry_of([entry]), whole.held[entry], want="loss").loss, whole.loss
        )
    assert isinstance(found, StartsInside)
