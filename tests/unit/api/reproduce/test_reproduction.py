"""Which request an infotext stands for, and what is said to differ."""

from __future__ import annotations

from dataclasses import replace

import pytest
from PIL import Image

from stable_diffusion.api.reproduce.reproduction import Reproduction, differs_in_computing, differs_in_input, reproduction_of
from stable_diffusion.api.tasks import image_task, text_task
from stable_diffusion.core.errors import InvalidRequest
from stable_diffusion.core.requests import parse_image_to_image, parse_text_to_image
from stable_diffusion.core.safety import SafetyPolicy
from stable_diffusion.core.schedulers import SCHEDULERS
from stable_diffusion.core.types import GeneratedImage
from stable_diffusion.images import infotext
from stable_diffusion.models.folder import DEMO_FOLDER, check_model
from tests.tasks import make_task, served

MODEL = check_model(DEMO_FOLDER, name="demo")
DRAWN = GeneratedImage(Image.new("RGB", (64, 64)), None, "", "", device="cpu", dtype="float32")
A1111 = "a castle\nSteps: 25, Sampler: {}, CFG scale: 7, Seed: 5, Size: 512x768, Model hash: 6ce0161689, Model: v1-5{}, Version: v1.10.1"


def of_a1111(sampler: str = "Euler a", more: str = "") -> Reproduction:
    return reproduction_of(infotext.read(A1111.format(sampler, more)), MODEL)


@pytest.mark.parametrize("scheduler", [*SCHEDULERS, None])
def test_the_request_gives_the_same_task(scheduler: str | None) -> None:
    fields = {"prompt": "x", "negative_prompt": "y", "num_inference_steps": 9, "guidance_scale": 3.3, "guidance_end": 0.1, "seed": 7}
    task = text_task(parse_text_to_image({**fields, "scheduler": scheduler}), served(MODEL))
    again = reproduction_of(infotext.read(infotext.write(task, DRAWN, MODEL)), MODEL)
    assert again.differs == []
    assert text_task(parse_text_to_image(again.fields), served(MODEL)) == task


def test_eta_is_told_and_taken_again() -> None:
    task = text_task(parse_text_to_image({"prompt": "x", "seed": 7, "scheduler": "TCD", "eta": 0.3}), served(MODEL))
    again = reproduction_of(infotext.read(infotext.write(task, DRAWN, MODEL)), MODEL)
    assert again.differs == []
    assert text_task(parse_text_to_image(again.fields), served(MODEL)) == task


@pytest.mark.parametrize(("policy", "checked"), [("always", True), ("default-on", True), ("off", False)])
def test_a_picture_that_was_drawn_unchecked_is_drawn_again_as_the_policy_says(policy: SafetyPolicy, checked: bool) -> None:
    unchecked = text_task(parse_text_to_image({"prompt": "x", "seed": 7, "safety_check": False}), served(MODEL, "off"))
    again = reproduction_of(infotext.read(infotext.write(unchecked, DRAWN, MODEL)), MODEL)
    assert again.differs == []
    assert text_task(parse_text_to_image(again.fields), served(MODEL, policy)).safety_check is checked


def test_an_input_picture_is_compared_as_it_was_scaled() -> None:
    picture = Image.linear_gradient("L").convert("RGB").resize((100, 50))
    parameters = parse_image_to_image({"prompt": "x", "strength": 0.3, "seed": 1})
    task = image_task(parameters, served(MODEL), picture)
    again = reproduction_of(infotext.read(infotext.write(task, DRAWN, MODEL)), MODEL)
    assert (again.kind, again.fields["strength"]) == ("img2img", 0.3)
    repeated = image_task(parse_image_to_image(again.fields), served(MODEL), picture)
    assert repeated == replace(task, image=repeated.image)
    assert differs_in_input(again.infotext, repeated) == []
    other = image_task(parse_image_to_image(again.fields), served(MODEL), Image.new("RGB", (100, 50)))
    (told,) = differs_in_input(again.infotext, other)
    assert told.startswith(
        f"Input hash: {task.image_hash}, here {other.image_hash} (another image, or prepared as other programs do: blurred"
    )


def test_a_scheduler_of_the_model_that_has_no_short_name_is_found_again() -> None:
    own = replace(MODEL, scheduler="DEISMultistepScheduler")
    said = infotext.read(infotext.write(make_task(scheduler="DEISMultistepScheduler"), DRAWN, own))
    assert "scheduler" not in reproduction_of(said, own).fields
    named = replace(said, values={**said.values, "Schedule type": "Automatic"})
    assert not reproduction_of(named, own).differs
    assert reproduction_of(said, own).differs == []
    assert reproduction_of(said, MODEL).differs == ["Sampler: DEISMultistepScheduler is not known here, PNDMScheduler is used"]


@pytest.mark.parametrize(
    ("sampler", "scheduler", "told"),
    [
        ("Euler a", "EulerAncestralDiscreteScheduler", None),
        ("DPM++ 2M Karras", "DPMSolverMultistepScheduler Karras", None),
        ("DPM++ 2M, Schedule type: Karras", "DPMSolverMultistepScheduler Karras", None),
        ("DPM++ 2M, Schedule type: Automatic", "DPMSolverMultistepScheduler", None),
        ("PLMS", "PNDMScheduler", None),
        ("Euler, Schedule type: Exponential", "EulerDiscreteScheduler", "Schedule type: Exponential is not known here"),
        ("DPM++ 3M SDE, Schedule type: Karras", "DPMSolverMultistepScheduler 3M SDE Karras", None),
        ("DPM2 a Karras", "KDPM2AncestralDiscreteScheduler Karras", None),
        ("Euler, Schedule type: SGM Uniform", "EulerDiscreteScheduler Trailing", None),
        ("DPM++ 2S a, Schedule type: Karras", None, "Sampler: DPM++ 2S a Karras is not known here, PNDMScheduler is used"),
    ],
)
def test_samplers_of_a1111_are_mapped_or_said_to_be_unknown(sampler: str, scheduler: str | None, told: str | None) -> None:
    again = of_a1111(sampler)
    assert again.fields.get("scheduler") == scheduler
    assert again.differs[2:] == ([] if told is None else [told])


@pytest.mark.parametrize(
    ("more", "kind"),
    [
        ("", "txt2img"),
        (", Denoising strength: 0.75", "img2img"),
        (", Denoising strength: 0.75, Mask blur: 4", "inpaint"),
        (", Denoising strength: 0.7, Hires upscale: 2", "txt2img"),
    ],
)
def test_the_kind_of_a_picture_of_a1111_shows_in_what_else_is_said(more: str, kind: str) -> None:
    assert of_a1111(more=more).kind == kind


def test_what_is_not_known_here_is_named_and_kept_short() -> None:
    many = "".join(f", Thing {number}: {'x' * 500}" for number in range(50))
    (told,) = of_a1111(more=f", Clip skip: 1, VAE: vae.pt{many}").differs[2:]
    assert told.startswith("not known here: VAE vae.pt, Thing 0 xxx")
    assert told.endswith(" and 43 more")
    assert len(told) < 600


def test_another_model_version_precision_and_device_are_told() -> None:
    text = infotext.write(make_task(), replace(DRAWN, dtype="float16", device="NVIDIA T4"), replace(MODEL, name="v1_4"))
    text = text.replace(MODEL.hash, "0123456789").replace(infotext.program_version(), f"{infotext.PROGRAM} 0.1")
    text = text.replace("torch: ", "torch: 1.")
    again = reproduction_of(infotext.read(text), MODEL)
    torch = infotext.library_versions()["torch"]
    assert again.differs == [
        f"Version: {infotext.PROGRAM} 0.1, here {infotext.program_version()}",
        f"Model: v1_4 (0123456789), here demo ({MODEL.hash})",
        f"torch: 1.{torch}, here {torch}",
    ]
    assert differs_in_computing(again.infotext, DRAWN) == ["Precision: float16, here float32", "Device: NVIDIA T4, here cpu"]


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (("Steps: 25", "Steps: many"), "picture: its infotext says Steps: many, which cannot be read"),
        (("Size: 512x768", "Size: 512"), "picture: its infotext says Size: 512, which cannot be read"),
        (("Seed: 5, ", ""), "picture: its infotext has no Seed"),
        (("Version", "Kind: dream, Version"), "picture: its infotext says Kind: dream, which cannot be read"),
    ],
)
def test_what_is_needed_and_not_readable_is_refused(change: tuple[str, str], told: str) -> None:
    with pytest.raises(InvalidRequest, match=told) as caught:
        reproduction_of(infotext.read(A1111.format("Euler a", "").replace(*change)), MODEL)
    assert caught.value.problems[0].field == "picture"
