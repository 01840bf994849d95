"""``saekit dashboard --serve``: all features of a store in a browser, each made when it is asked for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from saekit.commands.dashboards import is_store, labels_of, names_of, store_of
from saekit.commands.effects import effects_of
from saekit.dashboards.effects import check_asked
from saekit.dashboards.serving import HOST, PORT, address_of, check_serving, is_loopback, opened_port, serve
from saekit.errors import ConfigError
from saekit.plugins.manager import PluginManager, default_manager

if TYPE_CHECKING:
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
    overwrite: bool = False,
    folder: str | Path | None = None,
    verbose: bool = True,
    plugins: PluginManager | None = None,
    **collecting: Any,
) -> None:
    """Serve a dashboard of all features of a store, until Ctrl-C; each is made when somebody looks at it.

    It is at ``http://127.0.0.1:8000/``, which only this machine reaches.  Another ``host``, such as ``0.0.0.0``, lets
    others in, who can then read the texts and look at every feature: there is no password.  ``port`` 0 is any that is
    free.  Requests that call the server by a name of the web are refused, as a page elsewhere could make them;
    ``allowed_hosts`` are names by which it may be called, beside ``localhost`` and addresses.

    ``loss_effects`` (``"exact"`` or ``"direct"``) loads the model, and tells of the loss as features are looked at.
    Everything else is as for :func:`saekit.dashboard`.  :class:`saekit.errors.PlaceError` for a port that is in use,
    :class:`saekit.errors.MissingPackageError` where the web server is not installed (``pip install 'saekit[serve]'``).
    """
    check_serving(host, port)
    check_asked(loss_effects)
    if isinstance(allowed_hosts, str) or not all(isinstance(name, str) and name for name in allowed_hosts):
        raise ConfigError([("allowed_hosts", f"must be a list of names, found {allowed_hosts!r}")])
    plugins = plugins or default_manager()
    with opened_port(host, port) as opened:  # before anything long
        from saekit.dashboards.data import Look
        from saekit.dashboards.server import Served
        from saekit.status import Status

        look = Look(top=top, quantiles=quantiles, per_quantile=per_quantile, window=window, seed=seed)
        store = store_of(what, folder, collecting, overwrite=overwrite, verbose=verbose, plugins=plugins)
        names = names_of(store, sae)
        known = labels_of(labels, names)
        with Status(verbose=verbose) as say:
            saes, model, device = None if is_store(what) else what, collecting.get("model"), collecting.get("device")
            effects = effects_of(saes, store, names, loss_effects, model=model, device=device, plugins=plugins, say=say)
            served = Served(store=store, names=names, look=look, effects=effects, labels=known, title=title)
            say("making the list of features")
            number = sum(len(one) for one in served.saes)
            served.tag  # noqa: B018 - the page is made before anybody waits for it
            say.rest()
        where = address_of(host, opened)

        def ready() -> None:
            if not verbose:
                return
            print(f"{number:,} features are shown at {where}  (Ctrl-C ends it)", flush=True)
            if not is_loopback(opened):
                print(
                    f"Whoever reaches port {opened.getsockname()[1]} of this machine can read these texts: there is no "
                    "password",
                    flush=True,
                )

        serve(served, opened, names=allowed_hosts, ready=ready)
