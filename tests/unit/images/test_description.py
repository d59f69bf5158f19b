"""What other programs wrote of a picture is found: EXIF comments in every encoding, and what stands behind A1111's last line."""

from __future__ import annotations

import io
import itertools
import struct
from pathlib import Path

import pytest
from PIL import Image

from stable_diffusion.core.errors import InvalidRequest
from stable_diffusion.images import infotext
from stable_diffusion.images.decode import read_description
from stable_diffusion.images.description import exif_comment
from tests.programs import cwebp, exiftool_each, imagemagick

CASES = Path(__file__).parent / "cases"
PROMPT = "a small red circle, café 日本 “x”"
LAST_LINE = "Steps: 20, Sampler: Euler a, CFG scale: 7, Seed: 5, Size: 64x64, Model hash: abc, Model: m, Version: v1.9.0"
INFOTEXT = f"{PROMPT}\nNegative prompt: blurry\n{LAST_LINE}"
ASCII = INFOTEXT.encode("ascii", "ignore").decode()


def block(comment: bytes, order: str, kind: int = 7) -> bytes:
    """An EXIF block with nothing but a comment."""
    head = {"<": b"II*\0", ">": b"MM\0*"}[order] + struct.pack(f"{order}I", 8)
    folder = struct.pack(f"{order}HHHIII", 1, 0x8769, 4, 1, 26, 0)
    return head + folder + struct.pack(f"{order}HHHIII", 1, 0x9286, kind, len(comment), 44, 0) + comment


def read(content: bytes) -> infotext.Infotext:
    text = read_description(content, "picture")
    assert text is not None
    return infotext.read(text, "picture")


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("prefix", [b"", b"Exif\0\0", b"Exif\0\0" * 2])
@pytest.mark.parametrize(
    "comment",
    [
        b"UNICODE\0" + INFOTEXT.encode("utf-16-le"),
        b"UNICODE\0" + INFOTEXT.encode("utf-16-be"),
        b"UNICODE\0\xff\xfe" + INFOTEXT.encode("utf-16-le"),
        b"UNICODE\0\xfe\xff" + INFOTEXT.encode("utf-16-be"),
        b"UNICODE\0" + INFOTEXT.encode("utf-16-le") + b"\0",
        b"UNICODE\0" + INFOTEXT.encode("utf-16-be") + b"\0\0\0\0",
        b"UNICODE\0" + INFOTEXT.encode(),
        b"UNICODE\0" + INFOTEXT.encode("utf-8-sig"),
        b"UNICODE " + INFOTEXT.encode() + b"\0",
        b"ASCII\0\0\0" + INFOTEXT.encode(),
        b"ASCII\0\0\0" + INFOTEXT.encode("utf-8-sig") + b"\0",
        b"ASCII   " + INFOTEXT.encode() + b"\0what was in memory: \xff",
        b"ASCII\0\0\0" + INFOTEXT.encode("utf-16-le"),
        bytes(8) + INFOTEXT.encode(),
        bytes(8) + INFOTEXT.encode("utf-16-be"),
        INFOTEXT.encode(),
        INFOTEXT.encode("utf-8-sig") + b"\0",
        INFOTEXT.encode("utf-16"),
        INFOTEXT.encode("utf-16-be"),
    ],
    ids=repr,
)
def test_a_comment_is_read_in_every_encoding_that_programs_write(comment: bytes, order: str, prefix: bytes) -> None:
    assert exif_comment(prefix + block(comment, order)) == INFOTEXT


def test_a_comment_whose_letters_look_like_ascii_in_the_other_order_is_read() -> None:
    prompt = "\u4e00\u3000\u2000\u3a00\u2c00" * 200  # in the other order: N, 0, space, colon, comma
    for encoding in ("utf-16-le", "utf-16-be"):
        for order in "<>":
            assert exif_comment(block(b"UNICODE\0" + f"{prompt}\n{LAST_LINE}".encode(encoding), order)) == f"{prompt}\n{LAST_LINE}"


def test_latin_1_behind_ascii_is_read() -> None:
    assert exif_comment(block("ASCII\0\0\0un café\n".encode("latin-1") + LAST_LINE.encode(), ">")) == f"un café\n{LAST_LINE}"


@pytest.mark.parametrize("kind", [1, 2, 129])
def test_a_comment_of_another_type_of_text_is_read(kind: int) -> None:
    assert exif_comment(block(INFOTEXT.encode(), "<", kind)) == INFOTEXT


@pytest.mark.parametrize(
    "comment", [b"", bytes(8), b"ASCII\0\0\0", b"UNICODE\0", b"UNICODE\0\xff\xfe", bytes(264), b"ASCII\0\0\0" + bytes(40)]
)
def test_an_empty_comment_is_none(comment: bytes) -> None:
    assert exif_comment(block(comment, "<")) is None


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"no block", "its EXIF block is damaged: it has no TIFF header"),
        (b"II*\0", "its EXIF block is damaged or cut short"),
        (block(b"", "<")[:30], "its EXIF block is damaged or cut short"),
        (block(b"ASCII\0\0\0" + b"x" * 100, "<")[:-50], "its EXIF comment is cut short: it should have 108 bytes"),
        (block(b"JIS\0\0\0\0\0" + b"x" * 100, ">"), "its EXIF comment is in JIS, which is not supported"),
        (block(b"UNICODE\0\xff\xfe\0\xd8a\0", ">"), "its EXIF comment is damaged: 6 bytes that are not UTF-16-LE"),
        (block(b"UNICODE\0\xd8\0\0\xd8\0", ">"), "its EXIF comment is damaged: 5 bytes that are not UTF-16-BE or UTF-16-LE"),
        (block(bytes(40), ">", 3), "its EXIF comment is not text: its TIFF type is 3"),
    ],
)
def test_what_is_wrong_with_a_comment_is_said(content: bytes, told: str) -> None:
    with pytest.raises(ValueError, match=f"^{told}$"):
        exif_comment(content)
    webp = io.BytesIO()
    Image.new("RGB", (8, 8)).save(webp, "WEBP", exif=content)
    with pytest.raises(InvalidRequest, match=f"^picture: {told}$"):
        read_description(webp.getvalue(), "picture")


@pytest.mark.parametrize("name", sorted(file.name for file in CASES.glob("exifcomment_*")))
def test_the_comments_of_the_cases_are_read(name: str) -> None:
    said = read((CASES / name).read_bytes())
    assert (said.prompt, said.negative_prompt, said.values["Seed"]) == (PROMPT, "blurry", "5")


def test_what_exiftool_and_imagemagick_write_is_read(tmp_path: Path) -> None:
    files = {kind: imagemagick("-size", "16x16", "xc:red", f"{kind}:-") for kind in ("jpeg", "png", "webp")}
    (tmp_path / "infotext.txt").write_text(INFOTEXT)
    (tmp_path / "ascii.txt").write_text(ASCII)
    cases = itertools.product(files, ("II", "MM"), {"infotext": INFOTEXT, "ascii": ASCII}.items())
    made = {tmp_path / f"{order}.{name}.{kind}": (kind, order, name, text) for kind, order, (name, text) in cases}
    for path, (kind, *_) in made.items():
        path.write_bytes(files[kind])
    exiftool_each({path: (f"-ExifByteOrder={order}", f"-UserComment<={tmp_path / name}.txt") for path, (_, order, name, _) in made.items()})
    for path, (_, order, name, text) in made.items():
        content = path.read_bytes()
        assert {"II": b"II*\0", "MM": b"MM\0*"}[order] in content
        assert (b"UNICODE\0" if name == "infotext" else b"ASCII\0\0\0") in content
        assert read_description(content, "picture") == text, path.name
    jpeg = (tmp_path / "II.infotext.jpeg").read_bytes()
    assert read_description(imagemagick("-", "png:-", file=jpeg), "picture") == INFOTEXT, "converted to PNG"
    assert read_description(imagemagick("-", "webp:-", file=jpeg), "picture") == INFOTEXT, "converted to WebP"
    assert read_description(cwebp("-metadata", "exif", file=tmp_path / "II.infotext.jpeg"), "picture") == INFOTEXT


TEMPLATES = [
    "Template: a {small|big} circle",
    "Template: a {small|big} circle\nNegative Template: blurry",
    "Negative Template: {blurry|ugly}",
    "Template: a {small|big} circle, style: {oil|ink}, colour: red, light: {dim|bright}",
    "Template: a {small|big}\ncircle of\nseveral lines\nNegative Template: blurry",
    "Template: \nNegative Template: blurry, size: big, form: round, Template: x",
]


@pytest.mark.parametrize("template", TEMPLATES)
def test_a_template_behind_the_last_line_is_left_out(template: str) -> None:
    said = infotext.read(f"{INFOTEXT}\n{template}")
    assert (said.prompt, said.negative_prompt) == (PROMPT, "blurry")
    assert ", ".join(f"{name}: {value}" for name, value in said.values.items()) == LAST_LINE


def test_a_prompt_that_looks_like_a_template_is_a_prompt() -> None:
    said = infotext.read(f"Steps: 1, Seed: 2, Size: 3x3\nTemplate: a\n{LAST_LINE}")
    assert said.prompt == "Steps: 1, Seed: 2, Size: 3x3\nTemplate: a"
    assert said.values["Steps"] == "20"


def test_the_values_before_the_template_of_the_case_are_read() -> None:
    said = read((CASES / "infotext_dynamic_prompts_template.png").read_bytes())
    assert (said.prompt, said.negative_prompt, said.values["Version"]) == ("a small red circle", "blurry", "v1.6.0")


def test_a_byte_order_mark_never_becomes_part_of_the_prompt() -> None:
    assert infotext.read("\ufeff" + INFOTEXT).prompt == PROMPT
    assert exif_comment(block(b"UNICODE\0" + f"\ufeff\ufeff{INFOTEXT}".encode("utf-16-le"), "<")) == INFOTEXT


def test_a_text_that_is_no_infotext_is_shown() -> None:
    with pytest.raises(InvalidRequest, match=r"not an infotext: .*, got '\{\"prompt\": \"a red circle\"\}'$"):
        infotext.read('{"prompt": "a red circle"}')
    with pytest.raises(InvalidRequest, match=r", got 'x{60}\.\.\.'$"):
        infotext.read("a\n" + "x" * 100)
