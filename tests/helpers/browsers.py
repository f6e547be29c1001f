"""A real browser for the tests of pages and scripts; without one a skip that says how to get it."""

import contextlib
import functools
import http.server
import os
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
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

# Without motion: a colour that is still fading in is neither the old one nor the new one.
VIEWS: dict[str, dict[str, Any]] = {
    view: {"viewport": viewport, "color_scheme": scheme, "reduced_motion": "reduce"}
    for view, viewport, scheme in (
        ("light", {"width": 1280, "height": 900}, "light"),
        ("dark", {"width": 1280, "height": 900}, "dark"),
        ("phone", {"width": 375, "height": 800}, "light"),
        ("narrow", {"width": 320, "height": 640}, "light"),
    )
}

WATCH_SHIFTS = """window.shift = 0; new PerformanceObserver((list) => {
  for (const entry of list.getEntries()) if (!entry.hadRecentInput) window.shift += entry.value;
}).observe({ type: "layout-shift", buffered: true });"""


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


class _QuietHandler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass


def serve(folder: Path) -> Iterator[str]:
    """The address of a folder's files, while it is iterated over."""
    handler = functools.partial(_QuietHandler, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()
