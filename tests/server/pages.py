"""What the tests of the page have in common: what a user does, and what is asked of a page."""

import time
from contextlib import contextmanager

from tests.data_sources import real_photos

DONE = "!running && document.querySelector('.run')"
STATES = "[...document.querySelectorAll('.run:first-child figure')].map((tile) => tile.dataset.state)"
NOW = "Number(document.querySelector('#line').getAttribute('aria-valuenow'))"  # patches above the line
PHOTO = next(path for path in real_photos() if path.name == "astronaut.png")


def text(page, selector):
    return page.evaluate(f"document.querySelector({selector!r}).textContent")


def give(page, file=PHOTO):
    page.choose("#file", file)
    page.wait("picture && document.activeElement.id == 'line'")


def make(page, **settings):
    for name, value in settings.items():
        page.type(f"[name={name}]", str(value))
    page.click("#generate")


def downloads(browser, count, suffix=".jpg", seconds=20):
    """The contents of the files that have been downloaded, by name; none is left."""
    limit = time.monotonic() + seconds
    while True:
        files = sorted(browser.downloads.iterdir())
        if len(files) == count and all(file.suffix == suffix and file.stat().st_size for file in files):
            break
        assert time.monotonic() < limit, files
        time.sleep(0.05)
    found = {file.name: file.read_bytes() for file in files}
    for file in files:
        file.unlink()
    return found


SMALL = """[...document.querySelectorAll("button, input:not(.unseen), .button, [role=slider]")]
    .map((element) => [element.outerHTML.slice(0, 60), element.getBoundingClientRect()])
    .filter(([_, {width, height}]) => width && (height < 43.5 || width < 43.5))
    .map(([html]) => html)"""
# WCAG's contrast of what is written with what is behind it
FAINT = """(() => {
    const luminance = (colour) => colour.match(/[\\d.]+/g).slice(0, 3).map((c) => c / 255)
        .map((c) => c <= .04045 ? c / 12.92 : ((c + .055) / 1.055) ** 2.4)
        .reduce((sum, c, i) => sum + c * [.2126, .7152, .0722][i], 0);
    const behind = (element) => {
        for (; element; element = element.parentElement) {
            const colour = getComputedStyle(element).backgroundColor;
            if (colour !== "rgba(0, 0, 0, 0)") return colour;
        }
    };
    const faint = (element) => {
        const [a, b] = [getComputedStyle(element).color, behind(element)].map(luminance);
        return (Math.max(a, b) + .05) / (Math.min(a, b) + .05) < 4.5;
    };
    return [...document.querySelectorAll("h1, h2, p, label, small, button:enabled, .button")]
        .filter((element) => element.textContent.trim() && element.getClientRects().length)
        .filter(faint).map((element) => element.outerHTML.slice(0, 80));
})()"""


@contextmanager
def checked(page, width, dark):
    yield
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.evaluate(SMALL) == [] and page.evaluate(FAINT) == []
    background = page.evaluate("getComputedStyle(document.body).backgroundColor.match(/\\d+/g).map(Number)")
    assert (sum(background) < 100) == dark
