"""Makes the videos of jobs, one job at a time, in the engine's rotation."""

from __future__ import annotations

import base64
import logging
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from causalrope_sp.errors import CausalRopeError, ConfigError, PromptError, RankLostError
from causalrope_sp.io.video_writer import VideoWriter
from causalrope_sp.serving.event_log import log_event
from causalrope_sp.serving.job_store import Job, JobStore

if TYPE_CHECKING:
    from causalrope_sp.pipeline.session import Session
    from causalrope_sp.serving.engine import Engine
    from causalrope_sp.serving.metrics import Metrics

_log = logging.getLogger(__name__)
UNFINISHED = ("queued", "in_progress")


@dataclass
class _Running:
    """The job that is being made."""

    job: Job
    number: int
    session: Session
    writer: VideoWriter


class JobRunner:
    """A source of the engine that makes the oldest job that waits. The engine's thread alone calls it.

    Args:
        engine: the engine.
        store: the jobs.
        metrics: where it counts.
    """

    def __init__(self, engine: Engine, store: JobStore, metrics: Metrics) -> None:
        self._engine, self._commands, self.store, self._metrics = engine, engine.commands, store, metrics
        self._running: _Running | None = None
        self._count()
        engine.add(self)

    @property
    def waiting(self) -> int:
        """How many jobs are not finished."""
        return sum(job.status in UNFINISHED for job in self.store.jobs.values())

    def create(self, image: bytes | None, fields: dict[str, Any]) -> Job:
        """Queues a job; see `JobStore.create`."""
        job = self.store.create(image, **fields)
        self._count()
        log_event(_log, "job queued", job=job.id, frames=job.frames)
        return job

    def remove(self, name: str) -> bool:
        """Removes a job, also while it is made. Returns whether there was one."""
        job = self.store.jobs.get(name)
        if job is None:
            return False
        if self._running is not None and self._running.job.id == name:
            self._running.writer.discard()
            self._leave()
        self.store.remove(job)
        self._count()
        log_event(_log, "job removed", job=job.id)
        return True

    def needs_chunk(self) -> bool:
        """Whether a job is being made or waits."""
        return self._running is not None or self._next() is not None

    def make_chunk(self) -> None:
        """Makes a chunk of the job in progress, or of the next one; an error ends that job."""
        job = self._next() if self._running is None else self._running.job
        assert job is not None, "it has said that it needs a chunk"
        try:
            self._running = running = self._running or self._begin(job)
            job = running.job
            chunk = self._commands.step(running.number)
            self._metrics.count_chunk(chunk, None)
            assert chunk.frames is not None, "rank 0 has the frames"
            running.writer.write(chunk.frames)
            done = running.writer.frames
            if done < job.frames:
                running.job = self.store.change(job, progress=99 * done // job.frames)
                return
            running.writer.close()
            self._finish(job, status="completed", progress=100)
        except RankLostError:
            raise
        except Exception as error:
            told = isinstance(error, ConfigError | PromptError)  # others name files
            reason = str(error) if told else "the video could not be made: see the server's log"
            log_event(_log, "job failed", job=job.id, error=type(error).__name__, message=str(error))
            if self._running is not None:
                self._running.writer.discard()
            self._finish(job, status="failed", error={"code": "failed", "message": reason})

    def look(self) -> None:
        """Does nothing: jobs do not expire."""

    def keep(self) -> None:
        """Does nothing: jobs are on disk."""

    def end(self, reason: str) -> None:
        """Leaves the job in progress; it is made again after a restart."""
        if self._running is not None:
            self._running.writer.discard()
            self._running = None

    def _next(self) -> Job | None:
        return next((job for job in self.store.jobs.values() if job.status == "queued"), None)

    def _begin(self, job: Job) -> _Running:
        job = self.store.change(job, status="in_progress")
        arguments: dict[str, Any] = {"prompt": job.prompt, "seed": job.seed, "num_frames": job.frames, "kept_chunks": 0}
        if job.has_image:
            arguments["image"] = base64.b64encode(self.store.image(job).read_bytes()).decode()
        number, session = self._commands.open(**arguments)
        pipe = self._commands.pipe
        try:
            writer = VideoWriter(self.store.video(job), pipe.height, pipe.width, pipe.fps)
        except CausalRopeError:
            self._commands.call("close", number)
            raise
        return _Running(job, number, session, writer)

    def _finish(self, job: Job, **fields: Any) -> None:
        self._leave()
        self.store.change(job, completed_at=int(time.time()), **fields)
        self._count()
        log_event(_log, "job finished", job=job.id, status=fields["status"])

    def _leave(self) -> None:
        """Closes the session of the job in progress, if there is one."""
        running, self._running = self._running, None
        if running is not None:
            self._commands.call("close", running.number)

    def _count(self) -> None:
        self._metrics.queued_jobs.set(self.waiting)
