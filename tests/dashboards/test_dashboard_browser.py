"""A dashboard in a real browser: it finds, sorts and answers keys, in both themes and widths, and asks for nothing."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from support.odd_tokens import ODD
from support.pages import wait

import saekit
from saekit.dashboards import Look, page_data, page_html
from saekit.features import Feature, Window

SHOWN = [5, 3, 0, 1, 2, 4]


class Halved:
    """Half of each activation; of every second token below zero."""

    kind = "direct path"

    def __call__(self, feature: Feature, windows: Sequence[Window]) -> list[list[float | None]]:
        return [[value * (-0.5) ** (1 + at % 2) for at, value in enumerate(one.values)] for one in windows]


@pytest.fixture(scope="module")
def page(store: saekit.FeatureStore, tmp_path_factory: pytest.TempPathFactory) -> Path:
    shown = {name: [store.saes[name].feature(index) for index in SHOWN] for name in ("topk", "heads")}
    effects: Any = {"topk": Halved()}
    data = page_data(
        store, shown, Look(top=4, per_quantile=2), effects=effects, labels={"topk": {5: "<b>bold</b>"}}, title=ODD[1]
    )
    place = tmp_path_factory.mktemp("page") / "page.html"
    place.write_text(page_html(data), encoding="utf-8")
    return place


class Looked:
    """A page that is open."""

    def __init__(self, browser: Any, page: Path) -> None:
        self.browser, self.page = browser, page

    def open(self, width: int = 1280, scheme: str = "light", at: str = "") -> None:
        device = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
        self.browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", device)
        wanted = {"name": "prefers-color-scheme", "value": scheme}
        self.browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [wanted]})
        self.browser.get("about:blank")
        self.browser.get(self.page.as_uri() + at)

    def run(self, script: str) -> Any:
        return self.browser.execute_script(f"return {script}")

    def texts(self, selector: str) -> list[str]:
        found: list[str] = self.run(f"[...document.querySelectorAll({selector!r})].map(one => one.textContent)")
        return found

    def wait(self, script: str, wanted: Any = True) -> None:
        wait(self.browser, script, wanted)

    def named(self, name: str) -> None:
        self.wait("document.querySelector('#feature h2')?.textContent", f"Feature {name}")

    def press(self, keys: str) -> None:
        from selenium.webdriver.common.action_chains import ActionChains

        ActionChains(self.browser, duration=0).send_keys(keys).perform()

    def listed(self) -> list[int]:
        return [int(text) for text in self.texts("#list .number")]


@pytest.fixture
def looked(browser: Any, page: Path) -> Iterator[Looked]:
    browser.get_log("performance"), browser.get_log("browser")
    yield Looked(browser, page)
    # Whatever failed: the next page begins in the theme of the system.
    browser.execute_script("try { localStorage.clear(); } catch {}")
    severe = [entry for entry in browser.get_log("browser") if entry["level"] in ("SEVERE", "WARNING")]
    assert not severe
    messages = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    asked = [one["params"]["request"]["url"] for one in messages if one["method"] == "Network.requestWillBeSent"]
    outside = [url for url in asked if not url.startswith((page.as_uri(), "data:", "blob:", "about:"))]
    assert not outside, "no request leaves the page"


CONTRAST = """(() => {
  const channels = (text) => {
    const context = Object.assign(document.createElement("canvas"), { width: 1, height: 1 }).getContext("2d");
    context.fillStyle = text; context.fillRect(0, 0, 1, 1);
    return [...context.getImageData(0, 0, 1, 1).data].map((one) => one / 255);
  };
  const over = (front, back) => [0, 1, 2].map((at) => front[at] * front[3] + back[at] * (1 - front[3]));
  const light = (color) => color.map((one) => one <= 0.04045 ? one / 12.92 : ((one + 0.055) / 1.055) ** 2.4)
    .reduce((sum, one, at) => sum + one * [0.2126, 0.7152, 0.0722][at], 0);
  const ground = (one) => {
    const own = channels(getComputedStyle(one).backgroundColor);
    return own[3] >= 0.999 ? own.slice(0, 3) : over(own, one.parentElement ? ground(one.parentElement) : [1, 1, 1]);
  };
  const low = [];
  for (const one of document.querySelectorAll("body *")) {
    if (one.closest("svg, dialog, [hidden], :disabled") || !one.getClientRects().length) continue;
    if (![...one.childNodes].some((child) => child.nodeType === 3 && child.textContent.trim())) continue;
    const back = ground(one), front = over(channels(getComputedStyle(one).color), back);
    const [dark, bright] = [light(back), light(front)].sort((x, y) => x - y);
    const ratio = (bright + 0.05) / (dark + 0.05);
    if (ratio < 4.5) low.push([one.className || one.tagName, one.textContent.slice(0, 20), ratio]);
  }
  return low;
})()"""


NAMELESS = """[...document.querySelectorAll("button, select, input")].filter((one) => one.getClientRects().length
  && !one.textContent.trim() && !one.labels?.length && !one.ariaLabel).length"""


@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (1280, "dark"), (375, "dark")])
def test_it_draws_in_every_theme_and_width(looked: Looked, width: int, scheme: str) -> None:
    looked.open(width, scheme)
    looked.named("5")
    looked.wait("document.querySelectorAll('.plot .main-svg').length >= 2")
    assert looked.run("[...document.querySelectorAll('.plot')].every(one => one.querySelector('.point path'))")
    assert looked.run("document.documentElement.scrollWidth <= innerWidth"), "nothing sticks out"
    ground = looked.run("getComputedStyle(document.body).backgroundColor")
    assert ground == ("rgb(246, 247, 249)" if scheme == "light" else "rgb(16, 19, 23)")
    assert looked.run(CONTRAST) == []
    assert looked.run(NAMELESS) == 0
    if width == 375:
        assert not looked.run("document.getElementById('side').getClientRects().length")
        looked.run("document.getElementById('open-list').click()")
        looked.run("document.querySelectorAll('#list a')[1].click()")
        looked.named("3")
        assert not looked.run("document.getElementById('side').getClientRects().length"), "a choice closes the list"


def test_tokens_stay_text_and_are_seen(looked: Looked) -> None:
    looked.open()
    looked.named("5")
    assert looked.run("document.title") == ODD[1]
    assert looked.texts("h1") == [ODD[1]]
    assert looked.texts(".label") == ["<b>bold</b>"]
    looked.run("document.getElementById('help').click()")
    seen = set()
    for index in SHOWN:
        looked.run(f"location.hash = '#0/{index}'")
        looked.named(str(index))
        seen |= set(looked.texts(".token"))
    assert {ODD[1], ODD[2], ODD[7], ODD[10], ODD[11], "⏎", "····", "⇥", "\\u202egnp", "\ufffd", "∅", "\\u2028"} <= seen
    assert looked.run("document.querySelectorAll('main script, main img, main b').length") == 0


def test_keys_lead_from_feature_to_feature(looked: Looked) -> None:
    looked.open()
    looked.named("5")
    right, left = "\ue014", "\ue012"
    for keys, name in (("j", "3"), (right, "0"), ("k", "3"), (left, "5"), ("k", "5")):
        looked.press(keys)
        looked.named(name)
    looked.press("jjj")
    looked.named("1")
    assert looked.run("document.querySelector('#list [aria-current]').dataset.index") == "1"
    looked.browser.back()
    looked.named("0")
    looked.run("document.querySelector('[data-step=\"1\"]').focus()")
    for name in ("1", "2"):
        looked.press("\ue007")
        looked.named(name)
    looked.run("document.querySelector('.skip').click()")
    looked.wait("location.hash", "#feature")
    looked.named("2")
    looked.run("location.hash = '#0/0'")
    looked.named("0")
    looked.press("?")
    assert looked.run("document.getElementById('keys').open")
    looked.press("j\ue00c")
    looked.wait("document.getElementById('keys').open", False)
    looked.named("0")


def test_features_are_found_by_token_and_by_number(looked: Looked) -> None:
    looked.open()
    looked.named("5")
    looked.press("/")
    assert looked.run("document.activeElement.id") == "search"
    index = looked.run("sae().index")
    word = next(text for text in index[2]["raises"] if text.startswith(" w"))
    having = [one["index"] for one in index if any(word in text for text in one["fires_on"] + one["raises"])]
    looked.press(word)
    assert looked.listed() == having
    assert 0 < len(having) < len(SHOWN)
    assert looked.texts("#found") == [f"{len(having)} of 6 features"]
    assert word.strip() in looked.texts("#list .hit")
    looked.press("\ue007")  # Enter
    looked.named(str(having[0]))
    looked.press("/")
    looked.press("4")
    assert looked.listed()[0] == 4, "the feature of that number comes first"
    looked.press("\ue003no such token")
    assert looked.listed() == []
    assert looked.texts("#found") == ["No feature has it among its tokens, nor in a text"]
    assert looked.texts(".title .quiet") == ["not in the list"]
    looked.press("\ue00c")  # Escape
    assert looked.listed() == SHOWN
    plain = looked.run(
        "sae().features[5].top.flatMap((one) => one.tokens.slice(1).map((token, at) => one.tokens[at] + token))"
        ".find((text) => /^[ a-z0-9]+$/.test(text))"
    )
    looked.run(f"(search.value = {json.dumps(plain)}, relist())")
    assert 5 in looked.listed(), "a text of several tokens is found where no token has it"
    looked.run("(search.value = '', relist())")


def test_the_list_is_sorted(looked: Looked, store: saekit.FeatureStore) -> None:
    looked.open()
    looked.named("5")
    sae = store.saes["topk"]
    high = sae.table("logits", "high")
    for name, values in (("firing_fraction", sae.fired), ("maximum", sae.maximum), ("max_logit", high)):
        looked.press("s")
        assert looked.run("sort.value") == name
        assert looked.listed() == sorted(SHOWN, key=lambda index, by=values: (-float(f"{by[index]:.4g}"), index))
    looked.press("s")
    assert looked.listed() == sorted(SHOWN)


def test_tooltips_tell_of_a_token_under_the_mouse_and_in_focus(looked: Looked) -> None:
    from selenium.webdriver.common.action_chains import ActionChains

    looked.open()
    looked.named("5")
    token = looked.browser.find_element("css selector", ".sequence .peak")
    ActionChains(looked.browser, duration=0).move_to_element(token).perform()
    data = looked.run("sae().features[5].top[0]")
    text, value, effect = (data[key][data["at"]] for key in ("tokens", "values", "loss_effects"))
    looked.wait("document.getElementById('tip').hidden", False)
    lines = looked.texts("#tip > *")
    assert json.loads(lines[0]) == text
    assert lines[1].startswith(f"token {data['ids'][data['at']]}")
    assert lines[2] == f"activation {value:.4g}"
    moved = "rises" if effect > 0 else "falls"
    assert lines[3].startswith(f"without it, the loss at the next token {moved} by ")
    assert lines[3].endswith(" nats (direct path)")
    assert lines[4] == f"context {data['context']}, position {data['start'] + data['at']}"
    assert looked.texts(".legend .quiet")[-1] == "(approximate: direct path)"
    assert looked.run("document.querySelectorAll('.sequence .helps, .sequence .harms').length > 0")
    looked.run("document.querySelector('.sequence .peak').focus()")
    looked.press("\ue012")  # to the left
    assert looked.run("document.activeElement === document.querySelector('.sequence .before').lastElementChild")
    assert json.loads(looked.texts("#tip b")[0]) == data["tokens"][data["at"] - 1]
    assert looked.run("document.activeElement.getAttribute('aria-describedby')") == "tip"
    looked.named("5")
    looked.press("\ue00c")
    assert looked.run("document.getElementById('tip').hidden")


def test_a_theme_that_is_chosen_stays(looked: Looked) -> None:
    looked.open(scheme="light")
    looked.named("5")
    looked.wait("document.querySelectorAll('.plot .main-svg').length >= 2")
    looked.press("t")
    assert looked.run("document.documentElement.dataset.theme") == "dark"
    looked.open(scheme="light")
    looked.named("5")
    assert looked.run("document.documentElement.dataset.theme") == "dark"
    looked.run("document.getElementById('theme').click()")
    assert looked.run("[document.documentElement.dataset.theme, recall('theme')]") == ["light", None]


def test_what_has_no_meaning_is_said_on_the_page(looked: Looked) -> None:
    looked.open(at="#0/3")
    looked.named("3")
    assert looked.texts(".head .notice") == ["It fires on no token of this text, so there are no examples of it."]
    looked.run("(document.getElementById('choose-sae').value = '1',"
               " document.getElementById('choose-sae').dispatchEvent(new Event('change')))")  # fmt: skip
    looked.named("5")
    assert looked.texts(".writes .none")[0].startswith("Nothing can be said of logits: blocks.0.attn.hook_z is not in")
    assert looked.run("sort.querySelector('[value=max_logit]').disabled")
    assert looked.run("location.hash") == "#1/5"
    looked.browser.back()
    looked.named("3")


def test_it_prints_on_white(looked: Looked) -> None:
    looked.open(scheme="dark")
    looked.named("5")
    looked.wait("document.querySelectorAll('.plot .main-svg').length >= 2")
    looked.browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print"})
    assert looked.run("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert not looked.run("document.getElementById('side').getClientRects().length")
    looked.browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": ""})
    pdf = looked.browser.execute_cdp_cmd("Page.printToPDF", {"printBackground": False})
    assert len(pdf["data"]) > 20_000
    looked.wait("document.documentElement.dataset.theme", "light")
