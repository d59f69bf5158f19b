"""POST /reproduce over HTTP: what this server drew is drawn again, to the last bit."""

from __future__ import annotations

import base64
import io
import json
import re
import time
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image

from stable_diffusion.images import infotext
from stable_diffusion.images.decode import read_description
from stable_diffusion.images.encode import encode
from stable_diffusion.models.folder import DEMO_FOLDER, check_model
from tests.http.asking import PROMPT, as_file, draw, picture_of, redraw, refused
from tests.http.servers import Server

HASH = check_model(DEMO_FOLDER).hash


@pytest.fixture
def server(server: Server) -> Server:
    """One precision: `test_doors.py` tries every door in both."""
    return server


def reproduce(
    server: Server, picture: bytes, inputs: dict[str, bytes] | None = None, accept: str = "image/png", **wishes: object
) -> httpx.Response:
    with server.client() as client:
        data = {"data": json.dumps(wishes)} if wishes else {}
        return client.post("/reproduce", files={"picture": picture, **(inputs or {})}, data=data, headers={"Accept": accept})


def described(response: httpx.Response) -> infotext.Infotext:
    text = read_description(response.content, "picture")
    assert text is not None
    return infotext.read(text)


def with_description(text: str) -> bytes:
    return encode(Image.new("RGB", (64, 64)), "png", text)


def test_a_picture_from_text_is_drawn_again_to_the_last_bit(server: Server) -> None:
    prompt = 'a red circle\nNegative prompt: and a \u732b, "quoted" &amp;lt;'
    fields: dict[str, Any] = {
        "negative_prompt": "green",
        "guidance_scale": 3.3,
        "guidance_end": 0.5,
        "scheduler": "DPM++ 2M Karras",
        "width": 72,
    }
    first = draw(server, prompt=prompt, num_inference_steps=4, **fields)
    again = reproduce(server, first.content)
    assert again.status_code == 200, again.text
    assert again.headers["differs"] == "nothing"
    assert again.content == first.content
    assert again.headers["content-disposition"] == f'inline; filename="txt2img-{first.headers["seed"]}.png"'
    assert (again.headers["prompt"], again.headers["safety_check"]) == (first.headers["prompt"], "true")


def test_pictures_from_pictures_are_drawn_again_with_what_they_were_drawn_from(
    server: Server, input_picture: Image.Image, right_half_mask: Image.Image
) -> None:
    wide = as_file(input_picture.resize((200, 100)), "JPEG")
    for path, inputs in (("/img2img", {"img": wide}), ("/inpaint", {"img": wide, "mask": as_file(right_half_mask.resize((200, 100)))})):
        first = redraw(server, path, inputs, num_inference_steps=4, strength=0.7, scheduler="Euler a")
        again = reproduce(server, first.content, inputs)
        assert again.status_code == 200, again.text
        assert again.headers["differs"] == "nothing"
        assert again.content == first.content
        other = reproduce(server, first.content, inputs | {"img": as_file(Image.new("RGB", (200, 100)))})
        assert other.headers["differs"].startswith("Input hash: ")
        assert "img: the part is missing" in refused(reproduce(server, first.content), 400, "img")
        plan = reproduce(server, first.content, dry_run=True).json()
        assert (plan["kind"], plan["missing"], plan["differs"]) == (path[1:], list(inputs), [])
    assert "mask: the part is missing" in refused(reproduce(server, first.content, {"img": wide}), 400, "mask")


def test_a_picture_of_openais_edits_is_drawn_again_under_the_same_mask(server: Server, input_picture: Image.Image) -> None:
    mask = Image.new("RGBA", (64, 64), "white")
    mask.paste((255, 255, 255, 0), (32, 0, 64, 64))  # read as a plain mask it would have the left half repainted
    files = {"image": as_file(input_picture), "mask": as_file(mask)}
    with server.client() as client:
        edited = client.post("/v1/images/edits", files=files, data={"prompt": PROMPT, "steps": "4", "strength": "1"})
    first = base64.b64decode(edited.json()["data"][0]["b64_json"])
    again = reproduce(server, first, {"img": files["image"], "mask": files["mask"]})
    assert again.headers["differs"] == "nothing"
    assert again.content == first
    other = reproduce(server, first, {"img": files["image"], "mask": as_file(Image.new("L", (64, 64), "white"))}, dry_run=True)
    (told,) = other.json()["differs"]
    assert re.fullmatch(r"Mask hash: \w{10}, here \w{10} \(another image, or prepared as other programs do: .*\)", told)


@pytest.mark.parametrize("image_format", ["jpeg", "webp"])
def test_other_formats_say_the_same(server: Server, image_format: str) -> None:
    first = draw(server, f"image/{image_format}", num_inference_steps=2, negative_prompt="caf\u00e9 \u732b")
    again = reproduce(server, first.content, accept=f"image/{image_format}")
    assert again.headers["differs"] == "nothing"
    assert again.content == first.content
    assert described(again).negative_prompt == "caf\u00e9 \u732b"


def test_metadata_can_be_left_out_and_changes_no_pixel(server: Server) -> None:
    with_it, without = (draw(server, num_inference_steps=2, seed=1, metadata=metadata) for metadata in (True, False))
    assert with_it.content != without.content
    assert np.array_equal(np.asarray(picture_of(with_it)), np.asarray(picture_of(without)))
    assert Image.open(io.BytesIO(without.content)).info == {"srgb": 0}, "its colours, and nothing of how it was drawn"
    assert "picture: the file has no infotext" in refused(reproduce(server, without.content), 400, "picture")
    assert reproduce(server, with_it.content, metadata=False).content == without.content


def test_what_was_computed_on_and_with_is_said(server: Server) -> None:
    values = described(draw(server, num_inference_steps=1)).values
    assert (values["Model"], values["Model hash"], values["Precision"], values["Device"]) == ("demo", HASH, "float32", "cpu")
    assert set(infotext.LIBRARIES) <= set(values)


def test_a_picture_that_is_fetched_later_says_it_too(server: Server, input_picture: Image.Image) -> None:
    data: dict[str, Any] = {"prompt": PROMPT, "num_inference_steps": 2, "seed": 3}
    inputs = {"img": as_file(input_picture)}
    with server.client() as client:
        started = client.post("/img2img", files=inputs, data={"data": json.dumps(data)}, headers={"Prefer": "respond-async"})
        place = f"{started.headers['location']}/picture"
        while (fetched := client.get(place, headers={"Accept": "image/png"})).status_code == 202:
            time.sleep(0.05)
    assert fetched.content == redraw(server, "/img2img", inputs, **data).content
    assert {"Input hash", "Precision", "Device"} <= set(described(fetched).values)


def test_what_would_differ_is_said_without_and_with_drawing(server: Server) -> None:
    text = read_description(draw(server, num_inference_steps=2).content, "picture")
    assert text is not None
    changed = text.replace(HASH, "0123456789").replace("diffusers: 0.", "diffusers: 9.").replace("float32", "float16")
    asked = reproduce(server, with_description(changed), dry_run=True)
    assert asked.headers["content-type"] == "application/json"
    plan = asked.json()
    here = infotext.library_versions()["diffusers"]
    assert plan["differs"] == [f"Model: demo (0123456789), here demo ({HASH})", f"diffusers: 9.{here[2:]}, here {here}"]
    assert (plan["kind"], plan["missing"], plan["parameters"]["num_inference_steps"]) == ("txt2img", [], 2)
    drawn = reproduce(server, with_description(changed))
    assert drawn.headers["differs"] == "; ".join([*plan["differs"], "Precision: float16, here float32"])


def test_events_tell_it_too(server: Server) -> None:
    first = draw(server, num_inference_steps=2)
    told = reproduce(server, first.content, accept="text/event-stream").text
    completed = json.loads(told.rpartition("event: completed\ndata: ")[2])
    assert completed["parameters"]["differs"] == "nothing"
    assert completed["parameters"]["seed"] == int(first.headers["seed"])


def test_a_picture_of_a1111_is_drawn_as_far_as_it_is_known_here(server: Server) -> None:
    text = (
        "a red circle\nNegative prompt: blurry\nSteps: 3, Sampler: Euler a, Schedule type: Automatic, CFG scale: 7, Seed: 5, "
        "Size: 64x72, Model hash: 6ce0161689, Model: v1-5-pruned, Clip skip: 2, ENSD: 31337, Version: v1.10.1"
    )
    again = reproduce(server, with_description(text))
    assert again.status_code == 200
    names = ("scheduler", "guidance_scale", "seed", "height", "negative_prompt")
    assert [again.headers[name] for name in names] == ["EulerAncestralDiscreteScheduler", "7.0", "5", "72", "blurry"]
    differs = again.headers["differs"].split("; ")
    assert differs[0].startswith("Version: generated by v1.10.1, which uses other noise")
    assert differs[1:] == [f"Model: v1-5-pruned (6ce0161689), here demo ({HASH})", "not known here: ENSD 31337"]
    assert (again.headers["clip_skip"], again.headers["prompt_syntax"]) == ("2", "a1111")


def test_wrong_pictures_are_refused_by_name(server: Server, input_picture: Image.Image) -> None:
    too_long = with_description("x\nSteps: 1000, Seed: 1, CFG scale: 7, Size: 64x64")
    told = {
        b"hello": "picture: not a PNG, JPEG or WebP image",
        as_file(input_picture): "picture: the file has no infotext",
        with_description("a comment"): "picture: not an infotext",
        too_long: "picture: cannot be generated here: num_inference_steps: must be",
    }
    for picture, message in told.items():
        assert message in refused(reproduce(server, picture), 400, "picture")
    first = draw(server, num_inference_steps=1).content
    assert "img: must be omitted, the picture is from txt2img" in refused(reproduce(server, first, {"img": first}), 400, "img")
    assert "dry: is not a known field" in refused(reproduce(server, first, dry=True), 400, "dry")
