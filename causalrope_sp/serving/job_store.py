"""Jobs on disk: one JSON file each, replaced at once, so that a restart finds every job that was accepted."""

from __future__ import annotations

import json
import logging
import os
import re
import secrets
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from causalrope_sp.errors import OutputError, first_line
from causalrope_sp.serving.event_log import log_event

Status = Literal["queued", "in_progress", "completed", "failed"]

_log = logging.getLogger(__name__)
_ID = re.compile(r"video_[0-9a-f]{24}")


@dataclass(frozen=True)
class Job:
    """A video that was ordered, with the fields of the OpenAI API's video object and how it is made.

    Args:
        id, model, prompt, seconds, size, status, progress, completed_at, error: as in that API; `seconds` and `size`
            are texts, times are Unix seconds, progress is in percent.
        seed: of the noise.
        frames: pixel frames of the video.
        has_image: whether the video begins with an image, which is beside the job's file.
        ordered_ns: when it was ordered, in nanoseconds since 1970, by which jobs are in order.
    """

    id: str
    model: str
    prompt: str
    seconds: str
    size: str
    seed: int
    frames: int
    has_image: bool
    ordered_ns: int
    status: Status = "queued"
    progress: int = 0
    completed_at: int | None = None
    error: dict[str, str] | None = None

    def as_json(self) -> dict[str, Any]:
        """Returns the API's video object."""
        own = asdict(self)
        for name in ("frames", "has_image"):
            del own[name]
        own["created_at"] = own.pop("ordered_ns") // 10**9
        return {"object": "video", "expires_at": None, "remixed_from_video_id": None, **own}


class JobStore:
    """The jobs of a folder. One thread changes them; any may read `jobs`.

    Args:
        folder: the folder, which is made if it does not exist.

    Attributes:
        jobs: all jobs by id, in the order in which they were made.

    Raises:
        OutputError: the folder cannot be made or read.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            for pattern in ("*.part", "video_*.partial*.mp4"):  # of a server that was killed
                for path in folder.glob(pattern):
                    path.unlink()
            found = [job for path in folder.glob("video_*.json") if (job := _read(path)) is not None]
        except OSError as error:
            raise OutputError(f"cannot keep jobs in {folder}: {first_line(error)}") from error
        found.sort(key=lambda job: (job.ordered_ns, job.id))
        self.jobs = {job.id: job for job in found}
        for job in found:
            if job.status == "in_progress":  # the server ended in the middle of it: it is made from its start
                self.change(job, status="queued", progress=0)

    def create(self, image: bytes | None = None, **fields: Any) -> Job:
        """Makes a job.

        Args:
            image: a PNG of the model's size with which the video begins.
            fields: of `Job`.

        Raises:
            OutputError: it cannot be written.
        """
        job = Job(f"video_{secrets.token_hex(12)}", ordered_ns=time.time_ns(), has_image=image is not None, **fields)
        try:
            if image is not None:
                replace_file(self.image(job), image)
            self._write(job)
        except OSError as error:
            raise OutputError(f"cannot keep a job in {self._folder}: {first_line(error)}") from error
        return self._keep(job)

    def change(self, job: Job, **fields: Any) -> Job:
        """Changes fields of a job, and returns it. Where it cannot be written, a restart makes the job again."""
        job = self._keep(replace(job, **fields))
        try:
            self._write(job)
        except OSError as error:
            log_event(_log, "job not written", level=logging.ERROR, job=job.id, error=first_line(error))
        return job

    def remove(self, job: Job) -> None:
        """Removes a job and its files."""
        for path in (self._path(job), self.image(job), self.video(job)):
            path.unlink(missing_ok=True)
        self.jobs = {name: other for name, other in self.jobs.items() if name != job.id}

    def video(self, job: Job) -> Path:
        """Returns where the video of a job is."""
        return self._folder / f"{job.id}.mp4"

    def image(self, job: Job) -> Path:
        """Returns where the image of a job is."""
        return self._folder / f"{job.id}.png"

    def _path(self, job: Job) -> Path:
        return self._folder / f"{job.id}.json"

    def _keep(self, job: Job) -> Job:
        self.jobs = {**self.jobs, job.id: job}  # another thread may be iterating over the former one
        return job

    def _write(self, job: Job) -> None:
        replace_file(self._path(job), json.dumps(asdict(job)).encode())


def replace_file(path: Path, data: bytes) -> None:
    """Writes a file such that there is the old one or the new one at any moment."""
    part = path.with_suffix(".part")
    with open(part, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)


def _read(path: Path) -> Job | None:
    """Reads a job; None for a file that is none."""
    try:
        job = Job(**json.loads(path.read_text()))
        if job.id != path.stem or not _ID.fullmatch(job.id):
            raise ValueError("it has another job's id")
        return job
    except (ValueError, TypeError) as error:
        log_event(_log, "job not read", level=logging.WARNING, file=path.name, error=first_line(error))
        return None
