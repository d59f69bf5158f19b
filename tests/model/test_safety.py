"""The safety checker looks at each picture by itself."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from stable_diffusion.engine.denoiser import Denoiser
from stable_diffusion.engine.engine import Engine
from stable_diffusion.engine.loading import Parts, load
from stable_diffusion.models.folder import check_model
from tests.model.recording_engine import RecordingEngine
from tests.model.reference import assert_same_picture, draw_with_diffusers
from tests.safety_checkers import make_checked_model
from tests.tasks import make_task


@pytest.fixture(scope="module")
def strict_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checked_model(tmp_path_factory.mktemp("strict") / "model", flags_everything=True)


@pytest.fixture(scope="module")
def strict_engine(strict_folder: Path) -> Iterator[RecordingEngine]:
    engine = Engine(lambda: Denoiser(load(check_model(strict_folder), "fp32")), max_batch_size=4)
    yield RecordingEngine(engine, [])
    engine.close()


def test_a_flagged_picture_is_blank_as_in_diffusers(strict_engine: RecordingEngine, strict_folder: Path) -> None:
    task = make_task()
    (picture,) = strict_engine.draw([task])
    assert picture.flagged is True
    assert not np.asarray(picture.image).any()
    assert_same_picture(picture.image, draw_with_diffusers(strict_folder, task))


def test_unchecked_request_leaves_the_checker_on_for_the_next_one(strict_engine: RecordingEngine) -> None:
    checked = [True, False, True, False]
    pictures = strict_engine.draw([make_task(safety_check=check) for check in checked])
    assert [picture.flagged for picture in pictures] == [True, None, True, None]
    assert [bool(np.asarray(picture.image).any()) for picture in pictures] == [False, True, False, True]
    (following,) = strict_engine.draw([make_task()])
    assert following.flagged is True


def test_a_neighbour_that_is_flagged_changes_nothing_of_the_others(strict_engine: RecordingEngine) -> None:
    seeds = range(1, 5)
    unchecked = strict_engine.draw([make_task(seed=seed, safety_check=False) for seed in seeds])
    mixed = strict_engine.draw([make_task(seed=seed, safety_check=seed % 2 == 0) for seed in seeds])
    assert [picture.flagged for picture in mixed] == [None, True, None, True]
    for alone, together in zip(unchecked[::2], mixed[::2], strict=True):
        difference = np.abs(np.asarray(alone.image, int) - np.asarray(together.image, int))
        assert difference.max() <= 2  # the batches may be cut at other places


def test_of_pictures_that_are_drawn_together_only_those_that_are_flagged_are_blank(tmp_path: Path) -> None:
    """The threshold is put between what the checker's own network makes of two of the pictures and of the other two."""
    torch.manual_seed(1)  # of the checker's weights
    parts = load(check_model(make_checked_model(tmp_path / "model", flags_everything=False)), "fp32")
    engine = RecordingEngine(Engine(lambda: Denoiser(parts), max_batch_size=4), [])
    prompts = ["a red circle", "a green star", "a blue square on a yellow background", "a black circle on a white background"]
    unchecked = engine.draw([make_task(prompt=prompt, safety_check=False) for prompt in prompts])
    likeness = likeness_to_what_is_unsafe(parts, [picture.image for picture in unchecked])
    threshold = float(np.mean(sorted(likeness)[1:3]))
    assert parts.safety_checker is not None
    parts.safety_checker.concept_embeds_weights.data.fill_(threshold)
    checked = engine.draw([make_task(prompt=prompt) for prompt in prompts])
    engine.engine.close()
    assert [picture.flagged for picture in checked] == [like > threshold for like in likeness]
    assert sorted(picture.flagged is True for picture in checked) == [False, False, True, True]
    for before, after in zip(unchecked, checked, strict=True):
        if after.flagged:
            assert not np.asarray(after.image).any()
        else:
            assert np.abs(np.asarray(before.image, int) - np.asarray(after.image, int)).max() <= 2


def likeness_to_what_is_unsafe(parts: Parts, pictures: list[Image.Image]) -> list[float]:
    checker, reader = parts.safety_checker, parts.feature_extractor
    assert checker is not None
    assert reader is not None
    with torch.inference_mode():
        seen = checker.visual_projection(checker.vision_model(reader(pictures, return_tensors="pt").pixel_values)[1])
        return [float(one) for one in torch.nn.functional.cosine_similarity(seen, checker.concept_embeds[:1].expand_as(seen))]


def test_a_picture_that_is_not_flagged_is_not_changed(strict_engine: RecordingEngine, tmp_path: Path) -> None:
    folder = make_checked_model(tmp_path / "model", flags_everything=False)
    engine = RecordingEngine(Engine(lambda: Denoiser(load(check_model(folder), "fp32")), max_batch_size=2), [])
    (checked,) = engine.draw([make_task()])
    (unchecked,) = engine.draw([make_task(safety_check=False)])
    engine.engine.close()
    assert checked.flagged is False
    assert_same_picture(checked.image, unchecked.image)


def test_a_model_without_a_checker_says_that_nobody_looked(recording_engine: RecordingEngine) -> None:
    (picture,) = recording_engine.draw([make_task()])
    assert picture.flagged is None
