"""PNG files whose pixels are whole are read, whatever is wrong beside them, and refusals say what is wrong."""

from __future__ import annotations

import random
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest

from stable_diffusion.core.errors import InvalidRequest, TooLarge
from stable_diffusion.images.decode import names_of_texts, read_description, read_image, read_mask
from stable_diffusion.images.png import split
from tests import profiles
from tests.hostile_pictures import GREY, RGB, chunk, flat_png, png
from tests.programs import exiftool, imagemagick, pixels_by_imagemagick, pnmtopng

CASES = Path(__file__).parent / "cases"
NEEDED = (b"IHDR", b"PLTE", b"tRNS", b"IDAT")
INFOTEXT = "a red circle, café\nSteps: 20, Sampler: Euler a, CFG scale: 7, Seed: 5, Size: 64x64"


def chunks_of(content: bytes) -> list[tuple[bytes, int, int]]:
    """Name, start and end of each."""
    found, position = [], 8
    while position < len(content):
        (length,) = struct.unpack_from(">I", content, position)
        found.append((content[position + 4 : position + 8], position, position + 12 + length))
        position += 12 + length
    return found


def with_wrong_checksums(content: bytes, *kinds: bytes) -> bytes:
    changed = bytearray(content)
    for kind, _, end in chunks_of(content):
        if kind in kinds:
            changed[end - 1] ^= 1
    return bytes(changed)


def made_by_others(folder: Path) -> dict[str, bytes]:
    (folder / "of.icc").write_bytes(profiles.of_screen(profiles.SRGB))
    painted = imagemagick("-size", "40x30", "gradient:red-blue", "-density", "72", "-set", "comment", "some words", "png24:-")
    return {
        "ImageMagick": painted,
        "ImageMagick, a palette": imagemagick("-size", "40x30", "gradient:red-blue", "-colors", "20", "-density", "72", "png8:-"),
        "ImageMagick, a profile": imagemagick("-", "-profile", folder / "of.icc", "png:-", file=painted),
        "exiftool": exiftool("-XMP:Creator=somebody", "-EXIF:Make=some camera", "-PNG:Comment=words", file=painted),
        "netpbm": pnmtopng("-gamma", "0.45", file=b"P6\n8 8\n255\n" + bytes(range(192))),
    }


def test_a_wrong_checksum_beside_the_pixels_is_no_reason_to_refuse(tmp_path: Path) -> None:
    tried = set()
    for name, content in made_by_others(tmp_path).items():
        beside = {kind for kind, _, _ in chunks_of(content)} - {*NEEDED, b"IEND"}
        assert beside, name
        tried |= beside
        expected = pixels_by_imagemagick(content, "+profile", "*")
        for kind in beside:
            seen = np.asarray(read_image(with_wrong_checksums(content, kind, b"iCCP"), "img"))
            assert (seen == expected).all(), (name, kind)
    assert {b"pHYs", b"gAMA", b"cHRM", b"tIME", b"tEXt", b"iCCP", b"eXIf"} <= tried


@pytest.mark.parametrize("kind", [b"IHDR", b"PLTE", b"tRNS"])
def test_a_wrong_checksum_of_what_the_pixels_need_is_named(kind: bytes) -> None:
    palette = chunk(b"PLTE", bytes(range(6))) + chunk(b"tRNS", b"\0\xff")
    content = png(2, 1, 8, 3, b"\0\1", before=palette)
    assert read_image(content, "img").size == (2, 1)
    told = f"^img: the PNG is damaged: its {kind.decode()} chunk is cut short, or its checksum is wrong$"
    with pytest.raises(InvalidRequest, match=told):
        read_image(with_wrong_checksums(content, kind), "img")


@pytest.mark.parametrize("name", ["png_phys_bad_crc.png", "png_ztxt_1_5mb.png"])
def test_the_pixels_of_the_cases_are_read(name: str) -> None:
    content = (CASES / name).read_bytes()
    picture = read_image(content, "img")
    assert (picture.size, sorted(picture.getcolors() or [])) == ((96, 64), [(3072, (10, 200, 30)), (3072, (200, 10, 90))])
    assert (np.asarray(picture) == pixels_by_imagemagick(content)).all()
    assert read_description(content, "picture") is None


def test_a_large_text_or_profile_of_another_program_is_skipped_or_used(tmp_path: Path) -> None:
    plain = imagemagick("-size", "40x30", "gradient:red-blue", "png24:-")
    words = tmp_path / "words.txt"
    words.write_text("some words " * 150_000)
    by_exiftool = exiftool("-z", f"-PNG:Description<={words}", file=plain)
    by_imagemagick = imagemagick("-", "png24:-", file=by_exiftool)
    for content in (by_imagemagick, by_exiftool):
        text = split(content, "img").text
        assert "Description" in names_of_texts(content, "img")
        with pytest.raises(InvalidRequest, match="img: its text Description is too long"):
            text("Description", "img")
        assert (np.asarray(read_image(content, "img")) == pixels_by_imagemagick(plain)).all()
        assert read_description(content, "picture") is None
    profile = tmp_path / "large.icc"
    profile.write_bytes(profiles.of_screen(profiles.ADOBE_RGB, beside={b"junk": b"data" + random.Random(1).randbytes(1_500_000)}))
    with_profile = imagemagick("-", "-profile", profile, "png24:-", file=plain)
    assert len(with_profile) > 1_500_000
    small = tmp_path / "small.icc"
    small.write_bytes(profiles.of_screen(profiles.ADOBE_RGB))
    expected = read_image(imagemagick("-", "-profile", small, "png24:-", file=plain), "img")
    assert read_image(with_profile, "img").tobytes() == expected.tobytes()
    assert expected.tobytes() != read_image(plain, "img").tobytes()


def test_a_description_behind_the_pixels_or_of_another_program_is_read() -> None:
    ascii_text = INFOTEXT.replace("é", "e")
    by_imagemagick = imagemagick("-size", "8x8", "xc:red", "-set", "parameters", ascii_text, "png24:-")
    assert read_description(by_imagemagick, "picture") == ascii_text
    text = chunk(b"tEXt", b"parameters\0" + INFOTEXT.encode("latin-1"))
    packed = chunk(b"iTXt", b"parameters\0\1\0\0\0" + zlib.compress(INFOTEXT.encode()))
    for content in (flat_png(8, 8, 8, RGB, after=text), flat_png(8, 8, 8, RGB, after=packed), flat_png(8, 8, 8, RGB, before=packed)):
        assert read_description(content, "picture") == INFOTEXT


def test_a_text_that_is_damaged_is_refused_only_where_it_is_read() -> None:
    whole = chunk(b"zTXt", b"parameters\0\0" + zlib.compress(INFOTEXT.encode("latin-1")))
    wrong_sum = whole[:-1] + bytes((whole[-1] ^ 1,))
    broken = chunk(b"zTXt", b"parameters\0\0" + zlib.compress(INFOTEXT.encode("latin-1"))[:-9])
    no_utf_8 = chunk(b"iTXt", b"parameters\0\0\0\0\0" + INFOTEXT.encode("latin-1"))
    no_text = chunk(b"iTXt", b"parameters\0")
    for beside in (wrong_sum, broken, no_utf_8, no_text):
        content = flat_png(8, 8, 8, RGB, before=beside)
        assert read_image(content, "img").size == (8, 8)
        with pytest.raises(InvalidRequest, match="^picture: its text parameters is damaged"):
            read_description(content, "picture")
    assert names_of_texts(flat_png(8, 8, 8, RGB, before=chunk(b"tEXt", b"prompt\0{}")), "picture") == ["prompt"]


def test_exif_as_hexadecimal_text_turns_the_picture_and_is_bounded() -> None:
    block = b"MM\0*\0\0\0\x08\0\1\x01\x12\0\3\0\0\0\1\0\6\0\0\0\0\0\0"
    lines = b"\nexif\n%8d\n%s\n" % (len(block), block.hex().encode())
    text = chunk(b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(lines))
    assert read_image(flat_png(8, 6, 8, RGB, before=text), "img").size == (6, 8)
    for broken in (b"\nexif\n9\nxyz\n", b"\nexif", b"", b"\nexif\n9\nff\xff\n"):
        beside = chunk(b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(broken))
        assert read_image(flat_png(8, 6, 8, RGB, before=beside), "img").size == (8, 6)
    bomb = chunk(b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(b"\nexif\n9\n" + b"00" * 50_000_000))
    with pytest.raises(TooLarge, match="^img: its EXIF block has more than 1048576 bytes, at most 1048576 are allowed"):
        read_image(flat_png(8, 6, 8, RGB, before=bomb), "img")


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"\x89PNG\r\n\x1a\n", "its header, the IHDR chunk, is missing or cut short"),
        (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", bytes(12)), "its header, the IHDR chunk, is missing or cut short"),
        (flat_png(8, 8, 8, RGB)[:33], "it has no pixels or is cut short before them: there is no IDAT chunk"),
        (flat_png(8, 8, 8, GREY, before=chunk(b"tRNS", b"\0")), "its tRNS chunk, which defines transparency, is too short"),
    ],
)
def test_what_is_damaged_is_said(content: bytes, told: str) -> None:
    with pytest.raises(InvalidRequest, match=f"^mask: the PNG is damaged: {told}$"):
        read_mask(content, "mask")


def test_pillow_gets_only_what_the_pixels_need() -> None:
    beside = chunk(b"acTL", bytes(8)) + chunk(b"eXIf", b"MM\0*" + bytes(20)) + chunk(b"tEXt", b"a\0b") + chunk(b"iCCP", b"x\0\0?")
    content = flat_png(8, 8, 8, RGB, before=beside, after=chunk(b"tRNS", bytes(6)) + chunk(b"tIME", bytes(7)))
    parts = split(content, "img")
    assert [kind for kind, _, _ in chunks_of(parts.pixels)] == [b"IHDR", b"IDAT", b"IEND"]
    assert parts.pixels == flat_png(8, 8, 8, RGB)
    assert (parts.colour_key, parts.profile, parts.names_of_texts) == (None, None, ["a"])
