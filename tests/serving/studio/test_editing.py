"""Starting from an image in the studio: files, masks by mouse and by keys."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image
from playwright.sync_api import expect

from tests.serving.studio.server import red_square
from tests.serving.studio.user import as_png, facts, generate, of_store, painted, pixels, shown, stroke


def test_an_edit_sends_the_image_and_what_was_painted_over_it(server, page):
    page.set_input_files("#file", files=[as_png(red_square(32))])
    page.click("#mask-button")
    stroke(page, (0.1, 0.5), (0.4, 0.5))
    over = painted(page)
    assert over[16, 8] and not over[2, 2] and not over[16, 28]
    page.click("#mask-done")
    expect(page.locator("#mask-button")).to_have_text("Change the mask")
    generate(page)
    assert facts(page)["From"] == "an image, under a mask"
    [job] = server.store.jobs("")
    files = server.store.files(job.id)
    mask, image = (Image.open(io.BytesIO(files[job.request["files"][name][0]])) for name in ("mask", "image"))
    np.testing.assert_array_equal(np.asarray(image.convert("RGB")), red_square(32))
    np.testing.assert_array_equal(np.asarray(mask) == 255, over)
    changed = np.abs(pixels(page).astype(int) - red_square(32)).max(axis=2) > 60
    assert changed[over].mean() > changed[~over].mean(), "what was not painted stays closer to what it was"


def test_strokes_are_erased_undone_inverted_and_cleared(page):
    page.set_input_files("#file", files=[as_png(red_square())])
    page.click("#mask-button")
    stroke(page, (0.2, 0.5), (0.8, 0.5))
    line = painted(page)
    page.click("#tool-erase")
    stroke(page, (0.5, 0.2), (0.5, 0.8))
    erased = painted(page)
    assert line[20, 20] and not erased[20, 20] and erased[20, 9]
    page.keyboard.press("Control+z")
    np.testing.assert_array_equal(painted(page), line)
    page.keyboard.press("Control+Shift+z")
    np.testing.assert_array_equal(painted(page), erased)
    page.click("#mask-invert")
    assert (painted(page) == ~erased).mean() > 0.97, "edges are smooth"
    page.click("#mask-clear")
    assert not painted(page).any()
    page.click("#mask-undo")
    assert painted(page).any()
    page.click("#mask-close")
    expect(page.locator("#mask-button")).to_have_text("Paint a mask")


def test_a_mask_is_painted_by_keys_alone(page):
    page.set_input_files("#file", files=[as_png(red_square())])
    page.locator("#mask-button").focus()
    page.keyboard.press("Enter")
    expect(page.locator("#mask-canvas")).to_be_focused()
    page.keyboard.press(" ")
    there = painted(page)
    assert there[20, 20] and not there[20, 38]
    for key in ("]", "Shift+ArrowRight", " "):
        page.keyboard.press(key)
    assert painted(page).sum() > there.sum()
    page.locator("#mask-done").focus()
    page.keyboard.press("Enter")
    expect(page.locator("#mask-button")).to_be_focused()
    expect(page.locator("#mask-button")).to_have_text("Change the mask")


def test_an_image_is_dropped_pasted_and_cropped_to_the_size_that_is_made(server, page):
    wide = np.repeat(red_square(60), 2, axis=1)
    put = """([kind, bytes]) => {
        const transfer = new DataTransfer();
        transfer.items.add(new File([Uint8Array.from(bytes)], "wide.png", { type: "image/png" }));
        const how = { bubbles: true, cancelable: true };
        const event = kind === "paste" ? new ClipboardEvent("paste", { clipboardData: transfer, ...how })
            : new DragEvent(kind, { dataTransfer: transfer, ...how });
        document.body.dispatchEvent(event);
    }"""
    content = list(as_png(wide)["buffer"])
    page.evaluate(put, ["dragenter", content])
    expect(page.locator("#drop-cover")).to_be_visible()
    page.evaluate(put, ["drop", content])
    expect(page.locator("#drop-cover")).to_be_hidden()
    expect(page.locator("#image-hint")).to_contain_text("120 × 60")
    page.click("#image-remove")
    expect(page.locator("#drop")).to_be_visible()
    page.evaluate(put, ["paste", content])
    expect(page.locator("#image-hint")).to_contain_text("120 × 60")
    generate(page)
    made = facts(page)
    assert made["Size"] == "48 × 24" and made["From"] == "an image"
    [job] = server.store.jobs("")
    [sent] = server.store.files(job.id).values()
    assert Image.open(io.BytesIO(sent)).size == (48, 24)


def test_a_generated_image_is_started_from(server, page):
    generate(page, seed="5")
    shown(page)
    page.get_by_role("button", name="Start from it").click()
    expect(page.locator("#input-image")).to_be_visible()
    generate(page, strength="0.5")
    expect(page.locator("#tiles > li")).to_have_count(2)
    assert facts(page)["Strength"] == "0.5"
    job = server.store.jobs("")[0]
    [sent] = server.store.files(job.id).values()
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(sent)).convert("RGB")), of_store(server, 1))
