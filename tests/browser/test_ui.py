"""The page at /ui in a real browser."""

from __future__ import annotations

import base64
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import pytest
from PIL import Image
from playwright.sync_api import Page, expect

from stable_diffusion.core.schedulers import SCHEDULERS
from stable_diffusion.demo.shapes import judge, nearest_colour
from tests.browser.chromium import CHROMIUM
from tests.browser.visit import Visit, decoded
from tests.http.asking import as_file
from tests.http.following import cancelled
from tests.http.servers import ROOT, Server

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")

PROMPT = "a red circle on a blue background"
PHONE = {"viewport": {"width": 320, "height": 640}, "has_touch": True, "is_mobile": True}


def test_txt2img_works_with_the_keyboard_alone_and_shows_previews_and_progress(visit: Visit) -> None:
    keyboard = visit.page.keyboard

    def tab_to(name: str) -> None:
        for _ in range(30):
            if visit.page.evaluate("document.activeElement.id") == name:
                return
            keyboard.press("Tab")
        raise AssertionError(f"no way to {name}")

    visit.page.evaluate("window.seen = []")
    visit.page.evaluate(
        """new MutationObserver(() => {
             const [image, bar] = document.querySelectorAll("#cards img, #cards progress");
             if (bar) window.seen.push([bar.value, bar.max, image.src]);
           }).observe(document.getElementById("cards"), { subtree: true, childList: true, attributes: true })"""
    )
    tab_to("prompt")
    keyboard.type(PROMPT)
    tab_to("num_inference_steps")
    keyboard.press("Control+a")
    keyboard.type("40")
    tab_to("seed")
    keyboard.type("1")
    tab_to("draw")
    keyboard.press("Enter")
    expect(visit.control("cancel")).to_be_focused()
    (picture,) = visit.pictures()
    verdict = judge(picture)
    assert (verdict.colour, verdict.background, verdict.shape) == ("red", "blue", "circle")
    expect(visit.draw).to_be_focused()
    expect(visit.page.get_by_role("img", name=PROMPT)).to_be_visible()
    expect(visit.page.get_by_role("status")).to_have_text("The image is ready.")
    seen = visit.page.evaluate("window.seen")
    assert {maximum for _, maximum, _ in seen} >= {41}, "PNDM takes one step more"
    assert len({source for _, _, source in seen if source}) > 3, "previews"
    expect(visit.page.get_by_role("link", name="Download")).to_have_attribute("download", "a-red-circle-on-a-blue-background-1.png")


def test_img2img_works_with_a_dropped_image(visit: Visit, input_picture: Image.Image) -> None:
    content = base64.b64encode(as_file(input_picture)).decode()
    visit.page.locator("main").evaluate(
        """(main, content) => {
             const bytes = Uint8Array.from(atob(content), (one) => one.charCodeAt(0));
             const dataTransfer = new DataTransfer();
             dataTransfer.items.add(new File([bytes], "input.png", { type: "image/png" }));
             main.dispatchEvent(new DragEvent("drop", { bubbles: true, cancelable: true, dataTransfer }));
           }""",
        content,
    )
    expect(visit.page.get_by_role("img", name="The image to start from")).to_be_visible()
    visit.fill(prompt="a yellow square on a green background", num_inference_steps=10, seed=1, strength=0.3)
    visit.draw.click()
    (picture,) = visit.pictures()
    verdict = judge(picture)
    assert (verdict.colour, verdict.background) == ("yellow", "green")
    visit.page.get_by_role("button", name="Use as input").click()
    expect(visit.control("img")).to_be_focused()
    assert decoded(visit.control("input-picture")).tobytes() == picture.tobytes()


def test_a_file_in_an_unsupported_format_is_converted_before_sending(visit: Visit) -> None:
    wide = Image.new("RGB", (5000, 2500), "white")
    visit.control("img").set_input_files({"name": "a.gif", "mimeType": "image/gif", "buffer": as_file(wide, "GIF")})
    expect(visit.page.get_by_role("img", name="The image to start from")).to_be_visible()
    visit.fill(prompt=PROMPT, num_inference_steps=2)
    visit.draw.click()
    (picture,) = visit.pictures()
    assert picture.width > picture.height


def test_a_file_that_is_not_an_image_is_reported_at_its_field(visit: Visit) -> None:
    visit.control("img").set_input_files({"name": "a.png", "mimeType": "image/png", "buffer": b"no picture"})
    expect(visit.control("img-problem")).to_contain_text("not an image that this browser can show")
    expect(visit.control("input")).to_be_hidden()


def test_inpainting_changes_only_the_painted_area(visit: Visit, input_picture: Image.Image) -> None:
    visit.control("img").set_input_files({"name": "a.png", "mimeType": "image/png", "buffer": as_file(input_picture)})
    visit.page.get_by_role("radio", name="Repaint a part").check()
    visit.fill(prompt="a red circle on a blue background", num_inference_steps=10, seed=1, strength=1)
    visit.draw.click()
    expect(visit.control("mask-problem")).to_be_visible()  # the mask is still empty
    expect(visit.control("mask-all")).to_be_focused()

    visit.fill(**{"brush-size": 30})
    visit.control("mask").scroll_into_view_if_needed()
    box = visit.control("mask").bounding_box()
    assert box is not None
    mouse = visit.page.mouse
    for share in (0.7, 0.85):
        mouse.move(box["x"] + share * box["width"], box["y"] + 1)
        mouse.down()
        mouse.move(box["x"] + share * box["width"], box["y"] + box["height"] - 1, steps=5)
        mouse.up()
    expect(visit.control("mask")).to_have_attribute("aria-label", re.compile(r"Mask: 4\d % of the image is painted"))
    visit.draw.click()
    (picture,) = visit.pictures()
    before, after = np.asarray(input_picture), np.asarray(picture)
    assert (before[:, :32] == after[:, :32]).all(), "the left half was not painted"
    assert nearest_colour(after[:, 44:]) == "blue"


def test_a_mask_can_be_set_without_a_pointer(visit: Visit, input_picture: Image.Image) -> None:
    visit.control("img").set_input_files({"name": "a.png", "mimeType": "image/png", "buffer": as_file(input_picture)})
    visit.page.get_by_role("radio", name="Repaint all").focus()
    visit.page.keyboard.press("ArrowRight")
    visit.page.get_by_text("Rectangle by numbers").press("Enter")
    visit.fill(left=50, top=0, right=100, bottom=100)
    visit.page.get_by_role("button", name="Paint the rectangle").press("Enter")
    expect(visit.page.get_by_role("img", name="Mask: 50 % of the image is painted")).to_be_visible()
    visit.page.get_by_role("button", name="Clear the mask").press("Enter")
    expect(visit.page.get_by_role("img", name="Mask: 0 % of the image is painted")).to_be_visible()
    visit.page.get_by_role("button", name="Paint everything").press("Enter")
    expect(visit.page.get_by_role("img", name="Mask: 100 % of the image is painted")).to_be_visible()


def without_refusals(visit: Visit) -> None:
    """Chromium logs every response with status 400 or higher to its console."""
    visit.complaints[:] = [text for text in visit.complaints if "400 (Bad Request)" not in text]


def test_a_refusal_by_the_server_is_shown_at_the_field(visit: Visit) -> None:
    visit.fill(width=100, count=2)
    visit.draw.click()
    expect(visit.control("prompt-problem")).to_have_text("Is required")
    expect(visit.control("width-problem")).to_have_text("Must be a multiple of 8, 100 is not")
    expect(visit.control("width")).to_have_attribute("aria-describedby", "width-problem")
    expect(visit.control("prompt")).to_have_attribute("aria-invalid", "true")
    expect(visit.control("prompt")).to_be_focused()
    expect(visit.page.get_by_role("alert")).to_have_text("Check the marked fields.")
    visit.fill(prompt=PROMPT, width=72, num_inference_steps=2, count=1)
    visit.control("prompt").press("Control+Enter")
    (picture,) = visit.pictures()
    assert picture.size == (72, 64)
    expect(visit.page.locator(".problem")).to_have_count(0)
    expect(visit.page.get_by_role("alert")).to_be_empty()
    visit.fill(num_inference_steps=5000)
    visit.draw.click()
    expect(visit.control("num_inference_steps-problem")).to_have_text("Must be less than or equal to 150")
    expect(visit.page.get_by_role("alert")).to_have_text("Check the marked field.")
    assert visit.pictures()[0].tobytes() == picture.tobytes(), "the earlier image must still be shown"
    without_refusals(visit)


def test_cancelled_images_stop_being_generated(visit: Visit) -> None:
    before = cancelled(visit.server)
    visit.fill(prompt=PROMPT, num_inference_steps=150, count=3, seed=7)
    visit.draw.click()
    states = visit.page.locator("#cards .generating span:not(.unseen)")
    for number in range(3):
        expect(states.nth(number)).to_contain_text(" of 151")
    visit.page.locator("#cards button").first.click()
    expect(states.first).to_have_text("Cancelled")
    wait_until(lambda: cancelled(visit.server) == before + 1)
    expect(states.nth(1)).to_contain_text(" of 151")
    visit.page.keyboard.press("Escape")
    expect(states.nth(2)).to_have_text("Cancelled")
    wait_until(lambda: cancelled(visit.server) == before + 3)
    expect(visit.draw).to_be_visible()
    expect(visit.control("history")).to_be_hidden()


def test_four_images_are_generated_at_once_and_the_others_wait(visit: Visit) -> None:
    """A browser opens at most six connections: six streams would block all other requests."""

    def asked() -> int:
        return sum(url.endswith("/txt2img") for url in visit.asked)

    visit.fill(prompt=PROMPT, num_inference_steps=150, width=64, height=64, count=6, seed=7)
    visit.draw.click()
    states = visit.page.locator("#cards .generating span:not(.unseen)")
    for number in range(4):
        expect(states.nth(number)).to_contain_text(" of 151")
    for number in (4, 5):
        expect(states.nth(number)).to_have_text("Waiting for other images")
    assert asked() == 4
    visit.page.get_by_role("button", name="Cancel (seed 11)").click()
    expect(states.nth(4)).to_have_text("Cancelled")
    visit.page.get_by_role("button", name="Cancel (seed 8)").click()
    expect(states.nth(5)).to_contain_text(" of 151")
    assert asked() == 5
    visit.page.keyboard.press("Escape")
    expect(visit.draw).to_be_visible()
    expect(states.filter(has_text="Cancelled")).to_have_count(6)


def wait_until(is_so: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_an_image_and_its_settings_survive_a_reload(visit: Visit, input_picture: Image.Image) -> None:
    visit.control("img").set_input_files({"name": "a.png", "mimeType": "image/png", "buffer": as_file(input_picture)})
    visit.page.get_by_role("radio", name="Repaint a part").check()
    visit.control("mask-all").click()
    visit.fill(prompt=PROMPT, negative_prompt="green", num_inference_steps=4, guidance_scale=3.5, strength=0.9)
    visit.control("scheduler").select_option("Euler a")
    visit.draw.click()
    (first,) = visit.pictures()
    visit.open()
    expect(visit.control("prompt")).to_have_value("")
    visit.control("history-list").get_by_role("button", name=PROMPT).click()
    (shown,) = visit.pictures()
    assert shown.tobytes() == first.tobytes()
    expected = {"prompt": PROMPT, "negative_prompt": "green", "num_inference_steps": "4", "guidance_scale": "3.5", "strength": "0.9"}
    for name, value in {**expected, "scheduler": "Euler a", "width": ""}.items():
        expect(visit.control(name)).to_have_value(value)
    expect(visit.control("seed")).to_have_value(re.compile(r"\d+"))
    expect(visit.page.get_by_role("img", name="Mask: 100 % of the image is painted")).to_be_visible()
    visit.draw.click()
    expect(visit.page.locator("#history-list li")).to_have_count(2)
    (again,) = visit.pictures()
    assert again.tobytes() == first.tobytes()
    visit.page.on("dialog", lambda dialog: dialog.accept())
    visit.page.get_by_role("button", name="Clear", exact=True).click()
    expect(visit.control("history")).to_be_hidden()
    visit.open()
    expect(visit.control("history")).to_be_hidden()


def test_images_stored_by_an_earlier_version_of_the_page_are_shown(visit: Visit, input_picture: Image.Image) -> None:
    content = base64.b64encode(as_file(input_picture)).decode()
    entry = {"settings": {"prompt": "an old one", "seed": 5}, "kind": "txt2img"}
    parameters = {"prompt": "an old one", "seed": 5, "width": 64, "height": 64, "num_inference_steps": 4, "scheduler": "PNDMScheduler"}
    visit.page.evaluate(
        """async ([entry, parameters, content]) => {
             const bytes = Uint8Array.from(atob(content), (one) => one.charCodeAt(0));
             const picture = new Blob([bytes], { type: "image/png" });
             const done = (request) => new Promise((resolve) => { request.onsuccess = () => resolve(request.result); });
             const database = await done(indexedDB.open("stable_diffusion", 1));
             const store = database.transaction("drawn", "readwrite").objectStore("drawn");
             await done(store.add({ ...entry, start: null, mask: null, picture, parameters }));
           }""",
        [entry, parameters, content],
    )
    visit.open()
    visit.control("history-list").get_by_role("button", name="an old one, seed 5").click()
    (shown,) = visit.pictures()
    assert shown.tobytes() == input_picture.tobytes()
    expect(visit.control("seed")).to_have_value("5")


def test_several_images_have_consecutive_seeds(visit: Visit) -> None:
    visit.fill(prompt=PROMPT, num_inference_steps=4, count=3, seed=41)
    visit.draw.click()
    pictures = visit.pictures(3)
    assert len({picture.tobytes() for picture in pictures}) == 3
    facts = visit.page.locator("#cards figcaption .aside").all_text_contents()
    assert [fact.partition(" · ")[0] for fact in facts] == ["Seed 41", "Seed 42", "Seed 43"]


@pytest.mark.parametrize("broken", ["get() { throw new DOMException('no', 'SecurityError'); }", "value: undefined"])
def test_it_generates_with_storage_turned_off(visiting: Callable[..., Visit], broken: str) -> None:
    visit = visiting(f"Object.defineProperty(window, 'indexedDB', {{ {broken} }})")
    visit.fill(prompt=PROMPT, num_inference_steps=1)
    visit.draw.click()
    visit.pictures()
    expect(visit.control("history-note")).to_contain_text("gone when the page is closed")
    expect(visit.page.locator("#history-list li")).to_have_count(1)


def test_limits_and_noise_schedulers_come_from_the_server(visit: Visit) -> None:
    options = visit.control("scheduler").locator("option").all_text_contents()[1:]
    assert options == [short_names[0] for short_names in SCHEDULERS.values()]
    limits = {"width": ("64", "1024", "8"), "num_inference_steps": ("1", "150", "1"), "seed": ("0", "4294967295", "1")}
    for name, (minimum, maximum, step) in limits.items():
        for attribute, value in (("min", minimum), ("max", maximum), ("step", step)):
            expect(visit.control(name)).to_have_attribute(attribute, value)
    expect(visit.control("num_inference_steps")).to_have_value("50")


def test_an_unreachable_server_is_reported(visit: Visit) -> None:
    visit.page.route("**/txt2img", lambda route: route.abort())
    visit.fill(prompt=PROMPT)
    visit.draw.click()
    expect(visit.page.get_by_role("alert")).to_have_text("The server cannot be reached. Check that it is running and try again.")
    visit.page.route("**/capabilities", lambda route: route.abort())
    visit.open()
    expect(visit.page.get_by_role("alert")).to_contain_text("could not be read from the server")
    visit.complaints[:] = [text for text in visit.complaints if "net::ERR_FAILED" not in text]


def test_an_error_in_the_page_is_not_blamed_on_the_server(visit: Visit) -> None:
    visit.page.route("**/txt2img", lambda route: route.fulfill(content_type="text/event-stream", body="event: progress\ndata: null\n\n"))
    visit.fill(prompt=PROMPT)
    with visit.page.expect_event("pageerror"):
        visit.draw.click()
    expect(visit.page.get_by_role("alert")).to_have_text("Something went wrong in this page. Reload it and try again.")
    (complaint,) = visit.complaints
    assert "null" in complaint
    visit.complaints.clear()


def test_events_are_parsed_wherever_the_stream_is_split(visit: Visit) -> None:
    pieces = (
        ": hello",
        '\r\nevent: one\r\ndata: {"ä":\r\ndata:1}\r\n\r\n',
        ":\n\n",
        "event:two\rdata\rdata: x\r\r",
        "id: 4\ndata:  😀\n\n",
    )
    text = "".join((*pieces, "event: cut\ndata: off\n"))
    read = visit.page.evaluate(
        """async (text) => {
             const { eventsOf } = await import("./events.js");
             const bytes = new TextEncoder().encode(text);
             const all = new Set();
             for (let size = 1; size <= bytes.length; size++) {
               const body = new ReadableStream({
                 start(controller) {
                   for (let at = 0; at < bytes.length; at += size) controller.enqueue(bytes.slice(at, at + size));
                   controller.close();
                 },
               });
               const events = [];
               for await (const { name, data } of eventsOf(body)) events.push([name, data]);
               all.add(JSON.stringify(events));
             }
             return [...all].map(JSON.parse);
           }""",
        text,
    )
    assert read == [[["one", '{"ä":\n1}'], ["two", "\nx"], ["message", " 😀"]]]


def test_on_a_phone_the_page_fits_and_touch_paints(visiting: Callable[..., Visit], input_picture: Image.Image) -> None:
    visit = visiting(**PHONE)

    def too_wide() -> bool:
        wide: bool = visit.page.evaluate("document.documentElement.scrollWidth > document.documentElement.clientWidth")
        return wide

    assert not too_wide()
    visit.control("img").set_input_files({"name": "a.png", "mimeType": "image/png", "buffer": as_file(input_picture)})
    visit.page.get_by_role("radio", name="Repaint a part").tap()
    visit.page.get_by_text("Rectangle by numbers").tap()
    assert not too_wide()
    visit.control("mask").tap()
    expect(visit.control("mask")).to_have_attribute("aria-label", re.compile(r"Mask: [1-9]"))
    heights = visit.page.evaluate(
        """[...document.querySelectorAll("button, select, summary, input[type=number], .drop label, .choice label, header a")]
             .filter((one) => one.checkVisibility()).map((one) => [one.textContent.trim() || one.id, one.getBoundingClientRect().height])"""
    )
    assert [(name, height) for name, height in heights if height < (38 if name in CHOICES else 44)] == []
    visit.fill(prompt="a red circle " * 20, num_inference_steps=2, count=2)
    visit.draw.tap()
    visit.pictures(2)
    assert not too_wide()


CHOICES = ("Repaint all", "Repaint a part", "Paint", "Erase")


@contextmanager
def everything_shown(visit: Visit, picture: Image.Image) -> Iterator[Page]:
    visit.control("img").set_input_files({"name": "a.png", "mimeType": "image/png", "buffer": as_file(picture)})
    visit.page.get_by_role("radio", name="Repaint a part").check()
    visit.page.get_by_text("Rectangle by numbers").click()
    visit.control("mask-all").click()
    visit.fill(prompt=PROMPT, num_inference_steps=2, count=2)
    visit.draw.click()
    visit.pictures(2)
    yield visit.page


def roles_and_names(visit: Visit) -> list[tuple[str, str]]:
    tree = visit.context.new_cdp_session(visit.page).send("Accessibility.getFullAXTree")["nodes"]
    return [(node["role"]["value"], node.get("name", {}).get("value", "")) for node in tree if not node["ignored"]]


def test_controls_of_two_images_have_different_names(visit: Visit) -> None:
    expect(visit.page.get_by_label("Choose an image or drop one here")).to_have_id("img")
    visit.fill(prompt=PROMPT, num_inference_steps=150, count=2)
    visit.draw.click()
    expect(visit.page.get_by_role("progressbar")).to_have_count(2)
    assert_unique(roles_and_names(visit), "progressbar", 2)
    visit.page.keyboard.press("Escape")
    expect(visit.draw).to_be_visible()


def assert_unique(nodes: list[tuple[str, str]], first_role: str, at_least: int) -> None:
    for role in (first_role, "button"):
        names = [name for one, name in nodes if one == role]
        assert len(names) >= at_least
        assert len(set(names)) == len(names), names


def test_every_control_has_a_name(visit: Visit, input_picture: Image.Image) -> None:
    with everything_shown(visit, input_picture) as page:
        nodes = roles_and_names(visit)
        assert_unique(nodes, "link", 2)
        controls = [
            "button",
            "textbox",
            "spinbutton",
            "slider",
            "radio",
            "radiogroup",
            "combobox",
            "link",
            "image",
            "form",
            "region",
            "progressbar",
        ]
        nameless = [role for role, name in nodes if role in controls and not name.strip()]
        assert nameless == []
        assert {role for role, _ in nodes} >= {"main", "banner", "navigation", "form", "region", "alert", "status", "heading"}
        assert page.locator("html").get_attribute("lang") == "en"


def test_colours_have_enough_contrast_in_light_and_dark_mode() -> None:
    style = (ROOT / "stable_diffusion" / "ui" / "style.css").read_text()
    light, dark = (dict(re.findall(r"--([\w-]+): (#\w{6});", block)) for block in re.findall(r":root \{(.*?)\}", style, re.DOTALL)[:2])
    for colours in (light, dark):
        for text in ("text", "quiet", "wrong", "accent"):
            for ground in ("page", "surface", "sunk"):
                assert contrast(colours[text], colours[ground]) >= 4.5, (text, ground, colours)
        assert contrast(colours["on-accent"], colours["accent"]) >= 4.5
        assert contrast(colours["on-accent"], colours["accent-hover"]) >= 4.5
        assert contrast(colours["edge"], colours["surface"]) >= 3


def contrast(one: str, other: str) -> float:
    """WCAG 2.2, "contrast ratio"."""

    def luminance(colour: str) -> float:
        channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        red, green, blue = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels)
        return 0.2126 * red + 0.7152 * green + 0.0722 * blue

    darker, lighter = sorted((luminance(one), luminance(other)))
    return (lighter + 0.05) / (darker + 0.05)


def test_the_page_loads_nothing_from_other_hosts_and_is_cached_until_it_changes(server: Server) -> None:
    with server.client() as client:
        moved = client.get("/ui")
        assert (moved.status_code, moved.headers["location"]) == (308, "ui/")
        page = client.get("/ui/")
        assert page.headers["content-type"] == "text/html; charset=utf-8"
        assert {"default-src 'self'", "frame-ancestors 'none'"} <= set(page.headers["content-security-policy"].split("; "))
        assert page.headers["x-content-type-options"] == "nosniff"
        assert client.get("/ui/", headers={"If-None-Match": page.headers["etag"]}).status_code == 304
        assert client.get("/ui/app.js").headers["content-type"] == "text/javascript; charset=utf-8"
        assert client.get("/ui/../api.py").status_code == 404
        assert client.get("/ui/none.js").status_code == 404
        assert client.post("/ui/").status_code == 405
        assert 'href="./ui/"' in client.get("/").text
    for file in (ROOT / "stable_diffusion" / "ui").iterdir():
        assert "//" not in re.sub(r"^\s*//.*$|\s// .*$", "", file.read_text(), flags=re.MULTILINE), "no address of another site"


def test_the_start_log_names_the_page(server: Server) -> None:
    assert "open its address in a browser: /ui generates images" in server.log
