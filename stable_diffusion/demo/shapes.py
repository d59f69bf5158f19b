"""The captioned images that the demo model is trained on, and the pixel rule that judges the images it generates.

A scene is plain data; `draw` renders it, `caption` describes it, `judge` recognises it in an image without any model.
Does not depend on torch, the model or its training.
"""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import product

import numpy as np
from PIL import Image, ImageDraw

# All near a corner of the RGB cube: a guidance scale of 7.5 pushes colours outwards and would turn orange into red or yellow.
COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (220, 35, 40),
    "yellow": (250, 230, 45),
    "green": (40, 160, 70),
    "cyan": (40, 205, 225),
    "blue": (40, 80, 220),
    "purple": (145, 50, 185),
    "white": (245, 245, 245),
    "black": (18, 18, 18),
}
# The colour that only an adapter knows (`train_adapters.py`): the model's own training had no image with it.
PINK = (250, 80, 170)
COLOURS_WITH_PINK = {**COLOURS, "pink": PINK}
SHAPES = ("circle", "square", "triangle", "star", "cross")
# Radius of the shape as a share of the image's shorter side; without a size word it is medium.
SIZES = {"small": 0.19, "": 0.29, "large": 0.39}

_SUPERSAMPLING = 4
_HOLE = 0.65  # radius of the hole in a hollow shape, as a share of the shape's radius
_HELD_OUT_SHARE = 10  # one combination of words in ten is left out of training


@dataclass(frozen=True)
class Scene:
    """One image: a shape of one colour on a background of another. Centre and radius are shares of the shorter side.

    A hollow shape is an outline with the background inside. Captions do not mention it.
    """

    size: str
    colour: str
    shape: str
    background: str
    offset_x: float = 0.0
    offset_y: float = 0.0
    radius: float = 0.29
    angle_degrees: float = 0.0
    hollow: bool = False


def all_scenes() -> list[Scene]:
    """Every combination of words, each centred and upright."""
    return [
        Scene(size, colour, shape, background, radius=SIZES[size])
        for size, colour, shape, background in product(SIZES, COLOURS, SHAPES, COLOURS)
        if colour != background
    ]


def is_held_out(scene: Scene) -> bool:
    """Whether this combination of words is left out of training. A hash decides, so that the choice never changes."""
    words = f"{scene.size} {scene.colour} {scene.shape} {scene.background}"
    return hashlib.sha256(words.encode()).digest()[0] % _HELD_OUT_SHARE == 0


def caption(scene: Scene) -> str:
    """The prompt that describes the scene, in the words that the model is trained on."""
    size = f"{scene.size} " if scene.size else ""
    return f"a {size}{scene.colour} {scene.shape} on a {scene.background} background"


def vary(scene: Scene, rng: random.Random) -> Scene:
    """The same words, with the shape slightly shifted, scaled and rotated."""
    return replace(
        scene,
        offset_x=rng.uniform(-0.08, 0.08),
        offset_y=rng.uniform(-0.08, 0.08),
        radius=SIZES[scene.size] * rng.uniform(0.95, 1.05),
        angle_degrees=rng.uniform(-8, 8),
    )


def outline(shape: str, centre_x: float, centre_y: float, radius: float, angle_degrees: float) -> list[tuple[float, float]]:
    """The corners of `shape` in pixels; a circle is a polygon of 48 corners."""
    if shape == "circle":
        corners = [(math.sin(2 * math.pi * i / 48), -math.cos(2 * math.pi * i / 48)) for i in range(48)]
    elif shape == "square":
        corners = [(-0.85, -0.85), (0.85, -0.85), (0.85, 0.85), (-0.85, 0.85)]
    elif shape == "triangle":
        corners = [(0.0, -1.0), (1.0, 0.75), (-1.0, 0.75)]
    elif shape == "star":
        spokes = [(1.1 if i % 2 == 0 else 0.44, math.pi * i / 5) for i in range(10)]
        corners = [(length * math.sin(turn), -length * math.cos(turn)) for length, turn in spokes]
    elif shape == "cross":
        a, b = 0.34, 1.0
        corners = [(-a, -b), (a, -b), (a, -a), (b, -a), (b, a), (a, a), (a, b), (-a, b), (-a, a), (-b, a), (-b, -a), (-a, -a)]
    else:
        raise ValueError(f"unknown shape {shape!r}, expected one of {', '.join(SHAPES)}")
    turn = math.radians(angle_degrees)
    cosine, sine = math.cos(turn), math.sin(turn)
    return [(centre_x + radius * (x * cosine - y * sine), centre_y + radius * (x * sine + y * cosine)) for x, y in corners]


def _paint(canvas: ImageDraw.ImageDraw, scene: Scene, width: int, height: int, fill: int | tuple[int, ...]) -> None:
    side = min(width, height)
    centre_x, centre_y = width / 2 + scene.offset_x * side, height / 2 + scene.offset_y * side
    canvas.polygon(outline(scene.shape, centre_x, centre_y, scene.radius * side, scene.angle_degrees), fill=fill)


def draw(scene: Scene, width: int, height: int, rng: random.Random) -> Image.Image:
    """Render `scene` as an RGB image of `width` x `height` pixels; `rng` varies the two colours slightly."""

    def tint(colour: str) -> tuple[int, ...]:
        return tuple(max(0, min(255, channel + rng.randint(-8, 8))) for channel in COLOURS_WITH_PINK[colour])

    large = width * _SUPERSAMPLING, height * _SUPERSAMPLING
    background = tint(scene.background)
    image = Image.new("RGB", large, background)
    canvas = ImageDraw.Draw(image)
    _paint(canvas, scene, *large, tint(scene.colour))
    if scene.hollow:
        _paint(canvas, replace(scene, radius=_HOLE * scene.radius), *large, background)
    return image.resize((width, height), Image.Resampling.BOX)


def clutter(width: int, height: int, rng: random.Random) -> Image.Image:
    """An image without a caption: up to four shapes of any colour anywhere, so that the autoencoder learns more than captioned scenes."""

    def colour() -> tuple[int, int, int]:
        return rng.randint(0, 255), rng.randint(0, 255), rng.randint(0, 255)

    large = width * _SUPERSAMPLING, height * _SUPERSAMPLING
    ramp = Image.linear_gradient("L").rotate(rng.choice((0, 90, 180, 270))).resize(large)
    image = Image.composite(Image.new("RGB", large, colour()), Image.new("RGB", large, colour()), ramp)
    canvas = ImageDraw.Draw(image)
    for _ in range(rng.randint(0, 4)):
        scene = Scene("", "red", rng.choice(SHAPES), "blue", rng.uniform(-0.5, 0.5), rng.uniform(-0.5, 0.5), rng.uniform(0.08, 0.45))
        _paint(canvas, replace(scene, angle_degrees=rng.uniform(0, 360)), *large, colour())
    return image.resize((width, height), Image.Resampling.BOX)


@dataclass(frozen=True)
class Verdict:
    """The words that the pixel rule recognises in an image."""

    colour: str
    background: str
    shape: str


def nearest_colour(pixels: np.ndarray, colours: Mapping[str, tuple[int, int, int]] = COLOURS) -> str:
    """The name of the colour in `colours` nearest to the median of `pixels` (any shape, last axis RGB, 0 to 255)."""
    median = np.median(pixels.reshape(-1, 3).astype(float), axis=0)
    return min(colours, key=lambda name: float(np.sum((median - np.array(colours[name])) ** 2)))


def judge(image: Image.Image, colours: Mapping[str, tuple[int, int, int]] = COLOURS) -> Verdict:
    """Recognise the scene in an image of one shape: the border is the background, pixels that differ from it are the shape.

    The shape is the one whose outline, tried at several sizes and angles around the centre of those pixels, overlaps them best
    (intersection over union).
    """
    pixels = np.asarray(image.convert("RGB")).astype(float)
    height, width, _ = pixels.shape
    border = _border(pixels)
    distance = _distance(pixels, border)
    found = _is_shape(distance)
    background = nearest_colour(border, colours)
    if not found.any():
        return Verdict(background, background, "nothing")
    core = distance >= np.percentile(distance[found], 40)
    return Verdict(nearest_colour(pixels[core], colours), background, _best_shape(found, width, height))


def is_hollow(image: Image.Image) -> bool:
    """Whether the middle of the shape looks like the background and the shape lies on all four sides of it."""
    pixels = np.asarray(image.convert("RGB")).astype(float)
    found = _is_shape(_distance(pixels, _border(pixels)))
    if not found.any():
        return False
    row, column = (int(places.mean()) for places in np.nonzero(found))
    reach = min(found.shape) // 64
    middle = found[row - reach : row + reach + 1, column - reach : column + reach + 1]
    sides = found[:row, column], found[row:, column], found[row, :column], found[row, column:]
    return bool(middle.mean() < 0.5 and all(side.any() for side in sides))


def _border(pixels: np.ndarray) -> np.ndarray:
    """The outermost two pixels on each side, (N, 3)."""
    edges = (pixels[:2], pixels[-2:], pixels[:, :2], pixels[:, -2:])
    return np.concatenate([edge.reshape(-1, 3) for edge in edges])


def _distance(pixels: np.ndarray, border: np.ndarray) -> np.ndarray:
    """How far each pixel's colour is from the background's, (height, width)."""
    distance: np.ndarray = np.sqrt(((pixels - np.median(border, axis=0)) ** 2).sum(axis=2))
    return distance


def _is_shape(distance: np.ndarray) -> np.ndarray:
    """Which pixels are nearer to the shape's colour than to the background's, (height, width)."""
    # Half way between the background and the colour that differs most from it (robust to single pixels).
    is_shape: np.ndarray = distance > np.percentile(distance, 98) / 2
    return is_shape


def _best_shape(found: np.ndarray, width: int, height: int) -> str:
    rows, columns = np.nonzero(found)
    centre_x, centre_y = columns.mean() + 0.5, rows.mean() + 0.5
    best, best_overlap = "nothing", 0.0
    for shape, angle in product(SHAPES, (-8, -4, 0, 4, 8)):
        unit = Image.new("L", (200, 200))
        ImageDraw.Draw(unit).polygon(outline(shape, 100, 100, 80, angle), fill=1)
        unit_rows, unit_columns = np.nonzero(np.asarray(unit))
        # The same area and centre of mass as the found pixels; then slightly larger and smaller.
        fitted = math.sqrt(found.sum() / (len(unit_rows) / 80**2))
        for radius in (0.92 * fitted, fitted, 1.08 * fitted):
            shift_x = (unit_columns.mean() + 0.5 - 100) * radius / 80
            shift_y = (unit_rows.mean() + 0.5 - 100) * radius / 80
            template = Image.new("L", (width, height))
            ImageDraw.Draw(template).polygon(outline(shape, centre_x - shift_x, centre_y - shift_y, radius, angle), fill=1)
            mask = np.asarray(template) > 0
            overlap = float((mask & found).sum() / (mask | found).sum())
            if overlap > best_overlap:
                best, best_overlap = shape, overlap
    return best
