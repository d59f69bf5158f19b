"""The image repository, through real boto3 calls to moto's server; errors from AWS become one sentence."""

from __future__ import annotations

import json

import boto3
import click
import pytest
from botocore.exceptions import ClientError

from tests.deployment.conftest import StandInAws
from tests.http.servers import free_port


def test_a_missing_repository_is_created_with_scans_and_a_lifecycle_policy(aws: StandInAws) -> None:
    from bentoctl_aws_ec2.registry import create_repository

    made = create_repository("stable-diffusion", "us-west-1")
    assert made.url.endswith(".dkr.ecr.us-west-1.amazonaws.com/stable-diffusion")
    assert (made.username, bool(made.password)) == ("AWS", True)
    client = boto3.Session(region_name="us-west-1").client("ecr")
    [repository] = client.describe_repositories()["repositories"]
    assert repository["imageScanningConfiguration"]["scanOnPush"] is True
    rules = json.loads(client.get_lifecycle_policy(repositoryName="stable-diffusion")["lifecyclePolicyText"])["rules"]
    assert rules[0]["selection"]["countNumber"] == 10


def test_an_existing_repository_is_reused(aws: StandInAws) -> None:
    from bentoctl_aws_ec2.registry import create_repository

    assert create_repository("stable-diffusion", "us-west-1").url == create_repository("stable-diffusion", "us-west-1").url
    assert len(boto3.Session(region_name="us-west-1").client("ecr").describe_repositories()["repositories"]) == 1


def test_deleting_removes_the_images_and_may_be_repeated(aws: StandInAws, capsys: pytest.CaptureFixture[str]) -> None:
    from bentoctl_aws_ec2.registry import create_repository, delete_repository

    create_repository("stable-diffusion", "us-west-1")
    client = boto3.Session(region_name="us-west-1").client("ecr")
    manifest = {"schemaVersion": 2, "mediaType": "application/vnd.docker.distribution.manifest.v2+json"}
    client.put_image(repositoryName="stable-diffusion", imageManifest=json.dumps(manifest), imageTag="v1")
    delete_repository("stable-diffusion", "us-west-1")
    assert client.describe_repositories()["repositories"] == []
    delete_repository("stable-diffusion", "us-west-1")
    assert capsys.readouterr().out == "There was no repository stable-diffusion in us-west-1.\n"


def test_regions_have_separate_repositories(aws: StandInAws) -> None:
    from bentoctl_aws_ec2.registry import create_repository, delete_repository

    create_repository("stable-diffusion", "us-west-1")
    delete_repository("stable-diffusion", "ap-northeast-1")
    assert len(boto3.Session(region_name="us-west-1").client("ecr").describe_repositories()["repositories"]) == 1


def refused(name: str = "stable-diffusion", region: str = "us-west-1") -> str:
    from bentoctl_aws_ec2.registry import create_repository

    with pytest.raises(click.ClickException) as refusal:
        create_repository(name, region)
    return refusal.value.message


def test_without_credentials_the_error_says_how_to_set_them(aws: StandInAws, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    assert refused().startswith("no AWS credentials: run `aws configure`, or set AWS_PROFILE")


def test_an_unknown_profile_is_named(aws: StandInAws, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_PROFILE", "nobody")
    assert "nobody" in refused()


def test_an_unreachable_aws_points_at_region_and_network(aws: StandInAws, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{free_port()}")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    assert refused(region="eu-south-2").startswith("AWS does not respond in region eu-south-2: check spec.region")


@pytest.mark.parametrize(
    ("code", "words"),
    [
        ("UnrecognizedClientException", "AWS rejected your credentials in us-west-1"),
        ("AccessDeniedException", "your AWS user lacks permission for CreateRepository in us-west-1: told so"),
        ("LimitExceededException", "AWS refused CreateRepository in us-west-1 (LimitExceededException): told so"),
    ],
)
def test_a_refusal_by_aws_is_reported_with_its_reason(code: str, words: str) -> None:
    from bentoctl_aws_ec2.registry import clear_errors

    with pytest.raises(click.ClickException) as refusal, clear_errors("us-west-1"):
        raise ClientError({"Error": {"Code": code, "Message": "told so"}}, "CreateRepository")
    assert words in refusal.value.message
