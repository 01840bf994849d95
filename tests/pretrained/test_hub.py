"""A Hub that cannot be reached is told at once; one that is slow is waited for."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing

import huggingface_hub
import pytest
from huggingface_hub import constants

import saekit
from saekit import hub
from saekit.commands.pretokenize import _named_tokenizer
from saekit.config import DatasetConfig
from saekit.data.packed import Packed
from saekit.data.text import Documents
from saekit.errors import DataError, ModelError, SAEFormatError, SaekitError


@pytest.fixture
def address(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """That of a Hub on loopback that refuses all connections; whoever waits between tries fails."""
    for name in ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with closing(socket.socket()) as taken:  # bound and not listening
        taken.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{taken.getsockname()[1]}"
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "ENDPOINT", url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")
        monkeypatch.setattr(hub, "_PAUSE", 0)
        monkeypatch.setattr(hub, "_reached", set())
        monkeypatch.setattr(hub, "_unreached", {})
        monkeypatch.setattr(time, "sleep", lambda seconds: seconds and pytest.fail("tried again and again"))
        yield url


ASKED: dict[str, tuple[type[SaekitError], Callable[[], object]]] = {
    "an SAE": (SAEFormatError, lambda: saekit.SAE.from_hub("nobody/sae")),
    "a dataset": (DataError, lambda: Documents.open(DatasetConfig(path="nobody/texts"))),
    "a tokenizer": (ModelError, lambda: _named_tokenizer("nobody/tokenizer", saekit.default_manager())),
}


@pytest.mark.parametrize("what", list(ASKED))
def test_no_way_to_the_hub(address: str, what: str) -> None:
    kind, ask = ASKED[what]
    with pytest.raises(kind, match="nobody/") as caught:
        ask()
    (note,) = caught.value.__notes__
    assert note.startswith(f"The Hub at {address} cannot be reached (")
    assert "Connection refused" in note
    assert "HF_HUB_OFFLINE" not in str(caught.value)  # which nobody has set
    assert constants.HF_HUB_OFFLINE is False


def test_whether_contexts_are_packed_is_left_open(address: str) -> None:
    assert Packed.at(DatasetConfig(path="nobody/texts")) is None


def test_it_is_tried_again_after_a_while(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    monkeypatch.setattr(hub, "_no_connection", lambda url: asked.append(url) or OSError("no route"))
    for _ in range(3):
        with hub.within_reach():
            assert constants.HF_HUB_OFFLINE
            with hub.within_reach():  # inside of it, it is known
                pass
    assert asked == [address, address]
    monkeypatch.setattr(hub, "_KNOWN_FOR", 0)
    monkeypatch.setattr(hub, "_no_connection", lambda url: asked.append(url))
    with hub.within_reach(), hub.within_reach():
        assert not constants.HF_HUB_OFFLINE
    assert asked == [address] * 3


def test_a_hub_that_is_slow_is_a_hub(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:  # connections are made, and nothing is ever answered
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.getsockname()[1]}")
        monkeypatch.setattr(hub, "_PATIENCE", 0.2)
        with hub.within_reach():
            assert not constants.HF_HUB_OFFLINE


@pytest.mark.parametrize("answer", ["200 OK", "404 Not Found", "503 Service Unavailable"])
def test_whatever_it_answers_it_is_there(address: str, monkeypatch: pytest.MonkeyPatch, answer: str) -> None:
    def serve(server: socket.socket) -> None:
        connection, _ = server.accept()
        with connection:
            connection.recv(4096)
            connection.sendall(f"HTTP/1.1 {answer}\r\nContent-Length: 0\r\nConnection: close\r\n\r\n".encode())

    with socket.create_server(("127.0.0.1", 0)) as server:
        thread = threading.Thread(target=serve, args=(server,))
        thread.start()
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.getsockname()[1]}")
        with hub.within_reach():
            assert not constants.HF_HUB_OFFLINE
        thread.join()


def test_offline_mode_asks_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(hub, "_no_connection", lambda url: pytest.fail("asked"))
    with hub.within_reach():
        pass
    assert constants.HF_HUB_OFFLINE is True
    assert huggingface_hub.is_offline_mode()


def test_a_path_that_is_there_asks_nobody(monkeypatch: pytest.MonkeyPatch, tmp_path: object) -> None:
    monkeypatch.setattr(hub, "_no_connection", lambda url: pytest.fail("asked"))
    with hub.within_reach(unless=str(tmp_path)):
        pass
