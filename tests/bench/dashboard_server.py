"""How long a browser waits for a served dashboard of a large SAE: its list until it can be used, and its features.

    python tests/bench/dashboard_server.py [--features 24576] [--tokens 500000] [--vocabulary 50257]

It makes a store of that size with drawn numbers, serves it on this machine, opens it in headless Chromium, and prints
seconds; it judges nothing.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import random
import statistics
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from figures import missing, row, spread

from saekit.dashboards.server import Served
from saekit.dashboards.serving import address_of, opened_port, serve
from saekit.features.manifest import AboutSAE, StoreManifest
from saekit.features.store import FeatureStore
from saekit.files.tensors import save_tensors

CHROMIUM = "/usr/bin/chromium"
SIZE, PER_TOKEN, WIDTH = 128, 48, 768


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--features", type=int, default=24576)
    parser.add_argument("--tokens", type=int, default=500_000)
    parser.add_argument("--vocabulary", type=int, default=50_257)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        began = time.perf_counter()
        make(Path(folder), asked.features, asked.tokens // SIZE, asked.vocabulary)
        size = sum(path.stat().st_size for path in Path(folder).rglob("*"))
        about = f"a store of {asked.features:,} features, {size / 1e6:,.0f} MB"
        row(about, "making it", {"seconds": time.perf_counter() - began})
        print(f"a store of {asked.features:,} features, {size / 1e6:,.0f} MB, in {time.perf_counter() - began:.1f} s")
        began = time.perf_counter()
        served = Served(store=FeatureStore.open(folder))
        page = served.page
        row(about, "opening it, and making its page", {"seconds": time.perf_counter() - began})
        print(f"opened, and its page made, in {time.perf_counter() - began:.2f} s: {len(page) / 1e6:.2f} MB")
        opened = opened_port("127.0.0.1", 0)
        threading.Thread(target=serve, args=(served, opened), daemon=True).start()
        measure(address_of("127.0.0.1", opened), asked.features, about)


def make(folder: Path, n: int, contexts: int, vocabulary: int) -> None:
    """A store in which every feature fires somewhere, how often as 1/rank."""
    rng = np.random.default_rng(0)
    rates = 1 / np.arange(10, n + 10)
    counts = np.maximum((rates / rates.sum() * contexts * SIZE * PER_TOKEN).astype(np.int64), 1)
    counts = rng.permutation(np.minimum(counts, contexts * SIZE // 4))
    places = [np.sort(rng.choice(contexts * SIZE, count, replace=False)) for count in counts]
    values = [np.sort(rng.exponential(4, count)).astype(np.float32) for count in counts]
    for own in values:
        rng.shuffle(own)
    flat = np.concatenate(places)
    bins = np.stack([np.histogram(own, 50)[0] for own in values])
    k = 20

    def table(*shape: int) -> Any:
        return rng.standard_normal(shape).astype(np.float32)

    def numbers(most: int, *shape: int) -> Any:
        return rng.integers(0, most, shape).astype(np.int32)

    down = -np.sort(-np.abs(table(n, k)), 1)
    together = {f"features_by_{by}_{what}": np.abs(table(n, k)) / 9 for by in ("pearson", "jaccard")
                for what in ("cos", "jaccard", "pearson")}  # fmt: skip
    together |= {f"features_by_{by}_index": numbers(n, n, k) for by in ("pearson", "jaccard")}
    together |= {
        "neurons_cos": table(n, k) / 9,
        "neurons_pearson": table(n, k) / 9,
        "neurons_index": numbers(WIDTH, n, k),
    }
    files: dict[str, dict[str, Any]] = {
        "contexts": {"contexts": numbers(vocabulary, contexts, SIZE)},
        "sae-0/activations": {"contexts": (flat // SIZE).astype(np.int32), "positions": (flat % SIZE).astype(np.int16),
                              "values": np.concatenate(values)},
        "sae-0/index": {"features": np.arange(n), "fired": counts, "fired_contexts": counts, "histogram": bins,
                        "complete_above": np.zeros(n), "squares": counts * 32.0, "total": counts * 4.0,
                        "maximum": np.array([own.max() for own in values], np.float64),
                        "minimum": np.array([own.min() for own in values], np.float64),
                        "starts": np.concatenate([[0], counts.cumsum()])},
        "sae-0/kept": {"kept": np.ones((contexts, SIZE), np.bool_)},
        "sae-0/together": together,
        "sae-0/weights": {"alignment_index": numbers(WIDTH, n, k), "alignment_value": down,
                          "alignment_share": down / 99, "neighbor_index": numbers(n, n, k), "neighbor_cos": down / 9},
        "sae-0/logits": {"top": down, "bottom": -down, "top_ids": numbers(vocabulary, n, k),
                         "bottom_ids": numbers(vocabulary, n, k), "histogram": numbers(1000, n, 50), "high": down[:, 0],
                         "low": -down[:, 0], "mean": table(n), "std": np.abs(table(n))},
    }  # fmt: skip
    (folder / "sae-0").mkdir()
    about: dict[str, dict[str, Any]] = {}
    for name, tables in files.items():
        path = folder / f"{name}.safetensors"
        digest = save_tensors(path, {key: torch.from_numpy(np.ascontiguousarray(x)) for key, x in tables.items()})
        about[path.relative_to(folder).as_posix()] = {"bytes": path.stat().st_size, "sha256": digest}
    letters = random.Random(0)
    words = ["".join(letters.choices("abcdefghijklmnopqrstuvwxyz", k=letters.randint(2, 8))) for _ in range(vocabulary)]
    text = json.dumps([f" {word}" for word in words])
    (folder / "vocabulary.json").write_text(text)
    about["vocabulary.json"] = {"bytes": len(text), "sha256": hashlib.sha256(text.encode()).hexdigest()}
    sae = AboutSAE(name="made", folder="sae-0", checksum="0", architecture="saekit:topk", d_in=WIDTH, d_sae=n,
                   d_out=WIDTH, dtype="float32", inputs=["blocks.8.hook_resid_pre"],
                   targets=["blocks.8.hook_resid_pre"], hook="blocks.8.hook_resid_pre", layer=8, tokens={}, metadata={},
                   tokens_counted=contexts * SIZE)  # fmt: skip
    StoreManifest(model={"name": "made", "fingerprint": None}, dataset={}, contexts=contexts, context_size=SIZE,
                  digest="0", options={"top_kept": 200}, saes=[sae], files=about).save(folder)  # fmt: skip


def measure(url: str, n: int, about: str) -> None:
    if importlib.util.find_spec("selenium") is None or not Path(CHROMIUM).exists():
        missing("selenium and Chromium")
        return
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for argument in ("--headless", "--no-sandbox", "--disable-gpu", "--window-size=1280,900"):
        options.add_argument(argument)
    driver = webdriver.Chrome(options=options, service=Service("/usr/bin/chromedriver"))
    try:
        lists, tokens, features, drawn = [], [], [], []
        for _ in range(5):
            driver.get("about:blank")
            driver.get(url)
            while not driver.execute_script("return document.querySelectorAll('#list a').length"):
                time.sleep(0.005)
            timing = driver.execute_script("return performance.getEntriesByType('navigation')[0].toJSON()")
            lists.append(timing["domContentLoadedEventStart"] / 1000)
            tokens.append(driver.execute_async_script(_TOKENS) / 1000)
        for number in random.Random(1).sample(range(n), 20):
            found = driver.execute_async_script(_SHOWN, number)
            features.append(found[0] / 1000)
            drawn.append(found[1] / 1000)
        for case, seconds in (
            ("the list can be used", lists), ("what features fire on", tokens), ("a feature", features),
            ("with its pictures", drawn),
        ):  # fmt: skip
            row(about, case, {"seconds": spread(seconds)})
        print(f"the list can be used after {_told(lists)} s")
        print(f"what features fire on is there after {tokens[0]:.3f} s at first, then {_told(tokens[1:])} s")
        print(f"a feature is shown after {_told(features)} s, with its pictures after {_told(drawn)} s")
        waited = driver.execute_async_script(_SEARCHED)
        row(about, "a search", {"seconds": waited / 1000})
        print(f"a search is answered after {waited / 1000:.3f} s")
    finally:
        driver.quit()


_SHOWN = """
const [number, done] = arguments, began = performance.now();
let first = null;
location.hash = `#${number}`;
(function look() {
  const there = document.getElementById("name")?.textContent === `Feature ${number}`;
  if (there && first === null) first = performance.now() - began;
  const plots = [...document.querySelectorAll(".plot")];
  const drawn = there && plots.length && plots.every((one) => one.querySelector(".main-svg"));
  if (drawn) done([first, performance.now() - began]);
  else setTimeout(look, 2);
})();
"""
_TOKENS = """
const [done] = arguments;
(function look() {
  if (page.saes.every((one) => one.index.some((entry) => entry.fires_on.length))) done(performance.now());
  else setTimeout(look, 5);
})();
"""
_SEARCHED = """
const done = arguments[0], box = document.getElementById("search"), began = performance.now();
box.value = "qu";
box.dispatchEvent(new Event("input"));
requestAnimationFrame(() => setTimeout(() => done(performance.now() - began)));
"""


def _told(seconds: list[float]) -> str:
    return f"{statistics.median(seconds):.3f} (at most {max(seconds):.3f})"


if __name__ == "__main__":
    main()
