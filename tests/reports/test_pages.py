"""Pages: one file that needs nothing beside it, holds what it shows as data, and whatever names there are."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from support.written import EVALS, records, write_run, write_sweep

from saekit.reports.folder import read_run
from saekit.reports.page import curves_page, sweep_page
from saekit.reports.pictures import draw_pictures

POINTS = {
    f"{n}_l1={l1:g}_lr={lr:g}": {"sae": {"l1_coefficient": l1}, "training": {"lr": lr}}
    for n, (l1, lr) in enumerate((l1, lr) for l1 in (1.0, 3.0, 9.0) for lr in (1e-4, 1e-3))
}


class Page(HTMLParser):
    """The tags and texts of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: dict[str, list[str]] = {}
        self._inside: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "link"):
            self._inside.append(tag if "id" not in dict(attrs) else f"{tag}#{dict(attrs)['id']}")

    def handle_endtag(self, tag: str) -> None:
        assert self._inside.pop().partition("#")[0] == tag

    def handle_data(self, text: str) -> None:
        self.texts.setdefault(self._inside[-1] if self._inside else "", []).append(text)

    @property
    def data(self) -> Any:
        return json.loads("".join(self.texts["script#data"]))


def page_of(folder: Path) -> Page:
    run = read_run(folder)
    text = sweep_page(run) if run.sweep else curves_page(run.alone, run.state)
    assert text is not None
    return Page(text)


@pytest.fixture(scope="module")
def drawn_sweep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With its pictures, which take most of the time; tests only read it."""
    folder = tmp_path_factory.mktemp("drawn") / "sweep"
    draw_pictures(write_sweep(folder, POINTS, diverged={"5_l1=9_lr=0.001": "the loss is nan"}))
    return folder


def test_a_page_needs_no_network(tmp_path: Path, drawn_sweep: Path) -> None:
    draw_pictures(write_run(tmp_path / "run"))
    for folder, n_pages in ((tmp_path / "run", 1), (drawn_sweep, 1 + len(POINTS))):
        pages = list(folder.rglob("*.html"))
        assert len(pages) == n_pages
        for path in pages:
            text = path.read_text()
            page = Page(text)
            refers = [value for _, attrs in page.tags for name, value in attrs.items() if name in ("src", "href")]
            assert refers == ["data:,"], "but for an icon that is none"
            without = text.replace("http://www.w3.org/2000/svg", "")  # the name of a language, which is not fetched
            assert not re.search(r"https?:|//[a-z]|@import|url\((?!#)|fetch\(|XMLHttp|import\(|WebSocket", without)
            (policy,) = [a["content"] for tag, a in page.tags if a.get("http-equiv") == "Content-Security-Policy"]
            assert policy is not None
            assert policy.startswith("default-src 'none'")
            assert not re.search(r"\bconnect-src|https?", policy)


def test_what_is_in_the_curves(tmp_path: Path) -> None:
    page = page_of(write_run(tmp_path / "run", records(100, evals=20)))
    data = page.data
    assert data["tiles"] == [
        ["explained variance, held out", "0.812"], ["L0, features per token, held out", "31.5"],
        ["CE recovered, held out", "0.943"], ["dead features of 1,024", "80"], ["tokens", "100k"],
    ]  # fmt: skip
    ((kind, charts),) = [(group["kind"], group["charts"]) for group in data["groups"]]
    assert kind == "curves"
    assert [chart["title"] for chart in charts] == [
        "Loss (dashed: mse)", "Explained variance", "L0, features per token", "Dead features, of 1,024",
        "λ, l1_coefficient", "Learning rate",
    ]  # fmt: skip
    explained = charts[1]
    assert (explained["lower"], explained["upper"], explained["note"]) == (0, 1, "below 0 until 6k")
    assert [line["end"] for line in explained["lines"]] == ["0.900", "0.812", "0.943"]
    trained, held_out, _ = explained["lines"]
    assert trained["x"] == [1000 * n for n in range(1, 101)]
    assert "low" not in trained, "which is the mean"
    assert held_out["x"] == [20_000, 40_000, 60_000, 80_000, 100_000, 100_000]
    assert held_out["y"][-1] == EVALS["evals/explained_variance"]
    assert page.texts["title"] == ["run"]


def test_a_long_run_is_a_small_page(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path / "run", records(5000, noise=1.0, evals=50)))
    text = curves_page(run.alone, run.state)
    assert text is not None
    assert len(text.encode()) < 150_000
    line = Page(text).data["groups"][0]["charts"][0]["lines"][0]
    assert len(line["x"]) <= 400
    assert all(low <= y <= high for low, y, high in zip(line["low"], line["y"], line["high"], strict=True))
    many = {f"{n}": {"sae": {"l1_coefficient": float(n + 1)}} for n in range(60)}
    swept = sweep_page(read_run(write_sweep(tmp_path / "sweep", many, steps=400)))
    assert swept is not None
    assert len(swept.encode()) < 1_000_000


def test_what_is_in_a_sweep(drawn_sweep: Path) -> None:
    data = Page((drawn_sweep / "summary.html").read_text()).data
    points, curves = data["groups"]
    assert [chart["title"] for chart in points["charts"]] == ["Explained variance over L0", "CE recovered over L0"]
    lines = points["charts"][0]["lines"]
    assert [line["labels"] for line in lines] == [["1", "3", "9"], ["1", "3"]], "a line for each learning rate"
    assert lines[0]["x"] == sorted(lines[0]["x"], reverse=True)
    assert points["charts"][0]["xlog"]
    assert lines[0]["hover"][0].splitlines()[:3] == ["0_l1=1_lr=0.0001", "l1_coefficient = 1", "lr = 0.0001"]
    assert len({(line["light"], line["dark"]) for line in lines}) == 2
    (legend,) = data["legend"]
    assert (legend["what"], [entry["name"] for entry in legend["entries"]]) == ("lr", ["0.0001", "0.001"])
    assert [entry["tag"] for entry in legend["entries"]] == [tag for line in lines for tag in line["tags"]]
    assert [chart["title"] for chart in curves["charts"]] == [
        "Loss", "Explained variance", "L0, features per token", "Dead features"
    ]  # fmt: skip
    assert all(len(chart["lines"]) == 6 for chart in curves["charts"])
    assert data["table"]["head"][:3] == ["SAE", "l1_coefficient", "lr"]
    rows = data["table"]["rows"]
    assert rows[0]["link"] == "0_l1=1_lr=0.0001/curves.html"
    assert (drawn_sweep / rows[0]["link"]).is_file()
    assert rows[5]["cells"][-1] == "diverged"
    assert rows[5]["cells"][3] == "-"
    assert all(len(row["cells"]) == len(row["keys"]) == len(data["table"]["head"]) for row in rows)


def test_names_are_no_code(tmp_path: Path) -> None:
    evil = "</script><script>alert(1)</script>"
    folder = write_run(
        tmp_path / "a<b>&amp;\"'", end="failed", reason=f"{evil} {{title}}", options={"model": {"name": evil}}
    )
    run = read_run(folder)
    text = curves_page(run.alone, run.state)
    assert text is not None
    assert text.count("<script") == 2
    page = Page(text)
    assert page.texts["h1"] == ["a<b>&amp;\"'"]
    assert any(f"failed: {evil} {{title}}" in paragraph for paragraph in page.texts["p"])
    names = {f"{n} of them": {"training": {"device": f"{n}{evil}"}} for n in range(2)}
    swept_run = read_run(write_sweep(tmp_path / "sweep", names))
    swept = sweep_page(swept_run)
    assert swept is not None
    assert swept.count("<script") == 2
    data = Page(swept).data
    assert [entry["name"] for entry in data["legend"][0]["entries"]] == [f"0{evil}", f"1{evil}"]
    assert [row["link"] for row in data["table"]["rows"]] == [None, None], (
        "to names that an address would have to escape"
    )


def test_what_has_no_number_is_null(tmp_path: Path) -> None:
    made = records(30, evals=-1)
    made[10]["losses/overall_loss"] = None
    made[11]["metrics/l0"] = 1e400
    page = page_of(write_run(tmp_path / "run", made, end="interrupted"))
    assert page.data["groups"][0]["charts"][0]["lines"][0]["y"][10] is None
    assert page.data["groups"][0]["charts"][2]["lines"][0]["y"][11] is None
    run = read_run(write_run(tmp_path / "empty", []))
    assert curves_page(run.alone, run.state) is None
    swept = write_sweep(tmp_path / "none", {"a": {}, "b": {}})
    for path in swept.glob("*/metrics.jsonl"):
        path.write_text("")
    assert sweep_page(read_run(swept)) is None


BROWSER = shutil.which("chromium") or shutil.which("google-chrome")


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="there is no Chromium here")
def test_a_browser_draws_it(tmp_path: Path) -> None:
    for folder, charts, least in (
        (write_run(tmp_path / "run", records(100, evals=20)), 6, 3 * 6 + 2),
        (write_sweep(tmp_path / "sweep", POINTS), 6, 12),
    ):
        draw_pictures(folder)
        page = folder / ("curves.html" if charts == 6 and folder.name == "run" else "summary.html")
        script = """<script>addEventListener("error", (event) => { document.body.dataset.error = event.message; });
            setTimeout(() => {
              const svg = document.querySelectorAll(".chart svg")[1], box = svg.getBoundingClientRect();
              const at = { clientX: box.left + 180, clientY: box.top + 60 };
              for (const kind of ["pointermove", "pointerdown", "pointerup", "dblclick"]) {
                svg.dispatchEvent(new PointerEvent(kind, { ...at, pointerType: "mouse" }));
                at.clientX += 30;
              }
              for (const times of [1, 2]) document.querySelectorAll("button").forEach((button) => button.click());
              document.querySelectorAll("th").forEach((head) => head.click());
            }, 20);</script><main"""
        tried = page.with_name("tried.html")
        tried.write_text(page.read_text().replace("<main", script, 1))
        command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking",
                   f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=2000", "--dump-dom",
                   tried.as_uri()]  # fmt: skip
        found = subprocess.run(command, capture_output=True, text=True, timeout=120)
        assert "data-error" not in found.stdout
        assert found.stdout.count('class="chart"') == charts
        assert found.stdout.count('class="dot"') >= least
        assert "NaN" not in found.stdout
