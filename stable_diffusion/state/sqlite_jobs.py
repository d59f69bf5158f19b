"""The job store of one machine: an SQLite file in the server's shared folder.

Does not know that there are other machines.
"""

from __future__ import annotations

import json
import logging
import sqlite3
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from stable_diffusion.core.errors import (
    GenerationFailed,
    IdempotencyMismatch,
    JobsUnavailable,
    ServiceError,
    TooManyJobs,
    UnknownJob,
)
from stable_diffusion.core.fair_share import share_is_left
from stable_diffusion.core.types import GeneratedImage, ImageFormat, Progress, Task, Ticket
from stable_diffusion.state.job_record import (
    IMAGES_KEPT,
    IMAGES_KEPT_S,
    JobRecord,
    State,
    as_png,
    described,
    key_digest,
    state_of_error,
    task_of,
)
from stable_diffusion.state.jobs import HELD_FOR_S, JOBS_REMEMBERED_S, MAX_ASYNCHRONOUS_JOBS
from stable_diffusion.state.sqlite import transaction

logger = logging.getLogger("stable_diffusion")

_JOBS_REMEMBERED = 10_000
_GIVEN_UP_S = 10
_BUSY_TIMEOUT_S = 5

_SCHEMA = """
CREATE TABLE IF NOT EXISTS jobs (
    id TEXT NOT NULL, image_index INTEGER NOT NULL, owner TEXT NOT NULL, asynchronous INTEGER NOT NULL, task TEXT NOT NULL,
    runner INTEGER, state TEXT NOT NULL, position INTEGER NOT NULL, step INTEGER NOT NULL, steps INTEGER NOT NULL, seconds_left REAL,
    preview BLOB, cancel INTEGER NOT NULL DEFAULT 0, created_at REAL NOT NULL, ended_at REAL, outcome TEXT, picture BLOB,
    fetched INTEGER NOT NULL DEFAULT 0, held_at REAL, image_format TEXT,
    UNIQUE (id, image_index)
);
CREATE INDEX IF NOT EXISTS unfinished ON jobs (owner) WHERE ended_at IS NULL;
CREATE INDEX IF NOT EXISTS to_cancel ON jobs (runner) WHERE cancel = 1;
CREATE INDEX IF NOT EXISTS ended ON jobs (ended_at) WHERE ended_at IS NOT NULL;
CREATE INDEX IF NOT EXISTS kept ON jobs (ended_at) WHERE picture IS NOT NULL;
CREATE TABLE IF NOT EXISTS idempotency_keys (
    key TEXT PRIMARY KEY, fingerprint TEXT NOT NULL, job_id TEXT NOT NULL, created_at REAL NOT NULL
);
"""


class SqliteJobs:
    """Implements state.jobs.Jobs. Processes and threads may use it concurrently; every call opens the file itself.

    Every call raises JobsUnavailable if the file cannot be read or written, and logs the reason.
    """

    def __init__(self, folder: Callable[[], Path]) -> None:
        """`folder` returns the file's folder and creates it on each call, so that a cleanup of temporary folders does not stop jobs."""
        self._folder = folder

    @contextmanager
    def _database(self) -> Iterator[sqlite3.Connection]:
        try:
            file = self._folder() / "jobs.sqlite"
            with transaction(file, _SCHEMA, last_table="idempotency_keys", busy_timeout_s=_BUSY_TIMEOUT_S) as database:
                yield database
        except (OSError, sqlite3.Error) as error:
            logger.error("The job store cannot be read or written: %s", error)
            raise JobsUnavailable("the job store cannot be read or written; images can still be generated synchronously") from None

    def begin(self, ticket: Ticket, task: Task, runner: int) -> None:
        with self._database() as database:
            _insert(database, ticket, task, runner)

    def note(self, notes: Mapping[Ticket, Progress]) -> None:
        values = [
            (
                "queued" if progress.position else "running",
                progress.position,
                progress.step,
                progress.steps,
                progress.seconds_left,
                None if progress.preview is None else as_png(progress.preview),
                ticket.job_id,
                ticket.index,
            )
            for ticket, progress in notes.items()
        ]
        with self._database() as database:
            database.executemany(
                "UPDATE jobs SET state = ?, position = ?, step = ?, steps = ?, seconds_left = ?, preview = coalesce(?, preview)"
                " WHERE id = ? AND image_index = ? AND ended_at IS NULL",
                values,
            )

    def end(self, ticket: Ticket, outcome: GeneratedImage | ServiceError) -> None:
        image = as_png(outcome.image) if isinstance(outcome, GeneratedImage) and ticket.asynchronous else None
        state: State = "completed" if isinstance(outcome, GeneratedImage) else state_of_error(outcome)
        now = time.time()
        with self._database() as database:
            database.execute(
                "UPDATE jobs SET state = ?, step = iif(?, steps, step), outcome = ?, picture = ?, ended_at = ?, position = 0,"
                " seconds_left = 0, preview = NULL WHERE id = ? AND image_index = ? AND ended_at IS NULL",
                (state, state == "completed", json.dumps(outcome.facts()), image, now, ticket.job_id, ticket.index),
            )
            _forget(database, now)

    def to_cancel(self, runner: int) -> list[tuple[str, int]]:
        with self._database() as database:
            rows = database.execute(
                "SELECT id, image_index FROM jobs WHERE runner = ? AND cancel = 1 AND (ended_at IS NULL OR ended_at > ?)",
                (runner, time.time() - _GIVEN_UP_S),
            )
            return [(row["id"], row["image_index"]) for row in rows]

    def register_runner(self, runner: int) -> None:
        with self._database() as database:
            _fail(database, "runner = ?", (runner,))

    def accept(
        self,
        ticket: Ticket,
        tasks: Sequence[Task],
        idempotency_key: str | None,
        fingerprint: str,
        image_format: ImageFormat | None = None,
    ) -> str:
        with self._database() as database:
            database.execute("BEGIN IMMEDIATE")
            key = None if idempotency_key is None else key_digest(ticket.owner, idempotency_key)
            if key is not None and (known := self._known(database, key)) is not None:
                if known["fingerprint"] != fingerprint:
                    raise IdempotencyMismatch("Idempotency-Key: was used for another request", field="Idempotency-Key")
                return str(known["job_id"])
            _fail(database, _UNCLAIMED, (time.time() - HELD_FOR_S,))
            if (unfinished := _too_many_asynchronous(database, ticket.owner)) is not None:
                (soonest,) = database.execute("SELECT min(seconds_left) FROM jobs WHERE ended_at IS NULL AND asynchronous = 1").fetchone()
                raise TooManyJobs(
                    f"{unfinished} jobs with Prefer: respond-async or an Idempotency-Key are unfinished, no more are accepted",
                    retry_after_s=max(1, round(soonest or 1)),
                )
            for index, task in enumerate(tasks):
                _insert(database, replace(ticket, index=index), task, None)
            database.execute("UPDATE jobs SET held_at = ?, image_format = ? WHERE id = ?", (time.time(), image_format, ticket.job_id))
            if key is not None:
                database.execute(
                    "INSERT OR REPLACE INTO idempotency_keys VALUES (?, ?, ?, ?)", (key, fingerprint, ticket.job_id, time.time())
                )
            return ticket.job_id

    def _known(self, database: sqlite3.Connection, key: str) -> sqlite3.Row | None:
        """The job of an idempotency key, unless that job failed, was cancelled or has lost an image: then the key may be used again."""
        row: sqlite3.Row | None = database.execute(
            "SELECT fingerprint, job_id FROM idempotency_keys WHERE key = ?"
            " AND EXISTS (SELECT 1 FROM jobs WHERE id = job_id)"
            " AND NOT EXISTS (SELECT 1 FROM jobs WHERE id = job_id"
            " AND ended_at IS NOT NULL AND (picture IS NULL OR ended_at <= ?))",
            (key, time.time() - IMAGES_KEPT_S),
        ).fetchone()
        return row

    def get(self, job_id: str, owner: str | None = None) -> list[JobRecord]:
        now = time.time()
        find = "SELECT * FROM jobs WHERE id = ? ORDER BY image_index"
        with self._database() as database:
            rows = database.execute(find, (job_id,)).fetchall()
            if any(row["ended_at"] is None and row["runner"] is None and row["held_at"] < now - HELD_FOR_S for row in rows):
                _fail(database, _UNCLAIMED, (now - HELD_FOR_S,))
                rows = database.execute(find, (job_id,)).fetchall()
        if not rows or (owner is not None and any(row["owner"] != owner for row in rows)):
            raise UnknownJob("no such job; finished jobs are deleted after a day, and servers do not share jobs")
        return [_record(row, now) for row in rows]

    def cancel(self, job_id: str) -> None:
        with self._database() as database:
            database.execute("UPDATE jobs SET cancel = 1 WHERE id = ? AND ended_at IS NULL", (job_id,))

    def note_held(self, job_id: str) -> None:
        with self._database() as database:
            database.execute("UPDATE jobs SET held_at = ? WHERE id = ? AND runner IS NULL", (time.time(), job_id))

    def note_fetched(self, job_id: str) -> None:
        with self._database() as database:
            database.execute("UPDATE jobs SET fetched = 1 WHERE id = ? AND fetched = 0", (job_id,))

    def is_to_be_fetched(self, job_id: str) -> bool:
        with self._database() as database:
            return bool(database.execute("SELECT 1 FROM jobs WHERE id = ? AND picture IS NOT NULL AND fetched = 0", (job_id,)).fetchone())

    def of_owner(self, owner: str) -> list[JobRecord]:
        with self._database() as database:
            rows = database.execute("SELECT * FROM jobs WHERE owner = ? AND ended_at IS NULL ORDER BY rowid", (owner,)).fetchall()
        return [_record(row, time.time()) for row in rows]

    def cancel_of_owner(self, owner: str) -> None:
        with self._database() as database:
            database.execute("UPDATE jobs SET cancel = 1 WHERE owner = ? AND ended_at IS NULL", (owner,))

    def abandon(self, job_id: str, error: ServiceError, attempt: int | None = None) -> None:
        with self._database() as database:
            _fail(database, "id = ?", (job_id,), error)
            _forget(database, time.time())


def _too_many_asynchronous(database: sqlite3.Connection, owner: str) -> int | None:
    """The number of unfinished jobs if this owner may add no more, else None. Each owner has its share, up to twice the limit in total."""
    rows = database.execute("SELECT owner, count(*) FROM jobs WHERE ended_at IS NULL AND asynchronous = 1 GROUP BY owner").fetchall()
    counts: dict[str, int] = {row[0]: row[1] for row in rows}
    unfinished = sum(counts.values())
    if unfinished < MAX_ASYNCHRONOUS_JOBS:
        return None
    owners = len(counts.keys() | {owner})
    return None if share_is_left(counts.get(owner, 0), unfinished, owners, MAX_ASYNCHRONOUS_JOBS) else unfinished


def _insert(database: sqlite3.Connection, ticket: Ticket, task: Task, runner: int | None) -> None:
    """Insert a job as queued, or claim for `runner` the job that an API worker has accepted."""
    database.execute(
        "INSERT INTO jobs (id, image_index, owner, asynchronous, task, runner, state, position, step, steps, created_at)"
        " VALUES (?, ?, ?, ?, ?, ?, 'queued', 1, 0, ?, ?) ON CONFLICT DO UPDATE SET runner = excluded.runner",
        (
            ticket.job_id,
            ticket.index,
            ticket.owner,
            ticket.asynchronous,
            described(task),
            runner,
            task.num_inference_steps,
            time.time(),
        ),
    )


_UNCLAIMED = "runner IS NULL AND held_at < ?"


def _fail(database: sqlite3.Connection, which: str, values: tuple[object, ...], error: ServiceError | None = None) -> None:
    error = error or GenerationFailed("the model process stopped before the image was finished")
    database.execute(
        "UPDATE jobs SET state = ?, outcome = ?, ended_at = ?, cancel = 1, position = 0, seconds_left = 0, preview = NULL"
        f" WHERE {which} AND ended_at IS NULL",
        (state_of_error(error), json.dumps(error.facts()), time.time(), *values),
    )


def _forget(database: sqlite3.Connection, now: float) -> None:
    database.execute("UPDATE jobs SET picture = NULL WHERE picture IS NOT NULL AND ended_at < ?", (now - IMAGES_KEPT_S,))
    database.execute(
        "UPDATE jobs SET picture = NULL WHERE rowid IN"
        " (SELECT rowid FROM jobs WHERE picture IS NOT NULL ORDER BY ended_at DESC LIMIT -1 OFFSET ?)",
        (IMAGES_KEPT,),
    )
    database.execute("DELETE FROM jobs WHERE ended_at < ?", (now - JOBS_REMEMBERED_S,))
    database.execute("DELETE FROM jobs WHERE ended_at IS NOT NULL AND rowid <= (SELECT max(rowid) FROM jobs) - ?", (_JOBS_REMEMBERED,))
    database.execute("DELETE FROM idempotency_keys WHERE created_at < ?", (now - JOBS_REMEMBERED_S,))


def _record(row: sqlite3.Row, now: float) -> JobRecord:
    is_too_old = row["ended_at"] is not None and row["ended_at"] < now - IMAGES_KEPT_S
    return JobRecord(
        id=row["id"],
        index=row["image_index"],
        task=task_of(row["task"]),
        asynchronous=bool(row["asynchronous"]),
        state=row["state"],
        progress=Progress(row["position"], row["step"], row["steps"], row["seconds_left"] or 0.0),
        is_estimated=row["seconds_left"] is not None,
        preview_png=row["preview"],
        image_format=row["image_format"],
        created_at=row["created_at"],
        ended_at=row["ended_at"],
        outcome=json.loads(row["outcome"] or "{}"),
        image=None if is_too_old else row["picture"],
    )
