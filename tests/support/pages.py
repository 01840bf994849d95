"""Pages in a browser, which draw themselves when they have found their data: later than they are loaded."""

from __future__ import annotations

import time
from typing import Any


def wait(browser: Any, script: str, wanted: Any = True) -> None:
    """Until an expression of JavaScript has a value; ten seconds at most."""
    for _ in range(200):
        if browser.execute_script(f"return {script}") == wanted:
            return
        time.sleep(0.05)
    assert browser.execute_script(f"return {script}") == wanted
