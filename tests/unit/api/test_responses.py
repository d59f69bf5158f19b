"""Images and events as responses."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from pathlib import Path

import h11
import pytest
from PIL import Image
from starlette.types import Message

from stable_diffusion.api.responses import EventStream, as_headers, image_file
from stable_diffusion.core.limits import MAX_PROMPT_CHARACTERS
from stable_diffusion.core.types import GeneratedImage, ImageFormat
from stable_diffusion.images import infotext
from stable_diffusion.images.decode import read_description
from stable_diffusion.images.encode import MEDIA_TYPES
from stable_diffusion.models.folder import DEMO_FOLDER, check_model
from tests.tasks import make_task

MODEL = check_model(DEMO_FOLDER)


@pytest.mark.parametrize(
    ("flagged", "metadata", "is_told"), [(None, True, True), (False, True, True), (True, True, False), (False, False, False)]
)
def test_the_file_says_how_it_was_drawn_unless_it_is_blank_or_that_is_not_wanted(
    flagged: bool | None, metadata: bool, is_told: bool
) -> None:
    task, picture = make_task(metadata=metadata), GeneratedImage(Image.new("RGB", (64, 64)), flagged, "", "")
    text = read_description(image_file(task, picture, MODEL, "png"), "picture")
    assert text == (infotext.write(task, picture, MODEL) if is_told else None)


@pytest.mark.parametrize("image_format", MEDIA_TYPES)
@pytest.mark.parametrize("character", ["\U0001f534", '"', "ffi"])
def test_the_longest_prompts_fit_into_every_format(image_format: ImageFormat, character: str) -> None:
    """An EXIF block in a JPEG has at most 64 KB. A ligature, of which the cleaned prompt has three characters, is the worst."""
    prompt = character * MAX_PROMPT_CHARACTERS + "\n"
    task, picture = make_task(prompt=prompt, negative_prompt=prompt), GeneratedImage(Image.new("RGB", (64, 64)), None, "", "")
    text = read_description(image_file(task, picture, MODEL, image_format), "picture")
    assert text is not None
    read = infotext.read(text)
    assert (read.prompt, read.negative_prompt) == (prompt, prompt)


def test_a_text_that_is_cut_between_words_is_a_header_that_can_be_sent() -> None:
    for words in ("0 " * 1000, " 0" * 1000, " "):
        header = as_headers({"prompt_dropped": words})["prompt_dropped"]
        h11.Response(status_code=200, headers=[("prompt_dropped", header)])
        assert header == words[:1024].strip()


def test_events_are_closed_when_the_client_leaves_in_the_middle_of_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SD_SHARED_FOLDER", str(tmp_path))
    closed: list[str] = []

    async def events() -> AsyncGenerator[bytes, None]:
        try:
            yield b"event: one\n\n"
            yield b"event: two\n\n"
        finally:
            closed.append("events")

    async def leaves() -> Message:
        await asyncio.sleep(0.05)
        return {"type": "http.disconnect"}

    async def is_never_read(message: Message) -> None:
        if message["type"] == "http.response.body":
            await asyncio.sleep(60)

    async def respond() -> None:
        response = EventStream(events())
        await asyncio.wait_for(response({"type": "http", "asgi": {"spec_version": "2.3"}}, leaves, is_never_read), 5)
        assert closed == ["events"], "before the garbage collector comes"

    asyncio.run(respond())
