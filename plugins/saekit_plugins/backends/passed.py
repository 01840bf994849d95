"""Which backend a model that was passed from code is of.  A helper of the backends' plugins, not a plugin."""

from __future__ import annotations

from saekit.backends import wrong_model

__all__ = ["check_passed"]

_MARKS = {
    "HookedMamba": ("run_with_hooks", "input_dependent_hooks"),
    "HookedTransformer": ("run_with_hooks", "hook_dict", "cfg", "tokenizer"),
    "AutoModelForCausalLM": ("save_pretrained", "get_output_embeddings", "config"),
}
"""By the key of a backend, what its models have; the first that fits counts."""


def check_passed(loaded: object | None, expected: str) -> None:
    """Raise :class:`saekit.errors.ModelError` unless ``loaded`` is a model of the backend ``expected``, or None."""
    if loaded is None:
        return
    kind = next((key for key, names in _MARKS.items() if all(hasattr(loaded, name) for name in names)), None)
    if kind != expected:
        raise wrong_model(loaded, expected, kind)
