"""The choice of LoRAs on the page at /ui, with a server that has three."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from PIL import Image
from playwright.sync_api import expect

from stable_diffusion.core.limits import MAX_LORA_WEIGHT
from tests.browser.chromium import CHROMIUM
from tests.browser.visit import Visit, body_of
from tests.http.asking import picture_of
from tests.http.servers import ROOT, Server, serve
from tests.lora_files import ATTENTION, changes, save_as_diffusers, save_as_kohya

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")

PROMPT = "a red circle on a blue background"
LONG = "zzz_a_name_as_trainers_write_it_v2_final-000010"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("loras_on_the_page")
    loras = folder / "loras"
    save_as_diffusers(loras / "hollow.safetensors", changes(ATTENTION, seed=1))
    save_as_kohya(loras / "outline.safetensors", changes(ATTENTION, seed=2), metadata={"ss_output_name": "Outline v2"})
    save_as_kohya(loras / f"{LONG}.safetensors", changes(ATTENTION, seed=3))
    with serve(ROOT / "fp32", "service:svc", folder / "home", {"BENTOML_CONFIG": "configuration.yaml", "SD_LORAS": str(loras)}) as server:
        yield server


def generate(visit: Visit) -> tuple[dict[str, Any], Image.Image]:
    """The request's body and its image."""
    with visit.page.expect_request("**/txt2img") as sent:
        visit.draw.click()
    (picture,) = visit.pictures()
    return body_of(sent.value), picture


def apart(one: Image.Image, other: Image.Image) -> int:
    return int(np.abs(np.asarray(one).astype(int) - np.asarray(other).astype(int)).max())


def names_of(visit: Visit, label: str) -> list[str]:
    return visit.page.get_by_label(label, exact=True).locator("option").all_text_contents()


def of_server(server: Server, **fields: object) -> Image.Image:
    """What the API generates, without the page."""
    with server.client() as client:
        response = client.post("/txt2img", json={"prompt": PROMPT, "seed": 5, "num_inference_steps": 3, "output_format": "png", **fields})
    assert response.status_code == 200, response.text
    return picture_of(response)


def test_loras_are_chosen_with_weights_and_change_the_image_until_they_are_removed(visit: Visit) -> None:
    visit.fill(prompt=PROMPT, num_inference_steps=3, seed=5)
    body, plain = generate(visit)
    assert "loras" not in body

    add = visit.page.get_by_role("button", name="Add a LoRA")
    add.click()
    first = visit.page.get_by_label("LoRA 1", exact=True)
    expect(first).to_be_focused()
    assert names_of(visit, "LoRA 1") == ["hollow", "outline (Outline v2)", LONG]
    expect(visit.page.get_by_label("Weight of LoRA 1")).to_have_value("1")
    body, one = generate(visit)
    assert body["loras"] == [{"name": "hollow", "weight": 1}]
    assert apart(one, plain) > 8

    add.click()
    visit.page.get_by_label("LoRA 2", exact=True).select_option(LONG)
    visit.page.get_by_label("Weight of LoRA 1").fill("-0.25")
    visit.page.get_by_label("Weight of LoRA 2").fill("0.8")
    body, two = generate(visit)
    assert body["loras"] == [{"name": "hollow", "weight": -0.25}, {"name": LONG, "weight": 0.8}]
    assert apart(two, one) > 8
    expect(visit.page.locator("#cards figcaption .aside")).to_contain_text(f"LoRA hollow -0.25 · LoRA {LONG} 0.8")

    visit.page.get_by_role("button", name="Remove LoRA 1").click()
    expect(visit.page.get_by_role("button", name="Remove LoRA 1")).to_be_focused()  # that of the other one
    expect(visit.page.get_by_label("LoRA 1", exact=True)).to_have_value(LONG)
    body, other = generate(visit)
    assert body["loras"] == [{"name": LONG, "weight": 0.8}]
    assert apart(other, two) > 8

    visit.page.get_by_role("button", name="Remove LoRA 1").click()
    expect(add).to_be_focused()
    body, again = generate(visit)
    assert "loras" not in body
    assert apart(again, plain) == 0


def test_the_image_is_the_one_that_the_api_generates(visit: Visit) -> None:
    visit.fill(prompt=PROMPT, num_inference_steps=3, seed=5)
    visit.page.get_by_role("button", name="Add a LoRA").click()
    visit.page.get_by_label("LoRA 1", exact=True).select_option("outline")
    _, picture = generate(visit)
    assert apart(picture, of_server(visit.server, loras=[{"name": "outline"}])) == 0


def test_no_lora_is_chosen_twice(visit: Visit) -> None:
    add = visit.page.get_by_role("button", name="Add a LoRA")
    for _ in range(3):
        add.click()
    expect(add).to_be_hidden()
    values = [visit.page.get_by_label(f"LoRA {number}", exact=True).input_value() for number in (1, 2, 3)]
    assert values == ["hollow", "outline", LONG]
    expect(visit.page.get_by_label("LoRA 1", exact=True).locator("option:disabled")).to_have_count(2)
    visit.page.get_by_role("button", name="Remove LoRA 2").click()
    expect(add).to_be_visible()
    expect(visit.page.get_by_label("LoRA 1", exact=True).locator("option:disabled")).to_have_text(LONG)


def test_no_more_are_chosen_than_the_server_allows(visiting: Callable[..., Visit]) -> None:
    """The server's own limit, lowered on its way to the page, so that three files suffice."""
    visit = visiting()

    def lowered(route: Any) -> None:
        response = route.fetch()
        capabilities = response.json()
        capabilities["fields"]["loras"]["maxItems"] = 2
        route.fulfill(response=response, json=capabilities)

    visit.page.route("**/capabilities", lowered)
    visit.open()
    add = visit.page.get_by_role("button", name="Add a LoRA")
    add.click()
    expect(add).to_be_visible()
    add.click()
    expect(add).to_be_hidden()


def test_the_keyboard_alone_is_enough(visit: Visit) -> None:
    keyboard = visit.page.keyboard
    visit.fill(prompt=PROMPT, num_inference_steps=3, seed=5)
    visit.page.get_by_role("button", name="Add a LoRA").focus()
    keyboard.press("Enter")
    keyboard.press("o")  # to the choice that begins with it
    keyboard.press("Tab")
    expect(visit.page.get_by_label("Weight of LoRA 1")).to_be_focused()
    keyboard.press("Control+a")
    keyboard.type("0.5")
    keyboard.press("Tab")
    expect(visit.page.get_by_role("button", name="Remove LoRA 1")).to_be_focused()
    with visit.page.expect_request("**/txt2img") as sent:
        keyboard.press("Control+Enter")
    assert body_of(sent.value)["loras"] == [{"name": "outline", "weight": 0.5}]
    visit.pictures()


@pytest.mark.parametrize("weight", ["11", ""])
def test_a_weight_out_of_range_is_reported_at_its_field(visit: Visit, weight: str) -> None:
    visit.fill(prompt=PROMPT)
    for _ in range(2):
        visit.page.get_by_role("button", name="Add a LoRA").click()
    second = visit.page.get_by_label("Weight of LoRA 2")
    second.fill(weight)
    visit.draw.click()
    expect(second).to_be_focused()
    expect(second).to_have_accessible_description(f"Must be from {-MAX_LORA_WEIGHT:g} to {MAX_LORA_WEIGHT:g}.")
    expect(visit.page.get_by_label("Weight of LoRA 1")).not_to_have_attribute("aria-invalid", "true")
    assert not any(url.endswith("/txt2img") for url in visit.asked)


def test_loras_and_the_syntax_of_the_prompt_survive_a_reload(visit: Visit) -> None:
    visit.fill(prompt="a (red:1.3) circle <lora:outline:0.4>", num_inference_steps=3, seed=5)
    visit.page.get_by_role("button", name="Add a LoRA").click()
    visit.page.get_by_label("Weight of LoRA 1").fill("0.75")
    visit.page.get_by_text("More settings").click()
    visit.control("prompt_syntax").select_option("a1111")
    visit.fill(clip_skip=2)
    body, first = generate(visit)
    assert {name: body[name] for name in ("prompt_syntax", "clip_skip", "loras")} == {
        "prompt_syntax": "a1111",
        "clip_skip": 2,
        "loras": [{"name": "hollow", "weight": 0.75}],
    }
    expect(visit.page.locator("#cards figcaption .aside")).to_contain_text("LoRA hollow 0.75 · LoRA outline 0.4")
    visit.open()
    expect(visit.control("clip_skip")).to_be_hidden()
    visit.control("history-list").get_by_role("button").click()
    expect(visit.control("clip_skip")).to_be_visible()
    expect(visit.control("clip_skip")).to_have_value("2")
    expect(visit.control("prompt_syntax")).to_have_value("a1111")
    expect(visit.page.get_by_label("LoRA 1", exact=True)).to_have_value("hollow")
    expect(visit.page.get_by_label("Weight of LoRA 1")).to_have_value("0.75")
    visit.fill(seed=5)
    body_again, again = generate(visit)
    assert body_again == body
    assert apart(again, first) == 0
    visit.page.get_by_role("button", name="Remove LoRA 1").click()
    visit.control("prompt_syntax").select_option("Plain text")
    visit.fill(clip_skip=1)
    body, other = generate(visit)
    assert not {"prompt_syntax", "loras"} & set(body)
    assert apart(other, first) > 8


def test_an_image_with_a_lora_that_the_server_no_longer_has_says_so(visit: Visit) -> None:
    visit.fill(prompt=PROMPT, num_inference_steps=1, seed=5)
    visit.page.get_by_role("button", name="Add a LoRA").click()
    generate(visit)
    visit.page.route("**/capabilities", without_hollow)
    visit.open()
    visit.control("history-list").get_by_role("button").click()
    assert names_of(visit, "LoRA 1")[0] == "hollow (not on this server)"
    expect(visit.page.get_by_label("LoRA 1", exact=True)).to_have_value("hollow")


def without_hollow(route: Any) -> None:
    response = route.fetch()
    capabilities = response.json()
    capabilities["loras"] = [one for one in capabilities["loras"] if one["name"] != "hollow"]
    route.fulfill(response=response, json=capabilities)


def test_a_lora_that_is_gone_is_reported_at_the_choice(visit: Visit) -> None:
    visit.fill(prompt=f"{PROMPT} <lora:none:1>")
    visit.page.get_by_text("More settings").click()
    visit.control("prompt_syntax").select_option("a1111")
    visit.draw.click()
    expect(visit.control("loras")).to_contain_text(f"There is no LoRA 'none' here, this server has: hollow, outline, {LONG}")
    expect(visit.page.get_by_role("button", name="Add a LoRA")).to_be_focused()
    visit.complaints[:] = [text for text in visit.complaints if "422" not in text]


def test_rows_and_long_names_fit_on_a_phone(visiting: Callable[..., Visit]) -> None:
    visit = visiting(viewport={"width": 320, "height": 640}, has_touch=True, is_mobile=True)

    def fits() -> bool:
        narrow: bool = visit.page.evaluate("document.documentElement.scrollWidth <= document.documentElement.clientWidth")
        return narrow

    for _ in range(2):
        visit.page.get_by_role("button", name="Add a LoRA").tap()
    visit.page.get_by_label("LoRA 1", exact=True).select_option(LONG)
    visit.page.get_by_text("More settings").tap()
    assert fits()
    controls = visit.page.locator(":is(#loras, #more) :is(select, input, button, summary)")
    boxes = [control.bounding_box() for control in controls.all()]
    assert len(boxes) == 2 * len(("LoRA", "weight", "remove")) + len(("add", "more settings", "syntax", "skip"))
    for box in boxes:
        assert box is not None
        assert box["height"] >= 44
        assert 0 <= box["x"] <= box["x"] + box["width"] <= 320
    visit.fill(prompt=PROMPT, num_inference_steps=1)
    visit.draw.tap()
    visit.pictures()
    expect(visit.page.locator("#cards figcaption .aside")).to_contain_text(f"LoRA {LONG} 1")
    assert fits()


def test_long_names_fit_beside_the_image(visit: Visit) -> None:
    visit.page.get_by_role("button", name="Add a LoRA").click()
    visit.page.get_by_label("LoRA 1", exact=True).select_option(LONG)
    visit.fill(prompt=PROMPT, num_inference_steps=1)
    visit.draw.click()
    visit.pictures()
    assert visit.page.evaluate("document.documentElement.scrollWidth <= document.documentElement.clientWidth")
