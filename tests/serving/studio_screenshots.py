"""Screenshots of the studio: `python -m tests.serving.studio_screenshots OUT [NAME=BUNDLE...]`, to be looked at.

With one bundle or more they show those; the comparison needs two. Without any, models of numpy functions are served.
"""

from __future__ import annotations

import re
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from playwright.sync_api import Browser, Page, expect, sync_playwright

from runtimes.serving.engine.catalog import Catalog
from runtimes.serving.engine.engine import Engine
from runtimes.serving.engine.models import Models
from tests.deploy.browser import CHROMIUM
from tests.serving.studio.server import serving, serving_fakes

VIEWS: dict[str, dict[str, Any]] = {
    "desktop": {"viewport": {"width": 1440, "height": 900}, "color_scheme": "light"},
    "dark": {"viewport": {"width": 1440, "height": 900}, "color_scheme": "dark"},
    "phone": {"viewport": {"width": 360, "height": 740}, "color_scheme": "light", "has_touch": True, "is_mobile": True,
              "device_scale_factor": 2},
}
PROMPTS = ("red apple", "pizza", "sailboat", "penguin", "birthday cake", "rainbow")
Shot = Callable[[str], None]


def main(out: Path, bundles: list[str]) -> None:
    """Write every view into a folder."""
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="studio-") as folder, sync_playwright() as playwright:
        if bundles:
            catalog = Catalog(bundles)
            server = serving(Path(folder), catalog, Engine(Models(catalog)))
        else:
            server = serving_fakes(Path(folder))
        with server as running:
            browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
            for name, options in VIEWS.items():
                _view(browser, running.url, name, options, out)
            browser.close()
    print(f"{len(list(out.glob('*.png')))} images in {out}")


def _view(browser: Browser, url: str, name: str, options: dict, out: Path) -> None:
    context = browser.new_context(**options)
    context.set_default_timeout(60_000)
    page = context.new_page()
    page.goto(url)
    page.wait_for_selector("html[data-ready]")

    def shot(state: str) -> None:
        page.evaluate("document.querySelector('.fields').scrollTop = 0")
        page.wait_for_timeout(250)
        page.screenshot(path=out / f"{name}-{state}.png")

    shot("empty")
    _generating(page, shot)
    _gallery(page, shot)
    _mask(page, shot)
    if page.locator("#compare-button").is_enabled():
        _comparison(page, shot)
    context.close()


def _generate(page: Page, prompt: str, **fields: str) -> None:
    page.fill("#prompt", prompt)
    for name, value in fields.items():
        page.fill(f"#{name}", value)
    page.locator("#prompt").press("Control+Enter")


def _generating(page: Page, shot: Shot) -> None:
    page.locator("#advanced").evaluate("details => { details.open = true; }")
    _generate(page, "octopus", steps="150", seed="3")
    expect(page.locator(".progress-text")).to_contain_text(re.compile(r"Step ([89]\d|1\d\d) of"), timeout=60_000)
    shot("generating")
    page.fill("#steps", "")
    page.locator("#advanced").evaluate("details => { details.open = false; }")
    expect(page.locator(".facts")).to_be_visible(timeout=60_000)


def _gallery(page: Page, shot: Shot) -> None:
    for number, prompt in enumerate(PROMPTS, 2):
        _generate(page, prompt, seed="11")
        expect(page.locator("#gallery-count")).to_have_text(str(number), timeout=60_000)
    shot("gallery")
    _generate(page, "castle", count="4", seed="21")
    expect(page.locator(".group")).to_be_visible(timeout=60_000)
    shot("several")
    page.fill("#count", "1")


def _mask(page: Page, shot: Shot) -> None:
    page.locator("#tiles button").nth(4).click()
    page.get_by_role("button", name="Start from it").click()
    page.locator("#mask-button").click()
    box = page.locator("#mask-canvas").bounding_box()
    assert box is not None
    places = [(0.3, 0.35), (0.5, 0.25), (0.7, 0.4), (0.55, 0.55)]
    page.mouse.move(box["x"] + 0.3 * box["width"], box["y"] + 0.35 * box["height"])
    page.mouse.down()
    for x, y in places:
        page.mouse.move(box["x"] + x * box["width"], box["y"] + y * box["height"], steps=8)
    page.mouse.up()
    shot("mask")
    page.locator("#mask-done").click()
    _generate(page, "green heart", seed="5")
    expect(page.locator(".facts")).to_contain_text("under a mask", timeout=60_000)
    shot("edited")
    page.locator("#image-remove").click()


def _comparison(page: Page, shot: Shot) -> None:
    page.locator("#compare-button").click()
    _generate(page, "rocket", seed="4")
    expect(page.locator(".comparison")).to_be_visible(timeout=60_000)
    shot("compare")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
