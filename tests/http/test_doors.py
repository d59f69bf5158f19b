"""Every door of both services draws the same picture from the same words and seed, in whatever form of HTTP a client sends them."""

from __future__ import annotations

import base64
import gzip
import http.client
import io
import json
import socket
import subprocess
import zlib
from collections.abc import Callable
from pathlib import Path
from urllib.parse import urlsplit

import openai
import pytest
from PIL import Image

from tests.http.asking import PROMPT, as_file, draw, picture_of, redraw
from tests.http.following import ask, ended, start
from tests.http.servers import Server

SEED, STEPS = 11, 6


def through_openai(server: Server) -> bytes:
    transport = openai.DefaultHttpxClient(trust_env=False)
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="unused", http_client=transport) as client:
        answer = client.images.generate(prompt=PROMPT, extra_body={"seed": SEED, "num_inference_steps": STEPS})
    assert answer.data is not None
    return base64.b64decode(answer.data[0].b64_json or "")


def through_a1111(server: Server) -> bytes:
    body = {"prompt": PROMPT, "seed": SEED, "steps": STEPS, "cfg_scale": 7.5}
    with server.client() as client:
        return base64.b64decode(client.post("/sdapi/v1/txt2img", json=body).json()["images"][0])


def through_a_job(server: Server) -> bytes:
    job = ended(server, start(server, seed=SEED, num_inference_steps=STEPS).headers["location"])
    return ask(server, job["picture"], accept="image/png").content


def through_its_own_file(server: Server) -> bytes:
    drawn = draw(server, seed=SEED, num_inference_steps=STEPS)
    with server.client() as client:
        return client.post("/reproduce", files={"picture": drawn.content}, headers={"Accept": "image/png"}).content


WISHES = json.dumps({"prompt": PROMPT, "seed": SEED, "num_inference_steps": STEPS}).encode()
JSON_TYPE = "Content-Type: application/json"


def curl(url: str, body: bytes, *options: str) -> bytes:
    """What curl gets for `body`, which it sends as it is."""
    command = [
        "curl",
        "--silent",
        "--show-error",
        "--fail",
        "--globoff",
        "--header",
        "Accept: image/png",
        "--data-binary",
        "@-",
        *options,
        url,
    ]
    return subprocess.run(command, input=body, capture_output=True, check=True, timeout=60).stdout


def through_gzip(server: Server) -> bytes:
    packed = subprocess.run(["gzip", "--stdout"], input=WISHES, capture_output=True, check=True).stdout
    return curl(f"{server.url}/txt2img", packed, "-H", JSON_TYPE, "-H", "Content-Encoding: gzip")


def through_gzip_in_chunks(server: Server) -> bytes:
    options = ("-H", JSON_TYPE, "-H", "Content-Encoding: x-gzip", "-H", "Transfer-Encoding: chunked")
    return curl(f"{server.url}/txt2img", gzip.compress(WISHES), *options)


def through_deflate(server: Server) -> bytes:
    return curl(f"{server.url}/txt2img", zlib.compress(WISHES), "-H", JSON_TYPE, "-H", "Content-Encoding: deflate")


def through_bare_deflate(server: Server) -> bytes:
    compressor = zlib.compressobj(wbits=-15)
    return through_httplib(server, "/txt2img", compressor.compress(WISHES) + compressor.flush(), {"Content-Encoding": "deflate"})


def through_httplib(server: Server, target: str, body: bytes, headers: dict[str, str]) -> bytes:
    address = urlsplit(server.url)
    connection = http.client.HTTPConnection(str(address.hostname), address.port, timeout=60)
    try:
        connection.request("POST", target, body, {"Accept": "image/png", "Content-Type": "application/json", **headers})
        return connection.getresponse().read()
    finally:
        connection.close()


def through_absolute_form(server: Server) -> bytes:
    return curl("http://any.example/txt2img", WISHES, "-H", JSON_TYPE, "--proxy", server.url)


def through_absolute_form_of_https(server: Server) -> bytes:
    return through_httplib(server, "https://any.example:443//txt2img/?x=http://y//", WISHES, {"Host": "another.example"})


def through_doubled_slashes(server: Server) -> bytes:
    return curl(f"{server.url}///txt2img", WISHES, "-H", JSON_TYPE)


def through_a_slash_at_the_end(server: Server) -> bytes:
    return curl(f"{server.url}/txt2img//", WISHES, "-H", JSON_TYPE)


def through_an_encoded_slash(server: Server) -> bytes:
    return through_httplib(server, "/%2ftxt2img", WISHES, {})


def through_a_byte_order_mark(server: Server) -> bytes:
    return curl(f"{server.url}/txt2img", b"\xef\xbb\xbf" + WISHES, "-H", JSON_TYPE)


def through_a_byte_order_mark_at_a1111(server: Server) -> bytes:
    body = json.dumps({"prompt": PROMPT, "seed": SEED, "steps": STEPS, "cfg_scale": 7.5}).encode("utf-8-sig")
    answer = curl(f"{server.url}//sdapi/v1/txt2img/", gzip.compress(body), "-H", JSON_TYPE, "-H", "Content-Encoding: gzip")
    return base64.b64decode(json.loads(answer)["images"][0])


def through_half_a_connection(server: Server) -> bytes:
    address = urlsplit(server.url)
    head = f"POST /txt2img HTTP/1.1\r\nHost: x\r\nAccept: image/png\r\n{JSON_TYPE}\r\nContent-Length: {len(WISHES)}\r\n\r\n"
    with socket.create_connection((str(address.hostname), int(address.port or 0)), timeout=60) as connection:
        connection.sendall(head.encode() + WISHES)
        connection.shutdown(socket.SHUT_WR)
        answer = b""
        while piece := connection.recv(2**16):
            answer += piece
    return answer[answer.index(b"\x89PNG") :]


def through_accept_without_jpeg(server: Server) -> bytes:
    command = ["-H", JSON_TYPE, "-H", "Accept: image/jpeg;q=0, */*"]
    content = curl(f"{server.url}/txt2img", WISHES, *command)
    assert content.startswith(b"\x89PNG")
    return content


IN_ANOTHER_FORM = [
    through_gzip,
    through_gzip_in_chunks,
    through_deflate,
    through_bare_deflate,
    through_absolute_form,
    through_absolute_form_of_https,
    through_doubled_slashes,
    through_a_slash_at_the_end,
    through_an_encoded_slash,
    through_a_byte_order_mark,
    through_a_byte_order_mark_at_a1111,
    through_half_a_connection,
    through_accept_without_jpeg,
]


@pytest.mark.parametrize("through", IN_ANOTHER_FORM)
def test_every_form_of_a_request_draws_the_same_picture(server: Server, through: Callable[[Server], bytes]) -> None:
    plain = picture_of(draw(server, seed=SEED, num_inference_steps=STEPS))
    assert Image.open(io.BytesIO(through(server))).convert("RGB").tobytes() == plain.tobytes()


FORM_TYPE = "Content-Type: multipart/form-data; boundary=X"


def a_form(picture: bytes, headers: str) -> bytes:
    wishes = b'--X\r\nContent-Disposition: form-data; name="data"\r\n\r\n' + WISHES
    return wishes + f"\r\n--X\r\nContent-Disposition: form-data; {headers}\r\n\r\n".encode() + picture + b"\r\n--X--\r\n"


@pytest.mark.parametrize(
    "headers",
    [
        'name="img"\r\nContent-Type: image/png',
        'name="img"\r\nContent-Type: application/octet-stream',
        "name=img; filename*=UTF-8''b%C3%A4r.png",
        'name="img"; filename="input.png"',
    ],
    ids=repr,
)
@pytest.mark.parametrize("preamble", [b"", b"\r\n", b"This is a multi-part message in MIME format.\r\n"], ids=repr)
@pytest.mark.parametrize("coding", ["identity", "gzip"])
def test_every_form_of_an_upload_draws_the_same_picture(
    server: Server, input_picture: Image.Image, headers: str, preamble: bytes, coding: str
) -> None:
    plain = picture_of(redraw(server, "/img2img", {"img": as_file(input_picture)}, seed=SEED, num_inference_steps=STEPS))
    form = preamble + a_form(as_file(input_picture), headers)
    body = gzip.compress(form) if coding == "gzip" else form
    drawn = curl(f"{server.url}/img2img", body, "-H", FORM_TYPE, "-H", f"Content-Encoding: {coding}")
    assert Image.open(io.BytesIO(drawn)).convert("RGB").tobytes() == plain.tobytes()


def test_curls_own_form_without_a_filename_is_an_upload(server: Server, input_picture: Image.Image, tmp_path: Path) -> None:
    """`<` has curl send a file's content as a field; the type says what it is."""
    file = tmp_path / "a.png"
    file.write_bytes(as_file(input_picture))
    command = ["curl", "-sS", "--fail", "-F", f"img=<{file};type=image/png", "-F", f"data={WISHES.decode()}", f"{server.url}/img2img"]
    drawn = subprocess.run(command, capture_output=True, check=True, timeout=60).stdout
    assert Image.open(io.BytesIO(drawn)).size == (64, 64)


def status_of(url: str, *options: str) -> str:
    command = ["curl", "-sS", "--globoff", "--path-as-is", "--output", "/dev/null", "--write-out", "%{http_code}", *options, url]
    return subprocess.run(command, capture_output=True, check=True, timeout=60, text=True).stdout


@pytest.mark.parametrize(
    "path", ["//sdapi/v1/options", "/sdapi/v1/options/", "//v1/models", "/v1/models/", "/v1//models", "//ui/", "/ui//", "//"]
)
def test_slashes_that_mean_nothing_are_answered(server: Server, path: str) -> None:
    assert status_of(f"{server.url}{path}") == "200"


def test_the_page_keeps_its_slash_and_its_files_have_none(server: Server) -> None:
    found = {
        path: status_of(f"{server.url}{path}") for path in ("/ui", "/ui/", "/ui/index.html", "/ui/../status", "/nothing/", "/./status")
    }
    assert found == {"/ui": "308", "/ui/": "200", "/ui/index.html": "404", "/ui/../status": "404", "/nothing/": "404", "/./status": "404"}


@pytest.mark.parametrize(
    ("path", "told"), [("/txt2img", "message"), ("/v1/images/generations", "message"), ("/sdapi/v1/txt2img", "detail")]
)
@pytest.mark.parametrize("coding", ["br", "zstd", "gzip, gzip"])
def test_a_coding_that_is_not_read_is_refused_in_the_doors_form(server: Server, path: str, told: str, coding: str) -> None:
    with server.client() as client:
        answer = client.post(path, content=b"x", headers={"Content-Type": "application/json", "Content-Encoding": coding})
    assert (answer.status_code, answer.headers["accept-encoding"]) == (415, "gzip, deflate")
    document = answer.json()
    message = document[told] if told in document else document["error"][told]
    assert message == f"Content-Encoding must be one of gzip, deflate, or be left out, got {coding}"


def test_metrics_have_no_series_for_another_spelling(server: Server) -> None:
    for path in ("//status", "/status/", "/jobs//x/", "//jobs/y", "/%2Fjobs/z"):
        status_of(f"{server.url}{path}")
    status_of("http://any.example/jobs/a", "--proxy", server.url)
    with server.client() as client:
        series = client.get("/metrics").text
    assert 'endpoint="/jobs/{job_id}"' in series
    assert not [line for line in series.splitlines() if 'endpoint="//' in line or 'endpoint="http' in line or "/jobs/x" in line]


@pytest.mark.parametrize("through", [through_openai, through_a1111, through_a_job, through_its_own_file])
def test_every_door_draws_the_same_picture(server: Server, through: Callable[[Server], bytes]) -> None:
    plain = picture_of(draw(server, seed=SEED, num_inference_steps=STEPS))
    assert Image.open(io.BytesIO(through(server))).convert("RGB").tobytes() == plain.tobytes()
