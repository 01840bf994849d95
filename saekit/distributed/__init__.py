"""One run on many processes, by torch.distributed; a world of one costs nothing and imports nothing of it."""

from __future__ import annotations

import lazy_loader

# The public names stand in __init__.pyi, once, for people, type checkers and this line; each is imported on first use.
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
