"""A task and its outcome cross the process hop unchanged; the engine of the runner says how many pictures share a step."""

from __future__ import annotations

import logging
import pickle
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from stable_diffusion.core.errors import Cancelled, GenerationFailed, ServiceError
from stable_diffusion.core.types import Picture, Ticket
from stable_diffusion.models.folder import DEMO_FOLDER, check_model
from stable_diffusion.runner.startup import start_engine
from stable_diffusion.runner.wire import pack_outcome, pack_task, unpack_news, unpack_task
from tests.tasks import make_task

TICKET = Ticket("a1", "somebody", index=2, unattended=True)


def test_a_task_with_pictures_arrives_as_it_was_sent(input_picture: Image.Image, right_half_mask: Image.Image) -> None:
    task = make_task(kind="inpaint", image=input_picture, mask=right_half_mask, prompt="\u732b \U0001f600")
    arrived, ticket, follow = unpack_task(pickle.loads(pickle.dumps(pack_task(task, TICKET, follow=True))))
    assert arrived.image == input_picture
    assert arrived.mask == right_half_mask
    assert (ticket, follow) == (TICKET, True)
    assert pack_task(arrived, TICKET) == pack_task(task, TICKET)


def test_a_picture_arrives_bit_for_bit_in_one_ascii_line() -> None:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (8, 16, 3), dtype=np.uint8))
    line = pack_outcome(Picture(image, True, "\u732b", ""))
    assert line.isascii()
    assert line.count("\n") == 1
    arrived = unpack_news(line)
    assert isinstance(arrived, Picture)
    assert arrived == Picture(image, True, "\u732b", "")


@pytest.mark.parametrize("error", [GenerationFailed("out of luck"), Cancelled("not wanted any more")], ids=["failed", "cancelled"])
def test_an_error_arrives_as_the_error_that_it_was(error: ServiceError) -> None:
    with pytest.raises(type(error), match=error.message):
        unpack_news(pack_outcome(error))


def test_the_engine_of_the_runner_measures_how_many_pictures_share_a_step_and_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with caplog.at_level(logging.INFO, logger="stable_diffusion"):
        engine = start_engine(check_model(DEMO_FOLDER), "fp32", max_batch_size=10)
    engine.close()
    [said] = [record.getMessage() for record in caplog.records if "share a step" in record.getMessage()]
    found = re.match(r"Up to (\d+) pictures of 64x64 share a step: ([\d.]+)x the pictures of one at a time \(1: \d+ ms, 2: ", said)
    assert found, said
    # The demo model is launch-bound on every machine that it was tried on.
    assert int(found[1]) >= 2
    caplog.clear()
    with caplog.at_level(logging.INFO, logger="stable_diffusion"):
        start_engine(check_model(DEMO_FOLDER), "fp32", max_batch_size=10).close()
    [recalled] = [record.getMessage() for record in caplog.records if "share a step" in record.getMessage()]
    assert recalled.startswith(said.removesuffix(".")), "the second start measures nothing"


def test_a_max_batch_size_of_one_is_said_too(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="stable_diffusion"):
        engine = start_engine(check_model(DEMO_FOLDER), "fp32", max_batch_size=1)
    engine.close()
    assert "Up to 1 pictures of 64x64 share a step: max_batch_size is 1." in caplog.messages
