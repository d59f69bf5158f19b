"""Uploads with a colour profile look as other programs show them, and what is drawn says that it is sRGB."""

from __future__ import annotations

import io
import json
import random
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms

from stable_diffusion.core.types import ImageFormat
from stable_diffusion.images.colour import SRGB_PROFILE
from stable_diffusion.images.decode import read_image, read_mask
from stable_diffusion.images.encode import encode, encode_preview
from tests import profiles
from tests.programs import cwebp, exiftool, imagemagick, pixels_by_imagemagick

CASES = Path(__file__).parent / "cases"
SIDE = 32
MAX_LEVELS = 2  # ImageMagick computes in 16 bits
SCREENS = {
    "Display P3": profiles.of_screen(profiles.DISPLAY_P3),
    "Adobe RGB": profiles.of_screen(profiles.ADOBE_RGB),
    "a scanner's table": profiles.of_scanner(),
}


def colours(channels: int = 3) -> bytes:
    """Smooth, so that JPEG changes little: two channels along the sides, the others along the diagonals."""
    across, down = np.meshgrid(np.linspace(0, 255, SIDE), np.linspace(0, 255, SIDE))
    planes = [across, down, (across + down) / 2, (255 - across + down) / 2]
    return np.stack(planes[:channels], axis=-1).round().astype(np.uint8).tobytes()


def made(folder: Path, mode: str, profile: bytes, *options: str) -> bytes:
    """A picture of `colours` by ImageMagick, with that profile."""
    (folder / "of.icc").write_bytes(profile)
    raw = colours({"gray": 1, "rgb": 3, "rgba": 4, "cmyk": 4}[mode])
    return imagemagick("-size", f"{SIDE}x{SIDE}", "-depth", "8", f"{mode}:-", "-profile", folder / "of.icc", *options, file=raw)


def to_srgb(folder: Path) -> tuple[str | Path, ...]:
    """What has ImageMagick convert a picture to sRGB."""
    (folder / "srgb.icc").write_bytes(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    return "-intent", "perceptual", "-profile", folder / "srgb.icc"


def made_by_others(folder: Path, screen: bytes) -> dict[str, bytes]:
    png = made(folder, "rgb", screen, "png:-")
    (folder / "of.png").write_bytes(png)
    return {
        "png": png,
        "png of 16 bits": made(folder, "rgb", screen, "-depth", "16", "png48:-"),
        "png of a palette": made(folder, "rgb", screen, "-colors", "60", "+dither", "png8:-"),
        "png with alpha": made(folder, "rgba", screen, "png32:-"),
        "jpeg": made(folder, "rgb", screen, "-quality", "98", "-sampling-factor", "1x1", "jpeg:-"),
        "webp of ImageMagick": made(folder, "rgb", screen, "-define", "webp:lossless=true", "webp:-"),
        "webp of cwebp": cwebp("-lossless", "-exact", "-metadata", "icc", file=folder / "of.png"),
    }


@pytest.mark.parametrize("screen", SCREENS)
def test_colours_of_other_screens_become_what_imagemagick_makes_of_them(tmp_path: Path, screen: str) -> None:
    # Of a table LittleCMS makes another one for 8 bits, and interpolates in both.
    most = 10 if "table" in screen else MAX_LEVELS
    for name, content in made_by_others(tmp_path, SCREENS[screen]).items():
        expected = pixels_by_imagemagick(content, *to_srgb(tmp_path), "-background", "white", "-alpha", "remove")
        unconverted = pixels_by_imagemagick(content, "-background", "white", "-alpha", "remove")
        assert np.abs(expected - unconverted).max() > 20, f"{name}: the profile must matter"
        seen = np.asarray(read_image(content, "img")).astype(int)
        differing = np.abs(seen - expected)
        assert differing.max() <= (most if name != "jpeg" else most + 1), name
        assert differing.mean() < 1, name


def test_greys_of_another_gamma_become_what_imagemagick_makes_of_them(tmp_path: Path) -> None:
    for options in (("png:-",), ("-quality", "98", "jpeg:-")):
        content = made(tmp_path, "gray", profiles.of_grey(1.6), *options)
        expected = pixels_by_imagemagick(content, *to_srgb(tmp_path), "-colorspace", "sRGB", "-type", "TrueColor")
        assert np.abs(expected - pixels_by_imagemagick(content)).max() > 20, "the profile must matter"
        assert np.abs(np.asarray(read_image(content, "img")) - expected).max() <= MAX_LEVELS


def test_inks_become_what_imagemagick_makes_of_them_by_their_profile(tmp_path: Path) -> None:
    content = made(tmp_path, "cmyk", profiles.of_printer(), "-quality", "98", "-sampling-factor", "1x1", "jpeg:-")
    assert exiftool("-s3", "-ICC_Profile:ColorSpaceData", file=content) == b"CMYK\n"
    expected = pixels_by_imagemagick(content, *to_srgb(tmp_path))
    naive = np.asarray(Image.open(io.BytesIO(content)).convert("RGB")).astype(int)
    assert np.abs(expected - naive).max() > 50, "the profile must matter"
    differing = np.abs(np.asarray(read_image(content, "img")) - expected)
    # With 8 bits, LittleCMS interpolates among 23 levels of each ink; the dark corner has the steepest of them.
    assert differing.max() <= 3 * MAX_LEVELS
    assert differing.mean() < 0.5


def test_display_p3_has_its_colours_in_srgb() -> None:
    picture = read_image((CASES / "icc_display_p3.png").read_bytes(), "img")
    assert {colour for _, colour in picture.getcolors() or []} == {(0, 204, 13), (250, 31, 14)}


def file(picture: Image.Image, image_format: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, image_format, **options)
    return buffer.getvalue()


def picture_of_colours(mode: str = "RGB") -> Image.Image:
    return Image.frombytes("RGB", (SIDE, SIDE), colours()).convert(mode)


SRGB_CURVES = dict.fromkeys((b"rTRC", b"gTRC", b"bTRC"), profiles.curve_of_srgb())


@pytest.mark.parametrize(
    "profile",
    [SRGB_PROFILE, profiles.of_screen(profiles.SRGB, beside=SRGB_CURVES)],
    ids=["LittleCMS's", "a table of 1024 levels"],
)
def test_a_picture_that_is_srgb_keeps_every_level(profile: bytes) -> None:
    for picture in (picture_of_colours(), picture_of_colours("RGBA"), picture_of_colours("P")):
        content = file(picture, icc_profile=profile)
        assert read_image(content, "img").tobytes() == picture.convert("RGB").tobytes()


@pytest.mark.parametrize(("image_format", "mode"), [("PNG", "RGB"), ("JPEG", "RGB"), ("WEBP", "RGB"), ("JPEG", "CMYK"), ("JPEG", "L")])
def test_a_profile_that_cannot_be_used_is_ignored(image_format: str, mode: str) -> None:
    plain = file(picture_of_colours(mode), image_format)
    of_elements = profiles.of_screen(profiles.DISPLAY_P3)
    unusable = {
        "text": b"no profile",
        "cut short": SCREENS["Display P3"][:200],
        "zeros": bytes(600),
        "of a link between devices": profiles.profile(b"link", b"RGB ", b"RGB ", {}),
        "without tags": profiles.profile(b"mntr", {"RGB": b"RGB ", "CMYK": b"CMYK", "L": b"GRAY"}[mode], b"XYZ ", {}),
        "of another mode": of_elements if mode == "CMYK" else profiles.of_printer(),
        "over 4 MiB": SCREENS["Display P3"] + random.Random(1).randbytes(4 * 2**20),
    }
    for name, profile in unusable.items():
        content = file(picture_of_colours(mode), image_format, icc_profile=profile)
        assert read_image(content, "img").tobytes() == read_image(plain, "img").tobytes(), name


def test_a_flipped_profile_never_raises_anything() -> None:
    chance = random.Random(4)
    for mode, profile in (("RGB", SCREENS["Adobe RGB"]), ("CMYK", profiles.of_printer()), ("L", profiles.of_grey(2.2))):
        for _ in range(30):
            flipped = bytearray(profile)
            for _ in range(chance.randint(1, 6)):
                flipped[chance.randrange(min(len(flipped), chance.choice((200, 10_000))))] = chance.randrange(256)
            picture = read_image(file(picture_of_colours(mode), "JPEG", icc_profile=bytes(flipped)), "img")
            assert (picture.mode, picture.size) == ("RGB", (SIDE, SIDE))


def test_a_profile_that_lists_one_table_many_times_costs_nothing() -> None:
    """LittleCMS alone takes 40 s and 5 GB for it."""
    content = file(picture_of_colours(), icc_profile=profiles.of_elements(3000))
    started_s = time.process_time()
    seen = read_image(content, "img")
    assert time.process_time() - started_s < 1
    assert seen.tobytes() == read_image(file(picture_of_colours(), icc_profile=SCREENS["Display P3"]), "img").tobytes()


def test_the_levels_of_a_mask_are_no_colours() -> None:
    content = file(picture_of_colours("L"), icc_profile=profiles.of_grey(1.6))
    assert read_mask(content, "mask").tobytes() == picture_of_colours("L").tobytes()


@pytest.mark.parametrize("image_format", ["jpeg", "png", "webp"])
def test_what_is_drawn_says_that_it_is_srgb(image_format: ImageFormat) -> None:
    drawn = [encode(picture_of_colours(), image_format), encode(picture_of_colours(), image_format, "a red circle\nSteps: 1")]
    drawn.append(encode_preview(picture_of_colours(), (64, 64), image_format))
    tags = ("-SRGBRendering", "-ICC_Profile:ProfileDescription", "-ICC_Profile:ColorSpaceData")
    for content in drawn:
        told = json.loads(exiftool("-json", *tags, file=content))[0]
        if image_format == "png":
            assert told["SRGBRendering"] == "Perceptual"
        else:
            assert (told["ProfileDescription"], told["ColorSpaceData"].strip()) == ("sRGB built-in", "RGB")


@pytest.mark.parametrize("image_format", ["jpeg", "png", "webp"])
def test_what_is_drawn_is_the_same_file_at_any_time_and_read_back_unconverted(
    image_format: ImageFormat, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert SRGB_PROFILE[24:36] == bytes.fromhex("07d0 0001 0001 0000 0000 0000"), "when it was made"
    content = encode(picture_of_colours(), image_format)
    as_stored = np.asarray(Image.open(io.BytesIO(content)).convert("RGB")).astype(int)
    assert (np.asarray(read_image(content, "img")) == as_stored).all()
    assert np.abs(pixels_by_imagemagick(content, *to_srgb(tmp_path)) - as_stored).max() <= 1, "sRGB to ImageMagick, too"
