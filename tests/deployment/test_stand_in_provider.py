"""The stand-in for the AWS provider has the real provider's schema, and Terraform refuses configurations that do not match it."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.deployment.aws_schema import PROVIDER_ADDRESS, read_schema
from tests.deployment.terraform import PROVIDER_PROGRAM, SCHEMA_WHEEL, StandIn, find_terraform, prepare

needs_wheel = pytest.mark.skipif(not SCHEMA_WHEEL.exists(), reason="the wheel with the AWS provider's schema is not there")
needs_terraform = pytest.mark.skipif(find_terraform() is None, reason="terraform is not installed")

REQUIRED_PROVIDER = """
terraform {
  required_providers {
    aws = {
      source = "hashicorp/aws"
    }
  }
}
"""

CONFIGURATION = (
    REQUIRED_PROVIDER
    + """
provider "aws" {
  region = "eu-central-1"
}

module "boot" {
  source = "./boot"
  name   = "service"
}

data "aws_ssm_parameter" "image" {
  name = "/images/gpu"
}

resource "aws_iam_role" "service" {
  name               = "service"
  assume_role_policy = jsonencode({ Version = "2012-10-17", Statement = [] })
}

resource "aws_security_group" "service" {
  ingress {
    from_port   = 80
    to_port     = 80
    protocol    = "tcp"
    cidr_blocks = ["0.0.0.0/0"]
  }
}

resource "aws_lb_listener" "service" {
  load_balancer_arn = "balancer"

  default_action {
    type = "fixed-response"
  }
}

resource "aws_instance" "service" {
  ami                    = data.aws_ssm_parameter.image.value
  instance_type          = "g5.xlarge"
  user_data              = module.boot.script
  vpc_security_group_ids = [aws_security_group.service.id]

  root_block_device {
    volume_size = 60
  }

  timeouts {
    create = "20m"
  }
}

output "arn" {
  value = aws_instance.service.arn
}
"""
)

BOOT_MODULE = """
variable "name" {
  type = string
}

output "script" {
  value = "echo ${var.name}"
}
"""

PASSING_TEST = """
mock_provider "aws" {
  mock_data "aws_ssm_parameter" {
    defaults = {
      value = "ami-1"
    }
  }
}

run "plan" {
  command = plan

  assert {
    condition     = aws_instance.service.user_data == "echo service"
    error_message = "The script is another."
  }
}

run "apply" {
  assert {
    condition     = nonsensitive(aws_instance.service.ami) == "ami-1" && output.arn != ""
    error_message = "The mock provider did not fill in what AWS decides."
  }
}
"""

FAILING_TEST = """
mock_provider "aws" {}

run "plan" {
  command = plan

  assert {
    condition     = aws_instance.service.root_block_device[0].volume_size == 61
    error_message = "The volume is too small."
  }
}
"""

SECRET_OUTPUT = """
output "image" {
  value = data.aws_ssm_parameter.image.value
}
"""


@pytest.fixture(scope="module")
def schema() -> dict[str, Any]:
    resource_types = ["aws_instance", "aws_autoscaling_group", "aws_lb_target_group", "aws_iam_role", "aws_security_group", "aws_nothing"]
    document = read_schema(SCHEMA_WHEEL, [*resource_types, "aws_ssm_parameter"], ["aws_ssm_parameter", "aws_ami"])
    provider: dict[str, Any] = document["provider_schemas"][PROVIDER_ADDRESS]
    return provider


@pytest.fixture(scope="module")
def configuration(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("configuration")
    (folder / "main.tf").write_text(CONFIGURATION, encoding="utf-8")
    (folder / "boot").mkdir()
    (folder / "boot" / "main.tf").write_text(BOOT_MODULE, encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def stand_in(configuration: Path, tmp_path_factory: pytest.TempPathFactory) -> StandIn:
    return prepare(configuration, tmp_path_factory.mktemp("stand_in"))


def resource(schema: dict[str, Any], name: str) -> dict[str, Any]:
    block: dict[str, Any] = schema["resource_schemas"][name]["block"]
    return block


def errors(stand_in: StandIn, folder: Path) -> list[tuple[str, str]]:
    """Summary and detail of each error that `terraform validate` finds."""
    diagnostics = json.loads(stand_in.run(folder, "validate", "-json").stdout)["diagnostics"]
    return [(found["summary"], found["detail"]) for found in diagnostics if found["severity"] == "error"]


@needs_wheel
def test_the_schema_of_an_instance(schema: dict[str, Any]) -> None:
    instance = resource(schema, "aws_instance")
    attributes, blocks = instance["attributes"], instance["block_types"]
    assert attributes["ami"] == {"type": "string", "optional": True, "computed": True}
    assert attributes["arn"] == {"type": "string", "computed": True}
    assert attributes["user_data"] == {"type": "string", "optional": True}
    assert attributes["vpc_security_group_ids"]["type"] == ["set", "string"]
    assert attributes["ipv6_addresses"]["type"] == ["list", "string"]
    assert attributes["tags_all"]["type"] == ["map", "string"]
    assert attributes["monitoring"]["type"] == "bool"
    assert not attributes.keys() & {"count", "connection", "depends_on", "for_each", "lifecycle", "provider", "provisioners", "scope"}

    root = blocks["root_block_device"]
    assert (root["nesting_mode"], root["max_items"]) == ("list", 1)
    assert root["block"]["attributes"]["volume_size"] == {"type": "number", "optional": True, "computed": True}
    assert root["block"]["attributes"]["device_name"] == {"type": "string", "computed": True}
    assert blocks["ebs_block_device"]["nesting_mode"] == "set"
    assert "max_items" not in blocks["ebs_block_device"]
    assert blocks["ebs_block_device"]["block"]["attributes"]["device_name"] == {"type": "string", "required": True}
    assert blocks["metadata_options"]["block"]["attributes"].keys() >= {"http_tokens", "http_endpoint", "http_put_response_hop_limit"}
    reservation = blocks["capacity_reservation_specification"]["block"]["block_types"]["capacity_reservation_target"]
    assert (reservation["nesting_mode"], reservation["max_items"]) == ("list", 1)
    assert blocks["timeouts"]["nesting_mode"] == "single"
    assert blocks["timeouts"]["block"]["attributes"].keys() == {"create", "read", "update", "delete"}


@needs_wheel
def test_the_schemas_of_other_resources(schema: dict[str, Any]) -> None:
    group = resource(schema, "aws_autoscaling_group")
    assert group["attributes"]["min_size"] == {"type": "number", "required": True}
    assert group["attributes"]["max_size"] == {"type": "number", "required": True}
    assert group["attributes"]["target_group_arns"]["type"] == ["set", "string"]
    assert group["attributes"]["vpc_zone_identifier"]["type"] == ["set", "string"]
    assert group["block_types"]["launch_template"]["max_items"] == 1
    assert group["block_types"]["tag"]["nesting_mode"] == "set"
    assert group["block_types"]["tag"]["block"]["attributes"]["propagate_at_launch"] == {"type": "bool", "required": True}

    health_check = resource(schema, "aws_lb_target_group")["block_types"]["health_check"]
    assert (health_check["nesting_mode"], health_check["max_items"]) == ("list", 1)
    assert health_check["block"]["attributes"]["interval"]["type"] == "number"
    assert health_check["block"]["attributes"]["matcher"]["type"] == "string"

    role = resource(schema, "aws_iam_role")["attributes"]
    assert role["name"] == {"type": "string", "optional": True, "computed": True}
    assert role["assume_role_policy"] == {"type": "string", "required": True}

    # Rules are an attribute that may be written as blocks.
    kind, (_, rule) = resource(schema, "aws_security_group")["attributes"]["ingress"]["type"]
    assert kind == "set"
    assert rule["self"] == "bool"
    assert rule["cidr_blocks"] == ["list", "string"]


@needs_wheel
def test_the_schemas_of_data_sources_and_the_provider(schema: dict[str, Any]) -> None:
    parameter = schema["data_source_schemas"]["aws_ssm_parameter"]["block"]["attributes"]
    assert parameter["name"] == {"type": "string", "required": True}
    assert parameter["value"] == {"type": "string", "computed": True, "sensitive": True}
    assert "value_wo" not in parameter
    assert resource(schema, "aws_ssm_parameter")["attributes"]["value_wo"]["write_only"]

    image = schema["data_source_schemas"]["aws_ami"]["block"]
    assert image["attributes"]["owners"] == {"type": ["list", "string"], "optional": True}
    assert image["block_types"]["filter"]["block"]["attributes"]["values"] == {"type": ["set", "string"], "required": True}
    kind, (_, product_code) = image["attributes"]["product_codes"]["type"]
    assert (kind, product_code.keys()) == ("set", {"product_code_id", "product_code_type"})

    provider = schema["provider"]["block"]
    assert provider["attributes"]["region"] == {"type": "string", "optional": True}
    assert "alias" not in provider["attributes"]
    assert provider["block_types"]["default_tags"]["block"]["attributes"]["tags"]["type"] == ["map", "string"]

    assert "aws_nothing" not in schema["resource_schemas"]


@needs_terraform
@needs_wheel
def test_a_good_configuration_is_valid(stand_in: StandIn, configuration: Path) -> None:
    before = sorted(configuration.rglob("*"))
    assert errors(stand_in, configuration) == []
    assert sorted(configuration.rglob("*")) == before


@needs_terraform
@needs_wheel
@pytest.mark.parametrize(
    ("mistake", "summary", "name"),
    [
        pytest.param('instance_kind = "g5.xlarge"', "Unsupported argument", "instance_kind", id="unknown argument"),
        pytest.param("root_disk {}", "Unsupported block type", "root_disk", id="unknown block"),
        pytest.param("root_block_device {\n size = 60\n}", "Unsupported argument", "size", id="unknown argument in a block"),
        pytest.param("root_block_device {}\nroot_block_device {}", "Too many root_block_device blocks", "1", id="block twice"),
        pytest.param('root_block_device {\n volume_size = "large"\n}', "Incorrect attribute value type", "volume_size", id="wrong type"),
        pytest.param('vpc_security_group_ids = "sg-1"', "Incorrect attribute value type", "vpc_security_group_ids", id="not a set"),
        pytest.param('arn = "arn:aws:ec2"', "Read-only attribute", "arn", id="read-only attribute"),
        pytest.param('root_block_device {\n device_name = "sda"\n}', "Read-only attribute", "device_name", id="read-only in a block"),
        pytest.param("ami = var.image", "Reference to undeclared input variable", "image", id="undefined variable"),
        pytest.param("ami = aws_ami.image.id", "Reference to undeclared resource", "image", id="undefined resource"),
        pytest.param("}\noutput o {\n value = aws_instance.a.host", "Unsupported attribute", "host", id="unknown attribute"),
        pytest.param("}\nprovider aws {\n regio = 1", "Unsupported argument", "regio", id="unknown argument of the provider"),
        pytest.param("}\nresource aws_iam_role b {", "Missing required argument", "assume_role_policy", id="required argument"),
        pytest.param(
            '}\nresource aws_lb_listener b {\n load_balancer_arn = "b"', "Insufficient default_action blocks", "1", id="required block"
        ),
        pytest.param("}\nresource aws_server b {", "Invalid resource type", "aws_server", id="unknown resource type"),
    ],
)
def test_a_mistake_is_refused(stand_in: StandIn, tmp_path: Path, mistake: str, summary: str, name: str) -> None:
    (tmp_path / "main.tf").write_text(f'{REQUIRED_PROVIDER}\nresource "aws_instance" "a" {{\n{mistake}\n}}\n', encoding="utf-8")
    ((found_summary, detail),) = errors(stand_in, tmp_path)
    assert found_summary == summary
    assert name in detail


@needs_terraform
@needs_wheel
def test_plan_and_apply_run_with_mocks(stand_in: StandIn, configuration: Path) -> None:
    (configuration / "tests").mkdir()
    (configuration / "tests" / "service.tftest.hcl").write_text(PASSING_TEST, encoding="utf-8")
    finished = stand_in.run(configuration, "test")
    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert "2 passed, 0 failed" in finished.stdout


@needs_terraform
@needs_wheel
def test_a_wrong_assertion_fails(stand_in: StandIn, configuration: Path) -> None:
    (configuration / "failing.tftest.hcl").write_text(FAILING_TEST, encoding="utf-8")
    finished = stand_in.run(configuration, "test", "-filter=failing.tftest.hcl")
    assert finished.returncode == 1
    assert "The volume is too small." in finished.stdout + finished.stderr


@needs_terraform
@needs_wheel
def test_a_secret_in_an_output_is_refused(stand_in: StandIn, configuration: Path) -> None:
    (configuration / "outputs.tf").write_text(SECRET_OUTPUT, encoding="utf-8")
    (configuration / "failing.tftest.hcl").write_text('mock_provider "aws" {}\nrun "plan" {\n  command = plan\n}\n', encoding="utf-8")
    finished = stand_in.run(configuration, "test", "-filter=failing.tftest.hcl")
    (configuration / "outputs.tf").unlink()
    assert finished.returncode == 1
    assert "Output refers to sensitive values" in finished.stdout + finished.stderr


@needs_terraform
@needs_wheel
def test_nothing_can_be_planned_for_real(stand_in: StandIn, configuration: Path) -> None:
    finished = stand_in.run(configuration, "plan")
    assert finished.returncode == 1
    assert "PlanResourceChange" in finished.stderr


def test_the_plugin_refuses_to_be_started_by_hand() -> None:
    finished = subprocess.run([sys.executable, PROVIDER_PROGRAM, "schema.json"], capture_output=True, text=True, timeout=60)
    assert finished.returncode == 1
    assert "plugin" in finished.stderr
