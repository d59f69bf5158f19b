"""OpenAI's parameters become our request models; what is wrong is named."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from stable_diffusion.api.openai.parameters import OpenaiParameters, generation_fields, parse_edit, parse_generation, read_texts
from stable_diffusion.core.errors import InvalidRequest, UnknownParameter
from stable_diffusion.core.requests import ImageToImageRequest

PROMPT = "a red circle"


def test_a_prompt_alone_is_a_request_for_one_png_of_the_models_size() -> None:
    own, parameters = parse_generation({"prompt": PROMPT})
    assert (own.n, own.output_format, own.stream, own.partial_images) == (1, "png", False, 0)
    assert (parameters.prompt, parameters.width, parameters.height, parameters.seed) == (PROMPT, None, None, None)


def test_size_becomes_width_and_height_and_extensions_keep_their_names() -> None:
    extensions = {"seed": 7, "negative_prompt": "blue", "num_inference_steps": 5, "guidance_scale": 3, "scheduler": "euler a"}
    _, parameters = parse_generation({"prompt": PROMPT, "size": "72x64", "safety_check": False, **extensions})
    assert (parameters.width, parameters.height) == (72, 64)
    assert parameters.scheduler == "EulerAncestralDiscreteScheduler"
    assert parameters.safety_check is False


def test_null_stands_for_the_default_of_every_field() -> None:
    names = {*OpenaiParameters.model_fields, *generation_fields(ImageToImageRequest)} - {"prompt"}
    assert parse_edit({"prompt": PROMPT, **dict.fromkeys(names)}) == parse_edit({"prompt": PROMPT})


@pytest.mark.parametrize("name", ["sampler", "width", "preview_every_steps", "frames"])
def test_what_neither_openai_nor_this_server_can_do_anything_with_is_an_unknown_parameter(name: str) -> None:
    with pytest.raises(UnknownParameter, match=rf"^{name}: is not a known parameter, allowed are model, n, size"):
        parse_edit({"prompt": PROMPT, name: 1})


STILL = "this server makes one still image (PNG, JPEG or WebP)"


@pytest.mark.parametrize("value", [1, "<svg/>", True, {}, []])
@pytest.mark.parametrize("name", ["frame_duration_ms", "svg", "markup"])
def test_what_is_of_moving_pictures_and_of_shapes_is_refused_by_name(name: str, value: object) -> None:
    for parse in (parse_generation, parse_edit):
        assert refusal(parse, {name: value}) == (name, f"{name}: cannot be given, {STILL}")
        assert parse({"prompt": PROMPT, name: None}) == parse({"prompt": PROMPT})


@pytest.mark.parametrize("name", ["gif", "svg"])
def test_formats_of_moving_pictures_and_of_shapes_are_refused_by_name(name: str) -> None:
    for parse in (parse_generation, parse_edit):
        assert refusal(parse, {"output_format": name}) == ("output_format", f"output_format: {STILL}, not {name}")


@pytest.mark.parametrize("value", ["bmp", "GIF", 1, [], {}])
def test_any_other_format_is_refused_with_those_that_there_are(value: object) -> None:
    field, message = refusal(parse_generation, {"output_format": value})
    assert (field, message) == ("output_format", "output_format: must be one of 'jpeg', 'png' or 'webp'")


@pytest.mark.parametrize("count", [0, 2, 24, -1, 10**60])
def test_more_frames_than_one_are_refused(count: int) -> None:
    for parse in (parse_generation, parse_edit):
        assert refusal(parse, {"frame_count": count}) == ("frame_count", f"frame_count: must be 1, {STILL}")
    assert refusal(parse_edit, read_texts({"frame_count": str(count)}))[0] == "frame_count"


@pytest.mark.parametrize("value", ["two", 1.5, True, []])
def test_what_is_no_number_of_frames_is_refused(value: object) -> None:
    assert refusal(parse_generation, {"frame_count": value}) == ("frame_count", "frame_count: must be a valid integer")


def test_one_frame_is_what_is_made() -> None:
    for given in ({"frame_count": 1}, {"frame_count": None}, read_texts({"frame_count": "1"})):
        assert parse_edit({"prompt": PROMPT, **given}) == parse_edit({"prompt": PROMPT})


def refusal(parse: Callable[[dict[str, Any]], object], fields: dict[str, Any]) -> tuple[str | None, str]:
    """The field and the message that OpenAI's form of errors has, of a request that is wrong but not of an unknown parameter."""
    with pytest.raises(InvalidRequest) as caught:
        parse({"prompt": PROMPT, **fields})
    assert (caught.value.status, caught.value.type) == (400, "invalid_request")
    return caught.value.problems[0].field, caught.value.message


@pytest.mark.parametrize(("alias", "name"), [("steps", "num_inference_steps"), ("cfg_scale", "guidance_scale")])
def test_other_names_of_our_extensions_are_known(alias: str, name: str) -> None:
    assert getattr(parse_edit({"prompt": PROMPT} | read_texts({alias: "6"}))[1], name) == 6
    assert parse_generation({"prompt": PROMPT, alias: None, name: 6}) == parse_generation({"prompt": PROMPT, alias: 6, name: None})
    with pytest.raises(InvalidRequest, match=f"^{alias}: is another name of {name}, only one"):
        parse_generation({"prompt": PROMPT, alias: 6, name: 6})


@pytest.mark.parametrize("value", [1, True, "x", [], {"type": "auto"}])
def test_what_makes_no_difference_may_be_anything(value: object) -> None:
    for name in ("quality", "style", "moderation", "input_fidelity", "complexity", "user", "safety_identifier"):
        assert parse_generation({"prompt": PROMPT, name: value})[0].n == 1


def test_a_number_of_a_form_is_not_read_where_it_is_longer_than_any_number() -> None:
    brackets = "[" * 40 + "]" * 40
    assert read_texts({"n": brackets, "seed": "7"}) == {"n": brackets, "seed": 7}
    with pytest.raises(InvalidRequest, match="^n: "):
        parse_edit({"prompt": PROMPT} | read_texts({"n": "1" + " " * 64}))


def test_strength_is_for_edits_only() -> None:
    assert parse_edit({"prompt": PROMPT, "strength": 0.5})[1].strength == 0.5
    with pytest.raises(UnknownParameter, match="^strength"):
        parse_generation({"prompt": PROMPT, "strength": 0.5})


@pytest.mark.parametrize(
    ("texts", "read"),
    [
        ({"n": "2", "seed": "0", "strength": "0.5", "guidance_scale": "7"}, {"n": 2, "seed": 0, "strength": 0.5, "guidance_scale": 7}),
        ({"stream": "true", "safety_check": "false"}, {"stream": True, "safety_check": False}),
        ({"prompt": "7", "negative_prompt": "true", "user": "1"}, {"prompt": "7", "negative_prompt": "true", "user": "1"}),
        ({"model": "", "seed": ""}, {}),
    ],
    ids=["numbers", "flags", "texts", "not filled in"],
)
def test_texts_of_a_form_become_the_values_that_they_stand_for(texts: dict[str, str], read: dict[str, Any]) -> None:
    assert read_texts(texts) == read
    assert parse_edit({"prompt": PROMPT} | read_texts(texts))


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("n", "1.0"),
        ("n", "true"),
        ("n", "two"),
        ("n", "[1]"),
        ("seed", "9" * 5000),
        ("seed", "[" * 100_000),
        ("strength", "NaN"),
        ("strength", "1e999"),
        ("stream", "1"),
        ("stream", "True"),
        ("safety_check", "no"),
    ],
)
def test_texts_that_are_no_such_number_or_flag_are_refused(name: str, text: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        parse_edit({"prompt": PROMPT} | read_texts({name: text}))
    assert [problem.field for problem in caught.value.problems] == [name]


def test_what_does_not_go_together_is_refused() -> None:
    for fields, field in (
        ({"stream": True, "n": 2}, "n"),
        ({"partial_images": 1}, "partial_images"),
        ({"output_compression": 50}, "output_compression"),
    ):
        with pytest.raises(InvalidRequest) as caught:
            parse_generation({"prompt": PROMPT, **fields})
        assert caught.value.problems[0].field == field
    assert parse_generation({"prompt": PROMPT, "output_compression": 100})
    assert parse_generation({"prompt": PROMPT, "output_compression": 50, "output_format": "webp"})
