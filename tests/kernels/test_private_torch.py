"""What torch does not promise: it is in one file, and a public way is in its place where it is gone."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import saekit_plugins
import torch
from saekit_plugins.architectures.standard import StandardConfig
from support.kernels import built, seeded
from torch import Tensor

import saekit
import saekit.kernels.private_torch as private
from saekit import StepInput
from saekit.kernels import is_of_compiler, relu_gradient_
from saekit.kernels.private_torch import (
    entry_products,
    is_followed,
    public_entry_products,
    public_is_of_compiler,
    public_relu_gradient_,
)

ROOTS = Path(saekit.__file__).parent, Path(next(iter(saekit_plugins.__path__)))
FILES = [path for root in ROOTS for path in sorted(root.rglob("*.py"))]


def dotted(node: ast.AST) -> str:
    """``torch.ops.aten`` of an expression that is that, or an import of it."""
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def named(text: str) -> Iterator[str]:
    """What code, and the texts in it, name with dots; documentation does not count."""
    nodes = [*ast.walk(ast.parse(text))]
    documentation = {node.value for node in nodes if isinstance(node, ast.Expr)}
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Attribute):
            yield dotted(node)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node not in documentation:
            yield from node.value.split()


def private_of_torch(text: str) -> list[str]:
    """The names among them that torch does not promise."""
    found = []
    for name in named(text):
        if "torch" not in name:  # as most do not
            continue
        first, *parts = name.strip("`'\"().,:;").split(".")
        hidden = [part for part in parts if part.startswith("_") and not part.startswith("__")]
        if first == "torch" and (hidden or parts[:1] == ["ops"]):
            found.append(name)
    return found


def test_what_is_private_is_found() -> None:
    code = '''"""Such as torch._C."""
import torch._dynamo
from torch._C import x
from torch.nn import _y
torch.ops.aten.mm(torch.__version__)
torch.cpu._is_there()
getattr(torch, "_z")
filter("torch._inductor.config is old")
module._own, torch.nn.functional.relu
'''
    assert {*private_of_torch(code)} == {
        "torch._dynamo", "torch._C.x", "torch.nn._y", "torch.ops.aten.mm", "torch.ops.aten", "torch.ops",
        "torch.cpu._is_there", "torch._inductor.config",
    }  # fmt: skip


def test_one_file_knows_what_torch_does_not_promise() -> None:
    found = {}
    for path in FILES:
        text = path.read_text()
        if path.stem == "legacy":  # its texts are names in strangers' files, of which nothing is called
            text = ast.unparse(WithoutTexts().visit(ast.parse(text)))
        found[path] = private_of_torch(text)
    assert found.pop(Path(str(private.__file__)))
    assert not {path.stem: names for path, names in found.items() if names}


class WithoutTexts(ast.NodeTransformer):
    """Every text is empty."""

    def visit_Constant(self, node: ast.Constant) -> ast.Constant:
        return ast.Constant("") if isinstance(node.value, str) else node


# ---- what is there, and the public ways in its place


def forget() -> None:
    for known in (private._has_entry_products, private._has_relu_gradient, private._functorch_check):
        known.cache_clear()
    private._compiler_errors.cache_clear()


@pytest.fixture
def fresh() -> Any:
    """What was found out about torch is found out anew."""
    yield forget()
    forget()


def entries(n: int, d: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    vectors, weights = torch.randn(7, d, generator=seeded()).to(dtype), torch.randn(9, d, generator=seeded(1)).to(dtype)
    rows = torch.randint(7, (n,), generator=seeded(2)).sort().values
    features = torch.randint(9, (n,), generator=seeded(3))
    return vectors, weights, features, torch.searchsorted(rows, torch.arange(7)), rows


@pytest.mark.parametrize("n", [0, 1, 40])
def test_both_ways_to_the_products_of_entries_agree(n: int, fresh: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(private, "_AT_ONCE", 32)
    vectors, weights, features, starts, rows = entries(n, 12, torch.float64)
    expected = (vectors[rows] * weights[features]).sum(1)
    torch.testing.assert_close(public_entry_products(vectors, weights, features, rows), expected)
    torch.testing.assert_close(entry_products(vectors, weights, features, starts, rows), expected)


@pytest.mark.parametrize("change", ["gone", "another signature", "another result"])
def test_a_private_function_that_changed_is_left_alone(
    change: str, fresh: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = entries(20, 12, torch.float32)
    expected = entry_products(*given)
    private._has_entry_products.cache_clear()

    def other(*arguments: Any) -> Tensor:
        if change == "another result":
            return torch.zeros(len(arguments[2]), dtype=arguments[0].dtype)
        raise TypeError("no such arguments") if change == "another signature" else RuntimeError("no such function")

    monkeypatch.setattr(private, "_private_entry_products", other)
    torch.testing.assert_close(entry_products(*given), expected)


def test_a_whole_step_by_the_public_way(fresh: None, monkeypatch: pytest.MonkeyPatch) -> None:
    sae, x = built(StandardConfig(d_sae=400), bias=-4.0), torch.randn(300, 12, generator=seeded())
    found = []
    for there in (True, False):
        monkeypatch.setattr(private, "_has_entry_products", lambda *kind, there=there: there)
        sae.training_step(x, StepInput(step=0, generator=seeded()))
        found.append([value.grad.clone() for value in sae.parameters()])
        sae.zero_grad()
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("known", [True, False])
def test_what_torch_follows_is_seen(known: bool, fresh: None, monkeypatch: pytest.MonkeyPatch) -> None:
    if not known:
        monkeypatch.setattr(private, "_functorch_check", lambda: None)
    seen: list[bool] = []

    def look(x: Tensor) -> Tensor:
        seen.append(is_followed(x))
        return x.sum()

    x = torch.ones(3)
    assert not is_followed(x)
    torch.func.vmap(look)(x)
    torch.func.grad(look)(x)
    assert seen == [True, True]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_both_ways_to_the_gradient_of_relu_agree(dtype: torch.dtype, fresh: None) -> None:
    features = torch.randn(40, 9, generator=seeded()).relu().to(dtype)
    gradient = torch.randn(40, 9, generator=seeded(1)).to(dtype)
    expected = gradient * (features > 0)
    for way in (relu_gradient_, public_relu_gradient_):
        own = gradient.clone()
        assert way(own, features) is own or way is relu_gradient_
        assert torch.equal(own, expected), "it is written over"


@pytest.mark.parametrize("change", ["gone", "another signature", "another result", "not in place"])
def test_a_gradient_that_changed_is_left_alone(change: str, fresh: None, monkeypatch: pytest.MonkeyPatch) -> None:
    features, gradient = torch.tensor([0.0, 1.0]), torch.tensor([2.0, 3.0])

    def other(gradient: Tensor, features: Tensor) -> Tensor:
        if change == "another result":
            return gradient.zero_()
        if change == "not in place":
            return gradient * (features > 0)
        raise TypeError("no such arguments") if change == "another signature" else AttributeError("no such function")

    monkeypatch.setattr(private, "_private_relu_gradient_", other)
    relu_gradient_(gradient, features)
    assert gradient.tolist() == [0.0, 3.0]


def compiler_error() -> BaseException:
    """One that ``torch.compile`` itself raises."""

    def broken(x: Tensor) -> Tensor:
        torch._dynamo.graph_break()
        return x

    try:
        with pytest.raises(Exception) as caught:
            torch.compile(broken, fullgraph=True, backend="eager")(torch.ones(2))
        return caught.value
    finally:
        torch._dynamo.reset()


@pytest.mark.parametrize("known", [True, False])
def test_errors_of_the_compiler_are_known(known: bool, fresh: None, monkeypatch: pytest.MonkeyPatch) -> None:
    of_compiler = compiler_error()
    if not known:
        monkeypatch.setitem(sys.modules, "torch._dynamo.exc", None)
        assert private._compiler_errors() is None
    assert is_of_compiler(of_compiler)
    assert public_is_of_compiler(of_compiler)
    for error in (RuntimeError("mine"), ValueError("mine"), MemoryError(), KeyboardInterrupt()):
        assert not is_of_compiler(error)
        assert not public_is_of_compiler(error)
