"""The README's commands work; what it and the architecture page say of the repository is true. `test_docs.py` runs all examples."""

from __future__ import annotations

import os
import re
import signal
import subprocess
from pathlib import Path

from PIL import Image

from stable_diffusion.demo.shapes import judge
from tests.http.servers import ROOT, Server, environment, free_port, wait_until_ready


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


def test_ci_runs_the_readmes_test_command_and_brings_only_programs_whose_tests_would_be_skipped() -> None:
    lines = [line for line in (ROOT / ".ci" / "run").read_text().splitlines() if line and not line.startswith(("#", "set ", "cd "))]
    assert lines[-1] == "make test"
    installed = [line.partition("install ")[2] for line in lines if " install " in line]
    packages = "haproxy cloud-init chromium imagemagick libimage-exiftool-perl webp netpbm libavif-bin redis-server"
    assert installed == [f"--quiet=2 --no-install-recommends {packages} >/dev/null"]


def test_make_refuses_a_precision_that_does_not_exist() -> None:
    finished = subprocess.run(["make", "serve", "PRECISION=fp8"], cwd=ROOT, capture_output=True, text=True, timeout=30, check=False)
    assert finished.returncode == 2
    assert "PRECISION must be fp32 or fp16, got fp8" in finished.stderr


def test_every_package_is_in_the_architecture_page_and_every_file_that_it_names_is_there() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    packages = {folder.name for folder in (ROOT / "stable_diffusion").iterdir() if folder.is_dir() and folder.name != "__pycache__"}
    assert [name for name in sorted(packages) if f"`{name}/`" not in page] == []
    walk = page[page.index("## POST /txt2img") : page.index("## A deployment's life")]
    named = set(re.findall(r"`([a-z0-9_/]+\.py)`", walk))
    assert [name for name in sorted(named) if not ((ROOT / name).exists() or (ROOT / "stable_diffusion" / name).exists())] == []
    beside = {"web/disconnect.py", "web/upload_budget.py", "state/jobs.py", "state/metrics.py"}
    beside |= {"server/half_closed.py", "web/content_coding.py", "web/multipart.py"}
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
