"""Takes the pictures of docs/serving.md in Chromium: python docs/drawings/page.py [path of Chromium]

page.png        the page in a wide window, light
page_phone.png  the page at the width of a phone, dark
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

from playwright.sync_api import Browser, Page, expect, sync_playwright

DOCS = Path(__file__).parent.parent
sys.path.insert(0, str(DOCS.parent))

from tests.support.servers import running_server  # noqa: E402

PROMPTS = ("a large red circle slides right", "a large green circle bounces")


def main() -> None:
    chromium = sys.argv[1] if len(sys.argv) > 1 else shutil.which("chromium")
    with (
        tempfile.TemporaryDirectory() as folder,
        running_server(Path(folder), "--window", "7") as server,
        sync_playwright() as playwright,
    ):
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        for name, width, height, scheme in (("page", 1100, 800, "light"), ("page_phone", 390, 1580, "dark")):
            take(browser, server.url, DOCS / f"{name}.png", width, height, scheme)
        browser.close()


def take(browser: Browser, url: str, target: Path, width: int, height: int, scheme: Any) -> None:
    context = browser.new_context(viewport={"width": width, "height": height}, color_scheme=scheme, bypass_csp=True)
    page = context.new_page()
    page.goto(url)
    for number, prompt in enumerate(PROMPTS):
        page.fill("#prompt", prompt)
        page.click("#send")
        wait_for_chunk(page, 6 * (number + 1))
    page.keyboard.press("Escape")
    page.screenshot(path=target)
    page.click("#close")
    context.close()


def wait_for_chunk(page: Page, chunk: int) -> None:
    expect(page.locator("#send")).to_have_text("Change prompt", timeout=60_000)
    page.wait_for_function(f"document.getElementById('timeline').max >= {chunk}", timeout=60_000)


if __name__ == "__main__":
    main()
