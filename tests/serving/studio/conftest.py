"""A server with the studio page, and Chromium with a user who has it open."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, expect, sync_playwright

from tests.deploy.browser import CHROMIUM
from tests.serving.studio.server import StudioServer, serving_fakes
from tests.serving.studio.user import PATIENCE, Watched


@pytest.fixture(scope="session")
def chromium() -> Iterator[Browser]:
    if CHROMIUM is None:
        pytest.skip("Chromium is not installed here")
    expect.set_options(timeout=PATIENCE)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        yield browser
        browser.close()


@pytest.fixture
def server(tmp_path: Path) -> Iterator[StudioServer]:
    with serving_fakes(tmp_path) as running:
        yield running


@pytest.fixture
def user(chromium: Browser, server: StudioServer) -> Iterator[Watched]:
    """At the end nothing was complained of, and no other host was asked."""
    watched = Watched(chromium, server)
    yield watched
    watched.context.close()
    watched.check()


@pytest.fixture
def page(user: Watched) -> Page:
    return user.open()
