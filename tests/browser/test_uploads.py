"""The page at /ui sends exactly the image that it shows, whatever the file's metadata says.

Other programs make the files and read what was sent: ImageMagick, exiftool, cwebp, webpmux and avifenc.
"""

from __future__ import annotations

import base64
import io
import shutil
import struct
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image
from playwright.sync_api import Browser, Page, expect

from tests.browser.chromium import CHROMIUM
from tests.browser.visit import Visit, decoded

PROGRAMS = {"convert": "imagemagick", "exiftool": "libimage-exiftool-perl", "cwebp": "webp", "webpmux": "webp", "avifenc": "libavif-bin"}
MISSING = sorted({package for program, package in PROGRAMS.items() if shutil.which(program) is None})
pytestmark = [
    pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed"),
    pytest.mark.skipif(bool(MISSING), reason=f"not installed: Debian's {', '.join(MISSING)}"),
]

# The corners from the upper left, row by row. None is a colour of the demo model.
CORNERS = ((200, 30, 200), (110, 70, 30), (20, 180, 180), (70, 60, 110))
WIDTH, HEIGHT = 96, 64
CLOSE = 6  # of 255: what JPEG, WebP and AVIF may change within a colour
KEPT = 12  # of 255: scaled as well
REPAINTED = 40
# Records the uploads in the page, because Playwright cannot see the bytes of files.
REMEMBER_WHAT_IS_SENT = """
    const ask = window.fetch;
    window.fetch = (url, options) => {
      if (options?.body instanceof FormData) window.sent = options.body.get("img");
      return ask(url, options);
    };
"""
AS_BASE64 = """
    async (blob) => {
      const url = await new Promise((resolve) => {
        const reader = new FileReader();
        reader.onload = () => resolve(reader.result);
        reader.readAsDataURL(blob);
      });
      return [blob.type, url.slice(url.indexOf(",") + 1)];
    }
"""
Colours = npt.NDArray[np.float64]


def run(*command: object, stdin: bytes | None = None) -> bytes:
    finished = subprocess.run([str(part) for part in command], input=stdin, capture_output=True, timeout=60, check=False)
    assert finished.returncode == 0, finished.stderr.decode(errors="replace")
    return finished.stdout


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An image with a different colour in each corner, as four files without an orientation."""
    folder = tmp_path_factory.mktemp("files")
    upper_left, upper_right, lower_left, lower_right = (f"xc:rgb{colour}".replace(" ", "") for colour in CORNERS)
    rows = ["(", upper_left, upper_right, "+append", ")", "(", lower_left, lower_right, "+append", ")", "-append"]
    run("convert", "-size", f"{WIDTH // 2}x{HEIGHT // 2}", *rows, "-strip", "-type", "TrueColor", f"PNG24:{folder / 'plain.png'}")
    run("convert", folder / "plain.png", "-quality", "95", "-sampling-factor", "1x1", folder / "plain.jpg")
    run("cwebp", "-quiet", "-lossless", folder / "plain.png", "-o", folder / "plain.webp")
    run("avifenc", "--min", "0", "--max", "8", folder / "plain.png", folder / "plain.avif")
    return folder


def corners(picture: Image.Image) -> Colours:
    """The colour in the middle of each quarter, from the upper left, row by row."""
    pixels = np.asarray(picture.convert("RGB"), dtype=float)
    height, width = pixels.shape[:2]
    return np.array([pixels[int(y * height), int(x * width)] for y in (0.25, 0.75) for x in (0.25, 0.75)])


def as_other_programs_read_it(content: bytes) -> Image.Image:
    """Decode by ImageMagick, rotated by its orientation, if any."""
    return Image.open(io.BytesIO(run("convert", "-", "-auto-orient", "PPM:-", stdin=content)))


def farthest(one: Colours, other: Colours) -> Colours:
    """The largest channel difference of each corner's colour, 0 to 255."""
    farthest: Colours = np.abs(one - other).max(axis=-1)
    return farthest


class Upload:
    """Chooses files in the page, paints the upper left quarter, generates, and returns the results."""

    def __init__(self, visit: Visit, other_page: Page) -> None:
        self.visit = visit
        self.other_page = other_page

    def choose(self, content: bytes, name: str, media_type: str) -> Image.Image:
        """Choose a file and return the image that the page shows."""
        shown = self.visit.control("input-picture")
        before = shown.get_attribute("src")
        self.visit.control("img").set_input_files({"name": name, "mimeType": media_type, "buffer": content})
        expect(self.visit.control("input")).to_be_visible()
        if before is not None:
            expect(shown).not_to_have_attribute("src", before)
        return decoded(shown)

    def as_chromium_shows_it(self, content: bytes) -> Image.Image:
        """On a page that has nothing of ours."""
        self.other_page.set_content(f'<img src="data:;base64,{base64.b64encode(content).decode()}">')
        return decoded(self.other_page.locator("img"))

    def repaint_upper_left(self) -> tuple[Image.Image, bytes, str]:
        """The generated image, and the bytes and media type that the page sent."""
        visit = self.visit
        visit.page.get_by_role("radio", name="Repaint a part").check()
        if not visit.control("left").is_visible():
            visit.page.get_by_text("Rectangle by numbers").click()
        visit.fill(left=0, top=0, right=50, bottom=50)
        visit.control("mask-rectangle").click()
        visit.fill(prompt="a red circle on a blue background", num_inference_steps=2, seed=1, strength=1)
        with visit.page.expect_request("**/inpaint"):
            visit.draw.click()
        (picture,) = visit.pictures()
        media_type, content = visit.page.evaluate(f"({AS_BASE64})(window.sent)")
        return picture, base64.b64decode(content), media_type


@pytest.fixture
def upload(visiting: Callable[..., Visit], browser: Browser) -> Iterator[Upload]:
    other_page = browser.new_page()
    yield Upload(visiting(REMEMBER_WHAT_IS_SENT), other_page)
    other_page.close()


ORIENTATIONS = range(1, 9)


def with_orientations(folder: Path, suffix: str, where: str) -> list[bytes]:
    """One for each orientation, in `where`: EXIF or XMP. exiftool writes it, webpmux puts it into WebP: Debian 12's exiftool cannot."""
    tag = {"EXIF": "IFD0:Orientation", "XMP": "XMP-tiff:Orientation"}[where]
    carrier = "jpg" if suffix == "webp" else suffix
    made = [folder / f"{where}-{suffix}-{orientation}.{carrier}" for orientation in ORIENTATIONS]
    writing: list[object] = []
    for orientation, file in zip(ORIENTATIONS, made, strict=True):
        writing += ["-n", f"-{tag}={orientation}", "-o", file, folder / f"plain.{carrier}", "-execute"]
    run("exiftool", *writing[:-1])
    if suffix == "webp":
        run("exiftool", "-q", "-b", f"-{where}", "-w", "%d%f.block", *made)
        for file in made:
            run("webpmux", "-set", where.lower(), file.with_suffix(".block"), folder / "plain.webp", "-o", file.with_suffix(".webp"))
    files = [file.with_suffix(f".{suffix}") for file in made]
    assert orientations_in(files) == list(ORIENTATIONS)
    return [file.read_bytes() for file in files]


def orientations_in(files: list[Path]) -> list[int]:
    return [int(line) for line in run("exiftool", "-q", "-n", "-s3", "-Orientation", *files).split()]


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp"])
@pytest.mark.parametrize("where", ["EXIF", "XMP"])
def test_the_page_sends_the_image_it_shows_and_the_mask_matches(upload: Upload, folder: Path, suffix: str, where: str) -> None:
    sent_files, upper_left_colours = [], set()
    for orientation, content in zip(ORIENTATIONS, with_orientations(folder, suffix, where), strict=True):
        shown = upload.choose(content, f"a.{suffix}", {"jpg": "image/jpeg"}.get(suffix, f"image/{suffix}"))
        in_chromium = upload.as_chromium_shows_it(content)
        assert shown.size == in_chromium.size
        assert farthest(corners(shown), corners(in_chromium)).max() <= 1
        repainted, sent, media_type = upload.repaint_upper_left()
        assert media_type == "image/png"
        read = as_other_programs_read_it(sent)
        assert read.size == shown.size
        assert farthest(corners(read), corners(shown)).max() <= 1
        off = farthest(corners(repainted), corners(shown))
        assert off[0] > REPAINTED, f"orientation {orientation}: the quarter that was painted"
        assert off[1:].max() <= KEPT, f"orientation {orientation}: the quarters that were not painted"
        upper_left_colours.add(tuple(corners(shown)[0]))
        sent_files.append(folder / f"sent-{orientation}.png")
        sent_files[-1].write_bytes(sent)
    assert orientations_in(sent_files) == []
    if (suffix, where) in {("jpg", "EXIF"), ("png", "EXIF")}:  # some browsers rotate the others
        assert len(upper_left_colours) == 4


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp"])
def test_a_plain_file_is_sent_unchanged_whatever_its_name(upload: Upload, folder: Path, suffix: str) -> None:
    content = (folder / f"plain.{suffix}").read_bytes()
    shown = upload.choose(content, "a.gif", "image/gif")
    assert farthest(corners(shown), np.array(CORNERS, dtype=float)).max() <= CLOSE
    repainted, sent, media_type = upload.repaint_upper_left()
    assert sent == content
    assert media_type == f"image/{suffix}".replace("jpg", "jpeg")
    assert farthest(corners(repainted), corners(shown))[1:].max() <= KEPT


def srgb_profile(size: int) -> bytes:
    """LittleCMS's sRGB profile followed by `size` bytes, which its header includes."""
    from PIL import ImageCms

    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    return struct.pack(">I", len(profile) + size) + profile[4:] + bytes(size)


WITHOUT_GAMMA = ("-define", "png:exclude-chunks=gAMA,cHRM")  # which ImageMagick rounds: browsers show other colours then


def avif(folder: Path) -> bytes:
    return (folder / "plain.avif").read_bytes()


def damaged_side_chunk(folder: Path) -> bytes:
    content = bytearray(run("convert", folder / "plain.png", "-density", "72", "-units", "PixelsPerInch", *WITHOUT_GAMMA, "PNG24:-"))
    content[content.index(b"pHYs") + 4 + 9] ^= 0xFF  # the first byte of its checksum
    return bytes(content)


def large_profile(folder: Path) -> bytes:
    (folder / "large.icc").write_bytes(srgb_profile(2**20))
    return run("convert", folder / "plain.png", "-profile", folder / "large.icc", *WITHOUT_GAMMA, "PNG24:-")


def much_text(folder: Path) -> bytes:
    (folder / "text").write_text("a word " * 250_000)
    return run("exiftool", "-z", f"-PNG:Comment<={folder / 'text'}", "-o", "-", folder / "plain.png")


def converted(*options: str, to: str) -> Callable[[Path], bytes]:
    return lambda folder: run("convert", folder / "plain.png", *options, f"{to}:-")


def animated_webp(folder: Path) -> bytes:
    run("convert", folder / "plain.png", "(", folder / "plain.png", "-negate", ")", folder / "two.gif")
    run("gif2webp", "-quiet", folder / "two.gif", "-o", folder / "two.webp")
    return (folder / "two.webp").read_bytes()


def svg(folder: Path) -> bytes:
    size = f'width="{WIDTH // 2}" height="{HEIGHT // 2}"'
    rectangles = "".join(
        f'<rect x="{index % 2 * WIDTH // 2}" y="{index // 2 * HEIGHT // 2}" {size} fill="rgb{colour}"/>'
        for index, colour in enumerate(CORNERS)
    )
    return f'<?xml version="1.0"?>\n<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{HEIGHT}">{rectangles}</svg>'.encode()


REDRAWN: dict[str, tuple[Callable[[Path], bytes], str, str]] = {
    "AVIF named .jpg": (avif, "a.jpg", "image/jpeg"),
    "AVIF": (avif, "a.avif", "image/avif"),
    "GIF named .png": (converted(to="GIF"), "a.png", "image/png"),
    "BMP named .webp": (converted(to="BMP3"), "a.webp", "image/webp"),
    "PNG with a wrong checksum in pHYs": (damaged_side_chunk, "a.png", "image/png"),
    "PNG with a profile of more than 1 MiB": (large_profile, "a.png", "image/png"),
    "PNG with 1.75 MB of compressed text": (much_text, "a.png", "image/png"),
    "progressive JPEG": (converted("-interlace", "JPEG", "-quality", "95", to="JPEG"), "a.jpg", "image/jpeg"),
    "JPEG with bytes behind its end": (lambda folder: (folder / "plain.jpg").read_bytes() + b"more", "a.jpg", "image/jpeg"),
    "animated WebP": (animated_webp, "a.webp", "image/webp"),
    "SVG": (svg, "a.svg", "image/svg+xml"),
    "SVG named .png": (svg, "a.png", "image/png"),
    "PNG without a type": (damaged_side_chunk, "a", ""),
}


@pytest.mark.parametrize("kind", REDRAWN)
def test_formats_that_only_the_browser_decodes_are_sent_as_png(upload: Upload, folder: Path, kind: str) -> None:
    make, name, media_type = REDRAWN[kind]
    shown = upload.choose(make(folder), name, media_type)
    assert shown.size == (WIDTH, HEIGHT)
    assert farthest(corners(shown), np.array(CORNERS, dtype=float)).max() <= CLOSE
    repainted, sent, sent_type = upload.repaint_upper_left()
    assert sent_type == "image/png"
    assert run("identify", "-format", "%m", "-", stdin=sent) == b"PNG"
    off = farthest(corners(repainted), corners(shown))
    assert off[0] > REPAINTED
    assert off[1:].max() <= KEPT


def test_colours_of_another_colour_space_are_sent_as_shown(upload: Upload, folder: Path) -> None:
    """A PNG with a gamma of 1.0, which Chromium applies and Pillow ignores."""
    content = run("convert", folder / "plain.png", "-set", "gamma", "1.0", "-define", "png:include-chunk=gAMA", "PNG24:-")
    shown = upload.choose(content, "a.png", "image/png")
    in_chromium = upload.as_chromium_shows_it(content)
    assert farthest(corners(shown), corners(in_chromium)).max() <= 1
    assert farthest(corners(shown), np.array(CORNERS, dtype=float)).min() > KEPT, "the gamma must have an effect"
    repainted, _, _ = upload.repaint_upper_left()
    assert farthest(corners(repainted), corners(shown))[1:].max() <= KEPT


def test_transparent_areas_are_shown_white_like_on_the_server(upload: Upload, folder: Path) -> None:
    brown = f"rgb{CORNERS[1]}".replace(" ", "")
    content = run("convert", folder / "plain.png", "-alpha", "set", "-transparent", brown, *WITHOUT_GAMMA, "PNG32:-")
    assert Image.open(io.BytesIO(content)).convert("RGBA").getpixel((WIDTH - 1, 0))[3] == 0  # type: ignore[index]
    upload.choose(content, "a.png", "image/png")
    upload.visit.page.emulate_media(color_scheme="dark")
    on_screen = corners(Image.open(io.BytesIO(upload.visit.control("input-picture").screenshot())))
    expected = np.array([CORNERS[0], (255, 255, 255), *CORNERS[2:]], dtype=float)
    assert farthest(on_screen, expected).max() <= CLOSE
    repainted, _, _ = upload.repaint_upper_left()
    assert farthest(corners(repainted), expected)[1:].max() <= KEPT


def test_a_photo_over_the_size_limit_is_sent_smaller(upload: Upload, folder: Path) -> None:
    """Noise, of which a PNG would have 9 MiB."""
    content = run("convert", "-size", "2400x1800", "xc:gray", "+noise", "Random", "-quality", "100", "JPEG:-")
    assert len(content) > 4 * 2**20
    shown = upload.choose(content, "a.jpg", "image/jpeg")
    assert shown.size == (2048, 1536)
    _, sent, media_type = upload.repaint_upper_left()
    assert media_type == "image/jpeg"
    assert len(sent) < 4 * 2**20
    assert run("identify", "-format", "%m %w %h", "-", stdin=sent) == b"JPEG 2048 1536"


def test_the_file_chosen_last_is_sent(upload: Upload, folder: Path) -> None:
    """Even if an earlier one takes longer to load."""
    visit = upload.visit
    slow = run("convert", "-size", "5000x2500", "gradient:", "JPEG:-")
    visit.fill(prompt="a red circle on a blue background", num_inference_steps=2)
    for content in (slow, (folder / "plain.png").read_bytes()):
        visit.control("img").set_input_files({"name": "a", "mimeType": "", "buffer": content})
    with visit.page.expect_request("**/img2img"):
        visit.draw.click()
    _, sent = visit.page.evaluate(f"({AS_BASE64})(window.sent)")
    assert base64.b64decode(sent) == (folder / "plain.png").read_bytes()
    visit.pictures()


def cut(content: bytes) -> bytes:
    return content[: len(content) * 6 // 10]


NOT_SHOWN: dict[str, tuple[Callable[[Path], bytes], str]] = {
    "empty": (lambda folder: b"", "This file is empty."),
    "words": (lambda folder: b"no image", "This file is not an image that this browser can show. Choose a PNG, JPEG or WebP file."),
    "a page": (lambda folder: b"<!DOCTYPE html><p>Not found</p>", "This file is not an image that this browser can show."),
    "TIFF": (converted(to="TIFF"), "This browser cannot show this file, which is TIFF. Convert it to PNG or JPEG"),
    "PDF": (lambda folder: b"%PDF-1.7 and so on", "This browser cannot show this file, which is PDF."),
    "HEIC": (lambda folder: b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "This browser cannot show this file, which is HEIC."),
    "half a PNG": (lambda folder: cut((folder / "plain.png").read_bytes()), "This PNG file is damaged or cut short. Choose another one."),
    "half a JPEG": (lambda folder: cut((folder / "plain.jpg").read_bytes()), "This JPEG file is damaged or cut short."),
    "half a WebP": (lambda folder: cut((folder / "plain.webp").read_bytes()), "This WebP file is damaged or cut short."),
    "half a GIF": (lambda folder: converted(to="GIF")(folder)[:20], "This GIF file is damaged or cut short."),
    "half an SVG": (lambda folder: cut(svg(folder)), "This file is not an image that this browser can show."),
}


@pytest.mark.parametrize("kind", NOT_SHOWN)
def test_for_a_file_the_browser_cannot_decode_the_page_names_the_format_and_a_remedy(visit: Visit, folder: Path, kind: str) -> None:
    make, message = NOT_SHOWN[kind]
    visit.control("img").set_input_files({"name": "a.png", "mimeType": "image/png", "buffer": make(folder)})
    expect(visit.control("img-problem")).to_contain_text(message)
    expect(visit.control("input")).to_be_hidden()
    expect(visit.control("img")).to_have_attribute("aria-describedby", "img-problem")
