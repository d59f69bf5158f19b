"""Previews: the end that a prediction amounts to, held against diffusers' own, and how much it looks like the picture."""

from __future__ import annotations

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

from stable_diffusion.engine import previews
from stable_diffusion.engine.denoiser import Denoiser
from stable_diffusion.engine.job import Job
from stable_diffusion.engine.loading import Parts
from stable_diffusion.models.folder import DEMO_FOLDER
from tests.model.recording_engine import RecordingEngine
from tests.tasks import make_task


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("name", ["DDIMScheduler", "EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler"])
def test_the_expected_end_is_the_one_that_diffusers_tells(demo_parts: Parts, name: str, prediction_type: str) -> None:
    scheduler = getattr(diffusers, name).from_config(demo_parts.scheduler.config, prediction_type=prediction_type)
    scheduler.set_timesteps(10)
    chance = torch.Generator().manual_seed(1)
    latents = torch.randn(1, 4, 8, 8, generator=chance) * scheduler.init_noise_sigma
    for timestep in scheduler.timesteps:
        predicted = torch.randn(1, 4, 8, 8, generator=chance)
        ours = previews.expected_end(scheduler, latents, timestep, predicted)
        told = scheduler.step(predicted, timestep, latents)
        assert torch.allclose(ours, told.pred_original_sample, atol=1e-3, rtol=1e-3)
        latents = told.prev_sample


@pytest.mark.parametrize("scheduler", ["PNDMScheduler", "EulerDiscreteScheduler", "DPMSolverMultistepScheduler Karras"])
def test_the_preview_of_the_last_step_looks_like_the_picture(demo_parts: Parts, scheduler: str) -> None:
    denoiser = Denoiser(demo_parts)
    prompt = "a large red circle on a blue background"
    task = make_task(prompt=prompt, scheduler=scheduler, num_inference_steps=20, guidance_scale=4.0, preview_every_steps=1)
    job = Job(task, on_end=lambda outcome: None)
    job.tensors = denoiser.prepare(task)
    looks: list[Image.Image] = []
    while not job.is_denoised:
        denoiser.advance(job, denoiser.predict([job])[0])
        assert job.tensors.preview is not None
        looks.append(job.tensors.preview)
    picture = denoiser.decode(job).image.resize(looks[-1].size, Image.Resampling.BOX)
    distances = [float(np.sqrt(((np.asarray(look, float) - np.asarray(picture, float)) ** 2).mean())) for look in looks]
    assert looks[-1].size == (8, 8)
    assert distances[-1] < 30, distances
    assert distances[-1] < distances[0], distances


def test_a_picture_is_the_same_with_and_without_previews(recording_engine: RecordingEngine) -> None:
    without, with_previews = (recording_engine.draw([make_task(preview_every_steps=every)])[0].image for every in (0, 2))
    assert without == with_previews


def test_the_demo_model_has_a_map_of_its_own() -> None:
    ours, stable_diffusions = (previews.latent_to_rgb(folder, is_xl=False) for folder in (DEMO_FOLDER, DEMO_FOLDER / "unet"))
    assert ours.shape == stable_diffusions.shape
    assert not torch.equal(ours, stable_diffusions)


def test_a_model_without_a_map_of_its_own_gets_stable_diffusions(tmp_path_factory: pytest.TempPathFactory) -> None:
    factors, xl_factors = (previews.latent_to_rgb(tmp_path_factory.mktemp("model"), is_xl=is_xl) for is_xl in (False, True))
    assert factors.shape == xl_factors.shape == (5, 3)
    assert factors[4].tolist() == [0, 0, 0]
    assert xl_factors[4].tolist() != [0, 0, 0]


def test_the_fitted_map_gives_back_a_linear_one() -> None:
    chance = torch.Generator().manual_seed(2)
    truth = torch.rand(5, 3, generator=chance)
    latents = torch.randn(6, 4, 8, 8, generator=chance)
    pixels = torch.einsum("nchw,cr->nrhw", latents, truth[:4]) + truth[4][None, :, None, None]
    assert torch.allclose(torch.tensor(previews.fit(latents, pixels)), truth, atol=1e-3)
