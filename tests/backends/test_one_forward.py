"""``ModelBackend.run`` of every backend that is here, and the base classes that make it."""

from __future__ import annotations

import subprocess
import sys
from collections import OrderedDict, namedtuple
from typing import Any

import pytest
import torch
from support.tiny import hooked_mamba, hooked_transformer, tokenizer
from torch import Tensor

import saekit
from saekit import Forward
from saekit.abilities import HasMemory, HasTokenizer
from saekit.backends import Backend, Hooks, ModuleBackend, next_token_loss, wrong_model
from saekit.config import ModelConfig
from saekit.data.shared import SharedForwards
from saekit.errors import ModelError
from saekit.testing import FakeBackend

TOKENS = torch.randint(1, 100, (3, 12), generator=torch.Generator().manual_seed(0))


def built(model: object, key: str) -> Any:
    return saekit.default_manager().build("model_backends", key, model=ModelConfig(), loaded=model)


def lens() -> Any:
    return built(hooked_transformer(), "HookedTransformer")


BACKENDS = {
    "fake": (FakeBackend, "blocks.0.hook_resid_post"),
    "HookedTransformer": (lens, "blocks.0.hook_resid_post"),
    "HookedMamba": (lambda: built(hooked_mamba(), "HookedMamba"), "blocks.0.hook_resid_post"),
}


@pytest.fixture(params=list(BACKENDS))
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_loss_and_logits_belong_together(name: str) -> None:
    backend = BACKENDS[name][0]()
    logits = backend.run(TOKENS, want="logits").logits
    assert logits.shape[:2] == TOKENS.shape
    assert logits.shape[2] >= backend.d_vocab
    loss = backend.run(TOKENS, want="loss").loss
    assert torch.equal(loss, next_token_loss(logits, TOKENS))
    chosen = logits[:, :-1].log_softmax(-1).gather(-1, TOKENS[:, 1:, None])[..., 0]
    assert torch.allclose(loss, -chosen, atol=1e-5)


def test_what_is_read_is_what_was_there_before(name: str) -> None:
    make, hook = BACKENDS[name]
    backend = make()
    held = backend.run(TOKENS, read={hook}).held[hook]
    given: list[Tensor] = []

    def doubled(activation: Tensor) -> Tensor:
        given.append(activation)
        return 2 * activation

    later = hook.replace("0", "1")
    run = backend.run(TOKENS, read=[hook, later], replace={hook: doubled}, want="loss")
    assert torch.equal(run.held[hook], held)
    assert torch.equal(given[0], held)
    assert not torch.equal(run.held[later], backend.run(TOKENS, read=[later]).held[later])
    assert not torch.equal(run.loss, backend.run(TOKENS, want="loss").loss)
    with pytest.raises(
        ModelError, match=rf"replaces '{hook}' must be a tensor of shape \[3, 12, \d+\], found \[3, 12\]"
    ):
        backend.run(TOKENS, replace={hook: lambda activation: activation[..., 0]}, want="loss")


def test_gradients_are_those_of_small_changes(name: str) -> None:
    make, hook = BACKENDS[name]
    backend = make()
    run = backend.run(TOKENS, read={hook}, want="loss", grad=True)
    (gradient,) = torch.autograd.grad(run.loss.sum(), run.held[hook])
    if hasattr(backend, "model"):  # the library's own
        leaf = run.held[hook].detach().clone().requires_grad_()
        own = backend.model.run_with_hooks(
            TOKENS, return_type="loss", loss_per_token=True, fwd_hooks=[(hook, lambda activation, hook: leaf)]
        )
        own.sum().backward()
        assert torch.allclose(gradient, leaf.grad, atol=1e-6)
    direction = torch.randn(gradient.shape, generator=torch.Generator().manual_seed(1))

    def moved(by: float) -> Tensor:
        return backend.run(TOKENS, replace={hook: lambda held: held + by * direction}, want="loss").loss.double().sum()

    slope = (moved(1e-2) - moved(-1e-2)) / 2e-2
    assert torch.allclose((gradient * direction).double().sum(), slope, rtol=2e-2)
    scale = torch.ones(gradient.shape[-1], requires_grad=True)
    backend.run(TOKENS, replace={hook: lambda held: held * scale}, want="loss", grad=True).loss.sum().backward()
    assert torch.allclose(scale.grad, (gradient * run.held[hook].detach()).sum((0, 1)), rtol=1e-3, atol=1e-4)
    assert not backend.run(TOKENS, want="loss").loss.requires_grad


def test_unembeddings() -> None:
    for backend, hook in (
        (lens(), "ln_final.hook_normalized"),
        (BACKENDS["HookedMamba"][0](), "hook_norm"),
        (FakeBackend(), "blocks.1.hook_resid_post"),
    ):
        weights, bias = backend.unembedding()
        run = backend.run(TOKENS, read={hook}, want="logits")
        with torch.no_grad():
            assert torch.allclose(run.held[hook] @ weights + (0 if bias is None else bias), run.logits, atol=1e-5)

    class Without(FakeBackend):
        unembedding = Backend.unembedding

    with pytest.raises(ModelError, match="the model 'fake' has no unembedding that its backend knows"):
        Without().unembedding()


def test_abilities_are_told_by_protocols() -> None:
    known, fake = lens(), FakeBackend()
    assert isinstance(known, HasTokenizer)
    assert isinstance(known, HasMemory)
    assert not isinstance(fake, HasTokenizer | HasMemory)
    assert fake.fingerprint() is None
    for backend in (known, fake):
        reader = SharedForwards(backend).reader({"hook_embed"})
        for ability in (HasTokenizer, HasMemory):
            assert isinstance(reader, ability) == isinstance(backend, ability), "it is the model in all else"
        assert reader.fingerprint() == backend.fingerprint()
        assert reader.unembedding()[0].shape == backend.unembedding()[0].shape


def test_a_shared_forward_is_for_reading_alone() -> None:
    backend = FakeBackend()
    reader = SharedForwards(backend).reader({"hook_embed"})
    assert reader.run(TOKENS, read={"hook_embed"}, want="loss").loss.shape == (3, 11)
    run = reader.run(TOKENS, read={"hook_embed"}, grad=True)
    assert run.held["hook_embed"].requires_grad
    zeroed = reader.run(TOKENS, read={"blocks.0.hook_resid_post"}, replace={"hook_embed": torch.zeros_like})
    assert not zeroed.held["blocks.0.hook_resid_post"].any()


def test_a_hook_that_does_not_run_is_an_error() -> None:
    backend = lens()
    said = r"'blocks.0.attn.hook_result' of .* does not run as the model is configured \(TransformerLens has switches"
    with pytest.raises(ModelError, match=said):
        backend.run(TOKENS, read={"blocks.0.attn.hook_result"})
    with pytest.raises(ModelError, match=said):
        backend.run(TOKENS, replace={"blocks.0.attn.hook_result": torch.zeros_like}, want="loss")
    with pytest.raises(ModelError, match="the model 'fake' has no hook 'nowhere'"):
        FakeBackend().run(TOKENS, read={"nowhere"})


Pair = namedtuple("Pair", ["number", "rows"])


class Parts(torch.nn.Module):
    """What modules return beside tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(100, 4)
        self.pair, self.table, self.nested, self.unused = (torch.nn.Identity() for _ in range(4))

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        x = self.pair(Pair(1, x)).rows
        x = self.table(OrderedDict(none=None, rows=x, more=torch.zeros(1)))["rows"]
        (x, _), _ = self.nested([(x, "kept"), None])
        return x @ self.embed.weight.T


class PartsBackend(ModuleBackend):
    def logits(self, tokens: Tensor) -> Tensor:
        return self.model(tokens)


def parts(**options: Any) -> PartsBackend:
    torch.manual_seed(0)
    return PartsBackend(Parts(), name="parts", d_vocab=100, n_ctx=None, **options)


@pytest.mark.parametrize("hook", ["embed", "pair", "pair.input", "table", "table.input", "nested", "nested.input"])
def test_the_first_tensor_of_what_a_module_returns(hook: str) -> None:
    backend = parts()
    rows = backend.model.embed(TOKENS)
    assert torch.equal(backend.run(TOKENS, read={hook}).held[hook], rows)
    logits = backend.run(TOKENS, replace={hook: lambda held: 3 * held}, want="logits").logits
    assert torch.allclose(logits, 3 * rows @ backend.model.embed.weight.T)
    with pytest.raises(ZeroDivisionError):
        backend.run(TOKENS, read=["embed"], replace={hook: lambda held: held / (1 // 0)}, want="logits")
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in backend.model.modules()), "no hook is left behind"
    with pytest.raises(ModelError, match="the hook 'unused' of 'parts' does not run"):
        backend.run(TOKENS, read={hook, "unused"})
    with pytest.raises(ModelError, match="the model 'parts' has no hook 'none.input'"):
        backend.run(TOKENS, read={hook, "none.input"})


def test_one_hook_a_hook_that_is_none_and_a_text_for_tokens() -> None:
    backend = parts()
    assert list(backend.run(TOKENS, read="embed").held) == ["embed"]
    with pytest.raises(ModelError, match=r"'parts' has no hook 'embedd'\. Did you mean 'embed'"):
        backend.run(TOKENS, read=["embedd"])
    for tokens in ("a text", [1, 2]):
        with pytest.raises(
            ModelError, match=r"as a tensor \[batch, position\], found .*; those of a text are model.to_tok"
        ):
            backend.run(tokens, read=["embed"])  # type: ignore[arg-type]


def test_a_tokenizer_of_another_model() -> None:
    with pytest.raises(
        ModelError, match="the tokenizer of 'parts' has 2048 tokens, but the model knows 100: they do not"
    ):
        parts(tokenizer=tokenizer())
    with pytest.raises(ModelError, match="the model 'parts' has no tokenizer, so it cannot read text"):
        parts().token_texts([1])


def test_a_forward_has_what_it_was_asked_for() -> None:
    run = FakeBackend().run(TOKENS, want="loss")
    with pytest.raises(ValueError, match=r"this forward was not asked for its logits: run\(..., want='logits'\)"):
        run.logits  # noqa: B018
    with pytest.raises(ValueError, match="not asked for its loss"):
        Forward({}).loss  # noqa: B018
    hooks = Hooks({"a"}, {}, tokens=TOKENS)
    assert not hooks.done
    hooks("a", torch.zeros(3, 12, 4))
    assert hooks.done


def test_what_is_passed_instead() -> None:
    assert "model must be a Thing, found str. A model is chosen by its name with model.name = 'x'" in str(
        wrong_model("x", "Thing")
    )
    told = str(wrong_model(1, "AutoThing", "Other"))
    assert told.startswith("model must be an AutoThing, found int. It is an Other, and its backend must be named: ")
    assert told.endswith("model.backend=Other")
    assert "Of models of other kinds, saekit needs a backend" in str(wrong_model(1, "Thing"))


def test_the_base_classes_import_no_torch() -> None:
    code = "import sys; from saekit.backends import Backend, ModuleBackend; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
