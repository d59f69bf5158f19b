"""The OpenAPI document is right and says what the request models say."""

from __future__ import annotations

import re

from openapi_spec_validator import validate

from stable_diffusion.api.openai.parameters import parse_generation
from stable_diffusion.core.requests import ImageToImageRequest, TextToImageRequest, parse_image_to_image, parse_text_to_image
from stable_diffusion.server.openapi import document
from stable_diffusion.server.pages import PAGE


def test_the_document_is_valid_openapi() -> None:
    validate(document("stable_diffusion_fp32", "1.0.0"))


def test_every_field_is_described_with_its_limits() -> None:
    schemas = document("name", "1")["components"]["schemas"]
    for model in (TextToImageRequest, ImageToImageRequest):
        properties = schemas[model.__name__]["properties"]
        assert set(properties) == set(model.model_fields)
        assert all(text["description"] for text in properties.values())
    steps = schemas["TextToImageRequest"]["properties"]["num_inference_steps"]
    assert (steps["minimum"], steps["maximum"], steps["default"]) == (1, 150, 50)
    height = schemas["TextToImageRequest"]["properties"]["height"]
    assert height["multipleOf"] == 8
    assert height["anyOf"][0] == {"type": "integer", "minimum": 64, "maximum": 1024}


def test_the_examples_are_valid_requests() -> None:
    paths = document("name", "1")["paths"]
    parse_text_to_image(paths["/txt2img"]["post"]["requestBody"]["content"]["application/json"]["example"])
    for path in ("/img2img", "/inpaint"):
        form = paths[path]["post"]["requestBody"]["content"]["multipart/form-data"]["schema"]
        parse_image_to_image(form["properties"]["data"]["example"])


def test_openais_sizes_have_a_pattern() -> None:
    size = document("name", "1")["components"]["schemas"]["OpenaiGeneration"]["properties"]["size"]
    assert [bool(re.search(size["pattern"], one)) for one in ("auto", "512x64", "auto1", "512x", "x64", "large")] == [True] * 2 + [
        False
    ] * 4


def test_openais_parameters_are_described_and_their_example_is_a_valid_request() -> None:
    made = document("name", "1")
    for name in ("OpenaiGeneration", "OpenaiEdit"):
        assert all(text["description"] for text in made["components"]["schemas"][name]["properties"].values())
    assert "strength" not in made["components"]["schemas"]["OpenaiGeneration"]["properties"]
    parse_generation(made["paths"]["/v1/images/generations"]["post"]["requestBody"]["content"]["application/json"]["example"])


def test_the_page_loads_nothing_from_elsewhere() -> None:
    assert "http" not in PAGE
    assert "//" not in PAGE.replace("<!DOCTYPE html>", "")
