"""The HTML report in a real browser: no error, no request, charts that drew data, sorting, both colour schemes."""

from __future__ import annotations

import copy
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from onnx_lowrank.html import html

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

    from tests.conftest import Written

COMMANDS = ("optimize", "compare")


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """Chromium of the system, driven by playwright: nothing is downloaded."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    names = ("chromium", "chromium-browser", "google-chrome")
    found = next((path for name in names if (path := shutil.which(name))), None)
    if found is None:
        pytest.skip("no Chromium on this machine (Debian: apt-get install chromium)")
    with playwright.sync_playwright() as started:
        # Chromium refuses to run as root, as in a container, with its sandbox.
        launched = started.chromium.launch(executable_path=found, args=["--no-sandbox"])
        yield launched
        launched.close()


def opened(browser: Browser, path: Path, width: int = 1280, **options: Any) -> tuple[Page, list[str], list[str]]:
    """A page, what it logged, and what it asked for; the network is off."""
    context = browser.new_context(viewport={"width": width, "height": 800}, offline=True, **options)
    page = context.new_page()
    logged: list[str] = []
    asked: list[str] = []
    page.on("console", lambda message: logged.append(message.text))
    page.on("pageerror", lambda fault: logged.append(str(fault)))
    page.on("request", lambda request: asked.append(request.url))
    page.goto(path.as_uri())
    return page, logged, asked


@pytest.mark.parametrize("command", COMMANDS)
def test_no_error_and_no_request(browser: Browser, written: dict[str, Written], command: str) -> None:
    page, logged, asked = opened(browser, written[command].path)
    page.wait_for_timeout(300)
    assert logged == []
    assert [url for url in asked if not url.startswith("data:")] == [written[command].path.as_uri()]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_chart_drew_data(browser: Browser, written: dict[str, Written], command: str) -> None:
    page, _, _ = opened(browser, written[command].path)
    page.evaluate("document.querySelectorAll('details').forEach(d => { d.open = true; })")
    charts = page.locator("svg.chart")
    assert charts.count() >= 4
    for i in range(charts.count()):
        sizes = charts.nth(i).evaluate(
            "svg => [...svg.querySelectorAll('.mark')].map(m => m.getBoundingClientRect())"
            ".map(b => [b.width, b.height])"
        )
        assert sizes, charts.nth(i).get_attribute("aria-label")
        assert all(width > 0 and height > 0 for width, height in sizes)
        inside = charts.nth(i).evaluate(
            "svg => { const s = svg.getBoundingClientRect(); return [...svg.querySelectorAll('.mark, text')].every("
            "m => { const b = m.getBoundingClientRect(); return b.left > s.left - 9 && b.right < s.right + 9; }); }"
        )
        assert inside, charts.nth(i).get_attribute("aria-label")


def test_sorting_and_filtering(browser: Browser, written: dict[str, Written]) -> None:
    page, logged, _ = opened(browser, written["optimize"].path)
    read = "t => [...document.querySelectorAll('#table-' + t + ' tbody tr')].map(r => r.cells[1].dataset.value)"
    button = page.locator("#table-pareto th button").nth(1)
    button.click()
    down = [float(v) for v in page.evaluate(read, "pareto")]
    button.click()
    assert [float(v) for v in page.evaluate(read, "pareto")] == sorted(down)
    assert down == sorted(down, reverse=True)
    assert page.locator("#table-pareto th").nth(1).get_attribute("aria-sort") == "ascending"
    names = page.locator("#table-sites tbody tr td:first-child")
    page.locator("#table-sites th button").first.click()
    assert names.all_inner_texts() == sorted(names.all_inner_texts())
    page.fill("#filter", "layer.1")
    assert page.locator("#table-sites tbody tr:visible").count() == 1
    assert logged == []


SORTED = """table => [...table.tBodies[0].rows].map(r => [...r.cells].map(c => c.dataset.value ?? null))"""


@pytest.mark.parametrize("command", COMMANDS)
def test_every_column_of_every_table_sorts(browser: Browser, written: dict[str, Written], command: str) -> None:
    page, logged, _ = opened(browser, written[command].path)
    tables = page.locator("table.sortable")
    assert tables.count() >= 5
    for i in range(tables.count()):
        table, heads = tables.nth(i), tables.nth(i).locator("th")
        for column in range(heads.count()):
            button = heads.nth(column).locator("button")
            if not button.count():
                continue
            orders = []
            for _ in range(2):
                button.click()
                rows = [row[column] for row in table.evaluate(SORTED)]
                known = [value for value in rows if value is not None]
                assert rows[: len(known)] == known, "what was not measured stands last"
                orders.append((heads.nth(column).get_attribute("aria-sort"), known))
            assert {order for order, _ in orders} == {"ascending", "descending"}
            if "num" in (heads.nth(column).get_attribute("class") or ""):
                for order, known in orders:
                    numbers = [float(value) for value in known]
                    assert numbers == sorted(numbers, reverse=order == "descending")
    assert logged == []


@pytest.mark.parametrize("command", COMMANDS)
def test_the_parts_of_a_report_are_there(browser: Browser, written: dict[str, Written], command: str) -> None:
    """With figures: a real run leaves no part unmeasured."""
    page, _, _ = opened(browser, written[command].path)
    parts = ["latency", "frontier", "accuracy", "profile", "environment"]
    parts += ["sites", "staircases"] if command == "optimize" else []
    for part in parts:
        assert page.locator(f"#{part}").count() == 1
        assert page.locator(f"nav a[href='#{part}']").count() == 1
    assert page.locator(".missing").all_inner_texts() == []
    axes = page.locator("svg.chart .axis").all_text_contents()
    assert axes
    assert all(re.search(r"ms|milliseconds|loss|rank|×", axis) for axis in axes)


LONG = "a_folder_of_models/recogniser_of_a_long_name_that_tells_all_versions_and_settings_apart"


def crowded(data: dict[str, Any]) -> dict[str, Any]:
    """A comparison of eleven models with long names, timed in two ways; losses and times lie close together."""
    data = copy.deepcopy(data)
    first, second = data["models"][:2]
    more = [{**second, "path": f"{LONG}_{i}.onnx", "loss": 1e-3 * (1 + i % 3)} for i in range(9)]
    data["models"] = [{**first, "path": f"{LONG}_baseline.onnx"}, *more, {**second, "path": f"{LONG}_9.onnx"}]
    for row in data["models"]:
        if row["latency"]:
            row["latencies"] = [{**row["latency"], "threads": 4, "provider": "cuda"}]
    for key in ("profile", "accuracy", "cold"):
        for row in data[key]:
            row["model"] = f"{LONG.rpartition('/')[2]}_9.onnx"
    return lengthened(data)


def lengthened(data: dict[str, Any]) -> dict[str, Any]:
    """A report with long names of nodes and outputs."""
    data = copy.deepcopy(data)
    for row in [*data.get("sites", ()), *data["profile"]]:
        row["node"] = (
            f"/deberta/encoder/layer.11/attention/self/{row['node'].replace('/', '')}/a_name_without_any_break"
        )
    for row in data["accuracy"]:
        row["output"] = "a_long_name_of_an_output_without_any_break_that_goes_on_and_on:0"
    return data


@pytest.fixture
def long_page(written: dict[str, Written], command: str, tmp_path: Path) -> Path:
    """A page of long names."""
    data = written[command].data
    path = tmp_path / "long.html"
    path.write_text(html(crowded(data) if command == "compare" else lengthened(data)), encoding="utf-8")
    return path


@pytest.mark.parametrize("command", COMMANDS)
def test_no_table_is_cut_on_paper(browser: Browser, long_page: Path) -> None:
    """A4 without the margins of the style sheet, at 96 dots an inch: a page that is printed cannot be scrolled."""
    page, _, _ = opened(browser, long_page, 688)
    page.evaluate("document.querySelectorAll('details').forEach(d => { d.open = true; })")
    page.emulate_media(media="print")
    for name, right in page.evaluate(
        "[...document.querySelectorAll('table')].map(t => [t.id, t.getBoundingClientRect().right])"
    ):
        assert right <= 688, name
    assert page.evaluate("document.documentElement.scrollWidth") <= 688
    broken = page.evaluate(
        "[...document.querySelectorAll('table.sortable td.num')].filter(c => c.textContent.length && (() => {"
        "const r = document.createRange(); r.selectNodeContents(c.firstChild); return r.getClientRects().length > 1;"
        "})()).map(c => c.textContent)"
    )
    assert broken == [], "numbers stay whole"


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("width", [1280, 400])
def test_labels_stay_in_their_panels_and_apart(browser: Browser, long_page: Path, width: int) -> None:
    page, _, _ = opened(browser, long_page, width)
    beyond = page.evaluate(
        "[...document.querySelectorAll('figure text')].filter(t => {"
        "const f = t.closest('figure').getBoundingClientRect(), b = t.getBoundingClientRect();"
        "return b.left < f.left || b.right > f.right; }).map(t => t.textContent)"
    )
    assert beyond == []
    assert page.evaluate("document.documentElement.scrollWidth") == width
    over = page.evaluate(
        "[...document.querySelectorAll('#frontier svg .name')].flatMap((one, i, all) => all.slice(i + 1).filter("
        "two => { const a = one.getBoundingClientRect(), b = two.getBoundingClientRect();"
        "return a.left < b.right && b.left < a.right && a.top + 3 < b.bottom && b.top + 3 < a.bottom; })"
        ".map(two => one.textContent + two.textContent))"
    )
    assert over == []


def test_every_model_has_a_colour_and_its_way(browser: Browser, written: dict[str, Written], tmp_path: Path) -> None:
    """More models than the palette has colours: none is black, and rows of one model tell how it was timed."""
    path = tmp_path / "crowded.html"
    path.write_text(html(crowded(written["compare"].data)), encoding="utf-8")
    page, logged, _ = opened(browser, path)
    fills = "[...document.querySelectorAll('svg .mark')].map(m => getComputedStyle(m).fill)"
    assert "rgb(0, 0, 0)" not in page.evaluate(fills)
    assert len(set(page.evaluate(fills))) == 8
    ways = page.locator("#latency svg .way").all_text_contents()
    assert ways == ["1 thread, CPU time, cpu", "4 threads, CPU time, cuda"]
    assert page.locator("#profile h3").first.inner_text().endswith("apart_9.onnx")
    heads = page.locator("#table-latency th").all_inner_texts()
    assert [head.strip() for head in heads[:4]] == ["timed with", "model", "speed-up", "95 % interval"]
    assert logged == []


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("width", [1280, 400])
def test_the_verdict_is_seen_without_scrolling(
    browser: Browser, written: dict[str, Written], command: str, width: int
) -> None:
    page, _, _ = opened(browser, written[command].path, width)
    for part in ("h1", ".figures", ".where"):
        box = page.locator(part).first.bounding_box()
        assert box is not None
        assert box["y"] + box["height"] <= 800
    assert page.evaluate("document.documentElement.scrollWidth") == width


@pytest.mark.parametrize("command", COMMANDS)
def test_light_dark_and_print(browser: Browser, written: dict[str, Written], command: str, tmp_path: Path) -> None:
    """Screenshots stay in $ONNX_LOWRANK_ARTEFACTS, else in pytest's temporary folder."""
    tmp_path = Path(os.environ.get("ONNX_LOWRANK_ARTEFACTS") or tmp_path)
    paper = {}
    colour = "getComputedStyle(document.body).backgroundColor"
    for scheme in ("light", "dark"):
        page, logged, _ = opened(browser, written[command].path, color_scheme=scheme)
        page.screenshot(path=tmp_path / f"{command}-{scheme}.png", full_page=True)
        paper[scheme] = page.evaluate(colour)
        page.click("#theme")
        assert page.evaluate(colour) == "rgb(255, 255, 255)"
        page.click("#theme")
        paper[f"{scheme}, then dark"] = page.evaluate(colour)
        page.emulate_media(media="print")
        assert page.evaluate(colour) == "rgb(255, 255, 255)"
        assert page.pdf().startswith(b"%PDF")
        assert logged == []
    assert paper["light"] == "rgb(255, 255, 255)"
    assert paper["light"] != paper["dark"] == paper["light, then dark"] == paper["dark, then dark"]
    assert all(path.stat().st_size > 20_000 for path in tmp_path.glob("*.png"))


def test_the_json_can_be_saved(browser: Browser, written: dict[str, Written], tmp_path: Path) -> None:
    page, _, _ = opened(browser, written["optimize"].path)
    with page.expect_download() as saved:
        page.click("#download")
    saved.value.save_as(tmp_path / "report.json")
    assert '"schema": 1' in (tmp_path / "report.json").read_text(encoding="utf-8")
