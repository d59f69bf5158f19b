"""Every upload is decoded or refused with the reason, in limited time and memory, and colours are right in every mode."""

from __future__ import annotations

import io
import json
import struct
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from stable_diffusion.core.errors import InvalidRequest, TooLarge
from stable_diffusion.images.decode import read_image, read_mask
from tests.hostile_pictures import GREY, GREY_ALPHA, PALETTE, RGB, RGBA, chunk, drawing, file, png

MAX_TAKEN_S = 15  # processor time of one reader for one file; measured: 0.8 s
MAX_PEAK_MIB = 640
FEWEST_CASES = 400
MODES = {"read_image": "RGB", "read_mask": "L", "read_transparency_as_mask": "L", "read_mask_or_opacity": "L"}


@dataclass(frozen=True)
class Outcome:
    case: str
    expected: str
    reader: str
    outcome: str
    taken_s: float

    @property
    def refusal(self) -> str | None:
        """Why the file was refused. A mask without transparency does not count: the file itself is valid."""
        is_file_refused = self.outcome.startswith("refused: ") and "no pixel is transparent" not in self.outcome
        return self.outcome.removeprefix("refused: ") if is_file_refused else None


@dataclass(frozen=True)
class Reading:
    outcomes: list[Outcome]
    peak_mib: int
    complaints: str


@pytest.fixture(scope="module")
def reading() -> Reading:
    """The results of all cases, from a separate process that detects warnings and crashes and measures memory."""
    command = [sys.executable, "-W", "error", "-m", "tests.hostile_pictures"]
    root = Path(__file__).parents[2]
    finished = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=400, check=False)
    assert finished.returncode == 0, finished.stderr
    *outcomes, memory = map(json.loads, finished.stdout.splitlines())
    return Reading([Outcome(**outcome) for outcome in outcomes], memory["peak_mib"], finished.stderr)


def test_every_file_is_decoded_or_refused_without_warnings_or_crashes(reading: Reading) -> None:
    cases = {outcome.case for outcome in reading.outcomes}
    assert len(cases) >= FEWEST_CASES
    assert Counter(outcome.reader for outcome in reading.outcomes) == dict.fromkeys((*MODES, "read_description"), len(cases))
    for outcome in reading.outcomes:
        if outcome.outcome.startswith("refused: "):
            assert outcome.outcome.startswith("refused: img: "), outcome
        elif outcome.reader == "read_description":
            assert outcome.outcome == "description", outcome
        else:
            assert outcome.outcome == MODES[outcome.reader], outcome
    assert reading.complaints == ""


def test_valid_files_are_decoded_and_invalid_ones_refused(reading: Reading) -> None:
    decoded = [outcome for outcome in reading.outcomes if outcome.reader != "read_description"]
    assert not [outcome for outcome in decoded if outcome.expected == "read" and outcome.refusal]
    assert not [outcome for outcome in decoded if outcome.expected == "refused" and not outcome.refusal]


def test_a_text_bomb_is_refused_only_by_readers_of_the_text(reading: Reading) -> None:
    told = {outcome.case: outcome.refusal for outcome in reading.outcomes if outcome.reader == "read_description"}
    for kind in ("zTXt", "iTXt"):
        for where in ("before", "behind"):
            refusal = told[f"png, {kind} of 200 MiB {where} the pixels"]
            assert refusal == "img: its text parameters is too long, at most 1048576 bytes are allowed"
    assert told["png, iCCP of 200 MiB before the pixels"] is None


def test_no_file_takes_much_time_or_memory(reading: Reading) -> None:
    slowest = max(reading.outcomes, key=lambda outcome: outcome.taken_s)
    print(f"slowest: {slowest}; peak: {reading.peak_mib} MiB")
    assert slowest.taken_s < MAX_TAKEN_S, slowest
    assert reading.peak_mib < MAX_PEAK_MIB


@pytest.mark.parametrize(
    ("named", "told"),
    [
        ("png of 65535 x 65535 in its header", "the image has more than 16777216 pixels"),
        ("png of 10000 x 8000 in its header", "the image has 10000 x 8000 pixels, at most 16777216"),
        ("png of 16777216 x 1", "the image has 16777216 x 1 pixels, at most 16384 per side are allowed"),
        ("png, a million empty chunks", "the file has more than 16384 chunks"),
        ("jpeg, a million empty segments", "the file has more than 16384 segments"),
        ("jpeg of 4096 pixels, 100,000 scans", "the file has more than 64 scans"),
        ("jpeg, 4 MiB of fill bytes", "the file has more than 65536 bytes between its segments"),
        ("jpeg, EXIF of 15 MiB", "the file has EXIF in more than 16 segments"),
        ("png, EXIF of 15 MiB", "its EXIF block has 157286"),
        ("png, tRNS, a wrong checksum", "the PNG is damaged: its tRNS chunk is cut short, or its checksum is wrong"),
        ("png, IHDR, a wrong checksum", "the PNG is damaged: its IHDR chunk is cut short, or its checksum is wrong"),
        ("the beginning of a PNG", "the PNG is damaged: its header, the IHDR chunk, is missing"),
        ("a GIF file", "not a PNG, JPEG or WebP image"),
        ("an SVG file", "not a PNG, JPEG or WebP image"),
        ("a PostScript program", "not a PNG, JPEG or WebP image"),
        ("a TIFF file", "not a PNG, JPEG or WebP image"),
        ("nothing", "the file is empty"),
    ],
)
def test_a_refusal_names_the_problem(reading: Reading, named: str, told: str) -> None:
    refusals = [outcome.refusal for outcome in reading.outcomes if outcome.case == named]
    assert refusals
    assert all(refusal is not None and refusal.startswith(f"img: {told}") for refusal in refusals), refusals


# The expected values come from the formats' specifications. Files are built by hand if Pillow might write and read them wrongly.


def pixels_of(content: bytes) -> list[tuple[int, ...]]:
    picture = np.asarray(read_image(content, "img"))
    return [tuple(int(value) for value in pixel) for pixel in picture.reshape(-1, 3)]


def mask_of(content: bytes) -> list[int]:
    return [int(value) for value in np.asarray(read_mask(content, "mask")).ravel()]


def test_16_bit_grey_is_scaled_rather_than_clipped() -> None:
    values = [0, 257, 32_896, 65_278, 65_535]
    content = png(5, 1, 16, GREY, struct.pack(">5H", *values))
    assert mask_of(content) == [0, 1, 128, 254, 255]
    assert pixels_of(content) == [(value, value, value) for value in (0, 1, 128, 254, 255)]


def test_16_bit_colours_and_transparency_are_scaled() -> None:
    colours = struct.pack(">6H", 65_535, 32_896, 0, 257, 514, 771)
    assert pixels_of(png(2, 1, 16, RGB, colours)) == [(255, 128, 0), (1, 2, 3)]
    half = struct.pack(">4H", 0, 0, 0, 32_896)
    assert pixels_of(png(1, 1, 16, RGBA, half)) == [(127, 127, 127)]
    assert pixels_of(png(1, 1, 16, GREY_ALPHA, struct.pack(">2H", 0, 32_896))) == [(127, 127, 127)]


@pytest.mark.parametrize(
    ("depth", "row", "greys"), [(1, b"\x40", [0, 255]), (2, b"\x1b", [0, 85, 170, 255]), (4, b"\x0f\x80", [0, 255, 136])]
)
def test_grey_with_few_bits_spans_black_to_white(depth: int, row: bytes, greys: list[int]) -> None:
    assert mask_of(png(len(greys), 1, depth, GREY, row)) == greys


@pytest.mark.parametrize(("depth", "row"), [(1, b"\x40"), (2, b"\x10"), (4, b"\x01"), (8, b"\x00\x01")])
def test_palettes_keep_their_colours_and_transparency(depth: int, row: bytes) -> None:
    colours = chunk(b"PLTE", bytes((220, 35, 40, 40, 80, 220)))
    assert pixels_of(png(2, 1, depth, PALETTE, row, before=colours)) == [(220, 35, 40), (40, 80, 220)]
    transparent = colours + chunk(b"tRNS", b"\x00\xff")
    assert pixels_of(png(2, 1, depth, PALETTE, row, before=transparent)) == [(255, 255, 255), (40, 80, 220)]


@pytest.mark.parametrize(
    ("inks", "colour"),
    [
        ((0, 0, 0, 0), (255, 255, 255)),
        ((255, 0, 0, 0), (0, 255, 255)),
        ((0, 255, 255, 0), (255, 0, 0)),
        ((0, 0, 0, 255), (0, 0, 0)),
        ((0, 0, 0, 128), (127, 127, 127)),
        ((128, 0, 0, 128), (63, 127, 127)),
    ],
)
def test_cmyk_photographs_are_converted_to_rgb(inks: tuple[int, ...], colour: tuple[int, ...]) -> None:
    """(1 - ink) * (1 - black) of each; in the file they are inverted, as Adobe's programs write them."""
    content = file(Image.new("CMYK", (16, 16), inks), "JPEG", quality=100)
    assert b"Adobe" in content
    assert np.abs(np.array(pixels_of(content)) - colour).max() <= 3


def test_the_first_frame_of_an_animation_is_used() -> None:
    frames = [Image.new("RGB", (16, 16), colour) for colour in ((220, 35, 40), (40, 80, 220), (40, 160, 70))]
    for image_format in ("PNG", "WEBP", "MPO"):
        content = file(frames[0], image_format, save_all=True, append_images=frames[1:])
        assert np.abs(np.array(pixels_of(content)) - (220, 35, 40)).max() < 12, image_format


def test_a_file_with_the_most_allowed_chunks_is_decoded() -> None:
    content = file(drawing(), "JPEG", progressive=True)
    comments = b"\xff\xfe\0\2" * 16_000
    assert read_image(content[:2] + comments + content[2:], "img").size == (96, 64)
    chunks = chunk(b"aaAa", b"") * 16_000
    assert read_image(png(1, 1, 8, GREY, b"\0", before=chunks), "img").size == (1, 1)


@pytest.mark.parametrize("image_format", ["GIF", "TIFF", "EPS"])
def test_other_loaded_decoders_are_not_used(image_format: str) -> None:
    Image.init()
    assert image_format in Image.OPEN
    with pytest.raises(InvalidRequest, match="not a PNG, JPEG or WebP image"):
        read_image(file(drawing(), image_format), "img")


def test_exif_after_the_pixels_is_limited_too() -> None:
    content = png(1, 1, 8, GREY, b"\0", after=chunk(b"eXIf", bytes(2**20 + 1)))
    with pytest.raises(TooLarge, match="img: its EXIF block has 10485[0-9]+ bytes, at most 1048576 are allowed"):
        read_image(content, "img")
    assert Image.open(io.BytesIO(content)).size == (1, 1)
