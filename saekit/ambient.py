"""What torch keeps for a whole thread or process, and what would change a result without anybody having asked."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

__all__ = ["ambient"]


@contextmanager
def ambient() -> Iterator[None]:
    """Torch as it is when it was just imported, whatever the caller has set; afterwards it is the caller's again.

    Gradients can be computed, inference mode and autocast are off, new tensors are float32 and on the CPU.  All but the
    default dtype belong to the thread, and a thread that begins inside has none of the caller's.  Every function that a
    user calls enters this once; it may be a decorator.

    Left as they are: what is about speed or about debugging (the number of threads, the precision of float32 products,
    deterministic algorithms, anomaly detection), for those are choices that have no other place.
    """
    import torch

    dtype = torch.get_default_dtype()
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        for kind in ("cpu", "cuda", "mps", "xpu"):
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        if torch.get_default_device().type != "cpu":  # only then: each call of torch is slower by it
            stack.enter_context(torch.device("cpu"))
        stack.callback(torch.set_default_dtype, dtype)
        torch.set_default_dtype(torch.float32)
        yield
