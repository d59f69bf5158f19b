"""The operator's name, its module and the schema of `spec` in deployment_config.yaml, in the form that bentoctl requires.

The schema checks each field alone, because `bentoctl init` asks for one field at a time.
bentoctl_aws_ec2/specification.py checks combinations of fields.
"""

from __future__ import annotations

from bentoctl_aws_ec2.fields import (
    check_ami_id,
    check_api_key_arn,
    check_certificate_arn,
    check_cidr,
    check_environment_name,
    check_environment_value,
    check_idle_stop_minutes,
    check_instance_type,
    check_instances,
    check_region,
    check_subnet_id,
    to_boolean,
    to_integer,
)

OPERATOR_NAME = "aws-ec2"
OPERATOR_MODULE = "bentoctl_aws_ec2"
OPERATOR_DEFAULT_TEMPLATE = "terraform"

OPERATOR_SCHEMA = {
    "region": {
        "type": "string",
        "required": True,
        "default": "us-west-1",
        "check_with": check_region,
        "help_message": "AWS region to deploy to. GPU quota and prices differ between regions.",
    },
    "instance_type": {
        "type": "string",
        "default": "g4dn.xlarge",
        "check_with": check_instance_type,
        "help_message": "EC2 instance type: g4dn.xlarge (one T4 GPU) is the cheapest with a GPU; g5, g6, g6e and p families work too.",
    },
    "enable_gpus": {
        "type": "boolean",
        "nullable": True,
        "coerce": to_boolean,
        "help_message": "yes or no: give the container the machine's NVIDIA GPUs. Empty: yes if the instance type has them.",
    },
    "ami_id": {
        "type": "string",
        "nullable": True,
        "check_with": check_ami_id,
        "help_message": "Machine image to pin, like ami-0123456789abcdef0. Empty: AWS's current Deep Learning Base GPU AMI.",
    },
    "disk_size_gb": {
        "type": "integer",
        "default": 120,
        "min": 100,
        "max": 16384,
        "coerce": to_integer,
        "help_message": "Root disk in GiB, 100 to 16384. The AMI alone takes 75; the rest is for the unpacked image with its weights.",
    },
    "allowed_cidrs": {
        "type": "list",
        "default": [],
        "schema": {
            "type": "string",
            "check_with": check_cidr,
            "help_message": "Addresses that may reach the server, like 203.0.113.7/32 (one address); 0.0.0.0/0 allows everyone.",
        },
    },
    "environment_variables": {
        "type": "list",
        "default": [],
        "schema": {
            "type": "dict",
            "schema": {
                "name": {
                    "type": "string",
                    "required": True,
                    "check_with": check_environment_name,
                    "help_message": "Name of an environment variable of the container, like SD_MODEL.",
                },
                "value": {
                    "type": "string",
                    "required": True,
                    "check_with": check_environment_value,
                    "help_message": "Its value. Not for secrets: it is written to bentoctl.tfvars and to the machine's user data.",
                },
            },
        },
    },
    "api_key_arn": {
        "type": "string",
        "nullable": True,
        "check_with": check_api_key_arn,
        "help_message": "ARN of a Secrets Manager secret or an SSM parameter; the container gets its value as SD_API_KEYS. Empty: no keys.",
    },
    "instances": {
        "type": "dict",
        "nullable": True,
        "check_with": check_instances,
        "schema": {
            "min": {
                "type": "integer",
                "nullable": True,
                "min": 1,
                "max": 100,
                "coerce": to_integer,
                "help_message": "Fewest machines behind a load balancer. Empty: one machine with a fixed address and no load balancer.",
            },
            "max": {
                "type": "integer",
                "nullable": True,
                "min": 1,
                "max": 100,
                "coerce": to_integer,
                "help_message": "Maximum number of machines. Empty if min is empty.",
            },
        },
    },
    "shared_state": {
        "type": "boolean",
        "default": False,
        "coerce": to_boolean,
        "help_message": "yes or no: the machines share jobs and limits through a Valkey of ElastiCache (needs instances; costs extra).",
    },
    "certificate_arn": {
        "type": "string",
        "nullable": True,
        "check_with": check_certificate_arn,
        "help_message": "ARN of an ACM certificate for HTTPS at the load balancer (needs instances). Empty: HTTP.",
    },
    "spot": {
        "type": "boolean",
        "default": False,
        "coerce": to_boolean,
        "help_message": "yes or no: spot machines, up to 70 % cheaper; AWS may stop them at two minutes' notice.",
    },
    "idle_stop_minutes": {
        "type": "integer",
        "default": 0,
        "coerce": to_integer,
        "check_with": check_idle_stop_minutes,
        "help_message": "Stop the (single) machine after this many minutes without a request, 15 to 10080. 0: never.",
    },
    "subnet_ids": {
        "type": "list",
        "default": [],
        "schema": {
            "type": "string",
            "check_with": check_subnet_id,
            "help_message": "Public subnets of your own VPC, like subnet-0123456789abcdef0. Empty list: those of the default VPC.",
        },
    },
}
