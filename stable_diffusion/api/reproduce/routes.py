"""POST /reproduce: generates an image again from the description in its file, and says what differs.

It responds like the native API.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any

from pydantic import Field
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from typing_extensions import TypedDict

from stable_diffusion.api.context import Context, Served
from stable_diffusion.api.deliver import respond
from stable_diffusion.api.reproduce.reproduction import (
    Reproduction,
    differs_in_computing,
    differs_in_input,
    differs_in_loras,
    has_its_mask,
    reproduction_of,
)
from stable_diffusion.api.responses import as_headers, with_error_responses
from stable_diffusion.api.tasks import image_task, text_task
from stable_diffusion.core.errors import InvalidRequest
from stable_diffusion.core.requests import (
    ImageToImageRequest,
    ReproductionRequest,
    TextToImageRequest,
    parse_image_to_image,
    parse_reproduction,
    parse_text_to_image,
)
from stable_diffusion.core.types import GeneratedImage, Kind, Task
from stable_diffusion.images import infotext
from stable_diffusion.images.decode import names_of_texts, read_description, read_image, read_mask, read_transparency_as_mask
from stable_diffusion.models.folder import ModelFolder
from stable_diffusion.web.body import parse_json, read_parts, within_upload_budget
from stable_diffusion.web.decode_queue import decoded

_MAX_SHOWN_NAMES = 8
_INPUTS: dict[Kind, tuple[str, ...]] = {"txt2img": (), "img2img": ("img",), "inpaint": ("img", "mask")}


def make_routes(context: Context) -> list[Route]:
    async def reproduce(request: Request) -> Response:
        asked = await _read_request(request, context)
        reproduction, task = asked.reproduction, asked.task
        if task is None:
            return _description(reproduction, asked.missing, reproduction.differs)
        said = reproduction.infotext
        differs = [*reproduction.differs, *differs_in_loras(said, task), *differs_in_input(said, task)]
        if asked.dry_run:
            return _description(reproduction, [], differs)

        def remarks(image: GeneratedImage) -> dict[str, Any]:
            return {"differs": _as_text([*differs, *differs_in_computing(reproduction.infotext, image)])}

        response = await respond(request, context, task, asked.parameters, remarks)
        # For an asynchronous job or a stream, the differences that are known now.
        response.headers.setdefault("differs", as_headers({"differs": _as_text(differs)})["differs"])
        return response

    return [Route("/reproduce", with_error_responses(reproduce), methods=["POST"])]


@dataclass(frozen=True)
class _Asked:
    """A parsed request. `task` is None if inputs are `missing`, which only a dry run allows."""

    reproduction: Reproduction
    parameters: TextToImageRequest | ImageToImageRequest
    missing: list[str]
    task: Task | None
    dry_run: bool


async def _read_request(request: Request, context: Context) -> _Asked:
    """Read the upload, which is released on return: nothing holds it while the image waits and is generated."""
    with within_upload_budget(request, context.uploads) as uploading:
        files, data = await read_parts(uploading, ("picture",), ("img", "mask"))
        options = parse_reproduction({} if data is None else parse_json(data, "data"))
        served = context.served()
        reproduction = await run_in_threadpool(_read, files["picture"], served.model)
        parameters = _parameters(reproduction, options)
        missing = _missing(reproduction.kind, files)
        if missing and not options.dry_run:
            raise _missing_input(missing[0], reproduction.kind)
        work = partial(_task, parameters, served, files, reproduction.infotext)
        task = None if missing else await decoded(request, context.decoding, work)
        return _Asked(reproduction, parameters, missing, task, options.dry_run)


def _read(content: bytes, model: ModelFolder) -> Reproduction:
    text = read_description(content, "picture")
    if text is None:
        others = ", ".join(map(repr, names_of_texts(content, "picture")[:_MAX_SHOWN_NAMES]))
        raise InvalidRequest(
            f"picture: the file has no infotext: no PNG text named parameters{f' (there are: {others})' if others else ''}, "
            "no EXIF comment. Many programs drop them.",
            field="picture",
        )
    return reproduction_of(infotext.read(text, "picture"), model)


def _parameters(reproduction: Reproduction, options: ReproductionRequest) -> TextToImageRequest | ImageToImageRequest:
    fields = reproduction.fields | {"output_format": options.output_format, "metadata": options.metadata}
    try:
        text_only = reproduction.kind == "txt2img"
        parsed: TextToImageRequest | ImageToImageRequest = parse_text_to_image(fields) if text_only else parse_image_to_image(fields)
    except InvalidRequest as error:
        raise InvalidRequest(f"picture: cannot be generated here: {error.message}", field="picture") from None
    if not reproduction.is_ours:
        return parsed
    # Our own prompts are already cleaned; cleaning them again could change them.
    return parsed.model_copy(update={name: fields[name] for name in ("prompt", "negative_prompt")})


def _missing(kind: Kind, files: dict[str, bytes]) -> list[str]:
    """The missing inputs. Raises InvalidRequest for an input that the image's kind does not use."""
    for name in files:
        if name not in ("picture", *_INPUTS[kind]):
            raise InvalidRequest(f"{name}: must be omitted, the picture is from {kind}, which does not use this part", field=name)
    return [name for name in _INPUTS[kind] if name not in files]


def _missing_input(name: str, kind: Kind) -> InvalidRequest:
    what = "input image" if name == "img" else "mask"
    return InvalidRequest(
        f"{name}: the part is missing; the file of an {kind} image does not contain its {what} (curl: -F {name}=@input.jpg)", field=name
    )


def _task(
    parameters: TextToImageRequest | ImageToImageRequest,
    served: Served,
    files: dict[str, bytes],
    said: infotext.Infotext,
) -> Task:
    if isinstance(parameters, TextToImageRequest):
        return text_task(parameters, served)
    image = read_image(files["img"], "img")
    if "mask" not in files:
        return image_task(parameters, served, image)
    task = image_task(parameters, served, image, read_mask(files["mask"], "mask"))
    if has_its_mask(said, task):
        return task
    # Perhaps the image comes from OpenAI's API, which reads the transparency of a mask.
    try:
        by_transparency = image_task(parameters, served, image, read_transparency_as_mask(files["mask"], "mask"))
    except InvalidRequest:  # nothing in it is transparent
        return task
    return by_transparency if has_its_mask(said, by_transparency) else task


class DryRun(TypedDict):
    """The response to a dry run, which generates nothing."""

    kind: Kind
    parameters: Annotated[dict[str, Any], Field(description="The fields of a request that generates it again.")]
    missing: Annotated[list[str], Field(description="Parts that the generation needs and that were not sent.")]
    differs: Annotated[
        list[str],
        Field(
            description="Differences that are known before generation.",
            examples=[["Model: v1_4 (d3f0a1b2c3), here demo (b7503e29ef)", "torch: 2.12.0, here 2.13.0"]],
        ),
    ]


def _description(reproduction: Reproduction, missing: list[str], differs: list[str]) -> Response:
    response: DryRun = {"kind": reproduction.kind, "parameters": reproduction.fields, "missing": missing, "differs": differs}
    return JSONResponse(response)


def _as_text(differs: list[str]) -> str:
    return "; ".join(differs) or "nothing"
