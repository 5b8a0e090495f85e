"""One browser window for all tests of this folder; what goes wrong in its scripts fails the test."""

from __future__ import annotations

from collections.abc import Iterator

import chromium
import pytest
from server import free_port


@pytest.fixture(scope="session")
def window(tmp_path_factory: pytest.TempPathFactory) -> Iterator[chromium.Page]:
    if reason := chromium.why_not():
        pytest.skip(reason)
    with chromium.Page(tmp_path_factory.mktemp("browser"), free_port()) as page:
        yield page


@pytest.fixture
def page(window: chromium.Page) -> Iterator[chromium.Page]:
    window.size(1200, 1000)
    window.dark(False)
    yield window
    problems = window.problems()
    window.go("about:blank")
    # A server that is gone, or wants a key, is part of some tests.
    expected = ("ERR_CONNECTION", "ERR_EMPTY_RESPONSE", "401 (Unauthorized)")
    assert [one for one in problems if not any(part in one for part in expected)] == []
