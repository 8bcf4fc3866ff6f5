"""The studio before a server that wants a key, or that is away."""

from __future__ import annotations

from playwright.sync_api import expect

from tests.serving.studio.server import serving_fakes
from tests.serving.studio.user import Watched, generate, shown


def test_a_key_is_asked_for_only_where_the_server_wants_one(chromium, tmp_path):
    key = "k" * 24
    with serving_fakes(tmp_path, {"ann": key}) as server:
        user = Watched(chromium, server)
        page = user.context.new_page()
        page.goto(server.url)
        page.fill("#key", "w" * 24)
        page.get_by_role("button", name="Use key").click()
        expect(page.locator("#key-reason")).to_contain_text("does not know")
        page.fill("#key", key)
        page.get_by_role("button", name="Use key").click()
        generate(page)
        shown(page)
        assert page.evaluate("sessionStorage['studio.key']") == key
        assert page.evaluate("JSON.stringify(localStorage).includes('kkkk')") is False
        page.reload()
        page.wait_for_selector("html[data-ready]")
        expect(page.locator("#key-dialog")).to_be_hidden()
        user.context.close()
        assert [text for text in user.complaints if "status of 401" not in text] == []
        assert len(user.complaints) == 2


def test_without_a_key_no_key_is_mentioned(page):
    expect(page.locator("#key-button")).to_be_hidden()
    expect(page.locator("#key-dialog")).to_be_hidden()


def test_a_server_that_is_away_is_said_and_tried_again(server, page, user):
    user.context.set_offline(True)
    generate(page)
    expect(page.locator("#notice")).to_contain_text("The server does not answer.")
    user.context.set_offline(False)
    page.locator("#notice-retry").click()
    shown(page)
    expect(page.locator("#notice")).to_be_hidden()
    assert [text for text in user.complaints if "ERR_INTERNET_DISCONNECTED" not in text] == []
    user.complaints.clear()
