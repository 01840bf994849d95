"""What backends say of a model that they cannot take."""

from __future__ import annotations

from saekit.errors import ModelError

__all__ = ["wrong_model"]


def wrong_model(loaded: object, expected: str, backend: str | None = None) -> ModelError:
    """The error for an object that was passed as the model where ``expected`` was.

    ``backend`` is the key of the one that takes such objects, if it is known.
    """
    if isinstance(loaded, str):
        hint = f"A model is chosen by its name with model.name = {loaded!r}"
    elif backend is not None:
        hint = f'It is {_article(backend)} {backend}, and its backend must be named: model.backend = "{backend}"'
    else:
        hint = "Of models of other kinds, saekit needs a backend (model.backend)"
    return ModelError(f"model must be {_article(expected)} {expected}, found {type(loaded).__name__}. {hint}")


def _article(word: str) -> str:
    return "an" if word[:1] in "AEIOaeio" else "a"
