"""Communication statistics: what every collective moved, and how long this rank waited for it.

Elements and bytes are those that one rank *receives* from the others, padding included.
"""

from __future__ import annotations

import threading
from collections import defaultdict, deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from causalrope_sp.devices import recorded_event

KEPT_EVENTS = 4096  # pairs of CUDA events that are kept before those that are over are read
CROSSING = 1 << 20  # the step of `begun` at a collective across the `cfg` axis: more collectives than a pass makes
LAYERLESS = -1  # the layer of collectives outside the layers, such as those of a chunk's latents or the text


@dataclass
class Entry:
    """The sum over some collectives.

    Args:
        calls: how many collectives there were.
        elements: how many numbers this rank received.
        bytes: how many bytes this rank received.
        waited_s: the exposed time in seconds, in which this rank waited and computed nothing.
    """

    calls: int = 0
    elements: int = 0
    bytes: int = 0
    waited_s: float = 0.0

    def __iadd__(self, other: Entry) -> Entry:
        self.calls += other.calls
        self.elements += other.elements
        self.bytes += other.bytes
        self.waited_s += other.waited_s
        return self


@dataclass
class CapturedCollectives:
    """The collectives of a function that was captured in a graph.

    Attributes:
        entries: kind, layer and what one of them receives, in order.
        buffers: the memory that they read and write, which must live as long as the graph.
    """

    entries: list[tuple[str, int, Entry]] = field(default_factory=list)
    buffers: list[Tensor] = field(default_factory=list)


class CommStats:
    """Counts collectives by kind and layer. Any thread may add to it.

    A captured collective is counted at every replay of its graph, when the device reaches the graph. How long it was
    waited for is not measured there.

    Attention has the kinds "qkv", "output", "kv", "q" and "partial", "key sum" of the first keys of a quantized cache,
    and "means" of heads that choose similar frames. Decoding has "halo", "mid" (the decoder's own attention), "pixels",
    "decoder state" (for a saved session) and "to decode" (latents that are sent to decode ranks). The others are
    "guidance", "weights", "text", "latents" and "switch".

    Attributes:
        stored_bytes: the most bytes of module outputs that denoise passes stored for reuse at once.
        head_imbalance: the largest ρ of the streams that ran; see `HeadRings.imbalance`.
    """

    def __init__(self) -> None:
        self.entries: dict[tuple[str, int], Entry] = defaultdict(Entry)
        self._waits: list[tuple[str, int, torch.cuda.Event, torch.cuda.Event]] = []
        self._begun = self.stored_bytes = 0
        self.head_imbalance = 1.0
        self._lock = threading.Lock()
        self._starting: deque[tuple[str, torch.cuda.Event]] = deque()
        self._capturing: tuple[int, CapturedCollectives] | None = None  # in the thread of this number

    def begin(self, kind: str, layer: int, elements: int, like: Tensor) -> None:
        """Counts a collective that is about to start.

        Args:
            kind: the kind of the collective.
            layer: the layer that it belongs to, or `LAYERLESS`.
            elements: how many numbers this rank will receive.
            like: a tensor of the same dtype and device.
        """
        entry = Entry(1, elements, elements * like.element_size())
        captured = self.captured
        if captured is not None:
            captured.entries.append((kind, layer, entry))
        else:
            self._begin([(kind, layer, entry)], like.device)

    @property
    def captured(self) -> CapturedCollectives | None:
        """The collectives of the function that this thread captures now; None if it captures none."""
        capturing = self._capturing
        return capturing[1] if capturing is not None and capturing[0] == threading.get_ident() else None

    @contextmanager
    def capturing(self) -> Iterator[CapturedCollectives]:
        """Collects the collectives that this thread captures in the body, and counts none of them."""
        self._capturing = threading.get_ident(), CapturedCollectives()
        try:
            yield self._capturing[1]
        finally:
            self._capturing = None

    def replay(self, captured: CapturedCollectives, device: torch.device) -> None:
        """Counts the collectives of a graph that is about to be replayed on a device."""
        self._begin(captured.entries, device)

    def _begin(self, entries: list[tuple[str, int, Entry]], device: torch.device) -> None:
        for kind, layer, entry in entries:
            self.add(kind, layer, entry)
        if device.type == "cuda" and entries:
            event = recorded_event(device)
            self._starting.extend((kind, event) for kind, _, _ in entries)
        else:
            for kind, _, _ in entries:
                self.reach(kind)

    @property
    def started(self) -> int:
        """What `begun` will be once the device has reached all collectives that this rank has started."""
        with self._lock:
            count = self._begun
            for kind, _ in self._starting:
                count = _next(count, kind)
        return count

    @property
    def begun(self) -> int:
        """The progress of this rank, in collectives that it has reached since its start; on CUDA, that of its device.

        The ranks along the `cfg` axis may make different numbers of collectives in a step. A collective across that
        axis advances the count to the next multiple of `CROSSING`, so that these ranks are equal again.
        """
        while self._starting and self._starting[0][1].query():
            self.reach(self._starting.popleft()[0])
        return self._begun

    def reach(self, kind: str) -> None:
        """Advances `begun` by a collective that this rank has reached."""
        with self._lock:
            self._begun = _next(self._begun, kind)

    def add(self, kind: str, layer: int, entry: Entry) -> None:
        """Adds an entry to the sum of its kind and layer."""
        with self._lock:
            self.entries[kind, layer] += entry

    def add_wait(self, kind: str, layer: int, began: torch.cuda.Event, ended: torch.cuda.Event) -> None:
        """Adds the time that a CUDA stream waits between two events. It is read later, so that the host never waits."""
        with self._lock:
            self._waits.append((kind, layer, began, ended))
        if len(self._waits) > KEPT_EVENTS:  # `take` is not called: keep only the waits that are not over yet
            self._read_waits()

    def keep(self, stored_bytes: int, head_imbalance: float = 1.0) -> None:
        """Raises `stored_bytes` to at least this many bytes, and `head_imbalance` to at least this ratio."""
        self.stored_bytes = max(self.stored_bytes, stored_bytes)
        self.head_imbalance = max(self.head_imbalance, head_imbalance)

    def include(self, other: CommStats) -> None:
        """Adds the entries of other statistics, and keeps the larger `stored_bytes`."""
        self.keep(other.stored_bytes, other.head_imbalance)
        for (kind, layer), entry in other.entries.items():
            self.add(kind, layer, entry)

    def by_kind(self) -> dict[str, Entry]:
        """Returns the sums over all layers, by kind."""
        sums: dict[str, Entry] = defaultdict(Entry)
        for (kind, _), entry in self.entries.items():
            sums[kind] += entry
        return dict(sums)

    def total(self) -> Entry:
        """Returns the sum over all collectives."""
        total = Entry()
        for entry in self.entries.values():
            total += entry
        return total

    def take(self) -> CommStats:
        """Returns what was counted since the last call, and starts again from zero.

        On CUDA, a wait that is not over yet is counted by the next call.
        """
        self._read_waits()
        taken = CommStats()
        with self._lock:
            taken.entries, self.entries = self.entries, taken.entries
            taken.stored_bytes, self.stored_bytes = self.stored_bytes, 0
            taken.head_imbalance, self.head_imbalance = self.head_imbalance, 1.0
        return taken

    def _read_waits(self) -> None:
        """Adds the waits that are over and keeps the others."""
        with self._lock:
            waits, self._waits = self._waits, []
        for kind, layer, began, ended in waits:
            if ended.query():
                self.add(kind, layer, Entry(waited_s=began.elapsed_time(ended) / 1000))
            else:
                with self._lock:
                    self._waits.append((kind, layer, began, ended))

    def as_json(self) -> dict[str, dict[str, Any]]:
        """Returns the sums by kind in the form of JSON."""
        return {kind: asdict(entry) for kind, entry in sorted(self.by_kind().items())}


def _next(count: int, kind: str) -> int:
    """The count one collective later, or the next multiple of `CROSSING` for one across the `cfg` axis."""
    return (count // CROSSING + 1) * CROSSING if kind == "guidance" else count + 1
