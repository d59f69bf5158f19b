"""Ends `terraform apply` when the new machines can generate images, or with the reason why they cannot.

Follows the machines' start in CloudWatch (stream INSTANCE/boot), so it needs no network access to them.
For a group it also queries the load balancer and the Auto Scaling group. Does not know how the machines are created.
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from typing import Any, NoReturn

try:
    import boto3
    from botocore.exceptions import BotoCoreError, ClientError, HTTPClientError
except ImportError:
    sys.exit("wait_until_ready.py needs boto3: run terraform or bentoctl in the project's activated .venv")

POLL_S = 5.0
# How long AWS may be unreachable, or refuse requests because it is busy, before the program gives up.
PATIENCE_S = 120.0
BUSY = {
    "Throttling",
    "ThrottlingException",
    "RequestLimitExceeded",
    "InternalError",
    "InternalFailure",
    "ServiceUnavailable",
    "Unavailable",
}
CONTAINER_LINES = 10
# Launches that fail with one of these will keep failing; AWS itself retries others (no capacity in a zone).
PERMANENT_FAILURES = ("vCPU limit", "Max spot instance count exceeded", "not authorized", "The image id")


class NotReady(Exception):
    """The reason why the machines will not become ready, for the person who runs apply."""


@dataclass
class Machine:
    """The state of one machine, from its log so far."""

    instance_id: str
    next_token: str | None = None
    last_state: str = ""
    last_state_ms: int = 0
    last_line: str = ""


@dataclass
class Watcher:
    logs: Any
    log_group: str
    began_ms: float
    machines: dict[str, Machine] = field(default_factory=dict)

    def follow(self, instance_id: str) -> Machine:
        """Prints the machine's log since the last call. Raises NotReady if the machine has failed since this program began."""
        machine = self.machines.setdefault(instance_id, Machine(instance_id))
        for event in self._new_events(machine):
            text = event["message"]
            print(f"{instance_id}: {text}", flush=True)
            machine.last_line = text
            if text.startswith(("READY", "FAILED")):
                machine.last_state, machine.last_state_ms = text.partition(" ")[0].rstrip(":"), event["timestamp"]
        # An earlier apply has reported older failures, and the machine has retried since.
        if machine.last_state == "FAILED" and machine.last_state_ms >= self.began_ms:
            raise NotReady(f"{instance_id}: {machine.last_line}\n{self.container_lines(instance_id)}")
        return machine

    def container_lines(self, instance_id: str) -> str:
        try:
            events = self.logs.get_log_events(
                logGroupName=self.log_group, logStreamName=f"{instance_id}/container", limit=CONTAINER_LINES, startFromHead=False
            )["events"]
        except self.logs.exceptions.ResourceNotFoundException:
            return "The container has not been started."
        return "\n".join(["Last lines of the container:", *(f"  {event['message'].rstrip()}" for event in events)])

    def _new_events(self, machine: Machine) -> list[dict[str, Any]]:
        page: dict[str, Any] = {"logGroupName": self.log_group, "logStreamName": f"{machine.instance_id}/boot", "startFromHead": True}
        if machine.next_token:
            page["nextToken"] = machine.next_token
        try:
            response = self.logs.get_log_events(**page)
        except self.logs.exceptions.ResourceNotFoundException:
            return []  # it has not logged anything yet
        machine.next_token = response["nextForwardToken"]
        return list(response["events"])


def one_machine_is_ready(watcher: Watcher, ec2: Any, instance_id: str) -> bool:
    machine = watcher.follow(instance_id)
    if machine.last_state == "READY":
        return True
    instance = ec2.describe_instances(InstanceIds=[instance_id])["Reservations"][0]["Instances"][0]
    if instance["State"]["Name"] not in ("pending", "running"):
        reason = instance.get("StateReason", {}).get("Message", "AWS gives no reason")
        raise NotReady(f"{instance_id} is {instance['State']['Name']}: {reason}")
    return False


@dataclass(frozen=True)
class Group:
    """An Auto Scaling group, and how many machines with which version of its launch template make it ready."""

    name: str
    target_group: str
    template_version: str
    machines: int


def group_is_ready(watcher: Watcher, autoscaling: Any, balancer: Any, group: Group) -> bool:
    """True when enough machines with the new version have joined the group and pass the load balancer's health check."""
    _fail_on_permanent_launch_failure(watcher, autoscaling, group.name)
    members = autoscaling.describe_auto_scaling_groups(AutoScalingGroupNames=[group.name])["AutoScalingGroups"][0]["Instances"]
    new = [member for member in members if member.get("LaunchTemplate", {}).get("Version") == group.template_version]
    for member in new:
        if not member["LifecycleState"].startswith("Terminat"):
            watcher.follow(member["InstanceId"])
    joined = {member["InstanceId"] for member in new if member["LifecycleState"] == "InService"}
    health = balancer.describe_target_health(TargetGroupArn=group.target_group)["TargetHealthDescriptions"]
    healthy = {target["Target"]["Id"] for target in health if target["TargetHealth"]["State"] == "healthy"}
    if len(joined & healthy) >= group.machines:
        return True
    _fail_on_failed_replacement(watcher, autoscaling, group.name)
    return False


def _fail_on_permanent_launch_failure(watcher: Watcher, autoscaling: Any, group: str) -> None:
    for activity in autoscaling.describe_scaling_activities(AutoScalingGroupName=group, MaxRecords=10)["Activities"]:
        message = activity.get("StatusMessage", "")
        recent = activity["StartTime"].timestamp() * 1000 >= watcher.began_ms - 60_000
        if recent and activity["StatusCode"] == "Failed" and any(text in message for text in PERMANENT_FAILURES):
            raise NotReady(f"a machine could not be started: {message}")


def _fail_on_failed_replacement(watcher: Watcher, autoscaling: Any, group: str) -> None:
    for refresh in autoscaling.describe_instance_refreshes(AutoScalingGroupName=group, MaxRecords=1)["InstanceRefreshes"]:
        recent = refresh["StartTime"].timestamp() * 1000 >= watcher.began_ms - 300_000
        if recent and refresh["Status"] in ("Failed", "Cancelled", "RollbackFailed", "RollbackSuccessful"):
            reason = refresh.get("StatusReason", "AWS gives no reason")
            raise NotReady(f"the replacement of the machines ended as {refresh['Status']}: {reason}")


def wait(arguments: argparse.Namespace) -> None:
    session = boto3.Session(region_name=arguments.region)
    watcher = Watcher(session.client("logs"), arguments.log_group, aws_clock_ms(session))
    ec2, autoscaling, balancer = session.client("ec2"), session.client("autoscaling"), session.client("elbv2")
    group = Group(arguments.auto_scaling_group, arguments.target_group, str(arguments.template_version), arguments.machines)

    def is_ready() -> bool:
        if arguments.instance:
            return one_machine_is_ready(watcher, ec2, arguments.instance)
        return group_is_ready(watcher, autoscaling, balancer, group)

    began = last_response = time.monotonic()
    print("waiting until the server is ready; its machine downloads the image first, which takes minutes", flush=True)
    while time.monotonic() - began < arguments.timeout_s:
        try:
            if is_ready():
                print(f"ready after {time.monotonic() - began:.0f} s", flush=True)
                return
            last_response = time.monotonic()
        except (HTTPClientError, ClientError) as reason:
            is_temporary = isinstance(reason, HTTPClientError) or reason.response["Error"]["Code"] in BUSY
            if not is_temporary or time.monotonic() - last_response > PATIENCE_S:
                raise
            print(f"(AWS does not respond, trying again: {reason})", flush=True)
        time.sleep(POLL_S)
    raise NotReady(timed_out(watcher, arguments))


def aws_clock_ms(session: boto3.Session) -> float:
    """The time at AWS, which the machines share; this computer's clock may be wrong."""
    headers = session.client("sts").get_caller_identity()["ResponseMetadata"]["HTTPHeaders"]
    return parsedate_to_datetime(headers["date"]).timestamp() * 1000


def timed_out(watcher: Watcher, arguments: argparse.Namespace) -> str:
    last_lines = [f"  {machine.instance_id}: {machine.last_line or 'nothing'}" for machine in watcher.machines.values()]
    lines = [watcher.container_lines(instance_id) for instance_id in watcher.machines]
    hint = (
        "A machine that logs nothing cannot reach CloudWatch: its subnet needs internet access. "
        "To see its boot messages: "
        f"aws ec2 get-console-output --latest --region {arguments.region} --instance-id INSTANCE --output text"
    )
    return "\n".join(
        [f"not ready after {arguments.timeout_s:.0f} s. Last log lines:", *(last_lines or ["  (there is no machine)"]), *lines, hint]
    )


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--region", required=True)
    parser.add_argument("--log-group", required=True)
    parser.add_argument("--timeout-s", type=float, required=True)
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--instance")
    which.add_argument("--auto-scaling-group")
    parser.add_argument("--target-group")
    parser.add_argument("--template-version")
    parser.add_argument("--machines", type=int, default=1)
    return parser.parse_args()


def fail(reason: object, arguments: argparse.Namespace) -> NoReturn:
    print(f"\nThe server is not ready: {reason}", file=sys.stderr)
    if arguments.instance:
        print(
            "The machine keeps running, retrying and costing money, so that you can inspect it. Before the next apply, terminate it: "
            f"aws ec2 terminate-instances --region {arguments.region} --instance-ids {arguments.instance}",
            file=sys.stderr,
        )
    sys.exit(1)


if __name__ == "__main__":
    given = parse_arguments()
    try:
        wait(given)
    except (NotReady, BotoCoreError, ClientError) as reason:
        fail(reason, given)
