"""What torch has and does not promise: what kernels use of it, each beside a public way that takes its place.

Two other things are used where they belong: the in-place gradient of ReLU, by its activation function, and the name of
the compiler's errors, ``torch._dynamo.exc``, by those who compile.

Whether torch still has a function, and whether that still gives what the public way gives, is looked at once, on a few
numbers, when it is first wanted.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["entry_products", "has_bfloat16_products", "is_followed", "public_entry_products"]

_AT_ONCE = 1 << 22  # numbers that the public way holds in between


def entry_products(vectors: Tensor, weights: Tensor, features: Tensor, starts: Tensor, rows: Tensor) -> Tensor:
    """``[entries]``: of each entry ``⟨vectors[row], weights[feature]⟩``.

    ``vectors [n, d]`` and ``weights [d_sae, d]`` have their rows in one piece; ``starts [n]`` is each row's first entry
    among ``features`` and ``rows [entries]``, which rise.
    """
    if _has_entry_products(vectors.device.type, vectors.dtype):
        return _private_entry_products(vectors, weights, features, starts, rows)
    return public_entry_products(vectors, weights, features, rows)


def public_entry_products(vectors: Tensor, weights: Tensor, features: Tensor, rows: Tensor) -> Tensor:
    """The same, several times as slow."""
    size = max(_AT_ONCE // max(vectors.shape[1], 1), 1)
    parts = [
        torch.linalg.vecdot(vectors[some], weights[other])
        for some, other in zip(rows.split(size), features.split(size), strict=True)
    ]
    return torch.cat(parts) if parts else vectors.new_empty(0)


def _private_entry_products(vectors: Tensor, weights: Tensor, features: Tensor, starts: Tensor, rows: Tensor) -> Tensor:
    """The gradient to the weights of an embedding bag, where ``vectors`` are that to its sums."""
    products: Tensor = torch.ops.aten._embedding_bag_per_sample_weights_backward(
        vectors, weights, features, starts, rows, 0, -1
    )  # 0: the sum; no entry is padding
    return products


@functools.cache
def _has_entry_products(device: str, dtype: torch.dtype) -> bool:
    if not hasattr(torch.ops.aten, "_embedding_bag_per_sample_weights_backward"):
        return False
    with torch.inference_mode(False), torch.no_grad():
        vectors = torch.arange(6, device=device).reshape(3, 2).to(dtype)
        weights = torch.arange(8, device=device).reshape(4, 2).to(dtype)
        rows, features, starts = (torch.tensor(some, device=device) for some in ([0, 0, 2], [3, 1, 2], [0, 2, 2]))
        try:
            found = _private_entry_products(vectors, weights, features, starts, rows)
        except (RuntimeError, TypeError):  # another signature, or not for this device
            return False
        return torch.equal(found, public_entry_products(vectors, weights, features, rows))


@functools.cache
def has_bfloat16_products() -> bool:
    """Whether this CPU multiplies bfloat16 by itself; False where torch does not tell."""
    checks = (getattr(torch.cpu, name, None) for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"))
    return any(check is not None and check() for check in checks) and torch.backends.mkldnn.is_available()


def is_followed(x: Tensor) -> bool:
    """Whether what is done to ``x`` is compiled, traced or transformed by ``torch.func``: memory must not be reused."""
    traced: bool = torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]
    return torch.compiler.is_compiling() or traced or _is_wrapped(x)


def _is_wrapped(x: Tensor) -> bool:
    check = _functorch_check()
    return bool(check(x)) if check is not None else _has_no_memory(x)


@functools.cache
def _functorch_check() -> Callable[[Tensor], bool] | None:
    """Torch's own look at a tensor, or None where it is gone or does not know one from the other any more."""
    try:
        from torch._C._functorch import is_functorch_wrapped_tensor as check
    except ImportError:
        return None
    plain = torch.zeros(1, device="cpu")
    seen = [bool(check(plain))]

    def look(x: Tensor) -> Tensor:
        seen.append(bool(check(x)))
        return x

    torch.func.vmap(look)(plain)
    return check if seen == [False, True] else None


def _has_no_memory(x: Tensor) -> bool:
    """The public way: a tensor that ``torch.func`` has wrapped has no memory of its own to point to."""
    try:
        x.data_ptr()
    except RuntimeError:
        return True
    return False
