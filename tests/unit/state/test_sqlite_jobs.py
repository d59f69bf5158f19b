"""The job store of one machine: its file, how many images it keeps, and jobs whose API worker has died.

What holds for every store is in test_jobs.py.
"""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from stable_diffusion.core.errors import JobsUnavailable, PictureExpired, UnknownJob
from stable_diffusion.core.types import Ticket
from stable_diffusion.state.job_record import IMAGES_KEPT
from stable_diffusion.state.jobs import MAX_ASYNCHRONOUS_JOBS
from stable_diffusion.state.sqlite_jobs import SqliteJobs
from tests.tasks import make_task
from tests.unit.state.test_jobs import ASYNCHRONOUS, PICTURE, completed


def test_the_last_pictures_are_kept_and_attended_jobs_do_not_count(tmp_path: Path) -> None:
    jobs = SqliteJobs(lambda: tmp_path)
    for number in range(IMAGES_KEPT + 1):
        completed(jobs, f"job {number}")
        attended = Ticket(f"attended {number}", "somebody")
        jobs.begin(attended, make_task(), 0)
        jobs.end(attended, PICTURE)
    with pytest.raises(PictureExpired):
        jobs.get("job 0")[0].finished()
    assert jobs.get("job 1")[0].finished() == PICTURE


def test_a_folder_that_was_removed_is_no_reason_to_stop(tmp_path: Path) -> None:
    def folder() -> Path:
        (tmp_path / "shared").mkdir(exist_ok=True)
        return tmp_path / "shared"

    jobs = SqliteJobs(folder)
    completed(jobs, "a1")
    for file in folder().iterdir():
        file.unlink()
    with pytest.raises(UnknownJob):
        jobs.get("a1")
    completed(jobs, "b2")
    assert jobs.get("b2")[0].finished() == PICTURE


def test_a_broken_file_is_an_error_that_callers_know(tmp_path: Path) -> None:
    (tmp_path / "jobs.sqlite").write_text("not a database" * 100)
    with pytest.raises(JobsUnavailable):
        SqliteJobs(lambda: tmp_path).get("a1")


def test_a_job_whose_worker_died_before_a_runner_got_it_fails_after_a_minute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    jobs = SqliteJobs(lambda: tmp_path)
    now = time.time()
    jobs.accept(ASYNCHRONOUS, [make_task()], None, "")
    monkeypatch.setattr(time, "time", lambda: now + 58)
    assert jobs.get("a1")[0].state == "queued"
    jobs.note_held("a1")
    monkeypatch.setattr(time, "time", lambda: now + 116)
    assert jobs.get("a1")[0].state == "queued", "its worker still waits for a runner that loads"
    monkeypatch.setattr(time, "time", lambda: now + 119)
    assert jobs.get("a1")[0].state == "failed"


def test_jobs_whose_worker_died_do_not_keep_their_places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    jobs = SqliteJobs(lambda: tmp_path)
    now = time.time()
    for number in range(MAX_ASYNCHRONOUS_JOBS):
        jobs.accept(Ticket(f"job {number}", "somebody", asynchronous=True), [make_task()], None, "")
    monkeypatch.setattr(time, "time", lambda: now + 61)
    assert jobs.accept(ASYNCHRONOUS, [make_task()], None, "") == "a1"
