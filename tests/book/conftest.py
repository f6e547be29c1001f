"""What the tests of the pages share: the one browser of a process, the pages, their server."""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from browsers import VIEWS, WATCH_SHIFTS, open_browser, serve
from built_pages import HTML, once, run

if TYPE_CHECKING:
    from playwright.sync_api import Browser, BrowserContext


@pytest.fixture(scope="session")
def browser() -> "Iterator[Browser]":
    """Playwright starts no second one beside it."""
    with open_browser() as chromium:
        yield chromium


@pytest.fixture(scope="session")
def contexts(browser: "Browser") -> "dict[str, BrowserContext]":
    opened = {view: browser.new_context(**options) for view, options in VIEWS.items()}
    for context in opened.values():
        context.add_init_script(WATCH_SHIFTS)
    return opened


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the pages, brought up to date once, whoever asks first."""

    def bring_up_to_date() -> str:
        for command in ("fetch", "run", "pages"):
            done = run(sys.executable, "-m", "qstar_book", command)
            if done.returncode:
                return f"{command} failed:\n{done.stdout}\n{done.stderr}"
        return ""

    if failed := once(tmp_path_factory, "pages", bring_up_to_date):
        pytest.fail(failed)
    return HTML


@pytest.fixture(scope="session")
def site(built: Path) -> Iterator[str]:
    yield from serve(built)
