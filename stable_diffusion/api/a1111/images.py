"""The image and the mask of an A1111 body, from base64 to the output size: resize modes, inversion, blur.

Does not depend on HTTP or on the loaded model.
"""

from __future__ import annotations

import base64
from collections.abc import Callable
from typing import TypeVar

from PIL import Image, ImageFilter, ImageOps

from stable_diffusion.api.a1111.parameters import ImageToImageBody, PngInfoBody
from stable_diffusion.core.errors import InvalidRequest, TooLarge
from stable_diffusion.core.types import GeneratedImage, Task
from stable_diffusion.images.decode import MAX_UPLOAD_BYTES, read_description, read_image, read_mask_or_opacity
from stable_diffusion.images.transform import fit, scale_mask

T = TypeVar("T")

_WHITE_SPACE = b" \t\r\n\v\f"


class UnreadablePicture(InvalidRequest):
    """An image that cannot be decoded: status 400, while other errors in a body are 422. Clients see this class's name as `error`."""


def read_initial_image(body: ImageToImageBody) -> Image.Image:
    """The body's only image, upright RGB. Raises UnreadablePicture or TooLarge."""
    return _decoded(body.init_images[0], "init_images", read_image)


def read_infotext(body: PngInfoBody) -> str:
    """The description in an image's file; "" if there is none. Raises UnreadablePicture or TooLarge."""
    return _decoded(body.image, "image", read_description) or ""


def unchanged_image(task: Task) -> GeneratedImage:
    """The result of an img2img task of strength 0: its input. Nothing was generated, so nothing was checked."""
    assert task.image is not None
    return GeneratedImage(task.image, flagged=None, dropped_prompt="", dropped_negative_prompt="")


def read_inpainting_mask(body: ImageToImageBody, image_size: tuple[int, int]) -> Image.Image | None:
    """The body's mask, inverted and blurred as requested and scaled to its image's size; None if there is none.

    Raises UnreadablePicture, TooLarge, or InvalidRequest if its proportions differ from the image's or it repaints nothing.
    """
    if not body.mask:
        return None
    mask = _decoded(body.mask, "mask", read_mask_or_opacity)
    if body.inpainting_mask_invert:
        mask = ImageOps.invert(mask)
    if body.mask_blur:
        mask = mask.filter(ImageFilter.GaussianBlur(body.mask_blur))
    mask = scale_mask(mask, image_size, "mask")
    if mask.getextrema() == (0, 0):
        repainted = "black" if body.inpainting_mask_invert else "white"
        raise InvalidRequest(
            f"mask: no pixel is {repainted}, so nothing is repainted (inpainting_mask_invert swaps the colours)", field="mask"
        )
    return mask


def resize(image: Image.Image, width: int, height: int, resize_mode: int) -> Image.Image:
    """Resize to `width` x `height` in A1111's mode. 0: stretch, 1: scale to cover and crop, 2: scale to fit and continue the edges."""
    if resize_mode == 0:
        return image.resize((width, height), Image.Resampling.LANCZOS)
    if resize_mode == 1:
        return fit(image, width, height)
    scale = min(width / image.width, height / image.height)
    within = max(1, round(image.width * scale)), max(1, round(image.height * scale))
    return _with_edges_continued(image.resize(within, Image.Resampling.LANCZOS), width, height)


def _with_edges_continued(image: Image.Image, width: int, height: int) -> Image.Image:
    """Centre an image in `width` x `height` and repeat its outermost rows or columns up to the border."""
    left, top = (width - image.width) // 2, (height - image.height) // 2
    right, bottom = left + image.width, top + image.height
    canvas = Image.new(image.mode, (width, height))
    canvas.paste(image, (left, top))
    if top or bottom < height:
        canvas.paste(canvas.crop((0, top, width, top + 1)).resize((width, max(top, 1))), (0, 0))
        canvas.paste(canvas.crop((0, bottom - 1, width, bottom)).resize((width, max(height - bottom, 1))), (0, bottom))
    if left or right < width:
        canvas.paste(canvas.crop((left, 0, left + 1, height)).resize((max(left, 1), height)), (0, 0))
        canvas.paste(canvas.crop((right - 1, 0, right, height)).resize((max(width - right, 1), height)), (right, 0))
    return canvas


def _decoded(text: str, field: str, read: Callable[[bytes, str], T]) -> T:
    try:
        return read(_bytes_of(text, field), field)
    except InvalidRequest as error:
        raise UnreadablePicture(error.message, problems=error.problems) from None


def _bytes_of(text: str, field: str) -> bytes:
    """Decode base64, with or without line breaks, or a data URL."""
    if text.startswith("data:"):
        text = text.partition(",")[2]
    try:
        encoded = text.encode("ascii").translate(None, _WHITE_SPACE)
        if len(encoded) * 3 // 4 > MAX_UPLOAD_BYTES + 2:  # of padding
            raise TooLarge(f"{field}: the file has more than {MAX_UPLOAD_BYTES} bytes", field=field)
        return base64.b64decode(encoded, validate=True)
    except ValueError:
        raise InvalidRequest(f"{field}: not base64 (the server fetches no URLs)", field=field) from None
