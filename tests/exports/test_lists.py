"""Names and addresses at Neuronpedia; lists made over its API, by a key that is nowhere afterwards."""

from __future__ import annotations

import io
import json
import logging
import threading
import traceback
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest
from typer.testing import CliRunner

from saekit.cli import app
from saekit.errors import ConfigError, DataError
from saekit.exports import NeuronpediaName, lists, make_list, quick_list_url
from saekit.pretrained.catalog import Catalog

SECRET = "sk-np-0123456789abcdef=="


class Server(ThreadingHTTPServer):
    """It answers what it is told to, and keeps what it was asked."""

    status = 200
    answer: Any = {"url": "https://neuronpedia.org/list/abc"}  # noqa: RUF012
    headers: dict[str, str] = {}  # noqa: RUF012

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.asked: list[tuple[str, dict[str, str], Any]] = []

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class _Handler(BaseHTTPRequestHandler):
    server: Server

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.asked.append(
            (self.path, {key.lower(): value for key, value in self.headers.items()}, json.loads(body))
        )
        self._answer()

    def do_GET(self) -> None:
        self.server.asked.append((self.path, {key.lower(): value for key, value in self.headers.items()}, None))
        self._answer()

    def _answer(self) -> None:
        answer = self.server.answer
        data = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
        self.send_response(self.server.status)
        for name, value in self.server.headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NEURONPEDIA_API_KEY", SECRET)
    found = Server()
    thread = threading.Thread(target=found.serve_forever, args=(0.01,))
    thread.start()
    yield found
    found.shutdown()
    thread.join()
    found.server_close()


# ---- names


def test_every_published_name_is_taken_apart_and_put_together() -> None:
    names = {sae.neuronpedia for release in Catalog(()).releases for sae in release.saes.values() if sae.neuronpedia}
    assert len(names) > 2000
    for name in names:
        assert str(NeuronpediaName.of(name)) == name
    one = NeuronpediaName.of("gemma-2-9b/10-gemmascope-mlp-16k__l0-49")
    assert (one.model, one.layer_number, one.set, one.suffix) == ("gemma-2-9b", 10, "gemmascope-mlp-16k", "l0-49")
    assert NeuronpediaName.of("pythia-70m-deduped/e-att-sm").layer == "e"
    assert one.page(7) == "https://neuronpedia.org/gemma-2-9b/10-gemmascope-mlp-16k__l0-49/7"


@pytest.mark.parametrize(
    "bad",
    ["", "gpt2-small", "gpt2-small/8", "a/b/8-x", "gpt2-small/8-", "a b/8-x", "a/../8-x", "../8-x", "a/8-x\n", 3, None],
)
def test_what_is_no_name_is_refused(bad: Any) -> None:
    with pytest.raises(ConfigError, match=r"neuronpedia_id: must be MODEL/LAYER-SET, such as gpt2-small/8-res-jb"):
        NeuronpediaName.of(bad)


def test_the_address_of_a_quick_list_says_what_neuronpedia_reads() -> None:
    url = quick_list_url("gpt2-small/8-res-jb", [1, 20], "What & why / ünd?")
    parts = urlsplit(url)
    assert url.startswith("https://neuronpedia.org/quick-list/?name=What%20%26%20why")
    asked = parse_qs(parts.query, strict_parsing=True)
    assert asked["name"] == ["What & why / ünd?"]
    assert json.loads(asked["features"][0]) == [
        {"modelId": "gpt2-small", "layer": "8-res-jb", "index": "1"},
        {"modelId": "gpt2-small", "layer": "8-res-jb", "index": "20"},
    ]
    for bad in ([], [-1], [1.5], [True], ["1"]):
        with pytest.raises(ConfigError, match=r"features: (names none|must be whole numbers of 0 or more, found)"):
            quick_list_url("gpt2-small/8-res-jb", bad)


# ---- lists over the API


def test_a_list_is_made_and_its_address_given(server: Server) -> None:
    found = make_list("gpt2-small/8-res-jb", {3: "dogs", 5: "cats"}, "Pets", description="All", address=server.address)
    assert found == "https://neuronpedia.org/list/abc", "what sae-lens raises for where no browser is opened"
    (path, headers, body) = server.asked[0]
    assert path == "/api/list/new-with-features"
    assert headers["x-api-key"] == SECRET
    assert body == {
        "name": "Pets",
        "description": "All",
        "features": [
            {"modelId": "gpt2-small", "layer": "8-res-jb", "index": "3", "description": "dogs"},
            {"modelId": "gpt2-small", "layer": "8-res-jb", "index": "5", "description": "cats"},
        ],
    }


@pytest.mark.parametrize(
    ("status", "answer", "message"),
    [
        (401, {"message": "bad key"}, r"status 401, it does not know the key in NEURONPEDIA_API_KEY.*it says: bad key"),
        (403, {}, r"status 403, the key in NEURONPEDIA_API_KEY may not do this"),
        (429, b"slow down", r"status 429, it has had too many requests: wait, and try again"),
        (500, b"<html>" + b"x" * 99, r"status 500, it refuses"),
        (
            200,
            {"message": "no such feature"},
            r"status 200, it does not say where the list is \(it says: no such feature",
        ),
        (200, b"\xff{", r"status 200, it does not say where the list is"),
        (200, [1], r"status 200, it does not say where the list is"),
    ],
)
def test_what_the_server_says_is_told(server: Server, status: int, answer: Any, message: str) -> None:
    server.status, server.answer = status, answer
    with pytest.raises(DataError, match=message):
        make_list("gpt2-small/8-res-jb", [1], "A", address=server.address)


def test_without_a_way_there_it_is_said(server: Server) -> None:
    with pytest.raises(DataError, match=r"Neuronpedia cannot be reached at http://127.0.0.1:9: .*Connection refused"):
        make_list("gpt2-small/8-res-jb", [1], "A", address="http://127.0.0.1:9")


def test_a_key_is_needed_and_comes_from_the_environment_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NEURONPEDIA_API_KEY", raising=False)
    with pytest.raises(ConfigError, match=r"there is no API key: set the environment variable NEURONPEDIA_API_KEY"):
        make_list("gpt2-small/8-res-jb", [1], "A", address="http://127.0.0.1:9")
    with pytest.raises(ConfigError, match=r"address: must begin with https://, for a key is sent there"):
        make_list("gpt2-small/8-res-jb", [1], "A", address="http://example.org")


def test_a_key_goes_to_no_other_address(server: Server) -> None:
    server.status, server.headers = 302, {"Location": f"{server.address}/elsewhere"}
    with pytest.raises(DataError, match=r"status 302, it sends to another address, which is not followed"):
        make_list("gpt2-small/8-res-jb", [1], "A", address=server.address)
    assert len(server.asked) == 1


@pytest.mark.parametrize("key", [SECRET, f"{SECRET}\r\nX-Evil: 1", f"{SECRET} two", f"{SECRET}ü"])
def test_the_key_is_in_no_output_whatever_happens(
    server: Server,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    export: Any,
    key: str,
) -> None:
    """Fault 28: the reference wrote it into files.  Here servers that send it back are among what is tried."""
    monkeypatch.setenv("NEURONPEDIA_API_KEY", key)
    monkeypatch.chdir(tmp_path)
    said = io.StringIO()
    handler = logging.StreamHandler(said)
    logging.getLogger().addHandler(handler)
    logging.getLogger().setLevel(logging.DEBUG)
    echoed = {"message": f"the key {key} is wrong", "error": key, "url": None}
    try:
        for status, answer in (
            (200, {"url": "https://x.org"}),
            (401, echoed),
            (500, key.encode()),
            (200, echoed),
            (302, {}),
        ):
            server.status, server.answer = status, answer
            for address in (server.address, "http://127.0.0.1:9"):
                try:
                    said.write(make_list("gpt2-small/8-res-jb", [1], "A", address=address))
                except (DataError, ConfigError) as error:
                    said.write("".join(traceback.format_exception(error)) + repr(error) + repr(error.__dict__))
                    _write_locals(error, said)
        monkeypatch.setattr(lists.make_list, "__kwdefaults__", {"description": "", "address": server.address})
        for words in (["--make"], []):
            done = CliRunner().invoke(app, ["export", "list", "gpt2-small/8-res-jb", "--features", "1,2", *words])
            said.write(done.output + repr(done.exception))
        export(folder=tmp_path / "out", verbose=True, numbers=[1])
    finally:
        logging.getLogger().removeHandler(handler)
        logging.getLogger().setLevel(logging.WARNING)
    seen = said.getvalue() + "".join(capsys.readouterr())
    assert "status 401" in seen or key != SECRET
    assert SECRET not in seen
    for path in tmp_path.rglob("*"):
        assert not path.is_file() or SECRET.encode() not in path.read_bytes(), path


def _write_locals(error: BaseException, out: io.StringIO) -> None:
    """What a debugger would show of saekit's frames."""
    for frame, _ in traceback.walk_tb(error.__traceback__):
        if "/saekit/" in frame.f_code.co_filename and frame.f_code.co_name != "_key":
            out.write(repr(frame.f_locals))


def test_the_command_shows_an_address(store: Any) -> None:
    done = CliRunner().invoke(app, ["export", "list", str(store.folder), "--features", "1,3-4", "--name", "A b"])
    assert done.exit_code == 0, done.output
    assert done.stdout.strip() == quick_list_url("tiny/3-res-x", [1, 3, 4], "A b")
    released = ["export", "list", "gpt2-small-res-jb:blocks.8.hook_resid_pre", "--features", "1"]
    assert CliRunner().invoke(app, released).stdout.strip() == quick_list_url("gpt2-small/8-res-jb", [1])
    done = CliRunner().invoke(app, ["export", "list", "tiny/3-res-x", "--features", "all"])
    assert "must be numbers, such as 1,2,5-20, for a list of all is none" in str(done.exception)


def test_a_store_is_called_as_asked(store: Any) -> None:
    from saekit.commands.exporting import name_of

    assert str(name_of(str(store.folder), next(iter(store.saes)), "gpt2-small/8-res-jb")) == "gpt2-small/8-res-jb"
    with pytest.raises(ConfigError, match="--sae and --id are for a feature store or a run"):
        name_of("gpt2-small/8-res-jb", None, "gpt2-small/8-res-jb")
