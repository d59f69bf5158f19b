"""The tensor arithmetic: a task to latents, one UNet call for many jobs, latents to an image.

All operations and random draws happen in the order of diffusers' own pipelines, so that a job alone gives their images bit for bit.
`engine.py` and `batching.py` handle queues, threads and owners.
"""

from __future__ import annotations

import copy
import inspect
import logging
import math
import os
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import diffusers
import torch
from diffusers.image_processor import VaeImageProcessor
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion_img2img import retrieve_latents
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image

from stable_diffusion.core.errors import GenerationFailed, InvalidRequest
from stable_diffusion.core.limits import MAX_PROMPT_CHUNKS, MAX_STEPS
from stable_diffusion.core.prompt_syntax import Emphasis, composed, emphasized, scheduled, without_lora_tags
from stable_diffusion.core.schedulers import class_and_options, sampler_of
from stable_diffusion.core.types import GeneratedImage, Task
from stable_diffusion.engine import previews, threads
from stable_diffusion.engine.adapters import Lora
from stable_diffusion.engine.copies import AsynchronousCopies
from stable_diffusion.engine.cuda_graphs import CudaGraphs, Recorder
from stable_diffusion.engine.decoding import useful_counts
from stable_diffusion.engine.job import Conditioning, Job, Latents, TextRows, TextSchedule
from stable_diffusion.engine.lms import KeptLMSDiscreteScheduler
from stable_diffusion.engine.loading import Parts
from stable_diffusion.engine.lora_store import Claim, LoraStore, claimed
from stable_diffusion.engine.prompts import PromptEncoder, Text
from stable_diffusion.engine.row_inputs import RowInputs, joined, stacked
from stable_diffusion.engine.unet_calls import UNetCalls
from stable_diffusion.engine.ways import Way

logger = logging.getLogger("stable_diffusion")

_TIMED_STEPS = 5
# A step this slow is not measured again: the first launch hardly affects its time.
_SLOW_STEP_S = 1.0
_TILE_SIDE = 512  # pixels; diffusers' own tiles are as large as a native image
_COPYING_SCHEDULERS = frozenset(
    {"EulerAncestralDiscreteScheduler", "KDPM2AncestralDiscreteScheduler", "LCMScheduler", "UniPCMultistepScheduler"}
)
_TIMED_DECODINGS = 3
_LEVELS_APART = 3.0  # of 255, that decoding several images together may change
_BLACK = -1 + 1 / 255  # values up to it become level 0 of 255


class Denoiser:
    """The model's arithmetic. All calls must come from one thread. Only `prepare` and `advance` change a job's tensors."""

    def __init__(self, parts: Parts, make_recorder: Callable[[], Recorder] = CudaGraphs) -> None:
        """`make_recorder`: of CUDA graphs; for tests, which have no GPU."""
        self._parts = parts
        pixels_per_latent = 2 ** (len(parts.vae.config.block_out_channels) - 1)
        self._images = VaeImageProcessor(vae_scale_factor=pixels_per_latent)
        self._masks = VaeImageProcessor(vae_scale_factor=pixels_per_latent, do_normalize=False, do_binarize=True, do_convert_grayscale=True)
        self._pixels_per_latent = pixels_per_latent
        self._device_name = torch.cuda.get_device_name(parts.device) if parts.device.type == "cuda" else parts.device.type
        self._prompts = PromptEncoder(parts.text_encoders, parts.dtype, parts.inversions)
        self.loras = LoraStore(parts.loras, parts.device, parts.dtype)
        self.call_unet = UNetCalls(parts.unet, make_recorder)
        self.decode_counts: dict[int, float] = {}  # how many images of the native size are worth decoding together, and the seconds
        self.copies: Callable[[], AbstractContextManager[object]] = AsynchronousCopies if parts.device.type == "cuda" else nullcontext
        is_on_cpu = parts.device.type == "cpu"
        self._threads = threads.of_process(os.environ, torch.get_num_threads(), torch.set_num_threads, logger.info) if is_on_cpu else None

    def use(self, way: Way, width: int, height: int, jobs: Sequence[int]) -> int:
        """Compute UNet calls of each number of `jobs` of one size in this way from now on, and of one row; others stay eager.

        Returns the most rows for which it could be set up. If it raises, all calls are eager.
        """
        return self.call_unet.use(way, self.sample_inputs(1, width, height).first(), sorted({1, *(2 * count for count in jobs)}))

    @property
    def execution(self) -> str:
        """The name of the way in which the last UNet call was computed."""
        return self.call_unet.last_way.name

    def sample_inputs(self, jobs: int, width: int, height: int) -> RowInputs:
        """Inputs of a guided step of `jobs` different jobs of one size."""
        tasks = [replace(_unprompted(width, height), guidance_scale=7.5, seed=seed) for seed in range(jobs)]
        batch = [Job(task, on_end=lambda outcome: None) for task in tasks]
        for job in batch:
            job.tensors = self.prepare(job.task)
        inputs = self.unet_inputs(batch)
        missing = self._parts.unet.config.in_channels - inputs.latents.shape[1]
        if missing:  # made for inpainting: mask and masked image
            others = inputs.latents.new_zeros(inputs.rows, missing, *inputs.latents.shape[2:])
            inputs = replace(inputs, latents=torch.cat([inputs.latents, others], dim=1))
        return inputs

    @torch.inference_mode()
    def compute(self, inputs: RowInputs) -> torch.Tensor:
        """A UNet call. Returns when the device has finished it."""
        predicted = self.call_unet(inputs)
        self._wait_for_device()
        return predicted

    def warm_up(self, width: int, height: int) -> float:
        """Generate an image in two steps, so that kernels are chosen, memory is allocated and a broken model fails at start.

        Returns the seconds that the second step took.
        """
        blank = Image.new("RGB", (width, height))
        # Every model supports inpainting.
        task = Task("inpaint", "", "", width, height, 2, 7.5, 0, "DDIMScheduler", True, image=blank, mask=blank.convert("L"))
        job = Job(task, on_end=lambda outcome: None)
        job.tensors = self.prepare(task)
        while not job.is_denoised:
            began = time.perf_counter()
            self.advance(job, self.predict([job])[0])
            self._wait_for_device()
            seconds = time.perf_counter() - began
        self.decode(job)
        return seconds

    def _wait_for_device(self) -> None:
        if self._parts.device.type == "cuda":
            torch.cuda.synchronize()

    def step_seconds(self, jobs: int, width: int, height: int) -> float | None:
        """How long a guided step of `jobs` jobs of one size takes. None if they do not fit into memory."""
        try:
            return self._time_step(jobs, width, height)
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
            return None

    def _time_step(self, jobs: int, width: int, height: int) -> float:
        """The fastest of a few steps. The first does not count, because kernels are chosen for each number of rows."""
        task = Task("txt2img", "", "", width, height, _TIMED_STEPS + 1, 7.5, 0, "DDIMScheduler", False)
        batch = [Job(task, on_end=lambda outcome: None) for _ in range(jobs)]
        for job in batch:
            job.tensors = self.prepare(task)
        times: list[float] = []
        while not batch[0].is_denoised:
            began = time.perf_counter()
            for job, predicted in zip(batch, self.predict(batch), strict=True):
                self.advance(job, predicted)
            self._wait_for_device()
            times.append(time.perf_counter() - began)
            if times[-1] > _SLOW_STEP_S:
                break
        return min(times[1:] or times)

    # --- before the first step -------------------------------------------------------------------

    @torch.inference_mode()
    def prepare(self, task: Task, claim: Claim | None = None) -> Latents:
        """Encode the prompt and the image, draw the initial noise, set up the job's own noise scheduler.

        `claim`: the claim of a task with LoRAs, once `can_prepare` returns True.
        Raises InvalidRequest for a prompt that is too long, LoRAs that cannot be used, or a number of steps that the noise scheduler does
        not support.
        """
        with self.copies():
            return self._prepared(task, claim)

    def _prepared(self, task: Task, claim: Claim | None) -> Latents:
        loras = () if claim is None else claim.adapters()
        scheduler = self._new_scheduler(task.scheduler)
        # Timesteps stay on the CPU: schedulers use them as table indices, and on a GPU each access would wait for the device.
        _set_timesteps(scheduler, task)
        # Always on the CPU, so that a seed gives the same image on every device.
        generator = torch.Generator("cpu").manual_seed(task.seed)
        latents = Latents(
            latents=torch.empty(0),
            conditioning=Conditioning(()),
            scheduler=scheduler,
            timesteps=scheduler.timesteps,
            unet_timesteps=torch.empty(0),
            generator=generator,
            guided_steps=0,
            step_arguments=_step_arguments(scheduler, task, generator),
            dropped_prompt="",
            dropped_negative_prompt="",
            adapters=tuple((lora.unet, choice.unet_weight) for lora, choice in zip(loras, task.loras, strict=True) if lora.unet),
        )
        if task.kind == "txt2img":
            latents.latents = self._draw_noise(task, generator) * scheduler.init_noise_sigma
        elif task.kind == "img2img":
            self._start_from_image(task, latents)
        else:
            self._start_under_mask(task, latents)
        self._condition(task, latents, loras)
        if self._parts.is_xl:
            latents.time_ids = self._time_ids(task)
        if task.guidance_scale > 1 and latents.guidance_embedding is None:
            # A second-order scheduler makes two calls per step; both must be guided, or neither.
            order = scheduler.order
            steps = math.ceil(len(latents.timesteps) / order)
            latents.guided_steps = min(order * round(task.guidance_end * steps), len(latents.timesteps))
        latents.copies_in_steps = latents.inpainting_mask is not None or _copies_in_steps(scheduler, task)
        latents.unet_timesteps = latents.timesteps.to(device=self._parts.device, dtype=torch.float32)
        self._embed(latents)
        return latents

    def can_prepare(self, job: Job) -> bool:
        """Whether the job's LoRAs are on the device; if not, this continues to load them. `prepare` raises an error in a file."""
        if job.claim is None:
            job.claim = claimed(job.task.loras)
        return self.loras.go_on(job.claim)

    def loras_held(self) -> tuple[int, int]:
        """How many LoRAs are on the device, and their bytes."""
        return len(self.loras), self.loras.held_bytes

    def _condition(self, task: Task, latents: Latents, loras: tuple[Lora, ...]) -> None:
        """Read the prompts: which texts each row is told, and what of them is dropped."""
        steps = math.ceil(len(latents.timesteps) / latents.scheduler.order)
        of_text = [(lora, choice.text_encoder_weight) for lora, choice in zip(loras, task.loras, strict=True) if lora.changes_text]

        def schedule_of(prompt: str) -> TextSchedule:
            if task.prompt_syntax == "plain":
                return ((steps, Text(((Emphasis(prompt, 1.0),),), task.clip_skip, tuple(of_text))),)
            return tuple((last, Text(emphasized(text), task.clip_skip, tuple(of_text))) for last, text in scheduled(prompt, steps))

        parts = ((task.prompt, 1.0),) if task.prompt_syntax == "plain" else composed(without_lora_tags(task.prompt)[0])
        rows = tuple(schedule_of(text) for text, _ in parts)
        negative = schedule_of(task.negative_prompt)
        if not task.negative_prompt and self._parts.zeros_for_no_negative_prompt:
            negative = tuple((last, replace(text, is_zero=True)) for last, text in negative)
        latents.conditioning = Conditioning((negative, *rows), tuple(weight for _, weight in parts))
        width = self._parts.unet.config.time_cond_proj_dim
        if width is not None:
            embedding = guidance_embedding(task.guidance_scale, width)
            latents.guidance_embedding = embedding.to(device=self._parts.device, dtype=self._parts.dtype)
        latents.chunks = max(self._prompts.count_chunks(text) for row in latents.conditioning.rows for _, text in row)
        is_guided = task.guidance_scale > 1 or len(rows) > 1  # else the negative prompt is not used
        latents.dropped_prompt = self._dropped("prompt", rows, task)
        latents.dropped_negative_prompt = self._dropped("negative_prompt", (negative,) if is_guided else (), task)
        # Kept until the first step. A text that cannot be encoded fails here, where no other job is concerned.
        for schedule in (negative, *rows) if is_guided else rows:
            self._prompts.encode(schedule[0][1])

    def _dropped(self, field: str, schedules: Sequence[TextSchedule], task: Task) -> str:
        """What of a prompt's texts does not fit. Raises InvalidRequest if there is some, unless the task says to cut it."""
        dropped = " ".join(filter(None, (self._prompts.dropped(text) for schedule in schedules for _, text in schedule)))
        if dropped and not task.cut_prompts:
            tokens = MAX_PROMPT_CHUNKS * self._prompts.chunk_tokens
            raise InvalidRequest(f"{field}: more than {tokens} tokens; the excess begins with {dropped[:60]!r}", field=field)
        return dropped

    def _time_ids(self, task: Task) -> torch.Tensor:
        """What Stable Diffusion XL is told of an image: its original size, the corner of its crop and its size (Podell et al. 2023)."""
        values = (task.height, task.width, 0, 0, task.height, task.width)
        return torch.tensor([values], dtype=self._parts.dtype, device=self._parts.device)

    def _embed(self, state: Latents) -> TextRows:
        """The embeddings of a job's next step."""
        step = state.step_index // state.scheduler.order + 1
        texts = state.conditioning.at(step)[-state.rows :]
        if texts != state.texts or state.embeddings is None:
            with self.copies():
                rows = [self._prompts.encode(text) for text in texts]
            tokens, mask = stacked([row.tokens for row in rows])
            summaries = [row.pooled for row in rows if row.pooled is not None]
            state.embeddings = TextRows(tokens, mask, torch.cat(summaries) if summaries else None)
            state.texts = texts
        return state.embeddings

    def _new_scheduler(self, name: str) -> Any:
        """A new noise scheduler with the model's noise schedule. The shared one is never changed."""
        class_name, options = class_and_options(name)
        kind = KeptLMSDiscreteScheduler if class_name == "LMSDiscreteScheduler" else getattr(diffusers, class_name)
        return kind.from_config(self._parts.scheduler.config, **options)

    def _draw_noise(self, task: Task, generator: torch.Generator) -> torch.Tensor:
        shape = (
            1,
            self._parts.vae.config.latent_channels,
            task.height // self._pixels_per_latent,
            task.width // self._pixels_per_latent,
        )
        noise: torch.Tensor = randn_tensor(shape, generator=generator, device=self._parts.device, dtype=self._parts.dtype)
        return noise

    def _encode_image(self, pixels: torch.Tensor, latents: Latents) -> torch.Tensor:
        # Rounded to the dtype first, as in diffusers, also where the autoencoder computes in float32.
        pixels = pixels.to(device=self._parts.device, dtype=self._parts.dtype).to(self._parts.vae.dtype)
        distribution = _within_memory(self._parts.vae, latents, lambda: self._parts.vae.encode(pixels))
        encoded: torch.Tensor = retrieve_latents(distribution, generator=latents.generator).to(self._parts.dtype)
        scaling_factor: float = self._parts.vae.config.scaling_factor
        return scaling_factor * encoded

    def _skip_to_strength(self, task: Task, latents: Latents) -> None:
        """Skip the first steps, so that the fraction `strength` of them remains (Meng et al. 2021, SDEdit)."""
        skipped = task.num_inference_steps - min(int(task.num_inference_steps * task.strength), task.num_inference_steps)
        skipped *= latents.scheduler.order
        latents.timesteps = latents.scheduler.timesteps[skipped:]
        if hasattr(latents.scheduler, "set_begin_index"):
            latents.scheduler.set_begin_index(skipped)

    def _start_from_image(self, task: Task, latents: Latents) -> None:
        self._skip_to_strength(task, latents)
        image_latents = self._encode_image(self._images.preprocess(task.image), latents)
        noise = self._draw_noise(task, latents.generator)
        latents.latents = latents.scheduler.add_noise(image_latents, noise, latents.timesteps[:1])

    def _start_under_mask(self, task: Task, latents: Latents) -> None:
        self._skip_to_strength(task, latents)
        has_mask_channels = self._parts.unet.config.in_channels != self._parts.vae.config.latent_channels
        pixels = self._images.preprocess(task.image, height=task.height, width=task.width).to(torch.float32)
        mask_pixels = self._masks.preprocess(task.mask, height=task.height, width=task.width)
        image_latents = None
        if not has_mask_channels or task.strength < 1:
            # Contiguous as in diffusers' inpaint pipeline (not in its img2img pipeline): the last bit depends on the memory format.
            image_latents = self._encode_image(pixels, latents).contiguous()
        noise = self._draw_noise(task, latents.generator)
        if task.strength == 1:
            latents.latents = noise * latents.scheduler.init_noise_sigma
        else:
            latents.latents = latents.scheduler.add_noise(image_latents, noise, latents.timesteps[:1])
        mask = torch.nn.functional.interpolate(mask_pixels, size=noise.shape[-2:])
        mask = mask.to(device=self._parts.device, dtype=self._parts.dtype)
        if has_mask_channels:
            masked_latents = self._encode_image(pixels * (mask_pixels < 0.5), latents)
            latents.extra_channels = torch.cat([mask, masked_latents], dim=1)
        else:
            # diffusers also encodes the masked image here without using it. Draw its random numbers to stay in sync.
            self._draw_noise(task, latents.generator)
            latents.inpainting_mask, latents.image_latents, latents.noise = mask, image_latents, noise

    # --- the steps -------------------------------------------------------------------------------

    @torch.inference_mode()
    def predict(self, jobs: Sequence[Job]) -> list[torch.Tensor]:
        """One UNet call for the next step of all `jobs`, which share a batch key. Returns each job's rows. Does not change the jobs."""
        inputs = self.unet_inputs(jobs)
        began_s = time.perf_counter()
        predicted = self.call_unet(inputs)
        if self._threads is not None:
            now_s = time.perf_counter()
            self._threads.note_step(inputs.latents.shape, now_s - began_s, now_s)
        return list(torch.split(predicted, [job.rows for job in jobs]))

    @torch.inference_mode()
    def unet_inputs(self, jobs: Sequence[Job]) -> RowInputs:
        """The inputs of the next step of all `jobs`."""
        parts = []
        for job in jobs:
            state = _tensors_of(job)
            timestep = state.timesteps[state.step_index]
            scaled = state.scheduler.scale_model_input(state.latents, timestep)
            if state.extra_channels is not None:
                scaled = torch.cat([scaled, state.extra_channels], dim=1)
            text = self._embed(state)
            timesteps = state.unet_timesteps[state.step_index].expand(job.rows)
            guidance = None if state.guidance_embedding is None else state.guidance_embedding.expand(job.rows, -1)
            adapters = (state.adapters,) * job.rows if state.adapters else ()
            # Repeated by concatenation, as in diffusers. It keeps the memory format, on which the last bit depends.
            latents = torch.cat([scaled] * job.rows)
            time_ids = None if state.time_ids is None else state.time_ids.expand(job.rows, -1)
            parts.append(RowInputs(latents, timesteps, text.tokens, text.mask, guidance, text.pooled, time_ids, adapters))
        return joined(parts)

    @torch.inference_mode()
    def advance(self, job: Job, predicted: torch.Tensor) -> None:
        """Apply guidance and the noise scheduler to one job's rows. Reads no value, so only a preview waits for the device."""
        state = _tensors_of(job)
        # Noticing copies doubles the CPU's work for a step.
        with self.copies() if state.copies_in_steps else nullcontext():
            self._advance(job, state, predicted)

    def _advance(self, job: Job, state: Latents, predicted: torch.Tensor) -> None:
        timestep = state.timesteps[state.step_index]
        if job.is_guided:
            unconditional, *conditional = torch.split(predicted, 1)
            scale = job.task.guidance_scale if state.step_index < state.guided_steps else 1.0
            predicted = unconditional
            for weight, part in zip(state.conditioning.weights, conditional, strict=True):
                predicted = predicted + scale * weight * (part - unconditional)
        every = job.task.preview_every_steps
        state.preview = self._preview(state, timestep, predicted) if every and (state.step_index + 1) % every == 0 else None
        latents = state.scheduler.step(predicted, timestep, state.latents, **state.step_arguments, return_dict=False)[0]
        if state.inpainting_mask is not None:
            kept = state.image_latents
            assert kept is not None
            if state.step_index < len(state.timesteps) - 1:
                following = state.timesteps[state.step_index + 1]
                kept = state.scheduler.add_noise(kept, state.noise, torch.tensor([following]))
            latents = (1 - state.inpainting_mask) * kept + state.inpainting_mask * latents
        state.latents = latents
        state.step_index += 1

    def _preview(self, state: Latents, timestep: torch.Tensor, predicted: torch.Tensor) -> Image.Image:
        expected = previews.expected_end(state.scheduler, state.latents, timestep, predicted)
        return previews.to_image(expected, self._parts.latent_to_rgb)

    # --- after the last step ---------------------------------------------------------------------

    @torch.inference_mode()
    def decode(self, job: Job) -> GeneratedImage:
        """Decode latents to RGB and run the safety checker, if the model has one and the task asks for it.

        An image that comes out black or not finite, as happens in half precision, is decoded again in float32. Raises GenerationFailed
        if the latents are not finite; such values persist through all later steps.
        """
        state = _tensors_of(job)
        if not torch.isfinite(state.latents).all():
            raise GenerationFailed("generation produced NaN or infinity; try another seed or scheduler")
        pixels = self._to_pixels(self._parts.vae, state)
        decoded_again = not _is_usable(pixels)
        if decoded_again:
            pixels = self._to_pixels(self._vae_in_float32(), state)
            if not torch.isfinite(pixels).all():
                raise GenerationFailed("the image could not be decoded, even in float32; try another seed or scheduler")
        return self._finished(job, pixels, decoded_again=decoded_again)

    def _finished(self, job: Job, pixels: torch.Tensor, *, decoded_again: bool = False) -> GeneratedImage:
        state = _tensors_of(job)
        flagged = None
        if job.task.safety_check and self._parts.safety_checker is not None:
            pixels, flagged = self._check_safety(pixels)
        (image,) = self._images.postprocess(pixels, output_type="pil", do_denormalize=[not flagged])
        return GeneratedImage(
            image,
            flagged,
            state.dropped_prompt,
            state.dropped_negative_prompt,
            device=self._device_name,
            dtype=str(self._parts.dtype).removeprefix("torch."),
            decoded_again=decoded_again,
            tiled=state.tiled,
        )

    @torch.inference_mode()
    def decode_together(self, jobs: Sequence[Job]) -> list[GeneratedImage | Exception]:
        """Decode several jobs of one size in one call. Each has its image or its own error, as `decode` gives them.

        What does not work together, or does not fit into memory, is decoded one by one.
        """
        pixels = self._pixels_together(jobs) if len(jobs) > 1 else None
        found: list[GeneratedImage | Exception] = []
        for number, job in enumerate(jobs):
            try:
                usable = pixels is not None and _is_usable(pixels[number : number + 1])
                found.append(self._finished(job, pixels[number : number + 1]) if pixels is not None and usable else self.decode(job))
            except torch.AcceleratorError:
                raise
            except Exception as error:
                found.append(error)
        return found

    def _pixels_together(self, jobs: Sequence[Job]) -> torch.Tensor | None:
        """None if it does not fit into memory. Such an autoencoder is not put into tiles: one image may fit."""
        try:
            latents = torch.cat([_tensors_of(job).latents for job in jobs])
            return self._decoded(latents)
        except torch.OutOfMemoryError:
            pass
        torch.cuda.empty_cache()  # outside the handler: the error's traceback holds the intermediate tensors
        return None

    def _decoded(self, latents: torch.Tensor) -> torch.Tensor:
        vae: Any = self._parts.vae
        pixels: torch.Tensor = vae.decode(latents.to(vae.dtype) / vae.config.scaling_factor, return_dict=False)[0]
        return pixels

    @torch.inference_mode()
    def measure_decoding(self, width: int, height: int) -> None:
        """Find out how many images of this size are worth decoding together. On a CPU one: its images keep the bits of diffusers'."""
        if self._parts.device.type == "cpu":
            return
        latents = torch.cat([self._draw_noise(_unprompted(width, height), torch.Generator("cpu").manual_seed(seed)) for seed in range(4)])
        alone = self._decoded(latents[:1])

        def seconds(count: int) -> float | None:
            times: list[float] = []
            try:
                for _ in range(_TIMED_DECODINGS + 1):
                    began_s = time.perf_counter()
                    together = self._decoded(latents[:count])
                    self._wait_for_device()
                    times.append(time.perf_counter() - began_s)
            except torch.OutOfMemoryError:
                return None
            levels = float((together[:1] - alone).clamp(-2, 2).abs().max()) * 127.5
            return min(times[1:]) if levels <= _LEVELS_APART else None

        self.decode_counts = useful_counts(seconds)
        torch.cuda.empty_cache()

    def _to_pixels(self, vae: Any, state: Latents) -> torch.Tensor:
        latents = state.latents.to(vae.dtype) / vae.config.scaling_factor
        pixels: torch.Tensor = _within_memory(vae, state, lambda: vae.decode(latents, return_dict=False, generator=state.generator))[0]
        return pixels

    def _vae_in_float32(self) -> Any:
        """A copy for one image. The shared autoencoder stays as it is, and no memory is held for a rare case."""
        vae = self._parts.vae
        return vae if vae.dtype == torch.float32 else copy.deepcopy(vae).float()

    def _check_safety(self, pixels: torch.Tensor) -> tuple[torch.Tensor, bool]:
        """Run the safety checker, which blanks a flagged image itself."""
        assert self._parts.safety_checker is not None
        assert self._parts.feature_extractor is not None
        checker_inputs = self._parts.feature_extractor(self._images.postprocess(pixels, output_type="pil"), return_tensors="pt")
        clip_input = checker_inputs.pixel_values.to(device=self._parts.device, dtype=self._parts.dtype)
        # The checker writes into its input, which inference tensors allow only for a copy.
        pixels, (flagged,) = self._parts.safety_checker(images=pixels.clone(), clip_input=clip_input)
        return pixels, bool(flagged)


def _unprompted(width: int, height: int) -> Task:
    return Task("txt2img", "", "", width, height, 1, 1.0, 0, "DDIMScheduler", False)


def _within_memory(vae: Any, state: Latents, work: Callable[[], Any]) -> Any:
    """The result of `work`, which runs the autoencoder: in tiles if the whole does not fit into memory, which `state` then says."""
    try:
        return work()
    except torch.OutOfMemoryError:
        logger.warning("Out of memory in the autoencoder: trying again in tiles of %d pixels.", _TILE_SIDE)
    # Outside the handler: the error's traceback holds the intermediate tensors.
    torch.cuda.empty_cache()
    vae.enable_tiling()
    vae.tile_sample_min_size = _TILE_SIDE
    vae.tile_latent_min_size = _TILE_SIDE >> (len(vae.config.block_out_channels) - 1)
    state.tiled = True
    try:
        return work()
    finally:
        vae.disable_tiling()


def _is_usable(pixels: torch.Tensor) -> bool:
    """Whether all values are finite and at least one is not black (-1; pixels are clamped later)."""
    return bool(torch.isfinite(pixels).all() and pixels.max() > _BLACK)


def _tensors_of(job: Job) -> Latents:
    assert job.tensors is not None, "the job has not been prepared"
    return job.tensors


def guidance_embedding(guidance_scale: float, width: int) -> torch.Tensor:
    """The guidance scale as an input of a model that was distilled with it, (1, width): a sinusoidal embedding (Luo et al. 2023, LCM)."""
    half = width // 2
    frequencies = torch.exp(torch.arange(half, dtype=torch.float32) * -(math.log(10000.0) / (half - 1)))
    angles = 1000.0 * torch.tensor([guidance_scale - 1])[:, None] * frequencies[None, :]
    embedding = torch.cat([torch.sin(angles), torch.cos(angles)], dim=1)
    return torch.nn.functional.pad(embedding, (0, width % 2))


def _set_timesteps(scheduler: Any, task: Task) -> None:
    """Raises InvalidRequest if the scheduler does not support this number of steps, which also depends on the model."""
    if _supports(scheduler, task.num_inference_steps):
        return
    allowed = [steps for steps in range(1, MAX_STEPS + 1) if _supports(scheduler, steps)]
    alternative = f"allowed are {allowed[0]} to {allowed[-1]}" if allowed else "or any other number"
    name = sampler_of(task.scheduler)[0]
    raise InvalidRequest(
        f"num_inference_steps: the noise scheduler {name} does not support a step count of {task.num_inference_steps} with this model, "
        f"{alternative}",
        field="num_inference_steps",
    )


def _supports(scheduler: Any, steps: int) -> bool:
    try:
        scheduler.set_timesteps(steps)
    except ValueError:
        return False
    return True


def _copies_in_steps(scheduler: Any, task: Task) -> bool:
    """Whether a step of the noise scheduler copies something to the device: its noise, drawn on the CPU, or coefficients."""
    draws_noise = task.eta > 0 or str(scheduler.config.get("algorithm_type")).startswith("sde")
    return draws_noise or type(scheduler).__name__ in _COPYING_SCHEDULERS


def _step_arguments(scheduler: Any, task: Task, generator: torch.Generator) -> dict[str, Any]:
    """Schedulers that draw noise in a step get the job's generator; the others do not have the parameter."""
    parameters = inspect.signature(scheduler.step).parameters
    arguments: dict[str, Any] = {}
    if "eta" in parameters:
        arguments["eta"] = task.eta
    if "generator" in parameters:
        arguments["generator"] = generator
    return arguments
