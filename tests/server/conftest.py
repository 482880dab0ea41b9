"""Fixtures of the server's tests."""

import pytest

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
