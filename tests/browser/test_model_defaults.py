"""The page at /ui with a server whose model has defaults of its own, and which has no LoRAs."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator

import pytest
from playwright.sync_api import expect

from stable_diffusion.models.folder import DEMO_FOLDER
from tests.browser.chromium import CHROMIUM
from tests.browser.visit import Visit, body_of
from tests.http.servers import ROOT, Server, serve

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")

PROMPT = "a red circle on a blue background"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("defaults_on_the_page")
    model = shutil.copytree(DEMO_FOLDER, folder / "few_steps")
    defaults = {"steps": 4, "guidance_scale": 1.5, "guidance_scale_range": [1, 2], "scheduler": "Euler a"}
    (model / "defaults.json").write_text(json.dumps(defaults))
    (folder / "loras").mkdir()
    changes = {"BENTOML_CONFIG": "configuration.yaml", "SD_MODEL": str(model), "SD_LORAS": str(folder / "loras")}
    with serve(ROOT / "fp32", "service:svc", folder / "home", changes) as server:
        yield server


def test_the_models_own_defaults_are_shown_and_used(visit: Visit) -> None:
    expect(visit.control("num_inference_steps")).to_have_value("4")
    scale = visit.page.get_by_role("spinbutton", name="Guidance 1–2")
    expect(scale).to_have_value("1.5")
    expect(scale).to_have_attribute("min", "1")
    expect(scale).to_have_attribute("max", "2")
    expect(visit.control("scheduler").locator("option:checked")).to_have_text("Default (Euler a)")
    visit.fill(prompt=PROMPT)
    with visit.page.expect_request("**/txt2img") as sent:
        visit.draw.click()
    visit.pictures()
    body = body_of(sent.value)
    assert (body["num_inference_steps"], body["guidance_scale"], body["preview_every_steps"]) == (4, 1.5, 1)
    assert "scheduler" not in body
    expect(visit.page.locator("#cards figcaption .aside")).to_contain_text("4 steps · EulerAncestralDiscrete")


def test_a_guidance_scale_that_the_model_does_not_allow_is_reported_at_its_field(visit: Visit) -> None:
    visit.fill(prompt=PROMPT, guidance_scale=7)
    visit.draw.click()
    expect(visit.control("guidance_scale")).to_be_focused()
    expect(visit.control("guidance_scale-problem")).to_contain_text("1")
    expect(visit.control("guidance_scale-problem")).to_contain_text("2")
    visit.complaints[:] = [text for text in visit.complaints if "400" not in text]


def test_without_loras_there_is_no_choice_of_them(visit: Visit) -> None:
    expect(visit.control("loras")).to_be_hidden()
    expect(visit.page.get_by_role("button", name="Add a LoRA")).to_have_count(0)


def test_a_lora_that_only_the_prompt_names_is_reported_below_the_form(visit: Visit) -> None:
    visit.fill(prompt=f"{PROMPT} <lora:none:1>")
    visit.page.get_by_text("More settings").click()
    visit.control("prompt_syntax").select_option("a1111")
    visit.draw.click()
    expect(visit.page.get_by_role("alert")).to_contain_text("there is no LoRA 'none' here")
    expect(visit.control("loras")).to_be_hidden()
    visit.complaints[:] = [text for text in visit.complaints if "422" not in text]


def test_a_clip_skip_out_of_range_opens_the_settings_that_hold_it(visit: Visit) -> None:
    visit.page.get_by_text("More settings").click()
    visit.fill(prompt=PROMPT, clip_skip=99)
    visit.page.get_by_text("More settings").click()
    expect(visit.control("clip_skip")).to_be_hidden()
    visit.draw.click()
    expect(visit.control("clip_skip")).to_be_focused()
    expect(visit.control("clip_skip-problem")).to_contain_text("12")
    visit.complaints[:] = [text for text in visit.complaints if "400" not in text]
