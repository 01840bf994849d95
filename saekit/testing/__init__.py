"""What plugin authors test with.  Importing this imports no torch.

::

    from saekit.testing import check_plugin, isolated_manager

    def test_my_plugin():
        check_plugin(my_module)

    def test_my_schedule():
        plugins = isolated_manager(my_module)
        schedule = plugins.build("lr_schedules", "halving", lr=1.0, steps=100)
        assert schedule(0) == 1.0
"""

from __future__ import annotations

import lazy_loader

# The public names stand in __init__.pyi, once, for people, type checkers and this line; each is imported on first use.
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
