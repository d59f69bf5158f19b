"""The engine's loop: admit, step, finish, fail, cancel. All torch work of the process happens on its one thread.

`denoiser.py` computes a step, `batching.py` decides which jobs share it. Independent of BentoML and HTTP.
"""

from __future__ import annotations

import logging
import math
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Protocol

import torch

from stable_diffusion.core.errors import DeadlineExceeded, GenerationFailed, ModelUnavailable, QueueFull, ServiceError
from stable_diffusion.core.telemetry import (
    BatchLimitRecord,
    DecodedAgainRecord,
    EndRecord,
    LorasRecord,
    Outcome,
    OutOfMemoryRecord,
    Record,
    RefusalRecord,
    StartRecord,
    StepRecord,
    SubmitRecord,
    TurnRecord,
    WorkloadRecord,
)
from stable_diffusion.core.types import GeneratedImage, Progress, Task
from stable_diffusion.engine.admission import NO_LIMITS, QueueLimits, Workload
from stable_diffusion.engine.batching import Batching
from stable_diffusion.engine.decoding import count_to_decode
from stable_diffusion.engine.job import Job, Latents
from stable_diffusion.engine.lora_store import Claim
from stable_diffusion.engine.watchdog import Watchdog

logger = logging.getLogger("stable_diffusion")


_POLL_INTERVAL_S = 0.005


class Steps(Protocol):
    """The part of a denoiser that the engine uses."""

    @property
    def execution(self) -> str: ...
    @property
    def decode_counts(self) -> Mapping[int, float]: ...
    def can_prepare(self, job: Job) -> bool: ...
    def prepare(self, task: Task, claim: Claim | None = None) -> Latents: ...
    def predict(self, jobs: Sequence[Job]) -> list[torch.Tensor]: ...
    def advance(self, job: Job, predicted: torch.Tensor) -> None: ...
    def decode_together(self, jobs: Sequence[Job]) -> Sequence[GeneratedImage | Exception]: ...
    def loras_held(self) -> tuple[int, int]: ...


@dataclass(frozen=True)
class _Submit:
    job: Job


@dataclass(frozen=True)
class _Cancel:
    job: Job


class _Stop:
    pass


class Engine:
    """Runs many jobs at once. `submit` and `cancel` may be called from any thread and return immediately."""

    def __init__(
        self,
        load: Callable[[], Steps],
        max_batch_size: int,
        on_step: Callable[[StepRecord], None] | None = None,
        batch_limit_for: Callable[[tuple[int, int]], int] | None = None,
        on_record: Callable[[Record], None] | None = None,
        limits: QueueLimits = NO_LIMITS,
        watchdog: Watchdog | None = None,
    ) -> None:
        """Start the thread and load the model on it. Returns when the model is loaded; raises what loading raised.

        `max_batch_size`: how many jobs may share a UNet call. `batch_limit_for`: how many of one batch key, if fewer.
        `on_step` (each UNet call), `batch_limit_for` and `on_record` (all other records) are called on the engine's thread, except for
        records about a submission. They must not raise.
        `limits`: how much work is accepted. `watchdog`: ends the process when a turn hangs or the device has failed for good.
        """
        self._load = load
        self._batching: Batching[Job] = Batching(max_batch_size, batch_limit_for)
        self._workload = Workload(limits, self._batching.batch_limit)
        self._watchdog = watchdog
        self._to_decode: deque[Job] = deque()
        self._native_pixels = 1  # of the size for which decoding was measured
        self._encoding_is_due = False  # an image waits to be encoded, because one was decoded in the last turn
        self._inbox: queue.SimpleQueue[_Submit | _Cancel | _Stop] = queue.SimpleQueue()
        self._on_step = on_step
        self._on_record = on_record
        self._loaded = threading.Event()
        self._load_error: BaseException | None = None
        self._stopping = False
        self._is_waiting = False  # all jobs wait for LoRAs that are being loaded
        self._turn_seconds: float | None = None
        self._loras_held = (0, 0)
        self._between_steps_s = 0.0  # of turns that took no step but decoded an image
        # A second thread with OpenMP would make every step twice as slow on a CPU, so this thread also loads the model.
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()
        self._loaded.wait()
        if self._load_error is not None:
            raise self._load_error

    def submit(
        self,
        task: Task,
        on_end: Callable[[GeneratedImage | ServiceError], None],
        on_progress: Callable[[Progress], None] | None = None,
        *,
        owner: str = "",
        timeout_s: float = math.inf,
    ) -> Job:
        """Queue a task. `on_end` is called once, on the engine's thread, with the image or the error, unless the job is cancelled.

        Before that, `on_progress` is called on the same thread whenever the job's position or step has changed. It must not raise.
        Owners get equal shares of the device. `timeout_s`: the time until the image must be finished.
        Raises QueueFull or DeadlineExceeded if the job is not accepted.
        """
        if not self._thread.is_alive():
            raise GenerationFailed("the engine has been stopped")
        job = Job(task, on_end, on_progress, owner, time.perf_counter() + timeout_s)
        try:
            self._workload.take(job, timeout_s)
        except QueueFull:
            self._emit(RefusalRecord("queue_full"))
            raise
        except DeadlineExceeded:
            self._emit(RefusalRecord("deadline_exceeded"))
            raise
        self._emit(SubmitRecord())
        self._inbox.put(_Submit(job))
        return job

    def assume_step(self, height: int, width: int, seconds: float) -> None:
        """Set the model's native size, and the expected time of a one-job step of it until steps have been measured."""
        self._native_pixels = height * width
        self._workload.note_step((height, width), 1, seconds)
        self._emit_workload()

    def cancel(self, job: Job) -> None:
        """Drop a job before its next step. Does nothing if the job has ended. `on_end` is no longer called."""
        self._inbox.put(_Cancel(job))

    def close(self) -> None:
        """Stop the thread after the current step. Unfinished jobs fail."""
        self._inbox.put(_Stop())
        self._thread.join()

    def _emit(self, record: Record) -> None:
        if self._on_record is not None:
            self._on_record(record)

    # --- everything below runs on the engine's thread ------------------------------------------------

    def _run(self) -> None:
        try:
            self._denoiser = self._load()
        except BaseException as error:
            self._load_error = error
            return
        finally:
            self._loaded.set()
        while not self._stopping:
            try:
                self._turn()
            except torch.AcceleratorError:
                logger.critical("The device has failed and does not recover until this process ends.", exc_info=True)
                self._give_up(ModelUnavailable("the model process has failed and restarts; try again in a minute"))
                if self._watchdog is not None:
                    self._watchdog.end_process()
            except Exception:
                # A defect in the loop itself. Waiting clients get an error, and the engine still works for the next job.
                logger.exception("The engine failed outside of any job; all its jobs fail.")
                self._fail_all(GenerationFailed("the engine failed before this image was finished"))
        self._give_up(GenerationFailed("the engine was stopped before this image was finished"))

    def _give_up(self, error: ServiceError) -> None:
        """Fail all jobs, including those submitted during the last turn and not yet read."""
        while not self._inbox.empty():
            self._receive(self._inbox.get())
        self._fail_all(error)

    def _turn(self) -> None:
        """Read the inbox, drop late jobs, decode images for no longer than a step takes, or one; take one step."""
        self._read_inbox()
        began = time.perf_counter()
        self._drop_late_jobs(began)
        jobs, batch_limit = self._batching.next_turn()
        # In a turn, others wait for a decoding or for an encoding, not for both.
        decoding = [] if self._encoding_is_due else self._next_to_decode(jobs[:batch_limit])
        with self._watching(jobs[:batch_limit], decoding):
            if decoding:
                self._decode(decoding)
            batch = self._prepared(jobs, batch_limit, is_after_decoding=bool(decoding))
            self._is_waiting = not batch and not self._to_decode
            if batch:
                self._step(batch)
        self._note_turn(batch, time.perf_counter() - began)
        self._report_progress()
        self._emit_workload()
        if (held := self._denoiser.loras_held()) != self._loras_held:
            self._loras_held = held
            self._emit(LorasRecord(*held))

    def _emit_workload(self) -> None:
        self._emit(WorkloadRecord(self._workload.seconds(), self._workload.pixel_steps_per_s()))

    def _next_to_decode(self, batch: list[Job]) -> list[Job]:
        """The finished jobs to decode before the step of `batch`: one or, in one call, several of one size, if others do not wait long."""
        if not self._to_decode:
            return []
        key = self._to_decode[0].batch_key
        same = [job for job in self._to_decode if job.batch_key == key]
        most_s = self._workload.step_seconds(batch[0].batch_key, len(batch)) if batch else None
        count = count_to_decode(self._denoiser.decode_counts, len(same), key[0] * key[1] / self._native_pixels, most_s)
        return same[:count]

    def _watching(self, batch: list[Job], decoding: list[Job]) -> AbstractContextManager[None]:
        """Watch the decoding of images and the step of `batch`. Decoding takes about as long as one or a few steps of its size."""
        if self._watchdog is None:
            return nullcontext()
        decoding_s = [self._workload.step_seconds(job.batch_key, len(decoding)) for job in decoding[:1]]
        stepping_s = [self._workload.step_seconds(job.batch_key, len(batch)) for job in batch[:1]]
        return self._watchdog.watching(sum(decoding_s + stepping_s))

    def _note_turn(self, batch: list[Job], seconds: float) -> None:
        """Update the moving means. The time for decoding and preparing other jobs counts as part of a step."""
        if not batch:
            self._between_steps_s += seconds
            return
        seconds, self._between_steps_s = seconds + self._between_steps_s, 0.0
        self._workload.note_step(batch[0].batch_key, len(batch), seconds)
        self._turn_seconds = seconds if self._turn_seconds is None else 0.8 * self._turn_seconds + 0.2 * seconds
        self._emit(TurnRecord(seconds))

    def _drop_late_jobs(self, now_s: float) -> None:
        for job in [job for job in (*self._to_decode, *self._batching) if job.deadline_s < now_s]:
            self._fail(job, DeadlineExceeded("the image was not finished within the time that the request allows"))

    def _report_progress(self) -> None:
        if self._turn_seconds is None or all(job.on_progress is None for job in self._batching):
            return
        for standing in self._batching.standings():
            self._report(standing.job, standing.position, self._turn_seconds * standing.batches_left)

    def _report(self, job: Job, position: int, seconds_left: float) -> None:
        """Report where a job stands, once per step, and before its first step once per position in the queue."""
        tensors = job.tensors
        step = 0 if tensors is None else tensors.step_index
        position = 0 if step else position
        if job.on_progress is None or job.reported == (position, step):
            return
        job.reported = position, step
        preview = None if tensors is None else tensors.preview
        job.on_progress(Progress(position, step, step + job.steps_left, seconds_left, preview))

    def _read_inbox(self) -> None:
        """Read all messages. Waits for one only if there is nothing else to do, or briefly while all jobs wait for their LoRAs."""
        is_idle = not self._to_decode and not len(self._batching)
        timeout_s = None if is_idle else _POLL_INTERVAL_S
        is_idle = is_idle or self._is_waiting
        while True:
            try:
                message = self._inbox.get(block=is_idle, timeout=timeout_s)
            except queue.Empty:
                return
            is_idle = False
            self._receive(message)

    def _receive(self, message: _Submit | _Cancel | _Stop) -> None:
        match message:
            case _Submit(job):
                self._batching.add(job)
            case _Cancel(job):
                self._drop(job)
            case _Stop():
                self._stopping = True

    def _prepared(self, jobs: list[Job], batch_limit: int, *, is_after_decoding: bool) -> list[Job]:
        """The first jobs that can take a step and together cost no more than `batch_limit` jobs; at least one.

        New jobs are prepared, but at most one with an image, so that the others do not wait long; after a decoding, which they have waited
        for, it is prepared in the next turn.
        """
        ready: list[Job] = []
        must_wait = is_after_decoding and any(job.tensors is not None for job in jobs)
        encoded_image = must_wait
        self._encoding_is_due = must_wait and any(job.tensors is None and job.task.image is not None for job in jobs[:batch_limit])
        for job in jobs:
            if sum(other.cost for other in ready) >= batch_limit:
                break
            if job.tensors is None:
                try:
                    if not self._denoiser.can_prepare(job) or (job.task.image is not None and encoded_image):
                        continue
                    encoded_image = encoded_image or job.task.image is not None
                    job.tensors = self._denoiser.prepare(job.task, job.claim)
                except Exception as error:
                    self._fail(job, error)
                    continue
            if ready and sum(other.cost for other in ready) + job.cost > batch_limit:
                continue
            ready.append(job)
        return ready

    def _note_starts(self, batch: list[Job]) -> None:
        now = time.perf_counter()
        for job in batch:
            self._batching.note_start(job)
            if job.started_s is None:
                job.started_s = now
                chunks = 1 if job.tensors is None else job.tensors.chunks
                self._emit(StartRecord(now - job.submitted_s, chunks))

    def _step(self, batch: list[Job]) -> None:
        self._note_starts(batch)
        for job, predicted in self._predict(batch):
            try:
                self._denoiser.advance(job, predicted)
            except Exception as error:
                self._fail(job, error)
                continue
            if job.is_denoised:
                self._report(job, 0, 0.0)
                self._batching.remove(job)
                self._to_decode.append(job)

    def _predict(self, batch: list[Job]) -> list[tuple[Job, torch.Tensor]]:
        """One UNet call or, if it fails, one for each half, so that finally only the job that cannot be computed fails.

        A single job that does not fit into memory is tried again, after unused memory is freed.
        """
        predictions: list[tuple[Job, torch.Tensor]] = []
        calls = deque([batch])
        tried_again: set[Job] = set()
        ran_out_together = False
        largest_call = 0
        while calls:
            jobs = calls.popleft()
            predicted = self._call_unet(jobs)
            if not isinstance(predicted, Exception):
                largest_call = max(largest_call, len(jobs))
                predictions += zip(jobs, predicted, strict=True)
                continue
            ran_out = _is_out_of_memory(predicted)
            half = len(jobs) // 2
            if half:
                calls.extendleft((jobs[half:], jobs[:half]))
                ran_out_together = ran_out_together or ran_out
            elif ran_out and jobs[0] not in tried_again:
                tried_again.add(jobs[0])
                calls.appendleft(jobs)
            else:
                self._fail(jobs[0], predicted)
                continue
            if ran_out:
                self._emit(OutOfMemoryRecord())
        if ran_out_together and largest_call:
            height, width = key = batch[0].batch_key
            self._batching.lower_batch_limit(key, largest_call)
            self._emit(BatchLimitRecord(width, height, self._batching.batch_limit(key), len(batch)))
            logger.warning("Out of memory with %d jobs in a step: at most %d of this size from now on.", len(batch), largest_call)
        return predictions

    def _call_unet(self, jobs: list[Job]) -> list[torch.Tensor] | Exception:
        """The jobs' predictions or the error. Raises a device error, after which nothing can be computed."""
        try:
            predicted = self._denoiser.predict(jobs)
        except torch.AcceleratorError:
            raise
        except Exception as error:
            failure = error
        else:
            if self._on_step is not None:
                numbers, rows = tuple(job.number for job in jobs), sum(job.rows for job in jobs)
                rows_with_loras = sum(job.rows for job in jobs if job.tensors is not None and job.tensors.adapters)
                self._on_step(StepRecord(numbers, rows, rows_with_loras, self._denoiser.execution))
            return predicted
        if _is_out_of_memory(failure):
            failure.__traceback__ = None  # it references the call's intermediate tensors
            torch.cuda.empty_cache()  # does nothing without a GPU
        return failure

    def _decode(self, jobs: list[Job]) -> None:
        """The jobs stay in `_to_decode` until they end: if the device fails meanwhile, all of them learn of it."""
        try:
            found = self._denoiser.decode_together(jobs)
        except Exception as error:
            found = [error] * len(jobs)
        for job, image in zip(jobs, found, strict=True):
            if isinstance(image, Exception):
                self._fail(job, image)
                continue
            if image.decoded_again:
                self._emit(DecodedAgainRecord())
            if image.tiled:
                self._emit(OutOfMemoryRecord())
            waited_s = None if job.started_s is None else job.started_s - job.submitted_s
            self._end(job, replace(image, waited_s=waited_s), "flagged" if image.flagged else "completed")

    def _fail(self, job: Job, error: Exception) -> None:
        """End a job with an error. Raises a device error, after which nothing can be computed."""
        if isinstance(error, torch.AcceleratorError):
            raise error
        outcome: Outcome = "deadline_exceeded" if isinstance(error, DeadlineExceeded) else "failed"
        if not isinstance(error, ServiceError):
            logger.error("Job %d failed.", job.number, exc_info=error)
            if _is_out_of_memory(error):
                outcome = "out_of_memory"
                self._emit(OutOfMemoryRecord())
                error = GenerationFailed("the device is out of memory for this image; request a smaller one")
            else:
                error = GenerationFailed("the image could not be generated")
        self._end(job, error, outcome)

    def _drop(self, job: Job) -> None:
        """Remove a cancelled job in any state. Does nothing if it has ended."""
        if job.is_ended:
            return
        done, wanted = (job.tensors.step_index, len(job.tensors.timesteps)) if job.tensors is not None else (0, 0)
        logger.info("Job %d was cancelled after %d of %d steps.", job.number, done, wanted)
        self._leave(job, "cancelled")

    def _leave(self, job: Job, outcome: Outcome) -> None:
        self._batching.remove(job)
        if job in self._to_decode:
            self._to_decode.remove(job)
        self._workload.leave(job)
        job.is_ended = True
        job.tensors = job.claim = None
        generation_s = None if job.started_s is None else time.perf_counter() - job.started_s
        self._emit(EndRecord(job.task.kind, outcome, generation_s))

    def _end(self, job: Job, result: GeneratedImage | ServiceError, outcome: Outcome) -> None:
        self._leave(job, outcome)
        try:
            job.on_end(result)
        except Exception:
            # The receiver is gone, for example a closed event loop. The other jobs go on.
            logger.exception("The outcome of job %d could not be delivered.", job.number)

    def _fail_all(self, error: ServiceError) -> None:
        for job in [*self._to_decode, *self._batching]:
            self._end(job, error, "failed")
        self._emit_workload()


def _is_out_of_memory(error: Exception) -> bool:
    """Whether memory ran out. On a CPU torch has no separate exception class for it."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "DefaultCPUAllocator: can't allocate memory" in str(error)
