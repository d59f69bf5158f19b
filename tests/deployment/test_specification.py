"""deployment_config.yaml through the operator's schema and checks: refused values by field name, and the resulting variables."""

from __future__ import annotations

from typing import Any

import cerberus
import click
import pytest
import yaml

from tests.http.servers import ROOT

IMAGE = "123456789012.dkr.ecr.us-west-1.amazonaws.com/stable-diffusion:abc123"
SECRET = "arn:aws:secretsmanager:us-west-1:123456789012:secret:stable-diffusion-AbCdEf"
REFERENCE = {  # the reference's own configuration, word for word
    "region": "us-west-1",
    "instance_type": "g4dn.xlarge",
    "ami_id": "ami-0a85a3a3fb34b3c7f",
    "enable_gpus": True,
}


def check(spec: dict[str, Any]) -> tuple[dict[str, Any] | None, dict[str, Any]]:
    """As bentoctl checks a spec: the normalised spec or None, and the errors by field."""
    import operator_config

    validator = cerberus.Validator()
    return validator.validated(spec, schema=without_help(operator_config.OPERATOR_SCHEMA)), validator.errors


def without_help(rules: Any) -> Any:
    """The schema without the help texts, which bentoctl removes before Cerberus sees it."""
    if not isinstance(rules, dict):
        return rules
    return {name: without_help(rule) for name, rule in rules.items() if name != "help_message"}


def variables(spec: dict[str, Any], name: str = "stable-diffusion", **more: Any) -> dict[str, Any]:
    from bentoctl_aws_ec2.specification import terraform_variables

    checked, errors = check({"region": "us-west-1", **spec})
    assert checked is not None, errors
    return terraform_variables(name, {**checked, **more})


def refusal(spec: dict[str, Any], name: str = "stable-diffusion", **more: Any) -> str:
    with pytest.raises(click.ClickException) as refused:
        variables(spec, name, **more)
    return refused.value.message


def test_the_references_configuration_is_valid() -> None:
    values = variables(REFERENCE)
    assert values["ami_id"] == "ami-0a85a3a3fb34b3c7f"
    assert values["enable_gpus"] is True
    assert values["allowed_cidrs"] == []


@pytest.mark.parametrize("file", sorted((ROOT / "bentoctl").glob("deployment_config*.yaml")), ids=lambda file: file.stem)
def test_every_configuration_in_the_repository_is_valid(file: Any) -> None:
    configuration = yaml.safe_load(file.read_text())
    values = variables(configuration["spec"], configuration["name"])
    assert values["region"] == configuration["spec"]["region"]


GB = 10**9
# Without weights 5.84 GB (docs/measurements.md). The weights: the parameters of diffusers' classes with the XL configuration.
XL_PARAMETERS = {"unet": 2_567_463_684, "text_encoder": 123_060_480, "text_encoder_2": 694_659_840, "vae": 83_653_863}


@pytest.mark.parametrize(("value_bytes", "disk_size_gb"), [(2, 120), (4, 150)])
def test_the_disk_of_the_xl_configuration_holds_the_image_with_its_weights(value_bytes: int, disk_size_gb: int) -> None:
    from bentoctl_aws_ec2.specification import disk_warning

    text = (ROOT / "bentoctl" / "deployment_config_sdxl.yaml").read_text()
    spec = yaml.safe_load(text)["spec"]
    assert spec["instance_type"] in ("g5.xlarge", "g6.xlarge")  # 24 GB on the GPU
    assert spec["disk_size_gb"] == 120
    assert "In float32: 150." in text
    image = round(5.84 * GB) + value_bytes * sum(XL_PARAMETERS.values())
    assert disk_warning(disk_size_gb, image) is None


@pytest.mark.parametrize(("image_bytes", "needed"), [(22 * 2**30, 119), (45 * 2**29, 120), (45 * 2**29 + 1, 121), (60 * 10**9, 187)])
def test_a_disk_that_is_too_small_for_the_image_is_warned_of_with_the_size_that_is_needed(image_bytes: int, needed: int) -> None:
    from bentoctl_aws_ec2.specification import disk_warning

    assert disk_warning(needed, image_bytes) is None
    warning = disk_warning(needed - 1, image_bytes)
    assert warning is not None
    assert warning.startswith(f"spec.disk_size_gb: {needed - 1} GiB are probably too few")
    assert f"Set disk_size_gb to {needed} or more" in warning


def test_the_commented_configuration_mentions_every_field() -> None:
    import operator_config

    text = (ROOT / "bentoctl" / "deployment_config.yaml").read_text()
    missing = [field for field in operator_config.OPERATOR_SCHEMA if f"\n  {field}:" not in text and f"\n  # {field}:" not in text]
    assert missing == []


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("region", "us-wst-1", "did you mean us-west-1"),
        ("region", "", "is not an AWS region"),
        ("instance_type", "g4d.xlarge", "no instance family 'g4d'; did you mean g4dn"),
        ("instance_type", "g4dn.xlarg", "has the sizes 12xlarge, 16xlarge, 2xlarge, 4xlarge, 8xlarge, metal, xlarge"),
        ("instance_type", "p3.2xlarge", "V100 GPUs are too old"),
        ("instance_type", "g5g.xlarge", "ARM processor"),
        ("instance_type", "g4ad.xlarge", "it has AMD GPUs"),
        ("instance_type", 4, "string"),
        ("enable_gpus", "maybe", "must be yes or no, got 'maybe'"),
        ("ami_id", "ami-123", "is not an AMI id"),
        ("disk_size_gb", 8, "min value is 100"),
        ("disk_size_gb", "big", "must be a whole number, got 'big'"),
        ("disk_size_gb", True, "must be a whole number, got True"),
        ("api_key_arn", "my-secret", "neither the ARN"),
        ("shared_state", "perhaps", "must be yes or no, got 'perhaps'"),
        ("certificate_arn", "arn:aws:iam::123456789012:server-certificate/x", "not the ARN of an ACM certificate"),
        ("idle_stop_minutes", 5, "must be 0 (never) or 15 to 10080"),
        ("instances", {"min": 3, "max": 1}, "min 3 is more than max 1"),
        ("instances", {"min": 1}, "needs both min and max"),
        ("instances", {"min": 0, "max": 1}, "min value is 1"),
        ("instances", {"min": 1, "max": 2, "desired": 1}, "unknown field"),
        ("allowed_cidrs", ["203.0.113.7"], "write one address as 203.0.113.7/32"),
        ("allowed_cidrs", ["10.0.0.1/8"], "has host bits set"),
        ("allowed_cidrs", ["2001:db8::/32"], "the server has no IPv6 address"),
        ("allowed_cidrs", ["300.1.1.1/32"], "is not a CIDR block"),
        ("allowed_cidrs", "0.0.0.0/0", "must be of list type"),
        ("subnet_ids", ["vpc-0123456789abcdef0"], "is not a subnet id"),
        ("environment_variables", [{"name": "A B", "value": "x"}], "is not a valid environment variable name"),
        ("environment_variables", [{"name": "A", "value": "x\ny"}], "must be a single line"),
        ("environment_variables", [{"name": "A"}], "required field"),
        ("instance_typ", "g4dn.xlarge", "unknown field"),
    ],
)
def test_an_invalid_value_is_refused_with_the_name_of_its_field(field: str, value: object, words: str) -> None:
    checked, errors = check({"region": "us-west-1", field: value})
    assert checked is None
    assert list(errors) == [field]
    assert words in str(errors[field]).replace('\\"', '"')


def test_values_typed_at_init_mean_the_same_as_in_yaml() -> None:
    typed = {"enable_gpus": "no", "disk_size_gb": "200", "instances": {"min": "1", "max": "2"}, "shared_state": "yes"}
    assert variables(typed) == variables(
        {"enable_gpus": False, "disk_size_gb": 200, "instances": {"min": 1, "max": 2}, "shared_state": True}
    )


def test_an_empty_field_means_the_same_as_an_omitted_one() -> None:
    empty = dict.fromkeys(["ami_id", "api_key_arn", "certificate_arn", "instances", "enable_gpus"])
    assert variables(empty) == variables({})


def test_gpus_are_enabled_by_default_if_the_instance_type_has_them() -> None:
    assert variables({"instance_type": "g5.xlarge"})["enable_gpus"] is True
    assert variables({"instance_type": "c7i.2xlarge"})["enable_gpus"] is False


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ({"instance_type": "c7i.large", "enable_gpus": True}, "spec.enable_gpus: c7i.large has no NVIDIA GPU"),
        (
            {"certificate_arn": "arn:aws:acm:us-west-1:123456789012:certificate/0123-abcd"},
            "spec.certificate_arn: needs a load balancer, so set instances",
        ),
        ({"idle_stop_minutes": 30, "instances": {"min": 1, "max": 1}}, "spec.idle_stop_minutes: cannot be combined with instances"),
        ({"shared_state": True}, "spec.shared_state: needs machines that share it, so set instances with a max of 2 or more"),
        ({"shared_state": True, "instances": {"min": 1, "max": 1}}, "spec.shared_state: needs machines that share it"),
        (
            {
                "shared_state": True,
                "instances": {"min": 1, "max": 2},
                "environment_variables": [{"name": "SD_SHARED_STATE", "value": "rediss://:x@store.example"}],
            },
            "spec.environment_variables: SD_SHARED_STATE cannot be combined with shared_state",
        ),
        ({"idle_stop_minutes": 30, "spot": True}, "spec.idle_stop_minutes: cannot be combined with spot"),
        (
            {"subnet_ids": ["subnet-01234567"], "instances": {"min": 1, "max": 1}},
            "spec.subnet_ids: a load balancer needs subnets in at least",
        ),
    ],
)
def test_contradictory_fields_are_refused(spec: dict[str, Any], words: str) -> None:
    assert words in refusal(spec)


def test_all_problems_are_reported_at_once() -> None:
    message = refusal({"idle_stop_minutes": 30, "spot": True, "instance_type": "c7i.large", "enable_gpus": True}, "Stable_Diffusion")
    assert [line.split(":")[0] for line in message.splitlines()[1:]] == ["  - name", "  - spec.enable_gpus", "  - spec.idle_stop_minutes"]


@pytest.mark.parametrize(
    "name", ["Stable-Diffusion", "sd/fp32", "sd_fp32", "-sd", "sd-", "s", "1sd", "sd--fp32", "internal-sd", "sg-sd", "s" * 33, "a:b"]
)
def test_a_name_that_aws_would_refuse_is_refused(name: str) -> None:
    assert refusal({}, name).splitlines()[1].startswith(f"  - name: {name!r}")


@pytest.mark.parametrize("name", ["sd", "stable-diffusion-bentoml-tokyo", "s" * 32, "sd-2"])
def test_a_valid_name_is_accepted(name: str) -> None:
    assert variables({}, name)["deployment_name"] == name


@pytest.mark.parametrize(
    ("image_tag", "words"),
    [
        ("localhost:5000/stable-diffusion:1", "without a port"),
        ("123456789012.dkr.ecr.us-west-1.amazonaws.com:443/stable-diffusion:1", "without a port"),
        ("123456789012.dkr.ecr.us-west-1.amazonaws.com/team/stable-diffusion:1", "a single name after the slash"),
        ("stable-diffusion:1", "is not an image in Amazon ECR"),
        ("123456789012.dkr.ecr.us-east-1.amazonaws.com/stable-diffusion:1", "the image is in us-east-1 and spec.region is us-west-1"),
        ("123456789012.dkr.ecr.us-west-1.amazonaws.com/other:1", "the repository is other and the deployment is stable-diffusion"),
    ],
)
def test_an_image_from_another_repository_is_refused(image_tag: str, words: str) -> None:
    message = refusal({}, image_tag=image_tag)
    assert "image_tag: " in message
    assert words in message


def test_an_image_from_the_deployments_own_repository_is_accepted() -> None:
    assert variables({}, image_tag=IMAGE)["image_tag"] == IMAGE


def test_environment_variables_from_both_fields_reach_the_container() -> None:
    spec = {"environment_variables": [{"name": "SD_MODEL", "value": "demo"}]}
    assert variables(spec, env={"OTHER": "1"})["environment_variables"] == {
        "SD_MODEL": "demo",
        "OTHER": "1",
        "SD_WITHOUT_KEYS": "1",
    }
    assert "SD_MODEL is also in env" in refusal(spec, env={"SD_MODEL": "x"})
    assert "the value of OTHER must be a single line" in refusal(spec, env={"OTHER": "x\ny"})


def environment(**spec: Any) -> dict[str, str]:
    found: dict[str, str] = variables(spec)["environment_variables"]
    return found


def setting(name: str, value: str) -> list[dict[str, str]]:
    return [{"name": name, "value": value}]


def test_an_unreachable_server_starts_without_keys() -> None:
    assert environment() == {"SD_WITHOUT_KEYS": "1"}
    assert environment(environment_variables=setting("SD_WITHOUT_KEYS", "1")) == {"SD_WITHOUT_KEYS": "1"}
    assert environment(environment_variables=setting("SD_WITHOUT_KEYS", "true")) == {"SD_WITHOUT_KEYS": "true"}
    assert "SD_WITHOUT_KEYS must be 1" in refusal({"environment_variables": setting("SD_WITHOUT_KEYS", "0")})


def test_with_keys_the_machine_can_still_read_the_metrics() -> None:
    cidrs = ["203.0.113.7/32"]
    assert environment(api_key_arn=SECRET, allowed_cidrs=cidrs) == {"SD_OPEN": "metrics"}
    own = setting("SD_OPEN", "docs, metrics")
    assert environment(api_key_arn=SECRET, environment_variables=own) == {"SD_OPEN": "docs, metrics"}
    digest = f"alice:sha256:{'0' * 64}"
    given = setting("SD_API_KEYS", digest)
    assert environment(allowed_cidrs=cidrs, environment_variables=given) == {"SD_API_KEYS": digest, "SD_OPEN": "metrics"}
    closed = {"api_key_arn": SECRET, "environment_variables": setting("SD_OPEN", "docs")}
    assert "spec.environment_variables: SD_OPEN must include metrics" in refusal(closed)


def test_keys_must_be_given_in_exactly_one_working_way() -> None:
    """The container does not have the operator's key file, and of two values of a variable Docker silently takes one."""
    file = setting("SD_API_KEYS_FILE", "/run/keys")
    for spec in ({}, {"allowed_cidrs": ["203.0.113.7/32"]}, {"api_key_arn": SECRET}):
        assert "SD_API_KEYS_FILE names a file" in refusal({**spec, "environment_variables": file})
    assert "SD_API_KEYS_FILE" not in refusal({"allowed_cidrs": ["203.0.113.7/32"]})
    twice = {"api_key_arn": SECRET, "environment_variables": setting("SD_API_KEYS", "alice:0123456789abcdef")}
    assert "SD_API_KEYS cannot be combined with api_key_arn" in refusal(twice)


def test_a_reachable_server_without_keys_needs_an_explicit_setting() -> None:
    cidrs = ["0.0.0.0/0"]
    message = refusal({"allowed_cidrs": cidrs})
    assert "spec.allowed_cidrs: everyone in these blocks could generate images without an API key. Give api_key_arn" in message
    meant = {"environment_variables": setting("SD_WITHOUT_KEYS", "1")}
    assert environment(allowed_cidrs=cidrs, **meant) == {"SD_WITHOUT_KEYS": "1"}
    assert variables({"allowed_cidrs": cidrs}, env={"SD_WITHOUT_KEYS": "1"})["environment_variables"] == {"SD_WITHOUT_KEYS": "1"}


def test_every_question_of_init_has_a_help_text() -> None:
    import operator_config

    def questions(rules: dict[str, Any]) -> list[dict[str, Any]]:
        inner = rules.get("schema", {})
        if rules["type"] == "list":
            return questions(inner)
        return [question for rule in inner.values() for question in questions(rule)] if rules["type"] == "dict" else [rules]

    schema: dict[str, Any] = dict(operator_config.OPERATOR_SCHEMA)
    asked = [question for rules in schema.values() for question in questions(rules)]
    assert len(asked) == len(schema) + 2  # environment_variables and instances ask twice
    assert all(len(question["help_message"]) > 20 for question in asked)
