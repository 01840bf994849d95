"""A dashboard that is served: to whom, what, and where."""

from __future__ import annotations

import gzip
import http.client
import json
import runpy
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from support.odd_tokens import OddBackend

import saekit
from saekit.dashboards import Look, feature_data, index_data
from saekit.dashboards.columns import fires_on_columns, index_columns
from saekit.dashboards.server import Served
from saekit.dashboards.serving import address_of, check_serving, is_loopback, opened_port, serve
from saekit.errors import ConfigError, MissingPackageError, PlaceError

LOOK = Look(top=3, quantiles=2, per_quantile=1)


@pytest.fixture(scope="module")
def port(store: saekit.FeatureStore) -> Iterator[int]:
    """Where a dashboard of two of the SAEs is served."""
    served = Served(store=store, names=["topk", "heads"], look=LOOK, labels={"topk": {5: "<b>"}})
    opened = opened_port("127.0.0.1", 0)
    number = opened.getsockname()[1]
    with serving(served, opened, names=["My-Machine"]):
        yield number


class serving:
    """A server in a thread, for the time of a block."""

    def __init__(self, served: Served, opened: socket.socket, **options: Any) -> None:
        import uvicorn

        from saekit.dashboards.server import app_of

        config = uvicorn.Config(app_of(served, **options), log_level="warning", lifespan="off", ws="none")
        self.server, self.opened = uvicorn.Server(config), opened
        self.thread = threading.Thread(target=self.server.run, args=([opened],))

    def __enter__(self) -> None:
        self.thread.start()

    def __exit__(self, *raised: object) -> None:
        self.server.should_exit = True
        self.thread.join(10)
        self.opened.close()


def ask(port: int, path: str, method: str = "GET", **headers: str) -> tuple[http.client.HTTPResponse, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    connection.request(method, path, headers={name.replace("_", "-"): value for name, value in headers.items()})
    answer = connection.getresponse()
    body = answer.read()
    connection.close()
    return answer, body


def test_a_feature_is_what_a_page_would_say_of_it(port: int, store: saekit.FeatureStore) -> None:
    answer, body = ask(port, "/sae/1/feature/5.json")
    assert answer.status == 200
    assert answer.headers["content-type"] == "application/json"
    assert json.loads(body) == json.loads(json.dumps(feature_data(store.saes["heads"].feature(5), LOOK)))
    assert json.loads(ask(port, "/sae/0/feature/5.json")[1])["label"] == "<b>"


def test_the_columns_are_the_list(store: saekit.FeatureStore) -> None:
    for sae in store.saes.values():
        columns, later = index_columns(sae, {5: "five"}), fires_on_columns(sae)
        for at, entry in enumerate(index_data(sae, [*sae], {5: "five"})):
            assert columns["index"][at] == entry["index"]
            for name in ("firing_fraction", "maximum", "max_logit"):
                assert (columns[name] and columns[name][at]) == entry[name]
            assert columns["labels"].get(str(entry["index"])) == entry["label"]
            assert [columns["texts"][place] for place in columns["raises"][at]] == entry["raises"]
            assert [later["texts"][place] for place in later["fires_on"][at]] == entry["fires_on"]
        assert json.dumps([columns, later], allow_nan=False)


def test_tokens_that_come_again_and_again_do_not_hide_others(
    store: saekit.FeatureStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    from saekit.dashboards import columns

    sae = store.saes["jumprelu"]
    whole = fires_on_columns(sae)
    monkeypatch.setattr(columns, "_LOOKED_AT", (2, 3))
    assert fires_on_columns(sae) == whole
    assert max(map(len, whole["fires_on"])) == 10


def test_whoever_has_an_answer_is_not_sent_it_again(port: int) -> None:
    for path in ("/", "/sae/0/feature/5.json", "/sae/0/fires-on.json"):
        answer, body = ask(port, path)
        assert body
        assert answer.headers["cache-control"] == "no-cache"
        again, nothing = ask(port, path, If_None_Match=f'"other", W/{answer.headers["etag"]}')
        assert (again.status, nothing, again.headers["etag"]) == (304, b"", answer.headers["etag"])
        assert ask(port, path, If_None_Match='"other"')[0].status == 200


def test_another_look_has_another_tag(store: saekit.FeatureStore) -> None:
    tags = {Served(store=store, look=look, labels=labels).tag for look, labels in (
        (LOOK, {}), (Look(top=4), {}), (LOOK, {"topk": {1: "one"}}))}  # fmt: skip
    assert len(tags) == 3


def test_only_who_asks_for_this_machine_is_answered(port: int) -> None:
    for host in ("127.0.0.1", f"127.0.0.1:{port}", "localhost", f"LocalHost:{port}", "[::1]", f"[::1]:{port}",
                 "my-machine:80"):  # fmt: skip
        assert ask(port, "/sae/0/feature/5.json", Host=host)[0].status == 200, host
    for host in ("evil.example", f"evil.example:{port}", "localhost.evil.example", "10.0.0.1", "", "127.0.0.1.nip.io",
                 "[::2]", "localhost:x"):  # fmt: skip
        answer, body = ask(port, "/sae/0/feature/5.json", Host=host)
        assert answer.status == 421, host
        assert b"does not go by that name" in body


def test_nothing_is_changed_and_no_other_page_reads_it(port: int) -> None:
    for method in ("POST", "PUT", "DELETE", "PATCH", "OPTIONS"):
        answer, _ = ask(port, "/", method, Origin="http://evil.example")
        assert answer.status == 405
        assert "default-src 'none'" in answer.headers["content-security-policy"]
    answer, _ = ask(port, "/sae/0/feature/5.json", Origin="http://evil.example")
    assert not [name for name in answer.headers if name.lower().startswith("access-control")]
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert answer.headers["cross-origin-resource-policy"] == "same-origin"
    assert "frame-ancestors 'none'" in answer.headers["content-security-policy"]
    assert ask(port, "/", "HEAD")[0].status == 200


@pytest.mark.parametrize(
    ("path", "told"),
    [
        ("/sae/0/feature/16.json", "feature: must be 0 to 15 for topk, found 16"),
        ("/sae/2/feature/1.json", "sae: must be 0 to 1, found 2"),
        ("/sae/2/fires-on.json", "sae: must be 0 to 1, found 2"),
        (f"/sae/0/feature/{'9' * 20}.json", f"feature: must be a number of at most 9 digits, found '{'9' * 20}'"),
        ("/sae/0/feature/-1.json", "feature: must be a number of at most 9 digits, found '-1'"),
    ],
)
def test_what_is_not_there(port: int, path: str, told: str) -> None:
    answer, body = ask(port, path)
    assert (answer.status, json.loads(body)) == (404, {"error": told})
    assert ask(port, "/../../etc/passwd")[0].status == 404


def test_a_number_of_thousands_of_digits_is_not_there_either(port: int) -> None:
    for path in (f"/sae/0/feature/{'9' * 5000}.json", f"/sae/{'9' * 5000}/fires-on.json"):
        answer, body = ask(port, path)
        assert answer.status == 404
        assert b"must be a number of at most 9 digits, found '999" in body
        assert len(body) < 300
        assert answer.headers["x-content-type-options"] == "nosniff"


def test_plotly_comes_as_the_browser_takes_it(port: int) -> None:
    packed, plain = ask(port, "/plotly.js", Accept_Encoding="gzip, br"), ask(port, "/plotly.js")
    assert packed[0].headers["content-encoding"] == "gzip"
    assert gzip.decompress(packed[1]) == plain[1]
    assert b"Plotly" in plain[1]


def test_features_are_kept_as_they_were_sent_but_not_all(
    store: saekit.FeatureStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    from saekit.dashboards import server

    made: list[int] = []

    def counted(feature: Any, look: Look, **options: Any) -> dict[str, Any]:
        made.append(feature.index)
        return feature_data(feature, look, **options)

    monkeypatch.setattr(server, "feature_data", counted)
    monkeypatch.setattr(server, "_KEPT", 2)
    served = Served(store=store, look=LOOK)
    for number in (1, 2, 1, 4, 2, 1):
        assert json.loads(served.feature(0, number))["index"] == number
    assert made == [1, 2, 4, 2, 1]


def test_effects_are_computed_when_a_feature_is_looked_at(
    saes: dict[str, Any], contexts: Any, store: saekit.FeatureStore
) -> None:
    from saekit.analysis.loss_effects import LossEffects
    from saekit.dashboards.effects import PageEffects

    effects = PageEffects(LossEffects.of(store.saes["topk"], saes["topk"], OddBackend()))
    served = Served(store=store, names=["topk"], look=LOOK, effects={"topk": effects})
    found = json.loads(served.feature(0, 5))
    assert found["loss_effect_kind"] == "exact"
    assert any(found["top"][0]["loss_effects"])
    assert served.tag != Served(store=store, names=["topk"], look=LOOK).tag


def test_what_is_kept_is_sent_while_the_model_is_at_work(store: saekit.FeatureStore) -> None:
    """And what two ask for at once is made once."""
    begun, go_on, made = threading.Event(), threading.Event(), list[int]()

    class Slow:
        kind = "exact"

        def __call__(self, feature: Any, windows: Any) -> Any:
            made.append(feature.index)
            if feature.index == 5:
                begun.set()
                assert go_on.wait(20)
            return [[None] * len(window.ids) for window in windows]

    served = Served(store=store, names=["topk"], look=LOOK, effects={"topk": Slow()})
    kept = served.feature(0, 1)
    del made[:]
    threads = [threading.Thread(target=served.feature, args=(0, 5)) for _ in range(2)]
    for thread in threads:
        thread.start()
    assert begun.wait(20)
    found: list[bytes] = []
    other = threading.Thread(target=lambda: found.append(served.feature(0, 1)), daemon=True)
    other.start()
    other.join(5)
    go_on.set()
    for thread in threads:
        thread.join(20)
    assert found == [kept]
    assert made == [5]


def test_two_who_ask_for_the_list_wait_for_one(store: saekit.FeatureStore, monkeypatch: pytest.MonkeyPatch) -> None:
    from saekit.dashboards import server

    both, made = threading.Barrier(2), list[str]()

    def counted(sae: Any) -> Any:
        made.append(sae.name)
        with suppress(threading.BrokenBarrierError):
            both.wait(0.2)  # until another makes it, too
        return {}

    monkeypatch.setattr(server, "fires_on_columns", counted)
    served = Served(store=store, look=LOOK)
    threads = [threading.Thread(target=served.fires_on, args=(0,)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert len(made) == 1


def test_what_is_said_of_a_fault_has_the_same_headers(
    store: saekit.FeatureStore, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def wrong(self: Any, place: int, number: int) -> bytes:
        raise ZeroDivisionError

    monkeypatch.setattr(Served, "feature", wrong)
    opened = opened_port("127.0.0.1", 0)
    with serving(Served(store=store, look=LOOK), opened):
        answer, body = ask(opened.getsockname()[1], "/sae/0/feature/1.json")
    assert (answer.status, body) == (500, b"Internal Server Error")
    assert "default-src 'none'" in answer.headers["content-security-policy"]
    assert answer.headers["x-content-type-options"] == "nosniff"


def test_the_store_that_is_measured_is_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The benchmark's own, with few features."""
    bench = Path(__file__).parents[1] / "bench"
    monkeypatch.syspath_prepend(str(bench))  # where scripts find what they share
    make = runpy.run_path(str(bench / "dashboard_server.py"))["make"]
    make(tmp_path, 8, 4, 50)
    served = Served(store=saekit.FeatureStore.open(tmp_path, verify=True))
    assert b"made" in served.page
    assert json.loads(served.feature(0, 7))["index"] == 7
    assert len(json.loads(served.fires_on(0))["fires_on"]) == 8


# ---- where


def test_a_port_that_is_in_use_is_told_with_one_that_is_free() -> None:
    with opened_port("127.0.0.1", 0) as first:
        port = first.getsockname()[1]
        with pytest.raises(PlaceError, match=rf"port {port} of 127\.0\.0\.1 is in use.*--port \d+.*--port 0") as raised:
            opened_port("127.0.0.1", port)
        free = int(str(raised.value).split("--port ")[1].split(")")[0])
        assert port < free < port + 100
        opened_port("127.0.0.1", free).close()


def test_addresses_as_they_are_typed() -> None:
    with opened_port("127.0.0.1", 0) as here:
        port = here.getsockname()[1]
        assert address_of("127.0.0.1", here) == f"http://127.0.0.1:{port}/"
        assert address_of("0.0.0.0", here) == f"http://127.0.0.1:{port}/"
        assert address_of("::1", here) == f"http://[::1]:{port}/"
        assert is_loopback(here)
    with opened_port("0.0.0.0", 0) as everywhere:
        assert not is_loopback(everywhere)


def test_places_where_nothing_is_served() -> None:
    with pytest.raises(ConfigError, match=r"host: must be an address or a name of this machine.*found 'a/b'"):
        check_serving("a/b")
    with pytest.raises(ConfigError, match=r"port: must be a whole number from 1 to 65535.*found 70000"):
        check_serving(port=70000)
    with pytest.raises(ConfigError, match=r"host: '192\.0\.2\.1' is not an address of this machine"):
        opened_port("192.0.2.1", 0)


def test_without_the_web_server(monkeypatch: pytest.MonkeyPatch, store: saekit.FeatureStore) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(
        MissingPackageError, match=r"starlette and uvicorn are not installed: pip install 'saekit\[serve\]'"
    ):
        saekit.serve_dashboard(store)


def test_ctrl_c_ends_it(store: saekit.FeatureStore, capsys: pytest.CaptureFixture[str]) -> None:
    told: list[Any] = []

    def ask_then_stop(port: int) -> None:
        told.append(ask(port, "/sae/0/feature/1.json")[0].status)
        signal.raise_signal(signal.SIGINT)

    with opened_port("127.0.0.1", 0) as opened:
        port = opened.getsockname()[1]
        thread = threading.Thread(target=ask_then_stop, args=(port,))
        serve(Served(store=store, look=LOOK), opened, ready=thread.start)
        thread.join()
        assert told == [200]
        with pytest.raises(ConnectionError):
            socket.create_connection(("127.0.0.1", port), timeout=5)


def test_the_command_serves(
    store: saekit.FeatureStore, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from typer.testing import CliRunner

    from saekit.cli import app
    from saekit.commands import serving as command

    seen: dict[str, Any] = {}

    def served(what: Served, opened: socket.socket, *, names: Any, ready: Any) -> None:
        seen.update(saes=[one.name for one in what.saes], window=what.look.window, names=names)
        ready()

    monkeypatch.setattr(command, "serve", served)
    asked = ["dashboard", str(store.folder), "--serve", "--port", "0", "--window", "3"]
    result = CliRunner().invoke(app, [*asked, "--sae", "heads", "--allowed-host", "mine"])
    assert result.exit_code == 0, result.output
    assert seen == {"saes": ["heads"], "window": (3, 3), "names": ["mine"]}
    assert "16 features are shown at http://127.0.0.1:" in result.output
    assert "password" not in result.output
    told = CliRunner().invoke(app, [*asked, "--host", "0.0.0.0"]).output
    assert "there is no password" in told


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        (["--serve", "--features", "1"], "--features: --serve shows all features, and writes nothing"),
        (["--serve", "--overwrite"], "--overwrite: --serve shows all features, and writes nothing"),
        (["--serve", "--out", "x.html"], "--out: --serve shows all"),
        (["--port", "8000"], "--port: that is for --serve"),
        (["--loss-effects", "exact", "--no-loss-effects"], "contradict each other"),
        (["--loss-effects", "quick"], "must be 'exact', 'direct', 'auto'"),
        (["--serve", "--loss-effects", "exact"], "needs the SAE, and a feature store does not have it"),
    ],
)
def test_mistakes_of_the_command(asked: list[str], told: str, store: saekit.FeatureStore, tmp_path: Path) -> None:
    from typer.testing import CliRunner

    from saekit.cli import app

    asked = [*asked, "--port", "0"] if asked[0] == "--serve" else asked
    result = CliRunner().invoke(app, ["dashboard", str(store.folder), *asked])
    assert told in str(result.exception)
