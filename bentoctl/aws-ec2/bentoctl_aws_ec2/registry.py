"""The deployment's repository in Amazon ECR: creates it, gets its login for `docker push`, deletes it with its images.

Turns errors from AWS into one sentence that says what to do.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import boto3
import click
from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    ConnectTimeoutError,
    EndpointConnectionError,
    NoCredentialsError,
    PartialCredentialsError,
    ProfileNotFound,
)

KEPT_IMAGES = 10
REFUSED = {"AccessDeniedException", "AccessDenied", "UnauthorizedOperation"}
UNKNOWN_CREDENTIALS = {
    "UnrecognizedClientException",
    "InvalidClientTokenId",
    "InvalidSignatureException",
    "ExpiredTokenException",
    "ExpiredToken",
}


class Repository(NamedTuple):
    """What `docker push` needs, in bentoctl's order."""

    url: str
    username: str
    password: str


def create_repository(name: str, region: str) -> Repository:
    with clear_errors(region):
        client = boto3.Session(region_name=region).client("ecr")
        url = _find_or_create(client, name)
        authorization = client.get_authorization_token()["authorizationData"][0]
    username, _, password = base64.b64decode(authorization["authorizationToken"]).decode().partition(":")
    return Repository(url, username, password)


def delete_repository(name: str, region: str) -> None:
    """Deletes the repository with all its images. A missing repository is not an error."""
    with clear_errors(region):
        client = boto3.Session(region_name=region).client("ecr")
        try:
            client.delete_repository(repositoryName=name, force=True)
        except client.exceptions.RepositoryNotFoundException:
            click.echo(f"There was no repository {name} in {region}.")


def _find_or_create(client: Any, name: str) -> str:
    try:
        return str(client.describe_repositories(repositoryNames=[name])["repositories"][0]["repositoryUri"])
    except client.exceptions.RepositoryNotFoundException:
        created = client.create_repository(repositoryName=name, imageScanningConfiguration={"scanOnPush": True})
    client.put_lifecycle_policy(repositoryName=name, lifecyclePolicyText=json.dumps(lifecycle_policy()))
    return str(created["repository"]["repositoryUri"])


def lifecycle_policy() -> dict[str, Any]:
    """Keep a few images to roll back to: each costs about a dollar a month. Count only tagged ones: Docker also pushes untagged parts."""
    return {
        "rules": [
            {
                "rulePriority": 1,
                "description": f"keep the last {KEPT_IMAGES} images",
                "selection": {
                    "tagStatus": "tagged",
                    "tagPatternList": ["*"],
                    "countType": "imageCountMoreThan",
                    "countNumber": KEPT_IMAGES,
                },
                "action": {"type": "expire"},
            }
        ]
    }


@contextmanager
def clear_errors(region: str) -> Iterator[None]:
    try:
        yield
    except (NoCredentialsError, PartialCredentialsError) as reason:
        raise click.ClickException(
            "no AWS credentials: run `aws configure`, or set AWS_PROFILE, or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
        ) from reason
    except ProfileNotFound as reason:
        raise click.ClickException(
            f"{reason}: AWS_PROFILE must name one of the profiles that `aws configure list-profiles` prints"
        ) from reason
    except (EndpointConnectionError, ConnectTimeoutError) as reason:
        raise click.ClickException(
            f"AWS does not respond in region {region}: check spec.region, the network, and that your account has the region enabled"
        ) from reason
    except ClientError as reason:
        raise click.ClickException(_explain(reason, region)) from reason
    except BotoCoreError as reason:
        raise click.ClickException(f"the request to AWS in {region} failed: {reason}") from reason


def _explain(error: ClientError, region: str) -> str:
    code = error.response["Error"]["Code"]
    message = error.response["Error"].get("Message", "")
    if code in UNKNOWN_CREDENTIALS:
        return f"AWS rejected your credentials in {region} ({code}): check them with `aws sts get-caller-identity`"
    if code in REFUSED:
        return f"your AWS user lacks permission for {error.operation_name} in {region}: {message}"
    return f"AWS refused {error.operation_name} in {region} ({code}): {message}"
