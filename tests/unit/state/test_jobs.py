"""What holds for every job store: where jobs stand, for several processes at once; what is kept, for how long, and what a key is good for.

The same tests run on each store: the file of one machine, and a real Redis or Valkey.
"""

from __future__ import annotations

import threading
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from stable_diffusion.core.errors import (
    Cancelled,
    GenerationFailed,
    IdempotencyMismatch,
    PictureExpired,
    PictureNotKept,
    TooManyJobs,
    UnknownJob,
)
from stable_diffusion.core.types import GeneratedImage, Progress, Ticket
from stable_diffusion.state.job_record import IMAGES_KEPT_S, fingerprint
from stable_diffusion.state.jobs import MAX_ASYNCHRONOUS_JOBS, Jobs, new_job_id
from tests.job_stores import Store
from tests.tasks import make_task

IMAGE = Image.fromarray(np.random.default_rng(0).integers(0, 255, (8, 16, 3), dtype=np.uint8))
PICTURE = GeneratedImage(IMAGE, True, "\u732b", "")
TICKET = Ticket("a1", "somebody")
ASYNCHRONOUS = replace(TICKET, asynchronous=True)


@pytest.fixture
def jobs(store: Store) -> Jobs:
    return store.jobs


def completed(jobs: Jobs, job_id: str) -> None:
    ticket = Ticket(job_id, "somebody", asynchronous=True)
    jobs.begin(ticket, make_task(), 0)
    jobs.end(ticket, PICTURE)


def test_a_job_is_queued_then_running_then_completed(jobs: Jobs) -> None:
    jobs.begin(TICKET, make_task(prompt="\u732b"), 0)
    (record,) = jobs.get("a1")
    assert (record.state, record.task.prompt, record.is_ended, record.is_estimated) == ("queued", "\u732b", False, False)
    jobs.note({TICKET: Progress(3, 0, 50, 12.5)})
    (record,) = jobs.get("a1")
    assert (record.state, record.progress) == ("queued", Progress(3, 0, 50, 12.5))
    jobs.note({TICKET: Progress(0, 7, 50, 4.0, IMAGE)})
    jobs.note({TICKET: Progress(0, 8, 50, 3.9)})
    (record,) = jobs.get("a1")
    assert (record.state, record.progress.step, record.preview) == ("running", 8, IMAGE)
    jobs.end(TICKET, PICTURE)
    (record,) = jobs.get("a1")
    assert (record.state, record.progress.step, record.progress.seconds_left, record.preview) == ("completed", 50, 0.0, None)


def test_the_picture_is_kept_bit_for_bit_only_where_nobody_waited(jobs: Jobs) -> None:
    completed(jobs, "kept")
    assert jobs.get("kept")[0].finished() == PICTURE
    jobs.begin(TICKET, make_task(), 0)
    jobs.end(TICKET, PICTURE)
    with pytest.raises(PictureNotKept):
        jobs.get("a1")[0].finished()


def test_what_comes_after_the_end_changes_nothing(jobs: Jobs) -> None:
    jobs.begin(ASYNCHRONOUS, make_task(), 0)
    jobs.end(ASYNCHRONOUS, Cancelled("the job was cancelled"))
    jobs.end(ASYNCHRONOUS, PICTURE)
    jobs.note({ASYNCHRONOUS: Progress(0, 1, 2, 3.0)})
    jobs.abandon("a1", GenerationFailed("gone"))
    (record,) = jobs.get("a1")
    assert record.state == "cancelled"
    with pytest.raises(Cancelled, match="the job was cancelled"):
        record.finished()


def test_a_picture_is_gone_after_its_time_and_the_job_after_a_day(store: Store) -> None:
    jobs = store.jobs
    completed(jobs, "old")
    store.let_pass(IMAGES_KEPT_S + 1)
    with pytest.raises(PictureExpired, match="for 60 minutes"):
        jobs.get("old")[0].finished()
    store.let_pass(24 * 3600 - IMAGES_KEPT_S)
    completed(jobs, "new")
    with pytest.raises(UnknownJob):
        jobs.get("old")


def test_an_unknown_job_is_an_error(jobs: Jobs) -> None:
    with pytest.raises(UnknownJob):
        jobs.get("nobody")
    jobs.cancel("nobody")


def test_a_cancellation_is_found_by_the_runner_that_has_the_job_only(store: Store) -> None:
    jobs = store.jobs
    jobs.begin(TICKET, make_task(), 1)
    jobs.begin(replace(TICKET, index=1), make_task(), 0)
    jobs.cancel("a1")
    assert jobs.to_cancel(0) == [("a1", 1)]
    assert jobs.to_cancel(1) == [("a1", 0)]
    jobs.end(replace(TICKET, index=1), Cancelled("the job was cancelled"))
    store.let_pass(11)
    assert jobs.to_cancel(0) == []
    assert jobs.to_cancel(1) == [("a1", 0)]


def test_only_the_callers_own_jobs_are_cancelled(jobs: Jobs) -> None:
    jobs.begin(TICKET, make_task(), 0)
    jobs.begin(Ticket("b2", "somebody else"), make_task(), 0)
    assert [record.id for record in jobs.of_owner("somebody")] == ["a1"]
    jobs.cancel_of_owner("somebody")
    assert jobs.to_cancel(0) == [("a1", 0)]


def test_what_a_runner_left_fails_when_it_starts_again(jobs: Jobs) -> None:
    jobs.begin(TICKET, make_task(), 1)
    jobs.begin(Ticket("b2", "somebody"), make_task(), 0)
    jobs.register_runner(1)
    assert jobs.get("a1")[0].state == "failed"
    assert jobs.get("b2")[0].state == "queued"


def test_an_owner_who_has_all_places_does_not_keep_others_out(jobs: Jobs) -> None:
    for number in range(MAX_ASYNCHRONOUS_JOBS):
        jobs.accept(Ticket(f"{number}", "greedy", asynchronous=True), [make_task()], None, "what")
    with pytest.raises(TooManyJobs):
        jobs.accept(Ticket("one more", "greedy", asynchronous=True), [make_task()], None, "what")
    for number in range(MAX_ASYNCHRONOUS_JOBS // 2):
        jobs.accept(Ticket(f"other {number}", "other", asynchronous=True), [make_task()], None, "what")
    with pytest.raises(TooManyJobs):
        jobs.accept(Ticket("other one more", "other", asynchronous=True), [make_task()], None, "what")


def test_a_job_that_was_given_up_is_stopped_where_it_is_drawn(jobs: Jobs) -> None:
    jobs.begin(ASYNCHRONOUS, make_task(), 0)
    jobs.note({ASYNCHRONOUS: Progress(0, 3, 50, 12.5)})
    jobs.abandon("a1", GenerationFailed("too late"))
    assert jobs.to_cancel(0) == [("a1", 0)]
    (record,) = jobs.get("a1")
    assert (record.state, record.progress.seconds_left) == ("failed", 0.0)


def test_a_job_that_was_given_up_because_it_was_cancelled_is_cancelled(jobs: Jobs) -> None:
    jobs.begin(ASYNCHRONOUS, make_task(), 0)
    jobs.abandon("a1", Cancelled("the job was cancelled"))
    assert jobs.get("a1")[0].state == "cancelled"


def test_a_key_stands_for_the_job_that_it_was_first_sent_with(jobs: Jobs) -> None:
    assert jobs.accept(ASYNCHRONOUS, [make_task()], "key", "print") == "a1"
    again = Ticket("b2", "somebody", asynchronous=True)
    assert jobs.accept(again, [make_task()], "key", "print") == "a1"
    with pytest.raises(UnknownJob):
        jobs.get("b2")
    with pytest.raises(IdempotencyMismatch):
        jobs.accept(again, [make_task()], "key", "another print")
    assert jobs.accept(replace(again, owner="somebody else"), [make_task()], "key", "another print") == "b2", "keys are each caller's own"


def test_a_key_whose_job_failed_may_be_tried_again(jobs: Jobs) -> None:
    jobs.accept(ASYNCHRONOUS, [make_task()], "key", "print")
    jobs.abandon("a1", GenerationFailed("gone"))
    assert jobs.accept(Ticket("b2", "somebody", asynchronous=True), [make_task()], "key", "print") == "b2"


def test_one_of_many_that_come_at_once_with_a_key_gets_the_job(jobs: Jobs) -> None:
    accepted: list[str] = []

    def accept() -> None:
        accepted.append(jobs.accept(Ticket(new_job_id(), "somebody", asynchronous=True), [make_task()], "key", "print"))

    threads = [threading.Thread(target=accept) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(accepted) == 16
    assert len(set(accepted)) == 1


def test_a_job_of_several_images_is_known_by_its_key_until_one_of_them_is_lost(jobs: Jobs) -> None:
    tasks = [make_task(seed=seed) for seed in (1, 2)]
    ticket = Ticket("a1", "somebody", asynchronous=True)
    again = replace(ticket, job_id="b2")
    assert jobs.accept(ticket, tasks, "key", "print") == "a1"
    assert [record.task.seed for record in jobs.get("a1")] == [1, 2]
    for index in (0, 1):
        assert jobs.accept(again, tasks, "key", "print") == "a1"
        jobs.begin(replace(ticket, index=index), tasks[index], 0)
        jobs.end(replace(ticket, index=index), PICTURE)
    assert jobs.accept(again, tasks, "key", "print") == "a1"
    other = replace(ticket, job_id="c3")
    jobs.accept(other, tasks, "other key", "print")
    jobs.begin(other, tasks[0], 0)
    jobs.end(other, GenerationFailed("broken"))
    assert jobs.accept(again, tasks, "other key", "print") == "b2"


def test_more_asynchronous_jobs_than_may_wait_are_refused(jobs: Jobs) -> None:
    for number in range(MAX_ASYNCHRONOUS_JOBS):
        jobs.accept(Ticket(f"job {number}", "somebody", asynchronous=True), [make_task()], None, "")
    with pytest.raises(TooManyJobs) as refusal:
        jobs.accept(ASYNCHRONOUS, [make_task()], None, "")
    assert refusal.value.retry_after_s == 1
    jobs.begin(TICKET, make_task(), 0)
    jobs.end(Ticket("job 0", "somebody", asynchronous=True), PICTURE)
    assert jobs.accept(replace(ASYNCHRONOUS, job_id="c3"), [make_task()], None, "") == "c3"


def test_a_refused_caller_is_told_when_a_place_may_be_free(jobs: Jobs) -> None:
    for number in range(MAX_ASYNCHRONOUS_JOBS):
        jobs.accept(Ticket(f"job {number}", "somebody", asynchronous=True), [make_task()], None, "")
    running = Ticket("job 0", "somebody", asynchronous=True)
    jobs.begin(running, make_task(), 0)
    jobs.note({running: Progress(0, 3, 50, 7.2)})
    with pytest.raises(TooManyJobs) as refusal:
        jobs.accept(ASYNCHRONOUS, [make_task()], None, "")
    assert refusal.value.retry_after_s == 7


def test_the_fingerprint_follows_the_request_and_not_the_random_seed(input_picture: Image.Image) -> None:
    task = make_task(image=input_picture)
    path = "/img2img"
    same = fingerprint(path, [task], None)
    assert fingerprint(path, [replace(task, seed=7, image=input_picture.copy())], None) == same
    assert fingerprint(path, [task], 7) != same
    assert fingerprint(path, [task, task], None) != same
    assert fingerprint("/sdapi/v1/img2img", [task], None) != same
    assert fingerprint(path, [replace(task, prompt="another")], None) != same
    assert fingerprint(path, [replace(task, image=input_picture.rotate(90))], None) != same
