"""Whatever a client may write into a request is refused by name or lies within the documented limits, and then it can be drawn."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy
from PIL import Image
from starlette.responses import Response

from stable_diffusion.api import responses
from stable_diffusion.api.a1111 import parameters as a1111_parameters
from stable_diffusion.api.a1111 import responses as a1111_responses
from stable_diffusion.api.openai import parameters as openai_parameters
from stable_diffusion.api.openai import responses as openai_responses
from stable_diffusion.api.reproduce.reproduction import reproduction_of
from stable_diffusion.api.tasks import consecutive_tasks, image_task, text_task
from stable_diffusion.core.errors import InvalidRequest, ServiceError
from stable_diffusion.core.requests import (
    GenerationRequest,
    ImageToImageRequest,
    LoraRequest,
    TextToImageRequest,
    parse_image_to_image,
    parse_reproduction,
    parse_text_to_image,
)
from stable_diffusion.core.schedulers import SCHEDULERS
from stable_diffusion.core.types import GeneratedImage, Task
from stable_diffusion.images import infotext
from stable_diffusion.images.decode import read_description
from stable_diffusion.images.encode import encode
from stable_diffusion.models.folder import DEMO_FOLDER, check_model
from stable_diffusion.models.loras import LoraFile, Loras
from stable_diffusion.web.body import parse_json
from tests.tasks import served

MODEL = check_model(DEMO_FOLDER)
LONGEST_MESSAGE = 6000  # of an error, in characters: it repeats what was sent only in part
INPUT = Image.new("RGB", (64, 64))


def lora(name: str, alias: str) -> LoraFile:
    file = LoraFile(Path(f"{name}.safetensors"), name, alias, {}, {"unet": {}, "text_encoder": {}}, 1000, 0)
    file.__dict__["hash"] = "0123456789ab"  # else read from the file
    return file


SERVED = served(MODEL, loras=Loras({"hollow": lora("hollow", "v2"), "Outline, thin": lora("Outline, thin", "hollow")}, {}))

# -- what clients may write --------------------------------------------------------------------------------------------------------------

ODD_TEXTS = st.sampled_from(
    [
        "\0",
        "\ud800",
        "x\udfff",
        "\r\nSet-Cookie: a=b",
        "1e309",
        "NaN",
        "-1",
        "true",
        " ",
        "\u202e",
        "&amp;amp;lt;",
        "ﬁ",
        "é" * 2001,
        "x" * 2000,
    ]
)
TEXTS = st.text(st.characters(codec=None), max_size=40) | ODD_TEXTS
NUMBERS = (
    st.integers()
    | st.integers(0, 1100)
    | st.sampled_from([0, -1, 64, 512, 1024, 2**32 - 1, 2**32, 2**63, 2**64, -(2**200), 10**400, -0.0, 5e-324, 1.7976931348623157e308])
    | st.floats()
    | st.floats(0, 30)
)
VALUES = st.recursive(
    st.none() | st.booleans() | NUMBERS | TEXTS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXTS, inner, max_size=4),
    max_leaves=8,
)
# Pieces of A1111's grammar, right and wrong.
PROMPTS = TEXTS | st.lists(
    st.sampled_from(
        [
            "a ",
            "red",
            "(",
            ")",
            "[",
            "]",
            ":",
            "1.2",
            ":0.5]",
            "|",
            " AND ",
            " BREAK ",
            "\\",
            "<lora:",
            "hollow",
            ">",
            "<lora:Outline, thin:-1>",
        ]
    ),
    max_size=20,
).map("".join)
SIDES = st.sampled_from([64, 72, 512, 1024])
RIGHT_VALUES: dict[str, SearchStrategy[Any]] = {
    "prompt": PROMPTS,
    "negative_prompt": PROMPTS,
    "prompt_syntax": st.sampled_from(["plain", "a1111"]),
    "clip_skip": st.integers(1, 3),
    "loras": st.lists(
        st.fixed_dictionaries({"name": st.sampled_from(["hollow", "v2", "Outline, thin"])}, optional={"weight": st.floats(-10, 10)}),
        max_size=3,
    ),
    "override_settings": st.fixed_dictionaries({}, optional={"CLIP_stop_at_last_layers": st.integers(0, 4)}),
    "width": SIDES,
    "height": SIDES,
    "num_inference_steps": st.integers(1, 150),
    "steps": st.integers(1, 150),
    "guidance_scale": st.floats(0, 30),
    "cfg_scale": st.floats(0, 30),
    "guidance_end": st.floats(0, 1),
    "seed": st.integers(0, 2**32 - 1),
    "strength": st.floats(0, 1),
    "denoising_strength": st.floats(0, 1),
    "scheduler": st.sampled_from([name for names in SCHEDULERS.values() for name in names] + ["Karras", "normal"]),
    "sampler_name": st.sampled_from([names[0] for names in SCHEDULERS.values()]),
    "size": st.sampled_from(["auto", "64x64", "1024x512"]),
    "n": st.integers(1, 10),
    "batch_size": st.integers(1, 10),
    "safety_check": st.sampled_from([True, False, None]),
    "metadata": st.booleans(),
    "output_format": st.sampled_from(["png", "jpeg", "webp", None]),
    "init_images": st.just(["iVBORw0KGgo="]),
}


def documents_of(fields: list[str]) -> SearchStrategy[dict[str, Any]]:
    """Mostly right, with a few values that are anything at all."""
    right = st.fixed_dictionaries({}, optional={name: RIGHT_VALUES[name] for name in fields if name in RIGHT_VALUES})
    wrong = st.dictionaries(st.sampled_from(fields) | TEXTS, VALUES, max_size=2)
    required = st.fixed_dictionaries({name: RIGHT_VALUES[name] for name in ("prompt", "init_images") if name in fields})
    return st.builds(lambda *parts: {name: value for part in parts for name, value in part.items()}, required, right, st.just({}) | wrong)


# -- what the doors make of it -----------------------------------------------------------------------------------------------------------

Parsed = tuple[GenerationRequest, int]


def of_plain_text(document: dict[str, Any]) -> Parsed:
    return parse_text_to_image(document), 1


def of_plain_picture(document: dict[str, Any]) -> Parsed:
    return parse_image_to_image(document), 1


def of_openai(document: dict[str, Any]) -> Parsed:
    own, parameters = openai_parameters.parse_generation(document)
    return parameters, own.n


def of_openai_form(document: dict[str, Any]) -> Parsed:
    """As a form has it: every value is text."""
    texts = {name: value if isinstance(value, str) else json.dumps(value) for name, value in document.items()}
    own, parameters = openai_parameters.parse_edit(openai_parameters.read_texts(texts))
    return parameters, own.n


def of_a1111_text(document: dict[str, Any]) -> Parsed:
    asked = a1111_parameters.read_text_to_image(document)
    return asked.parameters, asked.count


def of_a1111_picture(document: dict[str, Any]) -> Parsed:
    asked = a1111_parameters.read_image_to_image(document)
    return asked.parameters, asked.count


Door = tuple[Callable[[dict[str, Any]], Parsed], list[str], Callable[[ServiceError], Response]]
_OPENAI_FIELDS = [
    *openai_parameters.OpenaiParameters.model_fields,
    *openai_parameters.generation_fields(ImageToImageRequest),
    "steps",
    "cfg_scale",
]
DOORS: list[Door] = [
    (of_plain_text, [name for name in ImageToImageRequest.model_fields if name != "strength"], responses.error_response),
    (of_plain_picture, list(ImageToImageRequest.model_fields), responses.error_response),
    (of_openai, [name for name in _OPENAI_FIELDS if name != "strength"], openai_responses.error_response),
    (of_openai_form, _OPENAI_FIELDS, openai_responses.error_response),
    (of_a1111_text, list(a1111_parameters.TextToImageBody.model_fields), a1111_responses.error_response),
    (of_a1111_picture, list(a1111_parameters.ImageToImageBody.model_fields), a1111_responses.error_response),
]


@pytest.mark.parametrize(("parse", "fields", "error_response"), DOORS, ids=[door[0].__name__ for door in DOORS])
def test_a_request_is_refused_by_name_or_lies_within_the_limits_and_can_be_drawn(
    parse: Callable[[dict[str, Any]], Parsed], fields: list[str], error_response: Callable[[ServiceError], Response]
) -> None:
    accepted, refused = [], []

    @settings(max_examples=400)
    @given(documents_of(fields))
    @example({"prompt": "x"})
    @example({"prompt": "x", "seed": float("nan")})
    @example({"prompt": "\ud800"})
    @example({"\ud800": 1, "prompt": "x"})
    def check(document: dict[str, Any]) -> None:
        body = json.dumps(document)
        try:
            parameters, count = parse(parse_json(body, "body"))
            assert_within_limits(parameters, count)
            assert_can_be_drawn(parameters, count)
        except ServiceError as error:
            assert_can_be_told(error, error_response)
            refused.append(body)
        else:
            accepted.append(body)

    check()
    print(f"accepted {len(accepted)}, refused {len(refused)}")
    assert min(len(accepted), len(refused)) >= 20  # else nothing was tried


def assert_within_limits(parameters: GenerationRequest, count: int) -> None:
    """The numbers that docs/api.md names."""
    assert len(parameters.prompt) <= 2000 * 18  # one character of a ligature may become several letters
    assert parameters.num_inference_steps is None or 1 <= parameters.num_inference_steps <= 150
    assert parameters.guidance_scale is None or 0 <= parameters.guidance_scale <= 30
    assert 0 <= parameters.eta <= 1
    assert 0 <= parameters.guidance_end <= 1
    assert 0 <= parameters.preview_every_steps <= 150
    assert parameters.seed is None or 0 <= parameters.seed <= 4294967295
    assert all(side is None or (64 <= side <= 2048 and side % 8 == 0) for side in (parameters.width, parameters.height))
    assert parameters.scheduler is None or parameters.scheduler in SCHEDULERS
    assert 1 <= count <= 10
    assert parameters.prompt_syntax in ("plain", "a1111")
    assert 1 <= parameters.clip_skip <= 12
    assert len(parameters.loras) <= 8
    assert all(1 <= len(one.name) <= 200 and -10 <= one.weight <= 10 for one in parameters.loras)
    for name, kind in (("num_inference_steps", int), ("clip_skip", int), ("guidance_scale", float), ("seed", int), ("metadata", bool)):
        value = getattr(parameters, name)
        assert value is None or type(value) is kind, name  # a boolean is no number
    if isinstance(parameters, ImageToImageRequest):
        assert 0 < parameters.strength <= 1


def assert_can_be_drawn(parameters: GenerationRequest, count: int) -> None:
    """Resolved, told in headers, written into a file and read from it: nothing raises but a refusal of too much work."""
    task = task_of(parameters)
    tasks = consecutive_tasks(task, count, check_model(DEMO_FOLDER))
    assert sum(one.width * one.height * one.num_inference_steps for one in tasks) <= 400_000_000
    assert 1 <= task.parts <= 4
    assert task.clip_skip <= MODEL.text_layers
    assert {one.name for one in task.loras} <= {"hollow", "Outline, thin"}
    picture = GeneratedImage(Image.new("RGB", (8, 8)), None, task.prompt, task.negative_prompt, "cpu", "float32")
    for name, value in responses.parameter_headers(task, picture, MODEL).items():
        assert re.fullmatch(r"[ -~]*", value), name
        assert value == value.strip(), name
    said = infotext.read(infotext.write(task, picture, MODEL))
    assert (said.prompt, said.negative_prompt) == (task.prompt, task.negative_prompt)
    assert_is_drawn_again(parameters, task, said)
    content = encode(picture.image, "png", infotext.write(task, picture, MODEL))
    assert read_description(content, "picture") == infotext.write(task, picture, MODEL)


def task_of(parameters: GenerationRequest) -> Task:
    if isinstance(parameters, ImageToImageRequest):
        return image_task(parameters, SERVED, INPUT)
    assert isinstance(parameters, TextToImageRequest)
    return text_task(parameters, SERVED)


def assert_is_drawn_again(parameters: GenerationRequest, task: Task, said: infotext.Infotext) -> None:
    """Its file says what the task needs: prompts, LoRAs with weights, and the rest."""
    fields = reproduction_of(said, MODEL).fields
    names = ("prompt_syntax", "clip_skip", "guidance_scale", "num_inference_steps", "guidance_end")
    assert {name: fields[name] for name in names} == {name: getattr(task, name) for name in names}
    again = parameters.model_copy(update={"loras": [LoraRequest(**one) for one in fields["loras"]]})
    assert task_of(again).loras == task.loras


def assert_can_be_told(error: ServiceError, error_response: Callable[[ServiceError], Response]) -> None:
    answer = error_response(error)
    assert 400 <= answer.status_code < 500
    json.loads(bytes(answer.body).decode("utf-8"))
    assert len(error.message) < LONGEST_MESSAGE
    assert all(re.fullmatch(r"[ -~]*", value) for value in answer.headers.values())


# -- JSON itself -------------------------------------------------------------------------------------------------------------------------

JSON_PIECES = st.sampled_from(
    [
        '"prompt"',
        '"seed"',
        ":",
        ",",
        "{",
        "}",
        "[",
        "]",
        "1e309",
        "-0",
        "NaN",
        "Infinity",
        "-Infinity",
        "null",
        "true",
        '"\\ud800"',
        '"\\u0000"',
    ]
    + ["1" * 5000, "0x10", "01", "1.", ".5", "'x'", "\ufeff", "/**/", "\n", "\0"]
)


@settings(max_examples=600)
@given(st.binary(max_size=200) | st.lists(JSON_PIECES, max_size=30).map("".join) | st.text(max_size=60))
@example(b'{"prompt": "x", "prompt": "y"}')
@example(b"[" * 100_000)
@example(b'{"a":' * 10_000 + b"1" + b"}" * 10_000)
@example(b"\xff\xfe{}")
def test_a_body_is_a_json_object_or_refused(body: bytes | str) -> None:
    try:
        document = parse_json(body, "body")
    except InvalidRequest as error:
        assert_can_be_told(error, responses.error_response)
    else:
        assert isinstance(document, dict)
        assert "NaN" not in repr(list(document.values()))


@settings(max_examples=300)
@given(st.lists(st.tuples(st.sampled_from(["prompt", "seed", "a"]), VALUES), min_size=1, max_size=5))
def test_a_name_that_is_given_twice_is_refused(pairs: list[tuple[str, Any]]) -> None:
    body = "{" + ",".join(f'"{name}": {json.dumps(value)}' for name, value in pairs) + "}"
    names = [name for name, _ in pairs]
    constants = re.search(r"NaN|Infinity", re.sub(r'"(\\.|[^"\\])*"', "", body))
    if len(set(names)) < len(names) or constants:
        with pytest.raises(InvalidRequest, match="is given more than once|is not a number in JSON"):
            parse_json(body, "body")
    else:
        assert list(parse_json(body, "body")) == names


@settings(max_examples=300)
@given(
    documents_of(["dry_run", "metadata", "output_format"]).map(lambda document: {**document, "prompt": "x"})
    | st.dictionaries(TEXTS, VALUES)
)
def test_wishes_for_a_reproduction_are_read_or_refused(document: dict[str, Any]) -> None:
    try:
        parse_reproduction(document)
    except ServiceError as error:
        assert_can_be_told(error, responses.error_response)


@settings(max_examples=300)
@given(
    st.text(st.characters(codec=None), max_size=200)
    | st.lists(ODD_TEXTS | st.sampled_from(["Steps: 20", ", ", "\n", "Seed: ", '"', "Size: 9x9"])).map("".join)
)
def test_a_text_in_a_pictures_file_is_read_or_refused(text: str) -> None:
    try:
        infotext.read(text, "picture")
    except ServiceError as error:
        assert_can_be_told(error, responses.error_response)


@pytest.mark.parametrize("value", [True, "20", "1e309", [20], {"a": 20}, 20.5])
@pytest.mark.parametrize("field", ["num_inference_steps", "seed", "width", "preview_every_steps"])
def test_only_whole_numbers_are_whole_numbers(field: str, value: object) -> None:
    with pytest.raises(InvalidRequest, match=field):
        parse_text_to_image({"prompt": "x", field: value})


@pytest.mark.parametrize("number", ["1e309", "-1e309", "NaN", "Infinity", "-Infinity", "-0.1", "30.000001", "true", '"7"'])
@pytest.mark.parametrize("parse", [of_plain_text, of_openai])
def test_only_finite_numbers_within_their_limits_are_numbers(parse: Callable[[dict[str, Any]], Parsed], number: str) -> None:
    with pytest.raises(InvalidRequest, match="guidance_scale|not a number in JSON"):
        parse(parse_json(f'{{"prompt": "x", "guidance_scale": {number}}}', "body"))


def test_minus_zero_is_zero() -> None:
    assert parse_text_to_image(parse_json('{"prompt": "x", "guidance_scale": -0, "seed": -0}', "body")).seed == 0
