"""Pictures and masks as A1111's bodies have them: base64, resize modes, inversion and blur. Held against Pillow and numpy."""

from __future__ import annotations

import base64
import io

import numpy as np
import pytest
from PIL import Image

from stable_diffusion.api.a1111 import images
from stable_diffusion.api.a1111.images import UnreadablePicture, read_initial_image, read_inpainting_mask, resize
from stable_diffusion.api.a1111.parameters import ImageToImageBody
from stable_diffusion.core.errors import InvalidRequest, TooLarge


def encoded(picture: Image.Image) -> str:
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode("ascii")


def half_white(size: tuple[int, int] = (64, 64)) -> Image.Image:
    """A mask whose right half is white."""
    mask = Image.new("L", size, 0)
    mask.paste(255, (size[0] // 2, 0, size[0], size[1]))
    return mask


def masked(**fields: object) -> np.ndarray:
    body = ImageToImageBody.model_validate({"mask": encoded(half_white()), "mask_blur": 0, **fields})
    mask = read_inpainting_mask(body, (64, 64))
    assert mask is not None
    assert mask.mode == "L"
    return np.asarray(mask)


@pytest.mark.parametrize("written", ["{}", "data:image/png;base64,{}", "data:image/png;base64,\n{}\n"])
def test_a_picture_may_be_in_lines_and_in_a_data_url(written: str, input_picture: Image.Image) -> None:
    text = encoded(input_picture)
    in_lines = "\r\n".join(text[start : start + 76] for start in range(0, len(text), 76))
    for one in (text, in_lines):
        read = read_initial_image(ImageToImageBody.model_validate({"init_images": [written.format(one)]}))
        assert np.array_equal(np.asarray(read), np.asarray(input_picture))


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("!!!!", "init_images: not base64"),
        ("abc", "init_images: not base64"),
        ("https://example.org/picture.png", "the server fetches no URLs"),
        ("\u00e9\ud800", "init_images: not base64"),
        ("", "init_images: the file is empty"),
        ("data:image/png;base64", "init_images: the file is empty"),
        ("AAAA", "init_images: not a PNG, JPEG or WebP image"),
    ],
)
def test_what_is_no_picture_is_refused_by_name(text: str, told: str) -> None:
    with pytest.raises(UnreadablePicture, match=told) as caught:
        read_initial_image(ImageToImageBody.model_validate({"init_images": [text]}))
    assert caught.value.status == 400


def test_white_is_repainted_and_inversion_turns_that_around() -> None:
    white_right = masked()
    assert white_right[:, :32].max() == 0
    assert white_right[:, 32:].min() == 255
    for inverted in (masked(inpainting_mask_invert=1), masked(inpainting_mask_invert=True)):
        assert np.array_equal(inverted, 255 - white_right)


def test_of_a_mask_with_transparency_the_opaque_is_repainted_whatever_its_colour() -> None:
    for colour in ("black", "white"):
        mask = Image.new("RGBA", (64, 64), colour)
        mask.putalpha(half_white())
        assert np.array_equal(masked(mask=encoded(mask)), np.asarray(half_white()))
    opaque = half_white().convert("RGBA")
    assert np.array_equal(masked(mask=encoded(opaque)), np.asarray(half_white()))


def test_a_mask_that_repaints_nothing_is_refused() -> None:
    for colour, invert, missing in ((0, 0, "white"), (255, 1, "black")):
        with pytest.raises(InvalidRequest, match=f"mask: no pixel is {missing}, so nothing is repainted") as caught:
            masked(mask=encoded(Image.new("L", (64, 64), colour)), inpainting_mask_invert=invert)
        assert not isinstance(caught.value, UnreadablePicture)


def test_what_is_too_large_is_refused_before_it_is_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "MAX_UPLOAD_BYTES", 300)
    monkeypatch.setattr("base64.b64decode", None)
    with pytest.raises(TooLarge, match="init_images: the file has more than 300 bytes"):
        read_initial_image(ImageToImageBody.model_validate({"init_images": ["AAAA\n" * 102]}))


def test_blur_is_gaussian_with_that_deviation() -> None:
    row = masked(mask_blur=4)[32].astype(float)
    assert np.all(np.diff(row) >= 0)
    assert row[0] == 0
    assert row[-1] == 255
    # The slope of a blurred edge is a Gaussian: 68.3 % of the rise lies within one deviation of the edge.
    rise = np.interp([27.5 + 8, 27.5], np.arange(64), row)
    assert (rise[0] - rise[1]) / 255 == pytest.approx(0.683, abs=0.04)


def test_there_is_no_mask_where_none_was_sent() -> None:
    assert read_inpainting_mask(ImageToImageBody.model_validate({}), (64, 64)) is None


def test_a_smaller_mask_is_scaled_and_one_of_other_proportions_refused() -> None:
    small = encoded(half_white((32, 32)))
    assert masked(mask=small).shape == (64, 64)
    with pytest.raises(InvalidRequest, match="mask: 64 x 32 does not have the proportions of the image, 64 x 64"):
        masked(mask=encoded(half_white((64, 32))))


@pytest.fixture
def wide() -> Image.Image:
    """128 x 64: red, white in the middle, blue."""
    picture = Image.new("RGB", (128, 64), "white")
    picture.paste("red", (0, 0, 32, 64))
    picture.paste("blue", (96, 0, 128, 64))
    return picture


def test_mode_0_stretches(wide: Image.Image) -> None:
    pixels = np.asarray(resize(wide, 64, 64, 0))
    assert np.array_equal(pixels, np.asarray(wide.resize((64, 64), Image.Resampling.LANCZOS)))
    assert tuple(pixels[32, 4]) == (255, 0, 0)
    assert tuple(pixels[32, 60]) == (0, 0, 255)


def test_mode_1_keeps_proportions_and_cuts_the_sides(wide: Image.Image) -> None:
    assert np.asarray(resize(wide, 64, 64, 1)).min() == 255, "only the white middle is left"


def test_mode_2_shows_all_and_continues_the_edges(wide: Image.Image) -> None:
    wide.paste("green", (0, 0, 128, 2))
    pixels = np.asarray(resize(wide, 64, 64, 2))
    within = np.asarray(wide.resize((64, 32), Image.Resampling.LANCZOS))
    assert np.array_equal(pixels[16:48], within)
    assert np.array_equal(pixels[:16], np.repeat(within[:1], 16, axis=0))
    assert np.array_equal(pixels[48:], np.repeat(within[-1:], 16, axis=0))


def test_mode_2_continues_the_sides_of_a_tall_picture(wide: Image.Image) -> None:
    tall = wide.transpose(Image.Transpose.ROTATE_90)
    pixels = np.asarray(resize(tall, 128, 64, 2))
    assert np.array_equal(pixels[:, :48], np.repeat(pixels[:, 48:49], 48, axis=1))
    assert np.array_equal(pixels[:, 80:], np.repeat(pixels[:, 79:80], 48, axis=1))


@pytest.mark.parametrize("size", [(1, 4000), (4000, 1), (1, 1), (7, 3)])
@pytest.mark.parametrize("mode", [0, 1, 2])
def test_pictures_of_any_proportions_get_the_size(size: tuple[int, int], mode: int) -> None:
    assert resize(Image.new("RGB", size, "red"), 72, 64, mode).size == (72, 64)
    assert resize(Image.new("L", size, 255), 72, 64, mode).getextrema() == (255, 255)
