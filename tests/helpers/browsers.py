"""A real browser for the tests of pages and scripts; without one a skip that says how to get it."""

import contextlib
import os
import shutil
from collections.abc import Iterator
from typing import Any

import pytest

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
QUIET = (
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-gpu",
    "--disable-sync",
    "--no-first-run",
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",  # no request can leave
)


def installed_browser() -> str | None:
    return next(filter(None, map(shutil.which, BROWSERS)), None)


def require_browser(path: str | None) -> str:
    """The browser's path; without one a skip that says how to get one, or a failure in CI."""
    if path is None:
        message = (
            f"no browser found (looked for {', '.join(BROWSERS)}), so nobody looked at the pages: "
            "install one, on Debian `apt-get install chromium`"
        )
        if os.environ.get("CI", "").lower() in ("true", "1"):
            pytest.fail(message)
        pytest.skip(message)
    return path


@contextlib.contextmanager
def open_browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    path = require_browser(installed_browser())
    sandbox = [] if os.geteuid() else ["--no-sandbox"]  # root has none
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=path, args=[*QUIET, *sandbox])
        yield chromium
        chromium.close()
