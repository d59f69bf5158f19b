"""`/metrics` counts what was drawn, whichever process is asked; the dashboard and the page of names say the same names."""

from __future__ import annotations

import json
import re
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.http.following import ask, start
from tests.http.servers import ROOT, Server
from tests.pages import PAGES

DASHBOARD = json.loads((ROOT / "grafana" / "dashboard.json").read_text(encoding="utf-8"))
OUR_NAME = "stable_diffusion_"


def scrape(server: Server) -> str:
    """Over a connection of its own, so that any API worker may answer."""
    with server.client() as client:
        return client.get("/metrics").text


def draw(server: Server, **fields: object) -> httpx.Response:
    with server.client() as client:
        return client.post("/txt2img", json={"prompt": "a red circle", "num_inference_steps": 1, **fields})


def value(page: str, series: str) -> float:
    return float(next(line for line in page.splitlines() if line.startswith(f"{series} ")).rpartition(" ")[2])


def names(page: str) -> set[str]:
    """Of all series, as queries name them."""
    return {sample.name for family in text_string_to_metric_families(page) for sample in family.samples}


def test_what_several_workers_had_drawn_is_counted_once_in_every_scrape(server: Server) -> None:
    before = scrape(server)
    completed = 'stable_diffusion_images_total{kind="txt2img",outcome="completed"}'
    drawn = 0
    with ThreadPoolExecutor(4) as clients:
        # Until both API workers have had some.
        while drawn < 40 and (drawn == 0 or len(set(re.findall(r'api_server_last_request.*?pid="(\d+)"', scrape(server)))) < 2):
            assert {answer.status_code for answer in clients.map(lambda _: draw(server), range(4))} == {200}
            drawn += 4
    assert drawn < 40, "one worker had all requests"
    pages = [scrape(server) for _ in range(6)]
    for page in pages:
        assert value(page, completed) - value(before, completed) == drawn
        counts = ("queue_wait_seconds_count", 'image_seconds_count{kind="txt2img"}')
        assert [value(page, OUR_NAME + count) - value(before, OUR_NAME + count) for count in counts] == [drawn, drawn]
        rows = value(page, "stable_diffusion_unet_rows_sum") - value(before, "stable_diffusion_unet_rows_sum")
        assert rows == 2 * drawn, "one guided step for each picture"
        assert value(page, "stable_diffusion_queue_jobs") == value(page, "stable_diffusion_running_jobs") == 0


def test_a_picture_that_is_being_drawn_is_a_running_one_and_is_counted_as_cancelled_when_its_client_leaves(server: Server) -> None:
    cancelled = 'stable_diffusion_images_total{kind="txt2img",outcome="cancelled"}'
    before = value(scrape(server), cancelled)
    with server.client() as client:
        body = {"prompt": "a red circle", "num_inference_steps": 150, "width": 256, "height": 256}
        with client.stream("POST", "/txt2img", json=body, headers={"Accept": "text/event-stream"}) as events:
            lines = events.iter_lines()  # without a name it would be closed at once, and the connection with it
            next(lines)
            asked = time.monotonic()
            # The first event may be of a job that waits.
            while value(scrape(server), "stable_diffusion_running_jobs") != 1:
                assert time.monotonic() - asked < 10, "the picture that is being drawn was not counted"
                time.sleep(0.05)
    left = time.monotonic()
    while value(page := scrape(server), cancelled) == before:
        assert time.monotonic() - left < 10, "the cancelled picture was not counted"
        time.sleep(0.05)
    assert value(page, cancelled) == before + 1
    assert value(page, "stable_diffusion_running_jobs") == 0


def seen_by_the_machine_on_aws(page: str, name: str) -> int:
    """A runner metric as the script counts it that stops an idle machine."""
    script = (ROOT / "bentoctl/aws-ec2/bentoctl_aws_ec2/terraform/boot/machine.sh").read_text()
    function = re.search(r"^metric\(\) \{.*?^\}", script, re.MULTILINE | re.DOTALL)
    assert function is not None
    command = ["bash", "-euc", f'{function[0]}\nmetrics=$(cat)\nmetric "$1"', "bash", name]
    return int(subprocess.run(command, input=page, capture_output=True, text=True, check=True).stdout)


def test_a_job_that_nobody_waits_for_keeps_a_machine_on_aws_from_stopping_as_idle(server: Server) -> None:
    before = seen_by_the_machine_on_aws(scrape(server), "bentoml_runner_request_total")
    location = start(server, num_inference_steps=150, width=256, height=256).headers["location"]
    began = time.monotonic()
    while value(page := scrape(server), "stable_diffusion_running_jobs") != 1:
        assert time.monotonic() - began < 10
        time.sleep(0.05)
    assert seen_by_the_machine_on_aws(page, "bentoml_runner_request_in_progress") == 1
    ask(server, location, "DELETE")
    while seen_by_the_machine_on_aws(page := scrape(server), "bentoml_runner_request_in_progress"):
        assert time.monotonic() - began < 20
        time.sleep(0.05)
    assert seen_by_the_machine_on_aws(page, "bentoml_runner_request_total") == before + 1


def test_the_model_and_the_cap_are_told(server: Server) -> None:
    page = scrape(server)
    assert re.search(r'stable_diffusion_model_info{device="[^"]+",dtype="float32",model="demo",precision="fp(32|16)",runner="1"} 1.0', page)
    # How many pictures share a step, and why.
    assert re.search(r'stable_diffusion_step_cap_pictures{height="64",reason="[^"]+",runner="1",width="64"} [1-9]', page), page
    assert re.search(r'stable_diffusion_execution_info{execution="eager",reason="[^"]+",runner="1"} 1.0', page), page


def queries() -> list[str]:
    targets = [target["expr"] for panel in DASHBOARD["panels"] for target in panel.get("targets", [])]
    return targets + [variable["definition"] for variable in DASHBOARD["templating"]["list"] if variable["type"] == "query"]


def queried_names() -> set[str]:
    return {name for query in queries() for name in re.findall(r"\b(?:stable_diffusion|bentoml)_\w+", query)}


def test_the_dashboard_asks_for_names_that_exist_and_for_all_of_ours(server: Server) -> None:
    draw(server)
    page = scrape(server)
    assert queried_names() <= names(page)
    families = {family.name for family in text_string_to_metric_families(page) if family.name.startswith(OUR_NAME)}
    unused = [family for family in families if not any(name.startswith(family) for name in queried_names())]
    assert unused == []


def test_the_page_of_names_lists_the_real_ones_with_their_types_and_labels(server: Server) -> None:
    listed = {
        name: (kind, set(re.findall(r"`(\w+)`", labels)))
        for name, kind, labels in re.findall(
            r"^\| `(stable_diffusion_\w+)` \| (\w+) \| (.*?) ?\|", PAGES["docs/operations.md"], re.MULTILINE
        )
    }
    real = {}
    for family in text_string_to_metric_families(scrape(server)):
        if family.name.startswith(OUR_NAME):
            name = f"{family.name}_total" if family.type == "counter" else family.name
            real[name] = family.type, {label for sample in family.samples for label in sample.labels} - {"le"}
    real["stable_diffusion_shared_state_reachable"] = "gauge", set()  # where SD_SHARED_STATE is set: test_shared_state.py
    assert listed == real


def test_the_seconds_have_buckets_up_to_ten_minutes(server: Server) -> None:
    page = scrape(server)
    for name in ("queue_wait_seconds", "step_seconds", 'image_seconds_bucket{kind="inpaint",'):
        series = f'{OUR_NAME}{name if "{" in name else name + "_bucket{"}le="600.0"}}'
        assert f"\n{series} " in page, series


@pytest.mark.parametrize("key", ["schemaVersion", "title", "uid", "panels", "templating"])
def test_the_dashboard_has_what_grafana_wants_of_a_file_to_import(key: str) -> None:
    assert DASHBOARD[key]


def test_every_panel_of_the_dashboard_has_a_place_of_its_own_and_asks_the_chosen_data_source() -> None:
    panels = DASHBOARD["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    taken: set[tuple[int, int]] = set()
    for panel in panels:
        place = panel["gridPos"]
        cells = {(x, y) for x in range(place["x"], place["x"] + place["w"]) for y in range(place["y"], place["y"] + place["h"])}
        assert not cells & taken, panel["title"]
        assert max(x for x, _ in cells) < 24
        taken |= cells
        for target in panel.get("targets", []):
            assert target["datasource"]["uid"] == "${DS_PROMETHEUS}"
    assert [variable["name"] for variable in DASHBOARD["templating"]["list"] if variable["type"] == "datasource"] == ["DS_PROMETHEUS"]
