"""What is written of a picture is read back, by this project and by what A1111 reads with."""

from __future__ import annotations

import contextlib
import json
import random
import re
import time

import pytest
from PIL import Image

from stable_diffusion.core.errors import InvalidRequest
from stable_diffusion.core.schedulers import SCHEDULERS, sampler_of
from stable_diffusion.core.types import GeneratedImage
from stable_diffusion.images import infotext
from stable_diffusion.models.folder import DEMO_FOLDER, check_model
from tests.tasks import make_task

MODEL = check_model(DEMO_FOLDER, name="demo")
DRAWN = GeneratedImage(Image.new("RGB", (64, 64)), None, "", "", device="cpu", dtype="float32")
A1111_PAIR = re.compile(r'\s*(\w[\w \-/]+):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)')
LOOKS_LIKE_ONE = "a\nNegative prompt: b\nSteps: 20, Sampler: Euler a, CFG scale: 7, Seed: 3"


def written(**changes: object) -> str:
    return infotext.write(make_task(**changes), DRAWN, MODEL)


def as_a1111_reads(text: str) -> tuple[str, str, dict[str, str]]:
    """Prompt, negative prompt and values, by the rules that the A1111 API's description gives."""
    *lines, last = text.strip().split("\n")
    values = {name: json.loads(value) if value[:1] == '"' else value for name, value in A1111_PAIR.findall(last)}
    assert len(values) >= 3
    negative_at = next((number for number, line in enumerate(lines) if line.startswith("Negative prompt:")), len(lines))
    negative = "\n".join(lines[negative_at:]).removeprefix("Negative prompt:").strip()
    return "\n".join(lines[:negative_at]), negative, values


def test_a_picture_is_described_as_a1111_does_it() -> None:
    text = written(negative_prompt="green", scheduler="DPMSolverMultistepScheduler Karras", guidance_scale=7.0)
    first, second, third = text.split("\n")
    assert first == "a red circle on a blue background"
    assert second == "Negative prompt: green"
    assert third.startswith(
        "Steps: 8, Sampler: DPM++ 2M, Schedule type: Karras, CFG scale: 7, Seed: 1, Size: 64x64, "
        f"Model hash: {MODEL.hash}, Model: demo, Kind: txt2img, Precision: float32, Device: cpu, torch: "
    )


def test_what_is_not_the_usual_is_written_too() -> None:
    changes = {"strength": 0.75, "guidance_end": 0.5, "safety_check": False, "image_hash": "0123456789", "mask_hash": "abcdef0123"}
    values = infotext.read(written(kind="inpaint", **changes)).values
    assert (values["Kind"], values["Denoising strength"]) == ("inpaint", "0.75")
    assert (values["Guidance end"], values["Safety check"]) == ("0.5", "false")
    assert (values["Input hash"], values["Mask hash"]) == ("0123456789", "abcdef0123")
    assert "Negative prompt" not in written()


@pytest.mark.parametrize(
    "prompt",
    [
        "two\nlines",
        "Negative prompt: at the start",
        LOOKS_LIKE_ONE,
        f"{LOOKS_LIKE_ONE}\n{LOOKS_LIKE_ONE}",
        'Exact prompt: "x", Steps: 1, Seed: 2',
        "  white space \t\n  around lines  \r",
        '\u8d64\u3044\u4e38, \u043a\u0440\u0443\u0433: \U0001f534\u2028\x85 \\ " \' \\"',
        'comma, colon: "quote" \\n \\',
        "",
        "\n\n",
    ],
)
def test_a_prompt_comes_back_to_the_last_character(prompt: str) -> None:
    for task_prompts in ({"prompt": prompt}, {"negative_prompt": prompt}, {"prompt": prompt, "negative_prompt": prompt}):
        task = make_task(**task_prompts)
        read = infotext.read(infotext.write(task, DRAWN, MODEL))
        assert (read.prompt, read.negative_prompt) == (task.prompt, task.negative_prompt)


def test_random_prompts_names_and_numbers_come_back() -> None:
    chance = random.Random(1)
    pieces = ["Negative prompt:", "Steps: 1, ", "\n", " ", ",", ":", '"', "\\", "\u732b", "x", "Exact prompt: ", "\r", "\t", "\u3000"]
    for _ in range(500):
        prompt, negative = ("".join(chance.choices(pieces, k=chance.randrange(12))) for _ in range(2))
        task = make_task(
            prompt=prompt,
            negative_prompt=negative,
            kind="img2img",
            guidance_scale=chance.choice([chance.uniform(0, 30), 1e-7, 0.0, 30.0]),
            guidance_end=chance.random(),
            strength=chance.uniform(1e-9, 1),
            seed=chance.randrange(2**32),
        )
        text = infotext.write(task, DRAWN, MODEL)
        read = infotext.read(text)
        assert (read.prompt, read.negative_prompt) == (prompt, negative)
        assert float(read.values["CFG scale"]) == task.guidance_scale
        assert float(read.values["Guidance end"]) == task.guidance_end
        assert float(read.values["Denoising strength"]) == task.strength
        assert int(read.values["Seed"]) == task.seed


@pytest.mark.parametrize("prompt", ["a red circle", "two\nlines", "(weights:1.2), [commas], \u732b"])
def test_a1111_reads_the_same(prompt: str) -> None:
    seen, negative, values = as_a1111_reads(written(prompt=prompt, negative_prompt="green, blue"))
    assert (seen, negative) == (prompt, "green, blue")
    assert (values["Steps"], values["Sampler"], values["Seed"], values["Size"]) == ("8", "PNDM", "1", "64x64")
    assert values == infotext.read(written(prompt=prompt)).values


@pytest.mark.parametrize("scheduler", [*SCHEDULERS, "DEISMultistepScheduler"])
def test_every_scheduler_has_a_name_of_its_own(scheduler: str) -> None:
    others = [sampler_of(other) for other in SCHEDULERS if other != scheduler]
    assert sampler_of(scheduler) not in others


def test_a_text_of_a1111_is_read() -> None:
    read = infotext.read(
        "a castle, (night:1.2)\nby a lake\nNegative prompt: blurry\nugly\n"
        "Steps: 25, Sampler: DPM++ 2M, Schedule type: Karras, CFG scale: 7, Seed: 965400086, Size: 512x768, Model hash: 6ce0161689, "
        'Model: v1-5-pruned, Clip skip: 2, Lora hashes: "a: 1, b: 2", Version: v1.10.1'
    )
    assert read.prompt == "a castle, (night:1.2)\nby a lake"
    assert read.negative_prompt == "blurry\nugly"
    assert read.values["Lora hashes"] == "a: 1, b: 2"
    assert (read.values["Clip skip"], read.values["Version"]) == ("2", "v1.10.1")


def test_half_a_surrogate_pair_is_replaced() -> None:
    read = infotext.read('Steps: 1, Seed: 2, Model: "\\ud800", Exact prompt: "a\\udfff \\ud83d\\udd34"')
    assert (read.values["Model"], read.prompt) == ("?", "a? \U0001f534")


@pytest.mark.parametrize("text", ["", "a red circle", "Steps: 1, Seed: 2", "a\n\n\n", "Comment: made, with: care", ",,,,:::"])
def test_another_text_is_refused_by_name(text: str) -> None:
    with pytest.raises(InvalidRequest, match="picture: not an infotext") as caught:
        infotext.read(text, "picture")
    assert caught.value.problems[0].field == "picture"


def test_a_long_text_is_refused_and_a_hostile_one_costs_little() -> None:
    with pytest.raises(InvalidRequest, match="at most 65536 are allowed"):
        infotext.read("x" * (infotext.MAX_CHARACTERS + 1))
    started = time.monotonic()
    for piece in ("a", " ", ",", "a:", 'aa:"', 'aa:"\\",', '\\"', "aa:,", "aa: "):
        text = (piece * infotext.MAX_CHARACTERS)[: infotext.MAX_CHARACTERS]
        with contextlib.suppress(InvalidRequest):
            infotext.read(text)
    assert time.monotonic() - started < 2
