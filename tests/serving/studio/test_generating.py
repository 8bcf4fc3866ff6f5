"""Generating in the studio: images, previews, the queue, cancel, errors."""

from __future__ import annotations

import re

import numpy as np
import pytest
from playwright.sync_api import expect

from tests.serving.studio.user import facts, generate, of_store, pixels, shown


def test_an_image_is_generated_and_shown_with_its_parameters(server, page):
    expect(page.get_by_text("Nothing generated yet")).to_be_visible()
    page.click("#advanced summary")
    page.select_option("#scheduler", "euler")
    generate(page, "a red apple", negative="blue", seed="7", steps="4", guidance="3.5")
    assert facts(page) | {"Made": "", "Took": ""} == {
        "Model": "plain (a1a1a1a1)", "Seed": "7", "Size": "32 × 32", "Quality": "standard", "Steps": "4",
        "Guidance": "3.5", "Scheduler": "euler", "Not": "blue", "Made": "", "Took": ""}
    np.testing.assert_array_equal(pixels(page), of_store(server))
    [job] = server.store.jobs("")
    asked = job.request["fields"]
    assert {**asked, "quality": "", "output": ""} == {
        "prompt": "a red apple", "negative_prompt": "blue", "seed": [7], "steps": 4, "guidance_scale": 3.5,
        "scheduler": "euler", "images_per_prompt": 1, "height": 32, "width": 32, "quality": "", "output": ""}
    expect(page.locator("#tiles > li")).to_have_count(1)


def test_previews_and_steps_are_shown_while_it_is_denoised(server, page):
    server.gate.close()
    generate(page)
    expect(page.locator(".progress-text")).to_have_text(re.compile("^Starting|^Waiting"))
    server.gate.let(10)
    expect(page.locator(".progress-text")).to_have_text("Step 10 of 25")
    preview = page.locator("#stage .preview img")
    expect(preview).to_be_visible()
    assert preview.evaluate("image => [image.naturalWidth, image.naturalHeight]") == [8, 8], "latents are an image here"
    assert page.locator("#stage progress").evaluate("bar => bar.value") == pytest.approx(0.4)
    expect(page).to_have_title(re.compile("Step 10 of 25"))
    server.gate.let()
    shown(page)
    assert server.statuses() == ["completed"]


def test_several_images_are_a_group_and_each_has_its_own_seed(server, page):
    generate(page, count="3", seed="40")
    expect(page.locator(".group button")).to_have_count(3)
    expect(page.locator("#gallery-count")).to_have_text("3")
    page.locator(".group button").nth(2).click()
    assert facts(page)["Seed"] == "42"
    page.keyboard.press("ArrowLeft")
    assert facts(page)["Seed"] == "41"


def test_what_waits_says_how_many_are_before_it_and_esc_cancels_what_is_shown(server, page):
    server.gate.close()
    generate(page, "eight", count="8")
    expect(page.locator("#tiles .active")).to_have_count(1)
    generate(page, "two", count="1")
    expect(page.locator(".progress-text")).to_have_text("Waiting, next in line")
    generate(page, "three")
    expect(page.locator(".progress-text")).to_have_text("Waiting, 1 before it")
    page.keyboard.press("Escape")
    expect(page.locator("#tiles .active")).to_have_count(2)
    page.locator("#tiles .active button").last.click()
    page.get_by_role("button", name="Cancel").click()
    expect(page.locator("#tiles .active")).to_have_count(1)
    server.gate.let()
    expect(page.locator("#gallery-count")).to_have_text("1")
    assert sorted(server.statuses()) == ["cancelled", "cancelled", "completed"]


def test_an_error_is_shown_in_the_servers_words_at_its_field(server, page, user):
    generate(page, "x" * 32_001)
    expect(page.locator("#prompt-problem")).to_contain_text("at most 32000 characters")
    expect(page.locator("#prompt")).to_be_focused()
    assert page.locator("#prompt").get_attribute("aria-invalid") == "true"
    assert server.statuses() == []
    assert [text for text in user.complaints if "status of 400" not in text] == []
    user.complaints.clear()


def test_a_value_out_of_range_is_not_sent(server, page):
    generate(page, count="9")
    expect(page.locator("#count-problem")).to_have_text("A whole number, 1 to 8.")
    page.fill("#count", "1")
    page.get_by_text("Custom").click()
    generate(page, width="33")
    expect(page.locator("#size-problem")).to_have_text("Width: 16 to 64 in steps of 8.")
    assert server.statuses() == []


def test_a_failed_job_says_why_and_is_tried_again(server, page):
    server.refuses.add("a storm")
    generate(page, "a storm")
    expect(page.get_by_role("alert")).to_contain_text("the device refuses")
    server.refuses.clear()
    page.get_by_role("button", name="Try again").click()
    shown(page)
    assert server.statuses() == ["completed", "failed"]
