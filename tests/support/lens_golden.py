"""What hooks hold in a HookedTransformer of transformer_lens 3, as ``tests/golden_lens/make_golden.py`` recorded it."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from saekit_plugins.backends.hooked_transformer import HookedTransformerOptions
from support.causal_lms import KINDS, causal_lm_folder
from torch import Tensor

from saekit.errors import ModelError

FILE = Path(__file__).parent.parent / "golden_lens" / "hooked_transformer.safetensors"
TOKENS = torch.randint(1, 2000, (2, 9), generator=torch.Generator().manual_seed(3))
UNPROCESSED = dict.fromkeys(
    ("fold_ln", "center_writing_weights", "center_unembed", "fold_value_biases"), False
)  # fmt: skip
_PLAIN = HookedTransformerOptions(from_pretrained_kwargs=UNPROCESSED)
CASES: dict[str, tuple[Callable[[], str], HookedTransformerOptions]] = {
    "tiny-python": (lambda: "saekit/tiny-python", HookedTransformerOptions()),
    **{kind: (lambda kind=kind: str(causal_lm_folder(kind)), HookedTransformerOptions()) for kind in KINDS},  # type: ignore[misc]
    **{f"{kind} plain": (lambda kind=kind: str(causal_lm_folder(kind)), _PLAIN) for kind in KINDS},  # type: ignore[misc]
}
"""By name: a model, and how it is processed."""


def held(backend: Any, hooks: Any = None) -> dict[str, Tensor]:
    """What is recorded of ``backend``: every hook that runs, or ``hooks``, and logits, loss and unembedding."""
    found: dict[str, Tensor] = {}
    for hook in backend.hook_names() if hooks is None else hooks:
        try:
            value = backend.run(TOKENS, read=[hook]).held[hook]
        except ModelError:  # it does not run as the model is configured
            continue
        found[hook] = _last(value)
    found["logits"] = backend.run(TOKENS, want="logits").logits[0, -1, :100]
    found["loss"] = backend.run(TOKENS, want="loss").loss
    found["unembedding"] = backend.unembedding()[0][:, 3]
    return found


def _last(value: Tensor) -> Tensor:
    """Of one context, what is at its last position; patterns and scores have positions last, twice."""
    by_head = value.ndim == 4 and value.shape[-1] == value.shape[-2] == TOKENS.shape[1]
    return value[0, :, -1] if by_head else value[0, -1]


@cache
def recorded() -> dict[str, dict[str, Tensor]]:
    """By case, by hook."""
    from safetensors.torch import load_file

    found: dict[str, dict[str, Tensor]] = {}
    for key, value in load_file(FILE).items():
        case, hook = key.split("/", 1)
        found.setdefault(case, {})[hook] = value
    return found
