"""The gallery of the documentation: a dashboard that is made, while the pages are built, of data that is kept."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from support.pages import wait

import saekit
from saekit.dashboards import page_data
from saekit.features import Feature, Window

DOCS = Path(__file__).parents[2] / "docs"


class Unchanged:
    kind = "exact"

    def __call__(self, feature: Feature, windows: Sequence[Window]) -> list[list[float | None]]:
        return [[0.0] * len(one.values) for one in windows]


@pytest.fixture(scope="module")
def gallery() -> Iterator[Any]:
    sys.path.insert(0, str(DOCS))
    try:
        import gallery_page

        yield gallery_page
    finally:
        sys.path.remove(str(DOCS))


def outline(data: Any) -> Any:
    """The names of all that is in it, and of lists those of the first entry."""
    if isinstance(data, Mapping):
        return {name: outline(value) for name, value in data.items()}
    first = data[0] if isinstance(data, list) and data else None
    return [outline(first)] if isinstance(first, Mapping) else None


def of_one_feature(data: Mapping[str, Any]) -> Any:
    (sae, *_) = data["saes"]
    one, *_ = sae["features"].values()
    return outline({**data, "saes": [{**sae, "features": one}]})


def test_the_data_is_what_pages_are_made_of_today(gallery: Any, store: saekit.FeatureStore) -> None:
    """Where it is not, ``docs/make_walk.py`` makes it anew."""
    sae = store.saes["topk"]
    fires = sae.feature(int(sae.indices[sae.fired.argmax()]))
    made = page_data(store, {"topk": [fires]}, effects={"topk": Unchanged()})
    assert of_one_feature(gallery.data()) == of_one_feature(made)


def test_the_page_is_that_of_the_features_with_names(gallery: Any, browser: Any, tmp_path: Path) -> None:
    browser.get_log("browser"), browser.get_log("performance")
    page = gallery.write(tmp_path)
    browser.get(page.as_uri())
    (sae,) = gallery.data()["saes"]
    named = [str(one["index"]) for one in sae["index"]]
    assert len(named) == 12
    wait(browser, "[...document.querySelectorAll('#list .number')].map(one => one.textContent)", named)
    assert all(one["label"] for one in sae["index"])
    assert not [entry for entry in browser.get_log("browser") if entry["level"] in ("SEVERE", "WARNING")]
    messages = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    asked = [one["params"]["request"]["url"] for one in messages if one["method"] == "Network.requestWillBeSent"]
    assert not [url for url in asked if not url.startswith((page.as_uri(), "data:", "blob:", "about:"))]


def test_the_gallery_names_its_page(gallery: Any) -> None:
    assert f'href="{gallery.NAME}"' in (DOCS / "gallery.md").read_text(encoding="utf-8")
