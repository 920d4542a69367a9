"""Pages as a browser shows them."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page


@contextmanager
def opened(browser: "Browser", path: Path, width: int = 1200) -> Iterator["Page"]:
    """The page in a browser that must neither fetch nor complain."""
    page = browser.new_page(viewport={"width": width, "height": 900})
    fetched: list[str] = []
    complaints: list[str] = []
    page.on("request", lambda request: fetched.append(request.url))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("console", lambda message: complaints.append(message.text) if message.type == "error" else None)
    page.goto(path.as_uri())
    page.wait_for_function("document.querySelectorAll('.js-plotly-plot .main-svg').length > 0")
    yield page
    assert [url for url in fetched if not url.startswith(("file:", "data:", "blob:"))] == []
    assert complaints == []
    page.close()
