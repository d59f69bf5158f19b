"""The rule that judges pictures is right about pictures that are known."""

from __future__ import annotations

import random
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from stable_diffusion.demo.shapes import (
    COLOURS,
    COLOURS_WITH_PINK,
    SHAPES,
    Scene,
    all_scenes,
    caption,
    draw,
    is_held_out,
    is_hollow,
    judge,
    vary,
)


def test_the_rule_reads_drawn_pictures_back() -> None:
    rng = random.Random(0)
    for scene in rng.sample(all_scenes(), 120):
        verdict = judge(draw(vary(scene, rng), 64, 64, rng))
        assert (verdict.colour, verdict.background, verdict.shape) == (scene.colour, scene.background, scene.shape)


@pytest.mark.parametrize("size", [(96, 96), (96, 64), (128, 128)])
def test_the_rule_works_at_other_sizes(size: tuple[int, int]) -> None:
    rng = random.Random(1)
    for shape in SHAPES:
        assert judge(draw(Scene("", "white", shape, "red"), *size, rng)).shape == shape


def test_the_rule_sees_nothing_in_a_plain_picture() -> None:
    assert judge(Image.new("RGB", (64, 64), COLOURS["red"])).shape == "nothing"


@pytest.mark.parametrize("hollow", [False, True])
def test_the_rule_sees_whether_a_shape_is_hollow(hollow: bool) -> None:
    rng = random.Random(2)
    for scene in rng.sample(all_scenes(), 120):
        assert is_hollow(draw(replace(vary(scene, rng), hollow=hollow), 64, 64, rng)) is hollow


def test_nothing_is_hollow_in_a_plain_image() -> None:
    assert not is_hollow(Image.new("RGB", (64, 64), COLOURS["red"]))


def test_pink_is_only_seen_by_the_rule_that_knows_it() -> None:
    rng = random.Random(3)
    for background in COLOURS:
        image = draw(Scene("", "pink", "circle", background), 64, 64, rng)
        assert judge(image, COLOURS_WITH_PINK).colour == "pink"
        assert judge(image).colour in COLOURS


def test_noise_is_hardly_ever_taken_for_the_picture_that_was_asked_for() -> None:
    random_numbers = np.random.default_rng(0)
    right = 0
    for _ in range(40):
        verdict = judge(Image.fromarray(random_numbers.integers(0, 255, (64, 64, 3), dtype=np.uint8)))
        right += (verdict.colour, verdict.background) == ("red", "blue")
    assert right <= 2


def test_a_tenth_of_all_combinations_is_kept_from_training() -> None:
    held_out = [scene for scene in all_scenes() if is_held_out(scene)]
    assert len(all_scenes()) == 3 * 8 * 5 * 7
    assert len(held_out) == 77
    assert {scene.shape for scene in held_out} == set(SHAPES)
    assert {scene.colour for scene in held_out} == set(COLOURS)


def test_captions_are_the_words_of_the_scene() -> None:
    assert caption(Scene("small", "red", "circle", "blue")) == "a small red circle on a blue background"
    assert caption(Scene("", "red", "circle", "blue")) == "a red circle on a blue background"
