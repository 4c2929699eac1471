"""The page of a pair in a real browser, without a network, at the width of a desk and of a phone."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from browser import PROGRAM, Browser, chromium
from test_htmlreport import HOSTILE, SHAPE, pair

from dinoreg.config import Config
from dinoreg.htmlreport import write_html_report

pytestmark = pytest.mark.skipif(PROGRAM is None, reason="no Chromium is installed (Debian: apt-get install chromium)")
COMPLAINTS = ("Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Log.entryAdded", "Page.javascriptDialogOpening")


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("report") / "report.html"
    fixed, moving, result = pair(folds=True)
    result = replace(result, warnings=["The motion reaches the edge of the search range. " * 3], info={"encoder": HOSTILE},
                     confidence=np.ones(SHAPE, np.float32), colours=np.full((2, 6, 5, 4, 3), 128, np.uint8))
    write_html_report(path, fixed, moving, result.warp(moving), result, title=HOSTILE, names=("a" * 120 + ".nii.gz", HOSTILE),
                      scores={"Landmarks": ("8.5 mm", "1.1 mm")}, config=Config().to_dict())
    return path


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with chromium(tmp_path_factory.mktemp("profile")) as started:
        yield started


@pytest.mark.parametrize("width", [1280, 360])
def test_the_page_is_complete_without_a_network(browser: Browser, page: Path, width: int, tmp_path: Path) -> None:
    browser.open(page, width)
    # decode() fails where a picture is damaged
    sizes = browser.evaluate("Promise.all([...document.images].map(i => i.decode().then(() => "
                             "[i.naturalWidth, i.naturalHeight, i.getBoundingClientRect().width])))")
    assert len(sizes) == 3 * (4 + 3 + 2)
    assert all(wide > 50 and high > 50 and 100 < shown <= width for wide, high, shown in sizes)
    # nothing is cut off at the side
    assert browser.evaluate("[document.documentElement.scrollWidth, window.innerWidth]") == [width, width]
    assert browser.told(*COMPLAINTS) == []
    asked = [event["request"]["url"] for event in browser.told("Network.requestWillBeSent")]
    assert [url for url in asked if not url.startswith("data:image/jpeg;base64,")] == [page.as_uri()]
    browser.screenshot(tmp_path / f"{width}.png")
    assert (tmp_path / f"{width}.png").stat().st_size > 50_000


def test_names_are_shown_as_they_are_and_warnings_without_scrolling(browser: Browser, page: Path) -> None:
    browser.open(page, 1280)
    assert browser.evaluate("document.querySelector('h1').textContent") == HOSTILE
    assert browser.evaluate("document.title") == HOSTILE
    kinds = browser.evaluate("[...document.querySelectorAll('.findings li')].map(e => "
                             "[e.className, getComputedStyle(e).borderLeftColor, e.getBoundingClientRect().bottom])")
    assert [kind for kind, _, _ in kinds] == ["warning", "warning"] + 3 * ["note"]  # search, folds; scores, motion, confidence
    assert kinds[0][1] != kinds[2][1] and kinds[2][2] < 900


def test_the_test_would_see_a_damaged_picture_a_script_and_a_request(browser: Browser, page: Path, tmp_path: Path) -> None:
    text = page.read_text(encoding="utf-8").replace(";base64,/9j/", ";base64,AAAA", 1)
    text = text.replace("</main>", "<script>1</script><img src='http://example.invalid/a.png'></main>")
    (tmp_path / "bad.html").write_text(text, encoding="utf-8")
    browser.open(tmp_path / "bad.html", 1280)
    assert browser.evaluate("[...document.images].filter(i => i.naturalWidth == 0).length") == 2
    refused = [event["entry"]["text"] for event in browser.told("Log.entryAdded")]
    assert any("script" in text for text in refused) and any("example.invalid" in text for text in refused)
