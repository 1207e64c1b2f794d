"""What the server counts, for Prometheus."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

if TYPE_CHECKING:
    from causalrope_sp.pipeline.output import VideoChunk

SECONDS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50)


class Metrics:
    """The counters of one server.

    Args:
        strategy: of attention, a label of the bytes between ranks.
        fps: pixel frames per second at which videos are played.
        ranks: how many ranks there are.

    Attributes:
        sessions: open live sessions.
        queued_jobs: jobs that are not finished.
        refused: what clients were refused, by code.
    """

    def __init__(self, strategy: str, fps: float, ranks: int) -> None:
        self._registry, self._strategy = CollectorRegistry(), strategy
        own: dict[str, Any] = {"registry": self._registry, "namespace": "causalrope"}
        self.sessions = Gauge("sessions", "Open live sessions", **own)
        self.queued_jobs = Gauge("queued_jobs", "Jobs that are queued or in progress", **own)
        self.refused = Counter("refused", "Messages and requests that were refused", ["code"], **own)
        self._frames = Counter("frames", "Pixel frames that were made", **own)
        self._chunks = Histogram("chunk_seconds", "Time to make a chunk, in seconds", buckets=SECONDS, **own)
        self._first = Histogram(
            "first_frame_seconds", "Time from opening a session to its first frame, in seconds", buckets=SECONDS, **own
        )
        self._rate = Gauge("chunk_fps", "Pixel frames per second of the last chunk", **own)
        self._bytes = Counter("received_bytes", "Bytes that rank 0 received from others", ["strategy", "kind"], **own)
        Gauge("fps", "Pixel frames per second at which videos are played", **own).set(fps)
        Gauge("ranks", "Ranks of the server", **own).set(ranks)

    def count_chunk(self, chunk: VideoChunk, opened: float | None) -> None:
        """Counts a chunk.

        Args:
            chunk: the chunk.
            opened: when its session was opened (`time.monotonic`), for its first chunk; None for others.
        """
        frames = 0 if chunk.frames is None else len(chunk.frames)
        self._frames.inc(frames)
        self._chunks.observe(chunk.timings.total)
        self._rate.set(frames / chunk.timings.total)
        if opened is not None:
            self._first.observe(time.monotonic() - opened)
        for kind, entry in chunk.comm_stats.as_json().items():
            self._bytes.labels(self._strategy, kind).inc(entry["bytes"])

    def as_text(self) -> bytes:
        """Returns all metrics in Prometheus' text format."""
        return generate_latest(self._registry)
