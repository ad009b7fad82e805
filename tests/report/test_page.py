"""The page in a real browser: it draws, switches, fits a phone, and neither asks for anything nor runs a label."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import pytest

from fallline.report import analyse, write

from .records import ALL, XSS

webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(not BROWSER or not DRIVER, reason="there is no chromium, or no chromedriver")


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    options = webdriver.ChromeOptions()
    for flag in (
        "headless",
        "no-sandbox",
        "disable-gpu",
        "disable-quic",
        "no-first-run",
        "disable-background-networking",
        "disable-component-update",
        "disable-sync",
        "disable-dev-shm-usage",
        f"user-data-dir={tmp_path_factory.mktemp('browser')}",
    ):
        options.add_argument(f"--{flag}")
    options.binary_location = BROWSER
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    yield driver
    driver.quit()


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("reports")
    return {name: write(folder / name, analyse(make())).as_uri() for name, make in ALL.items()}


@pytest.fixture
def visit(browser: Any, pages: dict[str, str]) -> Iterator[Callable[..., None]]:
    """Opens the page of a record at a width; at the end there must be no error and no request but for the page."""

    def go(name: str, width: int = 1280, scheme: str = "light") -> None:
        size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500}
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        media = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
        browser.get("about:blank")
        for log in ("browser", "performance"):
            browser.get_log(log)
        browser.get(pages[name])
        settle(browser)

    yield go
    assert browser.get_log("browser") == []
    messages = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    asked = [m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"]
    assert asked, "requests are logged"
    assert all(url in pages.values() or url.startswith("data:") for url in asked), asked


def settle(browser: Any) -> None:
    """Wait until observers of sizes have run: two frames."""
    browser.execute_async_script("const done = arguments[0]; requestAnimationFrame(() => requestAnimationFrame(done))")


def texts(browser: Any, selector: str) -> list[str]:
    return browser.execute_script(
        "return [...document.querySelectorAll(arguments[0])].map((e) => e.textContent)", selector
    )


def click(browser: Any, selector: str) -> None:
    browser.execute_script("document.querySelector(arguments[0]).click()", selector)
    settle(browser)


def paths(browser: Any) -> dict[str, str]:
    """Choice → the line drawn for it."""
    return browser.execute_script(
        "return Object.fromEntries([...document.querySelectorAll('#curves path[data-choice]')]"
        ".map((p) => [p.dataset.choice, p.getAttribute('d')]))"
    )


@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("name", ALL)
def test_every_record_is_drawn_and_fits(name: str, width: int, browser: Any, visit: Callable[..., None]) -> None:
    visit(name, width)
    assert texts(browser, "h2")[:3] == ["Summary", "Loss curves", "Final losses"]
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    assert len(texts(browser, "#numbers tbody tr")) == len(ALL[name]()["choices"])
    assert not [t for t in texts(browser, "#report *") if "NaN" in t or "undefined" in t]
    sizes = browser.execute_script("return [...document.querySelectorAll('svg *')].map((e) => e.outerHTML).join(' ')")
    assert "NaN" not in sizes
    assert "Infinity" not in sizes
    outside = browser.execute_script(
        "return [...document.querySelectorAll('.chart text')].map((e) => [e.textContent, e.getBoundingClientRect()])"
        ".filter(([, r]) => r.left < -1 || r.right > arguments[0] + 1).map(([t]) => t)",
        width,
    )
    assert outside == []


def test_the_summary_is_the_analysis(browser: Any, visit: Callable[..., None]) -> None:
    visit("study")
    answer = analyse(ALL["study"]())["analysis"]["summary"]["answer"]
    assert [t.replace("\u00a0", " ") for t in texts(browser, ".answer p")] == answer
    levels = [
        int(tag[1])
        for tag in browser.execute_script("return [...document.querySelectorAll('h1,h2,h3,h4')].map((e) => e.tagName)")
    ]
    assert levels[0] == 1
    assert all(b <= a + 1 for a, b in pairwise(levels)), "headings in order"


def test_charts_have_names(browser: Any, visit: Callable[..., None]) -> None:
    visit("study")
    named = browser.execute_script(
        "return [...document.querySelectorAll('.chart > svg')]"
        ".map((e) => e.getAttribute('role') === 'img' && e.getAttribute('aria-label') && e.querySelector('desc'))"
    )
    assert len(named) == 9, "curves, losses, differences, memory, time, four of tuning"
    assert all(named)


def test_the_axis_switches(browser: Any, visit: Callable[..., None]) -> None:
    visit("study")
    before = paths(browser)
    click(browser, "#curves button[data-value=seconds]")
    after = paths(browser)
    assert before["0"] != after["0"], "adamw does not take as long as the slowest"
    assert "training seconds: step × measured step time" in texts(browser, "#curves text")
    pressed = "return document.querySelector('#curves [data-value=seconds]').getAttribute('aria-pressed')"
    assert browser.execute_script(pressed) == "true"
    click(browser, "#curves button[data-value=step]")
    assert "step" in texts(browser, "#curves text")


def test_a_void_timing_is_not_drawn_across_seconds(browser: Any, visit: Callable[..., None]) -> None:
    visit("apart")
    assert set(paths(browser)) == {"0", "2", "3"}
    click(browser, "#curves button[data-value=seconds]")
    assert set(paths(browser)) == {"0", "3"}
    assert XSS in texts(browser, "#curves .note")[0]


def test_the_legend_switches_a_curve(browser: Any, visit: Callable[..., None]) -> None:
    visit("study")
    assert set(paths(browser)) == {"0", "1", "2", "3"}
    click(browser, ".legend button:nth-child(2)")
    assert set(paths(browser)) == {"0", "1", "3"}
    click(browser, ".legend button:nth-child(2)")
    assert set(paths(browser)) == {"0", "1", "2", "3"}


def test_many_choices_begin_with_nine_curves_that_look_different(browser: Any, visit: Callable[..., None]) -> None:
    visit("many")
    assert len(paths(browser)) == 9
    browser.execute_script(
        "[...document.querySelectorAll('#curves button')].find((b) => b.textContent === 'all choices').click()"
    )
    settle(browser)
    assert len(paths(browser)) == 25
    looks = browser.execute_script(
        "return [...document.querySelectorAll('#curves path[data-choice]')]"
        ".map((p) => p.style.stroke + p.getAttribute('stroke-dasharray'))"
    )
    assert len(set(looks)) == 25


def test_keys_move_along_the_curves(browser: Any, visit: Callable[..., None]) -> None:
    visit("study")
    assert texts(browser, ".legend .value")[0] == "4.8661"
    press = (
        "const box = document.querySelector('#curves .chart'); box.focus();"
        "box.dispatchEvent(new KeyboardEvent('keydown', { key: arguments[0] })); return document.activeElement === box"
    )
    assert browser.execute_script(press, "Home")
    assert texts(browser, ".legend .value") == ["7.6000"] * 4
    assert texts(browser, ".at") == ["Mean loss nearest to 0 tokens:"]
    browser.execute_script(press, "ArrowRight")
    assert texts(browser, ".at") == ["Mean loss nearest to 20.5 k tokens:"]
    browser.execute_script(press, "Escape")
    assert texts(browser, ".legend .value")[0] == "4.8661"


def test_the_pointer_reads_the_curves(browser: Any, visit: Callable[..., None]) -> None:
    visit("study")
    browser.execute_script(
        "const hit = document.querySelector('#curves .hit'), box = hit.getBoundingClientRect();"
        "hit.dispatchEvent(new PointerEvent('pointermove', { clientX: box.right, clientY: box.top + 5 }))"
    )
    assert texts(browser, ".at") == ["Mean loss nearest to 512 k tokens:"]
    assert texts(browser, ".legend .value")[1] == "4.6512"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_theme_follows_the_system_and_the_button(scheme: str, browser: Any, visit: Callable[..., None]) -> None:
    visit("plain", scheme=scheme)
    ground = "return getComputedStyle(document.body).backgroundColor"
    colors = {"light": "rgb(253, 253, 251)", "dark": "rgb(21, 23, 26)"}
    assert browser.execute_script(ground) == colors[scheme]
    click(browser, "button.theme")
    assert browser.execute_script(ground) == colors["dark" if scheme == "light" else "light"]


def test_a_label_is_text_and_nothing_else(browser: Any, visit: Callable[..., None]) -> None:
    visit("apart")
    assert browser.title == "tiny: comparison"
    assert browser.execute_script("return document.images.length") == 0
    assert XSS in browser.execute_script("return [...document.querySelectorAll('#numbers th')].map((e) => e.title)")


def test_the_record_can_be_unfolded(browser: Any, visit: Callable[..., None]) -> None:
    visit("study", 390)
    browser.execute_script("document.querySelectorAll('details').forEach((d) => { d.open = true; })")
    settle(browser)
    assert browser.execute_script("return document.documentElement.scrollWidth") <= 390
    cells = texts(browser, "details td")
    assert "LlamaForCausalLM" in cells
    assert "3c" * 32 in cells
    assert len(texts(browser, "details:first-of-type tbody tr")) >= sum(
        len(c["runs"]) for c in ALL["study"]()["choices"]
    )


def test_one_measure_is_drawn_against_another(browser: Any, visit: Callable[..., None]) -> None:
    visit("measured")
    drawn = "return [...document.querySelectorAll('#measures path[data-choice]')].map((p) => p.getAttribute('d'))"
    chosen = "return [...document.querySelectorAll('#measures select')].map((s) => s.value)"
    assert browser.execute_script(chosen) == ["docs/nll", "exact"], "what the objective of a choice declares"
    first = browser.execute_script(drawn)
    assert len(first) == 4
    browser.execute_script(
        "const s = document.querySelector('#measures select'); s.value = 'exact'; s.dispatchEvent(new Event('change'))"
    )
    settle(browser)
    assert browser.execute_script(drawn) != first
    assert "0.6200 ± 0.0100" in texts(browser, "#measures td") or "0.620 ± 0.010" in texts(browser, "#measures td")
