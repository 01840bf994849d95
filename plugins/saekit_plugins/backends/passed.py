"""Models that were passed from code: of which backend, and with what options.  A helper of plugins, not a plugin."""

from __future__ import annotations

from typing import Any

from saekit import ConfigError
from saekit.backends import is_wrapper_of_compile, wrong_model

__all__ = ["check_not_for_passed", "check_passed"]

_MARKS = {
    "TransformerBridge": ("boot_transformers", "original_model", "hook_dict"),
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
    if kind != expected or is_wrapper_of_compile(loaded):
        raise wrong_model(loaded, expected, kind)


def check_not_for_passed(options: Any, *names: str) -> None:
    """Raise :class:`saekit.ConfigError` where one of ``options`` that say how a model is loaded is not its default."""
    defaults = type(options)()
    found = [name for name in names if getattr(options, name) != getattr(defaults, name)]
    if found:
        raise ConfigError(
            [(f"model.backend.{name}", f"is {getattr(options, name)!r}, which says how a model is loaded, and this one "
              "was passed from code: leave it out, and load the model so yourself") for name in found]
        )  # fmt: skip
