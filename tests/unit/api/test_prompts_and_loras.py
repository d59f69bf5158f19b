"""What requests say of prompts and LoRAs becomes part of the task, or is refused with the field and the place."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from stable_diffusion.api.a1111.parameters import read_text_to_image
from stable_diffusion.api.openai.parameters import parse_edit, parse_generation, read_texts
from stable_diffusion.api.reproduce.reproduction import differs_in_loras, reproduction_of
from stable_diffusion.api.tasks import text_task
from stable_diffusion.core.errors import InvalidRequest, LoraNotFound
from stable_diffusion.core.requests import TextToImageRequest, parse_text_to_image
from stable_diffusion.core.types import GeneratedImage, LoraChoice, Task
from stable_diffusion.images import infotext
from stable_diffusion.models.folder import DEMO_FOLDER, check_model
from stable_diffusion.models.loras import LoraFile, Loras
from tests.tasks import served

MODEL = check_model(DEMO_FOLDER)
Door = Callable[[dict[str, Any]], TextToImageRequest]


def lora(name: str, alias: str = "", size_bytes: int = 1000) -> LoraFile:
    file = LoraFile(Path(f"{name}.safetensors"), name, alias or name, {}, {"unet": {}, "text_encoder": {}}, size_bytes, 0)
    file.__dict__["hash"] = hash_of(name)  # else read from the file
    return file


def hash_of(name: str) -> str:
    return f"{len(name):012x}"


LORAS = Loras({name: lora(name) for name in ("hollow", "outline")} | {"v2": lora("v2", "Pretty name")}, {"bad.safetensors": "it is a LoHa"})


def choice(name: str, unet: float, text_encoder: float | None = None) -> LoraChoice:
    return LoraChoice(name, unet, unet if text_encoder is None else text_encoder, hash_of(name), 1000)


def task_of(fields: dict[str, Any], loras: Loras = LORAS) -> Task:
    return text_task(parse_text_to_image({"prompt": "a circle", "num_inference_steps": 20, **fields}), served(MODEL, loras=loras))


def of_plain(fields: dict[str, Any]) -> TextToImageRequest:
    return parse_text_to_image(fields)


def of_openai(fields: dict[str, Any]) -> TextToImageRequest:
    return parse_generation(fields)[1]


@pytest.mark.parametrize("door", [of_plain, of_openai])
def test_the_field_names_loras_with_weights(door: Door) -> None:
    parameters = door({"prompt": "x", "loras": [{"name": "hollow"}, {"name": "Pretty name", "weight": -0.5}]})
    assert text_task(parameters, served(MODEL, loras=LORAS)).loras == (choice("hollow", 1.0), choice("v2", -0.5))


def test_a_form_has_the_field_as_json() -> None:
    parameters = parse_edit(read_texts({"prompt": "x", "loras": '[{"name": "hollow", "weight": 0.5}]'}))[1]
    assert [(one.name, one.weight) for one in parameters.loras] == [("hollow", 0.5)]
    for wrong in ("hollow", "[" * 3000, "{}", '["hollow"]', "[" + '{"name": "hollow"},' * 400 + "]"):
        with pytest.raises(InvalidRequest, match="loras"):
            parse_edit(read_texts({"prompt": "x", "loras": wrong}))


def test_tags_name_loras_in_a1111s_syntax_only() -> None:
    prompt = "a <lora:hollow:0.8> circle<lora:outline:0.5:0.25> <lora:v2>"
    tagged = task_of({"prompt": prompt, "prompt_syntax": "a1111", "loras": [{"name": "hollow", "weight": 2}]})
    expected = (choice("hollow", 2.0), choice("hollow", 0.8), choice("outline", 0.25, 0.5), choice("v2", 1.0))
    assert tagged.loras == expected, "the field's first, then the tags in their order"
    assert tagged.prompt == prompt, "it is told as it was written"
    assert task_of({"prompt": prompt}).loras == ()
    of_a1111 = text_task(read_text_to_image({"prompt": prompt}).parameters, served(MODEL, loras=LORAS))
    assert of_a1111.loras == expected[1:]
    assert of_a1111.prompt_syntax == "a1111"


def test_a_tag_in_the_negative_prompt_is_text() -> None:
    assert task_of({"negative_prompt": "<lora:nowhere:1>", "prompt_syntax": "a1111"}).loras == ()


def test_a_weight_of_zero_is_no_lora_but_its_tag_may_have_another_for_the_text() -> None:
    task = task_of({"prompt": "x <lora:hollow:0> <lora:outline:0.5:0>", "prompt_syntax": "a1111", "loras": [{"name": "v2", "weight": 0}]})
    assert task.loras == (choice("outline", 0.0, 0.5),)
    assert task_of({"loras": [{"name": "unknown", "weight": 0}]}).loras == ()


@pytest.mark.parametrize(
    "fields",
    [{"loras": [{"name": "hollow"}, {"name": "hallow"}]}, {"prompt": "x <lora:hallow:1>", "prompt_syntax": "a1111"}],
)
def test_an_unknown_name_is_refused_with_the_list(fields: dict[str, Any]) -> None:
    with pytest.raises(LoraNotFound, match="loras: there is no LoRA 'hallow' here, this server has: hollow, outline, v2") as caught:
        task_of(fields)
    assert (caught.value.status, caught.value.type) == (422, "lora_not_found")


def test_a_file_that_is_refused_is_told_with_the_reason() -> None:
    with pytest.raises(LoraNotFound, match="loras: 'bad' cannot be used: it is a LoHa"):
        task_of({"loras": [{"name": "bad"}]})


def test_too_many_loras_are_refused_together_with_the_tags() -> None:
    tags = "<lora:hollow:1>" * 5
    assert len(task_of({"prompt": f"x {tags}", "prompt_syntax": "a1111", "loras": [{"name": "v2"}] * 3}).loras) == 8
    with pytest.raises(InvalidRequest, match="loras: 9 are requested, at most 8 are allowed"):
        task_of({"prompt": f"x {tags}", "prompt_syntax": "a1111", "loras": [{"name": "v2"}] * 4})
    with pytest.raises(InvalidRequest, match="loras"):
        task_of({"loras": [{"name": "v2"}] * 9})


def test_loras_that_are_too_large_together_are_refused_and_one_twice_counts_once() -> None:
    large = Loras({name: lora(name, size_bytes=600 * 2**20) for name in ("a", "b")}, {})
    assert len(task_of({"loras": [{"name": "a"}, {"name": "a"}]}, large).loras) == 2
    with pytest.raises(InvalidRequest, match="loras: 1200 MiB together, at most 1024 are allowed"):
        task_of({"loras": [{"name": "a"}, {"name": "b"}]}, large)


@pytest.mark.parametrize(
    "loras",
    [
        "hollow",
        ["hollow"],
        [{"weight": 1}],
        [{"name": ""}],
        [{"name": "x" * 201}],
        [{"name": 1}],
        [{"name": "hollow", "weight": "1"}],
        [{"name": "hollow", "weight": 10.1}],
        [{"name": "hollow", "weight": -11}],
        [{"name": "hollow", "weight": True}],
        [{"name": "hollow", "more": 1}],
        {"hollow": 1},
        None,
    ],
    ids=str,
)
def test_a_malformed_list_is_refused_by_name(loras: object) -> None:
    with pytest.raises(InvalidRequest, match="loras") as caught:
        task_of({"loras": loras})
    assert {problem.field for problem in caught.value.problems} == {"loras"}


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"prompt": "a (b:11)"}, "prompt: character 6: the weight '11' is not between -10 and 10"),
        ({"prompt": "a (b:1.2.3)"}, "prompt: character 6: '1.2.3' is not a weight"),
        ({"prompt": "x <lora:hollow:much>"}, "prompt: character 16: 'much' is not a weight"),
        ({"prompt": "x <hypernet:hollow:1>"}, "prompt: character 3: "),
        ({"prompt": "<lora:hollow:1> AND (b:11)"}, "prompt: character 24: the weight '11'"),
        ({"negative_prompt": "a, ((b:9):9)"}, "negative_prompt: character 6: the brackets around this multiply to a weight of 81"),
        ({"prompt": "a AND b AND c AND d AND e"}, "prompt: 5 parts are joined with AND, at most 4 are allowed"),
        ({"prompt": "".join(f"[a|{chr(98 + index)}c{'|d' * index}]" for index in range(7))}, "prompt: it changes to "),
    ],
    ids=str,
)
def test_a_wrong_prompt_is_refused_with_its_place(fields: dict[str, Any], told: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        task_of({"prompt_syntax": "a1111", "num_inference_steps": 150, **fields})
    assert caught.value.message.startswith(told), caught.value.message
    assert caught.value.problems[0].field == told.partition(":")[0]


def test_in_plain_syntax_nothing_is_wrong() -> None:
    prompt = "a (b:11) <hypernet:x:1> a AND b AND c AND d AND e"
    assert (task_of({"prompt": prompt}).parts, task_of({"prompt": prompt}).loras) == (1, ())


def test_parts_are_counted() -> None:
    assert [task_of({"prompt": prompt, "prompt_syntax": "a1111"}).parts for prompt in ("a", "a AND b", "a AND b :0.5 AND c")] == [1, 2, 3]
    assert task_of({"prompt": "a", "negative_prompt": "a AND b", "prompt_syntax": "a1111"}).parts == 1


def test_a_text_may_change_up_to_32_times() -> None:
    words = "|".join(f"w{index}" for index in range(32))
    assert task_of({"prompt": f"[{words}]", "prompt_syntax": "a1111", "num_inference_steps": 100})
    with pytest.raises(InvalidRequest, match="prompt: it changes to 33 different texts with the steps, at most 32 are allowed"):
        task_of({"prompt": f"[{words}|more]", "prompt_syntax": "a1111", "num_inference_steps": 100})


def test_clip_skip_goes_as_far_as_the_text_encoder_has_layers() -> None:
    assert MODEL.text_layers == 3
    assert [task_of({"clip_skip": layers}).clip_skip for layers in (1, 2, 3)] == [1, 2, 3]
    with pytest.raises(InvalidRequest, match="clip_skip: must be at most 3 with the model model, got 4"):
        task_of({"clip_skip": 4})
    for wrong in (0, 13, 1.5, "2", True):
        with pytest.raises(InvalidRequest, match="clip_skip"):
            task_of({"clip_skip": wrong})


@pytest.mark.parametrize("syntax", ["A1111", "compel", "", None, 1])
def test_an_unknown_syntax_is_refused_by_name(syntax: object) -> None:
    with pytest.raises(InvalidRequest, match="prompt_syntax: must be one of 'plain' or 'a1111'"):
        task_of({"prompt_syntax": syntax})


@pytest.mark.parametrize(
    "fields",
    [
        {"loras": [{"name": "hollow", "weight": 0.8}, {"name": "v2", "weight": -1}]},
        {"prompt": "x <lora:hollow:0.8> y <lora:v2:1:0.5>", "prompt_syntax": "a1111"},
        {"prompt": "x <lora:hollow:0.8>", "prompt_syntax": "a1111", "loras": [{"name": "v2", "weight": 0.3}]},
        {"prompt": "x <lora:hollow:0>", "prompt_syntax": "a1111", "loras": [{"name": "v2", "weight": 0.3}]},
        {"prompt": "x <lora:hollow:1>", "loras": [{"name": "v2"}], "clip_skip": 2},
        {"prompt": "(a:1.2) AND b", "prompt_syntax": "a1111"},
    ],
    ids=str,
)
def test_what_a_file_says_gives_the_same_task_again(fields: dict[str, Any]) -> None:
    task = task_of(fields | {"seed": 7})
    again, said = reproduced(task)
    assert again == task
    assert differs_in_loras(said, again) == []


def reproduced(task: Task, loras: Loras = LORAS) -> tuple[Task, infotext.Infotext]:
    said = infotext.read(infotext.write(task, GeneratedImage(None, None, "", "", "cpu", "float32"), MODEL))  # type: ignore[arg-type]
    reproduction = reproduction_of(said, MODEL)
    assert reproduction.differs == []
    return text_task(parse_text_to_image(reproduction.fields), served(MODEL, loras=loras)), said


@pytest.mark.parametrize("name", ["a, b", "a: 1", "a:b", 'with "quotes"', "ünï", "a,b: 0.5", "a\\b"])
def test_names_with_marks_in_them_are_found_again(name: str) -> None:
    odd = Loras({"first": lora("first"), name: lora(name)}, {})
    task = task_of({"loras": [{"name": "first", "weight": 0.5}, {"name": name, "weight": 0.25}], "seed": 7}, odd)
    again, said = reproduced(task, odd)
    assert again == task
    assert differs_in_loras(said, again) == []


def test_another_file_of_the_same_name_is_said_to_differ() -> None:
    task = task_of({"loras": [{"name": "hollow"}], "seed": 7})
    changed = lora("hollow")
    changed.__dict__["hash"] = "f" * 12
    again, said = reproduced(task, Loras({"hollow": changed}, {}))
    assert differs_in_loras(said, again) == [f"LoRA hollow: {hash_of('hollow')}, here {'f' * 12}"]


def test_a_file_of_a1111_is_read_in_its_syntax_and_its_hashes_are_compared() -> None:
    text = (
        "a <lora:hollow:0.8> circle\nSteps: 25, Sampler: Euler a, CFG scale: 7, Seed: 5, Size: 64x64, Model hash: 6ce0161689, "
        'Clip skip: 2, Lora hashes: "hollow: 0123456789ab, gone: 111111111111", Version: v1.10.1'
    )
    reproduction = reproduction_of(infotext.read(text), MODEL)
    assert (reproduction.fields["prompt_syntax"], reproduction.fields["clip_skip"]) == ("a1111", 2)
    task = text_task(parse_text_to_image(reproduction.fields), served(MODEL, loras=LORAS))
    assert task.loras == (choice("hollow", 0.8),)
    assert differs_in_loras(reproduction.infotext, task) == [f"LoRA hollow: 0123456789ab, here {hash_of('hollow')}"]


@pytest.mark.parametrize("said", ["hollow", "hollow: much", ": 1", "hollow: 1, more", "a" * 20_000, "a: 1e999", "a, " * 10_000])
def test_loras_that_cannot_be_read_are_refused_by_name(said: str) -> None:
    text = f'a circle\nSteps: 25, Sampler: Euler a, CFG scale: 7, Seed: 5, Size: 64x64, Loras: "{said}", Lora hashes: "{said}"'
    with pytest.raises(InvalidRequest, match="Loras|loras"):
        parse_text_to_image(reproduction_of(infotext.read(text), MODEL).fields)
