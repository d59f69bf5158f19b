"""Pictures as cameras, converters and other programs write them, sent to a server: each does there what its user expects."""

from __future__ import annotations

import base64
import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.http.asking import PROMPT, as_file, draw, picture_of, redraw, refused
from tests.http.servers import Server
from tests.http.test_reproduce import reproduce

CASES = Path(__file__).parents[1] / "unit" / "images" / "cases"


@pytest.fixture
def server(server: Server) -> Server:
    """One precision: `test_doors.py` tries every door in both."""
    return server


def case(name: str) -> bytes:
    return (CASES / name).read_bytes()


@pytest.mark.parametrize("name", ["II_bom_le", "II_utf16be", "MM_bom_be", "ascii_with_utf8"])
def test_exif_comments_of_other_programs_are_reproduced(server: Server, name: str) -> None:
    parameters = reproduce(server, case(f"exifcomment_{name}.jpg"), dry_run=True).json()["parameters"]
    assert (parameters["prompt"], parameters["negative_prompt"]) == ("a small red circle, café 日本 “x”", "blurry")
    assert (parameters["num_inference_steps"], parameters["seed"]) == (20, 5)


def test_what_dynamic_prompts_wrote_is_reproduced(server: Server) -> None:
    parameters = reproduce(server, case("infotext_dynamic_prompts_template.png"), dry_run=True).json()["parameters"]
    assert (parameters["prompt"], parameters["guidance_scale"], parameters["seed"]) == ("a small red circle", 7, 5)


def test_what_was_found_instead_of_a_description_is_said(server: Server) -> None:
    told = refused(reproduce(server, case("png_ztxt_1_5mb.png")), 400, "picture")
    assert "no PNG text named parameters (there are: 'workflow'), no EXIF comment" in told


@pytest.mark.parametrize("name", ["png_phys_bad_crc.png", "png_ztxt_1_5mb.png"])
def test_pngs_with_whole_pixels_are_drawn_from(server: Server, name: str) -> None:
    assert picture_of(redraw(server, "/img2img", {"img": case(name)}, num_inference_steps=2)).width > 0


def test_what_inpainting_keeps_of_a_picture_in_display_p3_looks_as_it_did(server: Server) -> None:
    mask = as_file(Image.new("L", (64, 64)))
    kept = picture_of(redraw(server, "/inpaint", {"img": case("icc_display_p3.png"), "mask": mask}, num_inference_steps=2))
    assert {colour for _, colour in kept.getcolors() or []} == {(0, 204, 13), (250, 31, 14)}


@pytest.mark.parametrize("name", ["mask_4bit_tRNS.png", "mask_rgb16_tRNS.png"])
def test_openai_s_api_repaints_where_a_colour_key_is(server: Server, name: str) -> None:
    grey = Image.new("RGB", (64, 64), (120, 130, 140))
    with server.client() as client:
        files = {"image": as_file(grey), "mask": case(name)}
        answer = client.post("/v1/images/edits", files=files, data={"prompt": PROMPT, "num_inference_steps": "2", "size": "64x64"})
    assert answer.status_code == 200, answer.text
    edited = np.asarray(Image.open(io.BytesIO(base64.b64decode(answer.json()["data"][0]["b64_json"]))).convert("RGB"))
    assert (edited[:, :32] == (120, 130, 140)).all()
    assert (edited[:, 34:] != (120, 130, 140)).any()


@pytest.mark.parametrize(("accept", "said"), [("image/png", b"sRGB\0"), ("image/jpeg", b"ICC_PROFILE\0"), ("image/webp", b"ICCP")])
def test_answers_say_that_they_are_srgb(server: Server, accept: str, said: bytes) -> None:
    assert said in draw(server, accept, num_inference_steps=1).content
