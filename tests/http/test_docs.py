"""The pages' examples work when they are pasted, and their links and commands lead somewhere."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from PIL import Image

from stable_diffusion.demo.shapes import COLOURS_WITH_PINK, is_hollow, judge
from tests.http.servers import Server, environment
from tests.pages import EXAMPLE_URL, EXAMPLES, PAGES, ROOT, Example, anchors_of, examples_of, make_targets_in

AWS = "needs an AWS account and Docker; tests/deployment runs bentoctl's commands against stand-ins"
BENTO = "tests/slow/test_bento.py builds, exports, imports and serves bentos"
DOCKER = "needs Docker; make image-test builds and runs the images"
DOWNLOAD = "downloads gigabytes; tests/unit/models/test_download.py has a stand-in for the hub"
GPU = "needs a GPU"
ITSELF = "runs these tests"
LONG = "takes from twenty minutes to hours"
STARTS = "starts a server; test_readme.py runs `make serve`"
# Examples that are not run here, by page and first line, and why.


def _in_containers() -> list[tuple[str, str]]:
    """All examples of docs/container.md: tests/image builds and runs images, where there is Docker."""
    return [(example.page, example.first_line) for example in EXAMPLES if example.page == "docs/container.md"]


NOT_RUN = {
    ("README.md", "make serve"): STARTS,
    ("README.md", "make model                     # Stable Diffusion v1.4 into fp32/models/v1_4, about 5.4 GB"): DOWNLOAD,
    ("README.md", "SD_MODEL=/path/to/model.safetensors make serve"): STARTS,
    ("README.md", "source .venv/bin/activate && export BENTOML_DO_NOT_TRACK=True"): AWS,
    ("README.md", "make quick                     # lint, types, import rules and unit tests: about two minutes"): ITSELF,
    ("CONTRIBUTING.md", "make serve"): STARTS,
    ("CONTRIBUTING.md", "make quick"): ITSELF,
    ("bentoctl/README.md", "source .venv/bin/activate && export BENTOML_DO_NOT_TRACK=True"): AWS,
    ("bentoctl/README.md", "bentoctl destroy -f deployment_config_fp16.yaml"): AWS,
    ("bentoctl/README.md", "mkdir tokyo && cd tokyo"): AWS,
    ("docs/configuration.md", "(umask 077 && echo 'alice:sha256:HEX' > keys)"): STARTS,
    ("docs/configuration.md", "SD_MODEL=/path/to/folder make serve"): STARTS,
    ("docs/configuration.md", "make model MODEL=sdxl PRECISION=fp16"): DOWNLOAD,
    ("docs/deploy.md", "source .venv/bin/activate"): BENTO,
    ("docs/deploy.md", "cd fp32                                          # or fp16"): BENTO,
    ("docs/deploy.md", "bentoml export stable_diffusion_fp32:latest stable_diffusion_fp32.bento"): BENTO,
    **dict.fromkeys(_in_containers(), DOCKER),
    ("docs/deploy.md", "source .venv/bin/activate && export BENTOML_DO_NOT_TRACK=True"): AWS,
    ("docs/scale.md", ".venv/bin/python -m benchmarks.store"): "measures for a minute",
    ("docs/fleet.md", "make fleet N=2"): "starts servers; tests/slow/test_fleet.py runs it",
    ("docs/measurements.md", "make bench                     # about 40 minutes; benchmarks/results/table.md"): LONG,
    ("docs/operations.md", """jq -R 'fromjson? | select(.outcome == "failed")' < server.log"""): "needs jq and a log",
    ("docs/performance.md", "make bench                     # about 40 minutes"): LONG,
    ("stable_diffusion/demo/README.md", "make demo"): LONG,
    ("stable_diffusion/demo/README.md", "make demo-adapters"): LONG,
    ("stable_diffusion/demo/README.md", "SD_MODEL=demo-xl make serve"): STARTS,
    (
        "docs/performance.md",
        "benchmarks/gpu_wheels.sh wheels          # run here if the GPU machine has torch but no network; fetches 25 MB of wheels",
    ): GPU,
}
RUN = [example for example in EXAMPLES if example.language in ("bash", "python") and (example.page, example.first_line) not in NOT_RUN]
# The pages in docs/ have many examples with the default of 50 steps. Here they take fewer; those of README run as they stand.
FULL, SHORT = """background"}'""", """background","num_inference_steps":4}'"""
# Any request that an example makes must succeed.
CURL = 'set -euo pipefail; curl() { command curl --silent --show-error --fail-with-body "$@"; }\n'


def run(example: Example, server: Server, folder: Path) -> str:
    """Run an example as it stands, in `folder`, but against `server`. Returns what it prints."""
    here = example.text.replace(EXAMPLE_URL, server.url)
    if example.page.startswith("docs/") and example.page != "docs/jobs.md":  # whose examples follow a job while it runs
        here = here.replace(FULL, SHORT)
    command = ["bash", "-c", CURL + here] if example.language == "bash" else [sys.executable, "-c", here]
    variables = environment(folder, {"NO_PROXY": "127.0.0.1"})
    finished = subprocess.run(command, cwd=folder, env=variables, capture_output=True, text=True, timeout=120, check=False)
    assert finished.returncode == 0, f"{example}\n{finished.stdout}\n{finished.stderr}"
    return finished.stdout


@pytest.fixture
def project_folder(tmp_path: Path) -> Path:
    """A folder with what examples use of the project's."""
    (tmp_path / ".venv").symlink_to(sys.prefix)
    (tmp_path / "stable_diffusion").symlink_to(ROOT / "stable_diffusion")
    (tmp_path / "benchmarks").symlink_to(ROOT / "benchmarks")
    return tmp_path


@pytest.mark.parametrize("page", dict.fromkeys(example.page for example in RUN))
def test_the_examples_of_a_page_work(server: Server, project_folder: Path, page: str) -> None:
    printed = [run(example, server, project_folder) for example in RUN if example.page == page]
    images = {file.name: file for pattern in ("*.jpg", "*.png") for file in project_folder.glob(pattern)}
    for name, file in images.items():
        with Image.open(file) as picture:
            assert picture.format == ("JPEG" if name.endswith(".jpg") else "PNG")
            assert picture.size == (64, 64)
    saved = {name for example in RUN if example.page == page for name in re.findall(r"--output (\w+\.(?:jpg|png))", example.text)}
    assert saved <= set(images)
    if page in EXPECTED:
        EXPECTED[page](printed, project_folder, server)
    _cancel_what_is_left(server, printed)


def of_readme(printed: list[str], folder: Path, server: Server) -> None:
    with Image.open(folder / "output.jpg") as plain, Image.open(folder / "hollow.jpg") as hollow:
        assert (is_hollow(plain), is_hollow(hollow)) == (False, True)


def of_prompts(printed: list[str], folder: Path, server: Server) -> None:
    with Image.open(folder / "hollow.jpg") as image:
        assert is_hollow(image)
        seen = judge(image, COLOURS_WITH_PINK)
    assert (seen.colour, seen.background) == ("black", "pink")


def of_api(printed: list[str], folder: Path, server: Server) -> None:
    commands, python, progress = printed
    assert commands == ""
    assert python == "PNDMScheduler 50\n"
    assert progress.startswith("event: progress\ndata: {")
    assert re.search(r'event: completed\ndata: {"media_type": "image/jpeg", "image": "', progress)
    assert (folder / "output.png").exists()


def of_jobs(printed: list[str], folder: Path, server: Server) -> None:
    accepted, followed, cancelled, continued, _ = printed
    assert accepted.startswith("HTTP/1.1 202 Accepted")
    location = re.search(r"location: (/jobs/\w+)", accepted)
    assert location
    with server.client() as client:
        assert client.get(location[1]).json()["kind"] == "txt2img"
    assert "event: progress" in followed
    assert "event: completed" in followed
    assert json.loads(cancelled)["state"] in ("cancelled", "running")
    read = re.findall("(?m)^id: (.*)$", (folder / "events.txt").read_text())
    assert read
    assert not set(read) & set(re.findall("(?m)^id: (.*)$", continued))
    assert "event: completed" in continued


def of_reproduce(printed: list[str], folder: Path, server: Server) -> None:
    assert "differs: nothing" in printed[0]
    assert (folder / "again.jpg").read_bytes() == (folder / "output.jpg").read_bytes()
    assert json.loads(printed[1])["kind"] == "txt2img"


def of_openai(printed: list[str], folder: Path, server: Server) -> None:
    assert sorted(file.name for file in folder.glob("*.png")) == ["1.png", "2.png"]
    assert len(json.loads(printed[1])["data"]) == 1


def of_a1111(printed: list[str], folder: Path, server: Server) -> None:
    assert json.loads(printed[1].partition("\n")[0].removesuffix("{}"))["current_image"] is None


def of_configuration(printed: list[str], folder: Path, server: Server) -> None:
    assert re.search(r"^  alice:sha256:[0-9a-f]{64}$", printed[0], re.MULTILINE)


def of_decisions(printed: list[str], folder: Path, server: Server) -> None:
    assert printed == ["1.4.19\n"]


EXPECTED = {
    "README.md": of_readme,
    "docs/prompts.md": of_prompts,
    "docs/api.md": of_api,
    "docs/jobs.md": of_jobs,
    "docs/reproduce.md": of_reproduce,
    "docs/openai.md": of_openai,
    "docs/a1111.md": of_a1111,
    "docs/configuration.md": of_configuration,
    "docs/decisions.md": of_decisions,
}


def _cancel_what_is_left(server: Server, printed: list[str]) -> None:
    """Else a server of another test would start beside a model that is generating."""
    jobs = {job for text in printed for job in re.findall(r"location: (/jobs/\w+)", text)}
    with server.client() as client:
        for job in jobs:
            while client.delete(job).status_code == 202:
                time.sleep(0.1)


def test_there_is_an_example_for_each_endpoint() -> None:
    asked = {path for example in RUN for path in re.findall(rf"{EXAMPLE_URL}(/[\w/]*)", example.text)}
    native = {"/txt2img", "/img2img", "/inpaint", "/reproduce", "/jobs/"}
    others = {"/v1", "/v1/images/generations", "/sdapi/v1/txt2img", "/sdapi/v1/progress", "/sdapi/v1/interrupt"}
    assert native | others | {"/status", "/capabilities", "/metrics"} <= asked
    (api, _) = examples_of("docs/api.md", "bash")
    assert re.findall(r":3000(/\w+)", api.text) == ["/txt2img", "/img2img", "/inpaint"]


def test_every_example_is_run_or_has_a_reason() -> None:
    found = {(example.page, example.first_line) for example in EXAMPLES}
    assert sorted(set(NOT_RUN) - found) == []
    assert {example.language for example in EXAMPLES} <= {"bash", "python", "json", "yaml", "text"}, "an example names its language"


def test_each_page_of_docs_begins_with_what_it_is_for_and_an_example() -> None:
    for page, content in PAGES.items():
        if page.startswith("docs/"):
            title, _, purpose, *rest = content.splitlines()
            assert title.startswith("# ")
            assert purpose.startswith("For "), page
            first = re.search(r"^```(\w+)$", "\n".join(rest[:12]), re.MULTILINE)
            assert first, page
            assert first[1] in ("bash", "python"), page


@pytest.mark.parametrize("example", [one for one in EXAMPLES if one.language == "json"], ids=lambda one: one.page)
def test_examples_of_json_are_json(example: Example) -> None:
    json.loads(example.text)


def test_the_example_of_cors_goes_into_the_configuration() -> None:
    (example,) = examples_of("docs/configuration.md", "yaml")
    configuration = (ROOT / "fp32" / "configuration.yaml").read_text(encoding="utf-8")
    changed = yaml.safe_load(configuration.replace("api_server:\n", f"api_server:\n{example.text}"))
    assert changed["api_server"]["http"]["cors"]["enabled"] is True


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    for link, source in re.findall(r"\]\(([^)\s]+)\)|src=\"([^\"]+)\"", PAGES[page]):
        target, _, anchor = (link or source).partition("#")
        if target.startswith("http"):
            continue
        file = (ROOT / page).parent / target if target else ROOT / page
        assert file.exists(), link
        if anchor:
            assert anchor in anchors_of(str(file.resolve().relative_to(ROOT))), link


def test_the_make_targets_that_the_pages_name_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"^([\w-]+):", makefile, re.MULTILINE))
    folders = {f"test-{folder.name}" for folder in (ROOT / "tests").iterdir() if folder.is_dir()}
    for page in PAGES:
        assert make_targets_in(page) <= targets | folders, page
    assert {"serve", "test", "quick", "model"} <= make_targets_in("README.md")
    assert targets - {"precision", "on-this-python"} <= set(re.findall(r"^# make ([\w-]+)", makefile, re.MULTILINE)), (
        "the Makefile's first lines list all"
    )


def test_curl_is_installed() -> None:
    assert shutil.which("curl"), "the examples need curl"


def test_the_tests_that_security_names_exist() -> None:
    named = set(re.findall(r"`(tests/[\w/]+\.py)`", PAGES["SECURITY.md"]))
    assert named
    assert [file for file in sorted(named) if not (ROOT / file).exists()] == []


def test_the_files_that_contributing_names_exist() -> None:
    named = set(re.findall(r"`([\w/]+/\w+\.py)`", PAGES["CONTRIBUTING.md"]))
    assert len(named) > 15
    assert [file for file in sorted(named) if not ((ROOT / file).exists() or (ROOT / "stable_diffusion" / file).exists())] == []
