"""The OpenAPI document is valid and matches the request models and the responses."""

from __future__ import annotations

import json
import re
from typing import Any

import jsonschema  # type: ignore[import-untyped]
import pytest
from openapi_spec_validator import validate
from PIL import Image

from stable_diffusion.api import responses
from stable_diffusion.api.dialect import dialect_of
from stable_diffusion.api.openai import responses as openai
from stable_diffusion.api.openai.parameters import OpenaiParameters, parse_generation
from stable_diffusion.core.errors import GenerationFailed
from stable_diffusion.core.requests import ImageToImageRequest, TextToImageRequest, parse_image_to_image, parse_text_to_image
from stable_diffusion.core.types import GeneratedImage, LoraChoice, Progress
from stable_diffusion.models.folder import DEMO_FOLDER, check_model
from stable_diffusion.server.openapi import document
from stable_diffusion.server.pages import PAGE
from tests.tasks import make_task

MODEL = check_model(DEMO_FOLDER)
IMAGE = GeneratedImage(Image.new("RGB", (64, 64)), False, "the end", "its end", decoded_again=True)
PREVIEW = Image.new("RGB", (8, 8))


def check_against(openapi: dict[str, Any], schema: dict[str, Any], value: Any) -> None:
    jsonschema.validate(value, {**schema, "components": openapi["components"]})


def test_the_document_is_valid_openapi_and_its_components_have_short_names() -> None:
    openapi = document("stable_diffusion_fp32", "1.0.0")
    validate(openapi)
    assert all(name.isalnum() for name in openapi["components"]["schemas"]), "two models with the same name get long component names"


@pytest.mark.parametrize("path", ["/txt2img", "/jobs/{job_id}", "/v1/models", "/sdapi/v1/samplers", "/internal/ping"])
def test_the_front_doors_refusals_match_their_schema(path: str) -> None:
    openapi = document("name", "1")
    refusal = (dialect_of(path) or responses).refusal(401, "unauthorized", "an API key is needed")
    (operation,) = (operation for method, operation in openapi["paths"][path].items() if method in ("get", "post"))
    schema = operation["responses"]["401"]["content"]["application/json"]["schema"]
    check_against(openapi, schema, json.loads(bytes(refusal.body)))
    with pytest.raises(jsonschema.ValidationError):
        check_against(openapi, schema, {})


def events_of_an_image() -> list[bytes]:
    progress = Progress(position=1, step=0, steps=8, seconds_left=1.5)
    return [
        responses.progress_event(progress),
        responses.progress_event(Progress(position=0, step=1, steps=8, seconds_left=0)),
        responses.preview_event(1, PREVIEW, make_task()),
        responses.completed_event(make_task(), IMAGE, MODEL, "png", {"differs": "nothing"}),
        responses.error_event(GenerationFailed("not enough memory"), "A test"),
    ]


def events_of_an_openai_image() -> list[bytes]:
    parameters = OpenaiParameters.model_validate({"stream": True})
    return [
        openai.partial_image_event("image_generation.partial_image", make_task(), PREVIEW, 0, parameters),
        openai.completed_event("image_generation.completed", make_task(), IMAGE, MODEL, parameters),
        openai.error_event(GenerationFailed("not enough memory")),
    ]


def test_events_match_their_schemas() -> None:
    openapi = document("name", "1")
    sent_by_path = {"/txt2img": events_of_an_image(), "/v1/images/generations": events_of_an_openai_image()}
    for path, sent in sent_by_path.items():
        kinds = openapi["paths"][path]["post"]["responses"]["200"]["content"]["text/event-stream"]["schema"]["oneOf"]
        schemas = {kind["properties"]["event"]["const"]: kind["properties"]["data"]["contentSchema"] for kind in kinds}
        events = [re.fullmatch(r"event: (.+)\ndata: (.+)\n\n", event.decode()) for event in sent]
        assert [event[1] for event in events if event] == list(schemas)
        for event in events:
            assert event
            check_against(openapi, schemas[event[1]], json.loads(event[2]))
            with pytest.raises(jsonschema.ValidationError):
                check_against(openapi, schemas[event[1]], {})


def test_every_header_of_an_image_is_documented() -> None:
    documented = document("name", "1")["paths"]["/img2img"]["post"]["responses"]["200"]["headers"]
    task = make_task(kind="img2img", eta=0.5, loras=(LoraChoice("hollow", 0.8, 0.8, "0" * 12, 1000),))
    assert documented.keys() - {"Job-Id"} == responses.parameter_headers(task, IMAGE, MODEL).keys()


def test_every_field_is_described_with_its_limits() -> None:
    schemas = document("name", "1")["components"]["schemas"]
    for model in (TextToImageRequest, ImageToImageRequest):
        properties = schemas[model.__name__]["properties"]
        assert set(properties) == set(model.model_fields)
        assert all(text["description"] for text in properties.values())
    steps = schemas["TextToImageRequest"]["properties"]["num_inference_steps"]
    assert steps["anyOf"][0] == {"type": "integer", "minimum": 1, "maximum": 150}
    height = schemas["TextToImageRequest"]["properties"]["height"]
    assert height["multipleOf"] == 8
    assert height["anyOf"][0] == {"type": "integer", "minimum": 64, "maximum": 2048}


def test_the_examples_are_valid_requests() -> None:
    paths = document("name", "1")["paths"]
    parse_text_to_image(paths["/txt2img"]["post"]["requestBody"]["content"]["application/json"]["example"])
    for path in ("/img2img", "/inpaint"):
        form = paths[path]["post"]["requestBody"]["content"]["multipart/form-data"]["schema"]
        parse_image_to_image(form["properties"]["data"]["example"])


def test_openais_size_pattern_accepts_exactly_valid_sizes() -> None:
    size = document("name", "1")["components"]["schemas"]["OpenaiGeneration"]["properties"]["size"]
    assert [bool(re.search(size["pattern"], one)) for one in ("auto", "512x64", "auto1", "512x", "x64", "large")] == [True] * 2 + [
        False
    ] * 4


def test_openais_parameters_are_described_and_their_example_is_a_valid_request() -> None:
    openapi = document("name", "1")
    for name in ("OpenaiGeneration", "OpenaiEdit"):
        assert all(text["description"] for text in openapi["components"]["schemas"][name]["properties"].values())
    assert "strength" not in openapi["components"]["schemas"]["OpenaiGeneration"]["properties"]
    parse_generation(openapi["paths"]["/v1/images/generations"]["post"]["requestBody"]["content"]["application/json"]["example"])


def test_the_swagger_page_loads_nothing_from_other_hosts() -> None:
    assert "http" not in PAGE
    assert "//" not in PAGE.replace("<!DOCTYPE html>", "")
