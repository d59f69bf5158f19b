"""OpenAI's images API through the official client, and the requests that Open WebUI sends to it."""

from __future__ import annotations

import base64
import io
import time
from collections.abc import Iterator
from typing import Any, Literal

import numpy as np
import openai
import pytest
from PIL import Image

from tests.http.asking import PROMPT, as_file, draw, picture_of, redraw
from tests.http.following import cancelled, ended
from tests.http.servers import Server

IN_COMPANY = 2  # levels of 255 by which a picture may differ there, as docs/performance.md says


@pytest.fixture
def server(server: Server) -> Server:
    """One precision: `test_doors.py` tries every door in both."""
    return server


@pytest.fixture
def client(server: Server) -> Iterator[openai.OpenAI]:
    with openai.DefaultHttpxClient(trust_env=False) as connection:
        yield openai.OpenAI(base_url=f"{server.url}/v1", api_key="unused", http_client=connection, timeout=120)


def extras(**fields: object) -> dict[str, object]:
    return {"num_inference_steps": 4, "seed": 5, **fields}


def decoded(content: str | None, image_format: str = "PNG") -> Image.Image:
    assert content
    picture = Image.open(io.BytesIO(base64.b64decode(content)))
    assert picture.format == image_format
    return picture.convert("RGB")


def difference(one: Image.Image, other: Image.Image) -> int:
    return int(np.abs(np.asarray(one).astype(int) - np.asarray(other)).max())


def as_alpha(mask: Image.Image) -> Image.Image:
    """A mask as OpenAI has it: what is white in `mask` is transparent."""
    alpha = Image.new("RGBA", mask.size, "white")
    alpha.putalpha(mask.point(lambda value: 255 - value))
    return alpha


def test_three_pictures_are_those_of_single_requests_with_the_next_seeds(server: Server, client: openai.OpenAI) -> None:
    last_seed = 2**32 - 1
    before = time.time()
    answer = client.images.generate(model="demo", prompt=PROMPT, n=3, size="72x64", extra_body=extras(seed=last_seed))
    assert before - 1 <= answer.created <= time.time()
    assert (answer.size, answer.output_format, answer.background) == ("72x64", "png", "opaque")
    assert answer.data
    seeds = [one.seed for one in answer.data]  # type: ignore[attr-defined]
    assert seeds == [last_seed, 0, 1]
    assert [one.safety_flagged for one in answer.data] == [None] * 3  # type: ignore[attr-defined]
    for one, seed in zip(answer.data, seeds, strict=True):
        alone = picture_of(draw(server, seed=seed, num_inference_steps=4, width=72, height=64))
        assert difference(decoded(one.b64_json), alone) <= IN_COMPANY


def test_an_edit_repaints_what_is_transparent_in_the_mask_and_keeps_the_rest(
    client: openai.OpenAI, input_picture: Image.Image, right_half_mask: Image.Image
) -> None:
    mask = as_file(as_alpha(right_half_mask))
    answer = client.images.edit(image=as_file(input_picture), mask=mask, prompt=PROMPT, extra_body=extras(strength=1.0))
    assert answer.data
    before, after = np.asarray(input_picture), np.asarray(decoded(answer.data[0].b64_json))
    assert np.array_equal(before[:, :32], after[:, :32])
    assert np.abs(before[:, 32:].astype(int) - after[:, 32:]).mean() > 20


def test_an_edit_without_a_mask_redraws_the_whole_picture(server: Server, client: openai.OpenAI, input_picture: Image.Image) -> None:
    picture = as_file(input_picture)
    answer = client.images.edit(image=[picture], prompt=PROMPT, n=2, size="auto", extra_body=extras(strength=0.5))
    assert answer.data
    for one, seed in zip(answer.data, (5, 6), strict=True):
        plain = redraw(server, "/img2img", {"img": picture}, strength=0.5, seed=seed, num_inference_steps=4)
        assert difference(decoded(one.b64_json), picture_of(plain)) <= IN_COMPANY


def test_the_pictures_of_a_request_are_one_job(server: Server, client: openai.OpenAI) -> None:
    answer = client.images.with_raw_response.generate(prompt=PROMPT, n=2, extra_body=extras(num_inference_steps=1))
    # The client has the images before the job store has the end.
    job = ended(server, f"/jobs/{answer.headers['job-id']}")
    assert (job["state"], job["images"], job["kind"]) == ("completed", 2, "txt2img")


def test_a_prompt_of_several_chunks_is_drawn_whole_and_one_that_is_too_long_is_refused(client: openai.OpenAI) -> None:
    answer = client.images.generate(prompt=f"{PROMPT}{', very nice' * 60}", extra_body=extras(num_inference_steps=1))
    assert answer.data
    assert not hasattr(answer.data[0], "prompt_dropped")
    with pytest.raises(openai.BadRequestError, match="more than 450 tokens; the excess begins with 'very nice") as caught:
        client.images.generate(prompt=f"{PROMPT}{', very nice' * 160}", extra_body=extras(num_inference_steps=1))
    assert caught.value.param == "prompt"


def test_formats_are_as_asked_for_and_compression_is_their_quality(client: openai.OpenAI) -> None:
    sizes = []
    asked: list[tuple[Literal["jpeg", "webp"], int]] = [("jpeg", 10), ("jpeg", 100), ("webp", 50)]
    for output_format, compression in asked:
        answer = client.images.generate(
            prompt=PROMPT, output_format=output_format, output_compression=compression, extra_body=extras(num_inference_steps=1)
        )
        assert answer.data
        assert answer.output_format == output_format
        decoded(answer.data[0].b64_json, output_format.upper())
        sizes.append(len(answer.data[0].b64_json or ""))
    assert sizes[0] < sizes[1] / 2


def test_the_served_model_is_listed_and_no_other_is_found(client: openai.OpenAI) -> None:
    (model,) = client.models.list().data
    assert (model.id, model.object) == ("demo", "model")
    assert 0 < model.created <= time.time()
    with pytest.raises(openai.NotFoundError, match="this server has only 'demo'") as caught:
        client.images.generate(model="gpt-image-1", prompt=PROMPT)
    assert (caught.value.code, caught.value.param) == ("model_not_found", "model")


def test_what_is_wrong_is_a_bad_request_that_names_openais_parameter(client: openai.OpenAI) -> None:
    wrong: list[tuple[dict[str, object], str]] = [
        ({"prompt": ""}, "prompt"),
        ({"n": 11}, "n"),
        ({"size": "100x64"}, "size"),
        ({"size": "1536x1024"}, "size"),
        ({"size": "large"}, "size"),
        ({"response_format": "url"}, "response_format"),
        ({"output_format": "gif"}, "output_format"),
        ({"output_compression": 50}, "output_compression"),
        ({"background": "transparent"}, "background"),
        ({"partial_images": 2}, "partial_images"),
        ({"stream": True, "n": 2}, "n"),
        ({"scheduler": "magic"}, "scheduler"),
        ({"strength": 0.5}, "strength"),
    ]
    for fields, param in wrong:
        with pytest.raises(openai.BadRequestError) as caught:
            client.images.generate(prompt=PROMPT, extra_body=fields)
        assert (caught.value.param, caught.value.type) == (param, "invalid_request_error"), fields
        assert "Traceback" not in caught.value.response.text


def test_what_is_wrong_with_an_edit_is_named_too(client: openai.OpenAI, input_picture: Image.Image, right_half_mask: Image.Image) -> None:
    picture, mask = as_file(input_picture), as_file(as_alpha(right_half_mask))
    wide = as_file(as_alpha(right_half_mask.resize((128, 64))))
    wrong: list[tuple[dict[str, Any], str, str]] = [
        ({"image": [picture, picture]}, "image", "exactly one"),
        ({"image": b"hello"}, "image", "not a PNG, JPEG or WebP"),
        ({"mask": as_file(right_half_mask)}, "mask", "no pixel is transparent"),
        ({"mask": wide}, "mask", "must have the image's size, 64 x 64, got 128 x 64"),
        ({"extra_body": {"n": "two"}}, "n", "valid integer"),
        ({"extra_body": {"strength": 0}}, "strength", "greater than 0"),
        ({"extra_body": {"sampler": "x"}}, "sampler", "not a known parameter"),
    ]
    for fields, param, told in wrong:
        with pytest.raises(openai.BadRequestError, match=told) as caught:
            client.images.edit(**{"image": picture, "mask": mask, "prompt": PROMPT, **fields})
        assert caught.value.param == param, fields


def test_paths_methods_and_bodies_that_are_not_openais_are_refused_in_its_form(server: Server, client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="no such path: /v1/chat/completions"):
        client.chat.completions.create(model="demo", messages=[])
    with server.client() as plain:
        answers = [
            (405, plain.get("/v1/images/generations")),
            (405, plain.post("/v1/models")),
            (413, plain.post("/v1/images/generations", json={"prompt": "x" * 2**20})),
            (415, plain.post("/v1/images/generations", content=b"{}", headers={"Content-Type": "text/plain"})),
            (415, plain.post("/v1/images/edits", json={"prompt": PROMPT})),
            (400, plain.post("/v1/images/edits", files={"prompt": b"x"})),
            (400, plain.post("/v1/images/generations", content=b"[", headers={"Content-Type": "application/json"})),
        ]
    for status, answer in answers:
        assert answer.status_code == status, answer.text
        assert set(answer.json()["error"]) == {"message", "type", "param", "code"}


def test_a_stream_shows_the_picture_coming_and_ends_with_that_of_a_plain_answer(client: openai.OpenAI) -> None:
    fields = extras(num_inference_steps=8)
    told = list(client.images.generate(prompt=PROMPT, stream=True, partial_images=3, output_format="webp", extra_body=fields))
    partials = [event for event in told if event.type == "image_generation.partial_image"]
    assert [event.partial_image_index for event in partials] == [0, 1, 2]
    assert told[:3] == partials
    (completed,) = told[3:]
    assert completed.type == "image_generation.completed"
    for event in told:
        assert (event.size, event.output_format, event.background) == ("64x64", "webp", "opaque")
        assert decoded(event.b64_json, "WEBP").size == (64, 64)
    assert completed.usage.total_tokens == 0
    assert completed.seed == 5  # type: ignore[attr-defined]
    plain = client.images.generate(prompt=PROMPT, output_format="webp", extra_body=fields)
    assert plain.data
    assert completed.b64_json == plain.data[0].b64_json


def test_a_stream_of_an_edit_without_partial_images_is_one_event(client: openai.OpenAI, input_picture: Image.Image) -> None:
    told = list(client.images.edit(image=as_file(input_picture), prompt=PROMPT, stream=True, extra_body=extras()))
    assert [event.type for event in told] == ["image_edit.completed"]
    assert decoded(told[0].b64_json).size == (64, 64)


def test_open_webui_gets_its_pictures(server: Server, input_picture: Image.Image) -> None:
    """The fields and their forms are those of its backend/open_webui/routers/images.py, commit 02530d50."""
    with server.client() as client:
        client.headers["Authorization"] = "Bearer unused"
        answers = [
            client.post(
                "/v1/images/generations",
                # With what the settings' "additional parameters" add.
                json={"model": "demo", "prompt": PROMPT, "n": 2, "size": "64x64", "response_format": "b64_json", "num_inference_steps": 2},
            )
        ]
        # One picture is sent as `image`, a list as `image[]`; a model that is not set is empty.
        for name, model in (("image", ""), ("image[]", "demo")):
            form = {"model": model, "prompt": PROMPT, "n": "1", "size": "64x64", "background": "auto", "response_format": "b64_json"}
            files = {name: ("4f9a.jpg", as_file(input_picture, "JPEG"), "image/jpeg")}
            answers.append(client.post("/v1/images/edits", data=form | {"num_inference_steps": "2"}, files=files))
    assert [answer.status_code for answer in answers] == [200] * 3, [answer.text[:300] for answer in answers]
    assert [len(answer.json()["data"]) for answer in answers] == [2, 1, 1]
    for answer in answers:
        for image in answer.json()["data"]:
            assert not image.get("url")
            assert decoded(image["b64_json"]).size == (64, 64)


def test_a_client_that_leaves_stops_all_its_pictures(server: Server, client: openai.OpenAI) -> None:
    before = cancelled(server)
    with pytest.raises(openai.APITimeoutError):
        client.with_options(timeout=2, max_retries=0).images.generate(
            prompt=PROMPT, n=3, size="256x256", extra_body={"num_inference_steps": 60}
        )
    give_up = time.monotonic() + 30
    while cancelled(server) < before + 3:
        assert time.monotonic() < give_up, server.log
        time.sleep(0.1)


def test_a_request_that_is_sent_again_with_its_key_gets_the_same_images(client: openai.OpenAI) -> None:
    """As the official client repeats a request whose response was lost."""
    key = {"Idempotency-Key": "openai again"}
    asked: dict[str, Any] = {"prompt": PROMPT, "n": 2, "extra_body": {"num_inference_steps": 2}, "extra_headers": key}
    first, again = (client.images.with_raw_response.generate(**asked) for _ in range(2))
    assert first.headers["job-id"] == again.headers["job-id"]
    assert [one.b64_json for one in first.parse().data or []] == [one.b64_json for one in again.parse().data or []]
    with pytest.raises(openai.UnprocessableEntityError) as refusal:
        client.images.generate(**{**asked, "prompt": "a blue square"})
    assert refusal.value.param == "Idempotency-Key"
    with pytest.raises(openai.BadRequestError, match="cannot be combined with stream"):
        client.images.generate(**{**asked, "n": 1, "stream": True})


def test_a_seed_of_minus_1_is_random(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"prompt": PROMPT, "extra_body": {"num_inference_steps": 2, "seed": -1}}
    first, second = (client.images.generate(**asked) for _ in range(2))
    assert (first.data or [])[0].b64_json != (second.data or [])[0].b64_json


def test_a_model_is_found_by_its_name(client: openai.OpenAI) -> None:
    assert client.models.retrieve("demo") == client.models.list().data[0]
    with pytest.raises(openai.NotFoundError, match="there is no model 'other', this server has only"):
        client.models.retrieve("other")
