"""A deployment's name and its `spec`, checked as a whole and turned into the values of the Terraform variables.

fields.py checks single fields. Does not use files, Docker or AWS.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

import click

from bentoctl_aws_ec2.fields import GPU_FAMILIES, instance_family

AMI_GIB = 75  # on the root disk
# The name of the repository, the load balancer (at most 32 characters) and, with the region, the IAM role.
DEPLOYMENT_NAME = re.compile(r"[a-z](?:[a-z0-9]|-(?=[a-z0-9])){1,31}")
IMAGE_TAG = re.compile(
    r"(?P<account>\d{12})\.dkr\.ecr\.(?P<region>[a-z0-9-]+)\.amazonaws\.com(?:\.cn)?/(?P<repository>[a-z0-9-]+):(?P<version>[\w][\w.-]{0,127})"
)


def terraform_variables(deployment_name: str, spec: Mapping[str, Any]) -> dict[str, object]:
    """The value of every variable of variables.tf. `spec` has passed the schema of operator_config.py.

    Raises click.ClickException, which names every field that is wrong and what is allowed.
    """
    problems = check_name(deployment_name) + check_combinations(spec)
    image_tag = spec.get("image_tag") or ""
    if image_tag:
        problems += check_image_tag(image_tag, deployment_name, spec["region"])
    if problems:
        raise click.ClickException("nothing was generated:\n" + "\n".join(f"  - {problem}" for problem in problems))
    return {
        "deployment_name": deployment_name,
        "region": spec["region"],
        "image_tag": image_tag,
        "instance_type": spec["instance_type"],
        "enable_gpus": uses_gpus(spec),
        "ami_id": spec.get("ami_id"),
        "disk_size_gb": spec["disk_size_gb"],
        "spot": spec["spot"],
        "idle_stop_minutes": spec["idle_stop_minutes"],
        "instances": instances(spec),
        "shared_state": spec["shared_state"],
        "certificate_arn": spec.get("certificate_arn"),
        "allowed_cidrs": spec["allowed_cidrs"],
        "subnet_ids": spec["subnet_ids"],
        "api_key_arn": spec.get("api_key_arn"),
        "environment_variables": environment_variables(spec),
    }


def disk_warning(disk_size_gb: int, image_bytes: int) -> str | None:
    """What to say if a root disk of `disk_size_gb` GiB is too small for an image of `image_bytes`; None if it is large enough."""
    # The machine pulls the image, and its layers are on the disk packed and unpacked. Weights can hardly be packed.
    needed = AMI_GIB + math.ceil(2 * image_bytes / 2**30)
    if disk_size_gb >= needed:
        return None
    return (
        f"spec.disk_size_gb: {disk_size_gb} GiB are probably too few for this image of {image_bytes / 10**9:.1f} GB: the AMI takes "
        f"{AMI_GIB} GiB, and the image is on the disk packed and unpacked. Set disk_size_gb to {needed} or more and generate again"
    )


def uses_gpus(spec: Mapping[str, Any]) -> bool:
    asked = spec.get("enable_gpus")
    return has_gpus(spec["instance_type"]) if asked is None else bool(asked)


def has_gpus(instance_type: str) -> bool:
    return instance_family(instance_type) in GPU_FAMILIES


def instances(spec: Mapping[str, Any]) -> dict[str, int] | None:
    """How many machines stand behind a load balancer; None: one machine without a load balancer."""
    asked = spec.get("instances") or {}
    return {"min": asked["min"], "max": asked["max"]} if asked.get("min") is not None else None


def environment_variables(spec: Mapping[str, Any]) -> dict[str, str]:
    """The container's environment: the configured variables, and those that the bento needs to start and the machine to watch it."""
    given = given_variables(spec)
    if has_keys(spec):
        # machine.sh reads the metrics, without a key.
        return {"SD_OPEN": "metrics", **given}
    # The server is reachable only through the tunnel, or check_keys has required this variable to be set on purpose.
    return {"SD_WITHOUT_KEYS": "1", **given}


def given_variables(spec: Mapping[str, Any]) -> dict[str, str]:
    """The variables of `environment_variables` and of bentoctl's own `env`, which it passes inside `spec`; both mean the same."""
    listed = {variable["name"]: variable["value"] for variable in spec["environment_variables"]}
    return listed | dict(spec.get("env") or {})


def has_keys(spec: Mapping[str, Any]) -> bool:
    """Whether the server has API keys. locals.tf has the same rule."""
    return bool(spec.get("api_key_arn") or given_variables(spec).get("SD_API_KEYS"))


def check_name(deployment_name: str) -> list[str]:
    if deployment_name.startswith(("internal-", "sg-")):
        return [f"name: {deployment_name!r}: AWS reserves names that begin with internal- or sg-"]
    if DEPLOYMENT_NAME.fullmatch(deployment_name):
        return []
    return [
        f"name: {deployment_name!r} must be 2 to 32 lower-case letters, digits and single hyphens, starting with a letter and not "
        "ending with a hyphen"
    ]


def check_combinations(spec: Mapping[str, Any]) -> list[str]:
    problems = []
    if spec.get("enable_gpus") and not has_gpus(spec["instance_type"]):
        problems.append(
            f"spec.enable_gpus: {spec['instance_type']} has no NVIDIA GPU; set enable_gpus to false, or instance_type to one of the "
            f"families {', '.join(GPU_FAMILIES)}"
        )
    grouped = instances(spec) is not None
    if spec.get("certificate_arn") and not grouped:
        problems.append("spec.certificate_arn: needs a load balancer, so set instances (min 1 and max 1 for one machine)")
    if spec["idle_stop_minutes"] and grouped:
        problems.append("spec.idle_stop_minutes: cannot be combined with instances, whose number follows the load anyway")
    if spec["idle_stop_minutes"] and spec["spot"]:
        problems.append("spec.idle_stop_minutes: cannot be combined with spot, whose machines AWS starts and stops")
    if len(spec["subnet_ids"]) == 1 and grouped:
        problems.append("spec.subnet_ids: a load balancer needs subnets in at least two availability zones, got one subnet")
    problems += check_shared_state(spec)
    twice = set(spec.get("env") or {}) & {variable["name"] for variable in spec["environment_variables"]}
    problems += [f"spec.environment_variables: {name} is also in env; give it once" for name in sorted(twice)]
    problems += check_keys(spec)
    multiline = [name for name, value in (spec.get("env") or {}).items() if "\n" in value or "\r" in value]
    problems += [f"env: the value of {name} must be a single line" for name in multiline]
    return problems


def check_shared_state(spec: Mapping[str, Any]) -> list[str]:
    if not spec["shared_state"]:
        return []
    group = instances(spec)
    problems = []
    if group is None or group["max"] < 2:
        problems.append("spec.shared_state: needs machines that share it, so set instances with a max of 2 or more")
    if "SD_SHARED_STATE" in given_variables(spec):
        problems.append(
            "spec.environment_variables: SD_SHARED_STATE cannot be combined with shared_state, which sets it; give one of the two"
        )
    return problems


def check_keys(spec: Mapping[str, Any]) -> list[str]:
    """Check the API keys: a bento without keys does not start on an address that others can reach, unless SD_WITHOUT_KEYS is set."""
    given = given_variables(spec)
    if "SD_API_KEYS_FILE" in given:
        return ["spec.environment_variables: SD_API_KEYS_FILE names a file that the container does not have; use api_key_arn"]
    if spec.get("api_key_arn") and "SD_API_KEYS" in given:
        return ["spec.environment_variables: SD_API_KEYS cannot be combined with api_key_arn, which sets it; give one of the two"]
    if spec["allowed_cidrs"] and not has_keys(spec) and not _is_on(given.get("SD_WITHOUT_KEYS", "")):
        return [
            "spec.allowed_cidrs: everyone in these blocks could generate images without an API key. Give api_key_arn, or allow that with "
            "SD_WITHOUT_KEYS set to 1 in environment_variables"
        ]
    if not spec["allowed_cidrs"] and not has_keys(spec) and not _is_on(given.get("SD_WITHOUT_KEYS", "1")):
        return [
            "spec.environment_variables: SD_WITHOUT_KEYS must be 1 if there are no API keys (api_key_arn), or the server does not start"
        ]
    if has_keys(spec) and "metrics" not in [name.strip() for name in given.get("SD_OPEN", "metrics").split(",")]:
        return ["spec.environment_variables: SD_OPEN must include metrics, from which the machine reads the load"]
    return []


def _is_on(value: str) -> bool:
    """The same rule as in the server's core/settings.py, which the operator cannot import."""
    return value.strip().lower() in ("1", "true", "yes", "on")


def check_image_tag(image_tag: str, deployment_name: str, region: str) -> list[str]:
    match = IMAGE_TAG.fullmatch(image_tag)
    if match is None:
        return [
            f"image_tag: {image_tag!r} is not an image in Amazon ECR: ACCOUNT.dkr.ecr.REGION.amazonaws.com/NAME:VERSION, without a port "
            "and with a single name after the slash"
        ]
    problems = []
    if match["region"] != region:
        problems.append(f"image_tag: the image is in {match['region']} and spec.region is {region}; build again to push it there")
    if match["repository"] != deployment_name:
        problems.append(f"image_tag: the repository is {match['repository']} and the deployment is {deployment_name}; build again")
    return problems
