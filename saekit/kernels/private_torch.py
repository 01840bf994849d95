"""What torch has and does not promise: all that saekit uses of it, each beside a public way that takes its place.

Whether torch still has a function, and whether that still gives what the public way gives, is looked at once, on a few
numbers, when it is first wanted.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable

import torch
from torch import Tensor

__all__ = [
    "entry_products", "has_bfloat16_products", "int8_products", "is_followed", "is_of_compiler",
    "public_entry_products", "public_int8_products", "public_is_of_compiler", "public_relu_gradient_",
    "relu_gradient_", "why_no_int8_products",
]  # fmt: skip

_WITHOUT_BFLOAT16 = frozenset({
    "SSE41", "AVX", "AVX2", "AVX2_VNNI", "AVX2_VNNI_2", "AVX512_MIC", "AVX512_MIC_4OPS", "AVX512_CORE",
    "AVX512_CORE_VNNI",
})  # fmt: skip
"""What oneDNN may be held to, by its documentation of ``ONEDNN_MAX_CPU_ISA``, that has no such products of float32."""
_WITHOUT_VNNI = frozenset({"SSE41", "AVX", "AVX2", "AVX512_MIC", "AVX512_MIC_4OPS", "AVX512_CORE"})
"""What oneDNN may be held to that has no products of 8-bit integers: it makes them another way, which overflows."""
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


def relu_gradient_(gradient: Tensor, features: Tensor) -> Tensor:
    """``gradient`` where ``features``, of its shape, are above zero, and 0 elsewhere; written over ``gradient``."""
    if _has_relu_gradient(gradient.device.type, gradient.dtype):
        return _private_relu_gradient_(gradient, features)
    return public_relu_gradient_(gradient, features)


def public_relu_gradient_(gradient: Tensor, features: Tensor) -> Tensor:
    """The same, with a mask that takes memory."""
    return gradient.masked_fill_(features <= 0, 0)


def _private_relu_gradient_(gradient: Tensor, features: Tensor) -> Tensor:
    """What autograd calls, without a second tensor for what comes out."""
    found: Tensor = torch.ops.aten.threshold_backward.grad_input(gradient, features, 0, grad_input=gradient)
    return found


@functools.cache
def _has_relu_gradient(device: str, dtype: torch.dtype) -> bool:
    with torch.inference_mode(False), torch.no_grad():
        features = torch.tensor([0.0, 2.0, 0.5, 0.0, -1.0], device=device, dtype=dtype)
        gradients = [torch.tensor([3.0, -1.0, 0.25, -2.0, 1.0], device=device, dtype=dtype) for _ in range(2)]
        try:
            found = _private_relu_gradient_(gradients[0], features)
        except (AttributeError, RuntimeError, TypeError):  # gone, another signature, or not for this device
            return False
        in_place = found.data_ptr() == gradients[0].data_ptr()
        return in_place and torch.equal(gradients[0], public_relu_gradient_(gradients[1], features))


def is_of_compiler(error: BaseException) -> bool:
    """Whether ``error`` says that ``torch.compile`` failed, and is not one of the code that was compiled."""
    known = _compiler_errors()
    return public_is_of_compiler(error) if known is None else isinstance(error, known)


def public_is_of_compiler(error: BaseException) -> bool:
    """The same by the place where the error's class, or one that it derives from, is defined."""
    return _is_of_compiler(type(error))


def _is_of_compiler(kind: type) -> bool:
    return any(base.__module__.startswith(("torch._dynamo", "torch._inductor")) for base in kind.__mro__)


@functools.cache
def _compiler_errors() -> type[BaseException] | None:
    """What all of the compiler's errors derive from, or None where that is gone or has become something else."""
    try:
        from torch._dynamo.exc import TorchDynamoException
    except ImportError:
        return None
    is_own = _is_of_compiler(TorchDynamoException) and not issubclass(RuntimeError, TorchDynamoException)
    return TorchDynamoException if is_own else None


@functools.cache
def has_bfloat16_products() -> bool:
    """Whether this CPU multiplies bfloat16 by itself, and oneDNN, which does it for torch, may use that.

    False where torch does not tell.
    """
    if _held_to() in _WITHOUT_BFLOAT16:
        return False
    checks = (getattr(torch.cpu, name, None) for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"))
    return any(check is not None and check() for check in checks) and torch.backends.mkldnn.is_available()


def _held_to() -> str:
    """The instructions that oneDNN is held to, or nothing."""
    return (os.environ.get("ONEDNN_MAX_CPU_ISA") or os.environ.get("DNNL_MAX_CPU_ISA") or "").upper()


@functools.cache
def why_no_int8_products() -> str | None:
    """Why this CPU does not multiply 8-bit integers by itself, or torch does not let it; None: it does, exactly.

    Torch has oneDNN make these products where there is AVX-512 VNNI; elsewhere it makes them one by one.
    """
    check = getattr(torch.cpu, "_is_vnni_supported", None)
    if check is None or not check():
        return "this CPU has no AVX-512 VNNI"
    if _held_to() in _WITHOUT_VNNI:
        return f"ONEDNN_MAX_CPU_ISA holds oneDNN to {_held_to()}, which has no VNNI"
    if os.environ.get("ATEN_CPU_CAPABILITY", "").lower() in ("default", "avx2"):
        return f"ATEN_CPU_CAPABILITY holds torch to {os.environ['ATEN_CPU_CAPABILITY']}, which has no VNNI"
    if not torch.backends.mkldnn.is_available():
        return "this torch has no oneDNN"
    return None if _int8_products_are_exact() else f"torch {torch.__version__} has no exact products of uint8 and int8"


def int8_products(rows: Tensor, weights: Tensor, out: Tensor) -> Tensor:
    """``rows [n, d] @ weights [m, d]ᵀ``, uint8 and int8, exactly; written to ``out [n, m]``, int32."""
    if why_no_int8_products() is None:
        return _private_int8_products(rows, weights, out)
    return public_int8_products(rows, weights, out)


def public_int8_products(rows: Tensor, weights: Tensor, out: Tensor) -> Tensor:
    """The same by products in float32, of so few numbers that each is exact."""
    size = (1 << 24) // (255 * 128)
    out.zero_()
    for some, other in zip(rows.split(size, 1), weights.split(size, 1), strict=True):
        out += (some.float() @ other.float().T).int()
    return out


def _private_int8_products(rows: Tensor, weights: Tensor, out: Tensor) -> Tensor:
    return torch._int_mm(rows, weights.T, out=out)


@functools.cache
def _int8_products_are_exact() -> bool:
    """Also of the largest numbers, of which pairs do not fit into 16 bits."""
    if not hasattr(torch, "_int_mm"):
        return False
    rows = torch.arange(48 * 320, device="cpu").mul_(7).remainder_(256).to(torch.uint8).view(48, 320)
    weights = torch.arange(64 * 320, device="cpu").mul_(11).remainder_(255).sub_(127).to(torch.int8).view(64, 320)
    rows[::3], weights[::4], weights[1::4] = 255, 127, -127
    out, expected = (torch.empty(48, 64, dtype=torch.int32, device="cpu") for _ in range(2))
    with torch.inference_mode(False), torch.no_grad():
        try:
            found = _private_int8_products(rows, weights, out)
        except (AttributeError, RuntimeError, TypeError):  # another signature, or not for uint8
            return False
        return torch.equal(found, public_int8_products(rows, weights, expected))


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
