"""The one browser of a test process: Playwright starts no second one beside it."""

import pytest
from browsers import open_browser


@pytest.fixture(scope="session")
def browser():
    with open_browser() as chromium:
        yield chromium
