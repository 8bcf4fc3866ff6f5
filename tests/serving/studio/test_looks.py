"""The studio for every reader: comparison, keyboard, phone, dark, axe-core."""

from __future__ import annotations

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import expect

from tests.serving.studio.server import red_square
from tests.serving.studio.user import Watched, as_png, fits, generate, painted, shown

PHONE = {"width": 360, "height": 740}

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
            const outlined = one => {
                const style = getComputedStyle(one);
                return style.outlineStyle !== "none" && parseFloat(style.outlineWidth) > 1;
            };
            const thumb = e.type === "range";  // its thumb has the outline, which no style of the element says
            const seen = thumb || outlined(e) || outlined(e.parentElement);
            return [e.dataset.wanted ?? null, e.id || e.className || e.tagName, seen];
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

    def serious(part: str | None = None) -> list[str]:
        rules = {"runOnly": ["color-contrast"]} if scheme == "dark" else {}  # the rest is the same in both
        found = Axe().run(page, part, {"resultTypes": ["violations"], **rules}).response["violations"]
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
    assert serious("#stage") == []
    page.locator(".group button").first.click()
    page.set_input_files("#file", files=[as_png(red_square())])
    expect(page.locator(".comparison")).to_be_visible()
    assert serious() == []
    page.click("#mask-button")
    assert serious("#mask-dialog") == []
    page.click("#mask-close")
    page.click("#keys-button")
    assert serious("#keys-dialog") == []
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
