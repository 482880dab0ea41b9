"""Fixtures of the server's tests."""

import pytest

from tests.server.browser import Browser
from tests.server.scripted import ScriptedLoop
from tests.server.serving import serving


@pytest.fixture(scope="module")
def server():
    """A server before the scripted engine, shared by the tests of a file."""
    with serving(ScriptedLoop()) as running:
        yield running


@pytest.fixture(scope="module")
def slow_server():
    """One whose engine takes 10 ms a token."""
    with serving(ScriptedLoop(token_seconds=0.01)) as running:
        yield running


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with Browser(tmp_path_factory.mktemp("browser")) as running:
        yield running


@pytest.fixture
def visit(browser):
    """Opens the page of a server, with the model's name on it; closes it after the test."""
    pages = []

    def opened(server, ready=True, **look):
        page = browser.open(f"{server.url}/", **look)
        pages.append(page)
        if ready:
            page.wait("document.querySelector('#state').textContent == 'ready'")
        return page

    yield opened
    for page in pages:
        if page.session in browser.pages:
            page.close()
