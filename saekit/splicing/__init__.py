"""SAEs inside models: what is put where, for a while, in every forward.

The room is not called as its function ``saekit.splice``, which a module of that name would replace.
"""

from __future__ import annotations

import lazy_loader

# The public names stand in __init__.pyi, once, for people, type checkers and this line; each is imported on first use.
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
