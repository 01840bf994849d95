"""The page of token set enrichment in a real browser: it draws, in both themes and widths, and asks for nothing."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import attrs
import numpy as np
import pytest

from saekit.analysis import tsea

pytest.importorskip("selenium")
CHROMIUM, DRIVER = Path("/usr/bin/chromium"), Path("/usr/bin/chromedriver")
pytestmark = pytest.mark.skipif(
    not (CHROMIUM.exists() and DRIVER.exists()), reason="no Chromium with its driver is here"
)


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    random = np.random.default_rng(0)
    logits = random.standard_normal((30, 500)).astype(np.float32)
    sets = {f"set_{number}": random.choice(500, 4 + number, replace=False) for number in range(24)}
    logits[:3, sets["set_5"]] += 4
    found = tsea.enrichment_of(lambda some: logits[list(some)], range(30), sets, d_vocab=500, permutations=49)
    evil = attrs.evolve(
        found,
        name="<script>throw 1</script>",
        sets={"<b>set</b>" if name == "set_5" else name: ids for name, ids in found.sets.items()},
    )
    return evil.write(tmp_path_factory.mktemp("page"))[2]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = str(CHROMIUM)
    for argument in ("--headless", "--no-sandbox", "--disable-gpu"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(str(DRIVER)))
    yield driver
    driver.quit()


@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (400, "dark")])
def test_it_draws(page: Path, browser: Any, width: int, scheme: str) -> None:
    device = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", device)
    feature = {"name": "prefers-color-scheme", "value": scheme}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})
    browser.get_log("performance")
    browser.get(page.as_uri())
    for _ in range(100):
        if browser.execute_script("return document.querySelectorAll('.plot .main-svg').length") >= 9:
            break
        time.sleep(0.1)
    drawn = "return [...document.querySelectorAll('.plot')].every(p => p.querySelector('.trace path, .trace .point'))"
    assert browser.execute_script(drawn)
    assert browser.execute_script("return document.documentElement.scrollWidth <= innerWidth"), "nothing sticks out"
    assert browser.execute_script("return document.querySelector('h1').textContent").endswith(
        "<script>throw 1</script>"
    )
    assert "<b>set</b>" in browser.execute_script("return document.querySelector('.plot').textContent")
    labels = browser.execute_script(
        "return [...document.querySelectorAll('.plot .annotation')].map(a => a.textContent)"
    )
    assert {"0", "1", "2"} <= set(labels)
    ink = browser.execute_script("return getComputedStyle(document.body).backgroundColor")
    assert ink == ("rgb(255, 255, 255)" if scheme == "light" else "rgb(20, 22, 26)")
    severe = [entry for entry in browser.get_log("browser") if entry["level"] in ("SEVERE", "WARNING")]
    assert not severe
    messages = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    asked = {one["params"]["request"]["url"] for one in messages if one["method"] == "Network.requestWillBeSent"}
    assert all(url.startswith(("data:", page.as_uri())) for url in asked), asked
