"""The studio page in Chromium, served by the whole server over networks of numpy functions."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import pytest
from axe_playwright_python.sync_playwright import Axe
from PIL import Image
from playwright.sync_api import Browser, BrowserContext, Locator, Page, expect, sync_playwright

from tests.deploy.browser import CHROMIUM
from tests.serving.studio_server import StudioServer, red_square, serving

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed here")
STUDIO = Path(__file__).resolve().parents[2] / "runtimes" / "serving" / "studio"
PHONE = {"width": 360, "height": 740}


@pytest.fixture(scope="module")
def chromium() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        yield browser
        browser.close()


@pytest.fixture
def server(tmp_path: Path) -> Iterator[StudioServer]:
    with serving(tmp_path) as running:
        yield running


class Watched:
    """A browser of one user; what its pages complain of and whom they ask."""

    def __init__(self, chromium: Browser, server: StudioServer, **options) -> None:
        self.context: BrowserContext = chromium.new_context(**({"viewport": {"width": 1300, "height": 860}} | options))
        self.context.set_default_timeout(15_000)
        self.server, self.complaints, self.hosts = server, [], set()
        self.context.on("console", self._heard)
        self.context.on("weberror", lambda error: self.complaints.append(str(error.error)))
        self.context.on("request", lambda request: self.hosts.add(urlsplit(request.url).netloc))

    def _heard(self, message) -> None:
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


@pytest.fixture
def user(chromium: Browser, server: StudioServer) -> Iterator[Watched]:
    watched = Watched(chromium, server)
    yield watched
    watched.context.close()
    watched.check()


@pytest.fixture
def page(user: Watched) -> Page:
    return user.open()


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


def as_png(colours: np.ndarray) -> dict:
    """(H, W, 3) uint8 as a file for an input."""
    stream = io.BytesIO()
    Image.fromarray(colours).save(stream, "PNG")
    return {"name": "image.png", "mimeType": "image/png", "buffer": stream.getvalue()}


def fits(page: Page) -> bool:
    """Whether nothing leaves the screen sideways."""
    return page.evaluate("document.documentElement.scrollWidth <= innerWidth")


# ---- generating --------------------------------------------------------------------------------------------------


def test_an_image_is_generated_and_shown_with_its_parameters(server, page):
    expect(page.get_by_text("Nothing generated yet")).to_be_visible()
    page.click("#advanced summary")
    page.select_option("#scheduler", "euler")
    generate(page, "a red apple", negative="blue", seed="7", steps="4", guidance="3.5")
    assert facts(page) | {"Made": "", "Took": ""} == {
        "Model": "plain (a1a1a1a1)", "Seed": "7", "Size": "32 × 32", "Quality": "standard", "Steps": "4", "Guidance": "3.5",
        "Scheduler": "euler", "Not": "blue", "Made": "", "Took": ""}
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


# ---- starting from an image --------------------------------------------------------------------------------------


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
        const event = kind === "paste" ? new ClipboardEvent("paste", { clipboardData: transfer, bubbles: true, cancelable: true })
            : new DragEvent(kind, { dataTransfer: transfer, bubbles: true, cancelable: true });
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


# ---- gallery -----------------------------------------------------------------------------------------------------


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
    generate(page, "a tree", count="2", seed="8")
    expect(page.locator("#gallery-count")).to_have_text("2")
    other = Watched(chromium, server)
    there = other.open()
    there.click("#fetch")
    expect(there.locator("#tiles > li")).to_have_count(2)
    there.locator("#tiles button").first.click()
    assert facts(there)["Seed"] == "8"
    np.testing.assert_array_equal(pixels(there), of_store(server))
    there.click("#fetch")
    expect(there.locator("#toasts")).to_contain_text("no other images")
    other.context.close()
    other.check()


# ---- comparing, looks, keys --------------------------------------------------------------------------------------


def test_two_models_are_compared_under_a_slider(server, page):
    page.click("#compare-button")
    expect(page.locator("#compare")).to_have_value("inverted")
    generate(page)
    slider = page.locator(".comparison input")
    expect(slider).to_be_visible()
    expect(page.locator(".comparison .side").first).to_have_text("plain")
    jobs = server.store.jobs("")
    assert {job.model for job in jobs} == {"plain", "inverted"}
    assert jobs[0].request["fields"] == jobs[1].request["fields"], "the seed too"
    slider.focus()
    at = "document.querySelector('.comparison').style.getPropertyValue('--at')"
    assert page.evaluate(at) == "50%"
    page.keyboard.press("ArrowRight")
    assert page.evaluate(at) == "50.5%"
    box = page.locator(".comparison").bounding_box()
    assert box is not None
    page.mouse.move(box["x"] + box["width"] * 0.5, box["y"] + 20)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] * 0.25, box["y"] + 20, steps=3)
    page.mouse.up()
    assert float(page.evaluate(at).rstrip("%")) == pytest.approx(25, abs=1)
    page.reload()
    expect(page.locator(".comparison")).to_be_visible()
    expect(page.locator("#compare")).to_have_value("inverted")
    expect(page.locator(".actions a")).to_have_text(["Download plain", "Download inverted"])


def test_everything_is_reached_by_tab_with_a_visible_focus(server, page):
    generate(page)
    shown(page)
    page.set_input_files("#file", files=[as_png(red_square())])
    page.click("#advanced summary")
    wanted = page.evaluate("""() => {
        const found = [...document.querySelectorAll("a[href], button, input, select, textarea, summary")];
        const groups = new Set();
        return found.filter(e => !e.disabled && e.checkVisibility() && !e.closest("dialog, template")).filter(e => {
            if (e.type !== "radio") return true;
            return !groups.has(e.name) && groups.add(e.name);
        }).map((e, number) => { (e.type === "radio" ? document.querySelectorAll(`[name="${e.name}"]`) : [e]).forEach(
            one => { one.dataset.wanted = number; }); return number; });
    }""")
    page.evaluate("document.activeElement.blur(); window.getSelection().removeAllRanges()")
    reached, unseen = set(), []
    for _ in range(2 * len(wanted)):
        page.keyboard.press("Tab")
        number, name, seen = page.evaluate("""() => {
            const e = document.activeElement;
            const outlined = one => getComputedStyle(one).outlineStyle !== "none" && parseFloat(getComputedStyle(one).outlineWidth) > 1;
            const thumb = e.type === "range";  // its thumb has the outline, which no style of the element says
            return [e.dataset.wanted ?? null, e.id || e.className || e.tagName, thumb || outlined(e) || outlined(e.parentElement)];
        }""")
        if number is not None:
            reached.add(int(number))
            if not seen:
                unseen.append(name)
    assert set(wanted) - reached == set()
    assert unseen == []


def test_keys_generate_go_to_the_prompt_and_show_help(server, page):
    page.keyboard.press("/")
    expect(page.locator("#prompt")).to_be_focused()
    page.keyboard.type("a/b")
    page.keyboard.press("Control+Enter")
    shown(page)
    assert server.store.jobs("")[0].request["fields"]["prompt"] == "a/b"
    page.click("#keys-button")
    expect(page.locator("#keys-dialog")).to_be_visible()
    page.keyboard.press("Escape")
    expect(page.locator("#keys-dialog")).to_be_hidden()


def test_on_a_phone_nothing_leaves_the_screen_and_fingers_paint(chromium, server):
    phone = Watched(chromium, server, viewport=PHONE, has_touch=True, is_mobile=True, device_scale_factor=2)
    page = phone.open()
    assert fits(page)
    page.click("#compare-button")
    page.click("#advanced summary")
    generate(page, "a word of " + "more" * 80)
    expect(page.locator(".comparison")).to_be_visible()
    assert fits(page)
    generate(page, count="4")
    expect(page.locator(".group button")).to_have_count(4)
    assert fits(page)
    page.set_input_files("#file", files=[as_png(red_square())])
    page.tap("#mask-button")
    box = page.locator("#mask-canvas").bounding_box()
    assert box is not None and box["x"] >= 0 and box["x"] + box["width"] <= PHONE["width"]
    fingers = phone.context.new_cdp_session(page)
    x, y = box["x"] + box["width"] / 4, box["y"] + box["height"] / 2
    for kind, places in (("touchStart", [(x, y)]), ("touchMove", [(2 * x, y)]), ("touchEnd", [])):
        fingers.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": [{"x": a, "y": b} for a, b in places]})
    over = painted(page)
    assert over[20, 10] and not over[2, 2]
    assert fits(page)
    done = page.locator("#mask-done").bounding_box()
    assert done is not None and done["y"] + done["height"] <= PHONE["height"]
    phone.context.close()
    phone.check()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing_serious(chromium, server, scheme):
    reader = Watched(chromium, server, color_scheme=scheme, reduced_motion="reduce")
    page = reader.open()

    def serious() -> list[str]:
        found = Axe().run(page).response["violations"]
        return [f"{v['id']}: {node['target']} {node['failureSummary']}" for v in found
                if v["impact"] in ("serious", "critical") for node in v["nodes"]]

    assert serious() == []
    page.click("#advanced summary")
    page.click("#compare-button")
    server.gate.close()
    generate(page, count="9")
    generate(page, count="2")
    expect(page.locator(".preview").first).to_be_visible()
    assert serious() == []
    server.gate.let()
    expect(page.locator(".group")).to_be_visible()
    assert serious() == []
    page.locator(".group button").first.click()
    page.set_input_files("#file", files=[as_png(red_square())])
    expect(page.locator(".comparison")).to_be_visible()
    assert serious() == []
    page.click("#mask-button")
    assert serious() == []
    page.click("#mask-close")
    page.click("#keys-button")
    assert serious() == []
    reader.context.close()
    reader.check()


def test_colours_follow_the_system_until_they_are_chosen(chromium, server):
    reader = Watched(chromium, server, color_scheme="dark")
    page = reader.open()
    background = "getComputedStyle(document.body).backgroundColor"
    dark = page.evaluate(background)
    page.emulate_media(color_scheme="light")
    light = page.evaluate(background)
    assert dark == "rgb(16, 17, 19)" and light == "rgb(244, 244, 243)"
    page.click("#theme-button")
    page.click("#theme-button")
    assert page.evaluate(background) == dark
    page.reload()
    assert page.evaluate(background) == dark
    expect(page.get_by_role("button", name="Colours: dark")).to_be_visible()
    reader.context.close()
    reader.check()


# ---- keys, and a server that is away -----------------------------------------------------------------------------


def test_a_key_is_asked_for_only_where_the_server_wants_one(chromium, tmp_path):
    key = "k" * 24
    with serving(tmp_path, {"ann": key}) as server:
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
        assert page.evaluate("[JSON.stringify(localStorage).includes('kkkk'), sessionStorage['studio.key']]") == [False, key]
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


# ---- files -------------------------------------------------------------------------------------------------------


def test_the_page_has_no_inline_code_or_style_and_every_file_is_there_and_used():
    html = (STUDIO / "index.html").read_text(encoding="utf-8")
    assert re.findall(r"<style|<script(?![^>]*\bsrc=)|\sstyle=|\son\w+=|https?://|javascript:", html) == []
    texts = {file.name: file.read_text(encoding="utf-8") for file in STUDIO.iterdir()}
    named = set(re.findall(r'(?:href|src)="studio/([^"]+)"', html)) | {"index.html"}
    for name, text in texts.items():
        named |= {found for found in re.findall(r'from "\./([^"]+)"', text) if name.endswith(".js")}
    assert named == set(texts)
    icons = set(re.findall(r'<symbol id="i-([^"]+)"', html))
    used = set(re.findall(r'href="#i-([^"]+)"', html)) | set(re.findall(r'icon\("([^"]+)"\)', "".join(texts.values())))
    assert icons == used | {"light", "dark"}
    assert [name for name, text in texts.items() if re.search(r"innerHTML|outerHTML|insertAdjacentHTML|\beval\(", text)] == []


def test_the_policy_of_the_page_allows_no_inline_code_and_no_other_host(server, page):
    answer = page.request.get(server.url)
    policy = dict(part.strip().split(" ", 1) for part in answer.headers["content-security-policy"].split(";"))
    assert policy["default-src"] == "'none'" and policy["script-src"] == policy["style-src"] == "'self'"
    assert json.dumps(policy).count("http") == 0 and "unsafe" not in json.dumps(policy)
