"""Lists of features that Neuronpedia keeps, made over its API.

The key is read from the environment when it is needed.  It goes into one header of one request, to the address that is
asked and to no other: redirects are not followed, and no message, not even one that a server sent, holds it.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Mapping
from typing import Any
from urllib.parse import urlsplit

from saekit.errors import ConfigError, DataError
from saekit.exports.naming import ADDRESS, NeuronpediaName, quick_list_url
from saekit.files.storage import parse_json
from saekit.reasons import reason

__all__ = ["KEY", "make_list"]

KEY = "NEURONPEDIA_API_KEY"
_PATH = "/api/list/new-with-features"
_PATIENCE = 30.0  # seconds
_MOST = 1 << 20  # bytes of an answer that are read
_WHY: Mapping[int, str] = {
    401: f"it does not know the key in {KEY}: see your account page there",
    403: f"the key in {KEY} may not do this",
    404: "it has no such address; perhaps the SAE or its features are not there",
    429: "it has had too many requests: wait, and try again",
}


def make_list(
    neuronpedia_id: str | NeuronpediaName,
    features: Iterable[int] | Mapping[int, str],
    name: str,
    *,
    description: str = "",
    address: str = ADDRESS,
) -> str:
    """Make a list at Neuronpedia of features of one SAE, and give its address.

    ``features`` are their numbers, or numbers with a description of each.  The API key is that of the environment
    variable ``NEURONPEDIA_API_KEY``, and of nothing else.  :class:`saekit.errors.ConfigError` without one,
    :class:`saekit.errors.DataError` where the server cannot be reached or refuses.
    """
    one = neuronpedia_id if isinstance(neuronpedia_id, NeuronpediaName) else NeuronpediaName.of(neuronpedia_id)
    texts = dict(features) if isinstance(features, Mapping) else dict.fromkeys(features, "")
    quick_list_url(one, texts, name)  # which looks at the numbers and the name
    listed = [
        {"modelId": one.model, "layer": one.source, "index": str(int(number)), "description": text}
        for number, text in texts.items()
    ]
    body = json.dumps({"name": name, "description": description, "features": listed}).encode()
    _check_address(address)
    status, answer = _posted(address.rstrip("/") + _PATH, body, _key())
    if status is None:
        raise DataError(
            f"Neuronpedia cannot be reached at {address}: {answer.decode(errors='replace')}. Is there a way to the "
            "network? The address of a list needs none: quick_list_url(...), saekit export list without --make"
        )
    table = _table(answer)
    url = table.get("url")
    if 200 <= status < 300 and isinstance(url, str) and url:
        return url
    why = _WHY.get(status)
    said = table.get("message") or table.get("error")
    if why is None and 300 <= status < 400:
        why = "it sends to another address, which is not followed, for the key is not theirs"
    if why is None:
        why = "it does not say where the list is" if 200 <= status < 300 else "it refuses"
    says = f" (it says: {_short(said)})" if said else ""
    raise DataError(f"no list was made at {address}: status {status}, {why}{says}")


def _key() -> str:
    key = os.environ.get(KEY, "").strip()
    if not key:
        raise ConfigError(f"there is no API key: set the environment variable {KEY} to yours (from your account page)")
    if not re.fullmatch(r"[\w.~+/=:-]+", key, re.ASCII):
        raise ConfigError(f"the environment variable {KEY} holds what is no key: spaces, line breaks or odd characters")
    return key


def _check_address(address: str) -> None:
    parts = urlsplit(address)
    here = parts.hostname in ("localhost", "127.0.0.1", "::1")
    if parts.scheme == "https" or (parts.scheme == "http" and here):
        return
    raise ConfigError([("address", f"must begin with https://, for a key is sent there; found {address!r}")])


def _posted(address: str, body: bytes, key: str) -> tuple[int | None, bytes]:
    """The status and the answer; None and why, where there is none: what is raised here would know the key."""
    import http.client
    from urllib.error import HTTPError, URLError
    from urllib.request import HTTPRedirectHandler, Request, build_opener

    class Stays(HTTPRedirectHandler):
        """Goes nowhere else: the key would go along."""

        def redirect_request(self, *_: Any, **__: Any) -> None:
            return None

    request = Request(address, body, {"Content-Type": "application/json", "x-api-key": key}, method="POST")
    try:
        with build_opener(Stays).open(request, timeout=_PATIENCE) as answer:
            return answer.status, _without(answer.read(_MOST), key)
    except HTTPError as error:
        with error:
            return error.code, _without(error.read(_MOST), key)
    except (URLError, OSError, http.client.HTTPException) as error:
        cause = error.reason if isinstance(error, URLError) and isinstance(error.reason, Exception) else error
        return None, reason(cause).encode().replace(key.encode(), b"***")


def _without(answer: bytes, key: str) -> bytes:
    return answer.replace(key.encode(), b"***")


def _table(answer: bytes) -> dict[str, Any]:
    try:
        found = parse_json(answer)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _short(said: object) -> str:
    text = " ".join(str(said).split())
    return text if len(text) <= 200 else f"{text[:197]}..."
