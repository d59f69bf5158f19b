"""fp16/ is the same service: without a GPU it computes in float32, so its images are those of fp32/."""

from __future__ import annotations

import pytest
from PIL import Image

from tests.http.asking import as_file, draw, picture_of, redraw
from tests.http.servers import Server


def test_fp16_is_served_and_says_what_it_computes_in(fp16_server: Server) -> None:
    with fp16_server.client() as client:
        (runner,) = client.get("/status").json()["runners"]
        assert client.get("/docs.json").json()["info"]["title"] == "stable_diffusion_fp16"
    assert (runner["precision"], runner["dtype"]) == ("fp16", "float32")


def test_fp16_generates_the_image_of_fp32_from_text(server: Server, fp16_server: Server) -> None:
    ours, theirs = (picture_of(draw(one, seed=5, num_inference_steps=6)) for one in (fp16_server, server))
    assert ours.tobytes() == theirs.tobytes()


@pytest.mark.parametrize("kind", ["img2img", "inpaint"])
def test_fp16_generates_the_image_of_fp32_from_an_image(
    server: Server, fp16_server: Server, input_picture: Image.Image, right_half_mask: Image.Image, kind: str
) -> None:
    files = {"img": as_file(input_picture)} | ({"mask": as_file(right_half_mask)} if kind == "inpaint" else {})
    ours, theirs = (picture_of(redraw(one, f"/{kind}", files, seed=5, num_inference_steps=6)) for one in (fp16_server, server))
    assert ours.tobytes() == theirs.tobytes()
