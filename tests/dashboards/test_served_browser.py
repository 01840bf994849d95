"""A dashboard that is served, and features in a notebook, in a real browser."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import attrs
import pytest
import torch
from support.odd_tokens import ODD, OddBackend, collected, several_saes
from support.pages import wait

import saekit
from saekit.dashboards import Look
from saekit.dashboards.server import Served
from saekit.dashboards.serving import address_of, opened_port, serve

LOOK = Look(top=3, quantiles=2, per_quantile=1)


def asked(browser: Any) -> list[str]:
    """What was asked for since it was last asked."""
    messages = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    return [one["params"]["request"]["url"] for one in messages if one["method"] == "Network.requestWillBeSent"]


@pytest.fixture
def quiet(browser: Any) -> Iterator[Any]:
    """The browser, to which nothing was said that it complains about."""
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", {
        "width": 1000, "height": 900, "deviceScaleFactor": 1, "mobile": False})  # fmt: skip
    browser.get("about:blank")
    browser.get_log("performance"), browser.get_log("browser")
    yield browser
    assert not [entry for entry in browser.get_log("browser") if entry["level"] in ("SEVERE", "WARNING")]


@pytest.fixture(scope="module")
def url(store: saekit.FeatureStore) -> Iterator[str]:
    import uvicorn

    from saekit.dashboards.server import app_of

    app = app_of(Served(store=store, names=["topk", "heads"], look=LOOK, labels={"topk": {5: ODD[1]}}))
    opened = opened_port("127.0.0.1", 0)
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning", lifespan="off", ws="none"))
    thread = threading.Thread(target=server.run, args=([opened],))
    thread.start()
    yield address_of("127.0.0.1", opened)
    server.should_exit = True
    thread.join(10)
    opened.close()


def test_a_served_page_asks_for_what_is_looked_at(quiet: Any, url: str, store: saekit.FeatureStore) -> None:
    quiet.get(url)
    listed = "[...document.querySelectorAll('#list .number')].map(one => Number(one.textContent))"
    wait(quiet, listed, [*range(16)])
    wait(quiet, "document.querySelector('#feature h2')?.textContent", "Feature 0")
    wait(quiet, "document.querySelectorAll('.plot .main-svg').length >= 2")
    wait(quiet, "page.saes.every(one => one.index.some(entry => entry.fires_on.length))")
    assert "never fires" in quiet.execute_script("return document.querySelector('[data-index=\"3\"]').textContent")
    label = quiet.execute_script("return document.querySelector('[data-index=\"5\"] .words').textContent")
    assert label == ODD[1], "what people call a feature is text"
    got = asked(quiet)
    assert all(one.startswith((url, "data:")) for one in got), got
    assert [one for one in got if "/feature/" in one] == [f"{url}sae/0/feature/0.json"]

    quiet.execute_script("location.hash = '#1/7'")
    wait(quiet, "document.querySelector('#feature h2')?.textContent", "Feature 7")
    assert [one for one in asked(quiet) if "/feature/" in one] == [f"{url}sae/1/feature/7.json"]
    quiet.execute_script("location.hash = '#1/8'")
    wait(quiet, "document.querySelector('#feature h2')?.textContent", "Feature 8")
    quiet.execute_script("location.hash = '#1/7'")
    wait(quiet, "document.querySelector('#feature h2')?.textContent", "Feature 7")
    assert not [one for one in asked(quiet) if one.endswith("7.json")], "it is here already"


def test_all_features_are_searched_and_sorted(quiet: Any, url: str, store: saekit.FeatureStore) -> None:
    quiet.get(url)
    wait(quiet, "page.saes.every(one => one.index.some(entry => entry.fires_on.length))")
    sae = store.saes["topk"]
    window = sae.feature(5).top(1)[0]
    listed = "return [...document.querySelectorAll('#list .number')].map(one => Number(one.textContent))"
    quiet.execute_script(
        "search.value = arguments[0]; search.dispatchEvent(new Event('input'))", window.token.replace("\n", "\\n")
    )
    found = quiet.execute_script(listed)
    assert 5 in found
    assert len(found) < 16
    quiet.execute_script("search.value = ''; sort.value = 'maximum'; sort.dispatchEvent(new Event('change'))")
    strongest = [int(index) for index in sae.indices[(-sae.maximum).argsort(kind="stable")]]
    assert quiet.execute_script(listed)[:10] == strongest[:10]


def test_a_server_that_has_ended_is_told(quiet: Any, store: saekit.FeatureStore) -> None:
    @attrs.frozen(eq=False, slots=False, kw_only=True)
    class Broken(Served):
        def feature(self, place: int, number: int) -> bytes:
            raise saekit.ModelError("the model is gone")

    opened = opened_port("127.0.0.1", 0)
    ended = threading.Event()

    def look(address: str) -> None:
        import signal

        try:
            quiet.get(address)
            wait(quiet, "document.querySelector('#feature [role=alert]')?.textContent", "the model is gone")
        finally:
            ended.set()
            signal.raise_signal(signal.SIGINT)

    thread = threading.Thread(target=look, args=(address_of("127.0.0.1", opened),))
    serve(Broken(store=store, names=["topk"], look=LOOK), opened, ready=thread.start)
    thread.join()
    assert ended.is_set()
    assert quiet.execute_script("return document.querySelector('#feature [role=alert]')?.textContent")
    told = quiet.get_log("browser")  # of the answer 500, by the browser itself
    assert all("500" in entry["message"] for entry in told)


# ---- notebooks


@pytest.fixture(scope="module")
def own_store(tmp_path_factory: pytest.TempPathFactory, contexts: torch.Tensor) -> saekit.FeatureStore:
    """Of one SAE."""
    return collected(several_saes()["topk"], tmp_path_factory.mktemp("one") / "store", contexts)


def test_several_features_in_one_notebook(
    quiet: Any, store: saekit.FeatureStore, own_store: saekit.FeatureStore, tmp_path: Path
) -> None:
    with torch.inference_mode():
        shown = [
            saekit.show_feature(store, 5, sae="topk", label=ODD[1]),
            saekit.show_feature(store.saes["heads"], 7, top=2, height=300),
            saekit.show_feature(own_store.folder, 3, height=5000),
            saekit.show_feature(several_saes()["topk"], 5, folder=own_store.folder, model=OddBackend(),
                                contexts=torch.from_numpy(own_store.contexts).long(), device="cpu", verbose=False,
                                loss_effects="exact"),
        ]  # fmt: skip
    notebook = tmp_path / "notebook.html"
    cells = "".join(f"<div class=cell>{one._repr_html_()}</div>" for one in shown)
    notebook.write_text(f"<meta charset=utf-8><title>notebook</title><h1 id=feature>Notebook</h1>{cells}")
    assert len(cells) < 400_000, "no cell has plotly in it"
    quiet.get(notebook.as_uri())
    names = "[0, 1, 2, 3].map(at => frames[at]?.document.querySelector('h2')?.textContent)"
    wait(quiet, names, ["Feature 5", "Feature 7", "Feature 3", "Feature 5"])
    assert quiet.execute_script("return document.getElementById('feature').textContent") == "Notebook"
    assert quiet.title == "notebook", "no token is a script"
    bars = "return [0, 1, 2, 3].map(at => frames[at].document.querySelectorAll('.plot rect').length)"
    assert quiet.execute_script(bars) == [200, 100, 100, 200], "at heads nothing is known of logits; 3 never fires"
    assert quiet.execute_script("return frames[0].document.querySelector('.label').textContent") == ODD[1]
    wait(quiet, "document.querySelectorAll('iframe')[2].offsetHeight === frames[2].document.body.offsetHeight + 2")
    heights = quiet.execute_script("return [...document.querySelectorAll('iframe')].map(one => one.offsetHeight)")
    assert heights[0] == 800, "what is longer scrolls"
    assert heights[1] == 300
    assert 300 < heights[2] < 3000, "as tall as what is in it"
    effect = (
        "return [0, 3].map(at => frames[at].document.querySelectorAll('.sequence .helps, .sequence .harms').length)"
    )
    none, some = quiet.execute_script(effect)
    assert (none, some > 0) == (0, True)
    told = quiet.execute_script("""
        const page = frames[3], token = page.document.querySelector('.sequence .peak');
        token.dispatchEvent(new page.MouseEvent('mouseover', { bubbles: true }));
        return page.document.getElementById('tip').textContent;
    """)
    assert "activation" in told
    assert "nats (exact)" in told
    assert all(one.startswith(("file:", "data:", "about:srcdoc")) for one in asked(quiet))


def test_a_feature_as_a_text(store: saekit.FeatureStore) -> None:
    text = repr(saekit.show_feature(store, 5, sae="topk", label="five"))
    feature = store.saes["topk"].feature(5)
    first, label, raises, *windows = text.split("\n")
    assert first.startswith("feature 5 of topk, at blocks.1.hook_resid_post of fake: fires on ")
    assert (label, raises[:10], len(windows)) == ("  five", "  raises '", 3)
    assert f"{feature.maximum:8.3f}" in windows[0]
    assert "⟦" in windows[0]
    assert "of fake: fires on no token" in repr(saekit.show_feature(store, 3, sae="topk"))


def test_what_cannot_be_shown(store: saekit.FeatureStore) -> None:
    with pytest.raises(saekit.ConfigError, match=r"sae: is missing: there are several, topk, .*; name one"):
        saekit.show_feature(store, 5)
    with pytest.raises(saekit.ConfigError, match=r"index: must be 0 to 15 for topk, found 99"):
        saekit.show_feature(store, 99, sae="topk")
    with pytest.raises(saekit.ConfigError, match=r"height: must be 200 pixels or more, found 3"):
        saekit.show_feature(store, 5, sae="topk", height=3)
    with pytest.raises(saekit.ConfigError, match=r"loss_effects='exact' needs the SAE, and a feature store does not"):
        saekit.show_feature(store, 5, sae="topk", loss_effects="exact")
