"""Servers as processes, and viewers of their live sessions."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import av
import httpx
import numpy as np
from PIL import Image
from websockets.sync.client import connect

from tests.support.paths import ROOT

ONE_STEP = ("--steps", "1")  # fast, and good enough to be told apart
PATIENCE_S = 90.0


@dataclass
class RunningServer:
    """A server.

    Args:
        process: the process, torchrun's if there are several ranks.
        url: of its page.
        log: its lines on stderr so far.
    """

    process: subprocess.Popen[str]
    url: str
    log: list[str]

    @property
    def socket_url(self) -> str:
        return self.url.replace("http", "ws", 1) + "v1/realtime"

    def get(self, path: str, **headers: str) -> httpx.Response:
        """Asks for a path below the page."""
        return httpx.get(self.url + path, headers=headers, timeout=60)

    def delete(self, path: str) -> httpx.Response:
        """Removes what is at a path below the page."""
        return httpx.delete(self.url + path, timeout=60)

    def events(self, name: str) -> list[dict[str, Any]]:
        """The events of this name in its log."""
        told = [json.loads(line) for line in list(self.log) if line.startswith('{"event"')]
        return [event for event in told if event["event"] == name]


@contextmanager
def running_server(folder: Path, *words: str, ranks: int = 1, port: int = 0) -> Iterator[RunningServer]:
    """Starts a server, waits until it listens, and ends it."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)] if ranks > 1 else []
    line = [sys.executable, *launcher, "-m", "causalrope_sp", "serve", "--port", str(port), "--folder", str(folder)]
    process = subprocess.Popen(
        [*line, *words], stderr=subprocess.PIPE, text=True, cwd=ROOT, start_new_session=True, errors="replace"
    )
    log: list[str] = []
    listening = threading.Event()

    def read() -> None:
        assert process.stderr is not None
        for text in process.stderr:
            log.append(text.rstrip("\n"))
            if '"event": "listening"' in text:
                listening.set()
        listening.set()

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    try:
        assert listening.wait(PATIENCE_S), log
        found = [re.search(r'"url": "([^"]+)"', text) for text in log]
        urls = [match[1] for match in found if match]
        assert urls, log
        yield RunningServer(process, urls[0], log)
    except BaseException as error:
        error.add_note("the server's log:\n" + "\n".join(log))
        raise
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGINT)
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        reader.join(10)


@dataclass
class SeenChunk:
    """A chunk as a viewer gets it: its message, and its frames, uint8 (T, H, W, 3)."""

    head: dict[str, Any]
    parts: list[bytes]

    @property
    def frames(self) -> np.ndarray:
        if self.head["mime"] == "image/jpeg":
            return np.stack([np.asarray(Image.open(io.BytesIO(part))) for part in self.parts])
        with av.open(io.BytesIO(b"".join(self.parts)), "r") as file:
            return np.stack([frame.to_ndarray(format="rgb24") for frame in file.decode(video=0)])


@dataclass
class Viewer:
    """A connection to /v1/realtime. Messages that come while another one is awaited are kept."""

    url: str
    headers: dict[str, str] = field(default_factory=dict)
    subprotocols: Any = None
    others: list[dict[str, Any]] = field(default_factory=list)
    chunks: list[SeenChunk] = field(default_factory=list)
    number: int = 0
    _opened: ExitStack = field(default_factory=ExitStack)

    def __enter__(self) -> Self:
        connection = connect(
            self.url, additional_headers=self.headers, subprotocols=self.subprotocols, max_size=None, open_timeout=30
        )
        self.socket = self._opened.enter_context(connection)
        return self

    def __exit__(self, *_: object) -> None:
        self._opened.close()

    def send(self, kind: str, **fields: Any) -> int:
        """Sends a message and returns its number."""
        self.number += 1
        self.socket.send(json.dumps({"type": kind, "id": self.number, **fields}))
        return self.number

    def ask(self, kind: str, **fields: Any) -> dict[str, Any]:
        """Sends a message and returns its answer."""
        return self.answer(self.send(kind, **fields))

    def answer(self, number: int | None) -> dict[str, Any]:
        """Waits for the answer to a message."""
        return self.wait(lambda message: message["type"] in ("ack", "error") and message["id"] == number)

    def wait(self, fits: Any) -> dict[str, Any]:
        """Waits for a message that is no chunk."""
        deadline = time.monotonic() + PATIENCE_S
        while time.monotonic() < deadline:
            for message in self.others:
                if fits(message):
                    self.others.remove(message)
                    return message
            self._read(deadline - time.monotonic())
        raise TimeoutError(str(self.others))

    def next_chunk(self, play: bool = True) -> SeenChunk:
        """Waits for the next chunk, and if wanted tells the server that it has been played."""
        deadline = time.monotonic() + PATIENCE_S
        while not self.chunks:
            self._read(deadline - time.monotonic())
        chunk = self.chunks.pop(0)
        if play:
            self.send("played", sequence=chunk.head["sequence"])
        return chunk

    def read_all(self) -> None:
        """Reads until the connection ends, which raises ConnectionClosed, or nothing comes for 30 s: TimeoutError."""
        while True:
            self.socket.recv(30)

    def _read(self, seconds: float) -> None:
        text = self.socket.recv(seconds)
        assert isinstance(text, str)
        message = json.loads(text)
        if message["type"] != "chunk":
            self.others.append(message)
            return
        parts = [self.socket.recv(seconds) for _ in range(message["parts"])]
        self.chunks.append(SeenChunk(message, [part for part in parts if isinstance(part, bytes)]))


def mean_color(frames: np.ndarray) -> np.ndarray:
    """The mean colour of the pixels that are not dark, (3,); black if all are."""
    pixels = frames.reshape(-1, 3).astype(float)
    bright = pixels[pixels.max(axis=1) > 100]
    return bright.mean(axis=0) if len(bright) else np.zeros(3)
