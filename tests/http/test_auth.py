"""A server with API keys, over HTTP: every route of it, every way to send a key, what belongs to a key, and pages in a browser."""

from __future__ import annotations

import base64
import hashlib
import http.client
import io
import socket
import subprocess
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import openai
import psutil
import pytest
import yaml
from PIL import Image
from playwright.sync_api import Browser, BrowserContext, Page, expect
from starlette.responses import PlainTextResponse

from tests.browser.chromium import CHROMIUM, chromium
from tests.http.log_lines import line_of
from tests.http.servers import BENTOML, PLAIN_HTTP, ROOT, Server, environment, serve

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of what BentoML is made of, while it is loaded
    from stable_diffusion.server.application import all_routes, make_pages
    from stable_diffusion.server.front_door import FrontDoor

from stable_diffusion.api.context import Context
from stable_diffusion.core.shutdown import Unfinished
from stable_diffusion.runner.client import RunnerClient
from stable_diffusion.server.access.policy import LIMITED_PATHS, Access
from stable_diffusion.state.sqlite_jobs import SqliteJobs

ALICE, BOB, CAROL = "correct-horse-battery-staple", "tr0ub4dor-and-three-more", "password-of-sixteen-or-more"
KEYS = f"alice:{ALICE},bob:sha256:{hashlib.sha256(BOB.encode()).hexdigest()}"
PER_MINUTE = 60
FRIEND = "https://friend.example"
PROMPT = "a red circle on a blue background"
PROBES = ("/livez", "/readyz", "/healthz")
OPEN = (*PROBES, "/metrics")
UI_MODULES = ("app", "connection", "events", "file", "form", "history", "input", "loras", "mask", "results", "service", "upload")
# Every route, and how a request with nothing in it is answered to who has a key.
TABLE = {
    **{("GET", path): 200 for path in (*OPEN, "/", "/docs.json", "/static_content/swagger-ui.css", "/static_content/swagger-ui-bundle.js")},
    **{("GET", path): 200 for path in ("/status", "/capabilities", "/v1/models", "/ui/", "/ui/style.css")},
    **{("GET", f"/ui/{name}.js"): 200 for name in UI_MODULES},
    ("GET", "/ui"): 308,
    **{("POST", path): 415 for path in LIMITED_PATHS},
    ("GET", "/jobs/{job_id}"): 404,
    ("DELETE", "/jobs/{job_id}"): 404,
    ("GET", "/jobs/{job_id}/events"): 404,
    ("GET", "/jobs/{job_id}/picture"): 404,
    **{("GET", f"/sdapi/v1/{name}"): 200 for name in ("options", "sd-models", "progress", "samplers", "schedulers", "upscalers")},
    **{("GET", f"/sdapi/v1/{name}"): 200 for name in ("latent-upscale-modes", "sd-vae", "loras", "prompt-styles", "embeddings", "scripts")},
    **{("GET", f"/sdapi/v1/{name}"): 200 for name in ("cmd-flags", "memory", "hypernetworks", "face-restorers", "realesrgan-models")},
    **{("GET", f"/sdapi/v1/{name}"): 200 for name in ("script-info", "extensions")},
    **{
        ("POST", f"/sdapi/v1/{name}"): status
        for name, status in (("skip", 200), ("refresh-loras", 200), ("refresh-checkpoints", 200), ("png-info", 415))
    },
    ("GET", "/v1/models/{model_id}"): 404,
    ("GET", "/internal/ping"): 200,
    ("POST", "/sdapi/v1/options"): 415,
    ("POST", "/sdapi/v1/interrupt"): 200,
}


def basic(user: str, password: str) -> str:
    return "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode()


def ways(key: str) -> list[dict[str, str]]:
    return [{"Authorization": f"Bearer {key}"}, {"Authorization": basic("anybody", key)}, {"X-API-Key": key}]


@pytest.fixture(scope="module")
def keyed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """With three keys, of which one is in a file, open metrics, a rate limit, CORS for one site and prompts in the log."""
    home = tmp_path_factory.mktemp("keyed")
    file = home / "keys"
    file.write_text(f"# in a file\ncarol:{CAROL}\n")
    file.chmod(0o600)
    configuration = yaml.safe_load((ROOT / "fp32" / "configuration.yaml").read_text())
    configuration["api_server"]["http"] = {
        "cors": {
            "enabled": True,
            "access_control_allow_origins": [FRIEND],
            "access_control_allow_methods": ["GET", "POST", "DELETE"],
            "access_control_allow_headers": ["Authorization", "Content-Type"],
        }
    }
    (home / "configuration.yaml").write_text(yaml.safe_dump(configuration))
    variables = {
        "SD_API_KEYS": KEYS,
        "SD_API_KEYS_FILE": str(file),
        "SD_OPEN": "metrics",
        "SD_RATE_LIMIT": str(PER_MINUTE),
        "SD_LOG_PROMPTS": "1",
    }
    with serve(ROOT / "fp32", "service:svc", home, {"BENTOML_CONFIG": str(home / "configuration.yaml"), **variables}) as server:
        yield server


def client(server: Server, key: str | None) -> httpx.Client:
    headers = {} if key is None else {"Authorization": f"Bearer {key}"}
    return httpx.Client(base_url=server.url, headers=headers, timeout=120, **PLAIN_HTTP)


def served_routes() -> set[tuple[str, str]]:
    client = RunnerClient(None, SqliteJobs(lambda: Path()), Unfinished(grace_s=60))
    context = Context(client, lambda: pytest.fail("not asked"), lambda: pytest.fail("not asked"))
    door = FrontDoor(PlainTextResponse(), all_routes(context), make_pages("test", context), Access)
    return {(method, path) for path, methods in door._methods.items() for method in methods if method != "HEAD"}


def test_the_table_has_every_route_that_is_served() -> None:
    assert served_routes() == set(TABLE)


def test_every_route_that_draws_is_limited() -> None:
    not_drawing = {f"/sdapi/v1/{name}" for name in ("options", "interrupt", "skip", "refresh-loras", "refresh-checkpoints", "png-info")}
    assert {path for method, path in TABLE if method == "POST"} - not_drawing == set(LIMITED_PATHS)


def test_every_route_needs_a_key_but_those_that_are_open(keyed: Server) -> None:
    wrong = "x" * len(ALICE)
    without = [{}, {"Authorization": ""}, {"X-API-Key": ""}, *ways(wrong), *ways(ALICE[:-1]), *ways(f"alice:{ALICE}")]
    with client(keyed, None) as anybody:
        for method, path in TABLE:
            for headers in without:
                answer = anybody.request(method, path, headers=headers)
                assert (answer.status_code == 401) is (path not in OPEN), (method, path, headers)
            if method == "GET":
                assert (anybody.head(path).status_code == 401) is (path not in OPEN), path


SPELLINGS = ("/{}", "{}/", "//{}//", "http://any.example{}", "http://any.example:80/{}/")


def test_no_spelling_of_a_path_goes_around_the_key(keyed: Server) -> None:
    """As httplib sends it, which does not tidy up."""
    address = urlsplit(keyed.url)
    connection = http.client.HTTPConnection(str(address.hostname), address.port, timeout=60)
    for method, path in TABLE:
        for spelling in SPELLINGS:
            connection.request(method, spelling.format(path))
            answer = connection.getresponse()
            answer.read()
            assert (answer.status == 401) is (path not in OPEN), (method, path, spelling)
    connection.close()


def test_every_route_takes_the_key_in_each_of_three_ways(keyed: Server) -> None:
    with client(keyed, None) as anybody:
        for headers in ways(ALICE):
            answered = {(method, path): anybody.request(method, path, headers=headers).status_code for method, path in TABLE}
            assert answered == TABLE


def test_the_key_of_a_digest_and_the_key_of_a_file_open_too(keyed: Server) -> None:
    for key in (BOB, CAROL):
        with client(keyed, key) as owner:
            assert owner.get("/status").status_code == 200


def test_the_challenge_and_the_error_have_the_form_of_each_door(keyed: Server) -> None:
    with client(keyed, None) as anybody:
        answers = {path: anybody.post(path) for path in ("/txt2img", "/v1/images/generations", "/sdapi/v1/txt2img")}
        for answer in answers.values():
            assert answer.status_code == 401
            assert answer.headers["www-authenticate"] == 'Basic realm="stable_diffusion", charset="UTF-8", Bearer realm="stable_diffusion"'
        plain, openais, a1111s = (answer.json() for answer in answers.values())
        wrong = anybody.post("/txt2img", headers={"X-API-Key": "wrong"}).json()
    assert plain["error"]["type"] == "unauthorized"
    assert plain["error"]["message"].startswith("an API key is needed: send it as Authorization: Bearer KEY")
    assert wrong["error"]["message"].startswith("the API key is not one of this server's")
    assert openais["error"]["code"] == "invalid_api_key"
    assert openais["error"]["type"] == "invalid_request_error"
    assert set(a1111s) == {"error", "detail", "body", "errors"}
    assert a1111s["error"] == "Unauthorized"


def test_who_has_no_key_is_refused_before_a_body_is_read(keyed: Server) -> None:
    host, port = urlsplit(keyed.url).hostname, urlsplit(keyed.url).port
    with socket.create_connection((host, port), timeout=10) as connection:
        connection.sendall(b"POST /img2img HTTP/1.1\r\nHost: server\r\nContent-Type: image/png\r\nContent-Length: 20000000\r\n\r\n")
        assert connection.recv(100).startswith(b"HTTP/1.1 401 ")


def test_openais_client_comes_in_with_the_key_and_hears_that_another_one_is_wrong(keyed: Server) -> None:
    def connect(key: str) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{keyed.url}/v1", api_key=key, http_client=openai.DefaultHttpxClient(trust_env=False))

    with connect(ALICE) as alice:
        answer = alice.images.generate(prompt=PROMPT, extra_body={"num_inference_steps": 2})
        assert answer.data is not None
        assert Image.open(io.BytesIO(base64.b64decode(answer.data[0].b64_json or ""))).size == (64, 64)
    with connect("sk-wrong") as stranger, pytest.raises(openai.AuthenticationError) as refused:
        stranger.images.generate(prompt=PROMPT)
    assert refused.value.code == "invalid_api_key"


def test_one_key_neither_sees_nor_follows_nor_cancels_what_belongs_to_another(keyed: Server) -> None:
    with client(keyed, ALICE) as alice, client(keyed, BOB) as bob:
        started = alice.post("/txt2img", json={"prompt": PROMPT, "num_inference_steps": 150}, headers={"Prefer": "respond-async"})
        job = started.headers["location"]
        deadline = time.monotonic() + 60
        while (state := alice.get(job).json()["state"]) != "running" and time.monotonic() < deadline:
            time.sleep(0.05)
        for path in (job, f"{job}/events", f"{job}/picture"):
            refused = bob.get(path)
            assert (refused.status_code, refused.json()["error"]["type"]) == (404, "unknown_job")
        assert bob.delete(job).json() == bob.delete("/jobs/0").json()
        assert bob.get("/sdapi/v1/progress").json()["progress"] == 0.0
        assert bob.post("/sdapi/v1/interrupt").status_code == 200
        assert alice.get(job).json()["state"] == "running", "it ended too soon to prove anything"
        while (state := alice.get(job).json()["state"]) in ("queued", "running") and time.monotonic() < deadline:
            time.sleep(0.1)
        assert state == "completed"


def test_a_key_is_the_same_caller_whichever_way_it_is_sent(keyed: Server) -> None:
    request = {"prompt": PROMPT, "num_inference_steps": 2, "seed": 5}
    with client(keyed, None) as anybody:
        again = [anybody.post("/txt2img", json=request, headers={**way, "Idempotency-Key": "same"}) for way in ways(ALICE)]
        bobs = anybody.post("/txt2img", json=request, headers={**ways(BOB)[0], "Idempotency-Key": "same"})
    jobs = {answer.headers["job-id"] for answer in again}
    assert len(jobs) == 1
    assert bobs.headers["job-id"] not in jobs


def test_pictures_are_limited_for_each_key_over_all_workers_and_the_answer_says_when_to_come_back(keyed: Server) -> None:
    with client(keyed, CAROL) as carol, ThreadPoolExecutor(8) as threads:
        began = time.monotonic()
        # Wrong requests, which cost nothing; new connections, which both workers take.
        answers = list(
            threads.map(lambda _: httpx.post(f"{keyed.url}/txt2img", headers=ways(CAROL)[0], **PLAIN_HTTP), range(PER_MINUTE + 10))
        )
        took = time.monotonic() - began
        counts = Counter(answer.status_code for answer in answers)
        assert set(counts) == {415, 429}
        assert PER_MINUTE <= counts[415] <= PER_MINUTE + took * PER_MINUTE / 60 + 1
        refused = {path: carol.post(path) for path in LIMITED_PATHS[:1] + LIMITED_PATHS[4:5] + LIMITED_PATHS[6:7]}
        assert {answer.headers.get("retry-after") for answer in refused.values() if answer.status_code == 429} == {"1"}
        codes = [answer.json()["error"] for answer in refused.values() if answer.status_code == 429]
        assert codes
        assert carol.get("/status").status_code == 200
        assert carol.post("/sdapi/v1/interrupt").status_code == 200
    with client(keyed, BOB) as bob:
        assert bob.post("/txt2img").status_code == 415


def test_a_page_of_an_allowed_site_may_send_its_key_and_read_the_answers(keyed: Server) -> None:
    asked = {"Origin": FRIEND, "Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization,content-type"}
    with client(keyed, None) as anybody:
        preflight = anybody.options("/txt2img", headers=asked)
        assert preflight.status_code == 200
        assert preflight.headers["access-control-allow-origin"] == FRIEND
        assert "Authorization" in preflight.headers["access-control-allow-headers"]
        assert anybody.options("/txt2img", headers={**asked, "Origin": "https://other.example"}).status_code == 400
        assert "# HELP" not in anybody.options("/metrics", headers=asked).text
        private = {**asked, "Access-Control-Request-Private-Network": "true"}
        allowed = anybody.options("/txt2img", headers=private)
        assert (allowed.status_code, allowed.headers["access-control-allow-private-network"]) == (200, "true")
        assert allowed.headers["access-control-allow-origin"] == FRIEND
        other = anybody.options("/txt2img", headers={**private, "Origin": "https://other.example"})
        assert (other.status_code, other.headers.get("access-control-allow-private-network")) == (400, None)
        from_page = {"Origin": FRIEND, "Sec-Fetch-Site": "cross-site"}
        request = {"prompt": PROMPT, "num_inference_steps": 2}
        drawn = anybody.post("/txt2img", json=request, headers={**from_page, **ways(ALICE)[0]})
        refused = anybody.post("/txt2img", json=request, headers=from_page)
        elsewhere = anybody.post("/txt2img", json=request, headers={**from_page, "Origin": "https://other.example", **ways(ALICE)[0]})
    assert (drawn.status_code, drawn.headers["access-control-allow-origin"]) == (200, FRIEND)
    assert (refused.status_code, refused.headers["access-control-allow-origin"]) == (401, FRIEND)
    assert (elsewhere.status_code, elsewhere.headers.get("access-control-allow-origin")) == (403, None)


def test_every_answer_says_that_its_type_is_not_to_be_guessed(keyed: Server) -> None:
    with client(keyed, ALICE) as alice:
        for method, path in TABLE:
            if path != "/jobs/{job_id}/events":
                assert alice.request(method, path).headers["x-content-type-options"] == "nosniff", path
        assert alice.get("/nowhere").headers["x-content-type-options"] == "nosniff"
        for page in ("/", "/ui/"):
            headers = alice.get(page).headers
            assert headers["referrer-policy"] == "no-referrer"
            policy = headers["content-security-policy"]
            assert "frame-ancestors 'none'" in policy
            assert "unsafe" not in policy


def test_only_the_first_process_knows_a_key_and_no_log_has_one(keyed: Server) -> None:
    workers = psutil.Process(keyed.process.pid).children(recursive=True)
    assert len(workers) >= 3
    for worker in workers:
        variables = worker.environ()
        assert not [name for name, value in variables.items() if any(key in value for key in (ALICE, BOB, CAROL))]
        if "SD_API_KEYS" in variables:
            assert variables["SD_API_KEYS"].count(":sha256:") == 3
            assert "SD_API_KEYS_FILE" not in variables
        assert not [key for key in (ALICE, BOB, CAROL) if key in " ".join(worker.cmdline())]
    assert "Keys: alice, bob, carol; open without a key: metrics" in keyed.log
    assert not [key for key in (ALICE, BOB, CAROL) if key in keyed.log]


def test_prompts_are_logged_where_that_is_switched_on_and_keys_by_their_names(keyed: Server) -> None:
    request = {"prompt": 'a "red"\ncircle', "num_inference_steps": 2}
    with client(keyed, None) as anybody:
        answer = anybody.post("/txt2img", json=request, headers=ways(BOB)[1])
    line = line_of(keyed, answer)
    assert (line["prompt"], line["negative_prompt"], line["key"]) == ('a "red"\ncircle', "", "bob")


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({"SD_API_KEYS": "alice:too-short-15-ch"}, "Not started: SD_API_KEYS, entry 1 (alice): a key must have at least 16 characters"),
        ({"SD_API_KEYS": ALICE, "SD_OPEN": "everything"}, "Not started: SD_OPEN: 'everything' cannot be opened, only docs and metrics"),
    ],
)
def test_a_server_whose_settings_are_wrong_does_not_start_and_says_why(tmp_path: Path, variables: dict[str, str], words: str) -> None:
    finished = subprocess.run(
        [str(BENTOML), "serve", "service:svc", "--production", "--host", "127.0.0.1", "--port", "0"],
        cwd=ROOT / "fp32",
        env=environment(tmp_path, {"BENTOML_CONFIG": "configuration.yaml", **variables}),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert finished.returncode == 1
    assert words in finished.stderr
    assert "too-short" not in finished.stderr + finished.stdout
    assert "Traceback" not in finished.stderr


def test_at_a_loopback_address_a_server_without_keys_starts_quietly(server: Server) -> None:
    assert "API KEY" not in server.log.upper()


# --- in a browser -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    if CHROMIUM is None:
        pytest.skip("chromium is not installed")
    with chromium() as started:
        yield started


@pytest.fixture
def visitor(browser: Browser) -> Iterator[BrowserContext]:
    """Who has typed a key where the browser asked for a password."""
    context = browser.new_context(http_credentials={"username": "anybody", "password": BOB})
    context.set_default_timeout(20_000)
    yield context
    context.close()


def opened(visitor: BrowserContext, url: str) -> tuple[Page, list[str]]:
    page = visitor.new_page()
    complaints: list[str] = []
    page.on("console", lambda message: complaints.append(message.text) if message.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.goto(url)
    return page, complaints


def test_the_page_draws_for_who_has_typed_a_key(keyed: Server, visitor: BrowserContext) -> None:
    page, complaints = opened(visitor, f"{keyed.url}/ui")
    expect(page.locator("#draw")).to_be_enabled()
    page.locator("#prompt").fill(PROMPT)
    page.locator("#num_inference_steps").fill("4")
    page.locator("#draw").click()
    expect(page.locator("#cards figcaption")).to_have_count(1, timeout=60_000)
    assert [text for text in complaints if "401" not in text] == []


def test_swagger_sends_requests_for_who_has_typed_a_key_and_shows_the_picture(keyed: Server, visitor: BrowserContext) -> None:
    page, complaints = opened(visitor, f"{keyed.url}/")
    operation = page.locator("#operations-images-txt2img")
    operation.locator(".opblock-summary-control").click()
    body = operation.locator("textarea.body-param__text")
    body.fill('{"prompt": "a red circle on a blue background", "num_inference_steps": 4}')
    operation.get_by_role("button", name="Execute").click()
    picture = operation.locator(".responses-table.live-responses-table img")
    expect(picture).to_be_visible(timeout=60_000)
    assert picture.evaluate("async (image) => { await image.decode(); return image.naturalWidth; }") == 64
    assert [text for text in complaints if "401" not in text] == []


def test_who_types_a_wrong_key_sees_no_page(keyed: Server, browser: Browser) -> None:
    context = browser.new_context(http_credentials={"username": "alice", "password": "wrong"})
    page = context.new_page()
    answer = page.goto(f"{keyed.url}/ui/")
    assert answer is not None
    assert answer.status == 401
    context.close()
