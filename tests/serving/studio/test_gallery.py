"""The gallery of the studio: reload, links, deletion, what the server has."""

from __future__ import annotations

import numpy as np
from PIL import Image
from playwright.sync_api import expect

from tests.serving.studio.server import red_square
from tests.serving.studio.user import Watched, as_png, facts, generate, of_store, pixels


def test_a_reload_keeps_the_gallery_the_form_and_what_is_under_way(server, page):
    generate(page, "first", seed="1")
    first = pixels(page)
    server.gate.close()
    generate(page, "second", seed="2")
    expect(page.locator("#tiles .active")).to_have_count(1)
    page.reload()
    expect(page.locator("#tiles > li")).to_have_count(2)
    expect(page.locator("#prompt")).to_have_value("second")
    server.gate.let()
    expect(page.locator("#gallery-count")).to_have_text("2")
    assert facts(page)["Seed"] == "2"
    page.keyboard.press("ArrowRight")
    np.testing.assert_array_equal(pixels(page), first)
    assert server.statuses() == ["completed", "completed"], "what was under way was not sent again"


def test_a_link_makes_the_same_image_in_another_browser(chromium, server, page, user):
    user.context.grant_permissions(["clipboard-read", "clipboard-write"])
    page.get_by_text("Draft").click()
    generate(page, "ein Café & ein #Baum", count="2", negative="100% grey")
    page.locator(".group button").nth(1).click()
    made, said = pixels(page), facts(page)
    page.get_by_role("button", name="Copy link").click()
    expect(page.locator("#toasts")).to_contain_text("Link copied")
    link = page.evaluate("navigator.clipboard.readText()")
    other = Watched(chromium, server)
    there = other.open(link)
    expect(there.locator("#prompt")).to_have_value("ein Café & ein #Baum")
    expect(there.locator("#negative")).to_have_value("100% grey")
    expect(there.locator("#count")).to_have_value("1")
    assert there.url == server.url, "the address is plain again"
    there.click("#generate")
    np.testing.assert_array_equal(pixels(there), made)
    assert facts(there) | {"Made": "", "Took": ""} == said | {"Made": "", "Took": ""}
    assert server.store.jobs("")[0].request["fields"]["steps"] == 3, "draft's"
    other.context.close()
    other.check()


def test_a_link_of_another_build_or_model_says_so(server, user):
    page = user.open(f"{server.url}#prompt=x&model=plain&seed=3&bundle=ffffffffffffffff&steps=x&unknown=1")
    expect(page.locator("#notice")).to_contain_text("another build of plain (ffffffff)")
    expect(page.locator("#steps")).to_have_value("")
    page.goto(f"{server.url}#prompt=y&model=gone")
    expect(page.locator("#notice")).to_contain_text("“gone”, which this server does not have")
    expect(page.locator("#prompt")).to_have_value("y")


def test_images_are_deleted_brought_back_filtered_and_downloaded(server, page):
    for number, prompt in enumerate(("a tree", "a house")):
        generate(page, prompt, seed=str(number))
        expect(page.locator("#gallery-count")).to_have_text(str(number + 1))
    page.fill("#filter", "tree")
    expect(page.locator("#tiles > li")).to_have_count(1)
    page.fill("#filter", "")
    with page.expect_download() as download:
        page.get_by_role("link", name="Download").click()
    assert download.value.suggested_filename == "a-house-1.png"
    np.testing.assert_array_equal(np.asarray(Image.open(download.value.path()).convert("RGB")), of_store(server))
    page.locator("#stage").focus()
    page.keyboard.press("Delete")
    expect(page.locator("#tiles > li")).to_have_count(1)
    page.get_by_role("button", name="Undo").click()
    expect(page.locator("#tiles > li")).to_have_count(2)
    page.get_by_role("button", name="Delete all").click()
    page.locator("#confirm-yes").click()
    expect(page.get_by_text("Nothing generated yet")).to_be_visible()
    page.reload()
    expect(page.locator("#gallery-empty")).to_be_visible()
    page.wait_for_function("async () => !(await (await fetch('v1/jobs')).json()).data.length")


def test_another_browser_loads_what_the_server_has(chromium, server, page):
    page.set_input_files("#file", files=[as_png(red_square())])
    expect(page.locator("#input-image")).to_be_visible()
    generate(page, "an edit", strength="0.5")
    expect(page.locator("#gallery-count")).to_have_text("1")
    page.click("#image-remove")
    generate(page, "a tree", count="2", seed="8")
    expect(page.locator("#gallery-count")).to_have_text("3")
    other = Watched(chromium, server)
    there = other.open()
    there.click("#fetch")
    expect(there.locator("#tiles > li")).to_have_count(3)
    there.locator("#tiles button").last.click()
    assert facts(there)["From"] == "an image"
    there.get_by_role("button", name="Use settings").click()
    expect(there.locator("#image-problem")).to_contain_text("not in this browser")
    there.get_by_role("button", name="a tree").first.click()
    assert facts(there)["Seed"] == "8"
    np.testing.assert_array_equal(pixels(there), of_store(server))
    there.click("#fetch")
    expect(there.locator("#toasts")).to_contain_text("no other images")
    other.context.close()
    other.check()
