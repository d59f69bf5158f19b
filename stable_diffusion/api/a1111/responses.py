"""The responses of A1111's API: images, lists, progress and errors, field by field in A1111's form.

Functions over plain data; `routes.py` calls them.
"""

from __future__ import annotations

import base64
import json
import time
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import Field, NonNegativeInt
from starlette.responses import Response
from typing_extensions import TypedDict

from stable_diffusion import __version__
from stable_diffusion.api.a1111.parameters import GenerationBody, ImageToImageBody, missing_schedule
from stable_diffusion.api.responses import image_file, retry_after
from stable_diffusion.core.errors import InvalidRequest, ServiceError
from stable_diffusion.core.schedulers import SCHEDULERS, SCHEDULES, sampler_of
from stable_diffusion.core.types import GeneratedImage, Task
from stable_diffusion.images import infotext
from stable_diffusion.models.embeddings import read_embeddings
from stable_diffusion.models.folder import ModelFolder
from stable_diffusion.models.loras import Loras
from stable_diffusion.state.job_record import JobRecord

PREFIXES = ("/sdapi/", "/internal/")  # of the paths whose errors have this form
_NOT_USED = -1  # A1111's value for a missing subseed or size
_TIMESTAMP = "%Y%m%d%H%M%S"
_LEAST_PROGRESS, _MOST_PROGRESS = 0.01, 0.99  # 0 means an idle server, 1 a finished image


class A1111Pictures(TypedDict):
    images: Annotated[list[str], Field(description="PNG in base64, with the infotext as `parameters`.")]
    parameters: Annotated[dict[str, Any], Field(description="The request's known fields with their defaults.")]
    info: Annotated[str, Field(description="What was generated, as JSON: all_seeds, width, height, infotexts, ...")]


class A1111ServedOptions(TypedDict):
    # No `forge_preset`: with it SillyTavern would take the server for Forge.
    sd_model_checkpoint: str
    samples_format: Literal["png"]
    CLIP_stop_at_last_layers: Literal[1]
    sd_vae: str


class A1111Model(TypedDict):
    title: Annotated[str, Field(description="`sd_model_checkpoint` of the options.")]
    model_name: str
    hash: str
    sha256: None
    filename: str
    config: None


class A1111Vae(TypedDict):
    model_name: str
    filename: str


class A1111Lora(TypedDict):
    name: str
    alias: Annotated[str, Field(description="The name that its training gave it. Prompts may use it, too.")]
    path: str
    metadata: Annotated[dict[str, str], Field(description="Training metadata from its file.")]


class A1111Embedding(TypedDict):
    step: None
    sd_checkpoint: None
    sd_checkpoint_name: None
    shape: NonNegativeInt | None
    vectors: NonNegativeInt | None


class A1111Embeddings(TypedDict):
    loaded: Annotated[dict[str, A1111Embedding], Field(description="By the name that prompts use.")]
    skipped: Annotated[dict[str, A1111Embedding], Field(description="Files that cannot be used.")]


class A1111Sampler(TypedDict):
    name: str
    aliases: list[str]
    options: dict[str, str]


class A1111Scheduler(TypedDict):
    name: str
    label: str
    aliases: None
    default_rho: None
    need_inner_model: None


class A1111Upscaler(TypedDict):
    name: str
    model_name: None
    model_path: None
    model_url: None
    scale: float


class A1111PngInfo(TypedDict):
    info: Annotated[str, Field(description="The infotext in the file, empty if there is none.")]
    items: dict[str, str]
    parameters: Annotated[dict[str, str], Field(description="The infotext's values by A1111's names.")]


class A1111State(TypedDict):
    skipped: Literal[False]
    interrupted: Literal[False]
    job: Annotated[str, Field(description="The kind of the first job, empty if there is none.")]
    job_count: NonNegativeInt
    job_timestamp: str
    job_no: Literal[0]
    sampling_step: NonNegativeInt
    sampling_steps: NonNegativeInt


class A1111Progress(TypedDict):
    progress: Annotated[float, Field(ge=0, le=_MOST_PROGRESS)]
    eta_relative: Annotated[float, Field(ge=0, description="Seconds.")]
    state: A1111State
    current_image: None
    textinfo: None


class A1111Error(TypedDict):
    error: Annotated[str, Field(examples=["InvalidRequest"])]
    detail: Annotated[str, Field(examples=["steps: must be less than or equal to 150"])]
    body: str
    errors: str


ERROR = A1111Error


def images_response(body: GenerationBody, tasks: Sequence[Task], images: Sequence[GeneratedImage], model: ModelFolder) -> A1111Pictures:
    """The response of txt2img and img2img. Encodes the images, which takes a while."""
    results = list(zip(tasks, images, strict=True))
    # A flagged image gets no infotext, as in its file.
    infotexts = ["" if image.flagged else infotext.write(task, image, model) for task, image in results]
    files = (image_file(task, image, model, "png") for task, image in results)
    return {
        "images": [base64.b64encode(file).decode("ascii") for file in files] if body.send_images else [],
        "parameters": _echo(body, tasks[0]),
        "info": json.dumps(_info(body, tasks, images, model, infotexts)),
    }


def _echo(body: GenerationBody, task: Task) -> dict[str, Any]:
    """The known fields of the request, with their defaults."""
    of_model = {"steps": task.num_inference_steps, "cfg_scale": task.guidance_scale}
    echo = {name: of_model[name] if value is None and name in of_model else value for name, value in body.model_dump().items()}
    if isinstance(body, ImageToImageBody) and not body.include_init_images:
        echo |= {"init_images": None, "mask": None}
    return echo


def _info(
    body: GenerationBody, tasks: Sequence[Task], images: Sequence[GeneratedImage], model: ModelFolder, infotexts: list[str]
) -> dict[str, Any]:
    """What was generated. The last fields are not A1111's, except for `comments`."""
    first, count = tasks[0], len(tasks)
    sampler, schedule = sampler_of(first.scheduler)
    return {
        "prompt": first.prompt,
        "all_prompts": [task.prompt for task in tasks],
        "negative_prompt": first.negative_prompt,
        "all_negative_prompts": [task.negative_prompt for task in tasks],
        "seed": first.seed,
        "all_seeds": [task.seed for task in tasks],
        "subseed": _NOT_USED,
        "all_subseeds": [_NOT_USED] * count,
        "subseed_strength": 0,
        "width": first.width,
        "height": first.height,
        "sampler_name": sampler,
        "cfg_scale": first.guidance_scale,
        "steps": first.num_inference_steps,
        "batch_size": body.batch_size,
        "restore_faces": False,
        "face_restoration_model": None,
        "sd_model_name": model.name,
        "sd_model_hash": model.hash,
        "sd_vae_name": None if model.vae is None else model.vae.name,
        "sd_vae_hash": None,
        "seed_resize_from_w": _NOT_USED,
        "seed_resize_from_h": _NOT_USED,
        "denoising_strength": None if first.kind == "txt2img" else first.strength,
        "extra_generation_params": _extra_parameters(body, first, schedule),
        "index_of_first_image": 0,
        "infotexts": infotexts,
        "styles": [],
        "job_timestamp": time.strftime(_TIMESTAMP),
        "clip_skip": first.clip_skip,
        "is_using_inpainting_conditioning": model.only_inpaints,
        "version": f"{infotext.PROGRAM} {__version__}",
        "all_flagged": [image.flagged for image in images],
        "prompt_dropped": images[0].dropped_prompt or None,
        "negative_prompt_dropped": images[0].dropped_negative_prompt or None,
        "comments": _comments(body, first, images[0]),
    }


def _comments(body: GenerationBody, task: Task, image: GeneratedImage) -> list[str]:
    """Remarks for people, one a line, as A1111's page shows them."""
    comments = []
    if body.cfg_scale is not None and body.cfg_scale != task.guidance_scale:
        comments.append(f"cfg_scale: the model does not support {body.cfg_scale:g}, {task.guidance_scale:g} was used")
    dropped = {"prompt": image.dropped_prompt, "negative_prompt": image.dropped_negative_prompt}
    return comments + [f"{name}: too long, these last words were not used: {text}" for name, text in dropped.items() if text]


def _extra_parameters(body: GenerationBody, task: Task, schedule: str | None) -> dict[str, Any]:
    extra: dict[str, Any] = {"Schedule type": schedule} if schedule else {}
    if missing := missing_schedule(body, task.scheduler):
        extra["Schedule type"] = f"Automatic ({missing} is not available for {sampler_of(task.scheduler)[0]})"
    if task.loras:
        extra["Lora hashes"] = infotext.lora_hashes(task)
    if task.kind == "inpaint" and isinstance(body, ImageToImageBody):
        extra |= {"Mask blur": body.mask_blur, "Masked content": "original"}
    return extra


def options_response(model: ModelFolder) -> A1111ServedOptions:
    return {
        "sd_model_checkpoint": model.name,
        "samples_format": "png",
        "CLIP_stop_at_last_layers": 1,
        "sd_vae": "Automatic" if model.vae is None else model.vae.name,
    }


def models_response(model: ModelFolder) -> list[A1111Model]:
    return [{"title": model.name, "model_name": model.name, "hash": model.hash, "sha256": None, "filename": model.name, "config": None}]


def vaes_response(model: ModelFolder) -> list[A1111Vae]:
    """The autoencoder that replaces the model's own, if one does."""
    return [] if model.vae is None else [{"model_name": model.vae.name, "filename": model.vae.name}]


def loras_response(loras: Loras) -> list[A1111Lora]:
    return [
        {"name": file.name, "alias": file.alias, "path": file.path.name, "metadata": dict(file.metadata)} for file in loras.files.values()
    ]


def embeddings_response(model: ModelFolder) -> A1111Embeddings:
    """The textual inversions that prompts may name, and the files in the folder that cannot be used."""
    found = read_embeddings(model)
    loaded: dict[str, A1111Embedding] = {
        name: {"step": None, "sd_checkpoint": None, "sd_checkpoint_name": None, "shape": one.width, "vectors": one.vectors}
        for name, one in found.files.items()
    }
    no_facts: A1111Embedding = {"step": None, "sd_checkpoint": None, "sd_checkpoint_name": None, "shape": None, "vectors": None}
    return {"loaded": loaded, "skipped": dict.fromkeys(found.refused, no_facts)}


def samplers_response() -> list[A1111Sampler]:
    """Every noise scheduler under its first short name. DPM++ 2M with Karras' noise levels is a separate sampler."""
    return [{"name": name, "aliases": aliases, "options": {}} for name, *aliases in SCHEDULERS.values()]


def schedules_response() -> list[A1111Scheduler]:
    return [
        {"name": label.lower().replace(" ", "_"), "label": label, "aliases": None, "default_rho": None, "need_inner_model": None}
        for label in SCHEDULES
    ]


UPSCALERS: list[A1111Upscaler] = [{"name": "None", "model_name": None, "model_path": None, "model_url": None, "scale": 1}]
# Other paths that clients request at start. This server has nothing to list there.
EMPTY_LISTS: dict[str, Any] = {
    "/sdapi/v1/latent-upscale-modes": [],
    "/sdapi/v1/prompt-styles": [],
    "/sdapi/v1/hypernetworks": [],
    "/sdapi/v1/face-restorers": [],
    "/sdapi/v1/realesrgan-models": [],
    "/sdapi/v1/script-info": [],
    "/sdapi/v1/extensions": [],
    "/sdapi/v1/scripts": {"txt2img": [], "img2img": []},
    "/sdapi/v1/cmd-flags": {},
    "/sdapi/v1/memory": {"ram": {}, "cuda": {}},
    "/internal/ping": {},
}


def png_info_response(text: str) -> A1111PngInfo:
    """The text in an image's file: unchanged and, if it is an infotext, as values by name."""
    try:
        parsed = infotext.read(text)
    except InvalidRequest:
        return {"info": text, "items": {}, "parameters": {}}
    values = {"Prompt": parsed.prompt, "Negative prompt": parsed.negative_prompt, **parsed.values}
    width, _, height = values.get("Size", "").partition("x")
    sides = {"Size-1": width, "Size-2": height} if height else {}
    return {"info": text, "items": {"parameters": text}, "parameters": values | sides}


def progress_response(jobs: Sequence[JobRecord]) -> A1111Progress:
    """The progress of one caller's unfinished images. Idle is exactly progress 0 and job_count 0, for which clients wait."""
    standings = [job.progress for job in jobs]
    done, steps = sum(standing.step for standing in standings), sum(standing.steps for standing in standings)
    furthest = max(standings, key=lambda standing: standing.step, default=None)
    return {
        "progress": min(max(done / max(steps, 1), _LEAST_PROGRESS), _MOST_PROGRESS) if jobs else 0.0,
        "eta_relative": max((standing.seconds_left for standing in standings), default=0.0),
        "state": {
            "skipped": False,
            "interrupted": False,
            "job": jobs[0].task.kind if jobs else "",
            "job_count": len(jobs),
            "job_timestamp": time.strftime(_TIMESTAMP, time.localtime(jobs[0].created_at)) if jobs else "0",
            "job_no": 0,
            "sampling_step": furthest.step if furthest else 0,
            "sampling_steps": furthest.steps if furthest else 0,
        },
        "current_image": None,
        "textinfo": None,
    }


def json_response(content: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    """JSON in ASCII: clients' texts may contain lone surrogates, which UTF-8 cannot encode."""
    return Response(json.dumps(content), status, headers, media_type="application/json")


def error_response(error: ServiceError) -> Response:
    """An error in A1111's form, with 422 for a wrong field. Subclasses of InvalidRequest keep their own status."""
    status = 422 if type(error) is InvalidRequest else error.status
    return json_response(_error_body(type(error).__name__, error.message), status, retry_after(error))


def refusal(status: int, kind: str, message: str, headers: dict[str, str] | None = None) -> Response:
    """The response to a request that did not reach an endpoint, in A1111's form."""
    return json_response(_error_body("".join(word.capitalize() for word in kind.split("_")), message), status, headers)


def _error_body(name: str, message: str) -> A1111Error:
    return {"error": name, "detail": message, "body": "", "errors": message}
