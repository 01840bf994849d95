"""Follow the walk for real, and write what it shows: outputs, pictures, and the dashboard of the gallery.

    python docs/make_walk.py [FOLDER]

Every command and block of ``walk.md`` is run as it stands, in a folder without a run, or in one where an earlier call
has left one: then what trains is not run again.  What a block prints goes below it, as text.  Pictures are taken by
Chromium, and go to ``images``.  ``gallery.json.gz`` is the data of a dashboard; ``gallery_page.py`` makes a page of it.

The names of :data:`GALLERY` are of the features of one run.  Where another torch made others, read them anew.
"""

from __future__ import annotations

import contextlib
import gzip
import io
import os
import re
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from PIL import Image

import saekit

DOCS = Path(__file__).parent
CHROMIUM, DRIVER = "/usr/bin/chromium", "/usr/bin/chromedriver"
MOST = 120_000  # bytes of a picture
GALLERY = {
    595: "the name of an exception comes next",
    149: "after may, will, should: be",
    488: "which, that, this: what it does comes next",
    241: "= of an argument: its value comes next",
    391: "the value of an argument: a comma or ) comes next",
    852: "is and isinstance in a condition",
    171: "import: a module comes next",
    27: "a call with a text comes next",
    322: "the name of an exception",
    658: "a number, to be compared or added to",
    558: "used, returned, defined: by, as, from come next",
    47: "len: a parenthesis comes next",
}
FIND = """
const search = document.getElementById('search');
search.value = 'None';
search.dispatchEvent(new Event('input', {bubbles: true}));
document.getElementById('theme').click();
"""
LOWER = "document.querySelectorAll('#feature .group')[1].scrollIntoView()"
TOKEN = "document.querySelectorAll('#feature .group .token.peak')[3].focus()"
PARTS = [
    ("gallery-texts.png", LOWER, "#595", (1180, 600)),
    ("gallery-token.png", TOKEN, "#595", (1180, 480)),
    ("gallery-phone.png", "", "#149", (420, 760)),
    ("gallery-search.png", FIND, "#852", (1180, 480)),
]
"""Pictures of the gallery: what is done before each, the feature, and the size."""


def followed(page: Path, folder: Path) -> dict[str, Any]:
    """Run a page in ``folder``, write into it what its blocks print, and return their names."""
    os.chdir(folder)
    names: dict[str, Any] = {}

    def run(block: re.Match[str]) -> str:
        language, code = block[1], block[2]
        if language == "console":
            for line in code.replace("\\\n", " ").splitlines():
                there = folder / "runs" / "walk" / {"train": "sae", "features": "features"}.get(line.split()[1], "none")
                if not there.exists():
                    subprocess.run(shlex.split(line), check=True)
            return block[0]
        with contextlib.redirect_stdout(io.StringIO()) as said:
            exec(compile(code, str(page), "exec"), names)
        text = said.getvalue()
        return f"```python\n{code}```\n" + (f"\n```text\n{text}```\n" if text else "")

    source = page.read_text(encoding="utf-8")
    found = re.sub(r"^```(console|python)\n(.*?)^```\n(?:\n```text\n.*?^```\n)?", run, source, flags=re.M | re.S)
    page.write_text(found, encoding="utf-8")
    return names


@contextlib.contextmanager
def browser() -> Any:
    """A Chromium without a window."""
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for argument in ("--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"):
        options.add_argument(argument)
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    try:
        yield driver
    finally:
        driver.quit()


def pictured(driver: Any, page: Path, target: str, *, size: tuple[int, int], at: str = "", do: str = "") -> None:
    """A picture of a page at ``#at``, after the script ``do``."""
    width, height = size
    device = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", device)
    driver.get("about:blank")
    driver.get(page.absolute().as_uri() + at)
    time.sleep(2)
    driver.execute_script(do)
    time.sleep(1)
    kept(Image.open(io.BytesIO(driver.get_screenshot_as_png())), target)


def kept(image: Image.Image, target: str) -> None:
    """A picture in ``images``; of fewer colors, if it is large."""
    place = DOCS / "images" / target
    (image := image.convert("RGB")).save(place, optimize=True)
    if place.stat().st_size > MOST:
        image.quantize(256, dither=Image.Dither.NONE).save(place, optimize=True)
    print(f"{place.name}: {place.stat().st_size / 1000:,.0f} kB")


def gallery(folder: Path) -> Path:
    """A dashboard of the features that have names, and its data beside the pages."""
    page = saekit.dashboard(
        "runs/walk", features=[*GALLERY], labels=GALLERY, out=folder / "gallery.html", top=12, per_quantile=3,
        title="Features of a small model of Python",
    )  # fmt: skip
    (data,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', page.read_text("utf-8"), re.S)
    place = DOCS / "gallery.json.gz"
    place.write_bytes(gzip.compress(data.encode(), 9, mtime=0))
    print(f"{place.name}: {place.stat().st_size / 1000:,.0f} kB")
    return page


def pictures(names: dict[str, Any], folder: Path) -> None:
    """All of both pages."""
    curves = Image.open(folder / "runs" / "walk" / "curves.png")
    kept(curves.crop((0, 0, curves.width, int(0.4 * curves.height))), "walk-curves.png")
    sets = folder / "sets.html"
    names["found"].overlay(names["feature"].index).write_html(
        sets, include_plotlyjs=True, config={"displayModeBar": False}
    )
    shown, every = gallery(folder), folder / "runs" / "walk" / "dashboard.html"
    one = f"#{names['feature'].index}"
    with browser() as driver:
        pictured(driver, every, "walk-dashboard.png", size=(1180, 640))
        pictured(driver, folder / "named.html", "walk-named.png", size=(1180, 800), at=one)
        pictured(driver, sets, "walk-sets.png", size=(900, 420))
        pictured(driver, shown, "gallery.png", size=(1180, 760), at="#149")
        for target, part, at, size in PARTS:
            pictured(driver, shown, target, size=size, at=at, do=part)


def main() -> None:
    with tempfile.TemporaryDirectory() as empty:
        folder = Path(sys.argv[1] if len(sys.argv) > 1 else empty).absolute()
        pictures(followed(DOCS / "walk.md", folder), folder)


if __name__ == "__main__":
    main()
