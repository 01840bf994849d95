"""``saekit dashboard --serve``: all features of a store in a browser, each made when it is asked for."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from saekit.commands.beforehand import check_collecting
from saekit.commands.dashboards import check_fit, check_said, labels_of, names_of, sizes_of
from saekit.commands.effects import effects_of
from saekit.commands.stores import named_of, store_of
from saekit.dashboards.effects import check_asked
from saekit.dashboards.serving import HOST, PORT, address_of, check_serving, is_loopback, opened_port, serve
from saekit.errors import ConfigError
from saekit.plugins.manager import PluginManager, default_manager

if TYPE_CHECKING:
    import socket

    from saekit.dashboards.server import Served
    from saekit.features.windows import Width

__all__ = ["serve_dashboard"]


def serve_dashboard(
    what: object,
    *,
    host: str = HOST,
    port: int = PORT,
    allowed_hosts: Sequence[str] = (),
    sae: str | None = None,
    window: Width = (10, 10),
    top: int = 20,
    quantiles: int = 5,
    per_quantile: int = 5,
    labels: Mapping[int, str] | Mapping[str, Mapping[int, str]] | None = None,
    title: str | None = None,
    seed: int = 0,
    loss_effects: str | None = None,
    folder: str | Path | None = None,
    verbose: bool = True,
    plugins: PluginManager | None = None,
    **collecting: Any,
) -> None:
    """Serve a dashboard of all features of a store, until Ctrl-C; each is made when somebody looks at it.

    It is at ``http://127.0.0.1:8000/``, which only this machine reaches.  Another ``host``, such as ``0.0.0.0``, lets
    others in, without a password; ``port`` 0 is any that is free.  Requests that call the server by a name of the web
    are refused; ``allowed_hosts`` are names by which it may be called, beside ``localhost`` and addresses.

    ``loss_effects`` (``"exact"`` or ``"direct"``) loads the model, and tells of the loss as features are looked at.
    Everything else is as for :func:`saekit.dashboard`.  :class:`saekit.errors.PlaceError` for a port that is in use,
    :class:`saekit.errors.MissingPackageError` where the web server is not installed (``pip install 'saekit[serve]'``).
    """
    _check(host, port, allowed_hosts, loss_effects)
    check_said(title, labels, sae)
    plugins = plugins or default_manager()
    check_collecting(what, folder, collecting)
    with opened_port(host, port) as opened:  # before anything long
        from saekit.dashboards.data import Look
        from saekit.dashboards.server import Served
        from saekit.status import Status

        look = Look(top=top, quantiles=quantiles, per_quantile=per_quantile, window=window, seed=seed)
        sae = named_of(what, sae)
        check = functools.partial(check_fit, sae=sae, features=None, labels=labels)
        store = store_of(what, folder, collecting, verbose=verbose, plugins=plugins, check=check)
        names = names_of([*store.saes], sae)
        known = labels_of(labels, sizes_of(store, names))
        with Status(verbose=verbose) as say:
            effects = effects_of(what, store, names, loss_effects, collecting, plugins, say)
            say("making the list of features")
            served = Served(store=store, names=names, look=look, effects=effects, labels=known, title=title)
            served.prepare()
        ready = functools.partial(_tell, served, host, opened) if verbose else lambda: None
        serve(served, opened, names=allowed_hosts, ready=ready)


def _check(host: object, port: object, names: object, loss_effects: object) -> None:
    """What can be seen to be wrong without torch."""
    check_serving(host, port)
    check_asked(loss_effects)
    listed = isinstance(names, Sequence) and not isinstance(names, str)
    if not listed or not all(isinstance(name, str) and name for name in names):  # type: ignore[attr-defined]
        raise ConfigError([("allowed_hosts", f"must be a list of names, found {names!r}")])


def _tell(served: Served, host: str, opened: socket.socket) -> None:
    """Say where it is."""
    number = sum(len(one) for one in served.saes)
    print(f"{number:,} features are shown at {address_of(host, opened)}  (Ctrl-C ends it)", flush=True)
    if not is_loopback(opened):
        port = opened.getsockname()[1]
        print(f"Whoever reaches port {port} of this machine can read these texts: there is no password", flush=True)
