"""/v1/videos: jobs in the shape of the OpenAI API's videos."""

from __future__ import annotations

import asyncio
import io
import json
import re
import time
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Annotated, Any, Literal

from fastapi import APIRouter, Query, Request
from fastapi.responses import FileResponse, StreamingResponse
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException

from causalrope_sp.checks import check_whole, shown
from causalrope_sp.errors import CausalRopeError, ConfigError, InputError, OutputError
from causalrope_sp.io.media_reader import PICTURES, read_picture
from causalrope_sp.pipeline.generation_options import LARGEST_SEED
from causalrope_sp.serving.engine import LOOK_S
from causalrope_sp.serving.jobs import UNFINISHED
from causalrope_sp.serving.messages import LONGEST_PROMPT, check_prompt

if TYPE_CHECKING:
    from causalrope_sp.serving.job_store import Job
    from causalrope_sp.serving.jobs import JobRunner
    from causalrope_sp.serving.server import Server

MOST_SECONDS = 60
SIGN_OF_LIFE_S = 15.0  # between two lines of a stream of events
_BODY: dict[str, Any] = {
    "application/json": {
        "schema": {
            "type": "object",
            "required": ["prompt"],
            "additionalProperties": False,
            "properties": {
                "prompt": {"type": "string", "maxLength": LONGEST_PROMPT},
                "seconds": {"type": ["integer", "string"], "minimum": 1, "maximum": MOST_SECONDS},
                "seed": {"type": ["integer", "string"], "minimum": 0, "maximum": LARGEST_SEED},
                "model": {"type": "string"},
                "size": {"type": "string"},
            },
        }
    }
}
_NOT_STORED = {"Cache-Control": "no-store"}
DEFAULT_SECONDS = 4  # as in that API
FIELDS = ("prompt", "model", "seconds", "size", "seed", "input_reference")


def jobs_router(server: Server, runner: JobRunner) -> APIRouter:
    """Makes the routes.

    Args:
        server: the server.
        runner: of its jobs.
    """
    router = APIRouter(prefix="/v1/videos")

    @router.post("", openapi_extra={"requestBody": {"required": True, "content": _BODY}})
    async def create(request: Request) -> dict[str, Any]:
        try:
            body = await _body(request)
            fields, image = _fields(server, body), await _image(server, body.get("input_reference"))
        except CausalRopeError as error:
            raise HTTPException(400, str(error)) from error
        if runner.waiting >= server.options.max_jobs:
            raise HTTPException(429, f"{server.options.max_jobs} jobs wait, which is the most: try again later")
        try:
            return (await server.call(lambda: runner.create(image, fields))).as_json()
        except OutputError as error:
            raise HTTPException(507, "the server cannot keep any more jobs") from error

    @router.get("")
    async def list_all(
        after: str | None = None,
        limit: Annotated[int, Query(ge=1, le=100)] = 20,
        order: Literal["asc", "desc"] = "desc",
    ) -> dict[str, Any]:
        jobs = list(runner.store.jobs.values())
        jobs = jobs if order == "asc" else jobs[::-1]
        names = [job.id for job in jobs]
        if after is not None:
            jobs = jobs[names.index(after) + 1 :] if after in names else []
        page = [job.as_json() for job in jobs[:limit]]
        ends = {"first_id": page[0]["id"], "last_id": page[-1]["id"]} if page else {"first_id": None, "last_id": None}
        return {"object": "list", "data": page, "has_more": len(jobs) > limit, **ends}

    @router.get("/{name}")
    async def retrieve(name: str) -> dict[str, Any]:
        return _found(runner, name).as_json()

    @router.get("/{name}/content", response_class=FileResponse)
    async def content(name: str, variant: Literal["video"] = "video") -> FileResponse:
        job = _found(runner, name)
        if job.status != "completed":
            raise HTTPException(409, f"the video is not there: its status is {job.status}")
        return FileResponse(runner.store.video(job), media_type="video/mp4", filename=f"{job.id}.mp4")

    @router.get("/{name}/events", response_class=StreamingResponse)
    async def events(name: str) -> StreamingResponse:
        _found(runner, name)
        return StreamingResponse(_events(server, runner, name), media_type="text/event-stream", headers=_NOT_STORED)

    @router.delete("/{name}")
    async def delete(name: str) -> dict[str, Any]:
        if not await server.call(lambda: runner.remove(name)):
            raise HTTPException(404, "there is no video of this id")
        return {"id": name, "object": "video.deleted", "deleted": True}

    return router


async def _events(server: Server, runner: JobRunner, name: str) -> AsyncIterator[str]:
    """Makes server-sent events of a job's changes: `progress` and then `completed`, `failed` or `deleted`."""
    told, told_at = None, time.monotonic()
    while not server.engine.is_stopping:
        job = runner.store.jobs.get(name)
        if job is None:
            yield _event("deleted", {"id": name, "object": "video.deleted", "deleted": True})
            return
        if job != told:
            finished = job.status not in UNFINISHED
            yield _event(job.status if finished else "progress", job.as_json())
            if finished:
                return
            told, told_at = job, time.monotonic()
        elif time.monotonic() > told_at + SIGN_OF_LIFE_S:
            yield ": the job is as it was\n\n"  # a comment, so that a proxy does not take the connection for dead
            told_at = time.monotonic()
        await asyncio.sleep(LOOK_S)


def _event(kind: str, fields: dict[str, Any]) -> str:
    return f"event: {kind}\ndata: {json.dumps(fields)}\n\n"


def _found(runner: JobRunner, name: str) -> Job:
    job = runner.store.jobs.get(name)
    if job is None:
        raise HTTPException(404, "there is no video of this id")
    return job


async def _body(request: Request) -> dict[str, Any]:
    """Reads a body of JSON or of a form.

    Raises:
        ConfigError: it is neither, or has an unknown field.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind == "application/json":
        try:
            body = await request.json()
        except (ValueError, RecursionError):
            raise ConfigError("the body must be a JSON object") from None
        if not isinstance(body, dict):
            raise ConfigError("the body must be a JSON object")
    elif kind in ("multipart/form-data", "application/x-www-form-urlencoded"):
        body = dict(await request.form(max_files=1, max_fields=len(FIELDS)))
    else:
        raise ConfigError(f"the body must be JSON or a form, not {shown(kind)}")
    if unknown := sorted(body.keys() - set(FIELDS)):
        raise ConfigError(f"a video has no field {shown(unknown[0])}; its fields are {', '.join(FIELDS)}")
    return body


def _fields(server: Server, body: dict[str, Any]) -> dict[str, Any]:
    """Checks the fields of a job.

    Raises:
        ConfigError, PromptError: a field is wrong.
    """
    prompt = check_prompt("prompt", body.get("prompt"))
    server.check_prompt(prompt)
    own, size = server.facts["model"], f"{server.pipe.width}x{server.pipe.height}"
    if body.get("model", own) != own:
        raise ConfigError(f"model must be {own}, which the server has loaded, not {shown(body['model'])}")
    if body.get("size", size) != size:
        raise ConfigError(f"size must be {size}, which the server makes, not {shown(body['size'])}")
    seconds = _number("seconds", body.get("seconds", DEFAULT_SECONDS), 1, MOST_SECONDS)
    seed = _number("seed", body.get("seed", 0), 0, LARGEST_SEED)
    frames = max(1, round(seconds * server.pipe.fps))
    return {"prompt": prompt, "model": own, "size": size, "seconds": str(seconds), "seed": seed, "frames": frames}


def _number(name: str, value: object, least: int, most: int) -> int:
    """Checks a whole number that may come as digits."""
    if isinstance(value, str) and re.fullmatch("[0-9]{1,19}", value):
        value = int(value)
    return check_whole(name, value, least, most)


async def _image(server: Server, upload: object) -> bytes | None:
    """Reads an uploaded picture and fits it to the model's size; its size is checked before it is decoded.

    Returns:
        A PNG; None without an upload.

    Raises:
        ConfigError: it is no upload.
        InputError: it is no picture, or too large.
    """
    if upload is None:
        return None
    if not isinstance(upload, UploadFile):
        raise ConfigError("input_reference must be an uploaded file")
    data = await upload.read()
    return await asyncio.to_thread(_fitted, data, server.pipe.height, server.pipe.width)


def _fitted(data: bytes, height: int, width: int) -> bytes:
    from PIL import Image

    Image.init()
    try:
        picture = Image.open(io.BytesIO(data), formats=[kind for kind in PICTURES if kind in Image.OPEN])
    except Exception as error:  # Pillow's decoders raise whatever their format's code does
        raise InputError("input_reference must be a picture of a known kind") from error
    target = io.BytesIO()
    with picture:
        Image.fromarray(read_picture(picture, height, width)).save(target, "PNG")
    return target.getvalue()
