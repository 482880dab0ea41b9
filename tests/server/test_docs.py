"""The page of the routes, /docs, in a real browser: nothing of it comes from outside."""

import pytest

from tests.server.browser import BINARY

FILES = {"swagger-ui-bundle.js": "text/javascript", "swagger-ui.css": "text/css"}


@pytest.mark.skipif(BINARY is None, reason="no chromium: apt-get install chromium")
def test_routes_are_shown_and_tried_with_nothing_from_outside(server, browser):
    page = browser.open(f"{server.url}/docs")
    page.wait("document.querySelectorAll('.opblock').length >= 10")
    shown = page.evaluate(
        "[...document.querySelectorAll('.opblock-summary-path')].map((path) => path.dataset.path)"
    )
    assert set(shown) == set(server.client.get("/openapi.json").json()["paths"])
    for selector in ('[data-path="/health"]', ".try-out__btn", ".execute"):
        page.wait(f"document.querySelector({selector!r})")
        page.click(selector)
    page.wait("document.querySelector('.live-responses-table')?.textContent.includes('\"ok\"')")
    assert page.requested() and all(url.startswith(f"{server.url}/") for url in page.requested())
    assert page.complaints() == []
    page.evaluate("fetch('http://127.0.0.1:1/').catch(() => null)")
    assert any("Content Security Policy" in complaint for complaint in page.complaints())
    page.close()


def test_its_files_are_served_and_no_others(server):
    for name, kind in FILES.items():
        reply = server.client.get(f"/docs/{name}")
        assert reply.status_code == 200 and reply.headers["content-type"].startswith(kind)
    for name in ("redoc.standalone.js", "nothing.js", "..%2Fcore.py", "../core.py", "%2e%2e", ""):
        assert server.client.get(f"/docs/{name}").status_code == 404
