"""Measures a server on loopback: how many viewers it sustains, how soon a prompt is seen, and what it costs and keeps.

    python benchmarks/serve.py [--model toybox] [--seconds 10] [--opened 200] [--nonsense 2000] [--most 6]

The viewers play in real time: they tell the server that a chunk is played when it would be. Gate: the frames that a
viewer gets are those of a plain session, to what JPEG loses, and nonsense fails nothing. The last line is JSON.
"""

from __future__ import annotations

import random
import statistics
import string
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import click
import httpx
import numpy as np
import torch
from printed import finish, print_table

from causalrope_sp import CausalVideoPipeline

sys.path.insert(0, str(Path(__file__).parent.parent))
from tests.support.servers import RunningServer, Viewer, running_server

PROMPTS = ("a red circle slides right", "a green square bounces")
FILLED = 7  # chunks after which toybox's window is full


def check(url: str, model: str) -> None:
    pipe = CausalVideoPipeline.from_pretrained(model)
    with Viewer(url) as viewer, pipe.open(PROMPTS[0], seed=3) as alone:
        viewer.ask("open", prompt=PROMPTS[0], seed=3, media="jpeg")
        for _ in range(3):
            apart = np.abs(viewer.next_chunk().frames.astype(int) - alone.step().frames).mean()  # type: ignore[union-attr]
            assert apart < 4, f"a viewer sees something else than a session makes: {apart:.1f} of 255 apart"
        viewer.ask("close")


class RealTimeViewer:
    """Plays a session as a screen does, and adds up the seconds in which it had nothing to play."""

    def __init__(self, url: str, seconds: float, prompts_every: int | None = None) -> None:
        self.url, self.seconds, self.every = url, seconds, prompts_every
        self.stalled, self.frames, self.latencies = 0.0, 0, list[float]()
        self.thread = threading.Thread(target=self._play)
        self.thread.start()

    def _play(self) -> None:
        with Viewer(self.url) as viewer:
            fps = viewer.ask("open", prompt=PROMPTS[0])["fps"]
            for _ in range(FILLED):
                viewer.next_chunk()
            viewer.next_chunk()
            begun = until = time.perf_counter()
            sent, number, awaited = 0.0, 0, None
            while time.perf_counter() < begun + self.seconds:
                chunk = viewer.next_chunk(play=False)
                now = time.perf_counter()
                if awaited is not None and chunk.head["prompt_id"] >= awaited:
                    self.latencies.append(now - sent)
                    awaited = None
                self.stalled += max(0.0, now - until)
                until = max(now, until) + chunk.head["frames"] / fps
                self.frames += chunk.head["frames"]
                number += 1
                if self.every is not None and number % self.every == 0:
                    sent = time.perf_counter()
                    awaited = viewer.ask("prompt", prompt=PROMPTS[number // self.every % 2])["prompt_id"]
                time.sleep(max(0.0, until - time.perf_counter() - 0.001))
                viewer.send("played", sequence=chunk.head["sequence"])
            viewer.ask("close")


def sustained(url: str, seconds: float, most: int) -> list[tuple[int, float, float]]:
    """For 1, 2, ... viewers the largest share of time without a frame and the least frames a second, up to the first
    number of viewers of whom one waits for more than 1 % of the time."""
    rows = []
    for count in range(1, most + 1):
        viewers = [RealTimeViewer(url, seconds) for _ in range(count)]
        for viewer in viewers:
            viewer.thread.join()
        share = max(viewer.stalled for viewer in viewers) / seconds
        rows.append((count, share, min(viewer.frames for viewer in viewers) / seconds))
        if share > 0.01:
            break
    return rows


def overhead(url: str, chunks: int = 80) -> tuple[float, float]:
    """Median seconds from chunk to chunk to a viewer that plays at once, and of those that the session itself took."""
    arrived, own = [], []
    with Viewer(url) as viewer:
        viewer.ask("open", prompt=PROMPTS[0])
        for number in range(FILLED + chunks):
            chunk = viewer.next_chunk()
            if number >= FILLED:
                arrived.append(time.perf_counter())
                own.append(chunk.head["timings"]["total"])
        viewer.ask("close")
    return statistics.median(np.diff(arrived)), statistics.median(own)


def kept(server: RunningServer, opened: int) -> float:
    """MB by which the server has grown after so many sessions that were opened, seen and closed or left."""
    for number in range(20 + opened):
        if number == 20:
            before = resident(server.process.pid)
        with Viewer(server.socket_url) as viewer:
            answer = viewer.ask("open", prompt=PROMPTS[number % 2], seed=number)
            while answer["type"] == "error":  # those that were left are there for the grace
                time.sleep(0.1)
                answer = viewer.ask("open", prompt=PROMPTS[number % 2], seed=number)
            viewer.next_chunk()
            if number % 4:
                viewer.ask("close")
    while "causalrope_sessions 0.0" not in server.get("metrics").text:
        time.sleep(0.1)
    return resident(server.process.pid) - before


def resident(process: int) -> float:
    """MB of memory that a process has."""
    line = next(x for x in Path(f"/proc/{process}/status").read_text().splitlines() if x.startswith("VmRSS"))
    return int(line.split()[1]) / 1000


def nonsense(server: RunningServer, count: int) -> dict[str, int]:
    """Sends malformed messages and requests beside a viewer, and counts the answers by kind."""
    numbers, seen = random.Random(0), dict[str, int]()
    watching = RealTimeViewer(server.socket_url, 5.0)
    with httpx.Client(base_url=server.url, timeout=60) as client:
        for _ in range(count // 20):
            with Viewer(server.socket_url) as viewer:
                for _ in range(10):
                    viewer.socket.send(noise_message(numbers))
                    viewer.wait(lambda message: message["type"] == "error")
            seen["message refused"] = seen.get("message refused", 0) + 10
            for _ in range(10):
                method, path, body = noise_request(numbers)
                kind = f"status {client.request(method, path, content=body).status_code}"
                seen[kind] = seen.get(kind, 0) + 1
    watching.thread.join()
    assert not any(kind >= "status 5" for kind in seen if kind.startswith("status")), f"the server failed: {seen}"
    assert watching.frames > 0, "a viewer beside it saw nothing"
    return {**seen, "chunks beside": watching.frames}


def noise_message(numbers: random.Random) -> str:
    kinds = ["open", "prompt", "seek", "pause", "", "\\ud800", "close"]
    text = "".join(numbers.choices(string.printable, k=numbers.randrange(40)))
    shapes = [
        '{"type": "%s", "chunk": %d}',
        '{"type": "%s", "prompt": {"x": %d}}',
        '["%s", %d]',
        '{"type": "%s", "a": 1e%d',
    ]
    shape = numbers.choice(shapes) % (numbers.choice(kinds), numbers.randrange(-9, 10**9))
    return numbers.choice([text, shape])


def noise_request(numbers: random.Random) -> tuple[str, str, bytes]:
    name = "".join(numbers.choices(string.ascii_letters + "%./_-", k=numbers.randrange(1, 30)))
    path = numbers.choice(["v1/videos", f"v1/videos/{name}", f"v1/sessions/{name}", name, f"v1/videos/{name}/content"])
    body = numbers.randbytes(numbers.randrange(100))
    return numbers.choice(["GET", "POST", "DELETE", "PUT", "PATCH", "OPTIONS"]), path, body


@click.command()
@click.option("--model", default="toybox", show_default=True)
@click.option("--seconds", default=10.0, show_default=True, help="Play for so long with each number of viewers.")
@click.option("--opened", default=200, show_default=True, help="Open and drop so many sessions.")
@click.option("--nonsense", "malformed", default=2000, show_default=True, help="Send so much nonsense.")
@click.option("--most", default=6, show_default=True, help="Try up to so many viewers.")
def main(model: str, seconds: float, opened: int, malformed: int, most: int) -> None:
    torch.set_num_threads(1)
    words = ("--model", model, "--max-sessions", str(most + 2), "--grace", "1")
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder, running_server(Path(folder), *words) as server:
        url = server.socket_url
        check(url, model)
        found["sustained"] = sustained(url, seconds, most)
        rows = [(count, f"{100 * share:.1f}", f"{fps:.1f}") for count, share, fps in found["sustained"]]
        print_table(["viewers", "% of time without a frame", "frames a second, the slowest"], rows)
        served, own = found["served_s"], found["own_s"] = overhead(url)
        print(f"a chunk: {1e3 * served:.1f} ms served, of which the session {1e3 * own:.1f} ms\n")
        found["malformed"] = nonsense(server, malformed)
        print(f"malformed: {found['malformed']}\n")
        found["grown_mb"] = kept(server, opened)
        print(f"memory after {opened} sessions: {found['grown_mb']:+.1f} MB\n")
    for lead in ("1", "0.1"):
        with (
            tempfile.TemporaryDirectory() as folder,
            running_server(Path(folder), *words, "--lead-seconds", lead) as server,
        ):
            viewer = RealTimeViewer(server.socket_url, 3 * seconds, prompts_every=3)
            viewer.thread.join()
        times = sorted(viewer.latencies)
        p50, p95 = times[len(times) // 2], times[int(0.95 * len(times))]
        found[f"latency_lead_{lead}_s"] = {"p50": p50, "p95": p95, "changes": len(times), "stalled_s": viewer.stalled}
        print(f"prompt to first frame received, lead {lead} s: p50 {p50:.2f} s, p95 {p95:.2f} s, {len(times)} changes")
    finish("serve", model=model, **found)


if __name__ == "__main__":
    main()
