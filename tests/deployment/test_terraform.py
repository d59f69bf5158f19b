"""The Terraform that the operator writes: real Terraform validates, plans and renders it, with a stand-in for the AWS provider.

What needs no provider (locals.tf, boot/) Terraform really evaluates. With the real provider everything runs where it can be had.
"""

from __future__ import annotations

import base64
import gzip
import json
import re
import shutil
import subprocess
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hcl2
import pytest
import yaml

from tests.deployment.commands import TEMPLATES, TOOLS
from tests.deployment.terraform import SCHEMA_WHEEL, StandIn, find_terraform, prepare
from tests.http.servers import ROOT

TERRAFORM = find_terraform()
TESTS = sorted(Path(__file__).parent.glob("*.tftest.hcl"))
needs_terraform = pytest.mark.skipif(TERRAFORM is None, reason="terraform is not on PATH")
needs_schema = pytest.mark.skipif(not SCHEMA_WHEEL.exists(), reason="the AWS provider's schema is not there: make test fetches it")
SPECIFICATION: dict[str, Any] = {
    "region": "us-west-1",
    "instance_type": "g4dn.xlarge",
    "disk_size_gb": 120,
    "spot": False,
    "idle_stop_minutes": 0,
    "shared_state": False,
    "allowed_cidrs": ["203.0.113.7/32"],
    "subnet_ids": [],
    "environment_variables": [{"name": "SD_WITHOUT_KEYS", "value": "1"}],
    "image_tag": "123456789012.dkr.ecr.us-west-1.amazonaws.com/stable-diffusion:abc",
}


def write_deployment(folder: Path, **changes: Any) -> None:
    """What `bentoctl generate` writes, without bentoctl."""
    from bentoctl_aws_ec2.generate import write_templates

    write_templates(folder)
    write_values_for(folder, **changes)


def write_values_for(folder: Path, **changes: Any) -> Path:
    from bentoctl_aws_ec2.generate import write_values
    from bentoctl_aws_ec2.specification import terraform_variables

    return write_values(folder, terraform_variables("stable-diffusion", SPECIFICATION | changes))


def parsed(name: str) -> dict[str, Any]:
    return hcl2.loads((TEMPLATES / name).read_text())


def named(blocks: list[dict[str, Any]]) -> dict[str, Any]:
    """hcl2's list of {'"name"': body} as one dictionary by plain names."""
    return {name.strip('"'): body for block in blocks for name, body in block.items() if not name.startswith("__")}


@needs_terraform
def test_all_files_are_formatted_by_terraform_fmt(tmp_path: Path) -> None:
    write_deployment(tmp_path, env={"A": 'quote " dollar ${x} percent %{y}'}, instances={"min": 1, "max": 2})
    for folder in (tmp_path, Path(__file__).parent):
        finished = run(folder, "fmt", "-check", "-diff", "-recursive")
        assert (finished.returncode, finished.stdout) == (0, ""), finished.stderr


def run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Terraform without any provider."""
    assert TERRAFORM is not None
    return subprocess.run(
        [str(TERRAFORM), *arguments], cwd=folder, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=120, check=False
    )


def test_every_variable_is_typed_described_and_checked_and_has_no_default() -> None:
    for name, body in named(parsed("variables.tf")["variable"]).items():
        assert len(body["description"]) > 20, name
        assert "type" in body, name
        assert "default" not in body, f"{name}: bentoctl.tfvars gives every value"
        assert "validation" in body or body["type"] == "bool", name


def test_every_output_is_described() -> None:
    for file in ("outputs.tf", "boot/main.tf"):
        assert all(len(body["description"]) > 10 for body in named(parsed(file)["output"]).values())


def test_the_values_file_sets_exactly_the_declared_variables(tmp_path: Path) -> None:
    write_deployment(tmp_path)
    given = {name for name in hcl2.loads((tmp_path / "bentoctl.tfvars").read_text()) if not name.startswith("__")}
    assert given == set(named(parsed("variables.tf")["variable"]))


@needs_schema
def test_the_provider_is_pinned_to_the_version_whose_schema_is_checked() -> None:
    assert '"~> 6.25"' in (TEMPLATES / "versions.tf").read_text()
    with zipfile.ZipFile(SCHEMA_WHEEL) as wheel:
        assert "providers/hashicorp/aws/6.25.0/" in wheel.read("cdktf_cdktf_provider_aws/instance/__init__.py").decode()


@contextmanager
def operator_on_the_path() -> Iterator[None]:
    """For what outlives a test, and so the fixture of conftest.py."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.syspath_prepend(str(TEMPLATES.parents[1]))
        yield


@dataclass(frozen=True)
class Deployment:
    folder: Path
    stand_in: StandIn


@pytest.fixture(scope="module")
def deployment(tmp_path_factory: pytest.TempPathFactory) -> Deployment:
    """The templates and their Terraform tests in one folder, with the stand-in provider; the waiting program only checks its arguments."""
    folder = tmp_path_factory.mktemp("deployment") / "configuration"
    shutil.copytree(TEMPLATES, folder)
    for file in TESTS:
        shutil.copy(file, folder)
    shutil.copytree(Path(__file__).with_name("mocks"), folder / "mocks")
    with operator_on_the_path():
        values = write_values_for(folder)
    values.rename(folder / "terraform.tfvars")  # the tests' variables, but for what a test changes
    program = folder / "wait_until_ready.py"
    assert "        wait(given)\n" in program.read_text()
    program.write_text(program.read_text().replace("        wait(given)\n", "        print(given)\n"))
    return Deployment(folder, prepare(folder, tmp_path_factory.mktemp("provider")))


@needs_terraform
@needs_schema
def test_every_argument_block_and_reference_matches_the_providers_schema(deployment: Deployment) -> None:
    validated = deployment.stand_in.run(deployment.folder, "validate", "-json")
    assert json.loads(validated.stdout)["error_count"] == 0, validated.stdout


@needs_terraform
@needs_schema
@pytest.mark.parametrize("file", [file.name for file in TESTS])
def test_the_plans_pass_their_assertions(deployment: Deployment, file: str) -> None:
    tested = deployment.stand_in.run(deployment.folder, "test", f"-filter={file}")
    assert tested.returncode == 0, tested.stdout + tested.stderr
    runs = len(re.findall(r'^run "', (deployment.folder / file).read_text(), re.MULTILINE))
    assert f"Success! {runs} passed, 0 failed." in tested.stdout


@needs_terraform
def test_the_real_provider_accepts_the_configuration(tmp_path: Path) -> None:
    shutil.copytree(TEMPLATES, tmp_path / "configuration")
    initialised = run(tmp_path / "configuration", "init", "-backend=false", "-input=false")
    if "registry.terraform.io" in initialised.stderr:
        pytest.skip("Terraform's registry cannot be reached from here, so the real AWS provider was not asked")
    assert initialised.returncode == 0, initialised.stderr
    validated = run(tmp_path / "configuration", "validate", "-json")
    assert json.loads(validated.stdout)["error_count"] == 0, validated.stdout


# Real Terraform evaluates the rest without any provider.


def evaluate(folder: Path, **changes: Any) -> dict[str, Any]:
    """The locals that depend only on the variables, and the boot module's outputs, for a configuration."""
    folder.mkdir(exist_ok=True)
    for name in ("variables.tf", "locals.tf"):
        shutil.copy(TEMPLATES / name, folder)
    shutil.copytree(TEMPLATES / "boot", folder / "boot", dirs_exist_ok=True)
    boot = re.search(r'^module "boot" \{.*?^\}', (TEMPLATES / "main.tf").read_text(), re.MULTILINE | re.DOTALL)
    assert boot is not None
    names = named(parsed("locals.tf")["locals"])
    outputs = "\n".join(f'output "{name}" {{\n  value = local.{name}\n}}' for name in names)
    # Only the digest of the image, the address of the store and the ARN of its password come from AWS.
    module = boot[0]
    for value, known in (
        ("image", '"${local.image_registry}/${local.image_repository}@sha256:0123"'),
        ("store_address", 'var.shared_state ? "store.example:6379" : ""'),
        ("store_password_arn", 'var.shared_state ? "arn:aws:secretsmanager:us-west-1:123456789012:secret:sd-store-AbCdEf" : ""'),
    ):
        assert module.count(f"local.{value}\n") == 1
        module = module.replace(f"local.{value}\n", f"{known}\n")
    users = '\noutput "user_data" {\n  value = module.boot.user_data\n}\noutput "plain" {\n  value = module.boot.plain_user_data\n}\n'
    (folder / "main.tf").write_text(f"{module}\n{outputs}\n{users}")
    write_values_for(folder, **changes)
    for command in (["init"], ["apply", "-auto-approve", "-var-file", "bentoctl.tfvars"]):
        finished = run(folder, *command)
        assert finished.returncode == 0, finished.stdout + finished.stderr
    answer = json.loads(run(folder, "output", "-json").stdout)
    return {name: output["value"] for name, output in answer.items()}


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    variables = {"PLAIN": "demo", "HARD": """quote " dollar ${x} percent %{y} apostrophe ' back \\ slash"""}
    with operator_on_the_path():
        evaluated = evaluate(
            tmp_path_factory.mktemp("single"),
            env=variables,
            environment_variables=[],
            api_key_arn="arn:aws:ssm:us-west-1:123456789012:parameter/key",
            idle_stop_minutes=30,
        )
    return evaluated | {"given": {"SD_OPEN": "metrics", **variables}}


def files_of(user_data: str) -> dict[str, dict[str, str]]:
    return {file["path"]: file for file in yaml.safe_load(user_data)["write_files"]}


@needs_terraform
def test_names_and_switches_follow_from_the_variables(single: dict[str, Any], tmp_path: Path) -> None:
    assert single["single"] is True
    assert (single["image_registry"], single["image_repository"], single["image_version"]) == (
        "123456789012.dkr.ecr.us-west-1.amazonaws.com",
        "stable-diffusion",
        "abc",
    )
    assert (single["uses_secrets_manager"], single["uses_ssm_parameter"]) == (False, True)
    assert (single["scheme"], single["public_port"]) == ("http", 80)
    assert single["global_name"] == "stable-diffusion-us-west-1"
    group = evaluate(
        tmp_path / "group",
        instances={"min": 1, "max": 2},
        certificate_arn="arn:aws:acm:us-west-1:123456789012:certificate/01234567-89ab-cdef-0123-456789abcdef",
    )
    assert (group["single"], group["scheme"], group["public_port"]) == (False, "https", 443)
    assert "AUTO_SCALING_GROUP='stable-diffusion'\n" in files_of(group["plain"])["/etc/stable-diffusion/settings"]["content"]
    assert group["leave_timeout_s"] > group["longest_request_s"]
    assert group["leave_timeout_s"] <= 7200, "the most that AWS allows"


@needs_terraform
def test_the_user_data_of_a_group_with_shared_state_says_where_the_password_is_and_not_what_it_is(tmp_path: Path) -> None:
    shared = evaluate(tmp_path / "shared", instances={"min": 1, "max": 2}, shared_state=True)
    settings = files_of(shared["plain"])["/etc/stable-diffusion/settings"]["content"]
    assert "STORE_ADDRESS='store.example:6379'\n" in settings
    assert "STORE_PASSWORD_ARN='arn:aws:secretsmanager:us-west-1:123456789012:secret:sd-store-AbCdEf'\n" in settings
    # What knows the password is not among the settings, nor in an output.
    for name in ("main.tf", "outputs.tf"):
        assert not re.search(r"secret_string|random_password|auth_token", (TEMPLATES / name).read_text())


@needs_terraform
def test_the_costs_are_those_of_the_store_that_terraform_makes(single: dict[str, Any]) -> None:
    from bentoctl_aws_ec2 import costs

    assert (single["store_node_type"], single["store_nodes"]) == (costs.STORE_NODE_TYPE, costs.STORE_NODES)


@needs_terraform
def test_a_machine_drains_for_the_time_limit_of_a_request(single: dict[str, Any]) -> None:
    for precision in ("fp32", "fp16"):
        configuration = yaml.safe_load((ROOT / precision / "configuration.yaml").read_text())
        assert configuration["runners"]["traffic"]["timeout"] == single["longest_request_s"]


@needs_terraform
def test_the_user_data_fits_and_decodes_to_its_readable_form(single: dict[str, Any]) -> None:
    packed = base64.b64decode(single["user_data"])
    assert gzip.decompress(packed).decode() == single["plain"]
    assert len(packed) < 16384, "EC2's limit"


@needs_terraform
def test_the_user_data_contains_the_script_the_units_and_the_settings(single: dict[str, Any], tmp_path: Path) -> None:
    files = files_of(single["plain"])
    assert files["/usr/local/bin/stable-diffusion-machine"]["content"] == (TEMPLATES / "boot" / "machine.sh").read_text()
    assert files["/usr/local/bin/stable-diffusion-machine"]["permissions"] == "0755"
    environment = files["/etc/stable-diffusion/environment"]
    # docker --env-file takes everything after the first = literally.
    assert dict(line.split("=", 1) for line in environment["content"].splitlines()) == single["given"]
    assert environment["permissions"] == "0600"
    settings = tmp_path / "settings"
    settings.write_text(files["/etc/stable-diffusion/settings"]["content"])
    script = (TEMPLATES / "boot" / "machine.sh").read_text()
    needed = set(re.findall(r"\$\{([A-Z_]+):?\?\}", script)) - {"CONFIGURATION_DIRECTORY", "RUNTIME_DIRECTORY", "MAINPID"}
    sourced = subprocess.run(
        ["bash", "-euc", f"source {settings}; declare -p {' '.join(sorted(needed))}"], capture_output=True, text=True, check=True, env={}
    )
    assert 'API_KEY_ARN="arn:aws:ssm:us-west-1:123456789012:parameter/key"' in sourced.stdout
    assert 'IDLE_STOP_MINUTES="30"' in sourced.stdout
    assert {line.partition("=")[0] for line in settings.read_text().splitlines()} == needed


@needs_terraform
@pytest.mark.skipif(shutil.which("cloud-init") is None, reason="cloud-init is not installed")
def test_cloud_init_accepts_the_user_data(single: dict[str, Any], tmp_path: Path) -> None:
    file = tmp_path / "user-data"
    file.write_text(single["plain"])
    checked = subprocess.run(["cloud-init", "schema", "--config-file", str(file)], capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stdout + checked.stderr
    assert "Valid" in checked.stdout


@needs_terraform
@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed")
def test_systemd_accepts_the_units(single: dict[str, Any], tmp_path: Path) -> None:
    program = tmp_path / "stable-diffusion-machine"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    (tmp_path / "docker.service").write_text("[Service]\nExecStart=/bin/true\n")
    units = [file for path, file in files_of(single["plain"]).items() if path.startswith("/etc/systemd/system/")]
    assert len(units) == 3
    for unit in units:
        content = unit["content"].replace("/usr/local/bin/stable-diffusion-machine", str(program))
        (tmp_path / Path(unit["path"]).name).write_text(content)
    paths = [str(tmp_path / Path(unit["path"]).name) for unit in units]
    checked = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", "--recursive-errors=no", *paths],
        env={"SYSTEMD_UNIT_PATH": f"{tmp_path}:", "PATH": "/usr/bin:/bin:/usr/sbin:/sbin"},
        capture_output=True,
        text=True,
        check=False,
    )
    ours = [line for line in checked.stderr.splitlines() if "stable-diffusion" in line]
    assert (checked.returncode, ours) == (0, []), checked.stderr
    service = (tmp_path / "stable-diffusion.service").read_text()
    assert "TimeoutStopSec=3660" in service
    assert "Restart=always" in service


# checkov


def checkov(folder: Path) -> dict[str, Any]:
    finished = subprocess.run(
        [str(TOOLS / "checkov"), "-d", str(folder), "--framework", "terraform", "--skip-download", "--compact", "-o", "json"],
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )
    results: dict[str, Any] = json.loads(finished.stdout)["results"]
    return results


def test_checkov_finds_nothing_and_every_exception_is_needed_and_explained(tmp_path: Path) -> None:
    assert checkov(TEMPLATES)["failed_checks"] == []
    exceptions = [found for file in TEMPLATES.glob("*.tf") for found in re.findall(r"checkov:skip=(\w+):(.*)", file.read_text())]
    assert all(len(reason) > 20 for _, reason in exceptions)
    shutil.copytree(TEMPLATES, tmp_path / "bare")
    for file in (tmp_path / "bare").glob("*.tf"):
        file.write_text(re.sub(r".*checkov:skip=.*\n", "", file.read_text()))
    failed = {check["check_id"] for check in checkov(tmp_path / "bare")["failed_checks"]}
    assert failed == {check for check, _ in exceptions}
