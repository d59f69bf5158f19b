"""Both services over HTTP, as their users reach them: real processes, production mode."""

from __future__ import annotations

import io
import json
import re
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import unquote, urlsplit

import numpy as np
import pytest
from PIL import Image

from stable_diffusion.core.schedulers import SCHEDULERS
from stable_diffusion.demo.shapes import COLOURS, judge, nearest_colour
from tests.http.asking import PROMPT, as_file, draw, picture_of, redraw, refused
from tests.http.servers import Server


def test_a_red_circle_on_a_blue_background_is_red_in_the_middle_and_blue_in_the_corners(server: Server) -> None:
    pixels = np.asarray(picture_of(draw(server, num_inference_steps=50, seed=1)))
    assert nearest_colour(pixels[28:36, 28:36]) == "red"
    corners = [pixels[:4, :4], pixels[:4, -4:], pixels[-4:, :4], pixels[-4:, -4:]]
    assert [nearest_colour(corner) for corner in corners] == ["blue"] * 4
    assert judge(Image.fromarray(pixels)).shape == "circle"


def test_every_resolved_parameter_comes_back_as_a_header(server: Server) -> None:
    response = draw(server, negative_prompt="green", guidance_scale=3, guidance_end=0.5, seed=42, scheduler="euler a", width=72)
    expected = {
        "prompt": PROMPT,
        "negative_prompt": "green",
        "height": "64",
        "width": "72",
        "num_inference_steps": "10",
        "guidance_scale": "3.0",
        "guidance_end": "0.5",
        "seed": "42",
        "scheduler": "EulerAncestralDiscreteScheduler",
        "safety_check": "true",
        "safety_flagged": "unchecked",
        "model": "demo",
    }
    assert {name: response.headers[name] for name in expected} == expected
    assert "strength" not in response.headers
    assert picture_of(response).size == (72, 64)


def test_the_seed_that_was_drawn_draws_the_same_picture_again(server: Server) -> None:
    first = draw(server)
    again = draw(server, seed=int(first.headers["seed"]))
    assert again.content == first.content
    assert draw(server, seed=(int(first.headers["seed"]) + 1) % 2**32).content != first.content


@pytest.mark.parametrize(
    ("accept", "fields", "media_type"),
    [
        ("*/*", {}, "image/jpeg"),
        ("image/png", {}, "image/png"),
        ("image/webp", {}, "image/webp"),
        ("image/jpeg;q=0.5, image/webp;q=0.9", {}, "image/webp"),
        ("text/html,application/xhtml+xml,*/*;q=0.8", {}, "image/jpeg"),
        ("image/png", {"output_format": "webp"}, "image/webp"),
        ("application/json", {"output_format": "png"}, "image/png"),
    ],
)
def test_the_format_goes_by_field_then_by_accept_header(server: Server, accept: str, fields: dict[str, object], media_type: str) -> None:
    response = draw(server, accept, num_inference_steps=2, **fields)
    assert response.headers["content-type"] == media_type
    picture_of(response)
    assert Image.open(io.BytesIO(response.content)).get_format_mimetype() == media_type


def test_an_accept_header_without_an_image_is_refused(server: Server) -> None:
    assert "image/jpeg, image/png, image/webp" in refused(draw(server, "text/html"), 406, "Accept")


@pytest.mark.parametrize(
    "prompt",
    [
        "\u8d64\u3044\u4e38",
        "\u043a\u0440\u0430\u0441\u043d\u044b\u0439 \u043a\u0440\u0443\u0433",
        "\U0001f534 100% caf\u00e9",
        "line\nbreak",
    ],
)
def test_prompts_in_any_script_come_back_percent_encoded(server: Server, prompt: str) -> None:
    response = draw(server, prompt=prompt, num_inference_steps=2)
    assert response.status_code == 200
    assert response.headers["prompt"].isascii()
    assert unquote(response.headers["prompt"]) == prompt


def test_a_prompt_of_several_chunks_is_drawn_whole_and_one_that_is_too_long_is_refused(server: Server) -> None:
    long_prompt = f"{PROMPT}{', very nice' * 60}"
    response = draw(server, prompt=long_prompt, num_inference_steps=2)
    assert response.status_code == 200
    assert unquote(response.headers["prompt"]) == long_prompt
    assert "prompt_dropped" not in response.headers
    too_long = draw(server, prompt=f"{PROMPT}{', very nice' * 160}", num_inference_steps=2)
    assert "prompt: more than 450 tokens; the excess begins with 'very nice" in refused(too_long, 400, "prompt")


@pytest.mark.parametrize("scheduler", [short_names[0] for short_names in SCHEDULERS.values()])
def test_every_scheduler_draws_the_colours_that_were_asked_for(server: Server, scheduler: str) -> None:
    fields = {"prompt": "a large white circle on a black background", "num_inference_steps": 25, "guidance_scale": 4, "seed": 3}
    verdict = judge(picture_of(draw(server, "image/png", scheduler=scheduler, **fields)))
    assert (verdict.colour, verdict.background) == ("white", "black")


def test_eight_at_once_are_each_answered_with_their_own_picture(server: Server) -> None:
    names = list(COLOURS)
    pairs = [(names[index], names[(index + 3) % 8]) for index in range(8)]

    def ask(pair: tuple[str, str]) -> Image.Image:
        colour, background = pair
        return picture_of(
            draw(server, prompt=f"a large {colour} square on a {background} background", num_inference_steps=30, guidance_scale=4, seed=5)
        )

    with ThreadPoolExecutor(8) as threads:
        pictures = list(threads.map(ask, pairs))
    seen = [(judge(picture).colour, judge(picture).background) for picture in pictures]
    assert sum(one == other for one, other in zip(seen, pairs, strict=True)) >= 7, list(zip(seen, pairs, strict=True))


def test_img2img_keeps_the_layout_at_low_strength(server: Server, input_picture: Image.Image) -> None:
    response = redraw(
        server, "/img2img", {"img": as_file(input_picture)}, strength=0.2, prompt="a yellow square on a green background", seed=1
    )
    pixels = np.asarray(picture_of(response))
    assert response.headers["strength"] == "0.2"
    assert nearest_colour(pixels[14:26, 14:26]) == "yellow"
    for corner in (pixels[:4, -8:], pixels[-8:, :4], pixels[-8:, -8:], pixels[40:60, 40:60]):
        assert nearest_colour(corner) == "green"


def test_img2img_follows_the_prompt_at_high_strength(server: Server, input_picture: Image.Image) -> None:
    verdict = judge(picture_of(redraw(server, "/img2img", {"img": as_file(input_picture)}, strength=1.0, num_inference_steps=40, seed=1)))
    assert (verdict.colour, verdict.background) == ("red", "blue")


def test_inpaint_changes_what_is_under_the_mask_and_nothing_else(
    server: Server, input_picture: Image.Image, right_half_mask: Image.Image
) -> None:
    files = {"img": as_file(input_picture), "mask": as_file(right_half_mask)}
    response = redraw(
        server, "/inpaint", files, strength=1.0, num_inference_steps=30, prompt="a large purple circle on a black background", seed=2
    )
    before, after = np.asarray(input_picture), np.asarray(picture_of(response))
    assert np.array_equal(before[:, :32], after[:, :32])
    assert np.abs(before[:, 32:].astype(int) - after[:, 32:]).mean() > 20


def test_a_rotated_photograph_is_drawn_upright(server: Server) -> None:
    picture = Image.new("RGB", (128, 64), COLOURS["green"])
    picture.paste(COLOURS["red"], (0, 0, 64, 64))
    exif = Image.Exif()
    exif[0x0112] = 6
    response = redraw(server, "/img2img", {"img": as_file(picture, "JPEG", exif=exif)}, strength=0.1, guidance_scale=1)
    upright = np.asarray(picture_of(response))
    assert upright.shape[:2] == (88, 64)  # 1:2 at the native area, no side below 64
    assert nearest_colour(upright[4:20, 16:48]) == "red"
    assert nearest_colour(upright[-20:-4, 16:48]) == "green"


def test_a_transparent_picture_is_drawn_on_white(server: Server) -> None:
    picture = Image.new("RGBA", (64, 64), (0, 0, 0, 0))
    picture.paste((*COLOURS["blue"], 255), (0, 0, 32, 64))
    pixels = np.asarray(
        picture_of(redraw(server, "/img2img", {"img": as_file(picture, "WEBP", lossless=True)}, strength=0.1, guidance_scale=1))
    )
    assert nearest_colour(pixels[:, 44:]) == "white"
    assert nearest_colour(pixels[:, :20]) == "blue"


def test_proportions_are_kept_and_sizes_are_multiples_of_8(server: Server) -> None:
    wide = as_file(Image.new("RGB", (400, 225), "white"), "JPEG")
    size = picture_of(redraw(server, "/img2img", {"img": wide}, num_inference_steps=2)).size
    assert size == (88, 64)
    assert picture_of(redraw(server, "/img2img", {"img": wide}, num_inference_steps=2, width=160)).size == (160, 88)
    assert picture_of(redraw(server, "/img2img", {"img": wide}, num_inference_steps=2, width=64, height=64)).size == (64, 64)


@pytest.mark.parametrize(
    ("fields", "field", "told"),
    [
        ({"prompt": ""}, "prompt", "must not be empty"),
        ({"height": 100}, "height", "multiple of 8"),
        ({"width": 2056}, "width", "less than or equal to 2048"),
        ({"num_inference_steps": 1000}, "num_inference_steps", "less than or equal to 150"),
        ({"guidance_scale": "high"}, "guidance_scale", "valid number"),
        ({"scheduler": "magic"}, "scheduler", "allowed are PNDM"),
        ({"steps": 5}, "steps", "not a known field"),
        ({"strength": 0.5}, "strength", "not a known field"),
    ],
    ids=str,
)
def test_a_bad_field_is_named_with_its_limit(server: Server, fields: dict[str, object], field: str, told: str) -> None:
    message = refused(draw(server, "*/*", **fields), 400, field)
    assert message.startswith(field)
    assert told in message


def test_bad_input_is_refused_before_anything_is_computed(server: Server) -> None:
    started = time.monotonic()
    for _ in range(20):
        refused(draw(server, height=63, num_inference_steps=150), 400, "height")
    assert time.monotonic() - started < 5


@pytest.mark.parametrize(
    ("body", "content_type", "status", "told"),
    [
        (b'{"prompt": "x"', "application/json", 400, "body: not valid JSON"),
        (b'["x"]', "application/json", 400, "must be a JSON object"),
        (b'{"prompt": "x"}', "text/plain", 415, "Content-Type must be application/json, got text/plain"),
        (b'{"prompt": "x"}', "", 415, "Content-Type must be application/json, but it is missing"),
        (b'{"prompt": "' + b"x" * 2**20 + b'"}', "application/json", 413, "must have at most 1048576 bytes"),
    ],
    ids=["cut short", "a list", "plain text", "no type", "too long"],
)
def test_a_bad_body_is_refused_by_name(server: Server, body: bytes, content_type: str, status: int, told: str) -> None:
    headers = {"Content-Type": content_type} if content_type else {}
    with server.client() as client:
        assert told in refused(client.post("/txt2img", content=body, headers=headers), status)


def test_a_body_of_unknown_length_is_limited_too(server: Server) -> None:
    def endless() -> object:
        for _ in range(40):
            yield b" " * 65536

    with server.client() as client:
        response = client.post("/txt2img", content=endless(), headers={"Content-Type": "application/json"})  # type: ignore[arg-type]
    assert "the body must have at most 1048576 bytes" in refused(response, 413, "body")


def test_missing_and_unreadable_parts_are_a_400_that_names_them(server: Server, input_picture: Image.Image) -> None:
    picture = as_file(input_picture)
    with server.client() as client:
        data = {"data": json.dumps({"prompt": PROMPT})}
        assert "img: the part is missing" in refused(client.post("/img2img", files={"data": data["data"].encode()}), 400, "img")
        assert "data: the part is missing" in refused(client.post("/img2img", files={"img": picture}), 400, "data")
        assert "mask: the part is missing" in refused(client.post("/inpaint", files={"img": picture}, data=data), 400, "mask")
        assert "img: not a PNG, JPEG or WebP image" in refused(client.post("/img2img", files={"img": b"hello"}, data=data), 400, "img")
        assert "mask: the image is damaged" in refused(
            client.post("/inpaint", files={"img": picture, "mask": picture[:80]}, data=data), 400, "mask"
        )
        text_parts = {"img": (None, "input.jpg"), "data": (None, data["data"])}
        assert "img: must be a file, got text" in refused(client.post("/img2img", files=text_parts), 400, "img")
        assert "data: not valid JSON" in refused(client.post("/img2img", files={"img": picture}, data={"data": "{"}), 400, "data")
        assert "Content-Type must be multipart/form-data" in refused(client.post("/img2img", json={"prompt": PROMPT}), 415)
        assert "unknown part, allowed are img, data" in refused(
            client.post("/img2img", files={"img": picture, "mask": picture}, data=data), 400, "mask"
        )


def test_gif_is_refused_whatever_it_says_it_is(server: Server, input_picture: Image.Image) -> None:
    with server.client() as client:
        response = client.post(
            "/img2img",
            files={"img": ("input.png", as_file(input_picture, "GIF"), "image/png")},
            data={"data": json.dumps({"prompt": PROMPT})},
        )
    assert "img: not a PNG, JPEG or WebP image" in refused(response, 400, "img")


def test_unknown_paths_and_methods_are_refused_in_the_same_form(server: Server) -> None:
    with server.client() as client:
        assert refused(client.get("/nothing/here"), 404) == "no such path: /nothing/here"
        response = client.get("/txt2img")
        assert refused(response, 405) == "GET is not allowed here, use POST"
        assert response.headers["allow"] == "POST"


def test_data_may_be_a_file_part_as_well(server: Server, input_picture: Image.Image) -> None:
    with server.client() as client:
        response = client.post(
            "/img2img",
            files={
                "img": as_file(input_picture),
                "data": ("data.json", json.dumps({"prompt": PROMPT, "num_inference_steps": 2}), "application/json"),
            },
        )
    assert picture_of(response).size == (64, 64)


def test_names_that_utf_8_cannot_say_are_refused_in_the_same_form(server: Server) -> None:
    with server.client() as client:
        headers = {"Content-Type": "application/json"}
        assert "unicode" in refused(client.post("/txt2img", content=b'{"prompt": "x", "\\ud800": 1}', headers=headers), 400)
        twice = client.post("/txt2img", content=b'{"prompt": "x", "\\ud800": 1, "\\ud800": 2}', headers=headers)
        assert "given more than once" in refused(twice, 400)


def test_a_client_that_leaves_during_its_upload_is_no_error_of_ours(server: Server) -> None:
    address = urlsplit(server.url)
    with socket.create_connection((str(address.hostname), int(address.port or 0))) as connection:
        connection.sendall(b"POST /txt2img HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 100\r\n\r\n{")
    draw(server, num_inference_steps=1)
    assert "Traceback" not in server.log


def test_a_mask_of_other_proportions_is_refused(server: Server, input_picture: Image.Image) -> None:
    files = {"img": as_file(input_picture), "mask": as_file(Image.new("L", (64, 32)))}
    assert "mask: 64 x 32 does not have the proportions of the image, 64 x 64" in refused(redraw(server, "/inpaint", files), 400, "mask")


def test_a_client_that_leaves_stops_its_job(server: Server) -> None:
    """Its steps are counted in the engine's tests (`tests/test_runnable.py`); here the cancellation crosses HTTP and the process hop."""
    body = json.dumps({"prompt": PROMPT, "num_inference_steps": 150, "width": 256, "height": 256}).encode()
    address = urlsplit(server.url)
    cancelled_before = server.log.count("was cancelled after")
    with socket.create_connection((str(address.hostname), int(address.port or 0))) as connection:
        connection.sendall(
            b"POST /txt2img HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            + f"Content-Length: {len(body)}\r\n\r\n".encode()
            + body
        )
        time.sleep(3)
    left = time.monotonic()
    while server.log.count("was cancelled after") == cancelled_before:
        assert time.monotonic() - left < 10, "the job was not cancelled"
        time.sleep(0.02)
    seconds_to_cancel = time.monotonic() - left
    done, wanted = (int(number) for number in re.findall(r"was cancelled after (\d+) of (\d+) steps", server.log)[-1])
    assert 0 < done < wanted
    # Two of its steps, and what noticing a closed connection takes on a busy machine.
    assert seconds_to_cancel < 2 * 3 / done + 1
    # The server draws on for others.
    picture_of(draw(server, num_inference_steps=2))


def test_the_page_and_the_document_are_our_own(server: Server) -> None:
    with server.client() as client:
        page = client.get("/")
        assert page.headers["content-type"].startswith("text/html")
        assert "googletagmanager" not in page.text
        for asset in re.findall(r'(?:src|href)="\./(.*?)"', page.text):
            assert client.get(f"/{asset}").status_code == 200, asset
        assert set(client.get("/docs.json").json()["paths"]) >= {"/txt2img", "/img2img", "/inpaint"}


def test_probes_and_metrics_answer(server: Server) -> None:
    draw(server, num_inference_steps=1)
    with server.client() as client:
        assert client.get("/livez").status_code == 200
        assert client.get("/readyz").status_code == 200
        metrics = client.get("/metrics").text
        assert 'endpoint="/txt2img"' in metrics


def test_the_demo_model_is_announced_in_the_log(server: Server) -> None:
    assert "Serving the demo model, which generates coloured shapes only." in server.log


def test_no_prompt_is_logged_and_no_traceback(server: Server) -> None:
    assert PROMPT not in server.log
    assert "Traceback" not in server.log
