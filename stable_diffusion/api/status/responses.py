"""The responses of /status and /capabilities: their fields, and how they are filled."""

from __future__ import annotations

import time
from typing import Annotated, Any

from pydantic import Field, NonNegativeInt
from typing_extensions import NotRequired, TypedDict

from stable_diffusion import __version__
from stable_diffusion.api.tasks import kinds_of
from stable_diffusion.api.times import Time, time_at
from stable_diffusion.core.limits import MAX_CLIP_SKIP, MAX_IMAGES
from stable_diffusion.core.requests import ImageToImageRequest, LoraRequest
from stable_diffusion.core.safety import SafetyPolicy
from stable_diffusion.core.schedulers import SCHEDULERS
from stable_diffusion.core.types import ImageFormat, Kind
from stable_diffusion.images.decode import MAX_UPLOAD_BYTES, MAX_UPLOAD_PIXELS, MAX_UPLOAD_SIDE
from stable_diffusion.images.encode import MEDIA_TYPES
from stable_diffusion.models.embeddings import read_embeddings
from stable_diffusion.models.folder import ModelFolder
from stable_diffusion.models.loras import Loras
from stable_diffusion.runner.readiness import NOT_ANSWERING, stage_of
from stable_diffusion.state.runner_status import STAGES, RunnerState, Stage

# JSON Schema's names for the limits of a field.
_LIMITS = ("minimum", "exclusiveMinimum", "maximum", "exclusiveMaximum", "multipleOf", "minLength", "maxLength", "maxItems", "default")


class ServedModel(TypedDict):
    name: str
    hash: str
    is_demo: bool


class BatchLimit(TypedDict):
    width: NonNegativeInt
    height: NonNegativeInt
    pictures: NonNegativeInt
    reason: str


class Execution(TypedDict):
    way: Annotated[str, Field(description="As SD_EXECUTION names it.")]
    reason: str


class RunnerStatus(TypedDict):
    index: NonNegativeInt
    stage: Stage
    since: Annotated[Time, Field(description="When the stage began.")]
    uptime_s: float
    precision: Annotated[str, Field(description="The precision that was requested.")]
    device: Annotated[str | None, Field(description="null until the weights are loaded.")]
    dtype: Annotated[str | None, Field(description="The type that is used for computation; null until the weights are loaded.")]
    prediction_type: Annotated[
        str | None, Field(description="What the model's UNet predicts: epsilon (the noise), v_prediction or sample; null until then too.")
    ]
    caps: Annotated[
        list[BatchLimit], Field(description="The batch limits: how many images may share a step, and why. The native size comes first.")
    ]
    execution: Annotated[
        Execution | None, Field(description="The way in which steps are computed, and why; null until it is chosen, at the end of a start.")
    ]
    versions: dict[str, str]


class SharedState(TypedDict):
    reachable: Annotated[bool, Field(description="Whether the store that the machines share answers now.")]


class Status(TypedDict):
    ready: Annotated[bool, Field(description="Whether an image can be generated now, as /readyz reports.")]
    stage: Annotated[
        str, Field(description="The stage of the runner that is furthest.", json_schema_extra={"enum": [*STAGES, NOT_ANSWERING]})
    ]
    model: ServedModel
    version: Annotated[str, Field(description="The version of this service's API.")]
    runners: Annotated[list[RunnerStatus], Field(description="The model processes. One that has just started may not be listed yet.")]
    shared_state: NotRequired[Annotated[SharedState, Field(description="Only where SD_SHARED_STATE is set.")]]


class Size(TypedDict):
    width: NonNegativeInt
    height: NonNegativeInt


class UploadLimits(TypedDict):
    max_bytes: NonNegativeInt
    max_pixels: NonNegativeInt
    max_side: NonNegativeInt


class Safety(TypedDict):
    policy: Annotated[
        SafetyPolicy,
        Field(
            description="always: every image is checked. default-on: all but those requested with safety_check: false. "
            "off: only those requested with safety_check: true."
        ),
    ]
    has_checker: Annotated[bool, Field(description="Whether the model has a safety checker.")]


class Scheduler(TypedDict):
    scheduler: Annotated[str, Field(json_schema_extra={"enum": list(SCHEDULERS)})]
    names: list[str]


class LoraName(TypedDict):
    name: str
    alias: str


class Capabilities(TypedDict):
    model: str
    kinds: list[Kind]
    native_size: Size
    fields: Annotated[
        dict[str, dict[str, Any]],
        Field(description="The limits and the default of each field with this model, in the terms of JSON Schema."),
    ]
    upload: UploadLimits
    max_images: Annotated[NonNegativeInt, Field(description="Per request, in APIs that allow several images.")]
    max_pixel_steps: Annotated[
        NonNegativeInt, Field(description="Per request: width x height x num_inference_steps, summed over its images.")
    ]
    safety: Safety
    schedulers: Annotated[
        list[Scheduler], Field(description="Noise schedulers: the name in responses, and other names that requests may use.")
    ]
    default_scheduler: str
    loras: Annotated[list[LoraName], Field(description="The LoRAs that requests may name, by name or alias.")]
    embeddings: Annotated[list[str], Field(description="The textual inversions that prompts may name.")]
    output_formats: list[ImageFormat]
    previews: bool


def status_response(model: ModelFolder, runners: list[RunnerState], ready: bool, is_store_reachable: bool | None) -> Status:
    """`is_store_reachable`: None if the machine shares nothing."""
    status: Status = {
        "ready": ready,
        "stage": stage_of(runners, ready=ready),
        "model": {"name": model.name, "hash": model.hash, "is_demo": model.is_demo},
        "version": __version__,
        "runners": [_runner(runner) for runner in runners],
    }
    if is_store_reachable is not None:
        status["shared_state"] = {"reachable": is_store_reachable}
    return status


def _runner(runner: RunnerState) -> RunnerStatus:
    placement = runner.placement
    return {
        "index": runner.index or 0,  # published runners have one
        "stage": runner.stage,
        "since": time_at(runner.since_s),
        "uptime_s": round(time.time() - runner.started_s, 1),
        "precision": runner.precision,
        "device": None if placement is None else placement.device,
        "dtype": None if placement is None else placement.dtype,
        "prediction_type": None if placement is None else placement.prediction_type,
        "caps": [
            {"width": batch_limit.width, "height": batch_limit.height, "pictures": batch_limit.images, "reason": batch_limit.reason}
            for batch_limit in runner.batch_limits
        ],
        "execution": None if runner.execution is None else {"way": runner.execution.way, "reason": runner.execution.reason},
        "versions": {} if placement is None else placement.versions,
    }


def capabilities_response(model: ModelFolder, policy: SafetyPolicy, loras: Loras) -> Capabilities:
    """Reads folders: do not call it on an event loop."""
    fields = ImageToImageRequest.model_json_schema()["properties"]
    defaults = model.defaults
    least, greatest = defaults.guidance_scale_range
    lora_fields = LoraRequest.model_json_schema()["properties"]
    added: dict[str, dict[str, Any]] = {
        "num_inference_steps": {"default": defaults.num_inference_steps},
        "guidance_scale": {"default": defaults.guidance_scale, "minimum": least, "maximum": greatest},
        "width": {"maximum": model.max_side},
        "height": {"maximum": model.max_side},
        "clip_skip": {"maximum": min(model.text_layers, MAX_CLIP_SKIP)},
        "loras": {"items": {"properties": {name: _limits(field) for name, field in lora_fields.items()}}},
    }
    return {
        "model": model.name,
        "kinds": list(kinds_of(model)),
        "native_size": {"width": model.native_width, "height": model.native_height},
        "fields": {name: limits | added.get(name, {}) for name, field in fields.items() if (limits := _limits(field))},
        "upload": {"max_bytes": MAX_UPLOAD_BYTES, "max_pixels": MAX_UPLOAD_PIXELS, "max_side": MAX_UPLOAD_SIDE},
        "max_images": MAX_IMAGES,
        "max_pixel_steps": model.max_pixel_steps,
        "safety": {"policy": policy, "has_checker": model.has_safety_checker},
        "schedulers": [{"scheduler": scheduler, "names": list(names)} for scheduler, names in SCHEDULERS.items()],
        "default_scheduler": model.scheduler,
        "loras": [{"name": file.name, "alias": file.alias} for file in loras.files.values()],
        "embeddings": list(read_embeddings(model).files),
        "output_formats": list(MEDIA_TYPES),
        "previews": "preview_every_steps" in fields,
    }


def _limits(field: dict[str, Any]) -> dict[str, Any]:
    """The limits of a field; for a field that may be null, those of its value."""
    value: dict[str, Any] = next((one for one in field.get("anyOf", ()) if one.get("type") != "null"), {})
    return {name: limit for name, limit in {**value, **field}.items() if name in _LIMITS}
