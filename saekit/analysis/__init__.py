"""Looking at trained SAEs: a module for each question."""

from __future__ import annotations

import lazy_loader

# The public modules stand in __init__.pyi, for people, type checkers and this line; each is imported on first use.
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
