"""A1111's API over HTTP, asked as Open WebUI, SillyTavern and LibreChat ask it and read as they read it."""

from __future__ import annotations

import base64
import io
import json
import re
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image

from tests.http.asking import PROMPT, as_file
from tests.http.servers import Server

# What A1111's own reader of infotexts looks for on the last line.
INFOTEXT_PAIRS = re.compile(r'\s*(\w[\w \-/]+):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)')
NO_PASSWORD = {"Authorization": "Basic"}  # as SillyTavern sends it where none is set


@pytest.fixture
def server(server: Server) -> Server:
    """One precision: `test_doors.py` tries every door in both."""
    return server


def post(server: Server, path: str, body: object, headers: dict[str, str] | None = None) -> httpx.Response:
    with server.client() as client:
        return client.post(f"/sdapi/v1/{path}", json=body, headers=headers)


def get(server: Server, path: str, **query: str) -> Any:
    with server.client() as client:
        response = client.get(path, params=query, headers=NO_PASSWORD)
    assert response.status_code == 200, response.text
    return response.json()


def draw(server: Server, path: str = "txt2img", **fields: object) -> dict[str, Any]:
    """Few steps; the answer, whose form is checked."""
    response = post(server, path, {"prompt": PROMPT, "steps": 3, "seed": 7, **fields})
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    assert set(answer) == {"images", "parameters", "info"}
    return answer


def decoded(image: str) -> Image.Image:
    content = base64.b64decode(image, validate=True)
    assert content.startswith(b"\x89PNG")
    return Image.open(io.BytesIO(content))


def pixels_of(image: str) -> np.ndarray:
    return np.asarray(decoded(image).convert("RGB")).astype(int)


def in_base64(picture: Image.Image) -> str:
    return base64.b64encode(as_file(picture)).decode("ascii")


def refused(response: httpx.Response, status: int) -> str:
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    body = response.json()
    assert set(body) == {"error", "detail", "body", "errors"}
    assert body["errors"] == body["detail"]
    assert "Traceback" not in response.text
    assert "/stable_diffusion" not in response.text
    detail: str = body["detail"]
    return detail


def test_open_webui_finds_the_model_and_draws(server: Server) -> None:
    """It sends an empty Authorization where none is set, posts all options back, and reads `images` and `info`."""
    with server.client() as client:
        client.headers["Authorization"] = ""
        options = client.get("/sdapi/v1/options").json()
        models = client.get("/sdapi/v1/sd-models").json()
        assert [(model["title"], model["model_name"]) for model in models] == [(options["sd_model_checkpoint"], "demo")]
        assert set(models[0]) == {"title", "model_name", "hash", "sha256", "filename", "config"}
        assert client.post("/sdapi/v1/options", json={**options, "sd_model_checkpoint": models[0]["title"]}).status_code == 200
        body = {"prompt": PROMPT, "batch_size": 2, "width": 64, "height": 72, "steps": 2, "negative_prompt": "green"}
        answer = client.post("/sdapi/v1/txt2img", json=body).json()
    assert [decoded(image).size for image in answer["images"]] == [(64, 72)] * 2
    assert json.loads(answer["info"])["negative_prompt"] == "green"


def test_sillytavern_connects_lists_and_draws(server: Server) -> None:
    """Its body holds its own settings too, and settings of extensions that are not there."""
    options = get(server, "/sdapi/v1/options")
    assert "forge_preset" not in options, "it would take the server for Forge"
    assert get(server, "/sdapi/v1/sd-models")[0]["title"] == options["sd_model_checkpoint"]
    samplers = [sampler["name"] for sampler in get(server, "/sdapi/v1/samplers")]
    schedules = [schedule["name"] for schedule in get(server, "/sdapi/v1/schedulers")]
    assert {"Euler a", "DPM++ 2M", "DDIM"} <= set(samplers)
    assert {"automatic", "karras"} <= set(schedules)
    assert [one["name"] for one in get(server, "/sdapi/v1/upscalers")] == ["None"]
    assert [one["name"] for one in get(server, "/sdapi/v1/latent-upscale-modes")] == []
    assert [one["model_name"] for one in get(server, "/sdapi/v1/sd-vae")] == []
    assert post(server, "options", {"sd_model_checkpoint": options["sd_model_checkpoint"]}, NO_PASSWORD).status_code == 200
    progress = get(server, "/sdapi/v1/progress")
    assert (progress["progress"], progress["state"]["job_count"]) == (0.0, 0), "it waits for that"
    body = {
        "url": server.url,
        "auth": "user:secret",
        "prompt": PROMPT,
        "negative_prompt": "",
        "sampler_name": "DPM++ 2M",
        "scheduler": "karras",
        "steps": 3,
        "cfg_scale": 7,
        "width": 64,
        "height": 64,
        "restore_faces": False,
        "enable_hr": False,
        "hr_upscaler": "Latent",
        "hr_scale": 1,
        "hr_additional_modules": [],
        "denoising_strength": 0.7,
        "hr_second_pass_steps": 0,
        "seed": 5,
        "override_settings": {"CLIP_stop_at_last_layers": 1},
        "override_settings_restore_afterwards": True,
        "clip_skip": 1,
        "save_images": True,
        "send_images": True,
        "do_not_save_grid": False,
        "do_not_save_samples": False,
    }
    response = post(server, "txt2img", body, NO_PASSWORD)
    assert response.status_code == 200, response.text
    assert "secret" not in response.text
    answer = response.json()
    decoded(answer["images"][0])
    info = json.loads(answer["info"])
    assert (info["sampler_name"], info["extra_generation_params"]) == ("DPM++ 2M", {"Schedule type": "Karras"})
    with server.client() as client:
        plain = {"prompt": PROMPT, "num_inference_steps": 3, "guidance_scale": 7, "seed": 5, "scheduler": "DPM++ 2M Karras"}
        expected = client.post("/txt2img", json={**plain, "output_format": "png"})
    assert np.array_equal(pixels_of(answer["images"][0]), pixels_of(base64.b64encode(expected.content).decode()))


def test_librechat_reads_the_picture_and_what_info_says(server: Server) -> None:
    """It sends no more than this; the size is the tests'."""
    body = {"prompt": PROMPT, "negative_prompt": "", "cfg_scale": 4.5, "steps": 22, "width": 64, "height": 64}
    answer = post(server, "txt2img", body).json()
    Image.open(io.BytesIO(base64.b64decode(answer["images"][0].split(",", 1)[0]))).verify()
    info = json.loads(answer["info"])
    assert isinstance(info["seed"], int)
    assert (info["width"], info["height"]) == (64, 64)
    assert PROMPT in info["infotexts"][0]


@pytest.mark.parametrize(
    ("path", "content"),
    [
        ("/sdapi/v1/prompt-styles", []),
        ("/sdapi/v1/scripts", {"txt2img": [], "img2img": []}),
        ("/sdapi/v1/cmd-flags", {}),
        ("/sdapi/v1/memory", {"ram": {}, "cuda": {}}),
        ("/internal/ping", {}),
    ],
)
def test_what_plugins_ask_at_start_is_there_and_empty(server: Server, path: str, content: object) -> None:
    assert get(server, path) == content


def test_the_demo_models_loras_and_textual_inversion_are_listed(server: Server) -> None:
    loras = get(server, "/sdapi/v1/loras")
    assert [(lora["name"], lora["alias"]) for lora in loras] == [(name, name) for name in ("hollow", "lcm", "pink")]
    assert all(lora["metadata"]["modelspec.description"] for lora in loras)
    embeddings = get(server, "/sdapi/v1/embeddings")
    assert (list(embeddings["loaded"]), embeddings["skipped"]) == (["sun"], {})


def test_every_listed_sampler_can_be_asked_for(server: Server) -> None:
    for sampler in get(server, "/sdapi/v1/samplers"):
        for name in (sampler["name"], *sampler["aliases"]):
            named = draw(server, sampler_name=name, steps=1, scheduler="Automatic")
            info = json.loads(named["info"])
            assert name.startswith(info["sampler_name"]) or info["sampler_name"] == sampler["name"]


def test_picture_i_is_the_one_of_seed_plus_i_and_says_so(server: Server) -> None:
    answer = draw(server, batch_size=2, n_iter=2, seed=2**32 - 2, sampler_name="Euler")
    info = json.loads(answer["info"])
    assert info["seed"] == 2**32 - 2
    assert info["all_seeds"] == [2**32 - 2, 2**32 - 1, 0, 1]
    assert len(info["infotexts"]) == len(info["all_prompts"]) == len(info["all_subseeds"]) == len(answer["images"]) == 4
    alone = draw(server, seed=1, sampler_name="Euler")
    assert np.abs(pixels_of(answer["images"][3]) - pixels_of(alone["images"][0])).max() <= 2, "as with every picture in company"
    assert np.abs(pixels_of(answer["images"][0]) - pixels_of(answer["images"][1])).max() > 2


def test_info_has_what_a1111s_clients_read(server: Server) -> None:
    info = json.loads(draw(server, cfg_scale=5, sampler_name="Heun")["info"])
    expected = {
        "prompt": PROMPT,
        "negative_prompt": "",
        "seed": 7,
        "all_seeds": [7],
        "subseed_strength": 0,
        "width": 64,
        "height": 64,
        "sampler_name": "Heun",
        "cfg_scale": 5.0,
        "steps": 3,
        "batch_size": 1,
        "restore_faces": False,
        "face_restoration_model": None,
        "sd_model_name": "demo",
        "sd_model_hash": get(server, "/sdapi/v1/sd-models")[0]["hash"],
        "sd_vae_name": None,
        "sd_vae_hash": None,
        "denoising_strength": None,
        "extra_generation_params": {},
        "index_of_first_image": 0,
        "styles": [],
        "clip_skip": 1,
        "is_using_inpainting_conditioning": False,
    }
    assert {name: info[name] for name in expected} == expected
    assert re.fullmatch(r"\d{14}", info["job_timestamp"])
    assert {"all_prompts", "all_negative_prompts", "subseed", "all_subseeds", "seed_resize_from_w", "seed_resize_from_h", "version"} <= set(
        info
    )


def test_the_file_says_how_it_was_drawn_as_a1111_reads_it(server: Server) -> None:
    answer = draw(server, negative_prompt="green, dark", sampler_name="Euler a")
    text = decoded(answer["images"][0]).info["parameters"]
    assert text == json.loads(answer["info"])["infotexts"][0]
    prompt, negative_prompt, last_line = text.split("\n")
    assert (prompt, negative_prompt) == (PROMPT, "Negative prompt: green, dark")
    pairs = dict(INFOTEXT_PAIRS.findall(last_line))
    assert len(pairs) >= 3
    expected = {"Steps": "3", "Sampler": "Euler a", "CFG scale": "7", "Seed": "7", "Size": "64x64", "Model": "demo"}
    assert {name: pairs[name] for name in expected} == expected


def test_the_request_comes_back_without_its_pictures_unless_they_are_asked_for(server: Server, input_picture: Image.Image) -> None:
    picture = in_base64(input_picture)
    answer = draw(server, "img2img", init_images=[picture], hr_scale=2)
    parameters = answer["parameters"]
    assert (parameters["prompt"], parameters["steps"], parameters["denoising_strength"]) == (PROMPT, 3, 0.75)
    assert (parameters["init_images"], parameters["mask"]) == (None, None)
    assert draw(server, "img2img", init_images=[picture], include_init_images=True)["parameters"]["init_images"] == [picture]
    assert draw(server, send_images=False)["images"] == []


def test_img2img_stretches_as_a1111_does_and_is_otherwise_the_plain_one(server: Server, input_picture: Image.Image) -> None:
    wide = input_picture.resize((128, 64))
    answer = draw(server, "img2img", init_images=[f"data:image/png;base64,{in_base64(wide)}"], width=79, height=64, denoising_strength=0.9)
    info = json.loads(answer["info"])
    assert (info["width"], info["height"], info["denoising_strength"]) == (72, 64, 0.9)
    stretched = wide.resize((72, 64), Image.Resampling.LANCZOS)
    data = {"prompt": PROMPT, "num_inference_steps": 3, "guidance_scale": 7, "seed": 7, "strength": 0.9, "width": 72, "height": 64}
    with server.client() as client:
        plain = client.post("/img2img", files={"img": as_file(stretched)}, data={"data": json.dumps({**data, "output_format": "png"})})
    assert np.array_equal(pixels_of(answer["images"][0]), pixels_of(base64.b64encode(plain.content).decode()))
    cut = draw(server, "img2img", init_images=[in_base64(wide)], width=72, height=64, denoising_strength=0.9, resize_mode=1)
    assert not np.array_equal(pixels_of(cut["images"][0]), pixels_of(answer["images"][0]))


def test_a_mask_is_repainted_where_it_is_white_or_inverted_where_it_is_black(
    server: Server, input_picture: Image.Image, right_half_mask: Image.Image
) -> None:
    original = np.asarray(input_picture).astype(int)
    sent = {"init_images": [in_base64(input_picture)], "mask": in_base64(right_half_mask), "denoising_strength": 1.0}

    def changed(**fields: object) -> np.ndarray:
        """By column."""
        answer = draw(server, "img2img", **sent, **fields)
        assert json.loads(answer["info"])["extra_generation_params"]["Masked content"] == "original"
        difference: np.ndarray = np.abs(pixels_of(answer["images"][0]) - original).max(axis=(0, 2))
        return difference

    sharp = changed(mask_blur=0)
    assert sharp[:32].max() == 0
    assert sharp[32:].min() > 0
    inverted = changed(mask_blur=0, inpainting_mask_invert=1)
    assert inverted[32:].max() == 0
    assert inverted[:32].min() > 0
    blurred = changed()
    assert blurred[28:32].max() > 0, "the edge blends"
    assert blurred[:16].max() == 0


@pytest.mark.parametrize(
    ("path", "changes", "status", "told"),
    [
        ("txt2img", {"steps": 151}, 422, "steps: must be less than or equal to 150"),
        ("txt2img", {"sampler_name": "DPM fast"}, 404, "sampler_name: unknown scheduler 'DPM fast', allowed are PNDM"),
        ("txt2img", {"scheduler": "Polyexponential", "sampler_name": "Euler"}, 422, "scheduler: unknown noise levels 'Polyexponential'"),
        ("txt2img", {"batch_size": 6, "n_iter": 2}, 422, "batch_size * n_iter must be at most 10"),
        ("txt2img", {"enable_hr": True}, 422, "enable_hr: "),
        ("txt2img", {"override_settings": {"sd_model_checkpoint": "sdxl"}}, 404, "there is no model 'sdxl', this server has only 'demo'"),
        ("img2img", {}, 404, "init_images: the image is missing"),
        ("img2img", {"init_images": ["not base64!"]}, 400, "init_images: not base64"),
        ("img2img", {"init_images": [base64.b64encode(b"GIF89a").decode()]}, 400, "init_images: not a PNG, JPEG or WebP image"),
        ("img2img", {"init_images": ["\ud800"]}, 400, "init_images: not base64"),
        ("options", {"sd_model_checkpoint": "sdxl"}, 404, "there is no model 'sdxl'"),
        ("txt2img", {"override_settings": {"sd_vae": "nice"}}, 404, "sd_vae: must be Automatic or None on this server, got 'nice'"),
    ],
    ids=str,
)
def test_what_is_wrong_is_told_in_a1111s_form(server: Server, path: str, changes: dict[str, object], status: int, told: str) -> None:
    body = json.dumps({"prompt": PROMPT, "steps": 2, **changes})
    with server.client() as client:
        response = client.post(f"/sdapi/v1/{path}", content=body, headers={"Content-Type": "application/json"})
    assert told in refused(response, status)


def test_a_bad_mask_names_the_mask(server: Server, input_picture: Image.Image) -> None:
    picture = in_base64(input_picture)
    for mask, status, told in (
        ("!", 400, "mask: not base64"),
        (in_base64(Image.new("L", (64, 32))), 422, "mask: 64 x 32 does not have the proportions of the image"),
    ):
        response = post(server, "img2img", {"prompt": PROMPT, "init_images": [picture], "mask": mask})
        assert told in refused(response, status)


def test_bodies_are_limited_but_pictures_have_room(server: Server) -> None:
    with server.client() as client:
        not_json = client.post("/sdapi/v1/txt2img", content=b"prompt=x", headers={"Content-Type": "text/plain"})
        assert "Content-Type must be application/json" in refused(not_json, 415)
        malformed = client.post("/sdapi/v1/txt2img", content=b"{", headers={"Content-Type": "application/json"})
        assert "body: not valid JSON" in refused(malformed, 422)
    assert "must have at most 1048576 bytes" in refused(post(server, "txt2img", {"prompt": PROMPT, "infotext": "x" * 2**20}), 413)
    noise = Image.frombytes("RGB", (1000, 700), np.random.default_rng(1).bytes(1000 * 700 * 3))
    answer = draw(server, "img2img", init_images=[in_base64(noise)], steps=2, width=64, height=64)
    assert decoded(answer["images"][0]).size == (64, 64)


def test_what_reaches_no_endpoint_is_refused_in_the_same_form(server: Server) -> None:
    with server.client() as client:
        assert refused(client.get("/sdapi/v1/nothing"), 404) == "no such path: /sdapi/v1/nothing"
        assert refused(client.post("/internal/ping"), 405) == "POST is not allowed here, use GET"


def test_a_page_of_another_site_cannot_start_or_cancel_work(server: Server) -> None:
    """A form or a `no-cors` fetch asks nobody before it sends; browsers say where it comes from."""
    with server.client() as client:
        for site, status in (("cross-site", 403), ("same-origin", 200), ("same-site", 200), ("none", 200)):
            headers = {"Sec-Fetch-Site": site, "Origin": "https://example.org"}
            response = client.post("/sdapi/v1/interrupt", headers=headers)
            assert response.status_code == status
            assert client.get("/sdapi/v1/options", headers=headers).status_code == 200
            if status == 403:
                assert "pages of other sites" in refused(response, 403)
                plain = client.post("/txt2img", json={"prompt": PROMPT}, headers=headers)
                assert (plain.status_code, plain.json()["error"]["type"]) == (403, "cross_site")


def test_thousands_of_values_are_refused_before_they_are_read(server: Server) -> None:
    with server.client() as client:
        for path in ("img2img", "txt2img"):
            content = b'{"init_images": [' + b"0," * 200_000 + b"0]}"
            response = client.post(f"/sdapi/v1/{path}", content=content, headers={"Content-Type": "application/json"})
            assert "must have at most 16384 values" in refused(response, 422)


def test_the_file_says_nothing_where_that_is_not_wanted(server: Server) -> None:
    answer = draw(server, override_settings={"enable_pnginfo": False})
    assert "parameters" not in decoded(answer["images"][0]).info
    assert PROMPT in json.loads(answer["info"])["infotexts"][0]


def test_what_utf_8_cannot_say_is_refused_in_the_same_form(server: Server) -> None:
    with server.client() as client:
        for body in ('{"prompt": "\\ud800"}', '{"\\ud800": 1, "\\ud800": 2}'):
            response = client.post("/sdapi/v1/txt2img", content=body, headers={"Content-Type": "application/json"})
            refused(response, 422)


def test_the_callers_own_jobs_can_be_watched_and_interrupted_and_no_others(server: Server) -> None:
    alice, bob = {"Authorization": "Basic YWxpY2U6eA=="}, {"Authorization": "Basic Ym9iOng="}
    with server.client() as client, ThreadPoolExecutor() as pool:

        def progress(headers: dict[str, str]) -> dict[str, Any]:
            answer: dict[str, Any] = client.get("/sdapi/v1/progress", headers=headers).json()
            return answer

        drawing = pool.submit(post, server, "txt2img", {"prompt": PROMPT, "steps": 150, "batch_size": 4}, alice)
        deadline = time.monotonic() + 30
        while not (told := progress(alice))["state"]["sampling_step"] and time.monotonic() < deadline:
            time.sleep(0.05)
        assert 0 < told["progress"] < 1
        assert told["state"]["job_count"] == 4
        assert told["state"]["sampling_steps"] == 151, "PNDM takes one step more"
        assert told["eta_relative"] > 0
        assert progress(bob)["state"]["job_count"] == 0
        assert client.post("/sdapi/v1/interrupt", headers=bob).json() == {}
        time.sleep(0.2)
        assert progress(alice)["state"]["job_count"] == 4
        assert client.post("/sdapi/v1/interrupt", headers=alice).json() == {}
        assert "cancel" in refused(drawing.result(timeout=30), 499)
        deadline = time.monotonic() + 10
        while (idle := progress(alice))["state"]["job_count"] and time.monotonic() < deadline:
            time.sleep(0.05)
        assert (idle["progress"], idle["state"]["job_count"]) == (0.0, 0)


def test_a_request_that_is_sent_again_with_its_key_gets_the_same_images(server: Server) -> None:
    body = {"prompt": PROMPT, "steps": 2, "n_iter": 2}
    key = {"Idempotency-Key": "a1111 again"}
    first, again = (post(server, "txt2img", body, key) for _ in range(2))
    assert first.status_code == again.status_code == 200, again.text
    assert first.headers["job-id"] == again.headers["job-id"]
    assert first.json()["images"] == again.json()["images"]
    assert json.loads(first.json()["info"])["all_seeds"] == json.loads(again.json()["info"])["all_seeds"]
    assert "another request" in refused(post(server, "txt2img", {**body, "prompt": "a blue square"}, key), 422)
    other = post(server, "txt2img", body)
    assert other.headers["job-id"] != first.headers["job-id"]


def test_an_asynchronous_response_is_refused_by_name(server: Server) -> None:
    answer = refused(post(server, "txt2img", {"prompt": PROMPT, "steps": 2}, {"Prefer": "respond-async"}), 422)
    assert answer.startswith("Prefer: respond-async is offered by /txt2img")


def test_what_a1111_takes_is_taken(server: Server) -> None:
    """Requests that A1111 answers: without a prompt, with any seed, with a ControlNet that has nothing to do."""
    empty = draw(server, prompt="", width=64, height=64)
    assert json.loads(empty["info"])["prompt"] == ""
    large = json.loads(draw(server, seed=3088633670041979)["info"])
    assert large["seed"] == 3088633670041979 % 2**32
    assert large["all_seeds"] == [large["seed"]]
    assert len(draw(server, alwayson_scripts={"ControlNet": {"args": []}, "controlnet": {"args": [{"enabled": False}]}})["images"]) == 1


def test_at_strength_0_the_image_comes_back_unchanged(server: Server, input_picture: Image.Image) -> None:
    answer = draw(server, "img2img", init_images=[in_base64(input_picture)], denoising_strength=0, width=64, height=64)
    expected = input_picture.resize((64, 64), Image.Resampling.LANCZOS)
    assert np.array_equal(pixels_of(answer["images"][0]), np.asarray(expected.convert("RGB")).astype(int))
    assert "Denoising strength: 0" in json.loads(answer["info"])["infotexts"][0]


@pytest.mark.parametrize("name", ["hypernetworks", "face-restorers", "realesrgan-models", "script-info", "extensions"])
def test_lists_of_what_is_not_here_are_empty(server: Server, name: str) -> None:
    assert get(server, f"/sdapi/v1/{name}") == []


def test_there_is_nothing_to_refresh_or_skip(server: Server) -> None:
    assert post(server, "refresh-checkpoints", {}).json() is None
    skipped = post(server, "skip", {})
    assert (skipped.status_code, skipped.json()) == (200, {})


def test_png_info_reads_what_a_file_says(server: Server, input_picture: Image.Image) -> None:
    image = draw(server, negative_prompt="green", width=72)["images"][0]
    said = post(server, "png-info", {"image": f"data:image/png;base64,{image}"}).json()
    text = decoded(image).text["parameters"]  # type: ignore[attr-defined]
    assert (said["info"], said["items"]) == (text, {"parameters": text})
    values = said["parameters"]
    assert (values["Prompt"], values["Negative prompt"], values["Steps"], values["Seed"]) == (PROMPT, "green", "3", "7")
    assert (values["Size-1"], values["Size-2"]) == ("72", "64")
    assert post(server, "png-info", {"image": in_base64(input_picture)}).json() == {"info": "", "items": {}, "parameters": {}}
    assert refused(post(server, "png-info", {"image": "not base64"}), 400).startswith("image: not base64")
    assert refused(post(server, "png-info", {}), 422).startswith("image: is required")
