"""LoRAs, textual inversions and prompts as people write them, over HTTP: every API, a server with folders of files, good and bad."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from stable_diffusion.images import infotext
from stable_diffusion.images.decode import read_description
from tests.http.asking import PROMPT, as_file, draw, picture_of, redraw, refused
from tests.http.following import ended, start
from tests.http.servers import ROOT, Server, serve
from tests.lora_files import ATTENTION, TEXT_ENCODER, changes, save_as_diffusers, save_as_kohya
from tests.tensor_files import write, write_raw

STEPS = 3
SEED = 5
LONG = ", ".join(["a small red circle on a blue background"] * 22)  # 200 tokens


@dataclass(frozen=True)
class Offering:
    """A server and the folders that it looks into."""

    server: Server
    loras: Path
    embeddings: Path


@pytest.fixture(scope="module")
def offering(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Offering]:
    folder = tmp_path_factory.mktemp("offering")
    loras, embeddings = folder / "loras", folder / "embeddings"
    save_as_diffusers(loras / "hollow.safetensors", changes(ATTENTION, seed=1))
    save_as_kohya(loras / "outline.safetensors", changes(ATTENTION, seed=2), metadata={"ss_output_name": "Outline v2", "ss_steps": "100"})
    save_as_kohya(loras / "style" / "words.safetensors", {}, changes(TEXT_ENCODER, seed=3, size=0.3))
    write(loras / "loha.safetensors", {"lora_unet_conv_in.hada_w1_a": (4, 4)})
    write_raw(loras / "four_gigabytes.safetensors", b"{}", header_size=4 * 2**30)
    (loras / "pickle.pt").write_bytes(b"\x80\x04.")
    embeddings.mkdir()
    vectors = torch.randn(2, 96, generator=torch.Generator().manual_seed(0))
    save_file({"emb_params": vectors}, embeddings / "striped.safetensors")
    (embeddings / "old.pt").write_bytes(b"\x80\x04.")
    changed = {"BENTOML_CONFIG": "configuration.yaml", "SD_LORAS": str(loras), "SD_EMBEDDINGS": str(embeddings)}
    with serve(ROOT / "fp32", "service:svc", folder / "home", changed) as server:
        yield Offering(server, loras, embeddings)


@pytest.fixture(scope="module")
def server(offering: Offering) -> Server:
    return offering.server


@pytest.fixture(scope="module")
def plain(server: Server) -> np.ndarray[Any, Any]:
    return pixels(native(server))


def native(server: Server, **fields: Any) -> httpx.Response:
    return draw(server, num_inference_steps=STEPS, seed=SEED, **fields)


def pixels(response: httpx.Response) -> np.ndarray[Any, Any]:
    return np.asarray(picture_of(response)).astype(int)


def apart(one: np.ndarray[Any, Any], other: np.ndarray[Any, Any]) -> int:
    return int(np.abs(one - other).max())


def of_a1111(server: Server, path: str = "txt2img", **fields: object) -> dict[str, Any]:
    with server.client() as client:
        body = {"prompt": PROMPT, "steps": STEPS, "seed": SEED, "cfg_scale": 7.5, **fields}
        response = client.post(f"/sdapi/v1/{path}", json=body)
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


def first_pixels(answer: dict[str, Any]) -> np.ndarray[Any, Any]:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(answer["images"][0]))).convert("RGB")).astype(int)


def get(server: Server, path: str) -> Any:
    with server.client() as client:
        response = client.get(path)
    assert response.status_code == 200, response.text
    return response.json()


def described(content: bytes) -> infotext.Infotext:
    text = read_description(content, "picture")
    assert text is not None
    return infotext.read(text)


# -- what there is -----------------------------------------------------------------------------------------------------------------------


def test_what_may_be_named_is_listed(server: Server) -> None:
    capabilities = get(server, "/capabilities")
    names = [{"name": "hollow", "alias": "hollow"}, {"name": "outline", "alias": "Outline v2"}, {"name": "words", "alias": "words"}]
    assert capabilities["loras"] == names
    assert capabilities["embeddings"] == ["striped"]
    listed = get(server, "/sdapi/v1/loras")
    assert [set(one) for one in listed] == [{"name", "alias", "path", "metadata"}] * 3
    assert [(one["name"], one["alias"]) for one in listed] == [(one["name"], one["alias"]) for one in names]
    assert listed[1]["metadata"] == {"ss_output_name": "Outline v2", "ss_steps": "100"}
    assert not any(one["path"].startswith("/") for one in listed), "no path of the machine"
    embeddings = get(server, "/sdapi/v1/embeddings")
    facts = {"step": None, "sd_checkpoint": None, "sd_checkpoint_name": None}
    assert embeddings["loaded"] == {"striped": {**facts, "shape": 96, "vectors": 2}}
    assert list(embeddings["skipped"]) == ["old.pt"]


# -- the native API ----------------------------------------------------------------------------------------------------------------------


def test_a_lora_changes_the_image_by_its_weight_and_the_answer_says_so(server: Server, plain: np.ndarray[Any, Any]) -> None:
    full = native(server, loras=[{"name": "hollow"}])
    half = native(server, loras=[{"name": "hollow", "weight": 0.5}])
    assert json.loads(full.headers["loras"]) == [{"name": "hollow", "weight": 1.0}]
    assert apart(pixels(full), plain) > 8
    assert apart(pixels(half), plain) > 8
    assert apart(pixels(full), pixels(half)) > 2
    nothing = native(server, loras=[{"name": "hollow", "weight": 0}])
    assert apart(pixels(nothing), plain) == 0
    assert "loras" not in nothing.headers


def test_several_loras_and_an_alias(server: Server) -> None:
    both = native(server, loras=[{"name": "hollow", "weight": 0.5}, {"name": "Outline v2", "weight": 0.5}])
    assert json.loads(both.headers["loras"]) == [{"name": "hollow", "weight": 0.5}, {"name": "outline", "weight": 0.5}]
    one = native(server, loras=[{"name": "outline", "weight": 0.5}])
    assert apart(pixels(both), pixels(one)) > 2
    tagged = native(server, prompt=f"{PROMPT} <lora:hollow:0.5><lora:Outline v2:0.5>", prompt_syntax="a1111")
    assert apart(pixels(tagged), pixels(both)) == 0


def test_a_lora_of_the_text_encoder_works(server: Server, plain: np.ndarray[Any, Any]) -> None:
    assert apart(pixels(native(server, loras=[{"name": "words"}])), plain) > 2


def test_other_kinds_of_images_have_loras(server: Server, input_picture: Image.Image, right_half_mask: Image.Image) -> None:
    files = {"img": as_file(input_picture), "mask": as_file(right_half_mask)}
    for path, sent in (("/img2img", {"img": files["img"]}), ("/inpaint", files)):
        without = redraw(server, path, sent, seed=SEED, num_inference_steps=STEPS)
        with_lora = redraw(server, path, sent, seed=SEED, num_inference_steps=STEPS, loras=[{"name": "hollow"}])
        assert apart(pixels(with_lora), pixels(without)) > 2, path


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("hallow", "loras: there is no LoRA 'hallow' here, this server has: hollow, outline, words"),
        ("../hollow", "loras: there is no LoRA '../hollow' here"),
        ("loha", "loras: 'loha' cannot be used: it is a LoHa, which is not supported"),
        ("four_gigabytes", "loras: 'four_gigabytes' cannot be used: not a safetensors file"),
        ("pickle", "loras: 'pickle' cannot be used: a pickle can run code when it is loaded, only safetensors are served"),
    ],
)
def test_a_name_that_cannot_be_used_is_refused_with_what_there_is(server: Server, name: str, told: str) -> None:
    response = native(server, loras=[{"name": name}])
    assert told in refused(response, 422, "loras")
    assert response.json()["error"]["type"] == "lora_not_found"
    assert native(server).status_code == 200


def test_a_wrong_prompt_is_refused_with_its_place(server: Server) -> None:
    told = refused(native(server, prompt="a (circle:11)", prompt_syntax="a1111"), 400, "prompt")
    assert told == "prompt: character 11: the weight '11' is not between -10 and 10"
    assert native(server, prompt="a (circle:11)").status_code == 200, "text"


def test_clip_skip_changes_the_image_and_has_a_limit(server: Server, plain: np.ndarray[Any, Any]) -> None:
    skipped = native(server, clip_skip=2)
    assert skipped.headers["clip_skip"] == "2"
    assert apart(pixels(skipped), plain) > 2
    assert "clip_skip: must be at most 3" in refused(native(server, clip_skip=4), 400, "clip_skip")


def test_a_textual_inversion_is_used_by_its_name(server: Server) -> None:
    striped, other = native(server, prompt=f"{PROMPT}, striped"), native(server, prompt=f"{PROMPT}, spotted")
    assert apart(pixels(striped), pixels(other)) > 2


def test_a_prompt_is_used_to_its_450th_token_and_refused_beyond(server: Server) -> None:
    long_prompt = PROMPT + ", very nice" * 140
    with_end = native(server, prompt=f"{long_prompt}, green")
    assert "prompt_dropped" not in with_end.headers
    assert apart(pixels(with_end), pixels(native(server, prompt=f"{long_prompt}, blue"))) > 0
    for field in ("prompt", "negative_prompt"):
        told = refused(native(server, **{field: PROMPT + ", very nice" * 160}), 400, field)
        assert told.startswith(f"{field}: more than 450 tokens; the excess begins with 'very nice")


# -- OpenAI's API ------------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def client(server: Server) -> Iterator[openai.OpenAI]:
    with openai.DefaultHttpxClient(trust_env=False) as connection:
        yield openai.OpenAI(base_url=f"{server.url}/v1", api_key="unused", http_client=connection, timeout=120)


def extras(**fields: object) -> dict[str, object]:
    return {"num_inference_steps": STEPS, "seed": SEED, **fields}


def test_openais_client_names_loras_in_extra_body(server: Server, client: openai.OpenAI) -> None:
    loras = [{"name": "hollow", "weight": 0.8}]
    answer = client.images.generate(prompt=PROMPT, extra_body=extras(loras=loras))
    assert answer.data
    expected = pixels(native(server, loras=loras))
    assert apart(first_pixels({"images": [answer.data[0].b64_json]}), expected) == 0
    with pytest.raises(openai.UnprocessableEntityError, match="this server has: hollow, outline, words") as caught:
        client.images.generate(prompt=PROMPT, extra_body=extras(loras=[{"name": "hallow"}]))
    assert (caught.value.code, caught.value.param) == ("lora_not_found", "loras")


def test_openais_edits_have_loras_as_json(client: openai.OpenAI, input_picture: Image.Image) -> None:
    picture = as_file(input_picture)

    def edited(**fields: object) -> np.ndarray[Any, Any]:
        answer = client.images.edit(image=picture, prompt=PROMPT, extra_body=extras(**fields))
        assert answer.data
        return first_pixels({"images": [answer.data[0].b64_json]})

    assert apart(edited(loras=json.dumps([{"name": "hollow"}])), edited()) > 2


# -- A1111's API -------------------------------------------------------------------------------------------------------------------------


def test_tags_in_a_prompt_are_loras_and_the_file_says_them(server: Server) -> None:
    prompt = f"{PROMPT} <lora:hollow:0.8>"
    answer = of_a1111(server, prompt=prompt)
    expected = native(server, loras=[{"name": "hollow", "weight": 0.8}])
    assert apart(first_pixels(answer), pixels(expected)) == 0
    info = json.loads(answer["info"])
    assert info["prompt"] == prompt
    said = described(base64.b64decode(answer["images"][0]))
    assert said.prompt == prompt
    assert said.values["Lora hashes"] == info["extra_generation_params"]["Lora hashes"]
    name, _, content_hash = said.values["Lora hashes"].partition(": ")
    assert (name, len(content_hash), set(content_hash) <= set("0123456789abcdef")) == ("hollow", 12, True)


def test_an_unknown_tag_is_refused_in_a1111s_form(server: Server) -> None:
    with server.client() as client:
        response = client.post("/sdapi/v1/txt2img", json={"prompt": f"{PROMPT} <lora:hallow:1>", "steps": 2})
    assert response.status_code == 422
    assert "there is no LoRA 'hallow' here, this server has: hollow, outline, words" in response.json()["detail"]


def test_weights_and_a_long_negative_prompt_are_used(server: Server) -> None:
    weighed, other = of_a1111(server, prompt="a (red:1.5) circle"), of_a1111(server, prompt="a (red:0.5) circle")
    assert apart(first_pixels(weighed), first_pixels(other)) > 2
    with_long = of_a1111(server, negative_prompt=f"{LONG}, green")
    info = json.loads(with_long["info"])
    assert (info["negative_prompt_dropped"], info["comments"]) == (None, [])
    assert apart(first_pixels(with_long), first_pixels(of_a1111(server, negative_prompt=f"{LONG}, yellow"))) > 0


def test_what_is_too_long_is_cut_and_remarked(server: Server) -> None:
    answer = of_a1111(server, prompt=PROMPT + ", very nice" * 160)
    info = json.loads(answer["info"])
    assert info["prompt_dropped"].endswith("very nice")
    assert info["comments"] == [f"prompt: too long, these last words were not used: {info['prompt_dropped']}"]


def test_clip_skip_is_an_option_of_the_request(server: Server) -> None:
    answer = of_a1111(server, override_settings={"CLIP_stop_at_last_layers": 2})
    assert json.loads(answer["info"])["clip_skip"] == 2
    assert apart(first_pixels(answer), pixels(native(server, clip_skip=2))) == 0
    assert described(base64.b64decode(answer["images"][0])).values["Clip skip"] == "2"
    with server.client() as client:
        response = client.post("/sdapi/v1/txt2img", json={"prompt": PROMPT, "override_settings": {"CLIP_stop_at_last_layers": 4}})
    assert response.status_code == 422
    assert response.json()["detail"].startswith("CLIP_stop_at_last_layers: must be at most 3"), response.text


def test_sillytaverns_body_draws_with_a_lora(server: Server) -> None:
    """As it sends it: with its own settings, a clip skip of 1 in two places, and a negative prompt as long as people's."""
    body: dict[str, Any] = {
        "url": server.url,
        "auth": "",
        "prompt": f"masterpiece, ((best quality)), {PROMPT}, [blurry], <lora:hollow:0.7>",
        "negative_prompt": f"(worst quality, low quality:1.4), {LONG}",
        "sampler_name": "DPM++ 2M",
        "scheduler": "karras",
        "cfg_scale": 7,
        "width": 64,
        "height": 64,
        "restore_faces": False,
        "enable_hr": False,
        "hr_upscaler": "Latent",
        "denoising_strength": 0.7,
        "override_settings": {"CLIP_stop_at_last_layers": 1},
        "override_settings_restore_afterwards": True,
        "clip_skip": 1,
        "save_images": True,
        "send_images": True,
        "do_not_save_grid": False,
        "do_not_save_samples": False,
    }
    info = json.loads(of_a1111(server, **body)["info"])
    assert info["extra_generation_params"]["Lora hashes"].startswith("hollow: ")
    assert info["comments"] == []


def test_webuiapis_body_draws_with_a_lora(server: Server, input_picture: Image.Image) -> None:
    """What webuiapi 0.9 sends: every field of A1111's, most of them at their defaults."""
    body: dict[str, Any] = {
        "enable_hr": False,
        "hr_scale": 2,
        "hr_upscaler": "Latent",
        "hr_second_pass_steps": 0,
        "hr_resize_x": 0,
        "hr_resize_y": 0,
        "denoising_strength": 0.7,
        "firstphase_width": 0,
        "firstphase_height": 0,
        "prompt": f"{PROMPT} <lora:outline:1>",
        "styles": [],
        "subseed": -1,
        "subseed_strength": 0.0,
        "seed_resize_from_h": 0,
        "seed_resize_from_w": 0,
        "batch_size": 1,
        "n_iter": 1,
        "cfg_scale": 7.0,
        "width": 64,
        "height": 64,
        "restore_faces": False,
        "tiling": False,
        "do_not_save_samples": False,
        "do_not_save_grid": False,
        "negative_prompt": LONG,
        "eta": 1.0,
        "s_churn": 0,
        "s_tmax": 0,
        "s_tmin": 0,
        "s_noise": 1,
        "override_settings": {},
        "override_settings_restore_afterwards": True,
        "script_args": [],
        "script_name": None,
        "send_images": True,
        "save_images": False,
        "alwayson_scripts": {},
        "sampler_name": "Euler a",
        "scheduler": "automatic",
        "use_deprecated_controlnet": False,
    }
    assert "outline: " in json.loads(of_a1111(server, **body)["info"])["infotexts"][0]
    picture = base64.b64encode(as_file(input_picture)).decode()
    redrawn = of_a1111(server, "img2img", **body, init_images=[picture], resize_mode=0, inpainting_fill=0, include_init_images=False)
    assert "outline: " in json.loads(redrawn["info"])["infotexts"][0]


# -- jobs and /reproduce -----------------------------------------------------------------------------------------------------------------


def test_a_job_that_nobody_waits_for_has_its_loras(server: Server) -> None:
    fields: dict[str, Any] = {"seed": SEED, "num_inference_steps": STEPS, "loras": [{"name": "hollow"}], "clip_skip": 2}
    job = ended(server, start(server, **fields).headers["location"])
    assert job["state"] == "completed"
    with server.client() as client:
        fetched = client.get(job["picture"], headers={"Accept": "image/png"})
    waited_for = draw(server, **fields)
    assert apart(pixels(fetched), pixels(waited_for)) == 0
    assert {name: fetched.headers[name] for name in ("loras", "clip_skip")} == {
        name: waited_for.headers[name] for name in ("loras", "clip_skip")
    }


def reproduce(server: Server, picture: bytes) -> httpx.Response:
    with server.client() as client:
        return client.post("/reproduce", files={"picture": picture}, headers={"Accept": "image/png"})


@pytest.mark.parametrize(
    "fields",
    [
        {"loras": [{"name": "hollow", "weight": 0.8}, {"name": "words", "weight": -0.4}]},
        {"prompt": "a (red:1.2) circle AND a square :0.5 <lora:outline:0.6>", "prompt_syntax": "a1111", "loras": [{"name": "hollow"}]},
        {"prompt": f"{LONG}, striped", "clip_skip": 2},
    ],
    ids=str,
)
def test_an_image_is_drawn_again_to_the_last_bit(server: Server, fields: dict[str, Any]) -> None:
    first = native(server, **fields)
    again = reproduce(server, first.content)
    assert again.status_code == 200, again.text
    assert again.headers["differs"] == "nothing"
    assert again.content == first.content


def test_an_image_of_a1111s_api_is_drawn_again(server: Server) -> None:
    answer = of_a1111(server, prompt=f"{PROMPT} <lora:hollow:0.8:0.3>", negative_prompt="[green|dark]")
    content = base64.b64decode(answer["images"][0])
    again = reproduce(server, content)
    assert again.headers["differs"] == "nothing"
    assert apart(pixels(again), first_pixels(answer)) == 0


def test_files_that_come_change_and_go_are_noticed(offering: Offering) -> None:
    server, file = offering.server, offering.loras / "new.safetensors"
    assert "there is no LoRA 'new'" in refused(native(server, loras=[{"name": "new"}]), 422)
    save_as_diffusers(file, changes(ATTENTION, seed=7))
    with server.client() as client:
        assert client.post("/sdapi/v1/refresh-loras").status_code == 200
    first = native(server, loras=[{"name": "new"}])
    assert first.status_code == 200, first.text
    save_as_diffusers(file, changes(ATTENTION, seed=8))
    again = reproduce(server, first.content)
    said, here = described(first.content).values["Lora hashes"], described(again.content).values["Lora hashes"]
    assert said != here
    assert again.headers["differs"] == f"LoRA new: {said.partition(': ')[2]}, here {here.partition(': ')[2]}"
    assert apart(pixels(again), pixels(first)) > 2
    file.unlink()
    assert "there is no LoRA 'new'" in refused(reproduce(server, first.content), 422)
    assert [one["name"] for one in get(server, "/sdapi/v1/loras")] == ["hollow", "outline", "words"]


@pytest.mark.parametrize("fault", ["cut", "numbers", "shapes"])
def test_a_bad_file_is_refused_by_name_and_the_server_goes_on(offering: Offering, fault: str) -> None:
    server, file = offering.server, offering.loras / "bad.safetensors"
    factors = changes(ATTENTION, seed=9)
    down, up = next(iter(factors.values()))
    if fault == "numbers":
        down[0, 0] = torch.nan
    save_as_diffusers(file, factors if fault != "shapes" else {next(iter(factors)): (down[:, :-1].contiguous(), up)})
    if fault == "cut":
        file.write_bytes(file.read_bytes()[:-100])
    told = {
        "cut": (422, "loras: 'bad' cannot be used: has "),
        "shapes": (422, "it is for another kind of model"),
        "numbers": (400, "loras: bad: it contains NaN or infinity"),
    }
    status, message = told[fault]
    for _ in range(2):
        assert message in refused(native(server, loras=[{"name": "bad"}]), status, "loras")
    file.unlink()
    assert native(server, loras=[{"name": "hollow"}]).status_code == 200


def test_the_metrics_count_loras_and_chunks(server: Server) -> None:
    native(server, loras=[{"name": "hollow"}], prompt=LONG)
    with server.client() as client:
        page = client.get("/metrics").text
    values = {name: float(value) for name, _, value in (line.rpartition(" ") for line in page.splitlines() if not line.startswith("#"))}
    assert values["stable_diffusion_loras"] >= 1
    assert values["stable_diffusion_lora_bytes"] > 10_000
    assert values["stable_diffusion_unet_rows_with_loras_total"] >= 2 * STEPS
    assert values['stable_diffusion_prompt_chunks_bucket{le="1.0"}'] < values["stable_diffusion_prompt_chunks_count"]
