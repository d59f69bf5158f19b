"""machine.sh, run for real with bash: first boot, reboot, and everything that can be missing.

`aws`, `docker`, `nvidia-smi`, `cloud-init`, `systemctl` and `sleep` are stand-ins that write down how they were called;
curl is the real one and speaks to a server of the test's, which is EC2's metadata service too.
"""

from __future__ import annotations

import http.server
import json
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

import pytest

from stable_diffusion.core.settings import StoreAddress, read_settings
from stable_diffusion.core.types import Kind
from tests.deployment.commands import TEMPLATES, TOOLS, calls, path_with, stand_in
from tests.http.servers import ROOT, environment, free_port

SCRIPT = TEMPLATES / "boot" / "machine.sh"
IMAGE = "123456789012.dkr.ecr.us-west-1.amazonaws.com/stable-diffusion@sha256:0123"
SETTINGS = {
    "REGION": "us-west-1",
    "IMAGE": IMAGE,
    "PORT": "80",
    "ENABLE_GPUS": "true",
    "MINIMUM_DRIVER_MAJOR": "580",
    "STOP_TIMEOUT_S": "3600",
    "LOG_GROUP": "/bentoctl/stable-diffusion",
    "API_KEY_ARN": "",
    "IDLE_STOP_MINUTES": "0",
    "AUTO_SCALING_GROUP": "",
    "METRIC_NAMESPACE": "StableDiffusion",
    "BACKLOG_METRIC": "BacklogSeconds",
    "BUSY_METRIC": "BusyPercent",
    "STORE_ADDRESS": "",
    "STORE_PASSWORD_ARN": "",
    "READY_HOOK": "ready",
    "LEAVE_HOOK": "leave",
    "READY_TIMEOUT_S": "1800",
    "KEEP_ALIVE_S": "3660",
}
# The image is missing until it has been pulled, and then stays.
DOCKER = r"""
folder=$(dirname "$0")
case "$1 $2" in
  "image inspect") [[ -e $folder/pulled ]] ;;
  "login --username") cat >/dev/null ;;
  "pull --quiet") touch "$folder/pulled" ;;
  "logs --tail") echo "Not started: this bento holds no weights" ;;
esac
"""


@dataclass(frozen=True)
class Machine:
    """A machine's folders and programs."""

    root: Path

    @property
    def programs(self) -> Path:
        return self.root / "bin"

    @property
    def run(self) -> Path:
        return self.root / "run"

    def configure(self, **changes: str) -> None:
        settings = SETTINGS | changes
        (self.root / "etc" / "settings").write_text("".join(f"{name}='{value}'\n" for name, value in settings.items()))

    def do(self, what: str, **variables: str) -> subprocess.CompletedProcess[str]:
        folders = {"CONFIGURATION_DIRECTORY": str(self.root / "etc"), "RUNTIME_DIRECTORY": str(self.run)}
        return subprocess.run(
            ["bash", str(SCRIPT), what],
            env=environment(self.root, {**folders, **variables, "PATH": path_with([self.programs])}),
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )

    @property
    def said(self) -> list[str]:
        """What reached CloudWatch; every line must be the JSON that the AWS CLI takes."""
        sent = [call.partition("--log-events ")[2] for call in calls(self.programs) if call.startswith("aws logs put-log-events")]
        return [json.loads(events)[0]["message"] for events in sent]

    def called(self, beginning: str) -> list[str]:
        return [call for call in calls(self.programs) if call.startswith(beginning)]


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    machine = Machine(tmp_path)
    (tmp_path / "etc").mkdir()
    (tmp_path / "etc" / "environment").write_text("SD_MODEL=demo\n")
    machine.run.mkdir()
    machine.configure()
    stand_in(machine.programs, "aws", '[[ $1 == ecr ]] && echo "password-of-the-registry"; true')
    stand_in(machine.programs, "docker", DOCKER)
    stand_in(machine.programs, "nvidia-smi", 'echo "Tesla T4, 595.91.07"')
    stand_in(machine.programs, "cloud-init", 'echo "i-0123456789abcdef0"')
    stand_in(machine.programs, "systemctl", "")
    stand_in(machine.programs, "sleep", "")
    no_metadata_service(machine)
    return machine


def no_metadata_service(machine: Machine) -> None:
    metadata_service_at(machine, str(free_port()))


def metadata_service_at(machine: Machine, port: str) -> None:
    """The real curl, to which EC2's address of the metadata service is this port of loopback."""
    curl = shutil.which("curl")
    stand_in(machine.programs, "curl", f'exec {curl} "${{@//169.254.169.254//127.0.0.1:{port}}}"')


@contextmanager
def answering(pages: dict[str, str]) -> Iterator[str]:
    """A server on loopback with these pages. Yields its port."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = pages.get(self.path)
            if self.path.startswith("/latest/") and self.headers["X-aws-ec2-metadata-token"] != "the-token":
                body = None
            self.send_response(200 if body is not None else 503)
            self.end_headers()
            self.wfile.write((body or "").encode())

        def do_PUT(self) -> None:
            """Only the metadata service is asked so."""
            self.send_response(200 if self.headers["X-aws-ec2-metadata-token-ttl-seconds"] else 400)
            self.end_headers()
            self.wfile.write(b"the-token" if self.path == "/latest/api/token" else b"")

        def log_message(self, format: str, *arguments: object) -> None:
            """Quiet."""

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield str(server.server_address[1])
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def test_shellcheck_finds_nothing() -> None:
    finished = subprocess.run([str(TOOLS / "shellcheck"), str(SCRIPT)], capture_output=True, text=True, check=False)
    assert finished.stdout + finished.stderr == ""


def test_first_boot_checks_the_gpu_logs_in_pulls_and_starts_the_container(machine: Machine) -> None:
    prepared = machine.do("prepare")
    assert prepared.returncode == 0, prepared.stderr
    assert machine.called("docker login") == ["docker login --username AWS --password-stdin 123456789012.dkr.ecr.us-west-1.amazonaws.com"]
    assert machine.called("docker pull") == [f"docker pull --quiet {IMAGE}"]
    assert machine.called("docker run") == [f"docker run --rm --gpus all --network none --entrypoint nvidia-smi {IMAGE} -L"]
    assert [line.partition(" ")[0] for line in machine.said] == ["starting", "GPU:", "pulling", "pulled"]
    assert "password-of-the-registry" not in "\n".join(calls(machine.programs)) + prepared.stdout
    assert (machine.run / "secrets").read_text() == ""

    assert machine.do("run").returncode == 0
    started = machine.called("docker run --name")[0]
    for part in ("--gpus all", "--publish 80:3000", "--cap-drop ALL", "no-new-privileges", "--stop-timeout 3600"):
        assert part in started
    assert "--log-driver awslogs" in started
    assert "awslogs-stream=i-0123456789abcdef0/container" in started
    assert f"--env-file {machine.root / 'etc'}/environment --env-file {machine.run}/secrets" in started
    assert started.endswith(f"{IMAGE} serve --timeout-keep-alive 3660")


def test_a_reboot_starts_the_local_image_without_the_registry(machine: Machine) -> None:
    machine.do("prepare")
    (machine.programs / "calls.log").unlink()
    assert machine.do("prepare").returncode == 0
    assert machine.called("docker rm --force stable-diffusion") != []
    assert machine.called("docker pull") + machine.called("docker login") + machine.called("aws ecr") == []


def test_a_failed_pull_is_retried_with_growing_pauses(machine: Machine) -> None:
    failing = DOCKER.replace(
        'touch "$folder/pulled"', 'echo >>"$folder/tries"; (($(wc -l <"$folder/tries") > 3)) && touch "$folder/pulled"'
    )
    stand_in(machine.programs, "docker", failing)
    assert machine.do("prepare").returncode == 0
    assert len(machine.called("docker pull")) == 4
    assert machine.called("sleep") == ["sleep 5", "sleep 10", "sleep 20"]


def test_a_pull_that_keeps_failing_says_what_to_check(machine: Machine) -> None:
    stand_in(machine.programs, "docker", DOCKER.replace('touch "$folder/pulled"', "false"))
    assert machine.do("prepare").returncode == 1
    assert len(machine.called("docker pull")) == 5
    assert machine.said[-1].startswith(f"FAILED: the image {IMAGE} could not be pulled: is it in the repository")


def test_a_failed_login_points_at_the_region(machine: Machine) -> None:
    stand_in(machine.programs, "aws", "[[ $1 != ecr ]]")
    assert machine.do("prepare").returncode == 1
    assert "FAILED: login to 123456789012.dkr.ecr.us-west-1.amazonaws.com failed: check that spec.region" in machine.said[-1]


def test_a_missing_gpu_is_reported_with_the_output_of_nvidia_smi(machine: Machine) -> None:
    stand_in(machine.programs, "nvidia-smi", 'echo "No devices were found"; exit 6')
    assert machine.do("prepare").returncode == 1
    assert machine.said[-1].startswith("FAILED: no NVIDIA GPU, or no driver for it: nvidia-smi printed: No devices were found.")
    assert machine.called("docker pull") == []


def test_a_driver_too_old_for_torch_is_reported(machine: Machine) -> None:
    stand_in(machine.programs, "nvidia-smi", 'echo "Tesla T4, 515.65.01"')
    assert machine.do("prepare").returncode == 1
    assert "driver is 515.65.01, but torch's CUDA needs 580 or newer" in machine.said[-1]


def test_a_container_that_sees_no_gpu_is_reported(machine: Machine) -> None:
    broken = 'if [[ $1 == run ]]; then echo "could not select device driver with capabilities: [[gpu]]"; exit 125; fi\n' + DOCKER
    stand_in(machine.programs, "docker", broken)
    assert machine.do("prepare").returncode == 1
    assert "FAILED: the container sees no GPU (NVIDIA container toolkit): could not select device driver" in machine.said[-1]


def test_without_gpus_nothing_uses_one(machine: Machine) -> None:
    machine.configure(ENABLE_GPUS="false")
    stand_in(machine.programs, "nvidia-smi", "exit 127")
    assert machine.do("prepare").returncode == 0
    assert machine.do("run").returncode == 0
    assert "--gpus" not in "\n".join(calls(machine.programs))
    assert machine.called("nvidia-smi") == []


@pytest.mark.parametrize(
    ("arn", "call"),
    [
        ("arn:aws:secretsmanager:us-east-1:123456789012:secret:key-AbCdEf", "aws secretsmanager get-secret-value"),
        ("arn:aws:ssm:us-east-1:123456789012:parameter/key", "aws ssm get-parameter"),
    ],
)
def test_the_api_key_reaches_the_container_only_through_a_private_file(machine: Machine, arn: str, call: str) -> None:
    machine.configure(API_KEY_ARN=arn)
    stand_in(machine.programs, "aws", 'case $1 in secretsmanager | ssm) echo "the-key" ;; esac')
    prepared = machine.do("prepare")
    assert prepared.returncode == 0, prepared.stderr
    secrets = machine.run / "secrets"
    assert secrets.read_text() == "SD_API_KEYS=the-key\n"
    assert secrets.stat().st_mode & 0o077 == 0
    assert arn in machine.called(call)[0]
    assert "--region us-east-1" in machine.called(call)[0], "the key's own region"
    assert "the-key" not in "\n".join(calls(machine.programs)) + prepared.stdout + prepared.stderr


STORE = {
    "STORE_ADDRESS": "master.sd.abc123.usw1.cache.amazonaws.com:6379",
    "STORE_PASSWORD_ARN": "arn:aws:secretsmanager:us-west-1:123456789012:secret:sd-store-AbCdEf",
}
KEY_ARN = "arn:aws:secretsmanager:us-west-1:123456789012:secret:key-AbCdEf"
BOTH_SECRETS = 'case "$*" in *sd-store-*) echo "Pass0Word" ;; *secret:key-*) echo "the-key" ;; esac'


def test_the_address_of_the_shared_state_reaches_the_container_only_through_a_private_file(machine: Machine) -> None:
    machine.configure(**STORE, API_KEY_ARN=KEY_ARN)
    stand_in(machine.programs, "aws", BOTH_SECRETS)
    prepared = machine.do("prepare")
    assert prepared.returncode == 0, prepared.stderr
    started = machine.do("run")
    secrets = machine.run / "secrets"
    variables = dict(line.split("=", 1) for line in secrets.read_text().splitlines())
    assert variables == {"SD_API_KEYS": "the-key", "SD_SHARED_STATE": "rediss://:Pass0Word@master.sd.abc123.usw1.cache.amazonaws.com:6379"}
    assert secrets.stat().st_mode & 0o077 == 0
    assert f"--env-file {secrets}" in machine.called("docker run --name")[0]
    outputs = prepared.stdout + prepared.stderr + started.stdout + started.stderr
    assert "Pass0Word" not in "\n".join(calls(machine.programs)) + outputs
    [asked] = [call for call in machine.called("aws secretsmanager get-secret-value") if "sd-store-" in call]
    assert f"--secret-id {STORE['STORE_PASSWORD_ARN']}" in asked


def test_the_server_accepts_the_address_that_the_machine_builds(machine: Machine) -> None:
    machine.configure(**STORE)
    stand_in(machine.programs, "aws", BOTH_SECRETS)
    assert machine.do("prepare").returncode == 0
    variables = dict(line.split("=", 1) for line in (machine.run / "secrets").read_text().splitlines())
    store = read_settings(variables).shared_state
    assert store == StoreAddress("master.sd.abc123.usw1.cache.amazonaws.com", 6379, True, None, "Pass0Word", 0)


@pytest.mark.parametrize(
    ("answer", "words"),
    [("exit 254", "could not be read"), ('echo ""', "letters and digits"), ("echo 'a#secret@password'", "letters and digits")],
)
def test_a_store_whose_password_cannot_be_used_stops_the_start_without_telling_it(machine: Machine, answer: str, words: str) -> None:
    machine.configure(**STORE)
    stand_in(machine.programs, "aws", f"case $1 in secretsmanager) {answer} ;; esac")
    prepared = machine.do("prepare")
    assert prepared.returncode == 1
    assert "FAILED: the password of the Valkey" in machine.said[-1]
    assert words in machine.said[-1]
    assert "a#secret" not in "\n".join(machine.said) + prepared.stdout + prepared.stderr


def test_an_api_key_read_at_the_second_attempt_has_nothing_added(machine: Machine) -> None:
    machine.configure(API_KEY_ARN="arn:aws:secretsmanager:us-west-1:123456789012:secret:key-AbCdEf")
    once = machine.root / "once"
    stand_in(
        machine.programs, "aws", f'[[ $1 != secretsmanager ]] || {{ [[ -e "{once}" ]] && echo the-key || {{ touch "{once}"; exit 1; }}; }}'
    )
    assert machine.do("prepare").returncode == 0
    assert (machine.run / "secrets").read_text() == "SD_API_KEYS=the-key\n"


@pytest.mark.parametrize(
    ("answer", "words"),
    [("exit 254", "could not be read"), ('echo ""', "is empty"), (r'printf "one\ntwo\n"', "has more than one line")],
)
def test_a_missing_api_key_stops_the_start(machine: Machine, answer: str, words: str) -> None:
    machine.configure(API_KEY_ARN="arn:aws:secretsmanager:us-west-1:123456789012:secret:key-AbCdEf")
    stand_in(machine.programs, "aws", f"case $1 in secretsmanager) {answer} ;; esac")
    assert machine.do("prepare").returncode == 1
    assert "FAILED: the API key" in machine.said[-1]
    assert words in machine.said[-1]


@pytest.fixture
def container() -> Iterator[subprocess.Popen[bytes]]:
    """A stand-in for `docker run`, whose process id systemd passes as MAINPID."""
    process = subprocess.Popen(["sleep", "60"])
    yield process
    process.kill()
    process.wait()


def wait_for(machine: Machine, container: subprocess.Popen[bytes], began_s_ago: int = 0) -> subprocess.CompletedProcess[str]:
    (machine.run / "began").write_text(f"{int(time.time()) - began_s_ago}\n")
    return machine.do("wait", MAINPID=str(container.pid))


def test_ready_is_logged_once_the_server_is_ready(machine: Machine, container: subprocess.Popen[bytes]) -> None:
    with answering({"/readyz": ""}) as port:
        machine.configure(PORT=port)
        assert wait_for(machine, container).returncode == 0
    assert re.fullmatch(r"READY after \d+ s", machine.said[-1])


def test_waiting_ends_at_once_when_the_container_ends(machine: Machine, container: subprocess.Popen[bytes]) -> None:
    machine.configure(PORT=str(free_port()))
    container.kill()
    container.wait()
    assert wait_for(machine, container).returncode == 1
    machine.do("report", SERVICE_RESULT="exit-code", EXIT_STATUS="1")
    assert machine.said == ["FAILED: the image server ended (exit-code, 1); its last lines: Not started: this bento holds no weights"]


def test_a_server_that_never_becomes_ready_fails_after_the_time_limit_of_the_whole_start(
    machine: Machine, container: subprocess.Popen[bytes]
) -> None:
    machine.configure(PORT=str(free_port()))
    assert wait_for(machine, container, began_s_ago=1801).returncode == 1
    machine.do("report", SERVICE_RESULT="exit-code", EXIT_STATUS="1")
    assert len(machine.said) == 1
    assert machine.said[0].startswith("FAILED: the server is not ready after 1800 s; its last lines: Not started")


def test_a_machine_joins_its_group_when_it_is_ready_and_a_reboot_does_not_fail(
    machine: Machine, container: subprocess.Popen[bytes]
) -> None:
    with answering({"/readyz": ""}) as port:
        machine.configure(PORT=port, AUTO_SCALING_GROUP="stable-diffusion")
        assert wait_for(machine, container).returncode == 0
        [call] = machine.called("aws autoscaling complete-lifecycle-action")
        assert "--auto-scaling-group-name stable-diffusion --lifecycle-hook-name ready" in call
        assert call.endswith("--instance-id i-0123456789abcdef0 --lifecycle-action-result CONTINUE")
        nothing = "An error occurred (ValidationError): No active Lifecycle Action found with instance ID i-0123456789abcdef0"
        stand_in(machine.programs, "aws", f'[[ $1 != autoscaling ]] || {{ echo "{nothing}" >&2; exit 254; }}')
        assert wait_for(machine, container).returncode == 0
        assert machine.said[-1].startswith("READY")
        stand_in(machine.programs, "aws", '[[ $1 != autoscaling ]] || { echo "AccessDenied" >&2; exit 254; }')
        assert wait_for(machine, container).returncode == 0
        assert machine.said[-1].startswith("the machine could not join its group: ")
        assert "AccessDenied" in machine.said[-1]


def test_a_server_that_ends_is_reported_with_its_last_lines(machine: Machine) -> None:
    assert machine.do("report", SERVICE_RESULT="exit-code", EXIT_STATUS="1").returncode == 0
    [line] = machine.said
    assert line.startswith("FAILED: the image server ended (exit-code, 1); its last lines: Not started: this bento holds no weights")


def test_clean_stops_and_reported_failures_are_not_reported_again(machine: Machine) -> None:
    machine.do("report", SERVICE_RESULT="success", EXIT_STATUS="0")
    stand_in(machine.programs, "nvidia-smi", "exit 1")
    machine.do("prepare")
    machine.do("report", SERVICE_RESULT="exit-code", EXIT_STATUS="1")
    assert len([line for line in machine.said if line.startswith("FAILED")]) == 1


def test_log_lines_survive_quotes_backslashes_line_breaks_colours_and_incomplete_characters(machine: Machine) -> None:
    stand_in(machine.programs, "nvidia-smi", r"""printf 'a "quoted" \\ path\nand \033[31mred\033[0m \303'; exit 1""")
    machine.do("prepare")
    assert 'a "quoted" \\ path and  [31mred [0m ' in machine.said[-1]


def test_an_unreachable_cloudwatch_does_not_stop_the_preparation(machine: Machine) -> None:
    stand_in(machine.programs, "aws", '[[ $1 == ecr ]] && echo "password"')
    prepared = machine.do("prepare")
    assert prepared.returncode == 0
    assert "(CloudWatch did not accept that line)" in prepared.stdout


def test_stop_gives_the_container_the_time_of_the_longest_request(machine: Machine) -> None:
    machine.do("stop")
    assert machine.called("docker stop") == ["docker stop -t 3600 stable-diffusion"]


def metrics(in_progress: int, total: int) -> str:
    """The metrics as the service prints them, with lines that must not count: health checks continue while nothing is generated."""
    return (
        f'bentoml_runner_request_in_progress{{endpoint="/txt2img",runner_name="stable_diffusion_runner"}} {in_progress}.0\n'
        f'bentoml_api_server_request_in_progress{{endpoint="/metrics"}} 1.0\n'
        f'bentoml_runner_request_total{{endpoint="/img2img",http_response_code="200"}} {total}.0\n'
        f'bentoml_runner_request_total{{endpoint="/inpaint",http_response_code="500"}} 1.0\n'
        f'bentoml_runner_request_in_progress{{endpoint="/readyz",runner_name="stable_diffusion_runner"}} 1.0\n'
        f'bentoml_runner_request_total{{endpoint="/readyz",http_response_code="200"}} {time.monotonic_ns()}.0\n'
    )


def test_the_load_is_counted_over_all_methods_of_the_runner() -> None:
    assert f'endpoint="\\/({"|".join(get_args(Kind))})"' in SCRIPT.read_text()


def load(backlog_s: float, running: int) -> dict[str, str]:
    """The pages of a ready server with this load."""
    lines = f"stable_diffusion_queue_jobs 3.0\nstable_diffusion_backlog_seconds {backlog_s}\nstable_diffusion_running_jobs {running}.0\n"
    return {"/readyz": "ready", "/metrics": f"# HELP stable_diffusion_backlog_seconds 7\n{lines}"}


def reported(machine: Machine) -> list[dict[str, dict[str, object]]]:
    """What reached CloudWatch, by the metrics' names."""
    sent = [json.loads(call.partition("--metric-data ")[2]) for call in machine.called("aws cloudwatch put-metric-data")]
    assert all("--namespace StableDiffusion" in call for call in machine.called("aws cloudwatch"))
    return [{datum.pop("MetricName"): datum for datum in data} for data in sent]


@pytest.mark.parametrize(("running", "busy_percent"), [(0, 0), (1, 100), (4, 100)])
def test_a_machine_in_a_group_reports_the_seconds_of_work_that_wait_for_it_and_whether_it_generates(
    machine: Machine, running: int, busy_percent: int
) -> None:
    with answering(load(37.25, running)) as port:
        machine.configure(PORT=port, AUTO_SCALING_GROUP="stable-diffusion")
        assert machine.do("watch").returncode == 0
    of_the_group = {"Dimensions": [{"Name": "AutoScalingGroupName", "Value": "stable-diffusion"}]}
    assert reported(machine) == [
        {
            "BacklogSeconds": {"Unit": "Seconds", "Value": 37.25, **of_the_group},
            "BusyPercent": {"Unit": "Percent", "Value": busy_percent, **of_the_group},
        }
    ]


def test_what_a_real_server_shows_is_what_a_machine_reports(machine: Machine, tmp_path: Path) -> None:
    """The names and the form of the numbers are those of prometheus_client."""
    script = "from stable_diffusion.state.metrics import *; count = counting(); count(WorkloadRecord(0.00001)); print(page().decode())"
    variables = {"PROMETHEUS_MULTIPROC_DIR": str(tmp_path), "SD_SHARED_FOLDER": str(tmp_path / "shared")}
    command = [sys.executable, "-W", "ignore", "-c", script]
    page = subprocess.run(command, cwd=ROOT, env=environment(tmp_path, variables), capture_output=True, text=True, check=True).stdout
    with answering({"/readyz": "ready", "/metrics": page}) as port:
        machine.configure(PORT=port, AUTO_SCALING_GROUP="stable-diffusion")
        assert machine.do("watch").returncode == 0
    assert [(data["BacklogSeconds"]["Value"], data["BusyPercent"]["Value"]) for data in reported(machine)] == [(0.00001, 0)]


def test_a_machine_that_is_not_ready_does_not_make_its_group_look_idle(machine: Machine) -> None:
    with answering({"/metrics": load(0, 0)["/metrics"]}) as port:
        machine.configure(PORT=port, AUTO_SCALING_GROUP="stable-diffusion")
        assert machine.do("watch").returncode == 0
    assert reported(machine) == []


TARGET_STATE = "/latest/meta-data/autoscaling/target-lifecycle-state"


def test_a_machine_that_is_to_leave_finishes_its_work_first_and_reports_no_more(machine: Machine) -> None:
    with answering({**load(37.25, 1), TARGET_STATE: "Terminated"}) as port:
        metadata_service_at(machine, port)
        machine.configure(PORT=port, AUTO_SCALING_GROUP="stable-diffusion")
        assert machine.do("watch").returncode == 0
        assert machine.do("watch").returncode == 0
    assert reported(machine) == []
    steps = [call for call in calls(machine.programs) if call.startswith(("sleep", "systemctl", "aws autoscaling"))]
    let_go = (
        "aws autoscaling complete-lifecycle-action --auto-scaling-group-name stable-diffusion --lifecycle-hook-name leave "
        "--instance-id i-0123456789abcdef0 --lifecycle-action-result CONTINUE"
    )
    # Again a minute later: the load balancer may have waited longer for its requests than the server for its jobs.
    assert steps == ["sleep 30", "systemctl stop stable-diffusion.service", let_go, let_go]
    assert machine.said == ["leaving the group: finishing what was accepted", "leaving the group: finished"]


def test_a_machine_that_could_not_finish_is_not_let_go(machine: Machine) -> None:
    stand_in(machine.programs, "systemctl", "exit 1")
    with answering({**load(37.25, 1), TARGET_STATE: "Terminated"}) as port:
        metadata_service_at(machine, port)
        machine.configure(PORT=port, AUTO_SCALING_GROUP="stable-diffusion")
        assert machine.do("watch").returncode == 1
        assert machine.called("aws autoscaling") == []
        stand_in(machine.programs, "systemctl", "")
        assert machine.do("watch").returncode == 0
    assert len(machine.called("aws autoscaling")) == 1


@pytest.mark.parametrize(
    ("group", "state"),
    [("stable-diffusion", "InService"), ("stable-diffusion", "Standby"), ("", "Terminated")],  # without a group nobody waits for it
)
def test_a_machine_that_stays_is_not_stopped(machine: Machine, group: str, state: str) -> None:
    with answering({**load(37.25, 1), TARGET_STATE: state}) as port:
        metadata_service_at(machine, port)
        machine.configure(PORT=port, AUTO_SCALING_GROUP=group)
        assert machine.do("watch").returncode == 0
    assert machine.called("systemctl") + machine.called("aws autoscaling") == []


def test_a_server_that_is_loading_reports_nothing(machine: Machine) -> None:
    machine.configure(PORT=str(free_port()), AUTO_SCALING_GROUP="stable-diffusion")
    assert machine.do("watch").returncode == 0
    assert machine.called("aws cloudwatch") + machine.called("systemctl") == []


def test_an_idle_machine_stops_itself_and_a_busy_one_does_not(machine: Machine) -> None:
    clock = machine.root / "now"
    stand_in(machine.programs, "date", f'[[ $1 == +%s ]] && cat "{clock}" || echo 1000')

    def watch_at(minute: int, in_progress: int, total: int) -> None:
        clock.write_text(str(minute * 60))
        with answering({"/metrics": metrics(in_progress, total)}) as port:
            machine.configure(PORT=port, IDLE_STOP_MINUTES="15")
            assert machine.do("watch").returncode == 0

    watch_at(0, 0, 7)
    watch_at(14, 0, 8)  # a request came in between
    watch_at(28, 1, 8)  # one is being generated
    watch_at(42, 0, 8)
    assert machine.called("systemctl") == []
    watch_at(43, 0, 8)
    assert machine.called("systemctl") == ["systemctl poweroff"]
    assert machine.said[-1].startswith("stopping: no request for 15 minutes")


def test_a_machine_whose_server_never_becomes_ready_stops_after_the_time_of_a_start_too(machine: Machine) -> None:
    machine.configure(PORT=str(free_port()), IDLE_STOP_MINUTES="15")
    clock = machine.root / "now"
    stand_in(machine.programs, "date", f'[[ $1 == +%s ]] && cat "{clock}" || echo 1000')
    for minute in (0, 44):
        clock.write_text(str(minute * 60))
        assert machine.do("watch").returncode == 0
    assert machine.called("systemctl") == []
    clock.write_text(str(45 * 60))
    machine.do("watch")
    assert machine.called("systemctl") == ["systemctl poweroff"]


def test_an_unknown_command_prints_the_usage(machine: Machine) -> None:
    finished = machine.do("dance")
    assert finished.returncode == 2
    assert "prepare | run | wait | stop | report | watch" in finished.stderr
