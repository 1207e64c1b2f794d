"""Jobs, ordered with the client of the OpenAI API."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import threading
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import av
import httpx
import numpy as np
import openai
import pytest
from PIL import Image

from causalrope_sp.serving.job_store import JobStore
from tests.support.servers import ONE_STEP, RunningServer, Viewer, mean_color, running_server

RED, GREEN = "a large red circle slides right", "a large green circle slides right"
TOKEN = "a-token-of-enough-characters"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    options = ("--window", "7", "--token", TOKEN, "--max-jobs", "3", "--upload-mib", "1", *ONE_STEP)
    with running_server(tmp_path_factory.mktemp("served"), *options) as server:
        yield server


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # the hosted service ends, not the shape of its API
        yield


@pytest.fixture
def client(server: RunningServer) -> openai.OpenAI:
    return client_of(server)


def client_of(server: RunningServer) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}v1", api_key=TOKEN, max_retries=0, timeout=120)


def order(client: openai.OpenAI, prompt: str = RED, seconds: int = 1, **fields: Any) -> Any:
    """Orders a video of the server's own model and size."""
    return client.videos.create(prompt=prompt, seconds=str(seconds), **fields)  # type: ignore[arg-type]


def finished(client: openai.OpenAI, name: str) -> Any:
    deadline = time.monotonic() + 120
    while (video := client.videos.retrieve(name)).status in ("queued", "in_progress"):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    return video


def frames_of(client: openai.OpenAI, name: str) -> np.ndarray:
    with av.open(io.BytesIO(client.videos.download_content(name).content), "r") as file:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in file.decode(video=0)])


def metrics(server: RunningServer) -> str:
    return server.get("metrics", authorization=f"Bearer {TOKEN}").text


def test_waiting_jobs_are_counted(server: RunningServer, client: openai.OpenAI) -> None:
    names = [order(client).id for _ in range(2)]
    waiting = re.findall(r"\ncausalrope_queued_jobs (\S+)\n", metrics(server))
    assert float(waiting[0]) >= 1
    for name in names:
        finished(client, name)
        client.videos.delete(name)
    assert "\ncausalrope_queued_jobs 0.0\n" in metrics(server)


def test_a_video_is_made_downloaded_and_deleted(client: openai.OpenAI) -> None:
    video = order(client, seconds=2, extra_body={"seed": 3})
    assert (video.object, video.model, video.size, video.seconds) == ("video", "toybox", "64x64", "2")
    done = finished(client, video.id)
    assert (done.status, done.progress, done.error) == ("completed", 100, None)
    assert done.completed_at >= done.created_at
    frames = frames_of(client, video.id)
    assert frames.shape == (32, 64, 64, 3)
    assert mean_color(frames)[0] > mean_color(frames)[1] + 50
    assert client.videos.delete(video.id).deleted is True
    with pytest.raises(openai.NotFoundError):
        client.videos.retrieve(video.id)


def test_videos_are_listed_page_by_page(client: openai.OpenAI) -> None:
    names = [order(client).id for _ in range(3)]
    for name in names:
        finished(client, name)
    assert [video.id for video in client.videos.list(limit=2, order="asc")] == names  # the client turns the pages
    page = client.videos.list(limit=2)
    assert ([video.id for video in page.data], page.has_more) == ([names[2], names[1]], True)
    for name in names:
        client.videos.delete(name)


def test_a_video_begins_with_an_uploaded_picture(client: openai.OpenAI) -> None:
    picture = io.BytesIO()
    scene = np.full((200, 300, 3), (18, 18, 24), np.uint8)
    scene[60:140, 110:190] = (40, 180, 60)  # a green square, cropped to the middle
    Image.fromarray(scene).save(picture, "JPEG")
    video = order(client, GREEN, input_reference=("a.jpg", picture.getvalue(), "image/jpeg"))
    assert finished(client, video.id).status == "completed"
    first, right = frames_of(client, video.id)[0], np.asarray(Image.fromarray(scene[:, 50:250]).resize((64, 64)))
    assert np.abs(first.astype(int) - right).mean() < 15
    client.videos.delete(video.id)


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"prompt": "a pink cat"}, "unknown word 'pink'"),
        ({"model": "sora-2"}, "model must be toybox, which the server has loaded, not 'sora-2'"),
        ({"size": "1280x720"}, "size must be 64x64"),
        ({"seconds": 61}, "seconds must be"),
        ({"extra_body": {"seed": "-1"}}, "seed must be"),
        ({"extra_body": {"path": "/etc/passwd"}}, "a video has no field 'path'"),
        ({"input_reference": ("a.jpg", b"nonsense", "image/jpeg")}, "input_reference must be a picture"),
        ({"extra_body": {"input_reference": "/etc/passwd"}}, "input_reference must be an uploaded file"),
    ],
)
def test_wrong_orders_are_refused(client: openai.OpenAI, fields: dict[str, Any], reason: str) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        order(client, **fields)
    assert reason in refused.value.message


def test_a_picture_with_too_many_pixels_is_refused_by_its_header(client: openai.OpenAI) -> None:
    large = io.BytesIO()
    Image.new("1", (8000, 6000)).save(large, "PNG")
    assert len(large.getvalue()) < 2**20
    with pytest.raises(openai.BadRequestError, match="8000×6000 pixels; expected at most 34 million"):
        order(client, input_reference=("a.png", large.getvalue(), "image/png"))


def test_what_is_not_there_or_not_ready_is_said(client: openai.OpenAI, server: RunningServer) -> None:
    for name in ("video_000000000000000000000000", "..%2f..%2fetc%2fpasswd", "lock"):
        assert server.get(f"v1/videos/{name}/content", authorization=f"Bearer {TOKEN}").status_code == 404
    assert server.get("v1/videos").status_code == 401
    video = order(client, seconds=60)
    with pytest.raises(openai.ConflictError, match="the video is not there: its status is"):
        client.videos.download_content(video.id)
    client.videos.delete(video.id)  # in the middle of it
    with pytest.raises(openai.APIStatusError) as large:
        order(client, input_reference=("a.jpg", bytes(2**20), "image/jpeg"))
    assert large.value.status_code == 413


def test_no_more_jobs_wait_than_allowed_and_a_viewer_has_its_turn(client: openai.OpenAI, server: RunningServer) -> None:
    names = [order(client, seconds=60).id for _ in range(3)]
    with pytest.raises(openai.RateLimitError):
        order(client)
    with Viewer(server.socket_url, {"authorization": f"Bearer {TOKEN}"}) as viewer:
        viewer.ask("open", prompt=RED)
        assert [viewer.next_chunk().head["chunk"] for _ in range(3)] == [0, 1, 2]
        viewer.ask("close")
    assert {client.videos.retrieve(name).status for name in names} == {"in_progress", "queued"}
    for name in names:
        client.videos.delete(name)


def events_of(server: RunningServer, name: str) -> list[tuple[str, dict[str, Any]]]:
    """The server-sent events of a job to their end: kinds and data."""
    url, headers = f"{server.url}v1/videos/{name}/events", {"authorization": f"Bearer {TOKEN}"}
    with httpx.stream("GET", url, headers=headers, timeout=120) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        told = "".join(answer.iter_text()).split("\n\n")
    assert told.pop() == ""
    fields = [dict(line.split(": ", 1) for line in event.splitlines()) for event in told]
    return [(each["event"], json.loads(each["data"])) for each in fields]


def test_progress_is_told_as_events(client: openai.OpenAI, server: RunningServer) -> None:
    first, second = order(client, seconds=20), order(client, seconds=60)
    told = events_of(server, first.id)
    assert [kind for kind, _ in told] == ["progress"] * (len(told) - 1) + ["completed"]
    assert [job["progress"] for _, job in told] == sorted(job["progress"] for _, job in told)
    assert len({job["progress"] for _, job in told}) > 2
    assert told[-1][1] == client.videos.retrieve(first.id).model_dump(exclude_unset=True)
    threading.Timer(0.5, client.videos.delete, (second.id,)).start()
    assert events_of(server, second.id)[-1][0] == "deleted"
    answer = server.get(f"v1/videos/{second.id}/events", authorization=f"Bearer {TOKEN}")
    assert answer.status_code == 404
    client.videos.delete(first.id)


def test_jobs_survive_a_server_that_is_killed(tmp_path: Path) -> None:
    with running_server(tmp_path, "--token", TOKEN, *ONE_STEP) as server:
        client = client_of(server)
        done = finished(client, order(client).id)
        names = [order(client, seconds=20).id, order(client, GREEN).id]
        while client.videos.retrieve(names[0]).progress == 0:
            time.sleep(0.05)
        os.killpg(server.process.pid, signal.SIGKILL)
        server.process.wait()
    with running_server(tmp_path, "--token", TOKEN, *ONE_STEP) as server:
        client = client_of(server)
        assert [video.id for video in client.videos.list(order="asc")] == [done.id, *names]
        assert frames_of(client, done.id).shape[0] == 16
        assert [finished(client, name).status for name in names] == ["completed", "completed"]
        assert [frames_of(client, name).shape[0] for name in names] == [320, 16]
    assert not list((tmp_path / "jobs").glob("*.part*"))


def test_two_servers_do_not_share_a_folder(tmp_path: Path) -> None:
    with (
        running_server(tmp_path, *ONE_STEP),
        pytest.raises(AssertionError, match="another server uses the folder"),
        running_server(tmp_path, *ONE_STEP),
    ):
        pass


def test_a_file_that_is_no_job_is_passed_over(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    store = JobStore(tmp_path)
    job = store.create(model="m", prompt="p", seconds="1", size="64x64", seed=0, frames=16)
    (tmp_path / "video_000000000000000000000000.json").write_text(json.dumps({"id": "../../x"}))
    (tmp_path / "video_000000000000000000000001.json").write_text("{")
    assert JobStore(tmp_path).jobs == {job.id: job}


def test_a_form_that_is_none_is_refused(server: RunningServer) -> None:
    headers = {"authorization": f"Bearer {TOKEN}"}
    for kind, body in (
        ("text/plain", b"x"),
        ("application/json", b"[" * 10**5),
        ("application/json", b"[]"),
        ("multipart/form-data; boundary=x", b"x"),
        ("multipart/form-data", b""),
    ):
        answer = httpx.post(f"{server.url}v1/videos", content=body, headers={**headers, "content-type": kind})
        assert answer.status_code == 400, (kind, answer.text)
        assert answer.json()["error"]["type"] == "invalid_request_error"
