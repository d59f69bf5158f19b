"""The program that ends `terraform apply`, as Terraform starts it, against moto's logs and machines.

moto knows no instance refreshes, so for a group botocore's stubber answers; it holds every answer against AWS's own description of it.
"""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import datetime, timedelta, timezone
from pathlib import Path
from types import ModuleType
from typing import Any

import boto3
import pytest
from botocore.exceptions import ClientError, ReadTimeoutError
from botocore.stub import Stubber

from tests.deployment.commands import TEMPLATES
from tests.deployment.conftest import StandInAws
from tests.http.servers import environment

SCRIPT = TEMPLATES / "wait_until_ready.py"
LOG_GROUP = "/bentoctl/stable-diffusion"
REGION = "us-west-1"
NOW = datetime.now(timezone.utc)


@pytest.fixture
def program() -> ModuleType:
    description = importlib.util.spec_from_file_location("wait_until_ready", SCRIPT)
    assert description is not None
    assert description.loader is not None
    module = importlib.util.module_from_spec(description)
    sys.modules["wait_until_ready"] = module
    description.loader.exec_module(module)
    return module


class Logs:
    """Writes to the log group like the machine."""

    def __init__(self) -> None:
        self.client = boto3.Session(region_name=REGION).client("logs")
        self.client.create_log_group(logGroupName=LOG_GROUP)

    def say(self, instance: str, words: str, stream: str = "boot", age_s: float = 0) -> None:
        name = f"{instance}/{stream}"
        if not self.client.describe_log_streams(logGroupName=LOG_GROUP, logStreamNamePrefix=name)["logStreams"]:
            self.client.create_log_stream(logGroupName=LOG_GROUP, logStreamName=name)
        event = {"timestamp": round((time.time() - age_s) * 1000), "message": words}
        self.client.put_log_events(logGroupName=LOG_GROUP, logStreamName=name, logEvents=[event])


@pytest.fixture
def logs(aws: StandInAws) -> Logs:
    return Logs()


@pytest.fixture
def instance(aws: StandInAws) -> str:
    client = boto3.Session(region_name=REGION).client("ec2")
    image = client.describe_images(Owners=["amazon"])["Images"][0]["ImageId"]
    started = client.run_instances(ImageId=image, MinCount=1, MaxCount=1, InstanceType="g4dn.xlarge")
    return str(started["Instances"][0]["InstanceId"])


def start(folder: Path, aws: StandInAws, instance: str, timeout_s: float = 60) -> subprocess.Popen[str]:
    arguments = ["--region", REGION, "--log-group", LOG_GROUP, "--timeout-s", str(timeout_s), "--instance", instance]
    return subprocess.Popen(
        [sys.executable, str(SCRIPT), *arguments],
        env=environment(folder, aws.variables),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_it_prints_the_machines_log_and_ends_when_it_is_ready(aws: StandInAws, logs: Logs, instance: str, tmp_path: Path) -> None:
    logs.say(instance, "GPU: Tesla T4, 595.91.07")
    process = start(tmp_path, aws, instance)
    time.sleep(2)
    logs.say(instance, "READY after 61 s")
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert [line.partition(": ")[2] for line in out.splitlines()[1:3]] == ["GPU: Tesla T4, 595.91.07", "READY after 61 s"]
    assert out.splitlines()[-1].startswith("ready after ")


def test_it_fails_with_the_reason_and_the_containers_last_lines(aws: StandInAws, logs: Logs, instance: str, tmp_path: Path) -> None:
    logs.say(instance, "Not started: this bento holds no weights", stream="container")
    process = start(tmp_path, aws, instance)
    time.sleep(2)
    logs.say(instance, "FAILED: the image server ended (exit-code, 1)")
    out, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert f"The server is not ready: {instance}: FAILED: the image server ended (exit-code, 1)" in err
    assert "Last lines of the container:\n  Not started: this bento holds no weights" in err
    assert f"aws ec2 terminate-instances --region {REGION} --instance-ids {instance}" in err
    assert "Traceback" not in err


def test_an_earlier_failure_does_not_end_a_second_apply(aws: StandInAws, logs: Logs, instance: str, tmp_path: Path) -> None:
    logs.say(instance, "FAILED: no login", age_s=600)
    process = start(tmp_path, aws, instance)
    time.sleep(2)
    assert process.poll() is None
    logs.say(instance, "READY after 5 s")
    process.communicate(timeout=60)
    assert process.returncode == 0


def test_a_machine_that_logs_nothing_fails_with_a_hint(aws: StandInAws, logs: Logs, instance: str, tmp_path: Path) -> None:
    out, err = start(tmp_path, aws, instance, timeout_s=1).communicate(timeout=60)
    assert f"not ready after 1 s. Last log lines:\n  {instance}: nothing" in err
    assert "its subnet needs internet access" in err
    assert f"get-console-output --latest --region {REGION}" in err


def test_a_short_outage_of_aws_does_not_end_the_wait(
    program: ModuleType, aws: StandInAws, logs: Logs, instance: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    logs.say(instance, "READY after 5 s")
    answers = [ReadTimeoutError(endpoint_url=aws.url), ClientError({"Error": {"Code": "ThrottlingException"}}, "GetLogEvents")]
    really = program.one_machine_is_ready

    def shaky(*arguments: Any) -> bool:
        if answers:
            raise answers.pop()
        return bool(really(*arguments))

    monkeypatch.setattr(program, "one_machine_is_ready", shaky)
    monkeypatch.setattr(program, "POLL_S", 0.01)
    monkeypatch.setattr(sys, "argv", ["wait", "--region", REGION, "--log-group", LOG_GROUP, "--timeout-s", "20", "--instance", instance])
    program.wait(program.parse_arguments())
    assert answers == []


def test_a_machine_that_aws_has_terminated_fails_at_once(aws: StandInAws, logs: Logs, instance: str, tmp_path: Path) -> None:
    boto3.Session(region_name=REGION).client("ec2").terminate_instances(InstanceIds=[instance])
    out, err = start(tmp_path, aws, instance).communicate(timeout=60)
    assert f"The server is not ready: {instance} is terminated: " in err


def test_an_unknown_instance_fails_without_a_traceback(aws: StandInAws, tmp_path: Path) -> None:
    process = start(tmp_path, aws, "i-0000000000000000f")
    out, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "i-0000000000000000f" in err
    assert "Traceback" not in err


# A group of machines.


Ready = Callable[..., bool]


@pytest.fixture
def group_is_ready(program: ModuleType, logs: Logs) -> Ready:
    """`group_is_ready` of the program with these responses from AWS."""

    def ask(
        members: list[dict[str, Any]],
        states: dict[str, str],
        refresh: dict[str, Any] | None = None,
        activity: dict[str, Any] | None = None,
        machines: int = 1,
    ) -> bool:
        session = boto3.Session(region_name=REGION)
        autoscaling, balancer = session.client("autoscaling"), session.client("elbv2")
        watcher = program.Watcher(logs.client, LOG_GROUP, round(NOW.timestamp() * 1000))
        with Stubber(autoscaling) as first, Stubber(balancer) as second:
            first.add_response("describe_scaling_activities", {"Activities": [activity] if activity else []})
            first.add_response("describe_auto_scaling_groups", {"AutoScalingGroups": [scaling_group(members)]})
            first.add_response("describe_instance_refreshes", {"InstanceRefreshes": [refresh] if refresh else []})
            descriptions = [{"Target": {"Id": name}, "TargetHealth": {"State": state}} for name, state in states.items()]
            second.add_response("describe_target_health", {"TargetHealthDescriptions": descriptions})
            group = program.Group("stable-diffusion", "arn:aws:target-group", "7", machines)
            return bool(program.group_is_ready(watcher, autoscaling, balancer, group))

    return ask


def scaling_group(members: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "AutoScalingGroupName": "stable-diffusion",
        "MinSize": 1,
        "MaxSize": 2,
        "DesiredCapacity": 1,
        "DefaultCooldown": 300,
        "AvailabilityZones": ["us-west-1a"],
        "HealthCheckType": "ELB",
        "CreatedTime": NOW,
        "Instances": members,
    }


def member(name: str, state: str = "InService", version: str = "7") -> dict[str, Any]:
    return {
        "InstanceId": name,
        "AvailabilityZone": "us-west-1a",
        "LifecycleState": state,
        "HealthStatus": "Healthy",
        "ProtectedFromScaleIn": False,
        "LaunchTemplate": {"LaunchTemplateId": "lt-0123", "Version": version},
    }


def scaling_activity(message: str) -> dict[str, Any]:
    return {
        "ActivityId": "1",
        "AutoScalingGroupName": "stable-diffusion",
        "Cause": "a change of capacity",
        "StartTime": NOW,
        "StatusCode": "Failed",
        "StatusMessage": message,
    }


def test_a_group_is_ready_when_enough_machines_have_joined_and_are_healthy(group_is_ready: Ready) -> None:
    assert group_is_ready([], {}) is False
    assert group_is_ready([member("i-1", "Pending:Wait")], {}) is False
    assert group_is_ready([member("i-1")], {"i-1": "initial"}) is False
    assert group_is_ready([member("i-1")], {"i-1": "healthy"}) is True
    both = [member("i-1"), member("i-2")]
    assert group_is_ready(both, {"i-1": "healthy", "i-2": "unhealthy"}, machines=2) is False
    assert group_is_ready(both, {"i-1": "healthy", "i-2": "healthy"}, machines=2) is True


@pytest.mark.parametrize("minutes_ago", [0, 60])
def test_machines_with_the_old_image_do_not_make_a_group_ready(group_is_ready: Ready, minutes_ago: int) -> None:
    refresh = {"Status": "InProgress", "StartTime": NOW - timedelta(minutes=minutes_ago)}
    old, new = member("i-1", version="6"), member("i-2", "Pending:Wait")
    assert group_is_ready([old, new], {"i-1": "healthy"}, refresh=refresh) is False
    assert group_is_ready([old, member("i-2")], {"i-1": "draining", "i-2": "healthy"}, refresh=refresh) is True


def test_a_failed_replacement_fails_the_apply(group_is_ready: Ready, program: ModuleType) -> None:
    refresh = {"Status": "Failed", "StartTime": NOW, "StatusReason": "1 instance failed its health check"}
    with pytest.raises(program.NotReady, match="ended as Failed: 1 instance failed its health check"):
        group_is_ready([member("i-1", version="6")], {"i-1": "healthy"}, refresh=refresh)


def test_a_replacement_that_failed_long_ago_does_not_fail_the_apply(group_is_ready: Ready) -> None:
    long_ago = {"Status": "Failed", "StartTime": NOW - timedelta(days=1)}
    assert group_is_ready([member("i-1", "Pending:Wait")], {}, refresh=long_ago) is False


def test_a_failed_machine_in_the_group_fails_the_apply_with_its_log_line(group_is_ready: Ready, program: ModuleType, logs: Logs) -> None:
    logs.say("i-2", "FAILED: no NVIDIA GPU", age_s=-1)
    with pytest.raises(program.NotReady, match="i-2: FAILED: no NVIDIA GPU"):
        group_is_ready([member("i-1"), member("i-2", "Pending:Wait")], {"i-1": "healthy"}, machines=2)


def test_a_machine_that_is_being_replaced_may_fail(group_is_ready: Ready, logs: Logs) -> None:
    logs.say("i-1", "FAILED: the image server ended (signal, 15)", age_s=-1)
    logs.say("i-2", "FAILED: the image server ended (signal, 15)", age_s=-1)
    members = [member("i-1", version="6"), member("i-2", "Terminating:Wait"), member("i-3")]
    assert group_is_ready(members, {"i-3": "healthy"}) is True


@pytest.mark.parametrize(
    "message",
    [
        "You have requested more vCPU capacity than your current vCPU limit of 0 allows for the instance bucket that the specified "
        "instance type belongs to. Please visit AWS to request an adjustment to this limit. Launching EC2 instance failed.",
        "Max spot instance count exceeded. Launching EC2 instance failed.",
    ],
)
def test_a_launch_that_the_account_forbids_fails_the_apply(group_is_ready: Ready, program: ModuleType, message: str) -> None:
    with pytest.raises(program.NotReady, match="a machine could not be started: ") as refused:
        group_is_ready([], {}, activity=scaling_activity(message))
    assert message in str(refused.value)


def test_aws_retries_a_launch_without_capacity(group_is_ready: Ready) -> None:
    message = (
        "We currently do not have sufficient g4dn.xlarge capacity in the Availability Zone you requested. Launching EC2 instance failed."
    )
    assert group_is_ready([], {}, activity=scaling_activity(message)) is False
