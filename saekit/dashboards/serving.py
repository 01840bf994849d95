"""Where a dashboard is served: an address and a port that is free, until Ctrl-C.

Importing this needs no web server.
"""

from __future__ import annotations

import errno
import importlib.util
import ipaddress
import socket
from collections.abc import Callable, Sequence
from typing import Any

from saekit.errors import ConfigError, MissingPackageError, PlaceError

__all__ = ["HOST", "PORT", "address_of", "check_serving", "opened_port", "serve"]

HOST, PORT = "127.0.0.1", 8000
_TRIED = 100  # ports after one that is taken


def check_serving(host: object = HOST, port: object = PORT) -> None:
    """:class:`MissingPackageError` without the web server, :class:`ConfigError` for a place where nothing is served."""
    if missing := [name for name in ("starlette", "uvicorn") if importlib.util.find_spec(name) is None]:
        raise MissingPackageError(
            f"a dashboard is served by starlette and uvicorn, and {' and '.join(missing)} "
            f"{'is' if len(missing) == 1 else 'are'} not installed: pip install 'saekit[serve]'. Without them, a page "
            "that opens from disk shows as many features as you choose (saekit dashboard without --serve)"
        )
    problems = []
    if not isinstance(host, str) or not host or "/" in host or host != host.strip():
        problems.append(("host", f"must be an address or a name of this machine, such as 127.0.0.1, found {host!r}"))
    if type(port) is not int or not 0 <= port <= 65535:
        problems.append(("port", f"must be a whole number from 1 to 65535, or 0 for any that is free; found {port!r}"))
    if problems:
        raise ConfigError(problems)


def opened_port(host: str, port: int) -> socket.socket:
    """A socket that listens there; :class:`PlaceError` says which port is free where this one is not."""
    try:
        return _listening(host, port)
    except socket.gaierror as error:
        raise ConfigError([("host", f"{host!r} is no address or name of this machine: {error.strerror}")]) from error
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            free = _free(host, port)
            hint = "" if free is None else f": port {free} is free (--port {free}), and --port 0 takes any that is"
            raise PlaceError(f"port {port} of {host} is in use, perhaps by another dashboard{hint}") from error
        if error.errno == errno.EACCES:
            raise PlaceError(f"port {port} of {host} is not for everybody: choose one above 1023 (--port)") from error
        if error.errno == errno.EADDRNOTAVAIL:
            raise ConfigError([("host", f"{host!r} is not an address of this machine")]) from error
        raise PlaceError(f"nothing can be served at port {port} of {host}: {error}") from error


def _listening(host: str, port: int) -> socket.socket:
    family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    found = socket.socket(family, kind, protocol)
    try:
        if hasattr(socket, "SO_EXCLUSIVEADDRUSE"):  # where reuse would mean that two may listen
            found.setsockopt(socket.SOL_SOCKET, socket.SO_EXCLUSIVEADDRUSE, 1)
        else:
            found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        found.bind(address)
        found.listen(64)
    except OSError:
        found.close()
        raise
    return found


def _free(host: str, port: int) -> int | None:
    for other in range(port + 1, min(port + _TRIED, 65536)):
        try:
            _listening(host, other).close()
        except OSError:
            continue
        return other
    return None


def address_of(host: str, opened: socket.socket) -> str:
    """What is typed into a browser to come there."""
    port = opened.getsockname()[1]
    everywhere = host in ("0.0.0.0", "::", "")
    name = "127.0.0.1" if everywhere else f"[{host}]" if ":" in host else host
    return f"http://{name}:{port}/"


def is_loopback(opened: socket.socket) -> bool:
    """Whether only this machine comes there."""
    return ipaddress.ip_address(opened.getsockname()[0].partition("%")[0]).is_loopback


def serve(
    served: Any, opened: socket.socket, *, names: Sequence[str] = (), ready: Callable[[], Any] = lambda: None
) -> None:
    """Serve what ``served``, a :class:`saekit.dashboards.server.Served`, has, until Ctrl-C; ``ready`` is called before.

    The socket is closed then.
    """
    import uvicorn

    from saekit.dashboards.server import app_of

    app = app_of(served, names=names, anywhere=not is_loopback(opened))
    config = uvicorn.Config(
        app, log_level="warning", access_log=False, server_header=False, lifespan="off", ws="none", proxy_headers=False,
        timeout_graceful_shutdown=2,
    )  # fmt: skip
    with opened:
        ready()
        try:
            uvicorn.Server(config).run(sockets=[opened])
        except KeyboardInterrupt:  # which uvicorn passes on, after it has ended
            return
