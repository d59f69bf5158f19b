"""Uploads to safe pictures, pictures to files."""

from __future__ import annotations

import io
import struct
import time
import zlib
from contextlib import suppress

import numpy as np
import pytest
from PIL import Image

from stable_diffusion.core.errors import InvalidRequest, ServiceError, TooLarge
from stable_diffusion.core.types import ImageFormat
from stable_diffusion.images.decode import names_of_texts, read_description, read_image, read_mask, read_transparency_as_mask
from stable_diffusion.images.encode import encode
from stable_diffusion.images.transform import fit, keep_outside_mask, output_size, scale_mask

RED, GREEN, BLUE = (220, 35, 40), (40, 160, 70), (40, 80, 220)


def as_file(picture: Image.Image, image_format: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, image_format, **options)
    return buffer.getvalue()


def halves(left: object, right: object, mode: str = "RGB") -> Image.Image:
    picture = Image.new(mode, (20, 10), left)  # type: ignore[arg-type]
    picture.paste(right, (10, 0, 20, 10))  # type: ignore[arg-type]
    return picture


@pytest.mark.parametrize("image_format", ["PNG", "JPEG", "WEBP"])
def test_the_three_formats_are_read(image_format: str) -> None:
    picture = read_image(as_file(Image.new("RGB", (9, 7), RED), image_format), "img")
    assert (picture.mode, picture.size) == ("RGB", (9, 7))
    assert np.abs(np.asarray(picture).astype(int) - RED).max() < 12


@pytest.mark.parametrize("image_format", ["GIF", "BMP", "TIFF", "PPM", "ICO"])
def test_no_other_decoder_can_be_reached(image_format: str) -> None:
    with pytest.raises(InvalidRequest, match="img: not a PNG, JPEG or WebP image"):
        read_image(as_file(Image.new("RGB", (16, 16), RED), image_format), "img")


def test_a_rotated_photograph_is_set_upright() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: to be shown turned clockwise by 90 degrees
    upright = read_image(as_file(halves(RED, BLUE), "JPEG", exif=exif, quality=100), "img")
    assert upright.size == (10, 20)
    assert np.abs(np.asarray(upright)[2, 5].astype(int) - RED).max() < 12
    assert np.abs(np.asarray(upright)[17, 5].astype(int) - BLUE).max() < 12


def test_what_is_transparent_becomes_white_in_a_picture_and_black_in_a_mask() -> None:
    layer = halves((220, 35, 40, 255), (0, 0, 255, 0), "RGBA")
    picture = np.asarray(read_image(as_file(layer), "img"))
    assert tuple(picture[5, 2]) == RED
    assert tuple(picture[5, 15]) == (255, 255, 255)
    mask = np.asarray(read_mask(as_file(halves((255, 255, 255, 255), (255, 255, 255, 0), "RGBA")), "mask"))
    assert (mask[5, 2], mask[5, 15]) == (255, 0)


def test_palettes_with_transparency_are_composited_too() -> None:
    picture = Image.new("P", (8, 8), 1)
    picture.putpalette([0, 0, 0, 220, 35, 40])
    picture.putpixel((0, 0), 0)
    pixels = np.asarray(read_image(as_file(picture, transparency=0), "img"))
    assert tuple(pixels[0, 0]) == (255, 255, 255)
    assert tuple(pixels[4, 4]) == RED


@pytest.mark.parametrize(
    ("mode", "colour", "expected"), [("L", 128, 128), ("1", 1, 255), ("I;16", 128 * 257, 128), ("LA", (128, 255), 128)]
)
def test_grey_pictures_of_any_depth_keep_their_brightness(mode: str, colour: object, expected: int) -> None:
    pixels = np.asarray(read_image(as_file(Image.new(mode, (8, 8), colour)), "img"))  # type: ignore[arg-type]
    assert abs(int(pixels[4, 4, 0]) - expected) <= 1
    mask = np.asarray(read_mask(as_file(Image.new(mode, (8, 8), colour)), "mask"))  # type: ignore[arg-type]
    assert abs(int(mask[4, 4]) - expected) <= 1


def test_cmyk_photographs_are_read() -> None:
    picture = read_image(as_file(Image.new("RGB", (8, 8), GREEN).convert("CMYK"), "JPEG"), "img")
    assert np.abs(np.asarray(picture)[4, 4].astype(int) - GREEN).max() < 12


@pytest.mark.parametrize("image_format", ["PNG", "JPEG", "WEBP"])
def test_a_file_that_is_cut_short_is_refused_by_name(image_format: str) -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8))
    content = as_file(noise, image_format)
    with pytest.raises(InvalidRequest, match=r"^img: "):
        read_image(content[: len(content) // 2], "img")


@pytest.mark.parametrize("content", [b"", b"hello", b"\x89PNG\r\n\x1a\n", b"<svg xmlns='http://www.w3.org/2000/svg'/>", b"GIF89a"])
def test_what_is_no_image_is_refused_by_name(content: bytes) -> None:
    with pytest.raises(InvalidRequest, match=r"^mask: "):
        read_mask(content, "mask")


def test_flipped_bytes_never_raise_anything_but_a_service_error() -> None:
    random = np.random.default_rng(1)
    for image_format in ("PNG", "JPEG", "WEBP"):
        content = np.frombuffer(as_file(halves(RED, BLUE), image_format), np.uint8)
        for _ in range(60):
            damaged = content.copy()
            damaged[random.integers(0, len(damaged), 4)] = random.integers(0, 256, 4)
            with suppress(ServiceError):
                read_image(damaged.tobytes(), "img")


@pytest.mark.filterwarnings("ignore::UserWarning:PIL.TiffImagePlugin")  # Pillow says so; the picture is what counts
def test_damaged_exif_is_ignored_and_never_raises() -> None:
    exif = Image.Exif()
    exif[0x0112], exif[0x010F], exif[0x8769] = 6, "camera", {0x9286: b"comment"}
    content = np.frombuffer(as_file(halves(RED, BLUE), "JPEG", exif=exif), np.uint8)
    start = content.tobytes().index(b"Exif")
    length = int.from_bytes(content[start - 2 : start].tobytes(), "big") - 8  # of the block behind its name
    random = np.random.default_rng(2)
    for _ in range(400):
        damaged = content.copy()
        damaged[start + 6 + random.integers(0, length, 3)] = random.integers(0, 256, 3)
        assert read_image(damaged.tobytes(), "img").size in ((20, 10), (10, 20))


def test_a_mask_is_scaled_to_its_picture_but_must_have_its_proportions() -> None:
    mask = Image.new("L", (20, 10), 0)
    assert scale_mask(mask, (400, 200), "mask").size == (400, 200)
    assert scale_mask(mask, (401, 200), "mask").size == (401, 200)
    with pytest.raises(InvalidRequest, match="mask: 20 x 10 does not have the proportions of the image, 10 x 20"):
        scale_mask(mask, (10, 20), "mask")


def test_a_bomb_is_refused_from_its_header() -> None:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 8000, 8000, 8, 2, 0, 0, 0)
    bomb = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 1000)) + chunk(b"IEND", b"")
    with pytest.raises(TooLarge, match="img: the image has 8000 x 8000 pixels, at most 16777216 in total are allowed"):
        read_image(bomb, "img")


def test_a_file_of_too_many_bytes_is_refused_unread() -> None:
    with pytest.raises(TooLarge, match="img: the file has 20971521 bytes, at most 20971520 are allowed"):
        read_image(b"\x89PNG" + b"\0" * (20 * 2**20 - 3), "img")


@pytest.mark.parametrize(
    ("picture", "width", "height", "expected"),
    [
        ((512, 512), None, None, (512, 512)),
        ((4000, 3000), None, None, (592, 440)),
        ((100, 100), None, None, (512, 512)),
        ((300, 1200), None, None, (256, 1024)),
        ((5000, 10), None, None, (1024, 64)),
        ((800, 600), 400, None, (400, 304)),
        ((800, 600), None, 240, (320, 240)),
        ((800, 600), 512, 512, (512, 512)),
    ],
)
def test_an_input_picture_keeps_its_proportions_at_the_native_area(
    picture: tuple[int, int], width: int | None, height: int | None, expected: tuple[int, int]
) -> None:
    size = output_size(picture, (512, 512), width, height, 1024)
    assert size == expected
    assert all(side % 8 == 0 for side in size)


def test_fitting_cuts_but_never_squashes() -> None:
    picture = Image.new("RGB", (200, 100), GREEN)
    picture.paste(RED, (80, 30, 120, 70))  # a square in the middle
    pixels = np.asarray(fit(picture, 64, 64)).astype(int)
    red = np.abs(pixels - RED).max(axis=2) < 40
    rows, columns = np.nonzero(red)
    assert abs(int(np.ptp(rows)) - int(np.ptp(columns))) <= 1


def test_outside_the_mask_the_original_stays_to_the_last_bit() -> None:
    original = Image.fromarray(np.random.default_rng(2).integers(0, 255, (8, 8, 3), dtype=np.uint8))
    mask = Image.new("L", (8, 8), 0)
    mask.paste(255, (4, 0, 8, 8))
    kept = np.asarray(keep_outside_mask(Image.new("RGB", (8, 8), RED), original, mask))
    assert np.array_equal(kept[:, :4], np.asarray(original)[:, :4])
    assert (kept[:, 4:] == RED).all()


@pytest.mark.parametrize(("image_format", "signature"), [("jpeg", b"\xff\xd8\xff"), ("png", b"\x89PNG"), ("webp", b"RIFF")])
def test_pictures_are_written_in_the_format_asked_for(image_format: ImageFormat, signature: bytes) -> None:
    content = encode(halves(RED, BLUE), image_format)
    assert content.startswith(signature)
    again = Image.open(io.BytesIO(content)).convert("RGB")
    assert np.abs(np.asarray(again).astype(int) - np.asarray(halves(RED, BLUE))).max() <= (0 if image_format == "png" else 60)


DESCRIPTIONS = ["a red circle\nSteps: 1, Sampler: Euler, Seed: 1", "\u8d64\u3044\u4e38 \U0001f534 caf\u00e9\nSteps: 1"]


@pytest.mark.parametrize("description", DESCRIPTIONS)
@pytest.mark.parametrize("image_format", ["jpeg", "png", "webp"])
def test_a_description_comes_back_and_changes_no_pixel(image_format: ImageFormat, description: str) -> None:
    picture = halves(RED, BLUE)
    plain, described = encode(picture, image_format), encode(picture, image_format, description)
    assert read_description(described, "picture") == description
    assert read_description(plain, "picture") is None
    assert read_image(described, "img").tobytes() == read_image(plain, "img").tobytes()


@pytest.mark.parametrize("description", DESCRIPTIONS)
def test_a_description_is_where_a1111_has_it(description: str) -> None:
    assert Image.open(io.BytesIO(encode(halves(RED, BLUE), "png", description))).info["parameters"] == description
    for image_format in ("jpeg", "webp"):
        content = encode(halves(RED, BLUE), image_format, description)
        # Both byte orders are big-endian, as piexif reads and writes them.
        assert b"MM\0*" in content
        assert b"UNICODE\0" + description.encode("utf-16-be") in content


def test_a_comment_in_the_other_byte_order_or_in_ascii_is_read_too() -> None:
    for endian, comment in (("<", b"UNICODE\0" + "a\u732b".encode("utf-16-le")), (">", b"ASCII\0\0\0a castle")):
        exif = Image.Exif()
        exif.endian = endian
        exif.get_ifd(0x8769)[0x9286] = comment
        assert read_description(as_file(halves(RED, BLUE), "JPEG", exif=exif), "picture") in ("a\u732b", "a castle")


def png_with(*chunks: tuple[bytes, bytes]) -> bytes:
    """A PNG with more chunks before its pixels."""
    content = as_file(halves(RED, BLUE))
    at = content.index(b"IDAT") - 4
    packed = b"".join(struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks)
    return content[:at] + packed + content[at:]


@pytest.mark.parametrize(("kind", "head"), [(b"zTXt", b"parameters\0\0"), (b"iTXt", b"parameters\0\1\0\0\0")], ids=str)
def test_a_bomb_of_text_is_refused_by_name(kind: bytes, head: bytes) -> None:
    bomb = png_with((kind, head + zlib.compress(b"x" * 50_000_000)))
    with pytest.raises(InvalidRequest, match="picture: .*parameters is too long, at most 1048576 bytes"):
        read_description(bomb, "picture")
    many = png_with(*[(kind, head + zlib.compress(b"x" * 1_000_000))] * 100, (kind, head + zlib.compress(b"a red circle")))
    started_s = time.process_time()
    assert read_description(many, "picture") == "a red circle"
    assert time.process_time() - started_s < 0.1, "only the last one is decompressed"


def test_a_bomb_in_a_text_that_nobody_reads_is_not_decompressed() -> None:
    bomb = png_with(
        (b"zTXt", b"workflow\0\0" + zlib.compress(b"x" * 50_000_000)), (b"iTXt", b"other\0\1\0\0\0" + zlib.compress(bytes(50_000_000)))
    )
    started_s = time.process_time()
    assert read_description(bomb, "picture") is None
    assert names_of_texts(bomb, "picture") == ["workflow", "other"]
    assert read_image(bomb, "img").tobytes() == halves(RED, BLUE).tobytes()
    assert time.process_time() - started_s < 0.1


def test_a_huge_exif_block_is_refused_by_name() -> None:
    exif = Image.Exif()
    exif.get_ifd(0x8769)[0x9286] = b"UNICODE\0" + b"\0x" * 2**20
    with pytest.raises(TooLarge, match="picture: its EXIF block has 2097.* bytes, at most 1048576 are allowed"):
        read_description(as_file(halves(RED, BLUE), "WEBP", exif=exif), "picture")


@pytest.mark.filterwarnings("ignore::UserWarning:PIL.TiffImagePlugin")
@pytest.mark.parametrize("image_format", ["jpeg", "png", "webp"])
def test_damaged_descriptions_never_raise_anything_but_a_service_error(image_format: ImageFormat) -> None:
    random = np.random.default_rng(3)
    content = np.frombuffer(encode(halves(RED, BLUE), image_format, DESCRIPTIONS[1]), np.uint8)
    for _ in range(300):
        damaged = content.copy()
        damaged[random.integers(0, len(damaged), 4)] = random.integers(0, 256, 4)
        with suppress(ServiceError):
            read_description(damaged.tobytes(), "picture")


def test_what_is_transparent_in_a_mask_is_repainted_and_what_is_half_transparent_blends() -> None:
    mask = halves((255, 255, 255, 0), (0, 0, 0, 191), "RGBA")
    read = read_transparency_as_mask(as_file(mask), "mask")
    assert (read.mode, read.getpixel((0, 0)), read.getpixel((19, 9))) == ("L", 255, 64)
    palette = halves(0, 1, "P")
    palette.putpalette([*RED, *GREEN])
    read = read_transparency_as_mask(as_file(palette, transparency=0), "mask")
    assert (read.getpixel((0, 0)), read.getpixel((19, 9))) == (255, 0)


@pytest.mark.parametrize("mask", [Image.new("L", (8, 8)), Image.new("RGBA", (8, 8), "black")], ids=["no alpha", "opaque"])
def test_a_mask_without_anything_transparent_is_refused(mask: Image.Image) -> None:
    with pytest.raises(InvalidRequest, match="^mask: no pixel is transparent"):
        read_transparency_as_mask(as_file(mask), "mask")


def test_a_quality_makes_jpeg_and_webp_smaller_and_means_nothing_to_png() -> None:
    noise = Image.effect_noise((64, 64), 80).convert("RGB")
    assert len(encode(noise, "jpeg", quality=10)) < len(encode(noise, "jpeg")) < len(encode(noise, "jpeg", quality=100))
    assert len(encode(noise, "webp", quality=0)) < len(encode(noise, "webp"))
    assert encode(noise, "png", quality=0) == encode(noise, "png")
