"""The Hugging Face Hub where it cannot be reached: that is said within seconds, and what is in the cache does.

The library tries each of a dozen requests six times before it looks into its cache, which takes more than a minute.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from saekit.errors import SaekitError
from saekit.reasons import reason

__all__ = ["cached_alone", "is_path", "within_reach"]

_PATIENCE = 10.0  # seconds for a connection; a Hub that is slow to answer has made one by then
_PAUSE = 1.0  # seconds before the second and last try
_KNOWN_FOR = 30.0  # seconds for which a Hub that could not be reached is not tried again
_NO_CONNECTION = {"ConnectError", "ConnectTimeout", "ConnectionError", "ProxyError"}  # of the HTTP library, any of them
_unreached: dict[str, tuple[float, str]] = {}  # by address: when, and why
_reached: set[str] = set()


def is_path(name: str) -> bool:
    """Whether the name of a model, a tokenizer or a dataset can only mean a path: the Hub's have one slash at most."""
    return name.startswith((".", "/", "~")) or name.count("/") > 1


@contextmanager
def within_reach(unless: str | Path | None = None) -> Iterator[None]:
    """Where the Hub may be asked: if there is no way to it, only its cache is, and errors of saekit's say why.

    It is not asked for what is a path that is there: ``unless``.
    """
    if unless is not None and Path(unless).exists():
        yield
        return
    from huggingface_hub import constants

    why = None if constants.HF_HUB_OFFLINE else _why_unreached(constants.ENDPOINT)
    if why is None:
        yield
        return
    constants.HF_HUB_OFFLINE = True
    try:
        yield
    except SaekitError as error:
        error.add_note(
            f"The Hub at {constants.ENDPOINT} cannot be reached ({why}), so that only what it has given before was "
            "looked for."
        )
        raise
    finally:
        constants.HF_HUB_OFFLINE = False


@contextmanager
def cached_alone() -> Iterator[None]:
    """The Hub is not asked for anything: what its cache lacks is not there."""
    from huggingface_hub import constants

    before, constants.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE, True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


def _why_unreached(address: str) -> str | None:
    """Why no connection to the Hub can be made; None: one was, whatever it answers."""
    if address in _reached:
        return None
    when, why = _unreached.get(address, (float("-inf"), ""))
    if time.monotonic() - when < _KNOWN_FOR:
        return why
    fault = _no_connection(address)
    if fault is not None and "Timeout" not in type(fault).__name__:  # a name server or a router may have had a moment
        time.sleep(_PAUSE)
        fault = _no_connection(address)
    if fault is None:
        _reached.add(address)
        return None
    _unreached[address] = time.monotonic(), reason(fault)
    return reason(fault)


def _no_connection(address: str) -> Exception | None:
    """What one short request, by the library's own means (proxies, certificates), fails with before it is sent."""
    from huggingface_hub.utils import get_session  # type: ignore[attr-defined]

    try:
        get_session().head(address, timeout=_PATIENCE)
    except Exception as error:  # of whichever HTTP library it uses
        return error if type(error).__name__ in _NO_CONNECTION else None
    return None
