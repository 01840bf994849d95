"""A dashboard that is served: the list of all features of a store, and each feature when it is asked for."""

from __future__ import annotations

import gzip
import hashlib
import ipaddress
import json
import threading
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import nullcontext
from functools import cached_property
from typing import Any

import attrs
from starlette.applications import Starlette
from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from saekit._version import __version__
from saekit.dashboards.columns import fires_on_columns, index_columns
from saekit.dashboards.data import Effects, Look, feature_data, sae_data
from saekit.dashboards.page import page_data, page_html, plotly_gzipped
from saekit.errors import ConfigError, SaekitError
from saekit.features.store import FeatureStore, SAEFeatures
from saekit.plugins.text import short

__all__ = ["Served", "app_of"]

_KEPT = 256  # features that are kept as they were sent
_DIGITS = 9  # of numbers of features
_PLOTLY = "plotly.js"
_POLICY = (
    "default-src 'none'; connect-src 'self'; style-src 'unsafe-inline'; script-src 'self' 'unsafe-inline'; "
    "img-src data: blob:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_HEADERS = {
    "Content-Security-Policy": _POLICY,
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cache-Control": "no-cache",  # kept, and asked about: see the tags
}


@attrs.frozen(eq=False, slots=False, kw_only=True)
class Served:
    """What is served, made when it is asked for, and then kept for a while."""

    store: FeatureStore
    names: Sequence[str] | None = None
    """Of the SAEs that are shown; None: all of the store."""
    look: Look = attrs.field(factory=Look)
    effects: Mapping[str, Effects] = attrs.field(factory=dict)
    """By the names of SAEs, where a model is there."""
    labels: Mapping[str, Mapping[int, str]] = attrs.field(factory=dict)
    title: str | None = None
    _features: OrderedDict[tuple[int, int], bytes] = attrs.field(factory=OrderedDict, init=False)
    _fires_on: dict[int, bytes] = attrs.field(factory=dict, init=False)
    _kept: threading.Lock = attrs.field(factory=threading.Lock, init=False)
    """Of ``_features``.  Nobody holds it for long: what is kept is sent whatever else is being made."""
    _model: threading.Lock = attrs.field(factory=threading.Lock, init=False)
    """The model runs once at a time."""
    _lists: threading.Lock = attrs.field(factory=threading.Lock, init=False)
    """Of ``_fires_on``, where nothing is made twice."""

    @cached_property
    def saes(self) -> Sequence[SAEFeatures]:
        """In the order in which the page counts them."""
        return [self.store.saes[name] for name in (self.names or self.store.saes)]

    @cached_property
    def page(self) -> bytes:
        """The page with the list of all features."""
        title = self.title or f"Features of {', '.join(one.name for one in self.saes)}"
        data = page_data(self.store, {}, self.look, embedded=False, title=title)
        data["saes"] = [
            {"about": sae_data(sae), "index": index_columns(sae, self.labels.get(sae.name)), "features": {}}
            for sae in self.saes
        ]
        return page_html(data, plotly_at=f"{_PLOTLY}?{__version__}").encode()

    def fires_on(self, place: int) -> bytes:
        """The tokens that the features of an SAE fire on."""
        with self._lists:
            if place not in self._fires_on:
                self._fires_on[place] = _as_bytes(fires_on_columns(self.saes[place]))
            return self._fires_on[place]

    def feature(self, place: int, number: int) -> bytes:
        """What a page says of a feature; :class:`ConfigError` for one that is not there."""
        if (kept := self._sent_before(place, number)) is not None:
            return kept
        sae = self.saes[place]
        feature, effects = sae.feature(number), self.effects.get(sae.name)
        label = self.labels.get(sae.name, {}).get(number)
        with nullcontext() if effects is None else self._model:
            if (kept := self._sent_before(place, number)) is not None:  # another made it meanwhile
                return kept
            found = _as_bytes(feature_data(feature, self.look, effects=effects, label=label))
            return self._keep(place, number, found)

    def _sent_before(self, place: int, number: int) -> bytes | None:
        with self._kept:
            if (place, number) in self._features:
                self._features.move_to_end((place, number))
            return self._features.get((place, number))

    def _keep(self, place: int, number: int, found: bytes) -> bytes:
        with self._kept:
            self._features[place, number] = found
            if len(self._features) > _KEPT:
                self._features.popitem(last=False)
        return found

    def prepare(self) -> None:
        """Make the page and its tag before anybody waits for them."""
        self.tag  # noqa: B018 - it is kept

    @cached_property
    def tag(self) -> str:
        """What changes whenever anything that is served does."""
        manifest = self.store.manifest
        about = [
            manifest.identity,
            {name: dict(entry) for name, entry in manifest.files.items()},
            attrs.asdict(self.look),
        ]
        kinds = {name: one.kind for name, one in self.effects.items()}
        found = hashlib.sha256(json.dumps([about, kinds], sort_keys=True, default=str).encode())
        found.update(self.page)
        return f'"{found.hexdigest()[:32]}"'


def app_of(served: Served, *, names: Sequence[str] = (), anywhere: bool = False) -> ASGIApp:
    """The application.

    It answers to whoever calls it ``localhost`` or by an address of this machine alone, so that no page of the web
    whose name was made to lead here reads what is served; ``names`` are others by which it may be called, and
    ``anywhere`` lets addresses count that others reach it by.
    """
    routes = [
        Route("/", _cached(served, lambda request: Response(served.page, media_type="text/html"))),
        Route(f"/{_PLOTLY}", _cached(served, _plotly)),
        Route("/sae/{sae}/fires-on.json", _cached(served, _of(served, lambda place, _: served.fires_on(place)))),
        Route("/sae/{sae}/feature/{feature}.json", _cached(served, _of(served, served.feature))),
    ]
    # Around all of it: what is said of a fault of the server has the same headers.
    return _Guard(Starlette(routes=routes), frozenset(map(str.lower, names)), anywhere)


def _cached(served: Served, answer: Callable[[Request], Response]) -> Callable[[Request], Response]:
    """``answer``, which is not made for who has it.  It runs in a thread."""

    def answered(request: Request) -> Response:
        asked = {one.strip().removeprefix("W/") for one in request.headers.get("if-none-match", "").split(",")}
        response = Response(status_code=304) if served.tag in asked else answer(request)
        if response.status_code in (200, 304):
            response.headers["ETag"] = served.tag
        return response

    return answered


def _of(served: Served, found: Callable[[int, int], bytes]) -> Callable[[Request], Response]:
    def answer(request: Request) -> Response:
        try:
            place, number = (_number(request.path_params, name) for name in ("sae", "feature"))
            if place >= len(served.saes):
                raise ConfigError([("sae", f"must be 0 to {len(served.saes) - 1}, found {place}")])
            return Response(found(place, number), media_type="application/json")
        except ConfigError as error:
            return JSONResponse({"error": str(error)}, 404)
        except SaekitError as error:
            return JSONResponse({"error": str(error)}, 500)

    return answer


def _number(found: Mapping[str, str], name: str) -> int:
    """That in an address; :class:`ConfigError` for what is none, or has more digits than any that is there."""
    text = found.get(name, "0")
    if not (text.isascii() and text.isdecimal() and len(text) <= _DIGITS):
        raise ConfigError([(name, f"must be a number of at most {_DIGITS} digits, found {short(text)}")])
    return int(text)


def _plotly(request: Request) -> Response:
    packed = "gzip" in request.headers.get("accept-encoding", "")
    headers = {"Vary": "Accept-Encoding"} | ({"Content-Encoding": "gzip"} if packed else {})
    body = plotly_gzipped() if packed else gzip.decompress(plotly_gzipped())
    return Response(body, media_type="text/javascript", headers=headers)


def _as_bytes(data: Any) -> bytes:
    return json.dumps(data, separators=(",", ":"), allow_nan=False).encode()


class _Guard:
    """Turns away who calls the server by another name, and says to browsers what a page may do."""

    def __init__(self, app: ASGIApp, names: frozenset[str], anywhere: bool) -> None:
        self.app, self.names, self.anywhere = app, names, anywhere

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return

        async def guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in _HEADERS.items():
                    headers[name] = value
            await send(message)

        app: Callable[[Scope, Receive, Send], Awaitable[None]] = self.app
        if not self._knows(Headers(scope=scope).get("host", "")):
            app = PlainTextResponse(
                "this server does not go by that name; open it at its address, or name it: --allowed-host\n", 421
            )
        await app(scope, receive, guarded)

    def _knows(self, host: str) -> bool:
        """Whether ``host``, as a request names it, is one that this server goes by."""
        name, _, port = host.rpartition(":") if not host.endswith("]") else (host, "", "")
        name = (name if port.isdigit() and name else host).lower().removeprefix("[").removesuffix("]")
        if name == "localhost" or name in self.names:
            return True
        try:
            address = ipaddress.ip_address(name)
        except ValueError:
            return False
        return address.is_loopback or self.anywhere
