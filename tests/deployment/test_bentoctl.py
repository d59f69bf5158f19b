"""The commands of bentoctl/README.md as a person types them: operator install, init, generate, build, destroy.

AWS is moto's server. Docker is a stand-in here: a `docker` that writes down how it was called, and its daemon's API with
the three calls that bentoctl makes. `make image-test` builds with the real one.
"""

from __future__ import annotations

import http.server
import json
import re
import shutil
import subprocess
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import boto3
import pytest

from tests.deployment.commands import OPERATOR, bentoctl, calls, path_with, stand_in
from tests.deployment.conftest import StandInAws
from tests.http.servers import BENTOML, ROOT, build_bento

CONFIGURATION = ROOT / "bentoctl" / "deployment_config.yaml"
REPOSITORY = "stable-diffusion-bentoml"
TERRAFORM = shutil.which("terraform")
# Records the build context in a file, because the folder is removed afterwards.
DOCKER = r"""
case "$1 $2" in
  "version --format") echo '"28.0.0"' ;;
  "buildx --help") echo "--builder string" ;;
  "buildx version") echo "github.com/docker/buildx v0.13.1 abc" ;;
  "image inspect") cat "$(dirname "$0")/size" 2>/dev/null || exit 1 ;;
  "buildx build")
    cd "${@: -1}" && find env/docker/Dockerfile src/service.py src/stable_diffusion/server/service.py >"$(dirname "$0")/context" ;;
esac
"""


# Needs no provider; its destruction fails while a file called broken exists.
MACHINE = """
variable "deployment_name" {
  type = string
}
resource "terraform_data" "machine" {
  provisioner "local-exec" {
    when    = destroy
    command = "test ! -e broken"
  }
}
output "region" {
  value = var.deployment_name
}
"""


@dataclass(frozen=True)
class Workplace:
    """A person's folder with the operator installed."""

    folder: Path
    home: Path

    def bentoctl(
        self, *arguments: str, changes: dict[str, str] | None = None, typed: str | None = None
    ) -> subprocess.CompletedProcess[str]:
        return bentoctl(self.home, self.folder, *arguments, changes=changes, typed=typed)

    @property
    def values(self) -> str:
        return (self.folder / "bentoctl.tfvars").read_text()


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home with the operator installed and the fp32 bento built."""
    home = tmp_path_factory.mktemp("home")
    installed = bentoctl(home, ROOT / "bentoctl", "operator", "install", "./aws-ec2")
    assert (installed.returncode, installed.stdout.strip()) == (0, "Installed aws-ec2!"), installed.stderr
    build_bento(ROOT / "fp32", home)
    return home


@pytest.fixture
def workplace(home: Path, tmp_path: Path) -> Workplace:
    folder = tmp_path / "deployment"
    folder.mkdir()
    shutil.copy(CONFIGURATION, folder)
    return Workplace(folder, home)


def test_the_installed_operator_is_this_repositorys_folder(home: Path) -> None:
    listed = json.loads((home / "operators" / "operator_list.json").read_text())
    assert listed["aws-ec2"]["path"] == str(OPERATOR)


def test_generate_writes_the_terraform_files_and_the_values(workplace: Workplace) -> None:
    generated = workplace.bentoctl("generate", "-f", "deployment_config.yaml")
    assert generated.returncode == 0, generated.stderr
    for name in ("versions.tf", "variables.tf", "main.tf", "outputs.tf", "boot/machine.sh", "wait_until_ready.py", "bentoctl.tfvars"):
        assert (workplace.folder / name).is_file()
        assert name in generated.stdout
    assert 'instance_type         = "g4dn.xlarge"\n' in workplace.values


def test_generate_says_what_a_shared_state_costs_and_nothing_where_there_is_none(workplace: Workplace) -> None:
    assert "dollars" not in workplace.bentoctl("generate").stdout
    configuration = workplace.folder / "deployment_config.yaml"
    changed = re.sub(r"(?m)^  # (instances:|  min: 1|  max: 3|shared_state:)(.*)$", r"  \1\2", configuration.read_text())
    configuration.write_text(changed.replace("shared_state: false", "shared_state: true"))
    generated = workplace.bentoctl("generate")
    assert generated.returncode == 0, generated.stderr
    assert "spec.shared_state: the Valkey costs about 37 dollars a month, with or without work: 2 cache.t4g.small" in generated.stdout
    assert "shared_state          = true\n" in workplace.values


def test_shared_state_for_a_single_machine_is_refused_by_name(workplace: Workplace) -> None:
    configuration = workplace.folder / "deployment_config.yaml"
    configuration.write_text(configuration.read_text().replace("  # shared_state: false", "  shared_state: true"))
    refused = workplace.bentoctl("generate")
    assert refused.returncode == 1
    assert "spec.shared_state: needs machines that share it, so set instances with a max of 2 or more" in refused.stderr
    assert not (workplace.folder / "bentoctl.tfvars").exists()


def test_a_second_generate_reports_that_main_tf_is_up_to_date(workplace: Workplace) -> None:
    workplace.bentoctl("generate")
    configuration = workplace.folder / "deployment_config.yaml"
    configuration.write_text(configuration.read_text().replace("g4dn.xlarge", "g5.xlarge"))
    again = workplace.bentoctl("generate")
    assert again.returncode == 0
    assert "main.tf and the other templates are up to date: only bentoctl.tfvars is written." in again.stdout
    assert '"g5.xlarge"' in workplace.values


def test_a_changed_main_tf_is_kept_and_the_message_names_both_options(workplace: Workplace) -> None:
    workplace.bentoctl("generate")
    main = workplace.folder / "main.tf"
    main.write_text(main.read_text() + "\n# mine\n")
    values = workplace.values
    refused = workplace.bentoctl("generate")
    assert refused.returncode == 1
    assert "main.tf: differs from what this operator writes" in refused.stderr
    assert "bentoctl generate --values-only" in refused.stderr
    assert "rm main.tf" in refused.stderr
    assert main.read_text().endswith("# mine\n")
    assert workplace.values == values
    assert workplace.bentoctl("generate", "--values-only").returncode == 0
    main.unlink()
    assert workplace.bentoctl("generate").returncode == 0
    assert "# mine" not in main.read_text()


def test_a_second_deployment_in_the_same_folder_is_refused(workplace: Workplace) -> None:
    workplace.bentoctl("generate")
    refused = workplace.bentoctl("generate", "-f", str(ROOT / "bentoctl" / "deployment_config_tokyo.yaml"))
    assert refused.returncode == 1
    assert "this folder belongs to the deployment stable-diffusion-bentoml" in refused.stderr
    assert 'deployment_name       = "stable-diffusion-bentoml"' in workplace.values


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("instance_type: g4dn.xlarge", "instance_type: g4d.xlarge", "no instance family"),
        ("allowed_cidrs: []", "allowed_cidrs: [1.2.3.4]", "1.2.3.4/32"),
        ("instance_type: g4dn.xlarge", "instance_type: c7i.large", "spec.enable_gpus: c7i.large has no NVIDIA GPU"),
        ("name: stable-diffusion-bentoml", "name: sd/bentoml", "name: 'sd/bentoml' must be"),
    ],
)
def test_a_bad_configuration_is_refused_before_anything_is_written(workplace: Workplace, old: str, new: str, words: str) -> None:
    configuration = workplace.folder / "deployment_config.yaml"
    configuration.write_text(configuration.read_text().replace(old, new))
    refused = workplace.bentoctl("generate")
    assert words in re.sub(r"\s+", " ", refused.stdout + refused.stderr)
    assert "Traceback" not in refused.stderr
    assert [file.name for file in workplace.folder.iterdir()] == ["deployment_config.yaml"]


def test_the_answers_to_init_make_a_deployment(workplace: Workplace) -> None:
    (workplace.folder / "deployment_config.yaml").unlink()
    answers = {
        "name": "my-pictures",
        "region": "ap-northeast-1",
        "instance_type, wrong at first": "g4dn.huge\n",
        "enable_gpus": "",
        "ami_id": "",
        "disk_size_gb": "150",
        "allowed_cidrs": "y\n203.0.113.7/32\nn",
        "environment_variables": "n",
        "api_key_arn": "arn:aws:ssm:ap-northeast-1:123456789012:parameter/keys",
        "instances.min": "",
        "instances.max": "",
        "shared_state": "",
        "certificate_arn": "",
        "spot": "no",
        "idle_stop_minutes": "30",
        "subnet_ids": "n",
        "env": "n",
        "file name": "",
    }
    finished = workplace.bentoctl("init", typed="\n".join(answers.values()) + "\n")
    assert finished.returncode == 0, finished.stderr
    assert "Help: AWS region to deploy to." in finished.stdout
    assert "the family 'g4dn' has the sizes" in finished.stdout
    for line in (
        'deployment_name       = "my-pictures"',
        'region                = "ap-northeast-1"',
        'instance_type         = "g4dn.xlarge"',
        "enable_gpus           = true",
        "disk_size_gb          = 150",
        'allowed_cidrs         = ["203.0.113.7/32"]',
        "idle_stop_minutes     = 30",
        "instances             = null",
    ):
        assert line in workplace.values


@dataclass
class DockerDaemon:
    """The three calls of Docker's HTTP API that bentoctl makes, with a record of the requests."""

    url: str = ""
    asked: list[str] = field(default_factory=list)


@pytest.fixture
def docker_daemon() -> Iterator[DockerDaemon]:
    daemon = DockerDaemon()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._answer({"ApiVersion": "1.41", "Id": "sha256:0123", "RepoTags": []})

        def do_POST(self) -> None:
            daemon.asked.append(self.path)
            self._answer({"status": "Pushed"}, status=201 if "/tag?" in self.path else 200)

        def _answer(self, body: dict[str, object], status: int = 200) -> None:
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.end_headers()
            self.wfile.write(json.dumps(body).encode() + b"\n")

        def log_message(self, format: str, *arguments: object) -> None:
            """Quiet."""

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    daemon.url = f"tcp://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield daemon
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def docker(tmp_path: Path) -> Path:
    stand_in(tmp_path / "docker-bin", "docker", DOCKER)
    return tmp_path / "docker-bin"


def with_docker(docker: Path, **more: str) -> dict[str, str]:
    return {"PATH": path_with([BENTOML.parent, docker]), **more}


def test_a_dry_run_builds_the_complete_bento_from_an_existing_folder(workplace: Workplace, docker: Path) -> None:
    built = workplace.bentoctl("build", "-b", "stable_diffusion_fp32:latest", "--dry-run", changes=with_docker(docker))
    assert built.returncode == 0, built.stderr
    assert "Created docker image: aws-ec2-stable_diffusion_fp32:" in built.stdout
    [call] = [call for call in calls(docker) if call.startswith("docker buildx build")]
    assert "--platform linux/amd64" in call
    assert (docker / "context").read_text().splitlines() == [
        "env/docker/Dockerfile",
        "src/service.py",
        "src/stable_diffusion/server/service.py",
    ]


def test_build_pushes_to_a_new_repository_and_writes_the_image_to_the_values(
    workplace: Workplace, docker: Path, docker_daemon: DockerDaemon, aws: StandInAws
) -> None:
    changes = with_docker(docker, DOCKER_HOST=docker_daemon.url, **aws.variables)
    workplace.bentoctl("generate")
    built = workplace.bentoctl("build", "-b", "stable_diffusion_fp32:latest", changes=changes)
    assert built.returncode == 0, built.stderr
    assert f"Created the repository {REPOSITORY}" in built.stdout
    [repository] = boto3.Session(region_name="us-west-1").client("ecr").describe_repositories()["repositories"]
    image_tag = re.search(r'^image_tag +=  *"(.*)"$', workplace.values, re.MULTILINE)
    assert image_tag is not None
    assert image_tag[1].startswith(f"{repository['repositoryUri']}:")
    pushed = [path for path in docker_daemon.asked if "/push" in path]
    assert len(pushed) == 1
    assert repository["repositoryUri"] in pushed[0]

    # A later generate keeps the image.
    assert workplace.bentoctl("generate").returncode == 0
    assert image_tag[0] in workplace.values


def test_an_image_too_large_for_the_disk_is_warned_of_after_the_build_and_at_every_generate(
    workplace: Workplace, docker: Path, docker_daemon: DockerDaemon, aws: StandInAws
) -> None:
    (docker / "size").write_text("31000000000\n")
    changes = with_docker(docker, DOCKER_HOST=docker_daemon.url, **aws.variables)
    built = workplace.bentoctl("build", "-b", "stable_diffusion_fp32:latest", changes=changes)
    assert built.returncode == 0, built.stderr
    warning = "Warning: spec.disk_size_gb: 120 GiB are probably too few for this image of 31.0 GB"
    assert warning in built.stderr
    again = workplace.bentoctl("generate", changes=changes)
    assert again.returncode == 0
    assert warning in again.stderr
    [image_tag] = re.findall(r'^image_tag +=  *"(.*)"$', workplace.values, re.MULTILINE)
    assert f"docker image inspect --format {{{{.Size}}}} {image_tag}" in calls(docker)
    configuration = workplace.folder / "deployment_config.yaml"
    configuration.write_text(configuration.read_text().replace("  # disk_size_gb: 120", "  disk_size_gb: 133"))
    enough = workplace.bentoctl("generate", changes=changes)
    assert enough.returncode == 0
    assert "Warning" not in enough.stderr


def test_build_without_credentials_explains_how_to_set_them(workplace: Workplace, docker: Path, docker_daemon: DockerDaemon) -> None:
    nobody = {"AWS_CONFIG_FILE": "/nonexistent", "AWS_SHARED_CREDENTIALS_FILE": "/nonexistent", "AWS_EC2_METADATA_DISABLED": "true"}
    refused = workplace.bentoctl(
        "build", "-b", "stable_diffusion_fp32:latest", changes=with_docker(docker, DOCKER_HOST=docker_daemon.url, **nobody)
    )
    assert refused.returncode == 1
    assert refused.stderr.strip().endswith(
        "Error: no AWS credentials: run `aws configure`, or set AWS_PROFILE, or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
    )


@pytest.mark.parametrize(
    ("script", "words"),
    [
        ('[[ "$1 $2" != "buildx version" ]]', "docker has no buildx plugin"),
        (
            '[[ $1 != version ]] || { echo "Cannot connect to the Docker daemon" >&2; exit 1; }',
            "the Docker daemon does not respond: Cannot connect to the Docker daemon",
        ),
    ],
)
def test_build_without_docker_says_what_is_missing(workplace: Workplace, docker: Path, script: str, words: str) -> None:
    stand_in(docker, "docker", script)
    refused = workplace.bentoctl("build", "-b", "stable_diffusion_fp32:latest", "--dry-run", changes=with_docker(docker))
    assert refused.returncode == 1
    assert f"Error: {words}" in refused.stderr
    assert "Traceback" not in refused.stderr


@pytest.mark.skipif(TERRAFORM is None, reason="terraform is not on PATH; bentoctl destroy calls it")
def test_destroy_deletes_the_repository_when_nothing_is_deployed(workplace: Workplace, aws: StandInAws) -> None:
    client = boto3.Session(region_name="us-west-1").client("ecr")
    client.create_repository(repositoryName=REPOSITORY)
    elsewhere = workplace.bentoctl("destroy", changes=aws.variables)
    assert elsewhere.returncode == 1
    assert f"this folder has no bentoctl.tfvars, so the images of {REPOSITORY} were kept" in elsewhere.stderr
    assert len(client.describe_repositories()["repositories"]) == 1
    workplace.bentoctl("generate")
    destroyed = workplace.bentoctl("destroy", changes=aws.variables)
    assert destroyed.returncode == 0, destroyed.stderr
    assert f"Deleted the repository {REPOSITORY}" in destroyed.stdout
    assert client.describe_repositories()["repositories"] == []


@pytest.mark.skipif(TERRAFORM is None, reason="terraform is not on PATH; bentoctl destroy calls it")
def test_an_unconfirmed_or_failed_destroy_keeps_the_images(workplace: Workplace, aws: StandInAws) -> None:
    assert TERRAFORM is not None
    client = boto3.Session(region_name="us-west-1").client("ecr")
    client.create_repository(repositoryName=REPOSITORY)
    # A deployment that needs no provider: Terraform keeps its output in the state, as with the real one.
    (workplace.folder / "main.tf").write_text(MACHINE)
    (workplace.folder / "bentoctl.tfvars").write_text(f'deployment_name = "{REPOSITORY}"\n')
    (workplace.folder / "broken").touch()
    (workplace.folder / ".terraform").mkdir()  # init creates it if there is a provider
    subprocess.run(
        [TERRAFORM, "apply", "-auto-approve", "-var-file", "bentoctl.tfvars"],
        cwd=workplace.folder,
        capture_output=True,
        check=True,
        timeout=60,
    )
    kept = workplace.bentoctl("destroy", changes=aws.variables)
    assert kept.returncode == 1
    left = f"1 resources of the deployment still exist (terraform_data.machine, ...), so its image repository {REPOSITORY} was kept"
    assert left in kept.stderr
    assert len(client.describe_repositories()["repositories"]) == 1

    # Terraform removes the outputs from its state before it fails, and bentoctl reads only those.
    for _ in range(2):
        failed = workplace.bentoctl("destroy", "--auto-approve", changes=aws.variables)
        assert failed.returncode == 1
        assert left in failed.stderr
        assert "Run: terraform apply -destroy -var-file bentoctl.tfvars" in failed.stderr
    assert len(client.describe_repositories()["repositories"]) == 1

    (workplace.folder / "broken").unlink()
    command = [TERRAFORM, "apply", "-destroy", "-auto-approve", "-var-file", "bentoctl.tfvars"]
    subprocess.run(command, cwd=workplace.folder, capture_output=True, check=True, timeout=60)
    gone = workplace.bentoctl("destroy", "--auto-approve", changes=aws.variables)
    assert gone.returncode == 0, gone.stderr
    assert client.describe_repositories()["repositories"] == []
