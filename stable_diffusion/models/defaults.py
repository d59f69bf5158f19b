"""A model's values for fields that a request omits: from its defaults.json, else from its configuration.

Takes parsed JSON; does not know requests.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from stable_diffusion.core.errors import InvalidRequest, ModelFolderError
from stable_diffusion.core.limits import MAX_GUIDANCE_SCALE, MAX_STEPS
from stable_diffusion.core.schedulers import class_and_options, known_scheduler
from stable_diffusion.core.validation import Side, validated

FILE_NAME = "defaults.json"
_USUAL_STEPS, _USUAL_GUIDANCE_SCALE = 50, 7.5
_XL_GUIDANCE_SCALE = 5.0  # as in diffusers
_FEW_STEPS = 4
_LCM_GUIDANCE_SCALE = 8.5  # of a model that takes the scale as an input (Luo et al. 2023)

_GuidanceScale = Annotated[float, Field(ge=0, le=MAX_GUIDANCE_SCALE)]


class DefaultsFile(BaseModel):
    """The content of defaults.json. Every field may be missing."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, frozen=True)

    steps: int | None = Field(None, ge=1, le=MAX_STEPS, description="Denoising steps.")
    guidance_scale: _GuidanceScale | None = Field(None, description="Guidance scale.")
    guidance_scale_range: list[_GuidanceScale] | None = Field(
        None,
        min_length=2,
        max_length=2,
        description="The lowest and the highest guidance scale that the model supports. Requests outside are refused; A1111's API uses "
        "the nearest value and says so in `info`.",
    )
    scheduler: Annotated[str, AfterValidator(known_scheduler)] | None = Field(None, description="Noise scheduler, by any of its names.")
    prediction_type: Literal["epsilon", "v_prediction"] | None = Field(
        None, description="What the UNet predicts, where the model's files say it wrongly or not at all (`epsilon`: the noise)."
    )
    vae: str | None = Field(
        None, min_length=1, description="A file with the autoencoder (VAE) to use instead of the model's, from the folder of this file."
    )
    width: Side = Field(None, description="Native width in pixels.")
    height: Side = Field(None, description="Native height in pixels.")


@dataclass(frozen=True)
class Defaults:
    """Values for omitted fields. The scale is in the range; without a stated range, that is the range of all requests."""

    num_inference_steps: int = _USUAL_STEPS
    guidance_scale: float = _USUAL_GUIDANCE_SCALE
    guidance_scale_range: tuple[float, float] = (0.0, MAX_GUIDANCE_SCALE)

    def allowed_guidance_scale(self, asked: float) -> float:
        """The nearest one within the range."""
        low, high = self.guidance_scale_range
        return min(max(asked, low), high)


def read_defaults(file: Path, content: dict[str, Any]) -> DefaultsFile:
    """Check the content of defaults.json. Raises ModelFolderError, which names `file` and the fault in it."""
    try:
        stated = validated(DefaultsFile, content)
    except InvalidRequest as error:
        raise ModelFolderError(f"{file}: {error.message}") from None
    if stated.guidance_scale_range is not None:
        low, high = stated.guidance_scale_range
        if low > high:
            raise ModelFolderError(f"{file}: guidance_scale_range: the first value must not exceed the second, got {low:g} and {high:g}")
        if stated.guidance_scale is not None and not low <= stated.guidance_scale <= high:
            raise ModelFolderError(f"{file}: guidance_scale: must be in the guidance_scale_range, {low:g} to {high:g}")
    return stated


def defaults_of(stated: DefaultsFile, scheduler: str, unet: dict[str, Any], scheduler_config: dict[str, Any]) -> Defaults:
    """The file's values, and for the rest those that the configurations show. `scheduler` is the one that is used by default."""
    steps, guidance_scale = _shown_by(scheduler, unet, scheduler_config)
    allowed = tuple(stated.guidance_scale_range or (0.0, MAX_GUIDANCE_SCALE))
    defaults = Defaults(steps if stated.steps is None else stated.steps, guidance_scale, (allowed[0], allowed[1]))
    asked = guidance_scale if stated.guidance_scale is None else stated.guidance_scale
    return replace(defaults, guidance_scale=defaults.allowed_guidance_scale(asked))


def _shown_by(scheduler: str, unet: dict[str, Any], config: dict[str, Any]) -> tuple[int, float]:
    """Steps and guidance scale. Only three signs are reliable; a model's name is not."""
    if unet.get("time_cond_proj_dim") is not None:
        return _FEW_STEPS, _LCM_GUIDANCE_SCALE
    if class_and_options(scheduler)[0] == "LCMScheduler":
        return _FEW_STEPS, 1.0
    is_turbo = (
        config.get("timestep_spacing") == "trailing"
        and config.get("prediction_type", "epsilon") == "epsilon"
        and not config.get("rescale_betas_zero_snr")
    )
    if is_turbo:
        return _FEW_STEPS, 0.0
    return _USUAL_STEPS, _XL_GUIDANCE_SCALE if unet.get("addition_embed_type") == "text_time" else _USUAL_GUIDANCE_SCALE
