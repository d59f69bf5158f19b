"""Tasks, outcomes and errors cross the process boundary unchanged."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
from PIL import Image

from stable_diffusion.core.errors import Cancelled, GenerationFailed, ServiceError
from stable_diffusion.core.types import GeneratedImage, Ticket
from stable_diffusion.runner.wire import pack_outcome, pack_task, unpack_task, unpack_update
from tests.tasks import make_task

TICKET = Ticket("a1", "alice", index=2, asynchronous=True)


def test_a_task_with_images_arrives_unchanged(input_picture: Image.Image, right_half_mask: Image.Image) -> None:
    task = make_task(kind="inpaint", image=input_picture, mask=right_half_mask, prompt="\u732b \U0001f600")
    arrived, ticket, follow = unpack_task(pickle.loads(pickle.dumps(pack_task(task, TICKET, follow=True))))
    assert arrived.image == input_picture
    assert arrived.mask == right_half_mask
    assert (ticket, follow) == (TICKET, True)
    assert pack_task(arrived, TICKET) == pack_task(task, TICKET)


def test_an_image_arrives_bit_for_bit_in_one_ascii_line() -> None:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (8, 16, 3), dtype=np.uint8))
    line = pack_outcome(GeneratedImage(image, True, "\u732b", ""))
    assert line.isascii()
    assert line.count("\n") == 1
    arrived = unpack_update(line)
    assert isinstance(arrived, GeneratedImage)
    assert arrived == GeneratedImage(image, True, "\u732b", "")


@pytest.mark.parametrize("error", [GenerationFailed("out of luck"), Cancelled("not wanted any more")], ids=["failed", "cancelled"])
def test_an_error_arrives_with_its_type_and_message(error: ServiceError) -> None:
    with pytest.raises(type(error), match=error.message):
        unpack_update(pack_outcome(error))
