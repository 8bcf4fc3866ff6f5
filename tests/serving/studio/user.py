"""A user of the studio: a browser that listens to what its pages complain of, and what a user does and sees there."""

from __future__ import annotations

import io
from urllib.parse import urlsplit

import numpy as np
from PIL import Image
from playwright.sync_api import (
    Browser,
    BrowserContext,
    ConsoleMessage,
    FilePayload,
    Locator,
    Page,
    Request,
    WebError,
    expect,
)

from tests.serving.studio.server import StudioServer

PATIENCE = 60_000  # milliseconds: for a machine that has much else to do


class Watched:
    """A browser of one user; what its pages complain of and whom they ask."""

    def __init__(self, chromium: Browser, server: StudioServer, **options) -> None:
        self.context: BrowserContext = chromium.new_context(**({"viewport": {"width": 1300, "height": 860}} | options))
        self.context.set_default_timeout(PATIENCE)
        self.server = server
        self.complaints: list[str] = []
        self.hosts: set[str] = set()
        self.context.on("console", self._heard)
        self.context.on("weberror", self._failed)
        self.context.on("request", self._asked)

    def _failed(self, error: WebError) -> None:
        self.complaints.append(str(error.error))

    def _asked(self, request: Request) -> None:
        self.hosts.add(urlsplit(request.url).netloc)

    def _heard(self, message: ConsoleMessage) -> None:
        if message.type in ("warning", "error"):
            self.complaints.append(message.text)

    def open(self, address: str = "") -> Page:
        page = self.context.new_page()
        page.goto(address or self.server.url)
        page.wait_for_selector("html[data-ready]")
        return page

    def check(self) -> None:
        assert self.complaints == []
        assert self.hosts - {""} == {urlsplit(self.server.url).netloc}, "blob: addresses apart, nothing else is asked"


def generate(page: Page, prompt: str = "a red apple", **fields: str) -> None:
    page.fill("#prompt", prompt)
    for name, value in fields.items():
        page.fill(f"#{name}", value)
    page.click("#generate")


def shown(page: Page) -> Locator:
    """The image on the stage, once it is there."""
    image = page.locator("#stage .frame img").first
    expect(image).to_be_visible()
    return image


def facts(page: Page) -> dict[str, str]:
    """What the stage says of its image."""
    shown(page)
    terms, values = page.locator(".facts dt").all_inner_texts(), page.locator(".facts dd").all_inner_texts()
    return dict(zip(terms, values, strict=True))


def pixels(page: Page) -> np.ndarray:
    """(H, W, 3) uint8 of the image on the stage."""
    found = page.evaluate("""async image => {
        await image.decode();
        const sheet = new OffscreenCanvas(image.naturalWidth, image.naturalHeight);
        const pen = sheet.getContext("2d");
        pen.drawImage(image, 0, 0);
        return [sheet.height, sheet.width, Array.from(pen.getImageData(0, 0, sheet.width, sheet.height).data)];
    }""", shown(page).element_handle())
    height, width, data = found
    return np.array(data, np.uint8).reshape(height, width, 4)[:, :, :3]


def of_store(server: StudioServer, place: int = 0) -> np.ndarray:
    """(H, W, 3) uint8 of the first image of a job, the newest job first."""
    found = server.store.image(server.store.jobs("")[place].images[0].sha256)
    assert found is not None
    return np.asarray(Image.open(io.BytesIO(found[0])).convert("RGB"))


def as_png(colours: np.ndarray) -> FilePayload:
    """(H, W, 3) uint8 as a file for an input."""
    stream = io.BytesIO()
    Image.fromarray(colours).save(stream, "PNG")
    return {"name": "image.png", "mimeType": "image/png", "buffer": stream.getvalue()}


def fits(page: Page) -> bool:
    """Whether nothing leaves the screen sideways."""
    return page.evaluate("document.documentElement.scrollWidth <= innerWidth")


def painted(page: Page) -> np.ndarray:
    """(H, W) bool: where the mask under the brush is painted."""
    data = page.evaluate("""() => { const sheet = document.getElementById("mask-canvas");
        const { data } = sheet.getContext("2d").getImageData(0, 0, sheet.width, sheet.height);
        return { side: sheet.width, alpha: Array.from(data).filter((_, at) => at % 4 === 3) }; }""")
    return np.array(data["alpha"]).reshape(-1, data["side"]) >= 128


def stroke(page: Page, *points: tuple[float, float]) -> None:
    """With the mouse over the mask, in shares of its width and height."""
    box = page.locator("#mask-canvas").bounding_box()
    assert box is not None
    places = [(box["x"] + x * box["width"], box["y"] + y * box["height"]) for x, y in points]
    page.mouse.move(*places[0])
    page.mouse.down()
    for place in places:
        page.mouse.move(*place, steps=4)
    page.mouse.up()
