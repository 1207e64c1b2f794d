"""Measures a server on loopback: how many viewers it sustains, how soon a prompt is seen, and what it costs and keeps.

    python benchmarks/serve.py [--model toybox] [--seconds 10] [--opened 1000] [--nonsense 10000] [--most 6]

The viewers play in real time: they tell the server that a chunk is played when it would be, or the server shows it to
them by WebRTC. Gate: the frames that a viewer gets are those of a plain session, to what JPEG loses, and nonsense fails
nothing. The last line is JSON.
"""

from __future__ import annotations

import asyncio
import math
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from printed import finish, print_table

from causalrope_sp import CausalVideoPipeline, VideoChunk
from causalrope_sp.serving.commands import Commands
from causalrope_sp.serving.engine import Engine
from causalrope_sp.serving.live import FlowLimits, LiveSession
from causalrope_sp.serving.metrics import Metrics

sys.path.insert(0, str(Path(__file__).parent.parent))
from tests.support.nonsense import send_messages, send_requests
from tests.support.rtc import rtc_viewer
from tests.support.servers import RunningServer, Viewer, running_server

PROMPTS = ("a red circle slides right", "a green square bounces")
FILLED = 7  # chunks after which toybox's window is full


def check(url: str, model: str) -> None:
    pipe = CausalVideoPipeline.from_pretrained(model)
    with Viewer(url) as viewer, pipe.open(PROMPTS[0], seed=3) as alone:
        viewer.ask("open", prompt=PROMPTS[0], seed=3, media="jpeg")
        for _ in range(3):
            apart = np.abs(viewer.next_chunk().frames.astype(int) - alone.step().frames).mean()
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
            chunk = viewer.next_chunk(play=False)
            begun = until = now = time.perf_counter()
            sent, number, awaited = 0.0, 0, None
            while now < begun + self.seconds:
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
                chunk = viewer.next_chunk(play=False)
                now = time.perf_counter()
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


def overhead(server: RunningServer, model: str, media: str, rounds: int, chunks: int) -> dict[str, float]:
    """Seconds of the processor for a chunk, the least of the rounds, which other work disturbs the least: of a session
    in this process, alone and as a live one beyond that; and with a viewer that plays at once, of the server's thread
    of connections and of those that encode."""
    pipe, found = CausalVideoPipeline.from_pretrained(model), dict[str, list[float]]()
    with Viewer(server.socket_url) as viewer:
        viewer.ask("open", prompt=PROMPTS[0], media=media)
        for _ in range(FILLED):
            viewer.next_chunk()
        for _ in range(rounds):
            viewer.ask("resume")
            begun, used = viewer.next_chunk().head["chunk"], thread_seconds(server.process.pid)
            for _ in range(chunks):
                last = viewer.next_chunk().head["chunk"]
            connections, encoding = beside_engine(server.process.pid, used, last - begun)
            viewer.ask("pause")
            while viewer.chunks:
                viewer.next_chunk()
            time.sleep(0.2)
            plain, beyond = live_session(pipe, chunks)
            parts = {"session": plain, "live": beyond, "connections": connections, "encoding": encoding}
            for name, seconds in parts.items():
                found.setdefault(name, []).append(seconds)
        viewer.ask("close")
    return {name: min(seconds) for name, seconds in found.items()}


def live_session(pipe: CausalVideoPipeline, chunks: int) -> tuple[float, float]:
    """Seconds of the processor that a chunk of a live session takes: to be made, and beyond that."""
    engine, made = Engine(Commands(pipe), lambda error: None), 0.0
    make = engine.commands.step

    def timed(number: int) -> VideoChunk:
        nonlocal made
        begun = time.thread_time()
        chunk = make(number)
        made += time.thread_time() - begun
        return chunk

    engine.commands.step = timed  # type: ignore[method-assign]
    metrics, arguments = Metrics(pipe.strategy, pipe.fps, 1), {"prompt": PROMPTS[0], "history": 4}
    live = LiveSession(engine, FlowLimits(pipe.fps, 60), metrics, lambda live: None, arguments)
    live.attach(lambda item: None)
    for number in range(FILLED + chunks):
        if number == FILLED:
            made, whole = 0.0, time.thread_time()
        live.look()
        assert live.needs_chunk(), "what was made is played at once"
        live.make_chunk()
        live.played(number)
    whole = time.thread_time() - whole
    live.close()
    return made / chunks, (whole - made) / chunks


def thread_seconds(process: int) -> dict[int, float]:
    """Seconds of the processor that each thread of a process has used so far."""
    tasks = Path(f"/proc/{process}/task").iterdir()
    return {int(task.name): int((task / "schedstat").read_text().split()[0]) / 1e9 for task in tasks}


def beside_engine(process: int, used: dict[int, float], chunks: int) -> tuple[float, float]:
    """Seconds of the processor a chunk, since `thread_seconds` said `used`, of a server's thread of connections and of
    its others but for the one that makes chunks, which works most."""
    now = thread_seconds(process)
    more = {thread: (now[thread] - used.get(thread, 0.0)) / chunks for thread in now}
    connections = more.pop(process)
    more.pop(max(more, key=lambda thread: more[thread]))
    return connections, sum(more.values())


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


def nonsense(server: RunningServer, count: int) -> dict[str, Any]:
    """Sends malformed messages and requests beside a viewer, and counts the answers by kind."""
    watching = RealTimeViewer(server.socket_url, math.inf)
    while not watching.frames and watching.thread.is_alive():  # little nonsense is sent faster than a chunk is made
        time.sleep(0.05)
    refused = send_messages(server.socket_url, count // 2)
    answers = send_requests(server.url, count // 2)  # it fails with the first status of 500 or above
    watching.seconds = 0
    watching.thread.join()
    assert watching.frames > 0, "a viewer beside it saw nothing"
    assert server.process.poll() is None, "the server has ended"
    beside = {"frames_beside": watching.frames, "stalled_s": watching.stalled}
    return {"messages_refused": refused, "requests": answers, **beside}


async def rtc_latencies(server: RunningServer, seconds: float, every: int) -> tuple[list[float], int, float]:
    """Seconds from a prompt to its first frame, shown by WebRTC, how many frames were lost, and seconds of the
    processor that the server takes a chunk beside making it."""
    found = list[float]()
    async with rtc_viewer(server.url) as viewer:
        await viewer.ask("open", prompt=PROMPTS[0])
        await viewer.until(lambda: len(viewer.heads) > FILLED)
        begun, number, used = time.perf_counter(), 0, thread_seconds(server.process.pid)
        seen = len(viewer.heads)
        while time.perf_counter() < begun + seconds:
            number, sent = number + 1, time.perf_counter()
            awaited = (await viewer.ask("prompt", prompt=PROMPTS[number % 2]))["prompt_id"]
            await viewer.until(lambda awaited=awaited: viewer.heads[-1]["prompt_id"] >= awaited)
            first = next(head["first_frame"] for head in viewer.heads if head["prompt_id"] >= awaited)
            await viewer.until(lambda first=first: len(viewer.frames) > first)
            found.append(viewer.frames[first][0] - sent)
            announced = len(viewer.heads)
            await viewer.until(lambda announced=announced: len(viewer.heads) >= announced + every)
        cost = sum(beside_engine(server.process.pid, used, len(viewer.heads) - seen))
        shown = sum(head["frames"] for head in viewer.heads[:-4])
        await viewer.ask("close")
        return found, max(0, shown - len(viewer.frames)), cost


@click.command()
@click.option("--model", default="toybox", show_default=True)
@click.option("--seconds", default=10.0, show_default=True, help="Play for so long with each number of viewers.")
@click.option("--opened", default=1000, show_default=True, help="Open and drop so many sessions.")
@click.option("--nonsense", "malformed", default=10_000, show_default=True, help="Send so much nonsense.")
@click.option("--most", default=6, show_default=True, help="Try up to so many viewers.")
@click.option("--rounds", default=9, show_default=True, help="Measure the overhead so many times.")
@click.option("--chunks", default=40, show_default=True, help="Make so many chunks in each of them.")
@click.option("--lead", "leads", multiple=True, default=("1", "0.1"), show_default=True, help="Try these leads, in s.")
def main(
    model: str, seconds: float, opened: int, malformed: int, most: int, rounds: int, chunks: int, leads: tuple[str, ...]
) -> None:
    torch.set_num_threads(1)
    words = ("--model", model, "--max-sessions", str(most + 2), "--grace", "1")
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder, running_server(Path(folder), *words) as server:
        url = server.socket_url
        check(url, model)
        found["sustained"] = sustained(url, seconds, most)
        rows = [(count, f"{100 * share:.1f}", f"{fps:.1f}") for count, share, fps in found["sustained"]]
        print_table(["viewers", "% of time without a frame", "frames a second, the slowest"], rows)
        for media in ("mp4", "jpeg"):
            parts = found[f"processor_s_{media}"] = overhead(server, model, media, rounds, chunks)
            plain, own = parts["session"], parts["live"] + parts["connections"]
            print(
                f"processor time of a chunk as {media}: {1e3 * plain:.1f} ms in a plain session; the server adds "
                f"{100 * own / plain:.1f} %, and encoding {100 * parts['encoding'] / plain:.1f} %\n"
            )
        found["malformed"] = nonsense(server, malformed)
        print(f"malformed: {found['malformed']}\n")
        found["grown_mb"] = kept(server, opened)
        print(f"memory after {opened} sessions: {found['grown_mb']:+.1f} MB\n")
    for lead in leads:
        with (
            tempfile.TemporaryDirectory() as folder,
            running_server(Path(folder), *words, "--lead-seconds", lead) as server,
        ):
            viewer = RealTimeViewer(server.socket_url, max(6, 3 * seconds), prompts_every=3)
            viewer.thread.join()
            shown, lost, cost = asyncio.run(rtc_latencies(server, max(6, 3 * seconds), every=3))
        for carrier, times in (("websocket", sorted(viewer.latencies)), ("webrtc", sorted(shown))):
            p50, p95 = times[len(times) // 2], times[int(0.95 * len(times))]
            found[f"{carrier}_lead_{lead}_s"] = {"p50": p50, "p95": p95, "changes": len(times)}
            print(f"prompt to its frame by {carrier}, lead {lead} s: p50 {p50:.2f} s, p95 {p95:.2f} s of {len(times)}")
        print(f"the server took {1e3 * cost:.1f} ms of the processor a chunk for WebRTC\n")
        found[f"processor_s_webrtc_lead_{lead}_s"] = cost
        found[f"disturbed_lead_{lead}_s"] = {"stalled_s": viewer.stalled, "frames_lost": lost}
    finish("serve", model=model, **found)


if __name__ == "__main__":
    main()
