"""A store of SAEs of several architectures, of a model some of whose tokens are hard to show."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support.odd_tokens import collected, odd_contexts, several_saes

import saekit

CHROMIUM, DRIVER = Path("/usr/bin/chromium"), Path("/usr/bin/chromedriver")


@pytest.fixture(scope="session")
def contexts() -> torch.Tensor:
    return odd_contexts()


@pytest.fixture(scope="session")
def saes() -> dict[str, Any]:
    return several_saes()


@pytest.fixture(scope="session")
def store(
    saes: dict[str, Any], contexts: torch.Tensor, tmp_path_factory: pytest.TempPathFactory
) -> saekit.FeatureStore:
    return collected(saes, tmp_path_factory.mktemp("dashboards") / "store", contexts)


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    """A Chromium without a window, which keeps what pages say and ask for; the test is skipped where there is none."""
    webdriver = pytest.importorskip("selenium.webdriver")
    if not (CHROMIUM.exists() and DRIVER.exists()):
        pytest.skip("no Chromium with its driver is here")
    options = webdriver.ChromeOptions()
    options.binary_location = str(CHROMIUM)
    for argument in ("--headless", "--no-sandbox", "--disable-gpu"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(str(DRIVER)))
    yield driver
    driver.quit()
