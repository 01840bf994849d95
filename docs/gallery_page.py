"""The dashboard of the gallery, made of its data while the documentation is built."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

from saekit.dashboards import page_html

NAME = "gallery-dashboard.html"
DATA = Path(__file__).parent / "gallery.json.gz"


def data() -> dict[str, Any]:
    """What :func:`saekit.dashboards.page_data` gave when ``make_walk.py`` ran."""
    found: dict[str, Any] = json.loads(gzip.decompress(DATA.read_bytes()))
    return found


def write(folder: Path) -> Path:
    """The page, in the folder of the built documentation."""
    place = folder / NAME
    place.write_text(page_html(data()), encoding="utf-8")
    return place
