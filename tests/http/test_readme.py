"""The README's commands are the ones that work, and its tables say what the code says."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from stable_diffusion.core.requests import ImageToImageRequest
from stable_diffusion.core.schedulers import SCHEDULERS
from stable_diffusion.demo.shapes import judge
from tests.http.servers import ROOT, Server, environment, free_port, wait_until_ready

README = (ROOT / "README.md").read_text(encoding="utf-8")
CURL_COMMANDS = [
    line for block in re.findall(r"```\n(.*?)```", README, re.DOTALL) for line in block.splitlines() if line.startswith("curl ")
]


def test_there_is_a_curl_line_for_each_endpoint() -> None:
    paths = [re.findall(r":3000(/\w+)", command) for command in CURL_COMMANDS]
    assert paths == [["/txt2img"], ["/img2img"], ["/inpaint"], ["/txt2img"], ["/reproduce"], ["/txt2img"], ["/txt2img"]]


@pytest.mark.parametrize("command", CURL_COMMANDS[:3], ids=["txt2img", "img2img", "inpaint"])
def test_the_curl_lines_make_a_picture(
    server: Server, tmp_path: Path, input_picture: Image.Image, right_half_mask: Image.Image, command: str
) -> None:
    input_picture.save(tmp_path / "input.jpg")
    right_half_mask.save(tmp_path / "mask.png")
    here = command.replace("http://127.0.0.1:3000", server.url)
    assert here != command
    subprocess.run(["bash", "-c", f"{here} --silent --fail"], cwd=tmp_path, check=True, timeout=120)
    with Image.open(tmp_path / "output.jpg") as picture:
        assert picture.format == "JPEG"
        assert picture.size == (64, 64)


def test_the_curl_line_for_progress_tells_the_steps_and_gets_the_picture(server: Server) -> None:
    here = CURL_COMMANDS[3].replace("http://127.0.0.1:3000", server.url)
    told = subprocess.run(["bash", "-c", f"{here} --silent --fail"], capture_output=True, text=True, check=True, timeout=120).stdout
    assert told.startswith("event: progress\ndata: {")
    assert re.search(r'event: completed\ndata: {"media_type": "image/jpeg", "image": "', told)


def test_the_curl_line_for_a_picture_that_was_drawn_draws_it_again(server: Server, tmp_path: Path) -> None:
    for command in (CURL_COMMANDS[0], CURL_COMMANDS[4]):
        here = command.replace("http://127.0.0.1:3000", server.url).replace('background"}', 'background","num_inference_steps":2}')
        told = subprocess.run(
            ["bash", "-c", f"{here} --silent --fail"], cwd=tmp_path, capture_output=True, text=True, check=True, timeout=60
        ).stdout
    assert "differs: nothing" in told
    assert (tmp_path / "again.jpg").read_bytes() == (tmp_path / "output.jpg").read_bytes()


def test_the_curl_line_for_a_job_gets_its_address(server: Server) -> None:
    here = CURL_COMMANDS[5].replace("http://127.0.0.1:3000", server.url)
    told = subprocess.run(["bash", "-c", f"{here} --silent"], capture_output=True, text=True, check=True, timeout=60).stdout
    assert told.startswith("HTTP/1.1 202 Accepted")
    location = re.search(r"location: (/jobs/\w+)", told)
    assert location
    with server.client() as client:
        assert client.get(location[1]).json()["kind"] == "txt2img"
        client.delete(location[1])  # else the other precision's server would start beside a model that is drawing


def test_the_example_in_python_saves_a_picture(server: Server, tmp_path: Path) -> None:
    (example,) = re.findall(r"```\n(import httpx\n.*?)```", README, re.DOTALL)
    here = example.replace("http://127.0.0.1:3000", server.url)
    variables = environment(tmp_path, {"NO_PROXY": "127.0.0.1"})
    told = subprocess.run([sys.executable, "-c", here], cwd=tmp_path, env=variables, capture_output=True, text=True, check=True, timeout=60)
    assert told.stdout == "PNDMScheduler 50\n"
    with Image.open(tmp_path / "output.png") as picture:
        assert (picture.format, picture.size) == ("PNG", (64, 64))


def test_make_serve_starts_a_server_whose_printed_curl_line_makes_a_picture(tmp_path: Path) -> None:
    port = free_port()
    log = tmp_path / "serve.log"
    with log.open("w") as stream:
        process = subprocess.Popen(
            ["make", "serve", f"PORT={port}"], cwd=ROOT, env=environment(tmp_path), stdout=stream, stderr=stream, start_new_session=True
        )
    try:
        wait_until_ready(Server(f"http://127.0.0.1:{port}", log, process))
        printed = log.read_text().replace("\\\n", " ")
        (command,) = re.findall(r"^\s*(curl .*)$", printed, re.MULTILINE)
        subprocess.run(["bash", "-c", f"{command} --silent --fail"], cwd=tmp_path, check=True, timeout=60)
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(30)
    with Image.open(tmp_path / "output.jpg") as picture:
        verdict = judge(picture.convert("RGB"))
    assert (verdict.colour, verdict.background) == ("red", "blue")


def test_relative_links_lead_somewhere() -> None:
    links = [link or source for link, source in re.findall(r"\]\(([^)]+)\)|src=\"([^\"]+)\"", README) if not link.startswith("http")]
    assert links
    headings = {f"#{heading.lower().replace(' ', '-')}" for heading in re.findall(r"^##+ (.+)$", README, re.MULTILINE)}
    assert [link for link in links if link not in headings and not (ROOT / link).exists()] == []


def test_the_make_targets_that_the_readme_names_exist() -> None:
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = set(re.findall(r"(?:^|`)make (\w+)", README, re.MULTILINE))
    assert {"serve", "test", "model"} <= named <= targets


def test_ci_runs_the_readmes_test_command_and_brings_only_programs_whose_tests_would_be_skipped() -> None:
    lines = [line for line in (ROOT / ".ci" / "run").read_text().splitlines() if line and not line.startswith(("#", "set ", "cd "))]
    assert lines[-1] == "make test"
    installed = [line.partition("install ")[2] for line in lines if " install " in line]
    programs = "haproxy cloud-init chromium imagemagick libimage-exiftool-perl webp netpbm"
    assert installed == [f"--quiet=2 --no-install-recommends {programs} >/dev/null"]


def test_make_refuses_a_precision_that_does_not_exist() -> None:
    finished = subprocess.run(["make", "serve", "PRECISION=fp8"], cwd=ROOT, capture_output=True, text=True, timeout=30, check=False)
    assert finished.returncode == 2
    assert "PRECISION is fp32 or fp16, not fp8" in finished.stderr


def test_every_field_and_scheduler_is_in_the_readme() -> None:
    for field in ImageToImageRequest.model_fields:
        assert f"`{field}`" in README
    for short_names in SCHEDULERS.values():
        assert f"`{short_names[0]}`" in README


def test_every_package_is_in_the_architecture_page_and_every_file_that_it_names_is_there() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    packages = {folder.name for folder in (ROOT / "stable_diffusion").iterdir() if folder.is_dir() and folder.name != "__pycache__"}
    assert [name for name in sorted(packages) if f"`{name}/`" not in page] == []
    walk = page[page.index("## POST /txt2img") : page.index("## A deployment's life")]
    named = set(re.findall(r"`([a-z0-9_/]+\.py)`", walk))
    assert [name for name in sorted(named) if not ((ROOT / name).exists() or (ROOT / "stable_diffusion" / name).exists())] == []
    beside = {"web/disconnect.py", "web/upload_budget.py", "state/jobs.py", "state/metrics.py"}
    beside |= {f"core/{name}.py" for name in ("errors", "settings", "schedulers", "journal", "types")}
    assert len(named - beside) == 20, "as the page says"
    operator = [str(file.relative_to(ROOT)) for file in (ROOT / "bentoctl" / "aws-ec2").rglob("*.py") if file.name != "__init__.py"]
    assert [name for name in sorted(operator) if f"`{name}`" not in page] == []


def test_every_direct_dependency_is_pinned_exactly_and_locked() -> None:
    for name in ("requirements-runtime", "requirements", "requirements-tools", "bentoctl/aws-ec2/requirements"):
        direct = [line.strip() for line in (ROOT / f"{name}.txt").read_text().splitlines() if line.strip() and line[0] not in "#-"]
        locked = (ROOT / f"{'requirements' if name.startswith('bentoctl') else name}.lock").read_text().lower()
        for requirement in direct:
            pinned = re.sub(r"\[.*\]", "", requirement.partition(";")[0].strip())
            assert re.fullmatch(r"[\w.-]+==[\w.]+", pinned), requirement
            assert pinned.lower() in locked, requirement


def test_the_shared_package_is_linked_into_both_services() -> None:
    for precision in ("fp32", "fp16"):
        link = ROOT / precision / "stable_diffusion"
        assert link.is_symlink()
        assert link.readlink() == Path("../stable_diffusion")


def test_curl_is_installed() -> None:
    assert shutil.which("curl"), "the README's commands need curl"
