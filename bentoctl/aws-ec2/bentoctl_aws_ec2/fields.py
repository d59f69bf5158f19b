"""Checks and conversions of single fields of `spec`, in the form that Cerberus calls them: `check(field, value, error)`.
Cerberus also calls them with None if a field may be empty.

Knows what AWS allows (regions and instance types from botocore's lists, without a request to AWS). Does not know
Terraform, or combinations of fields.
"""

from __future__ import annotations

import difflib
import ipaddress
import re
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from typing import Any

from boto3.session import Session

Report = Callable[[str, str], None]

# x86_64 families with NVIDIA GPUs that torch 2.13 with CUDA 13 runs on (compute capability 7.5 or newer) and that the AMI supports.
GPU_FAMILIES = ("g4dn", "g5", "g6", "g6e", "gr6", "g7", "g7e", "p4d", "p4de", "p5", "p5e", "p5en", "p6-b200", "p6-b300")
UNUSABLE_GPU_FAMILIES = {
    "p2": "its K80 GPUs are too old for torch 2.13 (compute capability 3.7, 7.5 is needed)",
    "p3": "its V100 GPUs are too old for torch 2.13 with CUDA 13 (compute capability 7.0, 7.5 is needed)",
    "p3dn": "its V100 GPUs are too old for torch 2.13 with CUDA 13 (compute capability 7.0, 7.5 is needed)",
    "g3": "its M60 GPUs are too old for torch 2.13 (compute capability 5.2, 7.5 is needed)",
    "g3s": "its M60 GPUs are too old for torch 2.13 (compute capability 5.2, 7.5 is needed)",
    "g6f": "it has a fraction of a GPU, which needs NVIDIA's GRID driver, and the AMI has another driver",
    "gr6f": "it has a fraction of a GPU, which needs NVIDIA's GRID driver, and the AMI has another driver",
    "g4ad": "it has AMD GPUs, and the image contains torch for NVIDIA",
}
# a1, and families with a g for Graviton after the generation: c7g, m6gd, g5g.
ARM_FAMILY = re.compile(r"a1|[a-z]+\d+g[a-z]*(-.*)?|.*-gb\d+")

IDENTIFIER = r"[0-9a-f]{8}(?:[0-9a-f]{9})?"
AMI_ID = re.compile(rf"ami-{IDENTIFIER}")
SUBNET_ID = re.compile(rf"subnet-{IDENTIFIER}")
API_KEY_ARN = re.compile(r"arn:aws[a-z-]*:(secretsmanager:[a-z0-9-]+:\d{12}:secret:[\w/+=.@-]+|ssm:[a-z0-9-]+:\d{12}:parameter/[\w/.-]+)")
CERTIFICATE_ARN = re.compile(r"arn:aws[a-z-]*:acm:[a-z0-9-]+:\d{12}:certificate/[0-9a-f-]+")
ENVIRONMENT_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


def to_boolean(value: object) -> bool:
    """A boolean from YAML, or as a person types it at `bentoctl init`."""
    if isinstance(value, bool):
        return value
    if isinstance(value, str) and value.strip().lower() in ("yes", "y", "true"):
        return True
    if isinstance(value, str) and value.strip().lower() in ("no", "n", "false"):
        return False
    raise ValueError(f"must be yes or no, got {value!r}")


def to_integer(value: object) -> int:
    """A whole number from YAML, or as a person types it at `bentoctl init`."""
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    if isinstance(value, str) and re.fullmatch(r"-?\d{1,9}", value.strip()):
        return int(value)
    raise ValueError(f"must be a whole number, got {value!r}")


def check_region(field: str, value: str, error: Report) -> None:
    known = known_regions()
    if value not in known:
        error(field, f"{value!r} is not an AWS region{_closest(value, known)}")


def check_instance_type(field: str, value: str, error: Report) -> None:
    family = instance_family(value)
    known = known_instance_types()
    families = {instance_family(name) for name in known}
    if family not in families:
        error(field, f"{value!r}: there is no instance family {family!r}{_closest(family, families)}")
    elif family in UNUSABLE_GPU_FAMILIES:
        error(field, f"{value!r}: {UNUSABLE_GPU_FAMILIES[family]}; families with a usable GPU: {', '.join(GPU_FAMILIES)}")
    elif ARM_FAMILY.fullmatch(family):
        error(field, f"{value!r} has an ARM processor, but the image is built for x86_64")
    elif value not in known:
        sizes = sorted(name.partition(".")[2] for name in known if instance_family(name) == family)
        error(field, f"{value!r}: the family {family!r} has the sizes {', '.join(sizes)}")


def check_ami_id(field: str, value: str | None, error: Report) -> None:
    if value is not None and not AMI_ID.fullmatch(value):
        error(field, f"{value!r} is not an AMI id: ami- and 8 or 17 hexadecimal digits, like ami-0123456789abcdef0")


def check_subnet_id(field: str, value: str, error: Report) -> None:
    if not SUBNET_ID.fullmatch(value):
        error(field, f"{value!r} is not a subnet id: subnet- and 8 or 17 hexadecimal digits, like subnet-0123456789abcdef0")


def check_cidr(field: str, value: str, error: Report) -> None:
    if "/" not in value:
        error(field, f"{value!r} is not a CIDR block: write one address as {value}/32")
        return
    if ":" in value:
        error(field, f"{value!r}: the server has no IPv6 address; give IPv4 blocks like 203.0.113.0/24")
        return
    try:
        ipaddress.IPv4Network(value)
    except ValueError as reason:
        error(field, f"{value!r} is not a CIDR block like 203.0.113.0/24: {reason}")


def check_api_key_arn(field: str, value: str | None, error: Report) -> None:
    if value is not None and not API_KEY_ARN.fullmatch(value):
        error(field, f"{value!r} is neither the ARN of a Secrets Manager secret nor that of an SSM parameter")


def check_certificate_arn(field: str, value: str | None, error: Report) -> None:
    if value is not None and not CERTIFICATE_ARN.fullmatch(value):
        error(field, f"{value!r} is not the ARN of an ACM certificate")


def check_environment_name(field: str, value: str, error: Report) -> None:
    if not ENVIRONMENT_NAME.fullmatch(value):
        error(field, f"{value!r} is not a valid environment variable name: letters, digits and _, not starting with a digit")


def check_environment_value(field: str, value: str, error: Report) -> None:
    if "\n" in value or "\r" in value:
        error(field, "must be a single line")


def check_instances(field: str, value: Mapping[str, Any] | None, error: Report) -> None:
    if value is None:
        return
    fewest, most = value.get("min"), value.get("max")
    if (fewest is None) != (most is None):
        error(field, "needs both min and max")
    elif isinstance(fewest, int) and isinstance(most, int) and fewest > most:
        error(field, f"min {fewest} is more than max {most}")


def check_idle_stop_minutes(field: str, value: int, error: Report) -> None:
    if value != 0 and not 15 <= value <= 10080:
        error(field, f"{value}: must be 0 (never) or 15 to 10080 minutes")


def instance_family(instance_type: str) -> str:
    return instance_type.partition(".")[0]


@cache
def known_regions() -> frozenset[str]:
    session = Session()
    return frozenset(
        region for partition in session.get_available_partitions() for region in session.get_available_regions("ec2", partition)
    )


@cache
def known_instance_types() -> frozenset[str]:
    """Every instance type of the installed botocore's description of EC2."""
    # Any region works: no request is sent.
    client = Session().client("ec2", region_name="us-east-1", aws_access_key_id="none", aws_secret_access_key="none")
    return frozenset(client.meta.service_model.shape_for("InstanceType").enum)


def _closest(value: str, known: Iterable[str]) -> str:
    matches = difflib.get_close_matches(value, sorted(known), n=3)
    return f"; did you mean {' or '.join(matches)}?" if matches else ""
