"""A photograph is set upright by what its file says, as ImageMagick and exiftool understand it; a file that says nothing is not turned."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from stable_diffusion.images.decode import read_image
from tests.hostile_pictures import drawing, file
from tests.programs import exiftool_each, imagemagick, pixels_by_imagemagick

CASES = Path(__file__).parent / "cases"
FORMATS: dict[str, dict[str, object]] = {"JPEG": {"quality": 98}, "PNG": {}, "WEBP": {"lossless": True}}
TAGS = ("IFD0:Orientation", "XMP-tiff:Orientation")
ORIENTATIONS = {
    1: "top-left",
    2: "top-right",
    3: "bottom-right",
    4: "bottom-left",
    5: "left-top",
    6: "right-top",
    7: "right-bottom",
    8: "left-bottom",
}


@pytest.mark.parametrize("image_format", FORMATS)
def test_every_orientation_in_exif_or_xmp_is_that_of_other_programs(tmp_path: Path, image_format: str) -> None:
    plain = file(drawing(), image_format, **FORMATS[image_format])
    files = {tmp_path / f"{tag}.{number}.{image_format}": (tag, number) for tag in TAGS for number in ORIENTATIONS}
    for path in files:
        path.write_bytes(plain)
    exiftool_each({path: ("-n", f"-{tag}={number}") for path, (tag, number) in files.items()})
    turned: list[str | Path] = []
    for number, name in ORIENTATIONS.items():
        turned += ["(", "-clone", "0", "-orient", name, "-auto-orient", "-write", f"rgb:{tmp_path / str(number)}", "+delete", ")"]
    imagemagick("-", "-depth", "8", *turned, "null:", file=plain)
    for path, (tag, number) in files.items():
        seen = read_image(path.read_bytes(), "img")
        assert seen.size == ((96, 64) if number < 5 else (64, 96)), (tag, number)
        assert seen.tobytes() == (tmp_path / str(number)).read_bytes(), (tag, number)


def test_a_png_without_exif_and_xmp_is_not_turned(tmp_path: Path) -> None:
    """Such a one the page sends: redrawn by the browser, which has set it upright."""
    photograph = tmp_path / "photograph.jpeg"
    photograph.write_bytes(file(drawing(), "JPEG"))
    exiftool_each({photograph: ("-n", "-IFD0:Orientation=6", "-XMP-tiff:Orientation=6")})
    redrawn = imagemagick("-", "-auto-orient", "-strip", "png24:-", file=photograph.read_bytes())
    assert read_image(redrawn, "img").size == (64, 96)
    assert (np.asarray(read_image(redrawn, "img")) == pixels_by_imagemagick(redrawn)).all()


def test_the_webp_of_the_case_is_turned() -> None:
    content = (CASES / "webp_exif_orientation6_square.webp").read_bytes()
    expected = pixels_by_imagemagick(content, "-orient", "right-top", "-auto-orient")
    assert (np.asarray(read_image(content, "img")) == expected).all()
