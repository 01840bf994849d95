"""What models are called elsewhere.  A helper of plugins, not a plugin."""

from __future__ import annotations

from saekit.garbage import uncollected

__all__ = ["also_called"]


def also_called(*names: str) -> set[str]:
    """All names under which transformer_lens knows a model of one of ``names``; with those themselves.

    ``gpt2`` is ``gpt2-small``, too.
    """
    with uncollected():
        from transformer_lens.supported_models import MODEL_ALIASES
    families = [{official, official.split("/")[-1], *others} for official, others in MODEL_ALIASES.items()]
    return set(names).union(*(family for family in families if family & set(names)))
