"""The container images of both bentos: built, run as documented, stopped during a generation, and rebuilt.

Slow, and needs what most machines lack: a Docker daemon, buildx and the base image. Run by `make image-test`.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import re
import shutil
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
from PIL import Image

from stable_diffusion.demo.shapes import judge
from tests.deployment.commands import bentoctl
from tests.http.servers import ROOT, build_bento, free_port, only_code, wait_until_drawing

BUILD_TIMEOUT_S = 3600  # the first build on a machine downloads gigabytes
READY_TIMEOUT_S = 300
GRACE_S = 900  # for `docker stop`, whose default is 10
DRAIN_S = 40  # how long the last image should take: longer than any usual grace period
REBUILD_S = 60
LAYER_OF_CODE_BYTES = 2_000_000
WEIGHTS_BYTES = 300_000_000
# The options of the machine on AWS (bentoctl/aws-ec2, machine.sh).
SERVE = ("serve", "--timeout-keep-alive", "3660")
OPTIONS = ("--stop-timeout", str(GRACE_S), "--cap-drop", "ALL", "--security-opt", "no-new-privileges", "--pids-limit", "4096")
CACHE = "/home/bentoml/.cache"
KEY = "correct-horse-battery-staple"
DIGEST = hashlib.sha256(KEY.encode()).hexdigest()

pytestmark = [pytest.mark.image, pytest.mark.timeout(BUILD_TIMEOUT_S)]


@dataclass(frozen=True)
class Built:
    precision: str
    home: Path  # of BentoML
    bento: Path
    image: str


@dataclass(frozen=True)
class Container:
    id: str
    port: int

    def client(self) -> httpx.Client:
        return httpx.Client(base_url=f"http://127.0.0.1:{self.port}", timeout=GRACE_S, trust_env=False)

    def state(self, field: str) -> str:
        return docker("inspect", "--format", f"{{{{.State.{field}}}}}", self.id)

    def log(self) -> str:
        finished = subprocess.run(
            ["docker", "logs", self.id], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace", check=True
        )
        return finished.stdout


def docker(*arguments: str, timeout: float = 120) -> str:
    finished = subprocess.run(["docker", *arguments], capture_output=True, text=True, timeout=timeout, check=False)
    assert finished.returncode == 0, f"docker {' '.join(arguments)}: {finished.stderr[-4000:]}"
    return finished.stdout.strip()


def build_image(home: Path, bento: Path) -> str:
    """`bentoctl build --dry-run` of a bento. Returns the image's name."""
    name = f"{bento.parent.name}:{bento.name}"
    built = bentoctl(home, ROOT / "bentoctl", "build", "-b", name, "--dry-run", timeout_s=BUILD_TIMEOUT_S)
    assert built.returncode == 0, built.stderr[-4000:]
    image = f"aws-ec2-{name}"
    assert f"Created docker image: {image}" in built.stdout
    return image


def layers(image: str) -> list[str]:
    """The digests of the layers, lowest first."""
    digests: list[str] = json.loads(docker("inspect", "--format", "{{json .RootFS.Layers}}", image))
    return digests


def layer_sizes(image: str) -> list[int]:
    """The sizes in bytes of the layers, lowest first, without empty ones."""
    sizes = docker("history", "--human=false", "--format", "{{.Size}}", image).split()
    return [int(size) for size in reversed(sizes) if size != "0"]


@contextmanager
def container(image: str, *options: str) -> Iterator[Container]:
    """Run the image with the demo model and further options of `docker run` on a free port until the block ends."""
    port = free_port()
    published = ("--publish", f"127.0.0.1:{port}:3000")
    options = options if "--env-file" in options else ("--env", "SD_WITHOUT_KEYS=1", *options)
    started = Container(docker("run", "--detach", "--env", "SD_MODEL=demo", *published, *OPTIONS, *options, image, *SERVE), port)
    try:
        wait_until_ready(started)
        yield started
    finally:
        docker("rm", "--force", "--volumes", started.id)


def wait_until_ready(started: Container) -> None:
    deadline = time.monotonic() + READY_TIMEOUT_S
    with started.client() as client:
        while time.monotonic() < deadline:
            assert started.state("Running") == "true", started.log()
            try:
                if client.get("/readyz", timeout=10).status_code == 200:
                    return
            except httpx.TransportError:
                pass  # not listening yet
            time.sleep(0.3)
    raise AssertionError(f"not ready after {READY_TIMEOUT_S} s:\n{started.log()}")


def wait_until_unready(started: Container) -> None:
    deadline = time.monotonic() + 60
    with started.client() as client:
        while client.get("/readyz", timeout=10).status_code == 200:
            assert time.monotonic() < deadline, started.log()
            time.sleep(0.1)


def refusal(image: str, *options: str) -> str:
    """The output of a container that fails to start."""
    command = ["docker", "run", "--rm", *OPTIONS, *options, image, *SERVE]
    finished = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert finished.returncode == 1, finished.stderr
    assert "Traceback" not in finished.stderr + finished.stdout
    return finished.stderr


def generate(client: httpx.Client, **fields: object) -> httpx.Response:
    return client.post("/txt2img", json={"prompt": "a large green square on a white background", "seed": 1, **fields})


def assert_generates_the_prompt(started: Container) -> None:
    with started.client() as client:
        response = generate(client)
    assert response.status_code == 200, response.text
    assert response.headers["model"] == "demo"
    verdict = judge(Image.open(io.BytesIO(response.content)).convert("RGB"))
    assert (verdict.colour, verdict.background) == ("green", "white")


@pytest.fixture(scope="session")
def docker_works() -> None:
    """What the tests need of the machine, or one sentence that says what is missing."""
    needs = {
        "the docker command": ["docker", "--version"],
        "a Docker daemon that this user may use": ["docker", "version"],
        "docker's buildx plugin": ["docker", "buildx", "version"],
    }
    for need, command in needs.items():
        if shutil.which("docker") is None or subprocess.run(command, capture_output=True, timeout=60, check=False).returncode:
            pytest.fail(f"The image tests need {need}: `{' '.join(command)}` fails.", pytrace=False)


def require_base_image(bento: Path) -> None:
    found = re.search(r"^FROM (\S+)", (bento / "env" / "docker" / "Dockerfile").read_text(), re.MULTILINE)
    assert found
    for command in (["docker", "image", "inspect", found[1]], ["docker", "pull", "--quiet", found[1]]):
        if subprocess.run(command, capture_output=True, timeout=600, check=False).returncode == 0:
            return
    pytest.fail(
        f"The image tests need the base image {found[1]}: it is not on this machine and `docker pull {found[1]}` fails.", pytrace=False
    )


@pytest.fixture(scope="module", params=["fp32", "fp16"])
def built(request: pytest.FixtureRequest, docker_works: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Built]:
    precision = request.param
    home = tmp_path_factory.mktemp(f"image-{precision}")
    bento = build_bento(ROOT / precision, home)
    require_base_image(bento)
    installed = bentoctl(home, ROOT / "bentoctl", "operator", "install", "./aws-ec2")
    assert installed.returncode == 0, installed.stderr
    image = build_image(home, bento)
    yield Built(precision, home, bento, image)
    docker("image", "rm", image)


@pytest.fixture(scope="module")
def running(built: Built) -> Iterator[Container]:
    with container(built.image) as started:
        yield started


def test_the_container_generates_what_the_prompt_says(running: Container) -> None:
    assert_generates_the_prompt(running)


def test_docker_reports_the_container_as_healthy(running: Container) -> None:
    deadline = time.monotonic() + 60
    while (health := running.state("Health.Status")) == "starting" and time.monotonic() < deadline:
        time.sleep(0.3)
    assert health == "healthy", docker("inspect", "--format", "{{json .State.Health}}", running.id)


def test_nothing_runs_as_root_or_under_a_shell(running: Container) -> None:
    processes = [line.split(None, 2) for line in docker("top", running.id, "-eo", "uid,pid,args").splitlines()[1:]]
    assert len(processes) >= 4  # BentoML's arbiter, two API workers, the runner
    assert {uid for uid, _, _ in processes} == {"1034"}
    first = docker("inspect", "--format", "{{.State.Pid}}", running.id)
    command = next(arguments for _, pid, arguments in processes if pid == first)
    assert "bentoml serve" in command
    assert "entrypoint.sh" not in command


def test_the_servers_user_can_write_only_to_the_cache(running: Container) -> None:
    find = ("find", "/home/bentoml", "/app", "-writable", "-not", "-path", f"{CACHE}*")
    assert docker("exec", running.id, *find) == ""
    assert docker("exec", running.id, "stat", "--format", "%U", f"{CACHE}/stable_diffusion_bentoml") == "bentoml"


def test_a_start_prints_no_deprecation_warning(running: Container) -> None:
    log = running.log()
    assert "Loaded demo" in log
    assert "pkg_resources" not in log


def test_without_weights_it_exits_with_a_clear_message(built: Built) -> None:
    assert "Not started: this bento holds no weights" in refusal(built.image)


def test_it_generates_with_a_read_only_root_file_system(built: Built) -> None:
    with container(built.image, "--read-only", "--tmpfs", "/tmp") as started:
        assert_generates_the_prompt(started)
        assert "Traceback" not in started.log()


def test_without_a_temporary_folder_it_exits_and_names_the_missing_option(built: Built) -> None:
    told = refusal(built.image, "--read-only")
    assert told == "Not started: /tmp cannot be written to. With 'docker run --read-only' add '--tmpfs /tmp'.\n"


def test_a_volume_keeps_the_measured_batch_limit(built: Built) -> None:
    volume = docker("volume", "create")
    try:
        for known in (False, True):
            with container(built.image, "--volume", f"{volume}:{CACHE}") as started:
                assert (f"known from {CACHE}/stable_diffusion_bentoml/" in started.log()) is known
                assert "cannot be stored" not in started.log()
    finally:
        docker("volume", "rm", volume)


def test_the_keys_of_an_env_file_are_used(built: Built, tmp_path: Path) -> None:
    file = tmp_path / "keys.env"
    file.write_text(f"SD_API_KEYS=alice:sha256:{DIGEST}\n")
    with container(built.image, "--env-file", str(file)) as started, started.client() as client:
        assert generate(client).status_code == 401
        client.headers["X-API-Key"] = KEY
        assert generate(client).status_code == 200


@pytest.mark.parametrize(
    ("line", "told"),
    [
        (f'SD_API_KEYS="alice:sha256:{DIGEST}"', "SD_API_KEYS: the value is in quotes. Leave them out"),
        (f"alice:sha256:{DIGEST}", "In an env file the line is SD_API_KEYS=alice:sha256:..."),
        (f"alice:{KEY}==", "a variable whose name begins with 'alice:'"),
    ],
)
def test_an_invalid_line_of_an_env_file_is_reported(built: Built, tmp_path: Path, line: str, told: str) -> None:
    file = tmp_path / "keys.env"
    file.write_text(line + "\n")
    assert told in refusal(built.image, "--env", "SD_MODEL=demo", "--env-file", str(file))


def test_a_container_stopped_during_a_generation_finishes_only_that(built: Built, capsys: pytest.CaptureFixture[str]) -> None:
    with container(built.image) as started, started.client() as client, ThreadPoolExecutor() as threads:
        begun = time.monotonic()
        generate(client, height=512, width=512, num_inference_steps=5).raise_for_status()
        steps = min(150, math.ceil(5 * DRAIN_S / (time.monotonic() - begun)) + 5)
        last = threads.submit(generate, client, height=512, width=512, num_inference_steps=steps)
        with started.client() as watching:
            wait_until_drawing(watching, poll_s=0.1)
        time.sleep(1)  # the request reaches the runner within milliseconds

        begun = time.monotonic()
        stopped = threads.submit(docker, "stop", started.id, timeout=GRACE_S + 60)
        time.sleep(1)
        with started.client() as late:
            refused = generate(late)
            assert (refused.status_code, refused.json()["error"]["type"]) == (503, "shutting_down")
            assert refused.elapsed.total_seconds() < 5
            assert late.get("/readyz").status_code == 503
            assert late.get("/livez").status_code == 200
        assert not last.done()

        image = last.result(GRACE_S)
        assert image.status_code == 200, image.text
        assert Image.open(io.BytesIO(image.content)).size == (512, 512)
        stopped.result(GRACE_S)
        took = time.monotonic() - begun
        with capsys.disabled():
            print(f"\n{built.precision}: {steps} steps at 512x512; stopped after {took:.1f} s")
        assert (started.state("Running"), started.state("ExitCode")) == ("false", "0")
        assert took > 10, "the image must take longer than docker's default grace period of 10 s"

        docker("start", started.id)
        wait_until_ready(started)
        assert_generates_the_prompt(started)


def test_a_dead_model_process_restarts_inside_the_container(built: Built, capsys: pytest.CaptureFixture[str]) -> None:
    with container(built.image) as started, started.client() as client:
        since = started.state("StartedAt")
        kill = "import psutil; [p.kill() for p in psutil.process_iter() if 'bentoml_cli.worker.runner' in p.cmdline()]"
        docker("exec", started.id, "python", "-c", kill)
        begun = time.monotonic()
        wait_until_unready(started)
        refused = generate(client)
        assert refused.status_code == 503
        assert refused.json()["error"]["type"] in ("model_loading", "model_unavailable")
        wait_until_ready(started)
        with capsys.disabled():
            print(f"\n{built.precision}: ready {time.monotonic() - begun:.1f} s after the model process was killed")
        assert_generates_the_prompt(started)
        assert (started.state("Running"), started.state("StartedAt")) == ("true", since)


def test_a_code_change_pushes_one_small_layer(built: Built, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / built.precision
    shutil.copytree(ROOT / built.precision, folder, ignore=only_code)
    for name in ("requirements-runtime.lock", "Dockerfile.template"):
        shutil.copy(ROOT / name, tmp_path)
    weights = folder / "models" / {"fp32": "v1_4", "fp16": "v1_4_fp16"}[built.precision] / "unet" / "weights.safetensors"
    weights.parent.mkdir(parents=True)
    with weights.open("wb") as file:
        file.truncate(WEIGHTS_BYTES)
    images = []
    try:
        images.append(build_image(built.home, build_bento(folder, built.home)))
        with (folder / "service.py").open("a") as service:
            service.write("\n# A change.\n")
        begun = time.monotonic()
        bento = build_bento(folder, built.home)
        packed = time.monotonic()
        images.append(build_image(built.home, bento))
        took = time.monotonic() - packed
        before, after = layers(images[0]), layers(images[1])
        sizes = layer_sizes(images[1])
        with capsys.disabled():
            print(f"\n{built.precision}: bento {packed - begun:.1f} s, image {took:.1f} s; layers {sizes}")
        assert took < REBUILD_S
        assert before[:-1] == after[:-1]
        assert before[-1] != after[-1]
        assert sizes[-1] < LAYER_OF_CODE_BYTES
        assert WEIGHTS_BYTES in sizes
        inside = f"/home/bentoml/bento/src/{weights.relative_to(folder)}"
        assert (
            docker("run", "--rm", "--entrypoint", "stat", images[1], "--format", "%s %U %A", inside) == f"{WEIGHTS_BYTES} root -rwxr-xr-x"
        )
    finally:
        for image in images:
            docker("image", "rm", image)
